r"""Half-spaces, hyperplanes and the second-order cone, with feasibility decided for the stored numbers.

**An inner product with its error.** With the normal :math:`a` scaled by a power of two to size about 1, and the products
:math:`a_i x_i` scaled down where they are large, the sums :math:`c` of the :math:`n` products and :math:`T` of their moduli, taken
in any order, satisfy

.. math:: |\langle a, x\rangle - c| \le E := \delta\, T + 2^{-1074} m, \qquad \delta = (n + 8)\, 2^{-52},

where :math:`m` counts the products that came out below the normal range, unless a factor is 0. A vector is in the half-space when
:math:`c + E \le b`, and on the hyperplane when :math:`|c - b| + E` is within the tolerance of :class:`Hyperplane`.

**Rounding into a half-space.** The projection in the metric :math:`P` is :math:`u = x - t\, a / P`. Its step :math:`t` is
computed with a margin of :math:`8 \delta (T + |b|)`, more than the roundings of :math:`u` and the error of the test can eat, and
each entry is cast to the dtype in the direction that lowers :math:`\langle a, u\rangle`. The result passes the test; where it
does not, because an entry left the range of the dtype, a fixed feasible vector takes its place.

**Rounding into the cone.** The vector :math:`x` is cast toward zero, with the bound of its norm of
:mod:`stableopt.constraints.balls`, and :math:`t` upwards.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_dims, check_number, check_numbers
from stableopt.constraints.kinds import VectorSet
from stableopt.constraints.layout import Vectors, weight_rows
from stableopt.constraints.rounding import toward_zero, unit_scale
from stableopt.errors import InfeasibleError

__all__ = ["HalfSpace", "Hyperplane", "SecondOrderCone"]

_LEAST_NORMAL = 2.0**-200  # relative to the largest entry
_LEAST_METRIC = 2.0**-60  # relative to the largest of a vector; smaller entries count as this
_SMALLEST_NORMAL = 2.0**-1022
_SMALLEST = 2.0**-1074


class _Affine(VectorSet):
    """What a half-space and a hyperplane share: the inner product with its error, and the shift along the normal."""

    normal: tuple[float, ...]
    offset: float

    def __post_init__(self) -> None:
        """Check the arguments."""
        name = type(self).__name__
        normal = check_numbers(name, "normal", self.normal)
        sizes = [abs(a) for a in normal if a != 0.0]
        if not sizes or min(sizes) < max(sizes) * _LEAST_NORMAL:
            raise ValueError(
                f"{name} needs a normal that is not 0, of which no entry is nonzero but below {_LEAST_NORMAL:.0e} times another, "
                f"got {normal!r}; write such entries as 0."
            )
        object.__setattr__(self, "normal", normal)
        object.__setattr__(self, "offset", check_number(name, "offset", self.offset))
        object.__setattr__(self, "dims", check_dims(name, self.dims))

    @property
    def diagonal(self) -> bool:
        """Whether the projection in a diagonal metric is exact: it is."""
        return True

    @property
    def _unit(self) -> float:
        """Half of the power of two by which normal and offset are divided."""
        return _shrunk(self.normal, self.offset)[2]

    def _scaled(self, v: Vectors) -> tuple[Tensor, float]:
        """Return normal and offset, divided by the same power of two."""
        normal, offset, _ = _shrunk(self.normal, self.offset)
        return weight_rows(type(self).__name__, "normal entries", v, normal), offset

    def _inner(self, v: Vectors, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c, T and the scale s <= 1 with which the inner product is c / s up to the error E / s."""
        products = a * x
        scale = unit_scale(v.max(products.detach().abs()).clamp_min(1.0))
        products = products * scale
        return v.sum(products), v.sum(products.detach().abs()), scale

    def _error(self, v: Vectors, a: Tensor, x: Tensor, size: Tensor) -> Tensor:
        below = ((a * x).abs() < _SMALLEST_NORMAL) & (x != 0) & (a != 0)
        return _delta(v) * size + v.sum(below.double()) * _SMALLEST

    def _center(self, v: Vectors, a: Tensor, b: float) -> Tensor:
        """Return the boundary point nearest to 0; refuse a set that does not reach into the range of the dtype there."""
        if 2.0 * _reach(self.normal, self.offset) > torch.finfo(v.stored.dtype).max:
            raise InfeasibleError(
                f"{self!r} is farther from 0 than half of the range of {v.stored.dtype}; scale it, or use a wider dtype."
            )
        return (a * (b / v.sum(a.square() * torch.ones_like(v.data)))).expand(v.data.shape)

    def _metric(self, v: Vectors, metric: Tensor | None) -> Tensor:
        ones = torch.ones_like(v.data[:, :1]).detach()
        return ones if metric is None else (metric / v.max(metric)).clamp_min(_LEAST_METRIC)


