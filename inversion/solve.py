"""One driver for every fixed-point method.

The driver owns the loop: it evaluates the residual, keeps each sample's best iterate, decides when a sample is done
and lets the batch shrink to those that are not. A method owns one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Method", "Residual", "Solution", "State", "Status", "solve"]

State = dict[str, Tensor]
"""What a method remembers: tensors with a leading batch dimension, so that the driver can drop finished samples."""

Residual = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
"""(iterates (A, …), their rows in the batch (A,)) → T of the same shape, or T and an error (A, …) of any shape.

The norm of the error is the merit by which the best iterate is chosen; without an error it is that of T."""


class Method(Protocol):
    """A fixed-point method: hyper-parameters only, its state explicit."""

    def init(self, z: Tensor) -> State: ...

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]: ...


class Status(Enum):
    """Why a sample stopped."""

    CONVERGED = "converged"  # its residual fell to the tolerance
    STALLED = "stalled"  # its best residual no longer improves
    MAX_STEPS = "max steps"
    START_KEPT = "start kept"  # its residual fell too little to rely on what follows; the value is the start
    ROUNDED = "16-bit rounding"  # what 16-bit maps lose is more than an 8-bit image does; 32 bit would come nearer
    DIVERGED = "diverged"  # NaN, overflow, or a residual far above the first; the value is still the best iterate


@dataclass(frozen=True)
class Solution:
    """`value` (B, …): each sample's best iterate; `residuals` (K, B): ‖T‖ along the way, NaN once a sample is done;
    `merits` (K, B): what the best iterate was chosen by; `steps` (B,): evaluations spent; `status`: one a sample;
    `chosen` (B,): at which of the K evaluations the value was met."""

    value: Tensor
    residuals: Tensor
    merits: Tensor
    steps: Tensor
    status: list[Status]
    chosen: Tensor

    def at_value(self, log: Tensor) -> Tensor:
        """(B,): residuals or merits (K, B) of the values returned; NaN where nothing was evaluated."""
        if not len(log):
            return torch.full((len(self.status),), torch.nan)
        return log.gather(0, self.chosen[None])[0]


STALL_GAIN = 0.99  # a sample stalls unless its best residual falls below this share of the one `PATIENCE` ago
PATIENCE = 3
BLOW_UP = 1e3  # a residual this many times the first will not come back


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample (B,)."""
    return x.reshape(len(x), -1).norm(dim=1)


@dataclass
class _Progress:
    """What the driver knows of each sample of the whole batch."""

    value: Tensor
    merit: Tensor
    first: Tensor
    lowest: Tensor  # (B, PATIENCE + 1) the best residual now and up to PATIENCE evaluations ago
    steps: Tensor
    status: list[Status]
    chosen: Tensor

    @classmethod
    def start(cls, z: Tensor) -> _Progress:
        inf = torch.full((len(z),), torch.inf, device=z.device)
        return cls(
            z.clone(),
            inf.clone(),
            inf.clone(),
            inf[:, None].repeat(1, PATIENCE + 1),
            torch.zeros(len(z), dtype=torch.int64),
            [Status.MAX_STEPS] * len(z),
            torch.zeros(len(z), dtype=torch.int64),
        )

    def update(self, rows: Tensor, z: Tensor, size: Tensor, merit: Tensor) -> None:
        better = torch.isfinite(size) & (merit < self.merit[rows])
        self.value[rows[better]], self.merit[rows[better]] = z[better], merit[better]
        improved = rows[better].cpu()
        self.chosen[improved] = self.steps[improved]
        self.first[rows] = torch.where(self.first[rows].isinf(), size, self.first[rows])
        best = torch.fmin(self.lowest[rows, :1], size[:, None])
        self.lowest[rows] = torch.cat([best, self.lowest[rows, :-1]], 1)
        self.steps[rows.cpu()] += 1

    def finished(self, rows: Tensor, size: Tensor, tol: Tensor | None) -> Tensor:
        """(A,) which of the active samples stop here; their status is noted."""
        converged = size <= (0.0 if tol is None else tol[rows])
        diverged = ~torch.isfinite(size) | (size > BLOW_UP * self.first[rows])
        stalled = (self.lowest[rows, 0] > STALL_GAIN * self.lowest[rows, -1]) & (tol is not None)
        done = torch.zeros_like(diverged)
        for now, status in (
            (converged, Status.CONVERGED),
            (diverged, Status.DIVERGED),
            (stalled, Status.STALLED),
        ):
            for row in rows[now & ~done].tolist():
                self.status[row] = status
            done |= now
        return done


def solve(
    residual: Residual,
    start: Tensor,
    method: Method,
    *,
    max_steps: int,
    tol: float | Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Look for z with T(z) = 0, each sample of the batch by itself.

    `max_steps` ≥ 0 steps are taken at most, so T is evaluated max_steps + 1 times (not at all for 0: the solution is
    the start). `tol`, a number or one a sample, is the ‖T‖ at which a sample has converged; a sample that stalls above
    it stops too. With None every step is taken, save where T is zero or diverges. The value returned is the evaluated
    iterate with the lowest merit, so it is never worse than the start. `progress(k, active)` is called after
    each evaluation. State and iterates are float32 whatever the dtype of the maps.
    """
    z = start.float()
    tol = None if tol is None else torch.as_tensor(tol, dtype=z.dtype, device=z.device).expand(len(z))
    rows, state, seen = torch.arange(len(z), device=z.device), method.init(z), _Progress.start(z)
    sizes, merits = [], []
    for k in range(max_steps + 1 if max_steps else 0):
        value = residual(z, rows)
        t, error = (x.float() for x in (value if isinstance(value, tuple) else (value, value)))
        size, merit = norms(t), norms(error)
        seen.update(rows, z, size, merit)
        for log, now in ((sizes, size), (merits, merit)):
            log.append(torch.full((len(start),), torch.nan).index_put_((rows.cpu(),), now.float().cpu()))
        keep = ~seen.finished(rows, size, tol)
        if progress:
            progress(k, int(keep.sum()))
        if k == max_steps or not keep.any():
            break
        if not keep.all():  # gathering copies
            rows, z, t, error = rows[keep], z[keep], t[keep], error[keep]
            state = {name: s[keep] for name, s in state.items()}
        z, state = method.step(z, t, error, state)
    empty = torch.empty(0, len(start))
    return Solution(
        seen.value,
        torch.stack(sizes) if sizes else empty,
        torch.stack(merits) if merits else empty,
        seen.steps,
        seen.status,
        seen.chosen,
    )
