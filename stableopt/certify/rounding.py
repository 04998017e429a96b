r"""How far an execution of a program in floating point can be from the exact program, on a whole ball of inputs.

For every value of a program the analysis carries, per sample x and for all inputs x' with :math:`\|x' - x\| \le r`,

* the value at x, computed in float64, and d, a bound of its distance to the exact one;
* :math:`k_0 + k_1 r`, a bound of how far the exact value at x' is from the exact value at x;
* :math:`e_0 + e_1 r`, a bound of how far the value that any execution in the runtime computes for x' is from the exact one at x'.

An operation with Lipschitz bound U multiplies all three by U and adds its own rounding, which is bounded with the size of its
operands: at most that at x plus the reach :math:`k_0 + d + e_0 + (k_1 + e_1) r`. The norm is the one of the certificate. Each
step is derived in docs/soundness.md, part R; the bounds themselves are computed in float64 and inflated by 1e-6 in each step, far
more than their own rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.certify.execute import is_composite, lower
from stableopt.certify.publish import WEIGHTED
from stableopt.certify.rounding_recurrence import recurrence_error
from stableopt.certify.rounding_terms import (
    INFLATE,
    PASSING,
    absolute_norm,
    evaluate,
    gamma,
    ones,
    own_error,
    product_terms,
    reflection_sums,
    size,
    weight_norm,
)
from stableopt.certify.runtime import RUNTIMES, Format, Runtime
from stableopt.errors import CertificateError

__all__ = ["Analysis", "State"]

Node = dict[str, Any]

_PASSING_ACTIVATIONS = {"identity", "relu", "abs", "leaky_relu", "prelu"}
_REFERENCE = RUNTIMES["float64"].wide


@dataclass(frozen=True)
class State:
    """What is known about one value; the fields are those of the module text.

    ``pending`` is the format in which the value was stored, if the rounding to it is not yet part of the error; ``low`` says
    whether the value is a number of the format of the operands of products.
    """

    value: Tensor
    d: Tensor
    k0: Tensor
    k1: float
    e0: Tensor
    e1: float
    cap: Tensor
    pending: Format | None = None
    low: bool = False

    def reach(self) -> tuple[Tensor, float]:
        """Bound how far a computed value at x' can be from the computed value at x."""
        return (self.k0 + self.d + self.e0) * INFLATE, (self.k1 + self.e1) * INFLATE