@dataclass(frozen=True)
class HalfSpace(_Affine):
    r"""The half-space :math:`\{u : \langle a, u\rangle \le b\}`.

    The projection in the metric :math:`P` is :math:`u = x - t\, a / P` with :math:`t = \max(\langle a, x\rangle - b,\ 0) / \sum_i
    a_i^2 / P_i`.

    Args:
        normal: :math:`a`, one finite number per entry of a vector in the order of ``dims``, not all 0.
        offset: :math:`b`, finite.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is not finite, the normal is 0, or an entry of it is nonzero but :math:`2^{200}` times smaller than
            another.

    Note:
        Every stored result satisfies the inequality exactly, as real numbers. A vector closer to the boundary than
        :math:`(n + 8) 2^{-52} \sum_i |a_i x_i|` may count as outside although it is not; a projected one stops short of the
        boundary by at most nine times :math:`(n + 8) 2^{-52} (\sum_i |a_i x_i| + |b|)`, plus one unit in the last place of each
        entry. Entries with :math:`a_i = 0` keep their value. A vector whose nearest point is not in the range of the dtype goes
        to 0, or to the point nearest to 0 if 0 is outside. Infinite entries become NaN. The derivative on the boundary is that
        of the inside. Metrics that span more than 60 binary orders are cut off there. A DTensor needs sums over the processes,
        no gathering. If the half-space is farther from 0 than half of the range of the dtype, projecting raises
        :class:`stableopt.errors.InfeasibleError`.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.2.3.

    Examples:
        >>> HalfSpace((1.0, 1.0), 2.0).project(torch.tensor([3.0, 2.0])).round(decimals=4)
        tensor([1.5000, 0.5000])
        >>> HalfSpace((1.0, 1.0), 2.0).violation(torch.tensor([3.0, 1.0]))
        2.0...
    """

    normal: tuple[float, ...]
    offset: float
    dims: int | tuple[int, ...] | None = None

    def _excess(self, v: Vectors) -> Tensor:
        return self._beyond(v, v.data.detach())

    def _beyond(self, v: Vectors, x: Tensor) -> Tensor:
        a, b = self._scaled(v)
        c, size, scale = self._inner(v, a, x)
        gap = c + self._error(v, a, x, size) - b * scale
        excess = gap / scale * self._unit * 2.0
        return torch.where(gap <= 0, 0.0, torch.where(excess <= 0, math.ulp(0.0), excess))

    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        a, b = self._scaled(v)
        c, size, scale = self._inner(v, a, v.data)
        margin = 8.0 * self._error(v, a, v.data.detach(), size + abs(b) * scale)
        direction = a / self._metric(v, metric)
        shift = direction * ((c + margin - b * scale).clamp_min(0.0) / v.sum(a * direction))
        return torch.where(a != 0, v.data - shift / scale, v.data)

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        a, b = self._scaled(v)
        inner = _toward(nearest, -a, v.stored.dtype)
        proved = self._beyond(v, inner.double()) <= 0
        least = torch.zeros_like(nearest) if b >= 0 else self._center(v, a, b * (1.0 + 16.0 * _delta(v)))
        return torch.where(proved, inner, _toward(least, -a, v.stored.dtype))


