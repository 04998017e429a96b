"""The rules of the operations: each checks the shapes and that the bound is proved (docs/soundness.md, S5, S6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .convolution import conv_at_most, reduced
from .files import choice, ints, number
from .numbers import Array, need, norm_at_most, row_sums

__all__ = ["RULES", "Graph", "Node", "Rule", "Shape", "part", "rule"]

Node: TypeAlias = dict[str, Any]
Shape: TypeAlias = tuple[int, ...]


class Rule(NamedTuple):
    """The keys of an operation beside op, in and bound (None: the rule checks them), the rule, and the norms in which it holds."""

    keys: set[str] | None
    check: Callable[..., Shape]
    norms: tuple[str, ...]


RULES: dict[str, Rule] = {}


def rule(
    op: str, keys: str | None, norms: str = "l2 linf token_max"
) -> Callable[[Callable[..., Shape]], Callable[..., Shape]]:
    """Register the rule of an operation: ``(graph, node, shape, bound) -> shape`` of the output, or RejectedError."""

    def register(check: Callable[..., Shape]) -> Callable[..., Shape]:
        RULES[op] = Rule(None if keys is None else set(keys.split()), check, tuple(norms.split()))
        return check

    return register


class Graph:
    """What the rules know: the tensors, which of them were used, the norm, and whether proofs are in integers."""

    def __init__(self, tensors: dict[str, Array], norm: str, exact: bool) -> None:
        self.tensors, self.norm, self.exact, self.used = tensors, norm, exact, set[str]()
        self.stable = dict[int, tuple[Fraction, Fraction | None]]()  # the rate and the gain of recurrent operations

    def tensor(self, name: Any, ndim: int) -> Array:
        """Return a tensor of the file and mark it as used."""
        need(isinstance(name, str) and name in self.tensors, f"the tensor {name!r} is not in the weight file")
        need(self.tensors[name].ndim == ndim, f"the tensor {name!r} must have {ndim} dimensions")
        self.used.add(name)
        return self.tensors[name]

    def vector(self, name: Any, size: int) -> Array | None:
        """Return a vector of the given size, or None if it is left out."""
        need(name is None or self.tensor(name, 1).shape == (size,), f"the tensor {name!r} must have {size} entries")
        return None if name is None else self.tensors[name]

    def operator(self, node: Any, shape: Shape, bound: Fraction | None, weight: Array | None = None) -> Shape:
        """Check a linear map or a convolution inside another operation, if wanted with another weight; return its shape."""
        need(isinstance(node, dict) and node.get("op") in {"linear", "conv"}, "an operator must be linear or conv")
        keys = RULES[node["op"]].keys or set[str]()
        need(set(node) - {"bound"} == keys | {"op"}, "an operator has wrong keys")
        need(node["op"] == "linear" or self.norm != "token_max", "a convolution has no rule for token_max")
        return (_linear if node["op"] == "linear" else _conv)(self, node, shape, bound, weight)

    def matrix(self, stack: Array, limit: Fraction | None) -> None:
        """Reject unless the norm of each matrix of the stack is proved to be within the limit, if there is one."""
        if limit is not None and self.norm == "linf":
            need(limit >= row_sums(stack, exact=self.exact), f"the bound {float(limit)!r} is not proved")
        elif limit is not None:
            need(norm_at_most(stack, limit, exact=self.exact), f"the bound {float(limit)!r} is not proved")


@rule("linear", "weight bias transposed")
def _linear(g: Graph, node: Node, shape: Shape, bound: Fraction | None, other: Array | None = None) -> Shape:
    weight = g.tensor(node["weight"], 2) if other is None else other
    weight = weight.T if choice(node["transposed"], (False, True), "transposed") else weight
    need(shape and shape[-1] == weight.shape[1], f"a layer for {weight.shape[1]} features follows the shape {shape}")
    g.vector(node["bias"], weight.shape[0])
    g.matrix(weight[None], bound)
    return (*shape[:-1], weight.shape[0])


@rule("conv", "dims weight bias stride padding output_padding dilation groups padding_mode transposed", "l2 linf")
def _conv(g: Graph, node: Node, shape: Shape, bound: Fraction | None, other: Array | None = None) -> Shape:
    """Check a convolution, or a transposed one: the adjoint of the convolution with the same weight, of the same norm (S6)."""
    dims, groups = choice(node["dims"], (1, 2, 3), "dims"), node["groups"]
    weight, turned = g.tensor(node["weight"], dims + 2), choice(node["transposed"], (False, True), "transposed")
    weight = weight if other is None else other
    need(type(groups) is int and groups >= 1 and weight.shape[0] % groups == 0, "groups must divide the channels")
    circular = choice(node["padding_mode"], ("zeros", "circular"), "padding_mode") == "circular"
    stride, dilation = (ints(node[key], 1, key, dims) for key in ("stride", "dilation"))
    padding, extra = (ints(node[key], 0, key, dims) for key in ("padding", "output_padding"))
    channels = (groups * weight.shape[1], weight.shape[0])[:: -1 if turned else 1]
    need(
        len(shape) == dims + 1 and shape[0] == channels[0],
        f"a convolution of {channels[0]} channels follows the shape {shape}",
    )
    spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    axes = list(zip(shape[1:], stride, padding, spans, extra, strict=True))
    sizes = [(i - 1) * s - 2 * p + w + e + 1 if turned else (i + 2 * p - w - 1) // s + 1 for i, s, p, w, e in axes]
    need(min(sizes) >= 1 and (turned or not any(extra)), "a convolution has no output, or an output_padding")
    need(not circular or (not turned and all(2 * p <= w for _, _, p, w, _ in axes)), "too much circular padding")
    g.vector(node["bias"], channels[1])
    if g.norm == "linf":  # S5.2: all taps of an output; a stride of a transposed convolution parts them into classes
        parts = weight.reshape(groups, -1, *weight.shape[1:])
        steps = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)] if turned else [1] * dims
        classes = tuple(map(min, steps, weight.shape[2:]))
        need(math.prod(classes) <= 2**12, "the stride is too large for a proof")
        for start in np.ndindex(*classes):
            taps = parts[(..., *(slice(c, None, s) for c, s in zip(start, steps, strict=True)))]
            g.matrix((np.moveaxis(taps, 1, 2) if turned else taps).reshape(1, channels[1], -1), bound)
    elif bound is not None:
        weight, grid = reduced(weight, shape[1:] if turned or circular else tuple(sizes), stride, dilation, circular)
        need(conv_at_most(weight, groups, bound, grid, exact=g.exact), f"the bound {float(bound)!r} is not proved")
    return (channels[1], *sizes)


@rule("affine", "scale bias axis")
def _affine(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Check x * scale + bias, along an axis or entry by entry (S5.3)."""
    axis, largest = choice(node["axis"], (0, -1, None), "axis"), Fraction(1)
    for key in ("scale", "bias"):
        if node[key] is not None:
            values = g.tensor(node[key], len(shape) if axis is None else 1)
            need(values.shape == (shape if axis is None else (shape[axis],)), f"the {key} has the wrong shape")
            largest = Fraction(float(np.abs(values).max())) if key == "scale" else largest
    need(bound >= largest, "the bound is not proved")
    return shape


