r"""T4, energies that provably fall: for each method an energy, its dissipation and the largest sound learning rate.

Every law has the form :math:`V^+ \le V - \kappa\|d^+\|^2`, :math:`d^+` the realized displacement of the step, and needs no
convexity
of f. The *dissipation* is :math:`\kappa`; the *energy limit* is the learning rate at which it reaches zero.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from stableopt.linalg.bound import Real
from stableopt.theory._arguments import Array, exact_upper, finite, fraction, limit, nonnegative, positive

__all__ = [
    "gradient_descent_decrease",
    "gradient_descent_energy_limit",
    "heavy_ball_dissipation",
    "heavy_ball_energy",
    "heavy_ball_energy_limit",
    "heavy_ball_lr_drift",
    "prox_gradient_dissipation",
    "prox_gradient_energy_limit",
    "realized_buffer",
    "sgd_energy_limit",
]


def gradient_descent_decrease(lr: Real, smoothness: Real, gradient_norm: Real) -> Real:
    r"""Return what a gradient step takes from f at least: :math:`\eta(1-\eta L/2)\|\nabla f\|^2`.

    Args:
        lr: :math:`\eta \ge 0`.
        smoothness: L >= 0, the Lipschitz constant of the gradient.
        gradient_norm: :math:`\|\nabla f(\theta)\|`.

    Returns:
        The guaranteed decrease, negative beyond 2/L; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    References:
        The descent lemma.

    Examples:
        >>> gradient_descent_decrease(0.5, smoothness=2.0, gradient_norm=4.0)
        4.0
    """
    eta, L = nonnegative("lr", lr), nonnegative("smoothness", smoothness)
    return eta * (1.0 - eta * L / 2.0) * nonnegative("gradient_norm", gradient_norm) ** 2


def gradient_descent_energy_limit(smoothness: Real) -> float:
    r"""Return the largest learning rate at which gradient descent never raises an L-smooth loss: :math:`2/L`.

    Args:
        smoothness: L >= 0 (the upper end is used).

    Returns:
        The limit, rounded down.

    Raises:
        ValueError: if L is negative or not finite.

    Examples:
        >>> gradient_descent_energy_limit(4.0)
        0.5
    """
    return sgd_energy_limit(smoothness)


def prox_gradient_dissipation(lr: Real, smoothness: Real) -> Real:
    r"""Return :math:`\kappa = 1/\eta-L/2` of proximal (and projected) gradient.

    :math:`F(\theta^+) \le F(\theta)-\kappa\|\theta^+-\theta\|^2`.

    F = f + g with f L-smooth and g convex (an indicator for a projection).

    Args:
        lr: :math:`\eta > 0`.
        smoothness: L >= 0.

    Returns:
        The dissipation, negative beyond 2/L; a Bound if an operand is one.

    Raises:
        ValueError: if lr is not positive or L is negative.

    Examples:
        >>> prox_gradient_dissipation(0.25, smoothness=2.0)
        3.0
    """
    return heavy_ball_dissipation(lr, smoothness, beta=0.0)


def prox_gradient_energy_limit(smoothness: Real) -> float:
    r"""Return the largest learning rate at which proximal gradient never raises F = f + g: :math:`2/L`.

    Args:
        smoothness: L >= 0 of f; g is convex.

    Returns:
        The limit, rounded down.

    Raises:
        ValueError: if L is negative or not finite.

    Examples:
        >>> prox_gradient_energy_limit(4.0)
        0.5
    """
    return sgd_energy_limit(smoothness)


def heavy_ball_energy(value: Real, lr: Real, beta: float, buffer_norm: Real) -> Real:
    r"""Return the energy of heavy ball: :math:`V = F+\frac{\beta\eta}{2}\|b\|^2`.

    b is torch's buffer after the step, equal to the realized displacement :math:`(\theta_{\text{old}}-\theta_{\text{new}})/\eta`;
    in terms of :math:`\Delta` it is :math:`F+\frac{\beta}{2\eta}\|\Delta\|^2`.

    Args:
        value: F at the parameters, of either sign.
        lr: :math:`\eta > 0`.
        beta: momentum in [0, 1).
        buffer_norm: the norm of b.

    Returns:
        The energy; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> heavy_ball_energy(1.0, lr=0.5, beta=0.5, buffer_norm=2.0)
        1.5
    """
    kinetic = fraction("beta", beta) / 2 * positive("lr", lr) * nonnegative("buffer_norm", buffer_norm) ** 2
    return finite("value", value) + kinetic


def heavy_ball_dissipation(lr: Real, smoothness: Real, beta: float) -> Real:
    r"""Return :math:`\kappa = (1-\beta)/\eta-L/2` of heavy ball, with or without a prox.

    :math:`V^+ \le V-\kappa\|\theta^+-\theta\|^2` for the energy of :func:`heavy_ball_energy`, if after a prox or projection the
    buffer is reset by :func:`realized_buffer`.

    Args:
        lr: :math:`\eta > 0`.
        smoothness: L >= 0 of f.
        beta: momentum in [0, 1).

    Returns:
        The dissipation, negative beyond :func:`heavy_ball_energy_limit`; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        The loss alone may rise; the energy does not. Without the reset of the buffer the law fails.

    References:
        The prox inequality, the descent lemma and Young's inequality; Ochs et al., iPiano, 2014.

    Examples:
        >>> heavy_ball_dissipation(0.25, smoothness=2.0, beta=0.5)
        1.0
    """
    return (1.0 - fraction("beta", beta)) / positive("lr", lr) - nonnegative("smoothness", smoothness) / 2.0


def heavy_ball_energy_limit(smoothness: Real, beta: float) -> float:
    r"""Return the largest learning rate at which the energy of heavy ball never rises: :math:`2(1-\beta)/L`.

    Args:
        smoothness: L >= 0 (the upper end is used).
        beta: momentum in [0, 1).

    Returns:
        The limit, rounded down. The edge :math:`2(1+\beta)/L` is 19 times larger at beta = 0.9.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> heavy_ball_energy_limit(4.0, beta=0.5)
        0.25
    """
    return sgd_energy_limit(smoothness, momentum=beta)


def sgd_energy_limit(
    smoothness: Real, *, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0
) -> float:
    r"""Return the sound limit of ``torch.optim.SGD`` without Nesterov: :math:`\frac{2(1-\beta)}{(1-d)(L+\omega)}`.

    The energy is :func:`heavy_ball_energy` of :math:`f+\frac{\omega}{2}\|\theta\|^2` with learning rate :math:`(1-d)\eta`.

    Args:
        smoothness: L >= 0 of the loss without the weight decay.
        momentum: :math:`\beta` in [0, 1).
        dampening: d in [0, 1); as in torch it acts only with momentum.
        weight_decay: :math:`\omega \ge 0`, coupled.

    Returns:
        The limit, rounded down.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> sgd_energy_limit(3.0, momentum=0.5, dampening=0.5, weight_decay=1.0)
        0.5
    """
    beta, d = Fraction(fraction("momentum", momentum)), Fraction(fraction("dampening", dampening))
    total = exact_upper(nonnegative("smoothness", smoothness)) + exact_upper(nonnegative("weight_decay", weight_decay))
    return limit(2 * (1 - beta), (1 - d if beta else 1) * total)


def heavy_ball_lr_drift(lr: Real, lr_next: Real, beta: float, buffer_norm: Real) -> Real:
    r"""Return what a change of the learning rate adds to the energy: :math:`\frac\beta2(\eta^+-\eta)\|b\|^2`.

    Args:
        lr: :math:`\eta > 0` before.
        lr_next: :math:`\eta^+ > 0` after.
        beta: momentum in [0, 1).
        buffer_norm: the norm of the buffer.

    Returns:
        The drift; a decay of the learning rate only takes energy away. A Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> heavy_ball_lr_drift(0.5, 1.0, beta=0.5, buffer_norm=2.0)
        0.5
    """
    change = positive("lr_next", lr_next) - positive("lr", lr)
    return fraction("beta", beta) / 2 * change * nonnegative("buffer_norm", buffer_norm) ** 2


def realized_buffer(before: ArrayLike, after: ArrayLike, lr: float) -> Array:
    r"""Return the momentum buffer to store after a prox or projection: :math:`b = (\theta_{\text{old}}-\theta_{\text{new}})/\eta`.

    Args:
        before: parameters before the step, any shape.
        after: parameters after the prox, the same shape.
        lr: :math:`\eta > 0`.

    Returns:
        The buffer, float64.

    Raises:
        ValueError: if the shapes differ or lr is not positive.

    Examples:
        >>> realized_buffer([1.0, 0.0], [0.5, 0.0], lr=0.5)
        array([1., 0.])
    """
    x, y = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"before and after must have one shape, got {x.shape} and {y.shape}.")
    positive("lr", lr)
    return (x - y) / lr
