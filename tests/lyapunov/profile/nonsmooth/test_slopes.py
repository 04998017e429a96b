"""Slopes of piecewise-linear functions against automatic differentiation, and the orders of groups that are sorted."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.lyapunov.profile.nonsmooth.clarke import clarke_bounds
from stableopt.lyapunov.profile.nonsmooth.slopes import FUNCTIONS, group_options, groups_of, pieces, slopes_of
from stableopt.nn.activations import Abs, GroupSort

MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "prelu": lambda: nn.PReLU(4, 0.3),
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.2),
    "relu6": nn.ReLU6,
    "softshrink": lambda: nn.Softshrink(0.1),
    "threshold": lambda: nn.Threshold(0.1, 0.1),
    "rrelu": lambda: nn.RReLU().eval(),
    "abs": Abs,
    "half of abs": lambda: Abs(0.5),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_interval_has_the_slopes_of_all_points_within_reach_and_no_wider(name: str) -> None:
    torch.manual_seed(0)
    module, z, reach = MODULES[name](), 2.0 * torch.randn(5, 4), 0.3
    if name == "relu6":
        z = 3.0 + 2.0 * z
    found = pieces(module, z)
    assert found is not None
    lower, upper = found.interval(z, reach)
    points = z + reach * torch.linspace(-1.0, 1.0, 4001)[:, None, None]  # (4001, 5, 4)
    slopes = slopes_of(module, points.reshape(-1, 4)).reshape(points.shape)
    assert (slopes >= lower - 1e-15).all()
    assert (slopes <= upper + 1e-15).all()
    torch.testing.assert_close(slopes.amin(0), lower)
    torch.testing.assert_close(slopes.amax(0), upper)
    assert (lower < upper).any()
    assert (lower == upper).any()


@pytest.mark.parametrize(
    ("function", "module"),
    [
        (F.relu, nn.ReLU()),
        (lambda z: F.leaky_relu(z, 0.1), nn.LeakyReLU(0.1)),
        (lambda z: F.hardtanh(z, -0.3, 0.2), nn.Hardtanh(-0.3, 0.2)),
        (torch.abs, Abs()),
    ],
)
def test_functions_and_modules_agree(function: Callable[[Tensor], Tensor], module: nn.Module) -> None:
    z = torch.linspace(-1.0, 1.0, 41)[None]
    assert torch.equal(slopes_of(function, z), slopes_of(module, z))


def test_what_jumps_or_draws_is_not_piecewise_linear() -> None:
    z = torch.zeros(1, 2)
    assert pieces(nn.Threshold(0.1, 20.0), z) is None
    assert pieces(nn.Threshold(0.1, 0.1), z) is not None
    assert pieces(nn.RReLU().train(), z) is None
    assert pieces(nn.Hardshrink(), z) is None
    assert F.hardshrink not in FUNCTIONS


def test_groups_are_those_that_the_layer_sorts() -> None:
    torch.manual_seed(0)
    for shape in ((6,), (6, 2), (4, 3, 2)):
        module = GroupSort(2)
        z = torch.randn(1, *shape)
        places = groups_of(module, shape)
        by_hand = z.reshape(-1).clone()
        by_hand[places] = z.reshape(-1)[places].sort(-1).values
        assert torch.equal(by_hand, module(z).reshape(-1))


def test_the_orders_of_a_group_are_those_that_points_within_reach_have() -> None:
    draw = np.random.default_rng(0)
    for _ in range(10):
        z, reach = tuple(draw.random(4)), 0.15
        seen = {tuple(np.argsort(np.array(z) + draw.uniform(-reach, reach, 4))) for _ in range(1500)}
        options = set(group_options(z, reach))
        assert seen <= options
        for order in options - seen:  # rare ones: points in that order exist
            place = -math.inf
            for i in order:
                place = max(place, z[i] - reach)
                assert place <= z[i] + reach + 1e-15


@pytest.mark.parametrize(("reach", "count"), [(0.4, 1), (0.5, 2), (1.0, 6)])
def test_orders_open_at_the_distance_at_which_two_can_meet(reach: float, count: int) -> None:
    """At 1, 2 with a third at 3: neighbors meet from 0.5 on, all three from 1 on."""
    assert len(group_options((1.0, 2.0), reach)) == min(count, 2)
    if count != 2:
        assert len(group_options((1.0, 2.0, 3.0), reach)) == count
    assert len(group_options((0.0,) * 4, 0.0)) == math.factorial(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("module", "place", "slopes"),
    [
        (nn.Softshrink(0.1), 0.1, (0.0, 1.0)),
        (nn.Threshold(0.3, 0.3), 0.3, (0.0, 1.0)),
        (nn.Hardtanh(-0.3, 0.3), 0.3, (0.0, 1.0)),
        (nn.LeakyReLU(), 0.0, (0.01, 1.0)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_kinks_do_not_pass_through_the_default_dtype(
    module: nn.Module, place: float, slopes: tuple[float, float], dtype: torch.dtype
) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        x = torch.tensor([[place]], dtype=dtype)
        reading = clarke_bounds(nn.Sequential(module), x)
    finally:
        torch.set_default_dtype(default)
    _, lower, upper = reading.slopes["0"]
    assert (lower.item(), upper.item()) == tuple(torch.tensor(slopes, dtype=dtype).double().tolist())
    assert reading.undecided.tolist() == [1]
    assert reading.proved
    assert 1.0 in reading.worst
