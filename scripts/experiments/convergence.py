"""Where does cocoercivity hold, and does it predict convergence? Theorems of arXiv 2409.18442.

    python -m scripts.experiments convergence -o build/convergence       # 100 images, 300 steps; hours on one core
    python -m scripts.experiments convergence -o build/convergence -n 4 --walk 40 --at 15 --steps 10

For each image and method: the minimum over the first 100 steps of ⟨T z_k, z_k − z_∞⟩ / ‖T z_k‖², with z_∞ the method's
300th iterate, against ‖z_100 − z_∞‖. Processes with a --method each can share an output folder, once a first one has
drawn the pictures; a final run without --method then reads their results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import click
import torch
from scipy.stats import spearmanr
from torch import Tensor

from ringmark.inversion.decoder import decoder_residual
from ringmark.inversion.methods import Adam, Anderson, ForwardStep, InertialKM
from ringmark.inversion.metrics import Walk
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.solve import Method, Residual
from ringmark.watermark.figures import COLOURS, GREY, INK, MARK
from scripts.experiments.common import Bench, Pictures, experiment
from scripts.experiments.plots import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", ":")
ROUNDING = 1e-6  # share of ‖z_k − z*‖² by which a descent inequality may fail due to rounding


class Walker(NamedTuple):
    """A method, and whether it may use D(z) − x besides T."""

    method: Method
    pixels: bool = True


def inertial(alpha: float, rho: float) -> InertialKM:
    """Inertial KM of step ρ = 2λβ with λ at 90 % of its bound for α; β is chosen to give ρ."""
    lam = 0.9 * InertialKM.bound(alpha)
    return InertialKM(lam, alpha, rho / (2 * lam))


def walkers(steps: int) -> dict[str, Walker]:
    """The paper's methods and ours; inertial KM with and without momentum, at the paper's step and at ours."""
    default = InertialKM()
    return {
        "forward": Walker(ForwardStep()),
        "km": Walker(default),
        "km-none": Walker(inertial(0.0, 2 * default.lam * default.beta)),
        "km-paper": Walker(inertial(0.9, 0.001)),
        "km-paper-none": Walker(inertial(0.0, 0.001)),
        "adam": Walker(Adam(lr=0.01, horizon=steps)),
        "anderson": Walker(Anderson()),
        "anderson-latents": Walker(Anderson(), pixels=False),
    }


TITLES = {
    "forward": "forward step, ρ = 1",
    "km": "inertial KM, ρ = 0.5, α = 0.3",
    "km-none": "KM, ρ = 0.5, α = 0",
    "km-paper": "inertial KM, ρ = 0.001, α = 0.9",
    "km-paper-none": "KM, ρ = 0.001, α = 0",
    "adam": "Adam on T, lr 0.01",
    "anderson": "Anderson, pixel residual",
    "anderson-latents": "Anderson, T alone",
}


def residual(model: LatentModel, images: Tensor, pixels: bool = True) -> Residual:
    """The residual of `invert_decoder`: T(z) = E(D(z)) − E(x) with error D(z) − x and D clipped to a picture's range.

    Without `pixels`, only T is returned.
    """
    both = decoder_residual(model.encode, model.decode, images, model.encode(images))
    return both if pixels else lambda z, rows: both(z, rows)[0]


@torch.inference_mode()
def walk(bench: Bench, walker: Walker, seen: Pictures, *, steps: int, at: int, name: str) -> Walk:
    """`Walk.along` from the encoder's latents."""
    model, (method, pixels) = bench.model, walker

    def along(images: Tensor, truth: Tensor) -> dict[str, Tensor]:
        images, truth = images.to(model.device), truth.to(model.device)
        T, start = residual(model, images, pixels), model.encode(images)
        return vars(Walk.along(T, start, method, steps=steps, at=at, truth=truth))

    key = ["walk", repr(method), pixels, steps, at]
    return Walk(**bench.batches(key, along, seen.images, seen.latents, name=name, batch=4, dim=-1))