@dataclass(frozen=True)
class Hyperplane(_Affine):
    r"""The hyperplane :math:`\{u : \langle a, u\rangle = b\}`, up to the rounding of the stored numbers.

    The projection in the metric :math:`P` is :math:`u = x - t\, a / P` with :math:`t = (\langle a, x\rangle - b) / \sum_i a_i^2 /
    P_i`. A stored vector of :math:`n` entries counts as feasible when it is proved that

    .. math:: |\langle a, u\rangle - b| \le (\epsilon + (n + 8)\, 2^{-46}) \Bigl(\sum_i |a_i u_i| + |b|\Bigr) + \sigma \sum_i |a_i|,

    where :math:`\epsilon` is the spacing of the dtype at 1 and :math:`\sigma` its smallest positive number. Every projection does.

    Args:
        normal: :math:`a`, one finite number per entry of a vector in the order of ``dims``, not all 0.
        offset: :math:`b`, finite.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is not finite, the normal is 0, or an entry of it is nonzero but :math:`2^{200}` times smaller than
            another.

    Note:
        A vector that has no such neighbor (its nearest point leaves the range of the dtype, or is lost in the rounding of the
        vector) goes to the point of the hyperplane nearest to 0. Infinite entries become NaN. Metrics that span more than 60
        binary orders are cut off there. A DTensor needs sums over the processes, no gathering. If the hyperplane is farther from
        0 than half of the range of the dtype, projecting raises :class:`stableopt.errors.InfeasibleError`.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.2.2.

    Examples:
        >>> Hyperplane((1.0, 1.0), 2.0).project(torch.tensor([3.0, 1.0]))
        tensor([2., 0.])
        >>> Hyperplane((1.0, 1.0), 2.0).violation(torch.tensor([3.0, 1.0])).__round__(3)
        2.0
    """

    normal: tuple[float, ...]
    offset: float
    dims: int | tuple[int, ...] | None = None

    def _excess(self, v: Vectors) -> Tensor:
        return self._beyond(v, v.data.detach())

    def _beyond(self, v: Vectors, x: Tensor) -> Tensor:
        info = torch.finfo(v.stored.dtype)
        a, b = self._scaled(v)
        c, size, scale = self._inner(v, a, x)
        smallest = info.smallest_normal * info.eps * v.sum(a.abs() * torch.ones_like(x)) * scale
        tolerance = (info.eps + 63.0 * _delta(v)) * (size + abs(b) * scale) + smallest
        # The last terms are the rounding of b and of this line.
        error = self._error(v, a, x, size) + _delta(v) * abs(b) * scale
        gap = (c - b * scale).abs() + error - tolerance
        excess = gap / scale * self._unit * 2.0
        return torch.where(gap <= 0, 0.0, torch.where(excess <= 0, math.ulp(0.0), excess))

    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        a, b = self._scaled(v)
        direction = a / self._metric(v, metric)
        total = v.sum(a * direction)
        u = v.data
        for _ in range(
            3
        ):  # the second removes the rounding of the first, which is relative to x, the third that of the second
            c, _, scale = self._inner(v, a, u)
            u = torch.where(a != 0, u - direction * ((c - b * scale) / total) / scale, u)
        return u

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        a, b = self._scaled(v)
        near = nearest.to(v.stored.dtype)
        proved = near.isfinite() & (self._beyond(v, near.double()) <= 0)
        proved = v.sum((~proved).double()) == 0
        return torch.where(proved, near, self._center(v, a, b).to(v.stored.dtype))


