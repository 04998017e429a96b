"""The norm proofs of the verifier against exact rational arithmetic and against the matrices of the operators."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.certify.verifier import convolution, numbers
from stableopt.linalg import conv_symbol_norm, spectral_norm
from tests.certify.oracle import norm_is_at_most, operator_matrix

U = 2.0**-53


def conv_at_most(weight: np.ndarray, groups: int, limit: Fraction, *, exact: bool = False) -> bool:
    """For images of every size: on a sample of 8k frequencies per axis."""
    grid = [(8 * k, True) if k > 1 else (1, False) for k in weight.shape[2:]]
    return convolution.conv_at_most(weight, groups, limit, grid, exact=exact)


def nasty(kind: str, m: int, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((m, n))
    if kind == "rank1":
        A = np.outer(A[:, 0], A[0])
    elif kind == "constant":
        A = np.full((m, n), 0.1)
    elif kind == "columns":
        A = A * 10.0 ** rng.integers(-12, 12, n)
    elif kind == "orthogonal":
        A = np.linalg.qr(rng.standard_normal((max(m, n), max(m, n))))[0][:m, :n]
    elif kind == "sparse":
        A = A * (rng.random((m, n)) < 0.3)
    return A


@settings(max_examples=150)
@given(
    st.sampled_from(["gauss", "rank1", "constant", "columns", "orthogonal", "sparse"]),
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([0, 0, -300, -140, -100, 100, 150, 250]),
)  # fmt: skip
@example("gauss", 3, 3, 0, -307)
@example("constant", 1, 1, 0, 0)
def test_what_is_proved_is_true_and_what_has_slack_is_proved(kind: str, m: int, n: int, seed: int, scale: int) -> None:
    A = nasty(kind, m, n, seed) * 10.0**scale
    norm = spectral_norm(A).upper
    for slack in (1e-9, 1e-12, 1e-14, 4e-16, 0.0, -2e-16, -1e-15, -1e-13, -1e-8):
        limit = Fraction(norm) * (1 + Fraction(slack))
        if numbers.norm_at_most(A[None], limit):
            assert norm_is_at_most(A, limit), (slack, A)
        else:
            assert slack < 1e-11 or norm == 0.0


def test_the_oracle_knows_a_norm_by_heart() -> None:
    A = np.array([[3.0, 0.0], [4.0, 0.0]])
    assert norm_is_at_most(A, Fraction(5))
    assert not norm_is_at_most(A, Fraction(5) - Fraction(1, 10**30))


@pytest.mark.parametrize("scale", [-1074, -1060, -1000, 0, 900, 1023])
def test_the_proof_is_scale_free(scale: int) -> None:
    A = np.array([[1.0, 1.0], [1.0, 0.0]]) * math.ldexp(1.0, scale)  # norm: the golden ratio
    golden = Fraction(1618033988749894848205, 10**21) * Fraction(2) ** scale
    assert numbers.norm_at_most(A[None], golden * (1 + Fraction(1, 10**12)))
    assert not numbers.norm_at_most(A[None], golden * (1 - Fraction(1, 10**15)))


def test_zero_needs_no_proof_and_nothing_is_below_zero() -> None:
    assert numbers.norm_at_most(np.zeros((1, 2, 3)), Fraction(0))
    assert not numbers.norm_at_most(np.full((1, 1, 1), 5e-324), Fraction(0))
    assert not numbers.norm_at_most(np.ones((1, 1, 1)), Fraction(-5))


def test_a_stack_is_judged_by_its_worst_matrix() -> None:
    stack = np.stack([np.eye(3), 1.001 * np.eye(3), np.zeros((3, 3))])
    assert numbers.norm_at_most(stack, Fraction(10011, 10000))
    assert not numbers.norm_at_most(stack, Fraction(1))


@pytest.mark.parametrize("witness", [0.0, 1e-3, 0.5, 1.0, 10.0, 1e9])
def test_no_witness_can_prove_what_is_false(monkeypatch: pytest.MonkeyPatch, witness: float) -> None:
    """The factorisation is not trusted: whatever it returns, a norm of 2 is not proved to be 1.99 (nor 1.9999999)."""
    A = np.diag([2.0, 1.0, 0.5])[None]
    for limit in (Fraction(199, 100), Fraction(2) - Fraction(1, 10**7)):
        honest = np.linalg.cholesky(5.0 * np.eye(3)[None])
        monkeypatch.setattr(np.linalg, "cholesky", lambda M, h=honest: witness * h)
        assert not numbers.norm_at_most(A, limit)
        monkeypatch.setattr(np.linalg, "cholesky", lambda M: np.sqrt(np.maximum(M, 0.0)) * witness)
        assert not numbers.norm_at_most(A, limit)
        monkeypatch.undo()


def test_the_rounding_of_the_gram_matrix_is_counted() -> None:
    """Columns of +-1/64 that are exactly orthogonal: nothing rounds, but the proof may not know that."""
    signs = np.array([[(-1.0) ** (i & j).bit_count() for j in range(4)] for i in range(4096)])
    A = signs / 64.0
    a_priori = Fraction(4096 * 4, 2**53)  # gamma_m ||A||_F^2
    assert numbers.gram_matrix(A[None])[1] >= a_priori
    assert not numbers.norm_at_most(A[None], Fraction(math.sqrt(1 + float(a_priori) * 0.95)))
    assert numbers.norm_at_most(A[None], Fraction(math.sqrt(1 + float(a_priori) * 1.2)))


@pytest.mark.parametrize("n", [1, 2, 16, 512])
def test_the_rounding_of_the_residual_is_counted(n: int) -> None:
    exact = np.eye(n)[None]
    a_priori = Fraction(n * n, 2**53) + Fraction(1, 2**53)  # gamma_n ||R||_F^2 and one rounding of the diagonal
    assert a_priori <= numbers.defect(0.0 * exact, 1.0) <= a_priori * Fraction(1001, 1000)


@pytest.mark.parametrize("transpose", [False, True])
def test_the_residual_is_bounded_by_rows_and_columns(monkeypatch: pytest.MonkeyPatch, transpose: bool) -> None:
    """A witness product that is not symmetric, as a strange library may return it: both sums count."""
    n = 8
    spike = np.zeros((1, n, n))
    spike[0, 0] = 1.0
    spike = spike.transpose(0, 2, 1) if transpose else spike
    true = np.linalg.norm(spike[0], 2)
    monkeypatch.setattr(np.linalg, "cholesky", np.zeros_like)
    assert numbers.defect(spike, 0.0) >= Fraction(true)


def test_cosines_and_sines_are_right_to_thirty_digits() -> None:
    mpmath.mp.dps = 60
    for denominator in (1, 2, 3, 8, 24, 280, 2048):
        for numerator in range(0, denominator, max(1, denominator // 40)):
            cosine, sine = convolution._cos_sin(numerator, denominator)
            angle = 2 * mpmath.pi * numerator / denominator
            for ours, true in ((cosine, mpmath.cos(angle)), (sine, mpmath.sin(angle))):
                assert abs(mpmath.mpf(ours.numerator) / ours.denominator - true) < mpmath.mpf(2) ** -120


def test_roots_are_rounded_up_and_tight() -> None:
    assert numbers.root_up(Fraction(0)) == 0
    for value in (Fraction(2), Fraction(1, 3**50), Fraction(10**40), Fraction(1, 10**200)):
        root, part = numbers.root_up(value), min(value, Fraction(1))
        assert (root - part / 2**201) ** 2 >= value
        assert root**2 <= value * (1 + Fraction(1, 2**190)) + Fraction(1, 2**300) * (value > 1)


# ------------------------------------------------------------------------------------------------------------ convolutions


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    dims = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 4 if dims == 2 else 6)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    mode = draw(st.sampled_from(["zeros", "circular"]))
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, s // 2 if mode == "circular" else s + 1)) for s in spans)
    shape = tuple(
        draw(st.integers(max(s + 1 - 2 * p, p, 1), max(s + 1, 8 if dims == 1 else 6)))
        for s, p in zip(spans, padding, strict=True)
    )
    inside, outside = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    torch.manual_seed(draw(st.integers(0, 10**6)))
    layer = kind(groups * inside, groups * outside, kernel, stride, padding, dilation, groups, False, mode)
    return layer, (groups * inside, *shape)


@settings(max_examples=120)
@given(convolutions())
def test_the_norm_of_the_operator_is_never_above_what_is_proved(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    true = np.linalg.norm(operator_matrix(layer, shape), 2)
    weight = layer.weight.detach().numpy()
    assert not conv_at_most(weight, layer.groups, Fraction(float(true) * (1 - 1e-9)))
    claim = conv_symbol_norm(layer.weight, groups=layer.groups).upper * (1 + 1e-9)
    assert claim >= true
    assert conv_at_most(weight, layer.groups, Fraction(claim))


def test_a_peak_between_the_grid_points_is_not_missed() -> None:
    kernel = np.array([[[1.0, 0.5, -0.8]]])
    omega = np.linspace(0, math.pi, 400_001)
    peak = np.abs(np.exp(1j * omega[:, None] * np.arange(3)) @ kernel[0, 0]).max()
    assert not conv_at_most(kernel, 1, Fraction(peak * (1 - 1e-9)))
    assert conv_at_most(kernel, 1, Fraction(peak * 1.03))


def test_the_bound_exceeds_the_supremum_by_at_most_the_secants() -> None:
    kernel = np.ones((1, 1, 3, 3)) / 9.0  # its symbol is 1 at frequency 0
    secants = 1.0 / math.cos(math.pi / 24) ** 2
    assert conv_at_most(kernel, 1, Fraction(secants * (1 + 1e-12)))
    assert not conv_at_most(kernel, 1, Fraction(secants * (1 - 1e-12)))


def test_the_rounding_of_the_symbol_is_counted() -> None:
    taps = 256
    kernel = np.full((1, 1, taps), 1.0 / taps)
    secant = 1 / (convolution._cos_sin(taps - 1, 4 * 8 * taps)[0])
    a_priori = Fraction(3, 2) * (numbers.gamma(taps) + 2 * numbers.U)
    assert not conv_at_most(kernel, 1, secant * (1 + a_priori * Fraction(99, 100)))
    assert conv_at_most(kernel, 1, secant * (1 + 2 * a_priori))


def test_groups_are_judged_by_the_worst_group() -> None:
    weight = np.zeros((4, 1, 3))
    weight[3, 0, 1] = 2.0
    weight[0, 0, 1] = 1.0
    assert not conv_at_most(weight, 4, Fraction(199, 100))
    assert conv_at_most(weight, 4, Fraction(204, 100))
    stacked = np.ones((2, 1, 1))  # as two groups 1, as one group (two outputs of one input) sqrt 2
    assert conv_at_most(stacked, 2, Fraction(1 + 1e-12))
    assert not conv_at_most(stacked, 1, Fraction(141, 100))


def test_all_frequencies_of_two_axes_are_on_the_grid() -> None:
    """A plane wave e^{i(x - y)} needs opposite signs of the two frequencies: only the first axis may be halved."""
    kernel = np.zeros((1, 1, 4, 4))
    for i in range(4):
        for j in range(4):
            kernel[0, 0, i, j] = math.cos(2 * math.pi * (i - j) / 8)
    layer = nn.Conv2d(1, 1, 4, padding=3, bias=False)
    layer.weight.data = torch.from_numpy(kernel)
    true = float(np.linalg.norm(operator_matrix(layer, (1, 14, 14)), 2))
    assert not conv_at_most(kernel, 1, Fraction(true * (1 - 1e-9)))


def test_padding_and_stride_keep_the_bound_of_the_symbol() -> None:
    """Circular padding beyond dilation (k - 1)/2 repeats outputs: there the bound is false, so it must be refused elsewhere."""
    layer = nn.Conv1d(1, 1, 1, padding=3, padding_mode="circular", bias=False)
    layer.weight.data.fill_(1.0)
    true = np.linalg.norm(operator_matrix(layer, (1, 3)), 2)
    assert conv_at_most(layer.weight.detach().numpy(), 1, Fraction(1001, 1000))
    assert true == pytest.approx(math.sqrt(3.0))
