"""Copies of tensors and nested values, and plans of what is to be written where."""

from __future__ import annotations

import copy
from collections.abc import Collection, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.constraints.sharding import is_sharded

__all__ = ["Copies", "Numbers", "Plan", "copied", "is_writable", "local", "same_kind"]

_TORCH: Any = torch
"""The kernels for lists of tensors, which torch exports without types."""
_DEEP = 16
"""Levels of nesting; what is deeper holds itself."""


def local(x: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: of a DTensor its shard, which shares its memory, else the tensor.

    Examples:
        >>> x = torch.ones(2)
        >>> local(x) is x
        True
    """
    return x.to_local() if is_sharded(x) else x  # pyright: ignore[reportAttributeAccessIssue]


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
        self._entries: list[tuple[MutableMapping[Any, Any] | list[Any], Any, Any]] = []

    def into(self, target: Tensor, source: Tensor) -> None:
        """Let a tensor hold the values of another one, of the same kind."""
        self._copies.into(target, source)

    def put(self, table: MutableMapping[Any, Any] | list[Any], key: Any, value: Any) -> None:
        """Let a table have this very object under a key, or a list these very entries in a slice."""
        self._entries.append((table, key, value))

    def remove(self, table: MutableMapping[Any, Any], key: Any) -> None:
        """Let a table have nothing under a key."""
        self._removals.append((table, key))

    def fill(self, table: MutableMapping[Any, Any], key: Any, value: Any, original: object = None) -> None:
        """Let a table have the value under a key.

        A tensor is written into if it is the very object that was there when the value was kept. Any other may be a view of what is
        not ours (a module that keeps its last batch has a view of the data): then the table gets a copy of the value.

        Args:
            table: a dictionary.
            key: of it.
            value: that was kept.
            original: what the table had under the key when the value was kept, if that is still alive.

        Examples:
            >>> data, mine = torch.ones(2), torch.zeros(2)
            >>> table, plan = {"last": data, "mean": mine}, Plan()
            >>> plan.fill(table, "last", torch.full((2,), 5.0))
            >>> plan.fill(table, "mean", torch.full((2,), 5.0), mine)
            >>> plan.carry_out()
            >>> table["last"].tolist(), data.tolist(), table["mean"] is mine
            ([5.0, 5.0], [1.0, 1.0], True)
        """
        now = table.get(key)
        if not (isinstance(now, Tensor) and isinstance(value, Tensor) and now is original):
            self.put(table, key, copied(value))
        elif same_kind(now, value) and is_writable(now):
            self.into(now, value)
        else:
            self.put(table, key, copied(value))

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


def is_writable(x: Tensor) -> bool:
    """Whether a tensor may be written into, and each entry has memory of its own.

    Examples:
        >>> is_writable(torch.ones(3)), is_writable(torch.ones(1).expand(3))
        (True, False)
    """
    if x.is_inference() or x.layout is not torch.strided:
        return False
    return all(stride != 0 or size <= 1 for stride, size in zip(x.stride(), x.shape, strict=True))


class Numbers:
    """The numbers, tensors and nested values of a dictionary, such as a group or the attributes of an optimizer.

    Lists, dictionaries and tuples count if nothing else is in them. What holds parameters, functions or other objects is
    left alone.

    Args:
        source: the dictionary.
        spared: keys that are left alone.

    Examples:
        >>> group = {"k": 1, "seen": [1], "mean": torch.zeros(1), "call": print}
        >>> seen, mean, numbers = group["seen"], group["mean"], Numbers(group, ())
        >>> group |= {"k": 2, "late": 3, "call": None}
        >>> seen.append(2), mean.add_(1.0)
        (None, tensor([1.]))
        >>> plan = Plan()
        >>> numbers.plan(plan, group)
        >>> plan.carry_out()
        >>> group, group["seen"] is seen
        ({'k': 1, 'seen': [1], 'mean': tensor([0.]), 'call': None}, True)
    """

    def __init__(self, source: dict[str, Any], spared: Collection[str]) -> None:
        self._spared, self._there = spared, frozenset(source)
        self._kept = {k: _Value(v) for k, v in source.items() if self._counts(k, v)}

    def plan(self, plan: Plan, target: dict[str, Any], spared: Collection[str] = ()) -> None:
        """Plan to put back every value, and to take away what came later; ``spared`` keys are left alone, too."""
        for key in [k for k, v in target.items() if self._counts(k, v) and k not in self._there and k not in spared]:
            plan.remove(target, key)
        for key, value in self._kept.items():
            if key not in spared:
                plan.put(target, key, value.plan(plan))

    def _counts(self, name: str, value: object) -> bool:
        return name not in self._spared and _is_number(value)


class _Value:
    """A value of any nesting: the objects that there were, and copies of what was in them."""

    def __init__(self, value: Any) -> None:
        self._original, self._copy = value, None
        self._parts: dict[Any, _Value] = {}
        if isinstance(value, Tensor):
            self._copy = value.detach().clone()
        elif isinstance(value, dict):
            self._parts = {k: _Value(v) for k, v in value.items()}
        elif isinstance(value, list | tuple):
            self._parts = {i: _Value(v) for i, v in enumerate(value)}

    def plan(self, plan: Plan) -> Any:
        """Plan to write into the objects that there were; return what has to stand in the place of the value."""
        value = self._original
        if isinstance(value, Tensor):
            if self._copy is None or not same_kind(value, self._copy) or not is_writable(value):
                return copied(self._copy)
            plan.into(value, self._copy)
            return value
        parts = {k: part.plan(plan) for k, part in self._parts.items()}
        if isinstance(value, dict):
            for key in value.keys() - parts.keys():
                plan.remove(value, key)
            for key, part in parts.items():
                plan.put(value, key, part)
        elif isinstance(value, list):
            plan.put(value, slice(None), [*parts.values()])
        elif isinstance(value, tuple) and any(part is not old for part, old in zip(parts.values(), value, strict=True)):
            return _tuple_like(value, [*parts.values()])
        return value


def copied(value: Any) -> Any:
    """Return a copy of nested state; tensors in it are cloned.

    Examples:
        >>> state = {"seen": [torch.zeros(1), 3]}
        >>> other = copied(state)
        >>> _ = state["seen"][0].add_(1)
        >>> other
        {'seen': [tensor([0.]), 3]}
    """
    if _is_plain(value):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {k: copied(v) for k, v in value.items()}
    if type(value) is list:
        return [copied(v) for v in value]
    if type(value) is tuple or hasattr(value, "_fields"):
        return _tuple_like(value, [copied(v) for v in value])
    return copy.deepcopy(value)


def _tuple_like(value: Any, parts: list[Any]) -> Any:
    if hasattr(value, "_make"):
        return value._make(parts)
    return tuple(parts) if type(value) is tuple else type(value)(parts)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _is_number(value: object, depth: int = 0) -> bool:
    """Whether a value is plain or a tensor, or nested of such; a parameter in a list belongs to somebody else."""
    if depth and isinstance(value, nn.Parameter):
        return False
    if isinstance(value, dict):
        return depth < _DEEP and all(_is_plain(k) and _is_number(v, depth + 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return depth < _DEEP and all(_is_number(v, depth + 1) for v in value)
    return _is_plain(value) or isinstance(value, Tensor)
