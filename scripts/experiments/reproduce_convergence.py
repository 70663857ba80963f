"""Where does cocoercivity hold, and does it foretell convergence? Figure and theorems of arXiv 2409.18442.

    python scripts/reproduce_convergence.py -o build/convergence       # 100 images, 300 steps; hours on one core
    python scripts/reproduce_convergence.py -o build/convergence -n 4 --steps 40 --at 15 --ddim 10

For each image and method: the minimum over the first 100 steps of ⟨T z_k, z_k − z_∞⟩ / ‖T z_k‖², z_∞ the method's own
300th iterate, against ‖z_100 − z_∞‖. With --method, given more than once, several processes can fill one cache; the
last run, without it, reads what they walked.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import click
import torch
from scipy.stats import spearmanr
from torch import Tensor

from ringmark.inversion.methods import Adam, Anderson, ForwardStep, InertialKM
from ringmark.inversion.metrics import Walk
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.solve import Method
from ringmark.watermark.figures import COLOURS, GREY, INK, MARK
from scripts.experiments.common import SEED, experiment_options, inertial, pictures, walk, write_results

LINES = ("-", "--", ":")
ROUNDING = 1e-6  # of ‖z_k − z*‖²: a descent inequality that fails by less is not violated


class Walker(NamedTuple):
    """A method, and whether it may look at D(z) − x beside T."""

    method: Method
    pixels: bool = True


def walkers(steps: int) -> dict[str, Walker]:
    """The paper's methods and ours; inertial KM with and without momentum at the paper's step and at our own."""
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


def step_of(method: Method) -> float | None:
    """ρ: how far the method goes along −T; none for Adam, which knows only signs at first."""
    match method:
        case ForwardStep():
            return method.rho
        case InertialKM():
            return 2 * method.lam * method.beta
        case Anderson():
            return method.beta
    return None


def asked(method: Method) -> float:
    """The cocoercivity that convergence asks for: more than ρ/2 in Theorem 1, β in Theorem 2; where there is none, 0."""
    if isinstance(method, InertialKM) and method.alpha > 0:
        return method.beta
    return (step_of(method) or 0.0) / 2


def shares(betas: Tensor, moving: Tensor, level: float) -> dict[str, float]:
    """Of steps, and of images at all whose steps, T is cocoercive above a level."""
    good = betas[:-1] > level
    return {
        "steps": float(good[moving].double().mean()),
        "images": float((good | ~moving).all(0).double().mean()),
    }


def rank_correlation(x: Tensor, y: Tensor) -> dict[str, float | int | None]:
    """Spearman's, over the images where both are finite; None where one of them does not vary."""
    fine = x.isfinite() & y.isfinite()
    if fine.sum() < 3 or x[fine].unique().numel() < 2 or y[fine].unique().numel() < 2:
        return {"rho": None, "p": None, "n": int(fine.sum())}
    found = spearmanr(x[fine].numpy(), y[fine].numpy())
    return {"rho": float(found.statistic), "p": float(found.pvalue), "n": int(fine.sum())}


def spread(values: Tensor) -> dict[str, float] | None:
    """Minimum, median and maximum over images, those that left the finite numbers left out."""
    values = values[values.isfinite()]
    if not len(values):
        return None
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def descent(walk: Walk, rho: float) -> dict[str, float | dict]:
    """Theorem 1 along plain steps: where 0 < ρ < 2β, how often its inequality holds, and how near T comes to 0."""
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
    """What is said of one method."""
    rho, alpha = step_of(method), getattr(method, "alpha", None)
    far, relative = walk.distances[-1], walk.distances[-1] / walk.distances[0]
    above = lambda level, betas=walk.betas: shares(betas, walk.moving, level)
    plain = isinstance(method, ForwardStep) or alpha == 0
    return {
        "method": name,
        "settings": repr(method),
        "rho": rho,
        "alpha": alpha,
        "images": len(far),
        "images with finite paths": int((walk.lowest.isfinite() & far.isfinite()).sum()),
        "minimum cocoercivity": spread(walk.lowest),
        "positive": above(0.0),
        "above rho/2": above(rho / 2) if rho else None,
        "cocoercivity its theorem asks for": asked(method),
        "above what its theorem asks for": above(asked(method)),
        "about the true latents": {
            "minimum cocoercivity": spread(walk.true_lowest),
            "positive": above(0.0, walk.true_betas),
            "above what its theorem asks for": above(asked(method), walk.true_betas),
        },
        "distance to the end": spread(far),
        "distance to the end, share of the first": spread(relative),
        "residual left": spread(walk.sizes[-1] / walk.sizes[0]),
        "residual left at the end": spread(walk.end / walk.sizes[0]),
        "spearman": rank_correlation(walk.lowest, far),
        "spearman, share of the first distance": rank_correlation(walk.lowest, relative),
        "theorem 1": descent(walk, rho) if plain and rho else None,
    }


def compare(walks: dict[str, Walk], one: str, other: str) -> dict:
    """Momentum against none: on how many images ‖T‖ is smaller at the last step walked, and by what factor."""
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
    """One image a row."""
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


