r"""T3h, circle contractivity: the steps at which a Runge-Kutta method keeps a gradient field nonexpansive.

For :math:`\dot h = -\nabla\varphi(h)` with :math:`\varphi` convex and L-smooth one step of the method (A, b) is nonexpansive if
:math:`\tau L \le 2r`, where r is the largest number with :math:`Q + B/r \succeq 0`, :math:`Q = BA + A^\top B - bb^\top`, B =
diag(b).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from stableopt.linalg.bound import Real, round_down
from stableopt.theory._arguments import exact_upper, limit, nonnegative

__all__ = ["ButcherTableau", "circle_contractivity_radius", "circle_radius", "runge_kutta_max_step"]

Matrix = list[list[Fraction]]


@dataclass(frozen=True)
class ButcherTableau:
    r"""A Runge-Kutta method: :math:`k_i = f(h+\tau\sum_j a_{ij}k_j)`, :math:`h^+ = h+\tau\sum_i b_ik_i`.

    Args:
        A: the rows of coefficients, ``s`` rows of ``s`` numbers; shorter rows are filled with zeros.
        b: the ``s`` weights.
        name: how the method is called.

    Raises:
        ValueError: if the sizes do not fit, a number is not finite, or the weights do not sum to 1 (within rounding).

    Examples:
        >>> ButcherTableau(A=((), (Fraction(1, 2),)), b=(Fraction(0), Fraction(1)), name="midpoint").explicit
        True
    """

    A: tuple[tuple[Fraction, ...], ...]
    b: tuple[Fraction, ...]
    name: str = "Runge-Kutta"

    def __post_init__(self) -> None:
        """Store exact rational numbers in full rows."""
        s = len(self.b)
        if s == 0 or len(self.A) != s or any(len(row) > s for row in self.A):
            raise ValueError(
                f"a tableau with {s} weights needs {s} >= 1 rows of at most {s} numbers, got {len(self.A)} rows."
            )
        if not all(math.isfinite(a) for row in (*self.A, self.b) for a in row):
            raise ValueError("a tableau must hold finite numbers.")
        rows = tuple(tuple(Fraction(a) for a in row) + (Fraction(0),) * (s - len(row)) for row in self.A)
        object.__setattr__(self, "A", rows)
        object.__setattr__(self, "b", tuple(Fraction(x) for x in self.b))
        if abs(sum(self.b) - 1) > Fraction(1, 10**12):
            raise ValueError(f"the weights of a consistent method sum to 1, got {float(sum(self.b))}.")

    @property
    def stages(self) -> int:
        """The number of evaluations of the field per step.

        Examples:
            >>> ButcherTableau(((),), (Fraction(1),)).stages
            1
        """
        return len(self.b)

    @property
    def explicit(self) -> bool:
        """Whether no stage needs itself or a later one.

        Examples:
            >>> ButcherTableau(((Fraction(1),),), (Fraction(1),)).explicit
            False
        """
        return all(a == 0 for i, row in enumerate(self.A) for a in row[i:])

    @property
    def c(self) -> tuple[Fraction, ...]:
        """The times of the stages: the row sums of A.

        Examples:
            >>> ButcherTableau(((Fraction(1),),), (Fraction(1),)).c
            (Fraction(1, 1),)
        """
        return tuple(sum(row, Fraction(0)) for row in self.A)


def circle_contractivity_radius(tableau: ButcherTableau) -> float:
    r"""Return the radius r of circle contractivity: :math:`1/r = -\lambda_{\min}(B^{-1/2}(BA+A^\top B-bb^\top)B^{-1/2})`.

    Stages that never reach the result are dropped and stages that always agree are merged first, because the theorem
    is about irreducible methods. Then a weight that is zero or negative leaves no radius at all.

    Args:
        tableau: any method, explicit or implicit.

    Returns:
        r, rounded down: :math:`Q + B/r \succeq 0` is checked in rational arithmetic. 0 if there is no radius, infinity if
        the method is algebraically stable (backward Euler, implicit midpoint).

    Note:
        An implicit method need not have an infinite radius: the trapezoidal rule has 2.

    References:
        Dahlquist and Jeltsch, Generalized disks of contractivity, 1979; Reducibility and contractivity, 2006.

    Examples:
        >>> from stableopt.theory.tableaux import EULER, MIDPOINT
        >>> circle_contractivity_radius(EULER), circle_contractivity_radius(MIDPOINT)
        (1.0, 0.0)
    """
    A, b = _irreducible([list(row) for row in tableau.A], list(tableau.b))
    if min(b) <= 0:
        return 0.0
    s = len(b)
    Q = [[b[i] * A[i][j] + A[j][i] * b[j] - b[i] * b[j] for j in range(s)] for i in range(s)]
    if _is_positive_semidefinite(Q):
        return math.inf
    root = np.sqrt(np.array(b, dtype=np.float64))
    smallest = float(np.linalg.eigvalsh(np.array(Q, dtype=np.float64) / np.outer(root, root))[0])
    return _proved_radius(Q, b, Fraction(1) / Fraction(max(-smallest, 1e-300)))


def circle_radius(A: Iterable[Iterable[float | Fraction]], b: Iterable[float | Fraction]) -> float:
    r"""Return the radius of circle contractivity of a method that is given by its coefficients.

    Args:
        A: the rows of coefficients, floats or rational numbers; rows may stop at their last entry that is not zero.
        b: the weights.

    Returns:
        :func:`circle_contractivity_radius` of the tableau. Floats are taken as the rational numbers that they are.

    Raises:
        ValueError: if the sizes do not fit, a number is not finite, or the weights do not sum to 1.

    Examples:
        >>> circle_radius([[], [1.0]], [0.5, 0.5]), circle_radius([[], [0.5]], [0.0, 1.0])  # Heun, explicit midpoint
        (1.0, 0.0)
    """
    rows = tuple(tuple(_rational(a) for a in row) for row in A)
    return circle_contractivity_radius(ButcherTableau(rows, tuple(_rational(x) for x in b)))


def runge_kutta_max_step(tableau: ButcherTableau, smoothness: Real) -> float:
    r"""Return the largest step at which the method keeps an L-smooth convex gradient field nonexpansive: :math:`2r/L`.

    Args:
        tableau: the method.
        smoothness: L >= 0 (the upper end is used).

    Returns:
        The limit, rounded down; 0 for a method that expands at every step size.

    Raises:
        ValueError: if L is negative or not finite.

    Examples:
        >>> from stableopt.theory.tableaux import RK4
        >>> runge_kutta_max_step(RK4, smoothness=4.0)
        0.5
    """
    L, r = exact_upper(nonnegative("smoothness", smoothness)), circle_contractivity_radius(tableau)
    return math.inf if math.isinf(r) else 0.0 if r == 0 else limit(2 * Fraction(r), L)


def _rational(x: float | Fraction) -> Fraction:
    if isinstance(x, Fraction):
        return x
    if not math.isfinite(x):
        raise ValueError(f"a tableau must hold finite numbers, got {x!r}.")
    return Fraction(float(x))


def _proved_radius(Q: Matrix, b: Sequence[Fraction], near: Fraction) -> float:
    """Return a float close to ``near`` at which ``Q + B/r`` is positive semidefinite by exact elimination."""
    simple = near.limit_denominator(1000)  # the radii of the usual methods are integers or simple fractions
    candidates = [simple] if abs(simple - near) < near / 10**9 else []
    candidates += [near * (1 - Fraction(1, 10**k)) for k in (15, 13, 11, 9, 7, 5)]
    for r in candidates:
        rounded = Fraction(round_down(r))
        if rounded > 0 and _is_positive_semidefinite(_shifted(Q, b, 1 / rounded)):
            return float(rounded)
    return 0.0


def _shifted(Q: Matrix, b: Sequence[Fraction], t: Fraction) -> Matrix:
    return [[q + (t * b[i] if i == j else 0) for j, q in enumerate(row)] for i, row in enumerate(Q)]


def _is_positive_semidefinite(Q: Matrix) -> bool:
    """Decide by exact symmetric elimination."""
    M = [list(row) for row in Q]
    for k, row in enumerate(M):
        if row[k] < 0 or (row[k] == 0 and any(row[k:])):
            return False
        if row[k] == 0:
            continue
        for i in range(k + 1, len(M)):
            ratio = M[i][k] / row[k]
            M[i] = [x - ratio * y for x, y in zip(M[i], row, strict=True)]
    return True


def _irreducible(A: Matrix, b: list[Fraction]) -> tuple[Matrix, list[Fraction]]:
    reaching = {i for i, weight in enumerate(b) if weight != 0}
    while more := {j for i in reaching for j, a in enumerate(A[i]) if a != 0} - reaching:
        reaching |= more
    kept = sorted(reaching)
    A, b = [[A[i][j] for j in kept] for i in kept], [b[i] for i in kept]
    # The coarsest partition whose classes see equal sums: such stages are equal for every field.
    label = [0] * len(b)
    while True:
        sums = [
            tuple(sum(a for a, k in zip(row, label, strict=True) if k == c) for c in range(max(label) + 1)) for row in A
        ]
        keys = list(dict.fromkeys(zip(label, sums, strict=True)))
        finer = [keys.index(key) for key in zip(label, sums, strict=True)]
        if finer == label:
            break
        label = finer
    classes = [[i for i, c in enumerate(label) if c == k] for k in range(max(label) + 1)]
    merged = [[sum((A[rows[0]][j] for j in columns), Fraction(0)) for columns in classes] for rows in classes]
    weights = [sum((b[j] for j in columns), Fraction(0)) for columns in classes]
    if len(classes) < len(b):  # merging can silence a class: look again
        return _irreducible(merged, weights)
    return merged, weights
