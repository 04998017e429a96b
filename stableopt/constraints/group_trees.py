r"""Norms of many groups: disjoint ones, groups over single entries, and trees of groups.

**Disjoint groups** are shrunk one by one (:mod:`stableopt.constraints.groups`).

**Entries, then groups.** For :math:`\lambda_1 \|u\|_1 + w \|u\|_2` the entries are shrunk first,
:math:`y_i = \operatorname{sign}(x_i) (|x_i| - s_i \lambda_1)_+`, then :math:`y` as a group. That is exact with one step per entry
too: the second map multiplies each entry by a number :math:`\ge 0`, so a subgradient :math:`z` of :math:`\|\cdot\|_1` at :math:`y`
is one at the result :math:`u`. If :math:`u \ne 0`, the sum of :math:`(y_i - x_i) / s_i + \lambda_1 z_i = 0` and
:math:`w u_i / \|u\| + (u_i - y_i) / s_i = 0` is the condition of optimality; and 0 is optimal exactly if
:math:`\min_{|z_i| \le 1} \|x / s - \lambda_1 z\| = \|y / s\| \le w`.

**Trees.** If any two groups are nested or disjoint, shrinking them in the order of their sizes is exact (Jenatton et al., 2011):
the map of a group multiplies all entries of a group inside it by one number, so a subgradient of the inner norm stays one. In
a diagonal metric it multiplies them by different numbers, the argument fails, and the result is not the minimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_dims, check_number, check_numbers
from stableopt.constraints.groups import Partition, Segments, group_norms, shrink_groups
from stableopt.constraints.kinds import VectorPenalty
from stableopt.constraints.layout import Vectors

__all__ = ["GroupLasso", "SparseGroup", "TreeGroups"]


def _check_groups(owner: str, groups: object) -> tuple[int, ...] | None:
    """Return one group label per entry as a tuple of ints, or ``None`` for one group, or refuse it.

    Raises:
        TypeError: if ``groups`` is not ``None``, a tuple, a list or a one-dimensional tensor of ints.
        ValueError: if the labels are not ``0`` to ``k-1``, each used, or ``-1``.

    Examples:
        >>> _check_groups("GroupLasso", [0, 1, -1, 0])
        (0, 1, -1, 0)
    """
    if isinstance(groups, Tensor) and groups.ndim == 1:
        groups = groups.tolist()
    if groups is None:
        return None
    if not isinstance(groups, list | tuple) or any(isinstance(g, bool) or not isinstance(g, int) for g in groups):
        raise TypeError(
            f"{owner} needs one int per entry of a vector as groups, or None for one group, got {type(groups).__name__}."
        )
    used = set(groups) - {-1}
    if not used or min(used) < 0 or max(used) != len(used) - 1:
        raise ValueError(
            f"{owner} needs the labels 0 to k-1 as groups, each of them used, and -1 for entries that are not penalized, "
            f"got {sorted(used)[:8]}; number the groups without gaps."
        )
    return tuple(groups)


def _check_weights(owner: str, weights: object, count: int) -> tuple[float, ...] | None:
    """Return one weight per group, or ``None`` for the square roots of the sizes, or refuse it.

    Raises:
        TypeError: if ``weights`` is not a sequence of real numbers.
        ValueError: if one is negative or not finite, or there are not ``count`` of them.

    Examples:
        >>> _check_weights("GroupLasso", [1, 2], 2)
        (1.0, 2.0)
    """
    if weights is None:
        return None
    numbers = check_numbers(owner, "weights", weights, low=0.0)
    if len(numbers) != count:
        raise ValueError(f"{owner} needs one number per group as weights, that is {count}, got {len(numbers)}.")
    return numbers


class _Grouped(VectorPenalty):
    """What penalties of disjoint groups share: fields that say the groups, and tables that are made once and stay out of copies.

    Attributes:
        groups: a field: one label per entry of a vector, ``-1`` for no group, or ``None`` if each vector is one group.
        weights: a field: one number per group, or ``None`` for the square roots of the sizes.
    """

    complex_too: ClassVar[bool] = True
    groups: tuple[int, ...] | None
    weights: tuple[float, ...] | None

    def __post_init__(self) -> None:
        """Check the labels, the weights and the dimensions."""
        name = type(self).__name__
        groups = _check_groups(name, self.groups)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(
            self, "weights", _check_weights(name, self.weights, 1 if groups is None else max(groups) + 1)
        )
        object.__setattr__(self, "dims", check_dims(name, self.dims))

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: tables on a device are made anew."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]

    @property
    def diagonal(self) -> bool:
        """True: the norm of each group of the result solves one equation in one unknown."""
        return True

    @functools.cached_property
    def _partition(self) -> Partition:
        labels = self.groups or ()
        sizes = Counter(labels)
        return Partition(labels, self.weights or tuple(math.sqrt(sizes[g]) for g in range(max(sizes, default=-1) + 1)))

    def _segments(self, v: Vectors) -> tuple[Segments, Tensor]:
        """Return the groups of given vectors, and their weights ``(1, k)``."""
        if self.groups is not None:
            return self._partition.on(v, type(self).__name__)
        weight = math.sqrt(v.size) if self.weights is None else self.weights[0]
        return Segments(v), v.data.real.new_full((1, 1), weight)


@dataclass(frozen=True)
class GroupLasso(_Grouped):
    r"""The group lasso :math:`g(x) = \lambda \sum_g w_g \|x_g\|_2` over disjoint groups of entries, which makes whole groups 0.

    .. math:: \operatorname{prox}_{sg}(x)_g = x_g\, (1 - s\lambda w_g / \|x_g\|_2)_+,

    and in a diagonal metric, for each group alone, as for :class:`~stableopt.constraints.groups.L2`.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        groups: one label per entry of a vector, ``0`` to ``k-1`` in any order, ``-1`` for an entry that is not penalized;
            ``None`` if each vector is one group.
        weights: :math:`w_g \ge 0`, one per group; ``None`` for the square roots of the sizes of the groups.
        dims: the dimensions of one vector; ``None`` for all entries together, in the order of ``x.flatten()``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is negative or not finite, the labels have gaps, or there is not one weight per group.

    Note:
        Complex tensors work. Derivatives and infinity are treated as by :class:`~stableopt.constraints.groups.L2`, and a NaN stays
        in its group. Of a DTensor the processes exchange one number per group and vector. On a GPU the entries of a group are
        summed in no fixed order, unless torch is told to use deterministic algorithms.

    References:
        Yuan and Lin, *Model selection and estimation in regression with grouped variables*, JRSS B, 2006.

    Examples:
        >>> import torch
        >>> g = GroupLasso(1.0, groups=(0, 1, 0, -1), weights=(2.5, 1.0))
        >>> g.prox(torch.tensor([3.0, 0.5, 4.0, 0.1]))
        tensor([1.5000, 0.0000, 2.0000, 0.1000])
        >>> g.value(torch.tensor([3.0, 0.5, 4.0, 0.1])).item()
        13.0
    """

    weight: float
    groups: tuple[int, ...] | None
    weights: tuple[float, ...] | None = None
    dims: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the weights, the labels and the dimensions."""
        object.__setattr__(self, "weight", check_number("GroupLasso", "weight", self.weight, low=0.0))
        super().__post_init__()

    def _value(self, v: Vectors) -> Tensor:
        segments, weights = self._segments(v)
        return self.weight * (weights * group_norms(v.data, segments)).sum(dim=1, keepdim=True)

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        segments, weights = self._segments(v)
        return shrink_groups(v.data, step, self.weight * weights, segments)


