"""Levels move along with the values, and the highest recent value is the highest recent value."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopt.lyapunov.alarms.levels import Levels, RecentHighest


def values(seed: int, n: int) -> list[float]:
    rng = random.Random(seed)
    return [3.0 * math.exp(-t / 30) + 0.2 * rng.random() for t in range(n)]


@given(st.integers(0, 50), st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
def test_levels_are_those_of_the_values_whatever_their_unit_and_zero(seed: int, unit: float, zero: float) -> None:
    plain, moved = Levels(), Levels()
    for value in values(seed, 95):
        plain.update(value)
        moved.update(unit * value + zero)
    for name in ("start", "last", "best"):
        assert getattr(moved, name) == pytest.approx(unit * getattr(plain, name) + zero, rel=1e-9, abs=1e-9)
    for name in ("fall", "scatter"):
        assert getattr(moved, name) == pytest.approx(
            unit * getattr(plain, name), rel=1e-6, abs=1e-6 * unit + 1e-12 * abs(zero)
        )


def test_a_level_is_the_median_of_its_block_and_one_wild_value_does_not_move_it() -> None:
    levels = Levels(block=5)
    assert [levels.update(x) for x in (1.0, 2.0, 1e30, 1.5, 1.2)] == [None, None, None, None, 1.5]


def test_a_level_that_goes_up_and_down_scatters_even_where_the_values_of_a_block_agree() -> None:
    """A staircase: no scatter within a block, and yet the next block may well be a stair higher."""
    levels, falling = Levels(), Levels()
    for t in range(400):
        levels.update(float(t // 10 % 3))
        falling.update(-float(t // 10))
    assert levels.scatter > 0.3
    assert falling.scatter == 0.0


@given(st.lists(st.floats(-1e6, 1e6), max_size=80), st.integers(1, 12), st.integers(1, 6))
def test_recent_highest_is_the_maximum_of_the_window_before_the_last_few(
    xs: list[float], window: int, delay: int
) -> None:
    recent = RecentHighest(window, delay)
    for n, x in enumerate(xs, start=1):
        recent.update(x)
        seen = xs[: max(n - delay, 0)][-window:]
        assert recent.highest == max(seen, default=-math.inf)
        assert recent.enough == (len(seen) >= min(20, window))


@given(st.integers(0, 60))
def test_resumed_levels_go_on_as_if_there_had_been_no_break(cut: int) -> None:
    whole, second = (Levels(), RecentHighest(20, 5)), (Levels(), RecentHighest(20, 5))
    for t, value in enumerate(values(1, 90)):
        for item in whole:
            item.update(value)
        for item in second if t >= cut else ():
            item.update(value)
        if t == cut - 1:
            for new, old in zip(second, whole, strict=True):
                new.load_state_dict(old.state_dict())  # pyright: ignore[reportArgumentType]
    if cut:
        assert second[0].state_dict() == whole[0].state_dict()
        assert second[1].state_dict() == whole[1].state_dict()
        assert second[1].highest == whole[1].highest


@pytest.mark.parametrize("block", [2, 0, True, 5.0])
def test_a_block_is_an_integer_of_at_least_three(block: int) -> None:
    with pytest.raises(ValueError, match="Levels needs block as an integer >= 3, got"):
        Levels(block)
