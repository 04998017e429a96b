r"""The Euclidean ball, also with weights, and the sphere, with feasibility decided for the stored numbers.

**The ball.** The norm of the stored numbers is known in float64 only up to rounding. With the entries scaled by a power of two to
size about 1 and summed in any order, hence also by parts on several processes, the computed :math:`S` of :math:`n` terms
:math:`w_i |x_i|^2` satisfies

.. math:: \|x\|_w \le U(x) := \sqrt{S}\,(1 + \delta), \qquad \delta = (n + 8)\, 2^{-53},

with room for the roundings of a weight's product, of a complex square, of the root and of the last product. Terms that underflow
are :math:`2^{-800}` times smaller than :math:`S`. A point counts as feasible when :math:`U(x) \le r`. Any other point gives the
projection :math:`u`, correct to a few roundings, which becomes :math:`p = u s` with :math:`s = r / (U(u)(1 + 4\delta))`, cast
toward zero. Then :math:`U(p) \le (1 + 2\delta)\|p\|_w < r`: the result is feasible by the same test, so projecting again changes
no bit.

**The metric.** In the norm :math:`\sum_i P_i u_i^2` the projection is :math:`u_i = P_i x_i / (P_i + \theta w_i)`, where
:math:`\theta` solves :math:`1 / \|u(\theta)\|_w = 1 / r`. The left side is increasing and concave, so Newton's method from the
left never steps past the root. It starts there from a bracket that a fixed number of bisections (of the exponent) has brought
within a factor of two. The number of steps does not depend on the data, so nothing waits for the device.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_dims, check_number, check_numbers
from stableopt.constraints.base import Regularizer
from stableopt.constraints.kinds import VectorSet
from stableopt.constraints.layout import Vectors, weight_rows
from stableopt.constraints.rounding import toward_zero, unit_scale
from stableopt.errors import InfeasibleError

__all__ = ["L2Ball", "Sphere"]

_SAFE_RADIUS = 2.0**-900  # below it the quotients of L2Ball may be subnormal, and its margins lost
_LEAST_WEIGHT = 2.0**-100  # relative to the largest
_LEAST_METRIC = 2.0**-60  # relative to the largest of a vector; smaller entries count as this
_LEAST_RADIUS = 2.0**-200  # relative to the vector; for a smaller one the direction has its limit
_BISECTIONS = 9  # the bracket spans at most 160 binary orders, and 160 / 2^9 < 1
_NEWTON_STEPS = 7


@dataclass(frozen=True)
class L2Ball(VectorSet):
    r"""The Euclidean ball :math:`\{x : \sum_i w_i |x_i|^2 \le r^2\}`; without weights, projection :math:`x \min(1, r / \|x\|_2)`.

    Args:
        radius: :math:`r`, finite, :math:`\ge 0`.
        weights: :math:`w_i > 0`, one per entry of a vector in the order of ``dims``, finite; ``None`` for ones.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the radius is negative or not finite, or a weight is not positive and finite, or :math:`2^{100}` times
            smaller than another.

    Note:
        Feasibility is decided by an upper bound of the norm that counts all rounding (see the module). A point of :math:`n`
        entries within the relative distance :math:`2(n + 8) 2^{-53}` of the sphere may therefore count as outside, although it
        is not, and is moved inwards; a projected point stops short of the sphere by at most five times that, plus one unit in
        the last place of its dtype. A radius below :math:`2^{-900}` times the root of the largest weight may send a point to the
        origin. Infinite entries become NaN. The derivative at the sphere is that of the inside. Metrics that span more than 60
        binary orders are cut off there. Computed in float64 on the device of ``x``, without waiting for it; a DTensor needs sums
        over the processes, no gathering.

    References:
        Moré, *The Levenberg-Marquardt algorithm: implementation and theory*, 1978, section 5 (the secular equation).

    Examples:
        >>> L2Ball(1.0).project(torch.tensor([3.0, 4.0], dtype=torch.float64))
        tensor([0.6000, 0.8000], dtype=torch.float64)
        >>> L2Ball(1.0).violation(torch.tensor([3.0, 4.0]))
        4.0...
        >>> L2Ball(5.0, dims=1).project(torch.tensor([[3.0, 3.0], [60.0, 80.0]])).round(decimals=4)
        tensor([[3., 3.],
                [3., 4.]])
    """

    complex_too: ClassVar[bool] = True
    radius: float
    weights: tuple[float, ...] | None = None
    dims: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "radius", check_number("L2Ball", "radius", self.radius, low=0.0))
        if self.weights is not None:
            weights = check_numbers("L2Ball", "weights", self.weights, low=0.0, strict=True)
            if min(weights) < max(weights) * _LEAST_WEIGHT:
                raise ValueError(
                    f"L2Ball needs weights of which none is below {_LEAST_WEIGHT:.0e} times another, got {min(weights)!r} and "
                    f"{max(weights)!r}; leave out what is not constrained."
                )
            object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "dims", check_dims("L2Ball", self.dims))

    @property
    def diagonal(self) -> bool:
        """Whether the projection in a diagonal metric is exact: it is.

        Examples:
            >>> L2Ball(1.0).project(torch.tensor([2.0, 2.0]), metric=torch.tensor([1.0, 1e6])).round(decimals=3)
            tensor([0., 1.])
        """
        return True

    def conjugate(self) -> Regularizer:
        """Return the Euclidean norm with the radius as weight.

        Raises:
            ValueError: if there are weights.

        Examples:
            >>> L2Ball(2.0).conjugate()
            L2(weight=2.0, dims=None)
        """
        from stableopt.constraints.groups import L2  # the norm imports the ball, which is dual to it

        return L2(self.radius, self.dims) if self.weights is None else super().conjugate()

    def _excess(self, v: Vectors) -> Tensor:
        bound, radius, scale = self._measure(v, v.data.detach())
        excess = (bound - radius) / scale * 2.0**self._half
        return torch.where(bound <= radius, 0.0, torch.where(excess <= 0, math.ulp(0.0), excess))

    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        bound, radius, scale = self._measure(v, v.data.detach())
        outside = ~(bound <= radius)
        unit, w = v.data * scale, self._rows(v)
        if w is not None or metric is not None:
            d = torch.ones_like(bound) if w is None else w
            if metric is not None:
                d = d / (metric / v.max(metric)).clamp_min(_LEAST_METRIC)
            d = (d / v.max(d)).expand(unit.shape)
            theta = _secular_root(v, _terms(unit, w), d, radius.clamp_min(_LEAST_RADIUS), outside)
            unit = unit / (1.0 + theta * d)
        # Away from the sphere the length is replaced by 1, so that no 0/0 reaches the derivative.
        length = torch.where(outside, v.sum(_terms(unit, w)), 1.0).sqrt()
        return unit * (min(self.radius * 2.0**-self._half, sys.float_info.max) / length)

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        bound, radius, _ = self._measure(v, nearest)
        least = torch.where(bound > 0, bound, 1.0) * (1.0 + 4.0 * _delta(v))
        inner = toward_zero(nearest * (radius / least).clamp_max(1.0), v.stored.dtype)
        if self.radius * 2.0**-self._half >= _SAFE_RADIUS:
            return inner
        bound, radius, _ = self._measure(v, inner.to(nearest.dtype))
        return torch.where(bound <= radius, inner, torch.zeros_like(inner))

    def _measure(self, v: Vectors, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return upper bounds of the norms, the radius on the same scale, and that scale of each row.

        The scaled radius is exact, or infinite, or so small that only zero is below it.
        """
        scale = unit_scale(v.max(_largest_parts(rows)))
        bound = v.sum(_terms(rows * scale, self._rows(v))).sqrt() * (1.0 + _delta(v))
        return bound, self.radius * scale * 2.0**-self._half, scale

    @property
    def _half(self) -> int:
        """The exponent of the power of four by which the weights are divided, so that the largest is about 1."""
        return 0 if self.weights is None else (math.frexp(max(self.weights))[1] + 1) // 2

    def _rows(self, v: Vectors) -> Tensor | None:
        if self.weights is None:
            return None
        return weight_rows("L2Ball", "weights", v, tuple(math.ldexp(w, -2 * self._half) for w in self.weights))


