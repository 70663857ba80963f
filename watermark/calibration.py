"""The measured null: what noise recovered from unmarked images looks like.

Before scoring, noise is centred by the mean and whitened by the covariance. A reference scored by a null that it helped
to measure would not be exchangeable with a new image, so references are cross-fitted: they are split into FOLDS parts,
and each part is scored by the null of the others. A new image is scored by the null of all parts. The two nulls differ
by no more than the sampling error of one part, and every image serves both purposes. The price is that P(p ≤ α) ≤ α is
measured rather than proved. The tests compare it with the exact but slow way, in which the new image is included in the
null and all images are scored alike (full conformal prediction, arXiv 0706.3188; on folds see arXiv 1905.02928).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmark.data.files import NO_SPACE, TensorInfo, read_tensors, write_atomic
from ringmark.data.settings import differences, typed
from ringmark.errors import CalibrationError, counted, one_line
from ringmark.inversion.noise_recovery import NoiseRecovery, rings
from ringmark.watermark.bank import Bank
from ringmark.watermark.null import Array, Null
from ringmark.watermark.statistics import needed_references

if TYPE_CHECKING:
    from ringmark.watermark.schemes.base import Scheme, SchemeTest

__all__ = [
    "FOLDS",
    "Calibration",
    "check_number",
    "default_reach",
    "pack",
    "reaches_beyond",
    "shrunk_mean",
    "smooth",
    "unpack",
]

FOLDS = 10
SERVED = (0.5, 1.5)  # sides, of the calibrated ones, at which its null was shown to hold (docs/explanation/keys.md)
KERNEL = (1.0, 0.5, 0.25)  # weights of a ring, its neighbours and the next ones
BORROWED = 1000  # most real numbers that a neighbour lends; a variance then has a relative error of √(2/1000) = 4.5 %
LEAST = needed_references(0.05)
MAX_BYTES, MAX_LATENT = 1 << 30, 1 << 22
RECOVERY = ("attenuation", "variance")  # tensors in the file if recovery was measured
HEADER = "ringmark calibration"
HALF = ("torch.bfloat16", "torch.float16")


@dataclass(frozen=True, eq=False)
class Calibration:
    """The null of one model and one inversion, from n unmarked images; made by `measure` or `load`.

    `power` (FOLDS, R, C, C) float64: Re F F* across channels, averaged over the bins of a ring and the images of a
    part; image i belongs to part i mod FOLDS. `spectra` (n, C, m, 2) float16: each image's bins (of rfft2) up to ring
    `reach`, from which the scores of any key are computed. They take 4 C m bytes per image: 4.1 kB for pocket's 4×32×32
    latents up to ring 12, 15 kB for 4×64×64 up to 24. They are rough copies of the noises and, given the model, of the
    pictures: keep the file as private as the pictures. `settings` is what the recovered noise depends on; `sources`
    counts images by kind. `recovery` (float64), if it was measured, shows where a mark is best recovered. `earlier` are
    the calibrations of cheaper stages of the inversion, the cheapest first, measured on the same images (see
    `detect.cascade`). `name` is the subject of error messages: the path of a file.
    """

    FILE: ClassVar[str] = "calibration.safetensors"
    """File name of the calibration in a model's folder."""

    power: Array
    spectra: NDArray[np.float16]
    latent_shape: tuple[int, int, int]
    reach: int
    settings: dict[str, Any]
    sources: dict[str, int]
    recovery: NoiseRecovery | None = None
    earlier: tuple[Calibration, ...] = ()
    name: str = "calibration"

    @classmethod
    def measure(
        cls,
        noise: Tensor | NDArray[Any],
        settings: dict[str, Any],
        sources: dict[str, int],
        *,
        reach: int | None = None,
        recovery: NoiseRecovery | None = None,
    ) -> Calibration:
        """Measure a calibration on recovered noise (n, C, h, w) of unmarked images.

        `settings` is `RecoverySettings.as_dict()`. `reach` defaults to `default_reach`. Raises CalibrationError for
        fewer images than LEAST, and for noise that is not finite or has no power on some ring.
        """
        noise = np.asarray(noise)
        check_number(len(noise))
        if sum(sources.values()) != len(noise):
            raise CalibrationError("calibration.sources", f"{len(noise)} images, but sources {sources}")
        broken = np.flatnonzero(~np.isfinite(noise).all((1, 2, 3)))
        if len(broken):
            raise CalibrationError(
                "calibration.not-finite",
                f"{len(broken)} of {len(noise)} noises are not finite, the first is number {broken[0]}",
            )
        channels, height, width = map(int, noise.shape[1:])
        reach = default_reach((channels, height, width)) if reach is None else reach
        calibration = cls(
            power=np.stack([_cross_power(noise[k::FOLDS]) for k in range(FOLDS)]),
            spectra=pack(noise, reach),
            latent_shape=(channels, height, width),
            reach=reach,
            settings=json.loads(json.dumps(settings)),
            sources=dict(sources),
            recovery=recovery,
        )
        if fault := calibration._fault():
            raise CalibrationError("calibration.degenerate", fault, subject=f"{len(noise)} unmarked images")
        return calibration

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.spectra)

    @property
    def null(self) -> Null:
        """Mean and smoothed covariance of recovered noise."""
        return self._null()

    def _null(self, without: int | None = None) -> Null:
        """The null of all parts, or of all but one."""
        if without not in self._nulls:
            self._nulls[without] = self._make_null(without)
        return self._nulls[without]

    @cached_property
    def _nulls(self) -> dict[int | None, Null]:
        """The nulls without each part."""
        return {}

    @cached_property
    def _averages(self) -> NDArray[np.float64]:
        """The mean spectra (FOLDS, C, m, 2) of each part."""
        return np.stack([self.spectra[k::FOLDS].mean(0, dtype=float) for k in range(FOLDS)])

    def _make_null(self, without: int | None) -> Null:
        images = np.bincount(np.arange(self.n) % FOLDS, minlength=FOLDS)
        if without is not None:
            images[without] = 0
        share, n = images / images.sum(), int(images.sum())
        average = unpack(np.tensordot(share, self._averages, 1)[None], self.latent_shape, self.reach)
        power = np.tensordot(share, self.power, 1)
        mean = shrunk_mean(average, power, n)
        bins = np.bincount(rings(*self.latent_shape[1:]).flatten().numpy())
        covariance = smooth(power - _cross_power(mean[None].numpy()), n * bins)
        return Null(covariance, min(self.latent_shape[1:]), mean, name="calibrated")

    def null_at(self, latent_shape: tuple[int, int, int]) -> Null:
        """The null of latents (C, h, w) of another size; see `Null.at`.

        Raises CalibrationError for latents with other channels, and for a side beyond SERVED times the calibrated one.
        """
        channels, *sides = self.latent_shape
        if latent_shape[0] != channels:
            fact = f"was made for latents of {channels} channels, not {latent_shape[0]}"
            raise CalibrationError("calibration.channels", fact, subject=self.name)
        ratios = [side / native for side, native in zip(latent_shape[1:], sides, strict=True)]
        if min(ratios) < SERVED[0] or max(ratios) > SERVED[1]:
            fact = f"was made for latents of {sides[0]}x{sides[1]}, too far from {latent_shape[1]}x{latent_shape[2]}"
            raise CalibrationError("calibration.size", fact, subject=self.name)
        return self.null.at(latent_shape)

    def noise(self, rows: slice = slice(None)) -> Tensor:
        """The recovered noises (n, C, h, w) float64, up to ring `reach`."""
        return torch.from_numpy(unpack(self.spectra[rows], self.latent_shape, self.reach))

    def trimmed(self, reach: int) -> Calibration:
        """The last stage alone, with spectra up to ring `reach`: a smaller file, for keys within that reach.

        Their scores change only through the mean, which is no longer subtracted on the rings beyond, whose power the
        smoothed covariance of the nearest rings includes.
        """
        reach = min(reach, self.reach)
        return replace(self, spectra=pack(self.noise().numpy(), reach), reach=reach, earlier=())

    def reference_scores(self, scheme: Scheme) -> Array:
        """Cross-fitted scores (n,) of the unmarked images for this key, in their order.

        Raises CalibrationError if the key uses rings beyond `reach`.
        """
        return self.reference_table([scheme])[:, 0]

    def reference_table(self, schemes: Sequence[Scheme]) -> Array:
        """The same (n, K) for keys of one kind. Raises CalibrationError."""
        self.check_reach(schemes[0])
        table = np.empty((self.n, len(schemes)))
        for k in range(FOLDS):
            null, test, observed = self._observed(k, schemes[0])
            table[k::FOLDS] = Bank(schemes, null, test).scores(observed)
        return table

    def _observed(self, k: int, scheme: Scheme) -> tuple[Null, SchemeTest, Array]:
        """The null of all parts but k, a test under it of a key of this kind, and what it observes of part k."""
        if (k, scheme.kind) not in self._seen:
            noise, null = self._parts[k]
            test = scheme.on(null)
            self._seen[k, scheme.kind] = null, test, test.observe(noise)
        return self._seen[k, scheme.kind]

    @cached_property
    def _seen(self) -> dict[tuple[int, Hashable], tuple[Null, SchemeTest, Array]]:
        """What `_observed` returns, by part and kind of key; keys of one kind share it."""
        return {}

    @cached_property
    def _parts(self) -> list[tuple[Tensor, Null]]:
        """Each part's noises and the null of the others; cached, because unpacking them is half the work per key."""
        return [(self.noise(slice(k, None, FOLDS)), self._null(without=k)) for k in range(FOLDS)]

    def check_level(self, alpha: float) -> None:
        """Raises CalibrationError if there are too few images for ranks to reach alpha."""
        if self.n < needed_references(alpha):
            raise CalibrationError(
                "calibration.level",
                f"{self.n} unmarked images cannot confirm p below {1 / (self.n + 1):.2g}, but alpha is {alpha:g}",
                subject=self.name,
                needed=needed_references(alpha),
            )

    def check_reach(self, scheme: Scheme) -> None:
        """Raises CalibrationError for a key that uses rings beyond `reach`."""
        if scheme.kind in self._within:
            return
        if reaches_beyond(scheme, self.latent_shape, self.reach):
            raise CalibrationError(
                "calibration.reach",
                f"holds rings up to {self.reach}, but the key ({scheme.label}) uses rings beyond",
                subject=self.name,
            )
        self._within.add(scheme.kind)

    @cached_property
    def _within(self) -> set[Hashable]:
        """The kinds of keys that use no rings beyond `reach`."""
        return set()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises CalibrationError, naming each difference, unless this was measured under `settings`.

        The size of the images may differ: see `null_at`. One made in float32 also serves half precision: rounding
        changes single noises, but not the distribution of p. Of 24 unmarked images of pocket and 200 keys, log₁₀ p
        shifts in bfloat16 by 0.0001 [−0.0009, 0.0012] after ten steps, and by no more in earlier stages
        (scripts/experiments/half_precision.py); float16 rounds eight times as finely.
        """
        ignore = {"image_size"}
        if self.settings.get("dtype") == "torch.float32" and settings.get("dtype") in HALF:
            ignore.add("dtype")
        if self.settings["model"].get("fingerprint") == settings["model"].get("fingerprint"):
            ignore.add("model name")  # a folder may be renamed
        if any(self.settings.get(name) != settings.get(name) for name in ("steps", "image_size")):
            ignore.add("timesteps")  # with other steps they differ anyway, and with another size they may
        if different := differences(self.settings, settings, ignore=ignore):
            fact = f"was made with other settings: {'; '.join(different)}"
            raise CalibrationError("calibration.settings", fact, subject=self.name)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash over the whole calibration."""
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for name, values in self._tensors().items():
            digest.update(f"{name}{values.shape}".encode() + values.tobytes())
        return digest.hexdigest()[:16]

    def _tensors(self) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {"power": self.power, "spectra": self.spectra}
        for i, stage in enumerate(self.earlier):
            tensors |= {f"{i}/power": stage.power, f"{i}/spectra": stage.spectra}
        if self.recovery:
            tensors |= {field: getattr(self.recovery, field).numpy() for field in RECOVERY}
        return {name: np.ascontiguousarray(values) for name, values in tensors.items()}

    def _description(self) -> dict[str, Any]:
        description = {
            "latent_shape": list(self.latent_shape),
            "reach": self.reach,
            "settings": self.settings,
            "sources": self.sources,
        }
        earlier = [stage.settings for stage in self.earlier]
        return description | ({"earlier": earlier} if earlier else {})

    def save(self, path: Path) -> None:
        """Write the file atomically, replacing an existing one. Raises CalibrationError."""
        from safetensors.numpy import save

        data = save(self._tensors(), {HEADER: json.dumps(self._description() | {"fingerprint": self.fingerprint})})
        try:
            write_atomic(path, data, 0o600)  # rough copies of the images
        except OSError as error:
            code = "file.full" if error.errno in NO_SPACE else "calibration.unwritable"
            raise CalibrationError(code, f"cannot be written ({error.strerror})", subject=path) from None

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read and check a calibration. Raises CalibrationError."""
        tensors, metadata = read_tensors(
            path, max_bytes=MAX_BYTES, check=_check_file, error=CalibrationError, room="calibration"
        )
        stored = json.loads(metadata[HEADER])
        tables = [torch.from_numpy(tensors[name]) for name in RECOVERY if name in tensors]
        last = cls(
            power=tensors["power"],
            spectra=tensors["spectra"],
            latent_shape=tuple(stored["latent_shape"]),
            reach=stored["reach"],
            settings=stored["settings"],
            sources=stored["sources"],
            name=one_line(path),
        )
        earlier = [
            replace(last, power=tensors[f"{i}/power"], spectra=tensors[f"{i}/spectra"], settings=settings)
            for i, settings in enumerate(stored.get("earlier", ()))
        ]
        calibration = replace(last, recovery=NoiseRecovery(*tables) if tables else None, earlier=tuple(earlier))
        if calibration.fingerprint != stored["fingerprint"] or calibration._fault():
            raise CalibrationError(
                "calibration.fingerprint", "is damaged: its fingerprint does not match its contents", subject=path
            )
        return calibration

    @classmethod
    def built_in(cls, folder: Path) -> Calibration | None:
        """The calibration in a model's folder, or None. Raises CalibrationError for a damaged file."""
        path = folder / cls.FILE
        return cls.load(path) if path.is_file() else None

    def _fault(self) -> str | None:
        """Why this calibration cannot whiten noise; None if it can."""
        if not (np.isfinite(self.power).all() and np.isfinite(self.spectra).all()):
            return "the recovered noise exceeds the range of 16-bit numbers"
        if self.recovery and not _sound(self.recovery):
            return "the measured noise recovery is not finite, or perfect on some ring"
        if fault := next(filter(None, (stage._fault() for stage in self.earlier)), None):
            return fault
        for parts in (None, *range(FOLDS)):
            size = np.linalg.eigvalsh(self._null(parts).covariance)
            if (size[:, 0] <= 1e-9 * size[:, -1]).any():
                return (
                    f"the recovered noise has no independent power in some channel on ring {int(np.argmin(size[:, 0]))}"
                )
        return None


