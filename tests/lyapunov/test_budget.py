"""Intervals keep the cost within the budget, and nothing below its own interval."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopt.lyapunov import Every
from stableopt.lyapunov.budget import TIERS, Schedule, intervals

costs_of = st.fixed_dictionaries({name: st.floats(1e-6, 10.0) for name in TIERS})
bases_of = st.fixed_dictionaries({name: st.integers(1, 100) for name in TIERS})


@given(costs_of, bases_of, st.floats(1e-5, 100.0))
def test_the_cost_per_step_is_within_the_budget_and_no_interval_below_its_base(costs, base, budget):
    plan = intervals(costs, base, budget)
    assert list(plan) == list(costs)
    assert all(plan[name] >= base[name] for name in TIERS)
    assert sum(costs[name] / plan[name] for name in TIERS) <= budget * (1 + 1e-9)


@given(costs_of, bases_of, st.floats(1e-5, 100.0))
def test_the_budget_is_used_where_it_does_not_suffice(costs, base, budget):
    plan = intervals(costs, base, budget)
    slack = budget - sum(costs[name] / (plan[name] - 1) for name in TIERS if plan[name] > base[name])
    if slack > 0 and any(plan[name] > base[name] for name in TIERS):  # one step less for all of them would be too much
        slack -= sum(costs[name] / plan[name] for name in TIERS if plan[name] == base[name])
        assert slack <= 1e-9 * budget


@given(costs_of, bases_of)
def test_with_enough_for_all_every_tier_has_its_own_interval_and_with_less_one_waits(costs, base):
    needed = sum(costs[name] / base[name] for name in TIERS)
    assert intervals(costs, base, needed * (1 + 1e-9)) == base
    assert intervals(costs, base, needed * 0.99) != base


def test_no_budget_is_no_look():
    assert intervals({"vitals": 1.0}, {"vitals": 1}, 0.0) == {"vitals": 2**30}
    assert intervals({"vitals": 1.0}, {"vitals": 1}, -1.0) == {"vitals": 2**30}


def looked(schedule: Schedule, first: int, end: int) -> list[int]:
    """Return the steps at which any tier is due."""
    steps = []
    for step in range(first, end):
        due = schedule.due(step)
        schedule.stepped(step, due)
        steps += [step] * bool(due)
    return steps


def drive(
    schedule: Schedule, steps: int, costs: dict[str, float], run: float = 1.0, hook: float = 0.0
) -> dict[str, int]:
    """Go on for some steps with given costs, and return how often each tier has looked."""
    looks = dict.fromkeys(costs, 0)
    for step in range(1, steps + 1):
        due = schedule.due(step)
        for name in due:
            looks[name] += 1
        spent = {name: costs[name] for name in due}
        schedule.stepped(step, due, run=run, monitor=sum(spent.values()) + hook, costs=spent)
    return looks


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.5])
def test_a_long_run_keeps_to_the_limit(limit):
    schedule = Schedule(Every(), limit)
    looks = drive(
        schedule, 20_000, {"vitals": 0.1, "energy": 0.6, "sharpness": 8.0, "layers": 0.3, "forward": 2.0, "gaps": 0.01}
    )
    assert schedule.overhead <= limit * 1.1
    assert schedule.overhead >= limit * 0.6  # and uses it
    assert all(count > 0 for count in looks.values())


def test_a_cheap_monitor_looks_at_its_own_intervals():
    looks = drive(Schedule(Every(), 0.05), 1000, dict.fromkeys(TIERS, 1e-4))
    assert looks == {"vitals": 1000, "energy": 1000, "sharpness": 10, "layers": 100, "forward": 10, "gaps": 10}


def test_the_hooks_themselves_are_paid_for():
    looks = drive(
        Schedule(Every(sharpness=None, layers=None, forward=None, gaps=None), 0.05),
        4000,
        {"vitals": 0.01, "energy": 0.01},
        hook=0.04,
    )
    assert looks["vitals"] + looks["energy"] < 4000 * 1.3
    free = drive(
        Schedule(Every(sharpness=None, layers=None, forward=None, gaps=None), 0.05),
        4000,
        {"vitals": 0.01, "energy": 0.01},
    )
    assert free["vitals"] + free["energy"] == 8000


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_without_a_limit_the_steps_are_one_and_then_each_so_many(every):
    schedule = Schedule(Every(vitals=every, energy=None, sharpness=None, layers=None, forward=None, gaps=None), None)
    assert looked(schedule, 1, 30) == list(range(1, 30, every))
    assert math.isnan(schedule.overhead)


def test_a_state_goes_on():
    one, other = Schedule(Every(), 0.05), Schedule(Every(), 0.05)
    costs = {"vitals": 0.1, "energy": 0.6, "sharpness": 8.0, "layers": 0.3, "forward": 2.0, "gaps": 0.01}
    drive(one, 300, costs)
    other.load_state_dict(one.state_dict())
    assert looked(one, 301, 340) == looked(other, 301, 340) != []


def test_a_run_begun_in_the_middle_keeps_the_grid():
    schedule = Schedule(Every(vitals=4, energy=None, sharpness=None, layers=None, forward=None, gaps=None), None)
    assert looked(schedule, 11, 22) == [11, 13, 17, 21]


@pytest.mark.parametrize(
    "bad", [{"vitals": 0}, {"energy": -1}, {"layers": 2.0}, {"gaps": True}, {"sharpness": "often"}]
)
def test_intervals_are_positive_integers_or_none(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Every(**bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "often"])
def test_every_is_a_number_or_the_intervals(bad):
    with pytest.raises(ValueError, match="every"):
        Every.of(bad)


def test_a_look_that_an_error_has_cut_short_is_still_due():
    schedule = Schedule(Every(), None)
    assert schedule.due(1) == schedule.due(1) == frozenset(TIERS)


def test_short_runs_are_watched_step_by_step():
    costs = dict.fromkeys(("vitals", "energy"), 1e-3)
    every = Every(sharpness=None, layers=None, forward=None, gaps=None)
    assert drive(Schedule(every, 0.01), 240, costs, run=1e-3) == {"vitals": 240, "energy": 240}  # 0.48 seconds
    looks = drive(Schedule(every, 0.01), 1000, costs, run=1e-3)
    assert 250 <= looks["vitals"] < 400


def test_pauses_do_not_count_as_training():
    every = Every(sharpness=None, layers=None, forward=None, gaps=None)
    schedule, still = Schedule(every, 0.05), Schedule(every, 0.05)
    costs = {"vitals": 0.1, "energy": 0.1}
    drive(schedule, 2000, costs)
    for step in range(1, 2001):
        due = still.due(step)
        spent = {name: costs[name] for name in due}
        still.stepped(step, due, run=1.0 + 1e4 * (step % 500 == 0), monitor=sum(spent.values()), costs=spent)
    assert still.run_seconds <= schedule.run_seconds + 4 * 10
    assert still.overhead >= 0.9 * schedule.overhead
