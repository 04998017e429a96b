r"""Rows in order: the nearest nondecreasing or nonincreasing one, by pooling adjacent violators.

Two neighbors (or two neighboring blocks) in the wrong order are equal in the nearest monotone row, so they may be replaced by one
block with their weighted mean, in any order and many at once. :func:`pool_adjacent` first merges all violators of all rows
together, as long as a round removes a fixed part of the blocks, then finishes with one pass and a stack. The rounds form a
geometric series, and the pass merges each block once: :math:`O(n)` in every case. It runs on the CPU, in numpy, wherever the tensor
lies.

**Feasibility as stored.** Order is decided by comparing stored numbers, which has no rounding. The means are computed in float64,
where a running maximum repairs an order that rounding has broken by a unit in the last place. The cast to the dtype of the tensor
rounds to nearest, and this is a monotone map: it keeps the order, so no inward rounding is needed. (A cast that rounds twice, such
as float64 to float16 by way of float32, is a composition of two such maps.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from stableopt.constraints.arguments import check_dims
from stableopt.constraints.kinds import VectorSet
from stableopt.constraints.layout import Vectors, substitute
from stableopt.constraints.rounding import unit_scale

__all__ = ["Monotone", "block_means", "in_order", "on_rows", "pool_adjacent"]

_WORTH_A_ROUND = 0.125  # a vectorized round must remove this part of the blocks, so that all rounds together cost O(n)


@dataclass(frozen=True)
class Monotone(VectorSet):
    r"""The vectors in order, :math:`\{x : x_1 \le x_2 \le \dots \le x_n\}`, or all the other way around.

    The projection is isotonic regression,

    .. math:: \arg\min_{u_1 \le \dots \le u_n} \sum_i P_i (u_i - x_i)^2,

    whose entries are weighted means of blocks of consecutive entries; it is exact in any diagonal metric :math:`P`.

    Args:
        increasing: whether the entries must not fall; otherwise they must not rise.
        dims: the dimensions of one vector, in the order in which its entries are read; ``None`` for all entries in storage order.

    Raises:
        TypeError: if ``increasing`` is not a bool, or ``dims`` are not dimensions.
        ValueError: if ``dims`` names a dimension twice.

    Note:
        Equal neighbors are in order, and so are 0.0 and -0.0. The derivative averages over blocks; where two blocks have the same
        mean it treats them as two, an element of the Clarke Jacobian. Blocks are found on the CPU, which waits for other devices.
        In a metric whose entries span more than 500 powers of two the smallest ones are raised.

    References:
        Barlow, Bartholomew, Bremner and Brunk, *Statistical Inference under Order Restrictions*, 1972, section 1.2; Best and
        Chakravarti, *Active set algorithms for isotonic regression*, Math. Programming 47, 1990.

    Examples:
        >>> import torch
        >>> Monotone().project(torch.tensor([1.0, 3.0, 2.0, 4.0]))
        tensor([1.0000, 2.5000, 2.5000, 4.0000])
        >>> Monotone(increasing=False, dims=-1).project(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
        tensor([[2., 2.],
                [3., 1.]])
        >>> Monotone().project(torch.tensor([3.0, 1.0]), metric=torch.tensor([3.0, 1.0]))
        tensor([2.5000, 2.5000])
    """

    increasing: bool = True
    dims: int | tuple[int, ...] | None = None
    needs_whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.increasing, bool):
            raise TypeError(f"Monotone needs True or False as increasing, got {self.increasing!r}.")
        object.__setattr__(self, "dims", check_dims("Monotone", self.dims))

    @property
    def diagonal(self) -> bool:
        """True: the projection is exact in a diagonal metric."""
        return True

    def _excess(self, v: Vectors) -> Tensor:
        rise = v.stored.detach().double().diff(dim=1)
        return v.max(-rise if self.increasing else rise)

    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        return in_order(v.data, metric) if self.increasing else -in_order(-v.data, metric)

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        return nearest.to(v.stored.dtype)  # rounding to nearest is monotone


def in_order(values: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Return the nondecreasing rows :math:`u` that minimize :math:`\sum_i w_i (u_i - x_i)^2`, differentiable by block means.

    Args:
        values: float64, shape ``(batch, n)``.
        weights: positive, of the same shape; ``None`` for ones.

    Returns:
        Float64 of the same shape. An entry that is a block of its own keeps its bits; a row with NaN or infinity becomes NaN.

    Examples:
        >>> in_order(torch.tensor([[3.0, 1.0, 5.0], [1.0, 2.0, 0.0]], dtype=torch.float64))
        tensor([[2., 2., 5.],
                [1., 1., 1.]], dtype=torch.float64)
    """
    if values.numel() == 0:
        return values
    finite = values.isfinite().all(dim=1, keepdim=True)
    safe = torch.where(finite, values, 0.0)
    scale = unit_scale(safe.detach().abs().amax(dim=1, keepdim=True))  # sums of 1e308 must not overflow
    unit = safe * scale
    if weights is not None:
        top = weights.detach().amax(dim=1, keepdim=True)
        weights = (weights * unit_scale(top)).clamp_min(2.0**-500)
    first = pool_adjacent(unit, weights)
    means = block_means(unit, first, weights) / scale
    alone = torch.zeros_like(safe).scatter_add(1, first, torch.ones_like(safe)).gather(1, first) == 1
    means = torch.where(alone, safe, means)
    ordered = substitute(means, means.detach().cummax(dim=1).values)
    return torch.where(finite, ordered, torch.nan)


def pool_adjacent(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the blocks of the isotonic regression of each row.

    Args:
        values: finite float64, shape ``(batch, n)``, small enough that sums do not overflow.
        weights: positive, of the same shape; ``None`` for ones.

    Returns:
        Int64 tensor of the same shape: for each entry the position, in its row, at which its block starts. Neighboring blocks whose
        means are equal stay apart.

    Examples:
        >>> pool_adjacent(torch.tensor([[1.0, 3.0, 2.0, 4.0], [4.0, 3.0, 2.0, 2.5]]))
        tensor([[0, 1, 1, 3],
                [0, 0, 0, 0]])
    """
    if values.numel() == 0:
        return torch.zeros_like(values, dtype=torch.int64)
    return on_rows(_pool, values, torch.ones_like(values) if weights is None else weights)[0]


def block_means(values: Tensor, first: Tensor, weights: Tensor | None = None, lift: Tensor | None = None) -> Tensor:
    r"""Return at each entry the weighted mean of its block, differentiably.

    The mean is corrected by the mean of the deviations from it, so that the error does not grow with the distance from zero.

    Args:
        values: float64, shape ``(batch, n)``.
        first: int64 of the same shape, the position in the row at which the block of each entry starts.
        weights: positive, of the same shape; ``None`` for ones.
        lift: for each entry what is added to the weighted sum of its block before the division; ``None`` for 0.

    Examples:
        >>> block_means(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[0, 0, 2]]))
        tensor([[2., 2., 2.]])
    """
    batch, n = values.shape
    mass = torch.ones_like(values) if weights is None else weights
    # One dimension, where scatter_add has a deterministic order on every device.
    heads = (first + n * torch.arange(batch, device=first.device).unsqueeze(1)).flatten()

    def sums(terms: Tensor) -> Tensor:
        return torch.zeros_like(terms).flatten().scatter_add(0, heads, terms.flatten())[heads].unflatten(0, (batch, n))

    total = sums(mass)
    means = sums(mass * values) / total
    means = means + sums((mass * (values - means)).detach()) / total.detach()
    return means if lift is None else means + lift / total


class _OnRows(torch.autograd.Function):
    """A numpy algorithm on rows. As an autograd function it also runs inside functorch, where tensors are wrapped."""

    @staticmethod
    def forward(algorithm: Callable[..., tuple[np.ndarray, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
        results = algorithm(*(r.cpu().numpy() for r in rows))
        return tuple(torch.from_numpy(r).to(rows[0].device) for r in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004  torch passes both
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        lanes, (algorithm, *rows) = info.batch_size, args
        flat = [
            (r.expand(lanes, *r.shape) if d is None else r.movedim(d, 0)).flatten(0, 1)
            for r, d in zip(rows, in_dims[1:], strict=True)
        ]
        results = _OnRows.apply(algorithm, *flat)
        return tuple(r.unflatten(0, (lanes, -1)) for r in results), (0,) * len(results)


def on_rows(algorithm: Callable[..., tuple[np.ndarray, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
    """Run a numpy algorithm on rows, on the CPU and without derivative.

    Args:
        algorithm: takes arrays of shape ``(batch, n)`` and returns a tuple of new arrays with the same first dimension.
        rows: tensors of shape ``(batch, n)`` on one device.

    Returns:
        The results as tensors on that device.

    Examples:
        >>> on_rows(lambda a: (a.argmax(axis=1, keepdims=True),), torch.tensor([[1.0, 3.0]]))
        (tensor([[1]]),)
    """
    return _OnRows.apply(algorithm, *(r.detach() for r in rows))  # pyright: ignore[reportReturnType]


def _pool(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray]:
    """Merge violators, all at once in rounds, then one after the other."""
    n = values.shape[1]
    start = np.arange(values.size)
    opens = start % n == 0  # whether a block is the first of its row: nothing merges across
    mean, mass = values.ravel(), weights.ravel()
    total = mean * mass
    while True:
        falls = (mean[:-1] > mean[1:]) & ~opens[1:]
        removed = np.count_nonzero(falls)
        if removed < _WORTH_A_ROUND * mean.size:
            break
        heads = np.flatnonzero(np.concatenate(([True], ~falls)))
        total, mass = np.add.reduceat(total, heads), np.add.reduceat(mass, heads)
        start, opens, mean = start[heads], opens[heads], total / mass
    if removed:
        start = start[_pool_in_turn(total.tolist(), mass.tolist(), opens.tolist())]
    sizes = np.diff(start, append=values.size)
    return (np.repeat(start % n, sizes).reshape(values.shape),)


def _pool_in_turn(total: list[float], mass: list[float], opens: list[bool]) -> list[int]:
    """Return which blocks start a merged one: one pass with a stack, in which a block is popped at most once."""
    heads: list[int] = []
    totals: list[float] = []
    masses: list[float] = []
    means: list[float] = []
    floor = 0  # the height of the stack at which the row begins
    for i, fresh in enumerate(opens):
        if fresh:
            floor = len(heads)
        head, s, c = i, total[i], mass[i]
        mean = s / c
        while len(heads) > floor and means[-1] > mean:
            head = heads.pop()
            s += totals.pop()
            c += masses.pop()
            means.pop()
            mean = s / c
        heads.append(head)
        totals.append(s)
        masses.append(c)
        means.append(mean)
    return heads
