"""Laws of proved norms: valid for the stored numbers, as tight as stated, and never silently wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stableopt.linalg import Bound, frobenius_norm, inf_norm, log_norm, one_norm, spectral_norm
from stableopt.linalg.proved import gamma, gram_upper, largest_eigenvalues_upper
from tests.linalg.oracle import log_norm_is_below, nasty_matrices, norm_is_below

SLACK = 1e-9


def check_spectral_norm(A: np.ndarray) -> None:
    bound = spectral_norm(A)
    if not A.any():
        assert bound == Bound.point(0.0)
        return
    above = math.nextafter(bound.upper, math.inf)
    assert norm_is_below(A, above), "the upper end is below the true norm"
    assert not norm_is_below(A, bound.lower), "the lower end is above the true norm"
    assert bound.upper <= bound.lower * (1 + SLACK), "the enclosure is wider than the slack of a certificate"


def test_spectral_norm_encloses_the_exact_norm() -> None:
    for A in nasty_matrices(np.random.default_rng(1), 600):
        check_spectral_norm(A)


@pytest.mark.slow
def test_spectral_norm_encloses_the_exact_norm_of_ten_thousand_matrices() -> None:
    matrices = nasty_matrices(np.random.default_rng(2), 10_000)
    for A in matrices:
        check_spectral_norm(A)
    assert len(matrices) == 10_000


@pytest.mark.parametrize("shape", [(64, 64), (128, 40), (40, 128), (300, 7)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-1040, 1e-40, 1e200])
def test_larger_matrices_and_extreme_scales(shape: tuple[int, int], scale: float) -> None:
    A = np.random.default_rng(3).standard_normal(shape) * scale
    bound = spectral_norm(A)
    reference = np.linalg.norm(A / scale, 2) if scale > 1e-300 else None
    assert bound.proved
    if reference is not None:
        assert bound.upper / scale == pytest.approx(reference, rel=1e-12)
        assert bound.width <= 1e-11 * bound.upper
    else:
        assert 0 < bound.lower <= bound.upper < 1e-305


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_the_stored_numbers(dtype: torch.dtype, device: torch.device) -> None:
    W = torch.randn(9, 5, device=device).to(dtype)
    bound = spectral_norm(W)
    stored = W.detach().cpu().double().numpy()
    assert norm_is_below(stored, math.nextafter(bound.upper, math.inf))
    assert not norm_is_below(stored, bound.lower)


def test_empty_and_zero_matrices_have_norm_zero() -> None:
    for shape in [(0, 3), (3, 0), (0, 0)]:
        for norm in (spectral_norm, frobenius_norm, inf_norm, one_norm):
            assert norm(torch.empty(shape)) == Bound.point(0.0)
    assert spectral_norm(torch.zeros(3, 2)) == Bound.point(0.0)
    assert inf_norm(torch.zeros(3, 2)) == Bound.point(0.0)
    assert log_norm(torch.zeros(2, 2)) == Bound.point(0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", [spectral_norm, frobenius_norm, inf_norm, one_norm, log_norm])
def test_non_finite_entries_are_refused(norm: object, bad: float) -> None:
    W = torch.eye(2)
    W[0, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        norm(W)


def test_wrong_types_and_shapes_are_refused() -> None:
    with pytest.raises(TypeError, match="real floating"):
        spectral_norm(torch.eye(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="real floating"):
        spectral_norm(torch.eye(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="list"):
        spectral_norm([[1.0]])
    with pytest.raises(ValueError, match="2 dimensions"):
        spectral_norm(torch.ones(3))
    with pytest.raises(ValueError, match="square"):
        log_norm(torch.ones(2, 3))
    with pytest.raises(ValueError, match="p = 1, 2 and inf"):
        log_norm(torch.eye(2), 3)


def test_row_sums_and_frobenius_norms_enclose_exact_sums() -> None:
    from fractions import Fraction

    for A in nasty_matrices(np.random.default_rng(4), 200):
        exact = [[abs(Fraction(float(x))) for x in row] for row in A]
        rows = max(sum(row) for row in exact)
        columns = max(sum(row[j] for row in exact) for j in range(A.shape[1]))
        square = sum(x * x for row in exact for x in row)
        frobenius = frobenius_norm(A)
        assert rows in inf_norm(A)
        assert columns in one_norm(A)
        assert Fraction(frobenius.lower) ** 2 <= square <= Fraction(frobenius.upper) ** 2
        assert frobenius.upper <= frobenius.lower * (1 + 1e-13)


def test_log_norm_encloses_the_exact_largest_eigenvalue_of_the_symmetric_part() -> None:
    rng = np.random.default_rng(5)
    for A in nasty_matrices(rng, 300):
        n = min(A.shape)
        square = A[:n, :n] - (rng.integers(0, 3) * np.abs(A).max()) * np.eye(n)
        bound = log_norm(square, 2)
        assert log_norm_is_below(square, math.nextafter(bound.upper, math.inf))
        assert not log_norm_is_below(square, bound.lower)
        assert bound.width <= 1e-12 * max(np.abs(square).max(), 1e-300)


@pytest.mark.parametrize("p", [1, math.inf])
def test_log_norm_is_the_exact_derivative_of_the_norm_for_small_steps(p: float) -> None:
    """‖I + hA‖ = 1 + h μ(A) exactly once h max|a_ii| <= 1 (T3f)."""
    A = torch.randn(6, 6) - 2 * torch.eye(6)
    h = 2.0**-4
    norm = torch.linalg.matrix_norm(torch.eye(6) + h * A, p)
    mu = log_norm(A, p)
    assert float((norm - 1) / h) == pytest.approx(mu.upper, rel=1e-12)
    assert mu.width < 1e-13


def test_a_bad_guess_costs_tightness_never_truth() -> None:
    G = np.eye(4)[None] * np.array([4.0, 2.0])[:, None, None]
    for guess in (0.0, -1e9, 3.9, 4.0, 100.0):
        assert largest_eigenvalues_upper(G, guess=guess) >= 4.0


def test_a_batch_is_bounded_by_its_largest_member() -> None:
    A = np.random.default_rng(6).standard_normal((5, 7, 3))
    largest = max(np.linalg.norm(a, 2) for a in A)
    assert largest * (1 - 1e-14) <= gram_upper(A) <= largest * (1 + 1e-12)
    assert gram_upper(A.transpose(0, 2, 1)) == pytest.approx(largest, rel=1e-12)
    assert gram_upper(np.zeros((2, 3, 3))) == 0.0


def test_gamma_is_rounded_up_and_refuses_endless_sums() -> None:
    from fractions import Fraction

    assert Fraction(gamma(1000)) >= Fraction(1000, 2**53 - 1000)
    with pytest.raises(ValueError, match="too long"):
        gamma(2**53)


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.999, 1.001, 3.0])
def test_the_factorization_is_a_witness_that_nobody_trusts(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the Cholesky routine returns, also for a shift that is too small, the bound stays above the truth."""
    rng = np.random.default_rng(7)
    G = rng.standard_normal((6, 6))
    G = G @ G.T
    G = (G + G.T) / 2
    true = float(np.linalg.eigvalsh(G)[-1])
    genuine = np.linalg.cholesky
    monkeypatch.setattr(np.linalg, "cholesky", lambda M: factor * genuine(M + 2 * true * np.eye(6)))
    for guess in (0.0, true / 2, true):
        assert largest_eigenvalues_upper(G[None], guess=guess) >= true * (1 - 1e-14)


def test_subnormal_results_are_rounded_outwards() -> None:
    """√2 · 2⁻¹⁰⁷⁴ lies between the first and the second positive float."""
    tiny = 2.0**-1074
    bound = spectral_norm(np.full((1, 2), tiny))
    assert bound.lower <= tiny
    assert bound.upper >= 2 * tiny
    assert spectral_norm(np.full((2, 2), 1.5e308)).upper == math.inf
