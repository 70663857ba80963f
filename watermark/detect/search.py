"""The search for keys in pictures that were turned, enlarged, cropped or shifted.

Angle and scale are gone through on a grid, in two stages. The cheap one inverts the picture once as it is and turns
the recovered noise: the networks know no rotation, yet enough of the noise's grain turns with the picture to put the
right candidate among the first. The dear one undoes the best candidates on the picture itself and inverts each anew.

The best of many tests is judged as such: its p-value is multiplied by the number of tests that might have been made.
"""

from __future__ import annotations

import math
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
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import Scheme

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = ["Found", "Search"]


@dataclass(frozen=True)
class Found:
    """The best fit of one key in one picture.

    `score` is the key's at `candidate` and `shift` (latent pixels down and right, after the candidate is undone);
    `log10_p` is that of the best of `tests` tests, corrected for them but not for the number of keys. `inversions` of
    the picture were made, for all keys together, and took `seconds` with all else.
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
        """What had been done to the picture: 'found by the search: turned by 75°, enlarged 1.27 times'."""
        angle, scale = self.candidate
        down, right = self.shift
        changes = [f"turned by {angle:g}°"] if angle else []
        changes += [f"enlarged {scale:g} times"] if scale != 1 else []
        changes += [f"noise moved {down:g} down and {right:g} right"] if (down, right) != (0, 0) else []
        return "found by the search: " + (", ".join(changes) or "unchanged")


@dataclass(frozen=True)
class Search:
    """Looks for keys on the grid angles (degrees) × scales, and at all shifts in steps of 1/`factor` latent pixel.

    A picture costs 1 + `dear` inversions, whatever the number of keys; an inversion is one pass of the encoder and
    `steps` of the network, so that by default a picture costs 70 calls of the network where the ordinary detector's 25
    steps cost 25. Each key costs as many FFTs of the marked channels as the grid has points, 1800.

    The defaults come from pocket, marked at radii 7 to 9. Of the score after the right turn is undone 0.94, 0.70 and
    0.50 are left at 1°, 2° and 3° off, of that after the right scale 0.95 and 0.8 at 2 % and 4 %: the grid must be the
    finer the larger the mark's radii, angles by about 16°/radius. `inverter` is the encoder alone: a turned or cropped
    picture was not decoded from any latent, and what decoder inversion gains after turns it loses after crops.

    It does not look for mirror images or for unequal scales of the sides. Keys of few free numbers, one a circle, say,
    cannot be significant among so many tests.
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
        """How often each picture is inverted."""
        return 1 + min(self.dear, len(self.grid) - 1)

    def tests(self, latent_shape: tuple[int, int, int]) -> int:
        """How many tests might be made of each key: every candidate at every shift in its window.

        All count, though few are made: which are made the picture itself decides.
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
        """For each sample the best fit of each key, by fingerprint in `schemes`, in their order.

        Raises SchemeError for a scheme that is not searchable.
        """
        look = _Look(self, Recoverer(model, self.inverter, self.steps), schemes, null, batch)
        samples, found = iter(samples), []
        while group := list(islice(samples, batch)):
            found += look.at(group)
        return found


@dataclass(frozen=True, eq=False)
class _Look:
    """A search in progress: what it searches with, and for what."""

    search: Search
    recoverer: Recoverer
    schemes: Mapping[str, Scheme]
    null: Null
    batch: int

    def at(self, samples: list[Sample]) -> list[list[Found]]:
        """For each sample, for each key."""
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
        """Of one image (3, H, W) and its noise (C, h, w), one a key."""
        tried = [IDENTITY, *self.promising(noise)]
        noises = torch.cat([noise[None], *self._anew(image, tried[1:])])
        return [self._fit(scheme, noises, tried) for scheme in self.schemes.values()]

    def _anew(self, image: Tensor, candidates: list[Candidate]) -> list[Tensor]:
        """Noise of one image (3, H, W) after each candidate is undone on it, in batches."""
        parts = [candidates[i : i + self.batch] for i in range(0, len(candidates), self.batch)]
        return [self._noise(undo(image.expand(len(c), -1, -1, -1), c).clamp(-1, 1)) for c in parts]

    def _noise(self, images: Tensor) -> Tensor:
        """(B, C, h, w); what left the range of numbers is 0."""
        return torch.nan_to_num(self.recoverer(images).noise, 0.0, 0.0, 0.0)

    def promising(self, noise: Tensor) -> list[Candidate]:
        """The `dear` candidates, the identity apart, that fit some key best in the turned noise (C, h, w), best first.

        p-values rank them: keys may have different numbers of features.
        """
        others, log10_p = self.search.grid[1:], []
        for start in range(0, len(others), CHUNK):
            part = others[start : start + CHUNK]
            turned = undo(noise.expand(len(part), -1, -1, -1), part, padding="zeros")
            peaks = [(scheme, self._peak(scheme, turned, part)) for scheme in self.schemes.values()]
            log10_p.append(np.min([scheme.on(self.null).log10_p(peak.score) for scheme, peak in peaks], 0))
        if not log10_p:
            return []
        return [others[i] for i in np.argsort(np.concatenate(log10_p), kind="stable")[: self.search.dear]]

    def _peak(self, scheme: Scheme, noise: Tensor, candidates: Sequence[Candidate]) -> Peak:
        """The best shift, within its window, of each noise (B, C, h, w) of which a candidate was undone."""
        factor = self.search.factor
        within = window(candidates, scheme.latent_shape[1:], factor=factor, slack=self.search.slack)
        return best_shift(scheme, noise, self.null, factor=factor, within=within)

    def _fit(self, scheme: Scheme, noise: Tensor, candidates: Sequence[Candidate]) -> _Fit:
        """One key's best fit; p for all tests that might have been made (`statistics.maximum_p`)."""
        score, shift, _ = self._peak(scheme, noise, candidates)
        best = int(score.argmax())
        log10_p = float(scheme.on(self.null).log10_p(score[best : best + 1])[0]) + math.log10(self._tests)
        down, right = shift[best].tolist()
        return _Fit(float(score[best]), min(0.0, log10_p), candidates[best], (down, right))


class _Fit(NamedTuple):
    """Score, p-value, candidate and shift of one key's best fit."""

    score: float
    log10_p: float
    candidate: Candidate
    shift: tuple[float, float]


CHUNK = 64  # candidates turned at once
