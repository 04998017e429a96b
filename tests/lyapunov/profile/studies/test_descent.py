"""A training with the derivative by its start: closed forms of a quadratic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stableopt.lyapunov.profile.studies.descent import DENSE, Descent, column_of

CURVATURES = torch.tensor([1.0, 3.0], dtype=torch.float64)


def model(size: int = 2) -> nn.Module:
    net = nn.Linear(size, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        net.weight.fill_(1.0)
    return net


def loss(net: nn.Module) -> Tensor:
    weight = net.get_parameter("weight")
    return 0.5 * (CURVATURES * weight.square()).sum()


def sgd(net: nn.Module, step: float, **options: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=step, **options)


def test_parameters_and_their_derivative_are_powers() -> None:
    run = Descent(model, sgd, loss, 0.1, None)
    assert run.train(5, log_norms=False) == []
    end, J = run.end()
    powers = (1 - 0.1 * CURVATURES) ** 5
    assert end == pytest.approx(powers.numpy(), rel=1e-14)
    assert torch.from_numpy(J).allclose(powers.diag(), rtol=1e-13)
    assert (run.gain, run.momentum) == (0.1, 0.0)


def test_one_direction_is_followed_alone() -> None:
    run = Descent(model, sgd, loss, 0.1, [torch.tensor([[0.0, 2.0]])])
    assert run.train(2, log_norms=True) == pytest.approx([-1.0] * 3)
    assert run.end()[1] == pytest.approx(torch.tensor([[0.0], [2.0 * 0.7**2]]).numpy(), rel=1e-13)


def test_the_gain_is_that_of_the_flow() -> None:
    run = Descent(model, lambda m, step: sgd(m, step, momentum=0.5, dampening=0.2), loss, 0.1, None)
    assert (run.gain, run.momentum) == (pytest.approx(0.1 * 0.8 / 0.5), 0.5)
    assert math.isnan(Descent(model, lambda m, step: sgd(m, step, weight_decay=0.1), loss, 0.1, None).gain)
    assert math.isnan(Descent(model, lambda m, step: torch.optim.Adam(m.parameters(), lr=step), loss, 0.1, None).gain)


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match="too many for a dense derivative"):
        Descent(lambda: model(DENSE + 1), sgd, loss, 0.1, None)
    for direction in (torch.zeros(2), torch.ones(3)):
        with pytest.raises(ValueError, match="not all zero"):
            column_of(direction, 2)
