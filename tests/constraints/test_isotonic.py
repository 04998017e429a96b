"""Isotonic regression: against two other libraries, exact fractions, quadratic optimality, and time in the worst case."""

from __future__ import annotations

import math
import time
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression as scipy_isotonic
from sklearn.isotonic import isotonic_regression as sklearn_isotonic
from torch import Tensor

from stableopt.constraints.isotonic import Monotone, block_means, in_order, on_rows, pool_adjacent
from tests.constraints.oracle import same_bits


def exact_regression(values: list[float], weights: list[float]) -> list[Fraction]:
    """Compute the max-min formula u_i = max_{a<=i} min_{b>=i} mean(x_a..x_b) in rational arithmetic: no pooling at all."""
    x, w = [Fraction(v) for v in values], [Fraction(v) for v in weights]
    total, mass = [Fraction(0)], [Fraction(0)]
    for xi, wi in zip(x, w, strict=True):
        total.append(total[-1] + wi * xi)
        mass.append(mass[-1] + wi)
    n = len(x)
    return [
        max(min((total[b + 1] - total[a]) / (mass[b + 1] - mass[a]) for b in range(i, n)) for a in range(i + 1))
        for i in range(n)
    ]


def inputs(n: int) -> dict[str, Tensor]:
    i = torch.arange(float(n))
    return {
        "noise": torch.randn(n),
        "walk": torch.randn(n).cumsum(0),
        "rising": i,
        "falling": -i,
        "last": torch.cat([i[1:], torch.tensor([-1e9])]),
        "first": torch.cat([torch.tensor([1e9]), i[1:]]),
        "waves": torch.sin(i / 30) * i,
        "few values": torch.randint(0, 3, (n,)).double(),
        "offset": 1e6 + torch.randn(n),
    }


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", list(inputs(3)))
def test_two_other_libraries_agree(name: str, weighted: bool) -> None:
    x = inputs(3000)[name]
    w = 0.1 + torch.rand(3000) if weighted else torch.ones(3000)
    u = Monotone().project(x, w)
    scale = float(x.abs().max())
    for other in (
        sklearn_isotonic(x.numpy(), sample_weight=w.numpy()),
        scipy_isotonic(x.numpy(), weights=w.numpy()).x,
    ):
        torch.testing.assert_close(u, torch.from_numpy(np.array(other)), rtol=1e-12, atol=1e-12 * scale)
    if not weighted:
        assert same_bits(Monotone().project(x), u)
    down = Monotone(increasing=False).project(-x, w)
    assert same_bits(down.flip(0) + 0.0, -u.flip(0) + 0.0)


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=12),
    st.lists(st.floats(0.01, 100), min_size=12, max_size=12),
)
@example([1.0, 1.0, 1.0], [1.0] * 12)
@example([3.0, 2.0, 1.0], [1.0] * 12)
@example([1.0, 0.0, 0.5, 0.5, 0.25], [1.0] * 12)
def test_the_max_min_formula_in_fractions_agrees(values: list[float], weights: list[float]) -> None:
    x, w = torch.tensor(values, dtype=torch.float64), torch.tensor(weights[: len(values)], dtype=torch.float64)
    wanted = torch.tensor([float(v) for v in exact_regression(values, w.tolist())], dtype=torch.float64)
    torch.testing.assert_close(Monotone().project(x, w), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", list(inputs(3)))
def test_the_multipliers_of_the_order_are_feasible_and_complementary(name: str, weighted: bool) -> None:
    """z_i = sum_{j<=i} P_j (x_j - u_j) >= 0, z_n = 0, and z_i (u_{i+1} - u_i) = 0."""
    x = inputs(2000)[name]
    P = 0.1 + torch.rand(2000) if weighted else torch.ones(2000)
    u = Monotone().project(x, P)
    z = (P * (x - u)).cumsum(0)
    tolerance = 1e-10 * float(x.abs().max() * P.sum())
    assert z.min() > -tolerance
    assert abs(z[-1]) < tolerance
    assert (z[:-1] * u.diff()).abs().max() < tolerance * float(x.abs().max())


@pytest.mark.parametrize("name", list(inputs(3)))
def test_the_worst_case_is_linear(name: str) -> None:
    x = inputs(100_000)[name]
    Monotone().project(x[:10])
    start = time.process_time()
    u = Monotone().project(x)
    assert time.process_time() - start < 1.0
    assert Monotone().violation(u) == 0.0


def test_rows_never_merge_across() -> None:
    x = torch.tensor([[5.0, 6.0], [1.0, 2.0], [0.0, -1.0]])
    assert torch.equal(pool_adjacent(x), torch.tensor([[0, 1], [0, 1], [0, 0]]))
    many = torch.randn(40, 25) + torch.arange(25) / 10
    alone = torch.stack([in_order(row[None])[0] for row in many])
    torch.testing.assert_close(in_order(many), alone, rtol=1e-15, atol=1e-15)
    assert pool_adjacent(torch.randn(25, 1)).eq(0).all()
    assert pool_adjacent(torch.zeros(3, 0)).shape == (3, 0)


def test_neighbors_that_are_equal_stay_apart() -> None:
    assert torch.equal(pool_adjacent(torch.tensor([[1.0, 1.0, 2.0, 2.0]])), torch.arange(4)[None])
    tied = torch.tensor([[1.0, 3.0, 2.0, 2.5]])  # mean 2.5 of the middle, then 2.5
    assert torch.equal(pool_adjacent(tied), torch.tensor([[0, 1, 1, 3]]))
    one_violator = torch.cat([torch.arange(12.0), torch.tensor([14.0, 13.0, 13.5, 20.0])])[
        None
    ]  # for the pass with a stack
    assert torch.equal(pool_adjacent(one_violator)[0], torch.tensor([*range(13), 12, 14, 15]))
    before = torch.cat([torch.arange(12.0), torch.tensor([13.5, 14.0, 13.0])])[None]
    assert torch.equal(pool_adjacent(before)[0], torch.tensor([*range(14), 13]))


def test_signed_zeros_are_in_order_either_way_and_keep_their_bits() -> None:
    for x in (torch.tensor([0.0, -0.0, 0.0]), torch.tensor([-0.0, 0.0, -0.0])):
        for c in (Monotone(), Monotone(increasing=False)):
            assert same_bits(c.project(x), x)
            assert c.violation(x) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_feasible_where_means_fall_between_its_numbers(dtype: torch.dtype) -> None:
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, generator=generator).cumsum(0).to(dtype)
        u = Monotone().project(x)
        values = [Fraction(v) for v in u.double().tolist()]
        assert all(a <= b for a, b in pairwise(values))
        assert same_bits(Monotone().project(u), u)
        best = torch.tensor([float(v) for v in exact_regression(x.double().tolist(), [1.0] * 40)])
        assert ((u.double() - best).abs() <= torch.finfo(dtype).eps * best.abs() + 1e-15).all()


