"""Many keys at once: the scores of keys of one kind are one matrix product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ringmark.watermark.null import Array, Null
from ringmark.watermark.schemes.base import Scheme, SchemeTest, TemplateTest

__all__ = ["BLOCK", "Bank", "blocks"]

BLOCK = 2048  # keys whose templates are in float64 at a time


def blocks(number: int) -> Iterator[slice]:
    """Slices of at most BLOCK that cover `number` rows."""
    return (slice(start, start + BLOCK) for start in range(0, number, BLOCK))


class Bank:
    """The tests of keys of one kind under one null.

    Templates are kept in float32: 4 d bytes a key, 170 MB for 100 000 keys of d = 424 features. All else is computed in
    float64, so cosines differ from those of `SchemeTest.score` by less than 1e-7, the relative rounding of a template.
    Scores that are −log₁₀ p, as those of default keys are, differ by about 1e-5, and by far more where the mark is
    recovered perfectly and p is tiny. Keys of a scheme without templates are scored one by one.
    """

    def __init__(self, schemes: Sequence[Scheme], null: Null, test: SchemeTest | None = None) -> None:
        self.schemes, self.null = schemes, null
        self.test = test or schemes[0].on(null)

    @cached_property
    def by_template(self) -> bool:
        """Whether scores come from templates."""
        return isinstance(self.test, TemplateTest)

    @cached_property
    def _templates(self) -> NDArray[np.float32]:
        assert isinstance(self.test, TemplateTest)
        parts = [self.test.templates(self.schemes[block]) for block in blocks(len(self.schemes))]
        return np.concatenate(parts, dtype=np.float32, casting="same_kind")

    def scores(self, observed: Array) -> Array:
        """Features (B, d) → scores (B, K)."""
        test = self.test
        if not isinstance(test, TemplateTest):
            return np.stack([scheme.on(self.null).score(observed) for scheme in self.schemes], 1)
        parts = (self._templates[block].astype(float) for block in blocks(len(self.schemes)))
        return np.hstack([test.scores(observed, templates) for templates in parts])
