"""An axis is monotone, names its values truly, and holds what it is made for."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stableopt.report.figures.scale import Scale, choose_scale
from tests.report.figures.drawing import value

NUMBERS = st.floats(-1e100, 1e100, allow_nan=False)


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.sampled_from(["auto", "linear", "log"]))
@example([5e-324], "auto")
@example([5e-324], "log")
@example([0.0], "log")
@example([-1e100, 1e100], "linear")
@example([5e-324, 1e100], "auto")
@example([1.0, 1.0 + 1e-15], "auto")
@example([1e6, 1e6 + 1e-4], "linear")
@example([7.3e-243, -8.8e65], "auto")
@example([1.0, 0.9999e15, 1.0001e15, 1.0, 1.0, 1.0], "auto")
def test_every_value_has_a_place_and_larger_ones_are_further(values, kind):
    scale = choose_scale(values, kind)
    places = [scale(v) for v in sorted(values)]
    assert all(0.0 <= place <= 1.0 for place in places)
    assert places == sorted(places)
    assert scale.low < scale.high
    if kind != "log":
        assert scale.low <= min(values) <= max(values) <= scale.high


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.sampled_from(["auto", "linear", "log"]), st.integers(2, 6))
@example([0.000123456, 0.000123457], "linear", 4)
@example([1e6, 1e6 + 1], "linear", 4)
@example([5e-324, 1.0], "log", 4)
@example([123456.0, 123457.0], "auto", 5)
def test_ticks_lie_on_the_axis_in_order_and_their_names_are_their_values(values, kind, count):
    scale = choose_scale(values, kind)
    ticks = scale.ticks(count)
    assert len(ticks) <= 3 * count
    assert [v for v, _ in ticks] == sorted({v for v, _ in ticks})
    span = scale.high - scale.low
    for number, name in ticks:
        assert scale.low - 1e-9 * abs(number) <= number + 1e-6 * span
        assert number <= scale.high + 1e-6 * span
        if span > 1e-7 * max(abs(scale.low), abs(scale.high)):
            assert abs(value(name) - number) <= max(1e-3 * span, 1e-9 * abs(number)) or kind == "log"
        if scale.kind == "log":
            assert math.isclose(value(name), number, rel_tol=1e-6, abs_tol=1e-300)


def test_round_values_are_named_as_people_write_them():
    assert [name for _, name in Scale(0.0, 1200.0).ticks()] == ["0", "500", "1000"]
    assert [name for _, name in Scale(0.0, 100_000.0).ticks(5)] == ["0", "20k", "40k", "60k", "80k", "100k"]
    assert [name for _, name in Scale(0.0, 2e6).ticks()] == ["0", "500k", "1M", "1.5M", "2M"]
    assert [name for _, name in Scale(1e-7, 1e5, "log").ticks()] == ["1e-6", "1e-3", "1", "1000"]
    assert [name for _, name in Scale(-1e12, 1e12, "symlog").ticks()] == [
        "-1e12",
        "-1e6",
        "-1",
        "0",
        "1",
        "1e6",
        "1e12",
    ]
    assert [name for _, name in Scale(0.0, 4e-7).ticks()] == ["0", "1e-7", "2e-7", "3e-7", "4e-7"]


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    scale = Scale(1e-4, 1e4, "log")
    assert [scale(10.0**k) for k in (-4, -2, 0, 2, 4)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_the_kind_of_the_axis_follows_the_values():
    assert choose_scale([1.0, 99.0]).kind == "linear"
    assert choose_scale([1.0, 101.0]).kind == "log"
    assert choose_scale([-1.0, 99.0]).kind == "linear"
    spiky = choose_scale([0.0, 1.0, 2.0, -3.0, 1e4])
    assert (spiky.kind, spiky.unit) == ("symlog", 2.0)
    assert spiky(2.0) - spiky(0.0) > 0.05  # what is usual can be told apart beside the spike
    assert choose_scale([0.0, 0.0, 0.0, 1e4]).kind == "linear"


def test_a_window_cuts_only_what_is_outside():
    assert choose_scale([0.0, 50.0], "linear", (-1.0, 2.0)).high == 2.0
    inside = choose_scale([0.0, 1.0], "linear", (-1.0, 2.0))
    assert (inside.low, inside.high) == (choose_scale([0.0, 1.0]).low, choose_scale([0.0, 1.0]).high)
    assert inside(50.0) == 1.0