def test_extreme_sizes_neither_overflow_nor_vanish() -> None:
    big = torch.tensor([1.7e308, 1.6e308, 1.5e308, 1.7e308])
    torch.testing.assert_close(Monotone().project(big), torch.tensor([1.6e308] * 3 + [1.7e308]), rtol=1e-15, atol=0)
    tiny = torch.tensor([3e-310, 1e-310, 4e-310])
    torch.testing.assert_close(Monotone().project(tiny), torch.tensor([2e-310, 2e-310, 4e-310]), rtol=1e-9, atol=0)
    mixed = torch.tensor([2e-308, 1e-308, 1e30, -1e-300, 1e300])
    u = Monotone().project(mixed)
    assert Monotone().violation(u) == 0.0
    assert u[-1] == 1e300
    assert Monotone().violation(torch.tensor([1.7e308, -1.7e308])) > 1e308
    alone = Monotone().project(torch.tensor([1e-310, 2.0, 1.0, 1e300]))
    assert alone[[0, 3]].tolist() == [1e-310, 1e300]
    P = torch.tensor([1e-300, 1e-300, 1e300])
    torch.testing.assert_close(Monotone().project(torch.tensor([2.0, 1.0, 3.0]), P), torch.tensor([1.5, 1.5, 3.0]))
    P = torch.tensor([1e300, 1e-300, 1.0])
    torch.testing.assert_close(Monotone().project(torch.tensor([2.0, 1.0, 3.0]), P), torch.tensor([2.0, 2.0, 3.0]))


