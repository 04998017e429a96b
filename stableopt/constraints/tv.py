r"""Total variation along one dimension, exactly and in linear time, and the fused lasso.

**Algorithm** (Johnson 2013). Let :math:`f_i(b)` be the least cost of the first :math:`i` entries if entry :math:`i + 1` is
:math:`b`. Its derivative is the one of :math:`f_{i-1}` plus :math:`P_i (b - x_i)`, clipped to :math:`[-w, w]`: piecewise linear,
and constant outside of two numbers :math:`l_i \le h_i`. Each entry adds two knots and deletes those that are clipped away, and each
knot is deleted once: :math:`O(n)` for any input and any weight. Going back, :math:`u_i` is :math:`u_{i+1}` clipped to
:math:`[l_i, h_i]`; where it is not clipped, the two are equal.

**Rounding.** The passes run on numbers scaled to size 1, and only the *segments* and the directions of the jumps
between them are taken from their result. The value of a segment is then computed anew from the stored entries,

.. math:: u = \frac{\sum_i P_i x_i + w (\sigma_+ - \sigma_-)}{\sum_i P_i}, \qquad \sigma_\pm \in \{-1, 0, 1\},

with the direction :math:`\sigma_-` of the jump before it and :math:`\sigma_+` of the one after it (0 at the ends): rounding does
not add up along the row. It can only split or join two segments whose values are equal up to rounding; where the jump between two
segments comes out the wrong way around, they are joined.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from stableopt.constraints.arguments import check_dims, check_number
from stableopt.constraints.isotonic import block_means, on_rows
from stableopt.constraints.kinds import VectorPenalty
from stableopt.constraints.layout import Vectors, carries_derivative, substitute
from stableopt.constraints.rounding import unit_scale
from stableopt.constraints.tv_loop import compiled_passes

__all__ = ["FusedLasso", "TV1D"]

_SPREAD = 2.0**-40  # of the steps of a vector: sums and differences of their inverses must keep the small ones
_ROUNDS = 8  # of joining what rounding has split; two are rarely needed


@dataclass(frozen=True)
class TV1D(VectorPenalty):
    r"""The total variation along one dimension, :math:`g(x) = w \sum_i |x_{i+1} - x_i|`: few jumps.

    The prox is piecewise constant. In a diagonal metric :math:`P` it is exact as well,

    .. math:: \arg\min_u\ w \sum_i |u_{i+1} - u_i| + \tfrac{1}{2s} \sum_i P_i (u_i - x_i)^2.

    Args:
        weight: :math:`w`, finite, :math:`\ge 0`.
        dims: the dimension along which neighbors are compared. A tuple of dimensions, or ``None`` for all of them, reads the
            entries of a vector in that order, as one line.

    Raises:
        TypeError: if the weight is not a real number, or ``dims`` are not dimensions.
        ValueError: if it is negative or not finite, or ``dims`` names a dimension twice.

    Note:
        :math:`O(n)` in every case, by a loop on the CPU, which waits for other devices: compiled where there is a C compiler
        (:mod:`stableopt.constraints.native`), else in Python, with the same bits, at about a microsecond
        for each entry. A vector with NaN or infinity becomes NaN. The derivative averages over segments; where two of them are
        about to join or part it is one element of the Clarke Jacobian. Errors are of the order of rounding relative to the largest
        :math:`P_i |x_i|` of the vector, and steps in a metric are raised to at least :math:`2^{-40}` of the largest of the vector.

    References:
        Johnson, *A dynamic programming algorithm for the fused lasso and L0-segmentation*, JCGS 22, 2013; Condat, *A direct
        algorithm for 1-D total variation denoising*, IEEE SPL 20, 2013, for the optimality conditions.

    Examples:
        >>> import torch
        >>> TV1D(1.0).prox(torch.tensor([0.0, 1.0, 9.0, 10.0]))
        tensor([1., 1., 9., 9.])
        >>> TV1D(1.0, dims=0).value(torch.tensor([[1.0, 0.0], [3.0, -1.0]])).item()
        3.0
    """

    weight: float
    dims: int | tuple[int, ...] | None = -1
    needs_whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "weight", check_number("TV1D", "weight", self.weight, low=0.0))
        object.__setattr__(self, "dims", check_dims("TV1D", self.dims))

    @property
    def diagonal(self) -> bool:
        """True: the prox is exact in a diagonal metric."""
        return True

    def _value(self, v: Vectors) -> Tensor:
        return self.weight * _variation(v)

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        return _flattened(v.data, step, self.weight)


@dataclass(frozen=True)
class FusedLasso(VectorPenalty):
    r"""Few jumps and few entries: :math:`g(x) = w \sum_i |x_{i+1} - x_i| + \lambda \sum_i |x_i|` along one dimension.

    The prox is that of the total variation followed by soft-thresholding, which is exact because the latter keeps order and
    equality of neighbors, so that a subgradient of the total variation at the first result is one at the second:

    .. math:: \operatorname{prox}_{sg} = \operatorname{prox}_{s \lambda \|\cdot\|_1} \circ \operatorname{prox}_{s w \mathrm{TV}}.

    Args:
        tv: :math:`w`, finite, :math:`\ge 0`.
        l1: :math:`\lambda`, finite, :math:`\ge 0`.
        dims: as for :class:`TV1D`.

    Raises:
        TypeError: if a weight is not a real number, or ``dims`` are not dimensions.
        ValueError: if a weight is negative or not finite, or ``dims`` names a dimension twice.

    Note:
        What :class:`TV1D` says holds here, except that there is no exact prox in a diagonal metric: different thresholds would part
        neighbors that are equal.

    References:
        Tibshirani, Saunders, Rosset, Zhu and Knight, *Sparsity and smoothness via the fused lasso*, JRSS B 67, 2005; Friedman,
        Hastie, Höfling and Tibshirani, *Pathwise coordinate optimization*, Annals of Applied Statistics 1, 2007, lemma A.1.

    Examples:
        >>> import torch
        >>> FusedLasso(tv=1.0, l1=2.0).prox(torch.tensor([0.0, 1.0, 9.0, 10.0]))
        tensor([0., 0., 7., 7.])
        >>> FusedLasso(tv=1.0, l1=2.0).value(torch.tensor([0.0, -1.0])).item()
        3.0
    """

    tv: float
    l1: float
    dims: int | tuple[int, ...] | None = -1
    needs_whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("tv", "l1"):
            object.__setattr__(self, name, check_number("FusedLasso", name, getattr(self, name), low=0.0))
        object.__setattr__(self, "dims", check_dims("FusedLasso", self.dims))

    def _value(self, v: Vectors) -> Tensor:
        return self.tv * _variation(v) + self.l1 * v.sum(v.data.abs())

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        u = _flattened(v.data, step, self.tv)
        threshold = step * self.l1
        return u - u.clamp(-threshold, threshold)


def _variation(v: Vectors) -> Tensor:
    return v.sum(v.data.diff(dim=1).abs())


def _flattened(x: Tensor, step: Tensor, weight: float) -> Tensor:
    """Return the proximal points of the total variation of rows; ``step`` is ``(1, 1)`` or has the shape of ``x``."""
    if x.numel() == 0 or weight == 0.0:
        return x
    finite = x.isfinite().all(dim=1, keepdim=True)
    safe = torch.where(finite, x, 0.0)
    scale = unit_scale(safe.detach().abs().amax(dim=1, keepdim=True))  # sums of 1e308 must not overflow
    top = step.amax(dim=1, keepdim=True)
    metric = torch.where(top > 0, top / step.clamp_min(top * _SPREAD), 1.0).expand(x.shape)
    # No multiplier is larger than 16 times the total metric, as the scaled entries are below 4: more weight changes nothing.
    enough = 16.0 * metric.detach().sum(dim=1, keepdim=True)
    tube = (weight * top * scale).clamp_max(sys.float_info.max).minimum(enough).expand(x.shape[0], 1)
    (u,) = on_rows(_levels, safe * scale, metric, tube)
    if carries_derivative(x, step):
        first, lift = on_rows(_places, safe * scale, metric, tube)
        u = substitute(block_means(safe * scale, first, metric, lift * tube), u)
    u = u / scale
    return torch.where(finite, torch.where(tube > 0, u, safe), torch.nan)


def _segments(values: np.ndarray, metric: np.ndarray, tube: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return of each segment start, length, the direction of the jump after it minus that before it, weighted sum and mass."""
    found = compiled_passes(values, metric, tube) or _looped(values, metric, tube)
    start, sign, total, mass = _joined(values, metric, tube, *found)
    return start, np.diff(start, append=values.size), np.diff(sign, append=0.0), total, mass


