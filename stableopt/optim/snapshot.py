"""The parameters and the state of an optimizer at one moment, to go back to."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableopt.constraints.sharding import is_sharded

__all__ = ["Snapshot", "local", "stamp"]

_TORCH: Any = torch
"""The kernels for lists of tensors, which torch exports without types."""

_NOT_KEPT = {"params", "lr", "prox", "constraint", "step_scale", "step_count", "skipped"}
_NOT_KEPT |= {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
"""What belongs to the user, to a scheduler, or to the guard, which counts and scales on whether a step is undone or not."""
_NOT_OF_THE_STEP = {"last_step", "pending", "_memory", "_process_group", "_opt_called"}
"""Attributes of the guard and of schedulers, which no step of an optimizer sets."""


def local(x: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: of a DTensor its shard, which shares its memory, else the tensor.

    Examples:
        >>> x = torch.ones(2)
        >>> local(x) is x
        True
    """
    return x.to_local() if is_sharded(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def stamp(x: Tensor) -> tuple[Any, ...]:
    """Return what changes when somebody changes a tensor: in place, or its dtype or memory.

    A sharded tensor counts the changes made through it, and its part here those made to the part. torch does not count what is done
    through ``.data``.

    Examples:
        >>> x = torch.ones(2)
        >>> before = stamp(x)
        >>> _ = x.mul_(2)
        >>> stamp(x) == before
        False
    """
    with torch.no_grad():
        part = local(x)
    return x._version, part._version, part.dtype, part.data_ptr()  # noqa: SLF001 - the documented way to see a change in place


class Snapshot:
    """The parameters and the state of an optimizer, to go back to; it may be taken again, in the memory it has.

    Args:
        optimizer: any torch optimizer.
        everything: keep all parameters and gradients, all state, and what numbers and tensors there are in the groups and among the
            attributes, as an optimizer needs of which nothing is known: many write the weight decay into the gradient.
            Otherwise only what a torch optimizer changes: parameters with a gradient and their state.
        gradients: keep the gradients as well; :meth:`restore` leaves them alone, :meth:`restore_gradients` puts them back.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> w.grad = torch.ones(1)
        >>> optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.9)
        >>> snapshot = Snapshot(optimizer)
        >>> optimizer.step()
        >>> snapshot.restore()
        >>> w.item(), len(optimizer.state)
        (1.0, 0)
    """

    def __init__(self, optimizer: Optimizer, *, everything: bool = False, gradients: bool = False) -> None:
        # the optimizer holds its snapshot: a weak way back frees the memory of both with the last reference to the optimizer
        self._optimizer = weakref.ref(optimizer)
        self._everything, self.with_gradients = everything, gradients
        self.parameters: list[Tensor] = []
        self.values: dict[Tensor, Tensor] = {}
        self.states: dict[Any, Any] = {}
        self.gradients: dict[Tensor, Tensor] = {}
        self._groups: list[tuple[dict[str, Any], _Numbers]] = []
        self._attributes: _Numbers | None = None
        self.take()

    @torch.no_grad()
    def take(self) -> None:
        """Keep what is there now; the memory of the last time is used again where shape, dtype and device are the same."""
        optimizer, copies = self._alive(), _Copies()
        self.parameters = [
            p for group in optimizer.param_groups for p in group["params"] if self._everything or p.grad is not None
        ]
        old = self.values
        self.values = {p: copies.of(p.detach(), old.get(p)) for p in self.parameters}
        kept, self.states = self.states, {}
        keys = list(optimizer.state) if self._everything else [p for p in self.parameters if p in optimizer.state]
        for key in keys:
            before, state = kept.get(key, {}), optimizer.state[key]
            if not isinstance(state, dict):  # a number under a name, where torch has a dictionary under a parameter
                self.states[key] = _copied(state)
                continue
            self.states[key] = {
                name: copies.of(value, before.get(name)) if isinstance(value, Tensor) else _copied(value)
                for name, value in state.items()
            }
        if self.with_gradients or self._everything:
            mine = self.gradients
            self.gradients = {
                p: p.grad.detach().clone()
                if p.grad.layout is not torch.strided
                else copies.of(p.grad.detach(), mine.get(p))
                for p in self.parameters
                if p.grad is not None
            }
        copies.run()
        if self._everything:
            self._groups = [(group, _Numbers(group, _NOT_KEPT)) for group in optimizer.param_groups]
            self._attributes = _Numbers(vars(optimizer), _NOT_OF_THE_STEP)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back every value; tensors that existed keep their identity."""
        optimizer, copies = self._alive(), _Copies()
        for p in self.parameters:
            copies.into(p, self.values[p])
        for key in [k for k in optimizer.state if k not in self.states and (self._everything or k in self.values)]:
            del optimizer.state[key]
        for key, kept in self.states.items():
            if not isinstance(kept, dict):
                optimizer.state[key] = _copied(kept)
                continue
            state = optimizer.state[key]
            for name in [k for k in state if k not in kept]:
                del state[name]
            for name, value in kept.items():
                now = state.get(name)
                if isinstance(value, Tensor) and isinstance(now, Tensor) and _same_kind(now, value):
                    copies.into(now, value)
                else:
                    state[name] = _copied(value)
        copies.run()
        if self._everything:
            for group, numbers in self._groups:
                numbers.put_back(group)
            if self._attributes is not None:
                self._attributes.put_back(vars(optimizer))
            self.restore_gradients()

    @torch.no_grad()
    def restore_gradients(self) -> None:
        """Put back the gradients, into the tensors that hold them now; where there was none there is none."""
        for group in self._alive().param_groups:
            for p in group["params"]:
                value = self.gradients.get(p)
                if value is None:
                    p.grad = None
                elif p.grad is None or not _same_kind(p.grad, value):
                    p.grad = value.clone()
                else:
                    p.grad.copy_(value)

    def _alive(self) -> Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the optimizer of this snapshot does not exist any more.")
        return optimizer


class _Numbers:
    """The numbers, tensors and nested values of a dictionary that an optimizer writes into."""

    def __init__(self, source: dict[str, Any], spared: set[str]) -> None:
        self._spared = spared
        self._kept = {k: (v, _copied(v)) for k, v in source.items() if self._counts(k, v)}

    def put_back(self, target: dict[str, Any]) -> None:
        """Put back every value, and take away what came later."""
        for key in [k for k, v in target.items() if self._counts(k, v) and k not in self._kept]:
            del target[key]
        for key, (original, value) in self._kept.items():
            if isinstance(original, Tensor) and _same_kind(original, value):
                original.copy_(value)
                target[key] = original
            else:
                target[key] = _copied(value)

    def _counts(self, name: str, value: object) -> bool:
        return name not in self._spared and (_is_plain(value) or isinstance(value, Tensor))


class _Copies:
    """Copies of many tensors, made at once."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def of(self, source: Tensor, memory: object) -> Tensor:
        """Return a tensor that will hold the values of ``source``: ``memory`` if it fits."""
        strided = source.layout is torch.strided
        if not (
            strided and isinstance(memory, Tensor) and _same_kind(memory, source) and memory.stride() == source.stride()
        ):
            return source.detach().clone()
        self._pairs.append((memory, source))
        return memory

    def into(self, target: Tensor, source: Tensor) -> None:
        """Let ``target`` hold the values of ``source``."""
        self._pairs.append((target, source))

    def run(self) -> None:
        """Copy."""
        if self._pairs:
            # parts of sharded tensors: _foreach_copy_ has no sharding strategy; complex and mixed ones take its slow path
            _TORCH._foreach_copy_([local(t) for t, _ in self._pairs], [local(s) for _, s in self._pairs])


def _same_kind(x: Tensor, y: Tensor) -> bool:
    return (x.shape, x.dtype, x.device, x.layout, is_sharded(x)) == (
        y.shape,
        y.dtype,
        y.device,
        y.layout,
        is_sharded(y),
    )


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple)


def _copied(value: Any) -> Any:
    """Copy nested state; tensors in it are cloned."""
    if _is_plain(value):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return copy.deepcopy(value)
