r"""From bounds of single derivatives to the constants of a cell: comparison maps.

A difference of two states moves, entry by entry, by no more than a monotone, convex and homogeneous map allows,

.. math:: |\delta h_t| \le T(|\delta h_{t-1}|, \|\delta x_t\|), \qquad \delta h_t = h_t - h'_t .

The rest is arithmetic of nonnegative numbers, rounded up. With weights :math:`w > 0` and the norm
:math:`\|v\|_w = \max_i |v_i| / w_i`:

* :math:`T(w, 0) \le a\,w` proves the factor a of the state, and :math:`T(0, 1) \le b\,w` that of the input, because T is
  subadditive.
* :math:`T(w, 1) \le w` proves :math:`|\delta h_t| \le w` for all t if no :math:`\|\delta x_t\|` exceeds 1, by induction over t: the
  gain from the largest input difference to the largest state difference is at most the norm of w. A gate that keeps for ever
  (:math:`z = 1`) has no factor below 1, and may still have such a w.
* For a linear majorant :math:`|\delta h_t| \le A\,|\delta h_{t-1}| + B\,|\delta x_t|`, a matrix G with :math:`A G + B \le G` bounds
  :math:`\sum_k A^k B`, hence the gain in l2, linf and l1 by the norm of G (a convolution with nonnegative matrices has in all three
  its largest gain at constant inputs).

Where the w and G come from proves nothing and needs no care: the inequalities are checked for the stored numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from stableopt.linalg import Bound, inf_norm, one_norm, spectral_norm
from stableopt.nn.dispatch import TOKEN_MAX
from stableopt.nn.recurrent.bounds import FEATURE_NORMS, CellBound
from stableopt.nn.recurrent.gates import Array, Chosen, Mix, Worst, up

__all__ = ["Comparison", "cell_constants", "sequence_constant"]

_LADDER = 6
"""How many rates are tried for weights, by bisection."""
_INFLATION = 1e-9
"""By how much a computed solution is enlarged, so that rounding does not spoil the check."""


class Comparison(ABC):
    """How differences grow in one step of one layer in one direction.

    Attributes:
        states: number of entries of the state.
        visible: which of them are the output.
        reach: limits of the moduli of the output, for runs from the zero state; infinite if there are none.
        metric: what the bound is about, for printing.
    """

    states: int
    visible: slice
    reach: Array
    metric: str = "the maximum norm of the state"

    @property
    def initial(self) -> float:
        """The largest modulus of an entry of the initial states from which the states stay where this holds."""
        return math.inf

    @abstractmethod
    def grown(self, w: Array, norm: str | None, mix: Mix) -> Array:
        """Return :math:`T(w, 1)`, or :math:`T(w, 0)` without a norm.

        Args:
            w: moduli of the difference of the states, ``(states,)``, or several in the columns of a matrix.
            norm: in which an input difference has size 1; None for no difference.
            mix: the supremum over the gates, or fixed gates.
        """

    @abstractmethod
    def input_columns(self, mix: Mix) -> Array:
        r"""Return :math:`T(0, e_j)` for each entry of the input, ``(states, inputs)``."""

    def settled(self, w: Array, norm: str, mix: Mix) -> Array:
        """Return an S(w), of the kind of T, such that S(w) <= w implies T(w, 1) <= w; T itself if nothing larger will do."""
        return self.grown(w, norm, mix)

    def plain(self, norm: str) -> list[CellBound]:
        """Return bounds in norms of the state that are no weighted maximum norms."""
        return []


def cell_constants(cell: Comparison, norm: str) -> CellBound:
    """Return the constants of a step: in a plain norm of the state if it contracts, else in the metric with the smallest gain.

    Args:
        cell: its comparison map.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``, of one input and one output.
    """
    return _selected(_candidates(cell, norm))


def sequence_constant(cell: Comparison, norm: str) -> tuple[float, CellBound]:
    """Return the smallest proved gain of sequences of any length, infinite if none is known, and the constants of a step.

    Args:
        cell: its comparison map.
        norm: of whole sequences, ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``.
    """
    one = FEATURE_NORMS[norm]
    candidates = _candidates(cell, one, everything=True)
    gains = [bound.gain().upper for bound in candidates]
    if norm in {"linf", TOKEN_MAX} and (w := _under_constant_inputs(cell, one)) is not None:
        gains.append(_size(w[cell.visible], one))
    if norm != TOKEN_MAX:
        gains.append(_norm_of_majorant(cell, norm))
    return min(gains), _selected(candidates)


def _candidates(cell: Comparison, norm: str, *, everything: bool = False) -> list[CellBound]:
    """Return the bounds in several metrics, the plain one first; the others only if that one does not contract, or if asked for."""
    peak = _under_constant_inputs(cell, norm) if norm == "linf" else None
    ones = np.ones(cell.states)
    found = cell.plain(norm) or [_weighted(cell, norm, ones, peak)]
    if everything or not found[0].contracts:
        found += [_weighted(cell, norm, w, peak) for w in (ones, *_weights(cell, norm))]
    return found


def _selected(candidates: list[CellBound]) -> CellBound:
    if candidates[0].contracts:
        return candidates[0]
    contracting = [bound for bound in candidates if bound.contracts]
    return min(contracting, key=lambda bound: bound.gain().upper) if contracting else candidates[0]


def _weighted(cell: Comparison, norm: str, w: Array, peak: Array | None) -> CellBound:
    """Return the constants in the maximum norm with weights; ``peak`` bounds all states under inputs of at most 1."""
    zero = np.zeros(cell.states)
    a = _largest_quotient(cell.grown(w, None, Worst()), w)
    b = _largest_quotient(cell.grown(zero, norm, Worst()), w)
    weighted = "" if (w == 1.0).all() else ", weighted entry by entry"
    return CellBound(
        Bound(0.0, a),
        Bound(0.0, b),
        Bound(0.0, _size(w[cell.visible], norm)),
        cell.metric + weighted,
        None if peak is None else Bound(0.0, _largest_quotient(peak, w)),
        cell.initial,
    )


def _largest_quotient(x: Array, w: Array) -> float:
    return math.nextafter(float((x / w).max(initial=0.0)), math.inf)


def _size(w: Array, norm: str) -> float:
    if not w.size:
        return 0.0
    return {"linf": one_norm, "l2": spectral_norm, "l1": inf_norm}[norm](w[None]).upper


def _weights(cell: Comparison, norm: str) -> Iterator[Array]:
    r"""Yield weights of :math:`w = v + T(w, 0)/r` for rates r between the growth of T and 1, v being what the input does."""
    push = cell.grown(np.zeros(cell.states), norm, Worst())
    if not np.isfinite(push).all():
        return
    push = push + 1e-6 * max(float(push.max(initial=0.0)), 1e-150)
    low, high = 0.0, 1.0
    rate = 1.0
    for _ in range(_LADDER):
        w = _solution(cell, push, rate)
        if w is None:
            if rate == 1.0:
                return
            low = rate
        else:
            high = rate
            yield w
        rate = (low + high) / 2


def _solution(cell: Comparison, push: Array, rate: float) -> Array | None:
    """Solve for the weights by Newton's method, which climbs to the smallest solution; None where there is none."""
    n = cell.states
    w = np.ones(n)
    for _ in range(20):
        worst = Worst()
        cell.grown(w, None, worst)
        A = cell.grown(np.eye(n), None, Chosen(worst.places))
        new = _solved(A / rate, push)
        if new is None:
            return None
        new /= new.max(initial=0.0)
        settled = np.abs(new - w).max() < 1e-6
        w = new
        if settled:
            break
    return w if w.min(initial=1.0) > 1e-200 else None


