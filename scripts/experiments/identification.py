"""Which of many keys is in the picture, and how often is a wrong one reported?

    python -m scripts.experiments identification -o build/identification    # 64 + 64 images, 12 minutes of one core
    python -m scripts.experiments identification -o build/small -n 2 --unmarked 2 --keys 2 --steps 4 --attack blur:4

Every marked image carries its own key out of `max(--keys)`, in the default placement. For each K it is tested for K
keys, like by a detector with a ring of K keys. The experiment counts
- accuracy: whether the largest whitened cosine, or the smallest published distance as in arXiv 2305.20030 and
  2404.14055, belongs to the embedded key; one of the K keys is always chosen;
- ringmark's rule: keys with K p <= alpha are reported, best first. The first is the right key, a wrong one, or none;
- false accusations: marked images for which any wrong key is reported, alone or besides the right one, and unmarked
  images for which any key is reported.

The same images are used for every K. Keys are arranged in a circle: image i carries key i, and its ring of K keys is
that key and the next K - 1. Every image is thus used at every K, and larger rings contain the smaller ones, so
differences between values of K do not come from different draws. Below the largest K, images have different rings; at
the largest, all have the same. An unmarked image is tested for the ring that starts at its number. Keys are drawn as by
`ringmark keygen -n` (all distinguishable), but from --seed: such keys are for experiments only.

p-values use the model's own calibration if it has one for these settings. Noise is recovered once for each image and
attack (1 s) and then scored for all keys at once; drawing an image takes 1.3 s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ringmark.watermark.attacks.chains import Chain
from ringmark.watermark.bank import Bank
from ringmark.watermark.figures import COLOURS
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import ALPHA, published_distance
from ringmark.watermark.tasks.keygen import draw_keys
from scripts.experiments.common import Bench, attack_option, experiment, mark_in_turn, share
from scripts.experiments.plots import intervals, legend_below, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MARK, TEAL, AMBER, GREY = COLOURS
SHOWN = dict(zip(  # outcome: style
    ("cosine finds the key", "distance finds the key", "right key named", "falsely accused", "unmarked accused"),
    ((INK, "-"), (AMBER, "--"), (TEAL, "-"), (MARK, "-"), (GREY, ":")),
    strict=True,
))  # fmt: skip


def make_schemes(bench: Bench, number: int) -> list[TreeRing]:
    """Distinguishable keys of the default placement."""
    rng = np.random.default_rng(bench.seed)
    keys = draw_keys(bench.model, [], number, lambda: bench.key(seed=rng))[0]
    return [TreeRing(key) for key in keys]


def scores(null: Null, schemes: list[TreeRing], noise: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, uncorrected p-value and published distance, each (N, K), of noise (N, C, h, w) and K keys of one kind."""
    first, nothing = schemes[0], torch.zeros(1, *schemes[0].latent_shape)
    score = Bank(schemes, null).scores(first.on(null).observe(noise))
    bins = first.masked(noise)[0].numpy()
    distance = [published_distance(bins, scheme.masked(nothing)[1].numpy()) for scheme in schemes]
    return score, 10 ** first.on(null).log10_p(score), np.stack(distance, 1)


def members(images: int, keys: int, total: int) -> np.ndarray:
    """Key numbers (images, keys) of each image's ring, its own key first, in a circle of `total` keys."""
    return (np.arange(images)[:, None] + np.arange(keys)) % total


def outcomes(cosine: np.ndarray, distance: np.ndarray, named: np.ndarray) -> dict[str, int]:
    """Counts of outcomes of marked images from arrays (N, K), an image's own key first; `named` where K p ≤ alpha."""
    right, any_named = (cosine.argmax(1) == 0) & (cosine[:, 0] != 0), named.any(1)
    return {
        "cosine finds the key": int(right.sum()),
        "distance finds the key": int((distance.argmin(1) == 0).sum()),
        "right key named": int((any_named & right).sum()),
        "wrong key named": int((any_named & ~right).sum()),
        "no key named": int((~any_named).sum()),
        "falsely accused": int(named[:, 1:].any(1).sum()),
    }


