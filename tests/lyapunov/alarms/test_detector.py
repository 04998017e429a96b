"""The law of the e-detector: whoever deals out the events, knowing all that was, cannot make it alarm too often."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopt.lyapunov.alarms import EDetector

NULL, LENGTH = 0.2, 40.0


def worst(
    detector: EDetector, allowed: float, steps: int, payoff: Callable[[float, int, bool], float], taken: int = 0
) -> float:
    """The highest mean payoff of an adversary who chooses each probability of an event in [0, allowed], knowing the past.

    The mean is linear in each probability, so 0 and ``allowed`` are all there is to try.
    """
    stopped = detector.statistic >= detector.run_length
    if stopped or taken == steps:
        return payoff(detector.statistic, taken, stopped)
    values = []
    for event in (False, True):
        after = copy.deepcopy(detector)
        after.update(event)
        values.append(worst(after, allowed, steps, payoff, taken + 1))
    without, come = values
    return max(without, (1.0 - allowed) * without + allowed * come)


def test_evidence_never_exceeds_the_number_of_steps_on_average_whatever_the_adversary_does() -> None:
    """E[M_tau - tau] <= 0 for every dealer within the null hypothesis, with equality for the one who always deals p0."""
    value = worst(EDetector(NULL, LENGTH), NULL, 8, lambda statistic, taken, _: statistic - taken)
    assert value == pytest.approx(0.0, abs=1e-9)


def test_the_guarantee_ends_just_past_the_null_rate() -> None:
    value = worst(EDetector(NULL, LENGTH), 1.01 * NULL, 8, lambda statistic, taken, _: statistic - taken)
    assert value > 1e-3


@pytest.mark.parametrize("steps", [3, 6, 9])
def test_false_alarms_in_n_steps_are_no_more_likely_than_n_over_the_run_length(steps: int) -> None:
    likely = worst(EDetector(NULL, LENGTH), NULL, steps, lambda _, __, stopped: float(stopped))
    assert likely <= steps / LENGTH


def run_length(detector: EDetector, deal: Callable[[random.Random, list[bool]], bool], seed: int) -> int:
    """The number of events until the alarm."""
    rng, past = random.Random(seed), [False]
    while detector.statistic < detector.run_length:
        past.append(deal(rng, past))
        detector.update(past[-1])
    return len(past) - 1


def independent(rng: random.Random, past: list[bool]) -> bool:
    return rng.random() < NULL


def bursts(rng: random.Random, past: list[bool]) -> bool:
    return rng.random() < (NULL if any(past[-3:]) or len(past) % 50 < 10 else 0.1 * NULL)


@pytest.mark.parametrize("deal", [independent, bursts])
def test_mean_run_length_is_at_least_what_is_stated(deal: Callable[[random.Random, list[bool]], bool]) -> None:
    lengths = [run_length(EDetector(NULL, LENGTH), deal, seed) for seed in range(300)]
    assert sum(lengths) / len(lengths) >= LENGTH


def test_a_rate_well_above_the_null_is_found_sooner() -> None:
    lengths = [run_length(EDetector(NULL, LENGTH), lambda rng, _: rng.random() < 3 * NULL, seed) for seed in range(100)]
    assert sum(lengths) / len(lengths) < 0.3 * LENGTH


class Literal:
    """The formulas, one after the other, with nothing remembered but M and the likelihoods of all beginnings."""

    def __init__(self, detector: EDetector) -> None:
        self.null, self.rates = detector.null, detector.rates
        self.sums, self.events = [0.0] * len(detector.rates), []

    def update(self, event: bool) -> float:
        self.events.append(event)
        for i, q in enumerate(self.rates):
            self.sums[i] = (self.sums[i] + 1.0) * (q / self.null if event else (1.0 - q) / (1.0 - self.null))
        return sum(self.sums) / len(self.sums)


@given(st.lists(st.booleans(), max_size=60), st.floats(0.01, 0.5))
def test_statistic_is_that_of_the_formulas(events: list[bool], null: float) -> None:
    detector = EDetector(null, 1e6)
    literal = Literal(detector)
    for event in events:
        assert detector.update(event) == pytest.approx(literal.update(event), rel=1e-12)


def test_a_quiet_run_comes_to_rest_and_wakes_up_as_if_it_had_not() -> None:
    detector = EDetector(0.1, 1e6)
    literal = Literal(detector)
    for _ in range(2000):
        detector.update(False)
        literal.update(False)
    for event in (True, False, True, True, False):
        assert detector.update(event) == pytest.approx(literal.update(event), rel=1e-12)


def test_evidence_is_counted_from_the_change_on() -> None:
    detector = EDetector(0.1, 1e6)
    for step, event in enumerate([False, True] + [False] * 200 + [True, True, False, True], start=1):
        detector.update(event, step)
    assert detector.evidence == (3, 4, 203)


def test_evidence_stays_finite() -> None:
    detector = EDetector(0.01, 1e6)
    for _ in range(1000):
        detector.update(True)
    assert detector.statistic < float("inf")


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40))
def test_a_resumed_detector_goes_on_as_if_there_had_been_no_break(events: list[bool], cut: int) -> None:
    whole, first, second = EDetector(0.1, 1e3), EDetector(0.1, 1e3), EDetector(0.1, 1e3)
    for step, event in enumerate(events):
        whole.update(event, step)
        (first if step < cut else second).update(event, step)
        if step == cut - 1:
            second.load_state_dict(first.state_dict())
    if len(events) > cut > 0:
        assert second.state_dict() == whole.state_dict()
        assert (second.statistic, second.evidence) == (whole.statistic, whole.evidence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"null": 0.0, "run_length": 10.0}, "EDetector needs null as a number between 0 and 1, got 0.0"),
        ({"null": True, "run_length": 10.0}, "EDetector needs null as a number between 0 and 1, got True"),
        ({"null": 0.1, "run_length": 1.0}, "EDetector needs run_length as a finite number > 1, got 1.0"),
        ({"null": 0.1, "run_length": float("nan")}, "EDetector needs run_length as a finite number > 1, got nan"),
        ({"null": 0.1, "run_length": float("inf")}, "EDetector needs run_length as a finite number > 1, got inf"),
        (
            {"null": 0.1, "run_length": 10.0, "rates": [0.05]},
            "EDetector needs each of rates as a number between 0.1 and 1, got 0.05",
        ),
        ({"null": 0.1, "run_length": 10.0, "rates": []}, "EDetector needs at least one rate, got none"),
    ],
)
def test_wrong_numbers_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EDetector(**arguments)  # pyright: ignore[reportArgumentType]


def test_a_state_of_other_rates_is_refused() -> None:
    with pytest.raises(ValueError, match="this EDetector has 4 rates, the state is of one with 1: make both alike"):
        EDetector(0.1, 10.0).load_state_dict(EDetector(0.1, 10.0, rates=[0.5]).state_dict())
