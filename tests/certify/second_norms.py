"""Norms and slopes decided exactly (integers) or with balls (arb), for the second verifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from math import prod
from typing import Any

from flint import arb, ctx, fmpq, fmpz_mat

__all__ = [
    "absolute_rows_at_most",
    "conv_matrix",
    "is_positive_semidefinite",
    "largest_eigenvalue_at_most",
    "norm_at_most",
    "precision",
    "slope_bound",
]

EXACT_SIZE = 40
"""Up to here the characteristic polynomial decides, beyond it a ball LDL^T."""


@contextmanager
def precision(bits: int) -> Iterator[None]:
    old, ctx.prec = ctx.prec, bits
    try:
        yield
    finally:
        ctx.prec = old


def is_positive_semidefinite(matrix: fmpz_mat) -> bool:
    """Decide M >= 0 for a symmetric integer matrix.

    All roots of det(xI - M) are real, so none is negative exactly if the signs of its coefficients alternate (Descartes). Larger
    matrices: a ball LDL^T whose pivots are all positive proves it; if one may not be, the polynomial decides again.
    """
    size = matrix.nrows()
    if size > EXACT_SIZE and _pivots_are_positive(matrix):
        return True
    coefficients = list(matrix.charpoly())
    return all(c == 0 or (c > 0) == ((size - k) % 2 == 0) for k, c in enumerate(coefficients))


def _pivots_are_positive(matrix: fmpz_mat) -> bool:
    with precision(256):
        rows = [[arb(v) for v in row] for row in matrix.tolist()]
        for k, pivots in enumerate(rows):
            if not pivots[k] > 0:
                return False
            for i in range(k + 1, len(rows)):
                factor = rows[i][k] / pivots[k]
                for j in range(k + 1, i + 1):
                    rows[i][j] -= factor * rows[j][k]
    return True


def norm_at_most(rows: list[list[int]], square_limit: fmpq) -> bool:
    """Decide ||A||_2^2 <= s exactly: p I - q A^T A >= 0 for s = p/q."""
    if len(rows) < len(rows[0]):
        rows = [list(column) for column in zip(*rows, strict=True)]
    a = fmpz_mat(rows)
    return largest_eigenvalue_at_most(a.transpose() * a, square_limit)


def largest_eigenvalue_at_most(symmetric: fmpz_mat, limit: fmpq) -> bool:
    n = symmetric.nrows()
    identity = fmpz_mat(n, n, [int(i == j) for i in range(n) for j in range(n)])
    return is_positive_semidefinite(int(limit.p) * identity - int(limit.q) * symmetric)


def absolute_rows_at_most(rows: list[list[int]], limit: fmpq) -> bool:
    """Decide whether each row sum of |A| is at most the limit: the norm from linf to linf."""
    return all(sum(map(abs, row)) <= limit for row in rows)


def conv_matrix(
    weight: tuple[int, ...],
    entries: list[int],
    image: tuple[int, ...],
    output: tuple[int, ...],
    place: tuple[tuple[int, int, int], ...],
    groups: int,
    *,
    circular: bool,
) -> list[list[int]]:
    """Return the dense matrix of y[o, p] = sum w[o, i, t] x[i, p s - pad + t d]; ``place`` holds (s, pad, d) of each axis."""
    outside, inside, kernel = weight[0], weight[1], weight[2:]
    size = prod(image)
    rows = []
    for o, p in product(range(outside), product(*map(range, output))):
        row = [0] * (groups * inside * size)
        first = o // (outside // groups) * inside
        for (i, *t), entry in zip(
            product(range(inside), *map(range, kernel)), _filter(entries, o, weight), strict=True
        ):
            at = [q * s - pad + u * d for q, u, (s, pad, d) in zip(p, t, place, strict=True)]
            if circular:
                at = [a % n for a, n in zip(at, image, strict=True)]
            if all(0 <= a < n for a, n in zip(at, image, strict=True)):
                flat = 0
                for a, n in zip(at, image, strict=True):
                    flat = flat * n + a
                row[(first + i) * size + flat] += entry
        rows.append(row)
    return rows


def _filter(entries: list[int], o: int, weight: tuple[int, ...]) -> list[int]:
    step = prod(weight[1:])
    return entries[o * step : (o + 1) * step]


# ------------------------------------------------------------------------------------------------------------------ slopes


def _sigmoid(x: arb) -> arb:
    return 1 / (1 + (-x).exp())


def _gelu(x: arb) -> arb:
    return (1 + (x / arb(2).sqrt()).erf()) / 2 + x * (-x * x / 2).exp() / (2 * arb.pi()).sqrt()


def _gelu_tanh(x: arb) -> arb:
    c, k = (2 / arb.pi()).sqrt(), arb(fmpq(44715, 1000000))
    t = (c * (x + k * x**3)).tanh()
    return (1 + t) / 2 + x / 2 * (1 - t * t) * c * (1 + 3 * k * x * x)


def _silu(x: arb) -> arb:
    return _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))


def _mish(x: arb) -> arb:
    t = (1 + x.exp()).log().tanh()
    return t + x * (1 - t * t) * _sigmoid(x)


@cache
def _peak(name: str) -> arb:
    """The largest slope of a smooth activation with one peak between 1 and 3, by sections; right to some 1e-25."""
    slope: Callable[[arb], arb] = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu, "mish": _mish}[name]
    with precision(200):
        low, high = arb(fmpq(1, 2)), arb(4)
        for _ in range(120):
            third = (high - low) / 3
            a, b = (low + third).mid(), (high - third).mid()
            low, high = (a, high) if slope(a).mid() < slope(b).mid() else (low, b)
        return slope(((low + high) / 2).mid())


def slope_bound(name: str, real: Callable[[str], fmpq]) -> fmpq | arb | None:
    """Return the largest |slope| of an activation with the settings given by ``real(key)``, None for an unknown one."""
    one = fmpq(1)
    steepest_one = (
        "identity relu abs tanh softplus hardtanh threshold celu softsign logsigmoid tanhshrink softshrink soft_abs"
    )
    constant = dict.fromkeys(steepest_one.split(), one)
    constant |= {"sigmoid": fmpq(1, 4), "hardswish": fmpq(3, 2), "hardsigmoid": fmpq(1, 6)}
    if name in constant:
        return constant[name]
    settings: dict[str, Callable[[], Any]] = {
        "leaky_relu": lambda: max(one, abs(real("slope"))),
        "elu": lambda: max(one, abs(real("alpha"))),
        "selu": lambda: fmpq(10507009873554805, 10**16) * fmpq(16732632423543772, 10**16),
    }
    if name in settings:
        return settings[name]()
    return _peak(name) if name in {"gelu", "gelu_tanh", "silu", "mish"} else None
