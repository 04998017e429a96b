r"""What is proved about one step of torch's plain recurrence, :class:`torch.nn.RNN` and :class:`torch.nn.RNNCell`.

.. math:: h^+ = \sigma(W_h h + W_x x + b), \qquad \sigma = \tanh \text{ or ReLU, slopes in } [0, 1] .

By the mean value theorem :math:`\delta h^+ = D\,(W_h\,\delta h + W_x\,\delta x)` with a diagonal :math:`0 \preceq D \preceq I`
that changes at every step, hence :math:`a = \|W_h\|` and :math:`b = \|W_x\|` in l2, linf and l1, attained where all slopes are 1
(tanh at 0, ReLU where all units are active). A scaling of the state by a positive *diagonal* matrix P commutes with every D, so
:math:`\|P W_h P^{-1}\|` will do as well; a full matrix does not commute, and neither does :math:`\rho(W_h) < 1` suffice. Entry by
entry, :math:`|\delta h^+| \le |W_h|\,|\delta h| + |W_x|\,|\delta x|`: a weighted maximum norm contracts if and only if
:math:`\rho(|W_h|) < 1` (for slopes of either sign it has to, Perron and Frobenius).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from stableopt.linalg import Bound, frobenius_norm, inf_norm, one_norm, spectral_norm
from stableopt.linalg.proved import as_matrix
from stableopt.nn.recurrent.bounds import CellBound
from stableopt.nn.recurrent.comparison import Comparison
from stableopt.nn.recurrent.gates import Array, Mix, Rows, up

__all__ = ["PlainStep"]

_NORMS = {"l2": spectral_norm, "linf": inf_norm, "l1": one_norm}


class PlainStep(Comparison):
    r"""One step of a plain recurrence.

    Args:
        W_h: ``(n, n)``.
        W_x: ``(n, m)``.
        biases: ``(n,)`` each, or None; they only matter for being finite.
        bounded: whether the activation is tanh, so that :math:`|h| \le 1`.

    Examples:
        >>> import torch
        >>> PlainStep(0.5 * torch.eye(2), torch.eye(2), [], bounded=True).plain("l2")[0].state.upper < 0.5 + 1e-12
        True
    """

    metric = "the plain norm of the state"

    def __init__(self, W_h: Tensor, W_x: Tensor, biases: list[Tensor | None], *, bounded: bool) -> None:
        self.rows = Rows(W_h, W_x, *biases)
        self.W_h, self.W_x = as_matrix(W_h), as_matrix(W_x)
        self.states = len(self.W_h)
        self.visible = slice(0, self.states)
        self.reach = np.full(self.states, 1.0 if bounded else math.inf)

    def grown(self, w: Array, norm: str | None, mix: Mix) -> Array:
        r"""Return :math:`|W_h| w`, plus what the input adds."""
        push = self.rows.from_input(norm)
        return up(self.rows.from_state(w) + push.reshape(-1, *[1] * (w.ndim - 1)))

    def input_columns(self, mix: Mix) -> Array:
        r"""Return :math:`|W_x|`."""
        return self.rows.inputs

    def plain(self, norm: str) -> list[CellBound]:
        """Return the bounds in the norm itself and, for l2 and l1, in the best diagonal scalings that are found."""
        size = _NORMS[norm]
        first = CellBound(_upper(size(self.W_h)), _upper(size(self.W_x)), metric=f"the {norm} norm of the state")
        if first.contracts:
            return [first]
        scalings = [] if norm == "linf" else _scalings(self.W_h, norm)  # those of linf are weights of the maximum norm
        return [first, *(self._scaled(norm, d) for d in scalings), *([] if norm == "l2" else [self._euclidean(norm)])]

    def _euclidean(self, norm: str) -> CellBound:
        r"""Return the bounds in the Euclidean norm of the state, for inputs and outputs measured otherwise.

        :math:`\|W_x v\|_2` is at most the norm of the row sums of :math:`|W_x|` for :math:`\|v\|_\infty \le 1`, and the largest
        norm of a column for :math:`\|v\|_1 \le 1`.
        """
        if norm == "linf":
            push, output = frobenius_norm(self.rows.from_input("linf")[None]), Bound.point(1.0)
        else:
            push, output = _largest_column(self.W_x), Bound.point(float(self.states)).sqrt()
        return CellBound(_upper(spectral_norm(self.W_h)), _upper(push), _upper(output), "the l2 norm of the state")

    def _scaled(self, norm: str, d: Array) -> CellBound:
        r"""Return the bounds in :math:`\|D h\|`."""
        size = _NORMS[norm]
        with np.errstate(over="ignore"):
            state, inputs = d[:, None] * self.W_h / d, d[:, None] * self.W_x
        if not (np.isfinite(state).all() and np.isfinite(inputs).all()):
            return CellBound(Bound(0.0, math.inf), Bound(0.0, math.inf))
        output = (1.0 / Bound.point(float(d.min(initial=1.0)))).upper
        return CellBound(
            _rounded(size(state), state),
            _rounded(size(inputs), inputs),
            Bound(0.0, output),
            f"the {norm} norm of the state scaled by a diagonal matrix",
        )


def _largest_column(A: Array) -> Bound:
    return Bound(0.0, max((frobenius_norm(column[None]).upper for column in A.T), default=0.0))


def _upper(bound: Bound) -> Bound:
    return Bound(0.0, bound.upper, bound.proved)


def _rounded(bound: Bound, computed: Array) -> Bound:
    """Add what the two roundings of each entry can make up, and underflows."""
    excess = frobenius_norm(computed) * (4 * 2.0**-53 * math.sqrt(max(computed.shape, default=1)) * 2) + 1e-300
    return Bound(0.0, (bound + excess).upper, bound.proved)


def _scalings(W: Array, norm: str) -> list[Array]:
    """Return diagonal scalings that may make a norm of W small: two balancings, and those of Perron vectors of |W|."""
    M = np.abs(W)
    if not M.any():
        return []
    found: list[Any] = [_balanced(M, 2.0), _balanced(M, 1.0)]
    for rate in (1.0, 0.95, 0.75, 0.5):
        with np.errstate(all="ignore"):
            try:
                right, left = (np.linalg.solve(np.eye(len(M)) - A / rate, np.ones(len(M))) for A in (M, M.T))
            except np.linalg.LinAlgError:
                continue
        if min(right.min(), left.min()) > 0.0 and np.isfinite(right).all() and np.isfinite(left).all():
            found.append(np.sqrt(left / right) if norm == "l2" else left)
    scaled: list[Array] = [d / d.max() for d in found if d.min() > 1e-100 * d.max()]
    return scaled


def _balanced(M: Array, power: float) -> Array:
    r"""Return the d for which rows and columns of :math:`d_i M_{ij} / d_j` are of about the same size (Osborne)."""
    d = np.ones(len(M))
    off = M - np.diag(np.diag(M))
    for _ in range(30):
        A = (d[:, None] * off / d) ** power
        rows, columns = A.sum(axis=1) + 1e-200, A.sum(axis=0) + 1e-200
        d = np.clip(d * (columns / rows) ** (0.25 / power), 1e-60, 1e60)
        d /= np.exp(np.log(d).mean())
    return d