class Analysis:
    """The rounding of a program in a runtime.

    Args:
        nodes: the operations, each with its ``bound``.
        tensors: the tensors that run, in float64 on the CPU.
        runtime: the arithmetic.
        norm: the norm of the certificate.
        changed: the names of the tensors that are not those of the certificate, because the runtime rounds them.

    Raises:
        CertificateError: from ``run``, for an operation whose rounding has no rule.

    Examples:
        >>> node = {"op": "scale", "in": [0], "factor": 3.0, "bound": 3.0}
        >>> state = Analysis([node], {}, RUNTIMES["float32"], "l2").run(torch.ones(1, 1, dtype=torch.float64))
        >>> float(state.value), bool(2e-7 < state.e0 < 6e-7), 3.0 <= state.k1 < 3.001
        (3.0, True, True)
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        tensors: Mapping[str, Tensor],
        runtime: Runtime,
        norm: str,
        changed: frozenset[str] = frozenset(),
    ) -> None:
        self.nodes, self.tensors, self.runtime, self.norm, self.changed = list(nodes), tensors, runtime, norm, changed
        self._norms: dict[tuple[Any, ...], float] = {}

    def run(self, x: Tensor) -> State:
        """Analyse a batch of inputs, float64 on the CPU; return what is known about the output."""
        return self.states(x)[-1]

    def states(self, x: Tensor) -> list[State]:
        """Return what is known about every value."""
        wide, zero = self.runtime.wide, x.new_zeros(len(x))
        e0 = wide.unit * size(x, self.norm) + wide.tiny * ones(x, self.norm)  # an input is rounded to the dtype
        start = State(x, zero, zero, 1.0, e0 * INFLATE, wide.unit * INFLATE, zero + math.inf)
        return self._walk(self.nodes, [self._capped(start, wide)])

    def _walk(self, nodes: Sequence[Node], states: list[State]) -> list[State]:
        for node in nodes:
            states = [*states, self._step(node, [states[number] for number in node["in"]])]
        return states

    def _step(self, node: Node, inputs: list[State]) -> State:
        if is_composite(node):
            return self._composite(node, self.settled(inputs[0]))
        if node["op"] in WEIGHTED:
            return self.product(node, self.settled(inputs[0]))
        if node["op"] in PASSING or (node["op"] == "pool" and node["name"] == "max"):
            return self._moved(node, inputs)
        return self._plain(node, inputs)

    def settled(self, state: State) -> State:
        """Add the rounding of the storage to the error."""
        kind = state.pending
        if kind is None:
            return state
        reach0, reach1 = state.reach()
        own = kind.unit * (size(state.value, self.norm) + reach0) + kind.tiny * ones(state.value, self.norm)
        e0, e1 = (state.e0 + own) * INFLATE, (state.e1 + kind.unit * reach1) * INFLATE
        return dataclasses.replace(state, e0=e0, e1=e1, pending=None)

    # ------------------------------------------------------------------------------------------------ the kinds of operations

    def operand(self, state: State) -> State:
        """Round the operand of a product to the format of operands, if it is not one of its numbers."""
        kind = self.runtime.operands
        if state.low or kind == self.runtime.wide:
            return state
        return self.settled(dataclasses.replace(state, pending=kind))

    def product(self, node: Node, state: State) -> State:
        """Multiply by a weight: the sums are computed with one unit roundoff, and stored with another."""
        state = self._capped(self.operand(state), self.runtime.operands)
        weight, norm, wide = self.tensors[node["weight"]], self.norm, self.runtime.wide
        value = evaluate(node, self.tensors, [state.value])
        bound, gain = self.bound(node), self._cached("gain", node, absolute_norm)
        count, q = product_terms(node, weight, state.value)
        if node["bias"] is not None:
            count, q = count + 1, q + _shaped(node, self.tensors[node["bias"]].abs(), q)
        reach0, reach1 = state.reach()
        total, g = size(q, norm), gamma(count + 1, self.runtime.sums)
        small = wide.tiny * (ones(value, norm) * (2 * count + 2 + state.value[0].numel() * size(state.value, norm)))
        small = small + wide.tiny * gain * (ones(state.value, norm) + reach0)
        e0 = bound * state.e0 + g * (total + gain * reach0) + small
        e1 = bound * state.e1 + (g + wide.tiny * state.value[0].numel()) * gain * reach1
        d = (
            bound * state.d
            + gamma(count + 1, _REFERENCE.unit) * total
            + _REFERENCE.tiny * (count + 2) * ones(value, norm)
        )
        cap = _room(q, gain, state, wide.largest)
        low = self.runtime.results != wide
        result = self._grown(state, value, bound, d, e0, e1, cap)
        result = dataclasses.replace(result, low=low, pending=self.runtime.results if low else None)
        return self._capped(result, self.runtime.results)

    def _moved(self, node: Node, inputs: list[State]) -> State:
        """Move entries: no rounding, and relative errors stay with their entries."""
        value = evaluate(node, self.tensors, [state.value for state in inputs])
        kinds = [state.pending for state in inputs if state.pending is not None]
        pending = kinds[0] if kinds else None
        for kind in kinds[1:]:
            pending = kind if pending is None else pending | kind
        low = all(state.low for state in inputs)
        state = self._stacked(inputs) if len(inputs) > 1 else inputs[0]
        result = self._grown(state, value, self.bound(node), state.d, state.e0, state.e1, state.cap, scaled=False)
        return dataclasses.replace(result, pending=pending, low=low)

    def _plain(self, node: Node, inputs: list[State]) -> State:
        """Compute in the wide format, and store in the format of the input."""
        passing = node.get("name") in _PASSING_ACTIVATIONS
        kind = inputs[0].pending if passing else None
        inputs = [dataclasses.replace(state, pending=None) if passing else self.settled(state) for state in inputs]
        value = evaluate(node, self.tensors, [state.value for state in inputs])
        factors = node["factors"] if node["op"] == "sum" else [1.0]
        bound = 1.0 if node["op"] == "sum" else self.bound(node)
        state = self._joined(inputs, factors) if node["op"] == "sum" else inputs[0]
        low = all(state.low for state in inputs)
        own = own_error(node, self.tensors, [state.value for state in inputs], value, bound)
        d, e0, e1, cap = bound * state.d, bound * state.e0, bound * state.e1, state.cap
        if own is not None:
            gain, (reach0, reach1) = 1.0 if node["op"] == "sum" else own.gain, state.reach()
            g, small, total = (
                gamma(own.count, self.runtime.wide.unit),
                ones(value, self.norm),
                size(own.size, self.norm),
            )
            e0 = e0 + g * (total + gain * reach0) + self.runtime.wide.tiny * own.count * small
            e1 = e1 + g * gain * reach1
            d = d + gamma(own.count, _REFERENCE.unit) * total + _REFERENCE.tiny * own.count * small
            cap = torch.minimum(cap, _room(own.size, gain, state, _root(self.runtime.wide.largest)))
        result = self._grown(state, value, bound, d, e0, e1, cap)
        if kind is not None:  # what underflowed in storage grows with the slope
            kind = dataclasses.replace(kind, tiny=kind.tiny * max(1.0, bound))
        if low and (own is not None or kind is not None):
            kind = self._twice(kind) if own is not None else kind
        return self._capped(dataclasses.replace(result, pending=kind, low=low), self.runtime.results if low else None)

    def _twice(self, kind: Format | None) -> Format:
        """Return the rounding of a stored number that is computed with and stored once more."""
        again = self.runtime.results
        if kind is None:
            return again
        return Format(kind.unit + again.unit + kind.unit * again.unit, 3.0 * max(kind.tiny, again.tiny), again.largest)

    def _composite(self, node: Node, state: State) -> State:
        """Bound the whole by its theorem, and its rounding by that of the small program that it stands for."""
        if len(node["in"]) != 1:
            raise CertificateError(f"the rounding of the operation {node['op']!r} with several inputs has no rule.")
        if touched := self._touched(node):
            raise CertificateError(
                f"the runtime {self.runtime.name} rounds the weight '{touched[0]}' of a block ({node['op']}), whose bound is "
                "proved for the unrounded one; certify the model with its weights in the dtype of the runtime."
            )
        reach0, reach1 = state.reach()
        zero = torch.zeros_like(state.d)
        start = State(state.value, zero, reach0, reach1, zero, 0.0, state.cap, low=state.low)
        steps = node["op"] == "recurrence"  # whose errors are carried on by what is proved about a step
        end = recurrence_error(self, node, start) if steps else self._walk(lower(node), [start])[-1]
        bound = node["bound"]
        result = self._grown(
            state,
            end.value,
            bound,
            bound * state.d + end.d,
            bound * state.e0 + end.e0,
            bound * state.e1 + end.e1,
            end.cap,
        )
        return dataclasses.replace(result, pending=end.pending, low=end.low)

    # ------------------------------------------------------------------------------------------------------------------- parts

    def bound(self, node: Node) -> float:
        """Return the Lipschitz bound of one operation with the weights that run."""
        if node["op"] in WEIGHTED:
            if "bound" in node and node["weight"] not in self.changed:
                return node["bound"]
            return self._cached("norm", node, weight_norm)
        if "bound" in node and not self._touched(node):
            return node["bound"]
        return slope(node, self.tensors, self.norm)

    def _touched(self, node: Node) -> list[str]:
        return sorted(name for name in _names(node) if name in self.changed)

    def _cached(self, kind: str, node: Node, function: Any) -> float:
        key = (kind, node["op"], node["weight"], node["transposed"], node.get("groups"))
        if key not in self._norms:
            self._norms[key] = function(node, self.tensors[node["weight"]], self.norm) * INFLATE
        return self._norms[key]

    def _joined(self, inputs: list[State], factors: Sequence[float]) -> State:
        """Return the errors of a weighted sum of values: the triangle inequality."""
        first = inputs[0]
        total = {
            name: sum(abs(f) * getattr(state, name) for f, state in zip(factors, inputs, strict=True)) * INFLATE
            for name in ("d", "k0", "k1", "e0", "e1")
        }
        cap = first.cap
        for state in inputs[1:]:
            cap = torch.minimum(cap, state.cap)
        return dataclasses.replace(first, cap=cap, **total)

    def _stacked(self, inputs: list[State]) -> State:
        """Return the errors of a concatenation: the largest in linf, at most the root of the sum of squares in the others."""
        total: dict[str, Any] = {}
        for name in ("d", "k0", "k1", "e0", "e1"):
            parts = torch.stack([torch.as_tensor(getattr(state, name), dtype=torch.float64) for state in inputs])
            whole = parts.amax(0) if self.norm == "linf" else torch.linalg.vector_norm(parts, dim=0) * INFLATE
            total[name] = float(whole) if name in {"k1", "e1"} else whole
        cap = torch.stack([state.cap for state in inputs]).amin(0)
        return dataclasses.replace(inputs[0], cap=cap, **total)

    def _grown(
        self,
        state: State,
        value: Tensor,
        bound: float,
        d: Tensor,
        e0: Tensor,
        e1: float,
        cap: Tensor,
        *,
        scaled: bool = True,
    ) -> State:
        factor = 1.0 if scaled else bound
        return State(
            value=value,
            d=d * factor * INFLATE,
            k0=bound * state.k0 * INFLATE,
            k1=bound * state.k1 * INFLATE,
            e0=e0 * factor * INFLATE,
            e1=e1 * factor * INFLATE,
            cap=torch.minimum(state.cap, cap),
        )

    def _capped(self, state: State, kind: Format | None) -> State:
        """Limit the radius to where no entry can overflow."""
        largest = (self.runtime.wide if kind is None else kind).largest
        return dataclasses.replace(state, cap=torch.minimum(state.cap, _room(state.value, 1.0, state, largest)))


def _room(q: Tensor, gain: float, state: State, largest: float) -> Tensor:
    """Return the radius up to which entries below q + gain * reach stay within half of the largest number."""
    reach0, reach1 = state.reach()
    left = 0.5 * largest - q.abs().flatten(1).amax(1) - gain * reach0
    return torch.where(
        left > 0, left / (gain * reach1) if gain * reach1 > 0 else left + math.inf, torch.zeros_like(left)
    )


def _root(largest: float) -> float:
    """Leave room for the products inside an operation: four factors and the settings."""
    return largest**0.25


def _shaped(node: Node, bias: Tensor, q: Tensor) -> Tensor:
    return bias.reshape(-1, *[1] * (q.ndim - 2)) if node["op"] == "conv" else bias


def _names(node: Node) -> set[str]:
    """Return the names of the tensors of a node and of those nested in it, without biases, which no bound depends on."""
    names: set[str] = set()
    for key, value in node.items():
        if isinstance(value, dict):
            names |= _names(value)
        elif isinstance(value, str) and key not in {"op", "name", "bias"}:
            names.add(value)
    return names


_SLOPES = {"sigmoid": 0.25, "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1, "mish": 1.09, "selu": 1.76, "hardswish": 1.5}


def slope(node: Node, tensors: Mapping[str, Tensor], norm: str) -> float:
    """Bound the Lipschitz constant of a simple operation without products.

    Raises:
        CertificateError: for an operation that has no such rule.

    Examples:
        >>> slope({"op": "scale", "factor": -2.0}, {}, "l2"), slope({"op": "activation", "name": "relu"}, {}, "linf")
        (2.0, 1.0)
    """
    op, name = node["op"], node.get("name")
    if op == "scale":
        return abs(node["factor"])
    if op == "affine":
        return 1.0 if node["scale"] is None else float(tensors[node["scale"]].abs().max())
    if op == "activation":
        extra = max(abs(node.get("slope", 0.0)), abs(node.get("alpha", 0.0)) if name == "elu" else 0.0)
        own = {"prelu": "weight", "spline": "slopes"}.get(str(name))
        return max(_SLOPES.get(str(name), 1.0), extra, 0.0 if own is None else float(tensors[node[own]].abs().max()))
    if op == "householder" and norm == "linf":
        return reflection_sums(tensors[node["vectors"]])
    if op in PASSING - {"take"} or op in {"mean", "softmax", "householder", "ball"}:
        return 1.0
    if op == "center" or (op == "bounded_norm" and norm != "linf"):
        return 2.0 if norm == "linf" else 1.0
    raise CertificateError(f"the operation {op!r} inside a block has no bound of its own.")
