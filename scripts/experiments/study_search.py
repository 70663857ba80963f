"""What the search for a turned, cropped or shifted mark finds, and what it costs.

    python scripts/study_search.py -o build/search                        # 24 marked and 24 unmarked drawn images
    python scripts/study_search.py -o build/search-small -n 4 --steps 5   # 2 and 2

Marked images, drawn with the default key's placement, and unmarked ones are turned by 75°, cropped to 75 % of their
area at a random place and enlarged again, turned and cropped, moved round by (13, -22) pixels, or left alone. Each is
judged by the ordinary detector, by the search, and as `--search` judges by both: twice the smaller p, with the search
only where the ordinary p does not suffice. AUCs are of the scores (of p for both), rates of p-values at the detector's α.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor
from tqdm import tqdm

from ringmark.data.images import Sample, from_array, to_array
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.attacks import distortions as attacks
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.detect.geometry import Search
from ringmark.watermark.detect.search import SearchingDetector
from ringmark.watermark.evaluation.rates import roc
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.tree_ring import make_key, recommend
from scripts.experiments.common import SEED, cached, experiment_options, pictures, write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHIFT = (13, -22)  # px right and down; not whole latents
ATTACKS = ("clean", "shift", "rotation:75", "crop:0.75", "rotation:-20+crop:0.75")
WAYS = ("without", "search", "both")
COLOURS = {"without": "#8d99ae", "search": "#1b3a5c", "both": "#d1495b"}


def attacked(spec: str, image: Image.Image, seed: int) -> Image.Image:
    """One of ATTACKS; a shift is cyclic, so that nothing is lost but place."""
    if spec == "clean":
        return image
    return ImageChops.offset(image, *SHIFT) if spec == "shift" else attacks.apply(spec, image, seed)


def without(detector: Detector, images: Tensor) -> dict[str, Tensor]:
    """Score, p-value and seconds (B,) of the ordinary detector."""
    recovered = detector.recover(images)
    (scheme,) = detector.schemes.values()
    score, p = detector.statistic(scheme, torch.nan_to_num(recovered.noise))
    return _columns(score=score, p=p, seconds=np.full(len(images), recovered.seconds), inversions=np.ones(len(images)))


def searched(search: Search, detector: Detector, images: Tensor) -> dict[str, Tensor]:
    """The same of the search, with the angle and scale found (B,)."""
    samples = [Sample(str(i), from_array(x.numpy())) for i, x in enumerate(images)]
    found = [f for (f,) in search(detector, samples)]
    of = lambda field: np.array([getattr(f, field) for f in found])
    angle, scale = np.array([f.candidate for f in found]).T
    return _columns(
        score=of("score"), p=of("p_value"), seconds=of("seconds"), inversions=of("inversions"), angle=angle, scale=scale
    )


def both(one: dict[str, np.ndarray], other: dict[str, np.ndarray], alpha: float) -> dict[str, np.ndarray]:
    """As `--search` judges: columns (N,) from those of the ordinary detector and of the search."""
    first, tests = np.minimum(1, SearchingDetector.TESTS * one["p"]), SearchingDetector.TESTS
    again = first > alpha
    p = np.where(again, np.minimum(first, np.minimum(1, tests * other["p"])), first)
    cost = {name: one[name] + again * other[name] for name in ("seconds", "inversions")}
    return {"p": p, "score": -p} | cost


def _columns(**columns: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(values, float)) for name, values in columns.items()}


def judged(
    way: Callable[[Tensor], dict[str, Tensor]], key: list, images: Tensor, name: str, cache: Path, batch: int = 4
) -> dict[str, np.ndarray]:
    """Columns (N,) of all images, batch by batch. What was judged before is read from the folder `cache`."""
    parts = []
    for some in tqdm(images.split(batch), name, leave=False, disable=None):
        parts.append(cached(cache, [*key, some], partial(way, some)))
    return {column: torch.cat([p[column] for p in parts]).numpy() for column in parts[0]}


def row(attack: str, way: str, found: dict[str, np.ndarray], marked: int, alpha: float) -> dict:
    """AUC with its interval, the shares called marked, and the cost; the first `marked` images are."""
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
    """In words."""
    return "\n".join(
        f"{r['attack']:24} {r['way']:8} AUC {r['AUC']:.3f} [{r['AUC low']:.3f}, {r['AUC high']:.3f}], "
        f"p ≤ {alpha:g}: marked {r['found']:.0%} of {r['marked']}, unmarked {r['false']:.0%} of {r['unmarked']}, "
        f"{r['inversions']:.0f} inversions, {r['seconds']:.2f} s an image"
        for r in rows
    )


def figure_of(rows: list[dict], alpha: float) -> Figure:
    """AUC with its interval, and the share of marked images found, by attack."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(r["attack"] for r in rows))
    for k, way in enumerate(WAYS):
        some = [r for r in rows if r["way"] == way]
        x = np.arange(len(some)) + 0.26 * (k - 1)
        auc, low, high = (np.array([r[c] for r in some]) for c in ("AUC", "AUC low", "AUC high"))
        left.errorbar(x, auc, [auc - low, high - auc], fmt="osd"[k], color=COLOURS[way], capsize=3, label=way)
        right.bar(x, [r["found"] for r in some], 0.24, color=COLOURS[way])
    left.axhline(0.5, color="grey", ls=":", lw=1)
    left.set(ylabel="AUC, 95 % interval", ylim=(0, 1.03))
    right.set(ylabel=f"marked images found at p ≤ {alpha:g}", ylim=(0, 1.03))
    for ax in (left, right):
        ax.set_xticks(range(len(names)), names, fontsize=8, rotation=20)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def study_key(model: LatentModel) -> Key:
    """The default placement and pattern, from a fixed seed: an experiment's key is no secret."""
    placement = recommend(model.recovery, model.latent_shape)
    return make_key(model.latent_shape, placement, model=model.identity, rng=np.random.default_rng(SEED))


