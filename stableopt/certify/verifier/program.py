"""The walk through a program, and how the bounds of its operations combine (docs/soundness.md, S7)."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

from .files import ints, number
from .numbers import Array, RejectedError, need, root_up, up
from .operations import RULES, Graph, Node, Shape, part

__all__ = ["Walk"]


class Walk:
    """A checked program: shapes of the values, bounds of the operations, and the slices of which values are functions alone."""

    def __init__(self, nodes: list[Node], g: Graph, shape: Shape) -> None:
        self.nodes, self.g, self.shapes = nodes, g, [shape]
        self.bounds: list[Fraction | None] = []  # None for operations that combine values
        self.sources: list[tuple[int, int, int, int] | None] = [None]  # (value, axis, start, stop)
        self.joint: dict[
            int, tuple[int, Fraction, Array | None]
        ] = {}  # last operation -> first one, bound and form of the chain
        self._constants: dict[int, list[Fraction | None]] = {}
        for index, node in enumerate(nodes):
            op = node.get("op") if isinstance(node, dict) else None
            try:
                need(isinstance(op, str), "an operation has no name")
                self._add(str(op), node, ints(node.get("in"), 0, "in"), index)
            except RejectedError as error:
                raise RejectedError(f"operation {index} ({op}): {error}") from None
        read = {value for node in nodes for value in node["in"]}
        need(read == set(range(len(nodes))), "a value is not used")

    def _add(self, op: str, node: Node, read: Shape, index: int) -> None:
        need(read and max(read) <= index, "it reads a value that is not there yet")
        shapes, sources, bound = [self.shapes[value] for value in read], {self.sources[value] for value in read}, None
        source = sources.pop() if len(sources) == 1 else None
        if op == "sum":
            need(set(node) == {"op", "in", "factors"} and isinstance(node["factors"], list), "a sum has wrong keys")
            need(len(node["factors"]) == len(read) and len(set(shapes)) == 1, "the values do not fit")
            shape = shapes[0]
        elif op == "concat":
            need(set(node) == {"op", "in", "axis"}, "a concat has wrong keys")
            axis = ints([node["axis"]], 0, "axis")[0]
            need(axis < min(map(len, shapes)), "the axis is missing")
            need(len({(*s[:axis], *s[axis + 1 :]) for s in shapes}) == 1, "the values do not fit")
            shape = (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])
        else:
            need(op in RULES and self.g.norm in RULES[op].norms, f"it has no rule in {self.g.norm}")
            keys = RULES[op].keys
            need(keys is None or set(node) == keys | {"op", "in", "bound"}, "it has wrong keys")
            need(len(read) == 1, "it reads one value")
            bound = number(node.get("bound"), "the bound")
            shape = RULES[op].check(self.g, node, shapes[0], bound)
            if op == "slice" and source is None:
                source = (read[0], *part(node, shapes[0]))
        self.shapes.append(shape)
        self.sources.append(source)
        self.bounds.append(bound)

    def constants(self, start: int = 0) -> list[Fraction | None]:
        """Return bounds of the constants of all values as functions of one of them alone; None where it is not alone (S7.1)."""
        if start not in self._constants:
            self._constants[start] = self._composed(start)
        return self._constants[start]

    def _composed(self, start: int) -> list[Fraction | None]:
        k: list[Fraction | None] = [None] * len(self.shapes)
        k[start] = Fraction(1)
        for index in range(start, len(self.nodes)):
            node, bound, parts = self.nodes[index], self.bounds[index], list[Fraction]()
            parts = [value for read in node["in"] if (value := k[read]) is not None]
            if len(parts) < len(node["in"]):
                continue
            if bound is not None:
                total = bound * parts[0]
            elif node["op"] == "sum":
                factors = [abs(number(f, "a factor", signed=True)) for f in node["factors"]]
                total = sum((f * p for f, p in zip(factors, parts, strict=True)), Fraction(0))
            else:
                total = max(parts) if self._separate(node) else root_up(sum((p * p for p in parts), Fraction(0)))
            if index in self.joint:
                first, proved, _ = self.joint[index]
                before = k[self.nodes[first]["in"][0]]
                total = total if before is None else min(total, proved * before)
            need(total < 2**1100, "a constant is too large for float64")
            k[index + 1] = up(total)
        return k

    def _separate(self, node: Node) -> bool:
        """Return whether the parts of a concat are measured apart: by the norm, or as functions of disjoint slices of one value."""
        if self.g.norm != "l2":
            return self.g.norm == "linf" or node["axis"] < len(self.shapes[node["in"][0]]) - 1
        sources: list[Any] = sorted(self.sources[value] or (-1, -1, 0, 0) for value in node["in"])
        return all(a[:2] == b[:2] != (-1, -1) and a[3] <= b[2] for a, b in itertools.pairwise(sources))
