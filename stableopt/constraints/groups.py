r"""Norms of groups of entries: shrink each group towards 0, or to 0, also in a diagonal metric.

Everything here rests on one operator. For a vector :math:`x`, a weight :math:`w` and a step :math:`s_i` for each entry (in
the metric :math:`P` the step :math:`s` is :math:`s / P_i`) the point

.. math:: u = \arg\min_u\ w \|u\| + \sum_i \frac{(u_i - x_i)^2}{2 s_i}

is 0 exactly if :math:`\sum_i (x_i / (s_i w))^2 \le 1`; otherwise :math:`u_i = x_i \nu / (\nu + s_i w)`, where :math:`\nu = \|u\|`
is the root of :math:`F(\nu) = \|x / (\nu + s w)\| = 1`. With one step for all entries :math:`\nu = \|x\| - s w`. With several,
:math:`1/F` is a power mean with exponent -2 of increasing affine functions, hence increasing and concave, so Newton's method for
:math:`1/F = 1` arrives below the root after one step from anywhere, and climbs from there. Because
:math:`|(1/F)''| \le 3 (1/F)' / \nu`, a step turns a relative error :math:`e` into at most :math:`\tfrac32 e^2`: five steps take one
fifth to rounding, and twelve halvings of the bit patterns take any bracket of float64 to one fifth. That is a fixed number of
evaluations, without waiting for the device. Autograd sees only the last of the five, which carries the derivative of the implicit
function.

Each group is scaled by a power of two to size about 1 first, so no square overflows or vanishes. Entries keep their signs
and phases. Where a group becomes 0 the derivative is 0, at the kink as well, where that is an element of the Clarke Jacobian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_dims, check_number
from stableopt.constraints.balls import L2Ball
from stableopt.constraints.base import Regularizer
from stableopt.constraints.kinds import VectorPenalty
from stableopt.constraints.layout import Vectors, substitute
from stableopt.constraints.rounding import unit_scale

__all__ = ["L2", "Partition", "Segments", "group_norms", "shrink_groups"]

_NEWTON, _HALVINGS = 4, 12


@dataclass(frozen=True)
class Segments:
    """Disjoint groups of the entries of each vector: reduce to one number per group, and spread such numbers to the entries.

    Args:
        v: the vectors; split over processes, the reductions reach across them.
        index: the group of each entry here, shape ``(n,)``; ``None`` if a vector is one group.
        free: which entries belong to no group, shape ``(n,)``; ``None`` if all belong to one.
        count: number of groups.

    Examples:
        >>> s = Segments(Vectors("GroupLasso", torch.tensor([1.0, 2.0, 4.0]), None), torch.tensor([0, 1, 1]), count=2)
        >>> s.sum(s.v.data).tolist(), s.spread(s.sum(s.v.data)).tolist()
        ([[1.0, 6.0]], [[1.0, 6.0, 6.0]])
    """

    v: Vectors
    index: Tensor | None = None
    free: Tensor | None = None
    count: int = 1

    def sum(self, terms: Tensor) -> Tensor:
        """Return the sum of the terms of each group, shape ``(batch, count)``."""
        if self.index is None:
            return self.v.sum(terms)
        table = terms.new_zeros(terms.shape[0], self.count).index_add(1, self.index, terms)
        return self.v.sum(table.reshape(-1, 1)).reshape(table.shape)

    def max(self, sizes: Tensor) -> Tensor:
        """Return the largest of the sizes, which are not negative, of each group, shape ``(batch, count)``; 0 without entries."""
        if self.index is None:
            return self.v.max(sizes).clamp_min(0.0)
        start = sizes.new_zeros(sizes.shape[0], self.count)
        table = start.scatter_reduce(1, self.index.expand(sizes.shape), sizes, "amax")
        return self.v.max(table.reshape(-1, 1)).reshape(table.shape)

    def spread(self, table: Tensor) -> Tensor:
        """Return the number of its group for each entry, in a shape that broadcasts to ``(batch, n)``."""
        return table if self.index is None else table.index_select(1, self.index)

    def one_step(self, step: Tensor) -> bool:
        """Return whether steps are one number for each vector, the same answer on all processes that share one."""
        if self.v.size <= 1 or not self.v.groups:
            return step.shape[1] == 1
        # A process with one entry of a long vector cannot see it: any other one can, and if none can, both ways are right.
        rows, length = self.v.data.shape
        known = float(step.shape[1] == 1 and length != 1)
        return bool((self.v.max(step.new_full((rows, 1), known)) > 0).any())


class Partition:
    """The groups that labels describe, with one weight each, before any tensor is known.

    Args:
        labels: the group of each entry of a vector, ``0`` to ``k-1``; ``-1`` for no group.
        weights: one number per group.

    Examples:
        >>> x = torch.tensor([3.0, 4.0, 5.0])
        >>> segments, weights = Partition((0, 0, -1), (2.0,)).on(Vectors("GroupLasso", x, None), "GroupLasso")
        >>> segments.free.tolist(), weights.tolist()
        ([False, False, True], [[2.0]])
    """

    def __init__(self, labels: tuple[int, ...], weights: tuple[float, ...]) -> None:
        self._labels = labels
        self._weights = weights
        self._some_free = -1 in labels
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, v: Vectors, owner: str) -> tuple[Segments, Tensor]:
        """Return the groups of given vectors, and the weights as ``(1, k)``.

        Raises:
            ValueError: if the vectors have another length than the labels.
        """
        if v.size != len(self._labels):
            raise ValueError(
                f"{owner} has {len(self._labels)} group labels, one for each entry of a vector, got vectors of {v.size} entries; "
                "give as many labels, or choose dims so that the vectors fit."
            )
        labels, weights = self._table(v.data.device)
        index = labels if v.layout is None else _local(labels, v)
        free = index < 0 if self._some_free else None
        return Segments(v, index.clamp_min(0), free, len(self._weights)), weights

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            with torch.inference_mode(False):  # an inference tensor would be useless to autograd later
                labels = torch.tensor(self._labels, dtype=torch.int64, device=device)
                weights = torch.tensor([self._weights], dtype=torch.float64, device=device)
            self._tables[device] = labels, weights
        return self._tables[device]


def _local(labels: Tensor, v: Vectors) -> Tensor:
    """Return the labels of the entries that lie on this process."""
    dims = tuple(range(v.whole.ndim)) if v.dims is None else v.dims
    shape = [1] * (v.whole.ndim - len(dims)) + [v.whole.shape[d] for d in dims]
    placed = labels.reshape(shape).movedim(tuple(range(-len(dims), 0)), dims) if dims else labels.reshape(())
    rows, (batch, length) = v.spread(placed.double()), v.data.shape
    return rows[0, :length].long() if batch else labels.new_zeros(length)


def shrink_groups(x: Tensor, step: Tensor, weights: Tensor, segments: Segments) -> Tensor:
    r"""Return :math:`\arg\min_u \sum_g w_g \|u_g\| + \sum_i |u_i - x_i|^2 / (2 s_i)` for each row.

    Args:
        x: float64 or complex128 rows ``(batch, n)``.
        step: one number, one per row, or one per entry.
        weights: one number per group, :math:`\ge 0`, shape ``(1, k)``.
        segments: the groups.

    Returns:
        Rows like ``x``, differentiable in ``x`` and ``step``.

    Examples:
        >>> x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        >>> one, segments = torch.ones(1, 1, dtype=torch.float64), Segments(Vectors("L2", x, 1))
        >>> shrink_groups(x, one, 2.5 * one, segments).tolist()
        [[1.5, 2.0]]
    """
    inner = x if segments.free is None else torch.where(segments.free, 0.0, x)
    scale = unit_scale(segments.max(inner.detach().abs()))
    unit = inner * segments.spread(scale)
    one = segments.one_step(step)
    found = (_one_step if one else _many_steps)(unit, step, weights, scale, segments)
    zero, threshold, divisor, factor = map(segments.spread, found) if one else found
    shrunk = inner * factor + 0.0  # signs stay; -0.0 becomes 0.0
    if _transformed() or (torch.is_grad_enabled() and (x.requires_grad or step.requires_grad)):
        # The same as a difference: the derivative of the product would overflow before that of the prox does.
        smooth = torch.where(zero, 0.0, inner - threshold * (unit / divisor))
        shrunk = substitute(smooth, shrunk)
    return shrunk if segments.free is None else torch.where(segments.free, x, shrunk)


def _one_step(unit: Tensor, step: Tensor, weights: Tensor, scale: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    """Return per group: whether the result is 0, s w, the divisor of x that gives u / |u|, and u / x."""
    threshold = step * weights
    scaled = threshold * scale
    squared = segments.sum(_squares(unit))
    zero = squared.detach().sqrt() <= scaled.detach()
    length = torch.where(zero, 1.0, squared).sqrt()
    threshold = torch.where(zero, 0.0, threshold)  # s w may overflow
    return zero, threshold, length, torch.where(zero, 0.0, 1.0 - scaled / length)


def _many_steps(unit: Tensor, step: Tensor, weights: Tensor, scale: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    """Return what :func:`_one_step` does, per entry."""
    spread = segments.spread
    threshold = step * spread(weights)
    scaled = threshold * spread(scale)
    fixed = unit.detach()
    apart = torch.where(fixed == 0, 1.0, scaled.detach())  # an entry 0 counts nowhere, also with step 0
    zero = segments.sum(_squares(fixed / apart)).sqrt() <= 1.0
    norm = torch.where(zero, 1.0, _norm_of_minimizer(fixed, apart, segments))
    divisor = spread(norm) + scaled
    terms = _squares(unit / divisor)
    F = torch.where(zero, 1.0, segments.sum(terms)).sqrt()
    G = torch.where(zero, 1.0, segments.sum(terms / divisor)).detach()
    newton = norm + (F - 1.0) * F.detach().square() / G
    norm = spread(torch.where(newton <= 0.0, norm, newton))
    divisor = norm + scaled
    zero = spread(zero) | (scaled.detach() == math.inf)
    return zero, torch.where(zero, 0.0, threshold), divisor, torch.where(zero, 0.0, norm / divisor)


def _norm_of_minimizer(unit: Tensor, scaled: Tensor, segments: Segments) -> Tensor:
    """Return the root of F, shape ``(batch, count)``; no particular number for groups that become 0 or contain NaN."""
    high = segments.sum(_squares(unit)).sqrt()
    low, point = torch.zeros_like(high), high
    may_stop = _may_stop(segments)
    for k in range(1 + 2 * _NEWTON + _HALVINGS):
        halving = _NEWTON < k <= _NEWTON + _HALVINGS
        if k > 0:
            point = _between(low, high) if halving else low
        divisor = segments.spread(point) + scaled
        terms = _squares(unit / divisor)
        square = segments.sum(terms)
        F = square.sqrt()
        newton = point + (F - 1.0) * square / segments.sum(terms / divisor)
        low = torch.fmax(low, torch.where(newton.isfinite(), newton, 0.0))
        low = torch.where(F > 1.0, torch.fmax(low, point), low)
        high = torch.where(F < 1.0, torch.fmin(high, point), high)
        low = torch.fmin(low, high)
        if may_stop and not halving and not bool(((low - point).abs() > 2.0**-30 * low).logical_or(F.isinf()).any()):
            break  # the next step would be below rounding, and the caller makes it
    return low


def _may_stop(segments: Segments) -> bool:
    """Return whether a look at the numbers is free: on the CPU, in one process, outside of torch.func."""
    return segments.v.data.device.type == "cpu" and not segments.v.groups and not _transformed()


def _transformed() -> bool:
    """Return whether torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001  # pyright: ignore[reportAttributeAccessIssue]


