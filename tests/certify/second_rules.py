"""The rules of the primitive operations, for the second verifier: from the table of the specification, decided exactly.

A rule takes the operation at hand and returns the shape after it; it refuses a bound that is not certainly large enough. With
``room`` a limit t counts as t (1 - room): what is accepted then is true with a margin, so a verifier in floating point must accept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

from flint import arb, fmpq

from tests.certify.second_norms import absolute_rows_at_most, conv_matrix, norm_at_most, slope_bound
from tests.certify.second_reader import RefusedError, Tensor, naturals, parse_real

__all__ = ["RULES", "Context", "need", "rule"]

Node = dict[str, Any]
Shape = tuple[int, ...]
Rule = Callable[["Context", Node, Shape], Shape]
RULES: dict[str, tuple[set[str], Rule]] = {}
MAX_DENSE = 2**18


def need(condition: object, reason: str) -> None:
    if not condition:
        raise RefusedError(reason)


@dataclass
class Context:
    """What a rule may look at: the tensors, the norm, and how much room a limit must leave."""

    tensors: dict[str, Tensor]
    metric: str
    room: fmpq
    used: set[str] = field(default_factory=set[str])
    chains: list[Any] = field(default_factory=list[Any])

    def tensor(self, name: Any, *dims: int) -> Tensor:
        need(isinstance(name, str) and name in self.tensors, f"no tensor {name!r}")
        self.used.add(name)
        need(len(self.tensors[name].shape) in dims, f"{name!r} has the wrong number of dimensions")
        return self.tensors[name]

    def vector(self, name: Any, *sizes: int) -> Tensor | None:
        if name is None:
            return None
        found = self.tensor(name, 1)
        need(found.shape[0] in sizes, f"{name!r} has the wrong size")
        return found

    def limit(self, node: Node, key: str = "bound") -> fmpq:
        value = parse_real(node.get(key))
        need(value >= 0, f"{key} is negative")
        return value * (1 - self.room)

    def holds(self, node: Node, truth: fmpq | int | arb, key: str = "bound") -> None:
        limit = self.limit(node, key)
        need(arb(limit) >= truth if isinstance(truth, arb) else limit >= truth, f"{node['op']}: {key} is too small")

    def matrix_holds(self, node: Node, rows: list[list[int]], exponent: int) -> None:
        """Refuse unless the norm of integers 2^exponent is at most the bound; token_max: of the matrix on one token."""
        limit = self.limit(node)
        scaled = limit * 2**-exponent if exponent <= 0 else limit / 2**exponent
        need(len(rows) * len(rows[0]) <= MAX_DENSE, "too large for the exact oracle")
        if self.metric == "linf":
            need(absolute_rows_at_most(rows, scaled), f"{node['op']}: the bound is too small")
        else:
            need(norm_at_most(rows, scaled * scaled), f"{node['op']}: the bound is too small")


def rule(op: str, fields: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES[op] = (set(fields.split()), function)
        return function

    return register


def integer(value: Any, low: int, high: int) -> int:
    need(type(value) is int and low <= value <= high, f"{value!r} is no integer in [{low}, {high}]")
    return int(value)


def end_axis(node: Node, shape: Shape) -> int:
    need(type(node["axis"]) is int and node["axis"] in {0, -1}, "the axis must be 0 or -1")
    return node["axis"] % len(shape)


def some_axis(node: Node, shape: Shape) -> int:
    return integer(node["axis"], -len(shape), len(shape) - 1) % len(shape)


def boolean(value: Any) -> bool:
    need(type(value) is bool, f"{value!r} is no boolean")
    return bool(value)


@rule("linear", "weight bias transposed")
def _linear(context: Context, node: Node, shape: Shape) -> Shape:
    weight = context.tensor(node["weight"], 2)
    rows = weight.rows()
    if boolean(node["transposed"]):
        rows = [list(column) for column in zip(*rows, strict=True)]
    need(shape[-1] == len(rows[0]), "a linear operation does not fit")
    context.vector(node["bias"], len(rows))
    context.matrix_holds(node, rows, weight.exponent)
    return (*shape[:-1], len(rows))


def window_shape(image: Shape, kernel: Shape, node: Node) -> tuple[Shape, tuple[tuple[int, int, int], ...]]:
    stride, padding = naturals(node["stride"], 1), naturals(node["padding"], 0)
    dilation = naturals(node["dilation"], 1) if "dilation" in node else (1,) * len(kernel)
    need(len({*map(len, (image, kernel, stride, padding, dilation))}) == 1, "one entry per axis")
    place = tuple(zip(stride, padding, dilation, strict=True))
    sizes = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, (s, p, d) in zip(image, kernel, place, strict=True)]
    need(min(sizes) >= 1, "a window is larger than its image")
    return tuple(sizes), place


@rule("conv", "dims weight bias stride padding dilation groups padding_mode transposed output_padding")
def _conv(context: Context, node: Node, shape: Shape) -> Shape:
    need(context.metric != "token_max", "no convolution in token_max")
    dims = integer(node["dims"], 1, 3)
    weight, groups = context.tensor(node["weight"], dims + 2), integer(node["groups"], 1, 2**40)
    kernel, image, transposed = weight.shape[2:], shape[1:], boolean(node["transposed"])
    need(len(image) == dims and weight.shape[0] % groups == 0, "a convolution does not fit")
    need(node["padding_mode"] in {"zeros", "circular"}, "unknown padding mode")
    circular = node["padding_mode"] == "circular"
    extra = naturals(node["output_padding"], 0)
    need(len(extra) == dims and (transposed or not any(extra)), "bad output padding")
    if transposed:
        need(shape[0] == weight.shape[0] and not circular, "a transposed convolution does not fit")
        out, place = _grown_shape(image, kernel, node, extra)
        channels = groups * weight.shape[1]
        inner, outer = out, image
    else:
        need(shape[0] == groups * weight.shape[1], "a convolution does not fit")
        out, place = window_shape(image, kernel, node)
        channels = weight.shape[0]
        inner, outer = image, out
    context.vector(node["bias"], channels)
    size = weight.shape[0] * prod(outer) * groups * weight.shape[1] * prod(inner)
    need(size <= MAX_DENSE, "too large for the exact oracle")
    rows = conv_matrix(weight.shape, weight.integers, inner, outer, place, groups, circular=circular)
    if transposed:
        rows = [list(column) for column in zip(*rows, strict=True)]
    context.matrix_holds(node, rows, weight.exponent)
    return (channels, *out)


def _grown_shape(
    image: Shape, kernel: Shape, node: Node, extra: Shape
) -> tuple[Shape, tuple[tuple[int, int, int], ...]]:
    stride, padding, dilation = naturals(node["stride"], 1), naturals(node["padding"], 0), naturals(node["dilation"], 1)
    place = tuple(zip(stride, padding, dilation, strict=True))
    sizes = []
    for i, k, (s, p, d), e in zip(image, kernel, place, extra, strict=True):
        sizes.append((i - 1) * s - 2 * p + d * (k - 1) + 1 + e)
    need(min(sizes) >= 1, "a transposed convolution has no output")
    return tuple(sizes), place


@rule("affine", "scale bias axis")
def _affine(context: Context, node: Node, shape: Shape) -> Shape:
    if node["axis"] is None:  # entry by entry
        parts = [None if node[key] is None else context.tensor(node[key], len(shape)) for key in ("scale", "bias")]
        need(all(part is None or part.shape == shape for part in parts), "affine: wrong shape")
        scale = parts[0]
    else:
        size = shape[end_axis(node, shape)]
        scale = context.vector(node["scale"], size)
        context.vector(node["bias"], size)
    context.holds(node, fmpq(1) if scale is None else max(map(abs, scale.integers)) * scale.unit)
    return shape


@rule("scale", "factor")
def _scale(context: Context, node: Node, shape: Shape) -> Shape:
    context.holds(node, abs(parse_real(node["factor"])))
    return shape


SETTINGS: dict[str, set[str]] = {
    "softplus": {"beta"}, "hardtanh": {"min", "max"}, "leaky_relu": {"slope"}, "elu": {"alpha"}, "celu": {"alpha"},
    "softshrink": {"lambd"}, "soft_abs": {"delta"}, "prelu": {"weight", "axis"}, "threshold": {"min"},
    "zigzag": {"thresholds", "axis"}, "spline": {"slopes", "bias", "span", "axis"},
}  # fmt: skip


def activation_slope(context: Context, node: Node, shape: Shape) -> fmpq | arb:
    """Return the largest |slope|, after checking the settings."""
    name = node.get("name")
    need(
        isinstance(name, str) and set(node) <= {"op", "in", "bound", "name"} | SETTINGS.get(name, set()),
        "bad activation",
    )
    need(set(node) >= {"op", "name"} | SETTINGS.get(name, set()), "an activation lacks a setting")
    if name == "prelu":
        slopes = context.vector(node["weight"], 1, shape[end_axis(node, shape)])
        assert slopes is not None
        return max(fmpq(1), max(map(abs, slopes.integers)) * slopes.unit)
    if name in {"zigzag", "spline"}:
        return _piecewise(context, node, shape[end_axis(node, shape)])
    values = {key: parse_real(node[key]) for key in SETTINGS.get(name, set())}
    need(
        values.get("beta", 1) > 0 and values.get("delta", 1) > 0 and values.get("lambd", 0) >= 0,
        "a setting must be positive",
    )
    need(values.get("min", -1) < values.get("max", 1), "hardtanh needs min < max")
    need(name != "celu" or values["alpha"] > 0, "alpha must be positive")
    slope = slope_bound(name, values.__getitem__)
    need(slope is not None, f"unknown activation {name!r}")
    assert slope is not None
    return ROUNDED.get(name, slope) if context.room else slope


ROUNDED = {"gelu": fmpq(1129, 1000), "gelu_tanh": fmpq(1129, 1000), "silu": fmpq(11, 10), "mish": fmpq(1089, 1000)}
"""What a verifier may use for the largest slopes that are no simple numbers."""


def _piecewise(context: Context, node: Node, size: int) -> fmpq:
    if node["name"] == "zigzag":
        low, high = context.tensor(node["thresholds"], 2).rows()
        need(len(low) == size and all(a <= b for a, b in zip(low, high, strict=True)), "thresholds out of order")
        return fmpq(1)
    slopes = context.tensor(node["slopes"], 2)
    need(slopes.shape[0] == size and parse_real(node["span"]) > 0, "a spline does not fit")
    context.vector(node["bias"], size)
    return max(map(abs, slopes.integers)) * slopes.unit


@rule("activation", "*")
def _activation(context: Context, node: Node, shape: Shape) -> Shape:
    context.holds(node, activation_slope(context, node, shape))
    return shape


@rule("groupsort", "group_size axis")
def _groupsort(context: Context, node: Node, shape: Shape) -> Shape:
    axis, size = end_axis(node, shape), integer(node["group_size"], 1, 2**48)
    need(shape[axis] % size == 0, "the group size does not divide the axis")
    need(context.metric != "token_max" or axis == len(shape) - 1 or size == 1, "sorting across tokens mixes them")
    context.holds(node, 1)
    return shape


@rule("pool", "name dims kernel stride padding")
def _pool(context: Context, node: Node, shape: Shape) -> Shape:
    """Average: exact for the image. Maximum: each pixel counts in every window that covers it."""
    need(context.metric != "token_max", "no pool in token_max")
    kernel = naturals(node["kernel"], 1)
    need(node["name"] in {"avg", "max"} and integer(node["dims"], 1, 3) == len(kernel) == len(shape) - 1, "bad pool")
    out, place = window_shape(shape[1:], kernel, node)
    need(all(2 * p <= k for k, (_, p, _) in zip(kernel, place, strict=True)), "a pool is padded too much")
    if context.metric == "linf":
        context.holds(node, 1)
        return (shape[0], *out)
    need(prod(out) * prod(shape[1:]) <= MAX_DENSE, "too large for the exact oracle")
    rows = conv_matrix((1, 1, *kernel), [1] * prod(kernel), shape[1:], out, place, 1, circular=False)
    limit = context.limit(node)
    if context.room:  # the rule for every image size
        windows = prod(-(-k // s) for k, (s, _, _) in zip(kernel, place, strict=True))
        need(
            limit**2 >= fmpq(windows, prod(kernel) if node["name"] == "avg" else 1), "the bound of a pool is too small"
        )
    if node["name"] == "avg":
        need(norm_at_most(rows, (limit * prod(kernel)) ** 2), "the bound of an average pool is too small")
    else:
        need(limit**2 >= max(map(sum, zip(*rows, strict=True))), "the bound of a maximum pool is too small")
    return (shape[0], *out)


@rule("l2pool", "dims kernel stride")
def _l2pool(context: Context, node: Node, shape: Shape) -> Shape:
    """Windows to their 2-norms: | ||a|| - ||b|| | <= ||a - b|| per window; a pixel counts in every window that covers it."""
    need(context.metric != "token_max", "no l2 pool in token_max")
    kernel = naturals(node["kernel"], 1)
    need(integer(node["dims"], 1, 3) == len(kernel) == len(shape) - 1, "bad pool")
    out, place = window_shape(shape[1:], kernel, {"stride": node["stride"], "padding": [0] * len(kernel)})
    need(prod(out) * prod(shape[1:]) <= MAX_DENSE, "too large for the exact oracle")
    rows = conv_matrix((1, 1, *kernel), [1] * prod(kernel), shape[1:], out, place, 1, circular=False)
    most = max(map(sum, zip(*rows, strict=True))) if context.metric == "l2" else prod(kernel)
    if context.room and context.metric == "l2":
        most = prod(-(-k // s) for k, (s, _, _) in zip(kernel, place, strict=True))
    need(context.limit(node) ** 2 >= most, "the bound of an l2 pool is too small")
    return (shape[0], *out)


def tokens_met(order: list[int], old: int, new: int) -> int:
    """Return how many old tokens meet in one new token at most; ``order`` lists the old places of the entries."""
    return max(len({place // old for place in order[i : i + new]}) for i in range(0, len(order), new))


@rule("reshape", "shape")
def _reshape(context: Context, node: Node, shape: Shape) -> Shape:
    new = naturals(node["shape"], 1)
    need(new and prod(new) == prod(shape) <= MAX_DENSE, "a reshape changes the number of entries")
    square = tokens_met(list(range(prod(shape))), shape[-1], new[-1]) if context.metric == "token_max" else 1
    need(context.limit(node) ** 2 >= square, "the bound of a reshape is too small")
    return new


@rule("permute", "order")
def _permute(context: Context, node: Node, shape: Shape) -> Shape:
    order = naturals(node["order"], 0)
    need(sorted(order) == list(range(len(shape))) and prod(shape) <= MAX_DENSE, "no permutation of the axes")
    new, square = tuple(shape[a] for a in order), 1
    if context.metric == "token_max":
        steps = [prod(shape[a + 1 :]) for a in order]
        places = [sum(i * s for i, s in zip(at, steps, strict=True)) for at in product(*map(range, new))]
        square = tokens_met(places, shape[-1], new[-1])
    need(context.limit(node) ** 2 >= square, "the bound of a permutation is too small")
    return new


@rule("pad", "before after")
def _pad(context: Context, node: Node, shape: Shape) -> Shape:
    before, after = naturals(node["before"], 0), naturals(node["after"], 0)
    need(len(before) == len(after) == len(shape), "padding needs one entry per axis")
    context.holds(node, 1)
    return tuple(n + b + a for n, b, a in zip(shape, before, after, strict=True))


@rule("slice", "axis start stop")
def _slice(context: Context, node: Node, shape: Shape) -> Shape:
    axis = some_axis(node, shape)
    start = integer(node["start"], 0, shape[axis] - 1)
    stop = integer(node["stop"], start + 1, shape[axis])
    context.holds(node, 1)
    return (*shape[:axis], stop - start, *shape[axis + 1 :])


@rule("mean", "axis")
def _mean(context: Context, node: Node, shape: Shape) -> Shape:
    axis = some_axis(node, shape)
    need(len(shape) > 1, "a mean needs a second axis")
    need(context.metric != "token_max" or axis < len(shape) - 1, "a mean over the features")
    limit = context.limit(node)
    need(limit**2 * (shape[axis] if context.metric == "l2" else 1) >= 1, "the bound of a mean is too small")
    return (*shape[:axis], *shape[axis + 1 :])


@rule("take", "axis index")
def _take(context: Context, node: Node, shape: Shape) -> Shape:
    axis, index = some_axis(node, shape), naturals(node["index"], 0)
    need(index and max(index) < shape[axis], "an index lies outside")
    square = max(index.count(i) for i in set(index))
    if context.metric == "linf" or (context.metric == "token_max" and axis < len(shape) - 1):
        square = 1
    need(context.limit(node) ** 2 >= square, "take: the bound is too small")
    return (*shape[:axis], len(index), *shape[axis + 1 :])


@rule("standardize", "eps centered")
def _standardize(context: Context, node: Node, shape: Shape) -> Shape:
    eps, centered, n = parse_real(node["eps"]), boolean(node["centered"]), shape[-1]
    need(eps > 0, "eps must be positive")
    if context.metric != "linf":
        need(context.limit(node) ** 2 * eps >= 1, "standardize: the bound is too small")
        return shape
    whole = (fmpq(2 * (n - 1), n) if centered else fmpq(1)) + (arb(n - 1) / 27).sqrt()
    need(not arb(context.limit(node)) < whole / arb(eps).sqrt(), "standardize: the bound is too small")
    return shape


@rule("softmax", "axis")
def _softmax(context: Context, node: Node, shape: Shape) -> Shape:
    axis = some_axis(node, shape)
    need(context.metric != "token_max" or axis == len(shape) - 1, "a softmax mixes tokens")
    context.holds(node, fmpq(1, 2))
    return shape


@rule("center", "")
def _center(context: Context, node: Node, shape: Shape) -> Shape:
    context.holds(node, 1 if context.metric != "linf" else fmpq(2 * (shape[-1] - 1), shape[-1]))
    return shape


@rule("ball", "radius center axis")
def _ball(context: Context, node: Node, shape: Shape) -> Shape:
    need(
        context.metric == "l2" or (context.metric == "token_max" and (node["axis"] == -1 or len(shape) == 1)),
        "no ball here",
    )
    need(node["axis"] is None or (type(node["axis"]) is int and node["axis"] == -1), "the axis must be null or -1")
    need(parse_real(node["radius"]) >= 0, "a negative radius")
    need(node["center"] is None or context.tensor(node["center"], len(shape)).shape == shape, "the centre does not fit")
    context.holds(node, 1)
    return shape


@rule("householder", "vectors axis")
def _householder(context: Context, node: Node, shape: Shape) -> Shape:
    axis, vectors = end_axis(node, shape), context.tensor(node["vectors"], 2)
    need(vectors.shape[0] * vectors.shape[1] == shape[axis], "a reflection does not fit")
    need(context.metric != "token_max" or axis == len(shape) - 1, "a reflection mixes tokens")
    truth = fmpq(1)
    for d in vectors.rows() if context.metric == "linf" else []:
        q, s = sum(v * v for v in d), sum(map(abs, d))
        if q:
            truth = max(truth, *(fmpq(abs(q - 2 * v * v) + 2 * abs(v) * (s - abs(v)), q) for v in d))
    context.holds(node, truth)
    return shape
