"""Shared parts of the experiments: options, pictures with known latents, recovery of noise, results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ringmark.data.files import write_atomic
from ringmark.data.images import from_array, read_sample, to_array
from ringmark.data.results import Results, ResultsFolder, content_id
from ringmark.data.sources import find_images
from ringmark.errors import RingmarkError
from ringmark.inversion.decoder import INVERTERS, Inverter
from ringmark.inversion.diffusion import sample
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.recover import STEPS, Recoverer
from ringmark.watermark.attacks.chains import Chain, apply, expand, seed_of
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.verifier import built_in_calibration
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.evaluation.cells import CLEAN
from ringmark.watermark.evaluation.rates import rate
from ringmark.watermark.evaluation.tables import write_table
from ringmark.watermark.figures import save_figure
from ringmark.watermark.keys.key import SECRET_BYTES, Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import DEFAULT, Scheme
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.tasks.draw import prompts_for
from ringmark.watermark.tasks.keygen import new_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEED = 700_000  # seed of the first image of an experiment with --seed 0


@dataclass(frozen=True)
class Pictures:
    """Images (N, 3, H, W) rounded to 8 bits, the latents that were decoded into them and, if drawn, their noise."""

    images: Tensor
    latents: Tensor
    noise: Tensor | None
    names: list[str]


@dataclass(frozen=True)
class Inverted:
    """Latents (N, C, h, w), evaluations (N,) and the pixel residual's RMS in grey levels (N,), NaN for the encoder."""

    latents: Tensor
    evaluations: Tensor
    pixel_rms: Tensor