def _between(low: Tensor, high: Tensor) -> Tensor:
    """Return the number in the middle of the floats from low to high, about their geometric mean."""
    first, last = low.view(torch.int64), high.view(torch.int64)
    return (first + ((last - first) >> 1)).view(torch.float64)


def _squares(x: Tensor) -> Tensor:
    return x.real.square() + x.imag.square() if x.is_complex() else x.square()


def group_norms(x: Tensor, segments: Segments) -> Tensor:
    """Return the Euclidean norm of each group, shape ``(batch, count)``; its derivative at 0 is 0.

    Examples:
        >>> x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        >>> group_norms(x, Segments(Vectors("L2", x, 1))).item()
        5.0
    """
    inner = x if segments.free is None else torch.where(segments.free, 0.0, x)
    scale = unit_scale(segments.max(inner.detach().abs()))
    squared = segments.sum(_squares(inner * segments.spread(scale)))
    zero = squared.detach() == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt() / scale)


@dataclass(frozen=True)
class L2(VectorPenalty):
    r"""The Euclidean norm, not squared: :math:`g(x) = \lambda \|x\|_2` of each vector along ``dims``, which makes whole vectors 0.

    .. math:: \operatorname{prox}_{sg}(x) = x\, (1 - s\lambda / \|x\|_2)_+,

    and in a diagonal metric :math:`P`: 0 if :math:`\|P x / s\|_2 \le \lambda`, else
    :math:`u_i = P_i x_i \nu / (P_i \nu + s\lambda)` with :math:`\nu = \|u\|_2`, the root of one
    equation (see the module). It is the group lasso whose groups are the vectors: with ``dims=1`` of a weight matrix it switches
    off units.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        dims: the dimensions of one vector; ``None`` for all entries together.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the weight is negative or not finite, or ``dims`` is empty or names a dimension twice.

    Note:
        Complex tensors work. The derivative where the prox is 0, its kink included, is 0, and so is that of the value at 0; first
        derivatives only in a diagonal metric with several steps. A vector with NaN becomes NaN; with infinity it keeps it, or
        becomes NaN in a diagonal metric. A DTensor is not gathered: processes exchange norms only.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.5.1.
        Yuan and Lin, *Model selection and estimation in regression with grouped variables*, JRSS B, 2006.

    Examples:
        >>> import torch
        >>> L2(2.5).prox(torch.tensor([3.0, 4.0]))
        tensor([1.5000, 2.0000])
        >>> L2(1.0, dims=1).prox(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
        >>> L2(2.0).value(torch.tensor([3.0, -4.0])).item()
        10.0
    """

    complex_too: ClassVar[bool] = True
    weight: float
    dims: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the weight and the dimensions."""
        object.__setattr__(self, "weight", check_number("L2", "weight", self.weight, low=0.0))
        object.__setattr__(self, "dims", check_dims("L2", self.dims))

    @property
    def diagonal(self) -> bool:
        """True: the norm of the result solves one equation in one unknown."""
        return True

    def conjugate(self) -> Regularizer:
        """Return the Euclidean ball with the weight as radius."""
        return L2Ball(self.weight, dims=self.dims)

    def _value(self, v: Vectors) -> Tensor:
        return self.weight * group_norms(v.data, Segments(v))

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        return shrink_groups(v.data, step, v.data.real.new_full((1, 1), self.weight), Segments(v))
