r"""Sets of tensors whose entries are bounded one by one, with feasibility decided for the stored numbers.

They are exact: a bound that the dtype cannot represent is replaced by the next number *inside*, and entries are compared. The
product of a radius and a weight is rounded down in rational arithmetic. The modulus of a complex number is the norm of two
reals, bounded as in :mod:`stableopt.constraints.balls`: :math:`|z| \le \sqrt{S}\,(1 + \delta)` with :math:`\delta = 10 \cdot
2^{-53}`.
"""

from __future__ import annotations

import functools
import math
import sys
from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import (
    check_dims,
    check_number,
    check_numbers,
    check_step,
    check_tensor,
    combined_step,
)
from stableopt.constraints.base import Constraint, Regularizer
from stableopt.constraints.layout import Vectors, substitute, weight_rows
from stableopt.constraints.rounding import round_down_to, round_up_to, toward_zero, unit_scale
from stableopt.constraints.sharding import Sharding, is_sharded
from stableopt.errors import InfeasibleError

__all__ = ["Box", "LinfBall", "NonNegative"]

_DELTA = 10 * 2.0**-53  # of the norm of two numbers


class _Interval(Constraint):
    """The tensors whose entries all lie in one closed interval."""

    separable: ClassVar[bool] = True
    complex_too: ClassVar[bool] = False

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The ends of the interval."""

    def project(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return ``x`` with each entry moved to its interval; entries inside keep their bits, also -0.0.

        Args:
            x: any shape; never changed.
            metric: a tensor that broadcasts to ``x``; it has no influence, because each entry is projected alone.

        Raises:
            TypeError: if ``x`` or ``metric`` has the wrong type.
            ValueError: if the metric does not fit.
            InfeasibleError: if the dtype of ``x`` has no number in the interval.
        """
        name = type(self).__name__
        check_tensor(name, x, complex_too=self.complex_too)
        if metric is not None:
            check_step(name, metric, x, diagonal=True, called="metric")
        if not is_sharded(x):
            return self._project(x)
        layout = Sharding.of(name, x)  # pyright: ignore[reportArgumentType]
        return layout.wrap(self._project(x.to_local()))  # pyright: ignore[reportAttributeAccessIssue]

    def violation(self, x: Tensor) -> float:
        """Return the largest distance of an entry from its interval; infinite for NaN.

        Raises:
            TypeError: if ``x`` has the wrong type.
        """
        with torch.no_grad():
            v = Vectors(type(self).__name__, x, None, complex_too=self.complex_too)
            return v.worst(self._distances(v.data))

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the projection; step and metric are checked, then have no influence.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if ``step`` is negative, not finite, or a tensor that does not fit.
        """
        name = type(self).__name__
        check_tensor(name, x, complex_too=self.complex_too)
        combined_step(name, step, metric, x, diagonal=True)
        return self.project(x)

    def _project(self, x: Tensor) -> Tensor:
        low, high = self._stored_bounds(x.dtype)
        return torch.where(x < low, low, torch.where(x > high, high, x))

    def _distances(self, entries: Tensor) -> Tensor:
        """Return by how much entries in float64 are outside, NaN for NaN."""
        low, high = self.bounds
        excess = torch.where(entries < low, low - entries, torch.where(entries > high, entries - high, 0.0))
        return torch.where(entries.isnan(), entries, excess)

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

    def conjugate(self) -> Regularizer:
        """Return the indicator of the nonnegative numbers for the nonpositive ones, or the sum norm for a symmetric box.

        Raises:
            ValueError: for any other box.

        Examples:
            >>> Box(-math.inf, 0.0).conjugate(), Box(-2.0, 2.0).conjugate()
            (NonNegative(), L1(weight=2.0))
        """
        from stableopt.constraints.penalties import L1  # the penalties import the sets that are dual to them

        if (self.lower, self.upper) == (-math.inf, 0.0):
            return NonNegative()
        return L1(self.upper) if self.lower == -self.upper and self.upper < math.inf else super().conjugate()


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

    def conjugate(self) -> Regularizer:
        """Return the set of the nonpositive numbers.

        Examples:
            >>> NonNegative().conjugate()
            Box(lower=-inf, upper=0.0)
        """
        return Box(-math.inf, 0.0)


@dataclass(frozen=True)
class LinfBall(_Interval):
    r"""The ball :math:`\{x : |x_i| \le r w_i\}` of the maximum norm; projection: clip each modulus to :math:`r w_i`.

    Args:
        radius: :math:`r`, finite, :math:`\ge 0`.
        weights: :math:`w_i \ge 0`, one per entry of a vector in the order of ``dims``, finite; ``None`` for ones.
        dims: the dimensions along which the weights lie, an int or a tuple; ``None`` for all of them. No influence without weights.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the radius or a weight is negative or not finite.

    Note:
        Real entries are compared with the largest number of the dtype that is not above :math:`r w_i`, taken as a real product.
        A complex entry is feasible if an upper bound of its modulus, which counts all rounding, is at most that product; it then
        keeps its bits. Otherwise it is shortened, and stops short of the circle by at most :math:`10^{-14} r w_i` plus one unit
        in the last place of each part. A radius below :math:`2^{-900}` may send complex entries to 0, and infinite complex
        entries become NaN. The derivative on the boundary is that of the inside.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.2.4.

    Examples:
        >>> LinfBall(1.0).project(torch.tensor([-3.0, 0.5]))
        tensor([-1.0000,  0.5000])
        >>> LinfBall(0.5, weights=(1.0, 4.0), dims=1).project(torch.tensor([[3.0, 3.0], [0.25, -9.0]]))
        tensor([[ 0.5000,  2.0000],
                [ 0.2500, -2.0000]])
    """

    complex_too: ClassVar[bool] = True
    radius: float
    weights: tuple[float, ...] | None = None
    dims: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "radius", check_number("LinfBall", "radius", self.radius, low=0.0))
        if self.weights is not None:
            object.__setattr__(self, "weights", check_numbers("LinfBall", "weights", self.weights, low=0.0))
        object.__setattr__(self, "dims", check_dims("LinfBall", self.dims))

    def __repr__(self) -> str:
        """Return the constructor call, without the arguments that are not used."""
        rest = "" if self.weights is None else f", weights={self.weights!r}"
        return f"LinfBall(radius={self.radius!r}{rest}{'' if self.dims is None else f', dims={self.dims!r}'})"

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of an interval that holds every real entry; without weights, of the interval of each.

        Examples:
            >>> LinfBall(2).bounds
            (-2.0, 2.0)
        """
        widest = self.radius if self.weights is None else max(_products(self.radius, self.weights))
        return -widest, widest

    def conjugate(self) -> Regularizer:
        """Return the sum norm with the radius as weight.

        Raises:
            ValueError: if there are weights.

        Examples:
            >>> LinfBall(2.0).conjugate()
            L1(weight=2.0)
        """
        from stableopt.constraints.penalties import L1  # the penalties import the sets that are dual to them

        return L1(self.radius) if self.weights is None else super().conjugate()

    def project(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return ``x`` with each modulus clipped; entries inside keep their bits, also -0.0.

        Args:
            x: any shape that has ``dims``; real or complex; never changed.
            metric: a tensor that broadcasts to ``x``; it has no influence, because each entry is projected alone.

        Raises:
            TypeError: if ``x`` or ``metric`` has the wrong type.
            ValueError: if ``x`` lacks one of ``dims``, there are not as many weights as entries, or the metric does not fit.
        """
        if self.weights is None:
            return super().project(x, metric)
        v = Vectors("LinfBall", x, self.dims, complex_too=True)
        if metric is not None:
            check_step("LinfBall", metric, x, diagonal=True, called="metric")
        if x.is_complex():
            return v.fold(_shortened(v.stored, self._limits(v, torch.float64)))
        high = self._limits(v, x.dtype).to(x.dtype)
        return v.fold(torch.where(v.stored < -high, -high, torch.where(v.stored > high, high, v.stored)))

    def violation(self, x: Tensor) -> float:
        """Return the largest distance of an entry from its interval or disk; infinite for NaN.

        Raises:
            TypeError: if ``x`` has the wrong type.
            ValueError: if ``x`` lacks one of ``dims``, or there are not as many weights as entries.
        """
        if self.weights is None:
            return super().violation(x)
        with torch.no_grad():
            v = Vectors("LinfBall", x, self.dims, complex_too=True)
            return v.worst(_beyond(v.data, self._limits(v, torch.float64)))

    def _project(self, x: Tensor) -> Tensor:
        return _shortened(x, self.radius) if x.is_complex() else super()._project(x)

    def _distances(self, entries: Tensor) -> Tensor:
        return _beyond(entries, self.radius)

    def _limits(self, v: Vectors, dtype: torch.dtype) -> Tensor:
        limits = _products(self.radius, self.weights or ())
        return weight_rows("LinfBall", "weights", v, tuple(round_down_to(b, dtype) for b in limits))


@functools.lru_cache(maxsize=64)
def _products(radius: float, weights: tuple[float, ...]) -> tuple[float, ...]:
    """Return the largest finite numbers that are not above the exact products."""
    return tuple(_below(Fraction(radius) * Fraction(w)) for w in weights)


def _below(exact: Fraction) -> float:
    if exact > Fraction(sys.float_info.max):
        return sys.float_info.max
    near = float(exact)
    return near if Fraction(near) <= exact else math.nextafter(near, -math.inf)


def _modulus_bound(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return real and imaginary parts of size about 1, upper bounds of their norms, and the scales, of complex128 numbers."""
    parts = torch.view_as_real(z.resolve_conj())
    scale = unit_scale(parts.abs().amax(-1, keepdim=True))
    unit = parts * scale
    return unit, (unit.detach().square().sum(-1, keepdim=True).sqrt() * (1.0 + _DELTA)), scale


def _shortened(x: Tensor, radius: float | Tensor) -> Tensor:
    """Return complex numbers with moduli of at most the radius, unchanged where that is proved already."""
    limit = radius.unsqueeze(-1) if isinstance(radius, Tensor) else radius
    unit, bound, scale = _modulus_bound(x.to(torch.complex128))
    outside = ~(bound <= limit * scale)
    # Inside, the length is replaced by 1, so that no 0/0 reaches the derivative.
    length = torch.where(outside, unit.square().sum(-1, keepdim=True), 1.0).sqrt() * (1.0 + 5.0 * _DELTA)
    smooth = torch.view_as_complex(unit * (limit / length))
    inner = toward_zero(smooth.detach(), x.dtype)
    _, bound, scale = _modulus_bound(inner.to(torch.complex128))
    inner = torch.where((bound > limit * scale).squeeze(-1), torch.zeros_like(inner), inner)
    finite = x.detach().isfinite()
    moved = torch.where(finite, substitute(smooth.to(x.dtype), inner), math.nan)
    return torch.where(outside.squeeze(-1), moved, x)


def _beyond(entries: Tensor, limit: float | Tensor) -> Tensor:
    """Return by how much the moduli of float64 or complex128 numbers exceed the limit: 0 only if they provably do not."""
    if not entries.is_complex():
        return (entries.abs() - limit).clamp_min(0.0)
    high = limit.unsqueeze(-1) if isinstance(limit, Tensor) else limit
    _, bound, scale = _modulus_bound(entries)
    excess = ((bound - high * scale) / scale).clamp_min(math.ulp(0.0))
    return torch.where(bound <= high * scale, 0.0, excess).squeeze(-1)
