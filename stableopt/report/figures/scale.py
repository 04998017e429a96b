"""Scales: from values to places on an axis, and the values that an axis names."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Scale", "choose_scale"]

_NARROW = 1e-290  # smaller numbers and ranges are taken as zero: their ticks would not be floating-point numbers


@dataclass(frozen=True)
class Scale:
    """An axis: which values it spans, and how they are spread over it.

    Args:
        low: the value at its beginning.
        high: the value at its end, above ``low``.
        kind: "linear"; "log", for values above zero; or "symlog", which is linear near zero and logarithmic far from it.
        unit: where a symlog axis passes from the one to the other.

    Examples:
        >>> scale = Scale(1.0, 100.0, "log")
        >>> scale(10.0), scale(1e6), scale.ticks()
        (0.5, 1.0, [(1.0, '1'), (10.0, '10'), (100.0, '100')])
        >>> Scale(0.0, 2.0).ticks(4)
        [(0.0, '0'), (0.5, '0.5'), (1.0, '1'), (1.5, '1.5'), (2.0, '2')]
    """

    low: float
    high: float
    kind: str = "linear"
    unit: float = 1.0

    def __call__(self, value: float) -> float:
        """Return the place of a value: 0 at the beginning, 1 at the end; beyond them it is moved to the nearer end."""
        value = min(max(value, self.low), self.high)
        start = self._warp(self.low)
        return (self._warp(value) - start) / (self._warp(self.high) - start)

    def ticks(self, count: int = 4) -> list[tuple[float, str]]:
        """Return about ``count`` round values with their names."""
        if self.kind == "log":
            powers = _decades(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9), count)
            values = [10.0**power for power in powers]
            if len(values) >= 2:
                return [(value, _power(value)) for value in values]
        if self.kind == "symlog":
            largest = math.floor(math.log10(max(-self.low, self.high)))
            sizes = [10.0**power for power in _decades(math.ceil(math.log10(self.unit)), largest, max(count // 2, 1))]
            values = [-size for size in reversed(sizes)] + [0.0, *sizes]
            return [(value, _power(value)) for value in values if self.low <= value <= self.high]
        return _round_values(self.low, self.high, count)

    def _warp(self, value: float) -> float:
        if self.kind == "log":
            return math.log10(value)
        if self.kind == "symlog":
            if abs(value) > 1e15 * self.unit:  # the quotient may be too large for a float, and 1 is nothing beside it
                return math.copysign(math.log10(abs(value)) - math.log10(self.unit), value)
            return math.copysign(math.log10(1.0 + abs(value) / self.unit), value)
        return value


def choose_scale(values: Sequence[float], kind: str = "auto", window: tuple[float, float] | None = None) -> Scale:
    """Return an axis for values.

    Args:
        values: finite numbers.
        kind: of the :class:`Scale`; "auto" is logarithmic where all the values are above zero and span two decades, linear
            otherwise, except where some are a hundred times as large as half of them.
        window: the widest range to show; values outside are drawn at its edge.

    Examples:
        >>> choose_scale([1.0, 1000.0]).kind, choose_scale([0.0, 1.0]).kind, choose_scale([-1.0, 1.0, 1e9]).kind
        ('log', 'linear', 'symlog')
        >>> choose_scale([0.0, 50.0], window=(-1.0, 2.0)).high
        2.0
    """
    if kind == "log":
        values = [value for value in values if value > _NARROW]
    if window is not None:
        values = [min(max(value, window[0]), window[1]) for value in values]
    if not values:
        return Scale(0.1, 1.0, "log") if kind == "log" else Scale(0.0, 1.0)
    low, high = min(values), max(values)
    if kind == "log" or (kind == "auto" and low > _NARROW and high / low > 100):
        low, high = math.log10(low), math.log10(high)
        pad = max(0.04 * (high - low), 0.02)
        return Scale(10.0 ** (low - pad), 10.0 ** (high + pad), "log")
    unit = statistics.median_low(map(abs, values))
    if kind == "auto" and unit > _NARROW and max(-low, high) > 100 * unit:
        return Scale(min(low * 1.5, 0.0), max(high * 1.5, 0.0), "symlog", unit)
    pad = 0.04 * (high - low) if high - low > 1e-9 * abs(high) + _NARROW else 0.1 * abs(high) or 1.0
    pad = max(pad, _NARROW)
    low, high = low - pad, high + pad
    return Scale(low, high) if window is None else Scale(max(low, window[0]), min(high, window[1]))


def _decades(low: int, high: int, count: int) -> range:
    stride = max(1, math.ceil((high - low) / count))
    return range(math.ceil(low / stride) * stride, high + 1, stride)


def _round_values(low: float, high: float, count: int) -> list[tuple[float, str]]:
    rough = (high - low) / max(count, 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next((f * unit for f in (1, 2, 2.5, 5, 10) if f * unit >= rough * (1 - 1e-9)), rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(k * step, _name(k * step, step)) for k in range(first, last + 1)]


def _power(value: float) -> str:
    """Return the name of a power of ten: 0.01, 100, 1e4."""
    return f"{value:g}" if 1e-3 < abs(value) < 1e4 or value == 0.0 else _exponential(value, 1)


def _name(value: float, step: float) -> str:
    """Return a short name, 20k, 0.05 or 1e-7, with as many digits as tell it from its neighbor a step away."""
    size = abs(value)
    if size < 1e-9 * step:
        return "0"
    digits = min(max(math.floor(math.log10(size)) - math.floor(math.log10(step)) + 2, 1), 15)
    if size >= 1e9 or size < 1e-4:
        return _exponential(value, digits)
    unit, letter = (1e6, "M") if size > 999_999.5 else (1e3, "k") if size > 9_999.5 else (1.0, "")
    return f"{float(f'{value:.{digits}g}') / unit:.{max(digits, 6)}g}{letter}"


def _exponential(value: float, digits: int) -> str:
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
