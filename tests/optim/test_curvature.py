"""Products with the Hessian, against the Hessian."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.optim.curvature import Difference, Exact, dot, no_second_derivative
from stableopt.optim.sharpness import Sharpness
from tests.optim.test_sharpness import full_hessian, problem


@pytest.mark.parametrize("kind", [Exact, Difference])
def test_a_product_is_that_of_the_hessian(kind: type[Exact | Difference]) -> None:
    model, loss = problem()
    parameters = list(model.parameters())
    H = full_hessian(loss, parameters)
    with kind(loss, parameters) as product:
        for _ in range(3):
            v = [torch.randn_like(p) for p in parameters]
            Hv = torch.cat([h.flatten() for h in product(v)])
            torch.testing.assert_close(Hv, H @ torch.cat([x.flatten() for x in v]), rtol=1e-6, atol=1e-8)
        assert product.count == 3
        assert all(not h.any() for h in product([torch.zeros_like(p) for p in parameters]))
        assert dot(v, [2 * x for x in v]) == pytest.approx(2 * sum(float(x.square().sum()) for x in v))


def test_each_evaluation_draws_the_same_random_numbers() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1))
    x, parameters = torch.randn(10, 4), list(model.parameters())
    v = [torch.randn_like(p) for p in parameters]
    products = []
    for kind in (Exact, Difference):
        with kind(lambda: model(x).square().mean(), parameters) as product:
            products.append(product(v))
    for a, b in zip(*products, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_parameters_that_the_loss_does_not_use_have_no_curvature() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    for kind in (Exact, Difference):
        with kind(lambda: (used**2).sum(), [used, unused]) as product:
            first, second = product([torch.ones(2), torch.ones(3)])
        assert first.tolist() == pytest.approx([2.0, 2.0])
        assert second.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_of_the_difference_balances_its_two_errors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)
    x, y = torch.randn(50, 6, dtype=dtype), torch.randint(3, (50,))
    parameters = list(model.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    v = [torch.randn_like(p) for p in parameters]
    with Exact(loss, parameters) as product:
        exact = product(v)
        again = product(v)
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))
    with Difference(loss, parameters) as product:
        near = product(v)
    error = [a - b for a, b in zip(near, exact, strict=True)]
    assert math.sqrt(dot(error, error) / dot(exact, exact)) < 20 * torch.finfo(dtype).eps ** (2 / 3)


def test_other_failures_are_not_mistaken_for_a_missing_derivative() -> None:
    w = nn.Parameter(torch.randn(3))

    def broken() -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Sharpness(torch.optim.SGD([w], 0.5), broken).measure()
    assert not no_second_derivative(RuntimeError("CUDA out of memory"))
