"""Checks of what a user passes to a regularizer, with one wording for all of them."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from stableopt.constraints.rounding import STORAGE_DTYPES

__all__ = ["check_matrix", "check_number", "check_step", "check_tensor"]


def check_number(
    owner: str, name: str, value: object, *, low: float = -math.inf, strict: bool = False, finite: bool = True
) -> float:
    """Return a real number as a float, or refuse it.

    Args:
        owner: the class that asks, for the message.
        name: the argument, for the message.
        value: what the user passed.
        low: the smallest value allowed.
        strict: whether ``low`` itself is refused.
        finite: whether infinities are refused.

    Raises:
        TypeError: if ``value`` is not a real number; a bool is not one.
        ValueError: if it is NaN, infinite though it may not be, or too small.

    Examples:
        >>> check_number("L1", "weight", 1, low=0.0)
        1.0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner} needs a real number as {name}, got {value!r} ({type(value).__name__}).")
    number = float(value)
    if math.isnan(number) or (finite and math.isinf(number)) or number < low or (strict and number == low):
        kind = "a finite number" if finite else "a number, not NaN"
        limit = "" if low == -math.inf else f" {'>' if strict else '>='} {low:g}"
        raise ValueError(f"{owner} needs {kind}{limit} as {name}, got {number!r}.")
    return number


def check_tensor(owner: str, x: object) -> None:
    """Refuse what is not a real floating tensor of a supported dtype.

    Raises:
        TypeError: with the dtypes that work.

    Examples:
        >>> check_tensor("Box", torch.ones(2))
    """
    if not isinstance(x, Tensor) or x.dtype not in STORAGE_DTYPES:
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{owner} needs a float64, float32, bfloat16 or float16 tensor, got {got}.")


def check_matrix(owner: str, x: object, advice: str) -> None:
    """Refuse what is not a real floating matrix.

    Raises:
        TypeError: if it is not a real floating tensor.
        ValueError: if it does not have two dimensions; the message ends with ``advice``.

    Examples:
        >>> check_matrix("SpectralBall", torch.ones(2, 3), "Use two dimensions.")
    """
    check_tensor(owner, x)
    if isinstance(x, Tensor) and x.ndim != 2:
        raise ValueError(f"{owner} needs a matrix with two dimensions, got shape {tuple(x.shape)}. {advice}")


def check_step(owner: str, step: object, x: Tensor, *, separable: bool) -> None:
    """Refuse a proximal step that has no meaning. The numbers inside a tensor are not read: that would wait for the device.

    Args:
        owner: the class that asks, for the message.
        step: a finite number >= 0, or a floating tensor that broadcasts to ``x``.
        x: the point.
        separable: whether the owner acts per coordinate, so that each coordinate may have its own step.

    Raises:
        TypeError: if the step is neither a real number nor a floating tensor.
        ValueError: if a number is negative, NaN or infinite; if a tensor has several entries and the owner is not separable;
            or if it does not broadcast to ``x``.

    Examples:
        >>> check_step("L1", torch.ones(3), torch.zeros(2, 3), separable=True)
    """
    if not isinstance(step, Tensor):
        check_number(owner, "step", step, low=0.0)
        return
    if not step.dtype.is_floating_point:
        raise TypeError(f"{owner} needs a floating tensor as step, got dtype {step.dtype}.")
    if step.numel() != 1 and not separable:
        raise ValueError(
            f"{owner} does not act per coordinate, so its step is one number, got a tensor of shape {tuple(step.shape)}. "
            "Use a separable regularizer with a diagonal metric, or an optimizer without one."
        )
    try:
        fits = torch.broadcast_shapes(step.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{owner} needs a step that broadcasts to the point, got shapes {tuple(step.shape)} and {tuple(x.shape)}."
        )
