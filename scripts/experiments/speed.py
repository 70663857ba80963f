"""Time of encoder, decoder and network by batch size and way of computing.

    python -m scripts.experiments speed -o build/speed                          # pocket: 10 minutes of one core
    python -m scripts.experiments speed -o build/gpu --shape SDXL --way bfloat16 --batch 1 --batch 4    # on a GPU
    python -m scripts.experiments speed -o build/small --batch 1 --way eager --rounds 1

The ways are float32 as it comes ("eager"), with channels last, through torch.compile, and in half precision. Times are
medians of `--rounds` rounds that take all ways and batches in turn: on a CPU processor time, on a GPU with the device
synchronised. The first call, in which torch.compile compiles and libraries choose kernels, is timed by itself. "error"
is the RMS difference from the first way, relative to its RMS. All shapes but pocket have random weights, so there only
time and memory mean something; LaVie's network is AnimateDiff's, the same construction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from ringmark.inversion.memory import peak_during
from ringmark.inversion.models.loading import load_pipeline
from scripts.experiments.common import Bench, experiment, line
from scripts.experiments.costs import synchronise
from scripts.experiments.shapes import autoencoder

WAYS = ("eager", "channels-last", "compile", "bfloat16", "float16")
TOKENS, FLUX_TOKENS = 77, 512


@dataclass(frozen=True)
class Shape:
    """A model with random weights: diffusers' class and config of its network, and its latents (C, h, w)."""

    kind: str
    config: dict[str, Any]
    latent: tuple[int, int, int]
    frames: int = 1


CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
SHAPES = {
    "SD 1.5": Shape(
        kind="UNet2DConditionModel", config={"sample_size": 64, "cross_attention_dim": 768}, latent=(4, 64, 64)
    ),
    "SD 2.1": Shape(
        kind="UNet2DConditionModel",
        config={"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        latent=(4, 64, 64),
    ),
    "SDXL": Shape(
        kind="UNet2DConditionModel",
        config={
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        latent=(4, 128, 128),
    ),
    "FLUX.1": Shape(kind="FluxTransformer2DModel", config={}, latent=(16, 128, 128)),
    "LaVie": Shape(
        kind="UNetMotionModel",
        config={"cross_attention_dim": 768, "motion_num_attention_heads": 8},
        latent=(4, 40, 64),
        frames=16,
    ),
}


def network_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The network with random weights."""
    import diffusers

    torch.manual_seed(0)
    default, set_dtype = torch.get_default_dtype(), torch.set_default_dtype
    set_dtype(dtype)  # FLUX.1 in float32 would need 48 GB for a moment
    try:
        with device:
            network: nn.Module = getattr(diffusers, shape.kind)(**shape.config)
    finally:
        set_dtype(default)
    return network.requires_grad_(False).eval()


def inputs_of(shape: Shape, number: int, **place: Any) -> dict[str, Tensor]:
    """Random arguments of the network for a batch of this number."""
    random = torch.Generator().manual_seed(number)
    channels, height, width = shape.latent

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random).to(**place)

    if shape.kind == "FluxTransformer2DModel":
        patches = height * width // 4
        return {
            "hidden_states": normal(number, patches, 4 * channels),
            "encoder_hidden_states": normal(number, FLUX_TOKENS, 4096),
            "pooled_projections": normal(number, 768),
            "timestep": torch.full((number,), 0.5).to(**place),
            "img_ids": torch.zeros(patches, 3).to(**place),
            "txt_ids": torch.zeros(FLUX_TOKENS, 3).to(**place),
        }
    frames = (shape.frames,) if shape.frames > 1 else ()
    cross = shape.config["cross_attention_dim"]
    found: dict[str, Any] = {
        "sample": normal(number, channels, *frames, height, width),
        "timestep": torch.full((number,), 500.0).to(**place),
        "encoder_hidden_states": normal(number * shape.frames, TOKENS, cross),
    }
    if "addition_embed_type" in shape.config:
        found["added_cond_kwargs"] = {
            "text_embeds": normal(number, 1280),
            "time_ids": torch.zeros(number, 6).to(**place),
        }
    return found


def pocket_shape(network: nn.Module) -> Shape:
    """pocket's shape, for its inputs."""
    side, channels = network.config.sample_size, network.config.in_channels
    config = {"cross_attention_dim": network.config.cross_attention_dim}
    return Shape(kind="UNet2DConditionModel", config=config, latent=(channels, side, side))


def parts_of(name: str, way: str, device: torch.device) -> dict[str, Callable[[int], Tensor]]:
    """Encoder, decoder and network computed in one way, as functions of the number of pictures."""
    dtype = getattr(torch, way) if way.endswith("16") else torch.float32
    place = {"device": device, "dtype": dtype}
    if name == "pocket":
        pipe = load_pipeline("pocket", text=False, dtype=dtype).to(device)
        vae, network = pipe.vae, pipe.unet
        shape = pocket_shape(network)
        side = 2 ** (len(vae.config.block_out_channels) - 1)
    else:
        shape, side = SHAPES[name], 8
        vae, network = (
            autoencoder(1.0, str(dtype).removeprefix("torch."), str(device)),
            network_of(shape, dtype, device),
        )
    vae.requires_grad_(False)
    if way == "channels-last":
        vae, network = (each.to(memory_format=torch.channels_last) for each in (vae, network))
    channels, height, width = vae.config.latent_channels, *shape.latent[1:]
    encode, decode, predict = vae.encode, vae.decode, network
    if way == "compile":
        encode, decode, predict = map(torch.compile, (encode, decode, network))

    def noise(number: int, *size: int) -> Tensor:
        return torch.randn(number, *size, generator=torch.Generator().manual_seed(0)).to(**place)

    return {
        "encoder": lambda n: encode(noise(n, 3, side * height, side * width)).latent_dist.mode(),
        "decoder": lambda n: decode(noise(n, channels, height, width), return_dict=False)[0],
        "network": lambda n: predict(**inputs_of(shape, n, **place), return_dict=False)[0],
    }


@torch.inference_mode()
def measured(name: str, ways: list[str], batches: list[int], rounds: int, device: torch.device) -> list:
    """The rows of one model."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    rows, works = [], []
    expected: dict[tuple[str, int], Tensor] = {}
    for way in ways:
        for part, work in parts_of(name, way, device).items():
            for number in batches:
                started = clock()
                result, peak = peak_during(device, lambda work=work, number=number: work(number))
                synchronise(device)
                first, result = clock() - started, result.float()
                true = expected.setdefault((part, number), result)
                error = float((result - true).square().mean().sqrt() / true.square().mean().sqrt())
                head = {"model": name, "part": part, "way": way, "batch": number}
                rows.append(head | {"first s": first, "MB": peak, "error": error})
                works.append((work, number))
    taken = []
    for _ in range(rounds):
        taken.append([])
        for work, number in works:
            started = clock()
            work(number)
            synchronise(device)
            taken[-1].append((clock() - started) / number)
    for row, seconds in zip(rows, np.median(taken, 0), strict=True):
        row["ms an image"] = 1000 * float(seconds)
        click.echo(line(row))
    return rows


@experiment(model=False, drawing=False)
@click.option("--shape", "names", type=click.Choice(["pocket", *SHAPES]), multiple=True, default=["pocket"])
@click.option("--way", "ways", type=click.Choice(WAYS), multiple=True, default=WAYS[:4], show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=[1, 8], show_default=True)
@click.option("--rounds", default=9, show_default=True)
def main(bench: Bench, names: tuple, ways: tuple, batches: tuple, rounds: int) -> None:
    """Time an image of encoder, decoder and network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for name in names for row in measured(name, list(ways), list(batches), rounds, device)]
    bench.write(rows, device=str(device), rounds=rounds)
