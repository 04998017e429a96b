"""T2: the spectral law."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import stableopt.theory as th

factors = st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=8)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(1e-8, 1e8), st.floats(0, 1))
def test_a_layer_obeys_its_factor_and_the_aligned_layer_attains_it(
    seed: int, n: int, scale: float, leak: float
) -> None:
    g = np.random.default_rng(seed)
    W, b = scale * g.standard_normal((n, n)), scale * g.standard_normal(n)

    def layer(h: np.ndarray) -> np.ndarray:
        z = W @ h + b
        return np.where(z > 0, z, leak * z)

    factor = th.layer_factor(float(np.linalg.norm(W, 2)))
    x, y = g.standard_normal(n), g.standard_normal(n)
    assert np.linalg.norm(layer(x) - layer(y)) <= factor * np.linalg.norm(x - y) * (1 + 1e-12)
    v = np.linalg.svd(W)[2][0]
    base = np.linalg.lstsq(W, 1e3 * np.abs(W @ v) + 1e3 * scale - b, rcond=None)[0]
    if (W @ base + b > 2 * np.abs(W @ v)).all():  # all units active: the layer is affine there
        assert np.linalg.norm(layer(base + v) - layer(base)) == pytest.approx(factor, rel=1e-6)
    assert th.layer_factor(2.0, 1.5) == 3.0


@given(factors)
@example([0.0, 1.0])
@example([1.0])
def test_partial_products_are_all_products_of_consecutive_layers(fs: list[float]) -> None:
    table = th.partial_products(fs)
    for l in range(len(fs) + 1):
        assert len(table[l]) == l + 1
        for k in range(l + 1):
            assert table[l][k] == pytest.approx(math.prod(fs[k:l]), rel=1e-12)
    assert table[-1][0] == pytest.approx(th.product_factor(fs), rel=1e-12)
    assert th.largest_partial_product(fs) == pytest.approx(max(max(row) for row in table), rel=1e-12)


@given(factors)
def test_the_exponent_is_the_mean_log_of_the_product(fs: list[float]) -> None:
    assert th.depth_exponent(fs) == pytest.approx(sum(math.log(f) for f in fs) / len(fs), rel=1e-9, abs=1e-12)


def test_compensation_hides_in_the_product_and_shows_in_the_profile() -> None:
    assert th.product_factor([100.0, 0.01]) == 1.0
    assert th.depth_exponent([100.0, 0.01]) == pytest.approx(0.0, abs=1e-15)
    assert th.largest_partial_product([0.01, 100.0]) == 100.0
    assert th.largest_partial_product([0.5, 0.5]) == 1.0
    assert th.depth_exponent([0.0, 5.0]) == -math.inf
    assert th.product_factor([]) == 1.0


def test_no_layer_has_no_exponent() -> None:
    with pytest.raises(ValueError, match="at least one"):
        th.depth_exponent([])
    with pytest.raises(ValueError, match=r"factors\[1\]"):
        th.product_factor([1.0, -1.0])
