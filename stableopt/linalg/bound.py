"""Enclosures of real numbers, rounded outwards, that know whether they are proved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

__all__ = ["Bound", "Real", "lower", "round_down", "round_up", "upper"]


def round_up(exact: Fraction | float) -> float:
    """Return the smallest float that is not below ``exact``.

    Args:
        exact: any rational number; infinities pass through.

    Examples:
        >>> round_up(Fraction(1, 3)) > Fraction(1, 3)
        True
        >>> round_up(Fraction(1, 4))
        0.25
    """
    if isinstance(exact, float):
        return exact
    try:
        nearest = float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -_LARGEST
    if nearest in (math.inf, -math.inf):  # cannot happen for a Fraction in CPython; kept for other implementations
        return math.inf if exact > 0 else -_LARGEST
    return nearest if Fraction(nearest) >= exact else math.nextafter(nearest, math.inf)


def round_down(exact: Fraction | float) -> float:
    """Return the largest float that is not above ``exact``.

    Args:
        exact: any rational number; infinities pass through.

    Examples:
        >>> round_down(Fraction(1, 3)) < Fraction(1, 3)
        True
    """
    return -round_up(-exact)


_LARGEST = math.nextafter(math.inf, 0.0)


@dataclass(frozen=True, slots=True)
class Bound:
    r"""An enclosure :math:`\text{lower} \le x \le \text{upper}` of a real number :math:`x`.

    Sums, differences, products, quotients and roots of enclosures enclose the sums, differences, … of the numbers: every
    end is computed exactly and then rounded outwards to the next float, so ``1 * 1`` stays exactly 1 and nothing is lost
    where the arithmetic is exact. A result is *proved* only if every operand is.

    Args:
        lower: a float not above the number.
        upper: a float not below the number.
        proved: True if the enclosure follows from a proof that counts all rounding; False for an estimate.

    Raises:
        ValueError: if an end is NaN, or ``lower > upper``.

    Note:
        Plain ints and floats mix with enclosures as the exact, proved points that they are.

    Examples:
        >>> Bound(1.0, 2.0) * 3.0
        Bound(lower=3.0, upper=6.0, proved=True)
        >>> third = Bound.point(1.0) / 3.0
        >>> third.lower < third.upper and Fraction(1, 3) in third
        True
        >>> (Bound(0.0, 1.0) + Bound.estimate(0.5)).proved
        False
    """

    lower: float
    upper: float
    proved: bool = True

    def __post_init__(self) -> None:
        """Refuse an empty or undefined enclosure."""
        if not self.lower <= self.upper:
            raise ValueError(f"a Bound needs lower <= upper, got lower={self.lower!r} and upper={self.upper!r}.")

    @classmethod
    def point(cls, value: float) -> Bound:
        """Return the enclosure of a number that is exactly the float ``value``.

        Examples:
            >>> Bound.point(0.5)
            Bound(lower=0.5, upper=0.5, proved=True)
        """
        return cls(float(value), float(value), True)

    @classmethod
    def estimate(cls, value: float) -> Bound:
        """Return a point that is only an estimate, so that nothing computed from it counts as proved.

        Examples:
            >>> Bound.estimate(0.5).proved
            False
        """
        return cls(float(value), float(value), False)

    @property
    def width(self) -> float:
        """The distance of the ends, rounded up.

        Examples:
            >>> Bound(1.0, 3.0).width
            2.0
        """
        return (Bound.point(self.upper) - self.lower).upper

    def __contains__(self, value: float | Fraction) -> bool:
        return self.lower <= value <= self.upper

    def __add__(self, other: Real) -> Bound:
        o = _as_bound(other)
        return self._with(o, _add(self.lower, o.lower, up=False), _add(self.upper, o.upper, up=True))

    __radd__ = __add__

    def __neg__(self) -> Bound:
        return Bound(-self.upper, -self.lower, self.proved)

    def __sub__(self, other: Real) -> Bound:
        return self + (-_as_bound(other))

    def __rsub__(self, other: Real) -> Bound:
        return -self + other

    def __mul__(self, other: Real) -> Bound:
        o = _as_bound(other)
        pairs = [(a, b) for a in (self.lower, self.upper) for b in (o.lower, o.upper)]
        return self._with(o, min(_mul(a, b, up=False) for a, b in pairs), max(_mul(a, b, up=True) for a, b in pairs))

    __rmul__ = __mul__

    def __truediv__(self, other: Real) -> Bound:
        return self * _as_bound(other).reciprocal()

    def __rtruediv__(self, other: Real) -> Bound:
        return self.reciprocal() * other

    def __pow__(self, exponent: int) -> Bound:
        if not isinstance(exponent, int) or exponent < 0:
            raise ValueError(f"a Bound can be raised to an integer >= 0, got {exponent!r}; use sqrt() for a root.")
        result, base = Bound.point(1.0), abs(self) if exponent % 2 == 0 else self
        for _ in range(exponent):
            result = result * base
        return result

    def __abs__(self) -> Bound:
        if self.lower >= 0:
            return self
        if self.upper <= 0:
            return -self
        return Bound(0.0, max(-self.lower, self.upper), self.proved)

    def reciprocal(self) -> Bound:
        """Return the enclosure of ``1 / x``.

        Raises:
            ZeroDivisionError: if the enclosure contains zero.

        Examples:
            >>> Bound(2.0, 4.0).reciprocal()
            Bound(lower=0.25, upper=0.5, proved=True)
        """
        if self.lower <= 0.0 <= self.upper:
            raise ZeroDivisionError(f"cannot divide by {self}: it contains zero.")
        return Bound(_reciprocal(self.upper, up=False), _reciprocal(self.lower, up=True), self.proved)

    def sqrt(self) -> Bound:
        """Return the enclosure of the square root.

        Raises:
            ValueError: if the number may be negative.

        Examples:
            >>> Bound(4.0, 9.0).sqrt()
            Bound(lower=2.0, upper=3.0, proved=True)
        """
        if self.lower < 0:
            raise ValueError(f"the square root needs a number >= 0, got {self}.")
        return Bound(_sqrt(self.lower, up=False), _sqrt(self.upper, up=True), self.proved)

    def join(self, other: Real) -> Bound:
        """Return the enclosure of ``max(x, y)``.

        Examples:
            >>> Bound(0.0, 2.0).join(1.0)
            Bound(lower=1.0, upper=2.0, proved=True)
        """
        o = _as_bound(other)
        return self._with(o, max(self.lower, o.lower), max(self.upper, o.upper))

    def _with(self, other: Bound, low: float, high: float) -> Bound:
        return Bound(low, high, self.proved and other.proved)


Real: TypeAlias = float | int | Bound
"""A number that a law of the theory takes: a float (exact) or an enclosure."""


def upper(x: Real) -> float:
    """Return the upper end of an enclosure, or the number itself.

    Examples:
        >>> upper(Bound(1.0, 2.0)), upper(3)
        (2.0, 3.0)
    """
    return x.upper if isinstance(x, Bound) else float(x)


def lower(x: Real) -> float:
    """Return the lower end of an enclosure, or the number itself.

    Examples:
        >>> lower(Bound(1.0, 2.0)), lower(3)
        (1.0, 3.0)
    """
    return x.lower if isinstance(x, Bound) else float(x)


def _as_bound(x: Real) -> Bound:
    return x if isinstance(x, Bound) else Bound.point(x)


def _add(a: float, b: float, *, up: bool) -> float:
    if math.isinf(a) or math.isinf(b):
        total = a + b
        return total if not math.isnan(total) else (math.inf if up else -math.inf)
    exact = Fraction(a) + Fraction(b)
    return round_up(exact) if up else round_down(exact)


def _mul(a: float, b: float, *, up: bool) -> float:
    if a == 0 or b == 0:  # 0 * inf is 0 here: the ends are bounds of finite numbers
        return 0.0
    if math.isinf(a) or math.isinf(b):
        return a * b
    exact = Fraction(a) * Fraction(b)
    return round_up(exact) if up else round_down(exact)


def _reciprocal(a: float, *, up: bool) -> float:
    if math.isinf(a):
        return 0.0
    exact = 1 / Fraction(a)
    return round_up(exact) if up else round_down(exact)


def _sqrt(a: float, *, up: bool) -> float:
    if math.isinf(a) or a == 0:
        return a
    root = math.sqrt(a)
    if up:
        return root if Fraction(root) ** 2 >= Fraction(a) else math.nextafter(root, math.inf)
    return root if Fraction(root) ** 2 <= Fraction(a) else math.nextafter(root, 0.0)
