"""Doubly stochastic matrices: exact sums, the nearest one by optimality conditions and two other solvers, extremes."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from stableopt.constraints.birkhoff import DoublyStochastic
from tests.constraints.oracle import same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def sums_are_exact(X: Tensor) -> bool:
    rows = [[Fraction(a) for a in row] for row in X.double().tolist()]
    lines = rows + [list(column) for column in zip(*rows, strict=True)]
    return all(sum(line, Fraction(0)) == 1 and min(line) >= 0 for line in lines)


def dykstra(A: Tensor, sweeps: int) -> Tensor:
    """Return the projection by alternating onto the sums (a closed form) and the orthant, with Dykstra's correction."""
    n = A.shape[0]
    X, correction = A.clone(), torch.zeros_like(A)
    for _ in range(sweeps):
        rows, columns = X.sum(1, keepdim=True), X.sum(0, keepdim=True)
        Y = X + (1 - rows) / n + (1 - columns) / n + (X.sum() - n) / n**2
        X = (Y + correction).clamp_min(0)
        correction = Y + correction - X
    return X


@given(n=st.integers(1, 8), seed=st.integers(0, 10**6), scale=st.sampled_from([0.01, 1.0, 5.0, 100.0]))
def test_the_nearest_matrix_meets_its_optimality_conditions(n: int, seed: int, scale: float) -> None:
    """<A - X, Y - X> <= 0 for every permutation matrix Y, so for all their averages: the largest is an assignment problem."""
    A = scale * torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    X = DoublyStochastic().project(A)
    assert sums_are_exact(X)
    rows, columns = linear_sum_assignment((A - X).numpy(), maximize=True)
    most = float((A - X)[rows, columns].sum())
    assert most - float(((A - X) * X).sum()) <= 1e-12 * n * max(1.0, scale)


@pytest.mark.parametrize("seed", [11, 17, 37, 41, 46, 68, 91])
def test_parts_that_nothing_holds_do_not_drift_away(seed: int) -> None:
    """With steps of any length for such parts, these matrices lost seven digits of their sums."""
    A = 5 * torch.randn(11, 11, generator=torch.Generator().manual_seed(seed))
    X = DoublyStochastic().project(A)
    rows, columns = linear_sum_assignment((A - X).numpy(), maximize=True)
    assert float((A - X)[rows, columns].sum()) - float(((A - X) * X).sum()) <= 1e-12 * 11 * 5


@pytest.mark.parametrize("n", [2, 5, 9])
def test_the_projection_agrees_with_dykstra(n: int) -> None:
    A = 0.7 * torch.randn(n, n)
    torch.testing.assert_close(DoublyStochastic().project(A), dykstra(A, 4000), rtol=0, atol=1e-11)


@each_dtype
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_sums_are_exact_and_entries_move_by_about_a_unit(dtype: torch.dtype, scale: float) -> None:
    A = (scale * torch.randn(30, 30)).to(dtype)
    c = DoublyStochastic()
    X, best = c.project(A), c.project(A.double())
    assert sums_are_exact(X)
    assert c.violation(X) == 0.0
    assert same_bits(c.project(X), X)
    unit = torch.finfo(dtype).eps / 2
    assert float((X.double() - best).abs().max()) <= 2.1 * unit + 1e-12 * max(1.0, scale)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e9, 1e300])
def test_far_points_go_to_the_best_assignment(scale: float) -> None:
    A = torch.randn(12, 12)
    rows, columns = linear_sum_assignment(A.numpy(), maximize=True)
    wanted = torch.zeros(12, 12)
    wanted[rows, columns] = 1.0
    if scale >= 1e4:
        assert torch.equal(DoublyStochastic().project(scale * A), wanted)
    assert sums_are_exact(DoublyStochastic().project(scale * A))


def hard() -> list[Tensor]:
    n = 8
    steps = torch.arange(float(n), dtype=torch.float64)
    one = torch.ones(n, n, dtype=torch.float64)
    outer, sums = steps[:, None] * steps, steps[:, None] + steps
    return [
        0 * one, one, torch.eye(n).double(), 1e6 * torch.eye(n).double(), steps[:, None] * one, steps * one, -outer, outer,
        sums % 2, 1e5 * (sums % 2), 1e6 * (steps[:, None] < 4).double() * (steps < 5), (steps[:, None] == 0) * 1e8 * one,
        torch.triu(one) * 1e3, (10.0**steps)[:, None] * (10.0**-steps), -1e9 * one,
    ]  # fmt: skip


