"""Semidefinite and contracting matrices: exactly symmetric, proved in the storage dtype, nearest."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from stableopt.constraints import from_spec
from stableopt.constraints.symmetric import PSD, Hurwitz, _discs_below, clamp_eigenvalues
from stableopt.errors import InfeasibleError
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import same_bits
from tests.constraints.rows.spectra import between, contracting

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = [1, 2, 3, 5]


def top(S: Tensor) -> float:
    return float(np.linalg.eigvalsh(S.double().numpy())[-1])


@each_dtype
@pytest.mark.parametrize("n", SIZES)
def test_the_projection_clamps_the_eigenvalues_of_the_symmetric_part(n: int, dtype: torch.dtype) -> None:
    for low, high in ((0.0, math.inf), (0.3, 1.5), (-1.0, math.inf), (-2.0, -0.5)):
        x = (2 * torch.randn(n, n)).to(dtype)
        p = PSD(low, high).project(x)
        values, Q = np.linalg.eigh(((x.double() + x.double().mT) / 2).numpy())
        wanted = torch.tensor(Q @ np.diag(values.clip(low, high)) @ Q.T)
        size = 1 + float(np.abs(values).max())
        torch.testing.assert_close(p.double(), wanted, rtol=0, atol=size * (2 * torch.finfo(dtype).eps + 1e-13))
        assert torch.equal(p, p.mT)
        assert between(low, high, p)


def test_the_cone_meets_its_optimality_condition() -> None:
    """The symmetric part minus p is negative semidefinite and orthogonal to p."""
    for n in SIZES:
        x = 3 * torch.randn(n, n)
        p = PSD().map(x)
        rest = (x + x.mT) / 2 - p
        assert top(rest) <= 1e-13
        assert abs(float((rest * p).sum())) <= 1e-12


def test_no_member_is_nearer() -> None:
    for c in (PSD(), PSD(0.2, 1.0), Hurwitz(), Hurwitz(0.7)):
        for n in SIZES:
            x = 2 * torch.randn(n, n)
            p = c.project(x)
            for scale in (1e-3, 0.1, 1.0):
                q = c.project(p + scale * torch.randn(n, n))
                assert float(((x - p) * (q - p)).sum()) <= 1e-12  # the variational inequality


def test_a_singular_projection_gains_a_stated_multiple_of_the_identity() -> None:
    for n, most in ((8, 4e-14), (32, 4e-13)):
        p = PSD().project(torch.randn(n, n))
        assert 0 < np.linalg.eigvalsh(p.numpy())[0] <= most * top(p)
    for dtype in DTYPES[1:]:
        p = PSD().project(torch.randn(16, 16).to(dtype))
        assert np.linalg.eigvalsh(p.double().numpy())[0] <= 0.5 * torch.finfo(dtype).eps * top(p)


@each_dtype
def test_singular_members_are_recognized_where_rows_show_it(dtype: torch.dtype) -> None:
    path = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 1.0]]).to(dtype)  # a graph Laplacian, det 0
    for x in (path, torch.zeros(3, 3, dtype=dtype), torch.diag(torch.tensor([3.0, 0.0]).to(dtype))):
        assert PSD().project(x) is x
        assert Hurwitz().project(-x) is not None
        assert Hurwitz().violation(-x) == 0.0
    assert torch.equal(PSD().project(-torch.eye(3, dtype=dtype)), torch.zeros(3, 3, dtype=dtype))
    ones = torch.ones(3, 3, dtype=dtype)
    assert (
        0.0 < PSD().violation(ones) < 1e-14
    )  # a member that is not diagonally dominant: not provable, so moved by a hair
    decomposed = 64 * 3 * 2.0**-52  # the eigenvalues and vectors of a matrix of norm 3, in float64
    assert float((PSD().project(ones) - ones).abs().max()) <= 2 * torch.finfo(dtype).eps + decomposed


@each_dtype
def test_limits_at_inside_and_past(dtype: torch.dtype) -> None:
    eye = torch.eye(3, dtype=dtype)
    assert PSD(0.5, 2.0).violation(0.5 * eye) == PSD(0.5, 2.0).violation(2 * eye) == 0.0
    below = torch.tensor(0.5 - {2: 2.0**-9, 4: 2.0**-25, 8: 2.0**-54}[eye.element_size()], dtype=dtype)
    assert float(below) < 0.5
    assert 0.0 < PSD(0.5, 2.0).violation(below * eye) <= 0.005
    assert PSD(0.5, 2.0).violation(3 * eye) == pytest.approx(1.0, abs=1e-13)
    assert PSD().violation(-2 * eye) == pytest.approx(2.0, abs=1e-13)
    assert Hurwitz(0.5).violation(-0.5 * eye) == 0.0
    assert 0.0 < Hurwitz(0.5).violation(-below * eye) <= 0.005
    lopsided = eye.clone()
    lopsided[0, 1] = 0.25
    assert PSD().violation(lopsided) == 0.125  # half of what the two entries differ by


def test_the_smallest_asymmetry_counts() -> None:
    x = torch.eye(2)
    x[0, 1] = 5e-324
    assert PSD().violation(x) > 0.0
    p = PSD().project(x)
    assert torch.equal(p, p.mT)


def test_the_discs_are_decided_exactly() -> None:
    """Against rational numbers, within one unit in the last place of equality."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        n = int(torch.randint(1, 5, (), generator=generator))
        A = torch.randn(n, n, generator=generator)
        rows = [[Fraction(v) for v in row] for row in A.tolist()]
        discs = [
            2 * rows[i][i] + sum((abs(rows[i][j] + rows[j][i]) for j in range(n) if j != i), Fraction(0))
            for i in range(n)
        ]
        edge = float(max(discs) / 2)
        for limit in (edge, math.nextafter(edge, 9e9), math.nextafter(edge, -9e9)):
            inside = max(discs) <= 2 * Fraction(limit)
            seen.add(inside)
            assert _discs_below(A, limit) is inside
    assert seen == {True, False}
    assert not _discs_below(torch.full((1, 1), -1e300), 0.0)  # too near the end of the range to be summed


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_the_flow_of_a_member_contracts_at_the_rate(rate: float) -> None:
    for n in SIZES:
        A = Hurwitz(rate).project(3 * torch.randn(n, n))
        assert float(torch.linalg.eigvals(A).real.max()) <= -rate + 1e-14
        for t in (0.01, 0.3, 2.0):
            assert float(torch.linalg.matrix_norm(torch.linalg.matrix_exp(t * A), 2)) <= math.exp(-rate * t) + 1e-13


