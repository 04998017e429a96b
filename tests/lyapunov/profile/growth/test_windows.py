"""Windows: every K(t, s) is that of the dense products, and the largest one is found wherever it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.growth.windows import measure_windows
from stableopt.theory import transition_norms


@dataclass(frozen=True)
class Bare:
    """As little as windows need."""

    R: NDArray[np.float64]
    steps: NDArray[np.int64]
    full: bool


def factored(A: NDArray[np.float64], k: int, seed: int = 0) -> tuple[Factors, NDArray[np.float64]]:
    """Return the factors of dense one-step matrices by Benettin's method, and the orthonormal columns."""
    N = A.shape[1]
    Q = [np.linalg.qr(np.random.default_rng(seed).standard_normal((N, k)))[0]]
    R = []
    for step in A:
        q, r = np.linalg.qr(step @ Q[-1])
        sign = np.where(np.diag(r) < 0, -1.0, 1.0)
        Q.append(q * sign)
        R.append(r * sign[:, None])
    return Factors(np.array(R), np.arange(len(A) + 1), dimension=N), np.array(Q)


def matrices(n: int, N: int, seed: int, scale: float = 1.0) -> NDArray[np.float64]:
    return scale * np.random.default_rng(seed).standard_normal((n, N, N)) / math.sqrt(N)


def largest(R: NDArray[np.float64]) -> float:
    return float(np.log(transition_norms(list(R)).max()))


def test_windows_of_a_full_set_of_directions_are_the_transition_norms() -> None:
    A = matrices(12, 3, seed=0)
    found = measure_windows(factored(A, 3)[0])
    K = transition_norms(list(A))
    lower = np.tri(13, dtype=bool)
    np.testing.assert_allclose(found.log_norms[lower], np.log(K[lower]), rtol=1e-10, atol=1e-12)
    assert np.isnan(found.log_norms[~lower]).all()
    assert found.full
    np.testing.assert_allclose(found.path, np.log(K[:, 0]), rtol=1e-10, atol=1e-12)
    assert found.sup == found.sup_upper == pytest.approx(math.log(K.max()))
    assert math.exp(found.sup) == pytest.approx(K[found.end, found.start])


def test_fewer_directions_estimate_from_below_and_are_exact_on_their_span() -> None:
    A = matrices(10, 5, seed=1)
    factors, Q = factored(A, 2)
    found, K = measure_windows(factors), transition_norms(list(A))
    lower = np.tri(11, dtype=bool)
    assert not found.full
    assert (found.log_norms[lower] <= np.log(K[lower]) + 1e-12).all()
    for i, j in ((0, 10), (3, 7), (9, 10)):
        Phi = np.eye(5)
        for step in A[i:j]:
            Phi = step @ Phi
        assert found.log_norms[j, i] == pytest.approx(math.log(np.linalg.norm(Phi @ Q[i], 2)), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 6))])
