"""Nonconvex penalties: the prox is a global minimizer for every step, found again by brute force."""

from __future__ import annotations

import math

import pytest
import torch

from stableopt.constraints.base import Regularizer
from stableopt.constraints.kinds import Elementwise
from stableopt.constraints.nonconvex import L0, MCP, SCAD, Lq

PENALTIES = [
    L0(0.7), MCP(0.8, 1.5), MCP(0.5, 3.0), SCAD(0.6), SCAD(0.9, 2.5),
    Lq(0.7, 0.5), Lq(0.7, 2 / 3), Lq(0.4, 0.05), Lq(0.9, 0.97),
]  # fmt: skip
each = pytest.mark.parametrize("g", PENALTIES, ids=repr)
STEPS = (0.01, 0.3, 1.0, 1.5, 1.6, 2.0, 2.7, 3.0, 3.5, 4.7, 6.0, 30.0)


def objective(g: Elementwise, u: torch.Tensor, x: float, step: float) -> torch.Tensor:
    return g._value(u) + (u - x).square() / (2 * step)


def lowest(g: Elementwise, x: float, step: float) -> float:
    """Return the minimum over a grid of [0, x] with three refinements, and 0."""
    low, high = 0.0, x
    best = float(objective(g, torch.zeros(1), x, step))
    for _ in range(4):
        grid = torch.linspace(low, high, 2001)
        values = objective(g, grid, x, step)
        at, width = int(values.argmin()), (high - low) / 2000
        best = min(best, float(values[at]))
        low, high = max(0.0, float(grid[at]) - 2 * width), min(x, float(grid[at]) + 2 * width)
    return best


@each
@pytest.mark.parametrize("step", STEPS)
def test_no_point_is_lower_than_the_prox(g: Elementwise, step: float) -> None:
    for x in (0.0, 1e-3, 0.2, 0.55, 0.9, 1.2, 1.31, 1.8, 2.3, 2.6, 3.1, 5.0, 9.0):
        for sign in (1.0, -1.0):
            p = float(g.prox(torch.tensor(sign * x), step)) * sign
            assert 0.0 <= p <= x
            assert float(objective(g, torch.tensor([p]), x, step)) <= lowest(g, x, step) + 1e-13


@each
def test_the_derivative_is_the_inverse_of_one_plus_the_curvature(g: Elementwise) -> None:
    x, step = torch.linspace(0.013, 9.0, 137).requires_grad_(), 0.4
    p = g.prox(x, step)
    (found,) = torch.autograd.grad(p.sum(), x)
    at = p.detach().requires_grad_()
    bend = torch.zeros_like(at)
    if not isinstance(g, L0):
        (slope,) = torch.autograd.grad(g._value(at[at > 0]).sum(), at, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), at)
    torch.testing.assert_close(found, torch.where(at > 0, 1 / (1 + step * bend), 0.0), rtol=1e-9, atol=1e-12)


@each
def test_a_step_of_zero_is_the_identity(g: Elementwise) -> None:
    x = torch.tensor([0.0, -0.3, 5.0, 1e-300, -1e300])
    assert torch.equal(g.prox(x, 0.0), x)
    assert torch.equal(g.prox(x, torch.zeros(5)), x)


@each
def test_huge_entries_stay(g: Elementwise) -> None:
    x = torch.tensor([1e300, -1e150])
    assert torch.equal(g.prox(x, 2.0), x)


@each
def test_infinite_entries_stay(g: Elementwise) -> None:
    x = torch.tensor([math.inf, -math.inf])
    assert torch.equal(g.prox(x, 2.0), x)


@pytest.mark.parametrize(
    ("g", "step", "jump"),
    [
        (L0(0.5), 4.0, 2.0),
        (MCP(1.0, 1.0), 4.0, 2.0),
        (SCAD(1.0, 3.0), 4.0, 4.0),
        (SCAD(1.0, 3.0), 2.0, 3.0),
        (SCAD(0.5, 3.0), 16.0, 4.0),
        (Lq(1.0, 0.5), 1.0, 1.5),
    ],
)
def test_at_the_jump_both_ends_minimize_and_the_smaller_is_returned(g: Elementwise, step: float, jump: float) -> None:
    below, above = g.prox(torch.tensor([jump * (1 - 1e-12), jump * (1 + 1e-12)]), step)
    values = [float(objective(g, u.reshape(1), jump, step)) for u in (below, above)]
    assert values[0] == pytest.approx(values[1], rel=1e-10)
    assert float(g.prox(torch.tensor(jump), step)) == pytest.approx(float(below), abs=1e-10)


@pytest.mark.parametrize("x", [1.51, 2.0, 7.0, 1e4, -3.0])
def test_half_has_the_closed_form_with_a_cosine(x: float) -> None:
    """u + t q u^(q-1) = r for q = 1/2 is a cubic in sqrt(u)."""
    angle = math.acos(0.25 * (abs(x) / 3) ** -1.5)
    wanted = 2 / 3 * abs(x) * (1 + math.cos(2 * math.pi / 3 - 2 * angle / 3))
    assert float(Lq(1.0, 0.5).prox(torch.tensor(x))) == pytest.approx(math.copysign(wanted, x), rel=1e-13)


@pytest.mark.parametrize("q", [0.0, 1.0, -0.5, math.nan])
def test_a_power_outside_of_the_open_unit_interval_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="q"):
        Lq(1.0, q)


def test_parameters_at_their_limit_are_refused() -> None:
    for make in (lambda: SCAD(1.0, 2.0), lambda: MCP(1.0, 0.0), lambda: L0(-1.0)):
        with pytest.raises(ValueError, match="needs a finite number"):
            make()


@pytest.mark.parametrize("g", [L0(0.0), MCP(0.0), SCAD(0.0), Lq(0.0)], ids=repr)
def test_without_weight_the_prox_is_the_identity_with_derivative_one(g: Regularizer) -> None:
    x = torch.tensor([0.0, -0.0, 1.5, -1e-300], requires_grad=True)
    p = g.prox(x, 0.7)
    assert torch.equal(p, x)
    assert torch.autograd.grad(p.sum(), x)[0].tolist() == [1.0] * 4


def test_the_derivative_of_the_bridge_penalty_is_finite_at_zero_and_its_prox_at_infinity() -> None:
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    assert torch.autograd.grad(Lq(2.0, 0.5).value(x), x)[0].tolist() == [0.0, 0.5]
    assert Lq(1.0).prox(torch.tensor([torch.inf, -torch.inf])).tolist() == [torch.inf, -torch.inf]
