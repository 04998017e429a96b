"""The modules that a closure calls: which they are, and how to leave them as they were."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from stableopt.optim.agree import put_away

__all__ = ["buffers_put_back", "modules_at_hand"]

_DEPTH = 4
"""How far modules are looked for: functions that a closure calls, and objects that these are methods of."""


@contextmanager
def buffers_put_back(closure: Callable[[], Any]) -> Iterator[None]:
    """Put back values and objects of the buffers of all modules that are called inside, at the end.

    A hook on all modules sees the first call of each. Compiled ones are not called one by one, and such a hook would have them
    compiled anew: where one is at hand in the closure, the buffers of all modules at hand are kept from the start instead, also
    for those who put back around this call, and nobody's hook is there while it lasts.

    Args:
        closure: what will be called inside.

    Examples:
        >>> norm = nn.BatchNorm1d(2)
        >>> closure = lambda: norm(torch.rand(4, 2)).sum()
        >>> with buffers_put_back(closure):
        ...     _ = closure()
        >>> int(norm.num_batches_tracked)
        0
    """
    kept, at_hand = _Kept(), modules_at_hand(closure)
    compiled = any(map(_is_compiled, at_hand))
    around = [other for other in _AROUND if other.hooked] if compiled else []
    for other in around:
        other.unhook()
    for one in (kept, *around) if compiled else ():
        for module in at_hand:
            one.keep(module)
    if not compiled:
        kept.hook()
    _AROUND.append(kept)
    try:
        yield
    finally:
        _AROUND.remove(kept)
        kept.unhook()
        for other in around:
            other.hook()
        kept.put_back()


class _Kept:
    """What forward passes change in modules, as it was when each was first seen."""

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[nn.Module, dict[str, tuple[Tensor | None, Tensor | None]]]] = {}
        self._sharded: dict[int, nn.Module] = {}
        self._synchronized: dict[int, tuple[nn.parallel.DistributedDataParallel, bool]] = {}
        self._handle: Any = None

    @property
    def hooked(self) -> bool:
        """Whether it sees what is called."""
        return self._handle is not None

    def hook(self) -> None:
        """Keep each module that is called from now on."""
        self._handle = register_module_forward_pre_hook(lambda module, _: self.keep(module))

    def unhook(self) -> None:
        """See no more calls."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def keep(self, module: nn.Module) -> None:
        """Keep a module."""
        if isinstance(module, nn.parallel.DistributedDataParallel):
            self._synchronized.setdefault(id(module), (module, module.require_forward_param_sync))
            for inner in module.module.modules():  # it overwrites the buffers inside before those are called
                self.keep(inner)
        if id(module) not in self._sharded and put_away(module):  # other weights have been gathered, or none
            self._sharded[id(module)] = module
        if id(module) not in self._buffers and module._buffers:  # noqa: SLF001 - named_buffers would skip shared ones
            buffers = module._buffers.items()  # noqa: SLF001
            self._buffers[id(module)] = module, {n: (b, None if b is None else b.detach().clone()) for n, b in buffers}

    @torch.no_grad()
    def put_back(self) -> None:
        """Put everything back; graphs that others have built stay valid."""
        for module in self._sharded.values():
            put_away(module)
        for module, flag in self._synchronized.values():
            # a forward pass without gradients lets the next one keep the buffers of its own process
            module.require_forward_param_sync = flag
        for module, buffers in self._buffers.values():
            for name, (buffer, value) in buffers.items():
                module._buffers[name] = buffer  # noqa: SLF001
                if buffer is not None and value is not None:
                    buffer.data.copy_(value)  # always: batch_norm changes its statistics without counting a new version


_AROUND: list[_Kept] = []
"""Those within whose context we are."""


def modules_at_hand(closure: object) -> list[nn.Module]:
    """Return the modules that a function can reach: in its cells, globals, defaults and ``self``, and in functions there.

    Args:
        closure: a function, a method, a partial function, or a module.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> modules_at_hand(lambda: layer(torch.ones(2))) == [layer]
        True
    """
    found: dict[int, nn.Module] = {}
    seen: dict[int, object] = {}
    near: list[object] = [closure]
    for _ in range(_DEPTH + 1):
        further: list[object] = []
        for thing in near:
            if id(thing) in seen:
                continue
            seen[id(thing)] = thing
            if isinstance(thing, nn.Module):
                found |= {id(m): m for m in thing.modules()}
            else:
                further += _parts(thing)
        near = further
    return list(found.values())


def _parts(thing: object) -> list[object]:
    """Return what a function or an object refers to."""
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, FunctionType):
        used = (thing.__globals__.get(name) for name in thing.__code__.co_names)
        cells = [_content(cell) for cell in thing.__closure__ or ()]
        return [*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *used]
    if isinstance(thing, list | tuple):
        return list(thing)
    if isinstance(thing, type | ModuleType | Tensor) or not hasattr(thing, "__dict__"):
        return []
    return [part for part in vars(thing).values() if isinstance(part, nn.Module)]


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
