"""Text reports of an evaluation: evaluation.md, .csv and .json, gains.csv and scores.csv."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ringmark.data.files import write_atomic
from ringmark.watermark.evaluation.cells import CLEAN, FPRS, Cell, Evaluation, Row
from ringmark.watermark.evaluation.gain import Gain
from ringmark.watermark.evaluation.rates import GROUPS
from ringmark.watermark.evaluation.tables import interval_text, markdown, write_table
from ringmark.watermark.statistics import needed_references

__all__ = ["TABLES", "gain_table", "pivot", "summary", "write_tables"]

TABLES = ("evaluation.csv", "scores.csv", "gains.csv", "evaluation.json", "evaluation.md")
"""The files that `write_tables` writes; gains.csv only if there are gains."""

NONE = "none"
DOWN = ["key", "scheme", "statistic", "method"]


def write_tables(evaluation: Evaluation, folder: Path) -> None:
    """Write TABLES into `folder`. Raises EvaluationError for an empty class or scores that are not finite."""
    record = evaluation.record()
    write_table(folder / "evaluation.csv", record["rows"])
    write_table(folder / "scores.csv", evaluation.images)
    if evaluation.gains:
        write_table(folder / "gains.csv", [_gain_row(gain) for gain in evaluation.gains])
    write_atomic(folder / "evaluation.json", json.dumps(record, indent=1))
    write_atomic(folder / "evaluation.md", _report(evaluation, record))


def _gain_row(gain: Gain) -> Row:
    ways = {f"{role}_{name}": value for role in ("of", "over") for name, value in getattr(gain, role)._asdict().items()}
    numbers = {name: getattr(gain, name) for name in ("of_auc", "over_auc", "gain", "low", "high")}
    return ways | numbers | {"attacks": " ".join(gain.attacks), "marked": gain.marked, "unmarked": gain.unmarked}


def summary(evaluation: Evaluation) -> str:
    """The short table: AUC of the detector's score and of the published statistics, by key, attack and method."""
    published = {(cell.statistic, *_place(cell)): cell for cell in evaluation.cells if cell.is_compared}
    labels = list(dict.fromkeys(label for label, *_ in published))
    rows = []
    for cell in evaluation.cells:
        if cell.is_default:
            row = {name: cell.row[name] for name in ("key", "scheme", "attack", "method")}
            row["AUC, detector's score"] = interval_text(cell.row, "auc")
            for label in labels:
                other = published.get((label, *_place(cell)))
                row[f"AUC, {label}"] = interval_text(other.row, "auc") if other else ""
            rows.append(row)
    return markdown(rows)


def _place(cell: Cell) -> tuple[str, str, str]:
    return cell.key, cell.attack, cell.method


def pivot(cells: Sequence[Cell], name: str) -> str:
    """A table of one number with its interval: rows by key, statistic and method, columns by attack, then their mean.

    A missing number leaves an empty cell. The mean is over the attacks that have the number, without CLEAN.
    """
    import pandas

    frame = pandas.DataFrame([cell.row | {"text": interval_text(cell.row, name)} for cell in cells])
    attacks, down = frame["attack"].unique(), pandas.MultiIndex.from_frame(frame[DOWN].drop_duplicates())
    wide = frame.pivot(index=DOWN, columns="attack", values="text").reindex(index=down, columns=attacks)
    if (attacks != CLEAN).any():
        numbers = frame[frame["attack"] != CLEAN].assign(value=lambda rows: rows[name].astype(float))
        means = numbers.groupby(DOWN)["value"].mean().reindex(down)
        wide["mean"] = means.map("{:.3f}".format, na_action="ignore")
    return markdown(wide.reset_index())


def gain_table(gains: Sequence[Gain]) -> str:
    """The gain of each way over the first one, with its interval."""
    first = gains[0].over
    rows = [
        {
            "of": str(gain.of),
            "over": str(gain.over),
            "mean AUC": f"{gain.of_auc:.3f} and {gain.over_auc:.3f}",
            "gain": interval_text(vars(gain) | {"gain_low": gain.low, "gain_high": gain.high}, "gain"),
        }
        for gain in gains
        if gain.over == first
    ]
    return markdown(rows)


# -- evaluation.md ----------------------------------------------------------------------------------------------------


def _report(evaluation: Evaluation, record: Mapping[str, Any]) -> str:
    cells, rows = evaluation.cells, record["rows"]
    parts = [
        "<!-- ringmark evaluation -->\n# Evaluation",
        *_preamble(evaluation, rows),
        "## AUC",
        pivot(cells, "auc"),
        _cross_check(rows),
        *_gains(evaluation.gains),
        *_rates(cells),
        "## Time and memory",
        _cost(cells),
        "## Cost of the mark in image quality",
        _quality(record["quality"]),
    ]
    return "\n\n".join(parts) + "\n"


