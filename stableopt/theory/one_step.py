r"""T4, one step of each gradient method on a quadratic of curvature :math:`\lambda`, as a 2-by-2 matrix.

The spectral radius of the matrix is below 1 exactly between zero curvature and the edge. These matrices are *not* normal: a
spectral radius below 1 does not make the norm at most 1. Use :func:`stableopt.theory.synthesize_metric` for a norm that works.
"""

from __future__ import annotations

import numpy as np

from stableopt.linalg.bound import Bound, Real
from stableopt.theory._arguments import Array, finite, fraction

__all__ = [
    "adam_matrix",
    "adamw_matrix",
    "heavy_ball_matrix",
    "nadam_matrix",
    "nesterov_matrix",
    "rmsprop_matrix",
    "schedule_free_matrix",
    "sgd_matrix",
]


def heavy_ball_matrix(lr: float, curvature: float, beta: float) -> Array:
    r"""Return one step of heavy ball on :math:`(\theta_t, \theta_{t-1})`: :math:`[[1+\beta-\eta\lambda, -\beta], [1, 0]]`.

    Args:
        lr: :math:`\eta`.
        curvature: :math:`\lambda`, of either sign.
        beta: momentum in [0, 1).

    Returns:
        The matrix, ``(2, 2)``.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> heavy_ball_matrix(0.5, curvature=1.0, beta=0.5)
        array([[ 1. , -0.5],
               [ 1. ,  0. ]])
    """
    b = fraction("beta", beta)
    return np.array([[1 + b - _number("lr", lr) * _number("curvature", curvature), -b], [1.0, 0.0]])


def nesterov_matrix(lr: float, curvature: float, beta: float) -> Array:
    r"""Return one step of Nesterov's method: :math:`[[(1+\beta)(1-\eta\lambda), -\beta(1-\eta\lambda)], [1, 0]]`.

    Args:
        lr: :math:`\eta`.
        curvature: :math:`\lambda`, of either sign.
        beta: momentum in [0, 1).

    Returns:
        The matrix on :math:`(\theta_t, \theta_{t-1})`, ``(2, 2)``.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> nesterov_matrix(0.5, curvature=1.0, beta=0.5)
        array([[ 0.75, -0.25],
               [ 1.  ,  0.  ]])
    """
    b, shrink = fraction("beta", beta), 1 - _number("lr", lr) * _number("curvature", curvature)
    return np.array([[(1 + b) * shrink, -b * shrink], [1.0, 0.0]])


