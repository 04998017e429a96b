r"""The norm of two opposite shears, exactly: what one Hamiltonian block can do to distances.

.. math::
    M = \begin{pmatrix} I & S_2 \\ 0 & I \end{pmatrix} \begin{pmatrix} I & 0 \\ -S_1 & I \end{pmatrix}, \qquad
    0 \preceq S_1 \preceq u_1 I, \quad 0 \preceq S_2 \preceq u_2 I .

**The largest norm.** :math:`\|M\|_2` is convex in :math:`S_1` and in :math:`S_2`, so it is largest at extreme points: :math:`u_1P`
and :math:`u_2R` with projections. Two projections split the space into lines and planes that both keep; in a plane they project on
lines with an angle :math:`\varphi`. :math:`M` is symplectic there: its singular values are two pairs :math:`\sigma, 1/\sigma`. With
:math:`a = u_1u_2` and :math:`C = \cos^2\varphi`, the numbers :math:`x = (\sigma - 1/\sigma)^2` are the roots of

.. math:: x^2 - \bigl(u_1^2 + u_2^2 + Ca(a - 2)\bigr)x + a^2(1 - C)^2 = 0

(the trace and the determinant of :math:`M^\top M - I`), and the root of the larger one is

.. math:: v(C) = \tfrac12\sqrt{(u_1 + u_2)^2 - Ca(4 - a)} + \tfrac12\sqrt{(u_1 - u_2)^2 + Ca^2} ,

concave in :math:`C`. So :math:`\|M\|_2 \le t(\max_{0 \le C \le 1} v)` with :math:`t(v) = \tfrac12(v + \sqrt{v^2 + 4})`, the norm of
one shear, and this is attained. For small steps it is :math:`1 + \tfrac12\max(u_1, u_2)`: for equal ones half of the excess of the
product of the two norms.
"""

from __future__ import annotations

import math
from fractions import Fraction

from stableopt.linalg import Bound

__all__ = ["pair_limit", "pair_norm", "shear_norm"]


def shear_norm(u: Bound) -> Bound:
    r"""Return the norm of one shear with a symmetric part of norm :math:`u`, :math:`t(u) = \tfrac12(u + \sqrt{u^2 + 4})`.

    Args:
        u: :math:`u \ge 0`.

    Examples:
        >>> shear_norm(Bound.point(1.5)).upper
        2.0
    """
    return 0.5 * (u + (u**2 + 4.0).sqrt())


def pair_norm(u1: float, u2: float) -> Bound:
    r"""Enclose the largest norm of two opposite shears.

    Args:
        u1: :math:`u_1 \ge 0`.
        u2: :math:`u_2 \ge 0`.

    Examples:
        >>> pair_norm(1.5, 0.0).upper, abs(pair_norm(1.0, 1.0).upper - math.sqrt(3.0)) < 1e-12
        (2.0, True)
    """
    first, second = Fraction(u1), Fraction(u2)
    a, total, difference = first * second, (first + second) ** 2, (first - second) ** 2
    falls, rises = a * (4 - a), a * a  # the slopes of the two radicands
    if a == 0:
        best = Fraction(0)
    elif falls <= 0 or rises**2 * total - falls**2 * difference >= 4 * a * falls * rises:
        best = Fraction(1)
    else:  # where the derivative is zero
        best = max(Fraction(0), (rises**2 * total - falls**2 * difference) / (4 * a * falls * rises))
    v = 0.5 * (_root(total - best * falls) + _root(difference + best * rises))
    return shear_norm(v)


def pair_limit(norm: float) -> float:
    r"""Return the largest :math:`u` such that two opposite shears of at most :math:`u` have at most the given norm.

    With :math:`L` the norm, :math:`u = 2\tanh(\log L)` up to :math:`L = 1 + \sqrt2`, and :math:`\sqrt{L - 1/L}` beyond.

    Args:
        norm: :math:`L > 1`.

    Returns:
        The limit, rounded down, and a little more, so that the norm computed from it does not exceed the given one.

    Examples:
        >>> 0.999999 < pair_limit(math.sqrt(3.0)) < 1.0
        True
    """
    excess = Fraction(norm) - 1 / Fraction(norm)  # of one shear
    if excess <= 2:
        u = 2 * excess / (Fraction(norm) + 1 / Fraction(norm))
        return max(0.0, float(u) - 2.0**-48)
    return math.sqrt(float(excess)) * (1.0 - 2.0**-48)


def _root(square: Fraction) -> Bound:
    near = Bound.point(float(square))
    exact = Fraction(near.lower)
    low = near.lower if exact <= square else math.nextafter(near.lower, 0.0)
    high = near.upper if exact >= square else math.nextafter(near.upper, math.inf)
    return Bound(max(0.0, low), high).sqrt()
