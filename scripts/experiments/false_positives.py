"""Are the p-values valid? How often keys are called present in unmarked images.

    ringmark generate --no-mark -n 1000 --seed 200000 -o build/unmarked              # none of them calibrated pocket
    python -m scripts.experiments false_positives build/unmarked -o build/false-positives  # 15 minutes of two cores
    python -m scripts.experiments false_positives PHOTOGRAPHS -o build/photos --halves --attack flip --attack crop:0.75
    python -m scripts.experiments false_positives build/unmarked -o build/small --keys 2 --steps 4 --halves

Every image is tested for `--keys` keys of each of three families: the patterns *rand* and *ring* in the default
placement, and the pattern *ring* as published (arXiv 2305.20030: the published mask, one channel, radius 10 of 64). It
is also tested for the single key *zeros* of the default placement, whose test uses powers instead of the cosine. Noise
is recovered once for each image and attack, so more keys cost almost nothing. There are four tests:
- verdict: the p-value of the verdict, from the whitened cosine, or for *zeros* from the power ratio;
- conformal: the p-value by rank among the unmarked images of the calibration, which checks the verdict;
- published p: the p-value of arXiv 2305.20030;
- threshold 77: a mean distance below 77 for 64x64 latents, scaled to others by the side, which is a literal in a widely
  installed package. It has no level.

Without --halves, the model's own calibration or that of --calibration is used. With --halves, each half of the images
(every second one) is the calibration of the other; attacked images are only tested, never used to calibrate.

The interval of each key's rate is Clopper and Pearson's. It is a 95 % interval, so of 10 keys at three levels one or
two may miss the nominal level by chance; for small rates it is wider, and fewer do. The keys of a family are tested on
the same images, so the interval of their mean rate is a bootstrap over images.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from ringmark.data.results import ResultsFolder
from ringmark.data.sources import find_images
from ringmark.errors import RingmarkError
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.recover import STEPS, Recoverer, RecoverySettings
from ringmark.watermark.attacks.chains import Chain
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.evaluation.cells import CLEAN
from ringmark.watermark.evaluation.rates import rate
from ringmark.watermark.figures import COLOURS
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.statistics import conformal_p
from ringmark.watermark.tasks.attack import attack_files, attacked_name
from ringmark.watermark.tasks.recover import recover_files
from scripts.experiments.common import SEED, Bench, attack_option, experiment
from scripts.experiments.plots import legend_below, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = (0.05, 0.01, 0.001)
LITERAL = 77  # a mean distance, for latents of 64x64
RANKED = ("verdict", "conformal", "published p")
TESTS = (*RANKED, f"threshold {LITERAL}")


Tests = dict[str, np.ndarray]
"""p-values (n,) of n images by test."""


def families(bench: Bench, number: int) -> dict[str, list[Key]]:
    """Keys of each family. All keys *zeros* are the same."""
    published = Placement((bench.bands[-1].channels[0],), (1, 10 * min(bench.model.latent_shape[1:]) // 64))
    make = partial(bench.key, seed=np.random.default_rng(bench.seed))
    return {
        "rand": [make(pattern="rand") for _ in range(number)],
        "ring": [make(pattern="ring") for _ in range(number)],
        "published": [make(published, pattern="ring", mask="published") for _ in range(number)],
        "zeros": [make(pattern="zeros")],
    }


def tested(calibration: Calibration, key: Key, noise: Tensor) -> Tests:
    """p-values (n,) of recovered noise (n, C, h, w) by test; for the threshold 0 if it fires, otherwise 1."""
    detector, name = Detector([key], null=calibration.null, calibration=calibration), key.fingerprint
    score, log10_p = detector.statistic(name, noise)
    published = detector.schemes[name].published(noise)
    fires = published["published_distance"] < LITERAL * min(calibration.latent_shape[1:]) / 64
    conformal = conformal_p(score, detector.reference_scores(name))
    return dict(zip(TESTS, (10**log10_p, conformal, published["published_p"], 1.0 - fires), strict=True))


def by_halves(settings: RecoverySettings, clean: Tensor, keys: list[Key], noise: Tensor) -> list[Tests]:
    """Each key's tests of the `noise` of all images, under the null of the `clean` noise of the other half."""
    joined = [{name: np.empty(len(noise)) for name in TESTS} for _ in keys]
    for half in (0, 1):
        other = clean[1 - half :: 2]
        calibration = Calibration.measure(other, settings.as_dict(), {"given": len(other)})
        for whole, key in zip(joined, keys, strict=True):
            for name, p in tested(calibration, key, noise[half::2]).items():
                whole[name][half::2] = p
    return joined


def rows_of(about: dict, found: list[Tests]) -> list[dict]:
    """A row per key and test: rates at LEVELS with their intervals, and the p-value of the Kolmogorov-Smirnov test."""
    rows = []
    for number, tests in enumerate(found):
        for name, p in tests.items():
            row = about | {"key": number, "test": name, "images": len(p)}
            for level in LEVELS:
                share, (low, high) = rate(int((p <= level).sum()), len(p))
                row |= {f"{level:g}": share, f"{level:g} low": low, f"{level:g} high": high}
            rows.append(row | {"KS p": float(stats.kstest(p, "uniform").pvalue) if name in RANKED else None})
    return rows