def test_hurwitz_matrices_with_a_transient_are_not_members_and_theirs_is_no_convex_set() -> None:
    A, B = torch.tensor([[-1.0, 9.0], [0.0, -1.0]]), torch.tensor([[-1.0, 0.0], [9.0, -1.0]])
    assert float(torch.linalg.eigvals(A).real.max()) == -1.0
    assert float(torch.linalg.matrix_norm(torch.linalg.matrix_exp(A), 2)) > 1.0
    assert Hurwitz().violation(A) == pytest.approx(3.5, abs=1e-12)
    assert float(torch.linalg.eigvals((A + B) / 2).real.max()) == pytest.approx(3.5)


@each_dtype
def test_projecting_onto_contracting_matrices_keeps_the_skew_part(dtype: torch.dtype) -> None:
    for rate in (0.0, 0.6):
        x = (2 * torch.randn(4, 4)).to(dtype)
        p = Hurwitz(rate).project(x)
        close = 4 * torch.finfo(dtype).eps * float(x.abs().max()) + 1e-13
        torch.testing.assert_close((p - p.mT).double(), (x - x.mT).double(), rtol=0, atol=4 * close)
        assert contracting(rate, p)
    skew = torch.tensor([[0.0, 0.7], [-0.7, 0.0]], dtype=dtype)
    assert Hurwitz().project(skew) is skew


@pytest.mark.parametrize(
    "x",
    [
        torch.eye(3),
        torch.zeros(3, 3),
        torch.ones(3, 3),
        torch.diag(torch.tensor([1.0, 1.0, -1.0])),
        torch.diag(torch.tensor([1.0, 1.0 + 1e-9, -1.0])),
        torch.diag(torch.tensor([-1.0, -1.0 - 1e-10, 2.0])),
        torch.eye(3) + torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]]),
    ],
    ids=["identity", "zero", "rank one", "two equal", "nearly equal", "two equal cut", "skew added"],
)
def test_derivatives_are_right_at_repeated_eigenvalues(x: Tensor) -> None:
    """The derivative through the eigenvectors is infinite at each of these."""
    x = x.double().requires_grad_()
    for c in (PSD(-0.3), PSD(0.31, 0.93), PSD(-0.4, 5.0), Hurwitz(0.13), Hurwitz(2.1)):
        assert torch.autograd.gradcheck(c.map, x, atol=1e-6)
    for c in (PSD(0.31, 0.93), Hurwitz(0.13)):
        assert torch.autograd.gradcheck(c.project, x, atol=1e-6)


