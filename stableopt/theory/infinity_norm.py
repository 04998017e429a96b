r"""T3f, the exact CFL law in the maximum norm: :math:`\|I+\tau J\|_\infty = 1+\tau\mu_\infty(J)`, without any spectral norm.

Row sums cost O(n^2), and for a zero-padded convolution they do not depend on the size of the image.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from stableopt.linalg.bound import Real, lower, upper
from stableopt.theory._arguments import finite, joined, limit, matrix, nonnegative, vector

__all__ = [
    "infinity_factor",
    "infinity_law",
    "infinity_log_norm",
    "infinity_max_step",
    "leaky_infinity_factor",
    "leaky_infinity_max_step",
    "weighted_infinity_norm",
]


def infinity_log_norm(J: ArrayLike) -> float:
    r"""Return :math:`\mu_\infty(J) = \max_i\,(J_{ii} + \sum_{j\ne i}|J_{ij}|)`.

    Args:
        J: ``(n, n)``, n >= 1.

    Returns:
        The logarithmic norm; each row sum is rounded once. :func:`stableopt.linalg.log_norm` encloses it.

    Raises:
        ValueError: if J is not a finite square matrix.

    Examples:
        >>> infinity_log_norm([[-3.0, 1.0], [-1.0, -2.0]])
        -1.0
    """
    M = _nonempty(J)
    signed = np.abs(M)
    np.fill_diagonal(signed, np.diag(M))
    return max(math.fsum(row) for row in signed)


def infinity_law(step: Real, log_norm: Real) -> Real:
    r"""Return :math:`1 + \tau\mu_\infty(J)`, which *equals* :math:`\|I+\tau J\|_\infty` up to :func:`infinity_max_step`.

    Args:
        step: :math:`\tau \ge 0`, not beyond :func:`infinity_max_step`.
        log_norm: :math:`\mu_\infty(J)`, of either sign.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if the step is negative or an argument is not finite.

    Note:
        Beyond the maximal step this is only a lower bound of the norm; use :func:`infinity_factor` there.

    Examples:
        >>> infinity_law(0.25, log_norm=-1.0)
        0.75
    """
    return 1.0 + nonnegative("step", step) * finite("log_norm", log_norm)


def infinity_factor(step: Real, J: ArrayLike) -> float:
    r"""Return :math:`\|I+\tau J\|_\infty = \max_i(|1+\tau J_{ii}| + \tau\sum_{j\ne i}|J_{ij}|)` for any step.

    Args:
        step: :math:`\tau \ge 0`; at both ends of a Bound the larger norm is taken (the norm is convex in the step).
        J: ``(n, n)``.

    Returns:
        The norm, in floating point with each row sum rounded once.

    Raises:
        ValueError: if the step is negative or J is not a finite square matrix.

    Examples:
        >>> infinity_factor(0.25, [[-3.0, 1.0], [-1.0, -2.0]])
        0.75
    """
    nonnegative("step", step)
    M = _nonempty(J)
    ends = (lower(step), upper(step))
    return max(math.fsum(row) for tau in ends for row in np.abs(np.eye(len(M)) + tau * M))


def infinity_max_step(J: ArrayLike) -> float:
    r"""Return the step up to which :math:`1+\tau\mu_\infty(J)` is the norm: :math:`1/\max_i(-J_{ii})`.

    Args:
        J: ``(n, n)``.

    Returns:
        The limit, rounded down; infinity if no diagonal entry is negative.

    Raises:
        ValueError: if J is not a finite square matrix.

    Note:
        This is the limit of the *law*. The block contracts at such a step iff :math:`\mu_\infty(J) < 0`.

    Examples:
        >>> infinity_max_step([[-4.0, 1.0], [-1.0, -2.0]])
        0.25
    """
    return limit(1, Fraction(float(np.max(-np.diag(_nonempty(J))))))


def leaky_infinity_factor(step: Real, decay: Real, log_norm: Real) -> Real:
    r"""Bound the block :math:`h + \tau(-ch + \varphi(Ah+u))`, slopes of :math:`\varphi` in [0,1].

    :math:`1-\tau(c-\max(\mu_\infty(A),0))`.

    Args:
        step: :math:`\tau \ge 0`, not beyond :func:`leaky_infinity_max_step`.
        decay: c >= 0.
        log_norm: :math:`\mu_\infty(A)`.

    Returns:
        The factor in the maximum norm, attained within the class; a Bound if an operand is one.

    Raises:
        ValueError: if the step or the decay is negative, or an argument is not finite.

    Examples:
        >>> leaky_infinity_factor(0.25, decay=2.0, log_norm=1.0)
        0.75
    """
    margin = nonnegative("decay", decay) - joined(finite("log_norm", log_norm), 0.0)
    return 1.0 - nonnegative("step", step) * margin


def leaky_infinity_max_step(decay: Real, diagonal: ArrayLike) -> float:
    r"""Return the limit of :func:`leaky_infinity_factor`: :math:`\min_i 1/(c-\min(a_{ii},0))`.

    Args:
        decay: c >= 0 (the upper end is used).
        diagonal: the diagonal of A, ``(n,)``.

    Returns:
        The limit, rounded down; infinity if c = 0 and no entry is negative.

    Raises:
        ValueError: if the decay is negative or an argument is malformed.

    Examples:
        >>> leaky_infinity_max_step(2.0, diagonal=[1.0, -2.0])
        0.25
    """
    c = Fraction(upper(nonnegative("decay", decay)))
    return limit(1, c - min(Fraction(float(vector("diagonal", diagonal).min())), Fraction(0)))


def weighted_infinity_norm(W: ArrayLike, weights: ArrayLike) -> float:
    r"""Return the norm of W for :math:`\|x\| = \max_i |x_i|/w_i`: :math:`\max_i \sum_j |W_{ij}|w_j/w_i`.

    Args:
        W: ``(n, n)``.
        weights: ``(n,)``, positive.

    Returns:
        The norm, in floating point.

    Raises:
        ValueError: if W or the weights are malformed or a weight is not positive.

    Examples:
        >>> weighted_infinity_norm([[0.0, 4.0], [0.0, 0.0]], weights=[8.0, 1.0])
        0.5
    """
    M, w = _nonempty(W), vector("weights", weights)
    if len(w) != len(M) or w.min() <= 0:
        raise ValueError(f"weights must be {len(M)} positive numbers, got {w.tolist()}.")
    return max(math.fsum(row) for row in np.abs(M) * w / w[:, None])


def _nonempty(J: ArrayLike) -> np.ndarray:
    M = matrix("J", J)
    if M.size == 0:
        raise ValueError("J must have at least one row.")
    return M
