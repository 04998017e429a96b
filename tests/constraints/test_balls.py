"""Balls with weights, metrics, batches, complex numbers and shards, and the sphere; decided in rational arithmetic."""

from __future__ import annotations

import math
import sys
import textwrap
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stableopt.constraints.balls import L2Ball, Sphere
from stableopt.constraints.penalties import L1
from stableopt.constraints.sets import Box, LinfBall, NonNegative
from stableopt.errors import InfeasibleError
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import entries, same_bits
from tests.constraints.rows.balls import in_ball, in_boxes, in_ellipsoid, on_sphere
from tests.two_processes import in_two_processes

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bisected(x: list[float], w: list[float], P: list[float], radius: float) -> list[float]:
    """Return the projection in a metric by 400 bisections with 60 digits."""
    with mpmath.workdps(60):
        X, W, D = ([mpmath.mpf(v) for v in t] for t in (x, w, P))

        def at(theta: Any) -> list[Any]:
            return [d * a / (d + theta * b) for a, b, d in zip(X, W, D, strict=True)]

        def norm(u: list[Any]) -> Any:
            return mpmath.sqrt(mpmath.fsum(b * a * a for a, b in zip(u, W, strict=True)))

        if norm(X) <= radius:
            return x
        low, high = mpmath.mpf(0), mpmath.mpf(10) ** 60
        for _ in range(400):
            middle = (low + high) / 2
            low, high = (middle, high) if norm(at(middle)) > radius else (low, middle)
        return [float(u) for u in at(low)]


@pytest.mark.parametrize("spread", [0, 1, 4, 8])
def test_metrics_and_weights_match_a_bisection_with_sixty_digits(spread: int) -> None:
    for radius in (1e-6, 0.3, 2.0):
        x = torch.randn(6) * 10 ** (spread * (torch.rand(6) - 0.5) / 2)
        w, P = 10 ** (spread * (torch.rand(6) - 0.5)), 10 ** (spread * (torch.rand(6) - 0.5))
        weights = tuple(w.tolist())
        p = L2Ball(radius, weights).project(x, metric=P)
        expected = torch.tensor(bisected(x.tolist(), w.tolist(), P.tolist(), radius))
        torch.testing.assert_close(p, expected, rtol=1e-11, atol=1e-14 * radius)
        assert in_ellipsoid(radius, weights)(p)


def test_scales_stacked_over_sixty_orders_still_find_the_root() -> None:
    P = 2.0 ** torch.arange(0.0, 58.0, 2.0)
    for x, radius in ((1 / P, 1e-14), (1 / P, 1e-4), (torch.ones(29), 0.01), (torch.ones(29), 1.1)):
        p = L2Ball(radius).project(x, metric=P)
        expected = torch.tensor(bisected(x.tolist(), [1.0] * 29, P.tolist(), radius))
        torch.testing.assert_close(p, expected, rtol=1e-11, atol=1e-14 * radius)


