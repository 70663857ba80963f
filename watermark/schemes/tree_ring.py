"""Tree-ring watermarks: a pattern in the Fourier transform of the initial noise (arXiv 2305.20030).

A mark's radii are in cycles per reference side, `side` pixels of the latent, whatever the size of the latents: ring r
has the same frequencies in cycles per pixel at every size and aspect ratio. A key's values at one size follow from its
secret by `keys.expansion`; those of circles are the same at every size.

The centred mask is symmetric about DC and its pattern Hermitian, so the embedded pattern is exactly the one that is
tested for. The published mask is one row off DC; taking the real part then discards about half of the pattern.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.watermark.keys.expansion import normal
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Array, Null, spectrum
from ringmark.watermark.schemes.bands import (
    LOW,
    check_budget,
    described,
    read_bands,
    read_placement,
    recommend_bands,
    whole_of,
)
from ringmark.watermark.schemes.base import Panel, SchemeTest, Waves
from ringmark.watermark.schemes.bins import Bins, bins_of
from ringmark.watermark.schemes.fourier import (
    BandedTest,
    CosineTest,
    Placement,
    middle_phase,
    mirror,
    recommend,
    signed_frequencies,
)
from ringmark.watermark.schemes.zeros import Neighbours, PowerTest
from ringmark.watermark.statistics import cosine_log10_p, fisher, published_distance, published_p_value

__all__ = ["MASKS", "PATTERNS", "TreeRing"]

PATTERNS = ("ring", "rand", "zeros")
MASKS = ("centred", "published")
FAINT = 0.99  # whitened cosine that no real picture reaches


def _unit_power(transform: Tensor, marked: Tensor) -> Tensor:
    """Scale each channel to mean power 1 on the mark, like white noise."""
    count = marked.sum((-2, -1), keepdim=True).clamp_min(1)
    power = transform.abs().square().sum((-2, -1), keepdim=True) / count
    return transform / power.clamp_min(1e-12).sqrt()


def _check_names(pattern: object, mask: object) -> None:
    if pattern not in PATTERNS or mask not in MASKS:
        raise SchemeError(
            "scheme.pattern",
            f"unknown; patterns are {', '.join(PATTERNS)}, masks {', '.join(MASKS)}",
            subject=f"pattern {pattern!r} with mask {mask!r}",
        )


def _placed(key: Key) -> tuple[Placement, tuple[Placement, ...]]:
    """A key's placement, and its bands if it has several. Raises SchemeError for a description that makes no sense."""
    meta = key.metadata
    if "bands" in meta and "channels" not in meta:
        bands = read_bands(meta["bands"])
        return whole_of(bands), bands
    whole = read_placement(meta)
    return whole, read_bands(meta.get("bands", []), whole)