@dataclass(frozen=True)
class SparseGroup(_Grouped):
    r"""The sparse group lasso :math:`g(x) = \lambda_1 \|x\|_1 + \lambda_2 \sum_g w_g \|x_g\|_2`: few groups, few entries in them.

    .. math:: \operatorname{prox}_{sg}(x)_g = y_g\, (1 - s\lambda_2 w_g / \|y_g\|_2)_+, \qquad
        y_i = \operatorname{sign}(x_i) \max(|x_i| - s\lambda_1,\ 0),

    and the same two maps in a diagonal metric (see the module for the proof).

    Args:
        l1: :math:`\lambda_1`, finite, :math:`\ge 0`.
        l2: :math:`\lambda_2`, finite, :math:`\ge 0`.
        groups: one label per entry of a vector, ``0`` to ``k-1`` in any order, ``-1`` for an entry that is not penalized at all;
            ``None`` if each vector is one group.
        weights: :math:`w_g \ge 0`, one per group; ``None`` for the square roots of the sizes of the groups.
        dims: the dimensions of one vector; ``None`` for all entries together, in the order of ``x.flatten()``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is negative or not finite, the labels have gaps, or there is not one weight per group.

    Note:
        What :class:`GroupLasso` says about complex tensors, derivatives, NaN and DTensors holds here as well.

    References:
        Simon, Friedman, Hastie and Tibshirani, *A sparse-group lasso*, JCGS 22, 2013.

    Examples:
        >>> import torch
        >>> g = SparseGroup(1.0, 2.5, groups=(0, 0, 0, 1), weights=(1.0, 1.0))
        >>> g.prox(torch.tensor([4.0, -5.0, 0.5, 3.0]))
        tensor([ 1.5000, -2.0000,  0.0000,  0.0000])
        >>> g.value(torch.tensor([3.0, -4.0, 0.0, 0.0])).item()
        19.5
    """

    l1: float
    l2: float
    groups: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    dims: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the weights, the labels and the dimensions."""
        for name in ("l1", "l2"):
            object.__setattr__(self, name, check_number("SparseGroup", name, getattr(self, name), low=0.0))
        super().__post_init__()

    def _value(self, v: Vectors) -> Tensor:
        segments, weights = self._segments(v)
        sizes = v.data.abs() if segments.free is None else torch.where(segments.free, 0.0, v.data.abs())
        norms = group_norms(v.data, segments)
        return self.l1 * v.sum(sizes) + self.l2 * (weights * norms).sum(dim=1, keepdim=True)

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        segments, weights = self._segments(v)
        sparse = _shrink_entries(v.data, step * self.l1)
        if segments.free is not None:
            sparse = torch.where(segments.free, v.data, sparse)
        return shrink_groups(sparse, step, self.l2 * weights, segments)


def _shrink_entries(x: Tensor, threshold: Tensor) -> Tensor:
    """Return each entry with its modulus lowered by the threshold, at most to 0."""
    if not x.is_complex():
        return x - torch.clamp(x, -threshold, threshold)
    zero = x.detach().abs() <= threshold.detach()
    modulus = torch.where(zero, 1.0, x).abs()  # away from 0, where it has a derivative
    return torch.where(zero, 0.0, x * (1.0 - torch.where(zero, 0.0, threshold) / modulus))


@dataclass(frozen=True)
class TreeGroups(VectorPenalty):
    r"""A norm over a tree of groups, :math:`g(x) = \lambda \sum_g w_g \|x_g\|_2`, where any two groups are nested or disjoint.

    An entry can be nonzero only if all groups that contain it are: a child appears only with its parents. The prox is the
    composition of :math:`x_g \mapsto x_g (1 - s\lambda w_g / \|x_g\|_2)_+` over all groups, the smaller ones first.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        groups: for each group the indices of its entries in a vector, ``0`` to ``n-1``, in any order. Entries in no group are not
            penalized.
        weights: :math:`w_g \ge 0`, one per group; ``None`` for the square roots of the sizes of the groups.
        dims: the dimensions of one vector; ``None`` for all entries together, in the order of ``x.flatten()``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is negative or not finite, a group is empty or names an entry twice, there is not one weight per
            group, or two groups overlap without one containing the other, which needs an iterative solver instead.

    Note:
        A group that is given twice counts twice. Each level of the tree is one pass over the vector. There is no exact prox in a
        diagonal metric, and one is refused. Complex tensors work. Derivatives are treated as by :class:`GroupLasso`. NaN and
        infinity stay in the groups that contain them. Of a DTensor the processes exchange one number per group and vector.

    References:
        Jenatton, Mairal, Obozinski and Bach, *Proximal methods for hierarchical sparse coding*, JMLR 12, 2011, algorithm 1.

    Examples:
        >>> import torch
        >>> g = TreeGroups(1.0, groups=((0, 1, 2), (1, 2), (2,)), weights=(1.0, 2.5, 1.0))
        >>> g.prox(torch.tensor([0.0, 3.0, 5.0]))
        tensor([0.0000, 0.9000, 1.2000])
        >>> g.prox(torch.tensor([9.0, 1.0, 2.0]))
        tensor([8., 0., 0.])
    """

    complex_too: ClassVar[bool] = True
    weight: float
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] | None = None
    dims: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the weights, the tree and the dimensions."""
        groups = _check_index_groups("TreeGroups", self.groups)
        _heights("TreeGroups", groups)
        object.__setattr__(self, "weight", check_number("TreeGroups", "weight", self.weight, low=0.0))
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "weights", _check_weights("TreeGroups", self.weights, len(groups)))
        object.__setattr__(self, "dims", check_dims("TreeGroups", self.dims))

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: tables on a device are made anew."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def _value(self, v: Vectors) -> Tensor:
        total = v.data.real.new_zeros(v.data.shape[0], 1)
        for level in self._levels(v):
            segments, weights = level.on(v, "TreeGroups")
            total = total + self.weight * (weights * group_norms(v.data, segments)).sum(dim=1, keepdim=True)
        return total

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        rows = v.data
        for level in self._levels(v):
            segments, weights = level.on(v, "TreeGroups")
            rows = shrink_groups(rows, step, self.weight * weights, segments)
        return rows

    @functools.cached_property
    def _made(self) -> dict[int, tuple[Partition, ...]]:
        return {}

    def _levels(self, v: Vectors) -> tuple[Partition, ...]:
        """Return the groups as levels of disjoint ones, those first that contain no other; one list per length of a vector."""
        last = max(map(max, self.groups))
        if last >= v.size:
            raise ValueError(
                f"TreeGroups has a group with entry {last}, got vectors of {v.size} entries; "
                "count from 0, or choose dims so that the vectors fit."
            )
        if v.size not in self._made:
            heights = _heights("TreeGroups", self.groups)
            weights = self.weights or tuple(math.sqrt(len(g)) for g in self.groups)
            self._made[v.size] = tuple(
                _level([(g, w) for g, w, h in zip(self.groups, weights, heights, strict=True) if h == height], v.size)
                for height in range(max(heights) + 1)
            )
        return self._made[v.size]


