"""The page, in a real browser: pictures are dropped and uploaded, and verdicts are read."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from browser import MISSING, Browser, browser
from serving import FLAT, KEY, MARKED, PLAIN, Known, client, service

from ringmark.watermark.service.access import Caller
from ringmark.watermark.service.app import make_app

needs_browser = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@contextmanager
def served(**options: object) -> Iterator[str]:
    """The address of a service that runs in a thread."""
    config = uvicorn.Config(make_app(service(**options)), port=0, log_config=None, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pictures")
    (made / "inner").mkdir()
    for name, content in {
        "a marked.png": MARKED,
        "plain.png": PLAIN,
        "inner/flat.png": FLAT,
        "cut.png": MARKED[:-500],
    }.items():
        (made / name).write_bytes(content)
    (made / "notes.txt").write_text("no picture")
    return made


def verdicts(window: Browser) -> dict[str, str]:
    """The verdict in words by the name of the picture, once all are there."""
    window.wait("return document.getElementById('progress').textContent.startsWith('Done')")
    script = (
        "return [...document.querySelectorAll('.result')].map(r => [r.querySelector('h3'), r.querySelector('.verdict')]"
    )
    return dict(window.run(f"{script}.map(e => e.textContent))"))


SAID = {
    "a marked.png": f"Carries key {KEY.fingerprint[:8]}",
    "plain.png": f"Does not carry key {KEY.fingerprint[:8]}",
    "flat.png": "Inconclusive",
    "cut.png": "Not tested: the picture is damaged or cut off (cut off in the chunk IDAT)",
}


@pytest.mark.slow
@needs_browser
def test_a_folder_is_dropped_and_its_verdicts_are_read(window: Browser, folder: Path) -> None:
    with served() as address:
        window.open(address)
        window.drop("#drop", folder)
        found = verdicts(window)
        assert {Path(name).name: words for name, words in found.items()} == SAID, "and the text file is left out"
        assert (
            window.run("return document.getElementById('progress').textContent") == "Done: 4 pictures, 1 carries a key."
        )
        basis = window.run("return document.querySelector('.present .basis').textContent")
        assert "model identity" in basis and "1 key" in basis and "does not prove who made" in basis
        assert not window.run("return [...document.querySelectorAll('.evidence')].some(e => !e.hidden)")
        expected = [e for e in window.errors() if "422" not in e]
        assert not expected, "no error, and nothing that the content security policy refused"


@pytest.mark.slow
@needs_browser
def test_pictures_are_chosen_and_a_token_shows_figures(window: Browser, folder: Path) -> None:
    with served(access=Known(lab=Caller("lab", "p", 600))) as address:
        window.open(address)
        window.type("#files", str(folder / "a marked.png"))
        assert "access token" in verdicts(window)["a marked.png"]
        assert window.run("return document.getElementById('access').open")
        window.type("#token", "lab")
        window.type("#files", f"{folder / 'a marked.png'}\n{folder / 'plain.png'}")
        window.wait("return document.querySelectorAll('.present, .absent').length === 2")
        figures = window.run("return document.querySelector('.present .evidence').textContent")
        assert KEY.fingerprint in figures and re.search(r"p\d\.\d+e-\d+", figures)


@pytest.mark.slow
@needs_browser
def test_the_keyboard_reaches_everything_and_everything_has_a_name(window: Browser) -> None:
    with served() as address:
        window.open(address)
        reached = []
        for _ in range(3):
            window.press("Tab")
            reached.append(window.run("return document.activeElement.id || document.activeElement.localName"))
        assert reached == ["files", "folder", "summary"]
        window.press("Enter")
        window.press("Tab")
        assert window.run("return document.activeElement.id") == "token"
        window.devtools("Accessibility.enable")
        nodes = window.devtools("Accessibility.getFullAXTree")["nodes"]
        named = {(n["role"]["value"], n["name"]["value"]) for n in nodes if "role" in n and n.get("name")}
        assert {("button", "Choose pictures"), ("button", "Choose a folder"), ("form", "Pictures")} <= {
            (role, name.partition(":")[0]) for role, name in named
        }
        assert any(role == "textbox" and name.startswith("Token") for role, name in named)
        assert any(n["role"]["value"] == "status" for n in nodes if "role" in n)


def luminance(colour: str) -> float:
    """Of a colour as a browser computes it, as WCAG 2 defines it."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_and_can_be_read(window: Browser, folder: Path, width: int, dark: bool) -> None:
    with served() as address:
        window.open(address)
        window.look(width, 800, dark=dark)
        window.drop("#drop", folder)
        verdicts(window)
        assert window.run("return document.documentElement.scrollWidth") <= width
        script = """
        return [...document.querySelectorAll('h1, p, .button, summary, dt, dd, .verdict')].filter(e => e.offsetParent)
          .map(e => {
            let behind = e;
            while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
            return [e.textContent, getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
          })"""
        for text, front, behind in window.run(script):
            light, deep = sorted((luminance(front), luminance(behind)), reverse=True)
            assert (light + 0.05) / (deep + 0.05) >= 4.5, text


def test_the_page_needs_nothing_from_elsewhere() -> None:
    with client() as web:
        pages = {path: web.get(path) for path in ("/", "/page.js", "/page.css")}
    for response in pages.values():
        assert response.status_code == 200 and not re.search(r"(?:https?:)?//[a-z]", response.text)
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=|innerHTML", pages["/"].text + pages["/page.js"].text)
    kinds = [response.headers["content-type"].partition(";")[0] for response in pages.values()]
    assert kinds == ["text/html", "text/javascript", "text/css"]
