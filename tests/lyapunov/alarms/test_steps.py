"""Channels that look at one step."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopt.lyapunov.alarms import Increase, Leap, NonFinite, Sample
from tests.lyapunov.alarms.streams import descent, first, samples, whole


@pytest.mark.parametrize(
    ("sample", "what"),
    [
        (Sample(5, nonfinite=("loss",)), "Not finite: loss"),
        (Sample(5, math.inf), "Not finite: loss"),
        (Sample(5, 1.0, energy_before=1.0, energy_after=math.inf), "Not finite: the energy after the step"),
        (Sample(5, 1.0, energy_before=1.0, energy_after=math.nan), "Not finite: the energy after the step"),
        (Sample(5, verdict="nonfinite"), "Not finite: the energy or the step"),
        (Sample(5, nonfinite=tuple("abcdefg")), "Not finite: a, b, c, d, e and 2 more"),
    ],
)
def test_what_is_not_finite_is_reported_at_once(sample: Sample, what: str) -> None:
    alarm = NonFinite().update(sample)
    assert alarm is not None
    assert (alarm.what, alarm.since) == (what, 5)
    assert alarm.statistic >= alarm.threshold


def test_what_is_not_known_is_not_taken_for_not_finite() -> None:
    assert NonFinite().update(Sample(1)) is None
    assert NonFinite().update(Sample(1, 2.0, verdict="unobserved")) is None


def test_a_gradient_alone_may_be_the_overflow_of_a_scaler() -> None:
    alarm = NonFinite().update(Sample(1, nonfinite=("grad:a", "grad:b")))
    assert alarm is not None
    assert "scaler" in alarm.advice


def test_rising_energies_are_noticed_from_the_ninth_step_on_and_since_the_first() -> None:
    channel = Increase()
    assert first(channel, samples(descent(100))) is None
    alarm = first(channel, (whole(t, 0.5, 0.6) for t in range(101, 120)))
    assert alarm is not None
    assert alarm.since == 101
    assert alarm.evidence.startswith(
        "9 of 9 compared steps did; if a healthy run does so with a probability of at most 0.2"
    )


def test_a_share_of_rises_within_the_null_hypothesis_gives_no_alarm_and_one_past_it_does() -> None:
    rng = random.Random(0)
    for share, expected in ((0.15, False), (0.5, True)):
        stream = (whole(t, 1.0, 1.1 if rng.random() < share else 0.9) for t in range(1, 3000))
        assert (first(Increase(), stream) is not None) is expected


def test_rises_within_rounding_or_of_almost_nothing_are_none() -> None:
    losses = descent(200, noise=0.0, floor=1e-9)
    assert first(Increase(), samples(losses, drop=0.01)) is None
    channel = Increase()
    first(channel, samples(losses))
    assert first(channel, (whole(t, 1e-6, 1e-5) for t in range(201, 300))) is None  # ten times almost nothing


def test_a_guarded_run_and_one_that_stands_still_are_silent() -> None:
    assert first(Increase(), (whole(t, 1.0, 1.0, 0.0) for t in range(1, 500))) is None
    assert first(Leap(), (whole(t, 1.0, 1.0, 0.0) for t in range(1, 500))) is None


@given(st.integers(-10, 10), st.integers(-8, 8))
def test_increase_says_the_same_in_every_unit_and_from_every_zero(unit: int, zero: int) -> None:
    def run(unit: float, zero: float) -> list[int]:
        rng, channel = random.Random(3), Increase(run_length=100.0)
        losses = [unit * round(x, 6) + zero * unit for x in descent(60)]
        rises = [unit * (2.0**-5 if rng.random() < 0.6 else -(2.0**-5)) for _ in losses]
        pairs = enumerate(zip(losses, rises, strict=True), start=1)
        return [
            t
            for t, (x, rise) in pairs
            if channel.update(Sample(t, x, energy_before=x, energy_after=x + rise)) is not None
        ]

    plain = run(1.0, 0.0)
    assert plain
    assert run(2.0**unit, float(zero)) == plain


def lengths(values: list[float]) -> list[Sample]:
    return [Sample(t, displacement=d, weight_norm=10.0) for t, d in enumerate(values, start=1)]


@pytest.mark.parametrize("begins", [31, 60, 200])
def test_steps_a_hundred_times_longer_are_noticed_within_three(begins: int) -> None:
    rng = random.Random(0)
    usual = [0.1 * math.exp(0.3 * rng.gauss(0, 1)) for _ in range(begins)]
    channel = Leap()
    alarm = first(channel, lengths(usual + [100 * d for d in usual[:3]]))
    assert alarm is not None
    assert alarm.since == begins + 1


def test_a_warm_restart_and_a_slow_rise_are_no_leaps() -> None:
    cycle = [0.1 * (0.5 + 0.5 * math.cos(math.pi * t / 600)) for t in range(600)]
    assert first(Leap(), lengths(cycle * 3)) is None
    assert first(Leap(), lengths([1e-3 * 1.01**t for t in range(800)])) is None
    assert first(Leap(), lengths([0.0] * 100 + [0.1] * 100)) is None  # a rate of zero at first


def test_a_warm_restart_after_a_resumption_is_no_leap_either() -> None:
    cycle = [0.1 * (0.5 + 0.5 * math.cos(math.pi * t / 600)) for t in range(600)]
    before, after = Leap(), Leap()
    assert first(before, lengths(cycle)) is None
    after.load_state_dict(before.state_dict())
    assert first(after, lengths(cycle)) is None


def test_one_long_step_is_no_alarm() -> None:
    assert first(Leap(), lengths([0.1] * 200 + [10.0] + [0.1] * 200 + [100.0] + [0.1] * 50)) is None


def test_lengths_of_heavy_tails_are_no_leaps() -> None:
    for seed in range(5):
        rng = random.Random(seed)
        assert first(Leap(), lengths([abs(rng.gauss(0, 1) / rng.gauss(0, 1)) for _ in range(2000)])) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Increase(null=1.5), "EDetector needs null as a number between 0 and 1, got 1.5"),
        (lambda: Increase(noticeable=-1.0), "Increase needs noticeable as a number between 0 and 1, got -1.0"),
        (lambda: Leap(factor=1.0), "Leap needs factor as a finite number > 1, got 1.0"),
        (lambda: Leap(window=0), "Leap needs window as an integer >= 1, got 0"),
    ],
)
def test_wrong_numbers_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # pyright: ignore[reportCallIssue]
