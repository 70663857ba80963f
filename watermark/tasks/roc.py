"""ROC curves from audits of labelled images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ringmark.data.labels import match_labels
from ringmark.data.reader import read_records
from ringmark.data.settings import differences
from ringmark.errors import EvaluationError, counted
from ringmark.watermark.evaluation.rates import Curve, check_fpr, roc, tied_below
from ringmark.watermark.evaluation.tables import interval_text, markdown
from ringmark.watermark.schemes.base import published_statistics

__all__ = ["RocReport", "curves", "roc_of_files"]

Record = Mapping[str, Any]
NAMED = 20  # most names listed in a message

RANKED = "log10_p"
"""What the first curve ranks by. The scores of a search, of other sizes and of other schemes cannot be compared."""


@dataclass(frozen=True)
class RocReport:
    """ROC curves of labelled audits, and what they leave out.

    `curves` are by statistic; `records` counts the records. `unlabelled` records have no label. `unread` records have a
    label but no p, because the audit could not read the file. `unmatched` labels have no record.
    """

    curves: dict[str, Curve]
    records: int
    labelled: int
    unlabelled: list[str]
    unread: list[str]
    unmatched: list[str]

    def record(self) -> list[dict[str, Any]]:
        """Each curve as plain values: its summary and `points`, with thresholds in the statistic's own sign.

        If `larger_if_marked`, images at or above the threshold are called marked, otherwise those at or below it.
        """
        signs = _signs()
        return [_curve_record(curve, signs[name]) for name, curve in self.curves.items()]

    def table(self) -> str:
        """The curves' numbers as a Markdown table, with a note if there are too few unmarked images for the FPR."""
        signs = _signs()
        text = markdown([_row(curve.summary(), signs[name]) for name, curve in self.curves.items()])
        first = self.curves[RANKED]
        if first.point:
            return text
        return (
            f"{text}\n\nNo TPR and threshold at {first.fpr_limit:.3g} FPR: this needs at least "
            f"{counted(first.needed, 'unmarked image')}, not {first.negatives}."
        )

    def coverage(self) -> list[str]:
        """How many records are labelled, and the names of records and labels that were left out, as lines."""
        reasons = {
            "without a label": self.unlabelled,
            "labelled but unreadable": self.unread,
            "labelled but without a record": self.unmatched,
        }
        counts = f"{self.labelled} of {self.records} records labelled"
        return [counts, *(f"{len(names)} {reason}: {_named(names)}" for reason, names in reasons.items() if names)]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _curve_record(curve: Curve, sign: int) -> dict[str, Any]:
    summary, points = curve.summary(), curve.points()
    points["threshold"] = [None if value is None else sign * value for value in points["threshold"]]
    signed = {"larger_if_marked": sign > 0, "threshold": _signed(summary["threshold"], sign)}
    return summary | signed | {"points": points}


def _signed(threshold: float | None, sign: int) -> float | None:
    return sign * threshold if threshold is not None and math.isfinite(threshold) else None


def _row(summary: Mapping[str, Any], sign: int) -> dict[str, str]:
    flat = dict(summary)
    for name in ("auc", "tpr_at", "fpr_at"):
        flat[f"{name}_low"], flat[f"{name}_high"] = summary[f"{name}_interval"] or (None, None)
    threshold = _signed(summary["threshold"], sign)
    return {
        "": summary["name"],
        "AUC": interval_text(flat, "auc"),
        f"TPR at {summary['fpr_limit']:.3g} FPR": interval_text(flat, "tpr_at"),
        "threshold": "" if threshold is None else f"{'≥' if sign > 0 else '≤'} {threshold:.4g}",
        "FPR": interval_text(flat, "fpr_at"),
        "marked + unmarked": f"{summary['positives']} + {summary['negatives']}",
    }


def roc_of_files(results: Sequence[Path], label_files: Sequence[Path], fpr_limit: float = 0.01) -> RocReport:
    """ROC curves of the combined records of several audits.

    Raises EvaluationError as `curves` and `match_labels` do, evaluation.settings if the audits' settings differ,
    evaluation.twice if two audits have a record of the same file, and evaluation.fpr; StoreError and ImageError for
    files that are not results or labels.
    """
    check_fpr(fpr_limit)
    records, folders = _records_of(results)
    labels, unmatched = match_labels({r["sample_id"] for r in records}, label_files, folders=folders)
    return RocReport(
        curves=curves(records, labels, fpr_limit=fpr_limit),
        records=len(records),
        labelled=len(labels),
        unlabelled=[r["sample_id"] for r in records if r["sample_id"] not in labels],
        unread=[r["sample_id"] for r in records if r["sample_id"] in labels and "error" in r],
        unmatched=unmatched,
    )


def curves(
    records: Sequence[Record], labels: Mapping[str, bool], *, name: str = "", fpr_limit: float = 0.01
) -> dict[str, Curve]:
    """ROC curves of p and of each published statistic that all records have; larger values mean marked images.

    The statistics are those of the best key. Images whose corrected p is 1 are tied: nothing the detector reports tells
    them apart. An image that shows nothing ranks below all others. Raises EvaluationError: evaluation.number for a
    record without a number, and as `roc` does.
    """
    judged = [r for r in records if r["sample_id"] in labels and "error" not in r]
    marked = np.array([labels[r["sample_id"]] for r in judged], bool)
    blank = np.array([not r.get("shows", True) for r in judged], bool)
    signs = _signs()
    known = [name for name in signs if name == RANKED or all(name in r for r in judged)]
    by_statistic = {}
    for statistic in known:
        scores = signs[statistic] * np.array([_number(r, statistic) for r in judged], float)
        values, title = tied_below(scores, blank), f"{name} {statistic}".strip()
        by_statistic[statistic] = roc(values[marked], values[~marked], name=title, fpr_limit=fpr_limit)
    return by_statistic


def _signs() -> dict[str, int]:
    """The statistics that have a curve, and the sign that makes each larger for marked images."""
    return {RANKED: -1} | {s.name: s.sign for s in published_statistics().values() if s.compared}


def _number(record: Record, statistic: str) -> float:
    """A record's statistic; 0 for an image that shows nothing, whatever its record says."""
    value = record.get(statistic)
    if not record.get("shows", True):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        fact = f"its {statistic} is {json.dumps(value)}, not a number"
        raise EvaluationError("evaluation.number", fact, subject=f"record of {record['sample_id']}")
    return float(value)


def _records_of(results: Sequence[Path]) -> tuple[list[Record], list[Path]]:
    """All records of these files, and the audited folders; duplicate files are ignored."""
    records: list[Record] = []
    folders: list[Path] = []
    origin: dict[str, Path] = {}
    first: dict[str, Any] | None = None
    for path in {p.resolve(): p for p in results}.values():
        settings, file_records = read_records(path)
        folders.append(path.parent / str(settings.pop("folder", ".")))
        first = settings if first is None else first
        _check_settings(path, settings, results[0], first)
        for record in file_records:
            other = origin.setdefault(record["sample_id"], path)
            if other != path:
                fact = f"has a record of {record['sample_id']}, as {other} does"
                raise EvaluationError("evaluation.twice", fact, subject=path)
            records.append(record)
    return records, folders


def _check_settings(path: Path, settings: Mapping[str, Any], first: Path, expected: Mapping[str, Any]) -> None:
    if changed := differences(expected, settings):
        fact = f"was made with other settings than {first} ({'; '.join(changed)}), so the scores cannot be compared"
        raise EvaluationError("evaluation.settings", fact, subject=path)
