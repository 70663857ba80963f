"""Options shared by several commands, as decorators. A group of options is passed to its command as one typed value."""

from __future__ import annotations

import gc
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial, reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ringmark.data.ray_engine import Cluster
    from ringmark.inversion.models.pipeline import LatentModel
    from ringmark.watermark.tasks.load import Setup

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

EXIT_ABSENT, EXIT_USAGE, EXIT_INCONCLUSIVE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 3, 130, 141

MAX_GUIDANCE = 100  # far above useful values; larger ones overflow in the sampler


class FilePath(click.Path):
    """A non-empty path that ends in one of `suffixes`, if there are any."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__(path_type=Path, readable=False)  # whoever opens the file says what is wrong with it
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not os.fspath(value):
            self.fail("the name is empty; give a file or folder", param, ctx)
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            self.fail(f"{path}: the name must end in {' or '.join(self.suffixes)}", param, ctx)
        return path


class Finite(click.FloatRange):
    """A range of finite numbers; refuses NaN, for which comparisons with the range fail."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Size(click.ParamType["tuple[int, int]"]):
    """A size in pixels, written WIDTHxHEIGHT; the value is (height, width)."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        width, by, height = str(value).lower().partition("x")
        sides = (width, height)
        if not (by and all(re.fullmatch("[0-9]{1,9}", side) and int(side) for side in sides)):
            self.fail(f"{str(value)[:40]!r} is not a size such as 1024x768, width first", param, ctx)
        return int(height), int(width)


PATH, FIGURE = FilePath(), FilePath(".png", ".svg")
SEED = click.IntRange(0, 2**62)  # torch and NumPy take 63 bits; each further image adds 1


def options(*decorators: Decorator) -> Decorator:
    """Combine several decorators into one."""
    return lambda command: reduce(lambda inner, decorate: decorate(inner), reversed(decorators), command)


def grouped(name: str, group: type, *decorators: Decorator) -> Decorator:
    """Pass the values of these options to the command as one argument `name`, an instance of the dataclass `group`."""
    members = [field.name for field in fields(group)]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def call(*args: Any, **values: Any) -> Any:
            values[name] = group(**{member: values.pop(member) for member in members})
            return command(*args, **values)

        return options(*decorators)(call)

    return decorate


def names(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Split comma-separated names: 'a,b' and 'c' give a, b and c."""
    return tuple(name.strip() for value in values for name in value.split(","))


