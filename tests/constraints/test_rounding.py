"""Casts go the stated way, by exactly one neighbor, in every range of every dtype."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from stableopt.constraints.rounding import STORAGE_DTYPES, round_down_to, round_up_to, toward_zero, unit_scale
from tests.constraints.oracle import same_bits

NARROW = [torch.float32, torch.bfloat16, torch.float16]
finite = st.floats(allow_nan=False, allow_infinity=False)


def neighbor(value: float, dtype: torch.dtype, direction: float) -> float:
    """The next number of a dtype, found by walking over bit patterns: independent of the code under test."""
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[dtype]
    x = torch.tensor(value, dtype=dtype)
    assert float(x) == value or math.isinf(value)
    if value == 0:
        tiny = torch.tensor(1, dtype=bits).view(dtype)
        return float(tiny) if direction > 0 else -float(tiny)
    away = (value > 0) == (direction > 0)
    return float((x.view(bits) + (1 if away else -1)).view(dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(value=finite)
@example(value=0.0)
@example(value=-0.0)
@example(value=1e300)
@example(value=-1e300)
@example(value=5e-324)
@example(value=65519.9)
@example(value=-3.4028235677973366e38)
@example(value=1e-45)
@example(value=1 + 2**-8)
@example(value=-(2.0**-24) * 1.5)
def test_bounds_round_to_the_nearest_number_on_their_side(value: float, dtype: torch.dtype) -> None:
    low, high = round_down_to(value, dtype), round_up_to(value, dtype)
    assert low <= value <= high
    for end in (low, high):
        assert float(torch.tensor(end, dtype=torch.float64).to(dtype)) == end
    if low != value:
        assert (
            low == -math.inf or neighbor(low, dtype, 1.0) == high or (low, high) == (torch.finfo(dtype).max, math.inf)
        )
    assert math.copysign(1.0, low) == 1.0 or low < 0 or value == 0


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(value=finite)
@example(value=1e300)
@example(value=-1e300)
@example(value=2.0**-150)
@example(value=1 - 2.0**-40)
@example(value=1 + 2.0**-8 + 2.0**-40)
def test_a_cast_toward_zero_is_the_nearest_inner_number(value: float, dtype: torch.dtype) -> None:
    cast = float(toward_zero(torch.tensor(value, dtype=torch.float64), dtype))
    assert abs(Fraction(cast)) <= abs(Fraction(value))
    assert cast == (round_down_to(value, dtype) if value >= 0 else round_up_to(value, dtype))


def test_special_values_pass_through_a_cast_toward_zero() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=torch.float64)
    for dtype in STORAGE_DTYPES:
        y = toward_zero(x, dtype)
        assert same_bits(y, x.to(dtype))
        assert y.dtype == dtype


def test_a_cast_toward_zero_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match="float64"):
        toward_zero(torch.ones(2, dtype=torch.float32), torch.float16)
    with pytest.raises(TypeError, match="int32"):
        toward_zero(torch.ones(2, dtype=torch.float64), torch.int32)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.1, 5e-324])
def test_float64_bounds_are_what_they_are(value: float) -> None:
    assert round_down_to(value, torch.float64) == value == round_up_to(value, torch.float64)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_infinite_bounds_stay(dtype: torch.dtype) -> None:
    assert round_down_to(math.inf, dtype) == math.inf == -round_up_to(-math.inf, dtype)
    assert math.copysign(1.0, round_up_to(0.0, dtype)) == 1.0


@given(value=st.floats(min_value=0.0, allow_nan=False, allow_infinity=False))
@example(value=0.0)
@example(value=5e-324)
@example(value=2.0**-1022)
@example(value=1.7976931348623157e308)
@example(value=1.0)
def test_the_unit_scale_is_a_power_of_two_that_makes_a_number_about_one(value: float) -> None:
    scale = float(unit_scale(torch.tensor(value, dtype=torch.float64)))
    assert math.frexp(scale)[0] == 0.5
    assert 2.0**-1022 <= scale <= 2.0**1022
    assert value * scale < 4.0
    assert value * scale >= 1.0 or value < 2.0**-1022
    assert Fraction(value * scale) == Fraction(value) * Fraction(scale)


def test_the_unit_scale_of_what_is_not_finite_is_harmless() -> None:
    scale = unit_scale(torch.tensor([math.inf, math.nan], dtype=torch.float64))
    assert (scale == 2.0**-1022).all()
