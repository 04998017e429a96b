"""The retraction onto the orthogonal matrices: the theorem exactly, the stored numbers against rational arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import flint
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stableopt.constraints import Orthogonal
from stableopt.constraints.retraction import (
    _SERIES,
    _Gram,
    orthogonality_residual,
    polar_retraction,
    stated_tolerance,
)
from stableopt.linalg import spectral_norm
from stableopt.linalg.below import norm_is_below
from stableopt.nn import constrain, parameter_groups
from stableopt.optim import SGD
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import same_bits

SHAPES = [(3, 3), (5, 2), (2, 5), (1, 4), (4, 1), (1, 1), (12, 9)]
TINY = 2.0**-90
CASES = [
    (dtype, radius) for dtype in DTYPES for radius in (0.5, 1.0, 3.0, TINY) if (dtype, radius) != (DTYPES[-1], TINY)
]
each_case = pytest.mark.parametrize(("dtype", "radius"), CASES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Shape = tuple[int, int]


# --- oracles ---------------------------------------------------------------------------------------------------------


def exactly(value: float) -> flint.fmpq:
    return flint.fmpq(*value.as_integer_ratio())


def exact_gram(x: Tensor) -> list[list[flint.fmpq]]:
    """Return the Gram matrix of the shorter side of the stored matrix, without rounding."""
    rows = [[exactly(v) for v in row] for row in x.detach().double().cpu().tolist()]
    A = flint.fmpq_mat(rows)
    G = A.transpose() * A if len(rows) >= len(rows[0]) else A * A.transpose()
    return G.tolist()


def is_definite(S: list[list[flint.fmpq]], factor: int = 1, shift: flint.fmpq | int = 0) -> bool:
    """Decide whether ``factor * S + shift * I`` is positive definite: the pivots of rational elimination are positive."""
    n = len(S)
    M = [[factor * S[i][j] + (shift if i == j else 0) for j in range(n)] for i in range(n)]
    for k in range(n):
        if not M[k][k] > 0:
            return False
        for i in range(k + 1, n):
            quotient = M[i][k] / M[k][k]
            for j in range(i, n):
                M[i][j] -= quotient * M[k][j]
                M[j][i] = M[i][j]
    return True


def is_shorter(x: Tensor, radius: float) -> bool:
    """Decide whether the spectral norm of the stored numbers is below the radius."""
    return is_definite(exact_gram(x), -1, exactly(radius) ** 2)


def is_longer(x: Tensor, square: float, radius: float = 1.0) -> bool:
    """Decide whether the square of every singular value is above ``square * radius**2``."""
    return is_definite(exact_gram(x), 1, -exactly(square) * exactly(radius) ** 2)


def is_bounded(x: Tensor, bound: float, radius: float = 1.0) -> bool:
    """Decide whether ``bound`` exceeds the spectral norm of ``W.T W / r**2 - I``."""
    square, G = exactly(radius) ** 2, exact_gram(x)
    return is_definite(G, -1, square * (1 + exactly(bound))) and is_definite(G, 1, square * (exactly(bound) - 1))


def slack(shape: Shape) -> float:
    return (min(shape) * (sum(shape) + 24) + 16) * 2.0**-53


def tolerance(shape: Shape, dtype: torch.dtype) -> float:
    """Return what :class:`Orthogonal` states, letter by letter."""
    eps, N = torch.finfo(dtype).eps, max(shape)
    computed = eps if dtype == torch.float64 else 2.0**-23
    return min(4 * eps * math.sqrt(N), 1 / 4) + 8 * computed * N + 8 * slack(shape)


def kept(shape: Shape, dtype: torch.dtype) -> float:
    """Return within which distance a matrix stays as it is."""
    eps = torch.finfo(dtype).eps
    return min(tolerance(shape, dtype), 4 * eps * math.sqrt(max(shape)) + 32 * eps + 16 * slack(shape))


def polar(x: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(x.detach().double().cpu(), full_matrices=False)
    return U @ Vh


def with_values(sigma: Tensor, shape: Shape) -> Tensor:
    """Return a matrix with these singular values and random singular vectors."""
    U, V = (polar(torch.randn(size, len(sigma))) for size in shape)
    return U * sigma @ V.mT


def near(shape: Shape, dtype: torch.dtype, size: float, radius: float = 1.0) -> Tensor:
    """Return a matrix at this relative distance, in the spectral norm, from one on the set, rounded."""
    noise = torch.randn(shape)
    return (radius * (polar(torch.randn(shape)) + size * noise / torch.linalg.matrix_norm(noise, 2))).to(dtype)


def check_member(x: Tensor, W: Tensor | None, radius: float = 1.0) -> Tensor:
    """Assert everything that is promised of a result but that it is near to x, and return it."""
    assert W is not None
    assert (W.shape, W.dtype, W.device) == (x.shape, x.dtype, x.device)
    assert W.is_contiguous()
    assert is_shorter(W, radius)
    assert spectral_norm(W).upper <= radius
    assert norm_is_below(W, radius)
    assert is_longer(W, 1.0 - tolerance((x.shape[0], x.shape[1]), x.dtype), radius)
    assert polar_retraction(W, radius) is W
    for again in (W.clone(), W.mT.contiguous().mT):
        assert polar_retraction(again, radius) is again
    return W


def check(x: Tensor, W: Tensor | None, radius: float = 1.0, *, precise: bool = False) -> None:
    """Assert everything that is promised of the result for x; precise where the series leaves less than the rounding."""
    apart = torch.linalg.matrix_norm(check_member(x, W, radius).double().cpu() / radius - polar(x), 2)
    shape, eps = (x.shape[0], x.shape[1]), torch.finfo(x.dtype).eps
    precision = 4 * eps + 4 * max(slack(shape), 2.0**-48)
    assert float(apart) <= (precision if precise else kept(shape, x.dtype) / 2 + 2 * eps)


# --- the theorem in exact arithmetic ---------------------------------------------------------------------------------


def series(d: int) -> list[Fraction]:
    return [Fraction(math.comb(2 * k, k), 4**k) for k in range(d + 1)]


def product(a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
    total = [Fraction(0)] * (len(a) + len(b) - 1)
    for i, u in enumerate(a):
        for j, v in enumerate(b):
            total[i + j] += u * v
    return total


def value(coefficients: list[Fraction], e: Fraction) -> Fraction:
    return sum((c * e**k for k, c in enumerate(coefficients)), Fraction(0))


def residual_of(d: int) -> list[Fraction]:
    """Return the coefficients of ``r_d(e) = 1 - (1 - e) p_d(e)**2``."""
    r = [-c for c in product([Fraction(1), Fraction(-1)], product(series(d), series(d)))]
    return [1 + r[0], *r[1:]]


def test_the_stored_coefficients_are_those_of_the_binomial_series() -> None:
    assert [Fraction(a) for a in _SERIES] == series(4)[1:]


@pytest.mark.parametrize("d", range(9))
def test_the_residual_of_degree_d_is_a_power_series_with_nonnegative_coefficients_of_sum_one(d: int) -> None:
    r, p = residual_of(d), series(d)
    assert r[: d + 1] == [0] * (d + 1)
    assert r[d + 1] == 2 * series(d + 1)[-1] > 0
    assert min(r) >= 0
    assert sum(r) == 1
    slope = [k * c for k, c in enumerate(r)][1:]
    assert slope == [Fraction(0)] * d + [(2 * d + 1) * p[d] * c for c in p]  # r' = (2d+1) a_d e^d p_d


@pytest.mark.parametrize("d", range(9))
def test_the_residual_is_at_most_the_power_d_plus_one_and_not_the_next(d: int) -> None:
    r, p = residual_of(d), series(d)
    for k in range(1, 17):
        delta = Fraction(k, 16)
        for j in range(-4, 5):
            e = delta * j / 4
            assert abs(value(r, e)) <= value(r, delta) <= delta ** (d + 1)
            assert value(p, e) > 0
    assert value(r, Fraction(1)) == 1  # equality at the end of the interval
    for delta in (Fraction(1, 100), Fraction(1, 10**6)):
        assert value(r, delta) > r[d + 1] * delta ** (d + 1) * Fraction(99, 100)
        assert value(r, delta) > delta ** (d + 2)
        assert abs(value(r, -delta)) > delta ** (d + 2)


@pytest.mark.parametrize("degree", [0, 1, 2, 4])
@pytest.mark.parametrize("radius", [1.0, 3.0, TINY])
def test_a_correction_of_degree_d_leaves_the_residual_of_the_theorem(degree: int, radius: float) -> None:
    e = torch.tensor([0.85, 0.5, 0.1, 1e-3, 0.0, -1e-3, -0.1, -0.5, -0.85])
    X = radius * with_values((1 - e).sqrt(), (11, 9))
    correction, root = _Gram(X, radius).correction(degree, torch.float64)
    Y = X + correction
    expected = torch.tensor([float(value(residual_of(degree), Fraction(v))) for v in e.tolist()])
    found = 1 - torch.linalg.svdvals(Y / radius).square()
    torch.testing.assert_close(found.sort()[0], expected.sort()[0], rtol=0, atol=1e-14)
    assert float(found.abs().max()) <= 0.85 ** (degree + 1) + 1e-14
    torch.testing.assert_close(polar(Y), polar(X), rtol=0, atol=1e-13)
    if degree >= 2:
        assert 0.85 - 1e-14 <= float(root) <= 0.85 * 9**0.25
    else:
        assert float(root) == math.inf


# --- next to the set -------------------------------------------------------------------------------------------------


@each_case
@each_shape
def test_the_result_is_next_to_the_polar_factor_with_a_proved_norm(
    shape: Shape, dtype: torch.dtype, radius: float, device: torch.device
) -> None:
    for size in (0.1, 1e-2, 1e-4, 1e-9):
        x = near(shape, dtype, size, radius).to(device)
        before = x.clone()
        check(x, polar_retraction(x, radius), radius, precise=size <= 1e-4)
        assert same_bits(x, before)


dtypes_and_radii = st.sampled_from(CASES)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 2**31)


@given(shape=shapes, case=dtypes_and_radii, digits=st.floats(2.0, 53.0), seed=seeds)
@example(shape=(1, 1), case=(torch.float64, 1.0), digits=2.0, seed=0)
@example(shape=(6, 6), case=(torch.bfloat16, 3.0), digits=2.0, seed=1)
@example(shape=(6, 1), case=(torch.float16, 0.5), digits=50.0, seed=2)
def test_every_step_of_a_quarter_or_less_comes_back(
    shape: Shape, case: tuple[torch.dtype, float], digits: float, seed: int
) -> None:
    torch.manual_seed(seed)
    dtype, radius = case
    x = near(shape, dtype, 2.0**-digits, radius)
    before = x.clone()
    check(x, polar_retraction(x, radius), radius)
    assert same_bits(x, before)


@given(shape=shapes, digits=st.floats(2.0, 40.0), exponent=st.integers(-99, 98), seed=seeds)
def test_a_power_of_two_and_a_transposition_pass_through_bit_for_bit(
    shape: Shape, digits: float, exponent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = near(shape, torch.float64, 2.0**-digits, 1.5)
    W = polar_retraction(x, 1.5)
    assert W is not None
    scaled = polar_retraction(2.0**exponent * x, 1.5 * 2.0**exponent)
    assert scaled is not None
    assert same_bits(scaled, 2.0**exponent * W)
    if shape[0] != shape[1]:
        turned = polar_retraction(x.mT, 1.5)
        assert turned is not None
        assert turned.is_contiguous()
        assert same_bits(turned.mT, W)


@each_dtype
def test_strides_and_gradients_of_the_input_do_not_matter(dtype: torch.dtype) -> None:
    x = near((6, 4), dtype, 0.03)
    W = polar_retraction(x)
    assert W is not None
    for other in (x.mT.contiguous().mT, x.repeat(1, 2)[:, :4], x.clone().requires_grad_()):
        before = other.detach().clone()
        result = polar_retraction(other)
        assert result is not None
        assert result.is_contiguous()
        assert not result.requires_grad
        assert same_bits(result, W)
        assert same_bits(other, before)


def householder(n: int) -> Tensor:
    return torch.eye(n) - 2.0 / n * torch.ones(n, n)


@pytest.mark.parametrize(
    ("dtype", "radius"), [(torch.bfloat16, 1.34), (torch.float16, 1.12), (torch.float32, 1.24)], ids=str
)
def test_rounding_that_conspires_to_expand_is_noticed_and_answered(dtype: torch.dtype, radius: float) -> None:
    """The entries of this matrix repeat, so do their rounding errors, and together they outweigh the first margin."""
    eps = torch.finfo(dtype).eps
    x = (radius * torch.kron(householder(5), householder(7))).to(dtype)
    first = (radius * polar(x) * (1.0 - eps - 2.5 * slack((35, 35)))).to(dtype)
    assert spectral_norm(first).lower > radius * (1 + eps / 2)
    W = polar_retraction(x, radius)
    assert W is not None
    assert spectral_norm(W).upper <= radius
    assert is_shorter(W, radius)
    assert float((torch.linalg.svdvals(W.double()) / radius - 1.0).abs().max()) <= 4 * eps
    assert polar_retraction(W, radius) is W


def test_what_one_round_leaves_outside_of_the_ball_is_taken_away() -> None:
    """For a small e below 0 the norm still exceeds 1 after a round, by about a quarter of delta^5, within the tolerance."""
    e = Fraction(-6, 100)
    left = -value(residual_of(4), e)
    assert 2.5 * torch.finfo(torch.float32).eps < left < tolerance((8, 8), torch.float32)
    x = (math.sqrt(1 - e) * polar(torch.randn(8, 8))).float()
    check(x, polar_retraction(x))


def test_a_matrix_of_several_blocks_of_columns_is_judged_by_all_of_them(device: torch.device) -> None:
    """Above 512 columns half of the Gram matrix is mirrored."""
    x = near((530, 520), torch.float64, 1e-3).to(device)
    W = polar_retraction(x)
    assert W is not None
    assert norm_is_below(W, 1.0)
    bound = orthogonality_residual(x)
    S = x.mT @ x - torch.eye(520, device=device)
    mean = float(S.diagonal().mean())
    S.diagonal().sub_(mean)
    assert bound == pytest.approx(float(S.norm()) + abs(mean), rel=1e-6)
    torch.testing.assert_close(W.cpu(), polar(x), rtol=0, atol=1e-9)


# --- members ---------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(3, 3), (7, 3), (2, 5), (1, 1)], ids=str)
def test_the_tolerance_is_the_stated_one(shape: Shape, dtype: torch.dtype) -> None:
    assert stated_tolerance(torch.zeros(shape, dtype=dtype)) == pytest.approx(tolerance(shape, dtype), rel=1e-12)
    big = torch.zeros(1, 1, dtype=dtype).expand(5000, 8)
    assert stated_tolerance(big) == pytest.approx(tolerance((5000, 8), dtype), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (2, 6), (5, 1), (16, 16)], ids=str)
@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_matrix_is_kept_up_to_what_rounding_explains_and_moved_past_it(
    shape: Shape, dtype: torch.dtype, all_of_them: bool
) -> None:
    edge, top = kept(shape, dtype), 1 - 2.5 * slack(shape) - torch.finfo(dtype).eps
    for factor, stays in ((0.3, True), (0.93, True), (1.07, False), (3.0, False)):
        x = top * torch.eye(*shape)
        low = math.sqrt(1 - factor * edge)
        x[0, 0] = low
        if all_of_them:
            x.diagonal().fill_(low)
        x = x.to(dtype)
        W = polar_retraction(x)
        assert (W is x) is stays
        assert is_longer(x, 1 - edge) is stays
        if not stays:
            check(x, W)


@each_dtype
def test_a_matrix_that_expands_is_not_kept_however_little(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for excess in (eps, 2 * eps, 8 * eps):
        x = torch.eye(4, 3, dtype=dtype)
        x[0, 0] += excess
        assert not is_shorter(x, 1.0)
        W = polar_retraction(x)
        assert W is not x
        check(x, W)
    x = (1 - eps) * torch.eye(4, 3, dtype=dtype) if dtype != torch.float64 else (1 - slack((4, 3))) * torch.eye(4, 3)
    assert polar_retraction(x) is x


@given(shape=shapes, case=dtypes_and_radii, units=st.floats(-6.0, 6.0), noise=st.floats(0.0, 6.0), seed=seeds)
def test_what_is_kept_is_a_member_in_exact_arithmetic(
    shape: Shape, case: tuple[torch.dtype, float], units: float, noise: float, seed: int
) -> None:
    torch.manual_seed(seed)
    dtype, radius = case
    eps = torch.finfo(dtype).eps
    x = ((1 - units * eps) * radius * (polar(torch.randn(shape)) + noise * eps * torch.randn(shape))).to(dtype)
    if polar_retraction(x, radius) is x:
        assert is_shorter(x, radius)
        assert is_longer(x, 1.0 - tolerance(shape, dtype), radius)
    else:
        check(x, polar_retraction(x, radius), radius)


@given(
    shape=shapes,
    radius=st.sampled_from([1.0, 0.7, 3.0, TINY]),
    hair=st.sampled_from([0.0, 2.0**-48, 1e-3]),
    units=st.floats(-60.0, 60.0),
    seed=seeds,
)
def test_the_proof_of_the_norm_is_valid_and_succeeds_at_its_distance(
    shape: Shape, radius: float, hair: float, units: float, seed: int
) -> None:
    """For every matrix near the limit: proved implies true, and shorter by more than the slack implies proved."""
    torch.manual_seed(seed)
    m, n = max(shape), min(shape)
    A = radius * (1 - hair) * (1 - units * 2.0**-52) * polar(torch.randn(m, n))
    proved = float(_Gram(A, radius).exceeds(hair)) == 0.0
    limit = flint.fmpq(1) - exactly(hair)
    assert not proved or is_definite(exact_gram(A), -1, (limit * exactly(radius)) ** 2)
    shorter = limit * (1 - exactly(slack(shape)) - flint.fmpq(1, 2**50))
    assert proved or not is_definite(exact_gram(A), -1, (shorter * exactly(radius)) ** 2)


@given(
    shape=shapes,
    radius=st.sampled_from([1.0, 0.7, 3.0, TINY]),
    low=st.sampled_from([1e-14, 1e-6, 0.3]),
    units=st.floats(-120.0, 120.0),
    seed=seeds,
)
def test_the_proof_from_below_is_valid_and_succeeds_at_its_distance(
    shape: Shape, radius: float, low: float, units: float, seed: int
) -> None:
    torch.manual_seed(seed)
    m, n = max(shape), min(shape)
    sigma = torch.ones(n)
    sigma[0] = math.sqrt(1 - low)
    A = radius * (1 - units * 2.0**-52) * with_values(sigma, (m, n))
    gram = _Gram(A, radius)
    proved = gram.is_close(gram.facts(), low)
    assert not proved or is_longer(A, 1.0 - low, radius) or is_bounded(A, low, radius)
    assert proved or not is_longer(A, 1.0 - low + 3 * slack(shape), radius)


def test_sums_that_are_all_rounded_down_do_not_deceive_the_proofs() -> None:
    """A long column of equal numbers: its computed square is too small by up to hundreds of units in the last place."""
    deceived = 0
    for k in range(40):
        x = torch.full((2000, 1), 1 + k / 41)
        square = 2000 * exactly(1 + k / 41) ** 2
        for units in (10, 30, 100, 300):
            radius = math.sqrt(float(square.p) / float(square.q)) * (1 - units * 2.0**-53)
            assert square > exactly(radius) ** 2
            deceived += float((x.mT @ x)[0, 0]) < radius * radius
            assert float(_Gram(x, radius).exceeds(0.0)) != 0.0
            W = polar_retraction(x, radius)
            assert W is not None
            assert W is not x
            assert is_shorter(W, radius)
            bound = orthogonality_residual(x, radius)
            assert square <= exactly(radius) ** 2 * (1 + exactly(bound))
    assert deceived > 10


@pytest.mark.parametrize("shape", [(40, 30), (300, 2)], ids=str)
@pytest.mark.parametrize("others", [0.1, 0.9])
def test_the_proofs_leave_room_for_every_error_that_the_theorems_count(shape: Shape, others: float) -> None:
    """For a diagonal matrix all is computed almost exactly, and so one can see what is set aside for the worst one."""
    (m, n), u = shape, 2.0**-53
    for sign in (1, -1):  # the norm is below the level; all singular values are above it
        level, rest = (1.0, others) if sign == 1 else (others**2, 1.0)
        trace, size = (n - 1) * abs(level - rest**2), (n - 1) * rest**2 + level
        room = (n + 9) * u * trace + m * u * size
        for factor, extra, expected in ((0.95, 0.0, False), (1.05, 60 * u, True)):
            A = rest * torch.eye(m, n)
            A[0, 0] = math.sqrt(level - sign * (factor * room + extra))
            gram = _Gram(A, 1.0)
            if sign == 1:
                proved = float(gram.exceeds(0.0)) == 0.0
            else:
                assert gram.facts().residual > 1 - level
                proved = gram.is_close(gram.facts(), 1 - level)
            assert proved is expected


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_result_keeps_a_distance_from_both_limits_for_another_order_of_summation(n: int, sign: int) -> None:
    """One round leaves about 126/256 delta^5, which is chosen such that the results meet the limits from both sides."""
    edge, hair, seen = kept((n, n), torch.float64), max(slack((n, n)), 2.0**-48), 0
    margin = 2 * torch.finfo(torch.float64).eps + 5 * hair
    for step in range(120):
        left = edge - margin if sign == 1 else margin
        delta = (left * 256 / 126) ** 0.2 * 1.003 ** (step - 60)
        W = polar_retraction(math.sqrt(1 - sign * delta) * torch.eye(n))
        assert W is not None
        if sign == 1:
            assert is_longer(W, 1 - (edge - slack((n, n))))
            seen += not is_longer(W, 1 - (edge - 3 * slack((n, n))))
        else:
            assert is_shorter(W, 1 - hair)
            seen += not is_shorter(W, 1 - 2 * hair)
    assert seen > 0


# --- far from the set ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (6, 3), (2, 7)], ids=str)
@pytest.mark.parametrize("radius", [1.0, 0.25])
def test_the_reach_is_nine_tenths_on_both_sides(shape: Shape, dtype: torch.dtype, radius: float) -> None:
    Q = polar(torch.randn(shape))
    for e in (0.89, -0.89):
        x = (radius * math.sqrt(1 - e) * Q).to(dtype)
        check(x, polar_retraction(x, radius), radius)
    for e in (0.91, -0.91, -3.0, -1e3):
        assert polar_retraction((radius * math.sqrt(1 - e) * Q).to(dtype), radius) is None


@each_dtype
def test_one_bad_direction_among_many_is_within_reach(dtype: torch.dtype) -> None:
    """The Frobenius norm of E is above 0.9 here; that of its square tells that the spectral norm is not."""
    for e, reached in ((0.85, True), (-0.85, True), (0.93, False), (-0.93, False), (1.0, False)):
        squares = torch.tensor([1 - e, *([0.75, 1.25] * 10)])
        x = with_values(squares.sqrt(), (22, 21)).to(dtype)
        assert orthogonality_residual(x) > 0.9
        W = polar_retraction(x)
        assert (W is not None) is reached
        if W is not None:
            assert spectral_norm(W).upper <= 1.0


@each_dtype
@each_shape
def test_what_has_no_near_polar_factor_gives_none(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    Q = near(shape, dtype, 0.0).to(device)
    assert polar_retraction(torch.zeros_like(Q)) is None
    assert polar_retraction(3 * Q) is None
    assert polar_retraction(0.2 * Q) is None
    assert polar_retraction(torch.full_like(Q, torch.finfo(dtype).max)) is None
    assert polar_retraction(torch.full_like(Q, torch.finfo(dtype).smallest_normal)) is None
    for bad in (math.nan, math.inf, -math.inf):
        assert polar_retraction(torch.full_like(Q, bad)) is None
        x = Q.clone()
        x[-1, -1] = bad
        assert polar_retraction(x) is None
    for radius in (0.0, -1.0, math.nan, math.inf, 2.0**100, 2.0**-100):
        assert polar_retraction(Q, radius) is None
        assert polar_retraction(radius * Q.double(), radius) is None


@each_dtype
def test_what_is_no_matrix_with_entries_gives_none(dtype: torch.dtype) -> None:
    for shape in ((0, 3), (3, 0), (0, 0), (4,), (), (2, 3, 3)):
        assert polar_retraction(torch.ones(shape, dtype=dtype)) is None


@pytest.mark.parametrize("exponent", [-99, 99])
def test_the_radius_may_be_as_small_and_large_as_promised(exponent: int) -> None:
    radius = 1.25 * 2.0**exponent if exponent < 0 else 2.0**exponent
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = near((4, 3), dtype, 0.05, radius)
        W = polar_retraction(x, radius)
        assert W is not None
        assert is_shorter(W, radius)
        assert is_longer(W, 1.0 - tolerance((4, 3), dtype), radius)


# --- the residual ----------------------------------------------------------------------------------------------------


def frobenius_bound(x: Tensor, radius: float) -> tuple[float, float]:
    """Return the exact ``|G - tI|_F + |t - 1|`` with t the mean of the diagonal of G, and the trace of G, G over r squared."""
    G = [[v / exactly(radius) ** 2 for v in row] for row in exact_gram(x)]
    n = len(G)
    trace = sum((G[i][i] for i in range(n)), flint.fmpq(0))
    mean = trace / n
    apart = sum(((G[i][j] - (mean if i == j else 0)) ** 2 for i in range(n) for j in range(n)), flint.fmpq(0))
    flint.ctx.prec = 200
    return float((flint.arb(apart).sqrt() + abs(flint.arb(mean - 1))).mid()), float(flint.arb(trace).mid())


def check_residual(x: Tensor, radius: float) -> None:
    bound = orthogonality_residual(x, radius)
    m, n = max(x.shape), min(x.shape)
    assert is_bounded(x, bound, radius)
    best, trace = frobenius_bound(x, radius)
    assert bound <= best * (1 + 1e-12) + 2.0**-52 * ((m + n + 16) * trace + 16)  # as tight as its docstring says


@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    radius=st.sampled_from([1.0, 0.7, 3.0, 2.0**-99, 2.0**99]),
    digits=st.floats(-3.0, 60.0),
    seed=seeds,
)
@example(shape=(1, 1), dtype=torch.float64, radius=1.0, digits=60.0, seed=0)
def test_the_residual_is_bounded_from_above_and_hardly_more(
    shape: Shape, dtype: torch.dtype, radius: float, digits: float, seed: int
) -> None:
    torch.manual_seed(seed)
    if dtype == torch.float16 or (dtype != torch.float64 and radius > 3.0):
        radius = min(max(radius, 0.7), 3.0)
    check_residual(near(shape, dtype, 2.0**-digits, radius), radius)


@given(shape=shapes, spread=st.integers(0, 40), exponent=st.integers(-60, 60), seed=seeds)
def test_the_residual_is_bounded_at_uneven_and_extreme_scales(
    shape: Shape, spread: int, exponent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rows = 2.0 ** torch.randint(-spread, spread + 1, (shape[0], 1))
    columns = 2.0 ** torch.randint(-spread, spread + 1, (1, shape[1]))
    check_residual(rows * torch.randn(shape) * columns * 2.0**exponent, 1.0)


def test_one_number_whose_square_is_rounded_is_bounded_by_what_it_is() -> None:
    for x in (1 + torch.randn(200, 1, 1) * 2.0 ** torch.randint(-52, 0, (200, 1, 1))).unbind():
        check_residual(x, 1.0)
        check_residual(x / 3, 1 / 3)


@each_dtype
def test_the_residual_is_an_equality_at_multiples_of_the_identity(dtype: torch.dtype, device: torch.device) -> None:
    for shape in SHAPES:
        eye = torch.eye(*shape, dtype=dtype, device=device)
        for factor, radius, exact in (
            (2.0, 1.0, 3.0),
            (1.0, 1.0, 0.0),
            (0.5, 1.0, 0.75),
            (2.0, 2.0, 0.0),
            (1.0, 2.0, 0.75),
        ):
            assert exact <= orthogonality_residual(factor * eye, radius) <= exact + 2e-12
    assert 1.0 <= orthogonality_residual(torch.zeros(3, 2, dtype=dtype, device=device)) < 1 + 1e-14


def test_the_residual_of_what_is_not_finite_is_not_a_small_number() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.eye(4, 3)
        x[1, 1] = bad
        assert not math.isfinite(orthogonality_residual(x))
    for huge in (1e100, 1e160, 1e308):
        assert not orthogonality_residual(huge * torch.eye(3)) <= 1e100
    assert 1.0 <= orthogonality_residual(torch.full((3, 3), 5e-324)) < 1 + 1e-14


def test_the_residual_refuses_what_is_no_matrix_and_no_radius() -> None:
    assert orthogonality_residual(torch.zeros(0, 3)) == orthogonality_residual(torch.zeros(3, 0), 2.0) == 0.0
    for shape in ((), (3,), (2, 3, 3)):
        with pytest.raises(ValueError, match=r"needs a matrix of shape \(m, n\), got shape \("):
            orthogonality_residual(torch.zeros(shape))
    for radius in (0.0, -1.0, math.nan, math.inf, 2.0**100, 2.0**-100):
        with pytest.raises(ValueError, match=r"needs a radius between 2\^-100 and 2\^100, got"):
            orthogonality_residual(torch.eye(3), radius)


def test_the_residual_of_a_parameter_is_a_number() -> None:
    assert isinstance(orthogonality_residual(nn.Parameter(torch.eye(3))), float)


# --- what a step costs -----------------------------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """Count the products of matrices, and the decompositions but that of Cholesky."""

    PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul"})
    DECOMPOSITIONS = tuple(
        f"aten::{prefix}linalg_{name}" for prefix in ("", "_") for name in ("svd", "eig", "qr", "inv")
    )

    def __init__(self) -> None:
        super().__init__()
        self.products = self.decompositions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.products += name in self.PRODUCTS
        self.decompositions += name.startswith(self.DECOMPOSITIONS)
        return func(*args, **(kwargs or {}))


def products(function: Callable[[], Tensor | None]) -> int:
    with Counted() as counted:
        assert function() is not None
    assert counted.decompositions == 0
    return counted.products


@pytest.mark.parametrize("shape", [(256, 256), (256, 100), (100, 256)], ids=str)
def test_a_step_of_an_optimizer_costs_five_products(shape: Shape) -> None:
    x = near(shape, torch.float32, 0.01)
    assert 0.005 < float((torch.linalg.svdvals(x.double()).square() - 1).abs().max()) < 0.02
    assert products(lambda: polar_retraction(x)) == 5
    assert products(lambda: Orthogonal().project(x)) == 5
    W = Orthogonal().project(x)
    assert products(lambda: polar_retraction(W)) == 1


@pytest.mark.parametrize(
    ("dtype", "delta", "number"),
    [  # a round is 1, 2, 3 or 4 products for the degrees 0, 1, 2 and 4; each proof is one
        (torch.float32, 0.0, 2),
        (torch.float32, 1.1e-4, 3),
        (torch.float32, 1.4e-4, 4),
        (torch.float32, 2.3e-3, 4),
        (torch.float32, 2.7e-3, 5),
        (torch.float32, 0.05, 5),
        (torch.float32, 0.3, 8),  # degree 4, no proof, degree 2
        (torch.float64, 0.0, 3),
        (torch.float64, 1e-5, 4),
        (torch.float64, 1e-3, 5),
        (torch.float64, 0.05, 7),  # degree 4, no proof, degree 1
        (torch.bfloat16, 0.0, 2),
        (torch.bfloat16, 0.2, 5),
        (torch.bfloat16, -0.5, 8),  # degree 4, a proof that fails, degree 1
    ],
)
def test_the_degree_is_the_smallest_that_suffices(dtype: torch.dtype, delta: float, number: int) -> None:
    x = (math.sqrt(1 - delta) * torch.eye(16)).to(dtype)
    assert products(lambda: polar_retraction(x)) == number


class OnDevice(Tensor):
    """A tensor of the CPU that takes the way of those on a GPU, and counts how often the numbers are waited for."""

    is_cuda = True
    waits = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        OnDevice.waits += func in {Tensor.tolist, Tensor.item, Tensor.__float__, Tensor.__bool__, Tensor.cpu}
        return super().__torch_function__(func, types, args, kwargs)


def on_device(x: Tensor, radius: float = 1.0) -> tuple[Tensor | None, int]:
    """Return the result of that way, and the number of waits."""
    there = x.as_subclass(OnDevice)
    OnDevice.waits = 0
    W = polar_retraction(there, radius)
    return x if W is there else W if W is None else W.as_subclass(Tensor), OnDevice.waits


@each_dtype
@each_shape
def test_without_looking_at_the_numbers_first_the_promises_are_the_same(shape: Shape, dtype: torch.dtype) -> None:
    for size, radius in ((0.2, 1.0), (1e-2, 3.0), (1e-9, 0.5)):
        x = near(shape, dtype, size, radius)
        W, _ = on_device(x, radius)
        check(x, W, radius)
        assert on_device(W, radius)[0] is W
    Q = near(shape, dtype, 0.0)
    for far in (0 * Q, 3 * Q, 0.2 * Q, math.nan * Q, torch.full_like(Q, math.inf)):
        assert on_device(far)[0] is None


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_transfer_decides_a_step_of_an_optimizer(dtype: torch.dtype) -> None:
    for shape in ((64, 64), (64, 20), (20, 64)):
        W, waits = on_device(near(shape, dtype, 0.01))
        assert W is not None
        assert waits == 1


def test_autocast_changes_nothing() -> None:
    x = near((12, 9), torch.float32, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        W = polar_retraction(x)
        bound = orthogonality_residual(x)
    check_member(x, W)
    assert W is not None
    torch.testing.assert_close(W, polar_retraction(x), rtol=0, atol=0)
    assert bound == orthogonality_residual(x)


# --- many steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, (5, 5)), (torch.bfloat16, (4, 7))], ids=str)
def test_nothing_accumulates_over_two_hundred_steps(dtype: torch.dtype, shape: Shape) -> None:
    layer = constrain(nn.Linear(shape[1], shape[0], dtype=dtype), "weight", Orthogonal(), by="projection")
    optimizer = SGD(parameter_groups(layer, lr=0.05), lr=0.05)
    inputs, moved = torch.randn(16, shape[1], dtype=dtype), 0
    for step in range(200):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        (layer(inputs) - torch.randn(16, shape[0], dtype=dtype)).double().square().mean().backward()
        with Counted() as counted:
            optimizer.step()
        W = layer.weight.detach()
        moved += not torch.equal(W, before)
        assert counted.decompositions == 0, step
        assert spectral_norm(W).upper <= 1.0, step
        assert is_shorter(W, 1.0), step
        assert is_longer(W, 1.0 - kept(shape, dtype)), step
        assert Orthogonal().violation(W) == 0.0, step
    assert moved > 150


# --- derivatives -----------------------------------------------------------------------------------------------------


def by_cholesky(x: Tensor) -> Tensor:
    """Return the polar factor of a tall matrix as ``x (x.T x)**(-1/2)``, by the eigenvalues of the Gram matrix."""
    if x.shape[0] < x.shape[1]:
        return by_cholesky(x.mT).mT
    values, vectors = torch.linalg.eigh(x.mT @ x)
    return x @ (vectors * values.rsqrt()) @ vectors.mT


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4), (1, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch's forward mode
def test_next_to_the_set_the_projection_has_the_derivative_of_the_polar_factor(shape: Shape) -> None:
    x = near(shape, torch.float64, 0.03)
    member = Orthogonal().project(x).requires_grad_()
    assert Orthogonal().project(member) is member
    assert same_bits(Orthogonal().project(x.clone().requires_grad_()), Orthogonal().project(x))
    assert torch.autograd.gradcheck(Orthogonal().project, x.clone().requires_grad_(), atol=1e-6)
    expected = torch.autograd.functional.jacobian(by_cholesky, x)
    found = [
        torch.autograd.functional.jacobian(Orthogonal().project, x),
        torch.func.jacrev(Orthogonal().project)(x),
        torch.func.jacfwd(Orthogonal().project)(x),
    ]
    for jacobian in found:
        torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-11)
    weights = torch.randn(shape)
    gradient = torch.func.grad(lambda y: (weights * Orthogonal().project(y)).sum())(x)
    torch.testing.assert_close(gradient, (weights[..., None, None] * expected).sum((0, 1)), rtol=0, atol=1e-11)
