"""Train data/pocket, the embedded latent diffusion model, from scratch.

    python -m scripts.train_pocket                # everything; about five hours on two cores
    python -m scripts.train_pocket --export-only  # write data/pocket from the checkpoints as they are

Stages: render scenes, autoencoder, latents, diffusion, export. Each can be interrupted at any time and resumes from its
own checkpoint in --work; a batch is a pure function of the seed and the step, so a resumed run gets the same batches as
an uninterrupted one. Sample grids are written next to the checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ringmark.data.scenes import scene

ROOT = Path(__file__).resolve().parents[1]

SEED = 20240918
HELD_OUT = 1_000_000  # first scene seed that is never trained on
CONTEXT = 24  # tokens of a prompt
UNCONDITIONAL = 0.15  # share of training captions replaced by the empty prompt


# -- the modules -----------------------------------------------------------------------------------------------------


def make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[16, 32, 64],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )


def make_unet(text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with merges learned from the captions, so that each of their words is one token."""
    from tokenizers import Tokenizer, models, trainers

    blank = CLIPTokenizer()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = (
        blank.backend_tokenizer.normalizer,
        blank.backend_tokenizer.pre_tokenizer,
    )
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(set(map(chr, range(33, 127))))
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=2048,
            special_tokens=special,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    return CLIPTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], model_max_length=CONTEXT)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# -- a training run that can be killed -------------------------------------------------------------------------------


class Run:
    """Modules, their exponential moving average and AdamW, in one safetensors file that is replaced atomically."""

    def __init__(self, path: Path, modules: dict[str, nn.Module], lr: float) -> None:
        self.path, self.net, self.lr, self.step, self.seconds = path, nn.ModuleDict(modules), lr, 0, 0.0
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.ema = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        if path.exists():
            self._load()

    def _load(self) -> None:
        stored = load_file(self.path)
        self.net.load_state_dict(_part(stored, "net/"))
        self.ema = _part(stored, "ema/")
        self.step, self.seconds = int(stored["step"]), float(stored["seconds"])
        for name, p in self.net.named_parameters():
            self.optimizer.state[p] = {k: stored[f"{k}/{name}"] for k in ("exp_avg", "exp_avg_sq")} | {
                "step": torch.tensor(float(self.step))
            }

    def save(self) -> None:
        flat = {f"net/{k}": v for k, v in self.net.state_dict().items()} | {f"ema/{k}": v for k, v in self.ema.items()}
        for name, p in self.net.named_parameters():
            flat |= {f"{k}/{name}": self.optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}
        flat |= {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        temporary = self.path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in flat.items()}, temporary)
        os.replace(temporary, self.path)

    def averaged(self) -> nn.ModuleDict:
        """The modules with averaged weights; `resume` restores the training weights."""
        self._aside = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.net.load_state_dict(self.ema)
        return self.net.eval()

    def resume(self) -> None:
        self.net.load_state_dict(self._aside)
        self.net.train()

    def train(self, loss: Callable[[int], Tensor], steps: int, picture: Callable[[], None], every: int) -> None:
        """Minimise loss(step) until `steps`: warm-up, then a cosine to 1 % of the rate."""
        bar = tqdm(total=steps, initial=self.step, desc=self.path.stem, unit="step", mininterval=5)
        mean, started = None, time.monotonic()
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", self.lr)
        while self.step < steps:
            rate = min(1.0, (self.step + 1) / 300) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.step / steps)))
            self.optimizer.param_groups[0]["lr"] = self.lr * rate
            value = loss(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(0.9995, (1 + self.step) / (20 + self.step))
            for k, v in self.net.state_dict().items():
                self.ema[k].lerp_(v, 1 - decay) if v.is_floating_point() else self.ema[k].copy_(v)
            mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
            bar.set_postfix_str(f"loss {mean:.5f}", refresh=False)
            bar.update()
            if self.step % every == 0 or self.step == steps:
                self.seconds += time.monotonic() - started
                self.save()
                self.averaged()
                picture()
                self.resume()
                started = time.monotonic()
        bar.close()


def _part(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}


def autocast() -> torch.autocast:
    """bfloat16 if the processor supports it in hardware, which halves the time of a step."""
    fast = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=fast)


def generator(step: int, stage: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + 1_000_003 * stage + step)


# -- stage 1: pictures -----------------------------------------------------------------------------------------------


def _render(seed: int) -> tuple[np.ndarray, str]:
    drawn = scene(seed)
    return drawn.pixels, drawn.caption


