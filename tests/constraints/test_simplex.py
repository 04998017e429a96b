"""Simplices with exact sums, and their duals: oracles, optimality conditions, what is refused, extremes."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from stableopt.constraints.simplex import CappedSimplex, Max, Simplex, SumLargest
from stableopt.errors import InfeasibleError
from tests.constraints.oracle import same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def exact_sum(x: Tensor) -> Fraction:
    return sum((Fraction(a) for a in x.double().flatten().tolist()), Fraction(0))


def sorted_projection(x: np.ndarray, total: float) -> np.ndarray:
    falling = np.sort(x)[::-1]
    levels = (np.cumsum(falling) - total) / np.arange(1, len(x) + 1)
    return np.maximum(x - levels[np.nonzero(falling > levels)[0][-1]], 0.0)


@pytest.mark.parametrize("n", [1, 2, 17, 5000, 30_000])
@pytest.mark.parametrize("total", [1e-6, 1.0, 300.0])
def test_the_projection_agrees_with_sorting_in_numpy(n: int, total: float) -> None:
    x = torch.randn(n)
    p = Simplex(total).project(x)
    torch.testing.assert_close(p, torch.from_numpy(sorted_projection(x.numpy(), total)), rtol=1e-12, atol=1e-12)
    assert exact_sum(p) == Fraction(total)


@each_dtype
@pytest.mark.parametrize("total", [1.0, 0.1, 3e4])
def test_stored_sums_are_exact_in_every_dtype_and_feasible_rows_keep_their_bits(
    dtype: torch.dtype, total: float
) -> None:
    x = torch.cat((torch.randn(3, 300), 50 * torch.randn(3, 300), torch.ones(1, 300))).to(dtype)
    c = Simplex(total, dims=1)
    p = c.project(x)
    sums = {exact_sum(row) for row in p}
    assert len(sums) == 1
    assert 0 <= Fraction(total) - sums.pop() < Fraction(total * torch.finfo(dtype).eps)
    assert float(p.double().min()) >= 0
    assert c.violation(p) == 0.0
    assert same_bits(c.project(p), p)
    mixed = torch.stack((p[0], x[1]))
    assert same_bits(c.project(mixed)[0], p[0])


@given(
    n=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    total=st.sampled_from([0.5, 8.0]),
)
def test_the_projection_in_a_metric_meets_its_optimality_conditions(
    n: int, seed: int, spread: float, total: float
) -> None:
    """P_i (x_i - u_i) is one number on the support, and at least P_i x_i elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    x, P = torch.randn(n, generator=generator), 10 ** (spread * (torch.rand(n, generator=generator) - 0.5))
    u = Simplex(total).project(x, P)
    assert exact_sum(u) == Fraction(total)
    support = u > 0
    theta = (P * (x - u))[support]
    torch.testing.assert_close(theta, theta.mean().expand(len(theta)), rtol=1e-9, atol=1e-9 * float(P.max()))
    assert bool(((P * x)[~support] <= theta.mean() + 1e-9 * float(P.max())).all())


@given(
    n=st.integers(2, 9), seed=st.integers(0, 10**6), cap=st.sampled_from([0.25, 0.7, 5.0]), part=st.floats(0.05, 1.0)
)
def test_the_capped_projection_meets_its_optimality_conditions(n: int, seed: int, cap: float, part: float) -> None:
    x, total = torch.randn(n, generator=torch.Generator().manual_seed(seed)), part * n * cap
    total = min(total, float(Fraction(cap) * n))
    u = CappedSimplex(total, cap).project(x)
    assert exact_sum(u) == Fraction(total)
    assert bool(((u >= 0) & (u <= cap)).all())
    inside, low, high = (u > 1e-12) & (u < cap - 1e-12), u <= 1e-12, u >= cap - 1e-12
    moved = x - u
    level = moved[inside].mean() if inside.any() else moved[high].min()
    torch.testing.assert_close(moved[inside], level.expand(int(inside.sum())), rtol=0, atol=1e-12)
    assert bool((moved[low] <= level + 1e-11).all()) or not inside.any()
    assert bool((moved[high] >= level - 1e-11).all())


