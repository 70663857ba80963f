"""How far should the decoder be inverted when the picture may have been altered since?

    python -m scripts.experiments altered -o build/altered                  # 16 images; about 15 minutes of one core
    python -m scripts.experiments altered -o build/altered-small -n 2 --steps 4 --attack blur:4

Images marked with one key are altered, the decoder is inverted in several ways, and the key's whitened cosine with the
recovered noise is averaged over the images. Intervals are 95 %, from Student's t. "share" is the share of its change
that `operator` lets an image keep, as a median over images. The number of steps and the share were chosen on ten other
images (--seed 120000), not on those of the evaluation. All noise is whitened by the model's own table of noise
recovery.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from ringmark.inversion.decoder import AT_ONCE, INVERTERS, Autoencoder, Inverter, in_slices
from ringmark.inversion.methods import Anderson, Operator
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.solve import Solution, norms
from ringmark.watermark.attacks.chains import Chain
from ringmark.watermark.figures import COLOURS
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import cosine_scores
from scripts.experiments.common import SEED, Bench, attack_option, experiment
from scripts.experiments.plots import intervals, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Guarded(Inverter):
    """The default of earlier versions, for comparison.

    Two Anderson steps, but E(x) for an image whose remaining share of ‖T‖ is 1, or twice that of the picture D(E(x)).
    """

    def __call__(self, model: Autoencoder, images: Tensor, encoded: Tensor | None = None) -> Solution:
        start = INVERTERS["encoder"](model, images, encoded).value
        with torch.inference_mode():
            rendered = in_slices(model.decode, AT_ONCE)(start).clamp(-1, 1)
        found, reference = (super(Guarded, self).__call__(model, x) for x in (images, rendered))
        left, expected = (s.residuals.amin(0) / s.residuals[0] for s in (found, reference))
        slow = (left > 2 * expected) | (left >= 1)
        return replace(found, value=torch.where(slow.view(-1, 1, 1, 1), start, found.value))


WAYS = {
    "encoder": INVERTERS["encoder"],
    "guarded": Guarded(Anderson()),
    "operator": INVERTERS["operator"],
}
ATTACKS = (
    "blur:1", "median:3", "resize:2", "jpeg:90", "noise:0.02", "sharpen:1", "webp:80", "jpeg:75", "jpeg:50", "blur:4",
    "jpeg:25", "noise:0.1", "contrast:1.5", "brightness:6",
)  # fmt: skip


def shares(model: LatentModel, images: Tensor) -> dict[str, Tensor]:
    """`share` (B,) of its change that `operator` lets an image keep."""
    ways = INVERTERS["encoder"], INVERTERS["operator"], Inverter(Operator(allowance=math.inf))
    start, kept, whole = (way(model, images.to(model.device)).value for way in ways)
    return {"share": (norms(kept - start) / norms(whole - start)).cpu()}


def mean_of(cosines: np.ndarray) -> dict[str, float]:
    """Mean and its 95 % interval from Student's t."""
    half = stats.t.ppf(0.975, len(cosines) - 1) * np.std(cosines, ddof=1) / len(cosines) ** 0.5
    return {"cosine": float(cosines.mean()), "low": float(cosines.mean() - half), "high": float(cosines.mean() + half)}


def summary(rows: list[dict]) -> str:
    """The rows as text."""
    return "\n".join(
        f"{r['attack']:14} {r['way']:18} cosine {r['cosine']:.3f} [{r['low']:.3f}, {r['high']:.3f}], "
        f"share {r['share']:.2f}"
        for r in rows
    )


def figure_of(rows: list[dict]) -> Figure:
    """Cosines by attack, ordered by the share."""
    shares = {r["attack"]: r["share"] for r in sorted(rows, key=lambda r: -r["share"])}
    figure, (ax,) = panels(11, 4.2)
    colours = [COLOURS[i] for i in (4, 1, 0)]
    for i, (way, colour) in enumerate(zip(WAYS, colours, strict=True)):
        ordered = [next(r for r in rows if r["attack"] == name and r["way"] == way) for name in shares]
        x, style = np.arange(len(shares)) + 0.16 * (i - 1), {"fmt": "osD"[i], "ms": 4, "capsize": 2}
        intervals(ax, x, ordered, "cosine", "low", "high", color=colour, label=way, **style)
    ax.set_xticks(range(len(shares)), [f"{name}\n{value:.2f}" for name, value in shares.items()], fontsize=7)
    label = "attack, and the share of its change that the operator keeps"
    ax.set(xlabel=label, ylabel="whitened cosine, 95 % interval")
    figure.legend(loc="outside upper center", ncols=len(WAYS), frameon=False)
    return figure


def measure(bench: Bench, scheme: TreeRing, name: str, altered: Tensor) -> list[dict]:
    """A row for each way of inverting the decoder of these images."""
    share = bench.batches(["shares"], partial(shares, bench.model), altered, name=f"{name}: shares")["share"].numpy()
    about = {"attack": name, "n": len(altered), "share": float(np.median(share))}
    rows, test = [], scheme.on(Null.of_model(bench.model))
    for way, inverter in WAYS.items():
        noise = bench.recover(bench.invert(inverter, altered, f"{name}, {way}").latents, f"{name}, {way}")
        rows.append(about | {"way": way} | mean_of(cosine_scores(test.observe(noise), test.template)))
    return rows


@experiment(16, seed=60_000)
@attack_option(*ATTACKS)
def main(bench: Bench, attacks: dict[str, Chain | None]) -> None:
    """Decoder inversion of altered pictures."""
    scheme, rows = TreeRing(bench.key(seed=SEED)), []
    noise, prompts = bench.fresh(bench.number)
    seen = bench.draw(scheme.embed(noise), prompts).images
    for name, chain in tqdm(attacks.items(), "attacks", disable=None):
        rows += measure(bench, scheme, name, bench.attacked(seen, chain))
        click.echo(summary(rows[-len(WAYS) :]))
    bench.write(rows, figure_of(rows))
