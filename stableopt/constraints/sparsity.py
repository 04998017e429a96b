"""Vectors with few nonzero entries. Feasibility counts the stored numbers that are not 0, which needs no rounding at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_dims, check_number
from stableopt.constraints.kinds import VectorSet
from stableopt.constraints.layout import Vectors
from stableopt.constraints.rounding import unit_scale

__all__ = ["Sparsity"]


@dataclass(frozen=True)
class Sparsity(VectorSet):
    r"""The set :math:`\{x : \#\{i : x_i \ne 0\} \le k\}`; the projection keeps the :math:`k` entries of largest modulus.

    In the norm :math:`\sum_i P_i u_i^2` it keeps those with the largest :math:`\sqrt{P_i}\, |x_i|`.

    Args:
        k: number of entries that may be nonzero, an int :math:`\ge 0`.
        dims: the dimensions along which the entries of one vector lie, an int or a tuple; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``k`` is negative.

    Note:
        The set is not convex, and of entries that tie the ones with the lowest index are kept (in the order of ``dims``). Real
        entries are compared exactly if there is no metric; otherwise a tie is one of computed float64 numbers. Kept entries
        keep their bits. The derivative is 1 for kept entries and 0 for others, and the identity for feasible vectors. A vector
        with an infinite entry becomes NaN. A DTensor is gathered.

    References:
        Blumensath and Davies, *Iterative hard thresholding for compressed sensing*, 2009.

    Examples:
        >>> import torch
        >>> Sparsity(2).project(torch.tensor([1.0, -3.0, 2.0, 0.5]))
        tensor([ 0., -3.,  2.,  0.])
        >>> Sparsity(1, dims=1).project(torch.tensor([[2.0, -2.0], [0.0, 5.0]]))
        tensor([[2., 0.],
                [0., 5.]])
        >>> Sparsity(1).violation(torch.tensor([1.0, -3.0, 2.0]))
        2.0
    """

    complex_too: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = True
    k: int
    dims: int | tuple[int, ...] | None = None
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_number("Sparsity", "k", self.k, low=0.0)
        if not isinstance(self.k, int):
            raise TypeError(f"Sparsity needs an int as k, the number of nonzero entries, got {self.k!r}.")
        object.__setattr__(self, "dims", check_dims("Sparsity", self.dims))

    @property
    def diagonal(self) -> bool:
        """Whether the projection in a diagonal metric is exact: it is.

        Examples:
            >>> Sparsity(1).project(torch.tensor([2.0, 3.0]), metric=torch.tensor([4.0, 1.0]))
            tensor([2., 0.])
        """
        return True

    def _excess(self, v: Vectors) -> Tensor:
        return v.sum((v.stored.detach() != 0).double()) - self.k

    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        size = v.data.detach().abs()
        if metric is not None:
            # Both factors are brought to size about 1, so that products neither overflow nor tie at 0.
            size = size * unit_scale(v.max(size)) * (metric * unit_scale(v.max(metric))).sqrt()
        order = torch.sort(size, dim=1, descending=True, stable=True).indices
        kept = torch.zeros_like(size).scatter(1, order[:, : self.k], 1.0)
        return torch.where(kept > 0, v.data, 0.0)

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        return nearest.to(v.stored.dtype)  # exact: the entries come from that dtype
