r"""T3i and the rest of T3: budgets over depth, compensation, shortcuts that rescale, a nonlinearity after the sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

from stableopt.linalg.bound import Bound, Real, lower, upper
from stableopt.theory._arguments import (
    exact_upper,
    fraction,
    limit,
    listed,
    nonnegative,
    positive,
    real_exp,
    real_log,
)

__all__ = [
    "averaged_factor",
    "budget_max_step",
    "compensated_max_step",
    "depth_growth",
    "depth_growth_budget",
    "post_activation_factor",
    "scaled_shortcut_factor",
    "shortcut_factor",
]


def depth_growth(steps: Iterable[Real], lipschitz: Iterable[Real]) -> Real:
    r"""Bound a stack of Lipschitz blocks: :math:`\prod_l(1+\tau_lL_l)`.

    Args:
        steps: :math:`\tau_l \ge 0`, one per block.
        lipschitz: :math:`L_l \ge 0`, one per block.

    Returns:
        The growth; a Bound if an operand is one.

    Raises:
        ValueError: if the lengths differ or an argument is negative.

    Examples:
        >>> depth_growth([0.5, 0.5], lipschitz=[2.0, 1.0])
        3.0
    """
    growth: Real = 1.0
    for tau, L in _pairs(steps, lipschitz):
        growth = growth * (1.0 + tau * L)
    return growth


def depth_growth_budget(steps: Iterable[Real], lipschitz: Iterable[Real]) -> Real:
    r"""Bound a stack of Lipschitz blocks of any depth by its budget: :math:`\exp\sum_l\tau_lL_l \ge \prod_l(1+\tau_lL_l)`.

    Args:
        steps: :math:`\tau_l \ge 0`, one per block.
        lipschitz: :math:`L_l \ge 0`, one per block.

    Returns:
        The growth G; a Bound if an operand is one.

    Raises:
        ValueError: if the lengths differ or an argument is negative.

    Examples:
        >>> round(depth_growth_budget([0.01] * 100, lipschitz=[1.0] * 100), 3)
        2.718
    """
    total: Real = 0.0
    for tau, L in _pairs(steps, lipschitz):
        total = total + tau * L
    return real_exp(total)


def budget_max_step(growth: Real, lipschitz: Iterable[Real]) -> float:
    r"""Return the common step that keeps a stack within a growth budget: :math:`\log G/\sum_l L_l`.

    Args:
        growth: G >= 1 (the lower end is used).
        lipschitz: :math:`L_l \ge 0`, one per block (upper ends are used).

    Returns:
        The step, rounded down; infinity if all branches are constant.

    Raises:
        ValueError: if G < 1 or a constant is negative.

    Examples:
        >>> budget_max_step(1.0, lipschitz=[2.0, 2.0])
        0.0
    """
    if lower(positive("growth", growth)) < 1:
        raise ValueError(
            f"growth must be at least 1, since a Lipschitz branch cannot be made to contract, got {growth!r}."
        )
    total = sum((exact_upper(L) for L in listed("lipschitz", lipschitz)), Fraction(0))
    return math.inf if total == 0 else limit(Fraction(lower(real_log(Bound.point(lower(growth))))), total)


def compensated_max_step(contraction: Real, lipschitz: Real) -> float:
    r"""Return the step that a contraction before an expansive block allows: :math:`(1/c - 1)/L`.

    Args:
        contraction: c in (0, 1], the Lipschitz constant of what comes before (the upper end is used).
        lipschitz: L >= 0 of the expansive branch (the upper end is used).

    Returns:
        The largest :math:`\tau` with :math:`(1+\tau L)c \le 1`, rounded down; infinity for L = 0.

    Raises:
        ValueError: if c is outside (0, 1] or L is negative.

    Note:
        The pair is nonexpansive, the expansive block alone is not: partial products may exceed 1.

    Examples:
        >>> compensated_max_step(0.5, lipschitz=2.0)
        0.5
    """
    c, L = positive("contraction", contraction), nonnegative("lipschitz", lipschitz)
    if upper(c) > 1:
        raise ValueError(f"contraction must lie in (0, 1], got {contraction!r}.")
    return math.inf if upper(L) == 0 else limit(1 / exact_upper(c) - 1, exact_upper(L))


def averaged_factor(weight: float, lipschitz: Real = 1.0) -> Real:
    r"""Bound an averaged block (class g) :math:`(1-a)h + aT(h)`: :math:`1 - a + a\,\mathrm{Lip}(T)`, in any norm.

    Args:
        weight: a in [0, 1].
        lipschitz: Lip(T) >= 0; the block is nonexpansive if it is at most 1.

    Returns:
        The factor; a Bound if the Lipschitz constant is one.

    Raises:
        ValueError: if the weight is outside [0, 1] or the constant is negative.

    References:
        Krasnoselskii-Mann iteration.

    Examples:
        >>> averaged_factor(0.5, lipschitz=0.5)
        0.75
    """
    a = fraction("weight", weight, closed=True)
    return (1.0 - a) + a * nonnegative("lipschitz", lipschitz)


def shortcut_factor(shortcut_norm: Real, step: Real, lipschitz: Real) -> Real:
    r"""Bound a block with any linear shortcut, :math:`Sh+\tau f(h)`: :math:`\|S\|+\tau L`.

    Args:
        shortcut_norm: the norm of S (a projection, a pooling, a scalar).
        step: :math:`\tau \ge 0`.
        lipschitz: L >= 0 of the branch.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Examples:
        >>> shortcut_factor(0.5, step=0.25, lipschitz=2.0)
        1.0
    """
    return nonnegative("shortcut_norm", shortcut_norm) + nonnegative("step", step) * nonnegative("lipschitz", lipschitz)


def scaled_shortcut_factor(scale: Real, step: Real, factor: Callable[[Real], Real]) -> Real:
    r"""Bound a block with a scaled shortcut, :math:`\alpha h+\tau f(h)`.

    :math:`\alpha` times the factor at step :math:`\tau/\alpha`.

    Args:
        scale: :math:`\alpha > 0`.
        step: :math:`\tau \ge 0`.
        factor: the law of the branch, as a function of the step.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if the scale is not positive or the step is negative.

    Examples:
        >>> from stableopt.theory import cocoercive_factor
        >>> scaled_shortcut_factor(0.5, 0.25, lambda step: cocoercive_factor(step, 4.0))
        0.5
    """
    alpha = positive("scale", scale)
    return alpha * factor(nonnegative("step", step) / alpha)


def post_activation_factor(block_factor: Real, activation_lipschitz: Real) -> Real:
    r"""Bound a block with a nonlinearity after the sum, :math:`\sigma(h+\tau f(h))`: its factor times :math:`L_\sigma`.

    Args:
        block_factor: a bound on the block before the nonlinearity.
        activation_lipschitz: :math:`L_\sigma \ge 0`.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Examples:
        >>> post_activation_factor(1.5, activation_lipschitz=0.5)
        0.75
    """
    return nonnegative("block_factor", block_factor) * nonnegative("activation_lipschitz", activation_lipschitz)


def _pairs(steps: Iterable[Real], lipschitz: Iterable[Real]) -> list[tuple[Real, Real]]:
    taus, Ls = listed("steps", steps), listed("lipschitz", lipschitz)
    if len(taus) != len(Ls):
        raise ValueError(f"steps and lipschitz must have one entry per block, got {len(taus)} and {len(Ls)}.")
    return list(zip(taus, Ls, strict=True))
