r"""The small programs that the composite operations of residual, implicit and isometric blocks stand for.

Each block runs as these simple operations, so an analysis of their rounding speaks about what runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stableopt.certify.execute_composite import adjoint
from stableopt.certify.operations import lower, lowering, operation, run

__all__ = ["Steps"]

Node = dict[str, Any]


class Steps:
    """A small program under construction; value 0 is the input of the block.

    Examples:
        >>> steps = Steps()
        >>> steps.add("scale", 0, factor=2.0), steps.add("sum", 0, 1, factors=[1.0, 1.0])
        (1, 2)
        >>> len(steps.nodes)
        2
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, op: str, *inputs: int, **settings: Any) -> int:
        """Append an operation and return the number of its value."""
        self.nodes.append({"op": op, "in": list(inputs), **settings})
        return len(self.nodes)

    def nest(self, node: Node, value: int) -> int:
        """Append an operation that is written inside another one."""
        settings = {key: entry for key, entry in node.items() if key not in {"op", "in", "bound"}}
        return self.add(node["op"], value, **settings)

    def force(self, operator: Node, activation: Node, steps: str | None, value: int) -> int:
        r"""Append :math:`A^\top(s \odot \sigma(Ax + b))`."""
        hidden = self.nest(activation, self.nest(operator, value))
        if steps is not None:
            hidden = self.add("affine", hidden, scale=steps, bias=None, axis=_axis(operator))
        return self.nest(adjoint(operator), hidden)

    def blend(self, values: list[int], factors: list[float]) -> int:
        """Append a sum."""
        return self.add("sum", *values, factors=factors)

    def inner(self, node: Node, value: int) -> int:
        """Append a block that is written inside another one."""
        return {"euler": self.euler, "infinity": self.infinity}[node["op"]](node, value)

    def euler(self, node: Node, value: int) -> int:
        r"""Append :math:`cx + Kx - \tau A^\top(s \odot \sigma(Ax + b)) + \beta B\sigma(Cx + d)`, as often as it is taken."""
        for _ in range(node["times"]):
            values = [value, self.force(node["operator"], node["activation"], node["steps"], value)]
            factors = [node["decay"], -node["step"]]
            if node["skew"] is not None:
                values.append(self.add("linear", value, weight=node["skew"], bias=None, transposed=False))
                factors.append(1.0)
            if node["free"] is not None:
                hidden = self.nest(node["activation"], self.nest(node["free"]["inner"], value))
                values.append(self.nest(node["free"]["outer"], hidden))
                factors.append(node["free"]["scale"])
            value = self.blend(values, factors)
        return value

    def infinity(self, node: Node, value: int) -> int:
        r"""Append :math:`x + t \odot (\sigma(Ax + b) - cx)`, as often as it is taken."""
        axis = _axis(node["operator"])
        for _ in range(node["times"]):
            hidden = self.nest(node["activation"], self.nest(node["operator"], value))
            moved, decayed = (self.add("affine", v, scale=node["steps"], bias=None, axis=axis) for v in (hidden, value))
            value = self.blend([value, moved, decayed], [1.0, 1.0, -node["decay"]])
        return value


def _axis(operator: Node) -> int:
    return 0 if operator["op"] == "conv" else -1


@lowering("euler")
def _euler(node: Node) -> list[Node]:
    steps = Steps()
    steps.euler(node, 0)
    return steps.nodes


@lowering("infinity")
def _infinity(node: Node) -> list[Node]:
    steps = Steps()
    steps.infinity(node, 0)
    return steps.nodes


@lowering("shear")
def _shear(node: Node) -> list[Node]:
    """Return p - h1 A^T s(A q + b), then q + h2 B^T s(B p + c), both times the decay."""
    steps, half = Steps(), node["half"]
    q, p = (steps.add("slice", 0, axis=-1, start=start, stop=start + half) for start in (0, half))
    p = steps.blend([p, steps.force(node["first"], node["activation"], None, q)], [1.0, -node["steps"][0]])
    q = steps.blend([q, steps.force(node["second"], node["activation"], None, p)], [1.0, node["steps"][1]])
    both = steps.add("concat", q, p, axis=-1)
    if node["decay"] != 1.0:
        steps.add("scale", both, factor=node["decay"])
    return steps.nodes


@lowering("runge_kutta")
def _runge_kutta(node: Node) -> list[Node]:
    """Return the stages g = E(Y) - Y, Y = x + sum a g, and x + sum b g; stages that reach nothing are left out."""
    steps, value = Steps(), 0
    for _ in range(node["times"]):
        slopes: list[int] = []
        for row in node["stages"]:
            stage = _moved(steps, value, slopes, row)
            slopes.append(steps.blend([steps.inner(node["euler"], stage), stage], [1.0, -1.0]))
        value = _moved(steps, value, slopes, node["weights"])
    if value != len(steps.nodes):  # all weights are 0
        steps.add("scale", value, factor=1.0)
    return steps.nodes


def _moved(steps: Steps, value: int, slopes: list[int], weights: list[float]) -> int:
    used = [(slope, a) for slope, a in zip(slopes, weights, strict=True) if a != 0.0]
    return steps.blend([value, *(g for g, _ in used)], [1.0, *(a for _, a in used)]) if used else value


@lowering("implicit")
def _implicit(node: Node) -> list[Node]:
    """Return the iterates R(keep E(y) + mix x) from start x."""
    steps = Steps()
    y = steps.add("scale", 0, factor=node["start"]) if node["start"] != 1.0 else 0
    for _ in range(node["times"]):
        y = steps.blend([steps.inner(node["map"], y), 0], [node["keep"], node["mix"]])
        if node["resolvent"] is not None:
            y = steps.add("linear", y, weight=node["resolvent"], bias=None, transposed=False)
    return steps.nodes


@lowering("sandwich")
def _sandwich(node: Node) -> list[Node]:
    steps = Steps()
    steps.nest(node["second"], steps.nest(node["activation"], steps.nest(node["first"], 0)))
    return steps.nodes


@lowering("euclidean")
def _euclidean(node: Node) -> list[Node]:
    """Return the operations of the map whose bound is converted."""
    return lower(node["map"] | {"in": [0]})


def _same_shape(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Run a block; on the meta device only its shape is asked for, which is that of its input."""
    return inputs[0].clone() if inputs[0].is_meta else run(lower(node), tensors, inputs)


for _op in ("euler", "infinity", "shear", "runge_kutta", "implicit", "euclidean"):
    operation(_op)(_same_shape)
