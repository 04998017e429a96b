r"""Simplices, whose stored numbers have the exact sum, and what is dual to them: the maximum and the sum of the largest entries.

**Feasibility** is decided by integers: an entry must be a multiple of a power of two
(:func:`stableopt.constraints.apportion.grid_of`, about :math:`2^{-61}` of the total), and the integers must have the right sum.
**Rounding** to such numbers is :func:`stableopt.constraints.apportion.apportion`; the total and the cap are rounded down to the
dtype first, because a sum or a bound that is not a number of the dtype could not be reached. What comes out has the exact sum,
so the same test finds it feasible, and projecting again changes no bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.apportion import apportion, exactly_sums_to
from stableopt.constraints.arguments import check_dims, check_number
from stableopt.constraints.base import Regularizer
from stableopt.constraints.kinds import VectorPenalty, VectorSet
from stableopt.constraints.layout import Vectors
from stableopt.constraints.rounding import round_down_to
from stableopt.constraints.threshold import capped_level, soft_level
from stableopt.errors import InfeasibleError

__all__ = ["CappedSimplex", "Max", "Simplex", "SumLargest"]

_LEAST_STEP = 2.0**-60  # relative to the largest step of a vector; smaller ones count as this


class _FixedSum(VectorSet):
    """Nonnegative vectors with a fixed sum. The apportionment sorts, so a DTensor is gathered."""

    needs_whole: ClassVar[bool] = True
    total: float

    def project(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        r"""Return the nearest point of the set, in the norm :math:`\sum_i P_i u_i^2` if a metric is given, with the exact sum.

        Args:
            x: any shape that has ``dims``; never changed. A vector with NaN or infinity becomes NaN.
            metric: positive tensor that broadcasts to ``x``, if :attr:`diagonal`.

        Raises:
            TypeError: if ``x`` or ``metric`` has the wrong type.
            ValueError: if ``x`` lacks one of ``dims``, or the metric does not fit or is not supported.
            InfeasibleError: if no vector of that length and dtype is in the set.
        """
        self._refuse_no_entries(x)
        return super().project(x, metric)

    def violation(self, x: Tensor) -> float:
        """Return how far a sum is off or an entry outside its bounds, at most; 0.0 exactly if all vectors are proved feasible.

        Raises:
            TypeError: if ``x`` has the wrong type.
            ValueError: if ``x`` lacks one of ``dims``.
            InfeasibleError: if no vector of that length and dtype is in the set.
        """
        self._refuse_no_entries(x)
        return super().violation(x)

    def _refuse_no_entries(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and x.numel() == 0 and Vectors(type(self).__name__, x, self.dims).size == 0:
            raise InfeasibleError(f"{self!r} contains no vector without entries, got shape {tuple(x.shape)}.")

    def _stored_total(self, dtype: torch.dtype) -> float:
        total = round_down_to(self.total, dtype)
        if total == 0.0 or self.total > torch.finfo(dtype).max:
            raise InfeasibleError(
                f"{self!r} has a total outside the range of {dtype}; choose another one, or store the tensor in a wider dtype."
            )
        return total

    def _distance(self, v: Vectors, total: float, cap: float) -> Tensor:
        """Return how far each vector is outside, 0 only if it is proved feasible."""
        x = v.data.detach()
        outside = torch.maximum((v.sum(x) - total).abs(), torch.maximum(v.max(-x), v.max(x) - cap))
        proved = exactly_sums_to(v.stored, total) & (v.max(x) <= cap)
        return torch.where(proved, 0.0, outside.clamp_min(math.ulp(0.0)))


@dataclass(frozen=True)
class Simplex(_FixedSum):
    r"""The simplex :math:`\{u : u_i \ge 0,\ \sum_i u_i = T\}`, of which every stored vector has the exact sum.

    The projection in the metric :math:`P` is :math:`u_i = \max(x_i - \theta / P_i,\ 0)` with the one :math:`\theta` that makes
    the sum :math:`T`, rounded so that the sum of the stored numbers, taken as reals, is :math:`T` without any error.

    Args:
        total: :math:`T > 0`, finite. Where it is not a number of the dtype, it is rounded down to one.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the total is not positive and finite.

    Note:
        Each entry is within two units in its last place of the nearest point, plus its share of less than one unit of the
        largest entries; entries whose sum is less than that unit may become 0. (A sum that a floating-point loop takes of the
        result still rounds.) A vector that uses bits below :math:`2^{-61} T` counts as infeasible, whatever its sum. Zeros of
        the projection have the derivative 0. A DTensor is gathered. Metrics that span more than 60 binary orders are cut off
        there.

    References:
        Held, Wolfe and Crowder, *Validation of subgradient optimization*, 1974. Condat, *Fast projection onto the simplex and
        the l1 ball*, 2016.

    Examples:
        >>> Simplex().project(torch.tensor([0.5, 1.0, -2.0]))
        tensor([0.2500, 0.7500, 0.0000])
        >>> thirds = Simplex().project(torch.ones(3, dtype=torch.bfloat16))
        >>> sum(Fraction(a) for a in thirds.tolist()) == 1, Simplex().violation(thirds)
        (True, 0.0)
    """

    total: float = 1.0
    dims: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "total", check_number("Simplex", "total", self.total, low=0.0, strict=True))
        object.__setattr__(self, "dims", check_dims("Simplex", self.dims))

    @property
    def diagonal(self) -> bool:
        """Whether the projection in a diagonal metric is exact: it is.

        Examples:
            >>> Simplex().diagonal
            True
        """
        return True

    def conjugate(self) -> Regularizer:
        """Return the largest entry, times the total.

        Examples:
            >>> Simplex(2.0).conjugate()
            Max(weight=2.0, dims=None)
        """
        return Max(self.total, self.dims)

    def _excess(self, v: Vectors) -> Tensor:
        return self._distance(v, self._stored_total(v.stored.dtype), math.inf)

    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        total = self._stored_total(v.stored.dtype)
        if metric is None:
            return soft_level(v, v.data, None, total).above
        P = metric / v.max(metric)
        return soft_level(v, v.data * P, 1.0 / P, total).above / P

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        return apportion(nearest, self._stored_total(v.stored.dtype), v.stored.dtype)


@dataclass(frozen=True)
class CappedSimplex(_FixedSum):
    r"""The vectors with :math:`0 \le u_i \le c` and :math:`\sum_i u_i = T`, with the exact sum of the stored numbers.

    The projection is :math:`u_i = \min(\max(x_i - \theta, 0), c)`, with the :math:`\theta` that makes the sum :math:`T`.

    Args:
        total: :math:`T > 0`, finite. Where it is not a number of the dtype, it is rounded down to one.
        cap: :math:`c > 0`, finite. Where it is not a number of the dtype, it is rounded down to one.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is not positive and finite.

    Note:
        Projecting vectors of n entries raises :class:`stableopt.errors.InfeasibleError` if :math:`nc < T` in exact arithmetic,
        after both are rounded to the dtype: three entries of at most 0.333 do not reach 1. Rounding is that of
        :class:`Simplex`. The derivative at the kinks is that of the flat side. No metric. A DTensor is gathered.

    References:
        Wang and Lu, *Projection onto the capped simplex*, 2015.

    Examples:
        >>> CappedSimplex(2.0, 1.0).project(torch.tensor([3.0, 1.0, 1.5]))
        tensor([1.0000, 0.2500, 0.7500])
    """

    total: float
    cap: float
    dims: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("total", "cap"):
            value = check_number("CappedSimplex", name, getattr(self, name), low=0.0, strict=True)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "dims", check_dims("CappedSimplex", self.dims))

    def conjugate(self) -> Regularizer:
        r"""Return the sum of the :math:`T / c` largest entries, times c.

        Raises:
            ValueError: if :math:`T / c` is not an integer.

        Examples:
            >>> CappedSimplex(total=1.5, cap=0.5).conjugate()
            SumLargest(weight=0.5, k=3, dims=None)
        """
        count = Fraction(self.total) / Fraction(self.cap)
        return SumLargest(self.cap, int(count), self.dims) if count.denominator == 1 else super().conjugate()

    def _stored(self, v: Vectors) -> tuple[float, float, int]:
        """Return the total and the cap in the dtype, and how many full entries make the total, if such vectors exist."""
        total, cap = self._stored_total(v.stored.dtype), round_down_to(self.cap, v.stored.dtype)
        count = math.ceil(Fraction(total) / Fraction(cap)) if cap > 0 else v.size + 1
        if count > v.size:
            raise InfeasibleError(
                f"{self!r} contains no vector of {v.size} entries of {v.stored.dtype}: they sum to at most {v.size * cap!r}, "
                f"which is less than {total!r}. Raise the cap or lower the total."
            )
        return total, cap, count

    def _excess(self, v: Vectors) -> Tensor:
        total, cap, _ = self._stored(v)
        return self._distance(v, total, cap)

    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        total, cap, count = self._stored(v)
        return capped_level(v, v.data, cap, total, count).values

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        total, cap, _ = self._stored(v)
        return apportion(nearest, total, v.stored.dtype, cap)


@dataclass(frozen=True)
class Max(VectorPenalty):
    r"""The largest entry :math:`g(x) = \lambda \max_i x_i`, summed over all vectors along ``dims``.

    The prox cuts entries at one level, in any diagonal metric: :math:`u_i = \min(x_i, t)` with :math:`\sum_i \max(x_i - t, 0) /
    s_i = \lambda`.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the weight is negative or not finite.

    Note:
        The value may be negative; that of no entries is 0. Steps of one vector that span more than 60 binary orders are cut off
        there. A DTensor needs sums over the processes, no gathering.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.4.1.

    Examples:
        >>> Max(1.0).prox(torch.tensor([3.0, -2.0, 2.0]), step=2.0)
        tensor([ 1.5000, -2.0000,  1.5000])
    """

    weight: float
    dims: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "weight", check_number("Max", "weight", self.weight, low=0.0))
        object.__setattr__(self, "dims", check_dims("Max", self.dims))

    @property
    def diagonal(self) -> bool:
        """Whether the prox in a diagonal metric is exact: it is.

        Examples:
            >>> Max(1.0).diagonal
            True
        """
        return True

    def conjugate(self) -> Regularizer:
        """Return the simplex with the weight as total.

        Raises:
            ValueError: if the weight is 0.

        Examples:
            >>> Max(2.0).conjugate()
            Simplex(total=2.0, dims=None)
        """
        return Simplex(self.weight, self.dims) if self.weight > 0 else super().conjugate()

    def _value(self, v: Vectors) -> Tensor:
        return self.weight * v.max(v.data) if v.size else v.sum(v.data)

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        if step.numel() == 1:
            level = soft_level(v, v.data, None, self.weight * step)
        else:
            longest = v.max(step)
            ratio = torch.where(longest > 0, longest / step.clamp_min(longest * _LEAST_STEP), 1.0)
            level = soft_level(v, v.data, ratio, self.weight * longest)
        return torch.where(level.above > 0, level.theta, v.data)


@dataclass(frozen=True)
class SumLargest(VectorPenalty):
    r"""The sum of the k largest entries :math:`g(x) = \lambda \sum_{i \le k} x_{(i)}`, summed over all vectors along ``dims``.

    By Moreau's identity the prox subtracts the projection onto the capped simplex of total :math:`s \lambda k` and cap :math:`s
    \lambda`: the largest entries move by the cap, those around the level :math:`\theta` end on it, the others stay.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        k: how many entries, an int :math:`\ge 1`; each vector needs at least as many.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the weight is negative or not finite, or k is not positive.

    Note:
        The value may be negative. No metric. A DTensor is gathered. :class:`Max` is k = 1, faster and with a metric.

    References:
        Overton and Womersley, *Optimality conditions and duality theory for minimizing sums of the largest eigenvalues*, 1993
        (the function and its conjugate).

    Examples:
        >>> SumLargest(1.0, k=2).prox(torch.tensor([3.0, 1.0, 1.5]))
        tensor([2.0000, 0.7500, 0.7500])
        >>> SumLargest(2.0, k=2).value(torch.tensor([3.0, 1.0, 1.5])).item()
        9.0
    """

    weight: float
    k: int
    dims: int | tuple[int, ...] | None = None
    needs_whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "weight", check_number("SumLargest", "weight", self.weight, low=0.0))
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise TypeError(f"SumLargest needs an int as k, got {self.k!r} ({type(self.k).__name__}).")
        if self.k < 1:
            raise ValueError(f"SumLargest needs k >= 1, got {self.k}.")
        object.__setattr__(self, "dims", check_dims("SumLargest", self.dims))

    def conjugate(self) -> Regularizer:
        """Return the capped simplex with k times the weight as total and the weight as cap.

        Raises:
            ValueError: if the weight is 0.

        Examples:
            >>> SumLargest(0.5, k=3).conjugate()
            CappedSimplex(total=1.5, cap=0.5, dims=None)
        """
        total = self.k * self.weight
        if Fraction(total) > self.k * Fraction(self.weight):
            total = math.nextafter(total, 0.0)  # k entries at the cap must reach it
        return CappedSimplex(total, self.weight, self.dims) if self.weight > 0 else super().conjugate()

    def _value(self, v: Vectors) -> Tensor:
        self._check_length(v)
        return self.weight * v.data.topk(self.k, dim=1).values.sum(dim=1, keepdim=True)

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        self._check_length(v)
        cap = self.weight * step
        part = capped_level(v, v.data, cap, self.k * cap, self.k)
        moved = torch.where(part.full, v.data - cap, torch.where(part.between, part.theta, v.data))
        return torch.where(cap > 0, moved, v.data)

    def _check_length(self, v: Vectors) -> None:
        if v.size < self.k:
            raise ValueError(
                f"SumLargest needs vectors of at least k={self.k} entries, got {v.size} in shape {tuple(v.whole.shape)}; "
                "lower k, or choose other dims."
            )
