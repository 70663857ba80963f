"""The null, measured: what recovered noise looks like in images that nobody marked.

The mean is subtracted, the covariance whitens, and what is left is scored. A reference that had helped to measure the
null by which it is scored would not be exchangeable with a new image, so references are cross-fitted: in FOLDS parts,
each scored by the null of the others. A new image is scored by the null of all. The two differ by no more than the
sampling error of one part, and no image is lost to either task; the price is that P(p ≤ α) ≤ α is measured, not proved.
The tests hold it against the exact and slow way, in which the new image takes part in the null and all are scored
alike (full conformal prediction, arXiv 0706.3188; on folds see arXiv 1905.02928).
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmark.data.files import TensorInfo, read_tensors, write_atomic
from ringmark.data.settings import differences
from ringmark.errors import CalibrationError, one_line
from ringmark.inversion.noise_recovery import NoiseRecovery, rings
from ringmark.watermark.null import Array, Null
from ringmark.watermark.statistics import needed_references

if TYPE_CHECKING:
    from ringmark.watermark.schemes.base import Scheme

__all__ = ["FOLDS", "Calibration", "check_number", "shrunk_mean", "smooth"]

FOLDS = 10
KERNEL = (1.0, 0.5, 0.25)  # what a ring, its neighbours and theirs count for
BORROWED = 1000  # real numbers, a relative error of √(2/1000) = 4.5 % of a variance: no neighbour lends more
LEAST = needed_references(0.05)
MAX_BYTES, MAX_LATENT = 1 << 30, 1 << 22
RECOVERY = ("attenuation", "variance")  # tensors of the file where recoverability was measured, neither where not
HEADER = "ringmark calibration"
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The null of one model under one way of inversion, from n unmarked images; make one with `measure` or `load`.

    `power` (FOLDS, R, C, C) float64: Re F F* across channels, the mean over the bins of a ring and the images i of a
    part, i mod FOLDS. `spectra` (n, C, m, 2) float16: each image's bins (of rfft2) up to ring `reach`, from which the
    scores of any key are computed; 4 C m bytes an image, 4.1 kB for pocket's 4×32×32 latents up to ring 12, 15 kB for
    4×64×64 up to 24. They are rough copies of the noises, and with the model at hand of the pictures: keep the file as
    private as those. `settings` is what the recovered noise depends on; `sources` counts images by kind. `recovery`,
    float64 where it was measured, says where a mark comes back best. `name` begins messages; of a file it is its path.
    """

    FILE: ClassVar[str] = "calibration.safetensors"
    """What a model's folder calls the one that belongs to it."""

    power: Array
    spectra: NDArray[np.float16]
    latent_shape: tuple[int, int, int]
    reach: int
    settings: dict[str, Any]
    sources: dict[str, int]
    recovery: NoiseRecovery | None = None
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
        """From recovered noise (n, C, h, w) of unmarked images; `settings` is `RecoverySettings.as_dict()`.

        `reach` is three eighths of the shorter side unless given: rings beyond rarely survive compression. Raises
        CalibrationError for fewer images than LEAST, for noise that is not finite or has no power somewhere.
        """
        noise = np.asarray(noise)
        check_number(len(noise))
        if sum(sources.values()) != len(noise):
            raise CalibrationError("calibration.sources", f"{len(noise)} images, but sources {sources}")
        broken = np.flatnonzero(~np.isfinite(noise).all((1, 2, 3)))
        if len(broken):
            raise CalibrationError(
                "calibration.not-finite",
                f"{len(broken)} of {len(noise)} noises are not finite, number {broken[0]} the first",
            )
        channels, height, width = map(int, noise.shape[1:])
        reach = min(height, width) * 3 // 8 if reach is None else reach
        calibration = cls(
            power=np.stack([_cross_power(noise[k::FOLDS]) for k in range(FOLDS)]),
            spectra=_pack(noise, reach),
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
        """How many images."""
        return len(self.spectra)

    @cached_property
    def null(self) -> Null:
        """Mean and smoothed covariance of recovered noise."""
        return self._null()

    def _null(self, without: int | None = None) -> Null:
        """From every part but one."""
        images = np.bincount(np.arange(self.n) % FOLDS, minlength=FOLDS)
        if without is not None:
            images[without] = 0
        share, n = images / images.sum(), int(images.sum())
        parts = np.stack([self.spectra[k::FOLDS].mean(0, dtype=float) for k in range(FOLDS)])
        average = _unpack(np.tensordot(share, parts, 1)[None], self.latent_shape, self.reach)
        power = np.tensordot(share, self.power, 1)
        mean = shrunk_mean(average, power, n)
        bins = np.bincount(rings(*self.latent_shape[1:]).flatten().numpy())
        covariance = smooth(power - _cross_power(mean[None].numpy()), n * bins)
        return Null(covariance, mean, name="calibrated")

    def noise(self, rows: slice = slice(None)) -> Tensor:
        """(n, C, h, w) float64: the recovered noises, without what lies beyond `reach`."""
        return torch.from_numpy(_unpack(self.spectra[rows], self.latent_shape, self.reach))

    def reference_scores(self, scheme: Scheme) -> Array:
        """(n,): cross-fitted scores of the unmarked images for this key, in their order.

        Raises CalibrationError where the key looks beyond `reach`.
        """
        self.check_reach(scheme)
        scores = np.empty(self.n)
        for k, (noise, null) in enumerate(self._parts):
            test = scheme.on(null)
            if (observed := self._observed.get((k, scheme.kind))) is None:
                observed = self._observed[k, scheme.kind] = test.observe(noise)
            scores[k::FOLDS] = test.score(observed)
        return scores

    @cached_property
    def _observed(self) -> dict[tuple[int, Hashable], Array]:
        """What tests observe of each part, by part and kind of key: the same for all keys of a kind."""
        return {}

    @cached_property
    def _parts(self) -> list[tuple[Tensor, Null]]:
        """Each part's noises and the null of the others: kept, for unpacking them is half the work for a key."""
        return [(self.noise(slice(k, None, FOLDS)), self._null(without=k)) for k in range(FOLDS)]

    def check_level(self, alpha: float) -> None:
        """Raises CalibrationError where ranks among these images cannot come down to alpha."""
        if self.n < needed_references(alpha):
            raise CalibrationError(
                "calibration.level",
                f"{self.n} unmarked images confirm no p below {1 / (self.n + 1):.2g}, and alpha is {alpha:g}",
                subject=self.name,
                needed=needed_references(alpha),
            )

    def check_reach(self, scheme: Scheme) -> None:
        """Raises CalibrationError for a key that looks beyond `reach`: one that sees noise with nothing below."""
        white = torch.randn(1, *self.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        low = torch.fft.fft2(white) * (rings(*self.latent_shape[1:]) <= self.reach)
        beyond = white - torch.fft.ifft2(low).real
        if np.abs(scheme.on(Null.white(self.latent_shape)).observe(beyond)).max() > 1e-9:
            raise CalibrationError(
                "calibration.reach",
                f"holds rings up to {self.reach}, and the key ({scheme.label}) is looked for beyond",
                subject=self.name,
            )

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises CalibrationError that names each difference unless this was measured under `settings`."""
        ignore = set()
        if self.settings["model"].get("fingerprint") == settings["model"].get("fingerprint"):
            ignore.add("model name")  # a folder may be renamed
        if self.settings.get("steps") != settings.get("steps"):
            ignore.add("timesteps")  # of other steps they differ anyway
        if different := differences(self.settings, settings, ignore=ignore):
            fact = f"was made with other settings: {'; '.join(different)}"
            raise CalibrationError("calibration.settings", fact, subject=self.name)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over all of it."""
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for name, values in self._tensors().items():
            digest.update(f"{name}{values.shape}".encode() + values.tobytes())
        return digest.hexdigest()[:16]

    def _tensors(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {"power": self.power, "spectra": self.spectra}
        if self.recovery:
            found |= {field: getattr(self.recovery, field).numpy() for field in RECOVERY}
        return {name: np.ascontiguousarray(values) for name, values in found.items()}

    def _description(self) -> dict[str, Any]:
        return {
            "latent_shape": list(self.latent_shape),
            "reach": self.reach,
            "settings": self.settings,
            "sources": self.sources,
        }

    def save(self, path: Path) -> None:
        """Write the file whole or not at all, in place of what was there. Raises CalibrationError."""
        from safetensors.numpy import save

        data = save(self._tensors(), {HEADER: json.dumps(self._description() | {"fingerprint": self.fingerprint})})
        try:
            write_atomic(path, data, 0o600)  # rough copies of the images
        except OSError as error:
            code = "file.full" if error.errno in FULL else "calibration.unwritable"
            raise CalibrationError(code, f"cannot be written ({error.strerror})", subject=path) from None

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read and check a calibration. Raises CalibrationError."""
        tensors, metadata = read_tensors(
            path, max_bytes=MAX_BYTES, check=_check_file, error=CalibrationError, room="calibration"
        )
        stored = json.loads(metadata[HEADER])
        tables = [torch.from_numpy(tensors[name]) for name in RECOVERY if name in tensors]
        calibration = cls(
            power=tensors["power"],
            spectra=tensors["spectra"],
            latent_shape=tuple(stored["latent_shape"]),
            reach=stored["reach"],
            settings=stored["settings"],
            sources=stored["sources"],
            recovery=NoiseRecovery(*tables) if tables else None,
            name=one_line(path),
        )
        if calibration.fingerprint != stored["fingerprint"] or calibration._fault():
            raise CalibrationError(
                "calibration.fingerprint", "is damaged: its fingerprint does not fit its contents", subject=path
            )
        return calibration

    @classmethod
    def built_in(cls, folder: Path) -> Calibration | None:
        """The one that a model's folder holds, if any. Raises CalibrationError for a damaged file."""
        path = folder / cls.FILE
        return cls.load(path) if path.is_file() else None

    def _fault(self) -> str | None:
        """Why nothing can be whitened by this; None if it can."""
        if not (np.isfinite(self.power).all() and np.isfinite(self.spectra).all()):
            return "the recovered noise leaves the range of 16-bit numbers"
        if self.recovery and not _sound(self.recovery):
            return "how well noise comes back is not finite, or perfect on some ring"
        for parts in (None, *range(FOLDS)):
            size = np.linalg.eigvalsh(self._null(parts).covariance)
            if (size[:, 0] <= 1e-9 * size[:, -1]).any():
                return (
                    f"the recovered noise has no power of its own in some channel on ring {int(np.argmin(size[:, 0]))}"
                )
        return None


def check_number(n: int) -> None:
    """Raises CalibrationError where n images are too few for any calibration."""
    if n < LEAST:
        raise CalibrationError(
            "calibration.too-few",
            f"a calibration needs at least {LEAST}, for p ≤ 0.05, and {needed_references(1e-3)} for p ≤ 0.001",
            subject=f"{n} unmarked images",
        )


def smooth(covariance: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    """Radial smoothing of covariance (R, …), measured from `weight` (R,) > 0 real numbers each.

    Σ̃ᵣ = Σₛ w_rs Σₛ / Σₛ w_rs with w_rr = nᵣ and w_rs = K(r − s) min(nₛ, BORROWED): rings of few bins borrow from
    their neighbours, and well measured rings are left as they are, for then a slope would cost more than noise.
    """
    distance = np.abs(np.subtract.outer(np.arange(len(weight)), np.arange(len(weight))))
    kernel = np.append(KERNEL, 0.0)[np.minimum(distance, len(KERNEL))]
    shares = kernel * np.where(distance == 0, weight, np.minimum(weight, BORROWED))
    return np.tensordot(shares / shares.sum(1, keepdims=True), covariance, 1)


def shrunk_mean(average: NDArray[Any], power: NDArray[Any], n: int) -> Tensor:
    """(C, h, w): what n recovered noises have in common, from their `average` (1, C, h, w) and `power` (R, C, C).

    A model brings back something of the same layout from every image, so that their noise has a mean μ, which
    would give a key a little of the same score in all of them. On a ring the average's power A holds, beside |μ|², an n-th of the
    images' own variance, (P − A) / (n − 1). The bins of each channel and ring are multiplied by that share of A that is
    not this, at least 0: few images, which know μ badly, take little of it away.
    """
    own = np.diagonal(_cross_power(average), axis1=1, axis2=2)
    noise = (np.diagonal(power, axis1=1, axis2=2) - own) / (n - 1)
    share = (1 - np.divide(noise, own, out=np.ones_like(own), where=own > 0)).clip(0, 1)
    each = share.T[:, rings(*average.shape[2:]).numpy()]
    return torch.from_numpy(np.fft.ifft2(np.fft.fft2(average[0]) * each).real)


def _cross_power(noise: NDArray[Any]) -> NDArray[Any]:
    """(R, C, C): Re F F* of noise (n, C, h, w), averaged over images and the bins of each ring."""
    f, ring = np.fft.fft2(noise.astype(float), norm="ortho"), rings(*noise.shape[2:]).numpy()
    per_ring = (f[..., ring == r] for r in range(ring.max() + 1))
    return np.stack([np.tensordot(x, x.conj(), ((0, 2), (0, 2))).real / (len(x) * x.shape[2]) for x in per_ring])


def _stored_bins(height: int, width: int, reach: int) -> NDArray[np.bool_]:
    """(h, w//2 + 1): which bins of rfft2 are stored."""
    return rings(height, width).numpy()[:, : width // 2 + 1] <= reach


def _pack(noise: NDArray[Any], reach: int) -> NDArray[Any]:
    height, width = noise.shape[2:]
    stored = np.fft.rfft2(noise.astype(float), norm="ortho")[:, :, _stored_bins(height, width, reach)]
    with np.errstate(over="ignore"):
        return np.stack([stored.real, stored.imag], -1).astype(np.float16)


def _unpack(spectra: NDArray[Any], latent_shape: tuple[int, int, int], reach: int) -> NDArray[Any]:
    channels, height, width = latent_shape
    f = np.zeros((len(spectra), channels, height, width // 2 + 1), complex)
    f[:, :, _stored_bins(height, width, reach)] = spectra[..., 0].astype(float) + 1j * spectra[..., 1]
    return np.fft.irfft2(f, s=(height, width), norm="ortho")


def _sound(recovery: NoiseRecovery) -> bool:
    both = recovery.attenuation.isfinite() & recovery.variance.isfinite()
    return bool((both & (recovery.variance > 0)).all())


def _check_file(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
    """Raises ValueError, LookupError or TypeError unless description, types and shapes fit; nothing was read yet."""
    stored = json.loads(metadata[HEADER])
    whole = [*stored["latent_shape"], stored["reach"], *stored["sources"].values()]
    if not all(type(x) is int and x >= 0 for x in whole) or not isinstance(stored["settings"]["model"], dict):
        raise ValueError("a field of another type")
    channels, height, width = stored["latent_shape"]
    if not 0 < channels * height * width <= MAX_LATENT or not isinstance(stored["fingerprint"], str):
        raise ValueError("latents of no size, or too large")
    number_of_rings = int(rings(height, width).max()) + 1
    bins = int(_stored_bins(height, width, stored["reach"]).sum())
    n = infos["spectra"].shape[0]
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "power": ("F64", (FOLDS, number_of_rings, channels, channels)),
        "spectra": ("F16", (max(n, LEAST), channels, bins, 2)),
    }
    if set(RECOVERY) & set(infos):
        expected |= {name: ("F64", (channels, number_of_rings)) for name in RECOVERY}
    if {name: (info.dtype, info.shape) for name, info in infos.items()} != expected:
        raise ValueError("tensors of another type or shape")