@dataclass(frozen=True)
class Bench:
    """One run of an experiment: model, number of images, seeds and output folder."""

    name: str
    output: Path
    source: str = "pocket"
    number: int = 0
    seed: int = 0
    steps: int = 25
    inversion_steps: int | None = None
    guidance: float = 3.0
    photographs: Path | None = None
    dtype: str | None = None
    command: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)

    def kept(self) -> ResultsFolder:
        """What was computed in this run or earlier ones."""
        return ResultsFolder(self.output / "kept")

    @property
    def first(self) -> int:
        """Seed of the first image."""
        return SEED + self.seed

    @cached_property
    def model(self) -> LatentModel:
        return LatentModel.from_pretrained(self.source, dtype=self.dtype and getattr(torch, self.dtype))

    @cached_property
    def recoverer(self) -> Recoverer:
        """The recoverer that ringmark uses by default."""
        return Recoverer(self.model, steps=self.inversion_steps or min(self.steps, STEPS))

    @cached_property
    def calibration(self) -> Calibration | None:
        """The model's own calibration, if it has one for these settings."""
        return built_in_calibration(self.recoverer, [], Path(resolve(self.source)))[0]

    @property
    def calibration_used(self) -> str | None:
        """The fingerprint of the calibration."""
        return self.calibration.fingerprint if self.calibration else None

    @property
    def null(self) -> Null:
        """The calibration's null, or the model's if there is no calibration."""
        return self.calibration.null if self.calibration else Null.of_model(self.model)

    def test(self, scheme: Scheme, noise: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Score and uncorrected p-value (N,) of recovered noise (N, C, h, w)."""
        return score_and_p(scheme, self.null, noise)

    def key(
        self, place: Placement | None = None, *, seed: int | list[int] | np.random.Generator, **pattern: Any
    ) -> Key:
        """A key from a seed, by default with the default placement; an experiment's key need not be secret."""
        secret = np.random.default_rng(seed).bytes(SECRET_BYTES)
        if place:
            pattern |= {"channels": place.channels, "radii": place.radii}
        return new_key(self.model, DEFAULT, secret=secret, **pattern)

    @property
    def bands(self) -> tuple[Placement, ...]:
        """The bands of the default mark, at least one."""
        return TreeRing(self.key(seed=0)).parts

    def fresh(self, number: int, offset: int = 0) -> tuple[Tensor, list[str]]:
        """New noise (number, C, h, w) and as many prompts."""
        first = self.first + offset
        noise = initial_noise(list(range(first, first + number)), self.model.latent_shape)
        return noise, prompts_for([], number, first)

    def batches(
        self, key: list, make: Callable, *rows: Sequence, name: str, batch: int = 8, dim: int = 0
    ) -> dict[str, Tensor]:
        """The tensors that `make` returns for `rows`, batch by batch, concatenated along `dim`.

        Each batch is kept by key and content, so an interrupted run resumes there.
        """
        settings = {"model": self.model.identity, "dtype": str(self.model.dtype), "key": list(map(repr, key))}
        starts, parts = range(0, len(rows[0]), batch), []
        with self.kept() as kept:
            results = kept.of(key[0], settings)
            for i in tqdm(starts, name, leave=False, disable=None):
                batch_rows = [row[i : i + batch] for row in rows]
                parts.append(kept_tensors(results, content_id(*batch_rows), partial(make, *batch_rows)))
        return {column: torch.cat([part[column] for part in parts], dim) for column in parts[0]}

    @torch.inference_mode()
    def draw(
        self,
        noise: Tensor,
        prompts: list[str],
        name: str = "draw",
        guidance: float | None = None,
        steps: int | None = None,
    ) -> Pictures:
        """Pictures drawn from this noise (N, C, h, w)."""
        guidance = self.guidance if guidance is None else guidance
        model, steps = self.model, steps or self.steps
        schedule = model.schedule(steps)

        def make(some: Tensor, texts: list[str]) -> dict[str, Tensor]:
            latents = sample(model, some.to(model.device), model.condition(texts, guidance=guidance), schedule)
            return {"images": eight_bit(model.decode(latents).float().cpu()), "latents": latents.float().cpu()}

        drawn = self.batches(["draw", steps, guidance], make, noise, prompts, name=f"{name}: draw")
        return Pictures(**drawn, noise=noise, names=prompts)

    def pictures(self, scheme: Scheme | None = None) -> Pictures:
        """Photographs if a folder is given, otherwise drawn pictures, the first half marked if there is a scheme."""
        if self.photographs:
            return photographs(self.model, self.photographs, self.number)
        noise, prompts = self.fresh(self.number)
        marked = noise[: self.number // 2]
        if scheme and len(marked):
            noise = torch.cat([scheme.embed(marked), noise[len(marked) :]])
        return self.draw(noise, prompts)

    def invert(self, inverter: Inverter, images: Tensor, name: str) -> Inverted:
        """Decoder inversion of images (N, 3, H, W)."""
        make = partial(_invert, self.model, inverter)
        return Inverted(**self.batches(["invert", repr(inverter)], make, images, name=name))

    def recover(self, latents: Tensor, name: str) -> Tensor:
        """The noise (N, C, h, w) that latents come from, by naive inversion with the empty prompt."""

        def make(some: Tensor) -> dict[str, Tensor]:
            return {"noise": self.recoverer.noise(some)}

        return self.batches(["recover", self.recoverer.steps], make, latents, name=f"{name}: noise")["noise"]

    def noise_of(self, images: Tensor, name: str) -> Tensor:
        """The noise (N, C, h, w) that a detector recovers by default."""
        return self.recover(self.invert(INVERTERS["operator"], images, name).latents, name)

    def attacked(self, images: Tensor, chain: Chain | None) -> Tensor:
        """The images (N, 3, H, W) after an attack, each with its own generator."""
        if chain is None:
            return images
        before = [from_array(x.numpy()) for x in images]
        after = [apply(chain, x, seed_of(self.seed, str(i)), self.model) for i, x in enumerate(before)]
        return torch.stack([torch.from_numpy(to_array(x)) for x in after])

    def provenance(self) -> dict[str, Any]:
        """The settings, versions and hardware behind a result."""
        used_model = "model" in self.__dict__
        return {
            "experiment": self.name,
            "command": self.command,
            "parameters": self.parameters,
            "n": self.number,
            "seed": self.seed,
            "first_seed": self.first,
            "model": self.model.identity if used_model else None,
            "device": str(self.model.device) if used_model else None,
            "versions": versions(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }

    def write(self, rows: list[dict], figure: Figure | None = None, name: str | None = None, **facts: Any) -> None:
        """Write name.csv, name.json (rows, facts and provenance) and the figure as PNG and SVG."""
        path = self.output / (name or self.name)
        write_table(path.with_suffix(".csv"), rows)
        write_atomic(path.with_suffix(".json"), json.dumps(self.provenance() | facts | {"rows": rows}, indent=1))
        if figure is not None:
            for suffix in (".png", ".svg"):
                save_figure(figure, path.with_suffix(suffix), force=True)


def kept_tensors(results: Results, sample_id: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors kept under this id; those that `make` returns if there are none."""

    def made(_: list[int]) -> list[dict[str, np.ndarray]]:
        return [{name: values.cpu().numpy() for name, values in make().items()}]

    (found,) = results.complete([sample_id], made)
    return {name: torch.from_numpy(values) for name, values in found.items()}


def _invert(model: LatentModel, inverter: Inverter, images: Tensor) -> dict[str, Tensor]:
    solution = inverter(model, images.to(model.device))
    merits = solution.merits.nan_to_num(torch.inf)
    least = merits.amin(0) if len(merits) else torch.full((len(images),), torch.nan)
    rms = least.cpu() / images[0].numel() ** 0.5 * 127.5
    return {"latents": solution.value.cpu(), "evaluations": solution.steps.cpu(), "pixel_rms": rms}


def read_pictures(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Pictures (N, 3, H, W) at this size (H, W)."""
    samples = (read_sample(path, size) for path in paths)
    return torch.stack([torch.from_numpy(to_array(sample.image)) for sample in samples])


@torch.inference_mode()
def photographs(model: LatentModel, folder: Path, number: int) -> Pictures:
    """The first pictures of a folder, encoded and decoded so that their latents are known."""
    paths = find_images(folder)[:number]
    photos = read_pictures(paths, model.image_size)
    latents = torch.cat([model.encode(x) for x in photos.split(8)])
    images = torch.cat([model.decode(z) for z in latents.split(8)])
    return Pictures(
        images=eight_bit(images), latents=latents, noise=None, names=[str(p.relative_to(folder)) for p in paths]
    )


def eight_bit(images: Tensor) -> Tensor:
    """Images rounded to 8 bits, as in a PNG file."""
    return torch.stack([torch.from_numpy(to_array(from_array(x.clamp(-1, 1).numpy()))) for x in images])


def mark_in_turn(schemes: Sequence[Scheme], noise: Tensor) -> Tensor:
    """Noise (N, C, h, w) with sample i marked by scheme i modulo their number."""
    return torch.cat([schemes[i % len(schemes)].embed(z[None]) for i, z in enumerate(noise)])


def score_and_p(scheme: Scheme, null: Null, noise: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Score and uncorrected p-value (N,) of recovered noise (N, C, h, w) under a null."""
    test = scheme.on(null)
    scores = test.score(test.observe(noise))
    return scores, 10 ** test.log10_p(scores)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def share(hits: int, of: int) -> dict[str, float]:
    """Count, share and its 95 % Clopper-Pearson interval."""
    value, (low, high) = rate(int(hits), of)
    return {"count": int(hits), "of": of, "share": value, "low": low, "high": high}


def line(row: dict[str, Any], digits: int = 3) -> str:
    """A row's values for the terminal."""
    return "  ".join(f"{value:.{digits}f}" if isinstance(value, float) else str(value) for value in row.values())


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    libraries = ("ringmark", "torch", "diffusers", "numpy", "scipy", "Pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in libraries}


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# -- commands ----------------------------------------------------------------------------------------------------------


class Recorded(click.Command):
    """Keeps its arguments, so that results can record the command that made them."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        words = [_without_folders(word) for word in arguments]
        context.meta["command"] = shlex.join(["python", "-m", "scripts.experiments", str(self.name), *words])
        return super().parse_args(context, arguments)


def _without_folders(value: Any) -> Any:
    """Replace absolute paths by their names, so that results do not reveal local folders."""
    if isinstance(value, (str, Path)):
        return Path(value).name if Path(value).is_absolute() else str(value)
    return list(map(_without_folders, value)) if isinstance(value, tuple) else value


def experiment(
    number: int | None = None, *, seed: int = 0, model: bool = True, drawing: bool = True, photographs: bool = False
) -> Callable[[Callable], click.Command]:
    """Make a command from a function of a Bench and its own options.

    `number` is the default of -n, `seed` that of --seed. --model, --steps, --inversion-steps, --guidance and --images
    are added if requested.
    """
    options = [
        _option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
    ]
    if number is not None:
        options.append(_option("-n", "--number", default=number, help="Images."))
    if model:
        options.append(
            _option("--model", "source", default="pocket", help='"pocket", "pocket_flow", a folder or a hub id.')
        )
        options.append(
            _option("--seed", default=seed, help=f"Seed of all randomness; images count from this plus {SEED}.")
        )
    if drawing:
        options.append(_option("--steps", default=25, help="Steps for drawing."))
        options.append(_option("--inversion-steps", type=int, help=f"Steps for inversion.  [default: at most {STEPS}]"))
        options.append(_option("--guidance", default=3.0, help="Guidance for drawing."))
    if photographs:
        folder = click.Path(path_type=Path, exists=True, file_okay=False)
        options.append(_option("--images", "photographs", type=folder, help="Pictures to use instead of drawn ones."))

    def decorate(run: Callable) -> click.Command:
        name = run.__module__.rpartition(".")[2]
        command = click.command(name, cls=Recorded, help=run.__doc__)(partial(_run, run, name))
        command.params = options + list(reversed(getattr(run, "__click_params__", [])))
        return command

    return decorate


def _option(*names: str, **settings: Any) -> click.Option:
    return click.Option(names, show_default=not settings.get("required") and "default" in settings, **settings)


def _run(run: Callable, name: str, **given: Any) -> None:
    context = click.get_current_context()
    shared = {key: given.pop(key) for key in list(given) if key in Bench.__dataclass_fields__}
    parameters = {key: _without_folders(value) for key, value in (shared | context.params).items() if key != "output"}
    parameters = {key: list(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    try:
        run(Bench(name, command=context.meta["command"], parameters=parameters, **shared), **given)
    except RingmarkError as error:
        raise click.UsageError(str(error)) from None


def attack_option(*default: str) -> Callable[[Callable], Callable]:
    """The option --attack: chains by name, clean images first."""

    def chains(context: click.Context, parameter: click.Parameter, specs: tuple[str, ...]) -> dict[str, Chain | None]:
        try:
            return {CLEAN: None} | {str(chain): chain for chain in expand(specs)}
        except RingmarkError as error:
            raise click.BadParameter(str(error)) from None

    help = "An attack as in ringmark attack; may be repeated. Clean images are always included."
    return click.option(
        "--attack", "attacks", multiple=True, default=default, show_default=bool(default), callback=chains, help=help
    )
