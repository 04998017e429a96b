"""T3f: the exact law in the maximum norm."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import stableopt.theory as th
from stableopt.linalg import Bound, log_norm


def inf(M: np.ndarray) -> float:
    return float(np.linalg.norm(M, np.inf))


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(1e-8, 1e8), st.floats(0, 1))
@example(0, 1, 1.0, 1.0)
def test_the_norm_is_the_law_up_to_the_limit_and_more_beyond(seed: int, n: int, scale: float, at: float) -> None:
    g = np.random.default_rng(seed)
    J = scale * (g.standard_normal((n, n)) - 2 * np.eye(n))
    mu, limit = th.infinity_log_norm(J), th.infinity_max_step(J)
    assert mu == pytest.approx(log_norm(J, np.inf).upper, rel=1e-12)
    if math.isinf(limit):
        limit = 1 / scale
    assert inf(np.eye(n) + at * limit * J) == pytest.approx(th.infinity_law(at * limit, mu), rel=1e-12, abs=1e-12)
    for step in (at * limit, 3 * limit):
        assert th.infinity_factor(step, J) == pytest.approx(inf(np.eye(n) + step * J), rel=1e-12)
        assert th.infinity_factor(step, J) >= th.infinity_law(step, mu) * (1 - 1e-12) - 1e-12


def test_just_past_the_limit_the_law_fails() -> None:
    J = np.array([[-2.0]])
    assert th.infinity_max_step(J) == 0.5
    assert th.infinity_law(0.6, th.infinity_log_norm(J)) < inf(np.eye(1) + 0.6 * J)
    assert th.infinity_max_step([[3.0]]) == math.inf


def test_a_positive_diagonal_does_not_lower_the_limit() -> None:
    """Only negative entries do: the largest modulus of the diagonal is sufficient, but not the sharp limit."""
    J = np.array([[4.0, 1.0], [0.0, -1.0]])
    assert th.infinity_max_step(J) == 1.0
    assert inf(np.eye(2) + 0.9 * J) == pytest.approx(th.infinity_law(0.9, th.infinity_log_norm(J)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.floats(0.1, 5), st.floats(0, 1))
def test_the_leaky_block_law_holds_for_all_slopes_and_is_attained(seed: int, n: int, decay: float, at: float) -> None:
    g = np.random.default_rng(seed)
    A = g.standard_normal((n, n))
    mu, tau = th.infinity_log_norm(A), at * th.leaky_infinity_max_step(decay, np.diag(A))
    factor = th.leaky_infinity_factor(tau, decay, mu)
    for _ in range(5):
        D = np.diag(g.random(n))
        assert inf(np.eye(n) + tau * (-decay * np.eye(n) + D @ A)) <= factor + 1e-12
    extreme = max(inf(np.eye(n) + tau * (-decay * np.eye(n) + s * A)) for s in (0.0, 1.0))
    assert extreme == pytest.approx(factor, abs=1e-12)


def test_just_past_its_limit_the_leaky_law_fails() -> None:
    A, c = np.array([[-3.0]]), 1.0
    limit = th.leaky_infinity_max_step(c, [-3.0])
    assert limit == 0.25
    worst = lambda tau: max(abs(1 + tau * (-c + d * A[0, 0])) for d in (0.0, 1.0))  # noqa: E731
    assert worst(limit) <= th.leaky_infinity_factor(limit, c, -3.0)
    assert worst(3 * limit) > th.leaky_infinity_factor(3 * limit, c, -3.0)
    assert th.leaky_infinity_max_step(0.0, [1.0]) == math.inf


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_the_weighted_norm_is_that_of_the_scaled_matrix(seed: int, n: int) -> None:
    g = np.random.default_rng(seed)
    W, w = g.standard_normal((n, n)), np.exp(g.standard_normal(n))
    assert th.weighted_infinity_norm(W, w) == pytest.approx(inf(np.diag(1 / w) @ W @ np.diag(w)))


def test_an_enclosed_step_takes_the_worse_end_and_bad_matrices_are_refused() -> None:
    assert th.infinity_factor(Bound(0.0, 2.0), [[-2.0]]) == 3.0
    assert th.infinity_factor(Bound(0.0, 0.5), [[-2.0]]) == 1.0
    with pytest.raises(ValueError, match="got"):
        th.infinity_factor(-1.0, [[-2.0]])
    with pytest.raises(ValueError, match="at least one row"):
        th.infinity_log_norm(np.zeros((0, 0)))
    with pytest.raises(ValueError, match="positive numbers"):
        th.weighted_infinity_norm(np.eye(2), [1.0, 0.0])
