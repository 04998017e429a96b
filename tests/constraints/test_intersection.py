"""Projections on intersections: against closed forms, with a gap that bounds the distance, and a refusal where there is none."""

from __future__ import annotations

import pytest
import torch

from stableopt import InfeasibleError
from stableopt.constraints import (
    Box,
    Constraint,
    HalfSpace,
    Hurwitz,
    Intersection,
    L2Ball,
    NonNegative,
    Orthogonal,
    Simplex,
    SpectralBall,
    Sphere,
    dykstra,
)


def box_and_half_space(x: torch.Tensor, low: float, high: float, offset: float) -> torch.Tensor:
    """Bisect for the multiplier of sum(u) <= offset: u = clip(x - t)."""
    if float(x.clamp(low, high).sum()) <= offset:
        return x.clamp(low, high)
    below, above = 0.0, 100.0
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if float((x - middle).clamp(low, high).sum()) > offset else (below, middle)
    return (x - above).clamp(low, high)


def test_it_agrees_with_closed_forms() -> None:
    for seed in range(6):
        x = 3 * torch.randn(5, generator=torch.Generator().manual_seed(seed))
        orthant = Intersection((NonNegative(), L2Ball(1.0))).project(x)
        torch.testing.assert_close(orthant, L2Ball(1.0).project(x.clamp_min(0.0)), rtol=0, atol=1e-10)
        half = Intersection((Box(-1.0, 1.0), HalfSpace((1.0,) * 5, 0.5))).project(x)
        torch.testing.assert_close(half, box_and_half_space(x, -1.0, 1.0, 0.5), rtol=0, atol=1e-9)
        boxes = Intersection((Box(-1.0, 0.5), Box(-0.25, 2.0))).project(x)
        torch.testing.assert_close(boxes, x.clamp(-0.25, 0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "sets",
    [
        (NonNegative(), L2Ball(1.0)),
        (Box(-1.0, 1.0), HalfSpace((1.0, 2.0, -1.0), 0.5)),
        pytest.param((L2Ball(1.0), HalfSpace((1.0, 1.0, 1.0), 0.2), Box(-0.9, 0.4)), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_the_gap_bounds_the_distance_to_the_projection(sets: tuple[Constraint, ...]) -> None:
    for seed in range(2):
        x = 3 * torch.randn(3, generator=torch.Generator().manual_seed(seed))
        exact = dykstra(x, sets, tolerance=1e-14).point
        for sweeps_at_tolerance in (1e-2, 1e-4, 1e-8):
            found = dykstra(x, sets, tolerance=sweeps_at_tolerance)
            assert max(c.violation(found.point) for c in sets) == 0.0
            assert float((found.point - exact).norm()) <= (2 * found.gap) ** 0.5 + 1e-7
        assert dykstra(x, sets, tolerance=1e-13).gap < 1e-8


def test_alternating_projections_alone_would_not_give_the_nearest_point() -> None:
    """The corrections matter: on a ball and a half space plain alternation ends elsewhere."""
    x, sets = torch.tensor([2.0, 0.5]), (L2Ball(1.0), HalfSpace((0.0, 1.0), 0.1))
    plain = x
    for _ in range(200):
        for c in sets:
            plain = c.project(plain)
    ours = Intersection(sets).project(x)
    assert float((x - ours).norm()) < float((x - plain).norm()) - 1e-6


@pytest.mark.slow
def test_matrices_can_satisfy_two_conditions_at_once() -> None:
    both = Intersection((SpectralBall(1.0), Hurwitz(0.2)))
    for dtype in (torch.float64, torch.float32):
        A = both.project(torch.randn(4, 4).to(dtype))
        assert SpectralBall(1.0).violation(A) == 0.0
        assert Hurwitz(0.2).violation(A) == 0.0


def test_no_common_point_is_an_error_and_the_point_stays() -> None:
    x = torch.tensor([0.3, 0.2])
    before = x.clone()
    for sets in (
        (Box(0.0, 1.0), Box(2.0, 3.0)),
        (L2Ball(0.5), HalfSpace((1.0, 0.0), -1.0)),
        (Simplex(1.0), Simplex(2.0)),
    ):
        with pytest.raises(InfeasibleError, match=r"no common point|lies in all"):
            Intersection(sets, sweeps=60).project_(x)
        assert torch.equal(x, before)


def test_sets_that_are_not_convex_are_refused() -> None:
    for wrong in (Sphere(1.0), Orthogonal()):
        with pytest.raises(ValueError, match="all of them convex"):
            Intersection((NonNegative(), wrong))
    with pytest.raises(ValueError, match="at least one"):
        Intersection(())
    with pytest.raises(TypeError, match="tuple of Constraint"):
        Intersection(("Box",))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int as sweeps"):
        Intersection((NonNegative(),), sweeps=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sweeps >= 1"):
        Intersection((NonNegative(),), sweeps=0)
    with pytest.raises(ValueError, match="finite point"):
        dykstra(torch.tensor([float("nan")]), [NonNegative()])
