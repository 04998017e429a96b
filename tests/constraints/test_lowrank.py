"""Bounded rank and nearly orthogonal matrices."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from stableopt.constraints import from_spec
from stableopt.constraints import lowrank as module
from stableopt.constraints.lowrank import AlmostOrthogonal, Rank, smallest_singular_value_lower
from stableopt.errors import InfeasibleError
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import same_bits, singular_values
from tests.constraints.rows.spectra import almost_orthogonal, of_rank

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(3, 3), (5, 2), (2, 5), (4, 3), (1, 1)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_the_projection_onto_bounded_rank_truncates(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for k in (1, 2):
        x = (3 * torch.randn(shape)).to(dtype)
        p = Rank(k).project(x)
        U, S, Vh = torch.linalg.svd(x.double(), full_matrices=False)
        close = float(S[0]) * (torch.finfo(dtype).eps + 1e-14)
        torch.testing.assert_close(p.double(), (U[:, :k] * S[:k]) @ Vh[:k], rtol=0, atol=close)
        assert of_rank(k, p)
        assert Rank(k).project(p) is p
        assert (Rank(k).project(x) is x) is (k >= min(shape))


def test_no_matrix_of_the_rank_is_nearer() -> None:
    for shape in SHAPES[:4]:
        x = torch.randn(shape)
        best = float((Rank(2).project(x) - x).norm())
        assert best**2 == pytest.approx(sum(float(s) ** 2 for s in singular_values(x)[2:]), abs=1e-13)
        for _ in range(20):
            other = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
            for q in (other, Rank(2).project(x + 0.1 * other)):
                assert float((q - x).norm()) >= best - 1e-13


def test_the_projection_is_not_nonexpansive() -> None:
    x, y = torch.diag(torch.tensor([1.0, 0.99])), torch.diag(torch.tensor([0.99, 1.0]))
    assert float((Rank(1).project(x) - Rank(1).project(y)).norm()) > 50 * float((x - y).norm())


@each_dtype
def test_the_tolerance_of_the_rank_is_the_stated_one(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    relative = eps + 4 * (4 + 64) * 2.0**-52
    for factor, inside in ((0.5, True), (0.95, True), (1.1, False), (3.0, False)):
        x = torch.diag(torch.tensor([1.0, factor * relative])).to(dtype)
        assert of_rank(1, x) is inside
        assert Rank(1).violation(x) == (0.0 if inside else pytest.approx(float(x[1, 1]), rel=1e-12))
        assert (Rank(1).project(x) is x) is inside


@each_dtype
def test_results_stay_well_within_the_tolerance(dtype: torch.dtype) -> None:
    for n in (8, 40):
        p = Rank(2).project(torch.randn(n, n).to(dtype)).double()
        relative = torch.finfo(dtype).eps + 4 * (n * n + 64) * 2.0**-52
        assert float(torch.linalg.svdvals(p)[2] / p.norm()) <= relative / 4


def test_rank_keeps_its_promise_at_the_ends_of_the_range() -> None:
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        for size in (info.max, info.smallest_normal, info.smallest_normal * info.eps):
            x = (torch.tensor([[1.0, -1.0, 1.0], [1.0, 0.5, -1.0], [1.0, 1.0, 1.0]]) * size).to(dtype)
            for k in (1, 2):
                p = Rank(k).project(x)
                assert p.isfinite().all()
                assert of_rank(k, p)


@each_dtype
def test_the_coarse_steps_of_subnormal_numbers_are_within_the_tolerance(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    x = (torch.tensor([[5.0, 1.0], [1.0, 3.0]]) * info.smallest_normal * info.eps).to(dtype)
    p = Rank(1).project(x)
    sigma = singular_values(p)
    assert not torch.equal(p, x)
    assert sigma[1] > 2 * info.eps * sigma[0]  # rounding to whole steps has filled it up
    assert of_rank(1, p)
    assert Rank(1).violation(p) == 0.0


def test_what_is_no_rank_is_refused() -> None:
    for bad in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match="Rank needs an int as k"):
            Rank(bad)  # type: ignore[arg-type]
    for small in (0, -1):
        with pytest.raises(ValueError, match="k >= 1"):
            Rank(small)
    with pytest.raises(ValueError, match="dims"):
        Rank(1, (0, 0))
    assert from_spec(Rank(3, (0, 2)).spec()) == Rank(3, (0, 2))
    assert Rank(1).spec() == {"name": "Rank", "k": 1, "dims": None}


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_nearly_orthogonal_clamps_and_proves_both_sides(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for t in (0.05, 0.4, 0.95):
        for scale in (0.1, 1.0, 5.0):
            x = (scale * torch.randn(shape)).to(dtype)
            p = AlmostOrthogonal(t).project(x)
            U, S, Vh = torch.linalg.svd(x.double(), full_matrices=False)
            close = 4 * torch.finfo(dtype).eps + 1e-12
            torch.testing.assert_close(p.double(), (U * S.clamp(1 - t, 1 + t)) @ Vh, rtol=0, atol=close)
            assert almost_orthogonal(t, p)
            assert AlmostOrthogonal(t).violation(p) == 0.0


def test_nearly_orthogonal_at_inside_and_past_its_limits() -> None:
    c = AlmostOrthogonal(0.25)
    for sigma, excess in (
        (1.25, 0.0),
        (0.75, 0.0),
        (1.5, 0.25),
        (0.5, 0.25),
        (1.25 + 1e-12, 1e-12),
        (0.75 - 1e-12, 1e-12),
    ):
        inside = c.violation(torch.diag(torch.tensor([1.0, sigma])))
        assert inside == pytest.approx(excess, abs=2e-14)
        assert (excess == 0.0) or inside > 0.0
    assert c.violation(torch.diag(torch.tensor([1.25 - 1e-13, 0.75 + 1e-13]))) == 0.0
    assert c.violation(torch.zeros(3, 2)) == pytest.approx(0.75)


def test_what_exact_arithmetic_finds_outside_is_never_called_nearly_orthogonal() -> None:
    inside = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        U, _, Vh = torch.linalg.svd(torch.randn(4, 3, generator=generator), full_matrices=False)
        edge = torch.tensor([1.2, 1.0, 0.8]) + (torch.rand(3, generator=generator) - 0.5) * 2e-14
        x = (U * edge) @ Vh
        if AlmostOrthogonal(0.2).violation(x) == 0.0:
            inside += 1
            assert almost_orthogonal(0.2, x)
    assert inside < 60


def test_the_smallest_singular_value_is_bounded_from_below() -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            for size in (1e-3, 1.0, 100.0):
                x = (size * torch.randn(shape)).to(dtype)
                exact = singular_values(x)[-1]
                bound = smallest_singular_value_lower(x)
                assert mpmath.mpf(bound) <= exact
                assert bound >= float(exact) * (1 - 1e-9) - 1e-7 * float(x.double().norm())
                assert bound == smallest_singular_value_lower(x.mT.contiguous().mT)
    for x in (torch.ones(3, 3), torch.zeros(2, 2)):
        assert 0.0 <= smallest_singular_value_lower(x) <= singular_values(x)[-1]


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-200, 1e200, 1e307])
def test_the_lower_bound_holds_at_every_scale(size: float) -> None:
    x = size * torch.tensor([[2.0, -1.0], [1.0, 3.0], [0.0, 1.0]])
    exact, bound = singular_values(x)[-1], mpmath.mpf(smallest_singular_value_lower(x))
    assert exact * (1 - mpmath.mpf(1e-12)) - 2 * mpmath.mpf(5e-324) <= bound <= exact


def test_the_lower_bound_counts_the_rounding_of_the_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the eigenvalues of the rounded Gram matrix were known exactly."""
    from stableopt.linalg import Bound

    monkeypatch.setattr(module, "log_norm", lambda G, p: Bound.point(-1.0))
    assert smallest_singular_value_lower(torch.eye(3)) < 1.0 - 2.0**-53


