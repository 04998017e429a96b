"""Channels that look at the losses: what leaves the level sets is noticed, what only looks large is not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopt.lyapunov.alarms import Channel, Level, Relapse, Sample, Sublevel
from tests.lyapunov.alarms.streams import descent, first, samples

CHANNELS: list[Callable[[], Channel]] = [Sublevel, Relapse, Level]


def of(losses: list[float]) -> list[Sample]:
    return [Sample(t, loss) for t, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(
    ("make", "within", "begins"),
    [(Sublevel, 6, 200), (Relapse, 4, 200), (Level, 60, 200), (Relapse, 4, 40), (Sublevel, 6, 25)],
)
def test_a_run_that_loses_all_it_had_is_noticed(make: Callable[[], Channel], within: int, begins: int) -> None:
    rng = random.Random(1)
    alarm = first(make(), of(descent(begins) + [4.0 + rng.random() for _ in range(within)]))
    assert alarm is not None
    assert begins < alarm.since + 10
    assert alarm.since <= begins + 1
    assert alarm.statistic >= alarm.threshold


def test_a_run_that_falls_back_to_where_it_began_leaves_no_sublevel_set_but_relapses() -> None:
    losses = descent(200) + [2.0] * 80
    assert first(Sublevel(), of(losses)) is None
    assert first(Relapse(), of(losses)) is not None
    assert first(Level(), of(losses)) is not None


def test_batches_that_come_to_differ_more_leave_no_sublevel_set() -> None:
    rng = random.Random(0)
    assert first(Sublevel(), of([min(t, 400) / 400 * abs(rng.gauss(0, 1)) + 1.0 for t in range(1500)])) is None


def test_a_level_that_has_been_there_before_is_no_news_to_level() -> None:
    assert first(Level(), of(([2.0] * 150 + [1.0] * 50) * 5)) is None
    assert first(Level(), of(([2.0] * 150 + [1.0] * 50) * 2 + [1.0] * 150 + [2.0] * 80)) is not None


def test_a_rise_on_the_same_batch_is_seen_one_step_sooner() -> None:
    run = of(descent(200))
    known = [Sample(t, 0.1, 2.0) for t in (201,)] + [Sample(t, 2.0, 2.0) for t in (202, 203, 204)]
    alarm = first(Relapse(), run + known)
    assert alarm is not None
    assert alarm.since == 201


HEALTHY = {
    "constant": [1.0] * 1500,
    "zero": [0.0] * 1500,
    "descent": descent(1500),
    "to almost nothing": descent(1500, noise=0.5, floor=1e-8),
    "negative": [x - 10.0 for x in descent(1500)],
    "tiny": [1e-9 * x for x in descent(1500)],
    "heavy tails": [abs(random.Random(t).gauss(0, 1) / random.Random(-t - 1).gauss(0, 1)) for t in range(1500)],
    "rare spikes": [0.01 + (random.Random(t).random() < 0.01) for t in range(1500)],
    "warm-up": [2.3] * 100 + descent(1400),
    "one spike": [*descent(300), 50.0, *descent(1000, seed=2)[200:]],
    "ten times almost nothing": descent(900, noise=0.0, floor=1e-4) + [1e-3] * 1000,
}


@pytest.mark.parametrize("make", CHANNELS)
@pytest.mark.parametrize("name", HEALTHY)
def test_runs_that_go_well_are_silent(make: Callable[[], Channel], name: str) -> None:
    assert first(make(), samples(HEALTHY[name])) is None


@given(st.sampled_from(CHANNELS), st.integers(0, 20), st.integers(-20, 20), st.integers(-8, 8))
def test_alarms_are_the_same_in_every_unit_and_from_every_zero(
    make: Callable[[], Channel], seed: int, unit: int, zero: int
) -> None:
    losses = descent(120, seed) + [3.0 + 0.1 * t for t in range(60)]

    def run(unit: float, zero: float) -> list[int]:
        channel = make()
        return [s.step for s in of([unit * round(x, 6) + zero * unit for x in losses]) if channel.update(s) is not None]

    assert run(2.0**unit, float(zero)) == run(1.0, 0.0) != []


def test_the_order_of_exchangeable_losses_gives_fewer_alarms_than_stated() -> None:
    """Losses of heavy tails in random order: no more alarms in n steps than n over the stated run length allows, by far."""
    alarms = 0
    for seed in range(20):
        rng = random.Random(seed)
        alarms += first(Relapse(), of([math.exp(2 * rng.gauss(0, 1)) for _ in range(1000)])) is not None
    assert alarms <= 1


def test_unknown_losses_are_no_evidence_and_break_nothing() -> None:
    for make in CHANNELS:
        channel = make()
        for sample in of(descent(200)):
            assert channel.update(sample) is None
            assert channel.update(Sample(sample.step)) is None
        assert first(channel, [Sample(t, math.nan) for t in range(201, 400)]) is None


def test_the_reading_says_what_since_when_and_how_often_it_errs() -> None:
    alarm = first(Relapse(), of(descent(200, noise=0.0) + [2.0] * 5))
    assert alarm is not None
    words = str(alarm)
    for part in (
        "has come back up (2,",
        "since step 201",
        "4 of 4 steps",
        "at most 0.02 given its past",
        "once in 1e+05 steps",
        "What to do",
    ):
        assert part in words


@pytest.mark.parametrize("make", CHANNELS)
def test_wrong_numbers_are_refused(make: Callable[..., Channel]) -> None:
    with pytest.raises(ValueError, match="EDetector needs null as a number between 0 and 1, got 0"):
        make(null=0)
    with pytest.raises(ValueError, match=f"{make.__name__} needs margin as a finite number > 0, got -1"):  # pyright: ignore[reportAttributeAccessIssue]
        make(margin=-1)
