"""Tree-ring watermarks: a pattern in the Fourier transform of the initial noise (arXiv 2305.20030).

Transforms are orthonormal, so that a bin of white noise has unit power. Masks and spectra are in the unshifted order
of torch.fft. The centred mask is symmetric about DC and its pattern Hermitian, so what is embedded is what is looked
for. The published mask sits one row off DC; taking the real part then discards about half of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import NoiseRecovery, rings
from ringmark.watermark.keys.key import Key

__all__ = ["MASKS", "PATTERNS", "Placement", "TreeRing", "draw_spectrum", "make_key", "recommend"]

PATTERNS = ("ring", "rand", "zeros")
MASKS = ("centred", "published")
SIDE, LEAST_BESIDE = 2, 8  # rings on each side that *zeros* is compared with; the fewest bins that make a side


@dataclass(frozen=True)
class Placement:
    """Where the mark goes: latent channels and, inclusive, the range of ring radii in whole frequencies."""

    channels: tuple[int, ...]
    radii: tuple[int, int]

    def check(self, latent_shape: tuple[int, int, int]) -> None:
        """Raises SchemeError unless the placement fits a latent (C, h, w)."""
        count, *size = latent_shape
        low, high = self.radii
        if (
            not self.channels
            or len(set(self.channels)) < len(self.channels)
            or not all(0 <= c < count for c in self.channels)
        ):
            raise SchemeError(f"channels {list(self.channels)}: must be different numbers from 0 to {count - 1}")
        # DC alone is one number, which has no direction to compare.
        if not 0 <= low <= high < min(size) // 2 or high == 0:
            raise SchemeError(
                f"radii {low}-{high}: must rise, from 0 at least to between 1 and {min(size) // 2 - 1} for latents of {size[0]}x{size[1]}"
            )

    def share(self, latent_shape: tuple[int, int, int]) -> float:
        """Of the coefficients of a latent (C, h, w), how large a part the mark alters."""
        count, *size = latent_shape
        sizes = torch.bincount(rings(*size).flatten())
        return int(sizes[self.radii[0] : self.radii[1] + 1].sum()) * len(self.channels) / (count * size[0] * size[1])

    def check_budget(self, latent_shape: tuple[int, int, int], budget: float) -> None:
        """Raises SchemeError where the mark alters a larger share of the coefficients than this."""
        if (share := self.share(latent_shape)) > budget:
            raise SchemeError(
                f"budget {budget:g}: channels {list(self.channels)}, radii {self.radii[0]}-{self.radii[1]} alter {share:.3g} of the coefficients; raise --budget, or give --channels and --radii"
            )


def signed_frequencies(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Whole frequencies (h, 1) and (1, w) of an unshifted DFT."""
    return torch.fft.fftfreq(height, 1 / height)[:, None], torch.fft.fftfreq(width, 1 / width)[None]


def ring_index(mask: str, height: int, width: int) -> Tensor:
    """(h, w) int64: the ring each bin belongs to; -1 for none."""
    if mask == "centred":
        return rings(height, width)
    ky, kx = signed_frequencies(height, width)
    # Flipping y about an even number of rows puts the published centre at row h/2 − 1, where DC is at h/2.
    return torch.hypot(ky + 1 - height % 2, kx).ceil().clamp_min(1).long()


