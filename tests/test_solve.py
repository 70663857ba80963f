"""Every method × problems with known fixed points; each sample by itself; every way to stop."""

from __future__ import annotations

import pytest
import torch

from ringmark.inversion.methods import Adam, Anderson, ForwardStep, InertialKM
from ringmark.inversion.solve import BLOW_UP, Status, norms, solve

METHODS = [
    ForwardStep(),
    ForwardStep(0.5),
    InertialKM(),
    InertialKM(lam=0.4, alpha=0.2),
    Anderson(),
    Anderson(window=1),
    Anderson(window=2, beta=0.7),
]
WITH_ADAM = [*METHODS, Adam(lr=0.05, horizon=None)]
SHAPES = [(1, 1, 2, 3), (2, 4, 3, 2), (3, 1, 1, 7), (5, 2, 4, 4), (4, 6)]
name = repr


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(eigenvalues, seed=1):
    """A symmetric matrix with these eigenvalues."""
    q, _ = torch.linalg.qr(draw(len(eigenvalues), len(eigenvalues), seed=seed).double())
    return (q @ torch.diag(torch.as_tensor(eigenvalues).double()) @ q.T).float()


def linear(m, root):
    """T(z) = M (z − z*), M one matrix, or one a sample (B, n, n)."""
    each = m if m.ndim == 3 else m.expand(len(root), *m.shape)

    def residual(z, rows):
        return (each[rows] @ (z - root[rows]).flatten(1)[..., None]).view_as(z)

    return residual


def contraction(root):
    """T = id − S with S a slightly nonlinear contraction whose fixed point is the root."""

    def bend(z):
        return 0.4 * torch.sin(z) + 0.2 * z.roll(1, -1)

    return lambda z, rows: (z - bend(z)) - (root[rows] - bend(root[rows]))


def autoencoder(root):
    """T(z) = E(D(z)) − E(x) with E∘D near the identity and a bijection."""
    n = root[0].numel()
    d = torch.linalg.qr(draw(3 * n, n, seed=5))[0]
    e = d.T + 0.1 * draw(n, 3 * n, seed=6) / (3 * n) ** 0.5

    def both(z):
        return (torch.tanh(0.1 * (z.flatten(1) @ d.T)) / 0.1) @ e.T

    return lambda z, rows: (both(z) - both(root[rows])).view_as(z)


PROBLEMS = {
    "linear": lambda root: linear(matrix(torch.linspace(0.3, 1.6, root[0].numel())), root),
    "contraction": contraction,
    "autoencoder": autoencoder,
}


class Counted:
    """A residual that counts the rows it is asked for."""

    def __init__(self, residual):
        self.residual, self.rows = residual, 0

    def __call__(self, z, rows):
        assert len(z) == len(rows)
        self.rows += len(rows)
        return self.residual(z, rows)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_every_method_finds_every_root(method, problem, shape):
    root = draw(*shape)
    residual = Counted(PROBLEMS[problem](root))
    start = root + 0.3 * draw(*shape, seed=1)
    done = solve(residual, start, method, max_steps=200, tol=1e-4)
    assert done.status == [Status.CONVERGED] * shape[0]
    assert (done.value - root).abs().max() < 1e-3
    assert done.value.shape == root.shape and done.value.dtype == torch.float32
    assert done.steps.sum() == residual.rows
    assert done.residuals.shape == (int(done.steps.max()), shape[0]) == done.merits.shape
    assert torch.equal(done.residuals.isfinite().sum(0), done.steps)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_adam_comes_near_every_root(problem):
    root = draw(3, 2, 3, 3)
    start = root + 0.3 * draw(3, 2, 3, 3, seed=1)
    done = solve(PROBLEMS[problem](root), start, Adam(lr=0.05, horizon=100), max_steps=100)
    assert (norms(done.value - root) < 0.05 * norms(start - root)).all()
    assert (done.steps == 101).all()


