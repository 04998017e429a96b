r"""Numbers that are proved here and published with room for the proof of the verifier, which rounds in its own way."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from stableopt.errors import UncertifiableError
from stableopt.linalg import round_up, spectral_norm

__all__ = ["LARGEST_SCALE", "SLACK", "Array", "input_norm", "padded_norm", "published_number"]

Array: TypeAlias = npt.NDArray[np.float64]

SLACK = Fraction(1, 10**9)
"""What is added to a proved bound."""
LARGEST_SCALE = 2.0**60
"""Scales of a metric lie between this and its inverse."""
_LEAST = Fraction(1, 2**32)
"""What a proof in integers needs."""
_TINY = Fraction(1, 2**400)


def published_number(value: Fraction | float, slack: Fraction = SLACK) -> float:
    """Return a proved number with slack, rounded up.

    Args:
        value: the number.
        slack: relative.

    Raises:
        UncertifiableError: if it is too large for float64.

    Examples:
        >>> 2.0 < published_number(2.0) < 2.00000001
        True
    """
    bound = round_up(Fraction(value) * (1 + slack) + _TINY) if math.isfinite(value) else math.inf
    if not math.isfinite(bound):
        raise UncertifiableError("a bound is too large for float64.")
    return bound


def padded_norm(matrix: Array, slack: Fraction | None = None) -> float:
    """Return the Euclidean operator norm of a matrix with slack.

    Args:
        matrix: the matrix; each entry may be off by some roundings.
        slack: relative; None for as little as the verifier needs.

    Raises:
        UncertifiableError: if it is too large for float64.

    Examples:
        >>> 1.0 < padded_norm(np.eye(2)) < 1.000000001
        True
    """
    if not np.isfinite(matrix).all():
        raise UncertifiableError("a scaled matrix is too large for float64.")
    if slack is None:  # and eight roundings of each entry, which the Frobenius norm feels
        short, long = min(matrix.shape), max(matrix.shape)
        slack = Fraction(short * (3 * (long + short) + 128) + 32 * (math.isqrt(short) + 1), 2**53) + _LEAST
    return published_number(spectral_norm(matrix).upper, slack)


def input_norm(matrix: Array, norm: str) -> float:
    r"""Return the norm of a matrix from inputs to the Euclidean norm with slack.

    In linf it is at most :math:`(\sum_i \|m_i\|_1^2)^{1/2}`, as if all rows were largest at once.

    Args:
        matrix: the matrix.
        norm: that of the inputs.

    Raises:
        UncertifiableError: if it is too large for float64.

    Examples:
        >>> round(input_norm(np.array([[1.0, -1.0], [1.0, 1.0]]), "linf") ** 2, 6)
        8.0
    """
    if norm != "linf":
        return padded_norm(matrix)
    return padded_norm(np.abs(matrix).sum(1)[None], Fraction(4 * sum(matrix.shape) + 64, 2**52))