def step_of(method: Method) -> float | None:
    """ρ, the step along −T; None for Adam, whose first step only depends on signs."""
    match method:
        case ForwardStep():
            return method.rho
        case InertialKM():
            return 2 * method.lam * method.beta
        case Anderson():
            return method.beta
    return None


def asked(method: Method) -> float:
    """The cocoercivity required for convergence: more than ρ/2 in Theorem 1, β in Theorem 2, 0 without a theorem."""
    if isinstance(method, InertialKM) and method.alpha > 0:
        return method.beta
    return (step_of(method) or 0.0) / 2


def shares(betas: Tensor, moving: Tensor, level: float) -> dict[str, float]:
    """The shares of steps, and of images at all of their steps, at which cocoercivity exceeds a level."""
    good = betas[:-1] > level
    return {
        "steps": float(good[moving].double().mean()),
        "images": float((good | ~moving).all(0).double().mean()),
    }


def rank_correlation(x: Tensor, y: Tensor) -> dict[str, float | int | None]:
    """Spearman's rank correlation over the images with finite values; None if one of them is constant."""
    fine = x.isfinite() & y.isfinite()
    if fine.sum() < 3 or x[fine].unique().numel() < 2 or y[fine].unique().numel() < 2:
        return {"rho": None, "p": None, "n": int(fine.sum())}
    result = spearmanr(x[fine].numpy(), y[fine].numpy())
    return {"rho": float(result.statistic), "p": float(result.pvalue), "n": int(fine.sum())}


def spread(values: Tensor) -> dict[str, float] | None:
    """Minimum, median and maximum over images with finite values."""
    values = values[values.isfinite()]
    if not len(values):
        return None
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def descent(walk: Walk, rho: float) -> dict[str, float | dict]:
    """Theorem 1 along plain steps: where 0 < ρ < 2β, how often its inequality holds, and how much of ‖T‖ is left."""
    slack, moving = walk.slack(rho), walk.moving
    closer = walk.distances[1:] < walk.distances[:-1]
    meets = walk.lowest > rho / 2
    fall = walk.sizes[-1] / walk.sizes[0]
    return {
        "images with rho < 2 beta": float(meets.double().mean()),
        "steps at which the inequality holds": float((slack >= -ROUNDING)[moving].double().mean()),
        "slack, share of the squared distance": spread(slack[moving]),
        "steps that come closer": float(closer[moving].double().mean()),
        "residual left where rho < 2 beta": spread(fall[meets]) if meets.any() else None,
        "residual left elsewhere": spread(fall[~meets]) if not meets.all() else None,
    }


def summary(name: str, method: Method, walk: Walk) -> dict:
    """Everything about one method."""
    rho, alpha = step_of(method), getattr(method, "alpha", None)
    plain = isinstance(method, ForwardStep) or alpha == 0
    head = {"method": name, "settings": repr(method), "rho": rho, "alpha": alpha}
    return (
        head | cocoercivity(method, walk) | endings(walk) | {"theorem 1": descent(walk, rho) if plain and rho else None}
    )


def cocoercivity(method: Method, walk: Walk) -> dict:
    """Cocoercivity along the path, about its end and about the true latents."""
    rho, need = step_of(method), asked(method)
    return {
        "images": walk.distances.shape[1],
        "images with finite paths": int((walk.lowest.isfinite() & walk.distances[-1].isfinite()).sum()),
        "minimum cocoercivity": spread(walk.lowest),
        "positive": shares(walk.betas, walk.moving, 0.0),
        "above rho/2": shares(walk.betas, walk.moving, rho / 2) if rho else None,
        "cocoercivity its theorem asks for": need,
        "above what its theorem asks for": shares(walk.betas, walk.moving, need),
        "about the true latents": {
            "minimum cocoercivity": spread(walk.true_lowest),
            "positive": shares(walk.true_betas, walk.moving, 0.0),
            "above what its theorem asks for": shares(walk.true_betas, walk.moving, need),
        },
    }


