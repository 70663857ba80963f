"""How well the search finds rotated, cropped and shifted marks, and what it costs.

    python -m scripts.experiments search -o build/search                         # 24 marked and 24 unmarked images
    python -m scripts.experiments search -o build/search-small -n 4 --search-steps 5   # 2 and 2

Marked images, drawn with the default key's placement, and unmarked ones are rotated by 75°, cropped to 75 % of their
area at a random position and enlarged again, rotated and cropped, shifted cyclically by (13, -22) pixels, or left
unchanged. Each is tested by the ordinary detector, by the search, and by both as in `--search`: twice the smaller p,
with the search only if the ordinary p is not significant. AUCs are of the scores (for both: of p); rates are shares of
p-values at the level α.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from ringmark.data.images import Sample, from_array, to_array
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.attacks import chains
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.detect.search import Search
from ringmark.watermark.evaluation.rates import roc
from ringmark.watermark.null import Null
from scripts.experiments.common import SEED, Bench, experiment
from scripts.experiments.plots import columns, intervals, legend_below, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHIFT = (13, -22)  # px right and down; not whole latents
ATTACKS = ("clean", "shift", "rotation:75", "crop:0.75", "rotation:-20+crop:0.75")
TESTS = 2  # tests per key if pictures are searched
WAYS = ("without", "search", "both")
COLOURS = {"without": "#8d99ae", "search": "#1b3a5c", "both": "#d1495b"}


def attacked(spec: str, image: Image.Image, seed: int) -> Image.Image:
    """Apply one of ATTACKS; a shift is cyclic, so that no pixel is lost."""
    if spec == "clean":
        return image
    return ImageChops.offset(image, *SHIFT) if spec == "shift" else chains.apply(spec, image, seed)


def without(recoverer: Recoverer, detector: Detector, images: Tensor) -> dict[str, Tensor]:
    """Score, p-value and seconds (B,) of the ordinary detector."""
    recovered, (key,) = recoverer(images), detector.schemes
    score, log10_p = detector.statistic(key, torch.nan_to_num(recovered.noise))
    seconds, inversions = np.full(len(images), recovered.seconds), np.ones(len(images))
    return _columns(score=score, p=10**log10_p, seconds=seconds, inversions=inversions)


def searched(search: Search, model: LatentModel, detector: Detector, images: Tensor) -> dict[str, Tensor]:
    """Score, p-value and seconds (B,) of the search, with the angle and scale found (B,)."""
    samples = [Sample(str(i), from_array(x.numpy())) for i, x in enumerate(images)]
    fits = [fit for (fit,) in search(model, detector.schemes, detector.known, samples)]
    angle, scale = np.array([fit.candidate for fit in fits]).T
    values = {name: [getattr(fit, name) for fit in fits] for name in ("score", "p_value", "seconds", "inversions")}
    return _columns(p=values.pop("p_value"), **values, angle=angle, scale=scale)


def both(one: dict[str, np.ndarray], other: dict[str, np.ndarray], alpha: float) -> dict[str, np.ndarray]:
    """Columns (N,) of both tests combined as by `--search`, from those of the ordinary detector and of the search."""
    first, tests = np.minimum(1, TESTS * one["p"]), TESTS
    again = first > alpha
    p = np.where(again, np.minimum(first, np.minimum(1, tests * other["p"])), first)
    cost = {name: one[name] + again * other[name] for name in ("seconds", "inversions")}
    return {"p": p, "score": -p} | cost


def _columns(**columns: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(values, float)) for name, values in columns.items()}


def row(attack: str, way: str, found: dict[str, np.ndarray], marked: int, alpha: float) -> dict:
    """AUC with its interval, the shares called marked, and the cost; the first `marked` images are marked."""
    yes, no = found["score"][:marked], found["score"][marked:]
    curve, fires = roc(yes, no, fpr_limit=alpha), found["p"] <= alpha
    return {
        "attack": attack, "way": way, "marked": len(yes), "unmarked": len(no),
        "AUC": curve.auc, "AUC low": curve.auc_interval[0], "AUC high": curve.auc_interval[1],
        "found": float(fires[:marked].mean()), "false": float(fires[marked:].mean()),
        "least p unmarked": float(found["p"][marked:].min()), "median p marked": float(np.median(found["p"][:marked])),
        "mean score marked": float(yes.mean()), "mean score unmarked": float(no.mean()),
        "inversions": float(found["inversions"].mean()), "seconds": float(np.median(found["seconds"])),
    }  # fmt: skip


def summary(rows: list[dict], alpha: float) -> str:
    """The rows as text."""
    return "\n".join(
        f"{r['attack']:24} {r['way']:8} AUC {r['AUC']:.3f} [{r['AUC low']:.3f}, {r['AUC high']:.3f}], "
        f"p ≤ {alpha:g}: marked {r['found']:.0%} of {r['marked']}, unmarked {r['false']:.0%} of {r['unmarked']}, "
        f"{r['inversions']:.0f} inversions, {r['seconds']:.2f} s per image"
        for r in rows
    )


def figure_of(rows: list[dict], alpha: float) -> Figure:
    """AUC with its interval, and the share of marked images found, by attack."""
    figure, (left, right) = panels(10, 4, across=2)
    names = list(dict.fromkeys(r["attack"] for r in rows))
    for k, way in enumerate(WAYS):
        members = [r for r in rows if r["way"] == way]
        x, style = np.arange(len(members)) + 0.26 * (k - 1), {"fmt": "osd"[k], "color": COLOURS[way], "label": way}
        intervals(left, x, members, "AUC", "AUC low", "AUC high", capsize=3, **style)
        right.bar(x, *columns(members, "found"), 0.24, color=COLOURS[way])
    left.axhline(0.5, color="grey", ls=":", lw=1)
    left.set(ylabel="AUC, 95 % interval", ylim=(0, 1.03))
    right.set(ylabel=f"marked images found at p ≤ {alpha:g}", ylim=(0, 1.03))
    for ax in (left, right):
        ax.set_xticks(range(len(names)), names, fontsize=8, rotation=20)
    legend_below(figure, 3)
    return figure


def judged(bench: Bench, detector: Detector, search: Search, images: Tensor, spec: str) -> dict[str, dict]:
    """Columns (N,) by way."""
    settings = [bench.recoverer.settings, detector.settings()]
    ways = {
        "without": (partial(without, bench.recoverer, detector), settings),
        "search": (partial(searched, search, bench.model, detector), [*settings, search]),
    }
    found = {}
    for way, (make, key) in ways.items():
        tensors = bench.batches([way, *key], make, images, name=f"{spec}, {way}", batch=4)
        found[way] = {column: values.numpy() for column, values in tensors.items()}
    return found | {"both": both(found["without"], found["search"], detector.alpha)}


@experiment(48)
@click.option("--search-steps", default=Search.steps, show_default=True, help="DDIM steps of the search's inversions.")
@click.option("--dear", default=Search.dear, show_default=True, help="Candidates of the fine stage.")
@click.option("--angle-step", default=2.0, show_default=True, help="Degrees between the angles of the grid.")
@click.option(
    "--attack",
    "specs",
    multiple=True,
    default=ATTACKS,
    show_default=True,
    help="How images are altered; may be repeated.",
)
def main(bench: Bench, search_steps: int, dear: int, angle_step: float, specs: tuple[str, ...]) -> None:
    """A mark in rotated, cropped and shifted images, without the search, with the search alone and with both."""
    detector, rows = Detector([bench.key(seed=SEED)], null=Null.of_model(bench.model)), []
    (scheme,) = detector.schemes.values()
    search = Search(angles=tuple(np.arange(-180, 180, angle_step).tolist()), steps=search_steps, dear=dear)
    seen, alpha = bench.pictures(scheme), detector.alpha
    for spec in specs:
        changed = [attacked(spec, from_array(x.numpy()), bench.first + i) for i, x in enumerate(seen.images)]
        images = torch.from_numpy(np.stack([to_array(x) for x in changed]))
        found = judged(bench, detector, search, images, spec)
        rows += [row(spec, way, found[way], bench.number // 2, alpha) for way in WAYS]
        click.echo(summary(rows[-len(WAYS) :], alpha))
    facts = {"alpha": alpha, "grid": len(search.grid), "tests": search.tests(bench.model.latent_shape)}
    facts |= {"scales": search.scales, "placement": [list(scheme.placement.channels), list(scheme.placement.radii)]}
    bench.write(rows, figure_of(rows, alpha), **facts)
