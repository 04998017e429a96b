"""Laws of growth and whether a noise forgets, from low frequencies: exact cases, invariances and error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stableopt.lyapunov.profile.growth.trends import POWERS, SHORTEST, Path


def law(t: np.ndarray, power: float) -> np.ndarray:
    return np.log(t) if power == 0.0 else t**power


@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("power", [-1.0, -0.5, 0.0, 0.35, 0.5, 1.0, 1.5])
def test_an_exact_law_is_found_from_the_path_and_from_its_growth(power: float, walk: bool) -> None:
    t = np.arange(1001.0)
    path = -2.0 + 3.0 * law(np.maximum(t, 1.0), power)
    found = Path(path, 100).trend(0.95, walk=walk)
    assert found.power == power
    assert found.low <= power - 0.05 + 1e-9 < power + 0.05 - 1e-9 <= found.high
    assert found.high - found.low < 0.25
    if power in {0.0, 1.0}:
        k = 1 if power == 0.0 else 0
        assert found.rise[k] == pytest.approx(path[-1] - path[100], rel=1e-9)


def test_a_rise_moves_with_its_scale_and_not_with_its_level() -> None:
    t = np.arange(601.0)
    noise = np.random.default_rng(0).standard_normal(601)
    one, two = (Path(p, 60) for p in (0.01 * t + noise, -5.0 * (0.01 * t + noise) + 100.0))
    for walk in (False, True):
        a, b = one.trend(0.95, walk=walk), two.trend(0.95, walk=walk)
        assert b.rise == pytest.approx([-5.0 * r for r in a.rise])
        assert b.error == pytest.approx([5.0 * e for e in a.error])
        assert (a.power, a.low, a.high) == (b.power, b.low, b.high)
    assert one.stationary() == pytest.approx(two.stationary())
    assert one.walk(0.95) == pytest.approx(two.walk(0.95) / 5.0)


def test_a_random_walk_beneath_a_noise_is_bounded_from_above() -> None:
    r = np.random.default_rng(0)
    for size in (0.0, 1.0):  # of the walk at the end, in a noise of 0.3
        walks = r.standard_normal((40, 901)).cumsum(1) * size / 30.0
        found = [Path(walk + 0.3 * r.standard_normal(901), 0).walk(0.95) for walk in walks]
        assert sum(f >= 0.6 * size for f in found) >= 0.9 * 40
        assert np.median(found) <= 0.15 + 2.0 * size


def test_the_error_of_a_rise_is_its_scatter() -> None:
    r = np.random.default_rng(0)
    t = np.arange(501.0)
    for walk in (False, True):
        rises, errors = [], []
        for _ in range(200):
            e = r.standard_normal(501)
            found = Path(0.05 * t + (e.cumsum() if walk else e), 50).trend(0.95, walk=walk)
            rises.append(found.rise[0])
            errors.append(found.error[0])
        assert np.mean(rises) == pytest.approx(22.5, abs=4.0 * float(np.std(rises)) / math.sqrt(200))
        # the best of several noises is taken, which makes its errors a little small
        assert 0.75 < np.mean(errors) / np.std(rises) < 1.1


def test_the_interval_of_a_power_covers_as_often_as_it_says() -> None:
    r = np.random.default_rng(2)
    law = np.sqrt(np.arange(501.0))
    found = [Path(0.5 * law + r.standard_normal(501), 50).trend(0.5, walk=False) for _ in range(120)]
    assert 0.4 < np.mean([f.low <= 0.5 <= f.high for f in found]) < 0.88  # ends are rounded outwards


def test_a_mean_growth_that_wanders_off_has_an_error_still() -> None:
    r = np.random.default_rng(3)
    for _ in range(5):
        found = Path(r.standard_normal(401).cumsum().cumsum(), 40).trend(0.95, walk=True)
        assert 0.0 < min(found.error) < max(found.error) < np.inf


def test_lines_in_the_spectrum_are_taken_out_and_the_rest_is_kept() -> None:
    t = np.arange(1001.0)
    noise = 0.1 * np.random.default_rng(0).standard_normal(1001)
    waves = 4.0 * np.cos(2 * np.pi * t / 37.3 + 1.0) + 2.0 * np.sin(2 * np.pi * t / 5.1)
    plain, moved = Path(noise + 0.01 * t, 100), Path(noise + 0.01 * t + waves, 100)
    a, b = plain.trend(0.95, walk=False), moved.trend(0.95, walk=False)
    assert b.rise[0] == pytest.approx(a.rise[0], abs=3.0 * a.error[0])
    assert moved.stationary() > 7.0


def test_a_noise_that_forgets_is_told_from_a_walk() -> None:
    r = np.random.default_rng(0)
    walks = [Path(r.standard_normal(601).cumsum(), 60).stationary() for _ in range(100)]
    noises = [Path(r.standard_normal(601) + 0.01 * np.arange(601.0), 60).stationary() for _ in range(100)]
    assert np.mean(np.array(walks) > 7.0) <= 0.02
    assert np.mean(np.array(noises) > 7.0) >= 0.98
    assert min(walks) >= 0.0


def test_a_path_and_its_growth_are_the_same_question_one_order_apart() -> None:
    r = np.random.default_rng(1)
    twice = [Path(r.standard_normal(601).cumsum().cumsum(), 60).steady() for _ in range(60)]
    once = [Path(r.standard_normal(601).cumsum(), 60).steady() for _ in range(60)]
    assert np.mean(np.array(twice) > 7.0) <= 0.05
    assert np.mean(np.array(once) > 7.0) >= 0.95


def test_long_paths_are_looked_at_in_fewer_places() -> None:
    t = np.arange(20001.0)
    path = Path(np.sqrt(t), 2000)
    assert path.path.size <= 4097
    assert path.path[-1] == math.sqrt(20000.0)
    assert path.trend(0.95, walk=False).power == pytest.approx(0.5)


def test_short_paths_are_refused() -> None:
    assert Path(np.zeros(SHORTEST + 1), 0).steps == SHORTEST
    with pytest.raises(ValueError, match="too short"):
        Path(np.zeros(SHORTEST), 0)


def test_bounds_enclose_both_laws() -> None:
    t = np.arange(501.0)
    found = Path(0.02 * t + np.random.default_rng(0).standard_normal(501), 50).trend(0.95, walk=False)
    narrow, wide = found.bounds(0.5), found.bounds(0.99)
    assert wide[0] < narrow[0] < min(found.rise) < max(found.rise) < narrow[1] < wide[1]
    assert found.power in POWERS.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [300, 1000])
def test_one_walk_in_two_hundred_passes_for_a_noise_that_forgets(steps: int) -> None:
    r = np.random.default_rng(steps)
    passed = np.mean([Path(r.standard_normal(steps + 1).cumsum(), steps // 10).stationary() > 7.0 for _ in range(3000)])
    assert 0.0005 < passed < 0.01