def test_the_capped_projection_is_the_minimum_that_scipy_finds() -> None:
    x = torch.randn(8)
    u = CappedSimplex(2.0, 0.6).project(x)
    total = {"type": "eq", "fun": lambda a: a.sum() - 2, "jac": lambda a: np.ones(8)}
    found = minimize(
        lambda a: ((a - x.numpy()) ** 2).sum(),
        np.full(8, 0.25),
        jac=lambda a: 2 * (a - x.numpy()),
        bounds=[(0, 0.6)] * 8,
        constraints=total,
        options={"ftol": 1e-14},
    )
    torch.testing.assert_close(u, torch.from_numpy(found.x), rtol=0, atol=1e-6)


@each_dtype
def test_a_capped_simplex_of_one_point_is_that_point(dtype: torch.dtype) -> None:
    p = CappedSimplex(2.0, 0.25).project(torch.randn(8).to(dtype))
    assert torch.equal(p, torch.full((8,), 0.25, dtype=dtype))


@pytest.mark.parametrize("size", [1e-320, 1e-300, 1e30, 1.7e308])
def test_extreme_points_are_projected_exactly(size: float) -> None:
    x = size * torch.tensor([1.0, 1.0, -1.0, 0.5])
    for c in (Simplex(), CappedSimplex(1.0, 0.5), Simplex(5e-324), Simplex(1e308)):
        p = c.project(x)
        assert exact_sum(p) == Fraction(c.total)
        assert same_bits(c.project(p), p)
    P = torch.tensor([1e-200, 1.0, 1e100, 1e-3])
    assert exact_sum(Simplex().project(x, P)) == 1


@each_dtype
def test_violation_measures_the_sum_the_sign_and_the_cap(dtype: torch.dtype) -> None:
    c = CappedSimplex(1.0, 0.75)
    assert c.violation(torch.tensor([0.75, 0.25], dtype=dtype)) == 0.0
    assert c.violation(torch.tensor([0.75, 0.5], dtype=dtype)) == 0.25
    assert c.violation(torch.tensor([1.25, -0.25], dtype=dtype)) == 0.5
    assert Simplex().violation(torch.tensor([1.5, -0.5], dtype=dtype)) == 0.5
    assert Simplex().violation(torch.tensor([0.5, 0.5 + 4 * torch.finfo(dtype).eps], dtype=dtype)) > 0.0
    assert CappedSimplex(1.0, 0.5).violation(torch.tensor([0.5, 0.25, 0.25], dtype=dtype)) == 0.0
    assert CappedSimplex(1.0, 0.375).violation(torch.tensor([0.5, 0.25, 0.25], dtype=dtype)) == 0.125


