"""The report of an audit as one HTML page, which needs neither a network nor other files.

Every value in it is text: it is escaped, and characters that cannot be printed are replaced by their codes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringmark.data.settings import flatten
from ringmark.errors import counted, one_line
from ringmark.watermark.detect.verdict import TINIEST, p_text
from ringmark.watermark.evaluation.rates import rate
from ringmark.watermark.evaluation.tally import BARS, DECADES, LISTED, OTHERS, OUTCOMES, PValues, Tally

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["Thumbnail", "render"]

TEMPLATES = Path(__file__).parent / "templates"
ROWS = 200  # of a table of counts
WEEKS = 260  # the latest, in the table and the plot
POINTS = 241  # of a curve
CUT = 3.0  # bars are cut at this multiple of the expected height
VERDICTS = {"present": "key", "absent": "no key", "inconclusive": "inconclusive", "unreadable": "unreadable"}


@dataclass(frozen=True)
class Thumbnail:
    """A file in the audited folder: its `link` relative to the page, and a JPEG `thumbnail`, or why there is none."""

    link: str
    thumbnail: bytes
    reason: str = ""

    @property
    def source(self) -> str:
        """The thumbnail as a data URI."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.thumbnail).decode()}"


@dataclass(frozen=True)
class Axis:
    """Maps values from [low, high] to coordinates from `start` to `end`, by their logarithms if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The coordinate of a value; values outside are drawn at the ends."""
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, max(value, self.low)))
        return round(self.start + (self.end - self.start) * min((value - low) / (high - low), 1.0), 1)

    def ticks(self) -> list[float]:
        """A few round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(last, first - 1, -max(1, (last - first) // 6))]
        step = 10 ** math.floor(math.log10(self.high - self.low))
        step = next(
            step * factor for factor in (0.2, 0.25, 0.5, 1.0, 2.0) if (self.high - self.low) / step / factor <= 5
        )
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step * (1 + 1e-9)) + 1)]


@dataclass(frozen=True)
class Bars:
    """The histogram of the p-values above α, as the share of images in each of BARS equal bins of [0, 1]."""

    shares: Sequence[float]

    @property
    def expected(self) -> float:
        """The height of a bar if p is uniform; that of the first is a little less, because it starts at α."""
        return 1 / BARS

    @property
    def top(self) -> float:
        """The largest height drawn."""
        return min(max(*self.shares, 1.5 * self.expected), CUT * self.expected)

    @classmethod
    def of(cls, values: PValues) -> Bars:
        """The histogram of these p-values."""
        return cls((values.bars / max(values.above, 1)).tolist())


@dataclass(frozen=True)
class Curve:
    """The share of images with p of at most each value, from the smallest drawn up to 1, for logarithmic axes."""

    points: Sequence[tuple[float, float]]

    @classmethod
    def of(cls, values: PValues) -> Curve:
        """The curve of m p-values, down to about 1e-4 / m, which unmarked images hardly reach."""
        ends, numbers = values.cumulative()
        total = int(numbers[0])
        decades = min(4 + math.ceil(math.log10(max(total, 1))), DECADES)
        chosen = np.linspace(0, decades / DECADES * len(ends), POINTS).astype(int)[:-1]
        return cls([(float(ends[i]), int(numbers[i]) / max(total, 1)) for i in chosen[::-1] if numbers[i]])

    @property
    def low(self) -> float:
        """The smallest p drawn."""
        return min(self.points[0][0], 0.1)

    @property
    def least(self) -> float:
        """The smallest share drawn."""
        return min(self.low, self.points[0][1])


def render(
    tally: Tally,
    settings: Mapping[str, Any],
    *,
    title: str,
    written: str,
    fdr: float,
    pictures: Mapping[str, Thumbnail],
    shown: int,
) -> str:
    """The page. `pictures` are by the names of records; the first `shown` records of each list are drawn."""
    env = _environment()
    style, script = (_source(env, name) for name in ("report.css", "report.js"))
    lists = {"significant": tally.significant, "inconclusive": tally.inconclusive, "near": tally.near}
    rows = {name: best.rows() for name, best in lists.items()}
    page = env.get_template("report.html").render(
        title=title,
        written=written,
        style=style,
        script=script,
        policy=_policy(style, script),
        tally=tally,
        discoveries=tally.discoveries(fdr),
        doubt=calibration_finding(tally),
        corrections=corrections(settings),
        lists={name: found[:shown] for name, found in rows.items()},
        listed=list({row.name: row for found in rows.values() for row in found}.values()),
        pictures=pictures,
        shown=shown,
        most=LISTED,
        thumbnails=any(picture.thumbnail for picture in pictures.values()),
        folders=tally.folders.rows(ROWS),
        models=tally.models.rows(ROWS),
        weeks=_weeks(tally),
        keys=_keys(tally, settings),
        settings={name: setting_text(value) for name, value in flatten(settings).items()},
    )
    return page.lstrip()


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"number": number_text, "percent": percent_text, "p": log10_p_text, "tick": tick_text}
    env.filters["expected"] = expected_text
    env.globals |= {"Axis": Axis, "Bars": Bars, "Curve": Curve, "rate": rate, "counted": counted, "isnan": math.isnan}
    env.globals |= {"OUTCOMES": OUTCOMES, "VERDICTS": VERDICTS, "WEEKS": WEEKS}
    return env


def _plain(value: Any) -> Any:
    """A value as text in one line, whatever its characters; Markup is left as it is."""
    return value if hasattr(value, "__html__") else one_line(value)


def _source(env: Environment, name: str) -> Any:
    """One of our own files, as Markup."""
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _policy(*sources: str) -> str:
    """The content security policy: nothing but this style, this script and pictures in the page itself."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in sources)
    allowed = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'"
    return f"{allowed}; base-uri 'none'; form-action 'none'"


