"""The first classes."""

from __future__ import annotations

import math
from functools import partial

from stableopt.constraints import (
    L1,
    Box,
    Constraint,
    L2Ball,
    L2Squared,
    LinfBall,
    NonNegative,
    Orthogonal,
    SpectralBall,
)
from tests.constraints.oracle import exactly_feasible
from tests.constraints.rows import Row

MATRICES = ((4, 3), (3, 4), (3, 3), (1, 5), (5, 1), (1, 1))


def _set(c: Constraint, **rest: object) -> Row:
    return Row(c, exact=partial(exactly_feasible, c), **rest)  # type: ignore[arg-type]


ROWS = [
    Row(L1(0.3)), Row(L1(0.0)), Row(L2Squared(0.7)), Row(L2Squared(0.0)),
    *(_set(c) for c in (Box(-0.55, 0.8), Box(-math.inf, 0.1), Box(0.1, math.inf), NonNegative(), LinfBall(0.7))),
    *(_set(c) for c in (L2Ball(1.3), L2Ball(1e-3))),
    *(_set(c, degenerate=True) for c in (LinfBall(0.0), L2Ball(0.0), Box(0.5, 0.5), Box(-math.inf, math.inf))),
    *(_set(c, shapes=MATRICES) for c in (SpectralBall(0.9), SpectralBall(30.1))),
    *(_set(c, shapes=MATRICES, convex=False, tolerant=True) for c in (Orthogonal(), Orthogonal("cayley"))),
]  # fmt: skip
