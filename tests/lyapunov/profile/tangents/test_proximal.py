"""Tangents through a prox: its Jacobian is symmetric in the metric, and gives the derivative in the step and in the metric too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stableopt.constraints import L1, L2, Box, Constraint, L1Ball, L2Ball, NuclearNorm, Regularizer, Simplex, Sphere
from stableopt.lyapunov.profile.tangents.proximal import pushed_through
from tests.constraints.catalogue import ROWS, name_of, random, shapes_of
from tests.constraints.rows import Row


def prox_of(g: Regularizer, y: Tensor, size: float, metric: Any) -> Tensor:
    """What an optimizer does."""
    if isinstance(g, Constraint) and not (isinstance(metric, Tensor) and g.diagonal):
        return g.project(y)
    return g.prox(y, size / metric)


@pytest.mark.parametrize("g", [L1(0.3), L2(0.6), L2Ball(0.7), L1Ball(0.9), Box(-0.3, 0.4), Simplex(1.0)], ids=repr)
def test_point_step_and_metric_move_at_once(g: Regularizer) -> None:
    y, P = torch.randn(5), torch.rand(5) + 0.3
    d, dP, ds, h = torch.randn(2, 5), torch.randn(2, 5), torch.randn(2), 1e-6
    p, moved = pushed_through(g, y, d, 0.7, ds, P, dP)
    assert torch.equal(p, prox_of(g, y, 0.7, P))
    for i in range(2):
        ends = [prox_of(g, y + e * d[i], 0.7 + e * float(ds[i]), P + e * dP[i]) for e in (h, -h)]
        torch.testing.assert_close(moved[i], (ends[0] - ends[1]) / (2 * h), rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.smooth], ids=name_of)
def test_the_jacobian_is_symmetric_in_the_metric_for_every_regularizer(row: Row) -> None:
    """What the products rest on: its asymmetry, by differences alone, is that of differences."""
    shape = shapes_of(row)[0]
    y = 0.9 * random(row, shape, 2)
    P: Any = torch.rand(shape) + 0.5 if row.g.diagonal else 1.0
    h, n = 1e-5, y.numel()
    flat = [
        (prox_of(row.g, y + h * e.view(shape), 0.3, P) - prox_of(row.g, y - h * e.view(shape), 0.3, P)).flatten()
        / (2 * h)
        for e in torch.eye(n)
    ]
    J = torch.stack(flat, dim=1)
    weighted = P.flatten()[:, None] * J if isinstance(P, Tensor) and row.g.diagonal else J
    torch.testing.assert_close(weighted, weighted.T, rtol=1e-4, atol=1e-6)


def test_a_metric_that_is_one_number_changes_the_step_alone() -> None:
    y, d, none = torch.randn(4, 3), torch.randn(2, 4, 3), torch.zeros(2)
    for g in (L2(0.4), NuclearNorm(0.3)):
        for a, b in zip(pushed_through(g, y, d, 1.0, none, 2.0), pushed_through(g, y, d, 0.5, none), strict=True):
            torch.testing.assert_close(a, b)


def test_a_point_of_a_sphere_moves_along_it_and_one_inside_a_ball_as_it_likes() -> None:
    y = Sphere(2.0).project(torch.tensor([2.0, 0.0, 0.0]))
    d = torch.tensor([[1.0, 2.0, 3.0]])
    for size in (1.0, 1e-12, 1e12):
        _, moved = pushed_through(Sphere(2.0 * size), size * y, d, 0.1, torch.zeros(1))
        torch.testing.assert_close(moved, torch.tensor([[0.0, 2.0, 3.0]]), rtol=1e-12, atol=1e-7)
    assert torch.equal(pushed_through(L2Ball(2.1), y, d, 0.1, torch.zeros(1))[1], d)
    outside = pushed_through(L2Ball(1.0), y, d, 0.1, torch.zeros(1))[1]
    torch.testing.assert_close(outside, torch.tensor([[0.0, 1.0, 1.5]]), rtol=1e-12, atol=1e-12)


def test_on_the_edge_of_a_ball_it_is_between_inside_and_outside() -> None:
    y, d = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 1.0]])
    inside, edge, outside = (
        pushed_through(L2Ball(1.0), a * y, d, 0.1, torch.zeros(1))[1] for a in (1 - 1e-6, 1.0, 1 + 1e-6)
    )
    torch.testing.assert_close(inside, d)
    torch.testing.assert_close(outside, torch.tensor([[0.0, 1.0]]), rtol=1e-5, atol=1e-5)
    assert 0.0 <= float(edge[0, 0]) <= 1.0
    assert float(edge[0, 1]) == pytest.approx(1.0, abs=1e-6)


def test_a_step_of_zero_has_no_derivative_but_lets_tangents_through() -> None:
    y, d = torch.tensor([1.0, -2.0]), torch.randn(1, 2)
    p, moved = pushed_through(L1(0.5), y, d, 0.0, torch.zeros(1))
    assert torch.equal(p, y)
    assert torch.equal(moved, d)
    with pytest.raises(ValueError, match="a step of 0"):
        pushed_through(L1(0.5), y, d, 0.0, torch.ones(1))
