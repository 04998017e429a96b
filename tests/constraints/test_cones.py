"""Half-spaces, hyperplanes and the second-order cone, decided in rational arithmetic and against solvers coded apart."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from torch import Tensor

from stableopt.constraints.cones import HalfSpace, Hyperplane, SecondOrderCone
from stableopt.errors import InfeasibleError
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import entries, same_bits
from tests.constraints.rows.balls import in_cone, in_half_space, on_hyperplane

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NORMAL = (0.3, -2.0, 0.0, 1.1, 0.7, -0.4)


@each_dtype
def test_no_stored_point_of_many_violates_a_half_space(dtype: torch.dtype) -> None:
    for b in (0.3, 0.0, -1.7, 1e-4):
        c = HalfSpace(NORMAL, b, dims=-1)
        p = c.project((3 * torch.randn(100, 6)).to(dtype))
        assert c.violation(p) == 0.0
        assert all(in_half_space(NORMAL, b)(row) for row in p)
        assert same_bits(c.project(p), p)


def test_a_half_space_moves_along_the_normal_and_is_tight() -> None:
    a, x = torch.tensor(NORMAL), 3 * torch.randn(50, 6)
    for b in (0.3, -2.0):
        p = HalfSpace(NORMAL, b, dims=-1).project(x)
        expected = x - ((x @ a - b).clamp_min(0) / (a @ a))[:, None] * a
        torch.testing.assert_close(p, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(p[:, 2], x[:, 2], rtol=0, atol=0)


@pytest.mark.parametrize("cls", [HalfSpace, Hyperplane])
def test_the_metric_solves_the_weighted_problem(cls: type[Any]) -> None:
    a = torch.tensor(NORMAL)
    for seed in range(5):
        torch.manual_seed(seed)
        x, P = 2 * torch.randn(6), 0.1 + 5 * torch.rand(6)
        x = x if x @ a > 0.4 else -x
        p = cls(NORMAL, 0.4).project(x, metric=P)
        form = "ineq" if cls is HalfSpace else "eq"
        found = minimize(
            lambda u, x=x, P=P: float((P.numpy() * (u - x.numpy()) ** 2).sum()),
            np.zeros(6),
            method="SLSQP",
            constraints={"type": form, "fun": lambda u: 0.4 - u @ a.numpy()},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        torch.testing.assert_close(p, torch.tensor(found.x), rtol=1e-5, atol=1e-5)


def test_a_half_space_at_its_boundary_and_one_unit_off() -> None:
    c = HalfSpace((1.0,), 0.75)
    for value, inside in ((0.75, False), (math.nextafter(0.75, 1.0), False), (0.75 * (1 - 2e-14), True)):
        assert (c.violation(torch.tensor([value])) == 0.0) is inside
    assert HalfSpace((1.0, 3.0), 0.0).violation(torch.zeros(2)) == 0.0
    assert HalfSpace((1.0, 3.0), 0.0).violation(torch.tensor([5e-324, 0.0])) > 0.0
    assert HalfSpace((1.0, 0.0), 1e-301).violation(torch.tensor([1e-300, 1e300])) > 0.0
    assert HalfSpace((1.0, 1.0), 2.0).violation(torch.tensor([3.0, 1.0])) == pytest.approx(2.0, rel=1e-13)
    assert HalfSpace((4.0, 4.0), 8.0).violation(torch.tensor([3.0, 1.0])) == pytest.approx(8.0, rel=1e-13)


@settings(max_examples=40)
@given(
    x=arrays("float64", 3, elements=st.floats(allow_nan=False, allow_infinity=False)),
    a=st.tuples(*[st.floats(-1e9, 1e9).map(lambda v: round(v, 3)) for _ in range(3)]).filter(any),
    b=st.floats(-1e3, 1e3),
    dtype=st.sampled_from(DTYPES),
)
def test_affine_sets_are_sound_for_any_numbers(x: Any, a: Any, b: float, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    point = torch.tensor(x).clamp(info.min, info.max).to(dtype)
    for c, check in ((HalfSpace(a, b), in_half_space(a, b)), (Hyperplane(a, b), on_hyperplane(a, b))):
        if 2.5 * abs(b) * max(map(abs, a)) > info.max * sum(v * v for v in a):
            continue
        p = c.project(point)
        assert check(p)
        assert c.violation(p) == 0.0
        assert same_bits(c.project(p), p)
        assert c.violation(point) > 0.0 or check(point)


def test_what_the_dtype_cannot_reach_is_replaced_or_refused() -> None:
    x = torch.tensor([-60000.0, 60000.0], dtype=torch.float16)
    p = HalfSpace((1.0, 1.0), -60000.0).project(x)
    assert in_half_space((1.0, 1.0), -60000.0)(p)
    assert HalfSpace((1.0, 1.0), -60000.0).violation(p) == 0.0
    for c in (HalfSpace((1.0, 1.0), -1e6), Hyperplane((1.0, 1.0), 1e6)):
        with pytest.raises(InfeasibleError, match="wider dtype"):
            c.project(x)
    assert same_bits(HalfSpace((1.0, 1.0), 1e6).project(x), x)
    assert same_bits(HalfSpace((1e-300, 1e-300), 1e300).project(x), x)


@each_dtype
def test_a_hyperplane_holds_its_tolerance_and_one_much_smaller_fails(dtype: torch.dtype) -> None:
    for b in (0.3, 0.0, -1.7):
        c = Hyperplane(NORMAL, b, dims=-1)
        p = c.project((3 * torch.randn(100, 6)).to(dtype))
        assert c.violation(p) == 0.0
        assert all(on_hyperplane(NORMAL, b)(row) for row in p)
        moved = p.double()
        moved[:, 1] *= 1 + 40 * (torch.finfo(dtype).eps + 14 * 2.0**-46)
        moved[:, 1] += 40 * torch.finfo(dtype).eps
        assert Hyperplane(NORMAL, b, dims=-1).violation(moved) > 0.0
    assert Hyperplane((2.0,), 3.0).project(torch.tensor([1e300], dtype=torch.float64)).item() == pytest.approx(1.5)


@each_dtype
def test_the_cone_holds_exactly_and_is_the_closed_formula(dtype: torch.dtype) -> None:
    x = 3 * torch.randn(100, 5)
    c = SecondOrderCone(dims=-1)
    p = c.project(x.to(dtype))
    assert all(in_cone(row) for row in p)
    assert c.violation(p) == 0.0
    head, t = x.to(dtype).double()[:, :-1], x.to(dtype).double()[:, -1:]
    length = head.norm(dim=1, keepdim=True)
    half = (length + t) / 2
    expected = torch.cat([head * half / length, half], dim=1)
    expected = torch.where(length <= t, x.to(dtype).double(), torch.where(length <= -t, 0.0, expected))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(p.double(), expected, rtol=1.01 * eps + 1e-13, atol=1e-13 + 1e-7 * (eps > 1e-4))


def test_the_cone_satisfies_the_variational_inequality_and_splits_a_point() -> None:
    """<x - Px, u - Px> <= 0 in the cone, and x = Px + (the projection on the polar cone), which are orthogonal."""
    c = SecondOrderCone()
    for seed in range(20):
        torch.manual_seed(seed)
        x, u = 2 * torch.randn(4), c.project(5 * torch.randn(4))
        p = c.project(x)
        assert float((x - p) @ (u - p)) <= 1e-12
        assert abs(float(p @ (x - p))) <= 1e-12
        torch.testing.assert_close(x, p - c.project(-x), rtol=1e-12, atol=1e-12)


@each_dtype
def test_the_cone_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    info, c = torch.finfo(dtype), SecondOrderCone()
    tiny = info.smallest_normal * info.eps
    points: list[list[float]] = [
        [info.max, info.max, info.max, info.max],
        [info.max, -info.max, 0.0],
        [tiny, tiny, tiny],
        [info.max, tiny],
        [tiny, -info.max],
        [0.0, 0.0, -1.0],
        [-1.0],
        [2.0],
    ]
    for values in points:
        x = torch.tensor(values, dtype=torch.float64).to(dtype)
        p = c.project(x)
        assert p.isfinite().all()
        assert in_cone(p)
        assert c.violation(p) == 0.0
        assert same_bits(c.project(p), p)
    full = c.project(torch.full((4,), info.max, dtype=dtype))
    assert float(full[-1]) == info.max
    assert float(full[0]) == pytest.approx(info.max / 3**0.5, rel=2 * info.eps + 1e-12)
    assert c.project(torch.tensor([3.0, 4.0, -5.0], dtype=dtype)).tolist() == [0.0, 0.0, 0.0]
    assert c.violation(torch.tensor([3.0, 4.0, 5.0], dtype=dtype)) < 1e-13
    assert c.violation(torch.tensor([3.0, 4.0, 5.125], dtype=dtype)) == 0.0
    assert c.violation(torch.tensor([3.0, 4.0, 4.0], dtype=dtype)) == pytest.approx(1.0)


@pytest.mark.parametrize("c", [HalfSpace(NORMAL, 0.1), Hyperplane(NORMAL, 0.1), SecondOrderCone()], ids=repr)
def test_derivatives_are_finite_differences(c: Any) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(6).requires_grad_()
        assert torch.autograd.gradcheck(c.project, x, atol=1e-7)
        if c.diagonal:
            P = 0.1 + torch.rand(6)
            assert torch.autograd.gradcheck(lambda t, P=P: c.project(t, metric=P), x, atol=1e-7)


def test_bad_arguments_are_refused_in_a_sentence() -> None:
    calls: list[Any] = [
        (lambda: HalfSpace((0.0, 0.0), 1.0), "not 0"),
        (lambda: Hyperplane((1e-90, 1.0), 1.0), "none of which|no entry"),
        (lambda: HalfSpace((1.0,), math.inf), "offset"),
        (lambda: HalfSpace((math.nan,), 1.0), "normal"),
        (lambda: HalfSpace((1.0, 2.0), 1.0).project(torch.ones(3)), "as many normal entries"),
        (lambda: SecondOrderCone(dims=(0, 0)), "distinct"),
        (lambda: SecondOrderCone().prox(torch.ones(3), torch.ones(3)), "no exact prox"),
    ]
    for make, message in calls:
        with pytest.raises(ValueError, match=message):
            make()


def test_exact_sums_of_the_oracle_agree_with_hand_numbers() -> None:
    x: Tensor = torch.tensor([0.5, 0.25])
    assert entries(x) == [Fraction(1, 2), Fraction(1, 4)]
    assert in_half_space((1.0, 2.0), 1.0)(x)
    assert not in_half_space((1.0, 2.0), 0.999)(x)
