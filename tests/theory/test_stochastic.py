"""T4: sensitivity to the data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stableopt.theory as th


@given(st.floats(1e-8, 1e8), st.floats(0, 1), st.floats(0, 3))
def test_growth_factors_bound_the_step_of_every_admissible_curvature(L: float, part: float, at: float) -> None:
    lr, m = at / L, part * L
    for h in np.linspace(0, 1, 5):
        assert abs(1 - lr * h * L) <= th.convex_growth(lr, L) * (1 + 1e-12)
        assert abs(1 - lr * (2 * h - 1) * L) <= th.nonconvex_growth(lr, L) * (1 + 1e-12)
        if lr <= 2 / (L + m) * (1 - 1e-12):
            assert abs(1 - lr * (m + h * (L - m))) <= th.strongly_convex_growth(lr, m, L) + 1e-12
    assert th.nonconvex_growth(lr, L) == pytest.approx(1 + lr * L)
    assert th.convex_growth(lr, L) == pytest.approx(max(1.0, abs(1 - lr * L)))
    if m == L:
        assert th.strongly_convex_growth(0.9 / L, L, L) == pytest.approx(1 - 0.45)


def test_the_strongly_convex_growth_is_attained_at_its_largest_lr() -> None:
    m, L = 1.0, 3.0
    lr = 2 / (L + m)
    assert th.strongly_convex_growth(lr, m, L) >= abs(1 - lr * L)
    assert th.strongly_convex_growth(lr, L, L) if lr <= 1 / L else True
    assert th.strongly_convex_growth(1 / L, L, L) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at most 2"):
        th.strongly_convex_growth(1.01 * lr, m, L)
    with pytest.raises(ValueError, match="cannot exceed"):
        th.strongly_convex_growth(0.1, 2 * L, L)


@settings(max_examples=30)
@given(st.floats(0.1, 3), st.integers(1, 4), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_convex_stability_is_attained_by_linear_losses(G: float, n: int, lrs: list[float]) -> None:
    """f_i = G x, one replaced by -G x: enumerate every sequence of samples."""
    separations = []
    for drawn in itertools.product(range(n), repeat=len(lrs)):
        x = y = 0.0
        for i, lr in zip(drawn, lrs, strict=True):
            x, y = x - lr * G, y - lr * (-G if i == 0 else G)
        separations.append(abs(x - y))
    expected = G * sum(separations) / len(separations)
    assert th.convex_stability(G, n, lrs, smoothness=0.0) == pytest.approx(expected, abs=1e-12)
    assert expected <= th.nonsmooth_stability(G, n, lrs) + 1e-12


@given(st.floats(0.1, 3), st.integers(1, 20), st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_accumulated_laws_are_the_laws_of_the_list(G: float, n: int, lrs: list[float]) -> None:
    total, squares = sum(lrs), sum(lr * lr for lr in lrs)
    assert th.accumulated_convex_stability(G, n, total, max(lrs), 2.0) == pytest.approx(
        th.convex_stability(G, n, lrs, 2.0), abs=1e-14
    )
    assert th.accumulated_nonsmooth_displacement(G, n, total, squares) == pytest.approx(
        th.nonsmooth_displacement(G, n, lrs), abs=1e-14
    )
    with pytest.raises(ValueError, match="largest lr must be at most"):
        th.accumulated_convex_stability(G, n, 5.0, 1.01, 2.0)


@settings(max_examples=30)
@given(st.floats(0.1, 3), st.integers(1, 4), st.floats(-2, 2), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_propagated_learning_rates_are_attained_by_quadratics(G: float, n: int, h: float, lrs: list[float]) -> None:
    """f_i = h x^2 / 2 + G x, one replaced by h x^2 / 2 - G x: enumerate every sequence of samples; h of either sign."""
    drift, expected = 0.0, 0.0
    for lr in lrs:
        drift = abs(1 - lr * h) * drift + lr
    for drawn in itertools.product(range(n), repeat=len(lrs)):
        d = 0.0
        for i, lr in zip(drawn, lrs, strict=True):
            d = abs(1 - lr * h) * d + 2 * lr * G * (i == 0)
        expected += G * d / n ** len(lrs)
    assert th.accumulated_stability(G, n, drift) == pytest.approx(expected, abs=1e-12)


def test_convex_stability_refuses_a_learning_rate_beyond_its_hypothesis() -> None:
    assert th.convex_stability(1.0, 2, [0.5], 4.0) == 0.5
    with pytest.raises(ValueError, match=r"lrs\[1\]"):
        th.convex_stability(1.0, 2, [0.5, 0.51], 4.0)
    for n in (0, -1):
        with pytest.raises(ValueError, match="samples"):
            th.convex_stability(1.0, n, [0.1], 1.0)


@given(st.floats(0.1, 3), st.integers(2, 20), st.floats(0.1, 2), st.floats(0.05, 1.0))
def test_strongly_convex_stability_is_the_fixed_point_of_its_recursion(G: float, n: int, m: float, part: float) -> None:
    lr, separation = part / m, 0.0
    bound = th.strongly_convex_stability(G, n, m)
    for _ in range(400):
        separation = (1 - lr * m) * separation + 2 * lr * G / n
        assert G * separation <= bound * (1 + 1e-12)
    assert G * separation == pytest.approx(bound, rel=1e-6)


@settings(max_examples=30)
@given(st.floats(0.1, 3), st.integers(2, 50), st.floats(0.2, 3), st.floats(0.05, 1), st.integers(1, 10000))
def test_nonconvex_stability_is_the_best_burn_in(G: float, n: int, L: float, c: float, T: int) -> None:
    """Hardt, Recht and Singer wait t0 steps for the replaced sample: minimize their bound over t0."""
    bound = th.nonconvex_stability(G, n, L, c, T)
    wait = np.exp(np.linspace(-20, 20, 40001))
    waiting = (wait + 2 * G**2 / L * (T / wait) ** (L * c)) / (n - 1)
    assert bound == pytest.approx(waiting.min(), rel=1e-4)
    assert bound <= waiting.min() * (1 + 1e-9)


def test_nonconvex_stability_needs_two_samples() -> None:
    for n, T in [(1, 10), (10, 0)]:
        with pytest.raises(ValueError, match="samples >= 2"):
            th.nonconvex_stability(1.0, n, 1.0, 1.0, T)


@settings(max_examples=30)
@given(st.floats(0.1, 3), st.integers(1, 3), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_nonsmooth_runs_drift_apart_no_further_than_said(G: float, n: int, lrs: list[float]) -> None:
    """Run the worst case of the recursion over every sequence of samples."""
    total = 0.0
    for drawn in itertools.product(range(n), repeat=len(lrs)):
        d = 0.0
        for i, lr in zip(drawn, lrs, strict=True):
            d = math.sqrt(d * d + 4 * lr * lr * G * G + 4 * lr * G * d * (i == 0))
        total += d / n ** len(lrs)
    bound = th.nonsmooth_displacement(G, n, lrs)
    assert total <= bound + 1e-12
    assert th.nonsmooth_stability(G, n, lrs) == pytest.approx(G * bound)
    alone = 2 * G * math.sqrt(sum(lr * lr for lr in lrs))  # no replaced sample drawn: the first term is attained
    assert th.nonsmooth_displacement(G, 10**9, lrs) == pytest.approx(alone, abs=1e-6)
    assert bound - alone == pytest.approx(4 * G * sum(lrs) / n, abs=1e-9)
