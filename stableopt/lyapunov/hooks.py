"""The hooks around the steps of an optimizer: once a step, also where it calls the step of its base class, with its closure."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["Closure", "StepHooks"]

Closure = Callable[[], Any]

_RESUMED = "torch_dynamo_resume_in"
"""How torch calls the rest of a function whose compilation was broken off."""


class StepHooks:
    """Call one function before each step and another one after it.

    Args:
        optimizer: whose steps.
        before: gets the closure of the step, None if there is none, and whether the step got a ``trial``; returns the closure that
            the step is to have, None for its own.
        after: gets nothing; not called for a step that ends in an error.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        >>> said = []
        >>> hooks = StepHooks(optimizer, lambda closure, trial: said.append(closure), lambda: said.append("after"))
        >>> _ = hooks.attach()
        >>> optimizer.step()
        >>> hooks.remove()
        >>> optimizer.step()
        >>> said
        [None, 'after']
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[Closure | None, bool], Closure | None],
        after: Callable[[], None],
    ) -> None:
        self._optimizer, self._before_step, self._after_step = optimizer, before, after
        self._frame: FrameType | None = None
        self._handles: list[Any] = []
        # a step may be compiled; what looks at it is not. The wrapper costs time, so it is for such steps alone
        self._uncompiled: Any = torch.compiler.disable(self._see_before), torch.compiler.disable(self._see_after)

    def attach(self) -> bool:
        """Begin; return whether that is new.

        Examples:
            >>> import torch
            >>> hooks = StepHooks(torch.optim.SGD([torch.ones(1)]), lambda *_: None, lambda: None)
            >>> hooks.attach(), hooks.attach()
            (True, False)
        """
        if self._handles:
            return False
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before),
            self._optimizer.register_step_post_hook(self._after),
        ]
        return True

    def remove(self) -> None:
        """End; may be called twice.

        Examples:
            >>> import torch
            >>> StepHooks(torch.optim.SGD([torch.ones(1)]), lambda *_: None, lambda: None).remove()
        """
        for handle in self._handles:
            handle.remove()
        self._handles, self._frame = [], None

    def _before(
        self, _optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling():
            return self._uncompiled[0](args, kwargs)
        return self._see_before(args, kwargs)

    def _after(self, _optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._uncompiled[1]()
        else:
            self._see_after()

    def _see_before(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        caller = _caller()
        if self._frame is not None and _is_within(caller, self._frame):
            return None
        self._frame = caller
        first, *rest = args[1:] or (None,)  # before it comes the optimizer
        positional = callable(first)
        closure = first if positional else kwargs.get("closure")
        other = self._before_step(closure, kwargs.get("trial") is not None)
        if other is None:
            return None
        return ((self._optimizer, other, *rest), kwargs) if positional else (args, {**kwargs, "closure": other})

    def _see_after(self) -> None:
        if self._frame is None or _caller() is not self._frame:
            return  # the step of a base class, within the step that is watched
        self._frame = None
        self._after_step()


def _caller() -> FrameType | None:
    """Return the frame of the step that has called a hook: not that of a wrapper, nor of the second part of a compiled step."""
    frame = inspect.currentframe()
    while frame is not None and (
        frame.f_code.co_filename == __file__
        or "_dynamo" in frame.f_code.co_filename
        or frame.f_code.co_name.startswith(_RESUMED)
    ):
        frame = frame.f_back
    return frame


def _is_within(frame: FrameType | None, outer: FrameType) -> bool:
    """Whether ``outer`` is among the callers of ``frame``."""
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer
