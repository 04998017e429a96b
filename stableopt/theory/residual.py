r"""T3, the discrete CFL law of residual blocks :math:`h^+ = h + \tau f(h)`: what each class of branch allows.

Each class has a *factor* (a bound on the Lipschitz constant of the block in the Euclidean norm) and a *maximal step* (the largest
:math:`\tau` for which the factor is at most 1, rounded down). Derivatives are Clarke derivatives, so ReLU branches are covered.
"""

from __future__ import annotations

import math

from stableopt.linalg.bound import Bound, Real, lower, upper
from stableopt.theory._arguments import (
    exact_lower,
    exact_upper,
    finite,
    joined,
    limit,
    nonnegative,
    positive,
    real_sqrt,
)

__all__ = [
    "cocoercive_factor",
    "cocoercive_max_step",
    "dissipative_best_factor",
    "dissipative_best_step",
    "dissipative_factor",
    "dissipative_max_step",
    "gradient_branch_smoothness",
    "lipschitz_factor",
    "strongly_convex_best_factor",
    "strongly_convex_best_step",
    "strongly_convex_factor",
    "strongly_convex_max_step",
]


def lipschitz_factor(step: Real, lipschitz: Real) -> Real:
    r"""Bound a block whose branch is only Lipschitz (class a): :math:`1 + \tau L`, attained by :math:`f(h) = Lh`.

    Args:
        step: :math:`\tau \ge 0`.
        lipschitz: L >= 0, the Lipschitz constant of the branch, in any norm.

    Returns:
        The factor; a Bound if an operand is one. No step makes it smaller than 1.

    Raises:
        ValueError: if an argument is negative or not finite.

    Examples:
        >>> lipschitz_factor(0.25, lipschitz=2.0)
        1.5
    """
    return 1.0 + nonnegative("step", step) * nonnegative("lipschitz", lipschitz)


def dissipative_factor(step: Real, dissipation: Real, lipschitz: Real) -> Real:
    r"""Bound a one-sided Lipschitz block (class b): :math:`\sqrt{1 - 2\tau m + \tau^2L^2}`.

    Hypothesis: :math:`\langle f(x)-f(y), x-y\rangle \le -m\|x-y\|^2` and :math:`\|f(x)-f(y)\| \le L\|x-y\|`.

    Args:
        step: :math:`\tau \ge 0`.
        dissipation: m, at most L; negative for a branch that expands in some direction.
        lipschitz: L >= 0.

    Returns:
        The factor, attained by a scaled rotation; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is not finite, a step or L is negative, or :math:`|m| > L` (impossible by Cauchy-Schwarz).

    Examples:
        >>> dissipative_factor(0.5, dissipation=1.0, lipschitz=2.0)
        1.0
    """
    tau, (m, L) = nonnegative("step", step), _dissipative(dissipation, lipschitz)
    return real_sqrt(1.0 - 2.0 * tau * m + (tau * L) ** 2)


def dissipative_max_step(dissipation: Real, lipschitz: Real) -> float:
    r"""Return the limit of class b: :math:`2m/L^2`; below it the block contracts, at it the factor is 1.

    Args:
        dissipation: m, at most L (the lower end is used).
        lipschitz: L >= 0 (the upper end is used).

    Returns:
        The limit, rounded down; 0 if m <= 0, infinity for a constant branch (L = 0).

    Raises:
        ValueError: if an argument is not finite, L is negative, or :math:`|m| > L`.

    Examples:
        >>> dissipative_max_step(dissipation=1.0, lipschitz=2.0)
        0.5
    """
    m, L = _dissipative(dissipation, lipschitz)
    return math.inf if upper(L) == 0 else limit(2 * exact_lower(m), exact_upper(L) ** 2)


def dissipative_best_step(dissipation: Real, lipschitz: Real) -> float:
    r"""Return the step with the smallest factor of class b: :math:`m/L^2`.

    Args:
        dissipation: m > 0, at most L.
        lipschitz: L > 0.

    Returns:
        The step, rounded down.

    Raises:
        ValueError: if m or L is not positive or :math:`m > L`.

    Examples:
        >>> dissipative_best_step(dissipation=1.0, lipschitz=2.0)
        0.25
    """
    m, L = _dissipative(positive("dissipation", dissipation), lipschitz)
    return limit(exact_lower(m), exact_upper(L) ** 2)


def dissipative_best_factor(dissipation: Real, lipschitz: Real) -> Real:
    r"""Return the smallest factor of class b: :math:`\sqrt{1 - m^2/L^2}`.

    Args:
        dissipation: m > 0, at most L.
        lipschitz: L > 0.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if m or L is not positive or :math:`m > L`.

    Examples:
        >>> dissipative_best_factor(dissipation=3.0, lipschitz=5.0)
        0.8
    """
    m, L = _dissipative(positive("dissipation", dissipation), positive("lipschitz", lipschitz))
    return real_sqrt(1.0 - (m / L) ** 2)


