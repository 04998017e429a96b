"""What all losses share: which batches they take, in which dtype they compute, and how they reduce."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

__all__ = [
    "REDUCTIONS",
    "check_labels",
    "check_logits",
    "check_number",
    "check_reduction",
    "reduced",
    "require_number",
    "require_tensors",
]

REDUCTIONS = ("mean", "sum", "none")


def check_number(name: str, value: float, *, positive: bool) -> float:
    """Return a setting as a float.

    Args:
        name: what the message calls it.
        value: the setting.
        positive: whether 0 is refused; negative numbers always are.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative or not finite, or 0 where that is refused.

    Examples:
        >>> check_number("eps", 1, positive=True)
        1.0
    """
    require_number(name, value)
    if not (math.isfinite(value) and (value > 0 or (value == 0 and not positive))):
        raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'} and finite, got {value!r}.")
    return float(value)


def require_number(name: str, value: object) -> None:
    """Refuse what is no number.

    Args:
        name: what the message calls it.
        value: the setting.

    Raises:
        TypeError: if it is no number, and no tensor of one.

    Examples:
        >>> require_number("eps", 1)
        >>> require_number("eps", "1")
        Traceback (most recent call last):
        TypeError: eps must be a number, got '1'.
    """
    single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if isinstance(value, bool) or not (single or isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, got {value!r}.")


def check_reduction(reduction: str) -> str:
    """Return the reduction.

    Raises:
        ValueError: if it is unknown.

    Examples:
        >>> check_reduction("mean")
        'mean'
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    return reduction


def check_logits(logits: Tensor, target: Tensor, owner: str) -> None:
    """Refuse a batch whose shapes do not fit, and labels that are no classes.

    Args:
        logits: shape ``(N, C)``.
        target: shape ``(N,)``.
        owner: the loss, for the message.

    Raises:
        ValueError: if a shape does not fit or a label is no class.
        TypeError: if the logits are no floating tensor, or the target does not hold integers.

    Examples:
        >>> check_logits(torch.zeros(2, 3), torch.tensor([0, 2]), "a loss")
    """
    require_tensors(logits, target, owner)
    if logits.ndim != 2 or target.ndim != 1 or len(logits) != len(target):
        raise ValueError(
            f"{owner} needs logits of shape (N, C) and labels of shape (N,), got {tuple(logits.shape)} and {tuple(target.shape)}."
        )
    check_labels(target, logits.shape[1])


def require_tensors(logits: object, target: object, owner: str) -> None:
    """Refuse logits that are no floating tensor, and labels that are no tensor.

    Args:
        logits: the logits.
        target: the labels.
        owner: the loss, for the message.

    Raises:
        TypeError: if one of them is.

    Examples:
        >>> require_tensors(torch.zeros(1, 2), [0], "a loss")
        Traceback (most recent call last):
        TypeError: a loss needs labels in a tensor, got list.
    """
    for name, given in (("logits", logits), ("labels", target)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{owner} needs {name} in a tensor, got {type(given).__name__}.")
    if isinstance(logits, Tensor) and not logits.is_floating_point():
        raise TypeError(f"{owner} needs logits of a floating dtype, got {logits.dtype}.")


def check_labels(target: Tensor, classes: int) -> None:
    """Refuse labels that are no classes.

    On an accelerator the range is not checked, because that would wait for the device; there torch itself asserts when it gathers.

    Args:
        target: the labels.
        classes: how many classes there are.

    Raises:
        ValueError: if a label is no class.
        TypeError: if the target does not hold integers.

    Examples:
        >>> check_labels(torch.tensor([0, 3]), 3)
        Traceback (most recent call last):
        ValueError: labels must lie in 0 ... 2, got labels from 0 to 3.
    """
    if target.is_floating_point() or target.dtype in {torch.bool, torch.complex64, torch.complex128}:
        raise TypeError(f"the target must hold integer class labels, got dtype {target.dtype}.")
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool(((target < 0) | (target >= classes)).any()):
        low, high = int(target.min()), int(target.max())
        raise ValueError(f"labels must lie in 0 ... {classes - 1}, got labels from {low} to {high}.")


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Return the mean or the sum of the losses of the samples, or these themselves.

    Args:
        losses: shape ``(N,)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Examples:
        >>> reduced(torch.tensor([1.0, 2.0]), "sum")
        tensor(3.)
    """
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
