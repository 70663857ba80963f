"""The search for keys in pictures that were rotated, enlarged, cropped or shifted.

Rotation and scale are searched on a grid, in two stages. The coarse stage inverts the picture once and transforms the
recovered noise instead of the picture. The networks are not equivariant to rotation, but enough of the noise's
structure rotates with the picture to rank the right candidate among the first. The fine stage undoes the best
candidates on the picture itself and inverts each of the results.

The p-value of the best fit is corrected for multiple testing: it is multiplied by the number of possible tests.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringmark.inversion.decoder import INVERTERS, Inverter
from ringmark.inversion.recover import Model, Recoverer
from ringmark.watermark.detect.geometry import IDENTITY, Candidate, Peak, best_shift, undo, window
from ringmark.watermark.null import Array, Null
from ringmark.watermark.schemes.base import Scheme
from ringmark.watermark.statistics import corrected

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = ["Found", "Search"]


@dataclass(frozen=True)
class Found:
    """The best fit of one key in one picture.

    `score` is the key's score at `candidate` and `shift` (latent pixels down and right, after the candidate is undone).
    `log10_p` is corrected for the number of `tests` but not for the number of keys. `inversions` is the number of
    inversions of the picture, shared by all keys; `seconds` is the time of the whole search.
    """

    sample_id: str
    key: str
    score: float
    log10_p: float
    candidate: Candidate
    shift: tuple[float, float]
    tests: int
    inversions: int
    seconds: float

    @property
    def p_value(self) -> float:
        """10 to the power of `log10_p`."""
        return 10**self.log10_p

    @property
    def note(self) -> str:
        """The transformation found: 'found by the search: rotated by 75°, enlarged 1.27 times'."""
        angle, scale = self.candidate
        down, right = self.shift
        changes = [f"rotated by {angle:g}°"] if angle else []
        changes += [f"enlarged {scale:g} times"] if scale != 1 else []
        changes += [f"noise shifted {down:g} down and {right:g} right"] if (down, right) != (0, 0) else []
        return "found by the search: " + (", ".join(changes) or "unchanged")


@dataclass(frozen=True)
class Search:
    """Searches for keys on the grid `angles` (degrees) × `scales`, at all shifts in steps of 1/`factor` latent pixel.

    A picture costs 1 + `dear` inversions, whatever the number of keys. An inversion is one pass of the encoder and
    `steps` of the network, so by default a picture costs 70 network calls; ordinary detection in 25 steps costs 25.
    Each key costs one FFT of the marked channels per grid point; the default grid has 1800.

    The defaults were chosen for pocket with a mark at radii 7 to 9. The score falls to 0.94, 0.70 and 0.50 of its peak
    when the angle is off by 1°, 2° and 3°, and to 0.95 and 0.8 when the scale is off by 2 % and 4 %. Marks of larger
    radii need a finer grid, with angles spaced by about 16°/radius. By default `inverter` is the encoder alone: no
    latent decodes to a rotated or cropped picture, and what decoder inversion gains after rotations it loses after
    crops.

    Mirror images and unequal scales of the two sides are not searched. A key with few free numbers, such as one per
    circle, cannot be significant among so many tests.
    """

    angles: tuple[float, ...] = tuple(range(-180, 180, 2))
    scales: tuple[float, ...] = tuple(round(1.04**i, 4) for i in range(10))
    dear: int = 6
    steps: int = 10
    factor: int = 2
    slack: float = 1.0
    inverter: Inverter = INVERTERS["encoder"]

    @property
    def grid(self) -> list[Candidate]:
        """All candidates, the identity first."""
        pairs = product(self.angles, self.scales)
        return list(dict.fromkeys([IDENTITY, *(Candidate(float(a), float(s)) for a, s in pairs)]))

    @property
    def inversions(self) -> int:
        """The number of inversions per picture."""
        return 1 + min(self.dear, len(self.grid) - 1)

    def tests(self, latent_shape: tuple[int, int, int]) -> int:
        """The number of possible tests per key: every candidate at every shift in its window.

        All of them count, although few are made, because the picture decides which ones are made.
        """
        return int(window(self.grid, latent_shape[1:], factor=self.factor, slack=self.slack).sum())

    def __call__(
        self,
        model: Model,
        schemes: Mapping[str, Scheme],
        null: Null,
        samples: Iterable[Sample],
        *,
        batch: int = 8,
    ) -> list[list[Found]]:
        """The best fit of each key in each sample; `schemes` are by the keys' fingerprints and give the order.

        Raises SchemeError for a scheme that is not searchable.
        """
        look = _Look(
            search=self, recoverer=Recoverer(model, self.inverter, self.steps), schemes=schemes, null=null, batch=batch
        )
        samples, fits = iter(samples), []
        while group := list(islice(samples, batch)):
            fits += look.at(group)
        return fits


@dataclass(frozen=True, eq=False)
class _Look:
    """A search in progress, with its models and keys."""

    search: Search
    recoverer: Recoverer
    schemes: Mapping[str, Scheme]
    null: Null
    batch: int

    def at(self, samples: list[Sample]) -> list[list[Found]]:
        """The best fits of each sample, one per key."""
        from ringmark.data.images import to_array

        started = time.perf_counter()
        images = torch.from_numpy(np.stack([to_array(s.image) for s in samples]))
        fits = [self._fits(image, noise) for image, noise in zip(images, self._noise(images), strict=True)]
        seconds = (time.perf_counter() - started) / len(samples)
        return [
            [self._found(sample.id, key, fit, seconds) for key, fit in zip(self.schemes, row, strict=True)]
            for sample, row in zip(samples, fits, strict=True)
        ]

    def _found(self, sample_id: str, key: str, fit: _Fit, seconds: float) -> Found:
        return Found(
            sample_id=sample_id,
            key=key,
            score=fit.score,
            log10_p=fit.log10_p,
            candidate=fit.candidate,
            shift=fit.shift,
            tests=self._tests,
            inversions=self.search.inversions,
            seconds=seconds,
        )

    @cached_property
    def _tests(self) -> int:
        return self.search.tests(self.recoverer.model.latent_shape)

    def _fits(self, image: Tensor, noise: Tensor) -> list[_Fit]:
        """The best fits in one image (3, H, W) with this noise (C, h, w), one per key."""
        tried = [IDENTITY, *self.promising(noise)]
        noises = torch.cat([noise[None], *self._inverted_again(image, tried[1:])])
        return [self._fit(scheme, noises, tried) for scheme in self.schemes.values()]

    def _inverted_again(self, image: Tensor, candidates: list[Candidate]) -> list[Tensor]:
        """Recovered noise of one image (3, H, W) after each candidate is undone on it, in batches."""
        parts = [candidates[i : i + self.batch] for i in range(0, len(candidates), self.batch)]
        return [self._noise(undo(image.expand(len(c), -1, -1, -1), c).clamp(-1, 1)) for c in parts]

    def _noise(self, images: Tensor) -> Tensor:
        """Recovered noise (B, C, h, w), with 0 for values that are not finite."""
        return torch.nan_to_num(self.recoverer(images).noise, 0.0, 0.0, 0.0)

    def promising(self, noise: Tensor) -> list[Candidate]:
        """The `dear` best candidates besides the identity, at which the transformed noise (C, h, w) fits any key best.

        They are ranked by p-value, because keys may have different numbers of features.
        """
        others, log10_p = self.search.grid[1:], []
        for start in range(0, len(others), CHUNK):
            part = others[start : start + CHUNK]
            turned = undo(noise.expand(len(part), -1, -1, -1), part, padding="zeros")
            peaks = [(scheme, self._peak(scheme, turned, part)) for scheme in self.schemes.values()]
            log10_p.append(np.min([self._scored(scheme, peak.score)[1] for scheme, peak in peaks], 0))
        if not log10_p:
            return []
        return [others[i] for i in np.argsort(np.concatenate(log10_p), kind="stable")[: self.search.dear]]

    def _peak(self, scheme: Scheme, noise: Tensor, candidates: Sequence[Candidate]) -> Peak:
        """The best shift within the window of each candidate, for noise (B, C, h, w) with these candidates undone."""
        factor = self.search.factor
        within = window(candidates, scheme.latent_shape[1:], factor=factor, slack=self.search.slack)
        return best_shift(scheme, noise, self.null, factor=factor, within=within)

    def _fit(self, scheme: Scheme, noise: Tensor, candidates: Sequence[Candidate]) -> _Fit:
        """The best fit of one key; its p-value is corrected for all possible tests (`statistics.corrected`)."""
        value, shift, _ = self._peak(scheme, noise, candidates)
        best = int(value.argmax())
        score, log10_p = self._scored(scheme, value[best : best + 1])
        down, right = shift[best].tolist()
        return _Fit(
            score=float(score[0]),
            log10_p=float(corrected(log10_p[0], self._tests)),
            candidate=candidates[best],
            shift=(down, right),
        )

    def _scored(self, scheme: Scheme, values: Array) -> tuple[Array, Array]:
        """Scores and log₁₀ p of values of `Scheme.shift_scores`."""
        test = scheme.on(self.null)
        scores = test.of_shifts(values)
        return scores, test.log10_p(scores)


class _Fit(NamedTuple):
    """Score, log₁₀ p, candidate and shift of the best fit of one key."""

    score: float
    log10_p: float
    candidate: Candidate
    shift: tuple[float, float]


CHUNK = 64  # candidates per batch
