"""A number for each of many names, in little memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Positions"]

RECENT = 4096  # fewest names that are sorted in at a time


class Positions:
    """A whole number for each name, in 16 to 30 bytes a name however long it is.

    Names are compared by 64-bit hashes, of which two of 10 million agree with a probability of 3e-6. Most lie in sorted
    arrays; new ones wait in a dict until there are an eighth as many. Other threads may read while one writes.
    """

    def __init__(self) -> None:
        import numpy as np

        self._sorted: tuple[NDArray[np.int64], NDArray[np.int64]] = (np.empty(0, np.int64), np.empty(0, np.int64))
        self._recent: dict[int, int] = {}

    def get(self, name: str) -> int | None:
        """The number of a name; None if it has none."""
        digest = hash(name)
        # First the recent ones: what is missing there because it has been sorted in meanwhile is found below.
        if (number := self._recent.get(digest)) is not None:
            return number
        hashes, numbers = self._sorted
        row = hashes.searchsorted(digest)
        return int(numbers[row]) if row < len(hashes) and hashes[row] == digest else None

    def __setitem__(self, name: str, number: int) -> None:
        digest = hash(name)
        hashes, numbers = self._sorted
        row = hashes.searchsorted(digest)
        if row < len(hashes) and hashes[row] == digest:
            numbers[row] = number
            return
        self._recent[digest] = number
        if len(self._recent) > max(RECENT, len(hashes) // 8):
            self._sort_in()

    def _sort_in(self) -> None:
        import numpy as np

        recent = np.array(sorted(self._recent.items()), np.int64)
        hashes, numbers = self._sorted
        rows = hashes.searchsorted(recent[:, 0])
        self._sorted = np.insert(hashes, rows, recent[:, 0]), np.insert(numbers, rows, recent[:, 1])
        self._recent = {}

    def __len__(self) -> int:
        return len(self._sorted[0]) + len(self._recent)

    def numbers(self) -> NDArray[np.int64]:
        """The numbers of all names, in ascending order."""
        import numpy as np

        return np.sort(np.append(self._sorted[1], np.fromiter(self._recent.values(), np.int64)))
