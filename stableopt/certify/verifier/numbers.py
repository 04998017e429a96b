"""Norms of matrices, proved with every rounding error counted (docs/soundness.md, S1-S4).

u = 2^-53 and gamma_k = k u / (1 - k u): a sum of k products, in any order, with or without fused multiply-add, is off by at most
gamma_k sum |a_i b_i| + k 2^-1074, and a sum of k terms >= 0 is at most the computed one times 1 + gamma_2k. All scalar arithmetic
is exact (fractions); only array arithmetic rounds.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "TINY",
    "U",
    "Array",
    "RejectedError",
    "defect",
    "exact_log_norm",
    "exact_norm",
    "exact_product",
    "float_up",
    "gamma",
    "gram_matrix",
    "largest",
    "need",
    "norm_at_most",
    "power_up",
    "root_up",
    "row_sums",
    "squares",
    "up",
    "up_short",
]

Array: TypeAlias = npt.NDArray[np.float64]

U = Fraction(1, 2**53)
TINY = Fraction(1, 2**900)
"""More than all underflow of one proof: fewer than 2^100 products, each off by at most 2^-1074 when it underflows."""


class RejectedError(Exception):
    """The certificate or its weights have a defect; the message says which."""


def need(condition: object, reason: str) -> None:
    """Reject unless the condition holds."""
    if not condition:
        raise RejectedError(reason)


def gamma(k: int) -> Fraction:
    """Return gamma_k exactly."""
    need(k < 2**50, f"a sum of {k} terms is too long for a proof in float64")
    return Fraction(k, 2**53 - k)


def norm_at_most(stack: Any, limit: Fraction, *, exact: bool = False) -> bool:
    """Return True only if ||A||_2 <= limit is proved for every matrix A of the stack (b, m, n), real or complex, by a witness."""
    need(np.isfinite(stack).all(), "the arithmetic of a proof overflowed")
    if not stack.any() or limit <= 0:
        return limit >= 0 and not stack.any()
    a = np.ascontiguousarray(stack.transpose(0, 2, 1) if stack.shape[1] < stack.shape[2] else stack)
    exponent = int(np.frexp(np.abs(a.view(np.float64)).max())[1])  # S1: a power of two scales exactly
    a = np.ldexp(a.view(np.float64), -exponent).view(a.dtype)
    target, (m, n) = (limit / Fraction(2) ** exponent) ** 2, a.shape[1:]
    if target >= m * n * _parts(a):
        return True  # ||A||_F^2 is less
    if exact:
        return all(exact_norm(_real(matrix), limit / Fraction(2) ** exponent) for matrix in a)
    gram, error = gram_matrix(a)
    trace = Fraction(float(np.trace(gram.real, axis1=1, axis2=2).min()))
    reserve = (
        3 * gamma(n * _parts(a)) * max(n * target - trace, Fraction(0)) + 64 * n * U * target
    )  # for the defect: a guess
    t = float(target - error - reserve)
    return t > 0 and Fraction(t) + defect(-gram, t) + error <= target


def _parts(a: Any) -> int:
    return 2 if np.iscomplexobj(a) else 1


def _real(matrix: Any) -> Array:
    """Return a real matrix of the same norm: [[Re, -Im], [Im, Re]]."""
    return np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]]) if np.iscomplexobj(matrix) else matrix


def _square(a: Any) -> Any:
    """Return the computed A^* A of each matrix, by real products (S2): S^T S + i S^T T, S = [Re; Im], T = [Im; -Re]."""
    if not np.iscomplexobj(a):
        return a.transpose(0, 2, 1) @ a
    columns = np.concatenate([a.real, a.imag], axis=1)
    result = np.empty((len(a), a.shape[2], a.shape[2]), dtype=np.complex128)
    result.real = columns.transpose(0, 2, 1) @ columns
    result.imag = columns.transpose(0, 2, 1) @ np.concatenate([a.imag, -a.real], axis=1)
    return result


def _product_error(a: Any) -> Fraction:
    """Bound the error of the computed A^* A in norm (S2): gamma_m ||A||_F^2; for complex matrices sqrt(2) < 3/2 times gamma_2m."""
    return Fraction(_parts(a) + 1, 2) * gamma(_parts(a) * a.shape[1]) * squares(a) + TINY


def gram_matrix(a: Any) -> tuple[Any, Fraction]:
    """Return the computed A^* A of each matrix, made Hermitian by copying one triangle, and a bound of its error in norm (S2)."""
    gram = np.tril(_square(a))
    rest = np.tril(gram, -1).conj().transpose(0, 2, 1)
    if np.iscomplexobj(gram):
        gram.imag[:, range(gram.shape[1]), range(gram.shape[1])] = 0.0
    return gram + rest, _product_error(a)


def defect(symmetric: Any, shift: float) -> Fraction:
    """Return e with ``symmetric`` + shift I + e I >= 0, by an untrusted Cholesky factor of it (S4); large if there is none."""
    n, diagonal = symmetric.shape[1], range(symmetric.shape[1])
    moved = symmetric.copy()
    moved[:, diagonal, diagonal] += shift
    try:
        upper = np.linalg.cholesky(moved).conj().transpose(0, 2, 1).astype(symmetric.dtype)
    except np.linalg.LinAlgError:
        return Fraction(2) ** 1100
    residual = moved - _square(upper)
    moduli = np.abs(residual.real) + np.abs(residual.imag)
    sums = max(largest(moduli.sum(axis=1)), largest(moduli.sum(axis=2))) * (1 + gamma(4 * n)) * (1 + U)
    return sums + U * largest(np.abs(moved[:, diagonal, diagonal].real)) + _product_error(upper)


def squares(stack: Any) -> Fraction:
    """Bound the largest ||A||_F^2 of a stack from above."""
    flat = np.ascontiguousarray(stack).view(np.float64).reshape(len(stack), -1)
    return largest(np.square(flat).sum(axis=1)) * (1 + gamma(2 * flat.shape[1])) + TINY


def largest(values: Array) -> Fraction:
    """Return the largest entry exactly; NaN and infinity make every proof fail."""
    value = float(values.max())
    need(math.isfinite(value), "the arithmetic of a proof overflowed")
    return Fraction(value)


def row_sums(stack: Array, *, exact: bool = False) -> Fraction:
    """Bound the largest sum of moduli of a row from above (S5.2)."""
    if exact:
        exponent = int(np.frexp(np.abs(stack).max())[1])  # cut to units of 2^-52 of the largest entry
        sums = np.abs(_cut(np.ldexp(stack, -exponent), 52)).astype(object).sum(axis=-1)
        return (Fraction(int(sums.max())) + stack.shape[-1] * bool(stack.any())) * Fraction(2) ** (exponent - 52)
    return largest(np.abs(stack).sum(axis=-1)) * (1 + gamma(2 * stack.shape[-1])) + (TINY if stack.any() else 0)


def root_up(value: Fraction) -> Fraction:
    """Return a fraction above sqrt(value), by at most 2^-198 and, for values below 1, by at most 2^-198 sqrt(value)."""
    if not value:
        return value
    half = 200 + max(0, value.denominator.bit_length() - value.numerator.bit_length())
    return Fraction(math.isqrt(math.ceil(value * 4**half)) + 2, 2**half)


def power_up(value: Fraction, exponent: int) -> Fraction:
    """Return a power, rounded up at each squaring; one that float64 cannot hold is refused."""
    result = Fraction(1)
    for bit in f"{exponent:b}":
        result = up(result * result * (value if bit == "1" else 1))
        need(result < 2**1100, "a power is too large for float64")
    return result


def up(value: Fraction) -> Fraction:
    """Round up to a multiple of 2^-1000, so that fractions stay short."""
    return Fraction(math.ceil(value * 2**1000), 2**1000)


def up_short(value: Fraction) -> Fraction:
    """Round up to a multiple of 2^-100, so that powers stay short."""
    return Fraction(math.ceil(value * 2**100), 2**100)


def float_up(value: Fraction) -> float:
    """Return the least float64 that is not below, or infinity."""
    try:
        nearest = float(value)
    except OverflowError:
        return math.inf
    return nearest if Fraction(nearest) >= value else math.nextafter(nearest, math.inf)


# ---------------------------------------------------------------------------------------------------- in integers (S4 exact)


def exact_norm(matrix: Array, limit: Fraction) -> bool:
    """Prove ||A||_2 <= limit in integers of unit 2^-104 (S4.2): A is cut to multiples of 2^-52, R of 2^-48."""
    limit -= root_up(Fraction(matrix.size)) / 2**52
    a = _cut(matrix, 52)
    return limit > 0 and _exactly_below(product(a.T, a), math.floor(limit**2 * 2**104))


def exact_log_norm(matrix: Array, limit: Fraction) -> bool:
    """Prove A + A^T <= limit I for entries within [-1, 1], in integers: cutting moves an entry by less than 2^-51."""
    a = _cut(matrix, 52).astype(object)
    return _exactly_below((a + a.T) * 2**52, math.floor((limit - Fraction(len(a), 2**51)) * 2**104))


def _exactly_below(symmetric: Any, top: int) -> bool:
    """Prove that no eigenvalue is above ``top``, both in units of 2^-104, by R R^T for a Cholesky factor R of the rest."""
    n = len(symmetric)
    t = top - (max(abs(top), int(np.abs(symmetric).max())) >> 32)
    try:
        lower = np.linalg.cholesky(t / 2**104 * np.eye(n) - np.ldexp(symmetric.astype(np.float64), -104))
    except np.linalg.LinAlgError:
        return False
    r = _cut(lower, 48)
    rest = -symmetric - product(r, r.T) * 2**8
    rest[range(n), range(n)] += t
    return t + int(np.abs(rest).sum(axis=1).max()) <= top


def _cut(values: Array, bits: int) -> npt.NDArray[np.int64]:
    """Return the numbers in units of 2^-bits, cut towards zero."""
    return np.trunc(np.ldexp(values, bits)).astype(np.int64)


def product(a: Any, b: Any) -> Any:
    """Multiply integer matrices exactly: digits of 20 bits, sums of at most 2^22 products of two of them, then Python integers."""
    need(
        a.shape[1] <= 2**22 and max(np.abs(a).max(), np.abs(b).max()) < 2**60,
        "a matrix is too large for an exact product",
    )
    digits = [[(np.sign(x) * (np.abs(x) >> s & (2**20 - 1))) for s in (0, 20, 40)] for x in (a, b)]
    return sum(
        (p @ q).astype(object) * 2 ** (20 * (i + j)) for i, p in enumerate(digits[0]) for j, q in enumerate(digits[1])
    )


def exact_product(a: Array, b: Array) -> Array:
    """Multiply matrices of entries within [-1, 1] in units of 2^-52, and cut to multiples of 2^-50, which float64 holds (S6.3)."""
    return np.ldexp((product(_cut(a, 52), _cut(b, 52)) // 2**54).astype(np.float64), -50)