def draw(walks: dict[str, Walk], chosen: dict[str, Walker], steps: int):
    """A scatter plot a method, and the residual of them all along the way."""
    from matplotlib.figure import Figure

    across = min(3, len(walks) + 1)
    down = -(-(len(walks) + 1) // across)
    figure = Figure(figsize=(4 * across, 3.2 * down + 0.4), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for ax, (name, path) in zip(axes, walks.items(), strict=False):
        scatter(ax, path, TITLES[name], step_of(chosen[name].method), steps)
    residuals(axes[len(walks)], walks)
    for ax in axes[len(walks) + 1 :]:
        ax.set_axis_off()
    shown = {
        label: handle
        for ax in axes[: len(walks)]
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False)
    return figure


def scatter(ax, path: Walk, title: str, rho: float | None, steps: int) -> None:
    """Each image's distance to the end against its minimum cocoercivity; where 0 and ρ/2 lie, if that is near."""
    lowest, far = path.lowest, path.distances[-1]
    fine = lowest.isfinite() & far.isfinite()
    found, at = rank_correlation(lowest, far)["rho"], len(path.sizes) - 1
    ax.scatter(lowest[fine], far[fine], s=16, color=INK, alpha=0.7, lw=0, label="one image")
    if not fine.any():
        ax.set_title(f"{title}\nleft the finite numbers on every image", fontsize=10)
        return
    least, most = (float(x) for x in (lowest[fine].min(), lowest[fine].max()))
    marks = [(0.0, {"color": GREY, "ls": ":", "label": "cocoercivity 0"})]
    if rho:
        marks.append((rho / 2, {"color": MARK, "ls": "--", "label": "ρ/2, the least that Theorem 1 needs"}))
    for where, style in marks:  # far from all images a line would squeeze them into another
        if least - (most - least) <= where:
            ax.axvline(where, lw=1.2, **style)
    second = [f"Spearman {found:+.2f}"] if found is not None else []
    second += [f"{float((lowest > rho / 2).double().mean()):.0%} above ρ/2 = {rho / 2:.3g}"] if rho else []
    ax.set_title(title + "\n" + ", ".join(second), fontsize=10)
    ax.set(xlabel=f"minimum cocoercivity, k < {at}", ylabel=f"‖z$_{{{at}}}$ − z$_{{{steps}}}$‖ (latent units)")
    if least < -5:  # a few images far below 0
        ax.set_xscale("symlog", linthresh=1)
    if far[fine].max() > 20 * far[fine].min() > 0:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)


def residuals(ax, walks: dict[str, Walk]) -> None:
    """Median ‖T z_k‖ / ‖T z_0‖ of each method."""
    for i, (name, path) in enumerate(walks.items()):
        middle = (path.sizes / path.sizes[0]).nanmedian(1).values
        ax.plot(middle.numpy(), LINES[i // len(COLOURS)], color=COLOURS[i % len(COLOURS)], lw=1.6, label=name)
    ax.set(xlabel="step k", ylabel="‖T z$_k$‖ / ‖T z$_0$‖, median", yscale="log")
    ax.set_ylim(bottom=ax.get_ylim()[0] / 5)  # room for the legend
    ax.set_title("residual along the way", fontsize=10)
    ax.legend(fontsize=7, frameon=False, loc="lower left", ncols=2)


@click.command()
@experiment_options(100)
@click.option("--steps", default=300, show_default=True, help="Steps to z_∞.")
@click.option("--at", default=100, show_default=True, help="Steps whose cocoercivity is measured.")
@click.option("--ddim", default=25, show_default=True, help="DDIM steps of the drawn images.")
@click.option(
    "--method", "only", multiple=True, type=click.Choice(list(TITLES)), help="Only this one; may be repeated."
)
def main(
    source: str, images: Path | None, number: int, output: Path, steps: int, at: int, ddim: int, only: tuple
) -> None:
    """Cocoercivity along each method's path, Theorem 1 along real paths, momentum against none."""
    if not 0 < at < steps:
        raise click.UsageError(f"--at must lie between 0 and --steps, not at {at} of {steps}")
    model, cache = LatentModel.from_pretrained(source), output / "cache"
    seen = pictures(model, number, images, steps=ddim, cache=cache)
    chosen = {name: w for name, w in walkers(steps).items() if name in (only or TITLES)}
    walks = {
        name: walk(model, w.method, seen, steps=steps, at=at, name=name, cache=cache, pixels=w.pixels)
        for name, w in chosen.items()
    }
    methods = [summary(name, chosen[name].method, w) for name, w in walks.items()]
    pairs = [compare(walks, "km-paper", "km-paper-none"), compare(walks, "km", "km-none")]
    write_results(
        output,
        "reproduce_convergence",
        [row for name, w in walks.items() for row in rows(name, w, seen.names)],
        draw(walks, chosen, steps),
        model=model.identity,
        images=len(seen.names),
        source=images.name if images else "drawn",
        seed=None if images else SEED,
        settings={"steps": steps, "at": at, "ddim": ddim, "arrived": Walk.ARRIVED},
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        methods=methods,
        momentum=[pair for pair in pairs if pair],
    )
    for said in methods:
        click.echo(line(said))


def line(said: dict) -> str:
    """A method's summary for the terminal."""
    above, found = said["above what its theorem asks for"], said["spearman"]["rho"]
    if said["minimum cocoercivity"] is None or said["residual left at the end"] is None:
        return f"{said['method']:17} left the finite numbers on every image"
    text = f"{said['method']:17} min cocoercivity {said['minimum cocoercivity']['min']:8.3g}"
    text += f"  positive {said['positive']['steps']:.1%} of steps, {said['positive']['images']:.0%} of images"
    text += f"  enough {above['steps']:.1%}, {above['images']:.0%}"
    text += (
        f"  ‖T‖ left {said['residual left']['median']:.2g}, at the end {said['residual left at the end']['median']:.2g}"
    )
    return text + ("" if found is None else f"  Spearman {found:+.2f}")


if __name__ == "__main__":
    main()
