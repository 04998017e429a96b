r"""T7, sequences and the limit of continuous time: recurrent cells, state spaces, flows.

:math:`\rho(W) < 1` does *not* make a recurrent cell contract: ReLU with W = [[1.5, -2], [1.5, -1.5]] (:math:`\rho = 0.866`) has
a fixed point
that repels by 1.5 per step. What suffices is a small norm, in some diagonal scaling if need be.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from stableopt.linalg.bound import Bound, Real, lower, upper
from stableopt.theory._arguments import (
    Array,
    finite,
    fraction,
    increasing,
    matrix,
    nonnegative,
    positive,
    real_exp,
    real_sqrt,
    vector,
)
from stableopt.theory.profile import spectral_radius

__all__ = [
    "absolute_spectral_radius",
    "absolute_weights",
    "diagonal_norm",
    "flow_factor",
    "gradient_flow_factor",
    "leaky_cell_factor",
    "lru_gain",
    "lru_input_scale",
    "recurrent_factor",
    "state_space_gain",
    "unit_gain_input_scale",
]


def recurrent_factor(weight_norm: Real, slope: Real = 1.0) -> Real:
    r"""Bound one step of :math:`h^+ = \sigma(Wh+Ux+b)`: :math:`s\|W\|`, contracting if it is below 1.

    Args:
        weight_norm: :math:`\|W\|` in the Euclidean norm, or :func:`diagonal_norm` for the norm :math:`\|Dh\|`.
        slope: s >= 0, the Lipschitz constant of the elementwise :math:`\sigma`.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Examples:
        >>> recurrent_factor(0.5)
        0.5
    """
    return nonnegative("slope", slope) * nonnegative("weight_norm", weight_norm)


def leaky_cell_factor(step: float, weight_norm: Real) -> Real:
    r"""Bound one step of the leaky cell :math:`h^+ = (1-\tau)h+\tau\sigma(Wh+Ux+b)`: :math:`1-\tau(1-\rho)`.

    Args:
        step: :math:`\tau` in (0, 1].
        weight_norm: :math:`\rho \ge \|W\|_2`; contracting if below 1. Slopes of :math:`\sigma` lie in [0, 1].

    Returns:
        The factor; a Bound if the norm is one.

    Raises:
        ValueError: if the step is outside (0, 1] or the norm is negative.

    Examples:
        >>> leaky_cell_factor(0.5, weight_norm=0.5)
        0.75
    """
    tau = fraction("step", step, closed=True)
    if tau == 0:
        raise ValueError("step must lie in (0, 1], got 0.")
    return 1.0 - tau * (1.0 - nonnegative("weight_norm", weight_norm))


def diagonal_norm(W: ArrayLike, scaling: ArrayLike) -> float:
    r"""Return the norm of W in a diagonal metric: :math:`\|DWD^{-1}\|_2`, the factor of the cell in the norm :math:`\|Dh\|_2`.

    A diagonal D commutes with the slopes of :math:`\sigma`; a full matrix does not, and proves nothing.

    Args:
        W: ``(n, n)``.
        scaling: the diagonal of D, ``(n,)``, positive.

    Returns:
        The norm, computed in floating point.

    Raises:
        ValueError: if an argument is malformed or a scale is not positive.

    Examples:
        >>> diagonal_norm([[0.0, 4.0], [0.0, 0.0]], scaling=[1.0, 8.0])
        0.5
    """
    M, d = matrix("W", W), vector("scaling", scaling)
    if len(d) != len(M) or d.min() <= 0:
        raise ValueError(f"scaling must be {len(M)} positive numbers, got {d.tolist()}.")
    return float(np.linalg.norm(d[:, None] * M / d, 2))


def absolute_spectral_radius(W: ArrayLike) -> float:
    r"""Return :math:`\rho(|W|)`; below 1 the cell with slopes in [-1, 1] contracts in a weighted maximum norm.

    Args:
        W: ``(n, n)``.

    Returns:
        The spectral radius of the matrix of moduli, computed in floating point; at least :math:`\rho(W)`.

    Raises:
        ValueError: if W is not a finite square matrix.

    Examples:
        >>> absolute_spectral_radius([[-2.0, 1.0], [0.0, 1.0]])
        2.0
    """
    return spectral_radius(np.abs(matrix("W", W)))


def absolute_weights(W: ArrayLike, rate: float) -> Array:
    r"""Return weights w > 0 with :math:`\sum_j|W_{ij}|w_j \le \text{rate}\cdot w_i`.

    In the norm that they define the cell contracts at this rate.

    Args:
        W: ``(n, n)``.
        rate: a number above :math:`\rho(|W|)`.

    Returns:
        The weights for :func:`stableopt.theory.weighted_infinity_norm`, the largest being 1.

    Raises:
        ValueError: if the rate does not exceed :math:`\rho(|W|)`.

    Examples:
        >>> absolute_weights([[0.0, 4.0], [0.0, 0.0]], rate=0.5)
        array([1.        , 0.11111111])
    """
    M, r = np.abs(matrix("W", W)), float(upper(positive("rate", rate)))
    if absolute_spectral_radius(M) >= r:
        raise ValueError(
            f"rate must exceed the spectral radius {absolute_spectral_radius(M):.6g} of |W|, got {rate!r}."
        )
    w = np.linalg.solve(np.eye(len(M)) - M / r, np.ones(len(M)))
    return w / w.max()


def state_space_gain(modulus: Real, input_scale: Real, input_norm: Real = 1.0, output_norm: Real = 1.0) -> Real:
    r"""Bound the :math:`\ell_2` gain of a diagonal state space: :math:`\|C\|\|B\|\gamma/(1-|\lambda|)`.

    The system is :math:`h^+ = \Lambda h+\gamma Bx`, :math:`y = Ch`. A modulus below 1 bounds the state, but not the gain.

    Args:
        modulus: the largest :math:`|\lambda|`, below 1.
        input_scale: :math:`\gamma \ge 0`.
        input_norm: :math:`\|B\|`.
        output_norm: :math:`\|C\|`.

    Returns:
        The gain, attained by a constant input at a positive real eigenvalue; a Bound if an operand is one.

    Raises:
        ValueError: if the modulus reaches 1 or an argument is negative.

    Examples:
        >>> state_space_gain(0.75, input_scale=0.5)
        2.0
    """
    gain = nonnegative("input_scale", input_scale) / (1.0 - _modulus(modulus))
    return nonnegative("output_norm", output_norm) * nonnegative("input_norm", input_norm) * gain


def unit_gain_input_scale(modulus: Real) -> Real:
    r"""Return the input scale that makes the gain at most :math:`\|C\|\|B\|`: :math:`\gamma = 1-|\lambda|`.

    Args:
        modulus: :math:`|\lambda| < 1`.

    Returns:
        The scale; a Bound if the modulus is one (use its lower end).

    Raises:
        ValueError: if the modulus is outside [0, 1).

    Examples:
        >>> unit_gain_input_scale(0.75)
        0.25
    """
    return 1.0 - _modulus(modulus)


def lru_input_scale(modulus: Real) -> Real:
    r"""Return the input scale of the linear recurrent unit.

    :math:`\gamma = \sqrt{1-|\lambda|^2}`, which keeps the variance of white noise.

    Args:
        modulus: :math:`|\lambda| < 1`.

    Returns:
        The scale; a Bound if the modulus is one.

    Raises:
        ValueError: if the modulus is outside [0, 1).

    Examples:
        >>> lru_input_scale(0.6)
        0.8
    """
    return real_sqrt(1.0 - _modulus(modulus) ** 2)


def lru_gain(modulus: Real) -> Real:
    r"""Return the :math:`\ell_2` gain of the linear recurrent unit: :math:`\sqrt{(1+r)/(1-r)}`, 14 at r = 0.99.

    Args:
        modulus: r = :math:`|\lambda| < 1`.

    Returns:
        The gain; a Bound if the modulus is one.

    Raises:
        ValueError: if the modulus is outside [0, 1).

    Examples:
        >>> round(lru_gain(0.99), 1)
        14.1
    """
    return increasing(lambda r: real_sqrt((1.0 + r) / (1.0 - r)), _modulus(modulus))


def flow_factor(rate: Real, time: Real) -> Real:
    r"""Bound how a flow :math:`\dot h = f(h)` amplifies perturbations: :math:`e^{-mt}` if the log-norm of Df is at most -m.

    Args:
        rate: m, of either sign, in the norm P of :func:`stableopt.theory.metric_log_norm`.
        time: t >= 0.

    Returns:
        The factor in that norm; a Bound if an operand is one.

    Raises:
        ValueError: if the time is negative or an argument is not finite.

    Examples:
        >>> flow_factor(0.0, time=3.0)
        1.0
    """
    return real_exp(-finite("rate", rate) * nonnegative("time", time))


def gradient_flow_factor(smallest_curvature: Real, time: Real) -> Real:
    r"""Bound how gradient flow amplifies perturbations of its start: :math:`e^{-\mu t}`.

    Args:
        smallest_curvature: :math:`\mu`, below the spectrum of the Hessian, of either sign.
        time: t >= 0.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if the time is negative or an argument is not finite.

    Examples:
        >>> gradient_flow_factor(1.0, time=0.0)
        1.0
    """
    return flow_factor(smallest_curvature, time)


def _modulus(modulus: Real) -> Real:
    if lower(nonnegative("modulus", modulus)) < 0 or upper(modulus) >= 1:
        raise ValueError(f"modulus must lie in [0, 1), got {modulus!r}.")
    return modulus if isinstance(modulus, Bound) else float(modulus)