def default_reach(latent_shape: tuple[int, int, int]) -> int:
    """Three eighths of the shorter side: rings beyond rarely survive compression."""
    return min(latent_shape[1:]) * 3 // 8


def reaches_beyond(scheme: Scheme, latent_shape: tuple[int, int, int], reach: int) -> bool:
    """Whether a key's test uses rings beyond `reach` of latents (C, h, w)."""
    white = torch.randn(1, *latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = torch.fft.fft2(white) * (rings(*latent_shape[1:]) <= reach)
    beyond = white - torch.fft.ifft2(low).real
    return bool(np.abs(scheme.on(Null.white(latent_shape)).observe(beyond)).max() > 1e-9)


def check_number(n: int) -> None:
    """Raises CalibrationError if n images are too few for any calibration."""
    if n < LEAST:
        raise CalibrationError(
            "calibration.too-few",
            f"a calibration needs at least {LEAST}, for p ≤ 0.05, and {needed_references(1e-3)} for p ≤ 0.001",
            subject=counted(n, "unmarked image"),
        )


def smooth(covariance: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    """Radial smoothing of covariance (R, …), measured from `weight` (R,) > 0 real numbers each.

    Σ̃ᵣ = Σₛ w_rs Σₛ / Σₛ w_rs with w_rr = nᵣ and w_rs = K(r − s) min(nₛ, BORROWED): rings of few bins borrow from their
    neighbours, while well measured rings stay as they are, because there the bias of a slope would exceed the noise.
    """
    distance = np.abs(np.subtract.outer(np.arange(len(weight)), np.arange(len(weight))))
    kernel = np.append(KERNEL, 0.0)[np.minimum(distance, len(KERNEL))]
    shares = kernel * np.where(distance == 0, weight, np.minimum(weight, BORROWED))
    return np.tensordot(shares / shares.sum(1, keepdims=True), covariance, 1)


def shrunk_mean(average: NDArray[Any], power: NDArray[Any], n: int) -> Tensor:
    """The mean (C, h, w) of n recovered noises, shrunk; from their `average` (1, C, h, w) and `power` (R, C, C).

    Noise recovered by one model has a common mean μ, which would add the same amount to a key's score in all images. On
    a ring, the power A of the average is |μ|² plus 1/n of the images' own variance, (P − A) / (n − 1). The bins of each
    channel and ring are multiplied by the share of A that is not variance, at least 0, so that little is subtracted
    when few images give a poor estimate of μ.
    """
    mean_power = np.diagonal(_cross_power(average), axis1=1, axis2=2)
    noise = (np.diagonal(power, axis1=1, axis2=2) - mean_power) / (n - 1)
    share = (1 - np.divide(noise, mean_power, out=np.ones_like(mean_power), where=mean_power > 0)).clip(0, 1)
    each = share.T[:, rings(*average.shape[2:]).numpy()]
    return torch.from_numpy(np.fft.ifft2(np.fft.fft2(average[0]) * each).real)


def _cross_power(noise: NDArray[Any]) -> NDArray[Any]:
    """Re F F* (R, C, C) of noise (n, C, h, w), averaged over images and the bins of each ring."""
    f, ring = np.fft.fft2(noise.astype(float), norm="ortho"), rings(*noise.shape[2:]).numpy()
    per_ring = (f[..., ring == r] for r in range(ring.max() + 1))
    return np.stack([np.tensordot(x, x.conj(), ((0, 2), (0, 2))).real / (len(x) * x.shape[2]) for x in per_ring])


@lru_cache
def _stored_bins(height: int, width: int, reach: int) -> NDArray[np.bool_]:
    """Mask (h, w//2 + 1) of the bins of rfft2 that are stored."""
    return rings(height, width).numpy()[:, : width // 2 + 1] <= reach


def pack(noise: NDArray[Any], reach: int) -> NDArray[np.float16]:
    """The bins of rfft2 of noise (n, C, h, w) up to ring `reach`: (n, C, m, 2) float16, which may overflow."""
    height, width = noise.shape[2:]
    stored = np.fft.rfft2(noise.astype(float), norm="ortho")[:, :, _stored_bins(height, width, reach)]
    with np.errstate(over="ignore"):
        return np.stack([stored.real, stored.imag], -1).astype(np.float16)


def unpack(
    spectra: NDArray[Any], latent_shape: tuple[int, int, int], reach: int, *, dtype: type[np.floating] = np.float64
) -> NDArray[Any]:
    """The noise (n, C, h, w) with only these bins, in this precision; the inverse of `pack`."""
    channels, height, width = latent_shape
    bins = np.ascontiguousarray(spectra, dtype).view(np.result_type(dtype, 1j))[..., 0]
    f = np.zeros((len(spectra), channels, height * (width // 2 + 1)), bins.dtype)
    f[..., np.flatnonzero(_stored_bins(height, width, reach))] = bins
    half = torch.from_numpy(f).view(len(f), channels, height, -1)
    noise: Tensor = torch.fft.irfft2(half, s=(height, width), norm="ortho")  # twice as fast as NumPy's
    return noise.numpy()


def _sound(recovery: NoiseRecovery) -> bool:
    both = recovery.attenuation.isfinite() & recovery.variance.isfinite()
    return bool((both & (recovery.variance > 0)).all())


@dataclass(frozen=True)
class _Description:
    """What a calibration file says of its calibration."""

    latent_shape: list[int]
    reach: int
    settings: dict[str, Any]
    sources: dict[str, int]
    fingerprint: str
    earlier: list[dict[str, Any]] = field(default_factory=list)


def _check_file(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
    """Check description, types and shapes before values are read. Raises ValueError, LookupError or TypeError."""
    stored = typed(_Description, json.loads(metadata[HEADER]))
    if min(*stored.latent_shape, stored.reach, *stored.sources.values()) < 0:
        raise ValueError("a number is negative")
    stages = (stored.settings, *stored.earlier)
    if not all(isinstance(settings["model"], dict) for settings in stages):
        raise ValueError("the model is not described")
    if not all(type(settings["steps"]) is int for settings in stages):
        raise ValueError("the number of steps is not a whole number")
    channels, height, width = stored.latent_shape
    if not 0 < channels * height * width <= MAX_LATENT:
        raise ValueError("the latents are empty or too large")
    number_of_rings = int(rings(height, width).max()) + 1
    bins = int(_stored_bins(height, width, stored.reach).sum())
    n = infos["spectra"].shape[0]
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for stage in ("", *(f"{i}/" for i in range(len(stored.earlier)))):
        expected[f"{stage}power"] = ("F64", (FOLDS, number_of_rings, channels, channels))
        expected[f"{stage}spectra"] = ("F16", (max(n, LEAST), channels, bins, 2))
    if set(RECOVERY) & set(infos):
        expected |= {name: ("F64", (channels, number_of_rings)) for name in RECOVERY}
    if {name: (info.dtype, info.shape) for name, info in infos.items()} != expected:
        raise ValueError("a tensor has the wrong type or shape")
