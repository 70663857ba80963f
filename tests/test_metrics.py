"""Known numbers: decibels, correlation, cocoercivity, shares of energy."""

from __future__ import annotations

import pytest
import torch

from ringmark.inversion.metrics import cocoercivity, correlation, nmse_db


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nmse_in_decibels():
    truth = draw(4, 2, 3, 3)
    factor = torch.tensor([1.1, 1.01, 2.0, 0.0]).view(4, 1, 1, 1)
    assert torch.allclose(nmse_db(factor * truth, truth), torch.tensor([-20.0, -40.0, 0.0, 0.0]), atol=1e-3)
    assert (nmse_db(truth, truth) == -torch.inf).all()
    assert torch.allclose(nmse_db(2 * truth.half(), truth.half()), torch.zeros(4), atol=0.01)


def test_cocoercivity_of_linear_maps():
    """T = λ(z − z*): ⟨Tx, x⟩/‖Tx‖² = 1/λ; a rotation by a right angle has none; a rising residual, a negative one."""
    root = draw(3, 2, 1, 2)
    x = draw(3, 2, 1, 2, seed=1)
    rates = torch.tensor([0.5, 2.0, -4.0])
    assert torch.allclose(cocoercivity(root + x, rates.view(3, 1, 1, 1) * x, root), 1 / rates, atol=1e-5)
    turned = torch.stack([-x.flatten(1)[:, 1], x.flatten(1)[:, 0], -x.flatten(1)[:, 3], x.flatten(1)[:, 2]], 1)
    assert torch.allclose(cocoercivity(root + x, turned.view_as(x), root), torch.zeros(3), atol=1e-5)


@pytest.mark.parametrize("matrix", [torch.diag(torch.tensor([0.5, 1.0, 2.0]))])
def test_cocoercivity_along_any_direction_is_bounded_by_the_largest_eigenvalue(matrix):
    x = draw(50, 3)
    beta = cocoercivity(x, x @ matrix, torch.zeros(50, 3))
    assert beta.min() >= 1 / 2.0 - 1e-5 and beta.max() <= 1 / 0.5 + 1e-5


def test_correlation_knows_no_scale_or_offset():
    x, y = draw(3, 2, 16, 16), draw(3, 2, 16, 16, seed=1)
    assert torch.allclose(correlation(3 * x + 1, x), torch.ones(3), atol=1e-5)
    assert torch.allclose(correlation(-x, x), -torch.ones(3), atol=1e-5)
    assert correlation(x, y).abs().max() < 0.2
