"""Who calls a step, and with what."""

from __future__ import annotations

import sys

import torch

__all__ = ["check_callables", "level_outside", "refuse_closure_of_scaler"]

_SCALER_STEP = torch.amp.GradScaler.step.__code__
_DEPTH = 12  # frames between GradScaler.step and ours: hooks, profilers, wrappers of schedulers


def check_callables(closure: object, trial: object) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: naming the argument.

    Examples:
        >>> check_callables(None, 3.0)
        Traceback (most recent call last):
        TypeError: trial must be a function that returns the loss, or None, got float.
    """
    for name, value in (("closure", closure), ("trial", trial)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a function that returns the loss, or None, got {type(value).__name__}.")


def level_outside() -> int:
    """Return the stack level, for the caller, of the first frame that is neither ours nor torch's.

    Examples:
        >>> level_outside() >= 1
        True
    """
    level, frame = 1, sys._getframe(1)  # noqa: SLF001
    while frame is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in {
        "stableopt",
        "torch",
        "contextlib",
    }:
        level, frame = level + 1, frame.f_back
    return level


def refuse_closure_of_scaler() -> None:
    """Refuse to run a closure if it is ``torch.amp.GradScaler`` that has passed it.

    The scaler refuses the keyword, but hands on a closure that is given by position: it would compute scaled gradients anew,
    after the scaler has unscaled those that were there.

    Raises:
        RuntimeError: if a frame of ``GradScaler.step`` is among the callers.

    Examples:
        >>> refuse_closure_of_scaler()
    """
    frame = sys._getframe(1)  # noqa: SLF001 - the scaler leaves no other trace
    for _ in range(_DEPTH):
        if frame is None:
            return
        if frame.f_code is _SCALER_STEP and frame.f_locals["self"].is_enabled():
            raise RuntimeError(
                "GradScaler.step got a closure: its gradients would be scaled and never unscaled. Compute gradients first "
                "(scaler.scale(loss).backward()), then call scaler.step(optimizer, trial=loss_at_the_current_parameters)."
            )
        frame = frame.f_back