def _check_bands(pattern: str, mask: str, bands: Sequence[Placement]) -> None:
    """Raises SchemeError for several bands of a mark that is always tested as a whole."""
    if len(bands) > 1 and (pattern == "zeros" or mask == "published"):
        raise SchemeError(
            "scheme.one-band", "must be one for the pattern zeros and for the published mask", subject="bands"
        )


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
        self.placement, self.bands = _placed(key)
        self._as_one = "channels" in meta  # then all channels have the same mask, as in older keys
        _check_bands(self.pattern, self.mask, self.bands)
        for part in (self.placement, *self.bands):
            part.check(key.latent_shape)
        self.latent_shape = latent_shape or key.latent_shape
        self.side = min(key.latent_shape[1:])
        self._secret, self._stored = key.secret, _stored(key, self.placement)
        self.bins = self._bins_of(self.placement)
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
        bands: list[Any] | None = None,
        budget: float | None = None,
    ) -> dict[str, Any]:
        """Pattern, placement and bands.

        They are chosen within the budget unless they are given. Given channels apply to all bands; given radii make one
        band. Raises SchemeError for bands that overlap or are given together with channels or radii.
        """
        _check_names(pattern, mask)
        limit = {} if budget is None else {"budget": budget}
        if bands is not None:
            if channels is not None or radii is not None:
                raise SchemeError("scheme.both", "have channels and radii of their own", subject="bands")
            parts = read_bands(bands)
        elif radii is None and (pattern, mask) == ("rand", "centred"):
            parts = recommend_bands(recovery, latent_shape, **limit)
        else:
            parts = (recommend(recovery, latent_shape, lows=(1,) if pattern == "rand" else None, **limit),)
        if channels is not None:
            parts = tuple(replace(part, channels=channels) for part in parts)
        if radii is not None:
            parts = tuple(replace(part, radii=radii) for part in parts)
        _check_bands(pattern, mask, parts)
        for part in parts:
            part.check(latent_shape)
        if budget is not None:
            check_budget(parts, latent_shape, budget)
        return {"pattern": pattern, "mask": mask} | described(parts)

    def _check_size(self) -> None:
        """Raises SchemeError for a cosine of fewer than two numbers, or for *zeros* without bins beside the mask."""
        zeros = self.pattern == "zeros"
        if self.numbers < (1 if zeros else 2) or (zeros and not self.neighbours.masks):
            (low, high), (_, height, width) = self.placement.radii, self.latent_shape
            fact = f"have too few frequencies at radii {low}-{high}, in cycles per {self.side} latent pixels"
            raise SchemeError("scheme.size", fact, subject=f"latents of {height}x{width}")

    @property
    def spectrum(self) -> Tensor:
        """The key's spectrum (c, h, w)."""
        return _expanded(self) if self._stored is None else self._stored

    def _drawn(self) -> list[Tensor]:
        """Of a key *rand*: (x + iy)/√2 on each row of each channel's mask, x on bins that are their own mirror."""
        _, height, width = self.latent_shape
        values = []
        for channel, bins in zip(self.placement.channels, self._layout.of_channels, strict=True):
            label = f"tree-ring rand {self.mask} {height}x{width} channel {channel}"
            drawn = _complex(normal(self._secret, label, 2 * len(bins.rows)))
            values.append(torch.where(bins.real_only, drawn.real * 2**0.5, drawn))
        return values

    def at_random(self) -> Tensor:
        """The values of `_drawn` (c, h, w), with their conjugates on the opposite bins."""
        _, height, width = self.latent_shape
        values = torch.zeros(len(self.placement.channels), height * width, dtype=torch.complex128)
        for of_channel, bins, drawn in zip(values, self._layout.of_channels, self._drawn(), strict=True):
            of_channel[bins.mirrored], of_channel[bins.rows] = drawn.conj(), drawn
        return values.view(-1, height, width)

    def on_circles(self) -> Tensor:
        """One value per radius; for the centred mask it is real, with phases relative to the middle."""
        _, height, width = self.latent_shape
        high, ring = self.placement.radii[1], self.ring.clamp_max(self.placement.radii[1])
        labels = [f"tree-ring ring {self.mask} channel {channel}" for channel in self.placement.channels]
        if self.mask == "published":
            return torch.stack([_complex(normal(self._secret, label, 2 * (high + 1)))[ring] for label in labels])
        values = torch.stack([torch.from_numpy(normal(self._secret, label, high + 1))[ring] for label in labels])
        return values * middle_phase(height, width)

    @staticmethod
    def recommend(recovery: NoiseRecovery | None, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
        """The bands of new keys with the default pattern, or their channels and radii if there is only one."""
        return described(recommend_bands(recovery, latent_shape))

    @property
    def ring(self) -> Tensor:
        """The ring (h, w) of each bin."""
        return self.bins.ring

    @property
    def inside(self) -> Tensor:
        """Mask (h, w) of the bins from the lowest to the highest ring of the mark."""
        return self.bins.inside

    @property
    def marked(self) -> Tensor:
        """Mask (c, h, w) of the bins that the mark takes in each of its channels."""
        return self._layout.marked

    @cached_property
    def _layout(self) -> _Layout:
        return _layout_of(self.mask, self.placement, self.parts, self._as_one, self.latent_shape[1:], self.side)

    @property
    def parts(self) -> tuple[Placement, ...]:
        """The bands, or the whole placement as one."""
        return self.bands or (self.placement,)

    @cached_property
    def _tested(self) -> tuple[Placement, ...]:
        """The parts, without bands that have fewer than two features on these latents and therefore no direction."""
        if not self.bands:
            return self.parts
        return tuple(band for band in self.bands if self._numbers_in(band) > 1)

    def _numbers_in(self, part: Placement) -> int:
        return self._bins_of(part).numbers * len(part.channels)

    def _bins_of(self, band: Placement) -> Bins:
        averaged = (self.pattern, self.mask) == ("ring", "centred")
        return bins_of(self.mask, band.radii, self.latent_shape[1:], self.side, averaged=averaged)

    def _positions(self, band: Placement) -> list[int]:
        """The positions of a band's channels among those of the mark."""
        return [self.placement.channels.index(channel) for channel in band.channels]

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
        marked = torch.where(self.marked, self.spectrum, self._transform(noise))
        out = noise.clone()
        out[:, list(self.placement.channels)] = torch.fft.ifft2(marked, norm="ortho").real.to(noise)
        return out

    @cached_property
    def neighbours(self) -> Neighbours:
        """The bins beside the mark, which *zeros* is compared with."""
        return Neighbours(self.bins, self.placement.radii, self.side)

    def check_findable(self, alpha: float) -> None:
        """Raises SchemeError for a key with too few free numbers for any realistic image to reach p ≤ alpha."""
        if not self.free:
            return
        numbers = list(map(self._numbers_in, self._tested))
        if min(numbers) < 2 or fisher([cosine_log10_p(np.array([FAINT]), n) for n in numbers])[0] > math.log10(alpha):
            raise SchemeError(
                "scheme.unfindable",
                f"a key has {self.free} free numbers, too few for any real picture to reach p ≤ {alpha:g}",
                subject=f"{self.label} in {'; '.join(map(str, self.parts))}",
            )

    def on(self, null: Null) -> SchemeTest:
        """The whitened cosine, of bands if the key has any, or for *zeros* the power ratio of whitened noise."""
        if self.pattern == "zeros":
            return PowerTest(
                whitened=partial(self.whitened, null=null),
                bins=self.bins,
                neighbours=self.neighbours,
                channels=len(self.placement.channels),
            )
        template, observe = _templates([self], null)[0], partial(self._observed, null)
        templates = partial(_templates, null=null)
        if not self.bands:
            return CosineTest(template=template, observe=observe, templates=templates)
        ends = list(accumulate((self._numbers_in(self._tested[i]) for i in self._under(null)), initial=0))
        bands = [slice(start, end) for start, end in pairwise(ends)]
        return BandedTest(template=template, observe=observe, templates=templates, bands=bands)

    def _under(self, null: Null) -> list[int]:
        """Indices of the parts that are tested under a null: not the low rings if the layout is unknown."""
        every = range(len(self._tested))
        above = [i for i in every if null.layout_known or self._tested[i].radii[0] > LOW[1]]
        return above or list(every)

    def _observed(self, null: Null, noise: Tensor) -> Array:
        """The features (B, d) of whitened noise (B, C, h, w)."""
        self._check_shape(noise)
        return self._whitened_features(self.tested_bins(null.centred(noise, self.placement.channels)), null)

    def _whitened_features(self, of_bands: Sequence[Tensor], null: Null) -> Array:
        """The features (B, d) of the bins (B, c, n) that are tested in each band, after whitening."""
        parts = []
        for i in self._under(null):
            band, bins = self._tested[i], self._bins_of(self._tested[i])
            white = null.whiten_bins(of_bands[i], band.channels, bins.tested, self.latent_shape[1:])
            parts.append(bins.features(white))
        return torch.cat(parts, 1).numpy()

    def tested_bins(self, transform: Tensor) -> list[Tensor]:
        """The bins (…, c, n) that are tested in each band, of a transform (…, c, h, w) of the marked channels."""
        flat = transform.flatten(-2)
        return [flat[..., self._positions(band), :][..., self._bins_of(band).tested] for band in self._tested]

    @cached_property
    def key_bins(self) -> list[Tensor]:
        """The Hermitian part of the key's spectrum on the bins (c, n) that are tested in each band."""
        if self._stored is None and (self.pattern, self.mask) == ("rand", "centred"):
            return self._drawn_bins()
        return self.tested_bins(self.hermitian)

    def _drawn_bins(self) -> list[Tensor]:
        """The same for the centred *rand*, without the spectrum, since there may be many keys."""
        scaled = []
        for drawn, weight in zip(self._drawn(), self._layout.weights, strict=True):
            power = (drawn.real.square() + drawn.imag.square()) @ weight
            scaled.append(drawn / power.clamp_min(1e-12).sqrt())
        found = []
        for band in self._tested:
            rows = self._bins_of(band).rows
            of_channels = [(scaled[i], self._layout.of_channels[i].rows) for i in self._positions(band)]
            found.append(torch.stack([values[torch.searchsorted(at, rows)] for values, at in of_channels]))
        return found

    def published(self, noise: Tensor) -> dict[str, Array]:
        """The L1 distance and the p-value of arXiv 2305.20030."""
        recovered, key = (x.numpy() for x in self.masked(noise))
        return {
            "published_distance": published_distance(recovered, key),
            "published_p": published_p_value(recovered, key),
        }

    def panels(self, noise: Tensor) -> list[Panel]:
        """Real spectra of the channel with most of the mark, of one noise (1, C, h, w) and of the key.

        Phases are relative to the middle of the picture, where a ring is real and constant along each circle.
        """
        most = int(self.marked.sum((1, 2)).argmax())
        title = f"recovered noise, channel {self.placement.channels[most]}"
        return [
            self._panel(title, self._transform(noise)[0, most], most),
            self._panel("key", self.spectrum[most], most),
        ]

    def key_panels(self) -> list[Panel]:
        """The key's real spectra, with phases as in `panels`."""
        pairs = zip(self.placement.channels, self.spectrum, strict=True)
        return [self._panel(f"channel {channel}", values, i) for i, (channel, values) in enumerate(pairs)]

    def _panel(self, title: str, values: Tensor, position: int) -> Panel:
        turned = values * middle_phase(*self.inside.shape).conj()
        shown = torch.fft.fftshift(turned).real.numpy() * 2**0.5
        channel = self.placement.channels[position]
        radii = whole_of([part for part in self.parts if channel in part.channels]).radii
        inside = np.fft.fftshift(self.marked[position].numpy())
        return Panel(title=title, values=shown, inside=inside, radii=radii, side=self.side)

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
        """Features (B, d) of a transform (B, c, h, w) of the marked channels, of unit variance for white noise."""
        pairs = zip(self._tested, self.tested_bins(transform), strict=True)
        return torch.cat([self._bins_of(band).features(values) for band, values in pairs], 1)

    @property
    def numbers(self) -> int:
        """The number d of features."""
        return sum(map(self._numbers_in, self._tested))

    def masked(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """All masked bins of noise (B, n) and key (n,), complex, in the published units (white noise has power h·w)."""
        scale = self.inside.numel() ** 0.5
        return self._transform(noise)[:, self.marked] * scale, self.spectrum[self.marked] * scale

    @property
    def waves(self) -> Waves | None:
        """The waves of *rand*. The other patterns have too few free numbers for a search, or none.

        They are those of the channels of the largest band, on all rings that are marked in each of them: the low rings
        of further channels are recovered less well, and a search found no more with them. Of a bin whose mirror image
        is outside the mask, the Hermitian part has a quarter of the variance, and in old keys, whose opposite bins were
        drawn independently, half of it.
        """
        if self.pattern != "rand":
            return None
        largest = max(self._tested, key=self._numbers_in)
        shared = [part for part in self._tested if set(part.channels) >= set(largest.channels)]
        insides = [self._bins_of(part).inside for part in shared]
        inside = torch.stack(insides).any(0)
        number = inside.double() + mirror(inside).double()
        _, height, width = self.latent_shape
        searched = self.bins.rows[(number.flatten() > 0)[self.bins.rows] & ~self.bins.real_only]
        down, right = (k.expand(height, width).flatten()[searched] for k in signed_frequencies(height, width))
        deviation = number if self._stored is None else number.sqrt()
        scale = middle_phase(height, width).conj() / deviation.clamp_min(1)
        values = self.hermitian[self._positions(largest)] * scale
        return Waves(
            channels=largest.channels,
            frequencies=torch.stack([right / width, down / height], 1),
            ring=self.ring.flatten()[searched],
            values=values.flatten(1)[:, searched],
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
    transform = scheme.at_random() if scheme.pattern == "rand" else scheme.on_circles()
    return _unit_power(transform * scheme.marked, scheme.marked)


class _Layout(NamedTuple):
    """What all keys of a kind share: `TreeRing.marked`, and for each channel its mask and the weights of its rows.

    The mask of a channel reaches from the lowest to the highest ring of the bands that include it. The weights of the
    rows are their shares of the bins that are marked in the channel.
    """

    marked: Tensor
    of_channels: list[Bins]
    weights: list[Tensor]


@lru_cache(maxsize=64)
def _layout_of(
    mask: str, whole: Placement, parts: tuple[Placement, ...], as_one: bool, size: tuple[int, int], side: int
) -> _Layout:
    marked, of_channels, weights = torch.zeros(len(whole.channels), *size, dtype=torch.bool), [], []
    for i, channel in enumerate(whole.channels):
        mine = [part for part in parts if channel in part.channels]
        for part in mine:
            marked[i] |= bins_of(mask, part.radii, size, side).inside
        bins = bins_of(mask, (whole if as_one else whole_of(mine)).radii, size, side)
        number = marked[i].flatten()[bins.rows].double() * torch.where(bins.real_only, 1.0, 2.0)
        of_channels.append(bins)
        weights.append(number / number.sum().clamp_min(1))
    return _Layout(marked=marked, of_channels=of_channels, weights=weights)


def _templates(schemes: Sequence[TreeRing], null: Null) -> Array:
    """The templates (K, d) of keys of one kind: the features of their whitened spectra."""
    of_bands = zip(*(scheme.key_bins for scheme in schemes), strict=True)
    return schemes[0]._whitened_features([torch.stack(bins) for bins in of_bands], null)
