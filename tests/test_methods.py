"""The methods against their theorems, their papers' schedules and torch's own Adam."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ringmark.inversion.methods import Adam, Anderson, ForwardStep, InertialKM, Operator, generalisation
from ringmark.inversion.solve import Status, norms, solve


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    eigenvalues=st.lists(st.floats(0.05, 4.0), min_size=1, max_size=6),
    share=st.floats(0.05, 0.95),
    skew=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**16),
)
def test_theorem_1_descent_along_the_path(eigenvalues, share, skew, seed):
    """‖z_{k+1} − z*‖² ≤ ‖z_k − z*‖² − ρ(2β − ρ)‖T z_k‖² for T = M(z − z*), ⟨Mx, x⟩ ≥ β‖Mx‖², 0 < ρ < 2β."""
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(draw(n, n, seed=seed).double())
    a = draw(n, n, seed=seed + 1).double()
    m = q @ torch.diag(torch.tensor(eigenvalues).double()) @ q.T + skew * (a - a.T)
    # ⟨Mx, x⟩ ≥ β ‖Mx‖² for all x is ⟨y, M⁻¹y⟩ ≥ β‖y‖²: β is the least eigenvalue of the symmetric part of M⁻¹
    beta = float(torch.linalg.eigvalsh((torch.linalg.inv(m) + torch.linalg.inv(m).T) / 2)[0])
    assume(beta > 1e-3)
    rho = 2 * beta * share
    root, path = draw(1, n, seed=seed + 2), []

    def residual(z, rows):
        t = (z - root) @ m.float().T
        path.append((z.double() - root, t.double()))
        return t

    solve(residual, root + draw(1, n, seed=seed + 3), ForwardStep(rho), max_steps=10)
    for (x, t), (y, _) in pairwise(path):
        assert y.square().sum() <= x.square().sum() - rho * (2 * beta - rho) * t.square().sum() + 1e-5


@given(alpha=st.floats(0.0, 0.999), lam=st.floats(1e-6, 2.0))
@example(alpha=0.9, lam=0.0057)
@example(alpha=0.9, lam=0.0059)
@example(alpha=0.0, lam=1.0)
@example(alpha=0.0, lam=0.999)
def test_inertial_km_accepts_what_theorem_2_covers_and_nothing_else(alpha, lam):
    if lam * (1 - alpha + 2 * alpha**2) < (1 - alpha) ** 2:
        InertialKM(lam=lam, alpha=alpha)
    else:
        with pytest.raises(ValueError, match="lam <"):
            InertialKM(lam=lam, alpha=alpha)


@pytest.mark.parametrize(("lam", "alpha"), [(0.01, 1.0), (0.01, 1.5), (0.01, -0.1), (0.0, 0.3), (-0.1, 0.3)])
def test_inertial_km_outside_the_theorem(lam, alpha):
    with pytest.raises(ValueError):
        InertialKM(lam=lam, alpha=alpha)


def test_inertial_km_is_its_recursion():
    lam, alpha, beta = 0.2, 0.4, 1.2

    def t(z):
        return torch.sin(z) + 0.1 * z

    visited = []
    z = draw(2, 5)
    solve(
        lambda z, rows: (visited.append(z), t(z))[1],
        z,
        InertialKM(lam, alpha, beta),
        max_steps=6,
    )
    before = now = z
    for y_visited in visited:
        y = now + alpha * (now - before)
        assert torch.allclose(y_visited, y, atol=1e-6)
        before, now = now, y - 2 * lam * beta * t(y)


def test_adam_schedule_of_the_paper():
    adam = Adam(lr=1.0, horizon=50)
    assert adam.rate(0) == pytest.approx(1 / 5)
    assert [adam.rate(k) for k in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert adam.rate(5) == pytest.approx(1.0)  # warm-up ends after N/10 steps
    assert adam.rate(20) == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 45)))
    end = 0.5 * (1 + math.cos(math.pi * 35 / 45))
    assert all(adam.rate(k) == pytest.approx(end) for k in (40, 41, 49, 50, 1000))
    assert adam.rate(39) > end
    rates = [adam.rate(k) for k in range(5, 60)]
    assert rates == sorted(rates, reverse=True) and min(rates) > 0


@pytest.mark.parametrize("k", [0, 9, 10, 50, 80, 99, 150, 200])
def test_adam_counts_at_most_a_hundred_steps(k):
    assert Adam(horizon=200).rate(k) == Adam(horizon=100).rate(k)


@given(horizon=st.integers(1, 300), k=st.integers(0, 400))
def test_adam_rates_lie_between_nothing_and_lr(horizon, k):
    assert 0 < Adam(lr=0.01, horizon=horizon).rate(k) <= 0.01


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adam_without_a_horizon_is_torch_adam(betas):
    z, root, visited = draw(3, 4), draw(3, 4, seed=1), []

    def gradient(z):
        return torch.sin(z - root) + 0.2 * (z - root) ** 3

    def residual(z, rows):
        visited.append(z.clone())
        return gradient(z)

    solve(residual, z, Adam(lr=0.03, betas=betas, horizon=None), max_steps=20)
    theirs = z.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.03, betas=betas, eps=1e-8)
    for ours in visited:
        assert torch.allclose(ours, theirs, atol=1e-5)
        theirs.grad = gradient(theirs.detach())
        optimizer.step()


@pytest.mark.parametrize("m", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("skew", [0.0, 0.3])
def test_anderson_solves_m_dimensions_in_about_m_steps(m, skew):
    """On a linear problem type II with a full window is GMRES, but for rounding and the ridge."""
    a = draw(m, m, seed=m)
    matrix = torch.diag(torch.linspace(0.5, 1.5, m)) + skew * (a - a.T) / m**0.5
    root = draw(3, m, seed=1)
    method = Anderson(window=m, ridge=1e-12)
    done = solve(lambda z, rows: (z - root[rows]) @ matrix.T, draw(3, m), method, max_steps=3 * m + 3, tol=1e-4)
    assert done.status == [Status.CONVERGED] * 3
    assert (done.steps <= m + 3).all()
    assert norms(done.value - root).max() < 1e-3


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_anderson_beats_the_plain_step_with_any_window(window):
    eigenvalues, root = torch.linspace(0.1, 1.2, 12), draw(2, 3, 2, 2)

    def residual(z, rows):
        return eigenvalues.view(3, 2, 2) * (z - root[rows])

    start = root + draw(2, 3, 2, 2, seed=1)
    ours = solve(residual, start, Anderson(window=window), max_steps=20)
    plain = solve(residual, start, ForwardStep(), max_steps=20)
    assert (norms(ours.value - root) < norms(plain.value - root)).all()


def test_anderson_starts_with_the_plain_step():
    z, t = draw(2, 3), draw(2, 3, seed=1)
    method = Anderson(beta=0.6)
    assert torch.allclose(method.step(z, t, t, method.init(z))[0], z - 0.6 * t)


def test_anderson_undoes_a_step_that_went_wrong():
    method = Anderson(beta=1.0)
    z0, t0 = draw(2, 3), draw(2, 3, seed=1)
    z1, state = method.step(z0, t0, t0, method.init(z0))
    t1 = torch.stack([0.5 * t0[0], 2.0 * t0[1]])  # the first sample went well, the second did not
    z2, state = method.step(z1, t1, t1, state)
    assert state["beta"].tolist() == [1.0, 0.5]
    assert torch.equal(state["z"], torch.stack([z1[0], z0[1]])) and torch.equal(state["t"], torch.stack([t1[0], t0[1]]))
    # T doubled along z1 − z0 = −t0, so by the difference the root lies as far on the other side.
    assert torch.allclose(z2[1], z0[1] + t0[1], atol=1e-3)


@pytest.mark.parametrize("beyond", [2.5, 4.0, 6.0])
def test_anderson_survives_eigenvalues_beyond_two_where_the_plain_step_diverges(beyond):
    eigenvalues, root = torch.tensor([beyond, 1.2, 0.8, 0.5]), draw(3, 4)

    def residual(z, rows):
        return eigenvalues * (z - root[rows])

    start = root + 1
    plain = solve(residual, start, ForwardStep(), max_steps=40, tol=1e-4)
    assert Status.CONVERGED not in plain.status
    ours = solve(residual, start, Anderson(), max_steps=40, tol=1e-4)
    assert ours.status == [Status.CONVERGED] * 3
    assert norms(ours.value - root).max() < 1e-3


def test_anderson_with_repeated_differences_stays_finite():
    """All columns of the history are multiples of one vector: the small system is singular but for the ridge."""
    root, direction = torch.zeros(2, 6), draw(1, 6)
    for ridge in (1e-4, 1e-12, 1e-20):
        method = Anderson(ridge=ridge)
        done = solve(lambda z, rows: 0.3 * z, root + direction, method, max_steps=30, tol=1e-6)
        assert done.status == [Status.CONVERGED] * 2 and done.value.isfinite().all()


@pytest.mark.parametrize("bad", [{"window": 0}, {"window": -1}, {"ridge": 0.0}, {"ridge": -1.0}])
def test_anderson_that_cannot_work_is_refused(bad):
    with pytest.raises(ValueError, match="Anderson"):
        Anderson(**bad)


def test_the_error_of_the_rendering_never_grows():
    """P = 0 would keep it, and P is fitted to it."""
    method, z = Operator(), torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    state = method.init(z)
    before = norms(z[:, 1] - state["answer"])
    for k in range(4):
        t = torch.randn(z.shape, generator=torch.Generator().manual_seed(k + 1)) + 0.3 * z
        z, state = method.step(z, t, t, state)
        after = norms(z[:, 1] - state["answer"])
        assert (after <= before).all()
        before = after


def test_the_share_of_an_altered_picture_by_hand():
    """r = (1 / 9) / (1 / 4) = 4 / 9, so that the share is (1.5 · 4 / 9)² = 4 / 9; 1 up to the allowance."""
    start = torch.tensor([[2.0, 3.0]]).view(1, 2, 1, 1, 1)
    assert Operator(1.5, 2.0).share(start, start + 1).item() == pytest.approx(4 / 9)
    assert Operator(9 / 4, 2.0).share(start, start + 1).item() == pytest.approx(1)
    assert Operator().share(start, start).tolist() == Operator().share(start, start * torch.nan).tolist() == [0.0]


@pytest.mark.parametrize("scale", [-0.5, 0.1, 0.5, 3.0])
def test_nothing_looks_altered_to_a_map_that_merely_scales(scale):
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    start = torch.stack([scale * z, scale**2 * z], 1)
    assert (Operator(1.0).share(start, torch.stack([z, scale * z], 1)) > 0.999).all()


def test_an_operator_that_explains_nothing_else_does_not_generalise():
    """Noise explains noise at the sites that it was fitted to only; a matrix of the channels holds at all sites."""
    generator = torch.Generator().manual_seed(0)
    seen, noise, matrix = (torch.randn(s, generator=generator) for s in ((8, 8, 6, 6), (8, 4, 6, 6), (8, 4, 8)))
    assert generalisation(seen, noise).mean() < 0.15
    assert (generalisation(seen, torch.einsum("bcf,bfhw->bchw", matrix, seen)) > 0.9).all()
    assert (generalisation(seen, 0 * noise) == 0).all()
