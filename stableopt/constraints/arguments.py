"""Checks of what a user passes to a regularizer, with one wording for all of them."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from stableopt.constraints.rounding import COMPLEX_DTYPES, STORAGE_DTYPES

__all__ = ["check_dims", "check_matrix", "check_number", "check_numbers", "check_step", "check_tensor", "combined_step"]


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


def check_numbers(
    owner: str, name: str, value: object, *, low: float = -math.inf, strict: bool = False, finite: bool = True
) -> tuple[float, ...]:
    """Return a sequence of real numbers as a tuple of floats, or refuse it; the other arguments are those of check_number.

    Raises:
        TypeError: if ``value`` is not a list, a tuple or a one-dimensional tensor of real numbers.
        ValueError: if it is empty, or an entry is out of range.

    Examples:
        >>> check_numbers("SLOPE", "weights", [2, 1])
        (2.0, 1.0)
    """
    if isinstance(value, Tensor) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise TypeError(f"{owner} needs a tuple of numbers as {name}, got {type(value).__name__}.")
    if not value:
        raise ValueError(f"{owner} needs at least one number as {name}, got none.")
    return tuple(check_number(owner, name, item, low=low, strict=strict, finite=finite) for item in value)


def check_dims(owner: str, dims: object) -> int | tuple[int, ...] | None:
    """Return which dimensions hold one vector: ``None`` for all of them, an int, or a tuple of distinct ints.

    Raises:
        TypeError: if ``dims`` is something else.
        ValueError: if it is empty or names a dimension twice.

    Examples:
        >>> check_dims("L1Ball", [0, 1]), check_dims("L1Ball", -1)
        ((0, 1), -1)
    """
    if dims is None or (isinstance(dims, int) and not isinstance(dims, bool)):
        return dims
    if not isinstance(dims, list | tuple) or any(isinstance(d, bool) or not isinstance(d, int) for d in dims):
        raise TypeError(f"{owner} needs None, an int or a tuple of ints as dims, got {dims!r}.")
    if not dims or len(set(dims)) != len(dims):
        raise ValueError(f"{owner} needs distinct dimensions, at least one, as dims, got {dims!r}.")
    return tuple(dims)


def check_tensor(owner: str, x: object, *, complex_too: bool = False) -> None:
    """Refuse what is not a floating tensor of a supported dtype.

    Args:
        owner: the class that asks, for the message.
        x: what the user passed.
        complex_too: whether complex128 and complex64 work as well.

    Raises:
        TypeError: with the dtypes that work.

    Examples:
        >>> check_tensor("Box", torch.ones(2))
    """
    if isinstance(x, Tensor) and (x.dtype in STORAGE_DTYPES or (complex_too and x.dtype in COMPLEX_DTYPES)):
        return
    got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
    more = ", complex128 or complex64" if complex_too else ""
    raise TypeError(f"{owner} needs a float64, float32, bfloat16 or float16{more} tensor, got {got}.")


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


def check_step(owner: str, step: object, x: Tensor, *, diagonal: bool, called: str = "step") -> None:
    """Refuse a proximal step that has no meaning. The numbers inside a tensor are not read: that would wait for the device.

    Args:
        owner: the class that asks, for the message.
        step: a finite number >= 0, or a floating tensor that broadcasts to ``x``.
        x: the point.
        diagonal: whether the owner is exact with one step per coordinate, that is in a diagonal metric.
        called: the name of the argument, for the message.

    Raises:
        TypeError: if the step is neither a real number nor a floating tensor.
        ValueError: if a number is negative, NaN or infinite; if a tensor has several entries and the owner is not exact with them;
            or if it does not broadcast to ``x``.

    Examples:
        >>> check_step("L1", torch.ones(3), torch.zeros(2, 3), diagonal=True)
    """
    if not isinstance(step, Tensor):
        check_number(owner, called, step, low=0.0)
        return
    if not step.dtype.is_floating_point:
        raise TypeError(f"{owner} needs a floating tensor as {called}, got dtype {step.dtype}.")
    if step.numel() != 1 and not diagonal:
        raise ValueError(
            f"{owner} has no exact prox in a diagonal metric, so its {called} is one number, got a tensor of shape "
            f"{tuple(step.shape)}. Use a regularizer that has one, or an optimizer without a metric."
        )
    try:
        fits = torch.broadcast_shapes(step.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{owner} needs a {called} that broadcasts to the point, got shapes {tuple(step.shape)} and {tuple(x.shape)}."
        )


def combined_step(
    owner: str, step: float | Tensor, metric: Tensor | None, x: Tensor, *, diagonal: bool
) -> float | Tensor:
    """Check a step and a diagonal metric, and return the step of each coordinate in it.

    Args:
        owner: the class that asks, for the message.
        step: a finite number >= 0, or a floating tensor that broadcasts to ``x``.
        metric: ``None``, or a positive floating tensor that broadcasts to ``x``; its entries are not read.
        x: the point.
        diagonal: whether the owner is exact in a diagonal metric.

    Returns:
        ``step``, divided by the metric if there is one.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: as :func:`check_step`, for either.

    Examples:
        >>> combined_step("L1", 1.0, torch.tensor([1.0, 2.0]), torch.zeros(2), diagonal=True)
        tensor([1.0000, 0.5000])
    """
    check_step(owner, step, x, diagonal=diagonal)
    if metric is None:
        return step
    if not isinstance(metric, Tensor):
        raise TypeError(f"{owner} needs a floating tensor as metric, got {type(metric).__name__}.")
    check_step(owner, metric, x, diagonal=diagonal, called="metric")
    return step / metric
