"""How far from its tuned value may each hyper-parameter be, and does cocoercivity depend on what a picture shows?

    python scripts/study_sensitivity.py -o build/sensitivity       # 16 images, 100 paths; an hour on one core
    python scripts/study_sensitivity.py -o build/sensitivity -n 2 --paths 6 --steps 12 --at 6 --its 4 --every 3 --ddim 10

Every run takes all its steps (no early stopping) and keeps the iterate with the smallest pixel residual. A method still
works where it beats the encoder by 1 dB on average. Written to the folder of reproduce_convergence.py, with as many
paths as it has images, this reads the forward step's paths from its cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor

from ringmark.data.scenes import GROUNDS, SKIES
from ringmark.inversion.decoder import Inverter
from ringmark.inversion.methods import Adam, Anderson, ForwardStep, InertialKM
from ringmark.inversion.metrics import nmse_db
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.solve import Method
from ringmark.watermark.figures import COLOURS, GREY, INK, MARK
from scripts.experiments.common import (
    SEED,
    Pictures,
    experiment_options,
    inertial,
    invert_all,
    mean_and_error,
    pictures,
    walk,
    write_results,
)

WORKS = 1.0  # dB better than the encoder, on average


@dataclass(frozen=True)
class Sweep:
    """One hyper-parameter of one method: inverters by its values, and the value that commands use, if it is one."""

    parameter: str
    method: str
    inverters: dict[float, Inverter]
    used: float | None = None

    def thinned(self, every: int, its: int | None) -> Sweep:
        """Every so-manieth value, and no run longer than `its`: the small setting."""
        some = dict(list(self.inverters.items())[::every])
        if self.parameter == "iterations":
            some = {v: i for v, i in some.items() if its is None or i.max_steps <= its}
        return replace(self, inverters={v: i if its is None else shortened(i, its) for v, i in some.items()})


def shortened(inverter: Inverter, its: int) -> Inverter:
    """At most `its` steps; Adam's schedule spans what is left."""
    steps, method = min(inverter.max_steps, its), inverter.method
    return replace(
        inverter, max_steps=steps, method=replace(method, horizon=steps) if isinstance(method, Adam) else method
    )


def full(method: Method, steps: int) -> Inverter:
    """Every step of a method, so that what is compared is the method and not when it stops."""
    return Inverter(method, steps, early=False)


RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
STEPS = (0.05, 0.1, 0.2, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5)
SMALL_STEPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
MOMENTA = tuple(i / 10 for i in range(10))
DAMPINGS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
WINDOWS = (1, 2, 3, 5, 8, 10)
RIDGES = tuple(10.0**p for p in range(-8, 0))
BUDGETS = (1, 2, 3, 5, 8, 12, 20, 40)

AXES = {
    "learning rate": "learning rate",
    "step": "step ρ",
    "momentum": "momentum α",
    "damping": "damping β",
    "window": "window",
    "ridge": "relative ridge",
    "iterations": "iterations",
}
LINEAR = ("momentum", "damping", "window")


def sweeps() -> list[Sweep]:
    """Each method's hyper-parameters about the values that are used, at the number of steps that is used."""
    anderson = lambda name: lambda value: full(Anderson(**{name: value}), 8)
    table = lambda values, make: {float(v): make(v) for v in values}
    within = lambda alpha: full(InertialKM(0.9 * InertialKM.bound(alpha), alpha, 1.0), 20)
    return [
        Sweep("learning rate", "Adam, 50 its", table(RATES, lambda lr: full(Adam(lr=lr, horizon=50), 50)), 0.01),
        Sweep("step", "forward step, 12 its", table(STEPS, lambda rho: full(ForwardStep(rho), 12)), 1.0),
        Sweep("step", "KM, α = 0, 20 its", table(SMALL_STEPS, lambda rho: full(inertial(0.0, rho), 20))),
        Sweep("step", "KM, α = 0.9, 20 its", table(SMALL_STEPS, lambda rho: full(inertial(0.9, rho), 20)), 0.001),
        Sweep("momentum", "ρ = 0.5, 20 its", table(MOMENTA, lambda alpha: full(inertial(alpha, 0.5), 20)), 0.3),
        Sweep("momentum", "β = 1, λ near its bound, 20 its", table(MOMENTA, within)),
        Sweep("damping", "Anderson, 8 its", table(DAMPINGS, anderson("beta")), 1.0),
        Sweep("window", "Anderson, 8 its", {float(w): anderson("window")(w) for w in WINDOWS}, 5.0),
        Sweep("ridge", "Anderson, 8 its", table(RIDGES, anderson("ridge")), 1e-4),
        Sweep("iterations", "forward step", table(BUDGETS, lambda k: full(ForwardStep(), k)), 12.0),
        Sweep("iterations", "KM", table(BUDGETS, lambda k: full(InertialKM(), k)), 20.0),
        Sweep("iterations", "Adam", table(BUDGETS, lambda k: full(Adam(horizon=k), k))),
        Sweep("iterations", "Anderson", table(BUDGETS, lambda k: full(Anderson(), k)), 8.0),
    ]


