"""T6: small gain."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import stableopt.theory as th
from stableopt.linalg import Bound

gains = st.floats(0, 2)


@given(gains, gains, gains, gains)
@example(0.5, 0.0, 0.0, 0.5)
@example(0.0, 1.0, 1.0, 0.0)
def test_the_radius_is_the_spectral_radius_and_the_condition_is_exact(a: float, b: float, c: float, d: float) -> None:
    M = np.array([[a, b], [c, d]])
    radius = th.small_gain_radius(a, b, c, d)
    assert radius == pytest.approx(max(abs(np.linalg.eigvals(M))), abs=1e-7)
    if abs(radius - 1) > 1e-6:
        assert th.small_gain_holds(a, b, c, d) == (radius < 1)


def test_the_condition_is_strict_and_uses_the_worst_gains() -> None:
    assert not th.small_gain_holds(0.5, 0.5, 0.5, 0.5)
    assert th.small_gain_holds(0.5, 0.5, math.nextafter(0.5, 0), 0.5)
    assert not th.small_gain_holds(1.5, 0.1, 0.1, 1.5)  # the product alone would pass
    assert not th.small_gain_holds(0.5, Bound(0.1, 0.5), 0.5, 0.5)


@given(gains, st.floats(1e-6, 2), st.floats(1e-6, 2), gains, st.floats(0, 5), st.floats(0, 5))
def test_the_weighted_sum_decays_at_the_perron_rate(a: float, b: float, c: float, d: float, h: float, t: float) -> None:
    v1, v2 = th.small_gain_weights(a, b, c, d)
    assert min(v1, v2) > 0
    assert v1 + v2 == pytest.approx(1.0)
    radius = th.small_gain_radius(a, b, c, d)
    after = v1 * (a * h + b * t) + v2 * (c * h + d * t)
    assert after == pytest.approx(radius * (v1 * h + v2 * t), rel=1e-6, abs=1e-7)


@given(gains, gains, st.floats(0, 2), gains, st.floats(1e-3, 1), st.floats(0, 5), st.floats(0, 5))
@example(0.9, 5.0, 0.0, 0.5, 0.05, 1.0, 1.0)
def test_with_a_rate_the_weights_exist_for_triangular_gains_too(
    a: float, b: float, c: float, d: float, extra: float, h: float, t: float
) -> None:
    rate = th.small_gain_radius(a, b, c, d) + extra
    v1, v2 = th.small_gain_weights(a, b, c, d, rate)
    assert min(v1, v2) > 0
    assert v1 * (a * h + b * t) + v2 * (c * h + d * t) <= rate * (v1 * h + v2 * t) * (1 + 1e-9)


def test_triangular_gains() -> None:
    assert th.triangular_radius(0.5, 0.75) == th.small_gain_radius(0.5, 7.0, 0.0, 0.75) == 0.75
    with pytest.raises(ValueError, match="give a rate"):
        th.small_gain_weights(0.5, 7.0, 0.0, 0.75)
    with pytest.raises(ValueError, match="exceed"):
        th.small_gain_weights(0.5, 7.0, 0.0, 0.75, rate=0.75)


def test_mixed_sensitivity_is_a_product() -> None:
    assert th.mixed_sensitivity(3.0, 0.5) == 1.5
