"""Numbers that say how well an inversion went."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ringmark.errors import ModelError
from ringmark.inversion.solve import Method, Residual, norms

__all__ = [
    "NoiseRecovery",
    "Walk",
    "cocoercivity",
    "correlation",
    "high_frequency_share",
    "memory_kilobytes",
    "nmse_db",
    "peak_during",
    "release_memory",
    "rings",
    "stored_bytes",
    "trace",
]

Result = TypeVar("Result")


def nmse_db(estimate: Tensor, truth: Tensor) -> Tensor:
    """10 log₁₀(‖z − z*‖² / ‖z*‖²) of each sample (B,), in dB; average over dB, as arXiv 2409.18442 does."""
    return 20 * torch.log10(norms(estimate.float() - truth.float()) / norms(truth.float()))


def correlation(estimate: Tensor, truth: Tensor) -> Tensor:
    """Pearson's correlation of each sample (B,), in [-1, 1]."""
    pairs = zip(estimate.flatten(1), truth.flatten(1), strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])


def cocoercivity(z: Tensor, residual: Tensor, solution: Tensor) -> Tensor:
    """⟨T z, z − z*⟩ / ‖T z‖² of each sample (B,): the largest β for which cocoercivity holds at z."""
    t = residual.flatten(1)
    return (t * (z - solution).flatten(1)).sum(1) / t.square().sum(1)