def endings(walk: Walk) -> dict:
    """How close the path comes to its end, and how well the minimum cocoercivity predicts that."""
    far, relative = walk.distances[-1], walk.distances[-1] / walk.distances[0]
    return {
        "distance to the end": spread(far),
        "distance to the end, share of the first": spread(relative),
        "residual left": spread(walk.sizes[-1] / walk.sizes[0]),
        "residual left at the end": spread(walk.end / walk.sizes[0]),
        "spearman": rank_correlation(walk.lowest, far),
        "spearman, share of the first distance": rank_correlation(walk.lowest, relative),
    }


def compare(walks: dict[str, Walk], one: str, other: str) -> dict:
    """With momentum against without: on how many images ‖T‖ is smaller at the last step, and by what factor."""
    if one not in walks or other not in walks:
        return {}
    ratio = walks[one].sizes[-1] / walks[other].sizes[-1]
    nearer = walks[one].distances[-1] < walks[other].distances[-1]
    return {
        "momentum": one,
        "none": other,
        "residual smaller": float((ratio < 1).double().mean()),
        "residual ratio": spread(ratio),
        "nearer to its own end": float(nearer.double().mean()),
    }


def rows(name: str, walk: Walk, pictures: list[str]) -> list[dict]:
    """One row per image."""
    columns = {
        "minimum_cocoercivity": walk.lowest,
        "minimum_about_the_true_latent": walk.true_lowest,
        "distance_to_end": walk.distances[-1],
        "first_distance_to_end": walk.distances[0],
        "residual_left": walk.sizes[-1] / walk.sizes[0],
        "residual_left_at_end": walk.end / walk.sizes[0],
        "steps_positive": (walk.betas[:-1] > 0).double().mean(0),
    }
    table = zip(pictures, *(x.tolist() for x in columns.values()), strict=True)
    return [dict(zip(("method", "image", *columns), (name, *row), strict=True)) for row in table]


def figure_of(walks: dict[str, Walk], chosen: dict[str, Walker], steps: int) -> Figure:
    """A scatter plot per method, and the residuals of all methods by step."""
    across = min(3, len(walks) + 1)
    down = -(-(len(walks) + 1) // across)
    figure, axes = panels(4 * across, 3.2 * down + 0.4, down, across)
    for ax, (name, path) in zip(axes, walks.items(), strict=False):
        scatter(ax, path, TITLES[name], step_of(chosen[name].method), steps)
    residuals(axes[len(walks)], walks)
    for ax in axes[len(walks) + 1 :]:
        ax.set_axis_off()
    legends = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes[: len(walks)]]
    shown = {label: handle for entries in legends for handle, label in entries}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False)
    return figure


def scatter(ax: Axes, path: Walk, title: str, rho: float | None, steps: int) -> None:
    """Each image's distance to the end against its minimum cocoercivity, with lines at 0 and ρ/2 if they are close."""
    lowest, far, at = path.lowest, path.distances[-1], len(path.sizes) - 1
    fine = lowest.isfinite() & far.isfinite()
    ax.scatter(lowest[fine], far[fine], s=16, color=INK, alpha=0.7, lw=0, label="one image")
    if not fine.any():
        ax.set_title(f"{title}\noverflowed on every image", fontsize=10)
        return
    mark_bounds(ax, lowest[fine], rho)
    correlation = rank_correlation(lowest, far)["rho"]
    notes = [f"Spearman {correlation:+.2f}"] if correlation is not None else []
    notes += [f"{float((lowest > rho / 2).double().mean()):.0%} above ρ/2 = {rho / 2:.3g}"] if rho else []
    ax.set_title(title + "\n" + ", ".join(notes), fontsize=10)
    ax.set(xlabel=f"minimum cocoercivity, k < {at}", ylabel=f"‖z$_{{{at}}}$ − z$_{{{steps}}}$‖ (latent units)")
    if lowest[fine].min() < -5:  # a few images far below 0
        ax.set_xscale("symlog", linthresh=1)
    else:
        ax.locator_params(axis="x", nbins=4)  # long numbers would collide
    if far[fine].max() > 20 * far[fine].min() > 0:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)


