"""One driver for all fixed-point methods.

The driver owns the loop: it evaluates the residual, keeps each sample's best iterate, decides when a sample is done and
drops finished samples from the batch. A method owns one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Method", "Residual", "Solution", "State", "Status", "evaluated", "norms", "solve"]

State = dict[str, Tensor]
"""A method's state: tensors with a leading batch dimension, so that the driver can drop finished samples."""

Residual = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
"""(iterates (A, …), their rows in the batch (A,)) → T of the same shape, or T and an error (A, …) of any shape.

The norm of the error is the merit by which the best iterate is chosen; without an error it is that of T."""


class Method(Protocol):
    """A fixed-point method: hyper-parameters only, with explicit state."""

    def init(self, z: Tensor) -> State: ...

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]: ...


class Status(Enum):
    """Why a sample stopped."""

    CONVERGED = "converged"  # its residual reached the tolerance
    STALLED = "stalled"  # its best residual no longer improves
    MAX_STEPS = "max steps"
    NO_STEPS = "no steps"  # none were asked for; the value is the start
    ROUNDED = "16-bit rounding"  # 16-bit maps lose more than the rounding of an 8-bit image; 32 bits are more accurate
    DIVERGED = "diverged"  # NaN, overflow, or a residual far above the first; the value is still the best iterate


@dataclass(frozen=True)
class Solution:
    """The driver's result for B samples after at most K evaluations of T.

    `value` (B, …) is the best iterate. `residuals` (K, B) are ‖T‖ and `merits` (K, B) the criterion for the best
    iterate, both NaN once a sample has stopped. `steps` (B,) counts evaluations, `status` says why each sample stopped,
    and `chosen` (B,) is the evaluation that gave the value, or from which the last step led to it.
    """

    value: Tensor
    residuals: Tensor
    merits: Tensor
    steps: Tensor
    status: list[Status]
    chosen: Tensor

    def at_value(self, log: Tensor) -> Tensor:
        """Residuals or merits (B,) of the returned values, from `log` (K, B); NaN if nothing was evaluated."""
        return log.gather(0, self.chosen[None])[0] if len(log) else torch.full((len(self.status),), torch.nan)


STALL_GAIN = 0.99  # a sample stalls unless its best residual falls below this share of the one `PATIENCE` ago
PATIENCE = 3
BLOW_UP = 1e3  # a residual this many times the first has diverged


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample (B,)."""
    lengths: Tensor = torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)
    return lengths


def evaluated(residual: Residual, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """T and the error at z, both float32; the error is T if the residual returns none."""
    value = residual(z, rows)
    t, error = value if isinstance(value, tuple) else (value, value)
    return t.float(), error.float()


@dataclass
class _Progress:
    """The driver's state for each sample of the whole batch."""

    value: Tensor
    merit: Tensor
    first: Tensor
    lowest: Tensor  # (B, PATIENCE + 1) the best residual now and up to PATIENCE evaluations ago
    steps: Tensor
    status: list[Status]
    chosen: Tensor

    @classmethod
    def start(cls, z: Tensor, status: Status) -> _Progress:
        count = len(z)
        return cls(
            value=z.clone(),
            merit=torch.full((count,), torch.inf, device=z.device),
            first=torch.full((count,), torch.inf, device=z.device),
            lowest=torch.full((count, PATIENCE + 1), torch.inf, device=z.device),
            steps=torch.zeros(count, dtype=torch.int64),
            status=[status] * count,
            chosen=torch.zeros(count, dtype=torch.int64),
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

    def keep(self, rows: Tensor, z: Tensor, evaluation: int) -> None:
        """Take z as the value, whatever its merit; its logs are those of this evaluation."""
        self.value[rows], self.chosen[rows.cpu()] = z, max(0, evaluation)

    def finished(self, rows: Tensor, size: Tensor, tol: Tensor | None) -> Tensor:
        """Mask (A,) of the active samples that stop here; records their status."""
        reasons = {
            Status.CONVERGED: size <= (0.0 if tol is None else tol[rows]),
            Status.DIVERGED: ~torch.isfinite(size) | (size > BLOW_UP * self.first[rows]),
            Status.STALLED: (self.lowest[rows, 0] > STALL_GAIN * self.lowest[rows, -1]) & (tol is not None),
        }
        done = torch.zeros_like(size, dtype=torch.bool)
        for status, now in reasons.items():
            for row in rows[now & ~done].tolist():
                self.status[row] = status
            done |= now
        return done

    def solution(self, sizes: _Log, merits: _Log) -> Solution:
        return Solution(
            value=self.value,
            residuals=sizes.stack(),
            merits=merits.stack(),
            steps=self.steps,
            status=self.status,
            chosen=self.chosen,
        )


@dataclass
class _Log:
    """Log of numbers (K, B), NaN for samples that have stopped."""

    count: int
    lines: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor, values: Tensor) -> None:
        line = torch.full((self.count,), torch.nan)
        self.lines.append(line.index_put_((rows.cpu(),), values.float().cpu()))

    def stack(self) -> Tensor:
        return torch.stack(self.lines) if self.lines else torch.empty(0, self.count)


def solve(
    residual: Residual,
    start: Tensor,
    method: Method,
    *,
    max_steps: int,
    tol: float | Tensor | None = None,
    first: tuple[Tensor, Tensor] | None = None,
    judged: bool = True,
) -> Solution:
    """Solve T(z) = 0 for each sample of a batch independently.

    At most `max_steps` ≥ 0 steps are taken, so T is evaluated at most max_steps + 1 times (for 0 not at all; the
    solution is then the start). `tol`, a number or one per sample, is the ‖T‖ at which a sample has converged; a sample
    that stalls above it also stops. With None, all steps are taken unless T becomes zero or diverges. The returned
    value is the evaluated iterate with the lowest merit, so it is never worse than the start. State and iterates are
    float32 for any dtype of the maps.

    `first` is T and the error at the start if they are known already. If not `judged`, the value is the iterate after
    the last step, whatever the merits, and T is not evaluated there: for a method that needs no merit. A sample that
    diverged still gets its best iterate.
    """
    z = start.float()
    limits = None if tol is None else torch.as_tensor(tol, dtype=z.dtype, device=z.device).expand(len(z))
    rows, state = torch.arange(len(z), device=z.device), method.init(z)
    best = _Progress.start(z, Status.MAX_STEPS if max_steps else Status.NO_STEPS)
    sizes, merits = _Log(len(z)), _Log(len(z))
    for k in range(max_steps + judged if max_steps else 0):
        t, error = first if first and k == 0 else evaluated(residual, z, rows)
        size, merit = norms(t), norms(error)
        best.update(rows, z, size, merit)
        sizes.add(rows, size)
        merits.add(rows, merit)
        keep = ~best.finished(rows, size, limits)
        if k == max_steps or not keep.any():
            break
        if not keep.all():  # indexing copies
            rows, z, t, error = rows[keep], z[keep], t[keep], error[keep]
            state = {name: s[keep] for name, s in state.items()}
        z, state = method.step(z, t, error, state)
    else:
        if not judged:
            best.keep(rows, z, max_steps - 1)
    return best.solution(sizes, merits)
