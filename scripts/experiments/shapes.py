"""Memory and time of decoder inversion at the shapes of the paper's models.

    python -m scripts.experiments shapes -o build/shapes            # fp32 on a CPU: about 20 minutes of one core
    python -m scripts.experiments shapes -o build/shapes --width 0.0625 --scale 0.125

Stable Diffusion's autoencoder is built from its config with random weights, so time and memory are realistic, but
accuracy is not and is omitted. One iteration is one evaluation of E∘D and one step of the method (Anderson), or D, its
gradient and one step of Adam; "lean" is the gradient in bfloat16 by autocast with activation checkpointing. Each is
measured in a separate process, without the memory of the weights. Cases that would exceed --limit are not run; the size
of what autograd would store, counted on the meta device, is reported instead as a lower bound.

arXiv 2409.18442 inverts one picture (SD 2.1, InstaFlow) or 16 frames at once (LaVie): 7.13 GB against 64.7 GB, -89 %,
both including the weights of the whole model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ringmark.data.results import Results, content_id
from ringmark.inversion.decoder import gradient_residual, invert_decoder
from ringmark.inversion.memory import peak_during, stored_bytes
from ringmark.inversion.methods import Adam
from ringmark.inversion.models.pipeline import lean
from ringmark.inversion.solve import solve
from scripts.experiments.common import Bench, experiment, kept_tensors
from scripts.experiments.costs import in_own_process, limit_memory, synchronise
from scripts.experiments.plots import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHANNELS, LATENT, FACTOR = (128, 256, 512, 512), 4, 8
PAPER = {"gradient-free GB": 7.13, "gradient GB": 64.7, "reduction": 1 - 7.13 / 64.7}  # LaVie
OURS, GRADIENT, LEAN = "gradient-free", "gradient", "gradient, lean"
WHOLE, SINGLE = "whole batch", "frame by frame"
INKS = {OURS: "#1b3a5c", GRADIENT: "#d1495b", LEAN: "#edae49"}


@dataclass(frozen=True)
class Shape:
    """Latents of `frames` pictures (4, height, width), decoded to (3, 8 height, 8 width)."""

    name: str
    frames: int
    height: int
    width: int

    def scaled(self, scale: float) -> Shape:
        """The same shape with sides scaled by `scale`, at least 4."""
        return replace(self, height=max(4, round(self.height * scale)), width=max(4, round(self.width * scale)))


SHAPES = {
    s.name: s
    for s in (
        Shape(name="SD2.1, InstaFlow", frames=1, height=64, width=64),
        Shape(name="LaVie", frames=16, height=40, width=64),
    )
}


@dataclass(frozen=True)
class Case:
    """One measurement. `at_once` frames are processed together; `width` is a factor on the number of channels."""

    shape: Shape
    method: str
    at_once: int
    dtype: str
    width: float
    device: str

    @property
    def mode(self) -> str:
        return WHOLE if self.at_once == self.shape.frames else SINGLE

    @property
    def run_frames(self) -> int:
        """The number of frames run: gradients of single frames are independent, so one frame is enough to measure."""
        return self.shape.frames if self.method == OURS else self.at_once


def autoencoder(width: float, dtype: str, device: str) -> nn.Module:
    """Stable Diffusion's AutoencoderKL with its channels scaled by `width` and random weights."""
    from diffusers import AutoencoderKL

    channels = [max(1, int(c * width)) for c in CHANNELS]
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            latent_channels=LATENT,
            norm_num_groups=math.gcd(32, channels[0]),
        )
    # nn.Module's .to(): that of diffusers warns about modules to keep in float32, of which there are none
    return nn.Module.to(vae, getattr(torch, dtype)).requires_grad_(False).eval()


class Done(Exception):
    """Raised at the end of one iteration, with its seconds as the argument."""


@dataclass
class OneIteration:
    """A decoder that stops the inversion before its second iteration."""

    decode: Callable[[Tensor], Tensor]
    frames: int
    decoded: int = field(default=0, init=False)
    started: float = field(default=0.0, init=False)

    def __call__(self, z: Tensor) -> Tensor:
        synchronise(z.device)
        now = time.perf_counter()
        if self.decoded == self.frames:
            raise Done(now - self.started)
        self.started = self.started or now
        self.decoded += len(z)
        return self.decode(z)


def encoded(vae: nn.Module, x: Tensor) -> Tensor:
    return vae.encode(x).latent_dist.mode()


def decoded(vae: nn.Module, z: Tensor) -> Tensor:
    return vae.decode(z.to(vae.dtype), return_dict=False)[0]  # the driver's iterates are float32


