r"""The published bounds of the composite operations of residual, implicit and isometric blocks.

Each law is the function that the verifier checks with, evaluated in exact fractions of published bounds and rounded up. A step that
exceeds its limit by no more than the slack of those bounds is lowered to it: the lowered number is the one that runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stableopt.certify.program import Node
from stableopt.certify.publish import Publisher, composite, matrix_bound, published
from stableopt.certify.verifier.blocks import (
    euler_factor,
    infinity_factor,
    infinity_parts,
    infinity_sums,
    iterated,
    row_factor,
    sandwich_matrix,
    scaled_rows,
    shear_excess,
    shear_sums,
)
from stableopt.certify.verifier.numbers import power_up, root_up
from stableopt.errors import UncertifiableError
from stableopt.linalg import round_down, round_up

__all__ = ["storable", "storable_down"]

_SMALL = Fraction(1, 10**4)
"""The largest relative excess of a step over its limit that is taken for rounding and lowered."""

Shapes = list[tuple[int, ...]]


def storable(value: float, dtype: torch.dtype) -> float:
    """Round to a number that multiplies tensors of a dtype exactly as it is: of float32, or of float64 for float64.

    Args:
        value: the number.
        dtype: of the tensors.

    Examples:
        >>> storable(0.1, torch.float64), storable(0.1, torch.bfloat16)
        (0.1, 0.10000000149011612)
    """
    return value if dtype == torch.float64 else float(np.float32(value))


def storable_down(value: Fraction, dtype: torch.dtype) -> float:
    """Round down to a number that multiplies tensors of a dtype exactly as it is.

    Args:
        value: the number.
        dtype: of the tensors.

    Examples:
        >>> storable_down(Fraction(1, 10), torch.float32) <= 0.1
        True
    """
    low = round_down(value)
    rounded = storable(low, dtype)
    return rounded if rounded <= low else float(np.nextafter(np.float32(rounded), np.float32(-math.inf)))


def _power(factor: Fraction, times: int) -> float:
    return round_up(power_up(factor, times))


def _operator(node: Node, tensors: Mapping[str, Tensor], sizes: Shapes, norm: str) -> Node:
    r"""Publish :math:`U \ge \|S^{1/2}A\|_2` of the operator of a block, with what rounds in the product."""
    operator, steps = node["operator"], node.get("steps")
    if steps is None:
        return published(operator, tensors, sizes, norm)
    weight, units = (_array(tensors, name) for name in (operator["weight"], steps))
    scaled, rounding = scaled_rows(weight, units)
    inner = published(operator, {**tensors, operator["weight"]: torch.from_numpy(scaled)}, sizes, norm)
    return inner | {"bound": round_up(Fraction(inner["bound"]) + rounding)}


def _euler(node: Node, tensors: Mapping[str, Tensor], sizes: Shapes, norm: str) -> Node:
    found, skew, free = _branches(node, tensors, norm)
    operator, step, decay = node["operator"], node["step"], Fraction(node["decay"])
    if norm == "linf":
        weight, steps = (
            _array(tensors, operator["weight"]),
            None if node["steps"] is None else _array(tensors, node["steps"]),
        )
        rows = row_factor(weight, operator.get("groups", 1), steps, Fraction(step), decay)
        return node | found | {"bound": _power(rows + (skew or 0) + free, node["times"])}
    operator = _operator(node, tensors, sizes, norm)
    square = Fraction(operator["bound"]) ** 2
    if skew is None and not free and Fraction(step) * square > 2 * decay >= Fraction(step) * square * (1 - _SMALL):
        step = storable_down(2 * decay / square, tensors[operator["weight"]].dtype)
    factor = euler_factor(Fraction(step), Fraction(operator["bound"]), decay, skew, free)
    return node | found | {"operator": operator, "step": step, "bound": _power(factor, node["times"])}


def _branches(node: Node, tensors: Mapping[str, Tensor], norm: str) -> tuple[Node, Fraction | None, Fraction]:
    """Publish the skew part and the free part of an Euler step; return their fields and bounds."""
    found: Node = {"skew_bound": None}
    skew, free = None, Fraction(0)
    if node["skew"] is not None:
        found["skew_bound"] = matrix_bound(tensors[node["skew"]], norm)
        skew = Fraction(found["skew_bound"])
    if node["free"] is not None:
        inner, outer = (_part(node["free"][key], tensors, norm) for key in ("inner", "outer"))
        found["free"] = node["free"] | {"inner": inner, "outer": outer}
        free = abs(Fraction(node["free"]["scale"])) * Fraction(inner["bound"]) * Fraction(outer["bound"])
    return found, skew, free


def _array(tensors: Mapping[str, Tensor], name: str) -> Any:
    return tensors[name].double().cpu().numpy()


def _part(node: Node, tensors: Mapping[str, Tensor], norm: str) -> Node:
    """Publish a dense layer that is nested in a block."""
    return published(node, tensors, [(tensors[node["weight"]].shape[1],)], norm)


@composite("infinity")
def _infinity(node: Node, tensors: Mapping[str, Tensor], sizes: Shapes, norm: str) -> Node:
    operator, decay = node["operator"], Fraction(node["decay"])
    kernel, steps = (_array(tensors, name) for name in (operator["weight"], node["steps"]))
    sums, parts = infinity_sums(kernel, steps, decay), None
    if norm != "linf":
        operator = published(operator, tensors, sizes, norm)
        parts = infinity_parts(steps, decay, Fraction(operator["bound"]))
    return node | {"operator": operator, "bound": _power(infinity_factor(norm, sums, parts), node["times"])}


def _shear(node: Node, tensors: Mapping[str, Tensor], _sizes: Shapes, norm: str) -> Node:
    decay, keys = Fraction(node["decay"]), ("first", "second")
    if norm == "linf":
        weights = (_array(tensors, node[key]["weight"]) for key in keys)
        rows = (
            row_factor(w, 1, None, Fraction(step), Fraction(0)) for w, step in zip(weights, node["steps"], strict=True)
        )
        return node | {"bound": round_up(shear_sums(*rows) * decay)}
    both = {key: _part(node[key], tensors, norm) for key in keys}
    pairs = zip(node["steps"], both.values(), strict=True)
    excess = shear_excess(*(Fraction(step) * Fraction(operator["bound"]) ** 2 for step, operator in pairs))
    largest = (excess + root_up(excess**2 + 4)) / 2  # L with L - 1/L = excess
    return node | both | {"bound": round_up(decay * largest)}


def _runge_kutta(node: Node, tensors: Mapping[str, Tensor], sizes: Shapes, norm: str) -> Node:
    if norm == "linf":
        raise UncertifiableError("a Runge-Kutta method that is no combination of Euler steps has a bound in l2 only.")
    euler = published(node["euler"], tensors, sizes, norm)
    if euler["bound"] > 1.0:
        raise UncertifiableError(
            f"the step of a Runge-Kutta method is longer than its limit: Euler's step has the bound {euler['bound']!r}."
        )
    return node | {"euler": euler, "bound": 1.0}


def _implicit(node: Node, tensors: Mapping[str, Tensor], sizes: Shapes, norm: str) -> Node:
    inner = published(node["map"], tensors, sizes, norm)
    rho = None if node["resolvent"] is None else matrix_bound(tensors[node["resolvent"]], norm)
    start, keep, mix = (abs(Fraction(node[key])) for key in ("start", "keep", "mix"))
    factor, size = keep * Fraction(inner["bound"]), Fraction(1 if rho is None else rho)
    bound = round_up(iterated(start, factor, mix, size, node["times"]))
    return node | {"map": inner, "resolvent_bound": rho, "bound": bound}


@composite("sandwich")
def _sandwich(node: Node, tensors: Mapping[str, Tensor], _sizes: Shapes, _norm: str) -> Node:
    A, B, scales = (
        _array(tensors, name) for name in (node["first"]["weight"], node["second"]["weight"], node["scales"])
    )
    both, rounding = sandwich_matrix(A, B, scales)
    limit = Fraction(matrix_bound(torch.from_numpy(both))) + rounding
    return node | {
        "bound": round_up(limit**2 / 2 * (1 + Fraction(1, 2**80)))
    }  # more than the root of the verifier rounds


def _in_linf(publisher: Publisher) -> Publisher:
    """Publish in linf the smaller of the bound of the rows and of the one that the 2-norm gives, times the root of the size."""

    def publish(node: Node, tensors: Mapping[str, Tensor], sizes: Shapes, norm: str) -> Node:
        if norm != "linf":
            return publisher(node, tensors, sizes, norm)
        shape, kind = sizes[0], "token_max" if _on_tokens(node) else "l2"
        inner = publisher({key: entry for key, entry in node.items() if key != "in"}, tensors, sizes, kind)
        size = shape[-1] if kind == "token_max" else math.prod(shape)
        found = {"op": "euclidean", "in": node.get("in"), "norm": kind, "map": inner}
        found["bound"] = round_up(root_up(Fraction(inner["bound"]) ** 2 * size))
        try:
            rows = publisher(node, tensors, sizes, norm)
        except UncertifiableError:
            return found
        return rows if rows["bound"] <= found["bound"] or "in" not in node else found

    return publish


def _on_tokens(node: Node) -> bool:
    """Return whether all operators of a block are dense: they act on each vector along the last axis alone."""
    inner = node.get("map", node.get("euler", node))
    return inner.get("operator", {"op": "linear"})["op"] == "linear"


for _op, _publisher in {"euler": _euler, "shear": _shear, "runge_kutta": _runge_kutta, "implicit": _implicit}.items():
    composite(_op)(_in_linf(_publisher))
