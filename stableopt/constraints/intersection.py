r"""Intersections of convex sets, by Dykstra's algorithm with a duality gap.

With corrections :math:`p_i = 0` and :math:`u = x`, sweep over the sets: :math:`y_i = P_i(u + p_i)`,
:math:`p_i \leftarrow u + p_i - y_i`, :math:`u \leftarrow y_i`. Then :math:`u + \sum_i p_i = x` throughout, and :math:`u` tends
to the projection. Each correction is a normal of its set at :math:`y_i`, so its support function is
:math:`\langle p_i, y_i \rangle`, and

.. math:: D = \langle x, p \rangle - \tfrac12 \|p\|^2 - \sum_i \langle p_i, y_i \rangle, \qquad p = \sum_i p_i,

is a lower bound of :math:`\tfrac12 \|x - q\|^2` over all common points q. For one common point q the gap
:math:`\tfrac12 \|x - q\|^2 - D` therefore bounds how far it is from the projection: :math:`\tfrac12 \|q - P(x)\|^2 \le \text{gap}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_number, check_tensor
from stableopt.constraints.base import Constraint
from stableopt.constraints.layout import substitute
from stableopt.constraints.sharding import is_sharded, on_whole
from stableopt.errors import InfeasibleError

__all__ = ["DykstraResult", "Intersection", "dykstra"]

_ROUNDS = 200  # of plain alternating projections that end with a common point of the stored numbers


class DykstraResult(NamedTuple):
    r"""What :func:`dykstra` found.

    Attributes:
        point: float64 tensor that lies in all sets as stored.
        gap: duality gap, in units of the squared distance; the point is at most :math:`\sqrt{2\,\text{gap}}` from the projection,
            up to the rounding of float64 in computing the gap.
        sweeps: how many sweeps over the sets were made.
    """

    point: Tensor
    gap: float
    sweeps: int


@dataclass(frozen=True)
class Intersection(Constraint):
    r"""The points that lie in all of several convex sets; projection by Dykstra's algorithm, ended in a point of all of them.

    Args:
        sets: the sets, at least one, convex.
        tolerance: the sweeps end when the corrections change by less than this, relative to the size of the point; > 0.
        sweeps: how many sweeps there may be, :math:`\ge 1`.

    Raises:
        TypeError: if a set is not a constraint, or a number has the wrong type.
        ValueError: if there is none, one is not convex, or a number is out of range.
        InfeasibleError: in use, if no common point is found: the sets have none, or the sweeps do not suffice.

    Note:
        The result lies in every set as stored; that it is the *nearest* such point holds up to the tolerance, and :func:`dykstra`
        returns the gap that proves how nearly. Dykstra's algorithm may be slow where sets touch at small angles, and may stall
        for points that are very far away compared with the size of the sets: then it raises, it never returns a point outside. The
        derivative is that of the sweeps. The loop looks at the data after each sweep, so it waits for the device.

    References:
        Boyle and Dykstra, *A method for finding projections onto the intersection of convex sets in Hilbert spaces*, 1986; Gaffke
        and Mathar, *A cyclic projection algorithm via duality*, Metrika 36, 1989 (the dual problem).

    Examples:
        >>> from stableopt.constraints import L2Ball, NonNegative
        >>> both = Intersection((NonNegative(), L2Ball(1.0)))
        >>> both.project(torch.tensor([3.0, 4.0, -5.0], dtype=torch.float64)).round(decimals=6)
        tensor([0.6000, 0.8000, 0.0000], dtype=torch.float64)
    """

    sets: tuple[Constraint, ...]
    tolerance: float = 1e-12
    sweeps: int = 10_000

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.sets, list | tuple) or not all(isinstance(c, Constraint) for c in self.sets):
            raise TypeError(f"Intersection needs a tuple of Constraint objects as sets, got {self.sets!r}.")
        if not self.sets or not all(c.convex for c in self.sets):
            raise ValueError(f"Intersection needs at least one set, all of them convex, got {self.sets!r}.")
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int):
            raise TypeError(f"Intersection needs an int as sweeps, got {self.sweeps!r}.")
        if self.sweeps < 1:
            raise ValueError(f"Intersection needs sweeps >= 1, got {self.sweeps!r}.")
        object.__setattr__(self, "sets", tuple(self.sets))
        object.__setattr__(
            self, "tolerance", check_number("Intersection", "tolerance", self.tolerance, low=0.0, strict=True)
        )

    def project(self, x: Tensor) -> Tensor:
        """Return ``x`` itself, or the nearest common point up to the tolerance, feasible as stored.

        Raises:
            TypeError: as the sets.
            ValueError: as the sets.
            InfeasibleError: if no common point is found.
        """
        check_tensor("Intersection", x)
        if is_sharded(x):
            return on_whole("Intersection", self.project, x)
        if self.violation(x) == 0.0:
            return x
        if not bool(x.isfinite().all()):
            return x * math.nan
        nearest = _sweep(x.double(), self.sets, self.tolerance, self.sweeps)[0]
        point = _common_point(nearest.detach().to(x.dtype), self.sets)
        return substitute(nearest.to(x.dtype), point)

    def violation(self, x: Tensor) -> float:
        """Return the largest violation of a set.

        Raises:
            TypeError: as the sets.
            ValueError: as the sets.
        """
        check_tensor("Intersection", x)
        return max(c.violation(x) for c in self.sets)


@torch.no_grad()
def dykstra(x: Tensor, sets: Sequence[Constraint], tolerance: float = 1e-12, sweeps: int = 10_000) -> DykstraResult:
    """Return the point of several convex sets that is nearest to ``x``, with a gap that proves how nearly.

    Args:
        x: real floating tensor; computed in float64.
        sets: convex sets.
        tolerance: as in :class:`Intersection`.
        sweeps: as in :class:`Intersection`.

    Raises:
        TypeError: as :class:`Intersection`.
        ValueError: as :class:`Intersection`, and if ``x`` is not finite.
        InfeasibleError: if no common point is found.

    Examples:
        >>> from stableopt.constraints import Box, HalfSpace
        >>> found = dykstra(torch.tensor([2.0, 2.0]), [Box(0.0, 1.0), HalfSpace((1.0, 1.0), 1.5)])
        >>> found.point.round(decimals=6), found.gap < 1e-9
        (tensor([0.7500, 0.7500], dtype=torch.float64), True)
    """
    checked = Intersection(tuple(sets), tolerance, sweeps)
    check_tensor("dykstra", x)
    if not bool(x.isfinite().all()):
        raise ValueError("dykstra needs a finite point, got NaN or infinity.")
    wide = x.double()
    nearest, corrections, points, used = _sweep(wide, checked.sets, tolerance, sweeps)
    point = _common_point(nearest, checked.sets)
    total = torch.stack(corrections).sum(0)
    support = sum(float((p * y).sum()) for p, y in zip(corrections, points, strict=True))
    dual = float((wide * total).sum()) - 0.5 * float(total.square().sum()) - support
    return DykstraResult(point, max(0.5 * float((wide - point).square().sum()) - dual, 0.0), used)


def _sweep(
    x: Tensor, sets: tuple[Constraint, ...], tolerance: float, sweeps: int
) -> tuple[Tensor, list[Tensor], list[Tensor], int]:
    """Run Dykstra's algorithm; return its point, the corrections, the last projections, and the number of sweeps."""
    u, corrections = x, [torch.zeros_like(x) for _ in sets]
    points = [x for _ in sets]
    size = 1.0 + float(x.detach().abs().max()) if x.numel() else 1.0
    change = math.inf
    for used in range(1, sweeps + 1):
        before = u.detach()
        moved = 0.0
        for i, c in enumerate(sets):
            target = u + corrections[i]
            u = c.project(target)
            moved = max(moved, float((target - u - corrections[i]).detach().abs().max()) if x.numel() else 0.0)
            corrections[i], points[i] = target - u, u
        change = max(moved, float((u.detach() - before).abs().max()) if x.numel() else 0.0)
        if change <= tolerance * size:
            return u, corrections, points, used
    raise InfeasibleError(
        f"the intersection of {len(sets)} sets: after {sweeps} sweeps the corrections still change by {change:.3g} each time, so "
        f"the sets may have no common point ({', '.join(map(repr, sets))}). Check that they have one, or allow more sweeps."
    )


def _common_point(start: Tensor, sets: tuple[Constraint, ...]) -> Tensor:
    """Return a point near ``start`` that lies in all sets as stored, by plain alternating projections."""
    q, left = start, [math.inf]
    for _ in range(_ROUNDS):
        for c in sets:
            q = c.project(q)
        left = [c.violation(q) for c in sets]
        if max(left) == 0.0:
            return q
    raise InfeasibleError(
        f"the intersection of {len(sets)} sets: near the limit no point of {start.dtype} lies in all of them, the violations stay "
        f"at {left}. Their common points may be too few to be stored; give the sets an overlap, or use a finer dtype."
    )
