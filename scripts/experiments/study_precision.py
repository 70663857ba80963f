"""What 16-bit maps cost decoder inversion, over smooth, textured and high-frequency images.

    python scripts/study_precision.py -o build/precision --dtype bfloat16            # 48 drawn images
    python scripts/study_precision.py -o build/precision-small -n 6 --its 4 --dtype bfloat16
    python scripts/study_precision.py -o build/precision-float16 -n 12 --its 20      # a CPU's float16 is very slow
    python scripts/study_precision.py -o build/precision-photos --dtype bfloat16 --images photos

The images' own spectra sort them into thirds: the share of their energy above a quarter of Nyquist's frequency. The
latents are those from which 32-bit maps decoded the images; E and D then run in 16 bit, solvers stay in float32. Adam
takes ε = 1e-4 in 16 bit and 1e-8 in 32, as arXiv 2409.18442, which leaves 16-bit accuracy over kinds of images open.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from torch import Tensor
from tqdm import tqdm

from ringmark.inversion.decoder import COARSE, INVERTERS, Inverter, rounding_share
from ringmark.inversion.methods import Adam
from ringmark.inversion.metrics import high_frequency_share, nmse_db
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.solve import Status
from scripts.experiments.common import SEED, cached, experiment_options, mean_and_error, pictures, write_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CATEGORIES = ("smooth", "textured", "high-frequency")
FULL, HALVES = "float32", ("bfloat16", "float16")
ABOVE = 0.25  # of Nyquist's frequency
COLOURS = {FULL: "#1b3a5c", "bfloat16": "#e9a23b", "float16": "#d1495b"}


def inverters(dtype: str, its: int) -> dict[str, Inverter]:
    """What is compared, by name; `its` are Adam's iterations."""
    adam = Adam(horizon=its, eps=1e-8 if dtype == FULL else 1e-4)
    known = {name: INVERTERS[name] for name in ("encoder", "forward", "anderson")}
    return known | {"paper's Adam": Inverter(adam, its, early=False)}


def categories(share: Tensor) -> Tensor:
    """(B,) 0, 1 or 2: the third of the images that each one's share of high frequencies puts it in."""
    return share.argsort().argsort() * len(CATEGORIES) // len(share)


@torch.inference_mode()
def inverted(model: LatentModel, inverter: Inverter, images: Tensor, name: str, batch: int = 8) -> dict[str, Tensor]:
    """Latents (N, C, h, w), evaluations (N,) and whether 16 bit was found to rule (N,)."""
    found = [
        inverter(model, some.to(model.device)) for some in tqdm(images.split(batch), name, leave=False, disable=None)
    ]
    return {
        "latents": torch.cat([s.value.float().cpu() for s in found]),
        "evaluations": torch.cat([s.steps for s in found]),
        "rounded": torch.tensor([status is Status.ROUNDED for s in found for status in s.status]),
    }


@torch.inference_mode()
def rounding(model: LatentModel, images: Tensor, batch: int = 8) -> dict[str, Tensor]:
    """`rounding_share` of each image (N,)."""
    parts = [x.to(model.device) for x in images.split(batch)]
    return {"share": torch.cat([rounding_share(model.encode, x, model.encode(x)).cpu() for x in parts])}


def run(source: str, dtype: str, images: Tensor, its: int, cache: Path) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Each inverter's result in this precision, and the rounding shares (N,)."""
    model = LatentModel.from_pretrained(source, dtype=getattr(torch, dtype))
    key = [model.identity, dtype, images]  # a model's identity does not tell its precision
    shares = cached(cache, [*key, "rounding"], partial(rounding, model, images))["share"]
    found = {}
    for name, inverter in inverters(dtype, its).items():
        work = partial(inverted, model, inverter, images, f"{dtype}, {name}")
        found[name] = cached(cache, [*key, repr(inverter)], work)
    return found, shares


def row(
    dtype: str, method: str, category: str, chosen: Tensor, found: dict, full: Tensor, nmse: Tensor, share: Tensor
) -> dict:
    """NMSE, what is lost against 32 bit on the same images, and what the Solution says, over the chosen images."""
    mean, error = mean_and_error(nmse[chosen])
    loss, loss_error = mean_and_error((nmse - full)[chosen])
    return {
        "dtype": dtype, "method": method, "images": category, "n": int(chosen.sum()),
        "NMSE dB": mean, "standard error": error, "worst": float(nmse[chosen].max()),
        "loss dB": loss, "loss error": loss_error, "worst loss": float((nmse - full)[chosen].max()),
        "rounding share": float(share[chosen].mean()), "said ROUNDED": float(found["rounded"][chosen].float().mean()),
        "evaluations": float(found["evaluations"][chosen].float().mean()),
    }  # fmt: skip


