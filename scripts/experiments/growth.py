"""Time of a verdict against the size of the picture, and of an audit against the number of pictures.

    python -m scripts.experiments growth -o build/growth                # half an hour of one core, 8 GB
    python -m scripts.experiments growth -o build/small --shape pocket --side 64 --images 4

"parts": one picture through encoder, decoder and network, by the length of its sides. "stages": one picture of the
native size through the stages of a verdict, the time that has passed at the end of each. Both on a model of true shapes
with random weights, loading apart; seconds are processor time, with which other programs interfere little. Every part
runs once, after a small picture as a warm-up, and is kept: an interrupted run resumes.

"images": an audit of so many pictures of noise, 64 x 64, for one key by the encoder's latents of pocket. Memory is what
the process needs beyond its use before the audit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ringmark.data.results import content_id
from ringmark.inversion.decoder import INVERTERS
from ringmark.inversion.memory import peak_during
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.detect.cascade import EARLY, early_stages, stage_name
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.tasks.audit import audit_pictures, find_pictures
from ringmark.watermark.tasks.load import load_model
from scripts.experiments.common import Bench, experiment, kept_tensors, line
from scripts.experiments.shapes import autoencoder
from scripts.experiments.speed import SHAPES, TOKENS, network_of

SMALL, RADII = 64, (1, 6)  # sides of the pictures of an audit, and rings that fit into their latents
WARM = 64
STABLE = "SD 1.5"


def stable_diffusion() -> LatentModel:
    """Stable Diffusion 1.5 with random weights, and zeros for the empty prompt."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    shape = SHAPES[STABLE]
    pipe = StableDiffusionPipeline(
        vae=autoencoder(1.0, "float32", "cpu").to(memory_format=torch.channels_last),
        unet=network_of(shape, torch.float32, torch.device("cpu")),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompt = torch.zeros(1, TOKENS, shape.config["cross_attention_dim"])
    return LatentModel(pipe, name=f"{STABLE}, random weights", empty={"prompt_embeds": prompt})


class Timed:
    """A model whose parts are timed, each once; what is kept of an earlier run is not timed again."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name

    @cached_property
    def model(self) -> LatentModel:
        """The model, warm; loaded only if there is something left to time."""
        model = stable_diffusion() if self.name == STABLE else load_model(self.name, text=False)
        for work in self.works(model, WARM):
            work()
        return model

    def works(self, model: LatentModel, side: int) -> list[Callable[[], Tensor]]:
        """Encoder, decoder and network on one picture of noise."""
        image = self.image(side)
        noise = torch.randn(1, *model.noise_shape((side, side)), generator=torch.Generator().manual_seed(0))
        schedule, nothing = model.schedule(2), model.nothing
        return [
            lambda: model.encode(image),
            lambda: model.decode(noise),
            lambda: model.predict(noise, 1, schedule, nothing)[0],
        ]

    def image(self, side: int) -> Tensor:
        return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(self.bench.seed)) * 2 - 1

    def kept(self, what: object, make: Callable[[], list[float]]) -> list[float]:
        """The seconds that `make` returns, or has returned before."""
        with self.bench.kept() as kept:
            results, name = kept.of("growth", {}), content_id(self.name, what, torch.get_num_threads())
            found = kept_tensors(results, name, lambda: {"s": torch.tensor(make(), dtype=torch.float64)})
        return found["s"].tolist()

    @torch.inference_mode()
    def parts(self, side: int) -> dict:
        """Seconds of each part on a picture with these sides."""
        found = self.kept(side, lambda: [seconds(work) for work in self.works(self.model, side)])
        return {"side": side} | dict(zip(("encoder s", "decoder s", "network s"), found, strict=True))

    def stages(self) -> list[dict]:
        """Seconds until the end of each stage of a verdict on a picture of the native size."""
        found = self.kept("stages", lambda: passed(self.model, self.image(self.model.image_size[0])))
        names = [*map(stage_name, EARLY), "full"]
        return [{"stage": name, "s": taken} for name, taken in zip(names, found, strict=True)]


def seconds(work: Callable[[], object]) -> float:
    """Processor time."""
    started = time.process_time()
    work()
    return time.process_time() - started


def passed(model: LatentModel, image: Tensor) -> list[float]:
    """Processor time from the picture to the noise of each stage, as in `ringmark.watermark.detect.cascade.walk`."""
    whole, started = Recoverer(model), time.process_time()
    stages = [*early_stages(whole), whole]
    encoded, taken = whole.encode(image), []
    for stage in stages:
        stage(image, encoded)
        taken.append(time.process_time() - started)
    return taken


def noise_pictures(folder: Path, number: int, seed: int) -> Path:
    """A folder of small pictures of noise."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(number):
        Image.fromarray(rng.integers(0, 256, (SMALL, SMALL, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def audited(bench: Bench, number: int) -> dict:
    """An audit of this number of pictures."""
    model = bench.model
    key = bench.key(Placement(channels=(0,), radii=RADII), seed=bench.seed)
    verifier = Verifier(Recoverer(model, INVERTERS["encoder"], 0), [key], sizes=[(SMALL, SMALL)])
    with tempfile.TemporaryDirectory() as folder:
        pictures = noise_pictures(Path(folder) / "pictures", number, bench.seed)
        work = partial(audit_pictures, verifier, find_pictures([pictures]), Path(folder) / "audit.jsonl", workers=0)
        taken, grown = peak_during(model.device, lambda: seconds(work))
    return {"images": number, "ms an image": 1000 * taken / number, "MB": grown}


@experiment(drawing=False)
@click.option("--shape", type=click.Choice([STABLE, "pocket"]), default=STABLE, show_default=True)
@click.option("--side", "sides", type=int, multiple=True, default=[128, 256, 512, 768, 1024], show_default=True)
@click.option("--stages/--no-stages", "staged", default=True, show_default=True, help="Time the stages of a verdict.")
@click.option("--images", "numbers", type=int, multiple=True, default=[10, 100, 1000, 10000], show_default=True)
def main(bench: Bench, shape: str, sides: tuple[int, ...], staged: bool, numbers: tuple[int, ...]) -> None:
    """Time a verdict against the size of the picture, and an audit against their number."""
    torch.set_num_threads(1)
    timed = Timed(bench, shape)
    rows = [timed.parts(side) for side in sides]
    stages, audits = timed.stages() if staged else [], [audited(bench, number) for number in numbers]
    for row in (*rows, *stages, *audits):
        click.echo(line(row))
    bench.write(rows, shape=shape, stages=stages, audits=audits)
