"""Tree-ring watermarks: a pattern in the Fourier transform of the initial noise (arXiv 2305.20030).

A mark's radii are in cycles per reference side, `side` pixels of the latent, whatever the size of the latents: ring r
has the same frequencies in cycles per pixel at every size and aspect ratio. A key's values at one size follow from its
secret by `keys.expansion`; those of circles are the same at every size.

The centred mask is symmetric about DC and its pattern Hermitian, so the embedded pattern is exactly the one that is
tested for. The published mask is one row off DC; taking the real part then discards about half of the pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import TIE, NoiseRecovery, radial_frequencies, rings
from ringmark.watermark.keys.expansion import normal
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Array, Null, spectrum
from ringmark.watermark.schemes.base import Panel, SchemeTest, Waves
from ringmark.watermark.schemes.fourier import (
    BUDGET,
    BandedTest,
    CosineTest,
    Placement,
    bands_of,
    middle_phase,
    mirror,
    recommend,
    signed_frequencies,
)
from ringmark.watermark.statistics import (
    cosine_bound,
    power_p,
    power_scores,
    published_distance,
    published_p_value,
    spread_p,
)

__all__ = ["MASKS", "PATTERNS", "PowerTest", "TreeRing"]

PATTERNS = ("ring", "rand", "zeros")
MASKS = ("centred", "published")
FAINT = 0.99  # whitened cosine that no real picture reaches
SIDE, LEAST_BESIDE = 2, 8  # rings on each side that *zeros* is compared with; minimum number of bins of a side


def ring_index(mask: str, height: int, width: int, side: int | None = None) -> Tensor:
    """The ring (h, w) int64 of each bin, in cycles per `side` pixels of the latent, by default its shorter side."""
    if mask == "centred":
        return rings(height, width, side)
    ky, kx = signed_frequencies(height, width)
    side = side or min(height, width)
    # Flipping y about an even number of rows puts the published centre at row h/2 − 1, where DC is at h/2.
    distance = torch.hypot((ky + 1 - height % 2) * side / height, kx * side / width)
    return (distance - TIE).ceil().clamp_min(1).long()


def _unit_power(transform: Tensor, inside: Tensor) -> Tensor:
    """Scale each channel to mean power 1 on the mask, like white noise."""
    power = transform.abs().square().sum((-2, -1), keepdim=True) / inside.sum()
    return transform / power.clamp_min(1e-12).sqrt()


def _check_names(pattern: object, mask: object) -> None:
    if pattern not in PATTERNS or mask not in MASKS:
        raise SchemeError(
            "scheme.pattern",
            f"unknown; patterns are {', '.join(PATTERNS)}, masks {', '.join(MASKS)}",
            subject=f"pattern {pattern!r} with mask {mask!r}",
        )


def _whole_numbers(metadata: Mapping[str, Any], field: str) -> tuple[int, ...]:
    """A field of a key's description. Raises SchemeError unless it is a list of whole numbers."""
    values = metadata.get(field)
    if not isinstance(values, list) or not all(type(n) is int for n in values):
        raise SchemeError("scheme.description", f"its {field} are not whole numbers", subject="key")
    return tuple(values)


def _bands(metadata: Mapping[str, Any], placement: Placement) -> tuple[tuple[int, int], ...]:
    """The bands of a key's description, none in most. Raises SchemeError unless each lies within the radii."""
    bands, (lowest, highest) = metadata.get("bands", []), placement.radii
    if not isinstance(bands, list) or not all(
        isinstance(band, list)
        and len(band) == 2
        and all(type(n) is int for n in band)
        and lowest <= band[0] <= band[1] <= highest
        for band in bands
    ):
        raise SchemeError("scheme.description", "its bands are not ranges within its radii", subject="key")
    return tuple((low, high) for low, high in bands)


def _is_range(band: object, radii: tuple[int, int]) -> bool:
    """Whether this is a list of two whole numbers in ascending order within the radii."""
    numbers = isinstance(band, list) and len(band) == 2 and all(type(n) is int for n in band)
    return bool(numbers and radii[0] <= band[0] <= band[1] <= radii[1])  # type: ignore[index]


