"""A headless Chromium, driven over the WebDriver protocol with the standard library."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MISSING = "" if DRIVER and CHROMIUM else "needs chromium and chromedriver"
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb"]


class Browser:
    """One window."""

    def __init__(self, driver: str) -> None:
        options = {"binary": CHROMIUM, "args": ARGUMENTS}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._url = f"{driver}/session"
        session = self._call("", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/{session['sessionId']}"

    def _call(self, path: str, body: dict | None = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["value"]

    def close(self) -> None:
        self._call("", method="DELETE")

    def open(self, url: str) -> None:
        self._call("/url", {"url": url})

    def run(self, script: str, *args: object) -> Any:
        """The value of a script's return statement."""
        return self._call("/execute/sync", {"script": script, "args": args})

    def devtools(self, command: str, **params: object) -> Any:
        """The result of a command of Chromium's own protocol."""
        return self._call("/goog/cdp/execute", {"cmd": command, "params": params})

    def type(self, selector: str, text: str) -> None:
        """Type into an element; for a file input, text is the paths of files, a line each."""
        element = self._call("/element", {"using": "css selector", "value": selector})
        self._call(f"/element/{next(iter(element.values()))}/value", {"text": text})

    def press(self, key: str) -> None:
        """Press a key, such as Tab or Enter."""
        code = {"Tab": "\ue004", "Enter": "\ue007"}[key]
        actions = [{"type": "keyDown", "value": code}, {"type": "keyUp", "value": code}]
        self._call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def drop(self, selector: str, *paths: Path) -> None:
        """Drop files or folders on an element, as from a file manager."""
        x, y = self.run(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]",
            selector,
        )
        data = {"items": [], "files": list(map(str, paths)), "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.devtools("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The value of the script, once it is true."""
        until = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < until, script
            time.sleep(0.05)
        return value

    def errors(self) -> list[str]:
        """What the console says: errors of scripts and refusals of the content security policy."""
        return [entry["message"] for entry in self._call("/se/log", {"type": "browser"})]

    def screenshot(self, path: Path, width: int, height: int, *, dark: bool = False) -> None:
        """A picture of the whole page at this size of the window."""
        self.look(width, height, dark=dark)
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window and the colour scheme."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser for a while."""
    assert DRIVER
    process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout
        lines: Callable[[], str] = process.stdout.readline
        port = next(found[1] for line in iter(lines, "") if (found := re.search(r"successfully on port (\d+)", line)))
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.close()
    finally:
        process.kill()
        process.communicate()
