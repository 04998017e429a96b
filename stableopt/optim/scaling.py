"""Factors on learning rates and on gradients: who scales what, and what must not be mixed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["refuse_closure_of_scaler", "scaled"]

_SCALER_STEP = torch.amp.GradScaler.step.__code__
_DEPTH = 12  # frames between GradScaler.step and ours: hooks, profilers, wrappers of schedulers


@contextmanager
def scaled(groups: list[dict[str, Any]], scale: float) -> Iterator[None]:
    """Multiply the learning rates of all groups inside the context; afterwards the very same objects are back.

    Examples:
        >>> group = {"lr": 0.5}
        >>> with scaled([group], 0.5):
        ...     group["lr"]
        0.25
        >>> group["lr"]
        0.5
    """
    kept = [group.get("lr") for group in groups]
    try:
        if scale != 1.0:
            for group, lr in zip(groups, kept, strict=True):
                if lr is not None:
                    group["lr"] = lr * scale
        yield
    finally:
        for group, lr in zip(groups, kept, strict=True):
            if lr is not None:
                group["lr"] = lr


def refuse_closure_of_scaler() -> None:
    """Refuse to run a closure if it is ``torch.amp.GradScaler`` that has passed it.

    The scaler refuses the keyword, but hands on a closure that is given by position: it would compute scaled gradients anew, after the
    scaler has unscaled those that were there.

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
