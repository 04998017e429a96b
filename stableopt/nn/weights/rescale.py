r"""Weight maps that divide by an upper bound of the norm where it exceeds the radius.

.. math:: V \mapsto V \min\Bigl(1, \frac{\text{radius}}{U(V)}\Bigr), \qquad U(V) \ge \|V\| .

They have no state: the result depends on the original alone, is the same in training and evaluation, and a jump of the original is
followed at once. They differ in the bound :math:`U`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from stableopt.linalg.conv_grid import binary_size
from stableopt.nn.precision import full_precision
from stableopt.nn.weights.base import WeightMap, check_radius, grain, slack
from stableopt.nn.weights.isometry import HALF, stored

__all__ = ["Frobenius", "Gram", "Rescale", "RowSum", "Schur"]


class Rescale(WeightMap):
    """A weight map that divides by an upper bound of the norm where that exceeds the radius; subclasses say which bound.

    Args:
        geometry: the operator.
        radius: the limit.
        norm: the norm that is limited.

    Raises:
        TypeError: as :class:`WeightMap`.
        ValueError: as :class:`WeightMap`.

    Attributes:
        of_moduli: whether the bound grows with every absolute value of an entry. Then rounding an entry by :math:`u` relative
            raises it by no more; otherwise the rounding of half precision has to be measured.

    Note:
        The result is shrunk further by a small multiple of the machine precision, against rounding in the bound and in the
        product, so that what is stored is within the radius.

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> Gram(Geometry("linear"))(0.1 * torch.eye(2)).equal(0.1 * torch.eye(2))
        True
    """

    of_moduli: ClassVar[bool] = True
    _target: tuple[tuple[Any, ...], float] | None = None

    def forward(self, V: Tensor) -> Tensor:
        """Return the weight, scaled down if its norm may exceed the radius."""
        self.geometry.check(V)
        if not V.numel():
            return V
        wide = V.float() if V.dtype in HALF else V
        with full_precision(wide):
            size = binary_size(wide)
            target = (self.target if torch.compiler.is_compiling() else self._kept_target)(V.shape, V.dtype, wide.dtype)
            unit = wide / size
            bound = self.bounds(unit)
            above = ~(bound <= target / size)  # or no number
            factor = torch.where(above, target / torch.where(above, bound, 1.0), size)
            if V.dtype not in HALF or self.of_moduli:
                return (unit * factor).to(V.dtype).contiguous()
            return torch.where(above, stored(unit * factor, V.dtype, self.radius, self.geometry.folded), V).contiguous()

    def target(self, shape: torch.Size, dtype: torch.dtype, computed: torch.dtype) -> float:
        """Return what the computed bound is brought down to: the radius less all rounding that is not measured."""
        check_radius(self.radius, computed)
        V = torch.empty(shape, dtype=computed, device="meta")
        lost = slack(V, computed)
        if not self.of_moduli:
            lost += self.geometry.proof_slack(V)
        elif dtype != computed:
            lost += 0.51 * torch.finfo(dtype).eps
        return self.radius * max(
            0.0, 1.0 - lost - grain(dtype, V.numel(), self.radius, self.geometry.spread(V, self.norm))
        )

    def _kept_target(self, *key: Any) -> float:
        key = (self.geometry, self.radius, *key)
        if self._target is None or self._target[0] != key:
            self._target = key, self.target(*key[2:])
        return self._target[1]

    def bounds(self, V: Tensor) -> Tensor:
        """Return upper bounds of the norms of parts that are scaled on their own, broadcasting to the weight; here of the whole."""
        return self.bound(V)

    @abstractmethod
    def bound(self, V: Tensor) -> Tensor:
        """Return an upper bound of the norm in exact arithmetic, 0-d and differentiable."""


class Gram(Rescale):
    r"""Rescale by the Gram bound: the norm itself up to a few percent, at the price of a few matrix products per forward map.

    For convolutions it is the bound of the operator on images of any size. See :func:`stableopt.linalg.gram_norm` and
    :func:`stableopt.linalg.gram_conv_norm`.

    Args:
        geometry: the operator.
        radius: the limit.
        norm: ``"l2"``.

    Raises:
        TypeError: as :class:`WeightMap`.
        ValueError: as :class:`WeightMap`.

    References:
        Delattre, Barthélemy, Araujo and Allauzen, *Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram
        Iteration*, 2023.

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> W = Gram(Geometry("linear"), 1.0)(10.0 * torch.ones(2, 3))
        >>> bool(0.99 <= torch.linalg.matrix_norm(W, 2) <= 1.0)
        True
    """

    name: ClassVar[str] = "gram"
    of_moduli: ClassVar[bool] = False

    def bound(self, V: Tensor) -> Tensor:
        """Return the Gram bound."""
        return self.geometry.upper(V)


class Frobenius(Rescale):
    r"""Rescale by the Frobenius norm, of a convolution by :math:`\sum_t \|W_t\|_F` over its taps.

    The cheapest bound, and loose: up to :math:`\sqrt{\operatorname{rank}}` for a matrix. A padding that repeats pixels, stride and
    dilation do not matter beyond the factor of the copies.

    Args:
        geometry: the operator.
        radius: the limit.
        norm: ``"l2"``.

    Raises:
        TypeError: as :class:`WeightMap`.
        ValueError: as :class:`WeightMap`.

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> float(Frobenius(Geometry("linear")).bound(torch.tensor([[3.0, 4.0]])))
        5.0
    """

    name: ClassVar[str] = "frobenius"

    def bound(self, V: Tensor) -> Tensor:
        """Return the sum over the taps of their Frobenius norms, the largest over the groups."""
        if self.geometry.kind == "linear":
            return torch.linalg.vector_norm(V)
        taps = V.unflatten(0, (self.geometry.groups, -1)).flatten(3).square().sum(dim=(1, 2))
        safe = torch.where(taps > 0.0, taps, 1.0)
        sizes = torch.where(taps > 0.0, safe.sqrt(), 0.0)  # the derivative of the root is infinite at 0
        return sizes.sum(dim=1).amax() * self.geometry.repeated(V) ** 0.5


class Schur(Rescale):
    r"""Rescale by :math:`\sqrt{\|W\|_1 \|W\|_\infty} \ge \|W\|_2` (Schur's test), for convolutions as well.

    A single pass over the numbers; tight for weights of one sign, loose for random ones.

    Args:
        geometry: the operator.
        radius: the limit.
        norm: ``"l2"``.

    Raises:
        TypeError: as :class:`WeightMap`.
        ValueError: as :class:`WeightMap`.

    References:
        Schur, *Bemerkungen zur Theorie der beschränkten Bilinearformen mit unendlich vielen Veränderlichen*, 1911.

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> float(Schur(Geometry("linear")).bound(torch.ones(2, 2)))
        2.0
    """

    name: ClassVar[str] = "schur"

    def bound(self, V: Tensor) -> Tensor:
        """Return the geometric mean of the two norms."""
        product = self.geometry.upper(V, "l1") * self.geometry.upper(V, "linf")
        return torch.where(product > 0.0, torch.where(product > 0.0, product, 1.0).sqrt(), 0.0)


class RowSum(Rescale):
    r"""Rescale the rows that exceed the radius, each by its own sum: the :math:`\ell_\infty` or :math:`\ell_1` operator norm.

    .. math:: W_{ij} = V_{ij} \min\Bigl(1, \frac{\text{radius}}{\sum_k |V_{ik}|}\Bigr) \quad (\ell_\infty), \qquad
              \text{columns instead of rows for } \ell_1 .

    Exact for matrices. For a convolution a row is the kernel of an output channel, a column that of an input channel.

    Args:
        geometry: the operator.
        radius: the limit.
        norm: ``"linf"`` or ``"l1"``.

    Raises:
        TypeError: as :class:`WeightMap`.
        ValueError: as :class:`WeightMap`.

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> RowSum(Geometry("linear"), 1.0, "linf")(torch.tensor([[3.0, 1.0], [0.25, 0.5]])).round(decimals=4)
        tensor([[0.7500, 0.2500],
                [0.2500, 0.5000]])
    """

    name: ClassVar[str] = "rowsum"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l1"})

    def bound(self, V: Tensor) -> Tensor:
        """Return the largest sum."""
        return self.bounds(V).amax()

    def bounds(self, V: Tensor) -> Tensor:
        """Return the sums, in a shape that broadcasts to the weight."""
        stored_rows = (self.norm == "linf") != (self.geometry.kind == "conv_transpose")
        if stored_rows:  # the sums over everything but the first axis
            sums = V.abs().flatten(1).sum(dim=1)
            return sums.reshape(-1, *(1,) * (V.ndim - 1))
        parts = V.abs().unflatten(0, (self.geometry.groups, -1))
        sums = parts.sum(dim=(1, *range(3, parts.ndim)), keepdim=True) * self.geometry.repeated(V)
        return sums.expand(parts.shape[:2] + sums.shape[2:]).flatten(0, 1)
