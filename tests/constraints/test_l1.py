"""Sum-norm balls and the maximum norm: oracles, optimality conditions, both sides of the boundary, extremes, shards."""

from __future__ import annotations

import math
import textwrap
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stableopt.constraints.l1 import InfNormBall, L1Ball, LinfNorm, OneNormBall
from tests.constraints.oracle import same_bits
from tests.two_processes import in_two_processes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def sorted_projection(x: np.ndarray, radius: float) -> np.ndarray:
    """Return the projection onto the ball of the sum norm by sorting, in numpy."""
    size = np.abs(x)
    if size.sum() <= radius:
        return x
    falling = np.sort(size)[::-1]
    levels = (np.cumsum(falling) - radius) / np.arange(1, len(x) + 1)
    theta = levels[np.nonzero(falling > levels)[0][-1]]
    return np.sign(x) * np.maximum(size - theta, 0.0)


def exact_sum(x: Tensor, weights: tuple[float, ...] | None = None) -> Fraction:
    numbers = [abs(Fraction(a)) for a in x.double().flatten().tolist()]
    each = [1.0] * len(numbers) if weights is None else weights
    return sum((a * Fraction(w) for a, w in zip(numbers, each, strict=True)), Fraction(0))


@pytest.mark.parametrize("n", [1, 2, 17, 5000, 30_000])
@pytest.mark.parametrize("radius", [1e-6, 0.7, 100.0])
def test_the_projection_agrees_with_sorting_in_numpy(n: int, radius: float) -> None:
    x = torch.randn(n)
    wanted = torch.from_numpy(sorted_projection(x.numpy(), radius))
    torch.testing.assert_close(L1Ball(radius).project(x), wanted, rtol=1e-12, atol=1e-12)


