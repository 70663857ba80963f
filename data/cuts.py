"""Pictures within a picture: on a contact sheet, in a screenshot, on a page of one colour.

They are separated by lines of the background's colour (a recursive X-Y cut; Nagy and Seth, 1984).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["boxes"]

Box = tuple[int, int, int, int]
Mask = NDArray[np.bool_]

NEAR = 24  # grey levels by which the background may vary, as it does near the edges of a JPEG
FEW = 0.002  # share of a line that may differ more
GRAIN = 16  # grey levels that count as one colour
DEPTH = 6  # cuts within cuts
PROPORTION = 2.5  # pictures are not longer and narrower


def boxes(image: Image.Image, least: int, most: int = 24) -> list[Box]:
    """The boxes (left, top, right, bottom) of pictures in an RGB image, the largest first; without the image itself.

    Their sides are at least `least` pixels; at most `most` are returned.
    """
    pixels = np.asarray(image)
    inked = np.zeros(pixels.shape[:2], bool)
    for channel, level in enumerate(_background(pixels)):  # one by one, which takes less memory
        inked |= np.abs(pixels[..., channel].astype(np.int16) - level) > NEAR
    found = [box for box in _cut(inked, 0, 0, least, DEPTH) if box != (0, 0, *image.size) and _is_picture(box, least)]
    return sorted(found, key=_area, reverse=True)[:most]


def _background(pixels: NDArray[np.uint8]) -> NDArray[np.int16]:
    """The middle of the commonest colour (3,)."""
    codes = np.zeros(pixels.shape[:2], np.uint16)
    for channel in range(3):
        codes = codes * (256 // GRAIN) + pixels[..., channel] // GRAIN
    commonest = np.bincount(codes.ravel()).argmax()
    middle: NDArray[np.int16] = np.median(pixels[codes == commonest], axis=0).astype(np.int16)
    return middle


def _cut(inked: Mask, left: int, top: int, least: int, depth: int) -> Iterator[Box]:
    """The boxes of what blank lines separate in a mask (H, W) that begins at this place, without narrower pieces."""
    pieces = [(rows, columns) for rows in _runs(inked, 1, least) for columns in _runs(inked[rows], 0, least)]
    for rows, columns in pieces:
        part = inked[rows, columns]
        if depth and (part.shape != inked.shape or len(pieces) > 1):
            yield from _cut(part, left + columns.start, top + rows.start, least, depth - 1)
        else:
            yield left + columns.start, top + rows.start, left + columns.stop, top + rows.stop


def _runs(inked: Mask, along: int, least: int) -> list[slice]:
    """The runs of at least `least` lines that are not blank; lines run along this axis."""
    blank = inked.mean(along) <= FEW
    edges = np.flatnonzero(np.diff(np.concatenate([[True], blank, [True]]).astype(np.int8)))
    # Shorter runs hold no picture, and a page of dots has thousands in each direction.
    return [slice(int(start), int(stop)) for start, stop in edges.reshape(-1, 2) if stop - start >= least]


def _is_picture(box: Box, least: int) -> bool:
    left, top, right, bottom = box
    short, long = sorted((right - left, bottom - top))
    return short >= least and long <= PROPORTION * short


def _area(box: Box) -> int:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)