def draw_spectrum(
    pattern: str, mask: str, placement: Placement, latent_shape: tuple[int, int, int], rng: np.random.Generator
) -> Tensor:
    """A key's complex spectrum (len(channels), h, w), zero outside the mask, of unit mean power on it.

    rand: the transform of white noise, so that marked noise is white noise still; ring: one Gaussian value a circle,
    the same all along it, so that flips and rotations about the image's centre keep it, at the price of few free
    numbers and of a bump in the middle of the noise; zeros: nothing, which is no secret either.
    """
    _, height, width = latent_shape
    ring, channels = ring_index(mask, height, width), len(placement.channels)
    inside = (ring >= placement.radii[0]) & (ring <= placement.radii[1])
    white = torch.fft.fft2(torch.from_numpy(rng.normal(size=(channels, height, width))), norm="ortho")
    if pattern == "zeros":
        return torch.zeros_like(white)
    if pattern == "rand":
        return _unit_power(white * inside, inside)
    values = rng.normal(size=(channels, int(ring.max()) + 1))
    if mask == "published":
        complex_values = torch.from_numpy((values + 1j * rng.normal(size=values.shape)) / 2**0.5)
        return _unit_power(complex_values[:, ring] * inside, inside)
    return _unit_power(torch.from_numpy(values)[:, ring] * middle_phase(height, width) * inside, inside)


def middle_phase(height: int, width: int) -> Tensor:
    """(h, w) the phases that move a pattern from the corner to the middle of the picture, about which it is turned and flipped."""
    ky, kx = (k.double() for k in signed_frequencies(height, width))
    return torch.exp(-1j * torch.pi * (ky * (height - 1) / height + kx * (width - 1) / width))


def _unit_power(spectrum: Tensor, inside: Tensor) -> Tensor:
    """Scale each channel to mean power 1 on the mask, which is what white noise has there."""
    power = spectrum.abs().square().sum((-2, -1), keepdim=True) / inside.sum()
    return spectrum / power.clamp_min(1e-12).sqrt()


def make_key(
    latent_shape: tuple[int, int, int],
    placement: Placement,
    *,
    model: dict,
    pattern: str = "rand",
    mask: str = "centred",
    rng: np.random.Generator | None = None,
) -> Key:
    """A new key; values come from the operating system's generator unless `rng` is given (tests and experiments only)."""
    placement.check(latent_shape)
    _check_names(pattern, mask)
    spectrum = draw_spectrum(pattern, mask, placement, latent_shape, rng or Key.system_rng())
    values = torch.view_as_real(spectrum).float().numpy()
    return Key.new(
        values,
        scheme="tree-ring",
        pattern=pattern,
        mask=mask,
        channels=list(placement.channels),
        radii=list(placement.radii),
        latent_shape=list(latent_shape),
        model=model,
    )


def _check_names(pattern: str, mask: str) -> None:
    if pattern not in PATTERNS or mask not in MASKS:
        raise SchemeError(
            f"pattern {pattern!r} with mask {mask!r}: patterns are {', '.join(PATTERNS)}, masks {', '.join(MASKS)}"
        )


