"""T4: the mean square of SGD, against all batches, and the two exponents."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stableopt.theory as th


def hessians(seed: int, n: int, d: int, rank: int) -> list[np.ndarray]:
    g = np.random.default_rng(seed)
    factors = [g.standard_normal((d, rank)) * g.uniform(0.2, 2) for _ in range(n)]
    return [F @ F.T for F in factors]


def enumerated(Hs: list[np.ndarray], batch: int, lr: float) -> np.ndarray:
    """The mean of the Kronecker squares over every batch without replacement."""
    steps = [
        np.eye(len(Hs[0])) - lr * sum(Hs[i] for i in B) / batch for B in itertools.combinations(range(len(Hs)), batch)
    ]
    return sum(np.kron(M, M) for M in steps) / len(steps)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize(("d", "rank"), [(1, 1), (2, 1), (3, 1), (3, 2)])
def test_the_operator_is_the_mean_over_all_batches_and_the_edge_is_sharp(batch: int, d: int, rank: int) -> None:
    Hs = hessians(7 * batch + d, 5, d, rank)
    edge = th.mean_square_edge(Hs, batch)
    for lr in (0.0, 0.3 * edge, edge, 1.2 * edge):
        np.testing.assert_allclose(th.second_moment_operator(Hs, batch, lr), enumerated(Hs, batch, lr), atol=1e-10)
    assert th.spectral_radius(enumerated(Hs, batch, 0.999 * edge)) < 1
    assert th.spectral_radius(enumerated(Hs, batch, edge)) == pytest.approx(1.0, abs=1e-9)
    assert th.spectral_radius(enumerated(Hs, batch, 1.01 * edge)) > 1
    assert edge <= th.gradient_descent_edge(float(np.linalg.norm(sum(Hs) / 5, 2))) * (1 + 1e-9)


def test_directions_without_curvature_do_not_spoil_the_edge() -> None:
    Hs = [np.diag([h, 0.0]) for h in (1.0, 3.0)]
    assert th.mean_square_edge(Hs, 1) == pytest.approx(th.mean_square_edge([[[1.0]], [[3.0]]], 1))
    assert th.mean_square_edge([np.zeros((2, 2))] * 2, 1) == math.inf
    assert th.mean_square_edge([[[4.0]]], 1) == pytest.approx(0.5)


def test_a_point_that_is_no_minimum_and_bad_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="semidefinite"):
        th.mean_square_edge([[[-1.0]]], 1)
    with pytest.raises(ValueError, match="batch"):
        th.mean_square_edge([[[1.0]]], 2)
    with pytest.raises(ValueError, match="symmetric"):
        th.second_moment_operator([[[1.0, 2.0], [0.0, 1.0]]], 1, 0.1)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(0, 2))
def test_the_sufficient_law_bounds_the_mean_square(seed: int, d: int, part: float) -> None:
    Hs = hessians(seed, 4, d, d)
    mean, second = sum(Hs) / 4, float(np.linalg.norm(sum(H @ H for H in Hs) / 4, 2))
    mu = float(np.linalg.eigvalsh(mean)[0])
    limit = th.mean_square_max_lr(mu, second)
    lr = part * limit
    v = np.random.default_rng(seed).standard_normal(d)
    mean_square = sum(float(np.sum(((np.eye(d) - lr * H) @ v) ** 2)) for H in Hs) / 4
    assert mean_square <= th.mean_square_factor(lr, mu, second) * float(v @ v) * (1 + 1e-9)
    assert limit <= th.mean_square_edge(Hs, 1) * (1 + 1e-9)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_in_one_dimension_the_sufficient_law_is_exact(hs: list[float]) -> None:
    mu, second = sum(hs) / len(hs), sum(h * h for h in hs) / len(hs)
    limit = th.mean_square_max_lr(mu, second)
    assert th.mean_square_factor(limit, mu, second) == pytest.approx(1.0)
    assert sum((1 - 0.7 * limit * h) ** 2 for h in hs) / len(hs) == pytest.approx(
        th.mean_square_factor(0.7 * limit, mu, second)
    )
    assert th.mean_square_edge([[[h]] for h in hs], 1) == pytest.approx(limit)


def test_noise_cannot_have_less_second_moment_than_its_mean() -> None:
    assert th.mean_square_max_lr(0.0, 1.0) == 0.0
    with pytest.raises(ValueError, match="at least the square"):
        th.mean_square_factor(0.1, 2.0, 1.0)


def test_almost_sure_decay_and_mean_square_growth_happen_together() -> None:
    """a = 1 - eta h with eta h in {0.5, 2.8} equally: |a| in {0.5, 1.8}."""
    factors = [0.5, -1.8]
    assert th.almost_sure_exponent(factors) < 0 < th.mean_square_exponent(factors)
    g = np.random.default_rng(0)
    runs = np.abs(g.choice(factors, size=(4000, 40))).prod(axis=1)
    assert np.median(runs) < 1 < np.mean(runs**2)
    assert np.median(np.log(runs)) / 40 == pytest.approx(th.almost_sure_exponent(factors), abs=0.02)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5))
def test_jensen(factors: list[float]) -> None:
    assert th.almost_sure_exponent(factors) <= th.mean_square_exponent(factors) + 1e-12


def test_probabilities_weigh() -> None:
    assert th.almost_sure_exponent([2.0, 0.0], [1.0, 0.0]) == pytest.approx(math.log(2))
    assert th.almost_sure_exponent([2.0, 0.0]) == -math.inf
    assert th.mean_square_exponent([2.0, 1.0], [0.25, 0.75]) == pytest.approx(0.5 * math.log(1.75))
    assert th.mean_square_exponent([0.0]) == -math.inf
    for wrong in ([0.5], [0.5, 0.6], [1.5, -0.5]):
        with pytest.raises(ValueError, match="sum 1"):
            th.mean_square_exponent([1.0, 2.0], wrong)
