"""Combinations of other regularizers."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

from torch import Tensor

from stableopt.constraints import (
    L1,
    L2,
    AffineImage,
    Box,
    Constraint,
    Huber,
    Intersection,
    L1Ball,
    L2Ball,
    NonNegative,
    Product,
    Scaled,
    SeparableSum,
    Translated,
    Weighted,
    WithRidge,
)
from tests.constraints.oracle import entries
from tests.constraints.rows import Row

PAIR = Product((L2Ball(1.3), NonNegative()), (2, 1))


def in_product(x: Tensor) -> bool:
    a, b, c = entries(x)
    return a * a + b * b <= (13 * 2**52 // 10 + 1) ** 2 / 2**104 and c >= 0 and (a * a + b * b) ** 0.5 <= 1.3


def in_rows(x: Tensor) -> bool:
    return all(sum(map(abs, entries(row))) <= 1 for row in x[:1]) and all(
        v == min(max(v, -1), 1) for v in entries(x[1:])
    )


def in_both(c: Constraint, x: Tensor) -> bool:
    assert isinstance(c, Intersection)
    values = entries(x)
    return min(values) >= 0 and sum(v * v for v in values) <= 1


def in_moved_ball(x: Tensor) -> bool:
    return sum((v - Fraction(3, 4)) ** 2 for v in entries(x)) <= Fraction(1, 4)


def in_moved_diamonds(x: Tensor) -> bool:
    a, b, c, d = entries(x)
    return abs(a - Fraction(1, 2)) + abs(b - 1) <= 2 and abs(c + Fraction(1, 4)) + abs(d) <= 2


BOTH = Intersection((NonNegative(), L2Ball(1.0)))

ROWS = [
    Row(AffineImage(L2Ball(1.0), 0.5, 0.75), exact=in_moved_ball),
    Row(AffineImage(L1Ball(1.0, dims=-1), -2.0, (0.5, 1.0, -0.25, 0.0)), shapes=((2, 2),), exact=in_moved_diamonds),
    Row(AffineImage(L2Ball(1.0), -1.0, 0.25), exact=lambda x: sum((v - Fraction(1, 4)) ** 2 for v in entries(x)) <= 1),
    Row(SeparableSum((L1(0.3), L2(0.5)), (2, 3)), shapes=((5,),)),
    Row(SeparableSum((L1(0.3), L2(0.4)), (1, 2), 1), shapes=((2, 3),)),
    Row(PAIR, shapes=((3,),), exact=in_product),
    Row(Product((L1Ball(1.0, dims=1), Box(-1.0, 1.0)), (1, 2)), shapes=((3, 2),), exact=in_rows),
    Row(BOTH, shapes=((3,), (2, 2)), exact=partial(in_both, BOTH)),
    Row(Translated(L1(0.3), 0.7)),
    Row(Translated(L2(0.3), -0.4)),
    Row(Scaled(Huber(0.5, 0.3), -2.0)),
    Row(Weighted(L1(0.3), 2.5)),
    Row(WithRidge(L2(0.3), 0.8)),
    Row(WithRidge(L1(0.3), 0.8)),
]