@dataclass(frozen=True)
class SecondOrderCone(VectorSet):
    r"""The second-order cone :math:`\{(x, t) : \|x\|_2 \le t\}`, where :math:`t` is the last entry of a vector.

    The projection of a point outside is 0 if :math:`\|x\| \le -t`, else :math:`\tfrac12 (\|x\| + t)\,(x / \|x\|,\ 1)`.

    Args:
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if ``dims`` has the wrong type.
        ValueError: if it names a dimension twice.

    Note:
        Feasibility is decided by an upper bound of :math:`\|x\|` that counts all rounding: a vector of :math:`n` entries within the
        relative distance :math:`(n + 8) 2^{-52}` of the boundary may count as outside although it is not. The norm of a result
        stops short of its :math:`t` by at most seven times that, plus one unit in the last place of each entry. If the nearest
        :math:`t` is not in the range of the dtype, it becomes the largest number, and :math:`x` is shortened to it. Entries of
        :math:`x` for which the norm is below :math:`2^{-900}` may become 0. Infinite entries become NaN. The derivative on the
        boundary is that of the inside, and inside the polar cone it is 0. A DTensor is gathered.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.3.2.

    Examples:
        >>> SecondOrderCone().project(torch.tensor([3.0, 4.0, 1.0])).round(decimals=4)
        tensor([1.8000, 2.4000, 3.0000])
        >>> (
        ...     SecondOrderCone().violation(torch.tensor([3.0, 4.0, 5.5])),
        ...     SecondOrderCone().violation(torch.tensor([3.0, 4.0, 1.0])),
        ... )
        (0.0, 4.0...)
    """

    needs_whole: ClassVar[bool] = True
    dims: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the dimensions."""
        object.__setattr__(self, "dims", check_dims("SecondOrderCone", self.dims))

    def _excess(self, v: Vectors) -> Tensor:
        return self._beyond(v, v.data.detach())

    def _beyond(self, v: Vectors, rows: Tensor) -> Tensor:
        scale = unit_scale(rows.abs().amax(1, keepdim=True))
        unit = rows * scale
        gap = unit[:, :-1].square().sum(1, keepdim=True).sqrt() * (1.0 + _delta(v)) - unit[:, -1:]
        excess = gap / scale
        return torch.where(gap <= 0, 0.0, torch.where(excess <= 0, math.ulp(0.0), excess))

    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        scale = unit_scale(v.data.detach().abs().amax(1, keepdim=True))
        unit = v.data * scale
        x, t = unit[:, :-1], unit[:, -1:]
        square = x.square().sum(1, keepdim=True)
        # Where x is 0 or (x, t) is in the polar cone, the length is replaced by 1: no 0/0 reaches the derivative.
        moves = (square > 0) & (square.sqrt() > -t)
        length = torch.where(moves, square, 1.0).sqrt()
        top = (length + t) / 2.0
        # What is larger than the dtype can hold is shortened.
        most = torch.finfo(v.stored.dtype).max * scale
        top = torch.where(top > most, most, top)
        nearest = torch.cat([x * (top / length), top], dim=1) / scale
        return torch.where(moves, nearest, 0.0)

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        shorter = nearest[:, :-1] * (1.0 - 5.0 * _delta(v))
        x, t = (
            toward_zero(shorter, v.stored.dtype),
            _toward(nearest[:, -1:], torch.ones_like(nearest[:, -1:]), v.stored.dtype),
        )
        proved = self._beyond(v, torch.cat([x, t], dim=1).double()) <= 0
        return torch.cat([torch.where(proved, x, torch.zeros_like(x)), t], dim=1)


def _delta(v: Vectors) -> float:
    return (v.size + 8) * 2.0**-52


@functools.lru_cache(maxsize=64)
def _shrunk(normal: tuple[float, ...], offset: float) -> tuple[tuple[float, ...], float, float]:
    """Return both divided by the power of two next to the largest entry, which makes it less than 1, and half of that power.

    An offset that is not representable then is rounded down, in the end to infinity.
    """
    k = math.frexp(max(map(abs, normal)))[1]
    exact = Fraction(offset) / Fraction(2) ** k
    if abs(exact) > Fraction(sys.float_info.max):
        shrunk = math.copysign(math.inf, offset)
    else:
        shrunk = float(exact)
        shrunk = math.nextafter(shrunk, -math.inf) if Fraction(shrunk) > exact else shrunk
    return tuple(math.ldexp(a, -k) for a in normal), shrunk, 2.0 ** (k - 1)


@functools.lru_cache(maxsize=64)
def _reach(normal: tuple[float, ...], offset: float) -> float:
    """Return the largest entry of the boundary point nearest to 0."""
    numbers = [Fraction(n) for n in normal]
    reach = abs(Fraction(offset)) * max(map(abs, numbers)) / sum(n * n for n in numbers)
    return float(reach) if reach < Fraction(sys.float_info.max) else math.inf


def _toward(x: Tensor, direction: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast float64 numbers, upwards where the direction is positive, downwards where it is negative, but into the finite range."""
    inner = toward_zero(x, dtype)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[inner.element_size()]
    outer = (inner.view(bits) + 1).view(dtype)
    away = (x * torch.sign(direction) > 0) & (inner.double().abs() < x.abs())
    return torch.where(away, outer, inner).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