@pytest.mark.parametrize("method", WITH_ADAM, ids=name)
def test_no_steps_return_the_start_and_evaluate_nothing(method):
    def residual(z, rows):
        raise AssertionError("evaluated")

    start = draw(3, 2, 2)
    done = solve(residual, start, method, max_steps=0, tol=1.0)
    assert torch.equal(done.value, start) and done.value is not start
    assert done.steps.tolist() == [0, 0, 0] and done.residuals.shape == done.merits.shape == (0, 3)
    assert done.status == [Status.NO_STEPS] * 3


def test_max_steps_counts_steps_not_evaluations():
    root = draw(2, 4)
    for k in (1, 2, 5):
        done = solve(linear(0.1 * torch.eye(4), root), root + 1, ForwardStep(), max_steps=k)
        assert done.steps.tolist() == [k + 1] * 2 and done.status == [Status.MAX_STEPS] * 2
        assert torch.allclose(done.value - root, torch.full((2, 4), 0.9**k), atol=1e-5)


NEIGHBOURS = torch.stack(
    [
        matrix([0.9, 1.0, 1.1, 1.05]),  # easy
        matrix([0.05, 0.2, 1.0, 1.9]),  # hard
        matrix([30.0, 1.0, 1.0, 1.0]),  # diverges
        matrix([1.0, 1.0, 1.0, 1.0]),  # done after a step
        matrix([-0.3, 0.5, 1.0, 1.5]),  # no descent
        matrix([3.0, 1.2, 0.8, 0.4]),  # beyond 2
    ]
)


@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("method", WITH_ADAM, ids=name)
def test_a_sample_does_not_depend_on_its_batch(method, tol):
    root, start = draw(6, 2, 2), draw(6, 2, 2) + draw(6, 2, 2, seed=1)
    together = solve(linear(NEIGHBOURS, root), start, method, max_steps=15, tol=tol)
    for i in range(6):
        alone = solve(linear(NEIGHBOURS[i], root[i : i + 1]), start[i : i + 1], method, max_steps=15, tol=tol)
        assert torch.allclose(alone.value[0], together.value[i], atol=1e-5)
        assert alone.steps[0] == together.steps[i] and alone.status[0] == together.status[i]
        k = int(alone.steps[0])
        assert torch.allclose(alone.residuals[:, 0], together.residuals[:k, i], rtol=1e-3, atol=1e-5)
        assert together.residuals[k:, i].isnan().all()


