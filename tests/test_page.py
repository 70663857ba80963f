"""The page of a report shows any name as text, loads nothing, and says what the numbers say."""

from __future__ import annotations

import base64
import hashlib
import math
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from ringmark.data.schema import row_of
from ringmark.watermark.evaluation.page import (
    Axis,
    Bars,
    Curve,
    Thumbnail,
    calibration_finding,
    corrections,
    log10_p_text,
    percent_text,
    render,
)
from ringmark.watermark.evaluation.tally import COLUMNS, PValues, Tally

HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "a\u202egnp.exe",
    "</script><script>alert(2)</script>",
    "\"'><svg onload=alert(3)>",
    "{{ 7 * 7 }}/{% raw %}",
    "\udcff\udcfe.png",
    "line\nbreak\x00\x1b[31m.png",
    "javascript:alert(4)",
    "שלום/مرحبا.png",
]


class Parsed(HTMLParser):
    """The tags, attributes and text of a page, and the contents of style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, str] = {}
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        last = self.tags[-1][0] if self.tags else ""
        if self.cdata_elem:
            self.raw[last] = self.raw.get(last, "") + data
        else:
            self.text += data

    def values(self, *names: str) -> list[str]:
        return [value or "" for _, attrs in self.tags for name, value in attrs.items() if name in names]


def hostile_page(names: list[str] = HOSTILE) -> str:
    tally = Tally(0.01)
    for i, name in enumerate(names):
        record = {"sample_id": name, "present": (True, None, False)[i % 3], "p_value": 0.001 * (i + 1), "key": name}
        record |= {"model": name, "stage": name, "carries": [name], "notes": [name], "score": math.nan}
        failed = {"sample_id": name, "error": f"{name}: is damaged", "code": name}
        tally.add(pd.DataFrame(list(map(row_of, (record, failed)))))
    pictures = {name: Thumbnail("a%20b.png", b"\xff\xd8", "") for name in names}
    settings = {"folder": names[0], "keys": names, "nested": {names[0]: names}}
    return render(tally, settings, title=f"Audit of {names[0]}", written=names[1], fdr=0.05, pictures=pictures, shown=3)


@pytest.fixture(scope="module")
def page() -> Parsed:
    return Parsed(hostile_page())


def test_hostile_names_are_text(page: Parsed) -> None:
    harmless = Parsed(hostile_page([f"n{i}/x" for i in range(len(HOSTILE))]))
    assert sorted({tag for tag, _ in page.tags}) == sorted({tag for tag, _ in harmless.tags})
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    shown = (
        "<img src=x onerror=alert(1)>.png",
        "a\\u202egnp.exe",
        "\\udcff\\udcfe.png",
        "line\\nbreak\\x00\\x1b[31m.png",
    )
    for name in (*shown, HOSTILE[2], HOSTILE[3], HOSTILE[4], HOSTILE[8]):
        assert name in page.text
    assert "\u202e" not in page.text


def test_the_page_loads_nothing_and_allows_nothing(page: Parsed) -> None:
    assert {link.split(":")[0] for link in page.values("src")} == {"data"}
    assert set(page.values("href")) == {"a%20b.png", "#calibration"}
    assert not page.values("style") and "url(http" not in page.raw["style"]
    [policy] = [value for value in page.values("content") if "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_ids_are_unique_and_labels_lead_somewhere(page: Parsed) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert set(page.values("aria-labelledby")) <= set(ids)


def test_an_empty_audit_has_a_page() -> None:
    text = render(Tally(0.01), {}, title="Audit", written="", fdr=0.05, pictures={}, shown=3)
    assert text.startswith("<!doctype html>\n<!-- ringmark report -->")
    assert "nothing to compare" in Parsed(text).text


@pytest.mark.parametrize("p", [1.0, 0.3, 1e-300])
def test_one_image_has_a_page(p: float) -> None:
    tally = Tally(0.01)
    tally.add(pd.DataFrame([dict.fromkeys(COLUMNS) | {"sample_id": "a", "present": p <= 0.01, "p_value": p}]))
    text = Parsed(render(tally, {}, title="Audit", written="", fdr=0.05, pictures={}, shown=3)).text
    assert "1 file in all" in text and ("No image has a key" in text) == (p > 0.1)


@pytest.mark.parametrize(
    ("p", "finding"),
    [
        (np.linspace(0.0005, 0.9995, 2000), "as many"),
        (np.linspace(0.0005, 0.9995, 2000) ** 1.5, "more"),
        (np.linspace(0.0005, 0.9995, 2000) ** 0.5, "fewer"),
        (np.full(5, 1e-6), ""),
    ],
)
def test_the_calibration_is_judged_by_the_images_above_alpha(p: np.ndarray, finding: str) -> None:
    tally = Tally(1e-3)
    rows = [{"sample_id": str(i), "present": x <= 1e-3, "p_value": x} for i, x in enumerate(p)]
    tally.add(pd.DataFrame([dict.fromkeys(COLUMNS) | row for row in rows]))
    assert calibration_finding(tally) == finding
    text = render(tally, {}, title="Audit", written="", fdr=0.05, pictures={}, shown=3)
    assert ("says nothing about p near α" in text) == (finding == "fewer") and "false alarms than" not in text


def test_copies_of_an_image_are_no_evidence_against_the_calibration() -> None:
    tally = Tally(1e-3)
    rows = [{"sample_id": str(i), "p_value": (i + 0.5) / 4600} for i in range(4600)]
    rows += [{"sample_id": f"copy {i}", "p_value": 0.008, "same_as": "36"} for i in range(400)]
    tally.add(pd.DataFrame([dict.fromkeys(COLUMNS) | {"present": row["p_value"] <= 1e-3} | row for row in rows]))
    assert calibration_finding(tally) == "as many" and tally.showing.above == 4600 - 5
    assert tally.images == tally.discoveries(0.05).tests == 5000


def test_corrections_are_named() -> None:
    settings = {"keys": ["a", "b"], "stages": {"latents": 0.1, "full": 0.9}, "sizes": [[1, 2]], "search": "Search()"}
    assert corrections(settings) == ["2 keys", "2 stages", "the search"]
    assert corrections({"keys": ["a"]}) == []


def test_small_numbers_keep_their_meaning() -> None:
    assert [percent_text(x) for x in (0, 1e-7, 0.000123, 0.05, 0.99999, 1)] == [
        *("0 %", "< 0.001 %", "0.0123 %", "5 %", "> 99.99 %", "100 %")
    ]
    assert log10_p_text(-3) == "p = 0.001" and log10_p_text(-412.3) == "p = 1e-412"
    assert log10_p_text(-math.inf) == "p < 1e-300" and log10_p_text(math.nan) == ""


def test_axes_map_their_ends_and_have_round_ticks() -> None:
    for axis in (Axis(0, 0.15, 200, 20), Axis(1e-9, 1, 60, 600, log=True), Axis(0, 7, 0, 70)):
        assert (axis.at(axis.low), axis.at(axis.high)) == (axis.start, axis.end)
        ticks = axis.ticks()
        assert 3 <= len(ticks) <= 11
        assert all(
            axis.low <= tick <= axis.high * 1.001 and float(f"{tick:.2g}") == pytest.approx(tick) for tick in ticks
        )
    assert Axis(1e-4, 1, 0, 40, log=True).at(1e-2) == 20 and Axis(1e-4, 1, 0, 40, log=True).at(0) == 0


def test_plots_show_the_distribution() -> None:
    p = np.random.default_rng(3).random(4000)
    values = PValues(1e-3)
    values.add(np.log10(p))
    assert sum(Bars.of(values).shares) == pytest.approx(1)
    points = Curve.of(values).points
    assert points[-1] == (1, 1) and list(points) == sorted(points)
    assert all(share == pytest.approx((p <= x).mean(), abs=1e-3) for x, share in points)