def _lows(pattern: str) -> tuple[int, ...] | None:
    """The lowest radii that `recommend` chooses from.

    Independent values leave the noise white, so they may take the lowest rings, which survive crops. The other patterns
    would show in the picture there.
    """
    return (1,) if pattern == "rand" else None


def _complex(numbers: Array) -> Tensor:
    """Pairs of unit normal numbers (2n,) as complex numbers (n,) of unit power."""
    return torch.view_as_complex(torch.from_numpy(numbers).view(-1, 2)) / 2**0.5


def _stored(key: Key, placement: Placement) -> Tensor | None:
    """The spectrum (c, h, w) that an old key stores. Raises SchemeError unless its shape is as described."""
    if key.values is None:
        return None
    expected = (len(placement.channels), *key.latent_shape[1:], 2)
    if key.values.shape != expected:
        raise SchemeError(
            "scheme.values",
            f"its values have shape {key.values.shape}, but its description says {expected}",
            subject=f"key {key.fingerprint}",
        )
    return torch.view_as_complex(torch.from_numpy(key.values).double().contiguous())


class _Bins(NamedTuple):
    """The bins of a mask and radii: their rings and whether they are `inside` (h, w).

    `rows` are the flat indices of one bin of each conjugate pair in the mark; those that are their own mirror are
    `real_only`.
    """

    ring: Tensor
    inside: Tensor
    rows: Tensor
    real_only: Tensor


@lru_cache(maxsize=64)
def _bins_of(mask: str, radii: tuple[int, int], size: tuple[int, int], side: int) -> _Bins:
    """The bins on latents of this size (h, w), which all keys of a kind share."""
    ring = ring_index(mask, *size, side)
    inside = (ring >= radii[0]) & (ring <= radii[1])
    index = torch.arange(inside.numel()).view(size)
    mirrored = mirror(index)
    rows = index[(inside | mirror(inside)) & (index <= mirrored)]
    return _Bins(ring=ring, inside=inside, rows=rows, real_only=rows == mirrored.flatten()[rows])