def render_scenes(work: Path, count: int) -> tuple[np.ndarray, list[str]]:
    """Scenes 0 … count − 1 as a memory-mapped (count, 128, 128, 3) uint8 array, and their captions."""
    pixels, captions = work / f"scenes-{count}.npy", work / f"scenes-{count}.json"
    if not captions.exists():
        array = np.lib.format.open_memmap(pixels, "w+", np.uint8, (count, 128, 128, 3))
        with get_context("spawn").Pool() as pool:
            texts = []
            for i, (image, text) in enumerate(tqdm(pool.imap(_render, range(count), 64), "scenes", count)):
                array[i] = image
                texts.append(text)
        array.flush()
        captions.write_text(json.dumps(texts))
    return np.load(pixels, mmap_mode="r"), json.loads(captions.read_text())


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) → float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    rows = [torch.cat(list(row), 2) for row in images.split(columns)]
    array = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(path)


# -- stage 2: autoencoder --------------------------------------------------------------------------------------------


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def autoencoder_loss(vae: AutoencoderKL, x: Tensor, rng: torch.Generator) -> Tensor:
    """Squared error + L1 of the gradients + KL + ‖E[zzᵀ] − I‖², for uncorrelated channels of equal scale."""
    with autocast():
        posterior = vae.encode(x).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        z = mean + std * torch.randn(mean.shape, generator=rng)
        decoded = vae.decode(z).sample
    decoded = decoded.float()
    edges = sum(F.l1_loss(a, b) for a, b in zip(differences(decoded), differences(x), strict=True))
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    flat = mean.transpose(0, 1).flatten(1)
    moment = flat @ flat.T / flat.shape[1]
    whitening = (moment - torch.eye(len(moment))).square().mean()
    return F.mse_loss(decoded, x) + 0.05 * edges + 1e-5 * kl + 0.01 * whitening


def train_autoencoder(work: Path, pixels: np.ndarray, steps: int, batch: int) -> Run:
    vae = make_autoencoder()
    run = Run(work / "autoencoder.safetensors", {"vae": vae}, lr=2e-3)
    held_out = to_tensor(np.stack([scene(HELD_OUT + i).pixels for i in range(32)]))

    def loss(step: int) -> Tensor:
        rng = generator(step, 1)
        x = to_tensor(pixels[torch.randint(len(pixels), (batch,), generator=rng).numpy()])
        return autoencoder_loss(vae, x.flip(-1) if step % 2 else x, rng)

    @torch.inference_mode()
    def picture() -> None:
        z = vae.encode(held_out).latent_dist.mean
        decoded = vae.decode(z).sample.clamp(-1, 1)
        psnr = -10 * ((decoded - held_out) / 2).square().mean((1, 2, 3)).log10()
        tqdm.write(
            f"autoencoder step {run.step}: PSNR {psnr.mean():.2f} dB, channel std {z.std((0, 2, 3)).tolist()}",
            file=sys.stderr,
        )
        save_grid(torch.cat([held_out[:8], decoded[:8], held_out[8:16], decoded[8:16]]), 8, work / "autoencoder.png")

    run.train(loss, steps, picture, every=500)
    run.averaged()
    return run


# -- stage 3: latents ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_scenes(work: Path, vae: AutoencoderKL, pixels: np.ndarray, version: str) -> Tensor:
    """Posterior means (2, N, 4, 32, 32) fp16 of all scenes and of their mirror images."""
    path = work / f"latents-{version}.safetensors"
    if not path.exists():
        out = torch.empty((2, len(pixels), 4, 32, 32), dtype=torch.float16)
        for i in tqdm(range(0, len(pixels), 64), "latents"):
            x = to_tensor(pixels[i : i + 64])
            with autocast():
                for side in (0, 1):
                    out[side, i : i + 64] = vae.encode(x.flip(-1) if side else x).latent_dist.mean.half()
        save_file({"latents": out}, path)
    return load_file(path)["latents"]


# -- stage 4: diffusion ----------------------------------------------------------------------------------------------


