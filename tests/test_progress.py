"""Progress is a bar on a terminal and lines in a log."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from ringmark.watermark.tasks.progress import Progress


def three_items(**options: float) -> None:
    with Progress(4, task="audit", unit="image", **options) as progress:
        progress.add("with a key", earlier=True)
        progress.add("with a key")
        progress.add()
        progress.add("unreadable")


def test_without_a_terminal_the_log_has_rate_remaining_time_and_findings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ringmark")
    three_items(seconds=0)
    first, *_, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("audit: 0 of 4, ") and last.startswith("audit: 4 of 4, ")
    assert "image/s" in last or "s/image" in last
    assert last.endswith("00:00 left, 2 with a key, 1 unreadable")


def test_lines_of_the_log_are_far_apart(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ringmark")
    three_items(seconds=3600)
    assert [record.getMessage()[:14] for record in caplog.records] == ["audit: 0 of 4,", "audit: 4 of 4,"]


def test_on_a_terminal_there_is_a_bar(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "ringmark")
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    three_items()
    assert "4/4" in screen.getvalue() and "2 with a key, 1 unreadable" in screen.getvalue()
    assert not caplog.records