def trace(residual: Residual, start: Tensor, method: Method, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(z_k, T z_k) for k = 0 … steps: where the method evaluates T and what it finds, without the driver's stopping.

    For a method with momentum z_k is the extrapolated point, which is where its theorem asks for cocoercivity.
    """
    z, rows = start.float(), torch.arange(len(start), device=start.device)
    state = method.init(z)
    for k in range(steps + 1):
        value = residual(z, rows)
        t, error = (x.float() for x in (value if isinstance(value, tuple) else (value, value)))
        yield z, t
        if k < steps:
            z, state = method.step(z, t, error, state)


@dataclass(frozen=True)
class Walk:
    """How a method comes to where it ends, z_∞ (arXiv 2409.18442 takes the 300th iterate); float64.

    For k = 0 … K and each sample (K + 1, B): `distances` ‖z_k − z_∞‖, `sizes` ‖T z_k‖, `betas`
    ⟨T z_k, z_k − z_∞⟩ / ‖T z_k‖²; and `end` (B,) ‖T z_∞‖, for the end need not be a fixed point. `true_betas` are
    cocoercivities about known latents instead, NaN without: a slow method, whose steps ρ are all alike, shows
    β_k ≈ ρ (steps − k) about its own end, whatever T is.
    """

    distances: Tensor
    sizes: Tensor
    betas: Tensor
    true_betas: Tensor
    end: Tensor

    ARRIVED: ClassVar[float] = 1e-6
    """Of the first ‖T‖: below it T is rounding, and cocoercivity 0/0."""

    @classmethod
    def along(
        cls,
        residual: Residual,
        start: Tensor,
        method: Method,
        *,
        steps: int = 300,
        at: int = 100,
        truth: Tensor | None = None,
    ) -> Walk:
        """Walk `steps` steps and look back at the first `at` (= K), whose iterates are kept until the end is known."""
        points = trace(residual, start, method, steps)
        seen = [(z.double(), t.double()) for z, t in islice(points, at + 1)]
        end, last = seen[-1]
        for z, t in points:
            end, last = z.double(), t.double()
        known = torch.full_like(end, torch.nan) if truth is None else truth.double()
        each = lambda f: torch.stack([f(z, t) for z, t in seen]).cpu()
        return cls(
            each(lambda z, t: norms(z - end)),
            each(lambda z, t: norms(t)),
            each(lambda z, t: cocoercivity(z, t, end)),
            each(lambda z, t: cocoercivity(z, t, known)),
            norms(last).cpu(),
        )

    @property
    def moving(self) -> Tensor:
        """(K, B): steps that start before the fixed point is reached to rounding."""
        return ~(self.sizes[:-1] <= self.ARRIVED * self.sizes[0])

    @property
    def lowest(self) -> Tensor:
        """min over k < K of cocoercivity (B,), the path's β; NaN where the path left the finite numbers."""
        return torch.where(self.moving, self.betas[:-1], torch.inf).amin(0)

    @property
    def true_lowest(self) -> Tensor:
        """The same about the known latents."""
        return torch.where(self.moving, self.true_betas[:-1], torch.inf).amin(0)

    def slack(self, rho: float) -> Tensor:
        """(K, B): what Theorem 1's descent inequality leaves over, as a share of ‖z_k − z*‖².

        ‖z_k − z*‖² − ρ (2β − ρ) ‖T z_k‖² − ‖z_{k+1} − z*‖² ≥ 0 along z_{k+1} = z_k − ρ T z_k, with β the path's
        and z* = z_∞. In exact arithmetic it is 2ρ (β_k − β) ‖T z_k‖², so a violation is rounding.
        """
        before, after = self.distances[:-1].square(), self.distances[1:].square()
        return 1 - (rho * (2 * self.lowest - rho) * self.sizes[:-1].square() + after) / before


def rings(height: int, width: int) -> Tensor:
    """(h, w) int64: the radius of each bin of an unshifted 2-D DFT, rounded to whole frequencies of the shorter side."""
    short = min(height, width)
    ky, kx = torch.fft.fftfreq(height, 1 / short), torch.fft.fftfreq(width, 1 / short)
    return torch.hypot(ky[:, None], kx[None]).round().long()


def high_frequency_share(images: Tensor, above: float = 0.25) -> Tensor:
    """(B,) in [0, 1]: share of each image's energy, its mean apart, at radial frequencies above `above`, where 1 is Nyquist's.

    images (B, C, H, W); frequencies are cycles a pixel, along whichever side, so that size and aspect do not matter.
    """
    power = torch.fft.fft2(images.double().cpu()).abs().square().sum(1)
    ky, kx = (torch.fft.fftfreq(n, dtype=torch.float64) for n in images.shape[-2:])
    radius = 2 * torch.hypot(ky[:, None], kx[None])
    power[:, 0, 0] = 0
    return power[:, radius > above].sum(1) / power.sum((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)


def stored_bytes(map_: Callable[[Tensor], Tensor], z: Tensor, weights: Iterable[Tensor] = ()) -> int:
    """What autograd stores, beside the weights, to differentiate map_(z): a lower bound of the memory a gradient needs.

    With weights and z on the meta device nothing is computed, so it tells what would not fit.
    """
    known = {w.untyped_storage()._cdata for w in weights}
    stored = {}  # keeps the storages alive, so that no address is used twice

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            stored[storage._cdata] = storage
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        _graph = map_(z.detach().requires_grad_())
    return sum(storage.nbytes() for storage in stored.values())


@dataclass(frozen=True)
class NoiseRecovery:
    """How much of a model's noise comes back, per channel and ring: both (C, R) float64.

    A bin F of the noise is recovered as a F + rest, with `attenuation` a and `variance` v = E|rest|², for orthonormal
    transforms of unit normal noise. A mark of unit power stands at a signal-to-noise ratio a²/v.
    """

    attenuation: Tensor
    variance: Tensor

    FILE: ClassVar[str] = "noise_recovery.json"

    @property
    def null(self) -> Tensor:
        """Variance of a recovered bin of an unmarked image of this model, a² + v."""
        return self.attenuation.square() + self.variance

    @classmethod
    def measure(cls, recovered: Tensor, truth: Tensor) -> NoiseRecovery:
        """From recovered and true noise (B, C, h, w): a = Re Σ F̂ F* / Σ |F|², v = mean |F̂ − a F|²."""
        f, g = (torch.fft.fft2(x.double().cpu(), norm="ortho") for x in (truth, recovered))
        ring = rings(*truth.shape[-2:])
        count = len(truth) * torch.bincount(ring.flatten())

        def per_ring(power: Tensor) -> Tensor:
            total = torch.zeros(truth.shape[1], len(count), dtype=torch.float64)
            return total.index_add_(1, ring.flatten(), power.sum(0).flatten(1))

        a = per_ring((g * f.conj()).real) / per_ring(f.abs().square())
        return cls(a, per_ring((g - a[:, ring] * f).abs().square()) / count)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over both tables."""
        return hashlib.sha256(torch.stack([self.attenuation, self.variance]).numpy().tobytes()).hexdigest()[:16]

    def save(self, folder: Path, **settings) -> None:
        """Store it beside the model's weights, with the settings it was measured under."""
        table = {"attenuation": self.attenuation, "variance": self.variance}
        rounded = {k: [[float(f"{x:.6g}") for x in row] for row in v.tolist()] for k, v in table.items()}
        (folder / self.FILE).write_text(json.dumps(settings | rounded, indent=1))

    @classmethod
    def load(cls, folder: Path) -> NoiseRecovery | None:
        """What is stored in a model's folder; None if nothing is. Raises ModelError for a damaged file."""
        path = folder / cls.FILE
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text())
            a, v = (torch.tensor(stored[k], dtype=torch.float64) for k in ("attenuation", "variance"))
            if a.shape != v.shape or a.ndim != 2 or not (a.isfinite() & v.isfinite() & (v > 0)).all():
                raise ValueError("attenuation and variance must be tables of one shape, finite, variance positive")
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: damaged ({error}); measure it again with scripts/measure_recovery.py") from error
        return cls(a, v)


def peak_during(device: torch.device, work: Callable[[], Result]) -> tuple[Result, float]:
    """What `work` returns, and the megabytes above what was there before that it needed at its peak.

    On a CPU by Linux's account of this process, NaN where there is none; memory that a library freed but holds back
    counts as there before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return work(), (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
        before = memory_kilobytes("VmRSS")
        memory_kilobytes("VmHWM")
    except OSError:
        return work(), float("nan")
    return work(), (memory_kilobytes("VmHWM") - before) / 2**10


def release_memory() -> None:
    """Hand what the C library holds of freed memory back to the system, if it is one that can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows a library has to be named
        return


def memory_kilobytes(field: str) -> int:
    """A field of this process's status, VmRSS say, in kilobytes. Raises OSError where there is no such account (not Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = [int(line.split()[1]) for line in lines if line.startswith(field + ":")]
    if not found:
        raise OSError(errno.ENOENT, f"no {field} in it", "/proc/self/status")
    return found[0]