def score(found: Tensor, encoder: Tensor) -> dict[str, float]:
    """NMSE over images in dB, and what it gains over the encoder's."""
    (mean, error), gain = mean_and_error(found), encoder - found
    gained, uncertain = mean_and_error(gain)
    return {
        "nmse_db": mean,
        "standard_error": error,
        "worst_db": float(found.max()),
        "gain_db": gained,
        "gain_standard_error": uncertain,
        "worst_gain_db": float(gain.min()),
    }


def measure(model: LatentModel, sweep: Sweep, seen: Pictures, encoder: Tensor, cache: Path) -> list[dict]:
    """A row a value."""
    rows = []
    for value, inverter in sweep.inverters.items():
        name = f"{sweep.parameter} {value:g}, {sweep.method}"
        found = invert_all(model, inverter, seen.images, name=name, cache=cache)
        head = {"parameter": sweep.parameter, "method": sweep.method, "value": value, "its": inverter.max_steps}
        rows.append(head | score(nmse_db(found.latents, seen.latents), encoder))
    return rows


def works_within(rows: list[dict], used: float | None) -> dict:
    """The values around the best at which the method beats the encoder by WORKS dB, without a gap between them.

    `from` and `to` are values tried, so the true range is at least as wide; both None where none works.
    """
    best = max(range(len(rows)), key=lambda i: rows[i]["gain_db"])
    good = [row["gain_db"] >= WORKS for row in rows]
    low = high = best
    while low and good[low - 1]:
        low -= 1
    while high + 1 < len(rows) and good[high + 1]:
        high += 1
    ends = (rows[low]["value"], rows[high]["value"]) if good[best] else (None, None)
    tried = (rows[0]["value"], rows[-1]["value"])
    return {
        "parameter": rows[0]["parameter"],
        "method": rows[0]["method"],
        "used": used,
        "best": rows[best]["value"],
        "best_gain_db": rows[best]["gain_db"],
        "used_gain_db": next((row["gain_db"] for row in rows if row["value"] == used), None),
        "works_from": ends[0],
        "works_to": ends[1],
        "tried": tried,
    }


def categories(name: str, drawn: bool) -> list[str]:
    """What a picture shows: ground and sky of a caption as data/scenes.py writes it; a file's folder, or else its name."""
    if not drawn:
        path = Path(name)
        return [path.parent.name or path.stem]
    found = re.match(rf"({'|'.join(GROUNDS)}) (?:at|in|in a) ({'|'.join(SKIES)})\b", name)
    return [f"ground: {found[1]}", f"sky: {found[2]}"] if found else ["other"]


def by_category(names: list[str], lowest: Tensor, drawn: bool) -> list[dict]:
    """Mean, standard error and minimum over each category's images of the path's minimum cocoercivity; the share above ρ/2."""
    members: dict[str, list[int]] = {"all": list(range(len(names)))}
    for i, name in enumerate(names):
        for category in categories(name, drawn):
            members.setdefault(category, []).append(i)
    rows = []
    for category, which in sorted(members.items()):
        some = lowest[which]
        error = mean_and_error(some)[1] if len(some) > 1 else None
        low = {"mean": float(some.mean()), "standard_error": error, "minimum": float(some.min())}
        low["above_half_rho"] = float((some > ForwardStep().rho / 2).double().mean())
        rows.append({"category": category, "n": len(which)} | low)
    return rows


