"""Scaled products: what leaves the range of floats meanwhile is there at the end."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stableopt.lyapunov.profile.growth.scaled import Scaled


def product(factors: list[np.ndarray]) -> Scaled:
    X = Scaled.of(np.eye(len(factors[0])))
    for A in factors:
        X = Scaled.of(A) @ X
    return X


def dense(X: Scaled) -> np.ndarray:
    return np.ldexp(X.unit, np.clip(X.exponent, -1000, 1000)[..., None])


def test_small_products_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 5, 4, 4))
    np.testing.assert_allclose(dense(Scaled.of(A) @ Scaled.of(B)), A @ B, rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(dense(Scaled.of(A)), A)
    np.testing.assert_allclose(Scaled.of(A).log_norm(), np.log(np.linalg.norm(A, 2, axis=(-2, -1))), rtol=1e-13)
    np.testing.assert_allclose(Scaled.of(A).log_frobenius(), np.log(np.linalg.norm(A, axis=(-2, -1))), rtol=1e-13)


def test_a_direction_that_was_smaller_by_more_than_floats_know_is_there_in_the_end() -> None:
    up, down = np.diag([math.e, 1.0]), np.diag([1 / math.e, 1.0])
    up[0, 1] = down[0, 1] = 1e-3
    X = product([up] * 1000 + [down] * 2000)  # exp(1000) between the rows, then exp(-1000)
    assert abs(X.exponent[0] - X.exponent[1]) < 20  # the coupling brings the first row back to the size of the second
    assert float(X.log_norm()) == pytest.approx(0.0, abs=1e-5)
    up[0, 1] = down[0, 1] = 0.0
    X = product([up] * 1000 + [down] * 2000)
    assert X.exponent[0] * math.log(2) == pytest.approx(-1000, abs=1)
    assert float(X.log_norm()) == 0.0


@pytest.mark.parametrize("rate", [-2.0, 2.0])
def test_growth_by_thousands_of_decades_is_a_number(rate: float) -> None:
    X = product([math.exp(rate) * np.array([[1.0, 0.5], [0.0, 1.0]])] * 2500)
    assert float(X.log_norm()) == pytest.approx(rate * 2500 + math.log(1250), abs=1e-5)


def test_rows_of_zeros_stay_zero_and_hide_nothing() -> None:
    singular = np.array([[1e-300, 0.0], [0.0, 0.0]])
    X = product([singular] * 10 + [np.array([[1.0, 1e300], [0.0, 1e300]])])
    assert float(X.log_norm()) == pytest.approx(-3000 * math.log(10))
    assert X.exponent[1] == product([np.zeros((2, 2))] * 5).exponent[0]
    assert float(product([np.zeros((2, 2))] * 5).log_norm()) == -math.inf
    assert float(product([np.zeros((2, 2))] * 5).log_frobenius()) == -math.inf
    M, c = Scaled.of(np.zeros((1, 1))).scaled_by_one()
    assert (float(M[0, 0]), float(c)) == (0.0, 0.0)


def test_subnormal_entries_are_scaled_exactly() -> None:
    tiny = np.array([[5e-324, 0.0], [0.0, 3e-310]])
    X = Scaled.of(tiny) @ Scaled.of(np.diag([2.0**1023, 1.0]))
    assert float(X.log_norm()) == pytest.approx(math.log(2.0**-51))