def _under_constant_inputs(cell: Comparison, norm: str) -> Array | None:
    """Return a w with T(w, 1) <= w, found by Newton's method, None if there is none."""
    n = cell.states
    w = np.ones(n)
    for _ in range(30):
        worst = Worst()
        if not np.isfinite(cell.settled(w, norm, worst)).all():
            return None
        push = cell.settled(np.zeros(n), norm, Chosen(worst.places))
        A = cell.settled(np.eye(n), norm, Chosen(worst.places)) - push[:, None]
        floor = 1e-9 * max(float(push.max(initial=0.0)), 1e-150)
        new = _solved(A, push + floor)
        if new is None:
            return None
        settled = np.abs(new - w).max(initial=0.0) <= 1e-12 * new.max(initial=0.0)
        w = new
        if settled:
            break
    w = w * (1.0 + _INFLATION)
    return w if (cell.settled(w, norm, Worst()) <= w).all() else None


def _norm_of_majorant(cell: Comparison, norm: str) -> float:
    """Return the norm of a G with A G + B <= G, infinite if none is found."""
    n = cell.states
    A, B = cell.grown(np.eye(n), None, Worst()), cell.input_columns(Worst())
    if not B.size or not (np.isfinite(A).all() and np.isfinite(B).all()):
        return math.inf if B.size else 0.0
    floor = 1e-9 * max(float(B.max()), 1e-150)
    G = _solved(A, B + floor)
    if G is None:
        return math.inf
    G = G * (1.0 + _INFLATION)
    if not (up(up(A @ G, n) + B) <= G).all():
        return math.inf
    return {"linf": inf_norm, "l2": spectral_norm, "l1": one_norm}[norm](G[cell.visible]).upper


def _solved(A: Array, B: Array) -> Array | None:
    r"""Return the positive :math:`(I - A)^{-1} B`, which for B > 0 exists if and only if the spectral radius of A is below 1."""
    try:
        X: Array = np.linalg.solve(np.eye(len(A)) - A, B).astype(np.float64)
    except (np.linalg.LinAlgError, ValueError):
        return None
    return X if np.isfinite(X).all() and X.min(initial=1.0) > 0.0 else None