def _level(members: list[tuple[tuple[int, ...], float]], length: int) -> Partition:
    labels = [-1] * length
    for label, (group, _) in enumerate(members):
        for i in group:
            labels[i] = label
    return Partition(tuple(labels), tuple(weight for _, weight in members))


def _check_index_groups(owner: str, groups: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(groups, list | tuple) or any(
        not isinstance(g, list | tuple) or any(isinstance(i, bool) or not isinstance(i, int) for i in g) for g in groups
    ):
        raise TypeError(
            f"{owner} needs a tuple of tuples of ints as groups, the entries of each group, got {groups!r:.80}."
        )
    for group in groups:
        if not group or min(group) < 0 or len(set(group)) != len(group):
            raise ValueError(f"{owner} needs groups of distinct indices >= 0, at least one in each, got {group!r:.80}.")
    if not groups:
        raise ValueError(f"{owner} needs at least one group, got none.")
    return tuple(tuple(group) for group in groups)


def _heights(owner: str, groups: tuple[tuple[int, ...], ...]) -> list[int]:
    """Return how many groups are nested below each one, along the longest chain, or refuse groups that are not a tree."""
    heights = [0] * len(groups)
    outermost: dict[int, int] = {}  # of each entry, among the groups so far
    for k in sorted(range(len(groups)), key=lambda k: len(groups[k])):
        inner = Counter(outermost[i] for i in groups[k] if i in outermost)
        for j, common in inner.items():
            if common != len(groups[j]):
                raise ValueError(
                    f"{owner} needs groups of which any two are nested or disjoint, got {groups[j]!r:.60} and "
                    f"{groups[k]!r:.60}, which share {common} entries: there the prox is no composition; "
                    "merge the groups, or give each of them its own copy of the shared entries."
                )
        heights[k] = 1 + max((heights[j] for j in inner), default=-1)
        outermost |= dict.fromkeys(groups[k], k)
    return heights