def _levels(values: np.ndarray, metric: np.ndarray, tube: np.ndarray) -> tuple[np.ndarray]:
    """Return the proximal points: the means of the segments, corrected by the mean deviation, plus what the jumps add."""
    start, sizes, lift, total, mass = _segments(values, metric, tube)
    mean = total / mass
    mean += np.add.reduceat(metric.ravel() * (values.ravel() - np.repeat(mean, sizes)), start) / mass
    mean += tube.ravel()[start // values.shape[1]] * lift / mass
    return (np.repeat(mean, sizes).reshape(values.shape),)


def _places(values: np.ndarray, metric: np.ndarray, tube: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each entry where in its row its segment starts, and the direction of the jump after it minus that before it."""
    start, sizes, lift, *_ = _segments(values, metric, tube)
    first = np.repeat(start % values.shape[1], sizes)
    return first.reshape(values.shape), np.repeat(lift, sizes).reshape(values.shape)


def _looped(values: np.ndarray, metric: np.ndarray, tube: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what :func:`compiled_passes` returns, to the bit, by loops in Python."""
    batch, n = values.shape
    starts: list[int] = []
    signs: list[float] = []
    for i in reversed(range(batch)):  # from the last entry of all to the first, as each row is read backward
        passed = _forward(values[i].tolist(), metric[i].tolist(), float(tube[i, 0]))
        _backward(i * n, *passed, starts, signs)
    return np.array(starts[::-1]), np.array(signs[::-1])


def _joined(
    values: np.ndarray, metric: np.ndarray, tube: np.ndarray, start: np.ndarray, sign: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return starts, signs, weighted sums and masses without the jumps whose direction contradicts the values of the segments."""
    width = tube.ravel()[start // values.shape[1]]
    total, mass = np.add.reduceat((metric * values).ravel(), start), np.add.reduceat(metric.ravel(), start)
    for _ in range(_ROUNDS):
        rise = np.diff((total + width * np.diff(sign, append=0.0)) / mass)
        heads = np.flatnonzero(np.concatenate(([True], (rise * sign[1:] > 0.0) | (sign[1:] == 0.0))))
        if heads.size == start.size:
            break
        start, sign, width = start[heads], sign[heads], width[heads]
        total, mass = np.add.reduceat(total, heads), np.add.reduceat(mass, heads)
    return start, sign, total, mass


def _forward(values: list[float], metric: list[float], tube: float) -> tuple[float, list[float], list[float]]:
    r"""Return the last entry of the proximal point, and the bounds to which the others are clipped.

    The derivative of the message is :math:`a x + b - w` next to its lower end ``lo``, :math:`c x + d + w` next to its upper end
    ``hi``. At the inner knots ``X[l], ..., X[r]`` slope and intercept grow by ``A`` and ``B``.
    """
    X, A, B = ([0.0] * (2 * len(values)) for _ in range(3))
    l, r = len(values), len(values) - 1
    lo = hi = values[0]
    a, c, b, d = 0.0, 0.0, tube, -tube  # before the first entry there is nothing: the derivative is 0
    low, high = [], []
    for x, p in zip(values, metric, strict=True):
        if x < lo:
            l -= 1
            X[l], A[l], B[l] = lo, a, b
            a = b = 0.0
        elif x > hi:
            r += 1
            X[r], A[r], B[r] = hi, -c, -d
            c = d = 0.0
        px = p * x
        a, b = a + p, b - px
        c, d = c + p, d - px
        while l <= r and a * X[l] + b <= 0.0:
            a, b, l = a + A[l], b + B[l], l + 1
        while l <= r and c * X[r] + d >= 0.0:
            c, d, r = c - A[r], d - B[r], r - 1
        if l > r:  # one line from end to end: the end that is older takes over the sums of the newer one
            if x > hi:
                a, b = c, d + 2.0 * tube
            else:
                c, d = a, b - 2.0 * tube
        # No slope is below p, but the sums of metrics of very different sizes cancel. A call of max would take longer.
        a, c = a if a > p else p, c if c > p else p  # noqa: FURB136
        lo, hi = -b / a, -d / c
        low.append(lo)
        high.append(hi)
    inner = slice(l, r + 1)
    return _root(a, b - tube, zip(X[inner], A[inner], B[inner], strict=True), metric[-1]), low[:-1], high[:-1]


def _root(a: float, b: float, knots: Iterable[tuple[float, float, float]], least: float) -> float:
    """Return where a function is 0 that is a x + b at first, changes by A x + B at each knot X, and rises by ``least`` or more."""
    for X, A, B in knots:
        if a * X + b >= 0.0:
            break
        a, b = a + A, b + B
    return -b / max(a, least)


def _backward(at: int, last: float, low: list[float], high: list[float], starts: list[int], signs: list[float]) -> None:
    """Append, from the last to the first, where segments start and in which direction the jump to each goes; 0 for the first."""
    u = last
    for i, lo, hi in zip(range(at + len(low), at, -1), reversed(low), reversed(high), strict=True):
        if u < lo:
            u = lo
            starts.append(i)
            signs.append(-1.0)
        elif u > hi:
            u = hi
            starts.append(i)
            signs.append(1.0)
    starts.append(at)
    signs.append(0.0)
