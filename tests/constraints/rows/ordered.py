"""What sorts, pools and walks along a line."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from stableopt.constraints.isotonic import Monotone
from stableopt.constraints.ordered import SLOPE, KSupport
from stableopt.constraints.tv import TV1D, FusedLasso
from tests.constraints.oracle import entries
from tests.constraints.rows import Row


def _rises(x: Tensor) -> bool:
    return all(a <= b for a, b in pairwise(entries(x)))


def _falls(x: Tensor) -> bool:
    return all(a >= b for a, b in pairwise(entries(x)))


def _each_row(x: Tensor) -> bool:
    return all(_rises(row) for row in x.unbind(0))


TWELVE = ((4, 3), (3, 4), (12,), (2, 6))
FOUR = ((4,), (2, 2), (1, 4))
LINES = ((12,), (4, 3), (3, 4), (1, 9), (5, 1), (1, 1))

ROWS = [
    Row(Monotone(), exact=_rises),
    Row(Monotone(increasing=False), exact=_falls),
    Row(Monotone(dims=-1), exact=_each_row, shapes=((4, 3), (3, 4), (1, 9), (5, 1))),
    Row(SLOPE(tuple(0.05 * i for i in range(12, 0, -1))), shapes=TWELVE),
    Row(SLOPE((0.9, 0.4, 0.4, 0.0)), shapes=FOUR),
    Row(SLOPE((0.0, 0.0, 0.0, 0.0)), shapes=FOUR),
    Row(SLOPE((0.6, 0.2, 0.1), dims=-1), shapes=((4, 3), (1, 3), (3, 3))),
    *(Row(KSupport(0.4, k)) for k in (1, 3, 12)),
    Row(KSupport(0.0, 2)),
    Row(KSupport(0.7, 2, dims=-1), shapes=((4, 3), (3, 4), (1, 9), (5, 1))),
    *(Row(TV1D(w), shapes=LINES) for w in (0.4, 3.0)),
    *(Row(TV1D(w, dims=None)) for w in (0.2, 0.0)),
    *(Row(FusedLasso(tv, l1), shapes=LINES) for tv, l1 in ((0.4, 0.2), (0.0, 0.3), (0.5, 0.0))),
    Row(FusedLasso(0.3, 0.1, dims=None)),
]
