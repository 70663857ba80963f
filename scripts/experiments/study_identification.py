"""Which key of many is in the picture, and is a wrong one ever named?

    python scripts/study_identification.py -o build/identification        # 64 + 64 images, about 12 minutes of one core
    python scripts/study_identification.py -o build/identification -n 2 --unmarked 2 --keys 2 --keys 16 --steps 4 --attack blur:4

Every marked image carries a key of its own out of `max(--keys)`, in the default placement. For each K it is held
against K keys, as a detector with a ring of K keys would do. Counted are

- accuracy: the largest whitened cosine, and the smallest published distance as in arXiv 2305.20030 and 2404.14055,
  belong to the key that is there; one of the K is always chosen;
- the product's rule: keys with K p <= alpha are named, the best first. The right key is named, a wrong one, or none;
- false accusations: of marked images, those for which any wrong key is named, beside the right one or alone; of
  unmarked images, those for which any key is.

The very same images serve for every K. All keys stand in a circle; image i carries key i, and its ring of K is that key
and the K - 1 after it. So every image takes part at every K, no image is drawn for the sake of a small ring, and each
larger ring holds the smaller: that a key is named less often among more keys is no luck of the draw. Keys are drawn
alike, so which of them are the others is of no matter, but below the largest K images have different rings, and at the
largest all have the same. An unmarked image is held against the ring that begins at its number. Keys are drawn as
`ringmark keygen -n` draws them (none passes for another), but from --seed: such keys are for experiments only.

p-values rest on the model's own calibration where it has one for these settings. Noise is recovered once for each
image and attack, 1 s, and then scored against all keys at once; drawing costs 1.3 s.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from ringmark.data.images import from_array, to_array
from ringmark.errors import RingmarkError
from ringmark.inversion.diffusion import sample
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.attacks.chains import Chain, apply, expand, seed_of
from ringmark.watermark.calibration import whitened_features
from ringmark.watermark.detect.detector import ALPHA, Detector, with_built_in
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.evaluation.cells import CLEAN
from ringmark.watermark.figures import COLOURS
from ringmark.watermark.schemes.tree_ring import TreeRing, make_key, recommend
from ringmark.watermark.statistics import cosine_p, published_distance
from ringmark.watermark.tasks.audit import prompts_for
from ringmark.watermark.tasks.keygen import draw_keys
from scripts.experiments.common import SEED, cached, eight_bit, experiment_options, invert_all, recovered, write_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MARK, TEAL, AMBER, GREY = COLOURS
SHOWN = dict(zip(  # outcome: style
    ("cosine finds the key", "distance finds the key", "right key named", "falsely accused", "unmarked accused"),
    ((INK, "-"), (AMBER, "--"), (TEAL, "-"), (MARK, "-"), (GREY, ":")),
    strict=True,
))  # fmt: skip


def share(hits: int, of: int) -> dict:
    """Count, share and its 95 % Clopper–Pearson interval."""
    interval = stats.binomtest(int(hits), of).proportion_ci(method="exact")
    return {"count": int(hits), "of": of, "share": hits / of, "low": float(interval.low), "high": float(interval.high)}


def make_schemes(model: LatentModel, number: int, seed: int) -> list[TreeRing]:
    """Keys of the default placement that can be told apart."""
    place, rng = recommend(model.recovery, model.latent_shape), np.random.default_rng(seed)
    make = partial(make_key, model.latent_shape, place, model=model.identity, rng=rng)
    return [TreeRing(key) for key in draw_keys(model, [], number, make)[0]]


@torch.inference_mode()
def drawn_from(
    model: LatentModel,
    noise: Tensor,
    prompts: list[str],
    *,
    steps: int,
    guidance: float,
    name: str,
    cache: Path,
    batch: int = 8,
) -> Tensor:
    """8-bit images (N, 3, H, W) drawn from this noise; a batch that was drawn before is read from the folder `cache`."""
    schedule, images = model.schedule(steps), []

    def draw(z: Tensor, texts: list[str]) -> dict[str, Tensor]:
        latents = sample(model, z.to(model.device), model.embed(texts), schedule, guidance=guidance)
        return {"images": eight_bit(model.decode(latents).float().cpu())}

    for i, z in enumerate(tqdm(noise.split(batch), f"{name}: draw", leave=False, disable=None)):
        texts = prompts[i * batch : i * batch + len(z)]
        images.append(cached(cache, [model.identity, steps, guidance, texts, z], partial(draw, z, texts))["images"])
    return torch.cat(images)


def noise_of(model: LatentModel, images: Tensor, *, steps: int, name: str, cache: Path) -> Tensor:
    """The noise (N, C, h, w) that a detector recovers by default."""
    latents = invert_all(model, Detector(model, []).inverter, images, name=name, cache=cache).latents
    make = partial(recovered, model, latents, steps, name)
    return cached(cache, [model.identity, steps, latents], make)["noise"]


def attacked(model: LatentModel, images: Tensor, chain: Chain | None, seed: int) -> Tensor:
    """The images (N, 3, H, W) after an attack, each with a generator of its own."""
    if chain is None:
        return images
    pictures = [from_array(x.numpy()) for x in images]
    changed = [apply(chain, x, seed_of(seed, str(i)), model) for i, x in enumerate(pictures)]
    return torch.stack([torch.from_numpy(to_array(x)) for x in changed])


def scores(looking: Detector, schemes: list[TreeRing], noise: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whitened cosine, uncorrected p-value and published distance, each (N, K), of noise (N, C, h, w) and K keys.

    Features are linear and alike for all keys of one pattern and placement, so the cosines are one matrix product
    F Kᵀ of whitened rows of length 1; c and p are those of `Detector.statistic`, key by key.
    """
    nothing, first = torch.zeros(1, *looking.model.latent_shape), schemes[0]
    features = whitened_features(first, noise, *looking.null)[0]
    keys = np.stack([whitened_features(s, nothing, *looking.null)[1] for s in schemes])
    cosine, bins = np.clip(_unit(features) @ _unit(keys).T, -1, 1), first.masked(noise)[0].numpy()
    distance = [published_distance(bins, s.masked(nothing)[1].numpy()) for s in schemes]
    return cosine, cosine_p(cosine, features.shape[1]), np.stack(distance, 1)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of nothing, of an inversion that failed, point nowhere."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def members(images: int, keys: int, total: int) -> np.ndarray:
    """(images, keys): of each image the numbers of its ring's keys, its own first, in a circle of `total` keys."""
    return (np.arange(images)[:, None] + np.arange(keys)) % total


