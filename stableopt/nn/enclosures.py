"""Enclosures of the sigmoid and the hyperbolic tangent of floats."""

from __future__ import annotations

import math

from stableopt.linalg import Bound

__all__ = ["sigmoid", "tanh"]

_SLACK = 2.0**-50
"""The functions of ``math`` are within a unit in the last place, and two operations follow."""


def sigmoid(raw: float) -> Bound:
    r"""Enclose :math:`1/(1 + e^{-x})`.

    Args:
        raw: :math:`x`, also an infinity.

    Examples:
        >>> 0.5 in sigmoid(0.0), sigmoid(math.inf).upper, sigmoid(-math.inf).lower
        (True, 1.0, 0.0)
    """
    value = 1.0 / (1.0 + math.exp(-raw)) if raw >= 0 else math.exp(raw) / (1.0 + math.exp(raw))
    low, high = math.nextafter(value * (1.0 - _SLACK), -1.0), math.nextafter(value * (1.0 + _SLACK), 2.0)
    return Bound(max(0.0, low), min(1.0, high))


def tanh(raw: float) -> Bound:
    """Enclose the hyperbolic tangent.

    Args:
        raw: a number, also an infinity.

    Examples:
        >>> 0.0 in tanh(0.0), tanh(math.inf).upper, tanh(-math.inf).lower
        (True, 1.0, -1.0)
    """
    value = math.tanh(raw)
    slack = math.nextafter(abs(value) * _SLACK, 1.0)
    return Bound(max(-1.0, value - slack), min(1.0, value + slack))
