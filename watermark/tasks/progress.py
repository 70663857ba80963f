"""Progress of a long run: a bar on a terminal, otherwise a line in the log every minute."""

from __future__ import annotations

import io
import logging
import sys
from collections import Counter
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Progress"]

LOG = logging.getLogger(__name__)

SECONDS = 60.0  # between lines of the log
LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress:
    """Reports rate, remaining time and findings of a task on `total` items, to be used in a `with` block.

    `total` is None if it is not known. Lines of the log are at least `seconds` apart.
    """

    def __init__(self, total: int | None, *, task: str, unit: str, seconds: float = SECONDS) -> None:
        self.found: Counter[str] = Counter()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=task,
            unit=unit,
            bar_format=BAR if terminal else LINE,
            file=None if terminal else _LogLines(),
            mininterval=0.1 if terminal else seconds,
            miniters=None if terminal else 1,
            postfix=self._findings(),
        )

    def add(self, *found: str, earlier: bool = False) -> None:
        """Count one more item, and what was found in it. One that an `earlier` run has done takes no time."""
        self.found.update(found)
        self._bar.set_postfix_str(self._findings(), refresh=False)
        if earlier:
            self._bar.initial += 1
            self._bar.n += 1
            self._bar.last_print_n += 1
        else:
            self._bar.update()

    def _findings(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self.found.items())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()


class _LogLines(io.StringIO):
    """Logs each line that a bar draws."""

    def write(self, text: str, /) -> int:
        if line := text.strip():
            LOG.info("%s", line)
        return len(text)