# -- what the page says -----------------------------------------------------------------------------------------------


def calibration_finding(tally: Tally) -> str:
    """Whether images above α have "more" or "fewer" small p-values than uniform ones, or "as many"; "" if unknown.

    It is "more" if any of the shares is significantly too large, at the 95 % level.
    """
    shares = tally.showing.shares()
    if any(each.interval[0] > each.expected for each in shares):
        return "more"
    if any(each.interval[1] < each.expected for each in shares):
        return "fewer"
    return "as many" if shares else ""


def corrections(settings: Mapping[str, Any]) -> list[str]:
    """What p is corrected for, from the settings of an audit: '2 keys', '3 stages', …"""
    several = {name: settings.get(f"{name}s") for name in ("key", "stage", "size")}
    found = [counted(len(value), name) for name, value in several.items() if isinstance(value, (list, dict))]
    return [text for text in found if not text.startswith(("0 ", "1 "))] + ["the search"] * ("search" in settings)


def _keys(tally: Tally, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How many images carry each key, also those that none carries."""
    asked = settings.get("keys")
    names = [name for name in asked if isinstance(name, str)] if isinstance(asked, list) else []
    numbers = dict.fromkeys(names, 0) | tally.keys
    ordered = sorted(numbers.items(), key=lambda item: -item[1])
    return [{"name": name, "present": number} for name, number in ordered]


def _weeks(tally: Tally) -> list[dict[str, Any]]:
    """The counts of the latest WEEKS weeks, the earliest first."""
    rows = [row for row in tally.weeks.rows() if row["name"] not in ("", OTHERS)]
    return sorted(rows, key=lambda row: str(row["name"]))[-WEEKS:]


# -- numbers as text --------------------------------------------------------------------------------------------------


def number_text(value: int) -> str:
    """'10,000,000'."""
    return f"{value:,}"


def expected_text(value: float) -> str:
    """A mean number: '0.025', '12,000'."""
    return f"{value:.2g}" if value < 10 else number_text(round(value))


def percent_text(share: float) -> str:
    """Three significant digits, '0.123 %'; '<' or '>' where rounding would give 0 or 100 %."""
    if 0 < share < 5e-6:
        return "< 0.001 %"
    if 0.99995 < share < 1:
        return "> 99.99 %"
    return f"{100 * share:.3g} %"


def log10_p_text(log10_p: float) -> str:
    """'p = 2e-09' from log₁₀ p, also where p is too small for a float; '' if it is unknown."""
    if math.isnan(log10_p):
        return ""
    if log10_p > math.log10(TINIEST):
        return p_text(10**log10_p)
    return f"p = 1e{log10_p:.0f}" if math.isfinite(log10_p) else p_text(0.0)


def setting_text(value: Any) -> str:
    """A setting: text as it is, lists with commas, other values as JSON."""
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tick_text(value: float) -> str:
    """A number at an axis: '0.05', '1e-06'."""
    return f"{value:.12g}" if value == 0 or value >= 1e-3 else f"{value:.0e}"