def table(results: dict[str, tuple], truth: Tensor, category: Tensor) -> list[dict]:
    """A row for each precision, method and category, and for all images."""
    full = {name: nmse_db(found["latents"], truth) for name, found in results[FULL][0].items()}
    groups = {name: category == i for i, name in enumerate(CATEGORIES)} | {"all": category >= 0}
    return [
        row(dtype, method, group, chosen, found, full[method], nmse_db(found["latents"], truth), share)
        for dtype, (by_method, share) in results.items()
        for method, found in by_method.items()
        for group, chosen in groups.items()
    ]


def figure_of(rows: list[dict], results: dict[str, tuple], spectrum: Tensor, category: Tensor) -> Figure:
    """NMSE by method and precision for each category, and rounding share against the images' high frequencies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 4)
    low = min(r["NMSE dB"] - r["standard error"] for r in rows)
    high = max(r["NMSE dB"] + r["standard error"] for r in rows)
    for i, (ax, name) in enumerate(zip(axes, CATEGORIES, strict=False)):
        plot_category(ax, [r for r in rows if r["images"] == name])
        span = spectrum[category == i] * 100
        ax.set_title(f"{name}, n = {len(span)}\n{span.min():.2g} to {span.max():.2g} % above ¼ Nyquist", fontsize=9)
        ax.set_ylim(low - 0.5, high + 0.5)
    axes[0].set_ylabel("NMSE of the latents (dB), ± standard error")
    plot_rounding(axes[3], results, spectrum)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_category(ax: Axes, rows: list[dict]) -> None:
    """One point a method and precision."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    for k, dtype in enumerate(dict.fromkeys(r["dtype"] for r in rows)):
        some = [r for r in rows if r["dtype"] == dtype]
        x = [methods.index(r["method"]) + 0.18 * (k - 1) for r in some]
        y, error = ([r[c] for r in some] for c in ("NMSE dB", "standard error"))
        ax.errorbar(x, y, error, fmt="os^"[k], color=COLOURS.get(dtype), capsize=3, label=dtype)
    ax.set_xticks(range(len(methods)), methods, fontsize=8, rotation=20)
    ax.grid(axis="y", alpha=0.3)


def plot_rounding(ax: Axes, results: dict[str, tuple], spectrum: Tensor) -> None:
    """Where the line is crossed the Solution says that 16 bit rules."""
    for k, (dtype, (_, share)) in enumerate(results.items()):
        ax.plot(spectrum * 100, share, "os^"[k], color=COLOURS.get(dtype), ms=4)
    ax.axhline(COARSE, color="grey", ls="--", lw=1)
    ax.text(0.98, COARSE + 0.02, "above: Status.ROUNDED", ha="right", transform=ax.get_yaxis_transform(), fontsize=8)
    ax.axhline(1 / 8, color="grey", ls=":", lw=1)
    ax.text(0.98, 1 / 8 + 0.02, "exact encoder: 1/8", ha="right", transform=ax.get_yaxis_transform(), fontsize=8)
    ax.set(xscale="log", ylim=(0, 1.2), xlabel="energy above ¼ Nyquist (%)", ylabel="rounding share of σ_q")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.set_title("each image's rounding", fontsize=9)


def summary(rows: list[dict]) -> str:
    """What 16 bit loses, in words."""
    return "\n".join(
        f"{r['dtype']:9} {r['method']:13} {r['images']:15} NMSE {r['NMSE dB']:7.2f} ± {r['standard error']:.2f} dB, "
        f"lost {r['loss dB']:6.3f} ± {r['loss error']:.3f} dB, rounding share {r['rounding share']:.2f}, "
        f"ROUNDED {r['said ROUNDED']:.0%}"
        for r in rows
    )


@click.command()
@experiment_options(48)
@click.option("--its", default=50, show_default=True, help="Adam's iterations.")
@click.option(
    "--dtype", "halves", type=click.Choice(HALVES), multiple=True, default=HALVES, show_default=True, help="16 bit."
)
def main(source: str, images: Path | None, number: int, output: Path, its: int, halves: tuple) -> None:
    """16-bit against 32-bit maps by the images' own spectrum."""
    exact = LatentModel.from_pretrained(source, dtype=torch.float32)
    cache = output / "cache"
    seen = pictures(exact, number, images, cache=cache)
    spectrum = high_frequency_share(seen.images, ABOVE)
    category = categories(spectrum)
    results = {dtype: run(source, dtype, seen.images, its, cache) for dtype in (FULL, *halves)}
    rows = table(results, seen.latents.float().cpu(), category)
    click.echo(summary(rows))
    write_results(
        output, "study_precision", rows, figure_of(rows, results, spectrum, category),
        model=exact.identity, n=len(seen.images), seed=SEED, its=its, above_of_nyquist=ABOVE, coarse=COARSE,
        images=[{"name": n, "high-frequency share": float(s), "category": CATEGORIES[c]} for n, s, c in zip(seen.names, spectrum, category, strict=True)],
        source=str(images.name) if images else "drawn", threads=torch.get_num_threads(), torch=torch.__version__, device=str(exact.device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