def test_a_member_of_the_cone_has_the_derivative_of_symmetrizing() -> None:
    """Returning the tensor itself would pass a skew gradient through."""
    x = torch.diag(torch.tensor([3.0, 1.0])).requires_grad_()
    (grad,) = torch.autograd.grad((PSD().project(x) * torch.tensor([[1.0, 4.0], [0.0, 1.0]])).sum(), x)
    torch.testing.assert_close(grad, torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    assert same_bits(PSD().project(x), x)


def test_at_a_kink_the_slope_is_one() -> None:
    x = torch.diag(torch.tensor([2.0, 0.5])).requires_grad_()
    one = torch.tensor(0.5)
    (grad,) = torch.autograd.grad(clamp_eigenvalues(x, one, 4 * one)[1, 1], x)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


def test_what_a_dtype_cannot_hold_is_said_in_a_sentence() -> None:
    with pytest.raises(InfeasibleError, match=r"too narrow for torch\.bfloat16"):
        PSD(0.1002, 0.1003).project(torch.zeros(2, 2, dtype=torch.bfloat16))
    with pytest.raises(InfeasibleError, match=r"Hurwitz.*float16"):
        Hurwitz(1e5).project(torch.zeros(2, 2, dtype=torch.float16))
    with pytest.raises(InfeasibleError, match="PSD"):
        PSD(1e5).project(torch.zeros(2, 2, dtype=torch.float16))
    assert PSD(0.1002, 0.1003).violation(PSD(0.1002, 0.1003).project(torch.zeros(2, 2))) == 0.0
    assert Hurwitz(6e4).violation(Hurwitz(6e4).project(torch.zeros(2, 2, dtype=torch.float16))) == 0.0


@each_dtype
@pytest.mark.parametrize("limit", [1e-320, 1e-200, 1e-30, 1e30, 1e200, 1e307])
def test_projecting_ends_at_every_scale(limit: float, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor([[1.0, -2.0], [0.5, 1.0]])
    for size in (info.max / 2, 1.0, info.smallest_normal * info.eps):
        a = (size * x).to(dtype)
        for c in (PSD(0.0, limit), PSD(-limit), Hurwitz(limit if limit < info.max / 4 else 0.0)):
            p = c.project(a)
            assert p.isfinite().all()
            assert c.violation(p) == 0.0
            assert same_bits(c.project(p), p)
        assert between(0.0, limit, PSD(0.0, limit).project(a))


@each_dtype
def test_a_projection_beyond_the_range_of_the_dtype_is_pulled_inside_it(dtype: torch.dtype) -> None:
    """The exact one has an entry of 1.2 times the largest number."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).to(dtype) * torch.finfo(dtype).max
    p = PSD().project(x)
    assert p.isfinite().all()
    assert between(0.0, math.inf, p)
    assert float(p[0, 0]) > 0.4 * torch.finfo(dtype).max
    assert PSD().map(x.double()).isfinite().all()


@pytest.mark.parametrize("c", [PSD(), Hurwitz()], ids=repr)
def test_other_shapes_are_refused_with_advice(c: PSD | Hurwitz) -> None:
    for call in (c.project, c.violation, c.map, c.parametrization):
        with pytest.raises(ValueError, match=r"square matrices, got 2 x 3; for other shapes use SpectralBall"):
            call(torch.ones(2, 3))


def test_the_limits_are_checked_and_travel() -> None:
    for low, high in ((1.0, 1.0), (1.0, 0.0), (0.0, math.nan), (math.inf, math.inf), (-math.inf, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="PSD needs"):
            PSD(low, high)
    for bad in ("0", None, True):
        with pytest.raises(TypeError, match="PSD needs a real number"):
            PSD(bad)  # type: ignore[arg-type]
    assert from_spec(PSD().spec()) == PSD()
    assert PSD().spec() == {"name": "PSD", "low": 0.0, "high": "inf", "dims": None}
    assert from_spec(Hurwitz(0.2, (-2, -1)).spec()) == Hurwitz(0.2, (-2, -1))