def sgd_matrix(
    lr: float,
    curvature: float,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Array:
    r"""Return one step of ``torch.optim.SGD`` on (parameter, buffer).

    :math:`b^+ = \beta b+(1-d)(\lambda+\omega)\theta`, :math:`\theta^+ = \theta-\eta b^+`; with Nesterov's momentum
    :math:`\theta^+ = \theta-\eta((\lambda+\omega)\theta+\beta b^+)`.

    Args:
        lr: :math:`\eta`.
        curvature: :math:`\lambda`, of either sign.
        momentum: :math:`\beta` in [0, 1).
        dampening: d in [0, 1); as in torch it acts only with momentum.
        weight_decay: :math:`\omega`, coupled.
        nesterov: whether the gradient is taken ahead.

    Returns:
        The matrix, ``(2, 2)``.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        In torch the first step with momentum sets the buffer to the gradient without dampening; the matrix is that of later steps.

    Examples:
        >>> sgd_matrix(0.5, curvature=1.0, momentum=0.5)
        array([[ 0.5 , -0.25],
               [ 1.  ,  0.5 ]])
    """
    b, d, eta = fraction("momentum", momentum), fraction("dampening", dampening), _number("lr", lr)
    if nesterov and (d != 0 or b == 0):
        raise ValueError(f"nesterov needs momentum > 0 and dampening = 0, got {momentum!r} and {dampening!r}.")
    h = _number("curvature", curvature) + _number("weight_decay", weight_decay)
    gain = (1 - d) * h if b else h
    if nesterov:
        return np.array([[1 - eta * (h + b * gain), -eta * b * b], [gain, b]])
    return np.array([[1 - eta * gain, -eta * b], [gain, b]])


def adam_matrix(lr: float, curvature: float, beta1: float = 0.9) -> Array:
    r"""Return one step of Adam with a frozen preconditioner on (parameter, momentum), in the coordinates of P.

    Args:
        lr: :math:`\eta`.
        curvature: :math:`\lambda` of :math:`P^{-1/2}HP^{-1/2}`.
        beta1: in [0, 1).

    Returns:
        The matrix, ``(2, 2)``.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> adam_matrix(0.5, curvature=1.0, beta1=0.5)
        array([[ 0.75, -0.25],
               [ 0.5 ,  0.5 ]])
    """
    return adamw_matrix(lr, curvature, beta1, weight_decay=0.0)


def adamw_matrix(lr: float, curvature: float, beta1: float = 0.9, weight_decay: float = 0.01) -> Array:
    r"""Return one step of AdamW.

    :math:`m^+ = \beta_1m+(1-\beta_1)\lambda\theta`, :math:`\theta^+ = (1-\eta\omega)\theta-\eta m^+`.

    Args:
        lr: :math:`\eta`.
        curvature: :math:`\lambda` of :math:`P^{-1/2}HP^{-1/2}`.
        beta1: in [0, 1).
        weight_decay: :math:`\omega`, decoupled.

    Returns:
        The matrix on (parameter, momentum), ``(2, 2)``.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> adamw_matrix(0.5, curvature=1.0, beta1=0.5, weight_decay=0.5)
        array([[ 0.5 , -0.25],
               [ 0.5 ,  0.5 ]])
    """
    b, eta = fraction("beta1", beta1), _number("lr", lr)
    gain = (1 - b) * _number("curvature", curvature)
    return np.array([[1 - eta * _number("weight_decay", weight_decay) - eta * gain, -eta * b], [gain, b]])


def nadam_matrix(lr: float, curvature: float, beta1: float = 0.9) -> Array:
    r"""Return one step of NAdam with constant momentum and a frozen preconditioner on (parameter, momentum).

    :math:`m^+ = \beta_1m+(1-\beta_1)\lambda\theta`, :math:`\theta^+ = \theta-\eta(\beta_1m^+ + (1-\beta_1)\lambda\theta)`.

    Args:
        lr: :math:`\eta`.
        curvature: :math:`\lambda` of :math:`P^{-1/2}HP^{-1/2}`.
        beta1: in [0, 1).

    Returns:
        The matrix, ``(2, 2)``.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> nadam_matrix(1.0, curvature=1.0, beta1=0.5)
        array([[ 0.25, -0.25],
               [ 0.5 ,  0.5 ]])
    """
    b, eta = fraction("beta1", beta1), _number("lr", lr)
    gain = (1 - b) * _number("curvature", curvature)
    return np.array([[1 - eta * (1 + b) * gain, -eta * b * b], [gain, b]])


def rmsprop_matrix(lr: float, curvature: float, momentum: float = 0.0) -> Array:
    r"""Return one step of RMSprop with a frozen preconditioner on (parameter, buffer): :math:`b^+ = \beta b+\lambda\theta`.

    Args:
        lr: :math:`\eta`.
        curvature: :math:`\lambda` of :math:`P^{-1/2}HP^{-1/2}`.
        momentum: :math:`\beta` in [0, 1).

    Returns:
        The matrix, ``(2, 2)``.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> rmsprop_matrix(0.5, curvature=1.0)
        array([[ 0.5, -0. ],
               [ 1. ,  0. ]])
    """
    return sgd_matrix(lr, curvature, momentum=momentum)


def schedule_free_matrix(lr: float, curvature: float, beta: float = 0.9, weight: float = 0.0) -> Array:
    r"""Return one step of schedule-free gradient descent on (average, base point).

    :math:`y = (1-\beta)z+\beta x`, :math:`z^+ = z-\eta\lambda y`, :math:`x^+ = (1-c)x+cz^+`.

    Args:
        lr: :math:`\eta`.
        curvature: :math:`\lambda`, of either sign.
        beta: :math:`\beta` in [0, 1).
        weight: c in [0, 1].

    Returns:
        The matrix on (x, z), ``(2, 2)``.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> schedule_free_matrix(1.0, curvature=1.0, beta=0.5, weight=0.5)
        array([[ 0.25,  0.25],
               [-0.5 ,  0.5 ]])
    """
    b, c = fraction("beta", beta), fraction("weight", weight, closed=True)
    h = _number("lr", lr) * _number("curvature", curvature)
    return np.array([[1 - c - c * h * b, c * (1 - h * (1 - b))], [-h * b, 1 - h * (1 - b)]])


def _number(name: str, x: Real) -> float:
    value = finite(name, x)
    if isinstance(value, Bound):
        raise TypeError(f"{name} must be a float: a matrix of one step has no enclosures, got {x!r}.")
    return float(value)
