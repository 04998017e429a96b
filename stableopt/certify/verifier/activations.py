"""The slopes of activations, and the operations that sort, pool or project (docs/soundness.md, S5)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .files import choice, ints, number
from .numbers import need, root_up
from .operations import Graph, Node, Shape, rule

__all__ = ["slopes"]

Ends = tuple[Any, Any] | None

_SLOPES: dict[
    str, tuple[tuple[str, ...], Callable[..., Ends]]
] = {  # settings, and an interval that holds all slopes (S5.1)
    "identity": ((), lambda: (1, 1)),
    "relu": ((), lambda: (0, 1)),
    "abs": ((), lambda: (-1, 1)),
    "tanh": ((), lambda: (0, 1)),
    "sigmoid": ((), lambda: (0, Fraction(1, 4))),
    "softplus": (("beta",), lambda beta: (0, 1) if beta > 0 else None),
    "hardtanh": (("min", "max"), lambda low, high: (0, 1) if low < high else None),
    "threshold": (("min",), lambda _: (0, 1)),  # max(x, min)
    "leaky_relu": (("slope",), lambda slope: (min(slope, 1), max(slope, 1))),
    "elu": (("alpha",), lambda alpha: (min(alpha, 0), max(alpha, 1))),
    "celu": (("alpha",), lambda alpha: (0, 1) if alpha > 0 else None),
    "selu": ((), lambda: (0, Fraction(17581, 10000))),  # scale * alpha = 1.75809...
    "gelu": ((), lambda: (Fraction(-129, 1000), Fraction(1129, 1000))),  # -0.12890..., 1.12890...
    "gelu_tanh": ((), lambda: (Fraction(-13, 100), Fraction(1129, 1000))),  # -0.12899..., 1.12899...
    "silu": ((), lambda: (Fraction(-1, 10), Fraction(11, 10))),  # -0.0998..., 1.0998...
    "mish": ((), lambda: (Fraction(-113, 1000), Fraction(1089, 1000))),  # -0.11252..., 1.08849...
    "hardswish": ((), lambda: (Fraction(-1, 2), Fraction(3, 2))),
    "hardsigmoid": ((), lambda: (0, Fraction(1, 6))),
    "softsign": ((), lambda: (0, 1)),
    "logsigmoid": ((), lambda: (0, 1)),
    "tanhshrink": ((), lambda: (0, 1)),
    "softshrink": (("lambd",), lambda lambd: (0, 1) if lambd >= 0 else None),
    "soft_abs": (("delta",), lambda delta: (-1, 1) if delta > 0 else None),
}
_WITH_TENSORS = {
    "prelu": {"weight", "axis"},
    "zigzag": {"thresholds", "axis"},
    "spline": {"slopes", "bias", "span", "axis"},
}


def slopes(g: Graph, node: Any, shape: Shape | None = None) -> tuple[Fraction, Fraction]:
    """Return the ends of an interval that holds all slopes of an activation; ``shape`` of its input where it has tensors."""
    need(isinstance(node, dict) and node.get("op") == "activation", "an activation is missing")
    name, given = node.get("name"), set(node) - {"in", "bound", "op", "name"}
    if isinstance(name, str) and name in _WITH_TENSORS and shape is not None:
        need(given == _WITH_TENSORS[name], f"the activation {name!r} has wrong settings")
        return _tensor_slopes(g, node, shape[choice(node["axis"], (0, -1), "axis")])
    need(isinstance(name, str) and name in _SLOPES, f"the activation {name!r} has no rule here")
    keys, interval = _SLOPES[str(name)]
    need(given == set(keys), f"the activation {name!r} has wrong settings")
    ends = interval(*(number(node[key], key, signed=True) for key in keys))
    need(ends is not None, f"the settings of the activation {name!r} are impossible")
    return Fraction(ends[0]), Fraction(ends[1])  # type: ignore[index]


def _tensor_slopes(g: Graph, node: Node, size: int) -> tuple[Fraction, Fraction]:
    """Return the slopes of PReLU, of a zigzag of slopes +-1, or of a spline with given slopes between uniform knots (S5.1)."""
    if node["name"] == "zigzag":
        low, high = g.tensor(node["thresholds"], 2)
        need(low.shape == (size,) and (low <= high).all(), "the thresholds of a zigzag are not in order")
        return Fraction(-1), Fraction(1)
    if node["name"] == "prelu":
        values = g.tensor(node["weight"], 1)
        need(values.shape == (size,), "a PReLU has one slope for each channel")
        return min(Fraction(1), Fraction(float(values.min()))), max(Fraction(1), Fraction(float(values.max())))
    values = g.tensor(node["slopes"], 2)
    g.vector(node["bias"], size)
    need(
        len(values) == size and values.shape[1] >= 3 and number(node["span"], "span") > 0,
        "a spline does not fit its channels",
    )
    return Fraction(float(values.min())), Fraction(float(values.max()))


@rule("activation", None)
def _activation(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    need(bound >= max(map(abs, slopes(g, node, shape))), "the bound is not proved")
    return shape


def _channels(g: Graph, node: Node, shape: Shape) -> int:
    """Return the size of the axis that an operation works along; of tokens it may be the last one only."""
    axis = choice(node["axis"], (0, -1), "axis")
    need(g.norm != "token_max" or axis == -1 or len(shape) == 1, "the operation mixes tokens")
    return shape[axis]


@rule("groupsort", "group_size axis")
def _groupsort(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Sorting brings vectors closer: the sum of a_(i) b_(i) is at least that of a_i b_i (S5.5)."""
    need(
        _channels(g, node, shape) % ints([node["group_size"]], 1, "group_size")[0] == 0,
        "group_size must divide the channels",
    )
    need(bound >= 1, "the bound is not proved")
    return shape


