"""SLOPE and the k-support norm: their dual norms decide optimality, limits are known penalties, and scipy agrees."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from stableopt.constraints import L1, L2Squared
from stableopt.constraints.ordered import SLOPE, KSupport
from tests.constraints.oracle import same_bits

STEPS = (0.05, 1.0, 20.0)


def inputs(n: int) -> dict[str, Tensor]:
    return {
        "noise": torch.randn(n),
        "large": 30 * torch.randn(n),
        "ties": torch.randint(-2, 3, (n,)).double(),
        "equal": torch.full((n,), -1.5),
        "sparse": torch.randn(n) * (torch.rand(n) < 0.3),
        "scales": torch.randn(n) * 10.0 ** torch.linspace(-12, 2, n),
        "zero": torch.zeros(n),
    }


# SLOPE


def weights(n: int, kind: str) -> tuple[float, ...]:
    made = {
        "linear": torch.linspace(1.0, 0.1, n),
        "steep": torch.tensor([2.0] + [0.0] * (n - 1)),
        "flat": torch.full((n,), 0.4),
        "random": torch.rand(n).sort(descending=True).values,
    }[kind]
    return tuple(made.tolist())


@pytest.mark.parametrize("kind", ["linear", "steep", "flat", "random"])
@pytest.mark.parametrize("name", list(inputs(2)))
def test_the_residual_is_a_subgradient_of_slope(name: str, kind: str) -> None:
    """r = (x-u)/s lies in the dual ball (the j largest moduli sum to at most w_1 + ... + w_j) and <r, u> = g(u)."""
    for n in (1, 2, 7, 300):
        x, g = inputs(n)[name], SLOPE(weights(n, kind))
        cumulated = torch.tensor(g.weights).cumsum(0)
        for step in STEPS:
            u = g.prox(x, step)
            r = (x - u) / step
            slack = 1e-13 * n * (1 + float(x.abs().max()) / step)
            assert (r.abs().sort(descending=True).values.cumsum(0) <= cumulated + slack).all()
            value = sum(w * abs(v) for w, v in zip(g.weights, sorted(u.tolist(), key=lambda v: -abs(v)), strict=True))
            assert float(g.value(u)) == pytest.approx(value, rel=1e-13)
            assert float(r @ u) == pytest.approx(value, abs=slack * (1 + float(u.abs().max())))


def test_slope_with_equal_weights_is_the_l1_norm() -> None:
    for x in inputs(9).values():
        for step in STEPS:
            torch.testing.assert_close(SLOPE((0.4,) * 9).prox(x, step), L1(0.4).prox(x, step), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(SLOPE((0.4,) * 9).value(x), L1(0.4).value(x))


def test_slope_with_one_weight_is_the_maximum_norm() -> None:
    """The prox of s max|x| clips at the level above which the moduli sum to s."""
    x = torch.tensor([3.0, -1.0, 2.5, 0.2])
    torch.testing.assert_close(SLOPE((1.5, 0.0, 0.0, 0.0)).prox(x), torch.tensor([2.0, -1.0, 2.0, 0.2]))
    assert float(SLOPE((1.5, 0.0, 0.0, 0.0)).value(x)) == 4.5


def test_slope_is_a_maximum_over_permutations() -> None:
    x, g = torch.randn(5), SLOPE((0.9, 0.5, 0.5, 0.2, 0.0))
    best = max(
        sum(w * abs(float(x[i])) for w, i in zip(g.weights, p, strict=True)) for p in itertools.permutations(range(5))
    )
    assert float(g.value(x)) == pytest.approx(best, rel=1e-14)


def test_slope_pools_what_it_would_bring_out_of_order() -> None:
    u = SLOPE((1.0, 0.2, 0.0)).prox(torch.tensor([2.0, -2.5, 0.1]))
    assert u[0] == -u[1]
    torch.testing.assert_close(u, torch.tensor([1.65, -1.65, 0.1]))


def test_slope_without_weights_is_the_identity() -> None:
    x = torch.tensor([3.0, 0.0, -0.0, -1e-300, 1e300])
    assert torch.equal(SLOPE((0.0,) * 5).prox(x), x)
    assert torch.equal(SLOPE((2.0,) * 5).prox(x, 0.0), x)
    J = torch.autograd.functional.jacobian(SLOPE((0.0,) * 5).prox, x)
    assert torch.equal(J, torch.eye(5))


def test_slope_refuses_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"do not rise, got 1.0 and then 2.0 at position 2; sort them"):
        SLOPE((3.0, 1.0, 2.0))
    with pytest.raises(ValueError, match=r"SLOPE needs a finite number >= 0 as weights, got -1\.0"):
        SLOPE((1.0, -1.0))
    with pytest.raises(ValueError, match="at least one number"):
        SLOPE(())
    wrong: Any = 1.0
    with pytest.raises(TypeError, match="tuple of numbers"):
        SLOPE(wrong)
    g = SLOPE((2.0, 1.0))
    for call in (g.prox, g.value):
        with pytest.raises(ValueError, match=r"2 weights, got vectors of 3 entries \(shape \(3,\), dims=None\)"):
            call(torch.ones(3))
    assert SLOPE(torch.tensor([2.0, 1.0])) == g  # type: ignore[arg-type]
    assert not g.diagonal


# k-support


def dual_value(r: Tensor, k: int) -> float:
    """Half the square of the dual norm: the Euclidean norm of the k largest moduli."""
    return 0.5 * math.fsum(v * v for v in sorted(map(abs, r.tolist()), reverse=True)[:k])


def brute_force_value(x: Tensor, k: int) -> float:
    """The best of all proposals for the number of large entries; the true one satisfies both inequalities."""
    a = sorted(map(abs, x.tolist()), reverse=True)
    k = min(k, len(a))
    for q in range(k):
        rest = math.fsum(a[q:])
        if (q == 0 or a[q - 1] * (k - q) >= rest * (1 - 1e-12)) and rest >= a[q] * (k - q) * (1 - 1e-12):
            return 0.5 * (math.fsum(v * v for v in a[:q]) + rest**2 / (k - q))
    raise AssertionError("no q fits")


@pytest.mark.parametrize("name", list(inputs(2)))
def test_the_residual_is_a_subgradient_of_the_k_support_penalty(name: str) -> None:
    """g(u) + g*(r) = <u, r> for r = (x-u)/s: only a subgradient attains this, and only the true value of g does."""
    for n, k in ((1, 1), (2, 1), (7, 3), (7, 6), (7, 7), (7, 50), (200, 1), (200, 30), (200, 199)):
        x = inputs(n)[name]
        for weight in (0.3, 1.0, 50.0):
            g = KSupport(weight, k)
            for step in STEPS:
                u = g.prox(x, step)
                r = (x - u) / step
                pair = float(u @ r)
                size = float(x.square().sum()) / step
                assert float(g.value(u)) + dual_value(r, k) / weight == pytest.approx(pair, abs=1e-12 * size + 1e-300)
                assert (u * x >= 0).all()
                assert (u.abs() <= x.abs()).all()


@pytest.mark.parametrize("name", list(inputs(2)))
def test_the_value_is_the_one_of_the_definition(name: str) -> None:
    for n, k in ((1, 1), (2, 1), (7, 3), (7, 6), (7, 7), (7, 50), (200, 30)):
        x = inputs(n)[name]
        assert float(KSupport(1.0, k).value(x)) == pytest.approx(brute_force_value(x, k), rel=1e-13)
        for _ in range(5):  # sup <x, y> - g*(y)
            y = x + torch.randn(n)
            assert (
                float(KSupport(1.0, k).value(x))
                >= float(x @ y) - dual_value(y, k) - 1e-10 * (1 + float(x.abs().max())) ** 2
            )


def test_one_is_the_squared_l1_norm_and_all_is_the_squared_euclidean_norm() -> None:
    for x in inputs(8).values():
        assert float(KSupport(0.6, 1).value(x)) == pytest.approx(0.3 * float(x.abs().sum()) ** 2, rel=1e-14)
        for k in (8, 9, 10**30):
            torch.testing.assert_close(KSupport(0.6, k).value(x), L2Squared(0.6).value(x), rtol=1e-13, atol=0)
            for step in STEPS:
                torch.testing.assert_close(
                    KSupport(0.6, k).prox(x, step), L2Squared(0.6).prox(x, step), rtol=1e-13, atol=0
                )
    x, lam = (
        torch.tensor([3.0, -1.0, 0.5]),
        0.5,
    )  # squared L1: threshold lam * sum of the kept / (1 + lam * number of kept)
    torch.testing.assert_close(KSupport(lam, 1).prox(x), torch.tensor([2.0, 0.0, 0.0]))
    torch.testing.assert_close(
        KSupport(0.1, 1).prox(x), torch.tensor([3.0, -1.0, 0.5]) - 0.45 / 1.3 * torch.tensor([1.0, -1.0, 1.0])
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_scipy_finds_no_better_point(k: int, seed: int) -> None:
    """Minimize over u, and over theta for the value, with a solver that knows neither formula."""
    n, lam = 5, 0.7
    x = np.random.default_rng(seed).normal(size=n) * 2
    found = minimize(
        lambda z: lam / 2 * np.sum(z[:n] ** 2 / z[n:]) + np.sum((z[:n] - x) ** 2) / 2,
        np.concatenate([x / 2, np.full(n, k / n)]),
        bounds=[(None, None)] * n + [(1e-9, 1.0)] * n,
        constraints={"type": "ineq", "fun": lambda z: k - z[n:].sum()},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    g, t = KSupport(lam, k), torch.from_numpy(x)
    u = g.prox(t)
    best = float(g.value(u)) + float((u - t).square().sum()) / 2
    assert best <= found.fun + 1e-9
    assert best == pytest.approx(found.fun, rel=1e-5)
    torch.testing.assert_close(u, torch.from_numpy(found.x[:n]), atol=5e-3, rtol=0)


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=9),
    st.integers(1, 10),
    st.floats(1e-6, 1e6),
)
@example([1.0, 1.0, 1.0, 1.0], 2, 1.0)
@example([4.0, -1.0, 0.5], 2, 1.0)
@example([1.0, 0.0, 0.0], 2, 1.0)
def test_the_optimality_condition_holds_for_any_input(values: list[float], k: int, lam: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    g = KSupport(lam, k)
    u = g.prox(x)
    r = x - u
    gap = float(g.value(u)) + dual_value(r, k) / lam - float(u @ r)
    assert abs(gap) <= 1e-12 * float(x.square().sum()) + 1e-300


def test_the_k_support_prox_has_three_parts() -> None:
    lam, x = 1.0, torch.tensor([6.0, -2.0, 1.6, 0.1])
    u = KSupport(lam, 2).prox(x)
    torch.testing.assert_close(u, torch.tensor([3.0, -0.8, 0.4, 0.0]))
    theta = lam * u.abs() / (x.abs() - u.abs())
    assert float(theta.sum()) == pytest.approx(2.0)


def test_few_entries_are_only_shrunk_also_in_the_derivative() -> None:
    g = KSupport(1.0, 2)
    x = torch.tensor([0.0, 3.0, 0.0])
    assert torch.equal(g.prox(x), torch.tensor([0.0, 1.5, 0.0]))
    J = torch.autograd.functional.jacobian(g.prox, x)
    assert torch.equal(J, torch.diag(torch.tensor([0.5, 0.5, 0.0])))  # room for one of the zeros


@pytest.mark.parametrize("g", [SLOPE((0.9, 0.5, 0.5, 0.1, 0.0, 0.0)), KSupport(0.5, 2), KSupport(3.0, 1)], ids=repr)
def test_gradcheck_in_the_point_and_in_the_step(g: SLOPE | KSupport) -> None:
    x = torch.tensor([2.0, -1.4, 0.9, 1.5, -0.35, 0.02], requires_grad=True)
    step = torch.tensor(0.7, requires_grad=True)
    assert torch.autograd.gradcheck(g.prox, (x, step))
    assert torch.autograd.gradcheck(g.prox, (torch.complex(x.detach(), x.detach().flip(0)).requires_grad_(), step))
    assert torch.autograd.gradcheck(g.value, (x,))


@pytest.mark.parametrize("g", [SLOPE((0.9, 0.5, 0.1)), KSupport(0.5, 2)], ids=repr)
def test_sizes_do_not_matter(g: SLOPE | KSupport) -> None:
    x = torch.tensor([1.0, -0.6, 0.5])
    wanted = g.prox(x, 0.3)
    for scale in (2.0**1020, 2.0**600, 2.0**-600, 2.0**-1000):
        step = 0.3 * scale if isinstance(g, SLOPE) else 0.3
        torch.testing.assert_close(g.prox(x * scale, step) / scale, wanted, rtol=1e-13, atol=0)
    for step in (1e308, 1e300):
        assert torch.equal(g.prox(x, step).abs() < 1e-290, torch.ones(3, dtype=torch.bool))
        assert g.prox(1e300 * x, step).isfinite().all()
    mixed = g.prox(torch.tensor([1e300, -1e-300, 0.0]), 0.3)
    assert mixed.isfinite().all()


@pytest.mark.parametrize("make", [lambda d: SLOPE((0.9, 0.5, 0.1), dims=d), lambda d: KSupport(0.5, 2, dims=d)])
def test_vectors_that_are_not_finite_become_nan_alone(make: Any) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [math.nan, 0.0, 1.0], [math.inf, 1.0, 1.0]])
    u = make(-1).prox(x)
    assert u[0].isfinite().all()
    assert u[1:].isnan().all()
    torch.testing.assert_close(u[0], make(None).prox(x[0]))
    torch.testing.assert_close(make(0).prox(x.T)[:, 0], u[0])
    assert make(-1).prox(torch.zeros(0, 3)).shape == (0, 3)
    assert same_bits(make(None).prox(torch.tensor([0.0, -0.0, 0.0])).abs(), torch.zeros(3))


def test_k_support_refuses_what_makes_no_sense() -> None:
    wrong: Any
    for wrong in (True, 1.0, None):
        with pytest.raises(TypeError, match="KSupport needs an int as k"):
            KSupport(1.0, wrong)
    with pytest.raises(ValueError, match="k >= 1, got 0"):
        KSupport(1.0, 0)
    with pytest.raises(ValueError, match="weight"):
        KSupport(-1.0, 1)
    with pytest.raises(ValueError, match="no conjugate"):
        KSupport(1.0, 1).conjugate()
    assert not KSupport(1.0, 1).diagonal
    assert KSupport(1.0, 2).prox(torch.zeros(0)).shape == (0,)
    assert float(KSupport(1.0, 2).value(torch.zeros(0))) == 0.0