def iterate(vae: nn.Module, case: Case) -> float:
    """Seconds of one iteration over all frames."""
    shape, place = case.shape, {"device": vae.device, "dtype": vae.dtype}
    encode, decode = partial(encoded, vae), OneIteration(partial(decoded, vae), case.run_frames)
    frames = torch.rand(1, 3, case.run_frames, FACTOR * shape.height, FACTOR * shape.width, **place) * 2 - 1
    try:
        if case.method == OURS:
            invert_decoder(encode, decode, frames, max_steps=1, tol=None, at_once=case.at_once)
        else:
            start = torch.randn(case.run_frames, LATENT, shape.height, shape.width, **place)
            with lean(vae) if case.method == LEAN else nullcontext():
                solve(gradient_residual(decode, frames[0].transpose(0, 1)), start, Adam(lr=0.1), max_steps=1)
    except Done as done:
        return done.args[0] * shape.frames / case.run_frames
    raise RuntimeError("the inversion ended within its first iteration")


def measure(case: Case, limit: float) -> dict[str, Tensor]:
    """`seconds` of an iteration and `MB` above the weights, in this process; NaN if `limit` GiB are not enough."""
    device, size = torch.device(case.device), torch.device(case.device).type
    vae = autoencoder(case.width, case.dtype, case.device)
    # small, since memory that the C library keeps after freeing would count as in use before
    small = replace(case, shape=replace(case.shape.scaled(0.125), frames=1), at_once=1)
    try:
        iterate(vae, case if size == "cuda" else small)  # warm up: libraries allocate, compile and select kernels once
        if size == "cpu":
            limit_memory(limit)
        seconds, peak = peak_during(device, lambda: iterate(vae, case))
    except (RuntimeError, MemoryError) as error:
        if not any(word in str(error) for word in ("memory", "alloc", "primitive", "new thread")):
            raise
        seconds, peak = math.nan, math.nan
    finally:
        if size == "cpu":
            limit_memory(math.inf)  # otherwise the result could not be sent
    return {"seconds": torch.tensor(seconds), "MB": torch.tensor(peak)}


def apart(case: Case, limit: float) -> dict[str, Tensor]:
    """`measure` in a separate process."""
    try:
        return in_own_process(measure, case, limit)
    except BrokenProcessPool:  # killed, which may happen when out of memory
        return {"seconds": torch.tensor(math.nan), "MB": torch.tensor(math.nan)}


def estimated(case: Case) -> float:
    """Megabytes that autograd stores for one decoding: a lower bound for a gradient; 0 for other methods."""
    if case.method != GRADIENT:
        return 0.0
    vae = autoencoder(case.width, case.dtype, "meta")
    z = torch.empty(case.run_frames, LATENT, case.shape.height, case.shape.width, device="meta", dtype=vae.dtype)
    return stored_bytes(partial(decoded, vae), z, vae.parameters()) / 2**20


def cases(shapes: list[Shape], dtypes: list[str], width: float, device: str) -> list[Case]:
    """Each shape, precision and method, with the whole batch and, for several frames, frame by frame."""
    return [
        Case(shape=shape, method=method, at_once=at_once, dtype=dtype, width=width, device=device)
        for shape in shapes
        for dtype in dtypes
        for at_once in sorted({1, shape.frames})
        for method in INKS
    ]


def row(case: Case, limit: float, results: Results) -> dict:
    """The row of a case: `MB` is measured if it `fits`, otherwise it is the lower bound `stored MB`."""
    stored = estimated(case)
    missing = {"seconds": torch.tensor(math.nan), "MB": torch.tensor(math.nan)}
    sample_id = content_id(case, limit, torch.get_num_threads())
    found = missing if stored > limit * 2**10 else kept_tensors(results, sample_id, partial(apart, case, limit))
    seconds, peak = float(found["seconds"]), float(found["MB"])
    fits = not math.isnan(peak)
    head = {"shape": case.shape.name, "frames": case.shape.frames, "method": case.method, "mode": case.mode}
    costs = {"seconds": seconds if fits else None, "MB": peak if fits else stored or None, "stored MB": stored or None}
    return head | {"dtype": case.dtype, "fits": fits} | costs


def comparisons(rows: list[dict], weights: dict[str, float]) -> list[dict]:
    """Gradient-free against gradient, in all shapes, precisions and modes."""
    rivals = [r for r in rows if r["method"] != OURS and r["MB"]]
    ours = [r for r in rows if r["method"] == OURS and r["fits"]]
    pairs = [(our, rival) for rival in rivals for our in ours]
    alike = [(a, b) for a, b in pairs if (a["shape"], a["dtype"]) == (b["shape"], b["dtype"])]
    return [comparison(mine, rival, weights[mine["dtype"]]) for mine, rival in alike]


