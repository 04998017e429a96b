"""Elementwise activations with all slopes in [0, 1], which the proofs of gradient and contracting blocks need."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["UNIT_SLOPES", "check_unit_slopes"]


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40.0)  # log(1 + e^40) is 40 in float64: no jump where torch switches to the identity


UNIT_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,  # slope 0.01
    "tanh": torch.tanh,
    "softplus": _softplus,
    "hardtanh": F.hardtanh,
}
"""The activations by name."""

_NEGATIVE_SLOPES = {"gelu": -0.129, "silu": -0.100, "mish": -0.113, "hardswish": -0.5}


def check_unit_slopes(activation: str, owner: str) -> None:
    """Refuse an activation that is not known to have all slopes in [0, 1].

    Args:
        activation: its name.
        owner: the class whose bound needs it, for the message.

    Raises:
        ValueError: if it is none of :data:`UNIT_SLOPES`.

    Examples:
        >>> check_unit_slopes("gelu", "GradientBlock")
        Traceback (most recent call last):
        ValueError: activation 'gelu' has slopes down to -0.129; the bound of a GradientBlock needs slopes in [0, 1]. ...
    """
    if activation in _NEGATIVE_SLOPES:
        raise ValueError(
            f"activation {activation!r} has slopes down to {_NEGATIVE_SLOPES[activation]}; the bound of a {owner} needs "
            f"slopes in [0, 1]. Use one of {', '.join(UNIT_SLOPES)}."
        )
    if activation not in UNIT_SLOPES:
        raise ValueError(f"activation must be one of {', '.join(UNIT_SLOPES)}, got {activation!r}.")
