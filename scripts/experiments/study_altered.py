"""How far should the decoder be inverted when the picture may have been altered since?

    python scripts/study_altered.py -o build/altered                        # 16 images; about 15 minutes of one core
    python scripts/study_altered.py -o build/altered-small -n 2 --steps 4 --attack blur:4

Images marked with one key, of a fixed seed, are altered, their decoder is inverted in several ways, and the key's
whitened cosine with the noise that comes back is averaged over the images. Intervals are 95 %, Student's t. "slower" is
what `guarded` goes by: how much more of ‖T‖ is left after two Anderson steps than for the picture D(E(x)), the median
over images; "kept" is the share of images of which it keeps the encoder's latents. Two steps and the limit of two were
chosen on such images, with another placement; those of the evaluation are others. All noise is whitened by the
calibration of the guarded inversion.
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

from ringmark.errors import RingmarkError
from ringmark.inversion.decoder import INVERTERS, SLOWER, WITHIN, Inverter, invert_decoder, remaining_share
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.attacks.chains import expand
from ringmark.watermark.detect.detector import Detector, with_built_in
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.evaluation.cells import CLEAN
from ringmark.watermark.figures import COLOURS
from ringmark.watermark.tasks.audit import prompts_for
from scripts.experiments.common import SEED, cached, experiment_options, invert_all, recovered, write_results
from scripts.experiments.study_identification import attacked, drawn_from
from scripts.experiments.study_search import study_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {
    "encoder": INVERTERS["encoder"],
    "Anderson, 2 steps": Inverter(max_steps=2, early=False),
    "Anderson, 8 steps": INVERTERS["anderson"],
    "guarded": INVERTERS["guarded"],
}
ATTACKS = (
    "blur:1", "median:3", "resize:2", "jpeg:90", "noise:0.02", "sharpen:1", "webp:80", "jpeg:75", "jpeg:50", "blur:4",
    "jpeg:25", "noise:0.1", "contrast:1.5", "brightness:6",
)  # fmt: skip


def falls(model: LatentModel, images: Tensor, cache: Path, batch: int = 8) -> np.ndarray:
    """(N,): what is left of ‖T‖ after two Anderson steps, over what is left for the picture D(E(x))."""
    take = partial(invert_decoder, model.encode, model.decode, max_steps=WITHIN, tol=None)

    @torch.inference_mode()
    def measure() -> dict[str, Tensor]:
        parts = [some.to(model.device) for some in images.split(batch)]
        drawn = [model.decode(model.encode(some)).clamp(-1, 1) for some in parts]
        return {
            "slower": torch.cat(
                [remaining_share(take(x)) / remaining_share(take(y)) for x, y in zip(parts, drawn, strict=True)]
            )
        }

    return cached(cache, ["slower", model.identity, images], measure)["slower"].numpy()


def mean_of(cosines: np.ndarray) -> dict[str, float]:
    """Mean and its 95 % interval by Student's t."""
    half = stats.t.ppf(0.975, len(cosines) - 1) * np.std(cosines, ddof=1) / len(cosines) ** 0.5
    return {"cosine": float(cosines.mean()), "low": float(cosines.mean() - half), "high": float(cosines.mean() + half)}


def summary(rows: list[dict]) -> str:
    """In words."""
    return "\n".join(
        f"{r['attack']:14} {r['way']:18} cosine {r['cosine']:.3f} [{r['low']:.3f}, {r['high']:.3f}], "
        f"residual {r['slower']:.2f} times that of D(E(x)), encoder kept of {r['kept']:.0%}"
        for r in rows
    )


def figure_of(rows: list[dict]) -> Figure:
    """Cosines by attack, those where the residual falls fastest first."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["attack"] for r in sorted(rows, key=lambda r: r["slower"])))
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    for i, (way, colour) in enumerate(zip(WAYS, (COLOURS[4], COLOURS[3], COLOURS[1], COLOURS[0]), strict=True)):
        some = [next(r for r in rows if r["attack"] == name and r["way"] == way) for name in names]
        mean, low, high = (np.array([r[field] for r in some]) for field in ("cosine", "low", "high"))
        at = np.arange(len(names)) + 0.16 * (i - 1.5)
        ax.errorbar(at, mean, [mean - low, high - mean], fmt="osD^"[i], ms=4, color=colour, capsize=2, label=way)
    slower = {r["attack"]: r["slower"] for r in rows}
    ax.set_xticks(range(len(names)), [f"{name}\n{slower[name]:.2f}" for name in names], fontsize=7)
    ax.set(
        xlabel="attack, and how much more of ‖T‖ is left after two steps than for D(E(x))",
        ylabel="whitened cosine, 95 % interval",
    )
    figure.legend(loc="outside upper center", ncols=len(WAYS), frameon=False)
    return figure


@click.command()
@experiment_options(16)
@click.option(
    "--attack",
    "specs",
    multiple=True,
    default=ATTACKS,
    show_default=True,
    help="As in ringmark attack; again for more.",
)
@click.option("--steps", default=25, show_default=True, help="Of DDIM, both ways.")
@click.option("--guidance", default=3.0, show_default=True, help="When drawing.")
@click.option("--seed", default=60_000, show_default=True, help="Of prompts, noise and attacks.")
def main(
    source: str, images: Path | None, number: int, output: Path, specs: tuple[str, ...], steps: int, guidance: float,
    seed: int,
) -> None:  # fmt: skip
    """Decoder inversion of altered pictures."""
    if images:
        raise click.UsageError("--images: only drawn images carry keys")
    try:
        chains = {CLEAN: None} | {str(chain): chain for chain in expand(specs)}
    except RingmarkError as error:
        raise click.UsageError(str(error)) from None
    model, cache, rows = LatentModel.from_pretrained(source), output / "cache", []
    looking, _ = with_built_in(Detector(model, [study_key(model)], steps=steps), Path(resolve(source)))
    (scheme,) = looking.schemes.values()
    noise = scheme.embed(initial_noise(list(range(SEED + seed, SEED + seed + number)), model.latent_shape))
    seen = drawn_from(
        model, noise, prompts_for([], number, SEED + seed), steps=steps, guidance=guidance, name=CLEAN, cache=cache
    )
    for name, chain in tqdm(chains.items(), "attacks", disable=None):
        altered = attacked(model, seen, chain, seed)
        slower = falls(model, altered, cache)
        about = {
            "attack": name,
            "n": number,
            "slower": float(np.median(slower)),
            "kept": float(np.mean(slower > SLOWER)),
        }
        for way, inverter in WAYS.items():
            latents = invert_all(model, inverter, altered, name=f"{name}, {way}", cache=cache).latents
            back = cached(
                cache, [model.identity, steps, latents], partial(recovered, model, latents, steps, f"{name}, {way}")
            )
            rows.append(about | {"way": way} | mean_of(looking.statistic(scheme, back["noise"])[0]))
        click.echo(summary(rows[-len(WAYS) :]))
    write_results(
        output, "study_altered", rows, figure_of(rows), model=model.identity, n=number, first_seed=SEED + seed,
        steps=steps, guidance=guidance, slower=SLOWER, within=WITHIN, calibration=looking.settings()["calibration"],
        threads=torch.get_num_threads(), torch=torch.__version__, device=str(model.device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
