"""What an attacker who holds the model, but not the key, can learn, forge and remove.

    python -m scripts.experiments security -o build/security          # 64 images of a key; 13 minutes of one core
    python -m scripts.experiments security -o build/security -n 2 --forged 1 --steps 4
    python -m scripts.experiments security -o build/security-jpeg --published jpeg:25    # attacker has JPEG files only

The attacker recovers noise as the detector does: same model, same inversion. Without the model, or with one like it,
less comes back; that is not studied here (see arXiv 2601.20310 and 2606.29807). Costs: 1.3 s to draw an image, 1 s to
recover its noise.

Averaging. N images are marked with one key, of different prompts and seeds. A masked bin comes back as a K + rest, so
the mean over m images has the cosine √(m a² / (m a² + v)) with the key, for one a and v; over the rings of the mark,
see `expected_cosine`. For m = 1, 2, 4, … the images fall into N / m groups, each gives an estimate of the key, and
`--forged` new images are drawn from noise marked with an estimate (in turn, one of each group) and tested with the true
key. How many pass at alpha says how many images may be published with one key. At m = 1 this is the forgery by
transplanting a single image's bins. Intervals take forged images for independent; those of one estimate share its luck.
With --published only the attacker's images are distorted, not the forged ones.

Where the ring is. An attacker who knows neither channels nor radii compares, ring by ring, the power of the mean noise
with the 1/m of an image's power that is expected where images share nothing: `ring_z`. A ring shows at z > 4. The same
of as many unmarked images: what a model's images share without a key. A key leaks into other channels, so its rings
may show there too, later.

Drawing again. From the noise recovered from marked images: with another prompt (forgery); with the masked bins, or all
bins from ring 3 on, drawn anew (removal), once with the prompt and guidance, once with neither, as the inversion was,
which keeps the picture better. Similarity is the correlation of pixels, and their RMS difference in grey levels.
"""

from __future__ import annotations

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

SHOWS = 4.0  # z, of a ring that stands out: 3 in 100 000 by chance
LOWEST = 3  # ring from which on everything may be drawn anew and the layout stays
FRESH, OTHERS = 10_000, 30_000  # seeds of forged images and of pictures drawn again, after those of the marked ones


