"""T3g and i: averaging, budgets, compensation, shortcuts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stableopt.theory as th
from stableopt.linalg import Bound

blocks = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 5)), min_size=1, max_size=10)


@given(blocks)
def test_growth_is_attained_and_lies_within_its_budget(pairs: list[tuple[float, float]]) -> None:
    steps, constants = zip(*pairs, strict=True)
    growth, h = th.depth_growth(steps, constants), 1.0
    for tau, L in pairs:
        h = h + tau * L * h
    assert growth == pytest.approx(h)
    assert growth <= th.depth_growth_budget(steps, constants) * (1 + 1e-12)


def test_the_budget_is_used_up_as_the_depth_grows() -> None:
    for depth, used in [(8, 0.7), (64, 0.9), (512, 0.98)]:
        step = th.budget_max_step(10.0, [2.0] * depth)
        growth = th.depth_growth([step] * depth, [2.0] * depth)
        assert 10 * used < growth < 10
        assert th.depth_growth_budget([Bound.point(step)] * depth, [2.0] * depth).lower <= 10
    beyond = 1.01 * th.budget_max_step(10.0, [2.0] * 512)
    assert th.depth_growth_budget([beyond] * 512, [2.0] * 512) > 10
    assert th.depth_growth([beyond] * 2000, [2.0] * 2000) > 10
    assert th.budget_max_step(2.0, [0.0]) == math.inf
    assert th.budget_max_step(1.0, [1.0]) == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        th.budget_max_step(0.5, [1.0])


@given(st.floats(0.01, 1.0), st.floats(1e-8, 1e8))
def test_compensation_is_sharp(c: float, L: float) -> None:
    step = th.compensated_max_step(c, L)
    assert c * th.lipschitz_factor(step, L) <= 1 + 1e-15
    assert c * th.lipschitz_factor(step * 1.01 + 0.01 / L, L) > 1


def test_compensation_needs_a_contraction() -> None:
    assert th.compensated_max_step(1.0, 2.0) == 0.0
    assert th.compensated_max_step(0.5, 0.0) == math.inf
    for wrong in (1.5, 0.0):
        with pytest.raises(ValueError, match="contraction"):
            th.compensated_max_step(wrong, 1.0)


@given(st.floats(0, 1), st.floats(0, 3), st.sampled_from([1, 2, np.inf]))
def test_an_averaged_map_obeys_its_factor_in_every_norm(a: float, lipschitz: float, p: float) -> None:
    g = np.random.default_rng(0)
    T = g.standard_normal((4, 4))
    T = T / np.linalg.norm(T, p) * lipschitz
    factor = th.averaged_factor(a, lipschitz)
    assert np.linalg.norm((1 - a) * np.eye(4) + a * T, p) <= factor + 1e-12
    assert np.linalg.norm((1 - a) * np.eye(4) + a * lipschitz * np.eye(4), p) == pytest.approx(factor)
    assert factor <= 1 or lipschitz > 1


def test_averaging_beyond_one_is_refused() -> None:
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="weight"):
            th.averaged_factor(wrong)
    with pytest.raises(TypeError, match="exactly known"):
        th.averaged_factor(Bound(0.0, 0.5))


@given(st.floats(0.1, 10), st.floats(0, 3), st.floats(0.1, 5))
def test_scaled_shortcuts_rescale_the_law(alpha: float, tau: float, L: float) -> None:
    J = -np.diag([0.0, L])  # a gradient branch
    block = float(np.linalg.norm(alpha * np.eye(2) + tau * J, 2))
    assert th.scaled_shortcut_factor(alpha, tau, lambda t: th.cocoercive_factor(t, L)) == pytest.approx(block)
    assert block <= th.shortcut_factor(alpha, tau, L)
    assert th.shortcut_factor(alpha, tau, L) == pytest.approx(np.linalg.norm(alpha * np.eye(2) - tau * J, 2))


def test_a_nonlinearity_after_the_sum_multiplies() -> None:
    assert th.post_activation_factor(th.lipschitz_factor(0.5, 2.0), 0.25) == 0.5


def test_every_block_has_its_step() -> None:
    with pytest.raises(ValueError, match="one entry per block"):
        th.depth_growth([0.1], [1.0, 2.0])