def test_what_no_vector_can_meet_is_refused() -> None:
    ones = torch.ones
    for call in (
        lambda: CappedSimplex(1.0, 0.3).project(ones(3)),
        lambda: CappedSimplex(1.0, 1 / 3).project(ones(3)),  # three times the double next to a third is below 1
        lambda: CappedSimplex(1.0, 0.3).violation(ones(3)),
        lambda: Simplex().project(ones(0)),
        lambda: Simplex(dims=1).violation(ones(2, 0)),
        lambda: Simplex(1e-12).project(ones(3, dtype=torch.float16)),
        lambda: Simplex(1e6).project(ones(3, dtype=torch.float16)),
        lambda: CappedSimplex(0.5, 1e-12).project(ones(3, dtype=torch.float16)),
    ):
        with pytest.raises(InfeasibleError, match=r"contains no vector|outside the range"):
            call()
    assert CappedSimplex(1.0, 1 / 3).project(ones(4)).sum() == 1.0
    assert Simplex(dims=1).project(ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("step", [0.3, 2.0])
def test_the_maximum_is_cut_at_the_level_of_its_definition(step: float) -> None:
    x = torch.randn(9)
    for steps in (torch.full((9,), step), step * (0.2 + torch.rand(9))):
        u = Max(0.8).prox(x, steps)
        assert torch.equal(u, x.clamp_max(float(u.max())))
        assert float(((x - u) / steps).sum()) == pytest.approx(0.8, rel=1e-12)
    assert same_bits(Max(0.8).prox(x, torch.zeros(9)), x)
    torch.testing.assert_close(Max(0.8).prox(x, step), SumLargest(0.8, 1).prox(x, step), rtol=1e-13, atol=1e-13)


def test_the_value_of_sums_of_largest_entries() -> None:
    x = torch.tensor([[3.0, -1.0, 2.0], [-5.0, -4.0, -6.0]])
    assert SumLargest(2.0, 2, dims=1).value(x).item() == 2 * (5.0 - 9.0)
    assert Max(2.0, dims=1).value(x).item() == 2 * (3.0 - 4.0)
    assert Max(2.0).value(torch.zeros(0)).item() == 0.0
    assert Max(1.0).prox(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_the_prox_of_the_largest_entries_meets_its_optimality_conditions(k: int) -> None:
    """(x - u) / s is a subgradient at u: w for entries above the k-th, 0 below, between on ties, and its sum is w k."""
    for x in (torch.randn(9), torch.ones(9), torch.randn(9).round()):
        for s in (0.05, 1.0, 30.0):
            u = SumLargest(0.7, k).prox(x, s)
            slope = (x - u) / s
            kth = float(u.topk(k).values[-1])
            assert float(slope.sum()) == pytest.approx(0.7 * k, rel=1e-10)
            assert float(slope.min()) >= -1e-12
            assert float(slope.max()) <= 0.7 + 1e-12
            torch.testing.assert_close(slope[u > kth + 1e-10], torch.full((int((u > kth + 1e-10).sum()),), 0.7))
            assert not slope[u < kth - 1e-10].abs().gt(1e-12).any()
    assert same_bits(SumLargest(0.7, k).prox(x, 0.0), x)


def test_derivatives_are_those_of_finite_differences() -> None:
    x, P = torch.randn(7, requires_grad=True), 0.3 + torch.rand(7)
    assert torch.autograd.gradcheck(lambda t: Simplex(0.9).project(t, P), x)
    assert torch.autograd.gradcheck(CappedSimplex(2.0, 0.6).project, x)
    assert torch.autograd.gradcheck(lambda t: Max(0.8).prox(t, 0.7, P), x)
    J = torch.autograd.functional.jacobian(Simplex().project, torch.zeros(4))
    torch.testing.assert_close(J, torch.eye(4) - 0.25)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch.func.jacfwd
def test_function_transforms_agree_with_autograd() -> None:
    for c in (Simplex(), CappedSimplex(1.0, 0.4)):
        x, batch = torch.randn(5), torch.randn(4, 5)
        reverse = torch.autograd.functional.jacobian(c.map, x)
        torch.testing.assert_close(torch.func.jacrev(c.map)(x), reverse)
        torch.testing.assert_close(torch.func.jacfwd(c.map)(x), reverse)
        torch.testing.assert_close(torch.func.vmap(c.map)(batch), torch.stack([c.map(b) for b in batch]))


def test_conjugates_are_the_other_classes() -> None:
    assert Simplex(2.0, 1).conjugate() == Max(2.0, 1)
    assert Max(2.0, 1).conjugate() == Simplex(2.0, 1)
    assert SumLargest(0.25, 3, 0).conjugate() == CappedSimplex(0.75, 0.25, 0)
    assert CappedSimplex(0.75, 0.25, 0).conjugate() == SumLargest(0.25, 3, 0)
    for w, k in ((0.1, 3), (0.3, 7), (0.7, 10), (1.1, 49)):
        twin = SumLargest(w, k).conjugate()
        assert isinstance(twin, CappedSimplex)
        assert Fraction(twin.total) <= k * Fraction(w)
        assert twin.total == pytest.approx(k * w, rel=1e-15)
        assert twin.project(torch.randn(k)).isfinite().all()
    for g in (Max(0.0), SumLargest(0.0, 2), CappedSimplex(1.0, 0.3)):
        with pytest.raises(ValueError, match="conjugate"):
            g.conjugate()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Simplex(0.0), "Simplex needs a finite number > 0 as total"),
        (lambda: Simplex(math.inf), "total"),
        (lambda: CappedSimplex(1.0, 0.0), "cap"),
        (lambda: CappedSimplex(-1.0, 1.0), "total"),
        (lambda: Max(-1.0), "weight"),
        (lambda: SumLargest(-1.0, 2), "weight"),
        (lambda: SumLargest(1.0, 0), "k >= 1"),
        (lambda: SumLargest(1.0, 4).prox(torch.ones(3)), "at least k=4 entries"),
        (lambda: SumLargest(1.0, 4, dims=1).value(torch.ones(9, 3)), "at least k=4 entries"),
        (lambda: Simplex(dims=2).project(torch.ones(3)), "dims=2"),
        (lambda: CappedSimplex(1.0, 1.0).project(torch.ones(3), torch.ones(3)), "no exact prox in a diagonal metric"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("k", [True, 2.0, None])
def test_a_count_that_is_not_an_int_is_refused(k: Any) -> None:
    with pytest.raises(TypeError, match="int as k"):
        SumLargest(1.0, k)
