"""How strong is each statistic? The share of marked images found at 1 % and 0.1 % false positives, clean and attacked.

    ringmark evaluate --key rand.key -n 200 --seed 300000 --attacks tree-ring --methods guarded -o build/evaluation
    python scripts/study_power.py build/evaluation --key rand.key -o build/power      # from what that has recovered
    python scripts/study_power.py build/evaluation --key rand.key --others 4 -o build/power-small

The marked images, the unmarked ones and their attacked copies are those of the evaluation, and so are their recovered
noises. Two hundred unmarked images hold no threshold for 0.1 %. But a key that nobody planted is as good as any other:
each unmarked image is scored against the key and against `--others` keys made alike, from a fixed seed, and the
threshold is that of all these scores together. So the false-positive rate is that of a key drawn at random, and the
threshold one that does not know the key, as in practice. The marked images are held against the other keys, too: a
statistic that finds a key where another one of its kind was planted accuses the wrong. Intervals are Clopper and Pearson's over the marked images;
they leave out that the threshold rests on so many unmarked images only. The conformal p comes in steps of 1/(n + 1), so
that a threshold of its own would cut through ties: it is taken at its word, found is p ≤ FPR.

The evaluation must have been run with the default --batch, --max-steps and calibration, or all is recovered anew.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from ringmark.data.sources import find_images
from ringmark.errors import ImageError, ModelError, RingmarkError
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.attacks.chains import Chain, expand
from ringmark.watermark.detect.detector import Detector, detector, with_built_in
from ringmark.watermark.evaluation.cells import CLEAN, FPRS
from ringmark.watermark.evaluation.rates import OperatingPoint, tied_below, tpr_at
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.tree_ring import Placement, make_key
from ringmark.watermark.tasks.evaluate import CONFORMAL, UNMARKED, own_statistic, scores_of
from ringmark.watermark.tasks.recover import RecoveredFiles, recover_files
from scripts.experiments.common import SEED, write_results


def alike(model: LatentModel, key: Key, number: int, seed: int) -> list[Key]:
    """Keys of the same pattern, mask and placement."""
    about = key.metadata
    if about["pattern"] == "zeros":
        raise RingmarkError("pattern zeros: there is only one such key; give a key of another pattern")
    place, rng = Placement(tuple(about["channels"]), tuple(about["radii"])), np.random.default_rng(seed)
    make = partial(make_key, model.latent_shape, place, model=model.identity, rng=rng)
    return [make(pattern=about["pattern"], mask=about["mask"]) for _ in range(number)]


def recovered(looking: Detector, evaluation: Path, name: str, chain: Chain | None) -> RecoveredFiles:
    """Of the evaluation's images of one kind, after an attack. Raises RingmarkError where some cannot be read."""
    folder = evaluation / "attacked" / chain.slug / name if chain else evaluation / "images" / name
    found = recover_files(looking, find_images(folder), evaluation / "cache", name=f"{chain or CLEAN}, {name}")
    if found.refused:
        raise RingmarkError(f"{folder}: {len(found.refused)} images cannot be used")
    return found


def evidence(looking: Detector, keys: list[str], own: RecoveredFiles, none: RecoveredFiles) -> list[dict]:
    """Scores by name: of marked images for their key, keys[0], of them for the others, of unmarked ones for all, joined.

    An image that shows nothing is tied below all others, as in an evaluation.
    """
    pairs = [*((own, key) for key in keys), *((none, key) for key in keys)]
    scores = [scores_of(looking, key, files.noise.nan_to_num())[0] for files, key in pairs]
    blank = np.concatenate([np.isin(np.arange(len(files.ids)), list(files.doubts)) for files, _ in pairs])
    ends = [len(own.ids), len(keys) * len(own.ids)]
    tied = {name: tied_below(np.concatenate([some[name] for some in scores]), blank) for name in scores[0]}
    return [{name: np.split(values, ends)[i] for name, values in tied.items()} for i in range(3)]


