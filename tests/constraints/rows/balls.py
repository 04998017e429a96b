"""Balls, half-spaces, cones, and vectors with few entries."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import mpmath
import torch
from torch import Tensor

from stableopt.constraints.balls import L2Ball, Sphere
from stableopt.constraints.cones import HalfSpace, Hyperplane, SecondOrderCone
from stableopt.constraints.sets import LinfBall
from stableopt.constraints.sparsity import Sparsity
from tests.constraints.oracle import DIGITS, entries
from tests.constraints.rows import Row

Check = Callable[[Tensor], bool]


def each_line(check: Check) -> Check:
    return lambda x: all(check(line) for line in x.reshape(-1, x.shape[-1]).unbind(0))


def weighted_squares(weights: tuple[float, ...], x: Tensor) -> Fraction:
    return sum((Fraction(w) * a * a for w, a in zip(weights, entries(x), strict=True)), Fraction(0))


def in_ellipsoid(radius: float, weights: tuple[float, ...]) -> Check:
    return lambda x: weighted_squares(weights, x) <= Fraction(radius) ** 2


def in_ball(radius: float) -> Check:
    return lambda x: sum((a * a for a in entries(x)), Fraction(0)) <= Fraction(radius) ** 2


def in_boxes(radius: float, weights: tuple[float, ...]) -> Check:
    return lambda x: all(abs(a) <= Fraction(radius) * Fraction(w) for w, a in zip(weights, entries(x), strict=True))


def on_sphere(radius: float) -> Check:
    """The tolerance of the docstring, with digits to spare."""

    def check(x: Tensor) -> bool:
        info, n = torch.finfo(x.dtype), x.numel()
        with mpmath.workdps(DIGITS):
            length = mpmath.sqrt(mpmath.fsum(mpmath.mpf(float(a)) ** 2 for a in entries(x)))
            smallest = mpmath.mpf(info.smallest_normal) * mpmath.mpf(info.eps)
            return abs(length - radius) <= (info.eps + (n + 8) * 2.0**-50) * radius + mpmath.sqrt(n) * smallest

    return check


def inner(normal: tuple[float, ...], x: Tensor) -> Fraction:
    return sum((Fraction(a) * b for a, b in zip(normal, entries(x), strict=True)), Fraction(0))


def in_half_space(normal: tuple[float, ...], offset: float) -> Check:
    return lambda x: inner(normal, x) <= Fraction(offset)


def on_hyperplane(normal: tuple[float, ...], offset: float) -> Check:
    def check(x: Tensor) -> bool:
        info, n = torch.finfo(x.dtype), x.numel()
        size = sum((abs(Fraction(a) * b) for a, b in zip(normal, entries(x), strict=True)), abs(Fraction(offset)))
        rounding = Fraction(info.eps) + (n + 8) * Fraction(2) ** -46
        smallest = Fraction(info.smallest_normal) * Fraction(info.eps)
        slack = rounding * size + smallest * sum((abs(Fraction(a)) for a in normal), Fraction(0))
        return abs(inner(normal, x) - Fraction(offset)) <= slack

    return check


def in_cone(x: Tensor) -> bool:
    *head, last = entries(x)
    return last >= 0 and sum((a * a for a in head), Fraction(0)) <= last * last


def has_at_most(k: int) -> Check:
    return lambda x: sum(a != 0 for a in entries(x)) <= k


LONG = ((4, 3), (3, 4), (3, 3), (1, 5), (5, 1), (12,))
LINES = ((4, 3), (3, 4), (1, 9), (5, 1))
SIX = ((6,), (2, 3), (3, 2))
WEIGHTS = (0.3, 4.0, 1.0, 0.07, 2.0, 1.7)
NORMAL = (0.3, -2.0, 0.0, 1.1, 0.7, -0.4)
PAIR = ((2,), (2, 1))

ROWS: list[Row] = [
    Row(L2Ball(0.9, dims=-1), exact=each_line(in_ball(0.9)), shapes=LINES),
    Row(L2Ball(1.2, weights=WEIGHTS), exact=in_ellipsoid(1.2, WEIGHTS), shapes=SIX),
    Row(L2Ball(1e-3, weights=(1e-9, 1.0)), exact=in_ellipsoid(1e-3, (1e-9, 1.0)), shapes=PAIR),
    *(
        Row(Sphere(r), exact=on_sphere(r), shapes=(*LONG, (1, 1)), convex=False, tolerant=True, degenerate=True)
        for r in (1.3, 40.0)
    ),
    Row(
        Sphere(0.7, dims=-1),
        exact=each_line(on_sphere(0.7)),
        shapes=LINES,
        convex=False,
        tolerant=True,
        degenerate=True,
    ),
    Row(LinfBall(0.7, weights=WEIGHTS), exact=in_boxes(0.7, WEIGHTS), shapes=SIX),
    *(Row(HalfSpace(NORMAL, b), exact=in_half_space(NORMAL, b), shapes=SIX) for b in (0.4, 0.0, -1.3)),
    Row(
        HalfSpace((1.0, -0.01), 0.5, dims=-1),
        exact=each_line(in_half_space((1.0, -0.01), 0.5)),
        shapes=((4, 2), (1, 2)),
    ),
    *(
        Row(Hyperplane(NORMAL, b), exact=on_hyperplane(NORMAL, b), shapes=SIX, tolerant=True, degenerate=True)
        for b in (0.4, 0.0, -1.3)
    ),
    Row(SecondOrderCone(), exact=in_cone, shapes=LONG),
    Row(SecondOrderCone(dims=-1), exact=each_line(in_cone), shapes=LINES),
    *(Row(Sparsity(k), exact=has_at_most(k), shapes=LONG, convex=False) for k in (1, 3)),
    Row(Sparsity(0), exact=has_at_most(0), shapes=LONG, convex=False, degenerate=True),
    Row(Sparsity(2, dims=-1), exact=each_line(has_at_most(2)), shapes=LINES, convex=False),
]
