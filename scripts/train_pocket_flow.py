"""Train data/pocket_flow, the embedded rectified-flow model, on the autoencoder and text encoder of data/pocket.

    python -m scripts.train_pocket_flow                # everything; hours on one core
    python -m scripts.train_pocket_flow --export-only  # write data/pocket_flow from the last checkpoint

Three stages, as in InstaFlow (arXiv 2309.06380), each with its own checkpoint in --work:

1. flow: a network that predicts the velocity v = ε − x0 at z_σ = (1 − σ) x0 + σ ε, warm-started from data/pocket. 2.
reflow: the same loss on the flow's own noise-latent pairs, drawn with guidance, which straightens its paths. 3.
onestep: on the same pairs, ε − v(ε, 1) is trained to match x0, while the rest of the path is preserved.

A resumed run gives the same result as an uninterrupted one: batches and pairs are pure functions of the seed and the
step.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from ringmark.data.files import write_atomic
from ringmark.data.scenes import scene
from ringmark.inversion.models.flow import RectifiedFlowPipeline
from scripts.train_pocket import HELD_OUT, ROOT, Run, encode_scenes, generator, render_scenes, save_grid

POCKET = ROOT / "data" / "pocket"
UNCONDITIONAL = 0.1  # share of training captions replaced by the empty prompt
STAGES = {"flow": 11, "pairs": 12, "reflow": 13, "onestep": 14}  # random streams, distinct from those of train_pocket
TRUSTED = (0.04, 0.85)  # range of σ in which pocket's ε is a better target than a single pair of ε and x0
CHUNK = 32  # pairs per batch of drawing


# -- rectified flow -------------------------------------------------------------------------------------------------


def make_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def mixed_precision() -> torch.autocast:
    """bfloat16 if the processor supports it in hardware."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def predict(unet: nn.Module, z: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
    """The network's prediction (B, C, h, w) in float32."""
    with mixed_precision():
        prediction: Tensor = unet(z, timesteps, states).sample
    return prediction.float()


