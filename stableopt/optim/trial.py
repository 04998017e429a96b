"""Evaluate an unchanged torch closure a second time, for the cost of one forward pass and without leaving a trace."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stableopt.optim.modules import buffers_put_back

__all__ = [
    "Again", "RandomState", "as_loss", "autocast_eps", "evaluate_again", "graph_eps", "loss_with_graph", "untraced",
]  # fmt: skip

_GRAD: Any = Tensor.grad  # a descriptor on the class, whatever its annotation says
_GRAD_GET, _GRAD_SET, _GRAD_DELETE = _GRAD.__get__, _GRAD.__set__, _GRAD.__delete__

_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")

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
        return cls(torch.get_rng_state(), cuda, np.random.get_state(legacy=False), random.getstate())  # noqa: NPY002 - the global one

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


class Again:
    """What evaluates the loss of the same batch with the same random numbers at the current parameters.

    Args:
        evaluate: a closure or a trial.
        start: the random state of the first evaluation.
        value: the loss of the first evaluation, with its graph if it has one.

    Attributes:
        eps: the coarsest machine epsilon that autocast has brought into the evaluations so far, 0 without autocast.

    Examples:
        >>> again = Again(lambda: 2.0, RandomState.capture())
        >>> again(), again.eps
        (2.0, 0.0)
    """

    def __init__(self, evaluate: Callable[[], Any], start: RandomState, value: Any = None) -> None:
        self._evaluate, self._start, self._value, self.eps = evaluate, start, value, 0.0

    def __call__(self) -> float:
        """Return the loss at the current parameters."""
        return evaluate_again(self._evaluate, self._start, self._note)

    def look_closer(self) -> None:
        """Look through the graph of the first evaluation, too, which takes its time: a compiled model hides its autocast."""
        self._value = self._note(graph_eps(self._value))

    def _note(self, eps: float) -> None:
        self.eps = max(self.eps, eps)


def autocast_eps() -> float:
    """Return the coarsest machine epsilon that autocast brings into what is computed now, 0 without autocast.

    Examples:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     autocast_eps() == torch.finfo(torch.bfloat16).eps
        True
    """
    on = [device for device in _AUTOCAST if torch.is_autocast_enabled(device)]
    return max((torch.finfo(torch.get_autocast_dtype(device)).eps for device in on), default=0.0)


def graph_eps(value: Any) -> float:
    """Return the coarsest machine epsilon among the dtypes of the graph of a loss, 0 without a graph.

    Examples:
        >>> w = torch.ones(2, requires_grad=True)
        >>> graph_eps(w.half().float().sum()) == torch.finfo(torch.half).eps
        True
    """
    root = value.grad_fn if isinstance(value, Tensor) else None
    waiting, seen, eps = [root], {root, None}, 0.0
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        for made in getattr(node, "_input_metadata", ()):
            if made.dtype.is_floating_point:
                eps = max(eps, torch.finfo(made.dtype).eps)
        following = [n for n, _ in node.next_functions if n not in seen]
        seen.update(following)
        waiting += following
    return eps


def evaluate_again(
    closure: Callable[[], Any],
    start: RandomState | None = None,
    note: Callable[[float], None] | None = None,
    *,
    must_compute: bool = False,
) -> float:
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
        note: is told the coarsest machine epsilon that autocast has brought in.
        must_compute: refuse a closure in which torch computes nothing, as one that returns a loss from before.

    Returns:
        The loss.

    Raises:
        ValueError: if the closure does not return one real number, or computes nothing though it must.

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
    inner = getattr(closure, "__wrapped__", closure)
    code = inner.__code__ if isinstance(inner, FunctionType) else None
    try:
        if code not in _needs_graph:
            try:
                return _value(closure, begin, note, gradients=False, must_compute=must_compute)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                if code is not None:
                    _needs_graph.add(code)
        return _value(closure, begin, note, gradients=True, must_compute=must_compute)
    finally:
        end.restore()


def loss_with_graph(
    closure: Callable[[], Any], start: RandomState | None = None, *, accumulated: bool = False
) -> Tensor:
    """Return what a torch closure returns, with its graph: its ``backward`` does nothing, and it leaves no trace.

    Args:
        closure: as for :func:`evaluate_again`.
        start: the random state to begin with; None for the current one.
        accumulated: return the sum of all losses on which the closure calls ``backward`` instead, whose gradient is what it
            leaves in ``.grad``, whatever it returns.

    Returns:
        The loss, to be differentiated with ``torch.autograd.grad``.

    Raises:
        ValueError: if the closure does not return a tensor with a graph, or, where the sum is asked for, calls no ``backward``.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor(3.0))
        >>> def closure():
        ...     loss = w * w
        ...     loss.backward()
        ...     return loss
        >>> torch.autograd.grad(loss_with_graph(closure), w)[0].item(), w.grad is None
        (6.0, True)
    """
    with _begun_at(start), buffers_put_back(closure), torch.enable_grad(), _NoBackward() as mode:
        value = closure()
    if accumulated:
        value = torch.stack([loss.reshape(()) for loss in mode.losses]).sum() if mode.losses else None
    if not isinstance(value, Tensor) or value.grad_fn is None:
        raise ValueError(
            "the closure must return the loss as a tensor with its graph, not detached and not as a number."
        )
    return value


@contextmanager
def untraced(start: RandomState | None = None) -> Iterator[None]:
    """Evaluate without gradients, with a ``backward`` that does nothing, and put back all random states at the end.

    Args:
        start: the random state to begin with; None for the current one.

    Note:
        Buffers are not put back: :func:`evaluate_again` does that, for one closure.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor(3.0))
        >>> with untraced():
        ...     (w * w).backward()
        >>> w.grad is None
        True
    """
    with _begun_at(start), torch.no_grad(), _NoBackward():
        yield


@contextmanager
def _begun_at(start: RandomState | None) -> Iterator[None]:
    """Begin with a random state and without casts of an autocast, and put the random state back at the end."""
    end = RandomState.capture()
    try:
        (end if start is None else start).restore()
        torch.clear_autocast_cache()
        yield
    finally:
        end.restore()
        torch.clear_autocast_cache()


def _value(
    closure: Callable[[], Any],
    start: RandomState,
    note: Callable[[float], None] | None,
    *,
    gradients: bool,
    must_compute: bool,
) -> float:
    start.restore()
    # An autocast around the training step keeps the weights it has cast: before, they are those of the point that the step left;
    # after, they have no graph. Neither may meet the next forward pass.
    torch.clear_autocast_cache()
    try:
        with buffers_put_back(closure), torch.set_grad_enabled(gradients), _NoBackward() as mode:
            value = closure()
    finally:
        torch.clear_autocast_cache()
    if note is not None:
        note(mode.eps)
    if must_compute and not mode.computed:
        raise ValueError(
            "it computes nothing: the loss must be evaluated inside of it, at the parameters of the moment"
        )
    return as_loss(value.detach() if isinstance(value, Tensor) else value)


class _NoBackward(TorchFunctionMode):
    """Let ``backward`` do nothing, and give ``.grad`` a life of its own that ends with the mode.

    In plain words: gradients are None until ``backward`` is called and zero from then on, so that a closure may clip or scale them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._called, self.computed, self.eps = False, False, 0.0
        self.losses: list[Tensor] = []
        self._grads: dict[int, tuple[Tensor, Tensor | None]] = {}  # with its tensor, which keeps the id in use

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_compiling() and torch._C._is_any_autocast_enabled():  # noqa: SLF001
            self.eps = max(self.eps, autocast_eps())
        if func is Tensor.backward or func is torch.autograd.backward:
            self._called = self.computed = True
            self.losses += [args[0]] if isinstance(args[0], Tensor) else args[0]
            return None
        if func == _GRAD_GET:
            return self._grad(args[0])
        if func == _GRAD_SET:
            self._grads[id(args[0])] = args[0], args[1]
            return None
        if func == _GRAD_DELETE:
            self._grads[id(args[0])] = args[0], None
            return None
        self.computed = True
        return func(*args, **(kwargs or {}))

    def _grad(self, tensor: Tensor) -> Tensor | None:
        if id(tensor) not in self._grads or (self._grads[id(tensor)][1] is None and self._called):
            given = torch.zeros_like(tensor) if self._called and tensor.is_leaf and tensor.requires_grad else None
            self._grads[id(tensor)] = tensor, given
        return self._grads[id(tensor)][1]
