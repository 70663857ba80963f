"""Expand a secret into standard normal numbers, the same on every platform.

Number i of a label is Φ⁻¹((2n + 1) / 2⁵³), where Φ⁻¹ is the normal quantile and n the upper 52 bits of the i-th word of
a stream. The stream is a hash in counter mode, SHA-256(secret ‖ label ‖ counter) for counter = 0, 1, 2, …, with the
label in UTF-8 and the counter in 8 bytes; each hash gives four words of 8 bytes. All are big-endian.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

__all__ = ["normal"]

WORDS = 4  # of 8 bytes in a SHA-256


def normal(secret: bytes, label: str, count: int) -> NDArray[np.float64]:
    """The first `count` standard normal numbers of this secret and label; other labels give independent numbers.

    Odd multiples of 2⁻⁵³ are exact in float64, never 0 or 1, and symmetric about 1/2. No number exceeds 8.3.
    """
    prefix = secret + label.encode()
    blocks = (hashlib.sha256(prefix + i.to_bytes(8, "big")).digest() for i in range(-(-count // WORDS)))
    words = np.frombuffer(b"".join(blocks), ">u8")[:count]
    numbers: NDArray[np.float64] = ndtri((2 * (words >> 12) + 1) * 2.0**-53)
    return numbers
