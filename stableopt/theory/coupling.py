r"""T6, the coupled representation-parameter system: small gain.

One coupled step obeys :math:`\|\delta h^+\| \le a\|\delta h\|+b\|\delta\theta\|` and
:math:`\|\delta\theta^+\| \le c\|\delta h\|+d\|\delta\theta\|`.
"""

from __future__ import annotations

from stableopt.linalg.bound import Bound, Real, upper
from stableopt.theory._arguments import exact_upper, finite, increasing, joined, nonnegative, real_sqrt

__all__ = [
    "mixed_sensitivity",
    "small_gain_holds",
    "small_gain_radius",
    "small_gain_weights",
    "triangular_radius",
]


def small_gain_radius(a: Real, b: Real, c: Real, d: Real) -> Real:
    r"""Return the spectral radius of the gain matrix: :math:`\frac{a+d}2+\sqrt{\big(\frac{a-d}2\big)^2+bc}`.

    Args:
        a: gain of the representation on itself.
        b: gain of the parameters on the representation.
        c: gain of the representation on the parameters.
        d: gain of the parameters on themselves.

    Returns:
        :math:`\rho`; below 1 the coupled system contracts in the norm of :func:`small_gain_weights`. A Bound if an operand is one.

    Raises:
        ValueError: if a gain is negative or not finite.

    Examples:
        >>> small_gain_radius(0.5, 0.25, 0.25, 0.5)
        0.75
    """
    return increasing(_radius, *_gains(a, b, c, d))


def small_gain_holds(a: Real, b: Real, c: Real, d: Real) -> bool:
    r"""Decide whether the gain matrix has spectral radius below 1: a < 1, d < 1 and bc < (1-a)(1-d).

    Args:
        a: gain of the representation on itself.
        b: gain of the parameters on the representation.
        c: gain of the representation on the parameters.
        d: gain of the parameters on themselves.

    Returns:
        True if it holds for every value in the enclosures; decided in rational arithmetic.

    Raises:
        ValueError: if a gain is negative or not finite.

    Examples:
        >>> small_gain_holds(0.5, 0.25, 0.25, 0.5), small_gain_holds(0.5, 0.5, 0.5, 0.5)
        (True, False)
    """
    A, B, C, D = (exact_upper(x) for x in _gains(a, b, c, d))
    return A < 1 and D < 1 and B * C < (1 - A) * (1 - D)


def small_gain_weights(a: float, b: float, c: float, d: float, rate: float | None = None) -> tuple[float, float]:
    r"""Return positive weights v so that :math:`V = v_1\|\delta h\|+v_2\|\delta\theta\|` decays by the rate per step.

    Without ``rate`` this is the left Perron vector and the rate is the spectral radius. If b or c is zero that vector
    may vanish somewhere; then give a rate above the radius.

    Args:
        a: gain of the representation on itself.
        b: gain of the parameters on the representation.
        c: gain of the representation on the parameters.
        d: gain of the parameters on themselves.
        rate: None, or a number above the spectral radius.

    Returns:
        :math:`(v_1, v_2)`, positive, with the sum 1; computed in floating point.

    Raises:
        ValueError: if a gain is negative, the rate is not above the radius, or no positive Perron vector exists.

    Examples:
        >>> small_gain_weights(0.5, 0.25, 0.25, 0.5)
        (0.5, 0.5)
    """
    A, B, C, D = (upper(x) for x in _gains(a, b, c, d))
    radius = float(upper(_radius(A, B, C, D)))
    if rate is not None:
        r = float(upper(finite("rate", rate)))
        if r <= radius:
            raise ValueError(f"rate must exceed the spectral radius {radius:.6g}, got {rate!r}.")
        v1, v2 = (r - D) + C, (r - A) + B  # (1, 1) adj(rate I - M): what the geometric series of the gains sums to
    elif B == 0 or C == 0:
        raise ValueError(
            "a triangular gain matrix may have no positive Perron vector; give a rate above the spectral radius."
        )
    else:
        v1, v2 = C, radius - A
        if v2 <= 0:  # cancellation: use the other equation of the eigenvector
            v1, v2 = radius - D, B
    return v1 / (v1 + v2), v2 / (v1 + v2)


def triangular_radius(a: Real, d: Real) -> Real:
    """Return the spectral radius when the parameters do not depend on the representation of the step before: max(a, d).

    Args:
        a: gain of the representation on itself.
        d: gain of the parameters on themselves.

    Returns:
        The radius; a Bound if an operand is one.

    Raises:
        ValueError: if a gain is negative or not finite.

    Examples:
        >>> triangular_radius(0.5, 0.75)
        0.75
    """
    return joined(nonnegative("a", a), nonnegative("d", d))


def mixed_sensitivity(representation_gain: Real, parameter_gain: Real) -> Real:
    r"""Bound the mixed block of the profile for a fixed batch.

    :math:`\|D_{\theta_0}h_{L,t}\| \le \|D_\theta h_L\|\,\|D_{\theta_0}\theta_t\|`.

    Args:
        representation_gain: a bound on the derivative of the representation by the parameters at step t.
        parameter_gain: a bound on the derivative of the parameters by their start.

    Returns:
        The product; a Bound if an operand is one.

    Raises:
        ValueError: if a gain is negative or not finite.

    Examples:
        >>> mixed_sensitivity(2.0, 0.25)
        0.5
    """
    gain = nonnegative("representation_gain", representation_gain)
    return gain * nonnegative("parameter_gain", parameter_gain)


def _gains(a: Real, b: Real, c: Real, d: Real) -> tuple[Real, Real, Real, Real]:
    return nonnegative("a", a), nonnegative("b", b), nonnegative("c", c), nonnegative("d", d)


def _radius(a: Real, b: Real, c: Real, d: Real) -> Real:
    # Any evaluation order encloses: each operand is a point here, or a float.
    half = (a - d) / 2.0 if isinstance(a, Bound) or isinstance(d, Bound) else (a - d) / 2
    return (a + d) / 2.0 + real_sqrt(half**2 + b * c)
