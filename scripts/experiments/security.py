"""What an attacker who has the model but not the key can learn, forge and remove.

    python -m scripts.experiments security -o build/security          # 64 images of a key; 13 minutes of one core
    python -m scripts.experiments security -o build/security -n 2 --forged 1 --steps 4
    python -m scripts.experiments security -o build/security-jpeg --published jpeg:25    # attacker has JPEG files only

The attacker recovers noise as the detector does, with the same model and the same inversion. Without the model, or with
a similar one, less is recovered; that is not studied here (see arXiv 2601.20310 and 2606.29807). Drawing an image takes
1.3 s, recovering its noise 1 s.

Averaging. N images with different prompts and seeds are marked with one key. A masked bin is recovered as a K + rest,
so the mean over m images has the cosine √(m a² / (m a² + v)) with the key for constant a and v; for all rings of the
mark see `expected_cosine`. For m = 1, 2, 4, … the images are split into N / m groups, each of which gives an estimate
of the key. `--forged` new images are drawn from noise marked with the estimates (in turn) and tested with the true key.
The number that pass at alpha shows how many images can safely be published with one key. For m = 1 this is forgery by
transplanting the bins of a single image. Intervals assume independent forged images, although those of one estimate are
not. With --published, only the attacker's images are distorted, not the forged ones.

Where the ring is. An attacker who knows neither channels nor radii compares, ring by ring, the power of the mean noise
with 1/m of an image's power, which is expected if images share nothing: `ring_z`. A ring is visible at z > 4. The same
is done for as many unmarked images, to see what a model's images share without a key. A key leaks into other channels,
so its rings may become visible there too, with more images.

Drawing again. Images are drawn from the noise recovered from marked images: with another prompt (forgery), or with the
masked bins or all bins from ring 2 on replaced by new noise (removal). Removal is tried with the prompt and guidance,
and with neither, like the inversion, which preserves the picture better. Similarity is the correlation of pixels, and
their RMS difference in grey levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from ringmark.inversion.metrics import correlation
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.noise_recovery import rings
from ringmark.watermark.attacks.chains import parse
from ringmark.watermark.figures import COLOURS, GREY, INK, MARK
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import ALPHA, cosine_scores
from scripts.experiments.common import Bench, experiment, mark_in_turn, mean_and_error, share
from scripts.experiments.plots import columns, intervals, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWS = 4.0  # z above which a ring is visible: 3 in 100 000 by chance
LOWEST = 2  # lowest ring of a default mark; ring 1 fixes the layout
FRESH, OTHERS = 10_000, 30_000  # seeds of forged images and of pictures drawn again, after those of the marked ones


def ladder(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [2**i for i in range(most.bit_length())]


def forged(key: Key, noise: Tensor) -> Key:
    """An estimate of the key by an attacker who knows its mask and has these recovered noises (m, C, h, w).

    It is the mean of their masked bins, with each channel scaled to unit power, like in keys. An attacker learns values
    at one size and not the secret, so the estimate is like a key of an older file.
    """
    scheme = TreeRing(key)
    spectrum = torch.zeros_like(scheme.spectrum)
    spectrum[scheme.marked] = scheme.masked(noise)[0].mean(0)
    spectrum /= (spectrum.abs().square().sum((1, 2)) / scheme.marked.sum((1, 2))).sqrt()[:, None, None]
    metadata = {name: value for name, value in key.metadata.items() if name not in ("kind", "reference")}
    values = torch.view_as_real(spectrum).float().numpy()
    return Key(metadata | {"latent_shape": list(scheme.latent_shape)}, values=values)


def spread(values: Tensor) -> tuple[float, float | None]:
    """Mean and its standard error, which is None for a single value."""
    return mean_and_error(values) if len(values) > 1 else (float(values[0]), None)


def groups(noise: Tensor, m: int) -> list[Tensor]:
    """The noises split into complete groups of m."""
    return list(noise[: len(noise) // m * m].split(m))


def likeness(key: Key, estimates: list[Key]) -> Tensor:
    """The cosine (len(estimates),) between the true key's features and each estimate's."""
    true, *estimated = (
        scheme.features(scheme.hermitian[None])[0].numpy() for scheme in map(TreeRing, [key, *estimates])
    )
    return torch.from_numpy(cosine_scores(np.stack(estimated), true))


def expected_cosine(model: LatentModel, scheme: TreeRing, m: int) -> float | None:
    """The expected cosine of an estimate from m images and the key: mean over channels of mean(a) / √mean(a² + v / m).

    The inner means are over bins. a and v are the model's measured attenuation and variance (`NoiseRecovery`); None if
    they were not measured.
    """
    if model.recovery is None:
        return None
    of_channels = []
    for channel, marked in zip(scheme.placement.channels, scheme.marked, strict=True):
        ring = scheme.ring[marked]
        a, v = (table[channel, ring] for table in (model.recovery.attenuation, model.recovery.variance))
        of_channels.append(float(a.mean() / (a.square() + v / m).mean().sqrt()))
    return float(np.mean(of_channels))


def ring_z(noise: Tensor) -> Tensor:
    """z (C, R) of the common part of recovered noises (m, C, h, w), m ≥ 2, on each ring about DC; at most 37.

    m |mean|² over Σ |F − mean|² / (m − 1), both summed over a ring's n bins, is F-distributed with n and n (m − 1)
    degrees of freedom if the m noises are independent white noise; z is the normal deviate of that tail. The ratio is
    about (m a² + v) / (a² + v) for a key's ring, and 1 if nothing is shared, when the mean has 1/m of an image's power.
    """
    spectrum, m = torch.fft.fft2(noise.double(), norm="ortho"), len(noise)
    mean, ring = spectrum.mean(0), rings(*noise.shape[-2:]).flatten()
    count = torch.bincount(ring)
    between = m * by_ring(mean.abs().square(), ring, len(count))
    within = by_ring((spectrum - mean).abs().square().sum(0), ring, len(count)) / (m - 1)
    tail = stats.f.sf((between / within).numpy(), count.numpy(), count.numpy() * (m - 1))
    return torch.from_numpy(stats.norm.isf(np.clip(tail, 1e-300, 1 - 1e-15)))


def by_ring(power: Tensor, ring: Tensor, number: int) -> Tensor:
    """Sums (C, R) of power (C, h, w) over each ring."""
    return torch.zeros(len(power), number).double().index_add_(1, ring, power.flatten(1))


def cells(scheme: TreeRing) -> tuple[Tensor, Tensor]:
    """Masks (C, R) of possible rings (not DC, not the corners) and of the rings of this mark."""
    count, height, width = scheme.latent_shape
    possible = torch.zeros(count, int(rings(height, width).max()) + 1, dtype=torch.bool)
    possible[:, 1 : min(height, width) // 2] = True
    marked = torch.zeros_like(possible)
    for channels, (low, high) in ((list(part.channels), part.radii) for part in scheme.parts):
        marked[channels, low : high + 1] = True
    return possible, marked


def shown(noise: Tensor, m: int, where: Tensor) -> dict:
    """How many of the cells `where` have z > SHOWS, over all groups of m images; empty for m = 1."""
    if m == 1 or len(noise) < m or not where.any():
        return dict.fromkeys(("count", "of", "share", "low", "high"))
    hits = torch.stack([ring_z(some)[where] > SHOWS for some in groups(noise, m)])
    return share(int(hits.sum()), hits.numel())


def recovered(bench: Bench, images: Tensor, name: str) -> Tensor:
    return bench.noise_of(images, name).nan_to_num()


def p_values(bench: Bench, key: Key, noise: Tensor) -> np.ndarray:
    """The detector's p-value of each noise for this single key."""
    return bench.test(TreeRing(key), noise)[1]


