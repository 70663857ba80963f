"""The search for keys in pictures that were rotated, enlarged, cropped, mirrored, stretched or shifted.

Cropping, mirroring, enlarging and stretching are searched in noise recovered from the picture as it is, because the
networks nearly commute with them. They do not commute with rotation, so the picture is turned back by every angle
between `anchors` and encoded; smaller angles are read from these latents. Pictures within the picture are encoded too.
A few network calls on the picture as it is, and on the angles and the pictures within that fit best, choose one of
them, and if that is promising, its noise is recovered in more steps and decides.

**p holds whatever the picture.** Let F be the waves that were read, scaled to unit power on each ring, and K those of
the key. A key's values are drawn independently of each other and of all pictures that do not carry it, so the direction
of K is uniform, and c = Re⟨F, K⟩ / (‖F‖ ‖K‖) is distributed as the cosine of any fixed direction with a uniform one. No
model of unmarked noise is needed. Only the noise that decides counts, with all tests that might have been made in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmark.data.batches import chunks, grouped
from ringmark.errors import SchemeError
from ringmark.inversion.decoder import INVERTERS, Inverter
from ringmark.inversion.memory import halving
from ringmark.inversion.recover import Model, Recoverer
from ringmark.watermark.detect.geometry import Candidate, Grid, Group, phases, read, spectrum, undo
from ringmark.watermark.null import Array
from ringmark.watermark.schemes.base import Scheme, Waves
from ringmark.watermark.statistics import cosine_log10_p

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = ["Found", "Search", "check_searchable"]

PRODUCTS = 1 << 24  # numbers in one matrix product
BLOCK = 128  # keys at a time


@dataclass(frozen=True)
class Found:
    """The best fit of one key in one picture.

    `score` is the cosine at `candidate` and `shift` (latent pixels right and down, after the candidate is undone), in a
    picture `within` the sample or in the sample itself. `log10_p` is corrected for the number of `tests` but not for
    the number of keys; it is 0 if nothing was promising. `calls` is the number of network calls for the sample, shared
    by all keys; `seconds` is the time of the search.
    """

    sample_id: str
    key: str
    score: float
    log10_p: float
    candidate: Candidate
    shift: tuple[float, float]
    tests: int
    calls: int
    seconds: float
    within: bool = False

    @property
    def p_value(self) -> float:
        """10 to the power of `log10_p`."""
        return 10**self.log10_p

    @property
    def note(self) -> str:
        """The transformation found: 'found by the search: rotated by 75°, enlarged 1.27 times'."""
        right, down = self.shift
        changes = ["a picture within this one"] if self.within else []
        changes += [self.candidate.note] if self.candidate.note else []
        changes += [f"noise shifted {down:g} down and {right:g} right"] if any(self.shift) else []
        return "found by the search: " + (", ".join(changes) or "unchanged")


@dataclass(frozen=True)
class Search:
    """Searches for keys among the changes of `grid`.

    The picture is encoded as it is and at `grid.anchors` angles, and so is each picture within it. The picture as it
    is, the `refined` best angles and as many of the pictures within it are encoded (the angles anew) and inverted in
    `early_steps`. The best of them is inverted in `steps`, after another pass of the encoder, if it is promising: if
    its corrected log₁₀ p is at most `limit`. By default `inverter` is the encoder alone: no latent decodes to a rotated
    or cropped picture.
    """

    grid: Grid = field(default_factory=Grid)
    refined: int = 2
    early_steps: int = 3
    steps: int = 10
    limit: float = -0.5
    inverter: Inverter = INVERTERS["encoder"]

    def __call__(
        self, model: Model, schemes: Mapping[str, Scheme], samples: Iterable[Sample], *, batch: int = 8
    ) -> list[list[Found]]:
        """The best fit of each key in each sample; `schemes` are by the keys' fingerprints and give the order.

        Raises SchemeError as `check_searchable` does.
        """
        check_searchable(schemes)
        run = _Run(search=self, model=model, schemes=schemes, batch=batch)
        return [fits for group in chunks(samples, batch) for fits in run.on(group)]


class View(NamedTuple):
    """A picture (3, H, W), by how many degrees it was turned back, and the groups that are read from its noise.

    `within` says that it was cut out of the sample.
    """

    image: Tensor
    angle: float
    groups: list[Group]
    within: bool = False


class Tested(NamedTuple):
    """The best shift of B candidates in V views for K keys, all (V, B, K): log₁₀ p, cosine and number of the shift."""

    log10_p: Array
    cosine: Array
    at: NDArray[np.int64]


class Fit(NamedTuple):
    """The best fit of one key: log₁₀ p corrected for `tests`, the cosine, the change and the shift."""

    log10_p: float
    score: float
    candidate: Candidate
    shift: tuple[float, float]
    tests: int
    within: bool


@dataclass(frozen=True, eq=False)
class _Keys:
    """Some keys of one kind: their numbers among all, their waves, and the values (K, c, n) of all of them."""

    numbers: list[int]
    waves: Waves
    values: Tensor
    _phases: dict[Group, Tensor] = field(default_factory=dict)

    def tested(self, noise: Tensor, groups: Sequence[Group]) -> list[Tested]:
        """The best shift of the candidates of each group in noise (V, C, h, w)."""
        spectra = spectrum(noise[:, list(self.waves.channels)])
        return [self._tested(spectra, group) for group in groups]

    def _tested(self, spectra: Tensor, group: Group) -> Tested:
        found = self._evened(read(spectra, group.candidates, self.waves.frequencies))
        products = torch.einsum("vbcn,kcn->vbkn", found, self.values.conj())
        if group not in self._phases:
            self._phases[group] = phases(self.waves.frequencies, group.shifts)
        rows = torch.cat([products.real, -products.imag], -1).flatten(0, 2)
        parts = torch.split(rows, max(1, PRODUCTS // len(group.shifts)))
        best = [(part @ self._phases[group]).max(1) for part in parts]
        value, at = (torch.cat(each).view(products.shape[:3]) for each in zip(*best, strict=True))
        length = found.abs().square().sum((2, 3)).sqrt()[..., None] * self.values.abs().square().sum((1, 2)).sqrt()
        cosine = torch.where(length > 0, value / length, 0.0).double().numpy()
        log10_p = cosine_log10_p(cosine, 2 * self.values[0].numel()) + math.log10(group.tests)
        return Tested(log10_p=log10_p, cosine=cosine, at=at.numpy())

    def _evened(self, found: Tensor) -> Tensor:
        """Waves (V, B, c, n) of unit mean power on each ring of each channel; 0 where there is none."""
        ring = self.waves.ring
        power = torch.zeros(*found.shape[:3], int(ring.max()) + 1).index_add_(3, ring, found.abs().square())
        return found * (power / torch.bincount(ring).clamp_min(1)).clamp_min(1e-20).rsqrt()[..., ring]


@dataclass(frozen=True, eq=False)
class _Run:
    """A search in progress, with its model and keys."""

    search: Search
    model: Model
    schemes: Mapping[str, Scheme]
    batch: int

    def on(self, samples: list[Sample]) -> list[list[Found]]:
        """The best fit of each key in each of these samples."""
        from ringmark.data.images import to_array

        started, search = time.perf_counter(), self.search
        rows = [
            self._views(torch.from_numpy(to_array(sample.image)))
            + self._cut_out([torch.from_numpy(to_array(part)) for part in sample.parts])
            for sample in samples
        ]
        fits = iter(self._fits([view for views in rows for view in views], search.early_steps))
        chosen = [min([(next(fits), view) for view in views], key=_least) for views in rows]
        limit = search.limit - math.log10(len(self.schemes))
        going = [i for i, each in enumerate(chosen) if _least(each) <= limit]
        last = dict(zip(going, self._fits([chosen[i][1] for i in going], search.steps), strict=True))
        seconds = (time.perf_counter() - started) / len(samples)
        return [
            [
                Found(
                    sample_id=sample.id,
                    key=key,
                    seconds=seconds,
                    calls=search.early_steps * len(rows[i]) + search.steps * (i in last),
                    **fit._replace(log10_p=min(0.0, fit.log10_p) if i in last else 0.0)._asdict(),
                )
                for key, fit in zip(self.schemes, last.get(i, chosen[i][0]), strict=True)
            ]
            for i, sample in enumerate(samples)
        ]

    def _views(self, image: Tensor) -> list[View]:
        """The image (3, H, W) as it is, and turned back by the angles at which a key fits its latents best."""
        angles = self._promising(self._noise(self._turned(image, self.search.grid.coarse_angles), 0))
        turned = zip(self._turned(image, angles), angles, strict=True)
        return [View(image, 0.0, self._upright), *(View(x, angle, self._at_one) for x, angle in turned)]

    def _cut_out(self, parts: list[Tensor]) -> list[View]:
        """The `refined` of the pictures (3, H, W) within a sample whose latents fit any key best."""
        groups = self.search.grid.within(self._size, len(parts))
        if len(parts) > self.search.refined:
            noise = self._noise(torch.stack(parts), 0)
            best = [t.log10_p.min((1, 2)) for keys in self._kinds for t in keys.tested(noise, groups)]
            parts = [parts[i] for i in np.argsort(np.min(best, 0))[: self.search.refined]]
        return [View(part, 0.0, groups, within=True) for part in parts]

    def _turned(self, image: Tensor, angles: Sequence[float]) -> Tensor:
        """The image turned back by each of these angles (V, 3, H, W)."""
        if not angles:
            return image[None][:0]
        return undo(image.expand(len(angles), -1, -1, -1), [Candidate(angle) for angle in angles]).clamp(-1, 1)

    @torch.inference_mode()
    def _noise(self, images: Tensor, steps: int) -> Tensor:
        """The noise of images (V, 3, H, W), recovered in this number of steps; 0 where it is not finite."""
        recoverer = Recoverer(self.model, self.search.inverter, steps)

        def recover(views: list[Tensor]) -> list[Tensor]:
            return list(torch.nan_to_num(recoverer(torch.stack(views)).noise, 0.0, 0.0, 0.0))

        parts = (halving(recover, list(part)) for part in torch.split(images, self.batch))
        return torch.stack([noise for part in parts for noise in part])

    def _fits(self, views: Sequence[View], steps: int) -> list[list[Fit]]:
        """The best fit of each key in each view, whose noise is recovered in this number of steps."""
        if not views:
            return []
        noise = self._noise(torch.stack([view.image for view in views]), steps)
        return [self._fit(view, each[None]) for view, each in zip(views, noise, strict=True)]

    def _fit(self, view: View, noise: Tensor) -> list[Fit]:
        """The best fit of each key in a view with this noise (1, C, h, w)."""
        best: dict[int, Fit] = {}
        for keys in self._kinds:
            tested = keys.tested(noise, view.groups)
            best |= {number: _best(view, tested, k) for k, number in enumerate(keys.numbers)}
        return [best[number] for number in range(len(self.schemes))]

    @cached_property
    def _kinds(self) -> list[_Keys]:
        schemes = list(self.schemes.values())
        kinds = grouped(range(len(schemes)), [scheme.kind for scheme in schemes])
        return [_keys(schemes, block) for numbers in kinds for block in chunks(numbers, BLOCK)]

    @cached_property
    def _upright(self) -> list[Group]:
        return self.search.grid.upright(self._size)

    @cached_property
    def _at_one(self) -> list[Group]:
        return self.search.grid.turned(self._size)

    @cached_property
    def _around(self) -> list[Group]:
        return self.search.grid.around(self._at_one)

    @property
    def _size(self) -> tuple[int, int]:
        return next(iter(self.schemes.values())).latent_shape[1:]

    def _promising(self, noise: Tensor) -> list[float]:
        """The `refined` angles at which any key fits best, no two of them neighbours, from noise at the coarse ones."""
        best: dict[float, float] = {}
        for keys in self._kinds:
            for group, tested in zip(self._around, keys.tested(noise, self._around), strict=True):
                for turn, row in zip(self.search.grid.coarse_angles, tested.log10_p.min(2), strict=True):
                    for candidate, log10_p in zip(group.candidates, row.tolist(), strict=True):
                        angle = (turn + candidate.angle) % 360
                        best[angle] = min(best.get(angle, math.inf), log10_p)
        chosen: list[float] = []
        near = 1.5 * self.search.grid.spacing
        for angle in sorted(best, key=best.__getitem__):
            if len(chosen) < self.search.refined and all(near < (angle - a) % 360 < 360 - near for a in chosen):
                chosen.append(angle)
        return chosen


def _least(fits_and_view: tuple[list[Fit], View]) -> float:
    """The smallest log₁₀ p of any key."""
    return min(fit.log10_p for fit in fits_and_view[0])


def _best(view: View, tested: Sequence[Tested], k: int) -> Fit:
    """The best fit of key number k in a view, from the tests of each of its groups."""
    group, found = min(zip(view.groups, tested, strict=True), key=lambda pair: pair[1].log10_p[0, :, k].min())
    i = int(found.log10_p[0, :, k].argmin())
    right, down = group.shifts[found.at[0, i, k]].tolist()
    candidate = group.candidates[i]
    return Fit(
        log10_p=float(found.log10_p[0, i, k]),
        score=float(found.cosine[0, i, k]),
        candidate=candidate._replace(angle=candidate.angle + view.angle),
        shift=(right, down),
        tests=group.tests,
        within=view.within,
    )


def check_searchable(schemes: Mapping[str, Scheme]) -> None:
    """Raises SchemeError for a key that cannot be searched for."""
    for name, scheme in schemes.items():
        if scheme.waves is None:
            fact = f"({scheme.label}) cannot be searched for"
            raise SchemeError("scheme.no-search", fact, subject=f"key {name[:8]}")


def _keys(schemes: Sequence[Scheme], numbers: list[int]) -> _Keys:
    """These of the schemes, which are of one kind."""
    waves = [each for number in numbers if (each := schemes[number].waves)]
    return _Keys(
        numbers=numbers, waves=waves[0], values=torch.stack([each.values for each in waves]).to(torch.complex64)
    )
