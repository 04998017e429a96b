"""Energies from factors: they are those of T1 on the span, their rates sound, and their bounds hold for every window."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.energies import EnergySynthesis, synthesize
from stableopt.lyapunov.profile.growth.energy_cells import EnergyCells, fitting_growth
from stableopt.lyapunov.profile.growth.windows import Windows, measure_windows
from stableopt.theory import (
    energy_rate,
    energy_transition_bound,
    heavy_ball_matrix,
    synthesize_energy,
    synthesized_energy_rate,
    transition,
)
from tests.lyapunov.profile.growth.test_windows import Bare, factored, matrices


@pytest.mark.parametrize("k", [4, 2])
def test_an_energy_is_that_of_the_operators_in_the_coordinates_of_the_columns(k: int) -> None:
    A = matrices(9, 4, seed=0)
    factors, Q = factored(A, k)
    energy, full = synthesize(factors, weight=1.3), synthesize_energy(list(A), 1.3)
    for P, q, whole in zip(energy.P, Q, full, strict=True):
        np.testing.assert_allclose(P, q.T @ whole @ q, rtol=1e-11, atol=1e-11)  # Q^T P Q


def test_rates_are_the_smallest_ones_and_those_of_the_closed_form() -> None:
    A = matrices(9, 3, seed=1)
    factors, _ = factored(A, 3)
    energy = synthesize(factors, weight=0.8)
    for j, R in enumerate(factors.R):
        exact = energy_rate(R, energy.P[j], energy.P[j + 1])
        assert exact * (1 - 1e-12) <= math.exp(energy.log_rates[j]) <= exact * (1 + 1e-12)
        largest = math.exp(energy.log_largest[j])
        assert math.exp(energy.log_rates[j]) == pytest.approx(synthesized_energy_rate(0.8, largest), rel=1e-12)


def fractions(M: NDArray[np.float64]) -> list[list[Fraction]]:
    return [[Fraction(float(x)) for x in row] for row in M]


def is_positive_semidefinite(M: list[list[Fraction]]) -> bool:
    return M[0][0] >= 0 and M[1][1] >= 0 and M[0][0] * M[1][1] >= M[0][1] * M[1][0]


@pytest.mark.parametrize("weight", [None, 1e-18, 0.5, 3.0])
def test_rates_and_constants_are_sound_in_exact_arithmetic(weight: float | None) -> None:
    R = np.triu(np.random.default_rng(5).standard_normal((30, 2, 2)))
    R[3] *= 1e-9
    R[7, 0] = 0.0
    R[10:12] = [[0.0, -1.1], [0.0, 1.1]], [[12345.678, 12345.678], [0.0, 1.3]]  # X = C'PC is what is left of 1e8
    energy = synthesize(Bare(R, np.arange(31), True), weight=weight, grid=30)
    for j, step in enumerate(R):
        S, P, after = fractions(step), fractions(energy.P[j]), fractions(energy.P[j + 1])
        X = [
            [sum(S[a][r] * after[a][b] * S[b][c] for a in range(2) for b in range(2)) for c in range(2)]
            for r in range(2)
        ]
        rate = Fraction(math.exp(energy.log_rates[j]))
        assert is_positive_semidefinite([[rate * P[r][c] - X[r][c] for c in range(2)] for r in range(2)])
        lower, upper = Fraction(math.exp(energy.log_smallest[j])), Fraction(math.exp(energy.log_largest[j]))
        assert is_positive_semidefinite([[P[r][c] - lower * (r == c) for c in range(2)] for r in range(2)])
        assert is_positive_semidefinite([[upper * (r == c) - P[r][c] for c in range(2)] for r in range(2)])


def exact_product(R: NDArray[np.float64]) -> list[list[Fraction]]:
    X = [[Fraction(int(i == j)) for j in range(2)] for i in range(2)]
    for step in R:
        S = fractions(step)
        X = [[sum((S[r][l] * X[l][c] for l in range(2)), Fraction(0)) for c in range(2)] for r in range(2)]
    return X


def cancelling(n: int) -> NDArray[np.float64]:
    """Pairs of steps whose large off-diagonal entries cancel: what is left of them is rounding."""
    rng = np.random.default_rng(0)
    R = np.tile(np.eye(2), (n, 1, 1))
    R[:, 0, 0], R[:, 1, 1] = rng.uniform(0.9, 1.1, (2, n))
    R[:, 0, 1] = 1e6 * np.resize([1.0, -1.0], n) * (1 + 1e-8 * rng.random(n))
    return R


def test_the_rounding_of_the_products_over_a_cell_is_counted() -> None:
    R = cancelling(40)
    factors = Bare(R, np.arange(41), True)
    windows = measure_windows(factors, grid=5)
    cells = EnergyCells.of(R, windows)
    for a in range(5):
        exact = exact_product(R[8 * a : 8 * a + 8])
        size = Fraction(2) ** round(float(cells.log_scale[a]) / math.log(2))
        off = [
            [float(size * Fraction(float(cells.C[a, r, c])) - exact[r][c]) / float(size) for c in range(2)]
            for r in range(2)
        ]
        assert np.linalg.norm(off, 2) <= cells.error[a] < 1e-12
        assert cells.error[a] > 0
        assert EnergyCells.of(R, measure_windows(factors, grid=40)).error[a] == 0.0  # one factor is not rounded


def test_where_energies_would_be_rounding_the_norms_of_the_cells_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    R = cancelling(8)
    R[:, 0, 1] *= 1e7
    factors = Bare(R, np.arange(9), True)
    windows = measure_windows(factors, grid=2)
    energy = synthesize(factors, windows)
    assert energy.check(windows).holds
    with pytest.raises(ValueError, match="leave the precision"):
        synthesize(factors, windows, weight=1.0)
    monkeypatch.setattr(EnergyCells, "search", lambda self, windows: ("constant", np.zeros(2)))
    plain = synthesize(factors, windows)
    assert plain.reference == "norms"
    assert plain.check(windows).holds
    np.testing.assert_array_equal(plain.P, np.tile(np.eye(2), (3, 1, 1)))


@pytest.mark.parametrize("error", [0.0, 1e-3])
def test_rates_hold_for_every_product_within_the_error_of_a_cell(error: float) -> None:
    rng = np.random.default_rng(1)
    C = np.triu(rng.standard_normal((6, 3, 3)))
    cells = EnergyCells(C, np.zeros(6), np.full(6, error), np.ones(6))
    P, log_rates, log_smallest, log_largest = cells.certified(np.full(6, math.log(0.7)))
    worst = -math.inf
    for j in range(6):
        for _ in range(200):
            off = rng.standard_normal((3, 3))
            off *= error / np.linalg.norm(off, 2)
            worst = max(worst, math.log(energy_rate(C[j] + off, P[j], P[j + 1])) - log_rates[j])
        values = np.linalg.eigvalsh(P[j])
        assert math.exp(log_smallest[j]) <= values[0] * (1 + 1e-14)
        assert math.exp(log_largest[j]) >= values[-1] * (1 - 1e-14)
    assert -0.1 < worst <= 1e-13


def kinds() -> dict[str, Bare]:
    rng = np.random.default_rng(0)
    noise = np.triu(0.3 * rng.standard_normal((240, 3, 3)))
    noise[:, range(3), range(3)] = np.exp(0.3 * rng.standard_normal((240, 3)))
    phases = (
        [heavy_ball_matrix(1.0, 0.1, 0.9)] * 60
        + [heavy_ball_matrix(1.0, 4.2, 0.9)] * 10
        + [heavy_ball_matrix(1.0, 2.0, 0.9)] * 50
    )
    found = {
        "noise": noise,
        "growth by 2000 decades": np.tile(math.exp(5) * np.array([[1.0, 1.0], [0.0, 0.5]]), (900, 1, 1)),
        "decay by 2000 decades": np.tile(math.exp(-5) * np.array([[1.0, 1.0], [0.0, 0.5]]), (900, 1, 1)),
        "Jordan block": np.tile([[1.0, 1.0], [0.0, 1.0]], (100, 1, 1)),
        "heavy ball through an unstable phase": factored(np.array(phases), 2)[0].R,
        "projections that meet in zero": np.array(
            [np.eye(2), np.diag([1.0, 0.0]), np.diag([0.0, 2.0]), 3 * np.eye(2)] * 9
        ),
        "zero": np.zeros((5, 2, 2)),
        "Ginibre": factored(matrices(150, 4, seed=3), 4)[0].R,
    }
    return {name: Bare(R, np.cumsum(1 + np.arange(len(R) + 1) % 3), True) for name, R in found.items()}


@pytest.mark.parametrize("name", kinds())
@pytest.mark.parametrize("grid", [7, pytest.param(40, marks=pytest.mark.slow)])
def test_bounds_hold_for_every_window_and_rates_are_not_slack(name: str, grid: int) -> None:
    factors = kinds()[name]
    windows = measure_windows(factors, grid=grid)
    energy = synthesize(factors, windows)
    check = energy.check(windows)
    assert check.holds
    assert check.smallest >= -check.margin - 1e-9
    assert check.smallest <= check.median <= check.largest
    for i, j in ((0, 0), (0, grid // 2), (3, 4)):
        if j < len(energy.steps):
            assert energy.uniform_bound(i, j) >= energy.bound(i, j) >= windows.log_norms[j, i] - windows.rounding[j, i]
    lowered = replace(energy, log_largest=energy.log_largest - 2 * check.smallest - 1e-6)
    assert not lowered.check(windows).holds  # no bound is above the norm everywhere: at the end P is the identity


def test_bounds_are_those_of_the_transition_operators_themselves() -> None:
    A = matrices(20, 3, seed=7)
    energy = synthesize(factored(A, 3)[0])
    for i in range(21):
        for j in range(i, 21):
            K = np.linalg.norm(transition(list(A), i, j), 2)
            assert math.log(K) <= energy.bound(i, j) + 1e-12
            rates = np.exp(energy.log_rates[i:j])
            law = energy_transition_bound(rates, energy.smallest, energy.largest)
            assert isinstance(law, float)
            assert energy.uniform_bound(i, j) == pytest.approx(math.log(law), abs=1e-9)


def test_what_is_normal_has_an_energy_without_any_slack() -> None:
    rng = np.random.default_rng(2)
    scalar = Bare(np.exp(rng.standard_normal((60, 1, 1))), np.arange(61), True)
    windows = measure_windows(scalar)
    check = synthesize(scalar, windows).check(windows)
    assert check.holds
    assert check.largest < 1e-10
    decay = Bare(np.tile(np.diag([0.9, 0.3]), (60, 1, 1)), np.arange(61), True)
    energy = synthesize(decay)
    assert energy.constant == pytest.approx(1.0, abs=1e-12)
    assert energy.rate == pytest.approx(0.9, rel=1e-12)


def test_a_momentum_method_decays_in_an_energy_where_its_single_steps_expand() -> None:
    A = np.tile(heavy_ball_matrix(1.0, 1.0, 0.9), (200, 1, 1))
    factors, _ = factored(A, 2)
    windows = measure_windows(factors, grid=50)
    energy = synthesize(factors, windows)
    steps_only = np.log(np.linalg.norm(factors.R, 2, axis=(1, 2))).sum()
    assert steps_only > 50  # what the norms of the steps prove: nothing
    assert energy.rate < 1
    assert math.exp(energy.check(windows).largest) < 20
    assert energy.uniform_bound(0, 50) < 0


def loosest(energy: EnergySynthesis, windows: Windows) -> float:
    n = len(energy.steps)
    return max(energy.uniform_bound(i, j) - windows.log_norms[j, i] for i in range(n) for j in range(i, n))


@pytest.mark.parametrize("name", ["noise", "Ginibre", "Jordan block"])
def test_the_searched_energy_is_not_looser_than_the_norms_of_the_cells_or_a_constant_weight(name: str) -> None:
    factors = kinds()[name]
    windows = measure_windows(factors, grid=20)
    best = loosest(synthesize(factors, windows), windows)
    for weight in [1e-30, *(math.exp(-2 * (windows.exponent + a)) for a in (0.0, 0.01, 0.1, 1.0))]:
        assert best <= loosest(synthesize(factors, windows, weight=weight), windows) + 0.05


def test_leading_directions_are_those_of_the_leading_blocks() -> None:
    A = matrices(15, 5, seed=4)
    two, four = factored(A, 2)[0], factored(A, 4)[0]
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 4)))[0]
    assert Q.shape == (5, 4)
    leading = synthesize(four, directions=2, weight=1.1)
    assert leading.P.shape == (16, 2, 2)
    assert not leading.full
    same = synthesize(Bare(four.R[:, :2, :2], four.steps, False), weight=1.1)
    np.testing.assert_array_equal(leading.P, same.P)
    assert not synthesize(two).full
    assert synthesize(factored(A, 5)[0], directions=5).full
    assert not synthesize(factored(A, 5)[0], directions=3).full


def test_energies_along_a_tangent_fall_as_the_rates_say() -> None:
    A = matrices(40, 3, seed=6)
    factors, Q = factored(A, 3)
    energy = synthesize(factors, weight=1.1)
    for x in np.random.default_rng(0).standard_normal((20, 3)):
        V = energy.along(x)
        assert (np.diff(V) <= energy.log_rates + 1e-12).all()
        delta, coordinates = Q[0] @ x, []
        for j in range(41):
            coordinates.append(Q[j].T @ delta)
            if j < 40:
                delta = A[j] @ delta
        np.testing.assert_allclose(V, energy.energies(np.array(coordinates)), rtol=1e-9, atol=1e-9)
    values, vectors = np.linalg.eigh(energy.P[39])
    half = vectors / np.sqrt(values)
    worst = half @ np.linalg.eigh(half.T @ factors.R[39].T @ energy.P[40] @ factors.R[39] @ half)[1][:, -1]
    one = synthesize(Bare(factors.R[39:], np.arange(2), True), weight=math.exp(energy.log_weights[39]))
    assert np.diff(one.along(worst))[0] == pytest.approx(energy.log_rates[39], abs=1e-9)  # the rate is attained
    exploding = synthesize(kinds()["growth by 2000 decades"], grid=20)
    assert exploding.along(np.ones(2))[-1] == pytest.approx(2 * (4500 + math.log(3.0)), rel=1e-3)
    assert synthesize(kinds()["zero"]).along(np.ones(2))[-1] == -math.inf


def test_the_growth_that_fits_all_windows_best_is_found() -> None:
    rng = np.random.default_rng(0)
    sigma = np.concatenate([[0.0], np.cumsum(rng.standard_normal(12))])
    table = np.where(np.tri(13, dtype=bool), sigma[:, None] - sigma[None, :], np.nan)
    np.testing.assert_allclose(fitting_growth(table), sigma, atol=0.01)
    shear = measure_windows(Bare(np.tile([[1.0, 1.0], [0.0, 1.0]], (30, 1, 1)), np.arange(31), True)).log_norms
    fitted = fitting_growth(shear)
    below, j, i = np.tri(31, dtype=bool), *np.nonzero(np.tri(31, dtype=bool))
    slack = shear[j, i] - (fitted[j] - fitted[i])
    assert slack.min() >= -1e-12
    other = [
        np.ptp((shear - a * (np.arange(31)[:, None] - np.arange(31)[None, :]))[below]) for a in np.linspace(0, 0.2, 50)
    ]
    assert slack.max() <= min(other) * 1.002


def test_a_grid_of_another_run_and_nonsense_are_refused() -> None:
    factors = Bare(np.ones((4, 1, 1)), np.arange(5), True)
    energy = synthesize(factors)
    with pytest.raises(ValueError, match="no time in common"):
        energy.check(measure_windows(Bare(np.ones((4, 1, 1)), np.arange(10, 15), True)))
    with pytest.raises(ValueError, match="directions must lie"):
        synthesize(factors, directions=2)
    with pytest.raises(ValueError, match="weight must be positive"):
        synthesize(factors, weight=0.0)
    with pytest.raises(ValueError, match="leave the precision"):
        synthesize(factors, weight=1e18)
    with pytest.raises(ValueError, match="0 <= i <= j <= 4"):
        energy.bound(3, 2)
    with pytest.raises(ValueError, match="not all zero"):
        energy.along(np.zeros(1))
    with pytest.raises(ValueError, match="shape"):
        energy.energies(np.zeros((4, 1)))


def test_no_step_is_an_identity() -> None:
    energy = synthesize(Bare(np.zeros((0, 2, 2)), np.array([3]), True))
    assert energy.P.tolist() == [[[1.0, 0.0], [0.0, 1.0]]]
    assert (energy.bound(0, 0), energy.constant) == (0.0, 1.0)
    assert math.isnan(energy.rate)


def test_a_thinner_grid_of_windows_checks_the_times_in_common() -> None:
    factors = kinds()["noise"]
    energy, thin = synthesize(factors, grid=48), measure_windows(factors, grid=24)
    check = energy.check(thin)
    assert check.holds
    assert len(check.log_ratio) == 25 * 26 // 2
    assert check.start in thin.steps
    assert check.end in thin.steps