@dataclass(frozen=True)
class Sphere(VectorSet):
    r"""The sphere :math:`\{x : \|x\|_2 = r\}`, up to the rounding of the stored numbers; projection :math:`x\, r / \|x\|_2`.

    A stored vector of :math:`n` numbers counts as feasible when it is proved that

    .. math:: \bigl|\, \|x\|_2 - r \,\bigr| \le (\epsilon + (n + 8)\, 2^{-50})\, r + \sqrt{n}\, \sigma,

    where :math:`\epsilon` is the spacing of the dtype at 1 and :math:`\sigma` its smallest positive number. Every projection does.

    Args:
        radius: :math:`r > 0`, finite.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the radius is not positive and finite.

    Note:
        The set is not convex. The zero vector has no nearest point: it goes to the vector of equal positive entries, with the
        derivative 0. Complex vectors have :math:`2n` real numbers and the same tolerance. Infinite entries become NaN, and a
        tensor without entries is returned as it is. Projecting raises :class:`stableopt.errors.InfeasibleError` if the radius is
        above half of the range of the dtype.

    References:
        Absil, Mahony and Sepulchre, *Optimization Algorithms on Matrix Manifolds*, 2008, section 3.5.

    Examples:
        >>> Sphere(2.0).project(torch.tensor([3.0, -4.0]))
        tensor([ 1.2000, -1.6000])
        >>> Sphere(2.0).project(torch.zeros(4))
        tensor([1., 1., 1., 1.])
        >>> Sphere(2.0).violation(torch.tensor([3.0, -4.0], dtype=torch.float64))
        2.99...
    """

    complex_too: ClassVar[bool] = True
    radius: float = 1.0
    dims: int | tuple[int, ...] | None = None
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "radius", check_number("Sphere", "radius", self.radius, low=0.0, strict=True))
        object.__setattr__(self, "dims", check_dims("Sphere", self.dims))

    def _excess(self, v: Vectors) -> Tensor:
        info = torch.finfo(v.stored.dtype)
        if 2.0 * self.radius > info.max:
            raise InfeasibleError(
                f"{self!r} reaches beyond half of the range of {v.stored.dtype}; choose a smaller radius or a wider dtype."
            )
        x = v.data.detach()
        scale = unit_scale(v.max(_largest_parts(x)))
        length, radius = v.sum(_terms(x * scale, None)).sqrt(), self.radius * scale
        smallest = math.sqrt(v.size) * info.smallest_normal * info.eps
        tolerance = radius * (info.eps + 8.0 * _delta(v)) + smallest * scale
        gap = (length - radius).abs() + _delta(v) * (length + radius) - tolerance
        return torch.where(gap <= 0, 0.0, (gap / scale).clamp_min(math.ulp(0.0)))

    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        top = v.max(_largest_parts(v.data.detach()))
        unit = v.data * unit_scale(top)
        length = torch.where(top > 0, v.sum(_terms(unit, None)), 1.0).sqrt()
        return torch.where(top > 0, unit * (self.radius / length), self.radius / math.sqrt(max(v.size, 1)))

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        return nearest.to(v.stored.dtype)


