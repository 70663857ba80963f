"""Metrics of the accuracy and convergence of inversions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from ringmark.inversion.solve import Method, Residual, evaluated, norms

__all__ = ["Walk", "cocoercivity", "correlation", "nmse_db", "trace"]


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
    """(z_k, T z_k) for k = 0 … steps: the points where the method evaluates T, without the driver's stopping criteria.

    For a method with momentum, z_k is the extrapolated point, where its theorem requires cocoercivity.
    """
    z, rows = start.float(), torch.arange(len(start), device=start.device)
    state = method.init(z)
    for k in range(steps + 1):
        t, error = evaluated(residual, z, rows)
        yield z, t
        if k < steps:
            z, state = method.step(z, t, error, state)


@dataclass(frozen=True)
class Walk:
    """A method's path to its last iterate z_∞ (arXiv 2409.18442 takes the 300th); float64.

    For k = 0 … K and each sample (K + 1, B): `distances` ‖z_k − z_∞‖, `sizes` ‖T z_k‖, `betas`
    ⟨T z_k, z_k − z_∞⟩ / ‖T z_k‖². `end` (B,) is ‖T z_∞‖, since the last iterate need not be a fixed point. `true_betas`
    are cocoercivities about known latents instead of z_∞, NaN without them: a slow method with equal steps ρ has
    β_k ≈ ρ (steps − k) about its own end for any T.
    """

    distances: Tensor
    sizes: Tensor
    betas: Tensor
    true_betas: Tensor
    end: Tensor

    ARRIVED: ClassVar[float] = 1e-6
    """Share of the first ‖T‖ below which T is rounding error, and cocoercivity is 0/0."""

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
        """Take `steps` steps, and evaluate the first `at` (= K), whose iterates are kept until the end is known."""
        points = trace(residual, start, method, steps)
        seen = [(z.double(), t.double()) for z, t in islice(points, at + 1)]
        end, last = seen[-1]
        for z, t in points:
            end, last = z.double(), t.double()
        known = torch.full_like(end, torch.nan) if truth is None else truth.double()
        return cls(
            distances=torch.stack([norms(z - end) for z, _ in seen]).cpu(),
            sizes=torch.stack([norms(t) for _, t in seen]).cpu(),
            betas=torch.stack([cocoercivity(z, t, end) for z, t in seen]).cpu(),
            true_betas=torch.stack([cocoercivity(z, t, known) for z, t in seen]).cpu(),
            end=norms(last).cpu(),
        )

    @property
    def moving(self) -> Tensor:
        """Mask (K, B) of the steps that start before the fixed point is reached up to rounding."""
        return ~(self.sizes[:-1] <= self.ARRIVED * self.sizes[0])

    @property
    def lowest(self) -> Tensor:
        """The minimum cocoercivity (B,) over k < K, the path's β; NaN if the path overflowed."""
        return torch.where(self.moving, self.betas[:-1], torch.inf).amin(0)

    @property
    def true_lowest(self) -> Tensor:
        """`lowest` about the known latents."""
        return torch.where(self.moving, self.true_betas[:-1], torch.inf).amin(0)

    def slack(self, rho: float) -> Tensor:
        """The slack (K, B) of Theorem 1's descent inequality, as a share of ‖z_k − z*‖².

        ‖z_k − z*‖² − ρ (2β − ρ) ‖T z_k‖² − ‖z_{k+1} − z*‖² ≥ 0 along z_{k+1} = z_k − ρ T z_k, with the path's β and
        z* = z_∞. In exact arithmetic the slack is 2ρ (β_k − β) ‖T z_k‖², so violations are rounding errors.
        """
        before, after = self.distances[:-1].square(), self.distances[1:].square()
        return 1 - (rho * (2 * self.lowest - rho) * self.sizes[:-1].square() + after) / before
