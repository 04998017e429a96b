r"""Boxes and balls, with feasibility decided for the stored numbers.

**Boxes** are exact: a bound that the dtype cannot represent is replaced by the next number *inside*, and entries are compared.

**The Euclidean ball** needs the norm of the stored numbers, which float64 computes only up to rounding. With the entries
scaled by a power of two to size about 1 and summed in any order, the computed :math:`S` of :math:`n` squares satisfies
:math:`\|x\|^2 \le S (1 + \gamma_{n+1})`, hence

.. math:: \|x\| \le U(x) := \sqrt{S}\,(1 + \delta), \qquad \delta = (n + 8)\, 2^{-53},

with room for the roundings of the root and the product. A point counts as feasible when :math:`U(x) \le r`. Any other point becomes
:math:`p = x \cdot s` with :math:`s = r / (U(x)(1 + 4\delta))`, cast toward zero. Then :math:`\|p\| \le s\|x\|` and
:math:`U(p) \le (1 + 2\delta)\|p\| < r`: the result is feasible by the same test, so projecting again changes no bit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_number, check_tensor
from stableopt.constraints.base import Constraint
from stableopt.constraints.layout import substitute
from stableopt.constraints.rounding import round_down_to, round_up_to, toward_zero, unit_scale
from stableopt.errors import InfeasibleError

__all__ = ["Box", "L2Ball", "LinfBall", "NonNegative"]

_SAFE_RADIUS = 2.0**-900  # below it the quotients of L2Ball may be subnormal, and its margins lost


class _Interval(Constraint):
    """The tensors whose entries all lie in one closed interval."""

    separable: ClassVar[bool] = True

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The ends of the interval."""

    def project(self, x: Tensor) -> Tensor:
        """Return ``x`` with each entry moved to the interval; entries inside keep their bits, also -0.0.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.
            InfeasibleError: if the dtype of ``x`` has no number in the interval.
        """
        check_tensor(type(self).__name__, x)
        low, high = self._stored_bounds(x.dtype)
        return torch.where(x < low, low, torch.where(x > high, high, x))

    def violation(self, x: Tensor) -> float:
        """Return the largest distance of an entry from the interval; infinite for NaN.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.
        """
        check_tensor(type(self).__name__, x)
        if x.numel() == 0:
            return 0.0
        low, high = self.bounds
        entry = x.detach().double()
        excess = torch.where(entry < low, low - entry, torch.where(entry > high, entry - high, 0.0))
        return float(torch.where(entry.isnan(), math.inf, excess).max())

    def _stored_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        low, high = self.bounds
        inner = round_up_to(low, dtype), round_down_to(high, dtype)
        if inner[0] > inner[1] or inner[0] == math.inf or inner[1] == -math.inf:
            raise InfeasibleError(
                f"{self!r} contains no number of {dtype}: the nearest inside would be {inner[0]!r} to {inner[1]!r}. "
                "Widen the interval, or store the tensor in a finer dtype."
            )
        return inner