def mark_bounds(ax: Axes, lowest: Tensor, rho: float | None) -> None:
    """Lines at cocoercivity 0 and ρ/2, unless they are too far from all images."""
    least, most = float(lowest.min()), float(lowest.max())
    marks = [(0.0, {"color": GREY, "ls": ":", "label": "cocoercivity 0"})]
    if rho:
        marks.append((rho / 2, {"color": MARK, "ls": "--", "label": "ρ/2, the bound of Theorem 1"}))
    for where, style in marks:
        if least - (most - least) <= where:
            ax.axvline(where, lw=1.2, **style)


def residuals(ax: Axes, walks: dict[str, Walk]) -> None:
    """Median ‖T z_k‖ / ‖T z_0‖ of each method."""
    for i, (name, path) in enumerate(walks.items()):
        middle = (path.sizes / path.sizes[0]).nanmedian(1).values
        ax.plot(middle.numpy(), LINES[i // len(COLOURS)], color=COLOURS[i % len(COLOURS)], lw=1.6, label=name)
    ax.set(xlabel="step k", ylabel="‖T z$_k$‖ / ‖T z$_0$‖, median", yscale="log")
    ax.set_ylim(bottom=ax.get_ylim()[0] / 5)  # room for the legend
    ax.set_title("residual by step", fontsize=10)
    ax.legend(fontsize=7, frameon=False, loc="lower left", ncols=2)


@experiment(100, photographs=True)
@click.option("--walk", "length", default=300, show_default=True, help="Steps to z_∞.")
@click.option("--at", default=100, show_default=True, help="Steps whose cocoercivity is measured.")
@click.option(
    "--method", "only", multiple=True, type=click.Choice(list(TITLES)), help="Only this method; may be repeated."
)
def main(bench: Bench, length: int, at: int, only: tuple[str, ...]) -> None:
    """Cocoercivity along each method's path, Theorem 1 along real paths, and the effect of momentum."""
    if not 0 < at < length:
        raise click.UsageError(f"--at must be between 0 and --walk ({length}), not {at}")
    seen = bench.pictures()
    chosen = {name: w for name, w in walkers(length).items() if name in (only or TITLES)}
    walks = {name: walk(bench, w, seen, steps=length, at=at, name=name) for name, w in chosen.items()}
    methods = [summary(name, chosen[name].method, w) for name, w in walks.items()]
    pairs = [compare(walks, "km-paper", "km-paper-none"), compare(walks, "km", "km-none")]
    table = [row for name, w in walks.items() for row in rows(name, w, seen.names)]
    momentum = [pair for pair in pairs if pair]
    bench.write(table, figure_of(walks, chosen, length), arrived=Walk.ARRIVED, methods=methods, momentum=momentum)
    for method in methods:
        click.echo(line(method))


def line(method: dict) -> str:
    """A method's summary as text."""
    name, lowest, left = (method[key] for key in ("method", "minimum cocoercivity", "residual left at the end"))
    if lowest is None or left is None:
        return f"{name:17} overflowed on every image"
    enough, positive = method["above what its theorem asks for"], method["positive"]
    text = f"{name:17} min cocoercivity {lowest['min']:8.3g}"
    text += f"  positive {positive['steps']:.1%} of steps, {positive['images']:.0%} of images"
    text += f"  enough {enough['steps']:.1%}, {enough['images']:.0%}"
    text += f"  ‖T‖ left {method['residual left']['median']:.2g}, at the end {left['median']:.2g}"
    correlation = method["spearman"]["rho"]
    return text + ("" if correlation is None else f"  Spearman {correlation:+.2f}")
