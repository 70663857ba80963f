"""The search for a key in pictures that were turned, enlarged, cropped or shifted.

A shift of the noise is a ramp of phases in its transform, so one inverse FFT correlates with the key at every shift.
Angle and scale are gone through on a grid, in two stages. The cheap one inverts the picture once as it is and turns
the recovered noise: the networks know no rotation, yet enough of the noise's grain turns with the picture to put the
right candidate among the first. The dear one undoes the best candidates on the picture itself and inverts each anew.

The best of many tests is judged as such: its p-value is multiplied by the number of tests that might have been made.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ringmark.data.images import to_array
from ringmark.errors import SchemeError
from ringmark.inversion.decoder import INVERTERS, Inverter
from ringmark.inversion.noise_recovery import rings
from ringmark.watermark.detect.detector import Detector, null_covariance
from ringmark.watermark.schemes.tree_ring import TreeRing, middle_phase
from ringmark.watermark.statistics import cosine_p, maximum_p

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = [
    "IDENTITY",
    "Candidate",
    "Found",
    "Peak",
    "Search",
    "best_shift",
    "shift_scores",
    "undo",
    "window",
]


class Candidate(NamedTuple):
    """What may have been done to a picture, about its centre: turned anticlockwise by `angle` degrees, enlarged `scale` times."""

    angle: float = 0.0
    scale: float = 1.0


IDENTITY = Candidate()


class Peak(NamedTuple):
    """The best shift of each noise: `score` (B,), `shift` (B, 2) in latent pixels (down, right), and the `tests` (B,) made."""

    score: np.ndarray
    shift: np.ndarray
    tests: np.ndarray


@dataclass(frozen=True)
class Found:
    """The best fit of one key in one picture.

    `score` is the whitened cosine at `candidate` and `shift` (latent pixels down and right, after the candidate is
    undone); `p_value` that of the best of `tests` tests, corrected for them, not for the number of keys. `inversions`
    of the picture were made, for all keys together, and took `seconds` with all else.
    """

    sample_id: str
    key: str
    score: float
    p_value: float
    candidate: Candidate
    shift: tuple[float, float]
    tests: int
    inversions: int
    seconds: float

    @property
    def note(self) -> str:
        """In words: what had been done to the picture."""
        angle, scale = self.candidate
        turned = f"turned by {angle:g}°, " if angle else ""
        return f"found by the search: the picture was {turned}enlarged {scale:g} times about its middle, then the noise moved by {self.shift[0]:g} down and {self.shift[1]:g} right"


def shift_scores(scheme: TreeRing, noise: Tensor, covariance: np.ndarray, *, factor: int = 1) -> Tensor:
    """The whitened cosine of noise (B, C, h, w) with the key at every cyclic shift: (B, factor·h, factor·w) float64.

    Entry (y, x) is the score after the noise is shifted back by (y, x) / factor latent pixels; entry (0, 0) is the
    ordinary one. With F and K the transforms of noise and key, whitened by their null covariance (R, C, C) by ring,

        c(s) = Re Σ_k K*(k) F(k) e^{2πi k·s} / (‖F‖ ‖K‖)

    over the mask: shifts turn phases and leave ‖F‖ alone. A ring is compared by the means of its circles, which
    a shift does change, so that there the norm is taken at each shift. Fractional shifts come of padding the transform
    with zeros. Raises SchemeError for *zeros*, which knows no shift.
    """
    if scheme.pattern == "zeros":
        raise SchemeError("pattern 'zeros': is the same wherever the picture is moved; there is nothing to search")
    reached = scheme.inside | _mirror(scheme.inside)
    key = (scheme.spectrum + _mirror(scheme.spectrum).conj()) / 2
    transform = torch.fft.fft2(noise[:, list(scheme.placement.channels)].double().cpu(), norm="ortho")
    f, k = (_whiten(scheme, x, covariance) * reached for x in (transform, key[None]))
    if scheme.pattern == "ring" and scheme.mask_name == "centred":
        return _circle_scores(scheme, f, k, factor)
    length = (f.abs().square().sum((1, 2, 3)) * k.abs().square().sum()).sqrt()[:, None, None]
    return _ratio(_everywhere((k.conj() * f).sum(1), factor), length)


def _circle_scores(scheme: TreeRing, f: Tensor, k: Tensor, factor: int) -> Tensor:
    """Features are Σ / √n over the n bins of a circle, turned to the picture's middle, where the key is real."""
    low, high = scheme.placement.radii
    turn = middle_phase(*scheme.inside.shape).conj()
    dot, length, key_length = 0.0, 0.0, 0.0
    for radius in range(low, high + 1):
        circle = (scheme.ring == radius) * turn / (scheme.ring == radius).sum().sqrt()
        feature, key = _everywhere(f * circle, factor), (k * circle).real.sum((-2, -1))[..., None, None]
        dot, length = dot + (feature * key).sum(1), length + feature.square().sum(1)
        key_length = key_length + key.square().sum()
    return _ratio(dot, (length * key_length).sqrt())


