"""Fixed-point methods for T(z) = 0: frozen records of hyper-parameters with init() and step().

A step processes a batch, each sample independently; state tensors have a leading batch dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ringmark.inversion.solve import State, norms

__all__ = ["Adam", "Anderson", "ForwardStep", "InertialKM", "Operator"]


def _each(per_sample: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, …), to multiply with `like`."""
    return per_sample.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class ForwardStep:
    """z ← z − ρ T(z); converges for 0 < ρ < 2β if T is β-cocoercive along the path (arXiv 2409.18442, Theorem 1)."""

    rho: float = 1.0

    def init(self, z: Tensor) -> State:
        return {}

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]:
        return z - self.rho * t, state


@dataclass(frozen=True)
class InertialKM:
    """y = z_k + α (z_k − z_{k−1}); z_{k+1} = y − 2λβ T(y) (arXiv 2409.18442, Theorem 2).

    The driver evaluates T at the iterate, which is y. The paper uses α = 0.9 with ρ = 2λβ = 0.001; the defaults
    converge faster if E∘D is close to the identity. Raises ValueError unless λ (1 − α + 2α²) < (1 − α)², as the theorem
    requires.
    """

    lam: float = 0.25
    alpha: float = 0.3
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"inertial KM needs 0 <= alpha < 1, not {self.alpha}")
        bound = self.bound(self.alpha)
        if not 0 < self.lam < bound:
            raise ValueError(f"inertial KM with alpha = {self.alpha} needs 0 < lam < {bound:.4g}, not {self.lam}")

    @staticmethod
    def bound(alpha: float) -> float:
        """(1 − α)² / (1 − α + 2α²), the upper bound of λ in Theorem 2."""
        return (1 - alpha) ** 2 / (1 - alpha + 2 * alpha**2)

    def init(self, z: Tensor) -> State:
        return {"previous": z.clone()}

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]:
        new = z - 2 * self.lam * self.beta * t
        return new + self.alpha * (new - state["previous"]), {"previous": new}


@dataclass(frozen=True)
class Adam:
    """Adam with T in the gradient's place, and the schedule of arXiv 2409.18442 over `horizon` = N steps.

    Linear warm-up over N/10 steps, then a cosine until 0.8 N, then constant; N is at most 100. Without a horizon the
    rate is constant. `eps` is 1e-8 for 32-bit maps and 1e-4 for 16-bit maps.
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

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]:
        b1, b2 = self.betas
        m = b1 * state["m"] + (1 - b1) * t
        v = b2 * state["v"] + (1 - b2) * t**2
        k = int(state["k"][0])  # the driver drops samples but never restarts them, so all have the same count
        update = (m / (1 - b1 ** (k + 1))) / ((v / (1 - b2 ** (k + 1))).sqrt() + self.eps)
        return z - self.rate(k) * update, {"m": m, "v": v, "k": state["k"] + 1}


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration, type II, of z ← z − β T(z), safeguarded sample by sample.

    With ΔZ, ΔT, ΔR the last `window` differences of z, T and the error R, γ = argmin ‖R − ΔR γ‖² + ridge ‖γ‖² (columns
    of ΔR scaled to length 1) and z⁺ = z − β T − (ΔZ − β ΔT) γ. If the map returns an error besides T, as decoder
    inversion returns D(z) − x, the mixture is the one that fits the picture best, and E∘D need not be cocoercive in the
    directions already seen. Otherwise R = T, which is the usual method.

    If ‖R‖ exceeds `safeguard` times the lowest value so far, the step is undone and β is halved. Its difference stays
    in the history, since it carries information about the map (after arXiv 1808.03971).
    """

    window: int = 5
    beta: float = 1.0
    ridge: float = 1e-4
    safeguard: float = 1.2

    def __post_init__(self) -> None:
        if self.window < 1 or not self.ridge > 0:
            raise ValueError(f"Anderson needs window >= 1 and ridge > 0, not {self.window} and {self.ridge}")

    def init(self, z: Tensor) -> State:
        return {}

    def _first(self, z: Tensor, t: Tensor, error: Tensor) -> State:
        """The initial state: no differences, and a best error of infinity."""
        points = {"z": z, "t": t, "r": error}
        history = {f"d{name}": x.new_zeros(len(x), self.window, x[0].numel()) for name, x in points.items()}
        best, beta = (torch.full((len(z),), value, device=z.device) for value in (torch.inf, self.beta))
        return {**points, **history, "best": best, "beta": beta}

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]:
        old = state or self._first(z, t, error)
        size = norms(error)
        accepted = size <= self.safeguard * old["best"]
        new = {
            "best": torch.fmin(size, old["best"]),
            "beta": torch.where(accepted, old["beta"], old["beta"] / 2),
        }
        for name, now in (("z", z), ("t", t), ("r", error)):
            change = (now - old[name]).flatten(1)[:, None]
            new["d" + name] = torch.cat([old["d" + name][:, 1:], change], 1)
            new[name] = torch.where(_each(accepted, now), now, old[name])
        gamma, beta = self._mix(new["dr"], new["r"].flatten(1)), new["beta"][:, None, None]
        correction = torch.einsum("bm,bmn->bn", gamma, new["dz"] - beta * new["dt"]).view_as(z)
        return new["z"] - _each(new["beta"], z) * new["t"] - correction, new

    def _mix(self, dr: Tensor, r: Tensor) -> Tensor:
        """γ (B, m): ridge regression of r on the rows of dr, solved in float64; empty rows get γ = 0.

        Products are computed in float32, whose rounding is far below the ridge; a float64 copy would take most of the
        memory of a step.
        """
        gram, right = (dr @ dr.mT).double(), (dr @ r[:, :, None])[:, :, 0].double()
        length = gram.diagonal(dim1=1, dim2=2).sqrt()
        inverse = torch.where(length > 0, 1 / length, 0.0)
        gram, right = gram * inverse[:, :, None] * inverse[:, None], right * inverse
        eye = torch.eye(self.window, dtype=gram.dtype, device=gram.device)
        # solve_ex, because solve raises for the whole batch if one sample's system is singular
        mix, _ = torch.linalg.solve_ex(gram + self.ridge * eye, right)
        return torch.nan_to_num(mix * inverse, nan=0.0, posinf=0.0, neginf=0.0).float()


