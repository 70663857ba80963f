"""Watermarking schemes. The built-in ones are registered here without importing them."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

from ringmark.watermark.schemes.base import Parameter, PublishedStatistic, SchemeEntry, register

__all__: list[str] = []


def _span(text: str) -> range:
    """'3-10' as the numbers from 3 to 10, '3' as 3 alone. Raises ValueError."""
    low, dash, high = text.partition("-")
    first, last = int(low), int(high if dash else low)
    if not first <= last < first + 1000:  # no latent has more channels or rings
        raise ValueError(text)
    return range(first, last + 1)


def _numbers(text: str) -> tuple[int, ...]:
    """'0,2' as 0 and 2, '0-3' as 0, 1, 2 and 3."""
    try:
        return tuple(n for part in text.split(",") for n in _span(part))
    except ValueError:
        raise ValueError(f"{text!r}: use ascending whole numbers, as in 0,2 or 0-3") from None


def _range(text: str) -> tuple[int, int]:
    """'3-10' as 3 and 10."""
    try:
        span = _span(text if "-" in text else "")
    except ValueError:
        raise ValueError(f"{text!r}: use two ascending whole numbers, as in 3-10") from None
    return span[0], span[-1]


def _bands(bands: list[Any]) -> str:
    """[{"channels": [0, 1], "radii": [2, 4]}] as '2-4 in channels 0-1'; older keys' [[1, 4], [5, 9]] as '1-4; 5-9'."""
    return "; ".join(
        f"{_text(band['radii'], '-')} in {_channels(band['channels'])}" if isinstance(band, dict) else _text(band, "-")
        for band in bands
    )


def _parse_bands(text: str) -> list[dict[str, list[int]]]:
    """'2-4 in channels 0-1; 5-9 in channel 0' as a list of bands; the word may be left out. Raises ValueError."""
    found = [re.fullmatch(r"\s*([\d-]+) in (?:channels? )?([\d,-]+)\s*", band) for band in text.split(";")]
    if not all(found):
        raise ValueError(f"{text!r}: use radii and channels of each band, as in 2-3 in 0-3; 4-10 in 0")
    return [{"channels": list(_numbers(band[2])), "radii": list(_range(band[1]))} for band in found if band]


def _channels(channels: list[int]) -> str:
    """[0, 1, 2] as 'channels 0-2', [0, 2] as 'channels 0,2', [1] as 'channel 1'."""
    if len(channels) > 1 and all(b - a == 1 for a, b in pairwise(channels)):
        return f"channels {channels[0]}-{channels[-1]}"
    return f"channel{'s' if len(channels) > 1 else ''} {_text(channels, ',')}"


def _text(numbers: list[int], between: str) -> str:
    return between.join(map(str, numbers))


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(f"{text!r}: use a share above 0 and at most 1, as in 0.08")
    return share


register(
    SchemeEntry(
        name="tree-ring",
        home="ringmark.watermark.schemes.tree_ring:TreeRing",
        parameters=(
            Parameter(
                name="pattern",
                help="rand: one value per frequency; ring: one per circle, survives flips and rotation; zeros: none.",
                default="rand",
                choices=("ring", "rand", "zeros"),
            ),
            Parameter(
                name="mask",
                help="published: one row off centre, as in the tree-ring paper's code.",
                default="centred",
                choices=("centred", "published"),
            ),
            Parameter(
                name="channels",
                help="Latent channels, as in 0,2 or 0-3.  [default: where the model's noise is recovered best]",
                parse=_numbers,
                show=lambda channels: _text(channels, ","),
            ),
            Parameter(
                name="radii",
                help="Range of ring radii, as in 3-10.  [default: where the model's noise is recovered best]",
                parse=_range,
                show=lambda radii: _text(radii, "-"),
            ),
            Parameter(
                name="bands",
                help="Bands that are tested separately, instead of channels and radii, as in '2-3 in 0-3; 4-10 in 0'.  "
                "[default: low rings of all channels, and higher ones where the noise is recovered best]",
                parse=_parse_bands,
                show=_bands,
            ),
            Parameter(
                name="budget",
                help="Maximum share of the noise that the mark may alter.  [default: 0.11 for centred rand, else 0.08]",
                parse=_share,
            ),
        ),
        published=(
            PublishedStatistic(name="published_distance", label="published distance", larger_if_marked=False),
            PublishedStatistic(name="published_p", label="published p", larger_if_marked=False, compared=False),
        ),
    )
)
