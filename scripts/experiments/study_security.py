"""What someone who holds the model, but not the key, can do: learn the key, forge it, remove it.

    python scripts/study_security.py -o build/security               # 64 images of a key; about 13 minutes of one core
    python scripts/study_security.py -o build/security -n 2 --forged 1 --steps 4
    python scripts/study_security.py -o build/security-jpeg --published jpeg:25   # the attacker has JPEG files only

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

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from ringmark.errors import RingmarkError
from ringmark.inversion.metrics import correlation
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.noise_recovery import rings
from ringmark.watermark.attacks.chains import Chain, parse
from ringmark.watermark.detect.detector import ALPHA, Detector, with_built_in
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.figures import COLOURS, GREY, INK, MARK
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.tree_ring import Placement, TreeRing, make_key, recommend
from ringmark.watermark.statistics import cosine_test
from ringmark.watermark.tasks.audit import prompts_for
from scripts.experiments.common import SEED, experiment_options, mean_and_error, write_results
from scripts.experiments.study_identification import attacked, drawn_from, noise_of, share

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
    nothing = torch.zeros(1, *key.metadata["latent_shape"])
    found = np.stack([TreeRing(e).features(nothing)[1].numpy() for e in estimates])
    return torch.from_numpy(cosine_test(found, TreeRing(key).features(nothing)[1].numpy())[0])


def expected_cosine(model: LatentModel, scheme: TreeRing, m: int) -> float | None:
    """Of an estimate from m images and the key: per channel mean(a) / √mean(a² + v / m), over its features; then the mean.

    a and v are the model's measured attenuation and variance (`NoiseRecovery`); None where they were not measured.
    """
    if model.recovery is None:
        return None
    channel, ring = scheme.feature_rings()
    a, v = model.recovery.attenuation[channel, ring], model.recovery.variance[channel, ring]
    a, v = (x.view(len(scheme.placement.channels), -1) for x in (a, v))
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
    total = lambda power: torch.zeros(len(power), len(count)).double().index_add_(1, ring, power.flatten(1))
    between = m * total(mean.abs().square())
    within = total((spectrum - mean).abs().square().sum(0)) / (m - 1)
    tail = stats.f.sf((between / within).numpy(), count.numpy(), count.numpy() * (m - 1))
    return torch.from_numpy(stats.norm.isf(np.clip(tail, 1e-300, 1 - 1e-15)))


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


class Attacker(NamedTuple):
    """The model and how images are drawn and inverted; `judge` says which pass, `at` is the first seed."""

    model: LatentModel
    judge: Detector
    steps: int
    guidance: float
    cache: Path
    at: int

    def draw(self, noise: Tensor, prompts: list[str], name: str, guidance: float | None = None) -> Tensor:
        guidance = self.guidance if guidance is None else guidance
        return drawn_from(self.model, noise, prompts, steps=self.steps, guidance=guidance, name=name, cache=self.cache)

    def recover(self, images: Tensor, name: str) -> Tensor:
        return noise_of(self.model, images, steps=self.steps, name=name, cache=self.cache).nan_to_num()

    def fresh(self, offset: int, number: int) -> tuple[Tensor, list[str]]:
        """New noise and prompts."""
        first = self.at + offset
        noise = initial_noise(list(range(first, first + number)), self.model.latent_shape)
        return noise, prompts_for([], number, first)


def p_values(attacker: Attacker, key: Key, noise: Tensor) -> np.ndarray:
    """The detector's p-value of each noise, with this key alone."""
    return attacker.judge.statistic(TreeRing(key), noise)[1]


def forge(attacker: Attacker, estimates: list[Key], number: int, m: int) -> Tensor:
    """Noise recovered from `number` new images, each marked with one of the estimates, in turn."""
    noise, prompts = attacker.fresh(FRESH + 1000 * m.bit_length(), number)
    schemes = [TreeRing(e) for e in estimates]
    marked = torch.cat([schemes[i % len(schemes)].embed(noise[i : i + 1]) for i in range(number)])
    name = f"forged from {m}"
    return attacker.recover(attacker.draw(marked, prompts, name), name)