@pytest.mark.parametrize(("n", "grid"), [(40, 7), (41, 40), (23, 5), (30, 1)])
def test_the_largest_norm_is_that_of_all_windows_whatever_the_grid(n: int, grid: int, seed: int) -> None:
    R = np.triu(matrices(n, 3, seed=seed, scale=1.5))
    steps = np.cumsum(np.random.default_rng(seed).integers(1, 4, n + 1))
    thinned = measure_windows(Bare(R, steps, True), grid=grid, refine=10_000)
    whole = measure_windows(Bare(R, steps, True), grid=n)
    assert thinned.sup == pytest.approx(largest(R), rel=1e-12)
    assert thinned.sup == thinned.sup_upper == pytest.approx(whole.sup, rel=1e-12)
    place = dict(zip(steps.tolist(), range(n + 1), strict=True))
    assert whole.log_norms[place[thinned.end], place[thinned.start]] == pytest.approx(thinned.sup, rel=1e-12)
    np.testing.assert_allclose(thinned.path, whole.path, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(thinned.steps, steps[thinned.index])
    lower = np.tri(len(thinned.index), dtype=bool)
    np.testing.assert_allclose(
        thinned.log_norms[lower], whole.log_norms[np.ix_(thinned.index, thinned.index)][lower], rtol=1e-11, atol=1e-12
    )


def test_a_search_that_is_cut_says_how_much_it_may_have_missed() -> None:
    R = np.triu(matrices(60, 3, seed=2, scale=1.2))
    cut, truth = measure_windows(Bare(R, np.arange(61), True), grid=6, refine=0), largest(R)
    assert cut.sup <= truth + 1e-12
    assert cut.sup_upper >= truth - 1e-12
    assert cut.sup_upper > cut.sup


def test_a_window_that_starts_late_is_found_where_the_path_from_the_start_falls() -> None:
    R = np.full((1000, 1, 1), 0.9)
    R[500:520] = 1.5
    found = measure_windows(Bare(R, np.arange(0, 2001, 2), True), grid=13)
    assert found.peak == 0.0  # nothing to be seen from the start
    assert found.peak_step == 0
    assert found.exponent < 0
    assert (found.start, found.end) == (1000, 1040)
    assert found.sup == pytest.approx(20 * math.log(1.5))
    assert found.running[0] == 0.0
    assert (np.diff(found.running) >= 0).all()
    assert found.running[-1] <= found.sup


@pytest.mark.parametrize("rate", [-5.0, 5.0])
def test_thousands_of_decades_do_no_harm(rate: float) -> None:
    R = np.tile(math.exp(rate) * np.array([[1.0, 1.0], [0.0, 1.0]]), (1000, 1, 1))
    found = measure_windows(Bare(R, np.arange(1001), True), grid=50)
    assert found.path[-1] == pytest.approx(
        1000 * rate + math.asinh(500), rel=1e-12
    )  # |[[1, n], [0, 1]]| = exp asinh(n/2)
    assert found.exponent == pytest.approx(rate, abs=0.01)
    assert found.sup == pytest.approx(max(found.path[-1], math.log(largest_of_one(rate))), rel=1e-12)


def largest_of_one(rate: float) -> float:
    return max(1.0, math.exp(rate + math.asinh(0.5)))


def test_rounding_covers_the_error_of_the_table_and_is_not_much_larger() -> None:
    from fractions import Fraction

    R = np.triu(np.random.default_rng(3).standard_normal((200, 2, 2)))
    found = measure_windows(Bare(R, np.arange(201), True), grid=4)
    for j, i in ((4, 0), (2, 1), (4, 3)):
        X = [[Fraction(1), Fraction(0)], [Fraction(0), Fraction(1)]]
        for step in R[found.index[i] : found.index[j]]:
            S = [[Fraction(float(x)) for x in row] for row in step]
            X = [[sum(S[r][l] * X[l][c] for l in range(2)) for c in range(2)] for r in range(2)]
        scale = max(abs(x) for row in X for x in row)
        exact = math.log(np.linalg.norm([[float(x / scale) for x in row] for row in X], 2)) + log_of(scale)
        assert abs(exact - found.log_norms[j, i]) <= found.rounding[j, i] <= 1e-9


def test_rounding_counts_what_cancels_in_the_products() -> None:
    n, u = 40, 2.0**-53
    R = np.tile(np.eye(2), (n, 1, 1))
    R[:, 0, 1] = 1e8 * np.resize([1.0, -1.0], n)
    found = measure_windows(Bare(R, np.arange(n + 1), True))
    assert found.log_norms[n, 0] == pytest.approx(0.0, abs=1e-15)  # the products of the moduli are 4e9
    assert 2 * n * u * n * 1e8 <= found.rounding[n, 0] <= 4 * n * u * n * 1e8
    assert found.rounding[1, 0] <= 20 * u * max(1, found.log_norms[1, 0])


def log_of(x) -> float:
    shift = x.numerator.bit_length() - x.denominator.bit_length()
    return math.log(x / 2**shift if shift >= 0 else x * 2**-shift) + shift * math.log(2)


def test_directions_that_vanish_have_the_norm_zero() -> None:
    R = np.array([np.eye(2), np.diag([1.0, 0.0]), np.diag([0.0, 1.0]), 3 * np.eye(2)])
    found = measure_windows(Bare(R, np.arange(5), True))
    assert found.log_norms[3, 1] == found.log_norms[4, 0] == -math.inf
    assert found.rounding[4, 0] == 0.0
    assert found.sup == pytest.approx(math.log(3.0))
    assert found.exponent == -math.inf
    thinned = measure_windows(Bare(np.tile(R, (5, 1, 1)), np.arange(21), True), grid=4)
    assert thinned.sup == thinned.sup_upper == pytest.approx(math.log(3.0))


def test_no_step_and_one_direction_are_windows_too() -> None:
    found = measure_windows(Bare(np.zeros((0, 2, 2)), np.array([7]), True))
    assert found.log_norms.tolist() == [[0.0]]
    assert (found.sup, found.sup_upper, found.start, found.end, found.peak_step) == (0.0, 0.0, 7, 7, 7)
    assert math.isnan(found.exponent)
    shrinking = measure_windows(Bare(np.full((9, 1, 1), 0.5), np.arange(10), False), grid=2)
    assert shrinking.sup == 0.0
    assert shrinking.start == shrinking.end


@pytest.mark.parametrize(("grid", "refine"), [(0, 1), (1, -1)])
def test_nonsense_is_refused(grid: int, refine: int) -> None:
    with pytest.raises(ValueError, match="grid must be"):
        measure_windows(Bare(np.ones((1, 1, 1)), np.arange(2), True), grid=grid, refine=refine)
    with pytest.raises(ValueError, match="finite"):
        measure_windows(Bare(np.full((1, 1, 1), np.nan), np.arange(2), True))
