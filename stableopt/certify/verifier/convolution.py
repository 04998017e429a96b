"""Norms of convolutions as operators on images, from the symbol on a grid of frequencies (docs/soundness.md, S6)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from .numbers import Array, U, exact_product, gamma, need, norm_at_most, root_up, squares

__all__ = ["conv_at_most", "reduced"]


def conv_at_most(
    weight: Array, groups: int, limit: Fraction, grid: list[tuple[int, bool]], *, exact: bool = False
) -> bool:
    """Return True only if the convolution (out, in/groups, *kernel) has operator norm <= limit.

    Its norm is the supremum of the symbol over the frequency torus (S6.1). Along an axis with n frequencies, either images fit on a
    circle of n points, and these frequencies suffice (flag False), or the supremum over all is at most sec(pi m/n) times the
    largest on the n > 2 m, m = (k - 1)/2, by M. Riesz (S6.2, flag True). Cosines and sines are rounded from integers (S6.3).
    """
    if not weight.any() or limit <= 0:
        return limit >= 0 and not weight.any()
    exponent = int(np.frexp(np.abs(weight).max())[1])
    limit, kernel, taps = limit / Fraction(2) ** exponent, weight.shape[2:], math.prod(weight.shape[2:])
    parts = np.ldexp(weight, -exponent).reshape(groups, weight.shape[0] // groups, weight.shape[1], taps)
    sizes = [n for n, _ in grid]
    need(
        math.prod(sizes) * weight.size <= 2**32 and math.lcm(*sizes) <= 2**16,
        "the convolution is too large for a proof",
    )
    for k, (size, riesz) in zip(kernel, grid, strict=True):
        need(not riesz or size > k - 1, "the grid of frequencies is too coarse for the kernel")
        limit *= _cos_sin(k - 1, 4 * size)[0] - Fraction(1, 2**119) if riesz and k > 1 else 1
    if exact:
        limit -= root_up(Fraction(2 * math.prod(parts.shape[1:3]))) * (taps + 2) / 2**50
    else:
        bound = squares(np.abs(parts).sum(axis=3)) * (1 + gamma(2 * taps)) ** 2
        limit -= Fraction(3, 2) * (gamma(taps) + 2 * U) * root_up(bound)
    symbols = _symbols(parts, kernel, sizes, exact=exact)
    return all(norm_at_most(stack, limit, exact=exact) for stack in symbols)


def _symbols(parts: Array, kernel: tuple[int, ...], sizes: list[int], *, exact: bool) -> Iterator[Any]:
    """Yield the complex symbols of all groups on the grid."""
    period = math.lcm(*sizes)
    frequencies = np.indices([sizes[0] // 2 + 1, *sizes[1:]]).reshape(len(sizes), -1)  # the others are their conjugates
    positions = np.indices(kernel).reshape(len(sizes), -1)
    table = np.array([[float(v) for v in _cos_sin(j, period)] for j in range(period)])
    flat = parts.reshape(-1, parts.shape[3])
    pieces = max(1, frequencies.shape[1] * max(flat.size, len(flat) * 2) // 2**21)
    for some in np.array_split(frequencies, min(pieces, frequencies.shape[1]), axis=1):
        # the angle of a tap at a frequency, in units of one turn / period: an exact integer
        turns = sum(np.outer(f, t) * (period // s) for f, t, s in zip(some, positions, sizes, strict=True))
        chunk = table[np.asarray(turns) % period]  # (frequencies, taps, 2)
        columns = np.moveaxis(chunk, 1, 0).reshape(flat.shape[1], -1)
        values = exact_product(flat, columns) if exact else flat @ columns
        values = values.reshape(*parts.shape[:3], len(chunk), 2)
        real, imag = np.moveaxis(values, 3, 1).transpose(4, 0, 1, 2, 3).reshape(2, -1, *parts.shape[1:3])
        yield real + 1j * imag


def _cos_sin(numerator: int, denominator: int) -> tuple[Fraction, Fraction]:
    """Return cosine and sine of the given fraction of a turn in [0, 1], off by less than 2^-120: Taylor in units of 2^-160."""
    angle, sums, term = _TWO_PI * numerator // denominator, [0, 0, 0, 0], 1 << 160
    for k in range(
        80
    ):  # each term is off by a few units times at most e^(2 pi) < 2^10; the rest is below (2 pi)^80/80! < 2^-180
        sums[k % 4] += term
        term = (term * angle >> 160) // (k + 1)
    return Fraction(sums[0] - sums[2], 1 << 160), Fraction(sums[1] - sums[3], 1 << 160)


def _two_pi() -> int:
    """Return 2 pi in units of 2^-160, off by at most one unit, from pi = 16 arctan(1/5) - 4 arctan(1/239)."""
    arctan = [sum((-1) ** k * ((1 << 192) // ((2 * k + 1) * x ** (2 * k + 1))) for k in range(100)) for x in (5, 239)]
    return (32 * arctan[0] - 8 * arctan[1]) >> 32


_TWO_PI = _two_pi()


def reduced(
    weight: Array, places: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...], circular: bool
) -> tuple[Array, list[tuple[int, bool]]]:
    """Return a kernel of stride and dilation 1, and per axis its number of frequencies and whether they are a sample (S6.4)."""
    grid = []
    for axis, (n, s, d) in enumerate(zip(places, strides, dilations, strict=True), start=2):
        k = weight.shape[axis]
        if circular:
            step = math.gcd(s, n) // math.gcd(s, n, d)
            size = n // math.gcd(d, n) // step
        else:
            step = s // math.gcd(s, d)
            size = -(-n // (d // math.gcd(s, d))) + -(-k // step) - 1
        step = min(step, k)  # with a larger one, phases without taps would only add zeros
        taps = -(-k // step)
        room = [(0, 0)] * weight.ndim
        room[axis] = (0, taps * step - k)
        split = np.pad(weight, room).reshape(*weight.shape[:axis], taps, step, *weight.shape[axis + 1 :])
        weight = np.moveaxis(split, axis + 1, 2).reshape(
            len(weight), -1, *split.shape[2:axis], taps, *weight.shape[axis + 1 :]
        )
        grid.append((1, False) if taps == 1 else (size, False) if size <= 16 * taps else (8 * taps, True))
    return weight, grid
