"""Independent oracles: exact rational arithmetic, and singular values with 60 digits. They share no code with the package."""

from __future__ import annotations

from fractions import Fraction
from functools import singledispatch

import mpmath
import torch
from torch import Tensor

from stableopt.constraints import Box, Constraint, L2Ball, LinfBall, NonNegative, Orthogonal, SpectralBall

DIGITS = 60


def entries(x: Tensor) -> list[Fraction]:
    """Return the stored numbers, exactly."""
    return [Fraction(v) for v in x.detach().double().cpu().flatten().tolist()]


def singular_values(x: Tensor) -> list[mpmath.mpf]:
    """Return the singular values of the stored matrix with about 60 digits, the largest first."""
    with mpmath.workdps(DIGITS):
        rows = x.detach().double().cpu().tolist()
        # a power of two brings the matrix to size 1, so that no digit is lost to its scale
        matrix = mpmath.matrix([[mpmath.mpf(v) for v in row] for row in rows])
        if matrix.rows < matrix.cols:
            matrix = matrix.T
        return sorted((abs(s) for s in mpmath.svd_r(matrix, compute_uv=False)), reverse=True)


@singledispatch
def exactly_feasible(constraint: Constraint, x: Tensor) -> bool:
    """Decide whether the stored numbers lie in the set, without rounding."""
    raise NotImplementedError(f"no oracle for {constraint!r}")


def _between(x: Tensor, low: float, high: float) -> bool:
    return all(
        (low == -float("inf") or v >= Fraction(low)) and (high == float("inf") or v <= Fraction(high))
        for v in entries(x)
    )


@exactly_feasible.register
def _(constraint: Box, x: Tensor) -> bool:
    return _between(x, constraint.lower, constraint.upper)


@exactly_feasible.register
def _(constraint: NonNegative, x: Tensor) -> bool:
    return _between(x, 0.0, float("inf"))


@exactly_feasible.register
def _(constraint: LinfBall, x: Tensor) -> bool:
    return _between(x, -constraint.radius, constraint.radius)


@exactly_feasible.register
def _(constraint: L2Ball, x: Tensor) -> bool:
    return sum((v * v for v in entries(x)), Fraction(0)) <= Fraction(constraint.radius) ** 2


@exactly_feasible.register
def _(constraint: SpectralBall, x: Tensor) -> bool:
    return x.numel() == 0 or singular_values(x)[0] <= mpmath.mpf(constraint.radius)


@exactly_feasible.register
def _(constraint: Orthogonal, x: Tensor) -> bool:
    """Both halves of the promise: no singular value above 1, none far below."""
    if x.numel() == 0:
        return True
    sigma = singular_values(x)
    return (
        sigma[0] <= 1
        and 1 - sigma[-1] <= 8 * torch.finfo(x.dtype).eps * max(x.shape) ** 0.5 + 4 * (x.numel() + 64) * 2.0**-52
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bit for bit: -0.0 differs from 0.0, and NaN equals itself."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    same_kind = a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
    return same_kind and torch.equal(a.detach().contiguous().view(bits), b.detach().contiguous().view(bits))
