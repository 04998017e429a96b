"""Regularizers that act on each entry alone, on many parameters at once: in pieces that stay in the cache of a processor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.constraints import L1, Box, Constraint, NonNegative, Regularizer
from stableopt.constraints.kinds import Elementwise
from stableopt.constraints.penalties import in_range
from stableopt.optim.rules import UpdateRule
from stableopt.optim.snapshot import local

__all__ = ["Line", "acts_on_entries", "regularize_entries"]

_PIECE = 1 << 16
"""Entries that are worked on together on a CPU."""
_PIECE_ELSEWHERE = 1 << 26
_NATIVE = (torch.float32, torch.float64)

_TORCH: Any = torch
"""The kernels for lists of tensors, which torch exports without types."""


def acts_on_entries(regularizer: Regularizer) -> bool:
    """Return whether a regularizer treats every entry alike and alone, wherever it stands, so that tensors may be cut and joined.

    Examples:
        >>> from stableopt.constraints import L2Ball, WeightedL1
        >>> acts_on_entries(L1(0.1)), acts_on_entries(L2Ball(1.0)), acts_on_entries(WeightedL1((1.0, 2.0)))
        (True, False, False)
    """
    return isinstance(regularizer, Elementwise | Box | NonNegative)


@dataclass(frozen=True)
class Line:
    """A parameter, or a part of one, and its state, all in one dimension, in the memory of the optimizer where that is one line.

    Args:
        values: where the plain step has ended.
        state: after the plain step.
        first: whether this is its first step.
        strided: tensors whose memory is not one line, with the copies that stand for them.
    """

    values: Tensor
    state: dict[str, Any]
    first: bool
    strided: tuple[tuple[Tensor, Tensor], ...] = ()

    @classmethod
    def of(cls, p: Tensor, state: dict[str, Any], *, first: bool) -> Line | None:
        """Return the line of a parameter, None for a complex one and for one with a single entry.

        Examples:
            >>> Line.of(torch.ones(2, 3), {}, first=True).values.shape, Line.of(torch.ones(1), {}, first=True)
            (torch.Size([6]), None)
        """
        part = local(p.detach())
        shape = part.shape
        if p.numel() == 1 or part.is_complex():
            return None
        held = {k: local(v) if isinstance(v, Tensor) and v.shape == p.shape else v for k, v in state.items()}
        strided: list[tuple[Tensor, Tensor]] = []

        def line(x: Any) -> Any:
            if not (isinstance(x, Tensor) and x.shape == shape):
                return x
            if x.is_contiguous():
                return x.view(-1)
            copy = x.reshape(-1)
            strided.append((x, copy))
            return copy

        return cls(line(part), {k: line(v) for k, v in held.items()}, first, tuple(strided))

    def finish(self) -> None:
        """Put copies of strided memory back."""
        for place, copy in self.strided:
            place.copy_(copy.view(place.shape))

    def cut(self, size: int) -> Iterator[Line]:
        """Yield parts of at most ``size`` entries."""
        count = self.values.numel()
        if count <= size:
            yield self
            return
        lines = {k for k, v in self.state.items() if isinstance(v, Tensor) and v.ndim == 1 and v.numel() == count}
        for at in range(0, count, size):
            state = {k: v[at : at + size] if k in lines else v for k, v in self.state.items()}
            yield Line(self.values[at : at + size], state, self.first)


@torch.no_grad()
def regularize_entries(rule: UpdateRule, lines: list[Line], group: dict[str, Any], regularizer: Regularizer) -> None:
    """Do what :func:`stableopt.optim.regularize.regularize` does, up to rounding, for many parameters of one group.

    Args:
        rule: of the optimizer.
        lines: the parameters.
        group: their hyper-parameters.
        regularizer: one that :func:`acts_on_entries`.

    Examples:
        >>> from stableopt.optim.rules import HeavyBall
        >>> w = torch.tensor([1.0, -3.0])
        >>> regularize_entries(HeavyBall(), [Line(w, {}, True)], {"lr": 0.5, "momentum": 0.0}, L1(1.0))
        >>> w
        tensor([ 0.5000, -2.5000])
    """
    for batch in _batches(lines):
        first = batch[0]
        step: float | Tensor = rule.effective_lr(group, first=first.first)
        realign = bool(rule.momentum(group)) and rule.buffer(first.state) is not None
        metrics: list[Any] = [0.0] * len(batch)
        if realign or not isinstance(regularizer, Constraint):
            metrics = [rule.metric(line.state, group) for line in batch]
        values = [line.values for line in batch]
        sizes = [v.numel() for v in values]
        reached = torch.cat(values) if len(values) > 1 else values[0]
        if not isinstance(regularizer, Constraint):
            joined = torch.cat(metrics) if len(metrics) > 1 and isinstance(metrics[0], Tensor) else metrics[0]
            step = step / joined
        if (
            isinstance(regularizer, L1) and reached.dtype in _NATIVE
        ):  # the prox is this difference; nothing else is written
            taken = _clamped(reached, step * regularizer.weight)
            _TORCH._foreach_sub_(values, taken.split(sizes))
        else:
            moved = (
                regularizer.prox(reached, step)
                if not isinstance(regularizer, Constraint)
                else regularizer.project(reached)
            )
            taken = reached - moved if realign else moved
            _TORCH._foreach_copy_(values, moved.split(sizes))
        if realign:
            for line, metric, part in zip(batch, metrics, taken.split(sizes), strict=True):
                rule.realign(part, line.state, metric, group)
    for line in lines:
        line.finish()


def _clamped(x: Tensor, bound: float | Tensor) -> Tensor:
    """Return the projection on the box of a bound, which is what a soft threshold takes off."""
    bound = in_range(bound, x.dtype)  # an infinite one would make NaN of an infinite entry
    low: Any = -bound
    high: Any = bound
    return x.clamp(low, high)


def _batches(lines: list[Line]) -> Iterator[list[Line]]:
    """Cut long lines, and yield short ones together where they have dtype, device and age in common."""
    waiting: dict[Any, list[Line]] = {}
    for whole in lines:
        size = _PIECE if whole.values.device.type == "cpu" else _PIECE_ELSEWHERE
        for line in whole.cut(size):
            key = line.values.dtype, line.values.device, line.first, len(line.state)
            batch = waiting.setdefault(key, [])
            if batch and sum(b.values.numel() for b in batch) + line.values.numel() > size:
                yield batch
                batch = waiting[key] = []
            batch.append(line)
    yield from (batch for batch in waiting.values() if batch)