@click.command()
@experiment_options(48)
@click.option("--steps", default=Search.steps, show_default=True, help="DDIM steps of the search's inversions.")
@click.option("--dear", default=Search.dear, show_default=True, help="Candidates inverted anew.")
@click.option("--angle-step", default=2.0, show_default=True, help="Degrees between the angles of the grid.")
@click.option("--attack", "specs", multiple=True, default=ATTACKS, show_default=True, help="What is done to images.")
def main(
    source: str, images: Path | None, number: int, output: Path, steps: int, dear: int, angle_step: float, specs: tuple
) -> None:
    """A mark in turned, cropped and shifted images, without the search, by it alone and by both."""
    if images:
        raise click.UsageError("--images: the mark is planted as images are drawn; leave it out")
    model, cache = LatentModel.from_pretrained(source), output / "cache"
    detector = Detector(model, [study_key(model)])
    (scheme,) = detector.schemes.values()
    search = Search(angles=tuple(np.arange(-180, 180, angle_step).tolist()), steps=steps, dear=dear)
    seen, marked = pictures(model, number, scheme=scheme, cache=cache), number // 2
    ways = {"without": partial(without, detector), "search": partial(searched, search, detector)}
    keys = {"without": [detector.settings()], "search": [detector.settings(), search]}
    rows = []
    for spec in specs:
        some = [attacked(spec, from_array(x.numpy()), SEED + i) for i, x in enumerate(seen.images)]
        tensor = torch.from_numpy(np.stack([to_array(x) for x in some]))
        found = {way: judged(ways[way], [way, *keys[way]], tensor, f"{spec}, {way}", cache) for way in ways}
        found["both"] = both(*found.values(), detector.alpha)
        rows += [row(spec, way, found[way], marked, detector.alpha) for way in WAYS]
        click.echo(summary(rows[-len(WAYS) :], detector.alpha))
    write_results(
        output, "study_search", rows, figure_of(rows, detector.alpha),
        model=model.identity, n=number, seed=SEED, alpha=detector.alpha, grid=len(search.grid),
        tests=search.tests(model.latent_shape), steps=steps, dear=dear, angle_step=angle_step, scales=search.scales,
        placement=[list(scheme.placement.channels), list(scheme.placement.radii)],
        threads=torch.get_num_threads(), torch=torch.__version__, device=str(model.device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