def average(attacker: Attacker, key: Key, noise: Tensor, unmarked: Tensor, m: int, number: int, alpha: float) -> dict:
    """What m images of one key tell about it: a row."""
    scheme, estimates = TreeRing(key), [forged(key, some) for some in groups(noise, m)]
    alike, error = spread(likeness(key, estimates))
    p = p_values(attacker, key, forge(attacker, estimates, number, m))
    possible, marked = cells(scheme)
    seen = {
        "ring shown": shown(noise, m, marked),
        "shown elsewhere": shown(noise, m, possible & ~marked),
        "unmarked shown": shown(unmarked, m, possible),
    }
    return {
        "images": m, "estimates": len(estimates),
        "correlation": alike, "standard error": error,
        "expected": expected_cosine(attacker.model, scheme, m),
        **prefixed("forged passing", share((p <= alpha).sum(), number)),
        "forged median p": float(np.median(p)), "forged largest p": float(p.max()),
        **{k: v for name, found in seen.items() for k, v in prefixed(name, found).items()},
    }  # fmt: skip


def prefixed(name: str, found: dict) -> dict:
    """The entries of `share` as columns of their own."""
    return {f"{name}, {k}": v for k, v in found.items()}


def limits(rows: list[dict]) -> dict:
    """From how many published images on a forged key passes at all, and in half of the forged images; None: never."""
    least = lambda bound: next((r["images"] for r in rows if r["forged passing, share"] >= bound), None)
    some = next((r["images"] for r in rows if r["forged passing, count"]), None)
    return {"some forged images pass from": some, "half of them pass from": least(0.5), "all pass from": least(1.0)}


def replaced(model: LatentModel, noise: Tensor, place: Placement, seed: int) -> Tensor:
    """The noises with all bins of a placement drawn anew, other ones in each."""
    make = partial(make_key, model.latent_shape, place, model=model.identity)
    return torch.cat([
        TreeRing(make(rng=np.random.default_rng([seed, i]))).embed(z[None]) for i, z in enumerate(noise)
    ])  # fmt: skip