def _preamble(evaluation: Evaluation, rows: Sequence[Row]) -> list[str]:
    settings = evaluation.settings
    calibrations = ", ".join(f"{method} {name or NONE}" for method, name in settings["calibrations"].items())
    unfit = "".join(f" {method}: {reason}." for method, reason in settings["calibration_unfit"].items())
    given = settings["marked"] and settings["unmarked"]
    steps, guidance, seed = settings["steps"], settings["guidance"], settings["seed"]
    drawn = "" if given else f"; drawn in {steps} steps, guidance {guidance:g}, seed {seed}"
    return [
        f"Model {settings['model']['name']}; {_numbers(rows)}{drawn}; read in {settings['inversion_steps']} steps; "
        f"{settings['images']}.",
        f"Calibrations: {calibrations}; {NONE} means the model's own null.{unfit}",
        f"Files that could not be used: {len(evaluation.refused)}. Intervals are 95 %. For the AUC, they are DeLong's; "
        "if a prompt recurs among the marked or the unmarked images, they are those of a bootstrap clustered by "
        f"prompt, and left out with fewer than {GROUPS} prompts of either kind. For rates, they are Clopper-Pearson's, "
        "for independent images. An image that shows nothing (one flat colour) ranks below all others. "
        f"Means are over the attacks, without {CLEAN}.",
    ]


def _numbers(rows: Sequence[Row]) -> str:
    """'200 marked and 200 unmarked images', or ranges."""
    marked, unmarked = ([row[kind] for row in rows] for kind in ("marked", "unmarked"))
    return f"{_span(marked)} marked and {_span(unmarked)} unmarked images"


def _span(numbers: Sequence[int]) -> str:
    return "-".join(map(str, sorted({min(numbers), max(numbers)})))


def _cross_check(rows: Sequence[Row]) -> str:
    """The differences between DeLong's intervals and those of the bootstrap."""
    known = [row for row in rows if row["bootstrap_low"] is not None and row["auc"] < 1]
    ends = np.array([[row[f"delong_{end}"] - row[f"bootstrap_{end}"] for end in ("low", "high")] for row in known])
    if not len(ends):
        return f"No bootstrap intervals: fewer than {GROUPS} prompts, or the classes do not overlap."
    return (
        "The ends of DeLong's intervals and of those from a stratified bootstrap clustered by prompt differ by "
        f"{np.abs(ends).max():.3f} at most and by {np.abs(ends).mean():.3f} on average."
    )


def _gains(gains: Sequence[Gain]) -> list[str]:
    if not gains:
        return []
    first = gains[0]
    return [
        "## Gain in mean AUC",
        f"Differences of the mean AUC over {', '.join(first.attacks)} on the same {first.marked} marked and "
        f"{first.unmarked} unmarked images, by key, method and column of scores.csv. Intervals are 95 % for each "
        f"pair, from a paired bootstrap over prompts; there is none with fewer than {GROUPS} prompts or if "
        "both AUCs are 1. All pairs are in gains.csv.",
        gain_table(gains),
    ]


def _rates(cells: Sequence[Cell]) -> list[str]:
    parts = []
    for fpr in FPRS:
        parts += [f"## TPR at {100 * fpr:g} % FPR", _or_too_few(cells, f"tpr_{fpr:g}", needed_references(fpr))]
    for fpr in FPRS:
        needed = 2 * needed_references(fpr) - 1
        parts += [
            f"## Threshold for {100 * fpr:g} % FPR chosen on one half of the unmarked images, FPR on the other half",
            _or_too_few(cells, f"split_{fpr:g}_fpr", needed),
            "TPR at that threshold:",
            _or_too_few(cells, f"split_{fpr:g}_tpr", needed),
        ]
    default = [cell for cell in cells if cell.is_default]
    for alpha in FPRS:
        parts += [f"## Share of unmarked images with p ≤ {alpha:g}", pivot(default, f"p_{alpha:g}_fpr")]
        parts += [f"Share of marked images with p ≤ {alpha:g}:", pivot(default, f"p_{alpha:g}_tpr")]
    return parts


def _or_too_few(cells: Sequence[Cell], name: str, needed: int) -> str:
    if all(cell.row[name] is None for cell in cells):
        return f"Too few unmarked images for this rate: at least {needed} are needed."
    return pivot(cells, name)


def _cost(cells: Sequence[Cell]) -> str:
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        of_method = [cell for cell in cells if cell.method == method]
        megabytes = of_method[0].megabytes
        rows.append(
            {
                "method": method,
                "median s per image": f"{np.median([cell.seconds for cell in of_method]):.2f}",
                "MB per batch": "" if np.isnan(megabytes) else f"{megabytes:.0f}",
            }
        )
    return markdown(rows)


def _quality(rows: Sequence[Row]) -> str:
    """Fréchet distances compared with permuted labels, and the share of images that show what their prompt asks for."""
    if not rows:
        return "Too few images."
    distances = {"distance": "Fréchet distance", "expected": "permuted: mean", "limit": "permuted: 95 %", "p": "p"}
    parts = [
        "Marked and unmarked images differ in content, so distributions of simple features are compared: colour means "
        "and deviations, and energies of six frequency bands. Permuted: the same images with permuted labels.",
        _by_key(rows, {f"frechet_{name}": title for name, title in distances.items()}, _three_digits),
    ]
    shares = [n for n in rows[0] if not n.startswith("frechet") and n.endswith(("_marked", "_unmarked"))]
    if shares:
        parts += [
            "Share of images in which a classifier finds the sky and the ground of the prompt:",
            _by_key(rows, {name: name.replace("_", ", ") for name in shares}, interval_text),
        ]
    return "\n\n".join(parts)


def _by_key(rows: Sequence[Row], titles: Mapping[str, str], text: Callable[[Row, str], str]) -> str:
    return markdown([{"key": row["key"]} | {title: text(row, name) for name, title in titles.items()} for row in rows])


def _three_digits(row: Row, name: str) -> str:
    return f"{row[name]:.3f}"
