"""T1: energies bound transitions, and are built from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import stableopt.theory as th

seeds = st.integers(0, 2**32 - 1)


def random_steps(seed: int, n: int, T: int, scale: float) -> list[np.ndarray]:
    g = np.random.default_rng(seed)
    return [scale * g.standard_normal((n, n)) / math.sqrt(n) for _ in range(T)]


@settings(max_examples=30)
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.3, 1.0, 3.0]), st.floats(0.1, 10.0))
@example(0, 1, 1, 0.0, 1.0)
def test_the_synthesized_energy_obeys_its_equation_and_bounds_every_transition(
    seed: int, n: int, T: int, scale: float, w: float
) -> None:
    A = random_steps(seed, n, T, scale)
    P = th.synthesize_energy(A, w)
    assert len(P) == T + 1
    for t in range(T):  # the closed form of the recursion is a sum over later transitions
        direct = sum(w ** (r - t) * th.transition(A, t, r).T @ th.transition(A, t, r) for r in range(t, T + 1))
        np.testing.assert_allclose(P[t], direct, rtol=1e-9, atol=1e-9 * np.abs(direct).max())
        np.testing.assert_allclose(
            A[t].T @ P[t + 1] @ A[t], (P[t] - np.eye(n)) / w, rtol=1e-9, atol=1e-9 * np.abs(P[t]).max()
        )
    ends = [np.linalg.eigvalsh(p)[[0, -1]] for p in P]
    m, M = min(e[0] for e in ends), max(e[1] for e in ends)
    assert m >= 1 - 1e-9
    rates = [max(th.energy_rate(A[t], P[t], P[t + 1]), 0.0) for t in range(T)]
    norms = th.transition_norms(A)
    for s in range(T + 1):
        for t in range(s, T + 1):
            bound = th.energy_transition_bound(rates[s:t], m, M)
            assert norms[t, s] <= bound * (1 + 1e-9)
            assert norms[t, s] == pytest.approx(np.linalg.norm(th.transition(A, s, t), 2), rel=1e-12, abs=1e-300)


def test_the_transition_bound_is_attained() -> None:
    # V = |x_1|^2 + 4 |x_2|^2; a swap of axes with rate rho costs exactly sqrt(M/m).
    rho, P = 0.25, np.diag([1.0, 4.0])
    A = math.sqrt(rho) * np.array([[0.0, 2.0], [0.0, 0.0]])
    assert th.energy_rate(A, P, P) == pytest.approx(rho)
    assert np.linalg.norm(A, 2) == pytest.approx(th.energy_transition_bound([rho], 1.0, 4.0))


@settings(max_examples=25)
@given(seeds, st.floats(0.3, 0.95), st.floats(0.1, 0.99))
@example(1, 0.5, 0.99)
def test_synthesis_reaches_the_promised_size_and_rate(seed: int, rho: float, part: float) -> None:
    g = np.random.default_rng(seed)
    S = np.eye(2) + 0.5 * g.standard_normal((2, 2))
    if np.linalg.cond(S) > 50:
        return
    C = float(np.linalg.cond(S))
    A = [S @ np.diag([rho, -rho]) @ np.linalg.inv(S)] * 12  # ||A^k|| <= C rho^k
    w = part / rho**2
    bound = th.synthesized_energy_bound(C, rho, w)
    P = th.synthesize_energy(A, w)
    assert max(np.linalg.eigvalsh(p)[-1] for p in P) <= bound * (1 + 1e-9)
    rate = th.synthesized_energy_rate(w, bound)
    assert all(th.energy_rate(a, p, q) <= rate * (1 + 1e-9) + 1e-12 for a, p, q in zip(A, P, P[1:], strict=False))
    assert rate < 1 / w


def test_the_size_of_the_energy_is_attained_by_a_scalar_and_the_rate_tends_to_rho_squared() -> None:
    rho, w = 0.5, 3.9
    P = th.synthesize_energy([[[rho]]] * 4000, w)
    assert P[0][0, 0] == pytest.approx(th.synthesized_energy_bound(1.0, rho, w))
    rates = [th.synthesized_energy_rate(w, th.synthesized_energy_bound(1.0, rho, w)) for w in (3.0, 3.9, 3.999)]
    assert rates == pytest.approx([rho**2] * 3)  # C = 1: exactly rho^2 for every w
    slow = [th.synthesized_energy_rate(w, th.synthesized_energy_bound(2.0, rho, w)) for w in (3.0, 3.9, 3.999999)]
    assert slow[0] > slow[1] > slow[2] > rho**2
    assert slow[2] == pytest.approx(rho**2, rel=1e-4)


def test_subexponential_growth_has_no_exponent_and_no_bound() -> None:
    """K(t, 0) grows like t while lambda tends to 0: not called stable."""
    A = [np.array([[1.0, 1.0], [0.0, 1.0]])] * 400
    K = th.transition_norms(A[:100])[:, 0]
    assert K[100] > 99
    assert K[100] / K[50] == pytest.approx(2.0, rel=0.01)
    assert 0 < th.terminal_exponent(A) < 0.016


def test_a_negative_exponent_from_the_start_does_not_bound_a_late_start() -> None:
    """Phi(t, 0) decays while Phi(t, s) grows without bound."""
    A = [[[0.01]]] * 5 + [[[2.0]]] * 10
    K = th.transition_norms(A)
    assert th.terminal_exponent(A) < 0
    assert K[:, 0].max() == 1.0
    assert K.max() == 2.0**10


def test_frozen_hurwitz_matrices_can_explode_when_they_alternate() -> None:
    J = np.array([[-1.0, 10.0], [0.0, -1.0]])
    A = [np.eye(2) + 0.1 * (J if t % 2 == 0 else J.T) for t in range(100)]
    assert all(th.spectral_radius(a) == pytest.approx(0.9) for a in A)
    assert np.linalg.norm(th.transition(A, 0, 100), 2) > 1e18
    assert th.metric_log_norm(J, np.eye(2)) == pytest.approx(4.0)


def test_boundedness_by_a_constant_gives_no_strictly_dissipating_energy() -> None:
    """For a rotation the profile is 1; the synthesized energy needs w -> 1 and its size grows with the horizon."""
    rotation = [[[0.0, -1.0], [1.0, 0.0]]]
    sizes = [th.synthesize_energy(rotation * T, 1.0)[0][0, 0] for T in (10, 100, 1000)]
    assert sizes == pytest.approx([11.0, 101.0, 1001.0])
    rates = [th.energy_rate(rotation[0], *th.synthesize_energy(rotation * T, 1.0)[:2]) for T in (10, 1000)]
    assert rates[0] < rates[1] < 1
    assert rates[1] > 0.998
    with pytest.raises(ValueError, match="lower w"):
        th.synthesized_energy_bound(1.0, 1.0, 1.0)


@settings(max_examples=30)
@given(seeds, st.integers(1, 4), st.floats(1e-8, 1e8))
def test_a_metric_makes_any_matrix_with_a_small_spectral_radius_contract(seed: int, n: int, scale: float) -> None:
    A = scale * np.random.default_rng(seed).standard_normal((n, n))
    rate = 1.2 * th.spectral_radius(A)
    P = th.synthesize_metric(A, rate)
    assert th.metric_norm(A, P) < rate
    assert np.linalg.eigvalsh(P)[0] >= 1 - 1e-9
    with pytest.raises(ValueError, match="exceed"):
        th.synthesize_metric(A, 0.999 * th.spectral_radius(A))


@settings(max_examples=30)
@given(seeds, st.integers(1, 4))
def test_the_metric_norm_and_log_norm_are_those_of_the_transformed_matrix(seed: int, n: int) -> None:
    g = np.random.default_rng(seed)
    A, R = g.standard_normal((n, n)), np.eye(n) + 0.2 * g.standard_normal((n, n))
    if np.linalg.cond(R) > 100:
        return
    P = R.T @ R  # |x|_P = |R x|
    B = R @ A @ np.linalg.inv(R)
    assert th.metric_norm(A, P) == pytest.approx(np.linalg.norm(B, 2), rel=1e-9)
    h = 1e-7
    slope = (th.metric_norm(np.eye(n) + h * A, P) - 1) / h
    assert th.metric_log_norm(A, P) == pytest.approx(slope, abs=1e-4 * (1 + np.linalg.norm(B) ** 2))


def test_malformed_energies_are_refused() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        th.metric_norm(np.eye(2), [[1.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="positive definite"):
        th.metric_norm(np.eye(2), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="one size"):
        th.metric_norm(np.eye(2), np.eye(3))
    with pytest.raises(ValueError, match="shape"):
        th.metric_log_norm(np.eye(2), np.eye(3))
    with pytest.raises(ValueError, match="0 <= s <= t"):
        th.transition([np.eye(2)], 1, 0)
    with pytest.raises(ValueError, match="at least smallest"):
        th.energy_transition_bound([], 2.0, 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        th.synthesized_energy_bound(0.5, 0.5, 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        th.synthesized_energy_rate(1.0, 0.5)
