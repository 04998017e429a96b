r"""T3h in every norm: Runge-Kutta steps that are convex combinations of Euler steps.

Circle contractivity needs an inner product. In the maximum norm, the sum norm or any other, a method keeps what Euler's method
keeps if it can be written as a convex combination of Euler steps of length :math:`\tau/r`; the largest such r is its radius of
absolute monotonicity (the SSP coefficient), which is never above the radius of circle contractivity.
"""

from __future__ import annotations

import functools
from fractions import Fraction

from stableopt.linalg.bound import Real, round_down, round_up, upper
from stableopt.theory._arguments import nonnegative
from stableopt.theory.runge_kutta import ButcherTableau, Matrix

__all__ = ["monotone_factor", "monotonicity_radius"]


@functools.lru_cache(maxsize=256)
def monotonicity_radius(tableau: ButcherTableau) -> float:
    r"""Return the radius of absolute monotonicity of an explicit method.

    The largest r with :math:`rK(I+rK)^{-1} \ge 0` and :math:`(I+rK)^{-1}e \ge 0` entrywise, where K holds A above the row b.

    Args:
        tableau: an explicit method of s stages.

    Returns:
        r, rounded down, between 0 and s. In every norm in which Euler's step at :math:`\tau` does not expand, the method's step at
        :math:`r\tau` does not. 0 for a method that has no such guarantee in all norms (RK4, the midpoint rule).

    Raises:
        ValueError: if the method is implicit.

    References:
        Kraaijevanger, *Contractivity of Runge-Kutta Methods*, 1991; Gottlieb, Ketcheson and Shu, 2011.

    Examples:
        >>> from stableopt.theory.tableaux import HEUN, RK4, SSPRK104
        >>> monotonicity_radius(HEUN), monotonicity_radius(SSPRK104), monotonicity_radius(RK4)
        (1.0, 6.0, 0.0)
    """
    if not tableau.explicit:
        raise ValueError(f"monotonicity_radius needs an explicit method, got {tableau.name}.")
    K = _augmented(tableau)
    low, high = Fraction(0), Fraction(tableau.stages)
    if _is_monotone(K, high):
        return float(high)
    for _ in range(60):  # monotone at r means monotone below r
        middle = (low + high) / 2
        low, high = (middle, high) if _is_monotone(K, middle) else (low, middle)
    simple = high.limit_denominator(1000)  # the radii of the usual methods are integers or simple fractions
    if abs(simple - low) < Fraction(1, 10**12) and _is_monotone(K, simple):
        low = simple
    return round_down(low) if low > Fraction(1, 10**9) else 0.0


def monotone_factor(tableau: ButcherTableau, radius: float, euler_factor: Real) -> float:
    r"""Bound a step of an explicit method by the factor of Euler's step at :math:`\tau/r`, in the norm of that factor.

    With :math:`v = (I+rK)^{-1}e + q\,rK(I+rK)^{-1}v`, whose coefficients are not negative, it is the last entry of v.

    Args:
        tableau: an explicit method.
        radius: r, positive and at most :func:`monotonicity_radius`.
        euler_factor: q, a bound of :math:`h + \tau/r\, f(h)` (the upper end is used).

    Returns:
        The factor, rounded up; below 1 where q is.

    Raises:
        ValueError: if r is not positive, the method is not monotone at r, or q is negative.

    Examples:
        >>> from stableopt.theory.tableaux import EULER, HEUN
        >>> monotone_factor(EULER, 1.0, 0.5), monotone_factor(HEUN, 1.0, 0.5)
        (0.5, 0.625)
    """
    K, r, q = _augmented(tableau), Fraction(radius), Fraction(upper(nonnegative("euler_factor", euler_factor)))
    if not (tableau.explicit and r > 0 and _is_monotone(K, r)):
        raise ValueError(f"{tableau.name} is no convex combination of Euler steps at the radius {radius!r}.")
    starts, combined = _convex_form(K, r)
    v: list[Fraction] = []
    for start, row in zip(starts, combined, strict=True):
        v.append(start + q * sum((p * x for p, x in zip(row, v, strict=False)), Fraction(0)))
    return round_up(v[-1])


def _augmented(tableau: ButcherTableau) -> Matrix:
    return [[*row, Fraction(0)] for row in (*tableau.A, tableau.b)]


def _convex_form(K: Matrix, r: Fraction) -> tuple[list[Fraction], Matrix]:
    """Return the weights of the start and of the Euler steps: ``(I+rK)^-1 e`` and ``rK(I+rK)^-1``, by forward substitution."""
    starts: list[Fraction] = []
    combined: Matrix = []
    for i, row in enumerate(K):
        scaled = [r * a for a in row]
        # row i of P = rK - rK P, and of R e = e - rK R e: K is strictly lower triangular
        combined.append(
            [scaled[j] - sum((scaled[k] * combined[k][j] for k in range(j + 1, i)), Fraction(0)) for j in range(len(K))]
        )
        starts.append(1 - sum((scaled[k] * starts[k] for k in range(i)), Fraction(0)))
    return starts, combined


def _is_monotone(K: Matrix, r: Fraction) -> bool:
    starts, combined = _convex_form(K, r)
    return all(s >= 0 for s in starts) and all(p >= 0 for row in combined for p in row)
