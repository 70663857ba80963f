"""Decoder inversion against the paper's method and the gradient baseline: accuracy, time, memory.

    python -m scripts.experiments decoder -o build/bench                  # 64 images; about an hour on two cores
    python -m scripts.experiments decoder -o build/bench -n 4 --its 10    # a minute

One run, one machine, and the same 8-bit images for all methods. The first half of the drawn images carries a weak ring,
so that the table shows how well it is detected from each method's latents. Times are measured in turns on a few of the
images; nothing else should run meanwhile.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click
from torch import Tensor

from ringmark.inversion.decoder import Inverter
from ringmark.inversion.methods import Adam, Anderson
from ringmark.inversion.metrics import correlation, nmse_db
from ringmark.watermark.evaluation.rates import roc
from ringmark.watermark.evaluation.tables import write_table
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.schemes.tree_ring import TreeRing
from scripts.experiments.common import Bench, Inverted, Pictures, experiment, mean_and_error, score_and_p
from scripts.experiments.costs import peak_memory, seconds
from scripts.experiments.plots import columns, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANDERSON = (1, 2, 3, 4, 6, 8, 12, 20)  # steps
OPERATOR = (1, 2, 3, 4, 6)  # steps, at two evaluations each; two are the default of `ringmark verify`
MEMORY_BATCH = 8  # the batch size of the inversions
ENCODER, DEFAULT, OPERATOR_DEFAULT = "encoder", "Anderson, stopped by itself", "operator, 2 steps"


def contenders(its: int) -> dict[str, Inverter]:
    """All compared inverters; `its` is the number of iterations of the long gradient run (100 in the paper)."""
    half = its // 2
    known = {
        ENCODER: Inverter.named("encoder"),
        adam(its): Inverter.named("adam", half),
        lean(its): Inverter.named("gradient-lean", its // 5),
    }
    longest = {anderson(half): Inverter(Anderson(), half)}
    return known | gradients(its // 5) | gradients(its) | budgets() | longest | {DEFAULT: Inverter.named("anderson")}


def budgets() -> dict[str, Inverter]:
    """ringmark's methods, stopped after fixed numbers of steps."""
    fixed = {anderson(k): Inverter(Anderson(), k) for k in ANDERSON}
    return fixed | {f"operator, {counted(k)}": Inverter(max_steps=k) for k in OPERATOR}


def adam(its: int) -> str:
    return f"paper's Adam, {its // 2}"


def lean(its: int) -> str:
    return f"gradient 0.1 scheduled, {its // 5}, lean"


def anderson(steps: int) -> str:
    return f"Anderson, {counted(steps)}"


