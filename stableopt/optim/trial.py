"""Evaluate an unchanged torch closure a second time, for the cost of one forward pass and without leaving a trace."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from stableopt.optim.agree import put_away

__all__ = ["RandomState", "as_loss", "buffers_put_back", "evaluate_again", "modules_at_hand"]

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
        >>> w = nn.Parameter(torch.tensor(3.0))
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


@contextmanager
def buffers_put_back(closure: Callable[[], Any]) -> Iterator[None]:
    """Put back values and objects of the buffers of all modules that are called inside, at the end.

    A hook on all modules sees the first call of each. Compiled ones are not called one by one, and such a hook would have them compiled anew:
    where one is at hand in the closure, the buffers of all modules at hand are kept from the start instead.

    Examples:
        >>> norm = nn.BatchNorm1d(2)
        >>> closure = lambda: norm(torch.rand(4, 2)).sum()
        >>> with buffers_put_back(closure):
        ...     _ = closure()
        >>> int(norm.num_batches_tracked)
        0
    """
    kept: dict[int, tuple[nn.Module, dict[str, tuple[Tensor | None, Tensor | None]]]] = {}

    sharded: dict[int, nn.Module] = {}
    synchronized: dict[int, tuple[nn.parallel.DistributedDataParallel, bool]] = {}

    def keep(module: nn.Module, _arguments: Any) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            synchronized.setdefault(id(module), (module, module.require_forward_param_sync))
            for inner in module.module.modules():  # it overwrites the buffers inside before those are called
                keep(inner, None)
        if id(module) not in sharded and put_away(module):  # other weights have been gathered, or none
            sharded[id(module)] = module
        if id(module) not in kept and module._buffers:  # noqa: SLF001 - named_buffers would skip shared ones
            buffers = module._buffers.items()  # noqa: SLF001
            kept[id(module)] = module, {name: (b, None if b is None else b.detach().clone()) for name, b in buffers}

    at_hand = modules_at_hand(closure)
    if any(_is_compiled(module) for module in at_hand):
        for module in at_hand:
            keep(module, None)
        handle = None
    else:
        handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        for module in sharded.values():
            put_away(module)
        for (
            module,
            flag,
        ) in synchronized.values():  # a forward pass without gradients lets the next one keep its own buffers
            module.require_forward_param_sync = flag
        with torch.no_grad():
            for module, buffers in kept.values():
                for name, (buffer, value) in buffers.items():
                    module._buffers[name] = buffer  # noqa: SLF001
                    if buffer is not None and value is not None:
                        buffer.data.copy_(
                            value
                        )  # graphs that others have built stay valid; always: batch_norm changes its statistics without counting a new version


_DEPTH = 4
"""How far modules are looked for: functions that a closure calls, and objects that these are methods of."""


def modules_at_hand(closure: object) -> list[nn.Module]:
    """Return the modules that a function can reach: as itself, in its cells, globals, defaults and ``self``, and in functions there.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> modules_at_hand(lambda: layer(torch.ones(2))) == [layer]
        True
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def look(thing: object, depth: int) -> None:
        if id(thing) in seen or depth > _DEPTH:
            return
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found.update({id(m): m for m in thing.modules()})
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                look(part, depth + 1)
        elif isinstance(thing, MethodType):
            look(thing.__self__, depth + 1)
            look(thing.__func__, depth + 1)
        elif isinstance(thing, FunctionType):
            names = (thing.__globals__.get(name) for name in thing.__code__.co_names)
            for part in (
                *_contents(thing),
                *(thing.__defaults__ or ()),
                *(thing.__kwdefaults__ or {}).values(),
                *names,
            ):
                look(part, depth + 1)
        elif isinstance(thing, list | tuple):
            for part in thing:
                look(part, depth + 1)
        elif depth and not isinstance(thing, type | ModuleType | Tensor) and hasattr(thing, "__dict__"):
            for part in vars(thing).values():
                if isinstance(part, nn.Module):
                    look(part, depth + 1)

    look(closure, 0)
    return list(found.values())


def _contents(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
