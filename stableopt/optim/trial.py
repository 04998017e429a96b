"""Evaluate an unchanged torch closure a second time, for the cost of one forward pass and without leaving a trace."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stableopt.optim.modules import buffers_put_back

__all__ = ["RandomState", "as_loss", "evaluate_again"]

_GRAD: Any = Tensor.grad  # a descriptor on the class, whatever its annotation says
_GRAD_GET, _GRAD_SET, _GRAD_DELETE = _GRAD.__get__, _GRAD.__set__, _GRAD.__delete__

_needs_graph: WeakSet[CodeType] = WeakSet()
"""The code of closures that could not run without gradients: the next evaluation starts with them."""


@dataclass(frozen=True)
class RandomState:
    """The state of the global random number generators of torch (all devices in use), numpy and Python.

    Examples:
        >>> state = RandomState.capture()
        >>> first = torch.rand(2)
        >>> state.restore()
        >>> torch.equal(first, torch.rand(2))
        True
    """

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls) -> RandomState:
        """Return the state now.

        Examples:
            >>> len(RandomState.capture().cuda) == (torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
            True
        """
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())  # noqa: NPY002 - the global one is meant

    def restore(self) -> None:
        """Go back to this state.

        Examples:
            >>> state = RandomState.capture()
            >>> _ = random.random()
            >>> state.restore()
            >>> random.getstate() == state.python
            True
        """
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)


def as_loss(value: object) -> float:
    """Return what a closure gave as a float.

    Args:
        value: a real number, or a tensor or array with one element.

    Raises:
        ValueError: if it is anything else.

    Examples:
        >>> as_loss(1), as_loss(torch.tensor([0.5]))
        (1.0, 0.5)
        >>> as_loss(torch.zeros(3))
        Traceback (most recent call last):
        ValueError: the closure must return the loss, one real number, got a Tensor of shape (3,).
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        if math.prod(value.shape) == 1:
            value = value.item()
        else:
            raise ValueError(
                f"the closure must return the loss, one real number, got a {type(value).__name__} of shape {tuple(value.shape)}."
            )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(  # noqa: TRY004 - what a closure returns is a value, not an argument
            f"the closure must return the loss, one real number, got {value!r} ({type(value).__name__})."
        )
    return float(value)


def evaluate_again(closure: Callable[[], Any], start: RandomState | None = None) -> float:
    """Return the value of a torch closure at the current parameters, without its side effects.

    The closure may zero gradients, run the model, call ``backward``, clip and return the loss, as ``torch.optim`` asks for. Here
    it runs without gradients and ``backward`` does nothing; ``.grad`` is empty before it and zero after it, and in the end what it
    really was; buffers of the modules it calls (running statistics, power-iteration vectors) and all random states are put back; an
    autocast that is open around it forgets the weights it has cast.

    Args:
        closure: evaluated once; a second time, with gradients enabled, only if it needs a graph (``torch.autograd.grad``), and then
            once again from the next time on.
        start: the random state to begin with, that of the first evaluation, so that dropout draws the same mask; None for the
            current one.

    Returns:
        The loss.

    Raises:
        ValueError: if the closure does not return one real number.

    Note:
        What a closure changes by itself in Python (a counter, a data iterator) is not put back. A closure that draws a new batch at
        each call gives another function each time: draw the batch outside of it.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor(3.0))
        >>> def closure():
        ...     w.grad = None
        ...     loss = w * w
        ...     loss.backward()
        ...     return loss
        >>> evaluate_again(closure), w.grad is None
        (9.0, True)
    """
    end = RandomState.capture()
    begin = end if start is None else start
    code = closure.__code__ if isinstance(closure, FunctionType) else None
    try:
        if code not in _needs_graph:
            try:
                return _value(closure, begin, gradients=False)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                if code is not None:
                    _needs_graph.add(code)
        return _value(closure, begin, gradients=True)
    finally:
        end.restore()


def _value(closure: Callable[[], Any], start: RandomState, *, gradients: bool) -> float:
    start.restore()
    # An autocast around the training step keeps the weights it has cast: before, they are those of the point that the step left;
    # after, they have no graph. Neither may meet the next forward pass.
    torch.clear_autocast_cache()
    try:
        with buffers_put_back(closure), torch.set_grad_enabled(gradients), _NoBackward():
            value = closure()
    finally:
        torch.clear_autocast_cache()
    return as_loss(value.detach() if isinstance(value, Tensor) else value)


class _NoBackward(TorchFunctionMode):
    """Let ``backward`` do nothing, and give ``.grad`` a life of its own that ends with the mode.

    In plain words: gradients are None until ``backward`` is called and zero from then on, so that a closure may clip or scale them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._called = False
        self._grads: dict[int, tuple[Tensor, Tensor | None]] = {}  # with its tensor, which keeps the id in use

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward or func is torch.autograd.backward:
            self._called = True
            return None
        if func == _GRAD_GET:
            return self._grad(args[0])
        if func == _GRAD_SET:
            self._grads[id(args[0])] = args[0], args[1]
            return None
        if func == _GRAD_DELETE:
            self._grads[id(args[0])] = args[0], None
            return None
        return func(*args, **(kwargs or {}))

    def _grad(self, tensor: Tensor) -> Tensor | None:
        if id(tensor) not in self._grads or (self._grads[id(tensor)][1] is None and self._called):
            given = torch.zeros_like(tensor) if self._called and tensor.is_leaf and tensor.requires_grad else None
            self._grads[id(tensor)] = tensor, given
        return self._grads[id(tensor)][1]