def count(
    condition: str, marked: tuple[np.ndarray, ...], unmarked: tuple[np.ndarray, ...], keys: int, alpha: float
) -> list[dict]:
    """A row per outcome, from cosines, p-values and distances (N, all keys) of marked and unmarked images."""
    ring = members(len(marked[0]), keys, marked[0].shape[1])
    cosine, p, distance = (np.take_along_axis(x, ring, 1) for x in marked)
    found = {name: share(n, len(ring)) for name, n in outcomes(cosine, distance, keys * p <= alpha).items()}
    if len(unmarked[1]):
        ring = members(len(unmarked[1]), keys, unmarked[1].shape[1])
        accused = (keys * np.take_along_axis(unmarked[1], ring, 1) <= alpha).any(1)
        found["unmarked accused"] = share(accused.sum(), len(ring))
    return [{"attack": condition, "keys": keys, "outcome": name} | row for name, row in found.items()]


def figure_of(rows: list[dict]) -> Figure:
    """Shares against the number of keys, a panel for each attack."""
    names = list(dict.fromkeys(r["attack"] for r in rows))
    figure, axes = panels(1 + 3.2 * len(names), 4.4, across=len(names), sharey=True)
    for ax, name in zip(axes, names, strict=True):
        panel(ax, name, [r for r in rows if r["attack"] == name])
    axes[0].set_ylabel("share of images, 95 % intervals")
    legend_below(figure, 6, fontsize=8)
    return figure


def panel(ax: Axes, name: str, rows: list[dict]) -> None:
    """One attack; lines are slightly offset, because most of them coincide."""
    for i, (outcome, (colour, style)) in enumerate(SHOWN.items()):
        members = [r for r in rows if r["outcome"] == outcome]
        if members:
            x, look = np.array([r["keys"] for r in members]) * 1.12 ** (i - 2), {"color": colour, "ls": style}
            look |= {"fmt": "o", "ms": 3, "lw": 1.4, "capsize": 2, "label": outcome}
            intervals(ax, x, members, "share", "low", "high", **look)
    sizes = sorted({r["keys"] for r in rows})
    ax.plot(sizes, [1 / k for k in sizes], color="black", lw=0.8, ls=":", label="chance")
    ax.set(xscale="log", xlabel="keys in the ring", ylim=(-0.03, 1.03), title=name)
    ax.set_xticks(sizes, map(str, sizes))
    ax.minorticks_off()


def summary(rows: list[dict]) -> str:
    """Counts as text."""
    return "\n".join(
        f"{r['attack']:10} {r['keys']:5} keys  {r['outcome']:22} {r['count']:3} of {r['of']} "
        f"[{r['low']:.3f}, {r['high']:.3f}]"
        for r in rows
    )


@experiment(64, seed=40_000)
@click.option("--unmarked", default=64, show_default=True, help="Number of additional unmarked images.")
@click.option(
    "--keys", "sizes", type=click.IntRange(2), multiple=True, default=(2, 16, 128, 1024), show_default=True,
    help="Number of keys in the ring; may be repeated.",
)  # fmt: skip
@attack_option("jpeg:25", "blur:4", "noise:0.1")
@click.option(
    "--alpha", type=click.FloatRange(0, 1), default=ALPHA, show_default=True, help="Level of the corrected p."
)
def main(bench: Bench, unmarked: int, sizes: tuple[int, ...], attacks: dict[str, Chain | None], alpha: float) -> None:
    """N marked images, each with its own key, among K keys."""
    schemes, number, rows = make_schemes(bench, max(sizes)), bench.number, []
    noise, prompts = bench.fresh(number + unmarked)
    start = torch.cat([mark_in_turn(schemes, noise[:number]), noise[number:]])
    seen = bench.draw(start, prompts).images
    for name, chain in tqdm(attacks.items(), "attacks", disable=None):
        back = bench.noise_of(bench.attacked(seen, chain), name).nan_to_num()
        found = scores(bench.null, schemes, back)
        marked, others = (tuple(x[part] for x in found) for part in (slice(number), slice(number, None)))
        rows += [row for size in sorted(set(sizes)) for row in count(name, marked, others, size, alpha)]
    click.echo(summary(rows))
    facts = {"bands": [str(part) for part in schemes[0].parts], "calibration": bench.calibration_used}
    facts |= {"keys_in_all": len(schemes), "keys_carried": min(number, len(schemes))}
    bench.write(rows, figure_of(rows), settings=facts)