def test_a_tolerance_below_the_rounding_of_a_dtype_is_said_in_a_sentence() -> None:
    x = torch.randn(6, 6)
    with pytest.raises(InfeasibleError, match=r"AlmostOrthogonal.*too narrow for torch\.bfloat16 at shape \(6, 6\)"):
        AlmostOrthogonal(1e-4).project(x.bfloat16())
    assert AlmostOrthogonal(1e-4).violation(AlmostOrthogonal(1e-4).project(x.float())) == 0.0
    assert AlmostOrthogonal(1e-10).violation(AlmostOrthogonal(1e-10).project(x)) == 0.0


def test_zero_has_a_valid_projection() -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            assert almost_orthogonal(0.1, AlmostOrthogonal(0.1).project(torch.zeros(shape, dtype=dtype)))


def test_a_tolerance_out_of_range_is_refused() -> None:
    for bad in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match="AlmostOrthogonal needs"):
            AlmostOrthogonal(bad)
    assert from_spec(AlmostOrthogonal(0.3, (-2, -1)).spec()) == AlmostOrthogonal(0.3, (-2, -1))


@pytest.mark.parametrize(
    ("g", "x"),
    [
        (Rank(2), torch.diag(torch.tensor([2.0, 2.0, 0.5]))),
        (Rank(2), torch.diag(torch.tensor([2.0, 2.0 + 1e-9, 0.5, 0.5]))),
        (Rank(1), torch.ones(3, 3)),
        (Rank(1), torch.ones(3, 2) @ torch.ones(2, 4)),
        (AlmostOrthogonal(0.3), torch.eye(3)),
        (AlmostOrthogonal(0.3), 2 * torch.eye(4, 2)),
        (AlmostOrthogonal(0.3), torch.diag(torch.tensor([0.5, 0.5 + 1e-9, 2.0]))),
        (AlmostOrthogonal(0.3), torch.diag(torch.tensor([0.5, 0.5, 2.0])) @ torch.eye(3, 5)),
    ],
    ids=lambda v: repr(v) if not isinstance(v, Tensor) else str(tuple(v.shape)),
)
def test_derivatives_are_right_at_repeated_singular_values(g: Any, x: Tensor) -> None:
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(g.map, x, atol=1e-6)
    assert torch.autograd.gradcheck(g.project, x, atol=1e-6)


def test_a_matrix_of_low_rank_has_the_derivative_of_the_tangent_space() -> None:
    """Returning the tensor itself would pass the whole gradient through."""
    x = torch.diag(torch.tensor([3.0, 0.0])).requires_grad_()
    (grad,) = torch.autograd.grad(Rank(1).project(x).sum(), x)
    torch.testing.assert_close(grad, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert same_bits(Rank(1).project(x), x)


def test_where_a_gap_closes_the_derivative_stays_finite() -> None:
    for x in (torch.eye(3), torch.zeros(3, 3), math.pi * torch.eye(2, 3)):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(Rank(1).map(leaf).sum(), leaf)
        assert grad.isfinite().all()
