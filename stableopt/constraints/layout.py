"""Views of a tensor as many vectors or many matrices, in float64, with reductions that reach across processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stableopt.constraints.arguments import check_tensor
from stableopt.constraints.rounding import COMPLEX_DTYPES
from stableopt.constraints.sharding import Sharding, is_sharded, part_like

__all__ = ["Matrices", "Vectors", "carries_derivative", "substitute", "weight_rows"]

Dims = int | tuple[int, ...] | None


class Vectors:
    r"""A tensor as ``batch`` vectors of ``n`` entries each, one per row.

    Of a DTensor the rows hold what lies on this process, and :meth:`sum` and :meth:`max` communicate where a vector is
    split, so that
    code written with them gives the same on one process and on many.

    Args:
        owner: the class that asks, for messages.
        x: float64, float32, bfloat16 or float16 tensor of any shape; complex128 or complex64 if ``complex_too``.
        dims: the dimensions along which the entries of one vector lie; ``None`` for all of them, which gives one row.
        complex_too: whether complex tensors work.

    Attributes:
        stored: the entries as they are, shape ``(batch, n)``.
        data: the same in float64 or complex128, carrying gradients.
        size: number of entries of one vector on all processes together.
        groups: process groups over which each vector is split; empty in a single process.

    Raises:
        TypeError: if ``x`` has another dtype.
        ValueError: if it lacks one of the dimensions, or is a DTensor that cannot be worked on.

    Examples:
        >>> v = Vectors("L2Ball", torch.ones(2, 3, 4), dims=(0, 2))
        >>> v.data.shape, v.size, v.sum(v.data).flatten().tolist()
        (torch.Size([3, 8]), 8, [8.0, 8.0, 8.0])
        >>> v.fold(v.stored).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, owner: str, x: Tensor, dims: Dims, *, complex_too: bool = False) -> None:
        check_tensor(owner, x, complex_too=complex_too)
        self.whole = x
        self.dims = _positive(owner, dims, x)
        self.layout = Sharding.of(owner, x) if is_sharded(x) else None  # pyright: ignore[reportArgumentType]
        self.groups = self.layout.groups(self.dims) if self.layout else []
        self._all_groups = self.layout.groups(None) if self.layout else []
        local: Tensor = x.to_local() if self.layout else x  # pyright: ignore[reportAttributeAccessIssue]
        self._shape = local.shape
        self.stored = self.rows(local)
        self.data = self.stored.to(torch.complex128 if x.dtype in COMPLEX_DTYPES else torch.float64)
        self.size = x.numel() if self.dims is None else math.prod(x.shape[d] for d in self.dims)

    def finite(self) -> Tensor:
        """Return whether all entries of a vector are finite, shape ``(batch, 1)``."""
        return self.sum(self.data.detach() * 0.0) == 0

    def rows(self, local: Tensor) -> Tensor:
        """Return a tensor of the local shape as rows."""
        if self.dims is None:
            return local.reshape(1, -1)
        length = math.prod(local.shape[d] for d in self.dims)
        batch = math.prod(n for d, n in enumerate(local.shape) if d not in self.dims)
        return local.movedim(self.dims, tuple(range(-len(self.dims), 0))).reshape(batch, length)

    def spread(self, other: Tensor) -> Tensor:
        """Return a tensor that broadcasts to the original one, such as a metric, as float64 rows; one number as ``(1, 1)``."""
        if other.numel() == 1:
            number = other.full_tensor() if is_sharded(other) else other  # pyright: ignore[reportAttributeAccessIssue]
            return number.reshape(1, 1).double()
        return self.rows(part_like(self.whole, other, self.layout)).double()

    def fold(self, rows: Tensor) -> Tensor:
        """Return rows as a tensor of the original shape and layout; the inverse of :meth:`rows`."""
        if self.dims is None:
            local = rows.reshape(self._shape)
        else:
            kept = [n for d, n in enumerate(self._shape) if d not in self.dims]
            moved = rows.reshape(*kept, *(self._shape[d] for d in self.dims))
            local = moved.movedim(tuple(range(-len(self.dims), 0)), self.dims)
        return self.layout.wrap(local) if self.layout else local

    def sum(self, terms: Tensor) -> Tensor:
        """Return the sum of each vector, shape ``(batch, 1)``, over all processes."""
        return _reduced(terms.sum(dim=1, keepdim=True), "sum", self.groups)

    def max(self, terms: Tensor) -> Tensor:
        """Return the largest entry of each vector, shape ``(batch, 1)``, over all processes; NaN wins, none gives -inf."""
        top = terms.new_full((terms.shape[0], 1), -math.inf) if terms.shape[1] == 0 else terms.amax(dim=1, keepdim=True)
        if self.groups:  # a maximum over processes may drop NaN
            nan = _reduced(top.isnan().double(), "sum", self.groups) > 0
            finite = torch.where(top.isnan(), -math.inf, top)
            top = torch.where(nan, math.nan, _reduced(finite, "max", self.groups))
        return top

    def total(self, terms: Tensor) -> Tensor:
        """Return the sum of one number per vector, 0-d, over all vectors of all processes."""
        # A vector that is split has its number on every process of its groups: the first one counts it.
        first = all(torch.distributed.get_rank(g) == 0 for g in self.groups)
        mine = terms.sum() if first else torch.zeros_like(terms.sum())
        return _reduced(mine, "sum", self._all_groups)

    def worst(self, terms: Tensor) -> float:
        """Return the largest of one number per vector (at least 0), over all vectors of all processes; NaN counts as infinite."""
        top = terms.nan_to_num(nan=math.inf, posinf=math.inf).amax() if terms.numel() else terms.new_zeros(())
        return max(float(_reduced(top, "max", self._all_groups)), 0.0)


