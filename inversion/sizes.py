"""The sizes at which a model may have drawn a picture."""

from __future__ import annotations

import math
from typing import Protocol

from ringmark.errors import ModelError

__all__ = ["Size", "candidate_sizes"]

Size = tuple[int, int]


class Drawing(Protocol):
    """What has to be known about a model."""

    @property
    def image_size(self) -> Size: ...

    @property
    def sizes(self) -> tuple[Size, ...]: ...

    def noise_shape(self, size: Size) -> tuple[int, int, int]: ...


SAME_ASPECT = 0.02  # relative difference of aspect ratios that rounding to whole pixels can make
RANGE = 4.0  # a model is taken to draw pictures of a quarter to four times its native area


def candidate_sizes(picture: Size, model: Drawing) -> tuple[Size, ...]:
    """Sizes (H, W) at which a picture of this size may have been drawn, the likeliest first; at least one.

    A usual size of the model is the only candidate. For another size that the model can draw, the candidates are that
    size and, since the picture may have been resized, every usual size with the same aspect ratio. For a size that the
    model cannot draw, they are the usual sizes with the same aspect ratio, or else the one with the closest.
    """
    if picture in model.sizes:
        return (picture,)
    same = [size for size in model.sizes if _stretch(picture, size) <= SAME_ASPECT]
    if _drawable(picture, model):
        return (picture, *same)
    return tuple(same) or (min(model.sizes, key=lambda size: _stretch(picture, size)),)


def _stretch(one: Size, other: Size) -> float:
    """How much the aspect ratios of two sizes differ, |log ratio|."""
    return abs(math.log(one[0] * other[1]) - math.log(one[1] * other[0]))


def _drawable(size: Size, model: Drawing) -> bool:
    native = math.prod(model.image_size)
    if not native / RANGE <= math.prod(size) <= native * RANGE:
        return False
    try:
        model.noise_shape(size)
    except ModelError:
        return False
    return True