def gradient_branch_smoothness(weight_norm: Real, slope: Real = 1.0, strong: Real = 0.0) -> Real:
    r"""Bound the smoothness of the branch :math:`-(mh + A^\top\sigma(Ah+b))`: :math:`m + s\|A\|_2^2`.

    Args:
        weight_norm: an upper bound on :math:`\|A\|_2`.
        slope: s, with the slopes of :math:`\sigma` in [0, s]. GELU and SiLU have negative slopes and are not covered.
        strong: m >= 0.

    Returns:
        L of :func:`cocoercive_max_step` or, with m > 0, of :func:`strongly_convex_factor`; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Note:
        The transpose must be exact: another matrix in its place, or a convolution pair with different paddings, is not a gradient.

    Examples:
        >>> gradient_branch_smoothness(2.0, strong=0.5)
        4.5
    """
    return nonnegative("strong", strong) + nonnegative("slope", slope) * nonnegative("weight_norm", weight_norm) ** 2


def cocoercive_factor(step: Real, smoothness: Real) -> Real:
    r"""Bound a gradient block (class c), :math:`f = -\nabla\varphi` with :math:`\varphi` convex and L-smooth.

    :math:`\max(1, |1-\tau L|)`.

    Args:
        step: :math:`\tau \ge 0`.
        smoothness: L >= 0.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Examples:
        >>> cocoercive_factor(0.5, smoothness=4.0), cocoercive_factor(1.0, smoothness=4.0)
        (1.0, 3.0)
    """
    return joined(1.0, abs(1.0 - nonnegative("step", step) * nonnegative("smoothness", smoothness)))


def cocoercive_max_step(smoothness: Real) -> float:
    r"""Return the limit of class c: the block is nonexpansive iff :math:`\tau \le 2/L`.

    Args:
        smoothness: L >= 0 (the upper end is used).

    Returns:
        The limit, rounded down; infinity for L = 0.

    Raises:
        ValueError: if L is negative or not finite.

    Examples:
        >>> cocoercive_max_step(4.0)
        0.5
    """
    return limit(2, exact_upper(nonnegative("smoothness", smoothness)))


def strongly_convex_factor(step: Real, strong: Real, smoothness: Real) -> Real:
    r"""Bound a strongly convex gradient block (class d): :math:`\max(|1-\tau m|, |1-\tau L|)`.

    Args:
        step: :math:`\tau \ge 0`.
        strong: m >= 0, at most L.
        smoothness: L.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite, or :math:`m > L`.

    Examples:
        >>> strongly_convex_factor(0.5, strong=1.0, smoothness=3.0)
        0.5
    """
    tau, (m, L) = nonnegative("step", step), _strongly_convex(strong, smoothness)
    return joined(abs(1.0 - tau * m), abs(1.0 - tau * L))


def strongly_convex_max_step(smoothness: Real) -> float:
    r"""Return the limit of class d: for m > 0 the block contracts iff :math:`0 < \tau < 2/L`.

    Args:
        smoothness: L > 0 (the upper end is used).

    Returns:
        The limit, rounded down.

    Raises:
        ValueError: if L is not positive or not finite.

    Examples:
        >>> strongly_convex_max_step(4.0)
        0.5
    """
    return limit(2, exact_upper(positive("smoothness", smoothness)))


def strongly_convex_best_step(strong: Real, smoothness: Real) -> float:
    r"""Return the step with the smallest factor of class d: :math:`2/(m+L)`.

    Args:
        strong: m >= 0, at most L (the upper end is used: the safe side).
        smoothness: L > 0.

    Returns:
        The step, rounded down.

    Raises:
        ValueError: if m is negative, L is not positive, or :math:`m > L`.

    Examples:
        >>> strongly_convex_best_step(strong=1.0, smoothness=3.0)
        0.5
    """
    m, L = _strongly_convex(strong, positive("smoothness", smoothness))
    return limit(2, exact_upper(m) + exact_upper(L))


def strongly_convex_best_factor(strong: Real, smoothness: Real) -> Real:
    r"""Return the smallest factor of class d: :math:`(L-m)/(L+m)`.

    Args:
        strong: m >= 0, at most L.
        smoothness: L > 0.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if m is negative, L is not positive, or :math:`m > L`.

    Examples:
        >>> strongly_convex_best_factor(strong=1.0, smoothness=3.0)
        0.5
    """
    m, L = _strongly_convex(strong, positive("smoothness", smoothness))
    if isinstance(m, Bound) or isinstance(L, Bound):
        ratio = m / L  # m and L twice each would widen the enclosure
        return joined(2.0 / (1.0 + ratio) - 1.0, 0.0)
    return (L - m) / (L + m)


def _dissipative(dissipation: Real, lipschitz: Real) -> tuple[Real, Real]:
    m, L = finite("dissipation", dissipation), nonnegative("lipschitz", lipschitz)
    smallest = lower(abs(m)) if isinstance(m, Bound) else abs(m)
    if smallest > upper(L):
        raise ValueError(
            f"|dissipation| cannot exceed lipschitz (Cauchy-Schwarz), got {dissipation!r} and {lipschitz!r}."
        )
    return m, L


def _strongly_convex(strong: Real, smoothness: Real) -> tuple[Real, Real]:
    m, L = nonnegative("strong", strong), nonnegative("smoothness", smoothness)
    if lower(m) > upper(L):
        raise ValueError(f"strong cannot exceed smoothness, got {strong!r} > {smoothness!r}.")
    return m, L
