"""The rule of GRU and LSTM layers that run from the zero state (docs/soundness.md, S15)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from .files import choice, number
from .gate_steps import GATES, Step
from .numbers import Array, U, largest, need, norm_at_most, root_up, squares
from .operations import Graph, Node, Shape, rule
from .sequences import power_sum

__all__ = ["LONGEST", "size_of"]

LONGEST = 2**12  # steps of a peak
_SCALES = 2.0**60


def size_of(w: Array, norm: str) -> Fraction:
    """Bound the norm of a difference of outputs whose entries are at most w."""
    return largest(w) if norm == "linf" else root_up(squares(w[None, None]))


def _step(g: Graph, node: Node, shape: Shape) -> Step:
    kind = choice(node["kind"], ("gru", "lstm"), "kind")
    W, V = g.tensor(node["weight"], 2), g.tensor(node["input"], 2)
    R, (rows, p) = None if node["projection"] is None else g.tensor(node["projection"], 2), W.shape
    n, biases = rows // GATES[kind], [g.vector(node[key], rows) for key in ("bias", "hidden_bias")]
    fits = rows == n * GATES[kind] and (p == n if R is None else kind == "lstm" and R.shape == (p, n))
    need(fits and len(shape) == 2 and V.shape == (rows, shape[1]), "the gates do not fit")
    b = np.stack([np.zeros(rows) if v is None else v for v in biases])
    need(all(np.abs(M).max() <= _SCALES for M in (W, V, b, W if R is None else R)), "a weight of a gate is too large")
    limit = math.inf if node["limit"] is None else float(number(node["limit"], "the limit"))
    need(limit > 0, "the limit of the inputs must be positive")
    return Step(kind, W, V, b, R, limit, choice(node["length"], (shape[0],), "length"), exact=g.exact)


@rule("gated", "kind weight input bias hidden_bias projection limit reverse length scaling rate push")
def _gated(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """S15: inputs clipped to [-limit, limit], gates, zero initial state; a norm max |h_i| / w_i, a peak, or a sum of matrices."""
    step, rate, push = _step(g, node, shape), number(node["rate"], "the rate"), number(node["push"], "the push")
    choice(node["reverse"], (False, True), "reverse")
    scaling = g.vector(node["scaling"], step.states)
    w = np.ones(step.states) if scaling is None else scaling
    need(w.min() >= 1 / _SCALES and w.max() <= _SCALES, "a scale is out of range")
    kept = step.grown(w[:, None], step.still)[:, 0]
    pushed = step.grown(np.zeros((step.states, 1)), step.pushes(g.norm))[:, 0]
    need(rate >= largest(kept / w) * (1 + 2 * U), "the rate of gates is not proved")
    size = size_of(w[-len(step.reach) :], g.norm)
    need(push >= size * largest(pushed / w) * (1 + 2 * U), "the push of gates is not proved")
    total, gain = push * power_sum(rate, shape[0])[0], push / (1 - rate) if rate < 1 and step.endless else None
    if g.norm == "l2" and bound < total:
        G = step.sums(shape[0])
        need(np.isfinite(G).all() and norm_at_most(G[None], bound, exact=g.exact), "the bound of gates is not proved")
        total = bound
    elif g.norm != "l2" and shape[0] <= LONGEST:
        w, endless = step.peak(g.norm, shape[0])
        most = size_of(w[-len(step.reach) :], g.norm)
        total, gain = min(total, most), min(gain, most) if gain is not None and endless else gain
    need(bound >= total, "the bound of gates is not proved")
    g.stable[id(node)] = rate, gain
    return (shape[0], len(step.reach))