def rows_of(
    about: dict, marked: dict[str, np.ndarray], strangers: dict[str, np.ndarray], unmarked: dict[str, np.ndarray]
) -> list[dict]:
    """A row a statistic, from scores by name that are larger where marked; `strangers` are marked images for other keys.

    "accused" is the share of these that reach the threshold.
    """
    rows = []
    for name in marked:
        row = about | {"statistic": name, "marked": len(marked[name]), "unmarked scores": len(unmarked[name])}
        for fpr in FPRS:
            point = (
                OperatingPoint.of(marked[name], unmarked[name], fpr, -fpr)
                if name == CONFORMAL
                else tpr_at(marked[name], unmarked[name], fpr)
            )
            row |= {
                f"{fpr:g}": point.tpr,
                f"{fpr:g} low": point.tpr_interval[0],
                f"{fpr:g} high": point.tpr_interval[1],
                f"{fpr:g} accused": float(np.mean(strangers[name] >= point.threshold)),
            }
        rows.append(row)
    return rows


def means(rows: list[dict]) -> list[dict]:
    """A row a statistic: its mean TPR over the attacks."""
    attacked = [row for row in rows if row["attack"] != CLEAN]
    names = list(dict.fromkeys(row["statistic"] for row in attacked))
    return [
        {"attack": "mean of attacks", "statistic": name}
        | {f"{fpr:g}": float(np.mean([r[f"{fpr:g}"] for r in attacked if r["statistic"] == name])) for fpr in FPRS}
        for name in names
    ]


def beaten(rows: list[dict], default: str) -> list[str]:
    """Where the default statistic's rate lies below the best one's interval."""
    told = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        some = {row["statistic"]: row for row in rows if row["attack"] == attack}
        for fpr in FPRS:
            best = max(some.values(), key=lambda r: r[f"{fpr:g}"])
            if some[default][f"{fpr:g}"] < best[f"{fpr:g} low"]:
                told.append(f"{attack} at {fpr:g}: {best['statistic']}")
    return told


def summary(rows: list[dict]) -> str:
    """In words."""
    return "\n".join(
        f"{r['attack']:16} {r['statistic']:20} "
        + ", ".join(
            f"TPR {r[f'{fpr:g}']:.3f}"
            + (f" [{r[f'{fpr:g} low']:.3f}, {r[f'{fpr:g} high']:.3f}]" if f"{fpr:g} low" in r else "")
            + (f", other keys {r[f'{fpr:g} accused']:.4f}" if f"{fpr:g} accused" in r else "")
            + f" at {100 * fpr:g} %"
            for fpr in FPRS
        )
        for r in rows
    )


@click.command()
@click.argument("evaluation", type=click.Path(path_type=Path))
@click.option("--key", "file", type=click.Path(path_type=Path), required=True, help="One that was evaluated.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@click.option("--model", "source", default="pocket", show_default=True, help='"pocket", a folder or a hub id.')
@click.option("--attacks", "specs", default="tree-ring", show_default=True, help="Of those that were evaluated.")
@click.option("--method", default="guarded", show_default=True, help="Decoder inversion that was evaluated.")
@click.option("--steps", default=25, show_default=True, help="Of DDIM.")
@click.option("--others", default=100, show_default=True, help="Keys that nobody planted.")
@click.option("--seed", default=SEED, show_default=True, help="Of these.")
def main(
    evaluation: Path, file: Path, output: Path, source: str, specs: str, method: str, steps: int, others: int, seed: int
) -> None:
    """TPR of each statistic on the images of an EVALUATION."""
    try:
        model, key = LatentModel.from_pretrained(source), Key.load(file)
        keys = [key, *alike(model, key, others, seed)]
        looking, unfit = with_built_in(detector(model, keys, method, None, steps), Path(resolve(source)))
        if unfit:
            click.echo(f"note: without a calibration: {unfit}", err=True)
        rows = []
        for chain in tqdm([None, *expand(specs.split(","))], "attacks", disable=None):
            files = (recovered(looking, evaluation, name, chain) for name in (key.fingerprint[:8], UNMARKED))
            rows += rows_of({"attack": str(chain or CLEAN)}, *evidence(looking, [k.fingerprint for k in keys], *files))
    except (RingmarkError, ImageError, ModelError) as error:
        raise click.UsageError(str(error)) from None
    default = own_statistic(key.metadata["pattern"])
    click.echo(summary(rows + means(rows)))
    click.echo("; ".join(beaten(rows, default)) or f"nowhere is the {default} below the interval of the best")
    facts = {"model": model.identity, "pattern": key.metadata["pattern"], "mask": key.metadata["mask"]}
    facts |= {"others": others, "seed": seed, "method": method, "steps": steps, "beaten": beaten(rows, default)}
    calibration = looking.settings()["calibration"]
    write_results(output, "study_power", rows, means=means(rows), calibration=calibration, **facts)


if __name__ == "__main__":
    main()
