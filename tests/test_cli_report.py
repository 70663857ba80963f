"""`ringmark report`, and its page in a browser."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import MISSING, Browser, browser
from PIL import Image
from shell import refused, run

from ringmark.data.results import Results

SETTINGS = {"model": {"name": "pocket"}, "keys": ["k1", "k2"], "alpha": 0.001, "folder": "pictures"}
NAMES = [
    "a/one.png",
    "a/two.png",
    "b/<img src=x onerror=hacked=1>.png",
    "b/\u202egnp.png",
    "b/thrée #4?.png",
    "gone.png",
]
LOG10_P = [-40.0, -12.0, -3.1, -2.9, -0.3, -2.5]


def records(folder: Path) -> Iterator[dict[str, Any]]:
    for i, (name, log10_p) in enumerate(zip(NAMES, LOG10_P, strict=True)):
        present = None if i == 4 else log10_p <= -3
        yield {"sample_id": name, "present": present, "key": "k1", "log10_p": log10_p, "p_value": 10**log10_p} | {
            **{"carries": ["k1"] if present else [], "model": "pocket", "score": -log10_p, "stage": "full"},
            **{
                "size": (folder / name).stat().st_size if (folder / name).exists() else 7,
                "mtime_ns": 1_790_000_000 * 10**9,
            },
        }
    yield {
        "sample_id": "../secret.png",
        "present": True,
        "log10_p": -30,
        "size": (folder / "../secret.png").stat().st_size,
    }
    yield {"sample_id": "b/cut.png", "error": "b/cut.png: is damaged", "code": "image.damaged"}


def write(path: Path, found: list[dict[str, Any]], settings: dict[str, Any] = SETTINGS) -> Path:
    with Results(path, settings) as store:
        store.extend(found)
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The results of an audit with hostile names, next to the pictures."""
    folder = tmp_path / "pictures"
    for number, name in enumerate(("../secret.png", *NAMES[:-1])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (600, 300), (40 * number, 90, 120)).save(folder / name)
    return write(tmp_path / "results.jsonl", list(records(folder)))


def test_a_report_shows_pictures_of_the_audited_folder_and_no_others(results: Path) -> None:
    page = results.parent / "out" / "report.html"
    line = run("report", results, "-o", page).stdout
    assert line == f"8 images: 4 with a key, 6 at a false discovery rate of 0.05; reported in {page}\n"
    text = page.read_text(encoding="utf-8")
    assert text.count('src="data:image/jpeg;base64,') == 3 + 1 + 2  # significant, inconclusive and closest
    assert "outside the audited folder" in text and "file not found" in text
    assert 'href="../pictures/a/one.png"' in text and 'secret.png"' not in text
    assert 'href="../pictures/b/thr%C3%A9e%20%234%3F.png"' in text
    assert len(text) < 200_000
    run("report", results, "-o", page, "--thumbnails", 0)
    assert "base64" not in page.read_text().replace("sha256-", "").split("<body>")[1]


def test_a_changed_picture_is_not_shown(results: Path) -> None:
    (results.parent / "pictures" / NAMES[0]).write_bytes(b"something else")
    run("report", results, "-o", results.parent / "report.html")
    assert "file has changed since the audit" in (results.parent / "report.html").read_text()


def test_both_forms_of_results_have_the_same_report(results: Path) -> None:
    pytest.importorskip("pyarrow")
    parts = write(results.with_suffix(".parquet"), list(records(results.parent / "pictures")))
    pages = []
    for form in (results, parts):
        run("report", form, "-o", results.parent / "report.html")
        pages.append((results.parent / "report.html").read_text().replace(form.name, "results"))
    assert pages[0] == pages[1]