def diffusion_loss(
    unet: nn.Module, text: nn.Module, z: Tensor, ids: Tensor, alpha_bar: Tensor, rng: torch.Generator
) -> Tensor:
    """ε-prediction, weighted by min(SNR, 5)/SNR (arXiv 2303.09556)."""
    t = torch.randint(len(alpha_bar), (len(z),), generator=rng)
    a = alpha_bar[t].view(-1, 1, 1, 1)
    eps = torch.randn(z.shape, generator=rng)
    with autocast():
        predicted = unet(a.sqrt() * z + (1 - a).sqrt() * eps, t, text(ids).last_hidden_state).sample
    snr = (a / (1 - a)).flatten()
    return ((predicted.float() - eps).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_diffusion(
    work: Path, latents: Tensor, captions: list[str], vae: AutoencoderKL, scale: float, steps: int, batch: int
) -> Run:
    tokenizer = make_tokenizer(captions)
    text = make_text_encoder(tokenizer)
    unet = make_unet(text.config.hidden_size)
    run = Run(work / "diffusion.safetensors", {"unet": unet, "text": text}, lr=8e-4)
    ids, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])[0]
    alpha_bar = make_scheduler().alphas_cumprod
    prompts = [scene(HELD_OUT + i).caption for i in range(24)]

    def loss(step: int) -> Tensor:
        rng = generator(step, 2)
        i = torch.randint(latents.shape[1], (batch,), generator=rng)
        side = torch.randint(2, (batch,), generator=rng)
        dropped = torch.rand(batch, 1, generator=rng) < UNCONDITIONAL
        return diffusion_loss(
            unet, text, latents[side, i].float() * scale, torch.where(dropped, empty, ids[i]), alpha_bar, rng
        )

    def picture() -> None:
        pipe = assemble(vae, unet, text, tokenizer)
        pipe.set_progress_bar_config(disable=True)
        out = pipe(
            prompts,
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
        )
        save_grid(out.images * 2 - 1, 8, work / "diffusion.png")
        tqdm.write(f"diffusion step {run.step}: {work / 'diffusion.png'}", file=sys.stderr)

    run.train(loss, steps, picture, every=500)
    run.averaged()
    return run


# -- stage 5: the folder that ships ----------------------------------------------------------------------------------


def assemble(vae, unet, text, tokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(vae, unet, text, tokenizer, target: Path) -> None:
    """An ordinary diffusers folder with fp16 safetensors."""
    # A new pipeline of half-precision modules; the modules in training stay fp32.
    pipe = assemble(vae, unet, text, tokenizer).to(torch.float16)
    pipe.save_pretrained(target, safe_serialization=True)
    # Half precision is only for storage: without this, transformers would load the text encoder in half precision and
    # diffusers the network in float32.
    config = target / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    for file in target.rglob("*.safetensors"):
        file.chmod(0o644)


@click.command()
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=ROOT / "build" / "pocket",
    show_default=True,
    help="Checkpoints and pictures.",
)
@click.option(
    "--target",
    type=click.Path(path_type=Path),
    default=ROOT / "data" / "pocket",
    show_default=True,
    help="Output folder of the model.",
)
@click.option("--scenes", default=24_000, show_default=True, help="Training scenes.")
@click.option("--autoencoder-steps", default=10_000, show_default=True)
@click.option("--diffusion-steps", default=24_000, show_default=True)
@click.option("--batch", default=16, show_default=True, help="Images per step; twice as many for diffusion.")
@click.option("--export-only", is_flag=True, help="Do not train; export the current checkpoints.")
def main(
    work: Path, target: Path, scenes: int, autoencoder_steps: int, diffusion_steps: int, batch: int, export_only: bool
) -> None:
    """Train the embedded model and write it as a diffusers folder."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    pixels, captions = render_scenes(work, scenes)
    autoencoder = train_autoencoder(work, pixels, 0 if export_only else autoencoder_steps, batch)
    vae = autoencoder.net["vae"]
    latents = encode_scenes(work, vae, pixels, f"{scenes}-{autoencoder.step}")
    vae.register_to_config(scaling_factor=round(1 / float(latents.float().std()), 5))
    diffusion = train_diffusion(
        work, latents, captions, vae, vae.config.scaling_factor, 0 if export_only else diffusion_steps, 2 * batch
    )
    export(vae, diffusion.net["unet"], diffusion.net["text"], make_tokenizer(captions), target)
    times = [
        f"{run.path.stem} {run.step} steps of {n} images in {run.seconds / 60:.0f} minutes"
        for run, n in ((autoencoder, batch), (diffusion, 2 * batch))
    ]
    options = f" --autoencoder-steps {autoencoder.step} --diffusion-steps {diffusion.step}"
    (target / "training.json").write_text(json.dumps({"command": options, "times": "; ".join(times)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
