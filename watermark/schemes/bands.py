"""Bands: parts of a mark, each a range of rings in some channels, that are tested separately.

In a key's description a band is {"channels": [0, 1], "radii": [2, 3]}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.watermark.schemes.fourier import Placement, recommend

__all__ = [
    "LOW",
    "MOST",
    "WHITE_BUDGET",
    "check_budget",
    "described",
    "read_bands",
    "read_placement",
    "recommend_bands",
    "whole_of",
]

WHITE_BUDGET = 0.11  # share of the coefficients that a recommended mark may alter where it leaves the noise white
LOW = (2, 3)  # the rings that survive crops, but for the first, which fixes the picture's layout
MOST = 8  # bands of a mark


def read_placement(description: Mapping[str, Any]) -> Placement:
    """The channels and radii of a mark or of a band. Raises SchemeError if they make no sense."""
    channels, radii = (_whole_numbers(description, name) for name in ("channels", "radii"))
    if len(radii) != 2:
        raise SchemeError("scheme.description", "its radii are not two numbers", subject="key")
    return Placement(channels, (radii[0], radii[1]))


def _whole_numbers(description: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = description.get(name)
    if not isinstance(values, list) or not all(type(n) is int for n in values):
        raise SchemeError("scheme.description", f"its {name} are not whole numbers", subject="key")
    return tuple(values)


def read_bands(bands: Any, whole: Placement | None = None) -> tuple[Placement, ...]:
    """The bands of a description, which lie in a mark that is `whole` if that is described too.

    That is so in keys made before bands had channels: there, a band is a range of rings in all channels of the mark.
    Raises SchemeError for bands that share a ring, which would not be independent if channels are correlated, for those
    that reach beyond the mark, and for more than MOST.
    """
    refused = SchemeError(
        "scheme.bands", f"must be 1 to {MOST} ranges of rings without a ring in common", subject="bands"
    )
    if not isinstance(bands, list) or len(bands) > MOST or not (bands or whole):
        raise refused
    read = []
    for each in bands:
        band = {"channels": list(whole.channels), "radii": each} if whole and isinstance(each, list) else each
        if not isinstance(band, dict):
            raise refused
        read.append(read_placement(band))
        if not read[-1].channels or read[-1].radii[0] > read[-1].radii[1]:
            raise refused
    if any(below[1] >= above[0] for below, above in pairwise(sorted(band.radii for band in read))):
        raise refused
    if whole and not all(_within(band, whole) for band in read):
        raise refused
    return tuple(read)


def _within(band: Placement, whole: Placement) -> bool:
    (lowest, highest), (low, high) = whole.radii, band.radii
    return set(band.channels) <= set(whole.channels) and lowest <= low and high <= highest


def whole_of(bands: Sequence[Placement]) -> Placement:
    """All channels of the bands, and the range from their lowest to their highest ring."""
    lows, highs = zip(*(band.radii for band in bands), strict=True)
    return Placement(tuple(dict.fromkeys(c for band in bands for c in band.channels)), (min(lows), max(highs)))


def described(bands: Sequence[Placement]) -> dict[str, Any]:
    """The description of a mark: its bands, or the channels and radii of a single one."""
    each = [band.fields for band in bands]
    return {"bands": each} if len(each) > 1 else each[0]


def check_budget(bands: Sequence[Placement], latent_shape: tuple[int, int, int], budget: float) -> None:
    """Raises SchemeError if a mark of these bands alters a larger share of the coefficients than `budget`."""
    if (share := sum(band.share(latent_shape) for band in bands)) > budget:
        raise SchemeError(
            "scheme.budget",
            f"alters {share:.3g} of the coefficients, more than the budget of {budget:g}",
            subject="; ".join(map(str, bands)),
        )


def recommend_bands(
    recovery: NoiseRecovery | None, latent_shape: tuple[int, int, int], *, budget: float = WHITE_BUDGET
) -> tuple[Placement, ...]:
    """The bands of a mark of independent values: low rings of all channels, and the best of the higher rings.

    A crop moves high rings by more than the width of a bin and leaves low ones nearly in place; brightness and contrast
    spoil low ones. So each kind is tested by itself (see scripts/experiments/placement.py). Independent values leave
    the noise white, so they may take low rings, where other patterns would show in the picture; but not the lowest,
    which fixes the picture's layout (see scripts/experiments/diversity.py). Where the low rings would take more than
    half of the budget, all rings make one band.
    """
    low = Placement(tuple(range(latent_shape[0])), LOW)
    left = budget - low.share(latent_shape)
    if left < budget / 2:
        return (recommend(recovery, latent_shape, budget=budget, lows=(1,)),)
    return low, recommend(recovery, latent_shape, budget=left, lows=(LOW[1] + 1,))
