"""The catalogue: one row for every regularizer with typical arguments. The laws run on all of them; a new class adds rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stableopt.constraints import Regularizer


@dataclass(frozen=True)
class Row:
    """A regularizer and what the laws must know about it.

    Attributes:
        g: the regularizer.
        convex: whether firm nonexpansiveness and the prox inequality with the curvature of the step hold.
        shapes: the shapes that it takes; ``None`` for any shape at all. Weighted classes need the one of their weights, matrix
            classes have two dimensions.
        exact: decides with exact arithmetic (``fractions``, or digits to spare) whether the stored numbers of a set are feasible;
            required for sets, shares no code with the package.
        degenerate: a set that is trivial (a point, everything) or has no interior, so that the sample points lie on one side only.
        tolerant: violation is 0 within a stated tolerance, and ``exact`` checks that tolerance.
        smooth: whether gradcheck at random points applies (False where almost every point is a kink, or there is no derivative).
        domain: brings random points into the domain of a penalty that is infinite elsewhere (such as a logarithm).
        symmetric: whether only symmetric matrices occur as results (the projection then also symmetrizes).
    """

    g: Regularizer
    convex: bool = True
    shapes: tuple[tuple[int, ...], ...] | None = None
    exact: Callable[[Tensor], bool] | None = None
    degenerate: bool = False
    tolerant: bool = False
    smooth: bool = True
    domain: Callable[[Tensor], Tensor] | None = None
    symmetric: bool = False