def ways(
    attacker: Attacker, place: Placement, noise: Tensor, prompts: list[str]
) -> dict[str, tuple[Tensor, list[str], float]]:
    """Noise, prompts and guidance of the pictures drawn again."""
    count, height, width = attacker.model.latent_shape
    everything = Placement(tuple(range(count)), (LOWEST, min(height, width) // 2 - 1))
    other, others = attacker.fresh(OTHERS, len(noise))
    anew = partial(replaced, attacker.model, noise, seed=attacker.at)
    guidance, nothing = attacker.guidance, [""] * len(noise)
    return {
        "another prompt": (noise, others, guidance),
        "same prompt": (noise, prompts, guidance),
        "same prompt, ring replaced": (anew(place), prompts, guidance),
        "no prompt": (noise, nothing, 1.0),
        "no prompt, ring replaced": (anew(place), nothing, 1.0),
        f"no prompt, rings from {LOWEST} on replaced": (anew(everything), nothing, 1.0),
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


def draw_again(
    attacker: Attacker, key: Key, seen: Tensor, noise: Tensor, prompts: list[str], alpha: float
) -> list[dict]:
    """A row for the pictures as they were, and one for each way of drawing them again."""
    rows = [compared("not at all", attacker.guidance, p_values(attacker, key, noise), seen, seen, alpha)]
    place = TreeRing(key).placement
    for way, (start, texts, guidance) in tqdm(
        ways(attacker, place, noise, prompts).items(), "drawn again", disable=None
    ):
        images = attacker.draw(start, texts, way, guidance)
        p = p_values(attacker, key, attacker.recover(images, way))
        rows.append(compared(way, guidance, p, images, seen, alpha))
    return rows


def figure_of(rows: list[dict], z: Tensor | None, marked: Tensor) -> Figure:
    """The key against the number of images, where the ring is, and how soon that shows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    learnt, chart, soon = figure.subplots(1, 3)
    plot_learning(learnt, rows)
    if z is not None:
        plot_rings(chart, z, marked, rows[-1]["images"])
    for name, colour in (("ring shown", MARK), ("shown elsewhere", INK), ("unmarked shown", GREY)):
        plot_share(soon, [r for r in rows if r[f"{name}, of"]], name, colour)
    soon.set(xlabel="images averaged", ylabel=f"share of rings with z > {SHOWS:g}", ylim=(-0.03, 1.03))
    soon.legend(frameon=False, fontsize=8)
    return figure


def plot_learning(ax: Axes, rows: list[dict]) -> None:
    """Correlation of the estimate with the key, and the share of forged images that pass."""
    m = [r["images"] for r in rows]
    errors = [r["standard error"] or 0.0 for r in rows]
    ax.errorbar(m, [r["correlation"] for r in rows], errors, fmt="o", ms=4, color=INK, label="estimate and key")
    if rows[0]["expected"] is not None:
        ax.plot(m, [r["expected"] for r in rows], color=INK, lw=1, ls="--", label="expected")
    plot_share(ax, rows, "forged passing", MARK)
    ax.set(xlabel="images averaged", ylabel="correlation; share passing", ylim=(-0.03, 1.03))
    ax.legend(frameon=False, fontsize=8, loc="lower right")


def plot_share(ax: Axes, rows: list[dict], name: str, colour: str) -> None:
    """A share with its interval against the number of images."""
    x, y, low, high = (
        np.array([r[c] for r in rows]) for c in ("images", *(f"{name}, {k}" for k in ("share", "low", "high")))
    )
    if len(x):
        error = np.maximum(0, [y - low, high - y])
        ax.errorbar(x * 1.04, y, error, fmt="s-", ms=3, lw=1.2, capsize=2, color=colour, label=name)
        ax.set_xscale("log", base=2)


def plot_rings(ax: Axes, z: Tensor, marked: Tensor, m: int) -> None:
    """z of each channel and ring; crosses are where the key is."""
    picture = ax.imshow(z.numpy(), cmap="Blues", vmin=0, vmax=2 * SHOWS, aspect="auto", interpolation="nearest")
    channel, ring = np.nonzero(marked.numpy())
    ax.plot(ring, channel, "x", color=COLOURS[1], ms=7, label="the key")
    ax.set(xlabel="ring", ylabel="latent channel", yticks=range(len(z)), title=f"z of the mean of {m} images")
    ax.legend(fontsize=8, loc="upper right")
    ax.figure.colorbar(picture, ax=ax, extend="max")


def summary(rows: list[dict], again: list[dict]) -> str:
    """Both tables in words."""
    cell = lambda r, name: "-" if r[f"{name}, of"] is None else f"{r[f'{name}, count']}/{r[f'{name}, of']}"
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


def parsed(published: str | None) -> Chain | None:
    """The attack of --published, if any."""
    try:
        return parse(published) if published else None
    except RingmarkError as error:
        raise click.UsageError(str(error)) from None


@click.command()
@experiment_options(64)
@click.option("--forged", "number_forged", default=16, show_default=True, help="Images forged at each m; drawn again.")
@click.option("--published", help="Attack, as in ringmark attack, that published images have been through.")
@click.option("--alpha", type=click.FloatRange(0, 1), default=ALPHA, show_default=True, help="At which a key is there.")
@click.option("--steps", default=25, show_default=True, help="Of DDIM, both ways.")
@click.option("--guidance", default=3.0, show_default=True, help="When drawing.")
@click.option("--seed", default=50_000, show_default=True, help="Of the key, prompts and noise.")
def main(
    source: str, images: Path | None, number: int, output: Path, number_forged: int, published: str | None,
    alpha: float, steps: int, guidance: float, seed: int,
) -> None:  # fmt: skip
    """Averaging, forgery and removal by one who holds the model."""
    if images:
        raise click.UsageError("--images: only drawn images carry keys")
    chain = parsed(published)
    model = LatentModel.from_pretrained(source)
    judge, _ = with_built_in(Detector(model, [], steps=steps), Path(resolve(source)))
    attacker = Attacker(model, judge, steps, guidance, output / "cache", SEED + seed)
    place = recommend(model.recovery, model.latent_shape)
    key = make_key(model.latent_shape, place, model=model.identity, rng=np.random.default_rng(seed))
    noise, prompts = attacker.fresh(0, 2 * number)
    start = torch.cat([TreeRing(key).embed(noise[:number]), noise[number:]])
    seen = attacked(model, attacker.draw(start, prompts, "published"), chain, seed)
    back = attacker.recover(seen, "published")
    marked, unmarked = back[:number], back[number:]
    rows = [
        average(attacker, key, marked, unmarked, m, number_forged, alpha)
        for m in tqdm(ladder(number), "averaged", disable=None)
    ]
    few = min(number, number_forged)
    again = draw_again(attacker, key, seen[:few], marked[:few], prompts[:few], alpha)
    click.echo(summary(rows, again))
    facts = {
        "model": model.identity,
        "settings": {
            "channels": list(place.channels), "radii": list(place.radii), "images": number, "forged": number_forged,
            "published": published, "alpha": alpha, "shows": SHOWS, "steps": steps, "guidance": guidance, "seed": seed,
            "first_seed": attacker.at, "calibration": judge.settings()["calibration"],
        },
        "threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(model.device),
    }  # fmt: skip
    most = rows[-1]["images"]
    z = ring_z(marked[:most]) if most > 1 else None
    found = facts | {"limits": limits(rows), "ring_z": None if z is None else z.tolist()}
    write_results(output, "study_security", rows, figure_of(rows, z, cells(TreeRing(key))[1]), **found)
    write_results(output, "study_security_drawn_again", again, **facts)


if __name__ == "__main__":
    main()
