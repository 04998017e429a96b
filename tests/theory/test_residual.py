"""T3a to d: the step limits of residual blocks, on both sides and at a witness."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import stableopt.theory as th

scales = st.floats(1e-8, 1e8)
parts = st.floats(0.01, 1.0)


def norm(M: np.ndarray) -> float:
    return float(np.linalg.norm(M, 2))


def rotation_field(m: float, L: float) -> np.ndarray:
    """The scaled rotation with <d, Jd> = -m |d|^2 and |Jd| = L |d|."""
    w = math.sqrt(max(L * L - m * m, 0.0))
    return np.array([[-m, w], [-w, -m]])


@given(scales, st.floats(0, 3))
def test_a_lipschitz_branch_attains_its_factor(L: float, product: float) -> None:
    tau = product / L
    assert norm(np.eye(2) + tau * L * np.eye(2)) == pytest.approx(th.lipschitz_factor(tau, L), rel=1e-12)
    assert th.lipschitz_factor(tau, L) >= 1


@given(scales, parts, st.floats(0.01, 3))
@example(1.0, 1.0, 1.0)
def test_the_dissipative_law_is_attained_and_its_limit_is_sharp(L: float, part: float, at: float) -> None:
    m, J = part * L, rotation_field(part * L, L)
    limit = th.dissipative_max_step(m, L)
    assert th.dissipative_factor(at * limit, m, L) == pytest.approx(
        norm(np.eye(2) + at * limit * J), rel=1e-6, abs=1e-6
    )
    assert norm(np.eye(2) + limit * J) == pytest.approx(1.0, abs=1e-12)
    assert norm(np.eye(2) + 1.001 * limit * J) > 1
    assert norm(np.eye(2) + 0.999 * limit * J) < 1
    best = th.dissipative_best_step(m, L)
    assert th.dissipative_best_factor(m, L) == pytest.approx(norm(np.eye(2) + best * J), abs=1e-6)
    for other in (0.9, 1.1):
        assert th.dissipative_factor(best, m, L) <= th.dissipative_factor(other * best, m, L)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.floats(0, 2))
def test_the_dissipative_law_bounds_any_matrix(seed: int, n: int, tau: float) -> None:
    g = np.random.default_rng(seed)
    J = g.standard_normal((n, n)) - 2 * np.eye(n)
    m, L = -float(np.linalg.eigvalsh((J + J.T) / 2)[-1]), norm(J)
    assert norm(np.eye(n) + tau * J) <= th.dissipative_factor(tau, m, L) * (1 + 1e-12)


def test_without_dissipation_no_step_contracts() -> None:
    assert th.dissipative_max_step(0.0, 1.0) == 0.0
    assert th.dissipative_max_step(-0.5, 1.0) == 0.0
    assert th.dissipative_max_step(0.0, 0.0) == math.inf
    assert th.dissipative_factor(0.1, 0.0, 1.0) > 1
    with pytest.raises(ValueError, match="Cauchy"):
        th.dissipative_factor(0.1, 2.0, 1.0)
    with pytest.raises(ValueError, match="Cauchy"):
        th.dissipative_max_step(-2.0, 1.0)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 5), scales, st.floats(0, 1), st.floats(0, 0.5))
@example(0, 2, 3, 1.0, 1.0, 0.0)
def test_a_gradient_block_is_nonexpansive_up_to_its_limit(
    seed: int, n: int, hidden: int, scale: float, at: float, strong: float
) -> None:
    g = np.random.default_rng(seed)
    A = scale * g.standard_normal((hidden, n))
    m = strong * norm(A) ** 2
    L = th.gradient_branch_smoothness(norm(A), strong=m)
    assert isinstance(L, float)
    D = np.diag(g.random(hidden))  # any Clarke derivative of any activation with slopes in [0, 1]
    tau = at * th.cocoercive_max_step(L)
    J = -(m * np.eye(n) + A.T @ D @ A)
    assert norm(np.eye(n) + tau * J) <= th.strongly_convex_factor(tau, m, L) * (1 + 1e-12)
    assert th.strongly_convex_factor(tau, m, L) <= th.cocoercive_factor(tau, L) * (1 + 1e-12)
    assert th.cocoercive_factor(tau, L) <= 1 + 1e-12
    sharp = -(m * np.eye(n) + A.T @ A)  # all units active
    assert norm(np.eye(n) + 1.001 * th.cocoercive_max_step(L) * sharp) > 1
    assert norm(np.eye(n) + 1.5 * th.cocoercive_max_step(L) * sharp) == pytest.approx(
        th.cocoercive_factor(1.5 * th.cocoercive_max_step(L), L), rel=1e-9
    )


@given(scales, parts, st.floats(0, 3))
def test_the_strongly_convex_law_is_attained_and_its_best_step_is_best(L: float, part: float, at: float) -> None:
    m, J = part * L, -np.diag([part * L, L])
    tau = at / L
    assert th.strongly_convex_factor(tau, m, L) == pytest.approx(norm(np.eye(2) + tau * J), rel=1e-12)
    limit = th.strongly_convex_max_step(L)
    assert th.strongly_convex_factor(0.999 * limit, m, L) < 1 < th.strongly_convex_factor(1.001 * limit, m, L)
    best = th.strongly_convex_best_step(m, L)
    assert th.strongly_convex_best_factor(m, L) == pytest.approx(th.strongly_convex_factor(best, m, L), abs=1e-12)
    for other in (0.99, 1.01):
        assert th.strongly_convex_factor(other * best, m, L) >= th.strongly_convex_factor(best, m, L)
    with pytest.raises(ValueError, match="cannot exceed"):
        th.strongly_convex_factor(tau, 2 * L, L)


def test_the_smoothness_of_a_gradient_branch_counts_slope_and_square() -> None:
    assert th.gradient_branch_smoothness(3.0, slope=0.5, strong=0.25) == 4.75


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_negative_slopes_break_the_gradient_block(activation: str) -> None:
    """The block expands at a step far below the limit of slopes in [0, 1]."""
    f = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[activation]
    bias = torch.tensor(-math.sqrt(2.0) if activation == "gelu" else -2.4)
    A, step = 1.0, 0.01 * th.cocoercive_max_step(1.0)
    derivative = torch.func.jacrev(lambda h: h - step * A * f(A * h + bias))(torch.tensor(0.0))
    assert float(derivative) > 1 + 0.09 * step
    assert not th.slopes_allow_gradient_block(th.clarke_slopes(activation))


def test_a_matrix_that_is_not_the_transpose_breaks_the_gradient_block() -> None:
    """With B != A^T the field is not a gradient: it expands at 1 % of the limit."""
    g = np.random.default_rng(0)
    A, B = g.standard_normal((6, 4)), g.standard_normal((4, 6))
    step = 0.01 * th.cocoercive_max_step(norm(A) * norm(B))
    assert norm(np.eye(4) - step * B @ A) > 1.0001
    assert norm(np.eye(4) - step * A.T @ A) <= 1


def test_a_convolution_pair_with_different_paddings_is_not_a_gradient() -> None:
    """Zero padding one way and circular padding back: the product is not symmetric, and the block expands."""
    n, step = 6, 0.05
    k = np.array([1.0, -2.0, 0.5])
    zero = sum(c * np.eye(n, k=o) for c, o in zip(k, (-1, 0, 1), strict=True))
    circular = sum(c * np.roll(np.eye(n), o, axis=1) for c, o in zip(k, (-1, 0, 1), strict=True))
    g = np.random.default_rng(0)
    largest = max(norm(np.eye(n) - step * circular.T @ np.diag(g.integers(0, 2, n)) @ zero) for _ in range(64))
    assert largest > 1.001
    assert max(norm(np.eye(n) - step * zero.T @ np.diag(g.integers(0, 2, n)) @ zero) for _ in range(64)) <= 1 + 1e-12


def test_a_small_spectral_radius_is_not_a_small_norm() -> None:
    J = np.array([[-1.0, 10.0], [0.0, -1.0]])
    assert th.spectral_radius(np.eye(2) + 0.5 * J) == pytest.approx(0.5)
    assert norm(np.eye(2) + 0.5 * J) > 5
