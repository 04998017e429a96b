"""Rows of the table of theory against measured, and how the largest measured value is searched for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EPS = float(np.finfo(np.float64).eps)
ROUNDINGS = 4 * 8**2
"""Of a ratio of two norms, in half ulps: k² for the singular values of k = 8 rows, and as much for the numbers in them."""

Array = NDArray[np.float64]
Pair = tuple[float, float]
"""What the law says, and what was measured."""


@dataclass(frozen=True)
class Size:
    """How much is drawn: of operators, and of steps of each adversarial climb."""

    draws: int
    climb: int
    dimension: int


FULL = Size(draws=400, climb=300, dimension=8)
SMALL = Size(draws=25, climb=40, dimension=4)


@dataclass(frozen=True)
class Row:
    """A law beside what was measured.

    ``kind`` is ``search`` (the largest ratio of all draws and climbs), ``witness`` (a case in which the law is attained) or
    ``beyond`` (just past a limit, where the measured value exceeds what the law says up to it). A ``lower`` bound is one on a
    decrease: there the ratio is predicted to measured. ``rounding`` is how far the ratio can be off by that of its operands.
    """

    part: str
    law: str
    setting: str
    kind: str
    predicted: float
    measured: float
    rounding: float
    lower: bool = False
    tight: bool = True

    @property
    def ratio(self) -> float:
        """At most 1 unless it is ``beyond``."""
        above, below = (self.predicted, self.measured) if self.lower else (self.measured, self.predicted)
        return above / below if below > 0 else (1.0 if above == 0 else math.inf)

    @property
    def broken(self) -> bool:
        """Whether the law is contradicted, or a witness does not attain it, or nothing happens past a limit."""
        if self.kind == "beyond":
            return not self.ratio > 1
        return not self.ratio <= 1 + self.rounding or (self.kind == "witness" and self.ratio < 0.95)


def searched(
    part: str,
    law: str,
    setting: str,
    pairs: Iterable[Sequence[float]],
    *,
    roundings: float = ROUNDINGS,
    lower: bool = False,
    tight: bool = True,
) -> Row:
    """Return the row of the largest ratio, or of one that is too large beyond rounding if there is any.

    Each of the pairs may bring its own number of roundings, as a third entry, in half ulps.
    """
    rows = [
        Row(part, law, setting, "search", p, m, (own[0] if own else roundings) * EPS / 2, lower, tight)
        for p, m, *own in pairs
    ]
    return max(rows, key=lambda row: (row.broken, row.ratio))


def witnessed(
    part: str, law: str, setting: str, pair: Pair, *, roundings: float = ROUNDINGS, lower: bool = False
) -> Row:
    """Return the row of a case in which the law is attained."""
    return Row(part, law, setting, "witness", *pair, roundings * EPS / 2, lower)


def passed(part: str, law: str, setting: str, pair: Pair) -> Row:
    """Return the row of a case just past a limit."""
    return Row(part, law, setting, "beyond", *pair, 0.0)


def climb(value: Callable[[Array], float], start: Array, steps: int, rng: np.random.Generator) -> float:
    """Return the largest value that random steps of falling and rising length find from a start."""
    best, at, step = value(start), start, 1.0
    for _ in range(steps):
        other = at + step * rng.standard_normal(start.shape)
        found = value(other)
        if found > best:
            best, at, step = found, other, 1.5 * step
        else:
            step = max(0.9 * step, 1e-6)
    return best


def climbed(
    pair: Callable[[Array], Sequence[float]], start: Array, steps: int, rng: np.random.Generator
) -> Sequence[float]:
    """Return the promised and the real decrease with the largest ratio, found in the same way, and its roundings.

    Of decreases that are lost in their rounding only those are taken that contradict the promise nevertheless.
    """
    found: list[Sequence[float]] = []

    def ratio(x: Array) -> float:
        promised, real, roundings = pair(x)
        share = promised / real if real > 0 else math.inf if promised > 0 else 0.0
        if share > 1 + roundings * EPS / 2 or roundings * EPS < 1e-9:
            found.append((promised, real, roundings))
            return share
        return 0.0

    best = climb(ratio, start, steps, rng)
    return next((p for p in found if p[1] > 0 and p[0] / p[1] == best), found[-1])


def derivative_norm(f: Callable[[Tensor], Tensor], x: Array) -> float:
    """Return the spectral norm of the derivative that autograd finds."""
    J = torch.autograd.functional.jacobian(f, torch.as_tensor(x))
    return float(np.linalg.norm(np.asarray(J), 2))


def separation(step: Callable[[Array], Array], x: Array, y: Array) -> float:
    """Return how much a step separates two points: the ratio of the distances after and before."""
    return float(np.linalg.norm(step(x) - step(y)) / np.linalg.norm(x - y))


def two_points(z: Array) -> tuple[Array, Array]:
    """Return two points at the distance 1, the first within [-3, 3]^n, for any numbers to climb in."""
    x, gap = 3 * np.tanh(z[: len(z) // 2]), z[len(z) // 2 :]
    return x, x + gap / np.linalg.norm(gap)


def roundings_of(n: int, lr: float, smoothness: float, bound: float) -> float:
    """Return the half ulps of the separation of such points by a gradient step: n terms, of the size of points and step."""
    return 4 * n * (6 * math.sqrt(n) + 1) * (1 + lr * smoothness) / bound


def symmetric(rng: np.random.Generator, n: int, low: float, high: float) -> Array:
    """Return a random symmetric matrix with the spectrum in [low, high], both ends attained."""
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    spectrum = np.concatenate([[low, high], rng.uniform(low, high, n - 2)])
    return (Q * spectrum) @ Q.T


def norm(A: Array, p: float = 2) -> float:
    """Return an operator norm."""
    return float(np.linalg.norm(A, p))
