"""The parameters and the state of an optimizer at one moment, to go back to."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableopt.constraints.sharding import is_sharded

__all__ = ["OF_SCHEDULERS", "OF_THE_GUARD", "Copies", "Plan", "Snapshot", "local", "same_kind", "stamp"]

_TORCH: Any = torch
"""The kernels for lists of tensors, which torch exports without types."""

OF_THE_GUARD = frozenset({"step_scale", "step_count", "skipped"})
"""Numbers of a group with which the guard goes on counting and scaling whether a step is undone or not."""
OF_SCHEDULERS = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"})
"""Numbers of a group that belong to the user or to a scheduler."""
_NOT_KEPT = frozenset({"params", "prox", "constraint"}) | OF_SCHEDULERS | OF_THE_GUARD
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
        gradients: keep the gradients as well, for :meth:`restore_gradients`; None for: with everything, and then :meth:`restore`
            puts them back, too.
        numbers: keys of the groups that are kept as well, of :data:`OF_THE_GUARD` and :data:`OF_SCHEDULERS`; with everything.

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

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        everything: bool = False,
        gradients: bool | None = None,
        numbers: Collection[str] = (),
    ) -> None:
        # the optimizer holds its snapshot: a weak way back frees the memory of both with the last reference to the optimizer
        self._optimizer = weakref.ref(optimizer)
        self._everything, self.with_gradients = everything, everything if gradients is None else gradients
        self._spared = _NOT_KEPT - frozenset(numbers)
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
        optimizer, copies = self._alive(), Copies()
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
        if self.with_gradients:
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
            self._groups = [(group, _Numbers(group, self._spared)) for group in optimizer.param_groups]
            self._attributes = _Numbers(vars(optimizer), _NOT_OF_THE_STEP)

    def restore(self) -> None:
        """Put back every value; tensors that existed keep their identity."""
        plan = Plan()
        self.plan(plan)
        plan.carry_out()
        if self._everything and self.with_gradients:
            self.restore_gradients()

    @torch.no_grad()
    def plan(self, plan: Plan) -> None:
        """Plan to put back every value but the gradients; nothing is written yet.

        Examples:
            >>> w = torch.nn.Parameter(torch.ones(1))
            >>> optimizer = torch.optim.SGD([w])
            >>> snapshot, plan = Snapshot(optimizer, everything=True), Plan()
            >>> _ = w.data.zero_()
            >>> snapshot.plan(plan)
            >>> w.item(), plan.carry_out(), w.item()
            (0.0, None, 1.0)
        """
        optimizer = self._alive()
        for p in self.parameters:
            plan.into(p, self.values[p])
        for key in [k for k in optimizer.state if k not in self.states and (self._everything or k in self.values)]:
            plan.remove(optimizer.state, key)
        for key, kept in self.states.items():
            state = optimizer.state.get(key)
            if not isinstance(kept, dict) or not isinstance(state, dict):
                plan.put(optimizer.state, key, _copied(kept))
                continue
            for name in [k for k in state if k not in kept]:
                plan.remove(state, name)
            for name, value in kept.items():
                plan.fill(state, name, value)
        for group, numbers in self._groups:
            numbers.plan(plan, group)
        if self._attributes is not None:
            self._attributes.plan(plan, vars(optimizer))

    def refusal(self) -> str:
        """Say why the values cannot be put back; empty if they can.

        Examples:
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = torch.optim.SGD([w])
            >>> snapshot = Snapshot(optimizer, everything=True)
            >>> optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
            >>> snapshot.refusal()
            'the optimizer SGD has other parameters or groups than it had'
        """
        optimizer = self._alive()
        parts = zip(self._groups, optimizer.param_groups, strict=False)
        now = [p for group in optimizer.param_groups for p in group["params"]]
        if self._everything and (
            len(self._groups) != len(optimizer.param_groups)
            or any(kept is not group for (kept, _), group in parts)
            or [*map(id, now)] != [*map(id, self.parameters)]
        ):
            return f"the optimizer {type(optimizer).__name__} has other parameters or groups than it had"
        for p, value in self.values.items():
            if not same_kind(p, value):
                return f"a parameter of shape {tuple(value.shape)}, {value.dtype}, on {value.device} is of another kind now"
        return ""

    @torch.no_grad()
    def restore_gradients(self) -> None:
        """Put back the gradients, into the tensors that hold them now; where there was none there is none."""
        for group in self._alive().param_groups:
            for p in group["params"]:
                value = self.gradients.get(p)
                if value is None:
                    p.grad = None
                elif p.grad is None or not same_kind(p.grad, value):
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

    def __init__(self, source: dict[str, Any], spared: Collection[str]) -> None:
        self._spared = spared
        self._kept = {k: (v, _copied(v)) for k, v in source.items() if self._counts(k, v)}

    def plan(self, plan: Plan, target: dict[str, Any]) -> None:
        """Plan to put back every value, and to take away what came later."""
        for key in [k for k, v in target.items() if self._counts(k, v) and k not in self._kept]:
            plan.remove(target, key)
        for key, (original, value) in self._kept.items():
            if isinstance(original, Tensor) and same_kind(original, value) and _is_writable(original):
                plan.into(original, value)
                plan.put(target, key, original)
            else:
                plan.put(target, key, _copied(value))

    def _counts(self, name: str, value: object) -> bool:
        return name not in self._spared and (_is_plain(value) or isinstance(value, Tensor))


class Copies:
    """Copies of many tensors, made at once.

    Examples:
        >>> copies, memory = Copies(), torch.zeros(2)
        >>> copies.of(torch.ones(2), memory) is memory
        True
        >>> copies.run()
        >>> memory.tolist()
        [1.0, 1.0]
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def of(self, source: Tensor, memory: object) -> Tensor:
        """Return a tensor that will hold the values of ``source``: ``memory`` if it fits.

        Examples:
            >>> Copies().of(torch.ones(1), None).item()
            1.0
        """
        strided = source.layout is torch.strided
        if not (
            strided and isinstance(memory, Tensor) and same_kind(memory, source) and memory.stride() == source.stride()
        ):
            return source.detach().clone()
        self._pairs.append((memory, source))
        return memory

    def into(self, target: Tensor, source: Tensor) -> None:
        """Let ``target`` hold the values of ``source``.

        Examples:
            >>> copies, x = Copies(), torch.zeros(1)
            >>> copies.into(x, torch.ones(1))
            >>> copies.run()
            >>> x.item()
            1.0
        """
        self._pairs.append((target, source))

    def run(self) -> None:
        """Copy.

        Examples:
            >>> Copies().run()
        """
        if self._pairs:
            # parts of sharded tensors: _foreach_copy_ has no sharding strategy; complex and mixed ones take its slow path
            _TORCH._foreach_copy_([local(t) for t, _ in self._pairs], [local(s) for _, s in self._pairs])