@each_dtype
def test_no_stored_row_of_many_is_outside_where_the_usual_formula_is(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(400, 10)).to(dtype)
    p = L2Ball(1.3, dims=-1).project(x)
    assert all(in_ball(1.3)(row) for row in p)
    usual = x * (1.3 / x.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    assert not all(in_ball(1.3)(row) for row in usual)
    eps = torch.finfo(dtype).eps
    assert float(p.double().norm(dim=-1).min()) >= 1.3 * (1 - eps - 1e-13)


@settings(max_examples=40)
@given(
    x=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
    exponent=st.integers(-900, 900),
    radius=st.floats(0.0, allow_infinity=False),
    dtype=st.sampled_from(DTYPES),
)
def test_weighted_balls_are_sound_for_any_numbers(x: Any, exponent: int, radius: float, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    point = torch.tensor(x, dtype=torch.float64).clamp(info.min, info.max).to(dtype)
    weights = tuple(math.ldexp(w, exponent) for w in (1.0, 1.7, 2.0**-90))
    for ball in (L2Ball(radius, weights), LinfBall(radius, weights)):
        exact = in_ellipsoid(radius, weights) if isinstance(ball, L2Ball) else in_boxes(radius, weights)
        p = ball.project(point)
        assert exact(p)
        assert ball.violation(p) == 0.0
        assert same_bits(ball.project(p), p)
        assert ball.violation(point) > 0.0 or exact(point)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_moduli_hold_exactly(dtype: torch.dtype) -> None:
    z = torch.randn(200, dtype=torch.complex128).to(dtype) * 2
    weights = tuple((0.1 + torch.rand(200)).tolist())
    tips = (3 + 4j) * torch.tensor([1.0, 1 - 1e-15, 1 + 2e-16])
    for c, point, limits in (
        (LinfBall(0.7), z, [0.7] * 200),
        (LinfBall(0.7, weights), z, [Fraction(0.7) * Fraction(w) for w in weights]),
        (LinfBall(5.0), tips.to(dtype), [5.0] * 3),
        (LinfBall(5e-324), 1e-310 * z, [5e-324] * 200),
    ):
        p = c.project(point)
        for a, r in zip(torch.view_as_real(p), limits, strict=True):
            assert sum(e * e for e in entries(a)) <= Fraction(r) ** 2
        assert c.violation(p) == 0.0
        assert torch.equal(c.project(p), p)
        torch.testing.assert_close(p, c.prox(point, 2.0, metric=torch.ones(len(point))), rtol=0, atol=0)
    p = L2Ball(2.0).project(z)
    assert sum(e * e for e in entries(torch.view_as_real(p))) <= 4
    far = LinfBall(1.0).project(torch.tensor([3 + 4j, 0.3 + 0.4j, 0.0], dtype=dtype))
    torch.testing.assert_close(far, torch.tensor([0.6 + 0.8j, 0.3 + 0.4j, 0.0], dtype=dtype))
    assert LinfBall(1.0).violation(torch.tensor([3 + 4j])) == pytest.approx(4.0)
    assert LinfBall(1.0).project(torch.tensor([complex(math.inf, 0)])).isnan().all()
    q = z[:3].to(torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: torch.view_as_real(LinfBall(0.7).project(t)), q)


def test_products_of_radius_and_weight_are_exact() -> None:
    for w in (0.1, 0.3, 1 / 3, 3.3):
        end = LinfBall(0.1, (w,)).project(torch.tensor([9.0])).item()
        assert Fraction(end) <= Fraction(0.1) * Fraction(w) < Fraction(math.nextafter(end, 1.0))
    assert LinfBall(1e300, (1e300,)).project(torch.tensor([math.inf])).item() == sys.float_info.max
    assert LinfBall(2.0, (0.5, 1.0), dims=0).bounds == (-2.0, 2.0)
    assert LinfBall(2.0, (0.5, 1.0)).violation(torch.tensor([1.5, 2.25])) == 0.5
    x = torch.tensor([-0.0, 5.0])
    assert same_bits(LinfBall(1.0, (1.0, 9.0)).project(x, metric=torch.ones(2)), x)


@each_dtype
def test_the_sphere_holds_its_tolerance(dtype: torch.dtype) -> None:
    for radius in (1e-3, 1.3, 2000.0):
        for n in (1, 3, 100):
            c = Sphere(radius)
            for x in (torch.randn(n), torch.zeros(n), 1e-3 * torch.ones(n)):
                p = c.project(x.to(dtype))
                assert on_sphere(radius)(p)
                assert c.violation(p) == 0.0
                assert same_bits(c.project(p), p)
                eps = torch.finfo(dtype).eps
                off = p.double() * (1 + 4 * (eps + 2.0**-42)) + 4 * torch.finfo(dtype).tiny * eps
                assert c.violation(off) > 0.0
    assert Sphere(2.0).violation(torch.tensor([3.0, 4.0])) == pytest.approx(3.0)


def test_the_sphere_refuses_what_the_dtype_cannot_hold_and_has_the_closed_derivative() -> None:
    with pytest.raises(InfeasibleError, match="wider dtype"):
        Sphere(40000.0).project(torch.ones(2, dtype=torch.float16))
    x = torch.tensor([3.0, 4.0])
    unit = x / 5
    J = torch.autograd.functional.jacobian(Sphere(2.0).project, 2.0 * x)
    torch.testing.assert_close(J, 2.0 / 10 * (torch.eye(2) - torch.outer(unit, unit)))
    assert torch.autograd.functional.jacobian(Sphere(2.0).project, torch.zeros(2)).abs().max() == 0


def test_derivatives_in_a_metric_are_finite_differences() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        x, P = (2 * torch.randn(4)).requires_grad_(), 0.1 + 3 * torch.rand(4)
        for ball in (L2Ball(0.7), L2Ball(0.7, (0.2, 1.0, 3.0, 0.5)), L2Ball(100.0), L2Ball(0.7, dims=0)):
            assert torch.autograd.gradcheck(lambda t, ball=ball, P=P: ball.project(t, metric=P), x)


def test_conjugates_are_the_support_functions() -> None:
    assert LinfBall(2.0).conjugate() == L1(2.0)
    assert Box(-2.0, 2.0).conjugate() == L1(2.0)
    assert NonNegative().conjugate() == Box(-math.inf, 0.0)
    assert Box(-math.inf, 0.0).conjugate() == NonNegative()
    ball = L2Ball(2.0, dims=1)
    assert ball.conjugate().conjugate() == ball
    refused: list[Any] = [LinfBall(1.0, (1.0,)), L2Ball(1.0, (1.0,)), Box(0.0, 1.0), Box(-math.inf, math.inf)]
    for c in refused:
        with pytest.raises(ValueError, match="conjugate"):
            c.conjugate()


def test_bad_arguments_are_refused_in_a_sentence() -> None:
    calls: list[Any] = [
        (lambda: L2Ball(1.0, (1.0, 0.0)), "> 0 as weights"),
        (lambda: L2Ball(1.0, (1e-40, 1.0)), "none is below"),
        (lambda: L2Ball(1.0, (1.0, 2.0)).project(torch.ones(3)), "as many weights"),
        (lambda: L2Ball(1.0, dims=2).project(torch.ones(3)), "dims=2"),
        (lambda: Sphere(0.0), "> 0 as radius"),
        (lambda: LinfBall(1.0, (-1.0,)), ">= 0 as weights"),
        (lambda: LinfBall(1.0, (1.0,)).project(torch.ones(3)), "as many weights"),
        (lambda: Box(0.0, 1.0).project(torch.ones(3), metric=torch.ones(2)), "broadcasts"),
    ]
    for make, message in calls:
        with pytest.raises(ValueError, match=message):
            make()


SHARDED = """
    import sys
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from stableopt.constraints.balls import L2Ball, Sphere
    from stableopt.constraints.cones import HalfSpace, Hyperplane, SecondOrderCone
    from stableopt.constraints.sets import Box, LinfBall, NonNegative
    from stableopt.constraints.sparsity import Sparsity
    from tests.two_processes import join, leave

    torch.set_default_dtype(torch.float64)
    join(*sys.argv[1:])
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)

    def check(g, x, shard, *rest):
        with torch.no_grad():
            d = distribute_tensor(x, mesh, [Shard(shard)])
            torch.testing.assert_close(g.prox(d, *rest).full_tensor(), g.prox(x, *rest), rtol=1e-12, atol=1e-13)
            p = g.project(d)
            assert g.violation(p) == 0.0 and g.violation(p.full_tensor()) == 0.0
            assert torch.equal(g.project(p).to_local(), p.to_local())
            assert (g.violation(d) > 0) == (g.violation(x) > 0)
            assert float(g.value(p)) == 0.0

    for shape, dims in (((11,), None), ((5, 7), None), ((3, 5), 1), ((3, 5), 0), ((2, 3, 5), (2, 0))):
        x, steps = 2 * torch.randn(shape), 0.1 + torch.rand(shape)
        n = x.numel() if dims is None else torch.tensor([shape[d] for d in torch.tensor([dims]).flatten()]).prod().item()
        w = tuple((0.5 + torch.rand(n)).tolist())
        for shard in range(len(shape)):
            for g in (L2Ball(0.9, dims=dims), L2Ball(0.9, w, dims), HalfSpace(w, -0.3, dims), Hyperplane(w, 0.3, dims),
                      LinfBall(0.5), LinfBall(0.5, w, dims), Box(-0.3, 1.0), NonNegative(), Sparsity(2, dims)):
                check(g, x, shard)
                check(g, x, shard, steps)
            for g in (Sphere(1.1, dims), SecondOrderCone(dims)):
                check(g, x, shard)
    leave()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_same_as_one(tmp_path: Path) -> None:
    in_two_processes(textwrap.dedent(SHARDED), tmp_path)


def test_a_batch_along_any_dimensions_is_its_vectors() -> None:
    x: Tensor = 2 * torch.randn(3, 4, 5)
    p = L2Ball(1.1, dims=(0, 2)).project(x)
    for j in range(4):
        torch.testing.assert_close(p[:, j], L2Ball(1.1).project(x[:, j]), rtol=1e-13, atol=0)
