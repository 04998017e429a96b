"""What is said about a table of norms follows from it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stableopt.lyapunov.profile.representations.depth import DepthGrowth, ForwardProfile


def profile(*samples, **others):
    """A profile with these tables, given as the rows below the diagonal."""
    size = len(samples[0]) + 1
    tables = np.full((len(samples), size, size), np.nan)
    for table, rows in zip(tables, samples, strict=True):
        np.fill_diagonal(table, 0.0)
        for l, row in enumerate(rows, 1):
            table[l, :l] = row
    names, widths = tuple("abcdef"[:size]), (1,) * size
    return ForwardProfile(names, widths, tables, law=np.zeros(size - 1), residuals=np.zeros((size, size)), **others)


def test_the_largest_and_the_median_are_taken_over_the_samples_at_every_place():
    found = profile([[1.0], [5.0, 0.0]], [[2.0], [3.0, -1.0]], [[4.0], [-2.0, -2.0]])
    assert found.log_norms[1:, :2].tolist() == [[4.0, 0.0], [5.0, 0.0]]
    assert (found.log_medians[1, 0], found.log_medians[2, 0], found.log_medians[2, 1]) == (2.0, 3.0, -1.0)
    assert found.gains.tolist() == [4.0, 0.0]
    assert found.exponent == 2.5
    assert found.exponents[2].tolist()[:2] == [2.5, 0.0]
    assert np.isnan(found.exponents[np.triu_indices(3)]).all()
    assert (found.peak.log_norm, found.peak.source, found.peak.target) == (5.0, 0, 2)
    assert found.log_products[2, 0] == 4.0


def test_nothing_grows_in_a_contraction():
    found = profile([[-1.0], [-2.0, -1.0]])
    assert (found.peak.log_norm, found.peak.source, found.peak.target) == (0.0, 0, 0)
    assert "exponent -1.0000" in str(found)


def test_what_is_not_finite_is_not_called_a_peak():
    found = profile([[math.nan], [2.0, 1.0]])
    assert math.isnan(found.peak.log_norm)
    assert math.isnan(profile([[1.0], [math.nan, 1.0]]).exponent)
    assert profile([[-math.inf], [-math.inf, 1.0]]).exponent == -math.inf


@pytest.mark.parametrize(("log_norm", "resolved"), [(-34.0, True), (-36.0, False)])
def test_norms_below_the_rounding_of_their_products_are_not_resolved(log_norm, resolved):
    """Two layers of norm 1 and width 1: known up to two rounding units, 2 ** -51 = exp(-35.35)."""
    assert bool(profile([[0.0], [log_norm, 0.0]]).resolved[2, 0]) is resolved


def test_one_direction_has_gains_that_add_up():
    growth = DepthGrowth(("input", "0", "1"), np.array([0.0, 3.0, 1.0]), np.zeros((3, 2)))
    assert growth.gains.tolist() == [3.0, -2.0]
    assert growth.exponent == 0.5
