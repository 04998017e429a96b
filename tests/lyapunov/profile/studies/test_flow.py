"""Flows and their derivatives: closed forms, and the law that the logarithmic norm bounds the growth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stableopt.lyapunov.profile.studies.flow import follow, jacobian


def expm(A: np.ndarray) -> np.ndarray:
    """By scaling and squaring of the series."""
    n = max(0, math.ceil(math.log2(max(np.linalg.norm(A, 1), 1e-9))) + 6)
    X, term = np.eye(len(A)), np.eye(len(A))
    for k in range(1, 16):
        term = term @ A / 2**n / k
        X = X + term
    for _ in range(n):
        X = X @ X
    return X


def test_a_linear_flow_is_the_exponential_within_its_error() -> None:
    A = np.random.default_rng(0).normal(size=(3, 3))
    T = torch.from_numpy(A)
    h = torch.tensor([1.0, -2.0, 0.5])
    end = follow(lambda t, x: T @ x, h, np.eye(3), 0.8)
    exact = expm(0.8 * A)
    assert np.linalg.norm(end.derivative - exact) <= end.errors[1] <= 1e-7
    assert np.linalg.norm(end.state - exact @ h.numpy()) <= end.errors[0] <= 1e-7
    mu = np.linalg.eigvalsh(0.5 * (A + A.T))[-1]
    assert end.log_norm == pytest.approx(mu, abs=1e-12)
    assert end.largest_log_norm == pytest.approx(mu, abs=1e-12)


def test_a_flow_that_depends_on_time_and_is_not_linear() -> None:
    # h' = 2 t h^2 from 1: h = 1 / (1 - t^2), dh/dh0 = h^2; the derivative of f is 4 t h
    end = follow(lambda t, h: 2 * t * h * h, torch.ones(1), np.eye(1), 0.5)
    assert abs(end.state[0] - 4 / 3) <= end.errors[0]
    assert abs(end.derivative[0, 0] - 16 / 9) <= end.errors[1]
    # one number: the derivative is exactly exp of the integral
    assert math.exp(0.5 * end.log_norm) == pytest.approx(16 / 9, abs=1e-7)
    assert end.largest_log_norm == pytest.approx(4 * 0.5 * 4 / 3, rel=1e-6)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_derivative_grows_faster_than_the_logarithmic_norm(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(3, 3, generator=generator)
    end = follow(lambda t, h: torch.tanh(W @ h) - (1 + t) * h, torch.randn(3, generator=generator), np.eye(3), 0.5)
    rate = math.log(np.linalg.norm(end.derivative, 2)) / 0.5
    assert rate <= end.log_norm + end.errors[2]
    assert rate <= end.largest_log_norm
    # a smaller one would not do: a symmetric field attains it
    S = 0.5 * (W + W.T)
    linear = follow(lambda t, h: S @ h, torch.randn(3, generator=generator), np.eye(3), 0.5)
    assert math.log(np.linalg.norm(linear.derivative, 2)) / 0.5 == pytest.approx(linear.log_norm, abs=1e-8)


def test_a_derivative_is_written_down_row_by_row() -> None:
    value, J = jacobian(lambda x: (x**2).sum() * torch.ones(2), torch.tensor([[1.0, 3.0]]))
    np.testing.assert_allclose(value, [10.0, 10.0])
    np.testing.assert_allclose(J, [[2.0, 6.0], [2.0, 6.0]])
    value, J = jacobian(lambda x: torch.ones(2), torch.ones(3))  # constant
    np.testing.assert_allclose(J, np.zeros((2, 3)))
    with torch.no_grad():
        _, J = jacobian(lambda x: 2 * x, torch.ones(2))
    np.testing.assert_allclose(J, 2 * np.eye(2))