def test_one_ulp_out_of_order_is_seen_and_mended() -> None:
    x = torch.tensor([1.0, math.nextafter(1.0, 0.0)])
    assert Monotone().violation(x) == 2.0**-53
    assert Monotone(increasing=False).violation(x) == 0.0
    u = Monotone().project(x)
    assert u[0] <= u[1]
    subnormal = torch.tensor([5e-324, 0.0])
    assert Monotone().violation(subnormal) == 5e-324
    assert Monotone().violation(Monotone().project(subnormal)) == 0.0


def test_the_derivative_averages_over_blocks() -> None:
    x = torch.tensor([1.0, 3.0, 2.0, 4.0, 3.9])
    J = torch.autograd.functional.jacobian(Monotone().project, x)
    wanted = torch.block_diag(torch.ones(1, 1), torch.full((2, 2), 0.5), torch.full((2, 2), 0.5))
    torch.testing.assert_close(J, wanted)
    P = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0])
    J = torch.autograd.functional.jacobian(lambda t: Monotone().project(t, P), x)
    torch.testing.assert_close(J[1, 1:3], torch.tensor([0.25, 0.75]))


def test_gradcheck_in_the_point_and_in_the_metric() -> None:
    x = torch.randn(3, 6, requires_grad=True)
    P = (0.5 + torch.rand(3, 6)).requires_grad_()
    assert torch.autograd.gradcheck(in_order, (x, P))
    assert torch.autograd.gradgradcheck(in_order, (x, P))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch.func.jacfwd
def test_functorch_sees_the_same() -> None:
    x, c = torch.randn(7), Monotone()
    J = torch.autograd.functional.jacobian(c.project, x)
    torch.testing.assert_close(torch.func.jacrev(c.project)(x), J)
    torch.testing.assert_close(torch.func.jacfwd(c.project)(x), J)
    batch = torch.randn(4, 7)
    torch.testing.assert_close(torch.func.vmap(c.project)(batch), Monotone(dims=1).project(batch))


def test_block_means_are_as_accurate_far_from_zero_as_near() -> None:
    values = 1e8 + torch.rand(1, 100_000)
    mean = block_means(values, torch.zeros(1, 100_000, dtype=torch.int64))[0, 0]
    exact = float(sum(map(Fraction, values[0].tolist())) / 100_000)
    assert abs(float(mean) - exact) <= math.ulp(1e8)
    lifted = block_means(torch.ones(1, 4), torch.tensor([[0, 0, 2, 2]]), lift=torch.tensor([[1.0, 1.0, -4.0, -4.0]]))
    assert lifted.tolist() == [[1.5, 1.5, -1.0, -1.0]]


def test_an_array_algorithm_sees_plain_rows() -> None:
    seen: list[Any] = []

    def algorithm(a: np.ndarray) -> tuple[np.ndarray]:
        seen.append(a.shape)
        return (a + 1,)

    (result,) = on_rows(algorithm, torch.ones(2, 3, requires_grad=True))
    assert result.tolist() == [[2.0] * 3] * 2
    assert not result.requires_grad
    assert seen == [(2, 3)]


def test_a_row_that_is_not_finite_becomes_nan_and_leaves_the_others_alone() -> None:
    x = torch.tensor([[2.0, 1.0], [math.nan, 0.0], [1.0, math.inf], [-math.inf, 3.0]])
    u = Monotone(dims=-1).project(x)
    assert u[0].tolist() == [1.5, 1.5]
    assert u[1:].isnan().all()
    assert Monotone(dims=-1).violation(x) == math.inf


def test_fields_are_checked() -> None:
    wrong: Any = 1
    with pytest.raises(TypeError, match="Monotone needs True or False as increasing, got 1"):
        Monotone(wrong)
    with pytest.raises(TypeError, match="as dims"):
        Monotone(dims=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no conjugate"):
        Monotone().conjugate()
    assert Monotone().diagonal
    assert repr(Monotone(dims=[0, 1])) == "Monotone(increasing=True, dims=(0, 1))"  # type: ignore[arg-type]
