"""Watermarking schemes: what is planted in the noise, and the vectors by which it is found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scheme"]


class Scheme(Protocol):
    """A scheme with its key in it."""

    def embed(self, noise: Tensor) -> Tensor:
        """Unit normal noise (B, C, h, w) → marked noise of the same shape, still unit normal to the eye of the model."""
        ...

    def features(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Recovered noise (B, C, h, w) → recovered vectors (B, d) and the key's (d,), of unit variance on white noise."""
        ...
