"""The energies of a step, summed over all parameters in pieces that fit into the cache of a processor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.optim.rules import UpdateRule, step_sums
from stableopt.optim.rules.base import Scratch
from stableopt.optim.snapshot import local

__all__ = ["Moved", "energy_sums"]

_PIECE = 1 << 16
"""Entries of one piece on a CPU: what a rule computes of it stays in the second-level cache."""
_QUICK = (torch.float32, torch.float64)
_PIECE_ELSEWHERE = 1 << 26
"""Elsewhere a piece is what few kernels serve."""


@dataclass(frozen=True)
class Moved:
    """One parameter before and after a step, or the part of it that this process holds.

    Args:
        group: hyper-parameters, those that the step used.
        start: the parameter before.
        buffer: its momentum buffer before, None if it had none.
        end: the parameter after.
        state: its state after.
        share: the weight of this part in the sum over all processes.

    Examples:
        >>> Moved({"lr": 1.0}, torch.zeros(1), None, torch.ones(1), {}).share
        1.0
    """

    group: dict[str, Any]
    start: Tensor
    buffer: Tensor | None
    end: Tensor
    state: dict[str, Any]
    share: float = 1.0


def energy_sums(rule: UpdateRule, moved: list[Moved], device: torch.device) -> Tensor:
    r"""Return the sums of :func:`stableopt.optim.rules.step_sums` over many parameters, penalties left out.

    Args:
        rule: of the optimizer.
        moved: the parameters.
        device: where the result is to be.

    Returns:
        Five float64 numbers: energy before and after without loss and penalty, :math:`\|d\|_P^2/\eta'`,
        :math:`(1-\beta)\|d\|_P^2/\eta'`, :math:`\|d\|^2`.

    Examples:
        >>> from stableopt.optim.rules import HeavyBall
        >>> group = {"lr": 0.5, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
        >>> one = Moved(group, torch.zeros(3), None, torch.ones(3), {})
        >>> energy_sums(HeavyBall(), [one, one], torch.device("cpu")).round(decimals=6).tolist()
        [0.0, 0.0, 12.0, 12.0, 6.0]
    """
    quick, rows, scratch = [0.0] * 5, [], Scratch()
    for piece in _pieces(moved):
        row = None
        if piece.start.dtype in _QUICK and piece.start.device.type == "cpu":
            row = rule.quick_sums(piece.group, piece.start, piece.buffer, piece.end, piece.state, scratch)
        if row is not None:
            quick = [total + piece.share * one for total, one in zip(quick, row, strict=True)]
            continue
        sums = torch.stack(step_sums(rule, piece.group, piece.start, piece.buffer, piece.end, piece.state))
        rows.append((piece.share * sums).to(device))
    total = torch.tensor(quick, dtype=torch.float64, device=device)
    return total + torch.stack(rows).sum(0) if rows else total


def _pieces(moved: list[Moved]) -> Iterator[Moved]:
    """Cut large parameters, and join small ones that share everything but their numbers."""
    waiting: dict[tuple[Any, ...], list[Moved]] = {}
    for one in moved:
        flat = _flat(one)
        size = _PIECE if flat.start.device.type == "cpu" else _PIECE_ELSEWHERE
        count = flat.start.numel()
        if count == 0:
            continue
        for at in range(0, count - count % size if count > size else 0, size):
            yield _cut(flat, at, at + size)
        rest = _cut(flat, count - count % size, count) if count > size else flat
        if rest.start.numel() == 0:
            continue
        key = _key(rest)
        if key is None or rest.start.numel() > size // 2:
            yield rest
            continue
        together = waiting.setdefault(key, [])
        together.append(rest)
        if sum(m.start.numel() for m in together) > size // 2:
            yield _joined(waiting.pop(key))
    for together in waiting.values():
        yield _joined(together)


def _flat(one: Moved) -> Moved:
    """Lay out everything that has the shape of the parameter in one dimension; the penalty is not summed here."""
    start = local(one.start)
    shape = start.shape

    def line(x: Any) -> Any:
        x = local(x) if isinstance(x, Tensor) else x
        if not (isinstance(x, Tensor) and x.shape == shape):
            return x
        return (x.to_dense() if x.is_sparse else x).reshape(-1)  # SGD's momentum of sparse gradients is sparse

    # a parameter with one number could be mistaken for its step count: such a state is passed on as it is
    state = {k: line(v) for k, v in one.state.items()} if math.prod(shape) != 1 else _scalar_state(one)
    group = one.group if one.group.get("prox") is None else one.group | {"prox": None}
    return Moved(
        group,
        start.reshape(-1),
        None if one.buffer is None else line(one.buffer),
        local(one.end).reshape(-1),
        state,
        one.share,
    )


def _scalar_state(one: Moved) -> dict[str, Any]:
    """Return the state of a parameter with one entry: step counts are 0-d already, everything else becomes a line."""
    return {
        k: local(v).reshape(-1) if isinstance(v, Tensor) and k != "step" and v.dtype == one.start.dtype else v
        for k, v in one.state.items()
    }


def _is_line(flat: Moved, name: str, value: Any) -> bool:
    """Whether an entry of the state has one number for each of the parameter."""
    return isinstance(value, Tensor) and value.ndim == 1 and value.numel() == flat.start.numel() and name != "step"


def _cut(flat: Moved, begin: int, end: int) -> Moved:
    state = {k: v[begin:end] if _is_line(flat, k, v) else v for k, v in flat.state.items()}
    buffer = None if flat.buffer is None else flat.buffer[begin:end]
    return Moved(flat.group, flat.start[begin:end], buffer, flat.end[begin:end], state, flat.share)


def _key(flat: Moved) -> tuple[Any, ...] | None:
    """Return what two pieces must share to be one; None for a piece that stays alone."""
    numbers: list[Any] = []
    for name, value in flat.state.items():
        if not isinstance(value, Tensor):
            if not isinstance(value, bool | int | float | str | None):
                return None
            numbers.append((name, value))
        elif _is_line(flat, name, value):
            numbers.append((name, value.dtype))
        elif value.device.type != "cpu" or value.numel() != 1:
            return None  # reading it would wait for its device
        else:
            numbers.append((name, value.item()))
    start = flat.start
    return id(flat.group), start.dtype, start.device, flat.buffer is None, flat.share, tuple(numbers)


def _joined(together: list[Moved]) -> Moved:
    if len(together) == 1:
        return together[0]
    first = together[0]
    state = {
        k: torch.cat([m.state[k] for m in together]) if _is_line(first, k, v) else v for k, v in first.state.items()
    }
    buffer = None if first.buffer is None else torch.cat([m.buffer for m in together if m.buffer is not None])
    return Moved(
        first.group,
        torch.cat([m.start for m in together]),
        buffer,
        torch.cat([m.end for m in together]),
        state,
        first.share,
    )
