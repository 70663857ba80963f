"""Decoder inversion against the paper's method and the gradient baseline: accuracy, time, memory, and what it buys.

    python scripts/bench_decoder.py -o build/bench                  # 64 images; about an hour on two cores
    python scripts/bench_decoder.py -o build/bench -n 4 --its 10    # a minute

One run, one machine, the same 8-bit images for all; what was inverted is kept, so a stopped run goes on. The first half
of the drawn images carries a weak ring, so that the table says what each latent is worth for finding it. Times are
taken in turns on a few of the images, with nothing else running if they are to mean anything.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from ringmark.inversion.decoder import Inverter
from ringmark.inversion.metrics import correlation, nmse_db
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.evaluation.rates import roc
from ringmark.watermark.figures import write_table
from ringmark.watermark.schemes.tree_ring import Placement, TreeRing, make_key, recommend
from scripts.experiments.common import (
    Inverted,
    Pictures,
    cached,
    experiment_options,
    gradients,
    invert_all,
    mean_and_error,
    peak_memory,
    pictures,
    recovered,
    seconds,
    write_results,
)

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 20)
MEMORY_BATCH = 8  # as the images are inverted
ENCODER, DEFAULT = "encoder", "ours, default"


def contenders(its: int) -> dict[str, Inverter]:
    """Everything that is compared; `its` are the long gradient run's iterations (100 in the paper)."""
    half = its // 2
    known = {
        ENCODER: Inverter.named("encoder"),
        adam(its): Inverter.named("adam", half),
        lean(its): Inverter.named("gradient-lean", its // 5),
    }
    budgets = {ours(k): Inverter(max_steps=k, early=False) for k in sorted({*BUDGETS, half})}
    return known | gradients(its // 5) | gradients(its) | budgets | {DEFAULT: Inverter()}


def adam(its: int) -> str:
    return f"paper's Adam, {its // 2}"


def lean(its: int) -> str:
    return f"gradient 0.1 scheduled, {its // 5}, lean"


def ours(steps: int) -> str:
    return f"ours, {steps} steps"


def weak_key(model: LatentModel) -> TreeRing:
    """A single ring of the recommended placement, in its first channel."""
    best = recommend(model.recovery, model.latent_shape)
    place = Placement(best.channels[:1], (best.radii[0], best.radii[0]))
    return TreeRing(make_key(model.latent_shape, place, model=model.identity, rng=np.random.default_rng(7)))


def worth(model: LatentModel, latents: Tensor, seen: Pictures, scheme: TreeRing, cache: Path) -> dict[str, float]:
    """What latents are good for: correlation of true and recovered noise, and the AUC of the weak ring."""
    noise = cached(cache, [model.identity, latents], lambda: recovered(model, latents, 25, "worth"))["noise"]
    mean, error = mean_and_error(correlation(noise, seen.noise))
    score, _ = Detector(model, [], steps=1).statistic(scheme, noise)
    curve = roc(score[: len(score) // 2], score[len(score) // 2 :])
    return {
        "noise correlation": mean,
        "its error": error,
        "weak ring AUC": curve.auc,
        "AUC low": curve.auc_interval[0],
        "AUC high": curve.auc_interval[1],
    }


def row_of(name: str, found: Inverted, nmse: Tensor, taken: dict, memory: dict, value: dict) -> dict:
    mean, error = mean_and_error(nmse)
    return {
        "method": name,
        "NMSE dB": mean,
        "standard error": error,
        "worst": float(nmse.max()),
        "pixel RMS": float(found.pixel_rms.mean()),
        "evaluations": float(found.evaluations.float().mean()),
        "seconds": taken[name],
        "MB": memory.get(name),
        **value.get(name, {}),
    }


def claims(rows: dict[str, dict], nmse: dict[str, Tensor], its: int) -> list[dict]:
    """What is asked, what was reached: ours is the cheapest budget that is as accurate as the rival."""
    mean = {name: row["NMSE dB"] for name, row in rows.items()}
    short, long = (min((n for n in gradients(k)), key=mean.get) for k in (its // 5, its))
    half, default = its // 2, rows[DEFAULT]
    budgets = [ours(k) for k in sorted({*BUDGETS, half})]

    def quick(rival: str, slack: float, share: float) -> dict:
        mine = next((n for n in budgets if mean[n] <= mean[rival] + slack), budgets[-1])
        ratio = rows[mine]["seconds"] / rows[rival]["seconds"]
        said = f"{mine}: {mean[mine]:.2f} dB against {mean[rival]:.2f}, in {ratio:.3f} of its time"
        return claim(
            rival,
            f"within {slack} dB in {share:g} of its time",
            said,
            mean[mine] <= mean[rival] + slack and ratio <= share,
        )

    def claim(rival: str, asked: str, reached: str, holds: bool) -> dict:
        return {"against": rival, "asked": asked, "reached": reached, "holds": bool(holds)}

    gain = mean[adam(its)] - mean[ours(half)]
    memory = default["MB"] / rows[short]["MB"]
    better = int((nmse[DEFAULT] < nmse[ENCODER]).sum())
    found = [
        quick(adam(its), 0.0, 1 / 10),
        claim(adam(its), f"1 dB better at {half} evaluations", f"{gain:.2f} dB", gain >= 1),
        quick(short, 0.0, 1 / 8),
        claim(short, "memory at most 1/5", f"{memory:.3f} ({default['MB']:.0f} MB of {rows[short]['MB']:.0f})", memory <= 0.2),
        quick(long, 0.3, 1 / 5),
        claim(long, "more accurate by default", f"{mean[DEFAULT]:.2f} dB against {mean[long]:.2f}", mean[DEFAULT] < mean[long]),
        claim(ENCODER, "better on every image", f"{better} of {len(nmse[ENCODER])}", better == len(nmse[ENCODER])),
    ]  # fmt: skip
    for measure in ("noise correlation", "weak ring AUC"):
        if measure in default:
            best = max((short, long), key=lambda name: rows[name][measure])
            said = f"{default[measure]:.4f} against {rows[best][measure]:.4f}"
            found.append(claim(best, f"{measure} as high", said, default[measure] >= rows[best][measure]))
    return found


def figure_of(rows: list[dict]):
    """NMSE against time: ours as a line of budgets, the others as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    line = [r for r in rows if r["method"].endswith("steps")]
    line.sort(key=lambda r: r["seconds"])
    ax.plot([r["seconds"] for r in line], [r["NMSE dB"] for r in line], "o-", label="ours, 1 … steps")
    for row in rows:
        if row not in line:
            ax.errorbar(row["seconds"], row["NMSE dB"], row["standard error"], fmt="s", label=row["method"])
    ax.set(xscale="log", xlabel="seconds an image", ylabel="NMSE of the latent, dB (mean ± standard error)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


@click.command()
@experiment_options(64)
@click.option("--its", default=100, show_default=True, help="Iterations of the long gradient runs.")
@click.option("--timed", default=4, show_default=True, help="Images on which time is measured.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each when time is taken.")
def main(source: str, images: Path | None, number: int, output: Path, its: int, timed: int, rounds: int) -> None:
    """Accuracy, time, memory and worth of every decoder inversion; then what is claimed of ours."""
    model, cache = LatentModel.from_pretrained(source), output / "cache"
    scheme = weak_key(model)
    seen = pictures(model, number, images, scheme=scheme, cache=cache)
    all_of = contenders(its)
    found = {
        name: invert_all(model, inverter, seen.images, name=name, cache=cache) for name, inverter in all_of.items()
    }
    nmse = {name: nmse_db(f.latents, seen.latents) for name, f in found.items()}
    main_ones = [ENCODER, adam(its), *gradients(its // 5), *gradients(its), ours(12), DEFAULT]
    value = {} if images else {n: worth(model, found[n].latents, seen, scheme, cache) for n in main_ones}
    memory = {
        n: peak_memory(source, all_of[n], seen.images[:MEMORY_BATCH])
        for n in (ENCODER, adam(its), *gradients(its // 5), lean(its), DEFAULT)
    }
    taken = seconds(model, all_of, seen.images[:timed], rounds)
    rows = {n: row_of(n, found[n], nmse[n], taken, memory, value) for n in all_of}
    said = claims(rows, nmse, its)
    each = [{"image": name} | {n: float(nmse[n][i]) for n in all_of} for i, name in enumerate(seen.names)]
    write_table(output / "bench_decoder_images.csv", each)
    worst = max(each, key=lambda one: one[DEFAULT])
    for one in said:
        click.echo(
            f"{'yes' if one['holds'] else 'NO '}  against {one['against']}: asked {one['asked']}; reached {one['reached']}"
        )
    click.echo(f"worst image of the default: {worst['image']}, {worst[DEFAULT]:.2f} dB (encoder {worst[ENCODER]:.2f})")
    blank = {key: None for row in rows.values() for key in row}
    write_results(
        output, "bench_decoder", [blank | row for row in rows.values()], figure_of(list(rows.values())),
        model=model.identity, images=len(seen.names), timed=timed, rounds=rounds, threads=torch.get_num_threads(),
        claims=said, worst=worst,
    )  # fmt: skip


if __name__ == "__main__":
    main()