@dataclass(frozen=True)
class Operator:
    """z ← z − P [T(z); z] with P (C × 2C) fitted to a picture whose latent is known: the rendering of the encoder's.

    An iterate (2, C, h, w) holds the picture's latents, which start at y = E(x), and those of its rendering D(y), which
    start at E(D(y)). The rendering's answer is y, so its error w − y is known at every step, and

        P = argmin Σ_sites |w − y − P [T(w); w]|² + ridge

    tells T what to correct and shrinks the latents as E∘D requires. Where neither says anything about the error, P is
    small. The ridge is the mean square of T or of w times the regressors per site, so that few sites give a small P.
    The step is multiplied by `generalisation`, which is small where P holds only at the sites it was fitted to. The
    rendering's error never grows, since P = 0 would keep it.
    """

    allowance: float = 1.9
    steepness: float = 8.0

    def init(self, z: Tensor) -> State:
        return {"answer": z[:, 0].clone()}

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]:
        seen = torch.cat([t, z], 2)
        wrong = z[:, 1] - state["answer"]
        change = torch.einsum("bcf,bpfhw->bpchw", fitted(seen[:, 1], wrong), seen)
        return z - _each(generalisation(seen[:, 1], wrong), z) * change, state

    def share(self, start: Tensor, end: Tensor) -> Tensor:
        """The share (B,) in [0, 1] of its change that a picture keeps, from its first and last iterate.

        A picture that was altered after it was decoded changes more than its rendering does. With r = ‖end − start‖² /
        ‖start‖² of the rendering, divided by that of the picture, the share is min(1, `allowance` r) to the power of
        `steepness`. If E∘D merely scales, r is 1. The share is 0 where r is not a number.
        """
        relative = norms((end - start).flatten(0, 1)) / norms(start.flatten(0, 1))
        picture, rendering = relative.square().view(-1, 2).unbind(1)
        kept: Tensor = (self.allowance * rendering / picture).nan_to_num(0.0).clamp(max=1.0) ** self.steepness
        return kept


FOLDS = 4  # of the sites, for generalisation


def fitted(seen: Tensor, error: Tensor) -> Tensor:
    """P (B, C, 2C) with P `seen` ≈ `error` over all sites, by ridge regression of (B, C, …) on (B, 2C, …)."""
    x, e = seen.flatten(2).double(), error.flatten(2).double()
    regressors, sites = x.shape[1:]
    gram = x @ x.mT
    power = gram.diagonal(dim1=1, dim2=2).reshape(len(x), 2, -1).mean(2)  # of T and of the latents
    ridge = (power * regressors / sites).repeat_interleave(regressors // 2, 1)
    p, _ = torch.linalg.solve_ex(gram + torch.diag_embed(ridge), x @ e.mT)
    return torch.nan_to_num(p.mT, nan=0.0, posinf=0.0, neginf=0.0).float()


def generalisation(seen: Tensor, error: Tensor) -> Tensor:
    """The share (B,) in [0, 1] of P's prediction that holds at sites to which P was not fitted.

    With e the error and e' its prediction at each site by the P of the other folds of sites, it is ⟨e', e⟩ / ‖e'‖².
    """
    x, e = seen.flatten(2), error.flatten(2)
    fold = torch.arange(x.shape[2], device=x.device) % FOLDS
    predicted = torch.zeros_like(e)
    for held in (fold == k for k in range(FOLDS)):
        predicted[:, :, held] = fitted(x[:, :, ~held], e[:, :, ~held]) @ x[:, :, held]
    share = (predicted * e).sum((1, 2)) / predicted.square().sum((1, 2))
    return share.nan_to_num(0.0).clamp(0.0, 1.0)
