"""Are the p-values true? How often keys are called present in images that carry none.

    ringmark generate --no-mark -n 1000 --seed 200000 -o build/unmarked              # none of them calibrated pocket
    python scripts/study_false_positives.py build/unmarked -o build/false-positives  # 15 minutes of two cores
    python scripts/study_false_positives.py PHOTOGRAPHS -o build/false-positives-photos --halves --attack flip --attack crop:0.75
    python scripts/study_false_positives.py build/unmarked -o build/false-positives-small --keys 2 --steps 4 --halves

Every image is held against `--keys` keys of each of three families: the pattern *rand* and the pattern *ring* in the
default placement, and the pattern *ring* as published (arXiv 2305.20030: the published mask, one channel, radius 10 of
64); and against the one key *zeros* of the default placement, whose test is not the cosine but that of powers. Noise is
recovered once for each image and attack, so more keys cost next to nothing. Four tests are asked:

- verdict: the p-value that the verdict rests on, that of the whitened cosine and for *zeros* of the power ratio;
- conformal: the p-value by rank among the unmarked images of the calibration, by which the verdict is checked;
- published p: the p-value of arXiv 2305.20030;
- threshold 77: a mean distance below 77 for 64x64 latents, scaled to others by the side, which stands as a literal in a
  widely installed package. It knows no level.

Without --halves the model's own calibration is used, or that of --calibration. With --halves every second image makes
a calibration for the others, and they one for the first; attacked images are only tested, never calibrated on.

For each key the interval of its rate is Clopper and Pearson's. It is a 95 % interval, so of 10 keys at three levels
one or two may miss the nominal level by chance; where rates are small it is wider, and fewer do. The keys of a family
see the same images, so their mean rate has an interval by bootstrap over the images.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from ringmark.data.sources import find_images
from ringmark.errors import RingmarkError
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.attacks.chains import expand
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.evaluation.cells import CLEAN
from ringmark.watermark.evaluation.rates import rate
from ringmark.watermark.figures import COLOURS
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.tree_ring import Placement, make_key, recommend
from ringmark.watermark.statistics import conformal_p, published_distance, published_p_value
from ringmark.watermark.tasks.attack import attack_files, attacked_name
from ringmark.watermark.tasks.recover import recover_files
from scripts.experiments.common import SEED, write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = (0.05, 0.01, 0.001)
LITERAL = 77  # a mean distance, for latents of 64x64
RANKED = ("verdict", "conformal", "published p")
TESTS = (*RANKED, f"threshold {LITERAL}")


def families(model: LatentModel, number: int, seed: int) -> dict[str, list[Key]]:
    """Keys of each family, from a fixed seed: an experiment's keys are no secret. All keys *zeros* are the same."""
    rng, best = np.random.default_rng(seed), recommend(model.recovery, model.latent_shape)
    published = Placement((best.channels[0],), (1, 10 * min(model.latent_shape[1:]) // 64))
    make = partial(make_key, model.latent_shape, model=model.identity, rng=rng)
    return {
        "rand": [make(best, pattern="rand") for _ in range(number)],
        "ring": [make(best, pattern="ring") for _ in range(number)],
        "published": [make(published, pattern="ring", mask="published") for _ in range(number)],
        "zeros": [make(best, pattern="zeros")],
    }


def tested(detector: Detector, key: Key, noise: Tensor) -> dict[str, np.ndarray]:
    """Of each test its p-values (n,) on recovered noise (n, C, h, w); of the threshold 0 where it fires, else 1."""
    looking = Detector(
        detector.model, [key], inverter=detector.inverter, steps=detector.steps, calibration=detector.calibration
    )
    scheme = looking.schemes[key.fingerprint]
    score, p = looking.statistic(scheme, noise)
    published = [x.numpy() for x in scheme.masked(noise)]
    fires = published_distance(*published) < LITERAL * min(detector.model.latent_shape[1:]) / 64
    conformal = conformal_p(score, looking.reference_scores(key.fingerprint))
    return dict(zip(TESTS, (p, conformal, published_p_value(*published), 1.0 - fires), strict=True))


def by_halves(detector: Detector, clean: Tensor, keys: list[Key], noise: Tensor) -> list[dict[str, np.ndarray]]:
    """Of each key its tests of every image's `noise`, on the null of those images of the other half that are `clean`."""
    both = []
    for half in (0, 1):
        other = clean[1 - half :: 2]
        made = detector.with_calibration(Calibration.measure(other, detector.settings(), {"given": len(other)}))
        both.append([tested(made, key, noise[half::2]) for key in keys])
    joined = [{name: np.empty(len(noise)) for name in TESTS} for _ in keys]
    for half, found in enumerate(both):
        for whole, part in zip(joined, found, strict=True):
            for name in TESTS:
                whole[name][half::2] = part[name]
    return joined


def rows_of(about: dict, found: list[dict[str, np.ndarray]]) -> list[dict]:
    """A row a key and test: rates at LEVELS with their intervals, and the p-value of Kolmogorov and Smirnov's test."""
    rows = []
    for number, tests in enumerate(found):
        for name, p in tests.items():
            row = about | {"key": number, "test": name, "images": len(p)}
            for level in LEVELS:
                share, (low, high) = rate(int((p <= level).sum()), len(p))
                row |= {f"{level:g}": share, f"{level:g} low": low, f"{level:g} high": high}
            rows.append(row | {"KS p": float(stats.kstest(p, "uniform").pvalue) if name in RANKED else None})
    return rows


def pooled(about: dict, found: list[dict[str, np.ndarray]], seed: int) -> list[dict]:
    """A row a test: the keys' mean rate, its interval by bootstrap over images, and how many keys' intervals hold the level."""
    rows, keys = [], rows_of(about, found)
    for name in TESTS:
        own, p = [row for row in keys if row["test"] == name], np.stack([tests[name] for tests in found])
        row = about | {"test": name, "keys": len(p), "images": p.shape[1]}
        for level in LEVELS:
            low, high = bootstrap((p <= level).mean(0), seed)
            held = sum(r[f"{level:g} low"] <= level <= r[f"{level:g} high"] for r in own)
            row |= {f"{level:g}": float((p <= level).mean()), f"{level:g} low": low, f"{level:g} high": high}
            row |= {f"{level:g} held": held, f"{level:g} worst": max(r[f"{level:g}"] for r in own)}
        ks = [r["KS p"] for r in own if r["KS p"] is not None]
        rows.append(row | {"KS p least": min(ks, default=None), "KS p below 0.05": sum(x < 0.05 for x in ks)})
    return rows


def bootstrap(shares: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of (n,) independent shares; of equal ones, which tell nothing apart, the exact interval."""
    if np.ptp(shares) == 0:
        return rate(round(shares[0] * len(shares)), len(shares))[1]
    found = stats.bootstrap((shares,), np.mean, method="percentile", rng=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def figure_of(found: dict[tuple[str, str], list[dict[str, np.ndarray]]]) -> Figure:
    """What share of images has p at or below a level, against the level; a panel a condition and family, a line a key."""
    from matplotlib.figure import Figure

    conditions, kinds = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    figure = Figure(figsize=(1 + 3.6 * len(kinds), 0.6 + 3.4 * len(conditions)), layout="constrained")
    axes = figure.subplots(len(conditions), len(kinds), squeeze=False, sharex=True, sharey=True)
    for (condition, kind), keys in found.items():
        ax = axes[conditions.index(condition), kinds.index(kind)]
        for name, colour in zip(RANKED, (COLOURS[0], COLOURS[2], COLOURS[1]), strict=True):
            for number, tests in enumerate(keys):
                p = np.sort(tests[name])
                shares = np.arange(1, len(p) + 1) / len(p)
                ax.plot(p, shares, color=colour, lw=0.8, alpha=0.7, label=None if number else name)
        floor = 0.5 / len(p)
        ax.plot([floor, 1], [floor, 1], color="black", lw=1, ls=":", label="a true p-value")
        ax.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.1), title=f"{condition}, keys: {kind}")
    for ax in axes[-1]:
        ax.set_xlabel("level")
    for ax in axes[:, 0]:
        ax.set_ylabel("share of unmarked images with p ≤ level")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def summary(rows: list[dict]) -> str:
    """The pooled rows in words."""
    told = []
    for r in rows:
        rates = ", ".join(
            f"{100 * r[f'{level:g}']:.2f} % [{100 * r[f'{level:g} low']:.2f}, {100 * r[f'{level:g} high']:.2f}] at "
            f"{100 * level:g} % ({r[f'{level:g} held']}/{r['keys']})"
            for level in LEVELS
        )
        ks = "" if r["KS p least"] is None else f"; KS p ≥ {r['KS p least']:.3g}, {r['KS p below 0.05']} below 0.05"
        told.append(f"{r['attack']:10} {r['family']:10} {r['test']:13} {rates}{ks}")
    return "\n".join(told)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@click.option("--model", "source", default="pocket", show_default=True, help='"pocket", a folder or a hub id.')
@click.option("--calibration", type=click.Path(path_type=Path), help="In place of the model's own.")
@click.option("--halves", is_flag=True, help="Calibrate on one half of the images, test on the other, and in turn.")
@click.option("--attack", "specs", multiple=True, help="As in ringmark attack; again for more.")
@click.option("--keys", default=10, show_default=True, help="Of each family.")
@click.option("--steps", default=25, show_default=True, help="Of DDIM.")
@click.option("--seed", default=SEED, show_default=True, help="Of keys and attacks.")
def main(
    folder: Path, output: Path, source: str, calibration: Path | None, halves: bool, specs: tuple[str, ...],
    keys: int, steps: int, seed: int,
) -> None:  # fmt: skip
    """False-positive rates on the unmarked images of FOLDER."""
    if halves and calibration:
        raise click.UsageError("--halves makes its own calibrations; leave out one of the two")
    try:
        rows, found, facts = study(folder, output, source, calibration, halves, specs, keys, steps, seed)
    except RingmarkError as error:
        raise click.UsageError(str(error)) from None
    click.echo(summary(rows))
    every = [row for about, some in found.items() for row in rows_of(_about(about), some)]
    write_results(output, "study_false_positives", rows, figure_of(found), keys=every, **facts)


def _about(names: tuple[str, str]) -> dict:
    return dict(zip(("attack", "family"), names, strict=True))


def study(
    folder: Path, output: Path, source: str, calibration: Path | None, in_halves: bool, specs: tuple[str, ...],
    number: int, steps: int, seed: int,
) -> tuple[list[dict], dict[tuple[str, str], list[dict[str, np.ndarray]]], dict]:  # fmt: skip
    """Pooled rows, by attack and family what every key's tests say of every image, and the settings."""
    model = LatentModel.from_pretrained(source)
    detector, images = Detector(model, [], steps=steps), find_images(folder)
    if not in_halves:
        own = calibration or Path(resolve(source)) / Calibration.FILE
        detector = detector.with_calibration(Calibration.load(own))
    places = {CLEAN: images}
    for chain in expand(specs):
        place = output / "attacked" / chain.slug
        attack_files(folder, place, [chain], seed=seed, model=model)
        places[str(chain)] = [place / attacked_name(path.relative_to(folder).as_posix()) for path in images]
    noise = {}
    for name, paths in places.items():
        files = recover_files(detector, paths, output / "cache", name=name)
        if files.refused or files.doubts:
            raise RingmarkError(f"{folder}: {len(files.refused) + len(files.doubts)} images cannot be used; move them")
        noise[name] = files.noise
    found = {}
    for family, keys in families(model, number, seed).items():
        for name in tqdm(noise, family, disable=None):
            if in_halves:
                found[name, family] = by_halves(detector, noise[CLEAN], keys, noise[name])
            else:
                found[name, family] = [tested(detector, key, noise[name]) for key in keys]
    rows = [row for about, some in sorted(found.items()) for row in pooled(_about(about), some, seed)]
    used = "halves" if in_halves else detector.calibration.fingerprint
    facts = {"model": model.identity, "images": len(images), "keys_each": number, "steps": steps, "seed": seed}
    return rows, found, facts | {"calibration": used, "torch": torch.__version__}


if __name__ == "__main__":
    main()
