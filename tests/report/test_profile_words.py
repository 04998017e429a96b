"""A profile in words says its verdict with the horizon, and what limits it."""

from __future__ import annotations

import math

import pytest

from stableopt.report.profile_words import MEANINGS, power_text, remarks, sup_window, verdict_sentence
from stableopt.report.profiles import ProfileSummary
from tests.report.profiled import exponent_entry, numbers


def test_every_verdict_has_its_meaning_horizon_and_interval():
    for kind, meaning in MEANINGS.items():
        content = numbers()
        content["verdict"] = content["verdict"] | {"kind": kind, "terminal_decay": False}
        words = verdict_sentence(ProfileSummary(content))
        assert words.startswith(f"{kind} on 200 steps, 0 to 200: {meaning}")
        assert words.endswith("exponent -0.02 per step (95 % interval -0.024 … -0.016).")


def test_the_stretches_that_were_judged_are_named():
    def horizon(spans):
        verdict = numbers()["verdict"] | {"horizon": 400, "spans": spans}
        return verdict_sentence(ProfileSummary(numbers(verdict=verdict))).split(":")[0].split(" on ")[1]

    assert horizon([[0, 200], [1000, 1200]]) == "400 steps, 0 to 200 and 1000 to 1200"
    many = horizon([[100 * k, 100 * k + 50] for k in range(9)])
    assert many == "400 steps, 0 to 50 and 100 to 150 and 6 more stretches and 800 to 850"
    for odd in (None, [], "x", 3):
        assert horizon(odd) == "400 steps, 0 to 200"
    horizon([[1], None, [None, "x"], [[], {}]])


def test_the_constant_is_said_with_the_verdict_that_has_one():
    stable = verdict_sentence(ProfileSummary(numbers()))
    assert "‖Φ(t, s)‖ ≤ 3.5 · 0.985^(t − s)" in stable
    assert "died out" not in stable
    decays = numbers()["verdict"] | {"kind": "inconclusive"}
    words = verdict_sentence(ProfileSummary(numbers(verdict=decays)))
    assert "died out at the end, which bounds nothing in between" in words
    assert "≤" not in verdict_sentence(ProfileSummary(numbers(growth=0.02)))
    bounded = {"kind": "profile-bounded", "horizon": 10, "constant": 2.0, "rate": None}
    assert "at most 2 times" in verdict_sentence(ProfileSummary(numbers(verdict=bounded)))


def test_a_refused_interval_is_not_invented():
    refused = exponent_entry(-0.01, lower=None, upper=None, reason="only 12 effective samples")
    content = numbers(exponents=[refused])
    content["verdict"] = content["verdict"] | {"exponent": refused, "kind": "inconclusive"}
    assert "exponent -0.01 per step, without an interval" in verdict_sentence(ProfileSummary(content))
    assert "Exponent 1: only 12 effective samples." in remarks(ProfileSummary(content))


@pytest.mark.parametrize(
    "content", [{}, {"schema": 1}, {"schema": 1, "verdict": None}, {"verdict": {"kind": 3}}, {"verdict": []}]
)
def test_a_profile_that_says_nothing_is_said_to(content):
    assert verdict_sentence(ProfileSummary(content)) in {"no profile.", "a profile without a verdict."}


def test_limits_of_the_measurement_are_remarks():
    content = numbers(
        backend="difference", directions=2, dimension=100, full=False, windowed=True, reason="step 7: NaN"
    )
    found = remarks(ProfileSummary(content))
    assert "an estimate, no derivative" in found[0]
    assert found[1].startswith("2 of 100 directions were followed")
    assert found[2].startswith("Only windows of the run were followed")
    assert "The profile ended early: step 7: NaN." in found
    assert len(remarks(ProfileSummary(numbers()))) == 2  # how, and why the verdict
    assert remarks(ProfileSummary()) == []


def test_a_profile_that_ended_early_says_so_once():
    found = remarks(ProfileSummary(numbers(reason="the profile ended early: step 7: NaN")))
    assert "the profile ended early: step 7: NaN." in found


def test_looks_that_lack_something_are_named():
    missing = [{"step": 3, "reason": "the forward block: not today"}, {"step": 6, "reason": "the mixed block: no"}]
    found = remarks(ProfileSummary(numbers(missing=missing)))
    assert "The look at step 3 lacks something (and 1 more looks): the forward block: not today." in found
    for odd in ([{}], [{"reason": [1]}], [None], 3):
        remarks(ProfileSummary(numbers(missing=odd)))


def test_gains_from_below_are_said_to_exclude_nothing():
    gains = numbers()["gains"] | {"verdict": "not excluded", "exact": False}
    assert any("estimates from below" in text for text in remarks(ProfileSummary(numbers(gains=gains))))
    assert not any("estimates from below" in text for text in remarks(ProfileSummary(numbers())))


def test_the_largest_window_is_the_named_one():
    named = {"log_norm": 9.0, "start": 3, "end": 17, "at_most": 9.5}
    assert sup_window(ProfileSummary(numbers(largest_window=named))) == (9.0, 3, 17)
    for odd in (None, {}, named | {"end": "inf"}, named | {"log_norm": None}):
        assert sup_window(ProfileSummary(numbers(largest_window=odd))) is None


@pytest.mark.parametrize("log", [-1e6, -800.0, -690.0, -1.0, 0.0, 3.0, 689.0, 691.0, 5000.0])
def test_a_power_of_e_is_printed_at_any_size(log):
    mantissa, _, exponent = power_text(log).partition("e")
    assert math.log(float(mantissa)) + int(exponent or 0) * math.log(10) == pytest.approx(log, abs=6e-3)