def outcomes(cosine: np.ndarray, distance: np.ndarray, named: np.ndarray) -> dict[str, int]:
    """How many marked images come out how: all (N, K), an image's own key first; `named` where K p ≤ alpha."""
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
    """A row an outcome, from cosines, p-values and distances (N, all keys) of marked and of unmarked images."""
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
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["attack"] for r in rows))
    figure = Figure(figsize=(1 + 3.2 * len(names), 4.4), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        panel(ax, name, [r for r in rows if r["attack"] == name])
    axes[0].set_ylabel("share of images, 95 % intervals")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def panel(ax: Axes, name: str, rows: list[dict]) -> None:
    """One attack; lines stand a little apart, for most of them lie on one another."""
    for i, (outcome, (colour, style)) in enumerate(SHOWN.items()):
        some = [r for r in rows if r["outcome"] == outcome]
        if not some:
            continue
        x, y = np.array([r["keys"] for r in some]) * 1.12 ** (i - 2), np.array([r["share"] for r in some])
        low, high = (np.array([r[side] for r in some]) for side in ("low", "high"))
        error = np.maximum(0, [y - low, high - y])
        ax.errorbar(x, y, error, fmt="o", ls=style, ms=3, lw=1.4, capsize=2, color=colour, label=outcome)
    sizes = sorted({r["keys"] for r in rows})
    ax.plot(sizes, [1 / k for k in sizes], color="black", lw=0.8, ls=":", label="chance")
    ax.set(xscale="log", xlabel="keys in the ring", ylim=(-0.03, 1.03), title=name)
    ax.set_xticks(sizes, map(str, sizes))
    ax.minorticks_off()


def summary(rows: list[dict]) -> str:
    """Counts in words."""
    return "\n".join(
        f"{r['attack']:10} {r['keys']:5} keys  {r['outcome']:22} {r['count']:3} of {r['of']} "
        f"[{r['low']:.3f}, {r['high']:.3f}]"
        for r in rows
    )


@click.command()
@experiment_options(64)
@click.option("--unmarked", default=64, show_default=True, help="Images without a key beside them.")
@click.option(
    "--keys", "sizes", type=click.IntRange(2), multiple=True, default=(2, 16, 128, 1024), show_default=True,
    help="Keys in the ring; again for more.",
)  # fmt: skip
@click.option(
    "--attack", "specs", multiple=True, default=("jpeg:25", "blur:4", "noise:0.1"), show_default=True,
    help="As in ringmark attack; again for more. Clean images come first anyway.",
)  # fmt: skip
@click.option("--alpha", type=click.FloatRange(0, 1), default=ALPHA, show_default=True, help="Of the corrected p.")
@click.option("--steps", default=25, show_default=True, help="Of DDIM, both ways.")
@click.option("--guidance", default=3.0, show_default=True, help="When drawing.")
@click.option("--seed", default=40_000, show_default=True, help="Of keys, prompts, noise and attacks.")
def main(
    source: str, images: Path | None, number: int, output: Path, unmarked: int, sizes: tuple[int, ...],
    specs: tuple[str, ...], alpha: float, steps: int, guidance: float, seed: int,
) -> None:  # fmt: skip
    """N marked images, each with a key of its own, among K keys."""
    if images:
        raise click.UsageError("--images: only drawn images carry keys")
    try:
        chains = {CLEAN: None} | {str(chain): chain for chain in expand(specs)}
    except RingmarkError as error:
        raise click.UsageError(str(error)) from None
    model, cache, rows = LatentModel.from_pretrained(source), output / "cache", []
    looking, _ = with_built_in(Detector(model, [], steps=steps), Path(resolve(source)))
    schemes = make_schemes(model, max(sizes), seed)
    first, total = SEED + seed, number + unmarked
    noise = initial_noise(list(range(first, first + total)), model.latent_shape)
    marked = [schemes[i % len(schemes)].embed(noise[i : i + 1]) for i in range(number)]
    prompts = prompts_for([], total, first)
    seen = drawn_from(
        model, torch.cat([*marked, noise[number:]]), prompts, steps=steps, guidance=guidance, name=CLEAN, cache=cache
    )
    for name, chain in tqdm(chains.items(), "attacks", disable=None):
        back = noise_of(model, attacked(model, seen, chain, seed), steps=steps, name=name, cache=cache)
        found = scores(looking, schemes, back.nan_to_num())
        for size in sorted(set(sizes)):
            rows += count(name, tuple(x[:number] for x in found), tuple(x[number:] for x in found), size, alpha)
    click.echo(summary(rows))
    place = schemes[0].placement
    write_results(
        output, "study_identification", rows, figure_of(rows), model=model.identity,
        settings={
            "channels": list(place.channels), "radii": list(place.radii), "marked": number, "unmarked": unmarked,
            "alpha": alpha, "steps": steps, "guidance": guidance, "seed": seed, "first_seed": first,
            "keys_in_all": len(schemes), "keys_carried": min(number, len(schemes)),
            "calibration": looking.settings()["calibration"],
        },
        threads=torch.get_num_threads(), torch=torch.__version__, device=str(model.device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
