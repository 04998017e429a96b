"""What one path says, in training steps, and how far it is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stableopt.lyapunov.profile.growth.findings import MATERIAL, Clock, drawup, look
from tests.benchmarks.verdicts import ar


def test_the_largest_rise_is_that_of_all_pairs() -> None:
    path = np.random.default_rng(0).standard_normal(60).cumsum()
    assert drawup(path) == max(path[j] - path[i] for i in range(60) for j in range(i, 60))
    assert drawup(-np.arange(5.0)) == 0.0


@pytest.mark.parametrize("clock", [Clock(), Clock(300, 8)])
def test_slopes_are_per_training_step_and_places_are_training_steps(clock: Clock) -> None:
    found = look(-0.4 * np.arange(201.0), 20, 0.95, clock)
    assert found.kind == "exponentially stable"
    assert found.slope == pytest.approx(-0.4 / clock.stride)
    few = look(np.zeros(40), 4, 0.95, clock)
    assert few.kind == "inconclusive"
    assert f"at 35 boundaries after training step {clock.at(4)}," in few.reason
    assert clock.at(4) == clock.start + 4 * clock.stride


def test_bounded_is_said_up_to_a_doubling_that_is_excluded_and_not_beyond() -> None:
    # one noise, made larger: what is not excluded grows with it
    noise = ar(np.random.default_rng(1), 0.5, 1000)
    kinds = [look(scale * noise, 100, 0.95, Clock()).kind for scale in (0.1, 0.3, 3.0, 10.0)]
    assert kinds == ["profile-bounded", "profile-bounded", "inconclusive", "inconclusive"]
    assert "slow growth" in look(3.0 * noise, 100, 0.95, Clock()).reason
    assert math.exp(MATERIAL) == pytest.approx(2.0)


def test_a_fall_that_a_walk_beneath_the_noise_would_make_is_none() -> None:
    r = np.random.default_rng(5)
    found = [
        look(0.05 * r.standard_normal(1001).cumsum() + ar(r, 0.9, 1000, 0.5), 100, 0.95, Clock()) for _ in range(20)
    ]
    assert sum(f.kind in {"exponentially stable", "exponentially unstable", "profile-bounded"} for f in found) <= 1
    assert any("a random walk beneath the noise" in f.reason for f in found)
    steady = look(-0.02 * np.arange(1001.0) + ar(r, 0.9, 1000, 0.5), 100, 0.95, Clock())
    assert steady.kind == "exponentially stable"
