"""Laws of outward-rounded enclosures."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stableopt.linalg import Bound, lower, round_down, round_up, upper

numbers = st.floats(allow_nan=False, allow_infinity=False)
OPERATIONS = [
    (lambda a, b: a + b, "+"),
    (lambda a, b: a - b, "-"),
    (lambda a, b: a * b, "*"),
]


@given(numbers, numbers)
@example(1e308, 1e308)
@example(5e-324, 0.1)
@example(0.1, 0.2)
def test_arithmetic_encloses_the_exact_result_as_tightly_as_floats_allow(x: float, y: float) -> None:
    for operation, name in OPERATIONS:
        exact = operation(Fraction(x), Fraction(y))
        enclosure = operation(Bound.point(x), Bound.point(y))
        assert exact in enclosure, name
        if math.isfinite(enclosure.upper) and math.isfinite(enclosure.lower):
            assert math.nextafter(enclosure.lower, math.inf) >= enclosure.upper, name


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=2), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_products_enclose_every_product_of_members(ends: list[tuple[float, float]], at: tuple[float, float]) -> None:
    (a, b), (c, d) = (sorted(e) for e in ends)
    x = Fraction(a) + Fraction(at[0]) * (Fraction(b) - Fraction(a))
    y = Fraction(c) + Fraction(at[1]) * (Fraction(d) - Fraction(c))
    assert x * y in Bound(a, b) * Bound(c, d)
    assert x - y in Bound(a, b) - Bound(c, d)
    assert abs(x) in abs(Bound(a, b))
    assert x**2 in Bound(a, b) ** 2
    assert x**3 in Bound(a, b) ** 3
    assert max(x, y) in Bound(a, b).join(Bound(c, d))


@given(numbers.filter(bool))
@example(3.0)
@example(5e-324)
def test_reciprocal_and_root_enclose(x: float) -> None:
    assert 1 / Fraction(x) in Bound.point(x).reciprocal()
    root = Bound.point(abs(x)).sqrt()
    assert Fraction(root.lower) ** 2 <= abs(Fraction(x)) <= Fraction(root.upper) ** 2


def test_exact_arithmetic_is_not_widened() -> None:
    assert Bound.point(1.0) * 1.0 == Bound.point(1.0)
    assert Bound.point(0.5) + 0.25 == Bound.point(0.75)
    assert Bound.point(4.0).sqrt() == Bound.point(2.0)
    assert 1 / Bound.point(4.0) == Bound.point(0.25)
    assert 3 - Bound(1.0, 2.0) == Bound(1.0, 2.0)
    assert Bound(-3.0, 2.0) ** 2 == Bound(0.0, 9.0)
    assert Bound(1.0, 2.0).width == 1.0


def test_an_estimate_never_becomes_a_proof() -> None:
    estimate, proved = Bound.estimate(0.5), Bound.point(2.0)
    results = [
        estimate + proved,
        proved * estimate,
        estimate.sqrt(),
        abs(-estimate),
        estimate**2,
        proved.join(estimate),
        1 / estimate,
    ]
    assert [r.proved for r in results] == [False] * 7
    assert (proved * proved).proved


@pytest.mark.parametrize("ends", [(2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_an_empty_or_undefined_enclosure_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="lower <= upper"):
        Bound(*ends)


def test_undefined_operations_are_refused() -> None:
    with pytest.raises(ZeroDivisionError, match="contains zero"):
        1 / Bound(-1.0, 1.0)
    with pytest.raises(ValueError, match=">= 0"):
        Bound(-1.0, 1.0).sqrt()
    with pytest.raises(ValueError, match="integer"):
        Bound(0.0, 1.0) ** -1


def test_infinite_ends_stay_sound() -> None:
    unknown = Bound(1.0, math.inf)
    assert (unknown * 2).upper == math.inf
    assert (unknown * 0) == Bound.point(0.0)
    assert unknown.reciprocal() == Bound(0.0, 1.0)
    assert (unknown - unknown).lower == -math.inf
    assert (unknown - unknown).upper == math.inf
    assert unknown.sqrt().upper == math.inf


@given(st.fractions())
@example(Fraction(10) ** 400)
@example(-(Fraction(10) ** 400))
@example(Fraction(1, 10**400))
def test_directed_rounding_is_the_nearest_float_on_its_side(x: Fraction) -> None:
    up, down = round_up(x), round_down(x)
    assert down <= x <= up
    assert math.nextafter(down, math.inf) >= up


def test_ends_of_numbers_and_enclosures() -> None:
    assert (lower(Bound(1.0, 2.0)), upper(Bound(1.0, 2.0))) == (1.0, 2.0)
    assert (lower(2), upper(2)) == (2.0, 2.0)