class Matrices:
    """A tensor as a batch of matrices, shape ``(batch, m, n)``.

    Args:
        owner: the class that asks, for messages.
        x: float64, float32, bfloat16 or float16 tensor; complex128 or complex64 if ``complex_too``. Not a DTensor.
        dims: the two dimensions of one matrix; ``None`` asks for a tensor with exactly two.
        advice: what to do instead when the shape does not fit.
        complex_too: whether complex tensors work.

    Attributes:
        stored: the entries as they are.
        data: the same in float64 or complex128, carrying gradients.

    Raises:
        TypeError: if ``x`` has another dtype.
        ValueError: if the shape does not fit.

    Examples:
        >>> m = Matrices("PSD", torch.ones(2, 5, 3), dims=(0, 2))
        >>> m.data.shape, m.fold(m.stored).shape
        (torch.Size([5, 2, 3]), torch.Size([2, 5, 3]))
    """

    def __init__(
        self, owner: str, x: Tensor, dims: tuple[int, int] | None, *, advice: str = "", complex_too: bool = False
    ) -> None:
        check_tensor(owner, x, complex_too=complex_too)
        if dims is None and x.ndim != 2:
            raise ValueError(
                f"{owner} needs a matrix with two dimensions, got shape {tuple(x.shape)}. {advice}".rstrip()
                + " For a batch of matrices say which two dimensions hold one, as in dims=(-2, -1)."
            )
        first, second = _positive(owner, (0, 1) if dims is None else dims, x) or (0, 1)
        self.dims = (first, second)
        self._shape = x.shape
        moved = x.movedim(self.dims, (-2, -1))
        self._kept = moved.shape[:-2]
        self.stored = moved.reshape(math.prod(self._kept), *moved.shape[-2:])
        self.data = self.stored.to(torch.complex128 if x.dtype in COMPLEX_DTYPES else torch.float64)

    def fold(self, batch: Tensor) -> Tensor:
        """Return a batch of matrices as a tensor of the original shape."""
        return batch.reshape(*self._kept, *batch.shape[-2:]).movedim((-2, -1), self.dims)


def substitute(smooth: Tensor, value: Tensor) -> Tensor:
    """Return the numbers of ``value`` with the derivative of ``smooth``.

    Args:
        smooth: tensor that carries the derivative. Where it overflowed to infinity the derivative is 0.
        value: tensor of the same shape and dtype.

    Returns:
        ``value`` bit for bit, except that -0.0 becomes 0.0.

    Examples:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = substitute(2 * x, torch.tensor(5.0))
        >>> torch.autograd.grad(y, x)[0].item(), y.item()
        (2.0, 5.0)
    """
    return torch.where(smooth.isfinite(), value.detach() + (smooth - smooth.detach()), value.detach())


def carries_derivative(*tensors: Tensor) -> bool:
    """Return whether something differentiates through one of the tensors: autograd in either mode, or a transform of torch.func.

    Examples:
        >>> x = torch.ones(2, requires_grad=True)
        >>> carries_derivative(x), carries_derivative(x.detach())
        (True, False)
    """
    return any(
        (x.requires_grad and torch.is_grad_enabled())
        or torch.func.debug_unwrap(x) is not x
        or forward_ad.unpack_dual(x).tangent is not None
        for x in tensors
    )


def _positive(owner: str, dims: Dims, x: Tensor) -> tuple[int, ...] | None:
    if dims is None:
        return None
    wanted = (dims,) if isinstance(dims, int) else dims
    if any(not -x.ndim <= d < x.ndim for d in wanted):
        raise ValueError(f"{owner} with dims={dims!r} needs a tensor that has them, got shape {tuple(x.shape)}.")
    positive = tuple(d % x.ndim for d in wanted)
    if len(set(positive)) != len(positive):
        raise ValueError(f"{owner} with dims={dims!r} names one dimension of shape {tuple(x.shape)} twice.")
    return positive


def _reduced(t: Tensor, operation: str, groups: list[object]) -> Tensor:
    if not groups:
        return t
    from torch.distributed import ReduceOp, all_reduce

    result = t.detach().clone().contiguous()
    for group in groups:
        all_reduce(result, ReduceOp.SUM if operation == "sum" else ReduceOp.MAX, group=group)  # pyright: ignore[reportArgumentType]
    return result


def weight_rows(owner: str, name: str, v: Vectors, weights: tuple[float, ...]) -> Tensor:
    """Return one number per entry of a vector, in the order of ``dims``, as rows: what of them lies on this process.

    Args:
        owner: the class that asks, for the message.
        name: what the numbers are, for the message.
        v: the vectors.
        weights: the numbers.

    Raises:
        ValueError: if there are not as many as entries.

    Examples:
        >>> weight_rows("L2Ball", "weights", Vectors("L2Ball", torch.ones(3, 2), 1), (1.0, 2.0)).tolist()
        [[1.0, 2.0]]
    """
    if len(weights) != v.size:
        raise ValueError(
            f"{owner} needs as many {name} as a vector has entries, got {len(weights)} for vectors of {v.size} entries "
            f"in shape {tuple(v.whole.shape)}; give as many, or other dims."
        )
    row = torch.tensor([weights], dtype=torch.float64, device=v.stored.device)
    if v.layout is None:
        return row
    dims = tuple(range(v.whole.ndim)) if v.dims is None else v.dims
    lone = [1] * (v.whole.ndim - len(dims))
    shaped = row.reshape(*lone, *(v.whole.shape[d] for d in dims))
    return v.spread(shaped.movedim(tuple(range(-len(dims), 0)), dims))
