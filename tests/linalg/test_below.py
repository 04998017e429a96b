"""The decision that a norm is below a number: never wrong, and as sharp as stated."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from stableopt.linalg import below as module
from stableopt.linalg import spectral_norm
from stableopt.linalg.below import norm_is_below, relative_slack
from tests.linalg import oracle


def check(A: np.ndarray) -> int:
    """Ask just below, at and just above the norm; return how often the answer was yes."""
    norm = spectral_norm(A)
    if norm.upper == 0.0:
        assert norm_is_below(A, 0.0)
        return 1
    yes = 0
    slack = relative_slack(*A.shape)
    for radius in (
        norm.lower * (1 - 1e-9),
        math.nextafter(norm.lower, 0.0),
        norm.lower,
        norm.lower * (1 + slack / 8),
        norm.upper,
        norm.upper * (1 + slack),
    ):
        said = norm_is_below(A, radius)
        yes += said
        # The oracle decides "strictly below": ask it for the next float, which is above a norm equal to the radius.
        assert not said or oracle.norm_is_below(A, math.nextafter(radius, math.inf)), "said True, which is false"
    assert norm_is_below(A, norm.upper * (1 + 1.001 * slack) + 2.0**-1074) or norm.upper < 1e-150
    return yes


def test_true_is_never_said_when_it_is_false() -> None:
    matrices = oracle.nasty_matrices(np.random.default_rng(11), 600, largest=5)
    assert sum(check(A) for A in matrices) > len(matrices)


def test_the_nearest_float_below_the_norm_is_refused() -> None:
    """One rounding error that is not allowed for would show here: the norm is above the radius by less than one part in 1e15."""
    for A in oracle.nasty_matrices(np.random.default_rng(13), 150, largest=5):
        low, high = spectral_norm(A).lower, spectral_norm(A).upper
        if low < 1e-140:
            continue
        while math.nextafter(low, high) < high:  # the oracle says: norm >= low, norm < high
            middle = low + (high - low) / 2
            low, high = (low, middle) if oracle.norm_is_below(A, middle) else (middle, high)
        for radius in (math.nextafter(low, 0.0), low * (1 - 4e-16)):
            assert not norm_is_below(A, radius)


@pytest.mark.slow
def test_true_is_never_said_when_it_is_false_ten_thousand_times() -> None:
    matrices = oracle.nasty_matrices(np.random.default_rng(12), 10_000)
    assert sum(check(A) for A in matrices) > len(matrices)


@pytest.mark.parametrize("shape", [(40, 40), (64, 17), (9, 64), (140, 130)])
@pytest.mark.parametrize("kind", ["gauss", "orthogonal", "constant", "graded"])
def test_the_answer_is_yes_from_the_stated_distance_on(shape: tuple[int, int], kind: str) -> None:
    A = np.random.default_rng(5).standard_normal(shape)
    if kind == "orthogonal":
        U, _, Vh = np.linalg.svd(A, full_matrices=False)
        A = U @ Vh
    elif kind == "constant":
        A = np.ones(shape)
    elif kind == "graded":
        A = A * 10.0 ** np.linspace(-12, 12, shape[1])
    norm = spectral_norm(A)
    slack = relative_slack(*shape)
    assert slack <= 1e-11 or max(shape) > 128
    for X in (A, np.asfortranarray(A), A.T, A[::-1], A[:, ::-1]):  # other layouts and orders of summation
        assert norm_is_below(X, norm.upper / (1 - slack))
    for radius in (norm.lower * (1 - 1e-15), norm.lower * (1 - 1e-6), norm.lower / 2, 0.0):
        assert not norm_is_below(A, radius)


@pytest.mark.parametrize("scale", [2.0**-1070, 2.0**-1022, 1e-250, 2.0**-201, 2.0**-200, 2.0**200, 2.0**201, 1e300])
def test_every_scale(scale: float) -> None:
    A = np.random.default_rng(6).integers(-8, 9, (5, 4)).astype(float) * scale
    norm = spectral_norm(A)
    loose = 1.0 if scale < 1e-300 else 1e-12
    assert norm_is_below(A, norm.upper * (1 + loose) if norm.upper < 1e307 else math.inf)
    assert not norm_is_below(A, norm.lower * (1 - 1e-12))
    assert not norm_is_below(A, 2.0**-1074)
    assert norm_is_below(A, math.nextafter(math.inf, 0.0)) == (norm.upper < 1e307) or scale == 1e300


def test_a_large_norm_is_refused_by_a_rayleigh_quotient_without_a_factorization(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    real = module._factorizes
    monkeypatch.setattr(module, "_factorizes", lambda *a: calls.append(a) or real(*a))
    A = np.random.default_rng(7).standard_normal((160, 150))
    top = np.linalg.norm(A, 2)
    assert not norm_is_below(A, 0.9 * top)
    assert not norm_is_below(A.T, 0.9 * top)
    assert norm_is_below(A, np.linalg.norm(A) * (1 + 1e-9))
    assert norm_is_below(np.eye(200) * (1 - 1e-12), 1.0)  # by row and column sums
    assert not calls
    assert norm_is_below(A, top * (1 + 1e-11))
    assert len(calls) == 1


def test_the_refusal_never_exceeds_the_norm() -> None:
    for A in (np.eye(130), np.zeros((130, 130)), np.random.default_rng(8).standard_normal((140, 130)), np.ones((9, 4))):
        assert module._rayleigh_quotient(A, 2.0) <= np.linalg.norm(A, 2) / 2.0 * (1 + 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_decision_is_about_the_stored_numbers(dtype: torch.dtype, device: torch.device) -> None:
    W = torch.randn(9, 5, device=device).to(dtype)
    norm = spectral_norm(W)
    assert norm_is_below(W, norm.upper * (1 + 1e-13))
    assert norm_is_below(W.requires_grad_(), norm.upper * (1 + 1e-13))
    assert not norm_is_below(W, norm.lower * (1 - 1e-13))


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    norm_is_below(torch.randn(130, 130, generator=torch.Generator().manual_seed(1)), 1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_zero_and_bad_input() -> None:
    for shape in ((0, 3), (3, 0), (2, 2)):
        assert norm_is_below(torch.zeros(shape), 0.0)
    assert norm_is_below(torch.ones(2, 2), math.inf)
    for bad in (math.nan, -1.0):
        with pytest.raises(ValueError, match="radius >= 0"):
            norm_is_below(torch.ones(2, 2), bad)
    with pytest.raises(ValueError, match="NaN or infinite"):
        norm_is_below(torch.tensor([[math.nan]]), 1.0)
    with pytest.raises(TypeError, match="real floating"):
        norm_is_below(torch.ones(2, 2, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (100, 40), (3000, 2000)])
def test_every_error_of_the_proof_is_allowed_for(shape: tuple[int, int]) -> None:
    """The sum of the textbook's bounds, in rational arithmetic; and no more than the stated slack."""
    m, n = shape
    u, tiny = Fraction(1, 2**53), Fraction(1, 2**1074)

    def gamma(k: int) -> Fraction:
        return k * u / (1 - k * u)

    for trace, size, square in (
        (1.0, 1.0, 1.0),
        (n * 0.3, n * 0.3, 0.3),
        (0.0, 5.0, 1.0),
        (7.0, 0.0, 1.0),
        (0.0, 0.0, 1.0),
    ):
        factorization = gamma(n + 1) / (1 - gamma(n + 1)) * Fraction(trace)
        rest = (
            gamma(m) * Fraction(size) + u * Fraction(square) + 4 * n * (2 * n + Fraction(square)) * tiny + m * n * tiny
        )
        allowed = Fraction(module._allowance(m, n, trace, size, square))
        assert allowed >= factorization + rest
        if trace <= n * square and size <= n * square:
            assert allowed <= relative_slack(m, n) * square


def test_the_errors_are_taken_off_the_level_that_is_factorized(monkeypatch: pytest.MonkeyPatch) -> None:
    A = np.random.default_rng(9).standard_normal((6, 5))
    top = np.linalg.norm(A, 2)
    assert norm_is_below(A, 1.01 * top)
    monkeypatch.setattr(module, "_allowance", lambda m, n, trace, size, square: 0.1 * square)
    assert not norm_is_below(A, 1.05 * top)  # 1.05^2 * 0.9 < 1
    assert norm_is_below(A, 1.06 * top)