def pooled(about: dict, found: list[Tests], seed: int) -> list[dict]:
    """A row per test: the keys' mean rate with a bootstrap interval over images, and how many keys hold the level."""
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
    """95 % interval of the mean of independent shares (n,); the exact interval if all are equal."""
    if np.ptp(shares) == 0:
        return rate(round(shares[0] * len(shares)), len(shares))[1]
    found = stats.bootstrap((shares,), np.mean, method="percentile", rng=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def figure_of(found: dict[tuple[str, str], list[Tests]]) -> Figure:
    """The share of images with p ≤ level against the level: a panel per condition and family, a line per key."""
    conditions, kinds = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    size = 1 + 3.6 * len(kinds), 0.6 + 3.4 * len(conditions)
    figure, axes = panels(*size, len(conditions), len(kinds), sharex=True, sharey=True)
    for (condition, kind), keys in found.items():
        ax = axes[conditions.index(condition) * len(kinds) + kinds.index(kind)]
        plot_shares(ax, keys)
        ax.set_title(f"{condition}, keys: {kind}")
    for ax in axes[-len(kinds) :]:
        ax.set_xlabel("level")
    for ax in axes[:: len(kinds)]:
        ax.set_ylabel("share of unmarked images with p ≤ level")
    legend_below(figure, 4)
    return figure


def plot_shares(ax: Axes, keys: list[Tests]) -> None:
    """The distribution of each test's p-values, with a line per key."""
    images = len(keys[0][RANKED[0]])
    shares, floor = np.arange(1, images + 1) / images, 0.5 / images
    for name, colour in zip(RANKED, (COLOURS[0], COLOURS[2], COLOURS[1]), strict=True):
        for number, tests in enumerate(keys):
            label = None if number else name
            ax.plot(np.sort(tests[name]), shares, color=colour, lw=0.8, alpha=0.7, label=label)
    ax.plot([floor, 1], [floor, 1], color="black", lw=1, ls=":", label="valid p-value")
    ax.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.1))


def summary(rows: list[dict]) -> str:
    """The pooled rows as text."""
    lines = []
    for r in rows:
        rates = ", ".join(
            f"{100 * r[f'{level:g}']:.2f} % [{100 * r[f'{level:g} low']:.2f}, {100 * r[f'{level:g} high']:.2f}] at "
            f"{100 * level:g} % ({r[f'{level:g} held']}/{r['keys']})"
            for level in LEVELS
        )
        ks = "" if r["KS p least"] is None else f"; KS p ≥ {r['KS p least']:.3g}, {r['KS p below 0.05']} below 0.05"
        lines.append(f"{r['attack']:10} {r['family']:10} {r['test']:13} {rates}{ks}")
    return "\n".join(lines)


def attacked_files(bench: Bench, folder: Path, attacks: dict[str, Chain | None]) -> dict[str, list[Path]]:
    """The images of a folder by attack; attacked ones are written."""
    images = find_images(folder)
    places = {CLEAN: images}
    for name, chain in attacks.items():
        if chain is not None:
            place = bench.output / "attacked" / chain.slug
            attack_files(folder, place, [chain], seed=bench.seed, model=bench.model)
            places[name] = [place / attacked_name(path.relative_to(folder).as_posix()) for path in images]
    return places


def recovered(recoverer: Recoverer, places: dict[str, list[Path]], kept: ResultsFolder) -> dict[str, Tensor]:
    """Noise of all files by attack. Raises RingmarkError if any file cannot be used."""
    found = {name: recover_files(recoverer, paths, kept, name=name) for name, paths in places.items()}
    for name, files in found.items():
        if unusable := len(files.refused) + len(files.doubts):
            raise RingmarkError("experiment.images", f"{unusable} images cannot be used", subject=name)
    return {name: files.noise for name, files in found.items()}


def _about(names: tuple[str, str]) -> dict[str, str]:
    return dict(zip(("attack", "family"), names, strict=True))


@experiment(seed=SEED, drawing=False)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--steps", default=STEPS, show_default=True, help="Steps of the sampler inversion.")
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="Calibration file to use instead of the model's own."
)
@click.option("--halves", is_flag=True, help="Calibrate on each half of the images and test on the other.")
@attack_option()
@click.option("--keys", "number", default=10, show_default=True, help="Keys of each family.")
def main(bench: Bench, folder: Path, calibration: Path | None, halves: bool, attacks: dict[str, Chain | None]) -> None:
    """False-positive rates on the unmarked images of FOLDER."""
    if halves and calibration:
        raise click.UsageError("--halves makes its own calibrations; omit it or --calibration")
    recoverer = Recoverer(bench.model, steps=bench.steps)
    made = None if halves else Calibration.load(calibration or Path(resolve(bench.source)) / Calibration.FILE)
    if made:
        made.check(recoverer.settings.as_dict())
    with bench.kept() as kept:
        noise = recovered(recoverer, attacked_files(bench, folder, attacks), kept)
    found = {}
    for family, keys in families(bench, bench.number).items():
        for name in tqdm(noise, family, disable=None):
            if made:
                found[name, family] = [tested(made, key, noise[name]) for key in keys]
            else:
                found[name, family] = by_halves(recoverer.settings, noise[CLEAN], keys, noise[name])
    rows = [row for about, tests in sorted(found.items()) for row in pooled(_about(about), tests, bench.seed)]
    every = [row for about, tests in found.items() for row in rows_of(_about(about), tests)]
    click.echo(summary(rows))
    facts = {"n": len(noise[CLEAN]), "keys_each": bench.number, "calibration": made.fingerprint if made else "halves"}
    bench.write(rows, figure_of(found), keys=every, **facts)