def draw(rows: list[dict], encoder: float):
    """NMSE against each hyper-parameter, a small panel each.

    Bars are standard errors of the gain over the encoder: the images are the same for all, and differ far more than that.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["parameter"] for row in rows))
    across = min(4, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(3.9 * across, 3.6 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for ax, name in zip(axes, names, strict=False):
        panel(ax, name, [row for row in rows if row["parameter"] == name], encoder)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    return figure


def panel(ax, parameter: str, rows: list[dict], encoder: float) -> None:
    """NMSE against one hyper-parameter, a line a method, beside the encoder and the level that counts as working."""
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        x, y, e = zip(
            *((r["value"], r["nmse_db"], r["gain_standard_error"]) for r in rows if r["method"] == method), strict=True
        )
        ax.errorbar(x, y, e, fmt="o-", ms=3, lw=1.4, capsize=2, color=COLOURS[i % len(COLOURS)], label=method)
    ax.axhline(encoder, color=GREY, lw=1, label="encoder")
    ax.axhline(encoder - WORKS, color=GREY, lw=1, ls="--", label=f"encoder − {WORKS:g} dB")
    ax.set(xlabel=AXES[parameter], ylabel="NMSE (dB)", xscale="linear" if parameter in LINEAR else "log")
    ax.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1)


def draw_categories(rows: list[dict]):
    """Mean (with standard error) and minimum of each category."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.2 + 0.26 * len(rows)), layout="constrained")
    ax = figure.subplots()
    places = range(len(rows))
    errors = [row["standard_error"] or 0.0 for row in rows]
    ax.errorbar([row["mean"] for row in rows], places, xerr=errors, fmt="o", color=INK, ms=5, capsize=2, label="mean")
    ax.plot([row["minimum"] for row in rows], places, "|", color=MARK, ms=10, mew=2, label="minimum")
    ax.axvline(0.5, color=GREY, lw=1, ls="--", label="ρ/2")
    ax.set_yticks(places, [f"{row['category']} ({row['n']})" for row in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("minimum cocoercivity along the forward step's path, ρ = 1")
    figure.legend(loc="outside upper center", fontsize=8, frameon=False, ncols=3)
    return figure


def first(seen: Pictures, number: int) -> Pictures:
    """The first of the pictures."""
    return Pictures(seen.images[:number], seen.latents[:number], None, seen.names[:number])


@click.command()
@experiment_options(16)
@click.option("--paths", default=100, show_default=True, help="Images whose cocoercivity is measured.")
@click.option("--steps", default=300, show_default=True, help="Steps to z_∞.")
@click.option("--at", default=100, show_default=True, help="Steps whose cocoercivity is measured.")
@click.option("--ddim", default=25, show_default=True, help="DDIM steps of the drawn images.")
@click.option("--its", type=int, help="No inversion longer than this.")
@click.option("--every", default=1, show_default=True, help="Only every so-manieth value.")
@click.option("--parameter", "only", multiple=True, type=click.Choice(list(AXES)), help="Only this; may be repeated.")
def main(
    source: str,
    images: Path | None,
    number: int,
    output: Path,
    paths: int,
    steps: int,
    at: int,
    ddim: int,
    its: int | None,
    every: int,
    only: tuple[str, ...],
) -> None:
    """NMSE against each hyper-parameter; cocoercivity over categories of pictures."""
    model, cache = LatentModel.from_pretrained(source), output / "cache"
    seen = pictures(model, max(number, paths), images, steps=ddim, cache=cache)
    chosen = [s.thinned(every, its) for s in sweeps() if s.parameter in (only or AXES)]
    chosen = [s for s in chosen if s.inverters]
    facts = {
        "model": model.identity,
        "source": images.name if images else "drawn",
        "seed": None if images else SEED,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    settings = {"ddim": ddim, "its": its, "every": every, "works_db": WORKS}
    study_parameters(model, chosen, first(seen, number), output, facts | {"settings": settings})
    settings = {"method": repr(ForwardStep()), "steps": steps, "at": at, "ddim": ddim}
    study_categories(model, first(seen, paths), output, facts | {"settings": settings})


def study_parameters(model: LatentModel, chosen: list[Sweep], seen: Pictures, output: Path, facts: dict) -> None:
    """NMSE at every value of every sweep, and the range in which each method works."""
    cache = output / "cache"
    start = invert_all(model, Inverter(max_steps=0), seen.images, name="encoder", cache=cache)
    encoder = nmse_db(start.latents, seen.latents)
    tables = [measure(model, s, seen, encoder, cache) for s in chosen]
    ranges = [works_within(table, s.used) for table, s in zip(tables, chosen, strict=True)]
    rows, figures = [row for table in tables for row in table], {"encoder": score(encoder, encoder), "ranges": ranges}
    figure = draw(rows, float(encoder.mean()))
    write_results(output, "study_sensitivity", rows, figure, **facts, **figures, images=len(seen.names))
    for found in ranges:
        click.echo(line(found))


def study_categories(model: LatentModel, seen: Pictures, output: Path, facts: dict) -> None:
    """The forward step's minimum cocoercivity by what the pictures show."""
    at, steps = facts["settings"]["at"], facts["settings"]["steps"]
    path = walk(model, ForwardStep(), seen, steps=steps, at=at, name="paths", cache=output / "cache")
    table = by_category(seen.names, path.lowest, drawn=facts["seed"] is not None)
    write_results(output, "cocoercivity_by_category", table, draw_categories(table), **facts, images=len(seen.names))
    for row in table:
        click.echo(
            f"{row['category']:24} n {row['n']:3}  mean {row['mean']:.3f}  minimum {row['minimum']:.3f}  above ρ/2 {row['above_half_rho']:.0%}"
        )


def line(found: dict) -> str:
    """A range for the terminal."""
    text = f"{found['parameter']:14} {found['method']:32} best {found['best']:g} (+{found['best_gain_db']:.2f} dB)"
    if found["works_from"] is None:
        return text + "  nowhere 1 dB better than the encoder"
    return text + f"  1 dB better than the encoder from {found['works_from']:g} to {found['works_to']:g}"


if __name__ == "__main__":
    main()