def ladder(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [2**i for i in range(most.bit_length())]


def forged(key: Key, noise: Tensor) -> Key:
    """What is taken for the key by one who knows its mask and has these recovered noises (m, C, h, w).

    The mean of their masked bins, each channel at unit power, as keys are.
    """
    scheme = TreeRing(key)
    mean = scheme.masked(noise)[0].mean(0).view(len(scheme.placement.channels), -1)
    spectrum = torch.zeros_like(scheme.spectrum)
    spectrum[:, scheme.inside] = mean / mean.abs().square().mean(1, keepdim=True).sqrt()
    return Key(torch.view_as_real(spectrum).float().numpy(), key.metadata)


def spread(values: Tensor) -> tuple[float, float | None]:
    """Mean and its standard error, which a single value does not have."""
    return mean_and_error(values) if len(values) > 1 else (float(values[0]), None)


def groups(noise: Tensor, m: int) -> list[Tensor]:
    """The noises in as many whole groups of m as there are."""
    return list(noise[: len(noise) // m * m].split(m))


def likeness(key: Key, estimates: list[Key]) -> Tensor:
    """The cosine (len(estimates),) between the true key's features and each estimate's."""
    own, *found = (scheme.features(scheme.hermitian[None])[0].numpy() for scheme in map(TreeRing, [key, *estimates]))
    return torch.from_numpy(cosine_scores(np.stack(found), own))


def expected_cosine(model: LatentModel, scheme: TreeRing, m: int) -> float | None:
    """Of an estimate from m images and the key: per channel mean(a) / √mean(a² + v / m), over its bins; then the mean.

    a and v are the model's measured attenuation and variance (`NoiseRecovery`); None where they were not measured.
    """
    if model.recovery is None:
        return None
    channels, ring = list(scheme.placement.channels), scheme.ring[scheme.inside]
    a, v = (table[channels][:, ring] for table in (model.recovery.attenuation, model.recovery.variance))
    return float((a.mean(1) / (a.square() + v / m).mean(1).sqrt()).mean())


def ring_z(noise: Tensor) -> Tensor:
    """z (C, R) of what recovered noises (m, C, h, w), m ≥ 2, have in common on each ring about DC; at most 37.

    m |mean|² over Σ |F − mean|² / (m − 1), both summed over a ring's n bins, is F-distributed with n and n (m − 1)
    degrees of freedom if the m are independent white noise; z is the normal deviate of that tail. A key's ring has the
    ratio (m a² + v) / (a² + v) nearly, where nothing is shared it is 1: the mean's power is 1/m of an image's.
    """
    spectrum, m = torch.fft.fft2(noise.double(), norm="ortho"), len(noise)
    mean, ring = spectrum.mean(0), rings(*noise.shape[-2:]).flatten()
    count = torch.bincount(ring)
    between = m * by_ring(mean.abs().square(), ring, len(count))
    within = by_ring((spectrum - mean).abs().square().sum(0), ring, len(count)) / (m - 1)
    tail = stats.f.sf((between / within).numpy(), count.numpy(), count.numpy() * (m - 1))
    return torch.from_numpy(stats.norm.isf(np.clip(tail, 1e-300, 1 - 1e-15)))


def by_ring(power: Tensor, ring: Tensor, number: int) -> Tensor:
    """(C, h, w) summed over each of so many rings: (C, R)."""
    return torch.zeros(len(power), number).double().index_add_(1, ring, power.flatten(1))


def cells(scheme: TreeRing) -> tuple[Tensor, Tensor]:
    """(C, R) bool: where a ring may be at all (not DC, not the corners), and where this one is."""
    count, height, width = scheme.latent_shape
    possible = torch.zeros(count, int(rings(height, width).max()) + 1, dtype=torch.bool)
    possible[:, 1 : min(height, width) // 2] = True
    marked = torch.zeros_like(possible)
    low, high = scheme.placement.radii
    marked[list(scheme.placement.channels), low : high + 1] = True
    return possible, marked


def shown(noise: Tensor, m: int, where: Tensor) -> dict:
    """How many of the cells `where` show at z > SHOWS, over all groups of m images; nothing for m = 1."""
    if m == 1 or len(noise) < m or not where.any():
        return dict.fromkeys(("count", "of", "share", "low", "high"))
    hits = torch.stack([ring_z(some)[where] > SHOWS for some in groups(noise, m)])
    return share(int(hits.sum()), hits.numel())


def recovered(bench: Bench, images: Tensor, name: str) -> Tensor:
    return bench.noise_of(images, name).nan_to_num()


def p_values(bench: Bench, key: Key, noise: Tensor) -> np.ndarray:
    """The detector's p-value of each noise, with this key alone."""
    return bench.test(TreeRing(key), noise)[1]


def forge(bench: Bench, estimates: list[Key], number: int, m: int) -> Tensor:
    """Noise recovered from `number` new images, each marked with one of the estimates, in turn."""
    noise, prompts = bench.fresh(number, FRESH + 1000 * m.bit_length())
    marked = mark_in_turn([TreeRing(e) for e in estimates], noise)
    name = f"forged from {m}"
    return recovered(bench, bench.draw(marked, prompts, name).images, name)


def average(bench: Bench, key: Key, noise: Tensor, unmarked: Tensor, m: int, number: int, alpha: float) -> dict:
    """What m images of one key tell about it: a row."""
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
    """The entries of `share` as columns of their own."""
    return {f"{name}, {k}": v for k, v in found.items()}


def limits(rows: list[dict]) -> dict:
    """From how many published images on a forged key passes at all, and in half of the forged images; None: never."""
    bounds = {"some forged images pass from": 1e-9, "half of them pass from": 0.5, "all pass from": 1.0}
    passing = [(row["images"], row["forged passing, share"]) for row in rows]
    return {name: next((m for m, value in passing if value >= bound), None) for name, bound in bounds.items()}


def replaced(bench: Bench, noise: Tensor, place: Placement) -> Tensor:
    """The noises with all bins of a placement drawn anew, other ones in each."""
    keys = [bench.key(place, seed=[bench.first, i]) for i in range(len(noise))]
    return mark_in_turn([TreeRing(key) for key in keys], noise)


def ways(bench: Bench, place: Placement, noise: Tensor, prompts: list[str]) -> dict[str, tuple]:
    """Noise, prompts and guidance of the pictures drawn again."""
    count, height, width = bench.model.latent_shape
    everything = Placement(tuple(range(count)), (LOWEST, min(height, width) // 2 - 1))
    other, others = bench.fresh(len(noise), OTHERS)
    guidance, nothing, anew = bench.guidance, [""] * len(noise), replaced(bench, noise, place)
    return {
        "another prompt": (noise, others, guidance),
        "same prompt": (noise, prompts, guidance),
        "same prompt, ring replaced": (anew, prompts, guidance),
        "no prompt": (noise, nothing, 1.0),
        "no prompt, ring replaced": (anew, nothing, 1.0),
        f"no prompt, rings from {LOWEST} on replaced": (replaced(bench, noise, everything), nothing, 1.0),
        "same prompt, other noise": (other, prompts, guidance),
    }


def compared(way: str, guidance: float, p: np.ndarray, images: Tensor, before: Tensor, alpha: float) -> dict:
    """Whether the key is still there and the picture the same: a row."""
    alike, alike_error = spread(correlation(images, before))
    rms, rms_error = spread((images - before).square().mean((1, 2, 3)).sqrt() * 127.5)
    return {
        "drawn again": way, "guidance": guidance, **prefixed("key present", share((p <= alpha).sum(), len(p))),
        "median p": float(np.median(p)), "largest p": float(p.max()), "smallest p": float(p.min()),
        "pixel correlation": alike, "its error": alike_error,
        "grey levels RMS": rms, "RMS error": rms_error,
    }  # fmt: skip


def draw_again(bench: Bench, key: Key, seen: Tensor, noise: Tensor, prompts: list[str], alpha: float) -> list[dict]:
    """A row for the pictures as they were, and one for each way of drawing them again."""
    rows = [compared("not at all", bench.guidance, p_values(bench, key, noise), seen, seen, alpha)]
    every = ways(bench, TreeRing(key).placement, noise, prompts)
    for way, (start, texts, guidance) in tqdm(every.items(), "drawn again", disable=None):
        images = bench.draw(start, texts, way, guidance).images
        rows.append(compared(way, guidance, p_values(bench, key, recovered(bench, images, way)), images, seen, alpha))
    return rows


def figure_of(rows: list[dict], z: Tensor | None, marked: Tensor) -> Figure:
    """The key against the number of images, where the ring is, and how soon that shows."""
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
    """z of each channel and ring; crosses are where the key is."""
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
    """Both tables in words."""
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
@click.option("--forged", default=16, show_default=True, help="Images forged at each m; drawn again.")
@click.option("--published", help="Attack, as in ringmark attack, that published images have been through.")
@click.option("--alpha", type=click.FloatRange(0, 1), default=ALPHA, show_default=True, help="At which a key is there.")
def main(bench: Bench, forged: int, published: str | None, alpha: float) -> None:
    """Averaging, forgery and removal by one who holds the model."""
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
    most, place = rows[-1]["images"], bench.placement
    z = ring_z(marked[:most]) if most > 1 else None
    facts = {"channels": list(place.channels), "radii": list(place.radii), "shows": SHOWS}
    facts = {"settings": facts | {"calibration": bench.calibration_used}}
    found = {"limits": limits(rows), "ring_z": None if z is None else z.tolist()}
    bench.write(rows, figure_of(rows, z, cells(TreeRing(key))[1]), **facts, **found)
    bench.write(again, name="security_drawn_again", **facts)