def forge(bench: Bench, estimates: list[Key], number: int, m: int) -> Tensor:
    """Noise recovered from `number` new images, each marked with one of the estimates, in turn."""
    noise, prompts = bench.fresh(number, FRESH + 1000 * m.bit_length())
    marked = mark_in_turn([TreeRing(e) for e in estimates], noise)
    name = f"forged from {m}"
    return recovered(bench, bench.draw(marked, prompts, name).images, name)


def average(bench: Bench, key: Key, noise: Tensor, unmarked: Tensor, m: int, number: int, alpha: float) -> dict:
    """A row with what m images of one key reveal about it."""
    scheme, estimates = TreeRing(key), [forged(key, some) for some in groups(noise, m)]
    alike, error = spread(likeness(key, estimates))
    p = p_values(bench, key, forge(bench, estimates, number, m))
    possible, marked = cells(scheme)
    seen = {
        "ring shown": shown(noise, m, marked),
        "shown elsewhere": shown(noise, m, possible & ~marked),
        "unmarked shown": shown(unmarked, m, possible),
    }
    row = {"images": m, "estimates": len(estimates), "correlation": alike, "standard error": error}
    row |= {"expected": expected_cosine(bench.model, scheme, m)} | prefixed(
        "forged passing", share((p <= alpha).sum(), number)
    )
    row |= {"forged median p": float(np.median(p)), "forged largest p": float(p.max())}
    return row | {k: v for name, found in seen.items() for k, v in prefixed(name, found).items()}


