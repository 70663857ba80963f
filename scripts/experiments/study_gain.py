"""Is one way of marking and looking better than another? The difference of their mean AUC over the attacks, paired.

    ringmark evaluate --key rand.key --key published.key -n 200 --attacks tree-ring \\
        --methods encoder,guarded -o build/evaluation
    python scripts/study_gain.py build/evaluation --of KEY1,guarded,score --over KEY2,encoder,published_distance

KEY1 and KEY2 are the first digits of the keys' fingerprints, as in evaluation.md; the third part is a column of
scores.csv. All keys of an evaluation mark the same noises for the same prompts, and all meet the same unmarked images
under the same attacks, so most of what one image's luck does to one AUC it does to the other. The interval is that of a
bootstrap which draws prompts, marked and unmarked apart, and takes the very same ones for both ways and all attacks.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

from ringmark.watermark.evaluation.cells import CLEAN
from scripts.experiments.common import SEED

SMALL_IF_MARKED = ("published_distance", "published_p", "conformal_p", "p")


class Way(NamedTuple):
    """A key, a decoder inversion and a column of scores.csv."""

    key: str
    method: str
    column: str


class Scores(NamedTuple):
    """(attacks, n): scores that are larger if marked; `prompts` (n,) what images are not independent in."""

    marked: np.ndarray
    unmarked: np.ndarray
    prompts: tuple[list[str], list[str]]


def scores_of(rows: list[dict[str, str]], way: Way, attacks: list[str]) -> Scores:
    """Raises UsageError for a way that was not evaluated, or not on the same images under every attack."""
    sign = -1 if way.column in SMALL_IF_MARKED else 1
    own = [r for r in rows if r["key"].startswith(way.key) and r["method"] == way.method]
    if len({r["key"] for r in own}) != 1 or way.column not in own[0]:
        raise click.UsageError(
            f"{','.join(way)}: is not one way of this evaluation; keys are {sorted({r['key'] for r in rows})}"
        )
    kinds, prompts = [], []
    for label in "10":
        by_attack = [[r for r in own if (r["attack"], r["label"]) == (attack, label)] for attack in attacks]
        if len({tuple(r["image"] for r in some) for some in by_attack}) != 1:
            raise click.UsageError(f"{','.join(way)}: some image is missing under some attack; evaluate them all")
        # An image of which nothing can be said is the least marked of all.
        kinds.append(np.array([[sign * float(r[way.column] or -sign * np.inf) for r in some] for some in by_attack]))
        prompts.append([r["prompt"] or r["image"] for r in by_attack[0]])
    return Scores(*kinds, tuple(prompts))


def auc(marked: np.ndarray, unmarked: np.ndarray) -> float:
    """P(marked > unmarked) + P(equal) / 2."""
    order = np.sort(unmarked)
    below = np.searchsorted(order, marked, "left") + np.searchsorted(order, marked, "right")
    return float(below.mean() / (2 * len(order)))


def mean_auc(scores: Scores, i: np.ndarray | slice = slice(None), j: np.ndarray | slice = slice(None)) -> float:
    """Over attacks, of the marked images i and the unmarked images j."""
    return float(np.mean([auc(m[i], u[j]) for m, u in zip(scores.marked, scores.unmarked, strict=True)]))


def resampled(prompts: list[str], rng: np.random.Generator) -> np.ndarray:
    """Numbers of the images of as many prompts as there are, drawn with replacement."""
    names = np.unique(prompts)
    where = {name: np.flatnonzero(np.array(prompts) == name) for name in names}
    return np.concatenate([where[name] for name in rng.choice(names, len(names))])


def gain(one: Scores, other: Scores, draws: int, seed: int) -> dict:
    """Both mean AUCs, their difference and its 95 % interval."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        i, j = (resampled(prompts, rng) for prompts in one.prompts)
        found.append(mean_auc(one, i, j) - mean_auc(other, i, j))
    low, high = np.quantile(found, [0.025, 0.975])
    first, second = mean_auc(one), mean_auc(other)
    return {"of": first, "over": second, "gain": first - second, "low": float(low), "high": float(high)}


@click.command()
@click.argument("evaluation", type=click.Path(path_type=Path))
@click.option("--of", "first", required=True, help="KEY,METHOD,COLUMN.")
@click.option("--over", "second", required=True, help="KEY,METHOD,COLUMN of what it is compared with.")
@click.option("--draws", default=2000, show_default=True, help="Of the bootstrap.")
@click.option("--seed", default=SEED, show_default=True, help="Of the bootstrap.")
def main(evaluation: Path, first: str, second: str, draws: int, seed: int) -> None:
    """The gain in mean AUC of one way over another on the images of an EVALUATION."""
    if any(text.count(",") != 2 for text in (first, second)):
        raise click.UsageError("--of and --over take KEY,METHOD,COLUMN, as in b58b8c63,guarded,score")
    with (evaluation / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    attacks = [attack for attack in dict.fromkeys(r["attack"] for r in rows) if attack != CLEAN]
    if not attacks:
        raise click.UsageError(f"{evaluation}: was evaluated without attacks; there is no mean over them")
    ways = [Way(*text.split(",")) for text in (first, second)]
    one, other = (scores_of(rows, way, attacks) for way in ways)
    if one.prompts != other.prompts:
        raise click.UsageError("the two ways were evaluated on other images; nothing is paired")
    found = gain(one, other, draws, seed)
    click.echo(json.dumps(found | {"attacks": attacks, "marked": len(one.prompts[0]), "unmarked": len(one.prompts[1])}))


if __name__ == "__main__":
    main()
