"""The verdict on factors: all windows, all pieces, and a constant that no window of any two boundaries exceeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.growth.judged import judge_factors
from stableopt.lyapunov.profile.growth.verdicts import Verdict
from stableopt.lyapunov.profile.growth.windows import measure_windows


def factors(R: ArrayLike, steps: ArrayLike | None = None, dimension: int | None = None) -> Factors:
    """Factors from numbers or matrices."""
    R = np.asarray(R, float)
    R = R[:, None, None] if R.ndim == 1 else R
    at = np.arange(len(R) + 1) if steps is None else np.asarray(steps)
    return Factors(R, at, dimension=dimension or R.shape[-1])


def of(R: ArrayLike, steps: ArrayLike | None = None) -> Verdict:
    return judge_factors([factors(R, steps)])


def exceeded(found: Verdict, piece: Factors) -> float:
    """By how much the largest log K(t, s) of all boundaries exceeds the bound of the verdict."""
    table = measure_windows(piece, grid=max(piece.count, 1)).log_norms
    rate = math.log(found.rate) if found.kind == "exponentially stable" else 0.0
    t = piece.steps
    return float(np.nanmax(table - rate * np.maximum(t[:, None] - t, 0))) - math.log(found.constant)


def test_a_run_annihilated_once_is_judged_by_what_enters_later() -> None:
    found = of(np.r_[0.0, np.full(300, 2.0)])
    assert found.kind == "exponentially unstable"
    assert found.peak == pytest.approx(300 * math.log(2.0))
    assert found.rate == pytest.approx(2.0)
    assert "annihilated at training step 1" in found.reason
    calm = of(np.r_[np.full(100, 0.9), 0.0, np.full(300, 0.8)])
    assert calm.kind == "exponentially stable"
    assert (calm.spans, calm.horizon) == (((0, 401),), 401)
    assert calm.rate == pytest.approx(0.9)
    assert exceeded(calm, factors(np.r_[np.full(100, 0.9), 0.0, np.full(300, 0.8)])) <= 1e-9
    assert of([0.0]).kind == of(np.r_[np.full(30, 0.5), 0.0, np.full(30, 0.5)]).kind == "inconclusive"
    # half of the run grows before it is annihilated
    assert of(np.r_[np.full(300, 2.0), 0.0, np.full(300, 0.5)]).kind == "inconclusive"


def test_what_is_annihilated_whenever_it_enters_is_stable() -> None:
    found = of(np.zeros(100))
    assert (found.kind, found.constant, found.rate) == ("exponentially stable", 1.0, 0.0)
    R = np.tile([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [0.0, 0.0, 0.0]], (100, 1, 1))
    nilpotent = of(R)
    assert nilpotent.kind == "exponentially stable"
    assert abs(exceeded(nilpotent, factors(R))) < 1e-9
    assert of(R[:40]).kind == "inconclusive"


@pytest.mark.parametrize("cadence", [1, 4, 8])
def test_growth_of_what_enters_late_is_seen_at_any_cadence(cadence: int) -> None:
    R = np.tile(np.eye(2), (300, 1, 1))
    R[:100, 1, 1], R[200:, 1, 1] = 0.5, 1.2
    found = of(R, np.arange(301) * cadence)
    assert found.kind == "exponentially unstable"
    assert found.rate == pytest.approx(1.2 ** (1.0 / cadence), rel=1e-6)
    assert "enters at training step" in found.reason
    R[200:, 1, 1] = 1.0
    assert of(R, np.arange(301) * cadence).kind == "profile-bounded"


def test_a_short_last_factor_counts() -> None:
    R, steps = np.r_[np.full(1000, 0.999), 1e40], np.r_[np.arange(1001) * 8, 8007]
    found = of(R, steps)
    assert found.kind == "inconclusive"
    assert found.peak == pytest.approx(40 * math.log(10.0))
    assert of(np.r_[np.full(1000, 0.999), 0.999], steps).kind == "exponentially stable"


@pytest.mark.parametrize(("count", "kind"), [(1, "inconclusive"), (40, "inconclusive"), (100, "exponentially stable")])
def test_few_factors_are_no_verdict_however_long(count: int, kind: str) -> None:
    assert of(np.full(count, 0.5), np.arange(count + 1) * 100).kind == kind


@pytest.mark.parametrize("leading", [1.0, 0.99])
@pytest.mark.parametrize("spacing", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_constant_covers_a_spike_between_the_times_of_the_grid(leading: float, spacing: int) -> None:
    R = np.tile(np.diag([leading**spacing, 0.5 if leading < 1.0 else 1.0]), (1000, 1, 1))
    R[0, 1, 1], R[501, 1, 1], R[502, 1, 1] = 1e-3, 100.0, 0.01
    piece = factors(R, np.arange(1001) * spacing)
    found = judge_factors([piece])
    assert found.kind == ("exponentially stable" if leading < 1.0 else "profile-bounded")
    assert found.peak == pytest.approx(math.log(100.0))
    assert found.constant == pytest.approx(100.0 / leading**spacing, rel=1e-6)
    assert exceeded(found, piece) <= 1e-9


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 4))])
def test_no_window_of_a_noisy_run_exceeds_its_bound(seed: int) -> None:
    r = np.random.default_rng(seed)
    R = np.triu(0.3 * r.standard_normal((400, 3, 3))) + np.diag([0.9, 0.8, 0.5])
    piece = factors(R, np.cumsum(r.integers(1, 9, 401)))
    found = judge_factors([piece])
    assert found.kind in {"exponentially stable", "profile-bounded"}
    assert -1.0 <= exceeded(found, piece) <= 1e-9
    cut = judge_factors([piece], grid=20, refine=0)
    assert math.isnan(cut.constant) or exceeded(cut, piece) <= 1e-9


def pieces(*parts: tuple[NDArray[np.float64], int]) -> list[Factors]:
    return [factors(R, start + np.arange(len(R) + 1)) for R, start in parts]


def test_every_piece_of_a_windowed_run_is_judged() -> None:
    grows, falls, flat = np.full(200, 2.0), np.full(200, 0.9), np.ones(200)
    found = judge_factors(pieces((grows, 0), (falls, 1000)))
    assert found.kind == "inconclusive"
    assert "from training step 0 to 200 exponentially unstable" in found.reason
    assert found.spans == ((0, 200), (1000, 1200))
    assert found.horizon == 400
    assert "(400 steps in 2 stretches)" in str(found)
    both = judge_factors(pieces((falls, 0), (np.full(200, 0.95), 1000)))
    assert (both.kind, both.constant) == ("exponentially stable", pytest.approx(1.0, abs=1e-6))
    assert both.rate == pytest.approx(0.95)
    assert judge_factors(pieces((falls, 0), (flat, 300))).kind == "profile-bounded"
    assert judge_factors(pieces((grows, 0), (grows, 300))).kind == "exponentially unstable"


def test_a_last_piece_that_is_cut_short_does_not_undo_the_others() -> None:
    falls = np.full(200, 0.9)
    found = judge_factors(pieces((falls, 0), (np.array([0.95]), 1000)))
    assert found.kind == "exponentially stable"
    assert "fewer than 50 factors" in found.reason
    assert judge_factors(pieces((falls, 0), (np.array([50.0]), 1000))).kind == "inconclusive"
    with pytest.raises(ValueError, match="no factors"):
        judge_factors([])


def test_without_a_step_there_is_no_horizon() -> None:
    found = of(np.zeros((0, 2, 2)), [7])
    assert (found.kind, found.horizon, found.spans) == ("inconclusive", 0, ((7, 7),))
