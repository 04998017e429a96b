"""An independent oracle: exact decisions about norms in 256-bit ball arithmetic (about 77 digits)."""

from __future__ import annotations

from fractions import Fraction

import flint
import numpy as np

BITS = 256


def exact(x: float) -> flint.arb:
    """Return the ball that holds just the float ``x``."""
    fraction = Fraction(float(x))
    return flint.arb(fraction.numerator) / flint.arb(fraction.denominator)


def is_positive_definite(M: list[list[flint.arb]]) -> bool:
    """Decide by the signs of the pivots of the LDL factorization; raise if 256 bits do not decide."""
    n = len(M)
    M = [row[:] for row in M]
    for k in range(n):
        pivot = M[k][k]
        if pivot <= 0:
            return False
        if not pivot > 0:
            raise ArithmeticError("undecided: raise the precision")
        for i in range(k + 1, n):
            factor = M[i][k] / pivot
            for j in range(k + 1, n):
                M[i][j] = M[i][j] - factor * M[k][j]
    return True


def norm_is_below(A: np.ndarray, bound: float) -> bool:
    """Decide whether the spectral norm of the stored matrix is below ``bound``, exactly."""
    old, flint.ctx.prec = flint.ctx.prec, BITS
    try:
        if A.shape[0] < A.shape[1]:
            A = A.T
        n = A.shape[1]
        a = [[exact(x) for x in row] for row in A]
        square = exact(bound) * exact(bound)
        gram = [[sum((row[i] * row[j] for row in a), flint.arb(0)) for j in range(n)] for i in range(n)]
        return is_positive_definite(
            [[(square if i == j else flint.arb(0)) - gram[i][j] for j in range(n)] for i in range(n)]
        )
    finally:
        flint.ctx.prec = old


def log_norm_is_below(A: np.ndarray, bound: float) -> bool:
    """Decide whether the largest eigenvalue of the symmetric part is below ``bound``, exactly."""
    old, flint.ctx.prec = flint.ctx.prec, BITS
    try:
        n = len(A)
        half = flint.arb(1) / 2
        a = [[exact(x) for x in row] for row in A]
        t = exact(bound)
        return is_positive_definite(
            [[(t if i == j else flint.arb(0)) - half * (a[i][j] + a[j][i]) for j in range(n)] for i in range(n)]
        )
    finally:
        flint.ctx.prec = old


def nasty_matrices(rng: np.random.Generator, count: int, largest: int = 6) -> list[np.ndarray]:
    """Return matrices that break careless bounds: scales 1e±150, rank one, constant, graded, nearly orthogonal, one entry."""
    kinds = [
        "gauss",
        "rank one",
        "constant",
        "columns",
        "orthogonal",
        "sparse",
        "equal",
        "integer",
        "float32",
        "hilbert",
    ]
    matrices = []
    for k in range(count):
        m, n = rng.integers(1, largest + 1, 2)
        kind = kinds[k % len(kinds)]
        A = rng.standard_normal((m, n))
        if kind == "rank one":
            A = np.outer(rng.standard_normal(m), rng.standard_normal(n))
        elif kind == "constant":
            A = np.full((m, n), rng.standard_normal())
        elif kind == "columns":
            A = A * 10.0 ** rng.uniform(-12, 12, n)
        elif kind == "orthogonal":
            A = np.linalg.qr(rng.standard_normal((max(m, n), max(m, n))))[0][:m, :n]
        elif kind == "sparse":
            A = A * (rng.random((m, n)) < 0.3)
        elif kind == "equal":
            A = np.eye(m, n) + 1e-9 * A
        elif kind == "integer":
            A = np.round(A * 8)
        elif kind == "float32":
            A = A.astype(np.float32).astype(np.float64)
        elif kind == "hilbert":
            A = 1.0 / (np.arange(m)[:, None] + np.arange(n)[None, :] + 1.0)
        if k % 3 == 0:
            A = A * 10.0 ** rng.uniform(-150, 150)
        matrices.append(A)
    return matrices
