"""Fixed-point methods for T(z) = 0: frozen records of hyper-parameters with init() and step().

Every step works on a batch, each sample by itself; state tensors have a leading batch dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inversion.solve import Method, State, norms

__all__ = ["METHODS", "Adam", "Anderson", "ForwardStep", "InertialKM"]


def _each(per_sample: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, …) for multiplying with `like`."""
    return per_sample.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class ForwardStep:
    """z ← z − ρ T(z); converges for 0 < ρ < 2β if T is β-cocoercive along the path (arXiv 2409.18442, Theorem 1)."""

    rho: float = 1.0

    def init(self, z: Tensor) -> State:
        return {}

    def step(self, z: Tensor, residual: Tensor, state: State) -> tuple[Tensor, State]:
        return z - self.rho * residual, state


@dataclass(frozen=True)
class InertialKM:
    """y = z_k + α (z_k − z_{k−1}); z_{k+1} = y − 2λβ T(y) (arXiv 2409.18442, Theorem 2).

    The driver evaluates T where the method stands, so the iterate handed around is y. The paper runs α = 0.9 with
    ρ = 2λβ = 0.001; the defaults are quicker where E∘D is near the identity. Raises ValueError where
    λ (1 − α + 2α²) ≥ (1 − α)², outside which the theorem says nothing.
    """

    lam: float = 0.25
    alpha: float = 0.3
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"inertial KM needs 0 <= alpha < 1, not {self.alpha}")
        if not 0 < self.lam * (1 - self.alpha + 2 * self.alpha**2) < (1 - self.alpha) ** 2:
            bound = (1 - self.alpha) ** 2 / (1 - self.alpha + 2 * self.alpha**2)
            raise ValueError(f"inertial KM with alpha = {self.alpha} needs 0 < lam < {bound:.4g}, not {self.lam}")

    def init(self, z: Tensor) -> State:
        return {"previous": z.clone()}

    def step(self, z: Tensor, residual: Tensor, state: State) -> tuple[Tensor, State]:
        new = z - 2 * self.lam * self.beta * residual
        return new + self.alpha * (new - state["previous"]), {"previous": new}


@dataclass(frozen=True)
class Adam:
    """Adam with T in the gradient's place, and the schedule of arXiv 2409.18442 over `horizon` = N steps.

    Linear warm-up over N/10 steps, a cosine until 0.8 N, constant from there; N counts at most 100. Without a horizon
    the rate is constant. `eps` is 1e-8 for maps in 32 bit and 1e-4 for 16 bit.
    """

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    horizon: int | None = 50

    def rate(self, k: int) -> float:
        """The learning rate of step k = 0, 1, …"""
        if self.horizon is None:
            return self.lr
        n = min(self.horizon, 100)
        warm, end = n / 10, 0.8 * n
        if k + 1 < warm:
            return self.lr * (k + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (min(k, end) - warm) / (n - warm)))

    def init(self, z: Tensor) -> State:
        return {
            "m": torch.zeros_like(z),
            "v": torch.zeros_like(z),
            "k": torch.zeros(len(z), dtype=torch.int64, device=z.device),
        }

    def step(self, z: Tensor, residual: Tensor, state: State) -> tuple[Tensor, State]:
        b1, b2 = self.betas
        m = b1 * state["m"] + (1 - b1) * residual
        v = b2 * state["v"] + (1 - b2) * residual**2
        k = int(state["k"][0])  # the driver drops samples but never restarts them: one count serves all
        update = (m / (1 - b1 ** (k + 1))) / ((v / (1 - b2 ** (k + 1))).sqrt() + self.eps)
        return z - self.rate(k) * update, {"m": m, "v": v, "k": state["k"] + 1}


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration, type II, of z ← z − β T(z), safeguarded sample by sample.

    With ΔZ, ΔT the last `window` differences and γ = argmin ‖T − ΔT γ‖² + ridge·tr(ΔTᵀΔT)‖γ‖²:
    z⁺ = z − β T − (ΔZ − β ΔT) γ. A step after which ‖T‖ exceeds `safeguard` times the lowest so far is undone: back to
    that iterate with an empty history and half the β (after arXiv 1808.03971).
    """

    window: int = 5
    beta: float = 1.0
    ridge: float = 1e-4
    safeguard: float = 1.5

    def __post_init__(self) -> None:
        if self.window < 1 or not self.ridge > 0:
            raise ValueError(f"Anderson needs window >= 1 and ridge > 0, not {self.window} and {self.ridge}")

    def init(self, z: Tensor) -> State:
        none = torch.zeros(len(z), self.window, z[0].numel(), device=z.device)
        beta = torch.full((len(z),), self.beta, device=z.device)
        far = torch.full((len(z),), torch.inf, device=z.device)
        return {
            "dz": none,
            "dt": none.clone(),
            "z": z.clone(),
            "t": torch.zeros_like(z),
            "best_z": z.clone(),
            "best_t": torch.zeros_like(z),
            "best": far,
            "beta": beta,
        }

    def step(self, z: Tensor, residual: Tensor, state: State) -> tuple[Tensor, State]:
        size, first = norms(residual), state["best"].isinf()
        bad = size > self.safeguard * state["best"]
        better = size < state["best"]
        best_z, best_t = (
            torch.where(_each(better, z), z, state["best_z"]),
            torch.where(_each(better, z), residual, state["best_t"]),
        )
        z, t = torch.where(_each(bad, z), best_z, z), torch.where(_each(bad, z), best_t, residual)
        beta = torch.where(bad, state["beta"] / 2, state["beta"])
        fresh = (bad | first)[:, None, None]
        push = lambda old, new: torch.where(fresh, 0.0, torch.cat([old[:, 1:], new.flatten(1)[:, None]], 1))
        dz, dt = push(state["dz"], z - state["z"]), push(state["dt"], t - state["t"])
        plain, gamma = _each(beta, z) * t, self._mix(dt, t.flatten(1))
        correction = torch.einsum("bm,bmn->bn", gamma, dz - beta[:, None, None] * dt).view_as(z)
        new = {
            "dz": dz,
            "dt": dt,
            "z": z,
            "t": t,
            "best_z": best_z,
            "best_t": best_t,
            "best": torch.minimum(size, state["best"]),
            "beta": beta,
        }
        return z - plain - correction, new

    def _mix(self, dt: Tensor, t: Tensor) -> Tensor:
        """γ (B, m): ridge regression of t on the rows of dt, in float64; empty rows get γ = 0."""
        dt, t = dt.double(), t.double()
        gram = torch.einsum("bmn,bkn->bmk", dt, dt)
        trace = gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        eye = torch.eye(self.window, dtype=gram.dtype, device=gram.device)
        right = torch.einsum("bmn,bn->bm", dt, t)
        # solve_ex, because solve raises for the whole batch where one sample's system is singular
        mix, _ = torch.linalg.solve_ex(gram + self.ridge * trace[:, None, None] * eye, right)
        return mix.nan_to_num(0.0, 0.0, 0.0).float()


METHODS: dict[str, type[Method]] = {"forward": ForwardStep, "km": InertialKM, "adam": Adam, "anderson": Anderson}
"""The methods by the names that commands use; "encoder" is any of them with zero steps."""
