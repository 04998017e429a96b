"""Boxes and balls at, just inside and just past their boundary, decided in rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stableopt.constraints import Box, L2Ball, LinfBall, NonNegative
from stableopt.constraints.layout import substitute
from stableopt.errors import InfeasibleError
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import entries, exactly_feasible, same_bits

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def exact_square(x: torch.Tensor) -> Fraction:
    return sum((v * v for v in entries(x)), Fraction(0))


def after(value: float, dtype: torch.dtype, direction: float) -> float:
    x = torch.tensor(value, dtype=dtype)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    away = (value > 0) == (direction > 0)
    return float((x.view(bits) + (1 if away else -1)).view(dtype))


@each_dtype
def test_a_box_ends_at_its_last_representable_number(dtype: torch.dtype) -> None:
    for low, high in ((-0.1, 0.3), (1 / 3, 0.7), (-1e-3, 2.0**-30)):
        p = Box(low, high).project(torch.tensor([-1e4, 1e4], dtype=dtype)).tolist()
        for end, outward in ((p[0], -1.0), (p[1], 1.0)):
            assert Fraction(low) <= Fraction(end) <= Fraction(high)
            outside = after(end, dtype, outward) if end else outward
            assert not Fraction(low) <= Fraction(outside) <= Fraction(high)
            assert Box(low, high).violation(torch.tensor([end], dtype=dtype)) == 0.0
            assert Box(low, high).violation(torch.tensor([outside], dtype=dtype)) > 0.0


@each_dtype
def test_a_box_without_a_number_of_the_dtype_says_so(dtype: torch.dtype) -> None:
    x = torch.zeros(2, dtype=dtype)
    if dtype == torch.float64:
        assert Box(0.1, 0.1).project(x).tolist() == [0.1, 0.1]
        return
    with pytest.raises(InfeasibleError, match="finer dtype"):
        Box(0.1, 0.1).project(x)
    if dtype == torch.float16:
        with pytest.raises(InfeasibleError, match="float16"):
            Box(1e6, math.inf).project(x)
        with pytest.raises(InfeasibleError, match="float16"):
            Box(-math.inf, -1e6).project(x)


def test_the_violation_of_a_box_is_the_largest_excess() -> None:
    x = torch.tensor([[0.0, 1.5], [-2.25, 0.5]])
    assert Box(-1.0, 1.0).violation(x) == 1.25
    assert LinfBall(2.0).violation(x) == 0.25
    assert NonNegative().violation(x) == 2.25
    assert Box(-math.inf, 1.0).violation(x) == 0.5
    assert NonNegative().violation(torch.tensor([-5e-324])) == 5e-324


def test_open_sides_keep_infinity_and_signed_zeros_keep_their_sign() -> None:
    x = torch.tensor([math.inf, -0.0, -1.0, -math.inf])
    p = NonNegative().project(x)
    assert same_bits(p, torch.tensor([math.inf, -0.0, 0.0, 0.0]))
    assert NonNegative().violation(p) == 0.0
    assert Box(-math.inf, 0.5).violation(torch.tensor([-math.inf, math.inf])) == math.inf


def test_the_derivative_at_a_bound_is_that_of_the_inside() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], requires_grad=True)
    assert torch.autograd.grad(LinfBall(1.0).project(x).sum(), x)[0].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@each_dtype
def test_the_ball_holds_exactly_and_is_tight(dtype: torch.dtype) -> None:
    for n in (1, 2, 7, 100, 3000):
        for radius in (0.1, 1.0, 3.3):
            x = (10 * torch.randn(n)).to(dtype)
            x[0] = 8.0
            p = L2Ball(radius).project(x)
            assert exact_square(p) <= Fraction(radius) ** 2
            loss = torch.finfo(dtype).eps + (10 * (n + 8) * 2.0**-53)
            coarse = n**0.5 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / radius
            assert math.sqrt(float(exact_square(p))) >= radius * (1 - loss - coarse)
            direction = (x.double() @ p.double()) / (x.double().norm() * p.double().norm())
            assert float(direction) >= 1 - 4 * torch.finfo(dtype).eps ** 2 - 1e-13 - coarse


def test_the_ball_at_inside_and_past_its_radius() -> None:
    ball = L2Ball(5.0)
    hair = 8 * 2.0**-53
    for factor, inside in ((1 - 4 * hair, True), (1 + 2.0**-52, False), (1 + 1e-9, False)):
        x = factor * torch.tensor([3.0, 4.0])
        assert (ball.violation(x) == 0.0) is inside
        assert same_bits(ball.project(x), x) is inside
    assert ball.violation(torch.tensor([6.0, 8.0])) == pytest.approx(5.0, rel=1e-14)
    assert ball.violation(torch.tensor([math.nextafter(5.0, 6.0)])) > 0.0
    assert ball.project(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([3.0, 4.0], rel=1e-14)


@pytest.mark.parametrize(
    "radius", [0.0, 5e-324, 1e-310, 2.0**-1022, 1e-280, 1e-30, 1.0, 1e30, 1e300, 1.7976931348623157e308]
)
@each_dtype
def test_no_scale_overflows_or_cheats(radius: float, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    ball = L2Ball(radius)
    for size in (info.max, info.max / 4, 1.0, info.smallest_normal, info.smallest_normal * info.eps):
        for x in (torch.full((3, 3), size, dtype=dtype), torch.tensor([size, -size / 3, 0.0], dtype=dtype)):
            p = ball.project(x)
            assert p.isfinite().all()
            assert exactly_feasible(ball, p)
            assert ball.violation(p) == 0.0
            assert same_bits(ball.project(p), p)
            if exact_square(x) * Fraction(101, 100) <= Fraction(radius) ** 2:
                assert same_bits(p, x)
            elif exact_square(x) > Fraction(radius) ** 2:
                assert ball.violation(x) > 0.0
            if radius >= max(1e-280, 1e4 * info.smallest_normal) and exact_square(x) > Fraction(radius) ** 2:
                assert exact_square(p) >= Fraction(radius) ** 2 * Fraction(98, 100)


@settings(max_examples=60)
@given(
    x=arrays("float64", st.integers(1, 6), elements=st.floats(allow_nan=False, allow_infinity=False)),
    radius=st.floats(min_value=0.0, allow_nan=False, allow_infinity=False),
    dtype=st.sampled_from(DTYPES),
)
@example(x=torch.full((2,), 5e-324, dtype=torch.float64).numpy(), radius=5e-324, dtype=torch.float64)
@example(x=torch.tensor([3.0, 4.0], dtype=torch.float64).numpy(), radius=5.0, dtype=torch.float64)
def test_the_ball_is_sound_for_any_numbers(x, radius: float, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    point = torch.tensor(x)
    point = point.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    ball = L2Ball(radius)
    p = ball.project(point)
    assert exactly_feasible(ball, p)
    assert same_bits(ball.project(p), p)
    assert ball.violation(point) > 0.0 or exactly_feasible(ball, point)


def test_the_ball_of_a_million_numbers_is_still_sound_and_tight() -> None:
    x = torch.randn(1_000_000, dtype=torch.float32)
    p = L2Ball(10.0).project(x)
    total = math.fsum(v * v for v in p.double().tolist())  # squares of float32 are exact in float64, fsum is exact
    assert 100.0 * (1 - 1e-6) <= total <= 100.0


def test_the_ball_has_the_closed_derivative_and_none_is_nan_at_zero() -> None:
    x = torch.tensor([3.0, 4.0])
    unit = x / 5
    expected = 2.0 / 5 * (torch.eye(2) - torch.outer(unit, unit))
    torch.testing.assert_close(torch.autograd.functional.jacobian(L2Ball(2.0).project, x), expected)
    for radius in (0.0, 1.0):
        J = torch.autograd.functional.jacobian(L2Ball(radius).project, torch.zeros(3))
        assert torch.equal(J, torch.eye(3))


def test_a_replaced_value_keeps_the_derivative() -> None:
    x = torch.tensor([2.0, -4.0], requires_grad=True)
    value = torch.tensor([3.9, 0.0])
    y = substitute(2 * x, value)
    assert torch.equal(y, value)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2.0, 2.0]