@contextmanager
def uncollected() -> Iterator[None]:
    """Context, or decorator, for imports and for loading a model: the garbage collector passes over what they make.

    These are half a million objects, next to none of them garbage, that live until the end. Searching them time and
    again, and once more at exit, would take a quarter of the processor time of a short command.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class ModelOptions:
    """--model, --device, --dtype and --offload."""

    source: str
    device: str
    dtype: str
    offload: str | None

    @uncollected()
    def load(self, *, text: bool = False, loras: tuple[str, ...] = ()) -> LatentModel:
        """Load the model, with these LoRAs, and with its text encoders if `text`."""
        from ringmark.watermark.tasks import load

        return load.load_model(self.source, self.device, self.dtype, loras=loras, offload=self.offload, text=text)


@dataclass(frozen=True)
class InversionOptions:
    """--method, --max-steps and --steps."""

    method: str
    max_steps: int | None
    steps: int


@dataclass(frozen=True)
class DetectionOptions:
    """--key, --alpha, --calibration, --search, --size and --thorough."""

    key_paths: tuple[Path, ...]
    alpha: float
    calibration: Path | None
    search: bool
    sizes: tuple[tuple[int, int], ...]
    thorough: bool

    @uncollected()
    def prepare(self, model: ModelOptions, inversion: InversionOptions) -> Setup:
        """Load the verifier."""
        return self.loader(model, inversion)()

    def loader(self, model: ModelOptions, inversion: InversionOptions) -> Callable[[], Setup]:
        """Read keys and calibration; what is returned loads the verifier, in this process or another."""
        from ringmark.watermark.tasks.load import load_calibration, load_keys, load_verifier

        return partial(
            load_verifier,
            load_keys(self.key_paths),
            model=model.source,
            device=model.device,
            dtype=model.dtype,
            offload=model.offload,
            method=inversion.method,
            max_steps=inversion.max_steps,
            steps=inversion.steps,
            alpha=self.alpha,
            calibration=load_calibration(self.calibration),
            search=self.search,
            sizes=self.sizes,
            thorough=self.thorough,
        )


@dataclass(frozen=True)
class EngineOptions:
    """--engine, --ray-address, --ray-cores, --batch and --workers."""

    engine: str
    ray_address: str | None
    ray_cores: int
    batch: int | None
    workers: int

    def cluster(self, device: str) -> Cluster | None:
        """The cluster to run on, or None for this process; its GPUs are used unless the device is another."""
        from ringmark.data.ray_engine import Cluster

        gpus = device == "auto" or device.startswith("cuda")
        return Cluster(address=self.ray_address, cores=self.ray_cores, gpus=gpus) if self.engine == "ray" else None


max_steps_option = click.option(
    "--max-steps",
    type=click.IntRange(0, 1000),
    help="Maximum steps of the decoder inversion.  [default: the method's own]",
)
INVERSION_STEPS = 10
"""inversion.recover.STEPS, which needs torch to import."""

steps_option = click.option(
    "--steps",
    type=click.IntRange(1),
    default=INVERSION_STEPS,
    show_default=True,
    help="Steps of the sampler inversion.",
)
size_option = click.option("--size", type=Size(), help="Size of the images in pixels.  [default: the native size]")
fitting_batch_option = click.option(
    "--batch",
    type=click.IntRange(1),
    help="Images processed at a time.  [default: 8; on a GPU, as many as half of its free memory holds]",
)
batch_option = click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, help="Images processed at a time."
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Threads that read and decode images alongside the computation; with Ray, reading tasks for each process that "
    "tests images.",
)
engine_options = grouped(
    "engine",
    EngineOptions,
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Where to run: in this process, or in the processes of a Ray cluster.",
    ),
    click.option(
        "--ray-address",
        metavar="ADDRESS",
        help="The Ray cluster to join, such as auto (the one that this machine is in) or HOST:6379.  [default: one is "
        "started on this machine]",
    ),
    click.option(
        "--ray-cores",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="CPU cores of each process that tests images. There is one for each GPU, or without GPUs as many as the "
        "cluster has cores for.",
    ),
    fitting_batch_option,
    workers_option,
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
force_option = click.option("--force", is_flag=True, help="Replace existing files.")
seed_option = click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the first image's noise.")
guidance_option = click.option(
    "--guidance",
    type=Finite(1, MAX_GUIDANCE),
    default=3.0,
    show_default=True,
    help="Scale of classifier-free guidance; 1 turns it off.",
)
links_option = click.option("--follow-links", is_flag=True, help="Follow links that lead out of the folder.")

model_options = grouped(
    "model",
    ModelOptions,
    click.option(
        "--model",
        "source",
        default="pocket",
        show_default=True,
        help='"pocket" or "pocket_flow" (small models that ship with ringmark), a diffusers folder, a hub id or '
        "id@revision, or a .safetensors file with its configs in a folder of the same name.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …"),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        show_default=True,
        help="auto is float16 on CUDA and float32 on a CPU.",
    ),
    click.option(
        "--offload",
        type=click.Choice(["model", "sequential"]),
        help="Keep weights in main memory until they are needed: whole networks (model), or layer by layer "
        "(sequential), which needs the least GPU memory and is slow.",
    ),
)

METHODS = ("encoder", "operator", "anderson", "forward", "km", "adam", "gradient", "gradient-lean")
"""The names of inversion.decoder.INVERTERS, which needs torch to import."""

inversion_options = grouped(
    "inversion",
    InversionOptions,
    click.option(
        "--method",
        type=click.Choice(METHODS),
        default="operator",
        show_default=True,
        help="Decoder inversion. operator suits every autoencoder and altered images; anderson is more accurate on "
        "unaltered images of some autoencoders; encoder skips the inversion; gradient is the slow baseline; "
        "gradient-lean is the same with less memory.",
    ),
    max_steps_option,
    steps_option,
)

KEYS_HELP = "A key file or a folder of keys; may be repeated."
calibration_option = click.option(
    "--calibration",
    type=PATH,
    help="File written by ringmark calibrate; p-values are based on it and checked against its unmarked images.  "
    "[default: the model's own, if it has one for these settings]",
)
keys_option = click.option("--key", "key_paths", type=PATH, multiple=True, required=True, help=KEYS_HELP)
alpha_option = click.option(
    "--alpha",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=1e-3,
    show_default=True,
    help="Significance level: a key is present at p ≤ ALPHA, corrected for the number of keys.",
)
detection_options = grouped(
    "detection",
    DetectionOptions,
    keys_option,
    alpha_option,
    calibration_option,
    click.option(
        "--search",
        is_flag=True,
        help="Also search images in which no key is found for rotation, cropping, enlargement, mirroring, stretching "
        "and shifts, and for pictures within them, as in a screenshot.",
    ),
    click.option(
        "--size",
        "sizes",
        type=Size(),
        multiple=True,
        metavar="WxH",
        help="Size at which the images may have been drawn; may be repeated, and p is corrected for the number of "
        "sizes.  [default: the sizes that fit each image]",
    ),
    click.option(
        "--thorough",
        is_flag=True,
        help="Run all stages of the inversion on every image, even once a key is found. Finds every key of an image.",
    ),
)


def say(result: object, text: str | Iterable[str], as_json: bool) -> None:
    """Print a result: `text` for people, a line or several, or `result` as JSON for programs."""
    from ringmark.errors import one_line

    lines = [text] if isinstance(text, str) else text
    click.echo(json.dumps(result, indent=1, default=str) if as_json else "\n".join(map(one_line, lines)))


def warn(lines: Iterable[str]) -> None:
    """Print lines on stderr."""
    from ringmark.errors import one_line

    for line in lines:
        click.echo(one_line(line), err=True)
