"""Total variation: the dual certificate in long doubles, all patterns of jumps in fractions, limits, and time."""

from __future__ import annotations

import itertools
import math
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from stableopt.constraints import L1
from stableopt.constraints.tv import TV1D, FusedLasso
from tests.constraints.oracle import same_bits


def inputs(n: int) -> dict[str, Tensor]:
    i = torch.arange(float(n))
    return {
        "noise": torch.randn(n),
        "walk": torch.randn(n).cumsum(0),
        "ramp": i / 100,
        "falling": -i,
        "sawtooth": (-1.0) ** i * i / 50,
        "waves": 20 * torch.sin(i / 30),
        "parabola": (i - n / 2) ** 2 / n,
        "integers": torch.randint(0, 3, (n,)).double(),
        "steps": torch.randn(n // 50 + 1).repeat_interleave(50)[:n] + 0.1 * torch.randn(n),
        "offset": 1e6 + torch.randn(n),
        "spike": torch.where(i == n // 3, 1e9, torch.randn(n)),
        "constant": torch.full((n,), 0.3),
    }


def dual_gap(x: Tensor, u: Tensor, w: float, P: Tensor | None = None) -> float:
    """How far z_i = sum_{j<=i} P_j (u_j - x_j) is from |z| <= w, z_n = 0, and z_i = w sign(u_{i+1} - u_i) at jumps.

    The three together prove that u is the proximal point. Long doubles: the sum of the residuals must not add errors of its own.
    """
    residual = (u.numpy().astype(np.longdouble) - x.numpy()) * (1 if P is None else P.numpy())
    z = np.cumsum(residual)
    jump = np.diff(u.numpy())
    at = jump != 0
    worst = [abs(z[-1]), np.max(np.abs(z)) - w]
    if at.any():
        worst.append(np.max(np.abs(z[:-1][at] - w * np.sign(jump[at]))))
    return float(max(worst))


def exact_prox(values: list[float], metric: list[float], w: float) -> list[Fraction]:
    """Try every pattern of equal, rising and falling neighbors; the best point of all is the answer, in rational arithmetic."""
    x, P, weight = [Fraction(v) for v in values], [Fraction(p) for p in metric], Fraction(w)
    n = len(x)
    best: tuple[Fraction, list[Fraction]] | None = None
    for pattern in itertools.product((0, 1, -1), repeat=n - 1):
        ends = [-1, *(i for i, s in enumerate(pattern) if s), n - 1]
        u: list[Fraction] = []
        for start, end in itertools.pairwise(ends):
            block = range(start + 1, end + 1)
            before = pattern[start] if start >= 0 else 0
            after = pattern[end] if end < n - 1 else 0
            total = sum((P[i] * x[i] for i in block), Fraction(0)) + weight * (after - before)
            u += [total / sum(P[i] for i in block)] * len(block)
        cost = weight * sum(abs(b - a) for a, b in itertools.pairwise(u))
        cost += sum(p * (a - b) ** 2 for p, a, b in zip(P, u, x, strict=True)) / 2
        if best is None or cost < best[0]:
            best = cost, u
    assert best is not None
    return best[1]


@pytest.mark.parametrize("w", [0.01, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("name", list(inputs(100)))
def test_the_dual_certificate_holds(name: str, w: float) -> None:
    x = inputs(3000)[name]
    scale = max(1.0, float(x.abs().max()) * 1e-3)
    for row in (x, x[:7], x[:2], x[:1]):
        assert dual_gap(row, TV1D(w).prox(row), w) < 1e-10 * scale
    P = torch.exp(torch.randn(3000))
    u = TV1D(w).prox(x, 1.0, metric=P)
    assert dual_gap(x, u, w, P) < 1e-10 * scale * float(P.max())
    assert float(TV1D(w).value(u)) == pytest.approx(w * math.fsum(u.diff().abs().tolist()), rel=1e-13)


@given(
    st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.125, 0.5, 1.0, 3.0]),
    st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=6, max_size=6),
)
@example([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], 0.5, [1.0] * 6)
@example([0.0, 0.5, 1.0, 1.5, 1.0, 0.5], 0.25, [1.0] * 6)
@example([2.0, -2.0], 2.0, [1.0] * 6)
def test_every_pattern_of_jumps_was_worth_no_more(values: list[float], w: float, metric: list[float]) -> None:
    x, P = torch.tensor(values), torch.tensor(metric[: len(values)])
    for m in (P, torch.ones_like(P)):
        wanted = torch.tensor([float(v) for v in exact_prox(values, m.tolist(), w)])
        torch.testing.assert_close(TV1D(w).prox(x, 1.0, metric=m), wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(TV1D(w).prox(x), wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(TV1D(2 * w).prox(x, 0.5), wanted, rtol=1e-14, atol=1e-14)


def test_no_weight_and_no_step_are_the_identity() -> None:
    for x in inputs(400).values():
        for u in (TV1D(0.0).prox(x), TV1D(3.0).prox(x, 0.0), TV1D(3.0).prox(x, torch.zeros(400))):
            assert same_bits(u, x)
    tied = torch.tensor([1.0, 1.0, 2.0])
    for g, step in ((TV1D(0.0), 1.0), (TV1D(3.0), 0.0)):
        J = torch.autograd.functional.jacobian(lambda t, g=g, step=step: g.prox(t, step), tied)
        assert torch.equal(J, torch.eye(3))


def test_the_result_is_constant_from_a_weight_on_that_is_known() -> None:
    """u = mean exactly if w >= max_i |sum_{j<=i} (x_j - mean)|."""
    for name, x in inputs(500).items():
        if name == "constant":
            continue
        limit = float((x - x.mean()).cumsum(0).abs().max())
        at = TV1D(limit * (1 + 1e-9)).prox(x)
        assert torch.equal(at, at[:1].expand(500))
        torch.testing.assert_close(at, x.mean().expand(500), rtol=1e-14, atol=1e-14)
        for huge in (1e30, 1.7e308):
            assert same_bits(TV1D(huge).prox(x), at)
            assert same_bits(TV1D(huge).prox(x, 10.0), at)
        below = TV1D(limit * (1 - 1e-6)).prox(x)
        assert below.max() > below.min()


def test_symmetries() -> None:
    for w in (0.3, 4.0):
        for x in inputs(300).values():
            u, slack = TV1D(w).prox(x), 1e-13 * (1 + float(x.abs().max()))
            torch.testing.assert_close(TV1D(w).prox(x.flip(0)).flip(0), u, rtol=0, atol=slack)
            torch.testing.assert_close(-TV1D(w).prox(-x), u, rtol=0, atol=slack)
            torch.testing.assert_close(TV1D(w).prox(x + 7) - 7, u, rtol=0, atol=slack)
            for scale in (2.0**900, 2.0**-900):
                assert torch.equal(TV1D(w).prox(x * scale, scale) / scale, u)
            again = TV1D(0.2).prox(u)  # in one dimension weights add up
            torch.testing.assert_close(again, TV1D(w + 0.2).prox(x), rtol=0, atol=1e-11 * (1 + float(x.abs().max())))


@pytest.mark.parametrize("name", list(inputs(100)))
def test_the_worst_case_is_linear(name: str) -> None:
    n = 30_000
    x = inputs(n)[name]
    TV1D(1.0).prox(x[:10])
    for w in (0.001, 1.0, 1e3, 1e6):
        start = time.process_time()
        TV1D(w).prox(x)
        assert (
            time.process_time() - start < 1e-5 * n
        )  # about one microsecond for an entry, with room for a busy machine


@pytest.mark.slow
@pytest.mark.parametrize("w", [1.0, 10.0, 1e5])
@pytest.mark.parametrize("name", ["noise", "walk", "waves"])
def test_a_million_entries_are_exact(name: str, w: float) -> None:
    x = inputs(1_000_000)[name]
    u = TV1D(w).prox(x)
    assert dual_gap(x, u, w) < 1e-10 * max(1.0, float(x.abs().max()))


def test_dims_choose_the_lines() -> None:
    x = torch.randn(4, 5, 3)
    g = TV1D(0.5)
    rows = torch.stack([g.prox(row) for row in x.flatten(0, 1)]).reshape(4, 5, 3)
    torch.testing.assert_close(g.prox(x), rows, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(TV1D(0.5, dims=1).prox(x), g.prox(x.movedim(1, -1)).movedim(-1, 1))
    torch.testing.assert_close(TV1D(0.5, dims=None).prox(x), g.prox(x.flatten()).reshape(x.shape))
    torch.testing.assert_close(
        TV1D(0.5, dims=(2, 0)).prox(x), g.prox(x.permute(1, 2, 0).reshape(5, 12)).reshape(5, 3, 4).permute(2, 0, 1)
    )
    assert float(g.value(x)) == pytest.approx(0.5 * float(x.diff(dim=-1).abs().sum()))
    steps = torch.rand(4, 1, 1).expand(4, 5, 3)
    one_by_one = torch.stack([g.prox(a, float(s)) for a, s in zip(x, steps[:, 0, 0], strict=True)])
    torch.testing.assert_close(g.prox(x, steps), one_by_one, rtol=1e-13, atol=1e-13)
    for empty in (torch.zeros(0), torch.zeros(3, 0), torch.zeros(0, 3)):
        assert g.prox(empty).shape == empty.shape
        assert float(g.value(empty)) == 0.0


def test_a_metric_of_very_different_sizes_pins_what_is_heavy() -> None:
    x = torch.randn(200)
    for spread in (1e6, 1e15, 1e100):
        P = torch.where(torch.arange(200) % 7 == 0, spread, 1.0)
        u = TV1D(1.0).prox(x, 1.0, metric=P)
        assert u.isfinite().all()
        torch.testing.assert_close(u[::7], x[::7], rtol=0, atol=2.0 * max(1 / spread, 2.0**-40) + 1e-15)
    steps = torch.ones(6)
    steps[2] = 0.0
    u = TV1D(0.5).prox(torch.tensor([0.0, 1.0, 5.0, 1.0, 0.0, 0.0]), steps)
    torch.testing.assert_close(u, torch.tensor([0.5, 1.0, 5.0, 1.0, 0.25, 0.25]), rtol=0, atol=2e-12)


def test_a_metric_is_exact_up_to_the_rounding_of_its_largest_entry() -> None:
    for seed in range(150):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(10, 60))
        P = (
            np.exp2(40 * rng.random(n))
            if seed % 2
            else np.where(rng.random(n) < rng.random(), 2.0**39 * rng.random(n), 1.0)
        )
        x, w = torch.from_numpy(rng.normal(size=n)), 10.0 ** rng.uniform(-3, 13)
        u = TV1D(w).prox(x, 1.0, metric=torch.from_numpy(P))
        assert dual_gap(x, u, w, torch.from_numpy(P)) < 1e-14 * P.sum()


def test_the_derivative_averages_over_segments() -> None:
    x = torch.tensor([0.0, 1.0, 9.0, 10.0, 11.0])
    J = torch.autograd.functional.jacobian(TV1D(1.5).prox, x)
    torch.testing.assert_close(J, torch.block_diag(torch.full((2, 2), 0.5), torch.eye(1), torch.full((2, 2), 0.5)))
    assert TV1D(1.5).prox(x).tolist() == [1.25, 1.25, 9.0, 9.75, 9.75]


@pytest.mark.parametrize("g", [TV1D(0.7), FusedLasso(0.4, 0.3)], ids=repr)
def test_gradcheck_in_the_point_and_in_the_step(g: TV1D | FusedLasso) -> None:
    x = (3 * torch.randn(2, 9)).requires_grad_()
    assert torch.autograd.gradcheck(g.prox, (x, torch.tensor(0.6, requires_grad=True)))
    assert torch.autograd.gradgradcheck(g.prox, (x, torch.tensor(0.6, requires_grad=True)))
    assert torch.autograd.gradcheck(g.value, (x,))
    if g.diagonal:
        assert torch.autograd.gradcheck(g.prox, (x, (0.3 + torch.rand(2, 9)).requires_grad_()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch.func.jacfwd
def test_functorch_sees_the_same() -> None:
    x, g = torch.randn(8), FusedLasso(0.3, 0.1)
    J = torch.autograd.functional.jacobian(g.prox, x)
    torch.testing.assert_close(torch.func.jacrev(g.prox)(x), J)
    torch.testing.assert_close(torch.func.jacfwd(g.prox)(x), J)
    batch = torch.randn(4, 8)
    torch.testing.assert_close(torch.func.vmap(g.prox)(batch), g.prox(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(3, 50).to(dtype)
    for g in (TV1D(0.5), FusedLasso(0.5, 0.1)):
        assert torch.equal(g.prox(x), g.prox(x.double()).to(dtype))


def test_a_vector_that_is_not_finite_becomes_nan_alone() -> None:
    x = torch.tensor([[1.0, 2.0, 0.0], [math.nan, 0.0, 1.0], [0.0, math.inf, 1.0]])
    for g in (TV1D(0.3), FusedLasso(0.3, 0.1)):
        u = g.prox(x)
        assert torch.equal(u[0], g.prox(x[0]))
        assert u[1:].isnan().all()


def test_extreme_sizes_neither_overflow_nor_divide_by_zero() -> None:
    x = torch.tensor([1.7e308, -1.7e308, 1.7e308, 1.6e308])
    torch.testing.assert_close(TV1D(1e307).prox(x)[2:], torch.full((2,), 1.6e308), rtol=1e-14, atol=0)
    assert TV1D(1e308).prox(torch.tensor([1e-320, 0.0]), 1e308).isfinite().all()
    mixed = torch.tensor([1e300, 1e-300, -1e-300, 0.0, 5e-324])
    assert TV1D(1.0).prox(mixed).isfinite().all()
    assert torch.equal(TV1D(1.0).prox(torch.zeros(5)), torch.zeros(5))


# fused lasso


@pytest.mark.parametrize(("tv", "l1"), [(0.5, 0.3), (2.0, 0.1), (0.1, 1.0)])
def test_a_solver_of_the_dual_finds_the_fused_lasso(tv: float, l1: float) -> None:
    """Minimize |x - s D'z - s y|^2 over |z| <= tv, |y| <= l1; then u = x - s D'z - s y."""
    n, s = 12, 0.7
    D = np.diff(np.eye(n), axis=0)
    M = np.concatenate([D, np.eye(n)]).T * s
    bounds = [(-tv, tv)] * (n - 1) + [(-l1, l1)] * n
    for seed in range(3):
        x = 2 * np.random.default_rng(seed).normal(size=n)
        found = minimize(
            lambda q, x=x: 0.5 * np.sum((x - M @ q) ** 2),
            np.zeros(2 * n - 1),
            jac=lambda q, x=x: -M.T @ (x - M @ q),
            bounds=bounds,
            method="L-BFGS-B",
            options={"maxiter": 20_000, "maxfun": 100_000, "ftol": 1e-16, "gtol": 1e-11},
        )
        u = FusedLasso(tv, l1).prox(torch.from_numpy(x), s)
        torch.testing.assert_close(u, torch.from_numpy(x - M @ found.x), rtol=0, atol=1e-6)


def test_the_fused_lasso_contains_both_penalties() -> None:
    for x in inputs(60).values():
        assert torch.equal(FusedLasso(0.0, 0.4).prox(x, 0.5), L1(0.4).prox(x, 0.5))
        assert torch.equal(FusedLasso(0.4, 0.0).prox(x, 0.5), TV1D(0.4).prox(x, 0.5))
        both = FusedLasso(0.4, 0.3).value(x)
        torch.testing.assert_close(both, TV1D(0.4).value(x) + L1(0.3).value(x))


def test_fields_are_checked() -> None:
    with pytest.raises(ValueError, match="TV1D needs a finite number >= 0 as weight"):
        TV1D(-1.0)
    for field in ("tv", "l1"):
        wrong: dict[str, Any] = {"tv": 1.0, "l1": 1.0, field: math.nan}
        with pytest.raises(ValueError, match=f"FusedLasso needs a finite number >= 0 as {field}"):
            FusedLasso(**wrong)
    with pytest.raises(ValueError, match="needs a tensor that has them"):
        TV1D(1.0).prox(torch.tensor(1.0))
    with pytest.raises(ValueError, match="no conjugate"):
        TV1D(1.0).conjugate()
    assert TV1D(1.0).diagonal
    assert not FusedLasso(1.0, 1.0).diagonal
    assert TV1D(1.0).dims == FusedLasso(1.0, 1.0).dims == -1
    with pytest.raises(TypeError, match="as dims"):
        TV1D(1.0, dims="last")  # type: ignore[arg-type]


def test_with_and_without_a_derivative_the_numbers_are_the_same_bits() -> None:
    x = torch.randn(3, 200).cumsum(dim=1) + 1e3
    plain = TV1D(0.7, dims=1).prox(x)
    assert same_bits(TV1D(0.7, dims=1).prox(x.clone().requires_grad_()).detach(), plain)
    assert same_bits(torch.vmap(TV1D(0.7).prox)(x), plain)


def test_forward_derivatives_survive_no_grad() -> None:
    x, direction = torch.randn(30), torch.randn(30)
    with torch.no_grad():
        p, moved = torch.func.jvp(TV1D(0.4).prox, (x,), (direction,))
    near = (TV1D(0.4).prox(x + 1e-7 * direction) - p) / 1e-7
    torch.testing.assert_close(moved, near, rtol=1e-6, atol=1e-6)
    assert moved.abs().max() > 0.0