@pytest.mark.parametrize("A", hard())
def test_hard_matrices_are_projected_to_their_nearest(A: Tensor) -> None:
    X = DoublyStochastic().project(A)
    assert sums_are_exact(X)
    rows, columns = linear_sum_assignment((A - X).numpy(), maximize=True)
    gap = float((A - X)[rows, columns].sum()) - float(((A - X) * X).sum())
    assert gap <= 1e-13 * 8 * max(1.0, float(A.abs().max())) ** 2 * 8


def test_shifts_of_rows_and_columns_change_nothing() -> None:
    A = torch.randn(6, 6)
    moved = A + torch.randn(6, 1) + torch.randn(6)
    torch.testing.assert_close(DoublyStochastic().project(moved), DoublyStochastic().project(A), rtol=0, atol=1e-12)
    torch.testing.assert_close(DoublyStochastic().project(A.mT), DoublyStochastic().project(A).mT, rtol=0, atol=1e-12)


def test_every_permutation_is_its_own_projection() -> None:
    for order in itertools.permutations(range(3)):
        P = torch.eye(3)[list(order)]
        assert same_bits(DoublyStochastic().project(P), P)
        assert torch.equal(DoublyStochastic().project(50 * P), P)


def test_batches_are_projected_one_by_one() -> None:
    A = torch.randn(3, 5, 4, 5) * torch.tensor([1.0, 10.0, 1e5])[:, None, None, None]
    c = DoublyStochastic(dims=(1, 3))
    X = c.project(A)
    for i, j in itertools.product(range(3), range(4)):
        assert sums_are_exact(X[i, :, j])
        torch.testing.assert_close(X[i, :, j], DoublyStochastic().project(A[i, :, j]), rtol=0, atol=1e-11)
    A[0, 0, 0, 0] = float("nan")
    mixed = c.project(A)
    assert mixed[0, :, 0].isnan().all()
    assert not mixed[0, :, 1].isnan().any()
    assert c.violation(mixed) == float("inf")


def test_violation_measures_sums_and_signs() -> None:
    c = DoublyStochastic()
    assert c.violation(torch.tensor([[0.5, 0.5], [0.5, 0.75]])) == 0.25
    assert c.violation(torch.tensor([[1.5, -0.5], [-0.5, 1.5]])) == 0.5
    assert c.violation(torch.tensor([[0.5, 0.5], [0.5, 0.5 + 2.0**-53]])) > 0.0
    assert c.violation(torch.full((2, 2), 0.5)) == 0.0
    assert c.violation(torch.zeros(0, 0)) == 0.0
    assert c.project(torch.zeros(0, 0)).shape == (0, 0)


def test_the_derivative_is_that_of_finite_differences_also_with_separate_parts() -> None:
    for A in (torch.randn(4, 4), 3 * torch.randn(4, 4), torch.block_diag(5 + torch.randn(2, 2), 5 + torch.randn(2, 2))):
        assert torch.autograd.gradcheck(DoublyStochastic().project, A.requires_grad_(), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DoublyStochastic(dims=1), "two dimensions, rows and columns"),  # type: ignore[arg-type]
        (lambda: DoublyStochastic().project(torch.ones(2, 3)), "square matrices, got 2 x 3"),
        (lambda: DoublyStochastic().violation(torch.ones(2, 2, 2)), "a matrix with two dimensions"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="no exact prox in a diagonal metric"):
        DoublyStochastic().prox(torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_larger_matrices_are_exact(scale: float) -> None:
    A = scale * torch.randn(150, 150)
    for dtype in DTYPES:
        assert sums_are_exact(DoublyStochastic().project(A.to(dtype)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch.func
@pytest.mark.parametrize(
    "x", [torch.tensor([[0.3, 1.0], [0.2, -0.1]]), torch.tensor([[3.0, 1.0, 0.2], [0.4, 0.3, 0.9], [1.5, 0.1, 0.8]])]
)
def test_derivatives_forward_are_those_backward(x: Tensor) -> None:
    project, x = DoublyStochastic().project, x.double()
    rows = torch.randn(3, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    J = torch.autograd.functional.jacobian(project, x).flatten(2).flatten(0, 1)
    assert J.norm() > 0.1
    for v in rows:
        assert torch.func.jvp(project, (x,), (v,))[1].flatten().allclose(J @ v.flatten(), atol=1e-12)
    forward = torch.func.vmap(lambda v: torch.func.jvp(project, (x,), (v,))[1])(rows)
    assert forward.flatten(1).allclose(rows.flatten(1) @ J.T, atol=1e-12)
