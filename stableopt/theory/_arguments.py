"""Checks of arguments, and the few operations that work on floats and enclosures alike."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from decimal import Context, Decimal
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopt.linalg.bound import Bound, Real, lower, round_down, round_up, upper

__all__ = [
    "Array",
    "exact_lower",
    "exact_upper",
    "finite",
    "fraction",
    "increasing",
    "joined",
    "limit",
    "listed",
    "matrices",
    "matrix",
    "nonnegative",
    "positive",
    "real_exp",
    "real_log",
    "real_sqrt",
    "vector",
]

Array = NDArray[np.float64]

_DIGITS = Context(prec=40, Emax=10**6, Emin=-(10**6))


def finite(name: str, x: Real) -> Real:
    """Return ``x`` if it is a finite number or a finite enclosure."""
    if isinstance(x, Bound):
        if math.isfinite(x.lower) and math.isfinite(x.upper):
            return x
    elif not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be a number or a Bound, got {type(x).__name__}.")
    elif math.isfinite(x):
        return float(x)
    raise ValueError(f"{name} must be finite, got {x!r}.")


def nonnegative(name: str, x: Real) -> Real:
    """Return ``x`` if it is finite and no part of it is negative."""
    if lower(finite(name, x)) < 0:
        raise ValueError(f"{name} must be >= 0, got {x!r}.")
    return finite(name, x)


def positive(name: str, x: Real) -> Real:
    """Return ``x`` if it is finite and all of it is positive."""
    if lower(finite(name, x)) <= 0:
        raise ValueError(f"{name} must be > 0, got {x!r}.")
    return finite(name, x)


def fraction(name: str, x: float, *, closed: bool = False) -> float:
    """Return ``x`` if it lies in [0, 1), or in [0, 1] when ``closed``."""
    value = finite(name, x)
    if isinstance(value, Bound):
        raise TypeError(f"{name} is a setting, exactly known: give a float, not {x!r}.")
    if value < 0 or value > 1 or (value == 1 and not closed):
        raise ValueError(f"{name} must lie in [0, 1{']' if closed else ')'}, got {x!r}.")
    return float(value)


def listed(name: str, xs: Iterable[Real], check: Callable[[str, Real], Real] = nonnegative) -> list[Real]:
    """Return the checked numbers of an iterable as a list; each complaint names the position."""
    return [check(f"{name}[{i}]", x) for i, x in enumerate(xs)]


def matrix(name: str, A: ArrayLike, *, square: bool = True) -> Array:
    """Return ``A`` as a finite float64 matrix."""
    M = np.asarray(A, dtype=np.float64)
    if M.ndim != 2 or (square and M.shape[0] != M.shape[1]):
        raise ValueError(f"{name} must be a {'square ' if square else ''}matrix, got shape {M.shape}.")
    if not np.isfinite(M).all():
        raise ValueError(f"{name} must be finite, but it holds NaN or infinity.")
    return M


def matrices(name: str, As: Iterable[ArrayLike]) -> list[Array]:
    """Return a non-empty list of square matrices of one size."""
    checked = [matrix(f"{name}[{i}]", A) for i, A in enumerate(As)]
    if not checked:
        raise ValueError(f"{name} must hold at least one matrix, got none.")
    if len({A.shape for A in checked}) > 1:
        raise ValueError(f"{name} must be matrices of one size, got {sorted({A.shape for A in checked})}.")
    return checked


def vector(name: str, x: ArrayLike) -> Array:
    """Return ``x`` as a finite, non-empty float64 vector."""
    v = np.asarray(x, dtype=np.float64)
    if v.ndim != 1 or v.size == 0:
        raise ValueError(f"{name} must be a non-empty vector, got shape {v.shape}.")
    if not np.isfinite(v).all():
        raise ValueError(f"{name} must be finite, but it holds NaN or infinity.")
    return v


def exact_upper(x: Real) -> Fraction:
    """Return the upper end as a rational number."""
    return Fraction(upper(x))


def exact_lower(x: Real) -> Fraction:
    """Return the lower end as a rational number."""
    return Fraction(lower(x))


def limit(numerator: Fraction | int, denominator: Fraction | int) -> float:
    """Return ``numerator / denominator`` rounded down: 0 without a positive numerator, infinity for a denominator <= 0."""
    if numerator <= 0:
        return 0.0
    return math.inf if denominator <= 0 else round_down(Fraction(numerator) / Fraction(denominator))


def joined(*xs: Real) -> Real:
    """Return the maximum, an enclosure if any operand is one."""
    floats = [x for x in xs if not isinstance(x, Bound)]
    bounds = [x for x in xs if isinstance(x, Bound)]
    if not bounds:
        return max(floats)
    result = bounds[0]
    for x in [*bounds[1:], *floats]:
        result = result.join(x)
    return result


def real_sqrt(x: Real) -> Real:
    """Return the root of a number that is >= 0 by its meaning; what rounding made negative counts as 0."""
    x = joined(x, 0.0)
    return x.sqrt() if isinstance(x, Bound) else math.sqrt(x)


def increasing(law: Callable[..., Real], *xs: Real) -> Real:
    """Evaluate a law that increases in every argument at both ends, so that repeated arguments cost no width."""
    if not any(isinstance(x, Bound) for x in xs):
        return law(*xs)
    low = law(*(Bound.point(lower(x)) for x in xs))
    high = law(*(Bound.point(upper(x)) for x in xs))
    return Bound(lower(low), upper(high), all(x.proved for x in xs if isinstance(x, Bound)))


def real_exp(x: Real) -> Real:
    """Return ``exp(x)``; an enclosure is rounded outwards from a correctly rounded decimal value."""
    if not isinstance(x, Bound):
        try:
            return math.exp(x)
        except OverflowError:
            return math.inf
    return Bound(_transcendental(x.lower, "exp", up=False), _transcendental(x.upper, "exp", up=True), x.proved)


def real_log(x: Real) -> Real:
    """Return ``log(x)`` with ``log(0) = -inf``."""
    if not isinstance(x, Bound):
        return math.log(x) if x > 0 else -math.inf
    return Bound(_transcendental(x.lower, "ln", up=False), _transcendental(x.upper, "ln", up=True), x.proved)


def _transcendental(x: float, name: str, *, up: bool) -> float:
    if math.isinf(x) or (x == 0 and name == "ln"):
        return {math.inf: math.inf, -math.inf: 0.0}.get(x, -math.inf)
    if (x, name) in {(0.0, "exp"), (1.0, "ln")}:
        return 1.0 if name == "exp" else 0.0
    if name == "exp" and abs(x) > 800:  # beyond the range of floats
        return (math.inf if up else round_down(Fraction(10) ** 400)) if x > 0 else (5e-324 if up else 0.0)
    near = Fraction(_DIGITS.exp(Decimal(x)) if name == "exp" else _DIGITS.ln(Decimal(x)))
    error = abs(near) / 10**39  # half a unit of the 40th digit, and more
    return round_up(near + error) if up else round_down(near - error)
