"""Norms of vectors and of groups of entries."""

from __future__ import annotations

from stableopt.constraints.group_trees import GroupLasso, SparseGroup, TreeGroups
from stableopt.constraints.groups import L2
from tests.constraints.rows import Row

TWELVE = ((4, 3), (12,), (2, 6), (3, 2, 2))
SOME = ((4, 3), (3, 4), (1, 5), (5, 1), (2, 3, 2), (6,))
PAIRS = ((2, 2), (3, 2), (2, 3, 2))  # with dims=-1 vectors of two entries

ROWS: list[Row] = [
    Row(L2(0.6)),
    Row(L2(0.0)),
    Row(L2(0.6, dims=-1), shapes=SOME),
    Row(GroupLasso(0.3, groups=(0, 1, 2, 0, 0, 1, 3, 3, 1, 2, 2, 2)), shapes=TWELVE),
    Row(GroupLasso(0.4, groups=(1, 0), weights=(2.0, 0.5), dims=-1), shapes=PAIRS),
    Row(GroupLasso(0.2, groups=None, dims=-1), shapes=SOME),
    Row(SparseGroup(0.1, 0.3)),
    Row(SparseGroup(0.1, 0.3, dims=0), shapes=TWELVE),
    Row(SparseGroup(0.2, 0.2, groups=(0, 1, 2, 0, 0, 1, 3, 3, 1, 2, 2, 2)), shapes=TWELVE),
    Row(
        TreeGroups(0.2, groups=(tuple(range(12)), (0, 1, 2, 3, 4), (1, 3), (4,), (7, 8, 9), (9, 7), (11,))),
        shapes=TWELVE,
    ),
    Row(TreeGroups(0.3, groups=((0, 1), (1,)), weights=(1.0, 2.0), dims=-1), shapes=PAIRS),
]
