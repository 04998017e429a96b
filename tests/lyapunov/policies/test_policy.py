"""A policy is checked when it is made."""

from __future__ import annotations

from typing import Any

import pytest

from stableopt.lyapunov.policies.policy import Policy


def test_by_default_nothing_acts() -> None:
    policy = Policy()
    assert {policy.action(channel) for channel in policy.channels} == {"warn"}
    assert not policy.uses("raise", "skip", "shrink", "rollback")


@pytest.mark.parametrize("word", ["observe", "warn", "raise", "shrink", "rollback"])
def test_one_word_is_for_all_channels(word: str) -> None:
    policy = Policy.of(word)
    assert {policy.action(channel) for channel in (*policy.channels, "one of my own")} == {word}
    assert Policy.of(policy) is policy


@pytest.mark.parametrize("channel", Policy.channels)
def test_steps_are_skipped_for_what_is_not_finite_only(channel: str) -> None:
    if channel == "nonfinite":
        assert Policy(**{channel: "skip"}).action(channel) == "skip"
    else:
        with pytest.raises(ValueError, match=f"for nonfinite only, not for {channel}"):
            Policy(**{channel: "skip"})


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (
            {"level": "restore"},
            ValueError,
            "level as one of observe, warn, raise, skip, shrink, rollback, got 'restore'",
        ),
        ({"other": None}, ValueError, "other as one of"),
        ({"cooldown": -1}, ValueError, "cooldown as an integer >= 0, got -1"),
        ({"patience": 0}, ValueError, "patience as an integer >= 1, got 0"),
        ({"snapshots": 0}, ValueError, "snapshots as an integer >= 1"),
        ({"snapshot_every": 0}, ValueError, "snapshot_every as an integer >= 1"),
        ({"margin": -1}, ValueError, "margin as an integer >= 0"),
        ({"retries": -1}, ValueError, "retries as an integer >= 0"),
        ({"retries": True}, TypeError, "retries as an integer"),
        ({"cooldown": 1.5}, TypeError, "cooldown as an integer"),
        ({"factor": 0.0}, ValueError, "it would stop the training"),
        ({"factor": 1.0}, ValueError, "factor must be a finite number >= 0 and < 1"),
        ({"factor": float("nan")}, ValueError, "factor"),
        ({"factor": "half"}, TypeError, "factor must be a number"),
        ({"level": "rollback", "snapshots": 1}, ValueError, "= 0 steps, and margin asks for 20"),
        ({"level": "rollback", "snapshot_every": 19}, ValueError, "= 19 steps, and margin asks for 20"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Policy(**settings)


def test_the_limits_themselves_are_allowed() -> None:
    Policy(cooldown=0, patience=1, snapshots=1, snapshot_every=1, margin=0, retries=0, factor=0.999)
    Policy(level="rollback", snapshots=2, snapshot_every=20, margin=20)
    Policy(level="rollback", snapshots=1, margin=0)
    Policy(snapshots=1)  # nothing rolls back


@pytest.mark.parametrize(
    ("choice", "error"), [("skip", ValueError), ("restore", ValueError), (3, TypeError), (None, TypeError)]
)
def test_a_choice_is_a_policy_or_a_word(choice: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Policy.of(choice)
