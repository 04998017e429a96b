"""Inputs, labels and radii that a user gives: each is accepted, or refused in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_inputs", "checked_eps", "checked_labels", "shape_words"]


def shape_words(shape: Sequence[int]) -> str:
    """Return the shape of a batch in words.

    Args:
        shape: of one input, without the batch.

    Examples:
        >>> shape_words((4,)), shape_words((1, 8, 8))
        ('(batch, 4)', '(batch, 1, 8, 8)')
    """
    return f"({', '.join(['batch', *map(str, shape)])})"


def check_inputs(x: Any, shape: Sequence[int] | None = None) -> None:
    """Refuse what is no batch of inputs with numbers.

    Args:
        x: the inputs.
        shape: of one input, without the batch; None if it is not known.

    Raises:
        TypeError: if they are no floating tensor.
        ValueError: if the shape does not fit, or the tensor is sparse or on the meta device.

    Examples:
        >>> check_inputs(torch.ones(2, 4), (4,))
        >>> check_inputs(torch.ones(4), (4,))
        Traceback (most recent call last):
        ValueError: expected inputs of shape (batch, 4), got (4,).
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"the inputs must be a floating tensor, got {given}; convert them, and scale them as in training."
        )
    if shape is not None and (x.ndim == 0 or tuple(x.shape[1:]) != tuple(shape)):
        raise ValueError(f"expected inputs of shape {shape_words(shape)}, got {tuple(x.shape)}.")
    if x.device.type == "meta" or x.layout != torch.strided:
        kind = "on the meta device, without numbers" if x.device.type == "meta" else f"of layout {x.layout}"
        raise ValueError(f"the inputs must be a dense tensor with numbers, got one {kind}.")


def checked_labels(labels: Any, batch: int, classes: int | None = None) -> Tensor:
    """Return labels as int64 on the CPU.

    Args:
        labels: the true classes.
        batch: how many there must be.
        classes: how many classes there are; None if that is not known.

    Raises:
        ValueError: if they are no integer tensor of the shape ``(batch,)``, or no classes.

    Examples:
        >>> checked_labels(torch.tensor([1], dtype=torch.uint8), 1)
        tensor([1])
        >>> checked_labels(torch.tensor([-1]), 1, 3)
        Traceback (most recent call last):
        ValueError: labels must lie in 0 ... 2, got -1.
    """
    kinds = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
    if not isinstance(labels, Tensor) or labels.dtype not in kinds or labels.shape != (batch,):
        given = (
            f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        )
        raise ValueError(f"labels must be an integer tensor of shape ({batch},), got {given}.")
    known = labels.detach().to("cpu", torch.int64)
    bad = known < 0 if classes is None else (known < 0) | (known >= classes)
    if bool(bad.any()):
        wanted = "be at least 0" if classes is None else f"lie in 0 ... {classes - 1}"
        raise ValueError(f"labels must {wanted}, got {int(known[bad][0])}.")
    return known


def checked_eps(eps: Any) -> float:
    """Return a radius as a number.

    Args:
        eps: a number, or a tensor or array of one.

    Raises:
        ValueError: if it is none, negative, NaN or infinite.

    Examples:
        >>> checked_eps(torch.tensor(0.5))
        0.5
        >>> checked_eps(-1)
        Traceback (most recent call last):
        ValueError: eps must be a finite number of at least 0, got -1.
    """
    try:
        number = math.nan if isinstance(eps, str | bytes | bool) else float(eps)
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor of several numbers
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps!r}.")
    return number
