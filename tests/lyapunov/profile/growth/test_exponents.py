"""Exponents: closed forms, equivariance, both sides of every refusal, and intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.exponents import (
    MIN_EFFECTIVE,
    cosines,
    exponent,
    long_run_variance,
    mean_square_exponent,
    spectrum,
)

EPS = float(np.finfo(float).eps)


def ar(r: np.random.Generator, phi: float, n: int) -> NDArray[np.float64]:
    """A stationary autoregression of order one."""
    x = r.standard_normal(n)
    x[0] /= math.sqrt(1.0 - phi * phi)
    for t in range(1, n):
        x[t] += phi * x[t - 1]
    return x


def test_cosines_are_those_of_the_definition() -> None:
    n, x = 37, np.random.default_rng(0).standard_normal(37)
    for j in (1, 2, 9):
        expected = sum(math.sqrt(2 / n) * x[t] * math.cos(math.pi * j * (t + 0.5) / n) for t in range(n))
        assert cosines(x, 9)[j - 1] == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize(("phi", "theta"), [(0.0, 0.0), (0.8, 0.0), (-0.5, 0.0), (0.0, 0.9), (0.5, -0.4)])
def test_the_long_run_variance_is_that_of_the_spectrum_at_zero(phi: float, theta: float) -> None:
    r = np.random.default_rng(3)
    found = []
    for _ in range(60):
        e = r.standard_normal(1201)
        x = e[1:] + theta * e[:-1]
        for t in range(1, 1200):
            x[t] += phi * x[t - 1]
        found.append(long_run_variance(x)[0])
    assert np.mean(found) == pytest.approx(((1.0 + theta) / (1.0 - phi)) ** 2, rel=0.15)


def test_its_degrees_of_freedom_are_those_of_its_scatter() -> None:
    r = np.random.default_rng(4)
    found = np.array([long_run_variance(ar(r, 0.8, 500)) for _ in range(300)])
    assert found[:, 1].mean() < 12.0  # 16 frequencies, less what is not known of the correlation
    relative = found[:, 0].var() / found[:, 0].mean() ** 2  # 2 / nu of a chi-square
    assert 2.0 / relative == pytest.approx(found[:, 1].mean(), rel=0.35)


def test_the_bias_of_the_correlation_is_taken_out() -> None:
    r = np.random.default_rng(6)
    short = [long_run_variance(ar(r, 0.9, 200))[0] for _ in range(150)]
    assert 0.75 < np.median(short) / 100.0 < 1.3  # of 1 / (1 - 0.9)^2; without, it is 0.56


def test_adding_to_every_step_moves_the_exponent_and_scaling_scales_it() -> None:
    x = ar(np.random.default_rng(0), 0.6, 500)
    one, moved, scaled = exponent(x), exponent(x + 3.0), exponent(-2.0 * x)
    assert [moved.value - 3.0, moved.lower - 3.0, moved.upper - 3.0] == pytest.approx([one.value, one.lower, one.upper])
    assert [scaled.value, scaled.upper, scaled.lower] == pytest.approx([-2 * one.value, -2 * one.lower, -2 * one.upper])
    assert one.effective == pytest.approx(moved.effective) == pytest.approx(scaled.effective)


def test_the_value_is_the_mean_after_the_burn_in() -> None:
    x = np.random.default_rng(0).standard_normal(100)
    x[:10] = 1e3
    assert exponent(x).value == pytest.approx(x[10:].mean())
    assert (exponent(x).count, exponent(x).burn_in) == (90, 10)
    assert exponent(x, burn_in=0).value == pytest.approx(x.mean())


def test_windows_of_several_steps_give_the_rate_per_step() -> None:
    x = np.random.default_rng(1).standard_normal(1000) + 0.2
    five = exponent(x.reshape(200, 5).sum(1), spacing=5, burn_in=0)
    assert five.value == pytest.approx(x.mean())
    assert five.upper - five.lower == pytest.approx(
        exponent(x, burn_in=0).upper - exponent(x, burn_in=0).lower, rel=0.5
    )
    uneven = np.array([2, 3] * 200)
    sums = np.add.reduceat(x, np.concatenate([[0], np.cumsum(uneven)[:-1]]))
    other = exponent(sums, spacing=uneven, burn_in=0)
    assert other.value == pytest.approx(x.mean())
    # a rate of 0.2 whatever the window: no scatter is seen in windows that only differ in their length
    exact = exponent(0.2 * uneven, spacing=uneven)
    assert exact.upper - exact.lower < 10 * EPS


@pytest.mark.parametrize("rate", [0.0, math.log(0.9), -3.0, 40.0])
def test_a_deterministic_growth_is_known_to_rounding(rate: float) -> None:
    found = exponent(np.full(60, rate))
    assert found.lower <= rate <= found.upper
    assert 0.0 < found.upper - found.lower <= 4 * EPS * (1 + abs(rate))
    assert found.effective == 54


def test_a_transient_lies_within_the_interval() -> None:
    t = np.arange(300)
    found = exponent(math.log(0.9) + 0.9**t)  # a second direction that dies out
    assert found.lower <= math.log(0.9) <= found.upper < found.lower + 1e-2


def test_a_growth_that_drifts_has_no_limit_to_be_estimated() -> None:
    t = np.arange(1, 1001)
    found = exponent(np.log((t + 1) / t))  # the norm is t
    assert (found.known, found.kind) == (False, "finite time")
    assert "drifts" in found.reason
    assert found.value == pytest.approx(math.log(1001 / 101) / 900)
    noise = np.random.default_rng(0).standard_normal(1000)
    assert exponent(noise).kind == "almost sure"
    assert exponent(noise + 0.01 * t).kind == "finite time"


def test_both_sides_of_the_least_effective_number() -> None:
    # 1000 values of correlation phi are worth 1000 (1 - phi) / (1 + phi)
    assert exponent(ar(np.random.default_rng(0), 0.97, 1000), burn_in=0).known is False  # 15
    assert exponent(ar(np.random.default_rng(0), 0.9, 1000), burn_in=0).known is True  # 53
    few = exponent(np.random.default_rng(0).standard_normal(29), burn_in=0)
    assert not few.known
    assert "29 values are too few" in few.reason
    assert exponent(np.random.default_rng(0).standard_normal(30), burn_in=0).effective <= MIN_EFFECTIVE
    assert exponent(np.full(29, 1.0), burn_in=0).known is False
    assert exponent(np.full(30, 1.0), burn_in=0).known is True
    text = str(exponent(ar(np.random.default_rng(0), 0.97, 1000), burn_in=0))
    assert "no interval" in text
    assert "30 are needed" in text


def test_an_annihilated_perturbation_has_minus_infinity() -> None:
    with np.errstate(invalid="ignore"):
        growth = np.diff(
            np.log(np.array([1.0, 2.0, 1.0, 0.0, 0.0, 0.0]), where=np.arange(6) < 3, out=np.full(6, -np.inf))
        )
    found = exponent(growth)
    assert (found.value, found.lower, found.upper, found.sign) == (-math.inf, -math.inf, -math.inf, -1)
    assert "window 2" in found.reason


def test_what_is_no_number_has_no_interval() -> None:
    for bad in (math.nan, math.inf):
        found = exponent([0.1] * 50 + [bad] + [0.1] * 50)
        assert not found.known
        assert "window 50" in found.reason
        assert found.sign == 0
    assert not exponent([]).known


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="shape"):
        exponent(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="level"):
        exponent(np.zeros(50), level=95)
    with pytest.raises(ValueError, match="burn_in"):
        exponent(np.zeros(50), burn_in=50)
    with pytest.raises(ValueError, match="spacing"):
        exponent(np.zeros(50), spacing=0)
    with pytest.raises(ValueError, match="directions"):
        spectrum(np.zeros(50))
    with pytest.raises(ValueError, match="members"):
        mean_square_exponent(np.zeros(50))
    with pytest.raises(ValueError, match="level"):
        mean_square_exponent(np.zeros((50, 40)), level=0.0)
    with pytest.raises(ValueError, match="window"):
        mean_square_exponent(np.zeros((50, 40)), window=50)


def test_a_spectrum_has_an_exponent_for_each_column() -> None:
    r = np.random.default_rng(0)
    columns = np.array([0.3, -0.1, -2.0]) + 0.1 * r.standard_normal((400, 3))
    for found, column in zip(spectrum(columns, burn_in=3), columns.T, strict=True):
        assert found == exponent(column, burn_in=3)
    columns[7, 2] = -math.inf
    assert [e.value == -math.inf for e in spectrum(columns)] == [False, False, True]


def scalar(r: np.random.Generator, eta: float, T: int, m: int) -> NDArray[np.float64]:
    """Gradient descent with step eta on curvatures of an exponential law of mean 1: factors 1 - eta a."""
    return np.vstack([np.zeros(m), np.log(np.abs(1.0 - eta * r.exponential(size=(T, m)))).cumsum(0)])


def mean_square(eta: float) -> float:
    """1/2 log E (1 - eta a)^2 with E a = 1, E a^2 = 2."""
    return 0.5 * math.log(1.0 - 2.0 * eta + 2.0 * eta * eta)


def test_the_mean_square_may_grow_where_almost_every_path_decays() -> None:
    paths = scalar(np.random.default_rng(1), 1.2, 200, 400)
    almost_sure = exponent(np.diff(paths[:, 0]))
    square = mean_square_exponent(paths, window=1)
    assert almost_sure.upper < 0.0 < square.lower
    assert square.lower <= mean_square(1.2) <= square.upper
    assert (square.kind, square.count) == ("mean square", 180)


def test_a_mean_square_is_followed_while_enough_members_carry_it() -> None:
    paths = scalar(np.random.default_rng(0), 0.3, 100, 400)
    found = mean_square_exponent(paths, burn_in=0)
    assert found.lower <= mean_square(0.3) <= found.upper
    assert found.effective >= 400 / 3
    assert 4 <= found.count < 100
    assert f"from step {found.count + 1} on fewer than 133 of 400" in found.reason
    w = np.exp(2.0 * paths[found.count + 1])
    assert w.sum() ** 2 / (w**2).sum() < 400 / 3
    # the value is that of the definition
    expected = np.log(np.exp(2.0 * paths[found.count]).mean()) / 2 / found.count
    assert found.value == pytest.approx(expected)


def test_few_members_or_one_that_carries_all_are_refused() -> None:
    paths = scalar(np.random.default_rng(0), 0.1, 30, 40)
    assert mean_square_exponent(paths).known
    assert not mean_square_exponent(paths[:, :29]).known
    paths[1:, 0] += 10.0
    found = mean_square_exponent(paths)
    assert not found.known
    assert "members" in found.reason
    assert not mean_square_exponent(paths, window=30).known
    assert mean_square_exponent(paths, window=3, burn_in=2).known  # after its jump this member is like the others


def test_equal_members_have_the_exponent_of_each() -> None:
    paths = np.tile(math.log(0.9) * np.arange(51.0)[:, None], (1, 64))
    for window in (None, 1, 7):
        found = mean_square_exponent(paths, window=window)
        assert found.lower <= math.log(0.9) <= found.upper < found.lower + 1e-13
        assert found.effective == pytest.approx(64.0)
    shifted = mean_square_exponent(paths + 100.0)
    assert shifted.value == pytest.approx(math.log(0.9))


def test_the_jackknife_is_the_scatter_of_the_logarithm() -> None:
    r = np.random.default_rng(5)
    found = [mean_square_exponent(scalar(r, 0.2, 60, 60), window=1, burn_in=0) for _ in range(300)]
    half = np.mean([(e.upper - e.lower) / 2 for e in found])
    assert half / 2.0 == pytest.approx(float(np.std([e.value for e in found])), rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize(("phi", "n"), [(0.5, 200), (0.9, 1000), (0.97, 4000)])
def test_intervals_cover(phi: float, n: int) -> None:
    r = np.random.default_rng(0)
    found = [exponent(ar(r, phi, n), burn_in=0) for _ in range(1000)]
    known = [e for e in found if e.known]
    assert len(known) > 950
    assert 0.93 < np.mean([e.lower <= 0.0 <= e.upper for e in known]) < 0.985


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.1, 0.5, 1.2])
def test_intervals_of_the_mean_square_cover(eta: float) -> None:
    r = np.random.default_rng(0)
    found = [mean_square_exponent(scalar(r, eta, 100, 64), window=1) for _ in range(1000)]
    assert np.mean([e.known for e in found]) > 0.95
    assert 0.90 < np.mean([e.lower <= mean_square(eta) <= e.upper for e in found if e.known]) < 0.985


@pytest.mark.parametrize(("unit", "cadence", "seed"), [(1.0, 4, 4), (0.5, 1, 3), (0.5, 4, 2), (2.0, 4, 4), (1.0, 1, 1)])
def test_intervals_of_directions_that_turn_hold_the_exponents(unit: float, cadence: int, seed: int) -> None:
    # heavy ball, momentum 0.5 and rate 0.5, on curvatures 1, 0.5 and 0.1: complex and real pairs, all in closed form
    h, units = np.diag([1.0, 0.5, 0.1]), np.array([1.0] * 3 + [unit] * 3)
    A = np.block([[np.eye(3) - 0.5 * h, -0.25 * np.eye(3)], [h, 0.5 * np.eye(3)]]) * units[:, None] / units
    Q, growth = np.linalg.qr(np.random.default_rng(seed).standard_normal(A.shape))[0], []
    for _ in range(1000 // cadence):
        Q, R = np.linalg.qr(np.linalg.matrix_power(A, cadence) @ Q)
        growth.append(np.log(np.abs(np.diag(R))))
    truth = np.sort(np.log(np.abs(np.linalg.eigvals(A))))[::-1]
    for found, exact in zip(spectrum(growth, spacing=cadence), truth, strict=True):
        assert found.lower - 1e-14 <= exact <= found.upper + 1e-14
        assert found.upper - found.lower < 0.01


def test_after_an_annihilation_what_is_measured_entered_later() -> None:
    growth = np.r_[-np.inf, np.full(300, 2.0)]
    found = exponent(growth)
    assert (found.value, found.known, found.sign) == (-math.inf, False, 0)
    assert "enters there" in found.reason
