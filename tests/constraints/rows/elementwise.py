"""Penalties of single entries, convex or not."""

from __future__ import annotations

from torch import Tensor

from stableopt.constraints.elementwise import ElasticNet, Entropy, Hinge, Huber, LogBarrier
from stableopt.constraints.nonconvex import L0, MCP, SCAD, Lq
from stableopt.constraints.penalties import WeightedL1
from tests.constraints.rows import Row


def positive(x: Tensor) -> Tensor:
    return x.abs() + 0.05


SIX = ((6,), (2, 3), (3, 2), (1, 6))

ROWS: list[Row] = [
    Row(WeightedL1((0.3, 0.0, 1.2, 0.5, 2.0, 0.1)), shapes=SIX),
    Row(WeightedL1((0.3, 1.0), dims=-1), shapes=((2, 2), (3, 2), (2, 3, 2))),
    *(Row(ElasticNet(*w)) for w in ((0.3, 0.7), (0.3, 0.0), (0.0, 0.7))),
    *(Row(Huber(*w)) for w in ((0.8, 0.5), (2.0, 0.01), (0.0, 1.0))),
    Row(Hinge(0.6)), Row(Hinge(0.0)),
    Row(LogBarrier(0.4), domain=positive),
    Row(Entropy(0.7), domain=positive),
    *(Row(g, convex=False) for g in (L0(0.3), MCP(0.6, 1.5), SCAD(0.5), SCAD(0.4, 2.2), Lq(0.5, 0.5), Lq(0.3, 0.9))),
]  # fmt: skip