class TreeRing:
    """The scheme with one key in it. Raises SchemeError for a key of another scheme and for noise of another shape."""

    def __init__(self, key: Key) -> None:
        meta = key.metadata
        if meta["scheme"] != "tree-ring":
            raise SchemeError(f"key {key.fingerprint}: its scheme {meta['scheme']!r} is not tree-ring")
        self.pattern, self.mask_name = meta["pattern"], meta["mask"]
        self.kind = (self.pattern, self.mask_name, tuple(meta["channels"]), tuple(meta["radii"]))
        _check_names(self.pattern, self.mask_name)
        self.placement = Placement(tuple(meta["channels"]), tuple(meta["radii"]))
        self.latent_shape = tuple(meta["latent_shape"])
        self.placement.check(self.latent_shape)
        _, height, width = self.latent_shape
        expected = (len(self.placement.channels), height, width, 2)
        if key.values.shape != expected:
            raise SchemeError(
                f"key {key.fingerprint}: its values have shape {key.values.shape}, its description says {expected}"
            )
        self.spectrum = torch.view_as_complex(torch.from_numpy(key.values).double().contiguous())
        self.ring = ring_index(self.mask_name, height, width)
        self.inside = (self.ring >= self.placement.radii[0]) & (self.ring <= self.placement.radii[1])
        self._rows, self._real_only = self._independent_bins()

    def _independent_bins(self) -> tuple[Tensor, Tensor]:
        """Flat indices of one bin of each conjugate pair that the mark reaches, and which of them are their own mirror."""
        height, width = self.inside.shape
        index = torch.arange(height * width).view(height, width)
        mirror = self._mirror(index)
        rows = index[self._reached & (index <= mirror)]
        return rows, rows == mirror.flatten()[rows]

    @property
    def _reached(self) -> Tensor:
        """(h, w) the masked bins and their conjugates."""
        return self.inside | self._mirror(self.inside)

    @staticmethod
    def _mirror(x: Tensor) -> Tensor:
        """x(−k) in the unshifted order."""
        return x.flip(-2, -1).roll((1, 1), (-2, -1))

    def _transform(self, noise: Tensor) -> Tensor:
        if noise.ndim != 4 or tuple(noise.shape[1:]) != self.latent_shape:
            raise SchemeError(
                f"noise {tuple(noise.shape)}: this key needs (B, {', '.join(map(str, self.latent_shape))})"
            )
        return torch.fft.fft2(noise[:, list(self.placement.channels)].double().cpu(), norm="ortho")

    def embed(self, noise: Tensor) -> Tensor:
        """Replace the masked bins by the key's and go back; exact for the centred mask, see the module's text for the other."""
        marked = torch.where(self.inside, self.spectrum, self._transform(noise))
        out = noise.clone()
        out[:, list(self.placement.channels)] = torch.fft.ifft2(marked, norm="ortho").real.to(noise)
        return out

    def features(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """What a key leaves free, scaled to unit variance on white noise: (B, d) and (d,).

        Real and imaginary parts on independent bins; for a ring one mean a circle, since its key is constant there:
        two ring keys differ in no more than that, and a test on every bin would take one for the other. The key is the
        Hermitian part of its spectrum, which is what taking the real part leaves of it.
        """
        key = (self.spectrum + self._mirror(self.spectrum).conj()) / 2
        stack = self._circles if self._averages else self._bins
        return stack(self._transform(noise)), stack(key[None])[0]

    @property
    def _averages(self) -> bool:
        return self.pattern == "ring" and self.mask_name == "centred"

    def aligned(self, noise: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """For the eye: real spectra (h, w), DC in the middle, of the first marked channel of one noise and of the key.

        Turned to the phase of the image's middle, where a ring is real and the same all along its circle.
        """
        height, width = self.inside.shape
        turn = middle_phase(height, width).conj()
        both = torch.stack([self._transform(noise)[0, 0], self.spectrum[0]]) * turn
        return tuple(torch.fft.fftshift(both, dim=(-2, -1)).real.numpy() * 2**0.5)

    def drawn(self) -> np.ndarray:
        """For the eye: the key's real spectra (channels, h, w), DC in the middle, turned like `aligned`."""
        turned = self.spectrum * middle_phase(*self.inside.shape).conj()
        return torch.fft.fftshift(turned, dim=(-2, -1)).real.numpy() * 2**0.5

    def _bins(self, spectrum: Tensor) -> Tensor:
        bins = spectrum.flatten(2)[..., self._rows]
        real = bins.real * torch.where(self._real_only, 1.0, 2**0.5)
        imaginary = bins.imag[..., ~self._real_only] * 2**0.5
        return torch.cat([real, imaginary], -1).flatten(1)

    def _circles(self, spectrum: Tensor) -> Tensor:
        """Σ / √n over the n bins of each circle, turned to the image's middle, where conjugate bins are equal and real."""
        turned = (spectrum * middle_phase(*self.inside.shape).conj()).real[..., self.inside]
        circle = self.ring[self.inside] - self.placement.radii[0]
        count = torch.bincount(circle)
        total = torch.zeros(*turned.shape[:-1], len(count), dtype=turned.dtype).index_add_(-1, circle, turned)
        return (total / count.sqrt()).flatten(1)

    def feature_rings(self) -> tuple[Tensor, Tensor]:
        """For each feature (d,): its latent channel, and its ring about DC (the published mask's rings are not about DC)."""
        if self._averages:
            ring = torch.arange(self.placement.radii[0], self.placement.radii[1] + 1)
        else:
            ring = rings(*self.inside.shape).flatten()[self._rows]
            ring = torch.cat([ring, ring[~self._real_only]])
        channels = torch.tensor(self.placement.channels)
        return channels.repeat_interleave(len(ring)), ring.repeat(len(channels))

    def beside(self, noise: Tensor) -> list[Tensor]:
        """Powers (B, C, n) of the marked channels' bins next to the mask, conjugates too: what *zeros* is compared with.

        One tensor for each of `_sides`.
        """
        power = self._transform(noise).abs().square()
        return [power[..., side] for side in self._sides]

    @property
    def _sides(self) -> list[Tensor]:
        """(h, w) each: SIDE rings within the mask, if those have LEAST_BESIDE bins, and SIDE rings beyond it."""
        low, high = self.placement.radii
        spans = ((low - SIDE, low - 1), (high + 1, high + SIDE))
        bands = [(first <= self.ring) & (self.ring <= last) & (self._frequency > 0) for first, last in spans]
        within, beyond = ((band | self._mirror(band)) & ~self._reached for band in bands)
        both = within & beyond  # the published mask is not its own mirror
        return [side for side in (within & ~both, beyond & ~both) if side.sum() >= LEAST_BESIDE]

    @property
    def side_weights(self) -> np.ndarray:
        """(sides,): w with Σ w = 1 and, where there are two sides, Σ w L = the mask's L, a mean of log frequencies.

        Σ w log(power of a side) is then the mask's, wherever power follows a power of the frequency. A mask with no rings
        within is compared with those beyond as they are: its p is larger than the true one where power falls with the
        frequency, as it does in attacked pictures, and smaller where it rises.
        """
        of = lambda where: self._frequency[where & (self._frequency > 0)].log().mean().item()
        own, (first, *second) = of(self._reached), map(of, self._sides)
        share = (second[0] - own) / (second[0] - first) if second else 1.0
        return np.array([share, 1 - share][: 1 + len(second)])

    @property
    def _frequency(self) -> Tensor:
        """(h, w) distance from DC."""
        return torch.hypot(*signed_frequencies(*self.inside.shape))

    def masked(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """All masked bins in the published units, where white noise has power h·w: (B, n) and (n,), complex."""
        scale = self.inside.numel() ** 0.5
        recovered = self._transform(noise)[..., self.inside].flatten(1)
        return recovered * scale, self.spectrum[..., self.inside].flatten() * scale


def recommend(
    recovery: NoiseRecovery | None, latent_shape: tuple[int, int, int], *, budget: float = 0.08, lowest: int = 3
) -> Placement:
    """The placement with the greatest expected signal, Σ a²/v over its bins, within a share `budget` of all bins.

    Radii below `lowest` fix the picture's layout, radii beyond a third of the side rarely survive compression: both
    are left alone. Without a measured recovery, or where nothing fits: every channel, mid frequencies.
    """
    count, height, width = latent_shape
    short = min(height, width)
    if recovery is None:
        return Placement(tuple(range(count)), (max(1, short // 16), max(2, short // 6)))
    sizes = torch.bincount(rings(height, width).flatten()).double()
    gain = recovery.attenuation.clamp_min(0).square() / recovery.variance * sizes
    allowed = budget * count * height * width
    best, chosen = -1.0, None
    for low in range(lowest, short // 3 + 1):
        for high in range(low + 1, short // 3 + 1):
            number = min(count, int(allowed // sizes[low : high + 1].sum()))
            total, order = gain[:, low : high + 1].sum(1).sort(descending=True)
            if number and total[:number].sum() > best:
                best, chosen = (
                    float(total[:number].sum()),
                    Placement(tuple(sorted(order[:number].tolist())), (low, high)),
                )
    return chosen or recommend(None, latent_shape)