def prefixed(name: str, found: dict) -> dict:
    """The entries of `share` as columns with a prefix."""
    return {f"{name}, {k}": v for k, v in found.items()}


def limits(rows: list[dict]) -> dict:
    """The numbers of published images from which some, half and all forged images pass; None if they never do."""
    bounds = {"some forged images pass from": 1e-9, "half of them pass from": 0.5, "all pass from": 1.0}
    passing = [(row["images"], row["forged passing, share"]) for row in rows]
    return {name: next((m for m, value in passing if value >= bound), None) for name, bound in bounds.items()}


def replaced(bench: Bench, noise: Tensor, parts: Sequence[Placement]) -> Tensor:
    """The noises with all bins of these parts replaced by new noise, different in each."""
    for place in parts:
        keys = [bench.key(place, seed=[bench.first, i]) for i in range(len(noise))]
        noise = mark_in_turn([TreeRing(key) for key in keys], noise)
    return noise


def ways(bench: Bench, parts: Sequence[Placement], noise: Tensor, prompts: list[str]) -> dict[str, tuple]:
    """Noise, prompts and guidance for each way of drawing again."""
    count, height, width = bench.model.latent_shape
    everything = Placement(tuple(range(count)), (LOWEST, min(height, width) // 2 - 1))
    other, others = bench.fresh(len(noise), OTHERS)
    guidance, nothing, anew = bench.guidance, [""] * len(noise), replaced(bench, noise, parts)
    return {
        "another prompt": (noise, others, guidance),
        "same prompt": (noise, prompts, guidance),
        "same prompt, ring replaced": (anew, prompts, guidance),
        "no prompt": (noise, nothing, 1.0),
        "no prompt, ring replaced": (anew, nothing, 1.0),
        f"no prompt, rings from {LOWEST} on replaced": (replaced(bench, noise, [everything]), nothing, 1.0),
        "same prompt, other noise": (other, prompts, guidance),
    }


def compared(way: str, guidance: float, p: np.ndarray, images: Tensor, before: Tensor, alpha: float) -> dict:
    """A row with whether the key is still present and how similar the picture is."""
    alike, alike_error = spread(correlation(images, before))
    rms, rms_error = spread((images - before).square().mean((1, 2, 3)).sqrt() * 127.5)
    return {
        "drawn again": way, "guidance": guidance, **prefixed("key present", share((p <= alpha).sum(), len(p))),
        "median p": float(np.median(p)), "largest p": float(p.max()), "smallest p": float(p.min()),
        "pixel correlation": alike, "its error": alike_error,
        "grey levels RMS": rms, "RMS error": rms_error,
    }  # fmt: skip


def draw_again(bench: Bench, key: Key, seen: Tensor, noise: Tensor, prompts: list[str], alpha: float) -> list[dict]:
    """A row for the original pictures, and one for each way of drawing them again."""
    rows = [compared("not at all", bench.guidance, p_values(bench, key, noise), seen, seen, alpha)]
    every = ways(bench, TreeRing(key).parts, noise, prompts)
    for way, (start, texts, guidance) in tqdm(every.items(), "drawn again", disable=None):
        images = bench.draw(start, texts, way, guidance).images
        rows.append(compared(way, guidance, p_values(bench, key, recovered(bench, images, way)), images, seen, alpha))
    return rows


def figure_of(rows: list[dict], z: Tensor | None, marked: Tensor) -> Figure:
    """The estimated key by number of images, the position of the ring, and how soon it is visible."""
    figure, (learnt, chart, soon) = panels(14, 4, across=3)
    plot_learning(learnt, rows)
    if z is not None:
        plot_rings(chart, z, marked, rows[-1]["images"])
    for name, colour in (("ring shown", MARK), ("shown elsewhere", INK), ("unmarked shown", GREY)):
        plot_share(soon, [r for r in rows if r[f"{name}, of"]], name, colour)
    soon.set(xlabel="images averaged", ylabel=f"share of rings with z > {SHOWS:g}", ylim=(-0.03, 1.03))
    if len(rows) > 1:
        soon.legend(frameon=False, fontsize=8)
    return figure


def plot_learning(ax: Axes, rows: list[dict]) -> None:
    """Correlation of the estimate with the key, and the share of forged images that pass."""
    m, alike, error, expected = columns(rows, "images", "correlation", "standard error", "expected")
    ax.errorbar(m, alike, np.nan_to_num(error), fmt="o", ms=4, color=INK, label="estimate and key")
    if not np.isnan(expected).any():
        ax.plot(m, expected, color=INK, lw=1, ls="--", label="expected")
    plot_share(ax, rows, "forged passing", MARK)
    ax.set(xlabel="images averaged", ylabel="correlation; share passing", ylim=(-0.03, 1.03))
    ax.legend(frameon=False, fontsize=8, loc="lower right")


def plot_share(ax: Axes, rows: list[dict], name: str, colour: str) -> None:
    """A share with its interval against the number of images."""
    if rows:
        (x,), style = columns(rows, "images"), {"fmt": "s-", "ms": 3, "lw": 1.2, "capsize": 2}
        names = (f"{name}, {end}" for end in ("share", "low", "high"))
        intervals(ax, x * 1.04, rows, *names, color=colour, label=name, **style)
        ax.set_xscale("log", base=2)


def plot_rings(ax: Axes, z: Tensor, marked: Tensor, m: int) -> None:
    """z of each channel and ring, with crosses at the key."""
    picture = ax.imshow(z.numpy(), cmap="Blues", vmin=0, vmax=2 * SHOWS, aspect="auto", interpolation="nearest")
    channel, ring = np.nonzero(marked.numpy())
    ax.plot(ring, channel, "x", color=COLOURS[1], ms=7, label="the key")
    ax.set(xlabel="ring", ylabel="latent channel", yticks=range(len(z)), title=f"z of the mean of {m} images")
    ax.legend(fontsize=8, loc="upper right")
    ax.figure.colorbar(picture, ax=ax, extend="max")


def cell(row: dict, name: str) -> str:
    """A share as a fraction."""
    return "-" if row[f"{name}, of"] is None else f"{row[f'{name}, count']}/{row[f'{name}, of']}"


def summary(rows: list[dict], again: list[dict]) -> str:
    """Both tables as text."""
    lines = [
        f"{r['images']:4} images: correlation {r['correlation']:.3f}, forged passing {cell(r, 'forged passing')} "
        f"(median p {r['forged median p']:.1e}), rings shown {cell(r, 'ring shown')}, elsewhere "
        f"{cell(r, 'shown elsewhere')}, unmarked {cell(r, 'unmarked shown')}"
        for r in rows
    ]
    lines += [
        f"{r['drawn again']:36} key present {cell(r, 'key present')} (median p {r['median p']:.1e}), "
        f"pixel correlation {r['pixel correlation']:.3f}, RMS {r['grey levels RMS']:.1f} grey levels"
        for r in again
    ]
    return "\n".join(lines)


@experiment(64, seed=50_000)
@click.option(
    "--forged", default=16, show_default=True, help="Number of images forged at each m, and of images drawn again."
)
@click.option("--published", help="Attack applied to published images, as in ringmark attack.")
@click.option(
    "--alpha", type=click.FloatRange(0, 1), default=ALPHA, show_default=True, help="Level at which a key is present."
)
def main(bench: Bench, forged: int, published: str | None, alpha: float) -> None:
    """Averaging, forgery and removal by an attacker who has the model."""
    chain = parse(published) if published else None
    key, number, few = bench.key(seed=bench.seed), bench.number, min(bench.number, forged)
    noise, prompts = bench.fresh(2 * number)
    start = torch.cat([TreeRing(key).embed(noise[:number]), noise[number:]])
    seen = bench.attacked(bench.draw(start, prompts, "published").images, chain)
    marked, unmarked = recovered(bench, seen, "published").split(number)
    steps = tqdm(ladder(number), "averaged", disable=None)
    rows = [average(bench, key, marked, unmarked, m, forged, alpha) for m in steps]
    again = draw_again(bench, key, seen[:few], marked[:few], prompts[:few], alpha)
    click.echo(summary(rows, again))
    most = rows[-1]["images"]
    z = ring_z(marked[:most]) if most > 1 else None
    facts = {"bands": [str(part) for part in TreeRing(key).parts], "shows": SHOWS}
    facts = {"settings": facts | {"calibration": bench.calibration_used}}
    found = {"limits": limits(rows), "ring_z": None if z is None else z.tolist()}
    bench.write(rows, figure_of(rows, z, cells(TreeRing(key))[1]), **facts, **found)
    bench.write(again, name="security_drawn_again", **facts)