def _ratio(dot: Tensor, length: Tensor) -> Tensor:
    """A vector of zeros has cosine 0."""
    return torch.where(length > 0, dot / length, 0.0).clamp(-1, 1)


def _everywhere(spectrum: Tensor, factor: int) -> Tensor:
    """Re Σ_k X(k) e^{2πi k·s} of (…, h, w) for every shift s on a grid `factor` times as fine."""
    height, width = spectrum.shape[-2:]
    before = [factor * n // 2 - n // 2 for n in (height, width)]
    after = [(factor - 1) * n - b for n, b in zip((height, width), before, strict=True)]
    centred = torch.fft.fftshift(spectrum, dim=(-2, -1))
    padded = functional.pad(centred, (before[1], after[1], before[0], after[0]))
    return torch.fft.ifft2(torch.fft.ifftshift(padded, dim=(-2, -1)), norm="forward").real


def _whiten(scheme: TreeRing, spectrum: Tensor, covariance: np.ndarray) -> Tensor:
    """L⁻¹ F on every bin of the marked channels (B, c, h, w), Σ = L Lᵀ the covariance (R, C, C) of its ring."""
    marked = np.array(scheme.placement.channels)
    root = np.linalg.inv(np.linalg.cholesky(covariance[:, marked[:, None], marked]))
    each = torch.from_numpy(root)[rings(*spectrum.shape[-2:])].to(spectrum)
    return torch.einsum("hwij,bjhw->bihw", each, spectrum)


def _mirror(x: Tensor) -> Tensor:
    """x(−k) in the unshifted order."""
    return x.flip(-2, -1).roll((1, 1), (-2, -1))


def best_shift(
    scheme: TreeRing, noise: Tensor, covariance: np.ndarray, *, factor: int = 2, within: Tensor | None = None
) -> Peak:
    """The shift at which noise (B, C, h, w) fits the key best: marked noise rolled by (y, x) is found at (y, x).

    Shifts are in [−h/2, h/2) and [−w/2, w/2), in steps of 1/factor; where `within` (B, factor·h, factor·w) is given,
    those for which it is true. Raises SchemeError as `shift_scores`.
    """
    scores = shift_scores(scheme, noise, covariance, factor=factor)
    height, width = scores.shape[1:]
    within = torch.ones_like(scores, dtype=torch.bool) if within is None else within
    best, at = scores.masked_fill(~within, -torch.inf).flatten(1).max(1)
    shift = torch.stack([_signed(height)[at // width], _signed(width)[at % width]], 1) / factor
    return Peak(best.numpy(), shift.numpy(), within.sum((1, 2)).numpy())


def _signed(n: int) -> Tensor:
    """0, 1, …, −2, −1: what each of n cyclic shifts is."""
    return (torch.arange(n) + n // 2) % n - n // 2


def window(candidates: list[Candidate], size: tuple[int, int], *, factor: int = 2, slack: float = 1.0) -> Tensor:
    """(B, factor·h, factor·w): the shifts that are worth a test once each candidate is undone, latents of `size` (h, w).

    A crop of 1/scale of the sides lies at most (1 − 1/scale)/2 of them off the middle, along axes turned by the angle;
    `slack` latent pixels are added, for what is between grid points. For the identity every shift is: nothing tells
    where a picture that was merely moved may be.
    """
    angle, scale = torch.tensor(candidates).double().T[..., None]
    room = (1 - 1 / scale).abs() / 2
    cos, sin = torch.deg2rad(angle).cos().abs(), torch.deg2rad(angle).sin().abs()
    (height, width), still = size, (angle == 0) & (scale == 1)
    rows = still | (_signed(factor * height).abs() / factor <= room * (height * cos + width * sin) + slack)
    columns = still | (_signed(factor * width).abs() / factor <= room * (width * cos + height * sin) + slack)
    return rows[:, :, None] & columns[:, None]


def undo(pictures: Tensor, candidates: list[Candidate], *, padding: str = "border") -> Tensor:
    """Each of the pictures (B, c, H, W) turned and shrunk back, one candidate each; bicubic, about the centre.

    What was outside is unknown: the nearest edge continued ("border") or "zeros". Of pictures the edge serves best:
    after 75° and after a crop of 75 % the mean cosines of 6 marked images were .46 and .40, with reflection .45 and
    .39, with the mean colour .42 and .33, with black .30 and .30.
    """
    places = functional.affine_grid(_matrices(candidates, *pictures.shape[-2:]), pictures.shape, align_corners=False)
    return functional.grid_sample(
        pictures, places.to(pictures), mode="bicubic", padding_mode=padding, align_corners=False
    )


def _matrices(candidates: list[Candidate], height: int, width: int) -> Tensor:
    """(B, 2, 3): where in the given picture each place of the undone one is, in coordinates from −1 to 1."""
    angle, scale = torch.tensor(candidates).double().T
    cos, sin = scale * torch.deg2rad(angle).cos(), scale * torch.deg2rad(angle).sin()
    none = torch.zeros_like(cos)
    rows = [torch.stack([cos, sin * height / width, none], 1), torch.stack([-sin * width / height, cos, none], 1)]
    return torch.stack(rows, 1).float()


@dataclass(frozen=True)
class Search:
    """Looks for keys on the grid angles × scales (degrees; times) and at all shifts in steps of 1/`factor` latent pixel.

    A picture costs 1 + `dear` inversions, whatever the number of keys; an inversion is one pass of the encoder and
    `steps` of the network, so that by default a picture costs 70 calls of the network where the ordinary detector's 25
    steps cost 25. Each key costs as many FFTs of the marked channels as the grid has points, 1800.

    The defaults come from pocket, marked at radii 7 to 9. Of the score after the right turn is undone 0.94, 0.70 and
    0.50 are left at 1°, 2° and 3° off, of that after the right scale 0.95 and 0.8 at 2 % and 4 %: the grid must be the
    finer the larger the mark's radii, angles by about 16°/radius. `inverter` is the encoder alone: a turned or cropped
    picture was not decoded from any latent, and what decoder inversion gains after turns it loses after crops.

    It does not look for mirror images nor for unequal scales of the sides, and the pattern *ring*, with one number a
    circle, has too few features to be significant among so many tests.
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
        return list(
            dict.fromkeys([IDENTITY, *(Candidate(float(a), float(s)) for a, s in product(self.angles, self.scales))])
        )

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
        self, detector: Detector, samples: Iterable[Sample], *, covariance: np.ndarray | None = None, batch: int = 8
    ) -> list[list[Found]]:
        """For each sample the best fit of each of the detector's keys, in their order.

        Of the detector its model and keys are taken; `covariance` (R, C, C) whitens in place of `null_covariance`.
        Raises SchemeError for a key of pattern *zeros*.
        """
        covariance = null_covariance(detector.model) if covariance is None else covariance
        reader = Detector(detector.model, [], inverter=self.inverter, steps=self.steps)
        samples, found = iter(samples), []
        while some := list(islice(samples, batch)):
            found += self._look(reader, detector.schemes, some, covariance, batch)
        return found

    def _look(
        self, reader: Detector, schemes: dict[str, TreeRing], samples: list[Sample], covariance: np.ndarray, batch: int
    ) -> list[list[Found]]:
        started = time.perf_counter()
        images = torch.from_numpy(np.stack([to_array(s.image) for s in samples]))
        tests, fits = self.tests(reader.model.latent_shape), []
        for image, noise in zip(images, _noise(reader, images), strict=True):
            tried = [IDENTITY, *self.promising(list(schemes.values()), noise, covariance)]
            noises = torch.cat([noise[None], *self._anew(reader, image, tried[1:], batch)])
            fits.append([self._fit(scheme, noises, tried, covariance, tests) for scheme in schemes.values()])
        seconds = (time.perf_counter() - started) / len(samples)
        return [
            [Found(s.id, key, *fit, tests, self.inversions, seconds) for key, fit in zip(schemes, row, strict=True)]
            for s, row in zip(samples, fits, strict=True)
        ]

    @staticmethod
    def _anew(reader: Detector, image: Tensor, candidates: list[Candidate], batch: int) -> list[Tensor]:
        """Noise of one image (3, H, W) after each candidate is undone on it, in batches."""
        parts = [candidates[i : i + batch] for i in range(0, len(candidates), batch)]
        return [_noise(reader, undo(image.expand(len(c), -1, -1, -1), c).clamp(-1, 1)) for c in parts]

    def promising(self, schemes: list[TreeRing], noise: Tensor, covariance: np.ndarray) -> list[Candidate]:
        """The `dear` candidates, the identity apart, that fit some key best in the turned noise (C, h, w), the best first.

        Keys may have different numbers of features, so that p-values rank them and not cosines.
        """
        others, p = self.grid[1:], []
        for start in range(0, len(others), CHUNK):
            some = others[start : start + CHUNK]
            turned = undo(noise.expand(len(some), -1, -1, -1), some, padding="zeros")
            peaks = [self.peak(scheme, turned, some, covariance) for scheme in schemes]
            p.append(np.min([cosine_p(x.score, _features(s)) for s, x in zip(schemes, peaks, strict=True)], 0))
        return [others[i] for i in np.argsort(np.concatenate(p), kind="stable")[: self.dear]] if p else []

    def peak(self, scheme: TreeRing, noise: Tensor, candidates: list[Candidate], covariance: np.ndarray) -> Peak:
        """The best shift, within its window, of each noise (B, C, h, w) of which a candidate was undone."""
        within = window(candidates, scheme.latent_shape[1:], factor=self.factor, slack=self.slack)
        return best_shift(scheme, noise, covariance, factor=self.factor, within=within)

    def _fit(
        self, scheme: TreeRing, noise: Tensor, candidates: list[Candidate], covariance: np.ndarray, tests: int
    ) -> tuple[float, float, Candidate, tuple[float, float]]:
        """Score, p-value, candidate and shift of one key's best fit."""
        score, shift, _ = self.peak(scheme, noise, candidates, covariance)
        best = int(score.argmax())
        p = float(maximum_p(score[best], _features(scheme), tests))
        return float(score[best]), p, candidates[best], tuple(shift[best].tolist())


CHUNK = 64  # candidates turned at once


def _features(scheme: TreeRing) -> int:
    """How many features a key has."""
    return len(scheme.feature_rings()[0])


def _noise(reader: Detector, images: Tensor) -> Tensor:
    """(B, C, h, w); what left the range of numbers is 0."""
    return torch.nan_to_num(reader.recover(images).noise, 0.0, 0.0, 0.0)
