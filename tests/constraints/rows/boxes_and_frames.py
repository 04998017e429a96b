"""Boxes, orthonormal frames, and the two plain penalties."""

from __future__ import annotations

import math
from functools import partial

from stableopt.constraints import L1, Box, Constraint, L2Squared, LinfBall, NonNegative, Orthogonal, Stiefel
from tests.constraints.oracle import exactly_feasible
from tests.constraints.rows import Row

MATRICES = ((4, 3), (3, 4), (3, 3), (1, 5), (5, 1), (1, 1))
BOXES = [Box(-0.55, 0.8), Box(-math.inf, 0.1), Box(0.1, math.inf), NonNegative()]
TRIVIAL = [LinfBall(0.0), Box(0.5, 0.5), Box(-math.inf, math.inf)]
FRAMES = [Orthogonal(), Orthogonal("cayley"), Stiefel()]


def _set(c: Constraint, **rest: object) -> Row:
    return Row(c, exact=partial(exactly_feasible, c), **rest)  # type: ignore[arg-type]


ROWS = [
    *(Row(g) for g in (L1(0.3), L1(0.0), L2Squared(0.7), L2Squared(0.0))),
    *(_set(c) for c in BOXES),
    *(_set(c, degenerate=True) for c in TRIVIAL),
    *(_set(c, shapes=MATRICES, convex=False, tolerant=True) for c in FRAMES),
]
