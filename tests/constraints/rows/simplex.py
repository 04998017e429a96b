"""Simplices, sum-norm balls, and what is dual to them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from stableopt.constraints.birkhoff import DoublyStochastic
from stableopt.constraints.l1 import InfNormBall, L1Ball, LinfNorm, OneNormBall
from stableopt.constraints.simplex import CappedSimplex, Max, Simplex, SumLargest
from tests.constraints.rows import Row

MATRICES = ((4, 3), (3, 4), (3, 3), (1, 5), (5, 1), (1, 1))


def fractions(x: Tensor) -> list[Fraction]:
    return [Fraction(a) for a in x.detach().double().cpu().flatten().tolist()]


def sums_to_at_most(radius: float, weights: tuple[float, ...] | None = None) -> Callable[[Tensor], bool]:
    def check(x: Tensor) -> bool:
        each = [1.0] * x.numel() if weights is None else weights
        return sum((abs(a) * Fraction(w) for a, w in zip(fractions(x), each, strict=True)), Fraction(0)) <= Fraction(
            radius
        )

    return check


def lines_sum_to_at_most(radius: float, along: int) -> Callable[[Tensor], bool]:
    return lambda x: all(sums_to_at_most(radius)(line) for line in x.unbind(1 - along))


def stored(number: float, dtype: torch.dtype) -> Fraction:
    """Return the largest number of the dtype that is not above, found by a nearest cast and one step back."""
    near = torch.tensor(number, dtype=torch.float64).to(dtype)
    return Fraction(float(near if float(near) <= number else torch.nextafter(near, torch.zeros_like(near))))


def sums_to_exactly(total: float, cap: float | None = None) -> Callable[[Tensor], bool]:
    def check(x: Tensor) -> bool:
        numbers = fractions(x)
        high = None if cap is None else stored(cap, x.dtype)
        bounded = all(a >= 0 and (high is None or a <= high) for a in numbers)
        return bounded and sum(numbers, Fraction(0)) == stored(total, x.dtype)

    return check


def is_doubly_stochastic(x: Tensor) -> bool:
    return all(sums_to_exactly(1.0)(line) for line in (*x.unbind(0), *x.unbind(1)))


SQUARES = ((3, 3), (2, 2), (1, 1), (4, 4))
LONG = ((4, 3), (3, 4), (3, 3), (1, 5), (5, 1), (12,))
WEIGHTS = tuple(0.3 + 0.4 * i for i in range(6))

ROWS = [
    *(Row(L1Ball(r), exact=sums_to_at_most(r)) for r in (1.3, 40.0)),
    Row(L1Ball(0.0), exact=sums_to_at_most(0.0), degenerate=True),
    Row(L1Ball(0.9, weights=WEIGHTS), shapes=((6,), (2, 3), (3, 2)), exact=sums_to_at_most(0.9, WEIGHTS)),
    Row(InfNormBall(0.9), shapes=MATRICES, exact=lines_sum_to_at_most(0.9, 1)),
    Row(OneNormBall(0.9), shapes=MATRICES, exact=lines_sum_to_at_most(0.9, 0)),
    Row(LinfNorm(0.8)), Row(LinfNorm(30.0)), Row(LinfNorm(0.0)),
    *(Row(Simplex(t), shapes=(*LONG, (1, 1)), exact=sums_to_exactly(t), degenerate=True) for t in (1.0, 0.7)),
    *(
        Row(CappedSimplex(t, c), shapes=LONG, exact=sums_to_exactly(t, c), degenerate=True)
        for t, c in ((1.0, 0.5), (1.2, 0.3))
    ),
    Row(DoublyStochastic(), shapes=SQUARES, exact=is_doubly_stochastic, degenerate=True),
    Row(Max(0.8)), Row(Max(0.0)),
    *(Row(SumLargest(w, k), shapes=LONG) for w, k in ((0.5, 3), (0.3, 5), (0.0, 2))),
]  # fmt: skip