def counted(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def is_budget(name: str) -> bool:
    """Whether this is the name of one of ringmark's methods with a fixed number of steps."""
    return name.endswith((" step", " steps"))


def gradients(steps: int) -> dict[str, Inverter]:
    """Both settings of the gradient baseline of arXiv 2409.18442 at this many iterations."""
    by = partial(Inverter, max_steps=steps, gradient=True)
    return {
        f"gradient 0.1 scheduled, {steps}": by(Adam(lr=0.1, horizon=steps)),
        f"gradient 0.01 fixed, {steps}": by(Adam(lr=0.01, horizon=None)),
    }


def weak_scheme(bench: Bench) -> TreeRing:
    """A single low ring in the channel that is recovered best."""
    return TreeRing(bench.key(Placement(bench.bands[-1].channels[:1], (1, 1)), seed=7))


def worth(bench: Bench, latents: Tensor, seen: Pictures, scheme: TreeRing, name: str) -> dict[str, float]:
    """The value of latents for detection: correlation of true and recovered noise, and AUC of the weak ring."""
    noise = bench.recover(latents, name)
    mean, error = mean_and_error(correlation(noise, seen.noise))
    score, half = score_and_p(scheme, Null.of_model(bench.model), noise)[0], len(noise) // 2
    curve = roc(score[:half], score[half:])
    low, high = curve.auc_interval
    ring = {"weak ring AUC": curve.auc, "AUC low": low, "AUC high": high}
    return {"noise correlation": mean, "its error": error} | ring


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
    """Claims about Anderson, with measured values."""
    mean = {name: row["NMSE dB"] for name, row in rows.items()}
    short, long = (min(gradients(k), key=mean.__getitem__) for k in (its // 5, its))
    half, default = its // 2, rows[DEFAULT]
    gain, memory = mean[adam(its)] - mean[anderson(half)], default["MB"] / rows[short]["MB"]
    better, images = int((nmse[DEFAULT] < nmse[ENCODER]).sum()), len(nmse[ENCODER])
    sizes = f"{memory:.3f} ({default['MB']:.0f} MB of {rows[short]['MB']:.0f})"
    accuracy = f"{mean[DEFAULT]:.2f} dB against {mean[long]:.2f}"
    return [
        quick(rows, adam(its), slack=0.0, share=1 / 10),
        claim(adam(its), f"1 dB better at {half} evaluations", f"{gain:.2f} dB", gain >= 1),
        quick(rows, short, slack=0.0, share=1 / 8),
        claim(short, "memory at most 1/5", sizes, memory <= 0.2),
        quick(rows, long, slack=0.3, share=1 / 5),
        claim(long, "more accurate by default", accuracy, mean[DEFAULT] < mean[long]),
        claim(ENCODER, "better on every image", f"{better} of {images}", better == images),
        *as_high(rows, short, long),
    ]


def claim(rival: str, asked: str, reached: str, holds: bool) -> dict:
    return {"against": rival, "asked": asked, "reached": reached, "holds": bool(holds)}


def quick(rows: dict[str, dict], rival: str, *, slack: float, share: float) -> dict:
    """Claim: the cheapest budget that is as accurate as the rival takes a `share` of the rival's time."""
    by_cost = sorted(filter(is_budget, rows), key=lambda name: rows[name]["evaluations"])
    bound = rows[rival]["NMSE dB"] + slack
    cheapest = next((name for name in by_cost if rows[name]["NMSE dB"] <= bound), by_cost[-1])
    reached, ratio = rows[cheapest]["NMSE dB"], rows[cheapest]["seconds"] / rows[rival]["seconds"]
    text = f"{cheapest}: {reached:.2f} dB against {rows[rival]['NMSE dB']:.2f}, in {ratio:.3f} of its time"
    return claim(rival, f"within {slack} dB in {share:g} of its time", text, reached <= bound and ratio <= share)


def as_high(rows: dict[str, dict], *rivals: str) -> list[dict]:
    """Claims: Anderson's latents are as good for detection as those of the best rival."""
    claimed = []
    for measure in ("noise correlation", "weak ring AUC"):
        if measure in rows[DEFAULT]:
            best, default_value = max(rivals, key=lambda name: rows[name][measure]), rows[DEFAULT][measure]
            reached = f"{default_value:.4f} against {rows[best][measure]:.4f}"
            claimed.append(claim(best, f"{measure} as high", reached, default_value >= rows[best][measure]))
    return claimed


def figure_of(rows: list[dict]) -> Figure:
    """NMSE against time, with a line for each of ringmark's methods and the others as points."""
    figure, (ax,) = panels(8, 5)
    lines = {name: [r for r in rows if r["method"].startswith(f"{name}, ")] for name in ("Anderson", "operator")}
    for name, members in lines.items():
        by_time = sorted((r for r in members if is_budget(r["method"])), key=lambda r: r["seconds"])
        ax.plot(*columns(by_time, "seconds", "NMSE dB"), "o-", label=f"{name}, 1 … steps")
    for row in rows:
        if not is_budget(row["method"]):
            ax.errorbar(row["seconds"], row["NMSE dB"], row["standard error"], fmt="s", label=row["method"])
    ax.set(xscale="log", xlabel="seconds per image", ylabel="NMSE of the latent, dB (mean ± standard error)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def measure(bench: Bench, seen: Pictures, scheme: TreeRing, its: int, timed: int, rounds: int) -> tuple[dict, dict]:
    """Rows and errors (N,) in dB by contender."""
    inverters = contenders(its)
    inverted = {name: bench.invert(inverter, seen.images, name) for name, inverter in inverters.items()}
    nmse = {name: nmse_db(f.latents, seen.latents) for name, f in inverted.items()}
    rivals = [ENCODER, adam(its), *gradients(its // 5)]
    value = {}
    if seen.noise is not None:
        compared = [*rivals, *gradients(its), anderson(12), OPERATOR_DEFAULT, DEFAULT]
        value = {name: worth(bench, inverted[name].latents, seen, scheme, name) for name in compared}
    few = seen.images[:MEMORY_BATCH]
    weighed = (*rivals, lean(its), OPERATOR_DEFAULT, DEFAULT)
    memory = {name: peak_memory(bench.source, inverters[name], few) for name in weighed}
    taken = seconds(bench.model, inverters, seen.images[:timed], rounds)
    return {name: row_of(name, inverted[name], nmse[name], taken, memory, value) for name in inverters}, nmse


@experiment(64, photographs=True)
@click.option("--its", default=100, show_default=True, help="Iterations of the long gradient runs.")
@click.option("--timed", default=4, show_default=True, help="Images on which time is measured.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of time measurements.")
def main(bench: Bench, its: int, timed: int, rounds: int) -> None:
    """Accuracy, time, memory and value for detection of every decoder inversion, and claims about Anderson."""
    scheme = weak_scheme(bench)
    seen = bench.pictures(scheme)
    rows, nmse = measure(bench, seen, scheme, its, timed, rounds)
    each = [{"image": name} | {n: float(nmse[n][i]) for n in rows} for i, name in enumerate(seen.names)]
    write_table(bench.output / "decoder_images.csv", each)
    claimed, worst = claims(rows, nmse, its), max(each, key=lambda one: one[DEFAULT])
    for row in claimed:
        answer = "yes" if row["holds"] else "NO "
        click.echo(f"{answer}  against {row['against']}: required {row['asked']}; reached {row['reached']}")
    click.echo(f"worst image of the default: {worst['image']}, {worst[DEFAULT]:.2f} dB (encoder {worst[ENCODER]:.2f})")
    blank = {key: None for row in rows.values() for key in row}
    table = [blank | row for row in rows.values()]
    bench.write(table, figure_of(table), claims=claimed, worst=worst)