@given(
    n=st.integers(1, 9), seed=st.integers(0, 10**6), radius=st.sampled_from([1e-3, 0.5, 4.0]), kind=st.integers(0, 2)
)
def test_the_weighted_projection_in_a_metric_meets_its_optimality_conditions(
    n: int, seed: int, radius: float, kind: int
) -> None:
    """P_i (|x_i| - |u_i|) / w_i is one number on the support and at least the same as P_i |x_i| / w_i elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    x, w, P = torch.randn(n, generator=generator), *torch.rand(2, n, generator=generator).add(0.1).unbind()
    if kind == 2:
        P = 10 ** (6 * P - 3)
    ball = L1Ball(radius, None if kind == 0 else tuple(w.tolist()))
    w = torch.ones(n) if kind == 0 else w
    u = ball.project(x, P)
    if float((w * x.abs()).sum()) < radius * (1 - 1e-12):
        assert same_bits(u, x)
        return
    assert float((w * u.abs()).sum()) == pytest.approx(radius, rel=1e-13)
    assert exact_sum(u, tuple(w.tolist())) <= Fraction(radius)
    assert bool((u * x >= 0).all())
    moved, support = P * (x.abs() - u.abs()) / w, u != 0
    theta = moved[support].mean()
    torch.testing.assert_close(moved[support], theta.expand(int(support.sum())), rtol=1e-9, atol=1e-11)
    assert bool((moved[~support] <= theta * (1 + 1e-9)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_boundary_has_two_sides(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    on = torch.tensor([0.5, -0.25, 0.125], dtype=dtype)
    inside, outside = L1Ball(0.875 + 1e-14), L1Ball(0.875 * (1 - eps / 2))
    assert same_bits(inside.project(on), on)
    assert inside.violation(on) == 0.0
    assert outside.violation(on) > 0.0
    moved = outside.project(on)
    assert exact_sum(moved) <= Fraction(outside.radius)
    assert float((moved - on).abs().max()) <= 2 * eps + 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1000, 4097])
def test_a_projection_is_feasible_exactly_and_not_much_shorter_than_allowed(dtype: torch.dtype, n: int) -> None:
    x = (3 * torch.randn(n)).to(dtype)
    for radius in (0.9, n * 0.9):
        p = L1Ball(radius).project(x)
        total = exact_sum(p)
        support = int((p != 0).sum())
        assert total <= Fraction(radius)
        loss = float(p.abs().max()) * support * torch.finfo(dtype).eps
        assert float(Fraction(radius) - total) <= loss + radius * 5 * (2 * math.isqrt(n) + 18) * 2.0**-53


@pytest.mark.parametrize("radius", [0.0, 5e-324, 1e-310, 1e-300, 1e300, 1.7e308])
def test_extreme_radii_stay_feasible(radius: float) -> None:
    for size in (1e-320, 1e-300, 1.0, 1.7e308):
        x = size * torch.tensor([1.0, -0.7, 0.3, -1.0])
        for weights in (None, (1.0, 2.0, 0.5, 1e-3), (1e-50, 1e-40, 1.0, 1.0)):
            ball = L1Ball(radius, weights)
            p = ball.project(x)
            assert p.isfinite().all()
            assert exact_sum(p, weights) <= Fraction(radius)
            assert ball.violation(p) == 0.0
            assert same_bits(ball.project(p), p)


def test_a_product_that_underflows_is_not_called_feasible() -> None:
    assert L1Ball(0.0, (1e-200,)).violation(torch.tensor([1e-200])) > 0.0
    assert L1Ball(0.0, (1e-200,)).violation(torch.tensor([0.0])) == 0.0


def test_complex_moduli_shrink_and_phases_stay() -> None:
    z = torch.polar(torch.tensor([3.0, 2.0, 0.5, 0.0]), torch.tensor([0.3, -2.0, 1.0, 0.0]))
    p = L1Ball(2.0).project(z)
    torch.testing.assert_close(p.abs(), torch.tensor([1.5, 0.5, 0.0, 0.0]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p[:2].angle(), z[:2].angle(), rtol=1e-12, atol=0)
    q = LinfNorm(2.0).prox(z)
    torch.testing.assert_close(q.abs(), torch.tensor([1.5, 1.5, 0.5, 0.0]), rtol=1e-12, atol=1e-12)
    leaf = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(L1Ball(2.0).project(leaf).abs().sum(), leaf)
    assert grad.isfinite().all()


def test_the_derivative_is_that_of_finite_differences_with_weights_and_metric() -> None:
    x, P = torch.randn(6, requires_grad=True), 0.3 + torch.rand(6)
    ball = L1Ball(0.9, (1.0, 2.0, 0.5, 0.7, 1.3, 0.2))
    assert torch.autograd.gradcheck(lambda t: ball.project(t, P), x)
    assert torch.autograd.gradcheck(lambda t: LinfNorm(0.4).prox(t, 0.7, P), x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch.func.jacfwd
def test_function_transforms_agree_with_autograd() -> None:
    ball, x = L1Ball(0.7), torch.randn(5)
    reverse = torch.autograd.functional.jacobian(ball.map, x)
    torch.testing.assert_close(torch.func.jacrev(ball.map)(x), reverse)
    torch.testing.assert_close(torch.func.jacfwd(ball.map)(x), reverse)
    batch = torch.randn(4, 5)
    torch.testing.assert_close(torch.func.vmap(ball.map)(batch), torch.stack([ball.map(b) for b in batch]))


@pytest.mark.parametrize("step", [0.3, 2.0])
def test_the_maximum_norm_clips_at_the_level_of_its_definition(step: float) -> None:
    x, s = torch.randn(9), step * (0.2 + torch.rand(9))
    g = LinfNorm(0.8)
    for steps in (torch.full((9,), step), s):
        u = g.prox(x, steps)
        t = float(u.abs().max())
        assert torch.equal(u, x.clamp(-t, t))
        cut = float(((x.abs() - u.abs()) / steps).sum())
        assert cut == pytest.approx(0.8, rel=1e-12) if t > 0 else cut <= 0.8
    assert not g.prox(x, 100.0).any()
    assert same_bits(g.prox(x, torch.zeros(9)), x)


def test_a_step_of_zero_for_one_entry_keeps_it() -> None:
    u = LinfNorm(1.0).prox(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(u, torch.tensor([2.0, 2.0, 1.0]), rtol=1e-12, atol=0)


def test_the_maximum_norm_of_nothing_is_zero() -> None:
    assert LinfNorm(1.0).value(torch.zeros(0)).item() == 0.0
    assert LinfNorm(1.0).prox(torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_norm_balls_bound_the_gain(dtype: torch.dtype) -> None:
    W = (2 * torch.randn(5, 7)).to(dtype)
    rows, columns = InfNormBall(1.5).project(W), OneNormBall(1.5).project(W)
    assert all(exact_sum(row) <= Fraction(1.5) for row in rows)
    assert all(exact_sum(column) <= Fraction(1.5) for column in columns.mT)
    assert same_bits(OneNormBall(1.5).project(W.mT.contiguous()), rows.mT.contiguous())
    wide = rows.double()
    assert float(torch.linalg.matrix_norm(wide, math.inf)) == pytest.approx(1.5, rel=30 * torch.finfo(dtype).eps)
    assert float(torch.linalg.matrix_norm(columns.double(), 1)) <= 1.5
    for row, p in zip(W, rows, strict=True):
        assert same_bits(L1Ball(1.5).project(row), p)


def test_the_operator_norm_balls_work_on_batches() -> None:
    W = 2 * torch.randn(3, 5, 7)
    many = InfNormBall(1.0, dims=(-2, -1)).project(W)
    torch.testing.assert_close(many, torch.stack([InfNormBall(1.0).project(w) for w in W]), rtol=1e-13, atol=0)
    kernel = OneNormBall(1.0, dims=(1, 0)).project(W)
    assert float(kernel.abs().sum(dim=1).max()) <= 1.0
    assert OneNormBall(1.0, dims=(1, 0)).violation(kernel) == 0.0
    P = 0.1 + torch.rand(3, 5, 7)
    torch.testing.assert_close(
        InfNormBall(1.0, dims=(-2, -1)).prox(W, 0.3, P)[1], InfNormBall(1.0).project(W[1], P[1]), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1Ball(-1.0), "L1Ball needs a finite number >= 0 as radius"),
        (lambda: L1Ball(math.inf), "finite"),
        (lambda: L1Ball(1.0, (1.0, 0.0)), "> 0 as weights"),
        (lambda: L1Ball(1.0, (1e-80, 1.0)), "none is below"),
        (lambda: L1Ball(1.0, ()), "at least one number"),
        (lambda: L1Ball(1.0, (1.0, 2.0)).project(torch.ones(3)), "as many weights"),
        (lambda: L1Ball(1.0, dims=2).project(torch.ones(3)), "dims=2"),
        (lambda: LinfNorm(math.nan), "LinfNorm needs"),
        (lambda: InfNormBall(-1.0), "radius"),
        (lambda: InfNormBall(1.0, dims=1), "two dimensions"),  # type: ignore[arg-type]
        (lambda: InfNormBall(1.0).project(torch.ones(3)), "a matrix with two dimensions"),
        (lambda: InfNormBall(1.0).violation(torch.ones(2, 3, 4)), "dims=\\(-2, -1\\)"),
        (lambda: OneNormBall(1.0, dims=(0, -2)).project(torch.ones(3, 4)), "two dimensions of the tensor"),
        (lambda: OneNormBall(1.0, dims=(0, 5)).project(torch.ones(3, 4)), "two dimensions of the tensor"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_conjugates_keep_the_dimensions() -> None:
    assert L1Ball(2.0, dims=(0, 1)).conjugate() == LinfNorm(2.0, (0, 1))
    assert LinfNorm(2.0, 1).conjugate() == L1Ball(2.0, dims=1)
    with pytest.raises(ValueError, match="conjugate"):
        L1Ball(2.0, (1.0,)).conjugate()


SHARDED = """
    import sys
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from stableopt.constraints.l1 import InfNormBall, L1Ball, LinfNorm
    from stableopt.constraints.simplex import CappedSimplex, Max, Simplex, SumLargest
    from tests.two_processes import join, leave

    torch.set_default_dtype(torch.float64)
    join(*sys.argv[1:])
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)

    def check(g, x, shard, *rest):
        with torch.no_grad():
            d = distribute_tensor(x, mesh, [Shard(shard)])
            torch.testing.assert_close(g.prox(d, *rest).full_tensor(), g.prox(x, *rest), rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(g.value(g.prox(d, *rest)), g.value(g.prox(x, *rest)), rtol=1e-12, atol=1e-12)
            if hasattr(g, "project"):
                p = g.project(d)
                assert g.violation(p) == 0.0 and g.violation(p.full_tensor()) == 0.0
                assert torch.equal(g.project(p).to_local(), p.to_local())
                assert (g.violation(d) > 0) == (g.violation(x) > 0)

    for shape, dims in (((11,), None), ((5, 7), None), ((3, 5), 1), ((3, 5), 0), ((2, 3, 5), (2, 0)), ((9001,), None)):
        x, steps = torch.randn(shape), 0.1 + torch.rand(shape)
        n = x.numel() if dims is None else torch.tensor([shape[d] for d in torch.tensor([dims]).flatten()]).prod().item()
        weights = tuple((0.5 + torch.rand(n)).tolist())
        for shard in range(len(shape)):
            for g in (L1Ball(0.9, dims=dims), L1Ball(0.9, weights, dims), LinfNorm(0.7, dims), Max(0.7, dims), Simplex(1.0, dims)):
                check(g, x, shard)
                check(g, x, shard, steps)
            for g in (CappedSimplex(1.0, 0.6, dims), SumLargest(0.4, 2, dims)):
                check(g, x, shard)
    check(InfNormBall(0.5), torch.randn(4, 5), 0)
    check(InfNormBall(0.5), torch.randn(4, 5), 1)
    leave()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_same_as_one(tmp_path: Path) -> None:
    in_two_processes(textwrap.dedent(SHARDED), tmp_path)