@rule("scale", "factor")
def _scale(_g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    need(bound >= abs(number(node["factor"], "factor", signed=True)), "the bound is not proved")
    return shape


@rule("pool", "name dims kernel stride padding", "l2 linf")
def _pool(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Check a pool: a pixel lies in at most c = prod ceil(k/s) windows; average: the root of c / prod k, maximum: of c (S5.4)."""
    dims, average = choice(node["dims"], (1, 2, 3), "dims"), choice(node["name"], ("avg", "max"), "the pool") == "avg"
    kernel, stride = (ints(node[key], 1, key, dims) for key in ("kernel", "stride"))
    need(len(shape) == dims + 1, f"a pool of {dims} dims follows the shape {shape}")
    axes = list(zip(shape[1:], kernel, stride, ints(node["padding"], 0, "padding", dims), strict=True))
    need(all(2 * p <= k <= i + 2 * p for i, k, _, p in axes), "a pool does not fit its image")
    windows = math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))
    square = Fraction(windows, math.prod(kernel) if average else 1) if g.norm == "l2" else 1
    need(bound**2 >= square, "the bound is not proved")
    return (shape[0], *((i + 2 * p - k) // s + 1 for i, k, s, p in axes))


@rule("reshape", "shape")
@rule("permute", "order")
@rule("pad", "before after")
@rule("slice", "axis start stop")
@rule("mean", "axis")
def _moves(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Check an operation that moves, drops or averages entries (S5.3)."""
    op, axes, square, new = node["op"], len(shape), Fraction(1), shape
    if op == "reshape":
        new = ints(node["shape"], 1, "shape")
        need(new and math.prod(new) == math.prod(shape), "a reshape changes the number of entries")
        if (
            g.norm == "token_max" and shape[-1] % new[-1]
        ):  # a new token is made of entries of at most that many old ones
            square = (
                Fraction(new[-1], shape[-1]) if new[-1] % shape[-1] == 0 else Fraction((new[-1] - 1) // shape[-1] + 2)
            )
    elif op == "permute":
        order = ints(node["order"], 0, "order", axes)
        need(sorted(order) == list(range(axes)), "a permutation names each axis once")
        new = tuple(shape[axis] for axis in order)
        square = Fraction(new[-1]) if g.norm == "token_max" and order[-1] != axes - 1 else square
    elif op == "pad":
        before, after = ints(node["before"], 0, "before", axes), ints(node["after"], 0, "after", axes)
        new = tuple(b + n + a for b, n, a in zip(before, shape, after, strict=True))
    elif op == "slice":
        axis, start, stop = part(node, shape)
        new = (*shape[:axis], stop - start, *shape[axis + 1 :])
    else:
        axis = ints([node["axis"]], 0, "axis")[0]
        need(axis < axes - (g.norm == "token_max") and axes > 1, "a mean along a wrong axis")
        new, square = (*shape[:axis], *shape[axis + 1 :]), Fraction(1, shape[axis] if g.norm == "l2" else 1)
    need(bound**2 >= square and math.prod(new) < 2**40, "the bound is not proved")
    return new


def part(node: Node, shape: Shape) -> tuple[int, int, int]:
    """Return axis, start and stop of a slice."""
    axis, start, stop = ints([node["axis"], node["start"], node["stop"]], 0, "slice")
    need(axis < len(shape) and start < stop <= shape[axis], "a slice lies outside its value")
    return axis, start, stop
