"""The null, measured: what recovered noise looks like where nobody planted anything.

Bins are those of orthonormal 2-D transforms, rings are `inversion.diagnostics.rings`. A bin's real and imaginary parts
are taken to be uncorrelated and of equal variance, and so are the bins of a ring; the channels of one bin are not.

The mean is taken away, the covariance whitens, and what is left is scored. A reference that had helped to measure the
null by which it is scored would not be exchangeable with a new image, so references are cross-fitted: in FOLDS parts,
each scored by the null of the others. A new image is scored by the null of all. The two differ by no more than the
sampling error of one part, and no image is lost to either task; the price is that P(p ≤ α) ≤ α is measured, not proved.
The tests hold it against the exact and slow way, in which the new image takes part in the null and all are scored
alike (full conformal prediction, arXiv 0706.3188; on folds see arXiv 1905.02928).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringmark.data.files import one_line, remedy, write_atomic
from ringmark.errors import CalibrationError
from ringmark.inversion.noise_recovery import NoiseRecovery, rings
from ringmark.watermark.statistics import cosine_test, needed_references, power_test, spread_p, whiten

if TYPE_CHECKING:
    from ringmark.watermark.schemes.tree_ring import TreeRing

__all__ = [
    "FOLDS",
    "Calibration",
    "Null",
    "check_number",
    "relevant",
    "shrunk_mean",
    "smooth",
    "whitened_features",
    "whitened_test",
]

FOLDS = 10
KERNEL = (1.0, 0.5, 0.25)  # what a ring, its neighbours and theirs count for
BORROWED = 1000  # real numbers, a relative error of √(2/1000) = 4.5 % of a variance: no neighbour lends more
LEAST = needed_references(0.05)
MAX_BYTES, MAX_LATENT = 1 << 30, 1 << 22
IRRELEVANT = (
    "keys",
    "alpha",
    "null",
    "calibration",
    "search",
)  # of Detector.settings(): they do not change the recovered noise
RECOVERY = ("attenuation", "variance")  # tensors of the file where recoverability was measured, neither where not
RECALIBRATE = "make it with: ringmark calibrate"


class Null(NamedTuple):
    """What recovered noise is where nobody planted anything: its covariance (R, C, C) across channels by ring, and its mean (C, h, w)."""

    covariance: np.ndarray
    mean: Tensor | float = 0.0


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

    power: np.ndarray
    spectra: np.ndarray
    latent_shape: tuple[int, int, int]
    reach: int
    settings: dict
    sources: dict[str, int]
    recovery: NoiseRecovery | None = None
    name: str = "calibration"

    @classmethod
    def measure(
        cls,
        noise: Tensor | np.ndarray,
        settings: dict,
        sources: dict[str, int],
        *,
        reach: int | None = None,
        recovery: NoiseRecovery | None = None,
    ) -> Calibration:
        """From recovered noise (n, C, h, w) of unmarked images; `settings` as Detector.settings() gives them.

        `reach` is three eighths of the shorter side unless given: rings beyond rarely survive compression. Raises
        CalibrationError for fewer images than LEAST, for noise that is not finite or has no power somewhere.
        """
        noise = np.asarray(noise)
        check_number(len(noise))
        if sum(sources.values()) != len(noise):
            raise CalibrationError(f"{len(noise)} images, but sources {sources}; count every image once")
        broken = np.flatnonzero(~np.isfinite(noise).all((1, 2, 3)))
        if len(broken):
            raise CalibrationError(
                f"{len(broken)} of {len(noise)} noises are not finite, the first is number {broken[0]}; leave them out"
            )
        shape = tuple(map(int, noise.shape[1:]))
        reach = min(shape[1:]) * 3 // 8 if reach is None else reach
        made = cls(
            np.stack([_cross_power(noise[k::FOLDS]) for k in range(FOLDS)]),
            _pack(noise, reach),
            shape,
            reach,
            relevant(settings),
            dict(sources),
            recovery,
        )
        if fault := made._fault():
            raise CalibrationError(f"{len(noise)} unmarked images: {fault}; use images with some texture")
        return made

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
        return Null(smooth(power - _cross_power(mean[None].numpy()), n * bins), mean)

    def noise(self, rows: slice = slice(None)) -> Tensor:
        """(n, C, h, w) float64: the recovered noises, without what lies beyond `reach`."""
        return torch.from_numpy(_unpack(self.spectra[rows], self.latent_shape, self.reach))

    def reference_scores(self, scheme: TreeRing) -> np.ndarray:
        """(n,): cross-fitted scores of the unmarked images for this key, in their order.

        Raises CalibrationError where the key reaches beyond `reach`.
        """
        self.check_reach(scheme)
        scores = np.empty(self.n)
        for k, (noise, null) in enumerate(self._parts):
            if (seen := (k, *scheme.kind)) not in self._features:
                look = whitened_test if scheme.pattern == "zeros" else whitened_features
                self._features[seen] = look(scheme, noise, *null)[0]
            found = self._features[seen]
            if scheme.pattern != "zeros":
                found = cosine_test(found, whitened_features(scheme, noise[:1], *null)[1])[0]
            scores[k::FOLDS] = found
        return scores

    def test(self, scheme: TreeRing, noise: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Scores and p-values (B,) of recovered noise (B, C, h, w): `whitened_test` on this null.

        For the pattern *zeros* p is by the spread of the reference scores: power differs more from ring to ring, in
        unmarked images too, than white noise would by chance; there raises CalibrationError as `reference_scores` does.
        """
        score, p = whitened_test(scheme, noise, *self.null)
        return score, (spread_p(score, self.reference_scores(scheme)) if scheme.pattern == "zeros" else p)

    @cached_property
    def _features(self) -> dict[tuple, np.ndarray]:
        """Whitened features (for *zeros*: scores), by part and kind of key: they are alike for all keys of a kind."""
        return {}

    @cached_property
    def _parts(self) -> list[tuple[Tensor, Null]]:
        """Each part's noises and the null of the others: kept, for unpacking them is half the work for a key."""
        return [(self.noise(slice(k, None, FOLDS)), self._null(without=k)) for k in range(FOLDS)]

    def check_level(self, alpha: float) -> None:
        """Raises CalibrationError where ranks among these images cannot come down to alpha."""
        if self.n < needed_references(alpha):
            raise CalibrationError(
                f"{self.name}: {self.n} unmarked images confirm no p below {1 / (self.n + 1):.2g}, and --alpha is {alpha:g}; calibrate with at least {needed_references(alpha)} images, or raise --alpha"
            )

    def check_reach(self, scheme: TreeRing) -> None:
        """Raises CalibrationError for a key that looks beyond `reach`: one that sees noise which has nothing up to it."""
        white = torch.randn(1, *self.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        low = torch.fft.fft2(white) * (rings(*self.latent_shape[1:]) <= self.reach)
        beyond = white - torch.fft.ifft2(low).real
        if max(x.abs().max() for x in _seen(scheme, beyond)) > 1e-9:
            raise CalibrationError(
                f"{self.name}: holds rings up to {self.reach}, the key's mark of radii {scheme.placement.radii[0]}-{scheme.placement.radii[1]} is looked for beyond; leave the calibration out, or make a key of smaller radii"
            )

    def check(self, settings: dict) -> None:
        """Raises CalibrationError that names each difference unless this was measured under `settings`."""
        mine, theirs = _flat(self.settings), _flat(relevant(settings))
        if mine.get("model fingerprint") == theirs.get("model fingerprint"):
            mine["model name"] = theirs.get("model name")  # a folder may be renamed
        if mine.get("steps") != theirs.get("steps"):
            mine.pop("timesteps", None), theirs.pop("timesteps", None)  # of other steps they differ anyway
        said = lambda values, field: values.get(field, "not set")
        different = [
            f"{field} {said(mine, field)}, here {said(theirs, field)}"
            for field in sorted(mine.keys() | theirs.keys())
            if said(mine, field) != said(theirs, field)
        ]
        if different:
            raise CalibrationError(
                one_line(
                    f"{self.name}: made with {'; '.join(different)}; use those settings, or calibrate anew with these"
                )
            )

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over all of it."""
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for name, values in self._tensors().items():
            digest.update(f"{name}{values.shape}".encode() + values.tobytes())
        return digest.hexdigest()[:16]

    def _tensors(self) -> dict[str, np.ndarray]:
        found = {"power": self.power, "spectra": self.spectra}
        if self.recovery:
            found |= {field: getattr(self.recovery, field).numpy() for field in RECOVERY}
        return {name: np.ascontiguousarray(values) for name, values in found.items()}

    def _description(self) -> dict:
        return {
            "latent_shape": list(self.latent_shape),
            "reach": self.reach,
            "settings": self.settings,
            "sources": self.sources,
        }

    def save(self, path: Path) -> None:
        """Write the file whole or not at all, in place of what was there. Raises CalibrationError."""
        from safetensors.numpy import save

        described = json.dumps(self._description() | {"fingerprint": self.fingerprint})
        data = save(self._tensors(), {"ringmark calibration": described})
        try:
            write_atomic(path, data, 0o600)  # rough copies of the images
        except OSError as error:
            raise CalibrationError(
                f"{one_line(path)}: cannot be written: {error.strerror}; {remedy(error, 'choose another name')}"
            ) from None

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read and check a calibration. Raises CalibrationError, one line that names the file and the remedy."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        name = one_line(path)
        try:
            if path.is_dir():
                raise CalibrationError(f"{name}: is a folder; name a calibration file in it")
            if not path.is_file():
                raise CalibrationError(f"{name}: no such calibration; {RECALIBRATE} FOLDER -o {name}")
            if path.stat().st_size > MAX_BYTES:
                raise CalibrationError(f"{name}: too large to be a calibration ({path.stat().st_size >> 20} MB)")
            path.open("rb").close()  # says why, where safetensors does not
            with safe_open(path, "numpy") as file:
                stored = json.loads((file.metadata() or {})["ringmark calibration"])
                _check_description(stored)
                _check_tensors(file, tuple(stored["latent_shape"]), stored["reach"])
                tables = [torch.from_numpy(file.get_tensor(field)) for field in RECOVERY if field in file.keys()]
                recovery = NoiseRecovery(*tables) if tables else None
                fields = _fields(stored) | {"recovery": recovery, "name": name}
                made = cls(file.get_tensor("power"), file.get_tensor("spectra"), **fields)
        except CalibrationError:
            raise
        except PermissionError as error:
            raise CalibrationError(f"{name}: cannot be read: {error.strerror}") from None
        except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError, OSError):
            raise CalibrationError(
                f"{name}: not a ringmark calibration, or damaged; {RECALIBRATE} FOLDER -o {name}"
            ) from None
        if made.fingerprint != stored["fingerprint"] or made._fault():
            raise CalibrationError(
                f"{name}: damaged: its fingerprint does not fit its contents; restore it from a copy or {RECALIBRATE}"
            )
        return made

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
            f"{n} unmarked images: a calibration needs at least {LEAST}, for p ≤ 0.05, and {needed_references(1e-3)} for p ≤ 0.001; add images"
        )


def relevant(settings: dict) -> dict:
    """Of Detector.settings() what the recovered noise depends on, as JSON will give it back."""
    return json.loads(json.dumps({k: v for k, v in settings.items() if k not in IRRELEVANT}))


def smooth(covariance: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Radial smoothing of covariance (R, …), measured from `weight` (R,) > 0 real numbers each.

    Σ̃ᵣ = Σₛ w_rs Σₛ / Σₛ w_rs with w_rr = nᵣ and w_rs = K(r − s) min(nₛ, BORROWED): rings of few bins borrow from
    their neighbours, and well measured rings are left as they are, for then a slope would cost more than noise.
    """
    distance = np.abs(np.subtract.outer(np.arange(len(weight)), np.arange(len(weight))))
    kernel = np.append(KERNEL, 0.0)[np.minimum(distance, len(KERNEL))]
    shares = kernel * np.where(distance == 0, weight, np.minimum(weight, BORROWED))
    return np.tensordot(shares / shares.sum(1, keepdims=True), covariance, 1)


def shrunk_mean(average: np.ndarray, power: np.ndarray, n: int) -> Tensor:
    """(C, h, w): what n recovered noises have in common, from their `average` (1, C, h, w) and `power` (R, C, C).

    A model brings back something of the same layout from every image, so that their noise has a mean μ, which would give
    a key a little of the same score in all of them. On a ring the average's power A holds, beside |μ|², an n-th of the
    images' own variance, (P − A) / (n − 1). The bins of each channel and ring are multiplied by that share of A that is
    not this, at least 0: few images, which know μ badly, take little of it away.
    """
    own = np.diagonal(_cross_power(average), axis1=1, axis2=2)
    noise = (np.diagonal(power, axis1=1, axis2=2) - own) / (n - 1)
    share = (1 - np.divide(noise, own, out=np.ones_like(own), where=own > 0)).clip(0, 1)
    each = share.T[:, rings(*average.shape[2:]).numpy()]
    return torch.from_numpy(np.fft.ifft2(np.fft.fft2(average[0]) * each).real)


def whitened_test(
    scheme: TreeRing, noise: Tensor, covariance: np.ndarray, mean: Tensor | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and p-values (B,) of recovered noise (B, C, h, w) under a null (see `Null`).

    The whitened cosine and its Student-t p-value; for the pattern *zeros* the power test of whitened noise.
    """
    if scheme.pattern == "zeros":
        features, *beside = _seen(scheme, _whiten_noise(scheme, noise - mean, covariance))
        inside = features.unflatten(1, (len(scheme.placement.channels), -1))
        return power_test(inside.numpy(), [power.numpy() for power in beside], scheme.side_weights)
    return cosine_test(*whitened_features(scheme, noise, covariance, mean))


def whitened_features(
    scheme: TreeRing, noise: Tensor, covariance: np.ndarray, mean: Tensor | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Features (B, d) of recovered noise (B, C, h, w) and of the key (d,); those of unit variance and uncorrelated under the null."""
    features, key = scheme.features(noise - mean)
    channels, ring = (x.numpy() for x in scheme.feature_rings())
    marked = channels.reshape(len(scheme.placement.channels), -1)[:, 0]
    # Features go channel by channel, over the same bins in each.
    blocks = covariance[ring[: len(ring) // len(marked)]][:, marked[:, None], marked]
    both = np.concatenate([features.numpy(), key.numpy()[None]]).reshape(-1, len(marked), len(blocks))
    *rows, last = whiten(both, blocks).reshape(len(both), -1)
    return np.reshape(rows, (-1, len(last))), last


def _seen(scheme: TreeRing, noise: Tensor) -> tuple[Tensor, ...]:
    """All that the scheme's statistic looks at."""
    features, _ = scheme.features(noise)
    return (features, *scheme.beside(noise)) if scheme.pattern == "zeros" else (features,)


def _whiten_noise(scheme: TreeRing, noise: Tensor, covariance: np.ndarray) -> Tensor:
    """Noise (B, C, h, w) with the marked channels whitened ring by ring."""
    marked = np.array(scheme.placement.channels)
    blocks = covariance[rings(*noise.shape[2:]).flatten().numpy()][:, marked[:, None], marked]
    spectrum = np.fft.fft2(noise[:, marked].double().numpy())
    white = whiten(spectrum.reshape(*spectrum.shape[:2], -1), blocks).reshape(spectrum.shape)
    out = noise.double().clone()
    out[:, marked] = torch.from_numpy(np.fft.ifft2(white).real)
    return out


def _cross_power(noise: np.ndarray) -> np.ndarray:
    """(R, C, C): Re F F* of noise (n, C, h, w), averaged over images and the bins of each ring."""
    f, ring = np.fft.fft2(noise.astype(float), norm="ortho"), rings(*noise.shape[2:]).numpy()
    per_ring = (f[..., ring == r] for r in range(ring.max() + 1))
    return np.stack([np.tensordot(x, x.conj(), ((0, 2), (0, 2))).real / (len(x) * x.shape[2]) for x in per_ring])


def _stored_bins(height: int, width: int, reach: int) -> np.ndarray:
    """(h, w//2 + 1): which bins of rfft2 are stored."""
    return rings(height, width).numpy()[:, : width // 2 + 1] <= reach


def _pack(noise: np.ndarray, reach: int) -> np.ndarray:
    stored = np.fft.rfft2(noise.astype(float), norm="ortho")[..., _stored_bins(*noise.shape[2:], reach)]
    with np.errstate(over="ignore"):
        return np.stack([stored.real, stored.imag], -1).astype(np.float16)


def _unpack(spectra: np.ndarray, latent_shape: tuple[int, int, int], reach: int) -> np.ndarray:
    channels, height, width = latent_shape
    f = np.zeros((len(spectra), channels, height, width // 2 + 1), complex)
    f[..., _stored_bins(height, width, reach)] = spectra[..., 0].astype(float) + 1j * spectra[..., 1]
    return np.fft.irfft2(f, s=(height, width), norm="ortho")


def _sound(recovery: NoiseRecovery) -> bool:
    both = recovery.attenuation.isfinite() & recovery.variance.isfinite()
    return bool((both & (recovery.variance > 0)).all())


def _flat(settings: dict, prefix: str = "") -> dict:
    """{"model": {"name": …}} → {"model name": …}."""
    out = {}
    for name, value in settings.items():
        out |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def _fields(stored: dict) -> dict:
    return {
        "latent_shape": tuple(stored["latent_shape"]),
        "reach": stored["reach"],
        "settings": stored["settings"],
        "sources": stored["sources"],
    }


def _check_description(stored: dict) -> None:
    """Raises ValueError, LookupError or TypeError unless it is one; nothing has been allocated yet."""
    whole = [*stored["latent_shape"], stored["reach"], *stored["sources"].values()]
    if not all(type(x) is int and x >= 0 for x in whole) or not isinstance(stored["settings"]["model"], dict):
        raise ValueError("a field of another type")
    channels, height, width = stored["latent_shape"]
    if not 0 < channels * height * width <= MAX_LATENT or not isinstance(stored["fingerprint"], str):
        raise ValueError("latents of no size, or too large")


def _check_tensors(file, latent_shape: tuple[int, int, int], reach: int) -> None:
    """Raises ValueError unless types and shapes are as described; nothing has been read yet."""
    channels, height, width = latent_shape
    power, spectra = file.get_slice("power"), file.get_slice("spectra")
    number_of_rings = int(rings(height, width).max()) + 1
    n, *rest = spectra.get_shape()
    if (power.get_dtype(), spectra.get_dtype()) != ("F64", "F16"):
        raise ValueError("numbers of another type")
    if power.get_shape() != [FOLDS, number_of_rings, channels, channels]:
        raise ValueError("power of another shape")
    if n < LEAST or rest != [channels, int(_stored_bins(height, width, reach).sum()), 2]:
        raise ValueError("spectra of another shape")
    tables = [file.get_slice(field) for field in RECOVERY if set(RECOVERY) & set(file.keys())]
    if any((x.get_dtype(), x.get_shape()) != ("F64", [channels, number_of_rings]) for x in tables):
        raise ValueError("recovery of another type or shape")