def velocity(unet: nn.Module, z: Tensor, sigma: Tensor, states: Tensor) -> Tensor:
    """v(z, σ), an estimate of ε − x0; z (B, C, h, w), σ (B,) in [0, 1], states (B, tokens, width)."""
    return predict(unet, z, 1000 * sigma, states)


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def interpolate(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """z_σ = (1 − σ) x0 + σ ε for σ (B,)."""
    return torch.lerp(x0, eps, column(sigma))


def one_step(unet: nn.Module, eps: Tensor, states: Tensor) -> Tensor:
    """x0 = ε − v(ε, 1): the whole path in a single Euler step."""
    return eps - velocity(unet, eps, torch.ones(len(eps)), states)


@torch.no_grad()
def euler(unet: nn.Module, eps: Tensor, states: Tensor, empty: Tensor, steps: int, guidance: float = 1.0) -> Tensor:
    """Latents after Euler steps of equal length from σ = 1 to 0, v = v_∅ + guidance (v_text − v_∅)."""
    z = eps
    for sigma in torch.linspace(1, 1 / steps, steps):
        level = sigma.expand(len(z))
        v = velocity(unet, z, level, states)
        if guidance != 1:
            blank = velocity(unet, z, level, empty.expand_as(states))
            v = blank + guidance * (v - blank)
        z = z - v / steps
    return z


def logit_normal(count: int, rng: torch.Generator) -> Tensor:
    """σ (count,) with standard normal logit (arXiv 2403.03206)."""
    return torch.randn(count, generator=rng).sigmoid()


def both_ends(count: int, rng: torch.Generator, slope: float = 4.0) -> Tensor:
    """σ (count,) with density ∝ e^{aσ} + e^{a(1−σ)}: straight paths are hardest at their ends (arXiv 2405.20320)."""
    near = (torch.rand(count, generator=rng) * math.expm1(slope)).log1p() / slope
    return torch.where(torch.rand(count, generator=rng) < 0.5, near, 1 - near)


def pseudo_huber(error: Tensor, scale: float = 0.1) -> Tensor:
    """Mean over the batch of √(r² + c²) − c, r the root mean square of each sample's error."""
    return ((error.square().mean((1, 2, 3)) + scale**2).sqrt() - scale).mean()


# -- the model of which it starts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pocket:
    """The parts of data/pocket: frozen autoencoder, text encoder and ε-predicting network."""

    vae: AutoencoderKL
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    alpha_bar: Tensor

    @classmethod
    def load(cls, folder: Path) -> Pocket:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        for module in (pipe.vae, pipe.text_encoder, pipe.unet):
            module.requires_grad_(False).eval()
        return cls(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler.alphas_cumprod)

    @torch.inference_mode()
    def states(self, prompts: list[str]) -> Tensor:
        """Text encoder's hidden states (N, tokens, width)."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return torch.cat([self.text(part).last_hidden_state for part in ids.split(256)]).clone()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) timestep at which pocket's noise-to-signal ratio is σ / (1 − σ)."""
        ratio = ((1 - self.alpha_bar) / self.alpha_bar).log().div(2).numpy()
        return torch.from_numpy(np.interp(sigma.logit(1e-6).numpy(), ratio, np.arange(len(ratio)))).float()

    @torch.no_grad()
    def velocity(self, z: Tensor, sigma: Tensor, states: Tensor) -> Tensor:
        """(ε̂ − z) / (1 − σ) = ε̂ − x̂0, with pocket's ε̂ at z scaled to unit variance."""
        norm = (sigma**2 + (1 - sigma) ** 2).sqrt()
        eps = predict(self.unet, z / column(norm), self.timestep(sigma), states)
        return (eps - z) / column(1 - sigma)

    def warm_start(self) -> UNet2DConditionModel:
        """A copy of the network with its time embedding of 1000 σ refitted to the old one of the matching timestep."""
        unet = copy.deepcopy(self.unet).train().requires_grad_(True)
        optimizer = torch.optim.Adam(unet.time_embedding.parameters(), lr=2e-3)
        for step in range(400):
            sigma = torch.rand(256, generator=generator(step, STAGES["flow"]))
            wanted = self.unet.time_embedding(self.unet.time_proj(self.timestep(sigma)))
            loss = (unet.time_embedding(unet.time_proj(1000 * sigma)) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return unet


@dataclass(frozen=True)
class Corpus:
    """Scaled latents of scenes and their mirror images (2, N, C, h, w); states of the captions and the empty prompt."""

    latents: Tensor
    states: Tensor
    empty: Tensor

    def conditions(self, indices: Tensor, rng: torch.Generator) -> Tensor:
        """States (B, tokens, width) of these captions, some replaced by the empty prompt's."""
        dropped = torch.rand(len(indices), 1, 1, generator=rng) < UNCONDITIONAL
        return torch.where(dropped, self.empty, self.states[indices].float())


def load_corpus(work: Path, pocket: Pocket, scenes: int) -> Corpus:
    pixels, captions = render_scenes(work, scenes)
    latents = encode_scenes(work, pocket.vae, pixels, f"{scenes}-pocket")
    return Corpus(
        latents=latents * pocket.vae.config.scaling_factor,
        states=pocket.states(captions).half(),
        empty=pocket.states([""]),
    )


# -- the stages -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Scenes, steps of the three stages, settings of the pairs, latents per step, steps between checkpoints."""

    scenes: int
    flow: int
    reflow: int
    onestep: int
    pairs: int
    pair_steps: int
    guidance: float
    batch: int
    every: int


def flow_loss(unet: nn.Module, pocket: Pocket, corpus: Corpus, batch: int, step: int) -> Tensor:
    """‖v(z_σ, σ) − (ε − x0)‖²; within TRUSTED, pocket's velocity replaces the noisy target."""
    rng = generator(step, STAGES["flow"])
    i = torch.randint(corpus.latents.shape[1], (batch,), generator=rng)
    side = torch.randint(2, (batch,), generator=rng)
    x0, states = corpus.latents[side, i].float(), corpus.conditions(i, rng)
    eps, sigma = torch.randn(x0.shape, generator=rng), logit_normal(batch, rng)
    z, target = interpolate(x0, eps, sigma), eps - x0
    known = (sigma > TRUSTED[0]) & (sigma < TRUSTED[1])
    if known.any():
        target[known] = pocket.velocity(z[known], sigma[known], states[known])
    return (velocity(unet, z, sigma, states) - target).square().mean()


@dataclass(frozen=True)
class Pairs:
    """Noise and the latents that the flow draws from it (N, C, h, w) float16, index of the caption (N,), and time."""

    noise: Tensor
    latents: Tensor
    captions: Tensor
    seconds: float

    def batch(self, corpus: Corpus, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """ε, x0 and text states of `count` pairs drawn with replacement."""
        i = torch.randint(len(self.noise), (count,), generator=rng)
        return self.noise[i].float(), self.latents[i].float(), corpus.conditions(self.captions[i].long(), rng)


def draw_pairs(folder: Path, unet: nn.Module, corpus: Corpus, plan: Plan) -> Pairs:
    """The flow's first noise-latent pairs, in one file per chunk; existing files are reused."""
    folder = folder.with_name(f"{folder.name}-{plan.pair_steps}-{plan.guidance:g}")
    folder.mkdir(exist_ok=True)
    shape, chunks = corpus.latents.shape[2:], []
    for first in tqdm(range(0, plan.pairs, CHUNK), "pairs", mininterval=30):
        path = folder / f"{first:06d}.safetensors"
        if not path.exists():
            started = time.monotonic()
            rng = generator(first, STAGES["pairs"])
            noise = torch.randn(CHUNK, *shape, generator=rng).half()
            captions = torch.randint(len(corpus.states), (CHUNK,), generator=rng)
            z = euler(
                unet, noise.float(), corpus.states[captions].float(), corpus.empty, plan.pair_steps, plan.guidance
            )
            seconds = torch.tensor([time.monotonic() - started])
            drawn = {"noise": noise, "latents": z.half(), "captions": captions.int(), "seconds": seconds}
            save_file(drawn, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        chunks.append(load_file(path))
    parts = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return Pairs(
        noise=parts["noise"][: plan.pairs],
        latents=parts["latents"][: plan.pairs],
        captions=parts["captions"][: plan.pairs],
        seconds=float(parts["seconds"].sum()),
    )


def reflow_loss(unet: nn.Module, pairs: Pairs, corpus: Corpus, batch: int, step: int) -> Tensor:
    """Pseudo-Huber loss of v(z_σ, σ) − (ε − x0) on the flow's own pairs."""
    rng = generator(step, STAGES["reflow"])
    eps, x0, states = pairs.batch(corpus, batch, rng)
    sigma = both_ends(batch, rng)
    return pseudo_huber(velocity(unet, interpolate(x0, eps, sigma), sigma, states) - (eps - x0))


def one_step_loss(unet: nn.Module, pairs: Pairs, corpus: Corpus, batch: int, step: int) -> Tensor:
    """Pseudo-Huber loss of velocity; for three samples in four at σ = 1, where the error is ε − v(ε, 1) − x0.

    The others are anywhere on the path, so that 4 and 25 steps still work. The loss includes differences of the error
    between neighbours, which keep edges sharp.
    """
    rng = generator(step, STAGES["onestep"])
    eps, x0, states = pairs.batch(corpus, batch, rng)
    sigma = torch.where(torch.arange(batch) % 4 < 3, torch.ones(batch), both_ends(batch, rng))
    error = velocity(unet, interpolate(x0, eps, sigma), sigma, states) - (eps - x0)
    edges = pseudo_huber(error.diff(dim=-1)) + pseudo_huber(error.diff(dim=-2))
    return pseudo_huber(error) + 0.25 * edges


def picture_of(run: Run, pocket: Pocket, guidance: float, period: int, last: int) -> Callable[[], None]:
    """Draws a grid of eight held-out captions with 1, 4 and 25 steps at every fifth checkpoint and the last."""
    states = pocket.states([scene(HELD_OUT + i).caption for i in range(8)])
    channels, side = pocket.unet.config.in_channels, pocket.unet.config.sample_size
    noise = torch.randn(8, channels, side, side, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def picture() -> None:
        if run.step % period and run.step != last:
            return
        unet, empty = run.net["unet"], pocket.states([""])
        latents = [euler(unet, noise, states, empty, n, guidance if n > 1 else 1.0) for n in (1, 4, 25)]
        images = [pocket.vae.decode(z / pocket.vae.config.scaling_factor).sample for z in latents]
        path = run.path.with_name(f"{run.path.stem}-{run.step:05d}.png")
        save_grid(torch.cat(images), 8, path)
        tqdm.write(f"{run.path.stem} step {run.step}: {run.seconds / 60:.0f} minutes, {path}", file=sys.stderr)

    return picture


def train(work: Path, pocket: Pocket, corpus: Corpus, plan: Plan) -> tuple[dict[str, Run], Pairs]:
    """Run all stages, each from its checkpoint; the averaged weights of one stage are the start of the next."""
    runs: dict[str, Run] = {}

    def stage(name: str, unet: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float) -> None:
        run = runs[name] = Run(work / f"{name}.safetensors", {"unet": unet}, lr=lr)
        guidance = plan.guidance if name == "flow" else 1.0
        run.train(loss, steps, picture_of(run, pocket, guidance, 5 * plan.every, steps), plan.every)
        run.averaged()

    begun = (work / "flow.safetensors").exists()
    unet = copy.deepcopy(pocket.unet).train().requires_grad_(True) if begun else pocket.warm_start()
    stage("flow", unet, lambda step: flow_loss(unet, pocket, corpus, plan.batch, step), plan.flow, 5e-4)
    pairs = draw_pairs(work / f"pairs-{runs['flow'].step}", unet, corpus, plan)
    straight = copy.deepcopy(unet).train()
    stage("reflow", straight, lambda step: reflow_loss(straight, pairs, corpus, plan.batch, step), plan.reflow, 4e-4)
    final = copy.deepcopy(straight).train()
    stage("onestep", final, lambda step: one_step_loss(final, pairs, corpus, plan.batch, step), plan.onestep, 4e-4)
    return runs, pairs


def latest(work: Path, pocket: Pocket) -> UNet2DConditionModel:
    """The averaged weights of the last stage that has a checkpoint."""
    names = [name for name in ("onestep", "reflow", "flow") if (work / f"{name}.safetensors").exists()]
    if not names:
        raise click.ClickException(f"{work}: no checkpoint")
    run = Run(work / f"{names[0]}.safetensors", {"unet": copy.deepcopy(pocket.unet)}, lr=0.0)
    return run.averaged()["unet"]


# -- the folder that ships ------------------------------------------------------------------------------------------


def export(pocket: Pocket, unet: UNet2DConditionModel, target: Path) -> None:
    """An ordinary diffusers folder with float16 safetensors, read as float32."""
    half = {"vae": pocket.vae, "text_encoder": pocket.text, "unet": unet}
    pipe = RectifiedFlowPipeline(
        **{name: copy.deepcopy(module).half() for name, module in half.items()},
        tokenizer=pocket.tokenizer,
        scheduler=make_flow_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(target, safe_serialization=True)
    for file, old, new in (
        ("text_encoder/config.json", '"float16"', '"float32"'),
        ("model_index.json", "RectifiedFlowPipeline", "StableDiffusionPipeline"),
    ):
        path = target / file
        path.write_text(path.read_text().replace(old, new))
    for path in target.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # the folder of this machine that the part was loaded from
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for weights in target.rglob("*.safetensors"):
        weights.chmod(0o644)


def describe(runs: dict[str, Run], pairs: Pairs, plan: Plan) -> dict[str, str]:
    """Facts about the training for the model card: the command's options and the time of each stage."""
    options = [f"--{name}-steps {run.step}" for name, run in runs.items()]
    options += [f"--scenes {plan.scenes} --batch {plan.batch}"]
    options += [f"--pairs {plan.pairs} --pair-steps {plan.pair_steps} --guidance {plan.guidance:g}"]
    times = [f"{name} {run.step} steps in {run.seconds / 60:.0f} minutes" for name, run in runs.items()]
    times.insert(1, f"{plan.pairs} pairs in {pairs.seconds / 60:.0f} minutes")
    return {"command": " " + " ".join(options), "times": "; ".join(times)}


@click.command()
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=ROOT / "build" / "pocket_flow",
    show_default=True,
    help="Checkpoints, pairs and pictures.",
)
@click.option(
    "--target",
    type=click.Path(path_type=Path),
    default=ROOT / "data" / "pocket_flow",
    show_default=True,
    help="Output folder of the model.",
)
@click.option("--scenes", default=4000, show_default=True, help="Training scenes.")
@click.option("--flow-steps", default=1000, show_default=True)
@click.option("--reflow-steps", default=1000, show_default=True)
@click.option("--onestep-steps", default=1500, show_default=True)
@click.option("--pairs", default=3072, show_default=True, help="Noise-latent pairs for reflow and one step.")
@click.option("--pair-steps", default=12, show_default=True, help="Euler steps per pair.")
@click.option("--guidance", default=2.5, show_default=True, help="Guidance for drawing the pairs.")
@click.option("--batch", default=16, show_default=True, help="Latents per step.")
@click.option("--every", default=50, show_default=True, help="Steps between checkpoints.")
@click.option("--export-only", is_flag=True, help="Do not train; export the last checkpoint.")
def main(
    work: Path,
    target: Path,
    scenes: int,
    flow_steps: int,
    reflow_steps: int,
    onestep_steps: int,
    pairs: int,
    pair_steps: int,
    guidance: float,
    batch: int,
    every: int,
    export_only: bool,
) -> None:
    """Train the embedded rectified-flow model and write it as a diffusers folder."""
    work.mkdir(parents=True, exist_ok=True)
    pocket = Pocket.load(POCKET)
    if export_only:
        export(pocket, latest(work, pocket), target)
        return
    plan = Plan(
        scenes=scenes,
        flow=flow_steps,
        reflow=reflow_steps,
        onestep=onestep_steps,
        pairs=pairs,
        pair_steps=pair_steps,
        guidance=guidance,
        batch=batch,
        every=every,
    )
    runs, drawn = train(work, pocket, load_corpus(work, pocket, scenes), plan)
    export(pocket, runs["onestep"].net["unet"], target)
    write_atomic(target / "training.json", json.dumps(describe(runs, drawn, plan), indent=1) + "\n")


if __name__ == "__main__":
    main()
