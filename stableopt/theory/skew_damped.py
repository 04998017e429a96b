r"""T3e, linear skew blocks with damping, and implicit blocks, which know no CFL limit."""

from __future__ import annotations

import math

from stableopt.linalg.bound import Real, lower, upper
from stableopt.theory._arguments import exact_lower, exact_upper, finite, limit, nonnegative, positive, real_sqrt

__all__ = [
    "implicit_factor",
    "implicit_max_step",
    "skew_damped_best_factor",
    "skew_damped_best_step",
    "skew_damped_factor",
    "skew_damped_max_step",
]


def skew_damped_factor(step: Real, damping: Real, skew_norm: Real, remainder: Real = 0.0) -> Real:
    r"""Return the norm of a linear skew block with damping (class e), :math:`f(h) = (K-\gamma I)h`, and of what is near to one.

    :math:`\sqrt{(1-\tau\gamma)^2+\tau^2\omega^2} + \tau\rho` for :math:`f(h) = (K-\gamma I)h + g(h)`, Lip g at most
    :math:`\rho`.

    Args:
        step: :math:`\tau \ge 0`.
        damping: :math:`\gamma \ge 0`.
        skew_norm: :math:`\omega = \|K\|_2` with :math:`K^\top = -K`.
        remainder: :math:`\rho \ge 0`, a Lipschitz constant of the nonlinear rest.

    Returns:
        The norm, attained by some rest; a Bound if an operand is one. It is never above :func:`dissipative_factor` for
        :math:`m = \gamma - \rho`, :math:`L = \sqrt{\gamma^2+\omega^2} + \rho`.

    Raises:
        ValueError: if an argument is negative or not finite.

    Note:
        K itself acts linearly. :math:`\sigma(Kh+b) - \gamma h` is *not* covered: diag(slopes) K is not skew, and the block can
        expand at every step size.

    Examples:
        >>> skew_damped_factor(0.4, damping=1.0, skew_norm=2.0)
        1.0
        >>> skew_damped_factor(0.5, damping=1.0, skew_norm=0.0, remainder=0.5)
        0.75
    """
    tau, rho = nonnegative("step", step), nonnegative("remainder", remainder)
    gamma, omega = nonnegative("damping", damping), nonnegative("skew_norm", skew_norm)
    return real_sqrt((1.0 - tau * gamma) ** 2 + (tau * omega) ** 2) + tau * rho


def skew_damped_max_step(damping: Real, skew_norm: Real, remainder: Real = 0.0) -> float:
    r"""Return the limit of class e: nonexpansive iff :math:`\tau \le 2\gamma/(\gamma^2+\omega^2)`; never without damping.

    With a rest of Lipschitz constant :math:`\rho` it is :math:`2(\gamma-\rho)/(\gamma^2+\omega^2-\rho^2)`.

    Args:
        damping: :math:`\gamma \ge 0`.
        skew_norm: :math:`\omega \ge 0` (the upper end is used).
        remainder: :math:`\rho \ge 0` (the upper end is used).

    Returns:
        The limit over the whole enclosure, rounded down; infinity for the zero branch.

    Raises:
        ValueError: if an argument is negative or not finite.

    Examples:
        >>> skew_damped_max_step(damping=2.0, skew_norm=2.0)
        0.5
        >>> skew_damped_max_step(damping=0.0, skew_norm=2.0)
        0.0
        >>> skew_damped_max_step(damping=1.0, skew_norm=0.0, remainder=0.5)
        1.3333333333333333
    """
    gamma, omega = nonnegative("damping", damping), nonnegative("skew_norm", skew_norm)
    rho = exact_upper(nonnegative("remainder", remainder))
    if upper(gamma) == upper(omega) == rho == 0:
        return math.inf
    # As a function of the damping the limit rises up to gamma = rho + omega and falls beyond: its minimum is at an end.
    square = exact_upper(omega) ** 2 - rho**2
    return min(limit(2 * (g - rho), g * g + square) for g in (exact_lower(gamma), exact_upper(gamma)))


def skew_damped_best_step(damping: Real, skew_norm: Real) -> float:
    r"""Return the step with the smallest norm of class e: :math:`\gamma/(\gamma^2+\omega^2)`.

    Args:
        damping: :math:`\gamma > 0`.
        skew_norm: :math:`\omega \ge 0`.

    Returns:
        The step, half of :func:`skew_damped_max_step`, rounded down.

    Raises:
        ValueError: if the damping is not positive or an argument is not finite.

    Examples:
        >>> skew_damped_best_step(damping=2.0, skew_norm=2.0)
        0.25
    """
    return skew_damped_max_step(positive("damping", damping), skew_norm) / 2


def skew_damped_best_factor(damping: Real, skew_norm: Real) -> Real:
    r"""Return the smallest norm of class e: :math:`\omega/\sqrt{\gamma^2+\omega^2}`.

    Args:
        damping: :math:`\gamma > 0`.
        skew_norm: :math:`\omega \ge 0`.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if the damping is not positive or an argument is not finite.

    Examples:
        >>> skew_damped_best_factor(damping=3.0, skew_norm=4.0)
        0.8
    """
    ratio = nonnegative("skew_norm", skew_norm) / positive("damping", damping)
    return real_sqrt(1.0 - 1.0 / (1.0 + ratio**2))


def implicit_factor(step: Real, dissipation: Real) -> Real:
    r"""Bound an implicit block :math:`h^+ = (I-\tau f)^{-1}(h)` (backward Euler, proximal map): :math:`1/(1+\tau m)`.

    Hypothesis: f is one-sided Lipschitz with constant -m as in class b; no Lipschitz constant is needed.

    Args:
        step: :math:`\tau \ge 0`, with :math:`1+\tau m > 0`; any step if m >= 0 (no CFL limit).
        dissipation: m.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if :math:`1+\tau m \le 0`, where the equation may have no or many solutions.

    Examples:
        >>> implicit_factor(3.0, dissipation=1.0)
        0.25
    """
    denominator = 1.0 + nonnegative("step", step) * finite("dissipation", dissipation)
    if lower(denominator) <= 0:
        raise ValueError(
            f"an implicit block needs 1 + step * dissipation > 0, got step={step!r}, dissipation={dissipation!r}."
        )
    return 1.0 / denominator


def implicit_max_step(dissipation: Real) -> float:
    r"""Return the limit of solvability of an implicit block: infinity for m >= 0, else :math:`1/|m|` (not reached itself).

    Args:
        dissipation: m (the lower end is used).

    Returns:
        The limit, rounded down. For m < 0 the block is well posed below it, but expands.

    Raises:
        ValueError: if m is not finite.

    Examples:
        >>> implicit_max_step(1.0), implicit_max_step(-2.0)
        (inf, 0.5)
    """
    return limit(1, -exact_lower(finite("dissipation", dissipation)))
