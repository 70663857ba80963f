"""Decoder inversion against the paper's method and the gradient baseline: accuracy, time, memory, and what it buys.

    python scripts/bench_decoder.py -o build/bench            # 64 images; about an hour on two cores
    python scripts/bench_decoder.py -o build/bench -n 8 --its 10

One run, one machine, the same 8-bit images for all. The first half of the images carries a weak ring, so that the
table says what each latent is worth for finding it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from experiment import (
    Contender,
    Pictures,
    Timed,
    experiment_options,
    gradients,
    mean_and_error,
    ours,
    paper_adam,
    peak_memory,
    pictures,
    run,
    write_results,
)
from torch import Tensor

from inversion.diagnostics import nmse_db
from inversion.diffusion import invert
from inversion.model import LatentModel
from watermark.detect import Detector
from watermark.evaluate import roc
from watermark.schemes.tree_ring import Placement, TreeRing, make_key, recommend

BUDGETS = (1, 2, 3, 4, 5, 6, 8, 12, 20)
MEMORY_BATCH = 4


def contenders(its: int) -> dict[str, Contender]:
    """Everything that is compared; `its` are the long runs' iterations (100 in the paper)."""
    known = {"encoder": partial(ours, max_steps=0), f"paper's Adam, {its // 2}": paper_adam(its // 2)}
    budgets = {f"ours, {k} steps": partial(ours, max_steps=k, tol=None) for k in BUDGETS}
    return known | gradients(its // 5) | gradients(its) | budgets | {"ours, default": ours}


def weak_key(model: LatentModel) -> TreeRing:
    """Two rings of the recommended placement's first channel."""
    best = recommend(model.recovery, model.latent_shape)
    place = Placement(best.channels[:1], (best.radii[0], best.radii[0] + 1))
    return TreeRing(make_key(model.latent_shape, place, model=model.identity, rng=np.random.default_rng(7)))


@torch.inference_mode()
def worth(model: LatentModel, latents: Tensor, seen: Pictures, scheme: TreeRing, steps: int = 25) -> dict[str, float]:
    """What latents are good for: correlation of true and recovered noise (empty prompt), and the AUC of the weak ring."""
    grid, nothing = model.grid(steps), model.embed([""])
    noise = torch.cat(
        [invert(model, z.to(model.device), nothing.expand(len(z), -1, -1), grid).cpu() for z in latents.split(8)]
    )
    pairs = zip(noise.flatten(1), seen.noise.flatten(1), strict=True)
    correlation = float(np.mean([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]))
    score, _ = Detector(model, [], steps=1).statistic(scheme, noise)
    curve = roc(score[: len(score) // 2], score[len(score) // 2 :])
    return {
        "noise correlation": correlation,
        "weak ring AUC": curve.auc,
        "AUC low": curve.auc_interval[0],
        "AUC high": curve.auc_interval[1],
    }


def comparisons(nmse: dict[str, Tensor], timed: dict[str, Timed], memory: dict[str, float], its: int) -> list[dict]:
    """The claims, each with its ratio: the cheapest of our budgets that is as accurate as the other."""
    mean = {name: float(x.mean()) for name, x in nmse.items()}
    best = {
        k: min((n for n in mean if n.startswith("gradient") and n.endswith(f", {k}")), key=mean.get)
        for k in (its // 5, its)
    }
    rows = []
    for rival, allowance in ((f"paper's Adam, {its // 2}", 0.0), (best[its // 5], 0.0), (best[its], 0.3)):
        budget = next((k for k in BUDGETS if mean[f"ours, {k} steps"] <= mean[rival] + allowance), None)
        mine = f"ours, {budget} steps" if budget else f"ours, {BUDGETS[-1]} steps"
        rows.append({
            "against": rival, "its NMSE": mean[rival], "ours": mine, "our NMSE": mean[mine], "reached": budget is not None,
            "time ratio": timed[mine].seconds / timed[rival].seconds, "memory ratio": memory[mine] / memory[rival],
            "our default NMSE": mean["ours, default"], "our best NMSE": min(v for n, v in mean.items() if n.startswith("ours")),
        })  # fmt: skip
    better = int((nmse["ours, default"] < nmse["encoder"]).sum())
    click.echo(f"default better than the encoder on {better} of {len(nmse['encoder'])} images")
    return rows


@click.command()
@experiment_options(64)
@click.option("--its", default=100, show_default=True, help="Iterations of the long gradient runs.")
def main(source: str, images: Path | None, number: int, output: Path, its: int) -> None:
    """Accuracy, time, memory and worth of every decoder inversion; then the ratios."""
    model = LatentModel.from_pretrained(source)
    scheme = weak_key(model)
    seen = pictures(model, number, images, scheme=scheme)
    timed, nmse, memory, rows = {}, {}, {}, []
    for name, contender in contenders(its).items():
        timed[name] = run(model, contender, seen.images, name=name)
        nmse[name] = nmse_db(timed[name].latents, seen.latents)
        memory[name] = peak_memory(source, contender, seen.images[:MEMORY_BATCH])
        mean, error = mean_and_error(nmse[name])
        rows.append({
            "method": name, "NMSE dB": mean, "standard error": error, "worst": float(nmse[name].max()),
            "seconds": timed[name].seconds, "evaluations": float(timed[name].evaluations.float().mean()), "MB": memory[name],
            **(worth(model, timed[name].latents, seen, scheme) if seen.noise is not None else {}),
        })  # fmt: skip
        click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()))
    ratios = comparisons(nmse, timed, memory, its)
    for row in ratios:
        click.echo("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    write_results(output, "bench_decoder", rows, model=model.identity, images=number, ratios=ratios)


if __name__ == "__main__":
    main()
