"""What a reading says of its verdict and its largest window: all pieces, and what the search may have missed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import ArrayLike

from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.reading import ProfileReading


def reading(*parts: tuple[ArrayLike, int]) -> ProfileReading:
    """A reading of pieces, each of factors and a first step."""
    pieces = []
    for numbers, start in parts:
        R = np.asarray(numbers, float)
        R = R[:, None, None] if R.ndim == 1 else R
        pieces.append(Factors(R, start + np.arange(len(R) + 1), dimension=R.shape[-1]))
    return ProfileReading(
        pieces=tuple(pieces),
        theta=tuple(np.tile(np.eye(p.directions), (p.count + 1, 1, 1)) for p in pieces),
        windowed=len(pieces) > 1,
    )


def test_pieces_are_all_in_the_verdict() -> None:
    found = reading((np.full(200, 2.0), 0), (np.full(200, 0.9), 1000))
    assert found.verdict.kind == "inconclusive"
    assert found.verdict.spans == ((0, 200), (1000, 1200))
    assert "of the last piece" in str(found)
    assert "of the last piece" not in str(reading((np.full(60, 0.9), 0)))


def test_without_a_step_nothing_is_judged() -> None:
    found = reading((np.zeros((0, 1, 1)), 5))
    assert (found.verdict.kind, found.verdict.horizon) == ("inconclusive", 0)
    assert str(found).startswith("inconclusive on [5, 5]")


@pytest.mark.parametrize("directions", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_what_the_search_may_have_missed_is_said(directions: int) -> None:
    r = np.random.default_rng(0)
    R = np.triu(0.3 * r.standard_normal((600, directions, directions))) + 0.7 * np.eye(directions)
    R[:, range(directions), range(directions)] = np.abs(np.diagonal(R, axis1=1, axis2=2))
    found = reading((R, 0))
    w = found.windows
    assert w.sup_upper >= w.sup
    assert (w.sup_upper > w.sup) == (directions == 12)  # there the search is cut
    assert (f"none above {math.exp(w.sup_upper):.4g}" in str(found)) == (w.sup_upper > w.sup)
    if found.verdict.kind == "profile-bounded":
        assert found.verdict.constant >= math.exp(w.sup_upper) - 1e-12
