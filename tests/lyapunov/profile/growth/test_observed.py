"""What observations see of products of thousands of factors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.growth.observed import observed, products
from stableopt.lyapunov.profile.reading import ProfileReading


def gram(observation: np.ndarray) -> np.ndarray:
    return np.swapaxes(observation, -1, -2) @ observation


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_it_is_the_norm_of_the_observation_of_the_product(scale: float) -> None:
    rng = np.random.default_rng(0)
    R = scale * np.triu(rng.normal(size=(12, 3, 3)))
    C = rng.normal(size=(13, 2, 3))
    P, expected = np.eye(3), []
    for j in range(13):
        P = R[j - 1] @ P if j else P
        expected.append(math.log(np.linalg.norm(C[j] @ P, 2)))
    made = products(Factors(R, np.arange(13), dimension=3))
    assert observed(made, gram(C)) == pytest.approx(np.array(expected), abs=1e-12)


def test_places_are_those_of_all_boundaries() -> None:
    R = np.triu(np.random.default_rng(1).normal(size=(9, 2, 2)))
    factors, places = Factors(R, np.arange(10), dimension=2), np.array([0, 0, 4, 9])
    assert products(factors, places).log_norm() == pytest.approx(products(factors).log_norm()[places], abs=0)


@pytest.mark.parametrize("turn", [0.0, 0.3])
def test_what_is_seen_may_be_far_below_what_is_not_seen(turn: float) -> None:
    # a direction that decays is seen, the other one stays and is not seen: squares would be lost from step 162 on
    n = 400
    c, s = math.cos(turn), math.sin(turn)
    Q = np.array([[c, -s], [s, c]])
    R = np.tile(np.diag([1.0, 0.1]), (n, 1, 1))
    seen = observed(products(Factors(R, np.arange(n + 1), dimension=2)), np.tile(np.diag([0.0, 1.0]), (n + 1, 1, 1)))
    assert seen == pytest.approx(np.arange(n + 1) * math.log(0.1), rel=1e-13)
    turned = observed(products(Factors(R, np.arange(n + 1), dimension=2)), np.tile(gram(Q), (n + 1, 1, 1)))
    assert turned == pytest.approx(np.zeros(n + 1), abs=1e-12)


def test_the_mixed_and_the_parametric_block_do_not_vanish_early() -> None:
    R = np.tile(np.diag([1.0, 0.1]), (200, 1, 1))
    theta = np.tile(np.diag([0.0, 1.0]), (201, 1, 1))
    reading = ProfileReading(pieces=(Factors(R, np.arange(201), dimension=2),), theta=(theta,))
    assert reading.parametric == pytest.approx(np.arange(201) * math.log(0.1), rel=1e-13)


def test_sizes_on_the_diagonal_may_differ_by_any_factor() -> None:
    G = np.array([[1.0, 0.5e-100], [0.5e-100, 1e-200]])
    P = products(Factors(np.array([np.diag([0.0, 1.0])]), np.arange(2), dimension=2))
    assert observed(P, np.array([G, G]))[1] == pytest.approx(-100 * math.log(10), rel=1e-12)


def test_a_gram_that_is_rounding_does_not_see_what_it_should_not() -> None:
    v = np.array([[1.0, 1.0 / 3.0]])  # of rank one: its other eigenvalue is rounding, and has to be zero
    across = np.array([[1.0, 1.0], [-3.0, -3.0]])
    P = products(Factors(np.array([across]), np.arange(2), dimension=2))
    assert observed(P, np.array([gram(v), gram(v)]))[1] < math.log(1e-7)


def test_nothing_seen_is_minus_infinity_and_nothing_known_is_nan() -> None:
    G = np.array([np.zeros((2, 2)), np.full((2, 2), np.nan), np.diag([1.0, np.inf]), np.eye(2)])
    found = observed(products(Factors(np.tile(np.eye(2), (3, 1, 1)), np.arange(4), dimension=2)), G)
    assert found[0] == -math.inf
    assert np.isnan(found[1:3]).all()
    assert found[3] == pytest.approx(0.0, abs=1e-15)


def test_a_product_may_grow_and_shrink_by_more_than_a_float_holds() -> None:
    R = np.concatenate([np.tile(np.diag([10.0, 1.0]), (400, 1, 1)), np.tile(np.diag([0.1, 1.0]), (400, 1, 1))])
    made = products(Factors(R, np.arange(801), dimension=2))
    seen, other = (observed(made, np.tile(np.diag(row), (801, 1, 1))) for row in ([1.0, 0.0], [0.0, 1.0]))
    assert seen[[400, 800]] == pytest.approx([400 * math.log(10), 0.0], abs=1e-12)
    assert other[[400, 800]] == pytest.approx([0.0, 0.0], abs=1e-12)


def test_norms_far_outside_of_the_floats_are_exact() -> None:
    half = Factors(np.full((4000, 1, 1), 0.5), np.arange(4001), dimension=1)
    assert products(half, np.array([4000])).log_norm() == pytest.approx([-4000 * math.log(2)], rel=1e-13)
    assert products(Factors(np.zeros((3, 2, 2)), np.arange(4), dimension=2)).log_norm()[1:].tolist() == [-math.inf] * 3