class Plan:
    """What is to be written where. Memory for it is there already, and it may be carried out again.

    Examples:
        >>> plan, state, x = Plan(), {"step": 3}, torch.zeros(2)
        >>> plan.fill(state, "step", 1)
        >>> plan.into(x, torch.ones(2))
        >>> state, x.tolist()
        ({'step': 3}, [0.0, 0.0])
        >>> plan.carry_out()
        >>> state, x.tolist()
        ({'step': 1}, [1.0, 1.0])
    """

    def __init__(self) -> None:
        self._copies = Copies()
        self._removals: list[tuple[MutableMapping[Any, Any], Any]] = []
        self._entries: list[tuple[MutableMapping[Any, Any], Any, Any]] = []

    def into(self, target: Tensor, source: Tensor) -> None:
        """Let a tensor hold the values of another one, of the same kind."""
        self._copies.into(target, source)

    def put(self, table: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Let a table have this very object under a key."""
        self._entries.append((table, key, value))

    def remove(self, table: MutableMapping[Any, Any], key: Any) -> None:
        """Let a table have nothing under a key."""
        self._removals.append((table, key))

    def fill(self, table: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Let a table have the value under a key: in the tensor that is there, if it can hold it; else a copy."""
        now = table.get(key)
        if isinstance(value, Tensor) and isinstance(now, Tensor) and same_kind(now, value) and _is_writable(now):
            self.into(now, value)
        else:
            self.put(table, key, _copied(value))

    @torch.no_grad()
    def carry_out(self) -> None:
        """Write."""
        for table, key in self._removals:
            table.pop(key, None)
        for table, key, value in self._entries:
            table[key] = value
        self._copies.run()


def same_kind(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype, device and layout, and in being sharded.

    Examples:
        >>> same_kind(torch.ones(2), torch.zeros(2)), same_kind(torch.ones(2), torch.ones(2, dtype=torch.int64))
        (True, False)
    """
    return (x.shape, x.dtype, x.device, x.layout, is_sharded(x)) == (
        y.shape,
        y.dtype,
        y.device,
        y.layout,
        is_sharded(y),
    )


def _is_writable(x: Tensor) -> bool:
    """Whether it may be written into, and each entry has memory of its own."""
    if x.is_inference() or x.layout is not torch.strided:
        return False
    return all(stride != 0 or size <= 1 for stride, size in zip(x.stride(), x.shape, strict=True))


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
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
    if type(value) is tuple:
        return tuple(_copied(v) for v in value)
    return copy.deepcopy(value)
