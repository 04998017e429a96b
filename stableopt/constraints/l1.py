r"""Balls of the sum norm, plain, weighted, and by rows or columns of a matrix, and the maximum norm, which is dual to it.

**Feasibility** is decided by the sum of the stored moduli, taken in float64 in blocks of about :math:`\sqrt n` entries.
Whatever the order inside a block and among the blocks, the computed :math:`S` of :math:`n` nonnegative terms satisfies

.. math:: \sum_i w_i |x_i| \le S\,(1 + \delta), \qquad \delta = (2 \lfloor\sqrt n\rfloor + 18 + N)\, 2^{-53},

where :math:`N` is the number of processes that hold a part; there is room for the rounding of a weight's product, of a complex
modulus and of the product with :math:`1 + \delta`. Sums of doubles below the normal range are exact. A vector counts as
feasible when :math:`S(1 + \delta) \le r`; a sum that overflows is more than any radius.

**Rounding.** The nearest point :math:`u`, correct to a few roundings, is multiplied by :math:`r / (S(u)(1 + \delta)(1 +
4\delta))` and cast toward zero. The result :math:`p` has :math:`S(p)(1 + \delta) \le r (1 + \delta)^2 / (1 + 4\delta) < r`, so
the same test finds it feasible, and projecting again changes no bit. The price is a sum that stops short of :math:`r` by the
factor :math:`1 - 5\delta` (:math:`10^{-12}` for a million entries), and by one unit in the last place of each entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_dims, check_number, check_numbers, check_tensor
from stableopt.constraints.base import Constraint, Regularizer
from stableopt.constraints.kinds import VectorPenalty, VectorSet
from stableopt.constraints.layout import Vectors, weight_rows
from stableopt.constraints.rounding import toward_zero, unit_scale
from stableopt.constraints.threshold import soft_level

__all__ = ["InfNormBall", "L1Ball", "LinfNorm", "OneNormBall"]

_SMALLEST_NORMAL = 2.0**-1022
_SMALLEST = 2.0**-1074
_SAFE_RADIUS = 2.0**-900  # below it products may be subnormal, and the margins lost
_LEAST_WEIGHT = 2.0**-200  # relative to the largest: the squares of weights are needed
_LEAST_STEP = 2.0**-60  # relative to the largest step of a vector; smaller ones count as this


@dataclass(frozen=True)
class L1Ball(VectorSet):
    r"""The ball :math:`\{x : \sum_i w_i |x_i| \le r\}` of the (weighted) sum norm.

    The projection in the metric :math:`P` shrinks the moduli, with the one :math:`\theta` that puts the sum on the radius:

    .. math:: |u_i| = \max(|x_i| - \theta\, w_i / P_i,\ 0), \qquad \sum_i w_i |u_i| = r.

    Args:
        radius: :math:`r`, finite, :math:`\ge 0`.
        weights: :math:`w_i > 0`, one per entry of a vector in the order of ``dims``, finite; ``None`` for ones.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the radius is negative or not finite, or a weight is not positive and finite, or :math:`2^{200}` times
            smaller than another.

    Note:
        Feasibility is decided by an upper bound of the sum that counts all rounding (see the module): a vector closer to the
        boundary than the relative distance :math:`\delta` may count as outside although it is not, and is then moved inwards. A
        radius below :math:`2^{-900}` may send a vector to the origin. Complex entries keep their phase up to rounding. Zeros of
        the projection have the derivative 0, and on the boundary the derivative is that of the inside. A DTensor is projected
        by sums over the processes, without gathering it. Metrics that span more than 60 binary orders are cut off there.

    References:
        Michelot, *A finite algorithm for finding the projection of a point onto the canonical simplex*, 1986. Duchi,
        Shalev-Shwartz, Singer and Chandra, *Efficient projections onto the l1-ball*, 2008. Condat, *Fast projection onto the
        simplex and the l1 ball*, 2016.

    Examples:
        >>> L1Ball(2.0).project(torch.tensor([3.0, -2.0, 0.5])).round(decimals=5)
        tensor([ 1.5000, -0.5000,  0.0000])
        >>> L1Ball(2.0, weights=(1.0, 4.0, 1.0)).violation(torch.tensor([1.0, -0.25, 0.0]))
        4.4...e-15
        >>> L1Ball(1.0, dims=1).project(torch.tensor([[0.25, 0.5], [4.0, 0.0]])).round(decimals=5)
        tensor([[0.2500, 0.5000],
                [1.0000, 0.0000]])
    """

    radius: float
    weights: tuple[float, ...] | None = None
    dims: int | tuple[int, ...] | None = None
    complex_too: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "radius", check_number("L1Ball", "radius", self.radius, low=0.0))
        if self.weights is not None:
            weights = check_numbers("L1Ball", "weights", self.weights, low=0.0, strict=True)
            if min(weights) < max(weights) * _LEAST_WEIGHT:
                raise ValueError(
                    f"L1Ball needs weights of which none is below {_LEAST_WEIGHT:.0e} times another, got {min(weights)!r} and "
                    f"{max(weights)!r}; leave out what is not constrained."
                )
            object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "dims", check_dims("L1Ball", self.dims))

    @property
    def diagonal(self) -> bool:
        """Whether the projection in a diagonal metric is exact: it is.

        Examples:
            >>> L1Ball(1.0).diagonal
            True
        """
        return True

    def conjugate(self) -> Regularizer:
        """Return the maximum norm with the radius as weight.

        Raises:
            ValueError: if there are weights.

        Examples:
            >>> L1Ball(2.0).conjugate()
            LinfNorm(weight=2.0, dims=None)
        """
        return LinfNorm(self.radius, self.dims) if self.weights is None else super().conjugate()

    def _excess(self, v: Vectors) -> Tensor:
        return self._bound(v, v.data.detach()) - self.radius

    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        size = v.data.abs()
        if self.weights is None and metric is None:
            return _with_phase(v.data, soft_level(v, size, None, self.radius).above)
        # The weights and the metric are brought to at most 1, and the data to size about 1, so that nothing overflows.
        heaviest = 1.0 if self.weights is None else max(self.weights)
        w = (
            torch.ones_like(size[:1])
            if self.weights is None
            else weight_rows("L1Ball", "weights", v, self.weights) / heaviest
        )
        P = torch.ones_like(w) if metric is None else metric / v.max(metric)
        radius = self.radius / heaviest
        scale = unit_scale(v.max(size.detach()).clamp_min(radius))
        unit = soft_level(v, size * scale * (P / w), w * w / P, radius * scale).above
        return _with_phase(v.data, unit * (w / P) / scale)

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        bound = self._bound(v, nearest)
        factor = torch.where(bound > 0, self.radius / torch.where(bound > 0, bound, 1.0) / (1.0 + 4 * _delta(v)), 0.0)
        inner = toward_zero(nearest * factor, v.stored.dtype)
        if self.radius >= _SAFE_RADIUS:
            return inner
        proved = self._bound(v, inner.to(nearest.dtype)) <= self.radius
        return torch.where(proved, inner, torch.zeros_like(inner))

    def _bound(self, v: Vectors, rows: Tensor) -> Tensor:
        """Return an upper bound of the weighted sum of moduli, as the module explains."""
        terms = rows.abs()
        if self.weights is None:
            return _sum_in_blocks(v, terms) * (1.0 + _delta(v))
        products = terms * weight_rows("L1Ball", "weights", v, self.weights)
        below = (products < _SMALLEST_NORMAL) & (terms > 0)
        # Each product below the normal range may have lost half of the smallest number.
        return _sum_in_blocks(v, products) * (1.0 + _delta(v)) + v.sum(below.double()) * _SMALLEST


@dataclass(frozen=True)
class LinfNorm(VectorPenalty):
    r"""The maximum norm :math:`g(x) = \lambda \max_i |x_i|`, summed over all vectors along ``dims``.

    The prox clips the moduli at one level, in any diagonal metric: :math:`|u_i| = \min(|x_i|, t)`, where

    .. math:: \sum_i \max(|x_i| - t,\ 0) / s_i = \lambda, \qquad \text{or } t = 0 \text{ if } \sum_i |x_i| / s_i \le \lambda.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the weight is negative or not finite.

    Note:
        The prox is rounded to nearest. Clipped entries come out equal, except complex ones, whose phases round. Steps of one
        vector that span more than 60 binary orders are cut off there. Where entries lie exactly on the level, the derivative is
        that of unclipped ones. A DTensor needs sums over the processes, no gathering.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.5.2.

    Examples:
        >>> LinfNorm(1.0).prox(torch.tensor([3.0, -2.0, 0.5]), step=2.0)
        tensor([ 1.5000, -1.5000,  0.5000])
        >>> LinfNorm(2.0, dims=1).value(torch.tensor([[1.0, -3.0], [0.0, 0.5]])).item()
        7.0
    """

    weight: float
    dims: int | tuple[int, ...] | None = None
    complex_too: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "weight", check_number("LinfNorm", "weight", self.weight, low=0.0))
        object.__setattr__(self, "dims", check_dims("LinfNorm", self.dims))

    @property
    def diagonal(self) -> bool:
        """Whether the prox in a diagonal metric is exact: it is.

        Examples:
            >>> LinfNorm(1.0).diagonal
            True
        """
        return True

    def conjugate(self) -> Regularizer:
        """Return the ball of the sum norm with the weight as radius.

        Examples:
            >>> LinfNorm(2.0, dims=-1).conjugate()
            L1Ball(radius=2.0, weights=None, dims=-1)
        """
        return L1Ball(self.weight, dims=self.dims)

    def _value(self, v: Vectors) -> Tensor:
        return self.weight * v.max(v.data.abs()).clamp_min(0.0)  # the maximum of no entries is -inf

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        size = v.data.abs()
        if step.numel() == 1:
            level = soft_level(v, size, None, self.weight * step)
        else:
            longest = v.max(step)
            ratio = torch.where(longest > 0, longest / step.clamp_min(longest * _LEAST_STEP), 1.0)
            level = soft_level(v, size, ratio, self.weight * longest)
        clipped = torch.where(level.above > 0, level.theta, size)
        return _with_phase(v.data, torch.where(level.theta > 0, clipped, 0.0 * size))


class _LineBall(Constraint):
    """The matrices of which every row, or every column, lies in one ball of the sum norm."""

    complex_too: ClassVar[bool] = True
    radius: float
    dims: tuple[int, int] | None
    _along: ClassVar[int]

    def __post_init__(self) -> None:
        """Check the arguments."""
        name = type(self).__name__
        object.__setattr__(self, "radius", check_number(name, "radius", self.radius, low=0.0))
        dims = check_dims(name, self.dims)
        if dims is not None and (not isinstance(dims, tuple) or len(dims) != 2):
            raise ValueError(f"{name} needs two dimensions, rows and columns, as dims, got {dims!r}.")
        object.__setattr__(self, "dims", dims)

    @property
    def diagonal(self) -> bool:
        """Whether the projection in a diagonal metric is exact: it is."""
        return True

    def project(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest matrix of the set, rounded inwards.

        Args:
            x: a matrix, or a batch of matrices if ``dims`` are given; never changed.
            metric: positive tensor that broadcasts to ``x``.

        Raises:
            TypeError: if ``x`` or ``metric`` has the wrong type.
            ValueError: if the shape or the metric does not fit.
        """
        return self._lines(x).project(x, metric)

    def violation(self, x: Tensor) -> float:
        """Return by how much the bound of the norm exceeds the radius; 0.0 exactly if every line is proved feasible.

        Raises:
            TypeError: if ``x`` has the wrong type.
            ValueError: if the shape does not fit.
        """
        return self._lines(x).violation(x)

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the projection, in the metric ``metric / step`` if one of them is a tensor; a number as step has no influence.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if ``step`` is negative or not finite, or a shape does not fit.
        """
        return self._lines(x).prox(x, step, metric)

    def _lines(self, x: Tensor) -> L1Ball:
        name = type(self).__name__
        check_tensor(name, x, complex_too=True)
        if self.dims is None and x.ndim != 2:
            raise ValueError(
                f"{name} needs a matrix with two dimensions, got shape {tuple(x.shape)}. "
                "For a batch of matrices say which two dimensions hold one, as in dims=(-2, -1)."
            )
        pair = (0, 1) if self.dims is None else self.dims
        if any(not -x.ndim <= d < x.ndim for d in pair) or (pair[0] - pair[1]) % x.ndim == 0:
            raise ValueError(f"{name} with dims={pair!r} needs two dimensions of the tensor, got {tuple(x.shape)}.")
        return L1Ball(self.radius, dims=pair[self._along])


@dataclass(frozen=True)
class InfNormBall(_LineBall):
    r"""The matrices with :math:`\|W\|_{\infty\to\infty} = \max_i \sum_j |W_{ij}| \le r`: gain at most r in the maximum norm.

    Each row is projected on its own, onto :class:`L1Ball`; feasibility and rounding are described there.

    Args:
        radius: :math:`r`, finite, :math:`\ge 0`.
        dims: the dimensions of the rows and of the columns; ``None`` for a tensor with exactly two.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the radius is negative or not finite, or ``dims`` is not a pair.

    Note:
        The projection is the one in the Frobenius norm (or a diagonal metric), not in the operator norm.

    References:
        Gouk, Frank, Pfahringer and Cree, *Regularisation of neural networks by enforcing Lipschitz continuity*, 2021, section 3.

    Examples:
        >>> W = InfNormBall(1.0).project(torch.tensor([[2.0, 1.0], [0.25, -0.25]]))
        >>> W.round(decimals=5)
        tensor([[ 1.0000,  0.0000],
                [ 0.2500, -0.2500]])
    """

    radius: float
    dims: tuple[int, int] | None = None
    _along: ClassVar[int] = 1


@dataclass(frozen=True)
class OneNormBall(_LineBall):
    r"""The matrices with :math:`\|W\|_{1\to1} = \max_j \sum_i |W_{ij}| \le r`: gain at most r in the sum norm.

    Each column is projected on its own, onto :class:`L1Ball`; feasibility and rounding are described there.

    Args:
        radius: :math:`r`, finite, :math:`\ge 0`.
        dims: the dimensions of the rows and of the columns; ``None`` for a tensor with exactly two.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the radius is negative or not finite, or ``dims`` is not a pair.

    Note:
        The projection is the one in the Frobenius norm (or a diagonal metric), not in the operator norm.

    References:
        Gouk, Frank, Pfahringer and Cree, *Regularisation of neural networks by enforcing Lipschitz continuity*, 2021, section 3.

    Examples:
        >>> OneNormBall(1.0).violation(torch.tensor([[0.25, 1.0], [0.25, -1.0]])).__round__(6)
        1.0
    """

    radius: float
    dims: tuple[int, int] | None = None
    _along: ClassVar[int] = 0


def _with_phase(x: Tensor, size: Tensor) -> Tensor:
    """Return the numbers with the phases (signs) of ``x`` and other moduli; 0 stays 0."""
    if not x.is_complex():
        return torch.copysign(size, x)
    modulus = x.abs()
    return x * (size / torch.where(modulus > 0, modulus, 1.0))


def _sum_in_blocks(v: Vectors, terms: Tensor) -> Tensor:
    """Return the sum of each vector, first in blocks of about the root of its length."""
    length = math.isqrt(v.size) + 1
    count = terms.shape[1] // length
    blocks = terms[:, : count * length].unflatten(1, (count, length)).sum(dim=2) if count else terms[:, :0]
    rest = terms[:, count * length :].sum(dim=1, keepdim=True)
    return v.sum(torch.cat((blocks, rest), dim=1))


def _delta(v: Vectors) -> float:
    """Return the relative error bound of :func:`_sum_in_blocks`, with room for the roundings around it."""
    processes = sum(torch.distributed.get_world_size(group) for group in v.groups) if v.groups else 0
    return (2 * math.isqrt(v.size) + 18 + processes) * 2.0**-53