def comparison(our: dict, rival: dict, weights: float) -> dict:
    """The share of memory saved, without and with the weights, and the ratio of times.

    `at least` is True if the gradient did not fit and its lower bound is used.
    """
    return {
        "shape": our["shape"],
        "dtype": our["dtype"],
        "ours": our["mode"],
        "rival": rival["method"],
        "gradient": rival["mode"],
        "memory saved": 1 - our["MB"] / rival["MB"],
        "memory saved, with weights": 1 - (our["MB"] + weights) / (rival["MB"] + weights),
        "at least": not rival["fits"],
        "time ratio": our["seconds"] / rival["seconds"] if rival["fits"] else None,
    }


def figure_of(rows: list[dict], limit: float) -> Figure:
    """Bars of memory and time, hatched where the gradient did not fit and its lower bound is shown."""
    figure, axes = panels(11, 1.6 + 0.42 * len(rows), across=2, sharey=True)
    draw_bars(axes[0], rows, "MB", 1 / 2**10, "GB")
    draw_bars(axes[1], rows, "seconds", 1.0, "s")
    axes[0].set(xlabel=f"peak memory above the weights (GB; limit {limit:g})", title="memory")
    axes[1].set(xlabel="seconds per iteration over all frames", title="time")
    axes[0].set_yticks(range(len(rows)), [f"{r['shape']}, {r['dtype']}\n{r['mode']}" for r in rows], fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(handles=legend_handles(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def draw_bars(ax: Axes, rows: list[dict], column: str, factor: float, unit: str) -> None:
    """One bar per row, with its value at the end."""
    values = [r[column] * factor if r[column] is not None else 0.0 for r in rows]
    top = max(values) or 1.0
    for i, (r, value) in enumerate(zip(rows, values, strict=True)):
        ax.barh(i, value, color=INKS[r["method"]], alpha=1 if r["fits"] else 0.35, hatch="" if r["fits"] else "//")
        sign = "" if r["fits"] else "≥ "
        text = f"{sign}{value:.3g} {unit}" if value else "not run: does not fit"
        ax.text(value + top * 0.01, i, text, va="center", fontsize=8)
    ax.set_xlim(0, top * 1.22)


def legend_handles() -> list:
    from matplotlib.patches import Patch

    return [
        *(Patch(color=colour, label=name) for name, colour in INKS.items()),
        Patch(facecolor=INKS[GRADIENT], alpha=0.35, hatch="//", label="does not fit: lower bound (stored by autograd)"),
    ]


def cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def summary(rows: list[dict], ratios: list[dict]) -> str:
    """The rows and the ratios as text."""
    lines = ["  ".join(f"{k} {cell(v)}" for k, v in r.items()) for r in rows + ratios]
    return "\n".join([*lines, f"the paper at LaVie's shape: memory saved {PAPER['reduction']:.3f}"])


@experiment(model=False, drawing=False)
@click.option(
    "--shape", "names", type=click.Choice(list(SHAPES)), multiple=True, help="Only this shape; may be repeated."
)
@click.option(
    "--dtype", "dtypes", multiple=True, help="float32, bfloat16, …; may be repeated.  [default: both on a GPU]"
)
@click.option("--width", default=1.0, show_default=True, help="Factor on the number of channels.")
@click.option("--scale", default=1.0, show_default=True, help="Factor on the side lengths.")
@click.option("--limit", default=16.0, show_default=True, help="Memory limit of a measurement in GiB.")
def main(bench: Bench, names: tuple, dtypes: tuple, width: float, scale: float, limit: float) -> None:
    """Memory and time of one iteration, gradient-free against gradient, at the paper's shapes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = list(dtypes) or ["float32", *(["bfloat16"] if device == "cuda" else [])]
    shapes = [SHAPES[name].scaled(scale) for name in names or SHAPES]
    todo = cases(shapes, dtypes, width, device)
    with bench.kept() as kept:
        rows = [row(case, limit, kept.of("shapes", {})) for case in tqdm(todo, "measure", disable=None)]
    number = sum(p.numel() for p in autoencoder(width, "float32", "meta").parameters())
    weights = {d: number * getattr(torch, d).itemsize / 2**20 for d in dtypes}
    ratios = comparisons(rows, weights)
    click.echo(summary(rows, ratios))
    facts = {"ratios": ratios, "paper": PAPER, "weights_MB": weights, "shapes": [asdict(s) for s in shapes]}
    bench.write(rows, figure_of(rows, limit), **facts, device=device)