@dataclass(frozen=True)
class Box(_Interval):
    r"""The box :math:`\{x : l \le x_i \le u\}`; projection :math:`\min(\max(x_i, l), u)`.

    Args:
        lower: :math:`l`, a number or :math:`-\infty`.
        upper: :math:`u \ge l`, a number or :math:`\infty`.

    Raises:
        TypeError: if a bound is not a real number.
        ValueError: if a bound is NaN, ``lower > upper``, or the box holds no finite number.

    Note:
        Where a bound is not a number of the dtype, the entries stop at the next one inside: ``Box(0.0, 0.1)`` ends at 0.09998 in
        float16. On an open side an infinite entry stays. The derivative at a bound is 1.

    Examples:
        >>> Box(-1.0, 2.0).project(torch.tensor([-3.0, 0.5, 7.0]))
        tensor([-1.0000,  0.5000,  2.0000])
        >>> Box(-1.0, 2.0).violation(torch.tensor([-3.0, 0.5, 7.0]))
        5.0
    """

    lower: float
    upper: float

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name in ("lower", "upper"):
            object.__setattr__(self, name, check_number("Box", name, getattr(self, name), finite=False))
        if self.lower > self.upper or self.lower == math.inf or self.upper == -math.inf:
            raise ValueError(
                f"Box needs lower <= upper and a finite number between, got {self.lower!r} and {self.upper!r}."
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of the interval.

        Examples:
            >>> Box(0, 1).bounds
            (0.0, 1.0)
        """
        return self.lower, self.upper


@dataclass(frozen=True)
class NonNegative(_Interval):
    r"""The orthant :math:`\{x : x_i \ge 0\}`; projection :math:`\max(x_i, 0)`.

    Note:
        -0.0 and infinity are feasible and keep their bits.

    Examples:
        >>> NonNegative().project(torch.tensor([-3.0, 0.5]))
        tensor([0.0000, 0.5000])
    """

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of the interval.

        Examples:
            >>> NonNegative().bounds
            (0.0, inf)
        """
        return 0.0, math.inf


@dataclass(frozen=True)
class LinfBall(_Interval):
    r"""The ball :math:`\{x : \max_i |x_i| \le r\}` of the maximum norm; projection: clip each entry to :math:`[-r, r]`.

    Args:
        radius: :math:`r`, finite, :math:`\ge 0`.

    Raises:
        TypeError: if the radius is not a real number.
        ValueError: if it is negative or not finite.

    Examples:
        >>> LinfBall(1.0).project(torch.tensor([-3.0, 0.5]))
        tensor([-1.0000,  0.5000])
    """

    radius: float

    def __post_init__(self) -> None:
        """Check the radius."""
        object.__setattr__(self, "radius", check_number("LinfBall", "radius", self.radius, low=0.0))

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of the interval.

        Examples:
            >>> LinfBall(2).bounds
            (-2.0, 2.0)
        """
        return -self.radius, self.radius


@dataclass(frozen=True)
class L2Ball(Constraint):
    r"""The Euclidean ball :math:`\{x : \|x\|_2 \le r\}` of all entries; projection :math:`x \min(1, r / \|x\|_2)`.

    Args:
        radius: :math:`r`, finite, :math:`\ge 0`.

    Raises:
        TypeError: if the radius is not a real number.
        ValueError: if it is negative or not finite.

    Note:
        Feasibility is decided by an upper bound of the norm that counts all rounding (see the module). A point of :math:`n`
        entries within the relative distance :math:`2(n + 8) 2^{-53}` of the sphere may therefore count as outside, although it
        is not, and is moved inwards; a projected point stops short of the sphere by at most five times that, plus one unit in
        the last place of its dtype. A radius below :math:`2^{-900}` may send a point to the origin. Infinite entries become NaN.
        The derivative at the sphere is that of the inside. Computed in float64 on the device of ``x``, without waiting for it.

    Examples:
        >>> L2Ball(1.0).project(torch.tensor([3.0, 4.0], dtype=torch.float64))
        tensor([0.6000, 0.8000], dtype=torch.float64)
        >>> L2Ball(1.0).violation(torch.tensor([3.0, 4.0]))
        4.0...
    """

    radius: float

    def __post_init__(self) -> None:
        """Check the radius."""
        object.__setattr__(self, "radius", check_number("L2Ball", "radius", self.radius, low=0.0))

    def project(self, x: Tensor) -> Tensor:
        """Return ``x`` itself, or ``x`` shortened to the radius and rounded inwards.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.

        Examples:
            >>> L2Ball(5.0).project(torch.tensor([3.0, 3.0]))
            tensor([3., 3.])
        """
        check_tensor("L2Ball", x)
        if x.numel() == 0:
            return x
        unit, bound, radius = self._measure(x)
        outside = ~(bound <= radius)
        # Away from the sphere the length is replaced by 1, so that no 0/0 reaches the derivative.
        length = torch.where(outside, unit.square().sum(), 1.0).sqrt() * (1.0 + 5.0 * _delta(x))
        shortened = unit * (self.radius / length)
        inner = toward_zero(shortened, x.dtype)
        if self.radius < _SAFE_RADIUS:
            _, bound, radius = self._measure(inner)
            inner = torch.where(bound > radius, 0.0, inner)
        return torch.where(outside, substitute(shortened.to(x.dtype), inner), x)

    def violation(self, x: Tensor) -> float:
        """Return by how much the bound of the norm exceeds the radius; infinite for NaN and infinity.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.

        Examples:
            >>> L2Ball(5.0).violation(torch.tensor([3.0, 3.0]))
            0.0
        """
        check_tensor("L2Ball", x)
        if x.numel() == 0:
            return 0.0
        _, bound, radius = self._measure(x.detach())
        if bool(bound <= radius):
            return 0.0
        scale = unit_scale(x.detach().double().abs().amax())
        excess = float((bound - radius) / scale)
        return math.inf if math.isnan(excess) else max(excess, math.ulp(0.0))

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``x`` scaled to size about 1, an upper bound of its norm, and the radius on the same scale.

        The scaled radius is exact, or infinite, or so small that only zero is below it.
        """
        wide = x.double()
        scale = unit_scale(wide.detach().abs().amax())
        unit = wide * scale
        bound = unit.detach().square().sum().sqrt() * (1.0 + _delta(x))
        return unit, bound, self.radius * scale


def _delta(x: Tensor) -> float:
    return (x.numel() + 8) * 2.0**-53