@dataclass(frozen=True, eq=False)
class PowerTest:
    """A `SchemeTest` for the pattern *zeros*: the power that the mark's rings lack compared with their neighbours.

    Without references, p is that of white noise. With references it comes from their spread, since power differs more
    between rings than in white noise, even in unmarked images.
    """

    scheme: TreeRing
    null: Null

    @property
    def template(self) -> None:
        """None: the score is not a cosine."""
        return None

    def observe(self, noise: Tensor) -> Array:
        """Features of the mask, then the powers on its sides (B, d)."""
        transform = self.scheme.whitened(noise, self.null)
        power = transform.abs().square()
        parts = [self.scheme.features(transform), *(power[..., side].flatten(1) for side in self.scheme.sides)]
        return torch.cat(parts, 1).numpy()

    def score(self, observed: Array) -> Array:
        """The score s (B,) of `statistics.power_scores`."""
        channels = len(self.scheme.placement.channels)
        inside, *beside = np.split(
            observed, np.cumsum([self.scheme.numbers, *self._beside * channels]).astype(int)[:-1], axis=1
        )
        shaped = [part.reshape(len(observed), channels, -1) for part in (inside, *beside)]
        return power_scores(shaped[0], shaped[1:], self.scheme.side_weights)

    @property
    def _beside(self) -> Array:
        """The number of bins of each side per channel (sides,)."""
        return np.array([float(side.sum()) for side in self.scheme.sides])

    def log10_p(self, scores: Array, references: Array | None = None) -> Array:
        """From the spread of the references, or from the F-distribution of white noise without them."""
        if references is not None:
            p = spread_p(scores, references)
        else:
            channels = len(self.scheme.placement.channels)
            weights = self.scheme.side_weights
            p = power_p(scores, channels, self.scheme.numbers // channels, self._beside, weights)
        with np.errstate(divide="ignore"):
            return np.log10(p)

    def density(self, scores: Array) -> None:
        """None: not known in closed form."""
        return None


class TreeRing:
    """The tree-ring `Scheme` with one key. Raises SchemeError for a key that does not fit its own description."""

    def __init__(self, key: Key, latent_shape: tuple[int, int, int] | None = None) -> None:
        meta = key.metadata
        if meta["scheme"] != "tree-ring":
            raise SchemeError(
                "scheme.another",
                f"belongs to scheme {meta['scheme']!r}, not tree-ring",
                subject=f"key {key.fingerprint}",
            )
        self.pattern, self.mask = str(meta.get("pattern")), str(meta.get("mask"))
        _check_names(self.pattern, self.mask)
        channels, radii = _whole_numbers(meta, "channels"), _whole_numbers(meta, "radii")
        if len(radii) != 2:
            raise SchemeError("scheme.description", "its radii are not two numbers", subject=f"key {key.fingerprint}")
        self.placement = Placement(channels, (radii[0], radii[1]))
        self.placement.check(key.latent_shape)
        self.latent_shape = latent_shape or key.latent_shape
        self.side = min(key.latent_shape[1:])
        self.bands = _bands(meta, self.placement)
        self._secret, self._stored = key.secret, _stored(key, self.placement)
        bins = _bins_of(self.mask, self.placement.radii, self.latent_shape[1:], self.side)
        self.ring, self.inside, self._rows, self._real_only = bins
        self._check_size()

    @classmethod
    def fields(
        cls,
        latent_shape: tuple[int, int, int],
        *,
        recovery: NoiseRecovery | None = None,
        pattern: str = "rand",
        mask: str = "centred",
        channels: tuple[int, ...] | None = None,
        radii: tuple[int, int] | None = None,
        budget: float | None = None,
    ) -> dict[str, Any]:
        """Pattern, placement and bands.

        Channels and radii are chosen within the budget unless they are given. Radii that are given make one band.
        """
        best = recommend(recovery, latent_shape, budget=BUDGET if budget is None else budget, lows=_lows(pattern))
        placement = Placement(best.channels if channels is None else channels, best.radii if radii is None else radii)
        placement.check(latent_shape)
        if budget is not None:
            placement.check_budget(latent_shape, budget)
        _check_names(pattern, mask)
        banded = radii is None and (pattern, mask) == ("rand", "centred")
        bands = bands_of(placement.radii) if banded else ()
        return {
            "pattern": pattern,
            "mask": mask,
            "channels": list(placement.channels),
            "radii": list(placement.radii),
        } | ({"bands": list(map(list, bands))} if bands else {})

    def _check_size(self) -> None:
        """Raises SchemeError for latents without bins in the mask, or for *zeros* with too few beside it."""
        if not self.numbers or (self.pattern == "zeros" and not self.sides):
            (low, high), (_, height, width) = self.placement.radii, self.latent_shape
            fact = f"have too few frequencies at radii {low}-{high}, in cycles per {self.side} latent pixels"
            raise SchemeError("scheme.size", fact, subject=f"latents of {height}x{width}")

    @property
    def spectrum(self) -> Tensor:
        """The key's spectrum (c, h, w)."""
        return _expanded(self) if self._stored is None else self._stored

    def at_random(self, channel: int) -> Tensor:
        """(x + iy)/√2 on the first bin of each conjugate pair, in the order of rows; x on bins that are their own."""
        _, height, width = self.latent_shape
        label = f"tree-ring rand {self.mask} {height}x{width} channel {channel}"
        drawn = _complex(normal(self._secret, label, 2 * len(self._rows)))
        half = torch.zeros(height * width, dtype=torch.complex128)
        half[self._rows] = torch.where(self._real_only, drawn.real * 2**0.5 / 2, drawn)
        half = half.view(height, width)
        return half + mirror(half).conj()

    def on_circles(self, channel: int) -> Tensor:
        """One value per radius; for the centred mask it is real, with phases relative to the middle."""
        _, height, width = self.latent_shape
        high = self.placement.radii[1]
        label, ring = f"tree-ring ring {self.mask} channel {channel}", self.ring.clamp_max(high)
        if self.mask == "published":
            return _complex(normal(self._secret, label, 2 * (high + 1)))[ring]
        return torch.from_numpy(normal(self._secret, label, high + 1))[ring] * middle_phase(height, width)

    @staticmethod
    def recommend(recovery: NoiseRecovery | None, latent_shape: tuple[int, int, int]) -> dict[str, list[int]]:
        """Channels and radii of new keys with the default pattern, where the noise is recovered best."""
        best = recommend(recovery, latent_shape, lows=_lows("rand"))
        return {"channels": list(best.channels), "radii": list(best.radii)}

    @property
    def label(self) -> str:
        """The pattern, and the mask unless it is the centred one."""
        return self.pattern if self.mask == "centred" else f"{self.pattern}, {self.mask} mask"

    @property
    def kind(self) -> tuple[object, ...]:
        """Pattern, mask, placement, bands, and the latents and reference side that give them a meaning."""
        return ("tree-ring", self.pattern, self.mask, self.placement, self.bands, self.latent_shape, self.side)

    @property
    def free(self) -> int:
        """The number of real numbers that distinguish keys."""
        return 0 if self.pattern == "zeros" else self.numbers

    @property
    def score_name(self) -> str:
        """The name of the score."""
        if self.pattern == "zeros":
            return "power ratio"
        return "−log₁₀ p" if self.bands else "whitened cosine"

    def embed(self, noise: Tensor) -> Tensor:
        """Replace the masked bins by the key's and transform back; exact for the centred mask only (see the module).

        Raises SchemeError for noise of another shape.
        """
        marked = torch.where(self.inside, self.spectrum, self._transform(noise))
        out = noise.clone()
        out[:, list(self.placement.channels)] = torch.fft.ifft2(marked, norm="ortho").real.to(noise)
        return out

    def check_findable(self, alpha: float) -> None:
        """Raises SchemeError for a key with too few free numbers for any realistic image to reach p ≤ alpha."""
        if self.free and (self.free < 2 or cosine_bound(self.free, alpha) > FAINT):
            raise SchemeError(
                "scheme.unfindable",
                f"a key has {self.free} free numbers, too few for any real picture to reach p ≤ {alpha:g}",
                subject=f"{self.label} in {self.placement}",
            )

    def on(self, null: Null) -> SchemeTest:
        """The whitened cosine, of bands if the key has any, or for *zeros* the power ratio of whitened noise."""
        if self.pattern == "zeros":
            return PowerTest(self, null)
        template, observe = _templates([self], null)[0], partial(self._observed, null)
        templates = partial(_templates, null=null)
        if not self.bands:
            return CosineTest(template=template, observe=observe, templates=templates)
        return BandedTest(template=template, observe=observe, templates=templates, bands=self._features_of_bands)

    @property
    def _features_of_bands(self) -> list[NDArray[np.int64]]:
        """The positions of each band's features among all."""
        ring = self.ring.flatten()[self._rows]
        of_channel = torch.cat([ring, ring[~self._real_only]]).repeat(len(self.placement.channels)).numpy()
        return [np.flatnonzero((of_channel >= low) & (of_channel <= high)) for low, high in self.bands]

    def _observed(self, null: Null, noise: Tensor) -> Array:
        """The features (B, d) of whitened noise (B, C, h, w)."""
        self._check_shape(noise)
        transform = null.centred(noise, self.placement.channels)
        return self._whitened_features(transform.flatten(2)[..., self._tested], null)

    def _whitened_features(self, bins: Tensor, null: Null) -> Array:
        """The features (B, d) of whitened bins (B, c, n), those that are tested."""
        white = null.whiten_bins(bins, self.placement.channels, self._tested, self.latent_shape[1:])
        return self._features(white).numpy()

    @cached_property
    def key_bins(self) -> Tensor:
        """The Hermitian part of the key's spectrum on the bins that are tested (c, n)."""
        return self.hermitian.flatten(1)[:, self._tested]

    def published(self, noise: Tensor) -> dict[str, Array]:
        """The L1 distance and the p-value of arXiv 2305.20030."""
        recovered, key = (x.numpy() for x in self.masked(noise))
        return {
            "published_distance": published_distance(recovered, key),
            "published_p": published_p_value(recovered, key),
        }

    def panels(self, noise: Tensor) -> list[Panel]:
        """Real spectra of the first marked channel of one noise (1, C, h, w) and of the key.

        Phases are relative to the middle of the picture, where a ring is real and constant along each circle.
        """
        title = f"recovered noise, channel {self.placement.channels[0]}"
        return [self._panel(title, self._transform(noise)[0, 0]), self._panel("key", self.spectrum[0])]

    def key_panels(self) -> list[Panel]:
        """The key's real spectra, with phases as in `panels`."""
        pairs = zip(self.placement.channels, self.spectrum, strict=True)
        return [self._panel(f"channel {channel}", values) for channel, values in pairs]

    def _panel(self, title: str, values: Tensor) -> Panel:
        turned = values * middle_phase(*self.inside.shape).conj()
        shown = torch.fft.fftshift(turned).real.numpy() * 2**0.5
        inside = np.fft.fftshift(self.inside.numpy())
        return Panel(title=title, values=shown, inside=inside, radii=self.placement.radii, side=self.side)

    @property
    def _reached(self) -> Tensor:
        """Mask (h, w) of the masked bins and their conjugates."""
        return self.inside | mirror(self.inside)

    @property
    def hermitian(self) -> Tensor:
        """The Hermitian part of the key's spectrum, which remains after taking the real part."""
        spectrum = self.spectrum
        return (spectrum + mirror(spectrum).conj()) / 2

    def whitened(self, noise: Tensor, null: Null) -> Tensor:
        """Whitened transform (B, c, h, w) of the marked channels. Raises SchemeError for noise of another shape."""
        self._check_shape(noise)
        return null.whitened(noise, self.placement.channels)

    def _transform(self, noise: Tensor) -> Tensor:
        self._check_shape(noise)
        return spectrum(noise, self.placement.channels)

    def _check_shape(self, noise: Tensor) -> None:
        if noise.ndim != 4 or tuple(noise.shape[1:]) != self.latent_shape:
            needed = ", ".join(map(str, self.latent_shape))
            raise SchemeError(
                "scheme.noise", f"this key needs shape (B, {needed})", subject=f"noise {tuple(noise.shape)}"
            )

    def features(self, transform: Tensor) -> Tensor:
        """Features (B, d) of a transform (B, c, h, w) of the marked channels, of unit variance for white noise.

        They are the real and imaginary parts of independent bins. For a ring, they are one mean per circle: ring keys
        are constant on circles, and a test on every bin would confuse two of them.
        """
        return self._features(transform.flatten(2)[..., self._tested])

    def _features(self, bins: Tensor) -> Tensor:
        """The same, of the bins (B, c, n) that are tested."""
        return self._circles(bins) if self._averages else self._parts(bins)

    @property
    def _tested(self) -> Tensor:
        """Flat indices (n,) of the bins that features depend on."""
        return self.inside.flatten().nonzero().flatten() if self._averages else self._rows

    @property
    def numbers(self) -> int:
        """The number d of features."""
        each = len(self._circles_present) if self._averages else 2 * len(self._rows) - int(self._real_only.sum())
        return each * len(self.placement.channels)

    @property
    def _circles_present(self) -> Tensor:
        """The rings of the mask that have bins, which small latents lack between whole frequencies."""
        return torch.bincount(self.ring[self.inside]).nonzero().flatten()

    @property
    def _averages(self) -> bool:
        return self.pattern == "ring" and self.mask == "centred"

    def _parts(self, bins: Tensor) -> Tensor:
        real = bins.real * torch.where(self._real_only, 1.0, 2**0.5)
        imaginary = bins.imag[..., ~self._real_only] * 2**0.5
        return torch.cat([real, imaginary], -1).flatten(1)

    def _circles(self, bins: Tensor) -> Tensor:
        """Σ / √n over the n bins of each circle, with phases relative to the middle, where conjugate bins are equal."""
        turned = (bins * middle_phase(*self.inside.shape).conj()[self.inside]).real
        circle = torch.bucketize(self.ring[self.inside], self._circles_present)
        count = torch.bincount(circle)
        total = torch.zeros(*turned.shape[:-1], len(count), dtype=turned.dtype).index_add_(-1, circle, turned)
        return (total / count.sqrt()).flatten(1)

    @property
    def sides(self) -> list[Tensor]:
        """Masks (h, w): SIDE rings inside the mark, if they have LEAST_BESIDE bins, and SIDE rings outside it."""
        low, high = self.placement.radii
        spans = ((low - SIDE, low - 1), (high + 1, high + SIDE))
        bands = [(first <= self.ring) & (self.ring <= last) & (self._frequency > 0) for first, last in spans]
        within, beyond = ((band | mirror(band)) & ~self._reached for band in bands)
        both = within & beyond  # can overlap, because the published mask is not its own mirror
        return [side for side in (within & ~both, beyond & ~both) if side.sum() >= LEAST_BESIDE]

    @property
    def side_weights(self) -> Array:
        """Weights w (sides,) with Σ w = 1 and, for two sides, Σ w L = the mask's L, where L is the mean log frequency.

        If power follows a power law in frequency, Σ w log(power of a side) is then the log power of the mask. A mask
        without rings inside is compared directly with those outside: its p is too large if power falls with frequency,
        as it does in attacked pictures, and too small if power rises.
        """
        mask, (first, *second) = self._log_frequency(self._reached), list(map(self._log_frequency, self.sides))
        share = (second[0] - mask) / (second[0] - first) if second else 1.0
        return np.array([share, 1 - share][: 1 + len(second)])

    def _log_frequency(self, where: Tensor) -> float:
        return float(self._frequency[where & (self._frequency > 0)].log().mean())

    @property
    def _frequency(self) -> Tensor:
        """Distance (h, w) from DC, in the unit of radii."""
        return radial_frequencies(*self.latent_shape[1:], self.side)

    def masked(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """All masked bins of noise (B, n) and key (n,), complex, in the published units (white noise has power h·w)."""
        scale = self.inside.numel() ** 0.5
        recovered = self._transform(noise)[..., self.inside].flatten(1)
        return recovered * scale, self.spectrum[..., self.inside].flatten() * scale

    @property
    def waves(self) -> Waves | None:
        """The waves of *rand*. The other patterns have too few free numbers for a search, or none.

        Of a bin whose mirror image is outside the mask, the Hermitian part has half the variance.
        """
        if self.pattern != "rand":
            return None
        _, height, width = self.latent_shape
        rows, down_right = self._rows[~self._real_only], signed_frequencies(height, width)
        down, right = (k.expand(height, width).flatten()[rows] for k in down_right)
        number = self.inside.double() + mirror(self.inside).double()
        values = self.hermitian * middle_phase(height, width).conj() / number.clamp_min(1).sqrt()
        return Waves(
            channels=self.placement.channels,
            frequencies=torch.stack([right / width, down / height], 1),
            ring=self.ring.flatten()[rows],
            values=values.flatten(1)[:, rows],
        )


@lru_cache(maxsize=128)  # a spectrum is large: those of 100 000 keys of 4×64×64 latents have 6.6 GB a channel
def _expanded(scheme: TreeRing) -> Tensor:
    """The spectrum (c, h, w) of a key on its latents, zero outside the mask, of unit mean power on it.

    rand: independent values on the bins of the mask, so that marked noise is still white noise. ring: one value per
    circle, which survives flips and rotations about the centre of the picture, at the price of few free numbers and a
    bump in the middle of the noise. zeros: all zero, so all keys are the same.
    """
    channels = scheme.placement.channels
    if scheme.pattern == "zeros":
        return torch.zeros(len(channels), *scheme.latent_shape[1:], dtype=torch.complex128)
    of_channel = scheme.at_random if scheme.pattern == "rand" else scheme.on_circles
    transform = torch.stack([of_channel(channel) for channel in channels])
    return _unit_power(transform * scheme.inside, scheme.inside)


def _templates(schemes: Sequence[TreeRing], null: Null) -> Array:
    """The templates (K, d) of keys of one kind: the features of their whitened spectra."""
    return schemes[0]._whitened_features(torch.stack([scheme.key_bins for scheme in schemes]), null)
