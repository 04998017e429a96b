"""T3e and implicit blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import stableopt.theory as th


def norm(M: np.ndarray) -> float:
    return float(np.linalg.norm(M, 2))


@given(st.floats(1e-8, 1e8), st.floats(0, 10), st.floats(0, 2))
@example(1.0, 0.0, 1.0)
def test_the_skew_law_is_an_equality_and_its_limit_is_sharp(gamma: float, ratio: float, at: float) -> None:
    omega = ratio * gamma
    J = np.array([[-gamma, omega], [-omega, -gamma]])
    limit = th.skew_damped_max_step(gamma, omega)
    assert th.skew_damped_factor(at * limit, gamma, omega) == pytest.approx(norm(np.eye(2) + at * limit * J), abs=1e-7)
    assert norm(np.eye(2) + limit * J) == pytest.approx(1.0, abs=1e-12)
    assert norm(np.eye(2) + 1.01 * limit * J) > 1 > norm(np.eye(2) + 0.99 * limit * J)
    best = th.skew_damped_best_step(gamma, omega)
    assert th.skew_damped_best_factor(gamma, omega) == pytest.approx(norm(np.eye(2) + best * J), abs=1e-7)
    assert th.skew_damped_factor(1.1 * best, gamma, omega) >= th.skew_damped_factor(best, gamma, omega) - 1e-12


@given(st.floats(0.1, 10), st.floats(0, 3), st.floats(0, 0.95), st.floats(0.01, 1.5))
def test_the_law_with_a_rest_is_attained_and_its_limit_is_sharp(
    gamma: float, ratio: float, share: float, at: float
) -> None:
    """The worst rest acts along the image of the rest of the step, which is a scaled rotation here."""
    omega, rho = ratio * gamma, share * gamma
    J = np.array([[-gamma, omega], [-omega, -gamma]])
    limit = th.skew_damped_max_step(gamma, omega, rho)
    tau = at * limit
    linear = np.eye(2) + tau * J
    turn = linear / max(norm(linear), 1e-300)
    exact = norm(linear + tau * rho * turn) if norm(linear) > 1e-9 else norm(linear) + tau * rho
    assert th.skew_damped_factor(tau, gamma, omega, rho) == pytest.approx(exact, rel=1e-7)
    if abs(at - 1) > 1e-3:
        assert (exact > 1) is (at > 1)
    assert th.skew_damped_factor(limit, gamma, omega, rho) == pytest.approx(1.0, abs=1e-9)
    m, L = gamma - rho, np.hypot(gamma, omega) + rho
    assert th.skew_damped_factor(tau, gamma, omega, rho) <= th.dissipative_factor(tau, m, L * (1 + 1e-12)) + 1e-9
    assert limit >= th.dissipative_max_step(m, L * (1 + 1e-12)) * (1 - 1e-9)


def test_a_rest_as_large_as_the_damping_leaves_no_step() -> None:
    assert th.skew_damped_max_step(1.0, 2.0, 1.0) == 0.0
    assert th.skew_damped_max_step(1.0, 0.0, 3.0) == 0.0
    assert th.skew_damped_factor(0.1, 1.0, 0.0, 3.0) > 1
    with pytest.raises(ValueError, match="remainder"):
        th.skew_damped_factor(0.1, 1.0, 0.0, -1.0)


def test_without_damping_a_skew_block_always_expands() -> None:
    assert th.skew_damped_max_step(0.0, 1.0) == 0.0
    assert th.skew_damped_max_step(0.0, 0.0) == math.inf
    assert th.skew_damped_factor(1e-3, 0.0, 1.0) > 1


def test_a_nonlinearity_around_the_skew_matrix_is_not_covered() -> None:
    """sigma(Kx + b) - gamma x with K skew: the log-norm is positive for some slopes, so every small step expands."""
    g = np.random.default_rng(0)
    G = g.standard_normal((6, 6))
    K, gamma = 2 * (G - G.T), 0.5
    slopes = [np.diag([(i >> k) & 1 for k in range(6)]) for i in range(64)]  # ReLU patterns
    worst = max((D @ K - gamma * np.eye(6) for D in slopes), key=lambda J: th.metric_log_norm(J, np.eye(6)))
    assert th.metric_log_norm(worst, np.eye(6)) > 0
    tau = th.skew_damped_max_step(gamma, norm(K))
    assert norm(np.eye(6) + tau * (K - gamma * np.eye(6))) <= 1 + 1e-12  # the linear block is fine
    for step in (tau, tau / 100):
        assert norm(np.eye(6) + step * worst) > 1 + 1e-6
    x = np.full(6, 0.0)  # and a real point attains it: choose b so that exactly the units of the pattern are active
    D = (worst + gamma * np.eye(6)) @ np.linalg.inv(K)
    b = np.where(np.diag(D) > 0.5, 1.0, -1.0)
    v = np.linalg.svd(np.eye(6) + tau * worst)[2][0] * 1e-3
    block = lambda h: h + tau * (np.maximum(K @ h + b, 0) - gamma * h)  # noqa: E731
    assert np.linalg.norm(block(x + v) - block(x)) > np.linalg.norm(v)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(1e-3, 1e4))
def test_an_implicit_block_has_no_cfl_limit(seed: int, n: int, tau: float) -> None:
    g = np.random.default_rng(seed)
    S = g.standard_normal((n, n))
    J = S - S.T - g.random() * np.eye(n)
    m = -float(np.linalg.eigvalsh((J + J.T) / 2)[-1])
    inverse = np.linalg.inv(np.eye(n) - tau * J)
    assert norm(inverse) <= th.implicit_factor(tau, m) * (1 + 1e-9)
    assert norm(np.linalg.inv(np.eye(n) + tau * m * np.eye(n))) == pytest.approx(th.implicit_factor(tau, m))  # attained
    assert th.implicit_max_step(m) == math.inf


def test_an_implicit_block_that_expands_is_solvable_up_to_its_limit() -> None:
    assert th.implicit_max_step(-4.0) == 0.25
    assert th.implicit_factor(0.125, -4.0) == 2.0
    with pytest.raises(ValueError, match="implicit block needs"):
        th.implicit_factor(0.25, -4.0)
