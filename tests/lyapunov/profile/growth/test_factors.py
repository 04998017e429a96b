"""Triangular factors: what they mean, and orthonormal directions of any size."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableopt.lyapunov.profile.growth.factors import Factors, orthonormalize


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 6), st.integers(-300, 300))
def test_vectors_are_the_rows_times_the_factor_whatever_their_size(seed, k, more, power):
    V = torch.randn(k, k + more, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sizes = 2.0 ** torch.linspace(-abs(power), power, k, dtype=torch.float64)
    V = V * sizes[:, None]
    Q, R = orthonormalize(V)
    assert torch.allclose(Q @ Q.mT, torch.eye(k, dtype=torch.float64), atol=1e-13)
    assert (np.diag(R) >= 0).all()
    assert np.array_equal(R, np.triu(R))
    assert torch.allclose(torch.as_tensor(R.T) @ Q / sizes[:, None], V / sizes[:, None], atol=1e-12)


def test_spans_of_the_first_vectors_are_kept():
    V = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q, _ = orthonormalize(V)
    for j in range(1, 4):
        P = Q[:j].mT @ Q[:j]
        assert torch.allclose(V[:j] @ P, V[:j], atol=1e-13)


@pytest.mark.parametrize("V", [torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])])
def test_a_lost_direction_has_a_zero_and_the_basis_is_completed(V):
    Q, R = orthonormalize(V.double())
    assert R[1, 1] == 0.0
    assert torch.allclose(Q @ Q.mT, torch.eye(2, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(torch.as_tensor(R.T) @ Q, V.double(), atol=1e-14)


def test_float32_directions_are_factored_in_float64():
    V = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    Q, R = orthonormalize(V)
    assert Q.dtype == torch.float32
    assert R.dtype == np.float64
    exact = np.linalg.qr(V.double().numpy().T, mode="r")
    assert np.abs(np.abs(R) - np.abs(exact)).max() < 1e-13 * np.abs(exact).max()


def test_what_cannot_be_factored_is_refused():
    with pytest.raises(ValueError, match="3 in 2 dimensions"):
        orthonormalize(torch.ones(3, 2))
    with pytest.raises(ValueError, match="not finite"):
        orthonormalize(torch.tensor([[1.0, math.inf]]))


def test_products_of_factors_are_transitions_on_the_directions():
    rng = np.random.default_rng(0)
    A = [rng.standard_normal((4, 4)) for _ in range(6)]
    Q = torch.as_tensor(np.linalg.qr(rng.standard_normal((4, 2)))[0].T.copy())
    start, R = Q.numpy().T, []
    for step in A:
        Q, factor = orthonormalize(Q @ torch.as_tensor(step.T.copy()))
        R.append(factor)
    product = np.linalg.multi_dot(A[::-1]) @ start
    assert np.linalg.norm(np.linalg.multi_dot(R[::-1]), 2) == pytest.approx(np.linalg.norm(product, 2), rel=1e-12)


@pytest.mark.parametrize(
    ("R", "steps", "dimension", "said"),
    [
        (np.ones((1, 1, 2)), [0, 1], 1, r"shape \(n, k, k\)"),
        (np.ones((1, 1, 1)), [0], 1, "one more step"),
        (np.ones((1, 1, 1)), [1, 1], 1, "increase"),
        (np.ones((1, 2, 2)), [0, 1], 1, "2 columns in 1 dimensions"),
    ],
)
def test_factors_that_do_not_fit_are_refused(R, steps, dimension, said):
    with pytest.raises(ValueError, match=said):
        Factors(R, np.array(steps), dimension)