@pytest.mark.parametrize("method", WITH_ADAM, ids=name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_poisoned_sample_keeps_its_best_iterate_and_harms_no_other(method, poison, when):
    root, start = draw(3, 4), draw(3, 4) + draw(3, 4, seed=1)
    m, calls, seen = 0.5 * torch.eye(4), [], []

    def residual(z, rows):
        t = linear(m, root)(z, rows)
        for row, at, value in zip(rows.tolist(), z, t, strict=True):
            if row == 1:
                calls.append(1)
                if len(calls) > when:
                    value[2] = poison
                else:
                    seen.append((float(value.norm()), at.clone()))
        return t

    done = solve(residual, start, method, max_steps=6)
    clean = solve(linear(m, root[[0, 2]]), start[[0, 2]], method, max_steps=6)
    assert torch.allclose(done.value[[0, 2]], clean.value, atol=1e-6)
    assert done.status[1] is Status.DIVERGED and done.steps[1] == when + 1
    assert torch.equal(done.value[1], min(seen, key=lambda pair: pair[0])[1] if seen else start[1])


@pytest.mark.parametrize("method", WITH_ADAM, ids=name)
def test_a_residual_that_overflows_is_divergence(method):
    done = solve(lambda z, rows: -1e20 * z, draw(2, 5), method, max_steps=5)
    assert done.status == [Status.DIVERGED] * 2 and done.value.isfinite().all()


def test_each_status_has_its_cause():
    root = torch.zeros(4, 2)
    eigenvalue = torch.tensor([1.0, -0.001, 0.1, 20.0])
    done = solve(lambda z, rows: eigenvalue[rows, None] * z, root + 1, ForwardStep(), max_steps=8, tol=1e-6)
    assert done.status == [Status.CONVERGED, Status.STALLED, Status.MAX_STEPS, Status.DIVERGED]
    assert done.steps.tolist() == [2, 4, 9, 4]  # 19³ > 1000
    assert done.residuals[3, 3] > BLOW_UP * done.residuals[0, 3]


def test_without_a_tolerance_every_step_is_taken_save_at_an_exact_root():
    slow = torch.tensor([0.001, 0.0, -0.001])
    done = solve(lambda z, rows: slow[rows, None] * z, torch.ones(3, 2), ForwardStep(), max_steps=20)
    assert done.status == [Status.MAX_STEPS, Status.CONVERGED, Status.MAX_STEPS] and done.steps.tolist() == [21, 1, 21]
    done = solve(lambda z, rows: slow[rows, None] * z, torch.ones(3, 2), ForwardStep(), max_steps=20, tol=0.0)
    assert done.status == [Status.STALLED, Status.CONVERGED, Status.STALLED]


def test_tolerance_is_a_number_or_one_a_sample():
    root, start = torch.zeros(3, 2), torch.ones(3, 2)

    def halve(z, rows):
        return 0.5 * z

    first = float(norms(halve(start, None))[0])
    each = solve(halve, start, ForwardStep(), max_steps=30, tol=first * torch.tensor([1.0, 0.3, 0.01]))
    assert each.steps.tolist() == [1, 3, 8] and each.status == [Status.CONVERGED] * 3
    assert solve(halve, start, ForwardStep(), max_steps=30, tol=0.3 * first).steps.tolist() == [3, 3, 3]
    assert (each.value - root).norm() > 0


@pytest.mark.parametrize("method", WITH_ADAM, ids=name)
@pytest.mark.parametrize("eigenvalues", [[0.5, 3.0, 6.0, 1.0], [-0.5, 1, 1, 1], [-1, -2, -0.1, -3], [1e-6, 0, 1, 2]])
def test_never_worse_than_the_start(method, eigenvalues):
    root, start = draw(4, 4), draw(4, 4) + draw(4, 4, seed=1)
    residual = linear(matrix(eigenvalues), root)
    done = solve(residual, start, method, max_steps=12)
    rows = torch.arange(4)
    assert (norms(residual(done.value, rows)) <= norms(residual(start, rows)) * (1 + 1e-6)).all()
    low = done.residuals.nan_to_num(torch.inf).min(0).values
    assert torch.allclose(norms(residual(done.value, rows)), low, rtol=1e-5)


def test_the_merit_chooses_the_best_iterate():
    """‖T‖ falls all the way; the merit is least at the third evaluation of one sample, the first of the other."""
    turn = torch.tensor([2, 0])
    seen = []

    def residual(z, rows):
        seen.append(z.clone())
        return 0.5 * z, (len(seen) - 1 - turn[rows]).abs().float()

    done = solve(residual, torch.ones(2, 3), ForwardStep(), max_steps=5)
    assert torch.equal(done.value[0], seen[2][0]) and torch.equal(done.value[1], seen[0][1])
    assert done.merits[:, 0].tolist() == [2, 1, 0, 1, 2, 3]


def test_a_merit_that_is_nan_is_never_best():
    merits = iter([3.0, float("nan"), 2.0, float("nan")])
    seen = []

    def residual(z, rows):
        seen.append(z.clone())
        return 0.5 * z, torch.tensor([next(merits)])

    done = solve(residual, torch.ones(1, 3), ForwardStep(), max_steps=3)
    assert torch.equal(done.value, seen[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", WITH_ADAM, ids=name)
def test_the_solver_is_float32_whatever_the_maps(method, dtype):
    root = draw(2, 4)

    def residual(z, rows):
        assert z.dtype == torch.float32
        return (0.8 * (z - root[rows])).to(dtype)

    start = (root + 0.5).to(dtype)
    state = method.init(start.float())
    assert all(s.dtype == torch.float32 for s in state.values() if s.is_floating_point())
    done = solve(residual, start, method, max_steps=40, tol=5e-3)
    assert done.value.dtype == done.residuals.dtype == torch.float32
    assert norms(done.value - root).max() < 0.1


def test_the_start_is_left_as_it_was():
    start = draw(2, 3)
    before = start.clone()
    for method in WITH_ADAM:
        solve(lambda z, rows: 0.5 * z, start, method, max_steps=3)
    assert torch.equal(start, before)
