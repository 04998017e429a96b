"""Matrices and their spectra."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import flint
import mpmath
import torch
from torch import Tensor

from stableopt.constraints.lowrank import AlmostOrthogonal, Rank
from stableopt.constraints.spectra import NuclearBall, NuclearNorm, SpectralNorm
from stableopt.constraints.symmetric import PSD, Hurwitz
from tests.constraints.oracle import DIGITS, singular_values
from tests.constraints.rows import Row

MATRICES = ((4, 3), (2, 3), (3, 3), (1, 1))
SQUARE = ((3, 3), (2, 2), (1, 1))


def in_nuclear_ball(radius: float, x: Tensor) -> bool:
    with mpmath.workdps(DIGITS):
        return mpmath.fsum(singular_values(x)) <= mpmath.mpf(radius)


def rational(x: Tensor) -> list[list[Fraction]]:
    return [[Fraction(v) for v in row] for row in x.detach().double().cpu().tolist()]


def semidefinite(S: list[list[Fraction]]) -> bool:
    """All roots of the characteristic polynomial, which are real, are >= 0 exactly if its coefficients alternate."""
    n = len(S)
    matrix = flint.fmpq_mat(n, n, [flint.fmpq(v.numerator, v.denominator) for row in S for v in row])
    return all((-1) ** (n - k) * c >= 0 for k, c in enumerate(matrix.charpoly().coeffs()))


def between(low: float, high: float, x: Tensor) -> bool:
    A = rational(x)
    n = range(len(A))
    above = [[A[i][j] - Fraction(low) * (i == j) for j in n] for i in n]
    if any(A[i][j] != A[j][i] for i in n for j in n) or not semidefinite(above):
        return False
    return high == math.inf or semidefinite([[Fraction(high) * (i == j) - A[i][j] for j in n] for i in n])


def contracting(rate: float, x: Tensor) -> bool:
    A = rational(x)
    n = range(len(A))
    return semidefinite([[-2 * Fraction(rate) * (i == j) - A[i][j] - A[j][i] for j in n] for i in n])


def of_rank(k: int, x: Tensor) -> bool:
    """The tolerance that the docstring of Rank states, with digits to spare."""
    if k >= min(x.shape):
        return True
    info = torch.finfo(x.dtype)
    with mpmath.workdps(DIGITS):
        sigma = singular_values(x)
        length = mpmath.sqrt(mpmath.fsum(s * s for s in sigma))
        smallest = mpmath.sqrt(x.numel()) * mpmath.mpf(info.smallest_normal) * mpmath.mpf(info.eps)
        return sigma[k] <= (info.eps + 4 * (x.numel() + 64) * 2.0**-52) * length + smallest


def almost_orthogonal(t: float, x: Tensor) -> bool:
    with mpmath.workdps(DIGITS):
        sigma = singular_values(x)
        return 1 - mpmath.mpf(t) <= sigma[-1] and sigma[0] <= 1 + mpmath.mpf(t)


ROWS = [
    *(Row(g, shapes=MATRICES) for g in (NuclearNorm(0.4), SpectralNorm(0.6), SpectralNorm(0.0))),
    Row(NuclearBall(1.3), shapes=MATRICES, exact=partial(in_nuclear_ball, 1.3)),
    Row(NuclearBall(0.0), shapes=MATRICES, exact=partial(in_nuclear_ball, 0.0), degenerate=True),
    *(
        Row(PSD(*ends), shapes=SQUARE, exact=partial(between, *ends), symmetric=True)
        for ends in ((0.0, math.inf), (-0.2, 1.5))
    ),
    *(Row(Hurwitz(rate), shapes=SQUARE, exact=partial(contracting, rate)) for rate in (0.0, 0.3)),
    Row(Rank(1), shapes=MATRICES, exact=partial(of_rank, 1), convex=False, tolerant=True),
    # tolerant: not for its membership, which is proved, but because its derivative is unbounded at singular matrices
    Row(AlmostOrthogonal(0.2), shapes=MATRICES, exact=partial(almost_orthogonal, 0.2), convex=False, tolerant=True),
]
