r"""Nonnegative arithmetic, rounded up, for gates whose values are only known to lie in intervals.

A gate :math:`z \in [\check z, \hat z]` mixes what it keeps and what it lets in; the derivative of the mix also has the factor
:math:`z(1 - z)` of the sigmoid. One and the same :math:`z` stands in all three places, so the sharp bound is

.. math:: \sup_{\check z \le z \le \hat z} \; z\,k + (1 - z)\,s + z(1 - z)\,e, \qquad k, s, e \ge 0 .

For a GRU this is the difference between a useful constant and none: with :math:`\hat z` and :math:`1 - \check z` taken apart,
their sum is above 1 for every interval.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stableopt.linalg.proved import as_matrix, gamma
from stableopt.nn import enclosures

__all__ = ["Array", "Chosen", "Mix", "Rows", "Worst", "ends", "rows_times", "up"]

Array = npt.NDArray[np.float64]

_TINY = 2.0**-1074


def up(x: Array, terms: int = 1) -> Array:
    """Round a computed nonnegative expression up: at most ``terms`` roundings, and as many underflows, lie on each path to it.

    Examples:
        >>> bool((up(np.array([1.0])) > 1.0).all())
        True
    """
    return np.where(x > 0.0, x * (1.0 + 2.0 * gamma(terms + 4)) + (terms + 4) * _TINY, x + terms * _TINY)


def rows_times(v: Array, x: Array) -> Array:
    """Multiply each row of a vector or a matrix by a number.

    Examples:
        >>> rows_times(np.array([2.0, 3.0]), np.eye(2))
        array([[2., 0.],
               [0., 3.]])
    """
    return v.reshape(-1, *[1] * (x.ndim - 1)) * x


def ends(function: str, low: Array, high: Array) -> tuple[Array, Array]:
    """Enclose the values of an increasing function of :mod:`stableopt.nn.enclosures` on intervals.

    Args:
        function: ``"sigmoid"`` or ``"tanh"``.
        low: lower ends.
        high: upper ends.

    Examples:
        >>> low, high = ends("tanh", np.array([-np.inf]), np.array([0.0]))
        >>> float(low[0]), 0.0 <= float(high[0]) < 1e-300
        (-1.0, True)
    """
    enclose = getattr(enclosures, function)
    return np.array([enclose(x).lower for x in low.tolist()]), np.array([enclose(x).upper for x in high.tolist()])


class Mix(Protocol):
    """How a gate within an interval mixes three nonnegative arrays."""

    def __call__(self, low: Array, high: Array, keep: Array, new: Array, cross: Array) -> Array:
        r"""Return :math:`z\,k + (1 - z)\,s + z(1 - z)\,e` for some or for the worst :math:`z`."""
        ...


class Worst:
    r"""The supremum over the gate, rounded up; it remembers where it was taken.

    With :math:`z_0` the computed maximizer, :math:`z(1 - z) \le z_0^2 + (1 - 2z_0)z` (a tangent of a concave function), which
    makes the expression linear in z, so that the larger end bounds it; at :math:`z_0` nothing is lost.

    Examples:
        >>> one = np.ones(1)
        >>> Worst()(0 * one, one, one, one, 4 * one).round(9).tolist()
        [2.0]
    """

    def __init__(self) -> None:
        self.places: list[Array] = []

    def __call__(self, low: Array, high: Array, keep: Array, new: Array, cross: Array) -> Array:
        """Return the supremum."""
        low, high = (np.broadcast_to(end.reshape(-1, *[1] * (keep.ndim - 1)), keep.shape) for end in (low, high))
        with np.errstate(over="ignore"):
            inner = (keep - new + cross) / np.where(cross > 0.0, 2.0 * cross, 1.0)
        outer = np.where(keep >= new, high, low)
        place = np.clip(np.where(cross > 0.0, inner, outer), low, high)
        self.places.append(place)
        values = [
            z * keep + (1.0 - z) * new + (place * place + (1.0 - 2.0 * place) * z + 2.0**-50) * cross
            for z in (low, high)
        ]
        return up(np.maximum(*values), 4)


class Chosen:
    """The expression at places that were remembered, which is linear; for finding good weights, nothing is proved with it.

    Examples:
        >>> one = np.ones(1)
        >>> Chosen([0.5 * one])(0 * one, one, one, one, 4 * one)
        array([2.])
    """

    def __init__(self, places: list[Array]) -> None:
        self.places = iter(places)

    def __call__(self, low: Array, high: Array, keep: Array, new: Array, cross: Array) -> Array:
        """Return the mix."""
        z = next(self.places)
        return rows_times(z, keep) + rows_times(1.0 - z, new) + rows_times(z * (1.0 - z), cross)


class Rows:
    r"""What one gate is told: :math:`W_h h + W_x x + b`, with the moduli of its matrices, exactly as stored.

    Args:
        hidden: :math:`W_h`, ``(n, p)``.
        inputs: :math:`W_x`, ``(n, m)``.
        *biases: the biases that are added, ``(n,)`` each; None counts as 0.

    Raises:
        ValueError: if a number is NaN or infinite.

    Examples:
        >>> import torch
        >>> rows = Rows(torch.eye(2), torch.ones(2, 3), torch.tensor([0.5, -0.5]))
        >>> [end.round(9).tolist() for end in rows.interval(np.ones(2), np.ones(3))]
        [[-3.5, -4.5], [4.5, 3.5]]
    """

    def __init__(self, hidden: Tensor, inputs: Tensor, *biases: Tensor | None) -> None:
        self.hidden, self.inputs = (np.abs(as_matrix(W)) for W in (hidden, inputs))
        given = [as_matrix(b, ndim=1) for b in biases if b is not None]
        self.bias: Array = np.sum(given, axis=0) if given else np.zeros(len(self.hidden))
        self.bias_size = up(np.sum(np.abs(given), axis=0) if given else np.zeros(len(self.hidden)), 1)
        self._sizes: dict[str, Array] = {}

    def from_state(self, w: Array) -> Array:
        r"""Return :math:`|W_h|\,w`, rounded up, for ``w >= 0``: how far states that differ by ``w`` move the gate."""
        return up(self.hidden @ w, self.hidden.shape[1])

    def from_input(self, norm: str | None) -> Array:
        """Return how far an input difference of norm 1 moves each entry: the dual norms of the rows, rounded up.

        Args:
            norm: ``"l2"``, ``"linf"``, ``"l1"``, or None for no difference.
        """
        if norm is None or not self.inputs.size:
            return np.zeros(len(self.hidden))
        if norm not in self._sizes:
            A, terms = self.inputs, self.inputs.shape[1]
            if norm == "linf":
                size = up(A.sum(axis=1), terms)
            elif norm == "l1":
                size = A.max(axis=1)
            else:
                top = A.max(axis=1)
                unit = A / np.where(top > 0.0, top, 1.0)[:, None]  # squares neither overflow nor vanish
                size = up(top * np.sqrt((unit * unit).sum(axis=1) + terms * 2.0**-500), terms + 2)
            self._sizes[norm] = size
        return self._sizes[norm]

    def interval(self, state: Array, inputs: Array) -> tuple[Array, Array]:
        """Enclose what the gate is told, for entries of state and input of at most these moduli, possibly infinite."""
        around = self.from_state(state) + _times(self.inputs, inputs) + 4.0 * gamma(4) * self.bias_size
        around = up(around, 3)
        return np.nextafter(self.bias - around, -np.inf), np.nextafter(self.bias + around, np.inf)


def _times(A: Array, u: Array) -> Array:
    """Multiply moduli by limits of which some may be infinite; 0 times infinity is 0."""
    finite = np.isfinite(u)
    total = up(A[:, finite] @ u[finite], A.shape[1])
    return np.where((A[:, ~finite] > 0.0).any(axis=1), np.inf, total)
