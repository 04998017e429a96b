"""T7: recurrent cells, state spaces, flows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stableopt.theory as th

seeds = st.integers(0, 2**32 - 1)
TRAP = np.array([[1.5, -2.0], [1.5, -1.5]])


def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0.0)


def test_a_spectral_radius_below_one_does_not_make_a_relu_cell_contract() -> None:
    """The fixed point (1, 0) repels by 1.5 per step; none of the sufficient tests is fooled."""
    u = np.array([-0.5, -10.0])
    assert th.spectral_radius(TRAP) == pytest.approx(math.sqrt(0.75))
    fixed = np.array([1.0, 0.0])
    np.testing.assert_allclose(relu(TRAP @ fixed + u), fixed)
    h = fixed + np.array([1e-9, 0.0])
    for _ in range(40):
        h = relu(TRAP @ h + u)
    assert np.linalg.norm(h - fixed) / 1e-9 == pytest.approx(1.5**40, rel=1e-3)
    assert th.recurrent_factor(float(np.linalg.norm(TRAP, 2))) > 1
    assert th.absolute_spectral_radius(TRAP) > 1
    # no diagonal scaling helps: each has norm at least the diagonal entry 1.5
    assert min(th.diagonal_norm(TRAP, [1.0, s]) for s in np.exp(np.linspace(-5, 5, 101))) >= 1.5


def test_a_full_metric_proves_nothing_about_the_cell() -> None:
    P = th.synthesize_metric(TRAP, 0.95)
    assert th.metric_norm(TRAP, P) < 0.95  # contracts the linear map
    assert th.metric_norm(np.diag([1.0, 0.0]) @ TRAP, P) > 1  # but not under the slopes of ReLU


@settings(max_examples=50)
@given(seeds, st.integers(1, 5), st.floats(0.1, 1.5))
def test_a_cell_obeys_its_factor_in_every_diagonal_norm(seed: int, n: int, scale: float) -> None:
    g = np.random.default_rng(seed)
    W, u, D = scale * g.standard_normal((n, n)) / math.sqrt(n), g.standard_normal(n), np.exp(g.standard_normal(n))
    factor = th.recurrent_factor(th.diagonal_norm(W, D))
    x, y = g.standard_normal(n), g.standard_normal(n)
    for _ in range(5):
        before = np.linalg.norm(D * (x - y))
        x, y = relu(W @ x + u), relu(W @ y + u)
        assert np.linalg.norm(D * (x - y)) <= factor * before * (1 + 1e-12) + 1e-15
    assert th.diagonal_norm(W, D) == pytest.approx(np.linalg.norm(np.diag(D) @ W @ np.diag(1 / D), 2))
    assert th.recurrent_factor(0.5, slope=0.25) == 0.125


@settings(max_examples=50)
@given(seeds, st.integers(1, 5), st.floats(0.1, 3))
def test_the_absolute_test_gives_a_norm_in_which_the_cell_contracts(seed: int, n: int, scale: float) -> None:
    W = scale * np.random.default_rng(seed).standard_normal((n, n))
    radius = th.absolute_spectral_radius(W)
    assert radius >= th.spectral_radius(W) * (1 - 1e-9)
    w = th.absolute_weights(W, 1.01 * radius)
    assert w.min() > 0
    assert th.weighted_infinity_norm(W, w) <= 1.01 * radius * (1 + 1e-9)
    assert th.weighted_infinity_norm(W, w) >= radius * (1 - 1e-9)  # no norm can be below the spectral radius of |W|
    with pytest.raises(ValueError, match="exceed"):
        th.absolute_weights(W, 0.99 * radius)


@given(st.floats(0.01, 1.0), st.floats(0, 2), seeds)
def test_the_leaky_cell_obeys_its_factor_and_attains_it(tau: float, rho: float, seed: int) -> None:
    g = np.random.default_rng(seed)
    W = g.standard_normal((3, 3))
    W *= rho / np.linalg.norm(W, 2)
    D = np.diag(g.random(3))
    factor = th.leaky_cell_factor(tau, rho)
    assert np.linalg.norm((1 - tau) * np.eye(3) + tau * D @ W, 2) <= factor * (1 + 1e-12)
    assert np.linalg.norm((1 - tau) * np.eye(3) + tau * rho * np.eye(3), 2) == pytest.approx(factor)
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="step"):
            th.leaky_cell_factor(wrong, 0.5)


@given(st.floats(0, 0.999), st.floats(0.01, 2))
def test_the_gain_of_a_state_space_is_the_peak_of_its_frequency_response(r: float, gamma: float) -> None:
    w = np.linspace(-math.pi, math.pi, 2001)  # holds the frequency 0
    peak = np.abs(2.0 * gamma * 3.0 / (1 - r * np.exp(-1j * w))).max()
    assert th.state_space_gain(r, gamma, 2.0, 3.0) == pytest.approx(peak, rel=1e-9)
    assert th.state_space_gain(r, th.unit_gain_input_scale(r)) == pytest.approx(1.0)
    assert th.lru_gain(r) == pytest.approx(th.state_space_gain(r, th.lru_input_scale(r)), rel=1e-9)


def test_the_gain_of_the_lru_is_14_at_modulus_0_99() -> None:
    assert th.lru_gain(0.99) == pytest.approx(14.107, abs=1e-3)
    h, energy_in, energy_out = 0.0, 0.0, 0.0
    for _ in range(20000):  # a constant input reaches the gain
        h = 0.99 * h + th.lru_input_scale(0.99)
        energy_in, energy_out = energy_in + 1, energy_out + h * h
    assert math.sqrt(energy_out / energy_in) == pytest.approx(th.lru_gain(0.99), rel=0.01)
    for law in (th.lru_gain, th.lru_input_scale, th.unit_gain_input_scale, lambda r: th.state_space_gain(r, 1.0)):
        with pytest.raises(ValueError, match="modulus"):
            law(1.0)


def test_white_noise_keeps_its_variance_under_the_scale_of_the_lru() -> None:
    variance = sum((th.lru_input_scale(0.9) * 0.9**k) ** 2 for k in range(2000))
    assert variance == pytest.approx(1.0)


@settings(max_examples=30)
@given(seeds, st.floats(0, 3))
def test_a_flow_contracts_by_its_log_norm(seed: int, time: float) -> None:
    g = np.random.default_rng(seed)
    J, R = g.standard_normal((3, 3)) - 1.5 * np.eye(3), np.eye(3) + 0.2 * g.standard_normal((3, 3))
    if np.linalg.cond(R) > 50:
        return
    P, m = R.T @ R, -th.metric_log_norm(J, R.T @ R)
    steps = 2**14  # (I + J t/N)^N with squaring
    Phi = np.linalg.matrix_power(np.eye(3) + time / steps * J, steps)
    assert th.metric_norm(Phi, P) <= th.flow_factor(m, time) * (1 + 1e-2)
    values = np.linalg.eigvalsh((J + J.T) / 2)
    assert th.gradient_flow_factor(float(values[0]), time) == pytest.approx(math.exp(-values[0] * time))


def test_small_steps_of_a_contracting_block_tend_to_the_flow() -> None:
    """tau -> 0 at a fixed depth: the discrete law of class b tends to exp(-m t)."""
    m, L, t = 0.7, 2.0, 1.5
    gaps = [abs(th.dissipative_factor(t / n, m, L) ** n - th.flow_factor(m, t)) for n in (10, 100, 1000)]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    gd = [
        abs(th.gradient_descent_factor(t / n, 0.7, 2.0) ** n - th.gradient_flow_factor(0.7, t)) for n in (10, 100, 1000)
    ]
    assert gd[0] > 5 * gd[1] > 25 * gd[2]


def test_scalings_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive numbers"):
        th.diagonal_norm(np.eye(2), [1.0, -1.0])
    with pytest.raises(ValueError, match="positive numbers"):
        th.diagonal_norm(np.eye(2), [1.0])