def _largest_parts(x: Tensor) -> Tensor:
    return torch.maximum(x.real.abs(), x.imag.abs()) if x.is_complex() else x.abs()


def _terms(x: Tensor, weights: Tensor | None) -> Tensor:
    squares = x.real.square() + x.imag.square() if x.is_complex() else x.square()
    return squares if weights is None else squares * weights


def _delta(v: Vectors) -> float:
    return (v.size + 8) * 2.0**-53


def _secular_root(v: Vectors, terms: Tensor, d: Tensor, radius: Tensor, outside: Tensor) -> Tensor:
    r"""Return the :math:`\theta` with :math:`\sum_i t_i / (1 + \theta d_i)^2 = r^2`, differentiable in the terms; 0 if inside.

    The derivative is that of one more Newton step from the root, that is of the implicit function.
    """
    t = terms.detach()

    def length(theta: Tensor) -> Tensor:
        return v.sum(t / (1.0 + theta * d).square()).sqrt()

    low = (length(torch.zeros_like(radius)) / radius - 1.0).clamp_min(0.0)
    high = low / -v.max(-d)
    for _ in range(_BISECTIONS):
        middle = low.sqrt() * high.sqrt()
        short = length(middle) <= radius
        low, high = torch.where(short, low, middle), torch.where(short, middle, high)
    theta = low
    for _ in range(_NEWTON_STEPS):
        theta = torch.minimum(torch.maximum(theta + (length(theta) / radius - 1.0) * _pace(v, t, d, theta), low), high)
    square = v.sum(terms / (1.0 + theta * d).square())
    surplus = torch.where(outside, square, radius.square()).sqrt() / radius - 1.0
    return torch.where(outside, theta + surplus * _pace(v, t, d, theta), 0.0)


def _pace(v: Vectors, t: Tensor, d: Tensor, theta: Tensor) -> Tensor:
    stretch = 1.0 + theta * d
    shrunk = t / stretch.square()
    slope = v.sum(shrunk * (d / stretch))
    return v.sum(shrunk) / torch.where(slope > 0, slope, 1.0)