def test_names_that_are_not_utf8_are_found(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe.png")
    (tmp_path / "pictures").mkdir()
    try:
        Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / name)
    except OSError:
        pytest.skip("this file system has no such names")
    size = (tmp_path / "pictures" / name).stat().st_size
    record = {"sample_id": name, "present": True, "log10_p": -9.0, "size": size}
    run("report", write(tmp_path / "r.jsonl", [record]), "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'href="pictures/%FF%FE.png"' in text and "data:image/jpeg" in text


def test_pictures_elsewhere_are_not_read_and_only_the_web_is_linked(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    names = ["https://host/b/c.png?x=1", str(tmp_path / "a.png"), "javascript:alert(1)/d.png", "s3://bucket/e.png"]
    found = [{"sample_id": name, "present": True, "log10_p": -9.0} for name in names]
    settings = {name: value for name, value in SETTINGS.items() if name != "folder"}
    run("report", write(tmp_path / "r.jsonl", found, settings), "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert re.findall('href="([^#"]*)"', text) == ["https://host/b/c.png?x=1"] and "data:image/" not in text


def test_only_reports_are_overwritten(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("<!doctype html><p>mine")
    assert "was not written by ringmark" in refused("report", results, "-o", page)
    run("report", results, "-o", page, "--force")
    run("report", results, "-o", page)
    assert "must end in .html" in refused("report", results, "-o", tmp_path / "report.txt")


@pytest.mark.parametrize(
    "content", ['{"ringmark": 1, "settings": {}}\n', '{"ringmark": 1, "settings": {"alpha": 7}}\n']
)
def test_other_results_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.jsonl").write_text(content)
    line = refused("report", tmp_path / "r.jsonl", "-o", tmp_path / "report.html")
    assert "is not the results of an audit" in line and not (tmp_path / "report.html").exists()


def test_missing_and_foreign_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("hello\n")
    for name in ("none.jsonl", "x.jsonl", "none.parquet"):
        assert name in refused("report", tmp_path / name, "-o", tmp_path / "report.html")


def test_records_of_a_later_version_or_of_wrong_types_do_no_harm(results: Path, tmp_path: Path) -> None:
    odd = {
        "sample_id": "odd",
        "later": "field",
        "same_as": 5,
        "notes": "x",
        "log10_p": [1],
        "size": "big",
        "key": "\udcff",
    }
    with results.open("a") as file:
        file.write(json.dumps(odd) + "\n")
    assert run("report", results, "-o", tmp_path / "report.html").stdout.startswith("9 images")


# -- in a browser -----------------------------------------------------------------------------------------------------


needs_browser = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def opened(window: Browser, results: Path) -> Browser:
    """The report, open in a browser."""
    run("report", results, "-o", results.parent / "report.html")
    window.open((results.parent / "report.html").as_uri())
    return window


def shown(opened: Browser) -> list[str]:
    rows = "[...document.querySelectorAll('.filtered tbody tr')].filter(row => !row.hidden)"
    return [name.strip() for name in opened.run(f"return {rows}.map(row => row.cells[0].innerText)")]


@needs_browser
@pytest.mark.slow
def test_the_table_sorts_and_filters_by_keyboard(opened: Browser) -> None:
    assert len(shown(opened)) == 7
    header = ".filtered th:nth-child(3)"
    for order, direction in ((sorted(LOG10_P), "ascending"), (sorted(LOG10_P)[::-1], "descending")):
        opened.type(f"{header} button", "\ue007")
        assert opened.run("return document.querySelector(arguments[0]).ariaSort", header) == direction
        names = [NAMES[LOG10_P.index(value)].replace("\u202e", "\\u202e") for value in order]
        assert [name for name in shown(opened) if name != "../secret.png"] == names
    opened.type(".filter input", "TWO")
    assert shown(opened) == ["a/two.png"]
    assert opened.run("return document.querySelector('.filter output').textContent") == "1 of 7 shown"
    assert not opened.errors()


@needs_browser
@pytest.mark.slow
def test_nothing_in_a_name_runs_and_all_pictures_load(opened: Browser) -> None:
    assert opened.run("return typeof hacked") == "undefined"
    widths = opened.run("return [...document.images].map(image => image.naturalWidth)")
    assert widths == [256] * 6
    added = "const it = document.createElement('script'); it.text = 'hacked = 1'; document.body.append(it)"
    assert opened.run(f"{added}; return typeof hacked") == "undefined"
    assert any("Content Security Policy" in line for line in opened.errors())


@needs_browser
@pytest.mark.slow
def test_the_page_fits_a_phone_turns_dark_and_prints(opened: Browser) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    colours = set()
    for width, dark in ((360, False), (360, True), (1200, True)):
        opened.look(width, 700, dark=dark)
        colours.add(opened.run(background))
        assert opened.run("return document.documentElement.scrollWidth") <= width
    assert len(colours) == 2
    printed = opened.devtools("Page.printToPDF")["data"]
    assert base64.b64decode(printed).startswith(b"%PDF")
