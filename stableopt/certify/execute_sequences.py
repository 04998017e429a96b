r"""Run the operations on sequences: recurrences, state spaces and attention.

A recurrence and a state space run one step after the other, in the order of the simple operations that they stand for, so that an
analysis of the rounding of those speaks about what runs here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.certify.operations import apply, lowering, operation
from stableopt.nn.centering import into_ball
from stableopt.nn.statespace.scan import diagonal_step

__all__ = ["recurrence_step"]

Node: TypeAlias = dict[str, Any]


def _optional(tensors: Mapping[str, Tensor], name: str | None) -> Tensor | None:
    return None if name is None else tensors[name]


@operation("recurrence")
def _recurrence(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    W, step = tensors[node["weight"]], _optional(tensors, node["step"])
    if inputs[0].is_meta:  # only the shape is asked for
        return inputs[0].new_empty(*inputs[0].shape[:-1], len(W))
    outer, start = _optional(tensors, node["outer"]), _optional(tensors, node["initial"])
    drive = F.linear(inputs[0], tensors[node["input"]], _optional(tensors, node["bias"]))
    h = None if start is None else start.expand(len(drive), len(start))
    outputs, pieces = [], drive.unbind(1)
    for piece in reversed(pieces) if node["reverse"] else pieces:
        pushed = apply(node["activation"], tensors, [piece if h is None else F.linear(h, W) + piece])
        if outer is None:
            if step is not None:
                pushed = step * pushed if h is None else h + step * (pushed - h)
        else:
            inner = F.linear(pushed if step is None else step * pushed, W.mT)
            pushed = F.linear(-inner if h is None else h - inner, outer)
        h = pushed
        outputs.append(h)
    return torch.stack(outputs[::-1] if node["reverse"] else outputs, 1)


@operation("statespace")
def _statespace(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    real, imag, skip = tensors[node["real"]], tensors[node["imag"]], _optional(tensors, node["skip"])
    if inputs[0].is_meta:
        return inputs[0].new_empty(*inputs[0].shape[:-1], len(tensors[node["output"]]))
    pushed = F.linear(inputs[0], tensors[node["input"]])
    if node["bidirectional"]:
        forth, back = (
            torch.cat(parts, -1) for parts in zip(*(p.chunk(2, -1) for p in pushed.chunk(2, -1)), strict=True)
        )
        first, second = real.chunk(2), imag.chunk(2)
        one, other = _states(first[0], second[0], forth), _states(first[1], second[1], back.flip(1)).flip(1)
        halves = zip(one.chunk(2, -1), other.chunk(2, -1), strict=True)
        states = torch.cat([part for pair in halves for part in pair], -1)
    else:
        states = _states(real, imag, pushed)
    output = F.linear(states, tensors[node["output"]])
    return output if skip is None else output + F.linear(inputs[0], skip)


def _states(real: Tensor, imag: Tensor, pushed: Tensor) -> Tensor:
    first, *others = pushed.unbind(1)
    states = [first]
    for piece in others:
        states.append(piece + diagonal_step(real, imag, states[-1]))
    return torch.stack(states, 1)


@operation("attention")
def _attention(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    scales, x = tensors[node["scales"]], inputs[0]

    def clipped(kind: str, radius: float) -> Tensor:
        mapped = F.linear(x, tensors[node[f"{kind}_weight"]], _optional(tensors, node[f"{kind}_bias"]))
        return into_ball(mapped.unflatten(-1, (len(scales), -1)).transpose(-3, -2), radius, (-1,))

    q, k, v = (clipped(kind, radius) for kind, radius in zip(("query", "key", "value"), node["radii"], strict=True))
    q = q * scales[:, None, None]
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=node["causal"], scale=1.0)
    output = _optional(tensors, node["output_bias"])
    return F.linear(mixed.transpose(-3, -2).flatten(-2), tensors[node["output_weight"]], output)


@operation("bounded_norm")
def _bounded_norm(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    x = inputs[0]
    size = x.abs().amax(-1, keepdim=True).clamp_min(1.0)  # it cancels; with it no square overflows
    unit = x / size
    spread = unit.square().sum(-1, keepdim=True) / (node["radius"] ** 2 * x.shape[-1])
    return unit / (size.reciprocal().square() + spread).sqrt()


class _Steps:
    """Simple operations one after the other; value 0 is the sequence."""

    def __init__(self, inputs: int = 1) -> None:
        self.nodes: list[Node] = []
        self.inputs = inputs

    def add(self, op: str, *inputs: int, **settings: Any) -> int:
        self.nodes.append({"op": op, "in": list(inputs), **settings})
        return self.inputs + len(self.nodes) - 1

    def linear(self, value: int, weight: str, bias: str | None = None, *, transposed: bool = False) -> int:
        return self.add("linear", value, weight=weight, bias=bias, transposed=transposed)

    def scaled(self, value: int, scale: str | None) -> int:
        return value if scale is None else self.add("affine", value, scale=scale, bias=None, axis=-1)

    def blend(self, *values: int, last: float = 1.0) -> int:
        return self.add("sum", *values, factors=[*[1.0] * (len(values) - 1), last])

    def cut(self, value: int, axis: int, start: int, stop: int) -> int:
        return self.add("slice", value, axis=axis, start=start, stop=stop)

    def activation(self, node: Node, value: int) -> int:
        return self.add(
            node["op"], value, **{key: entry for key, entry in node.items() if key not in {"op", "in", "bound"}}
        )


@lowering("recurrence")
def _unrolled_recurrence(node: Node) -> list[Node]:
    steps, times = _Steps(), range(node["length"])
    drive, states, h = steps.linear(0, node["input"], node["bias"]), dict[int, int](), None
    if node["initial"] is not None:
        nothing = steps.add("scale", steps.cut(drive, 0, 0, 1), factor=0.0)
        h = steps.add("affine", nothing, scale=None, bias=node["initial"], axis=-1)
    for t in reversed(times) if node["reverse"] else times:
        states[t] = h = _advanced(steps, node, steps.cut(drive, 0, t, t + 1), h)
    steps.add("concat", *(states[t] for t in times), axis=0)
    return steps.nodes


def _advanced(steps: _Steps, node: Node, z: int, h: int | None) -> int:
    """Append one step of a recurrence, from what the input gives and the state before it."""
    step = node["step"]
    if h is not None:
        z = steps.blend(steps.linear(h, node["weight"]), z)
    pushed = steps.activation(node["activation"], z)
    if node["outer"] is not None:
        inner = steps.linear(steps.scaled(pushed, step), node["weight"], transposed=True)
        moved = steps.add("scale", inner, factor=-1.0) if h is None else steps.blend(h, inner, last=-1.0)
        return steps.linear(moved, node["outer"])
    if step is None or h is None:
        return steps.scaled(pushed, step)
    return steps.blend(h, steps.scaled(steps.blend(pushed, h, last=-1.0), step))


def recurrence_step(node: Node) -> list[Node]:
    """Return one step of a recurrence as simple operations: value 0 is the input, value 1 the state before it.

    Args:
        node: the recurrence.

    Examples:
        >>> node = {"weight": "W", "input": "U", "bias": None, "step": None, "outer": None}
        >>> node |= {"activation": {"op": "activation", "name": "relu"}}
        >>> [step["op"] for step in recurrence_step(node)]
        ['linear', 'linear', 'sum', 'activation']
    """
    steps = _Steps(2)
    _advanced(steps, node, steps.linear(0, node["input"], node["bias"]), 1)
    return steps.nodes


@lowering("statespace")
def _unrolled_statespace(node: Node) -> list[Node]:
    steps, n = _Steps(), node["states"]
    pushed = steps.linear(0, node["input"])
    states = _unrolled_states(steps, node, pushed, range(node["length"]))
    if node["bidirectional"]:  # both directions of all states, of which each half has one
        back = _unrolled_states(steps, node, pushed, reversed(range(node["length"])))
        half = n // 2
        parts = [(value, start) for start in (0, n) for value in (states, back)]
        cuts = [
            steps.cut(value, 1, start + half * (value == back), start + half * (1 + (value == back)))
            for value, start in parts
        ]
        states = steps.add("concat", *cuts, axis=1)
    output = steps.linear(states, node["output"])
    if node["skip"] is not None:
        steps.blend(output, steps.linear(0, node["skip"]))
    return steps.nodes


def _unrolled_states(steps: _Steps, node: Node, pushed: int, times: Iterable[int]) -> int:
    """Append all states of a state space that runs in one direction."""
    n, real, imag, states, before = node["states"], node["real"], node["imag"], dict[int, int](), None
    for t in times:
        h = steps.cut(pushed, 0, t, t + 1)
        if before is not None:
            re, im = steps.cut(before, 1, 0, n), steps.cut(before, 1, n, 2 * n)
            turned = (
                steps.blend(steps.scaled(re, real), steps.scaled(im, imag), last=-1.0),
                steps.blend(steps.scaled(im, real), steps.scaled(re, imag)),
            )
            h = steps.blend(h, steps.add("concat", *turned, axis=1))
        before = states[t] = h
    return steps.add("concat", *(states[t] for t in sorted(states)), axis=0)
