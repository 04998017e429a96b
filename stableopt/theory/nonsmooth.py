r"""T5, nonsmooth systems: bounds that hold for every element of the Clarke derivative.

A piecewise smooth activation contributes slopes from an interval, at a kink all of it; the laws of T2 and T3 then hold verbatim
with
that interval. The chain rule is an inclusion, so the bounds are sound and need not be attained.
"""

from __future__ import annotations

import math

from stableopt.linalg.bound import Bound, Real
from stableopt.theory._arguments import finite, nonnegative, real_sqrt
from stableopt.theory.residual import strongly_convex_factor
from stableopt.theory.skew_damped import implicit_factor

__all__ = [
    "CLARKE_SLOPES",
    "clarke_slopes",
    "leaky_relu_slopes",
    "prox_factor",
    "prox_gradient_factor",
    "slope_lipschitz",
    "slopes_allow_gradient_block",
    "subgradient_separation",
]

CLARKE_SLOPES: dict[str, Bound] = {
    "abs": Bound(-1.0, 1.0),
    "celu": Bound(0.0, 1.0),
    "elu": Bound(0.0, 1.0),
    "gelu": Bound(-0.12891, 1.12891),
    "groupsort": Bound(0.0, 1.0),
    "hardsigmoid": Bound(0.0, 0.16666666666666669),
    "hardswish": Bound(-0.5, 1.5),
    "hardtanh": Bound(0.0, 1.0),
    "identity": Bound(1.0, 1.0),
    "logsigmoid": Bound(0.0, 1.0),
    "mish": Bound(-0.11253, 1.08850),
    "relu": Bound(0.0, 1.0),
    "relu6": Bound(0.0, 1.0),
    "sigmoid": Bound(0.0, 0.25),
    "silu": Bound(-0.09985, 1.09985),
    "softplus": Bound(0.0, 1.0),
    "softsign": Bound(0.0, 1.0),
    "tanh": Bound(0.0, 1.0),
}
"""The slopes of activations with torch's default parameters, kinks included, rounded outwards."""


def clarke_slopes(activation: str) -> Bound:
    """Return the interval of all slopes of an activation, kinks included.

    Args:
        activation: a name of :data:`CLARKE_SLOPES`. For "groupsort", which is not elementwise, the entries of its
            permutation matrices.

    Returns:
        The enclosure of the slopes.

    Raises:
        ValueError: if the activation is not known.

    Examples:
        >>> clarke_slopes("relu")
        Bound(lower=0.0, upper=1.0, proved=True)
        >>> clarke_slopes("silu").lower < 0
        True
    """
    if activation not in CLARKE_SLOPES:
        raise ValueError(f"the slopes of {activation!r} are not known; known are {', '.join(sorted(CLARKE_SLOPES))}.")
    return CLARKE_SLOPES[activation]


def leaky_relu_slopes(negative_slope: float) -> Bound:
    """Return the slopes of a leaky ReLU: the interval between the negative slope and 1.

    Args:
        negative_slope: any finite number.

    Returns:
        The enclosure of the slopes.

    Raises:
        ValueError: if the slope is not finite.

    Examples:
        >>> leaky_relu_slopes(0.01)
        Bound(lower=0.01, upper=1.0, proved=True)
    """
    finite("negative_slope", negative_slope)
    return Bound(min(negative_slope, 1.0), max(negative_slope, 1.0))


def slope_lipschitz(slopes: Bound) -> float:
    r"""Return the Lipschitz constant of an elementwise activation: the largest modulus of a slope, :math:`\max(|l|, |u|)`.

    Args:
        slopes: the interval of slopes.

    Returns:
        The constant.

    Raises:
        ValueError: if the interval is not finite.

    Examples:
        >>> slope_lipschitz(Bound(-0.5, 0.25))
        0.5
    """
    finite("slopes", slopes)
    return abs(slopes).upper


def slopes_allow_gradient_block(slopes: Bound) -> bool:
    r"""Decide whether :math:`-A^\top\sigma(Ah+b)` is a gradient branch for every A: no slope is negative.

    Args:
        slopes: the interval of slopes.

    Returns:
        True for ReLU, tanh, sigmoid and the like; False for GELU and SiLU, whose blocks expand at every step size.

    Raises:
        ValueError: if the interval is not finite.

    Examples:
        >>> slopes_allow_gradient_block(clarke_slopes("tanh")), slopes_allow_gradient_block(clarke_slopes("gelu"))
        (True, False)
    """
    finite("slopes", slopes)
    return slopes.lower >= 0


def prox_factor(step: Real = 1.0, strong: Real = 0.0) -> Real:
    r"""Bound the Lipschitz constant of a prox of a convex g, or a projection on a convex set.

    :math:`1/(1+\tau m)`, 1 without strong convexity.

    Both are firmly nonexpansive: :math:`\|Px-Py\|^2 \le \langle Px-Py, x-y\rangle`, with symmetric derivatives of spectrum in
    [0, 1].

    Args:
        step: :math:`\tau \ge 0` of the prox.
        strong: m >= 0 of g.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Note:
        A projection on a nonconvex set (orthogonal matrices, a rank, a number of nonzeros) is not nonexpansive.

    Examples:
        >>> prox_factor(), prox_factor(step=2.0, strong=0.5)
        (1.0, 0.5)
    """
    return implicit_factor(step, nonnegative("strong", strong))


def prox_gradient_factor(lr: Real, smallest_curvature: Real, smoothness: Real, strong: Real = 0.0) -> Real:
    r"""Bound one step of proximal or projected gradient: :math:`\max(|1-\eta\mu|, |1-\eta L|)/(1+\eta m)`.

    Args:
        lr: :math:`\eta \ge 0`; nonexpansive up to 2/L.
        smallest_curvature: :math:`\mu \ge 0`, the strong convexity of the smooth part.
        smoothness: L, at least :math:`\mu`.
        strong: m >= 0, the strong convexity of the other part.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite, or :math:`\mu > L`.

    Examples:
        >>> prox_gradient_factor(0.5, smallest_curvature=1.0, smoothness=3.0, strong=2.0)
        0.25
    """
    return strongly_convex_factor(lr, smallest_curvature, smoothness) * prox_factor(lr, strong)


def subgradient_separation(distance: Real, lr: Real, lipschitz: Real) -> Real:
    r"""Bound the distance of two subgradient runs after a step on the same sample: :math:`\sqrt{\|\delta\|^2+4\eta^2G^2}`.

    Args:
        distance: :math:`\|\delta\| \ge 0` before.
        lr: :math:`\eta \ge 0`.
        lipschitz: G >= 0, a bound on all subgradients of the convex loss.

    Returns:
        The distance after, attained in the limit distance = 0 by two points on either side of the kink of
        :math:`G|\theta|`; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Note:
        No contraction holds in general: the method is not nonexpansive at any step.

    Examples:
        >>> subgradient_separation(3.0, lr=1.0, lipschitz=2.0)
        5.0
    """
    drift = 2.0 * nonnegative("lr", lr) * nonnegative("lipschitz", lipschitz)
    distance = nonnegative("distance", distance)
    if isinstance(distance, Bound) or isinstance(drift, Bound):
        return real_sqrt(distance**2 + drift**2)
    return math.hypot(distance, drift)
