"""The bound of an energy holds for every window of boundaries, not for those of its grid alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from stableopt.lyapunov.profile.growth.energies import synthesize
from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.growth.windows import measure_windows
from tests.lyapunov.profile.growth.test_energies import kinds
from tests.lyapunov.profile.growth.test_windows import Bare


def every_window(factors) -> np.ndarray:
    """Return log K of all windows, ``[t, s]``."""
    return measure_windows(factors, grid=len(factors.R), refine=0).log_norms


def shortened(name: str) -> Bare:
    factors = kinds()[name]
    return Bare(factors.R[:60], factors.steps[:61], factors.full)


@pytest.mark.parametrize("name", kinds())
@pytest.mark.parametrize("grid", [7, pytest.param(1, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.slow)])
def test_bounds_hold_for_all_windows_of_boundaries(name: str, grid: int) -> None:
    factors = shortened(name)
    energy, log_norms = synthesize(factors, measure_windows(factors, grid=grid)), every_window(factors)
    steps, log_constant = factors.steps.tolist(), math.log(energy.constant_between)
    slack = 1e-10 * (1 + np.abs(log_norms[np.isfinite(log_norms)]).max())
    for t in range(len(steps)):
        for s in range(t + 1):
            assert energy.window_bound(steps[s], steps[t]) >= log_norms[t, s] - slack
            if energy.largest_rate > 0:
                two_numbers = log_constant + (steps[t] - steps[s]) * math.log(energy.largest_rate)
                assert two_numbers >= log_norms[t, s] - slack


def test_a_spike_between_the_times_of_the_grid_is_in_the_bound() -> None:
    R = np.tile(np.eye(2), (1000, 1, 1))
    R[0, 1, 1], R[501, 1, 1], R[502, 1, 1] = 1e-3, 100.0, 0.01
    factors = Factors(R, np.arange(1001), dimension=2)
    windows = measure_windows(factors, grid=20)
    energy = synthesize(factors, windows)
    assert energy.check(windows).holds
    assert max(energy.uniform_bound(0, j) for j in range(21)) < math.log(1.01)  # the grid does not see it
    assert energy.window_bound(501, 502) == pytest.approx(math.log(100.0), abs=1e-6)
    assert energy.window_bound(500, 502) == pytest.approx(math.log(100.0), abs=1e-6)
    assert energy.window_bound(490, 502) == pytest.approx(math.log(100.0), abs=1e-6)
    assert energy.window_bound(501, 600) == pytest.approx(0.0, abs=1e-6)
    assert energy.constant_between == pytest.approx(100.0, rel=1e-6)


def test_a_contraction_with_a_spike_needs_a_larger_constant() -> None:
    R = np.tile(np.diag([0.99, 0.5]), (1000, 1, 1))
    R[501, 1, 1], R[502, 1, 1] = 100.0, 0.01
    energy = synthesize(Factors(R, np.arange(1001), dimension=2), grid=50)
    assert energy.constant == pytest.approx(1.0)
    assert energy.largest_rate == pytest.approx(0.99, rel=1e-9)
    assert energy.constant_between == pytest.approx(100.0 / 0.99, rel=0.2)


def test_the_check_fails_where_the_largest_window_exceeds_its_bound() -> None:
    R = np.tile(np.eye(1), (1000, 1, 1))
    R[501], R[502] = 100.0, 0.01
    factors = Factors(R, np.arange(1001), dimension=1)
    windows = measure_windows(factors, grid=20)
    energy = synthesize(factors, windows)
    none = replace(energy.between, before=0 * energy.between.before, after=0 * energy.between.after)
    blind = replace(energy, between=replace(none, single=0 * none.single))
    assert energy.check(windows).holds
    assert not blind.check(windows).holds


def test_the_mean_rate_bounds_no_window_and_the_largest_does() -> None:
    R = np.r_[np.full(200, 1.1), np.full(400, 0.9)][:, None, None]
    energy = synthesize(Factors(R, np.arange(601), dimension=1), grid=60)
    assert energy.constant * energy.rate**200 < 1e-3 < 1.1**200
    assert energy.largest_rate == pytest.approx(1.1, rel=1e-9)
    assert energy.constant_between * energy.largest_rate**200 >= 1.1**200


def test_the_largest_rate_is_per_training_step() -> None:
    R = np.array([4.0, 0.5, 8.0])[:, None, None]
    energy = synthesize(Factors(R, np.array([0, 4, 5, 15]), dimension=1))
    assert energy.largest_rate == pytest.approx(math.sqrt(2.0), rel=1e-12)


def test_norms_of_products_within_a_cell_are_those_of_numpy() -> None:
    R = np.triu(np.random.default_rng(4).normal(size=(17, 3, 3)))
    factors = Factors(R, np.arange(18), dimension=3)
    between = synthesize(factors, measure_windows(factors, grid=3)).between
    for place in range(18):
        start = max(g for g in between.index if g <= place)
        end = min(g for g in between.index if g >= place)
        for found, (s, t) in ((between.after[place], (start, place)), (between.before[place], (place, end))):
            P = np.eye(3)
            for step in R[s:t]:
                P = step @ P
            exact = math.log(np.linalg.norm(P, 2))
            assert exact <= found <= exact + 1e-12


@pytest.mark.parametrize(("sizes", "rate"), [([0.0] * 12, 0.0), ([1e300] * 12, math.inf), ([1e-300] * 12, 0.0)])
def test_the_ends_of_the_floats_are_no_traceback(sizes: list[float], rate: float) -> None:
    R = np.array(sizes)[:, None, None]
    factors = Factors(R, np.arange(13), dimension=1)
    energy = synthesize(factors, measure_windows(factors, grid=5))
    assert energy.largest_rate == pytest.approx(rate, abs=1e-290, rel=1) or energy.largest_rate > 1e299
    assert energy.constant_between >= energy.constant
    assert energy.window_bound(0, 7) >= 7 * math.log(max(sizes[0], 1e-320)) - 1e-6 or sizes[0] == 0
    assert energy.check(measure_windows(factors, grid=5)).holds


def test_times_that_are_no_boundaries_and_windows_backwards_are_refused() -> None:
    energy = synthesize(Factors(np.ones((2, 1, 1)), np.array([0, 4, 8]), dimension=1))
    with pytest.raises(ValueError, match="no factor begins or ends at step 5"):
        energy.window_bound(0, 5)
    with pytest.raises(ValueError, match="no factor begins or ends at step 9"):
        energy.window_bound(0, 9)
    with pytest.raises(ValueError, match="start <= end"):
        energy.window_bound(4, 0)


def test_without_a_step_the_bound_is_one() -> None:
    energy = synthesize(Factors(np.ones((0, 1, 1)), np.array([3]), dimension=1))
    assert energy.window_bound(3, 3) == 0.0
    assert math.isnan(energy.largest_rate)
    assert energy.constant_between == 1.0