@rule("householder", "vectors axis")
def _householder(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Z - 2 min(d.z, 0) d/(d.d): the identity on one side of a hyperplane, the reflection at it on the other (S5.5)."""
    vectors, most = g.tensor(node["vectors"], 2), Fraction(1)
    need(vectors.size == _channels(g, node, shape), "the reflections do not fit the channels")
    for d in vectors.tolist() if g.norm == "linf" else ():
        moduli = [abs(Fraction(x)) for x in d]
        square, total = sum((x * x for x in moduli), Fraction(0)), sum(moduli, Fraction(0))
        rows = [(abs(square - 2 * x * x) + 2 * x * (total - x)) / square for x in moduli] if square else [Fraction(1)]
        most = max(most, *rows)
    need(bound >= most, "the bound is not proved")
    return shape


@rule("center", "", "l2 linf token_max")
def _center(g: Graph, _node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Subtract the mean along the last axis: an orthogonal projection; its rows sum to 2 (n - 1)/n (S5.5)."""
    need(
        shape and bound >= (Fraction(2 * (shape[-1] - 1), shape[-1]) if g.norm == "linf" else 1),
        "the bound is not proved",
    )
    return shape


@rule("ball", "radius center axis", "l2 token_max")
def _ball(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """The projection on a ball, of the whole value or along the last axis, does not expand (S5.5)."""
    axis = choice(node["axis"], (None, -1), "axis")
    need(g.norm == "l2" or axis == -1 or len(shape) == 1, "the projection mixes tokens")
    need(
        node["center"] is None or g.tensor(node["center"], len(shape)).shape == shape, "the center has the wrong shape"
    )
    need(number(node["radius"], "the radius") > 0 and bound >= 1, "the bound is not proved")
    return shape


@rule("softmax", "axis")
def _softmax(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """diag(p) - p p^T is symmetric, and its rows sum to 2 p (1 - p) <= 1/2 (S5.5)."""
    axis = choice(node["axis"], tuple(range(-len(shape), len(shape))), "axis") % len(shape)
    need(g.norm != "token_max" or axis == len(shape) - 1, "a softmax mixes tokens")
    need(bound >= Fraction(1, 2), "the bound is not proved")
    return shape


@rule("standardize", "eps centered")
def _standardize(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """(x - mean)/sqrt(var + eps) along the last axis: the Jacobian lies between 0 and 1/sqrt(eps) (S5.6)."""
    eps, n = number(node["eps"], "eps"), shape[-1]
    first = Fraction(2 * (n - 1), n) if choice(node["centered"], (False, True), "centered") else Fraction(1)
    most = first + root_up(Fraction(n - 1, 27)) if g.norm == "linf" else Fraction(1)
    need(eps > 0 and bound**2 * eps >= most**2, "the bound is not proved")
    return shape


@rule("take", "axis index")
def _take(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Copy entries along an axis: in l2 the root of how often one is taken (S5.3)."""
    axis, index = ints([node["axis"]], 0, "axis")[0], ints(node["index"], 0, "index")
    need(axis < len(shape) and index and max(index) < shape[axis], "an index lies outside its axis")
    copies = Counter(index).most_common(1)[0][1]
    whole = g.norm == "linf" or (g.norm == "token_max" and axis < len(shape) - 1)
    need(bound**2 >= (1 if whole else copies), "the bound is not proved")
    return (*shape[:axis], len(index), *shape[axis + 1 :])


@rule("l2pool", "dims kernel stride", "l2 linf")
def _l2pool(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """The 2-norms of windows: a pixel lies in at most prod ceil(k/s) of them; a window has prod k pixels (S5.4)."""
    dims = choice(node["dims"], (1, 2, 3), "dims")
    kernel, stride = (ints(node[key], 1, key, dims) for key in ("kernel", "stride"))
    need(
        len(shape) == dims + 1 and all(k <= n for k, n in zip(kernel, shape[1:], strict=True)),
        "a pool does not fit its image",
    )
    windows = math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))
    need(bound**2 >= (windows if g.norm == "l2" else math.prod(kernel)), "the bound is not proved")
    return (shape[0], *((n - k) // s + 1 for n, k, s in zip(shape[1:], kernel, stride, strict=True)))
