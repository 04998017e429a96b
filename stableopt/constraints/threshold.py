r"""The level of a soft threshold: the number :math:`\theta` with :math:`\sum_i q_i \max(t_i - \theta, 0) = T`.

Projections onto simplices and :math:`\ell_1` balls, and the proximal operators of maxima, are this one equation: with
weights :math:`w` and a metric :math:`P` the condition :math:`\sum_i w_i \max(a_i - \theta w_i / P_i, 0) = r` becomes it through
:math:`t_i = a_i P_i / w_i` and :math:`q_i = w_i^2 / P_i`.

**Normal form.** The left side is convex, falls, and is piecewise linear. The largest entry alone shows that :math:`\theta \ge
t_{\max} - T / q_{\text{top}}`, so with :math:`b = \max((t - t_{\max}) q_{\text{top}} / T,\ -1)` the level lies in :math:`[-1,
0)` and no intermediate number is larger than the number of entries, whatever the size of the data.

**Two algorithms.** Where a tangent crosses the target is a lower bound of the level, because the function is convex. *Newton*
steps from tangent to tangent with sums only, so it works on vectors that are spread over processes; it starts from the level of
a sample, drops the entries that can no longer matter, and halves its bracket from time to time, so it needs at most about a
hundred passes on any data, and three to five on usual ones. *Sorting* takes the largest of the tangents' roots of all the sets
of the k largest entries; it never waits for the device.

**Accuracy.** Either only finds the active entries. The level is then recomputed from them, as a correction to the rounded first
value: the differences :math:`t_i - \theta` are of the size of the target, so they lose nothing to a large common part. Autograd
sees this last formula alone, which is the implicit function theorem on the active set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stableopt.constraints.layout import Vectors

__all__ = ["Clipped", "Level", "at_hand", "capped_level", "level_by_newton", "level_by_sorting", "soft_level"]

_SAMPLE = 4096  # vectors longer than this are sampled for a start
_TOLERANCE = 2.0**-51  # in units of the bracket [-1, 0]: entries that close to the level do not count
_MOST_PASSES = 160
_BISECTIONS = 54
_POLISHING = 6  # more tangents with weights: the bracket of the normal form is wide if the largest entry weighs little


class Level(NamedTuple):
    """A level and what is above it.

    Attributes:
        theta: the level, ``(batch, 1)``.
        above: :math:`max(t_i - theta, 0)`, rows, more accurate than what one would get from ``theta``.
    """

    theta: Tensor
    above: Tensor


def soft_level(v: Vectors, t: Tensor, q: Tensor | None, target: Tensor | float) -> Level:
    r"""Return the level with :math:`\sum_i q_i \max(t_i - \theta, 0) = T`, and what is above it, differentiable in t.

    Args:
        v: the vectors, for their reductions and layout.
        t: float64 rows ``(batch, n)``.
        q: positive rows that broadcast to ``t``, or ``None`` for ones.
        target: :math:`T \ge 0`, a number or ``(batch, 1)``. For 0 nothing is above the level, and nothing has a derivative.

    Returns:
        The level, which may be negative, and the rows above it.

    Examples:
        >>> x = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
        >>> level = soft_level(Vectors("", x, None), x[None], None, 2.0)
        >>> level.theta.item(), level.above.tolist()
        (1.5, [[1.5, 0.0, 0.5]])
    """
    point = t.detach()
    goal = torch.as_tensor(target, dtype=torch.float64, device=t.device).expand(t.shape[0], 1)
    top = v.max(point)
    heavy = 1.0 if q is None else v.max(torch.where(point == top, q, 0.0))
    span = goal / heavy
    b = ((point - top) / torch.where(span > 0, span, 1.0)).clamp_min(-1.0)
    weights = None if q is None else (q / heavy).expand(t.shape)
    by_newton = bool(v.groups) or at_hand(t)
    first = level_by_newton(v, b, weights) if by_newton else level_by_sorting(b, weights)
    base = top + first * span
    for _ in range(0 if q is None else _POLISHING):
        base = base + _to_tangent_root(v, point, q, goal, base, top)[1]
    distance, rest = _to_tangent_root(v, t, q, goal, base, top)
    reached = ((distance > 0) | (point == top)) & (goal > 0)
    return Level(base + rest, torch.where(reached, distance - rest, 0.0).clamp_min(0.0))


def _to_tangent_root(
    v: Vectors, t: Tensor, q: Tensor | None, goal: Tensor, base: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how far the active entries are above a trial level, and from there to the root of the tangent."""
    active = (t.detach() > base) | (t.detach() == top)
    distance = torch.where(active, t - base, 0.0)
    if q is None:
        return distance, (v.sum(distance) - goal) / v.sum(active.double())
    mass = torch.where(active, q, 0.0)
    return distance, (v.sum(mass * distance) - goal) / v.sum(mass)


def level_by_sorting(b: Tensor, q: Tensor | None) -> Tensor:
    r"""Return the level of the normal form, :math:`\max_k\, (\sum_{j \le k} q_j b_j - 1) / \sum_{j \le k} q_j`, b sorted to fall.

    Args:
        b: rows in :math:`[-1, 0]` with largest entry 0, without gradient, whole vectors.
        q: rows, 1 at the largest entry, or ``None``.

    Examples:
        >>> b = torch.tensor([[0.0, -0.5, -0.25]], dtype=torch.float64)
        >>> level_by_sorting(b, None)
        tensor([[-0.5833]], dtype=torch.float64)
    """
    if b.shape[1] == 0:
        return b.new_full((b.shape[0], 1), -1.0)
    ordered = b.sort(dim=1, descending=True)
    if q is None:
        mass = torch.arange(1, b.shape[1] + 1, dtype=b.dtype, device=b.device)
        return ((ordered.values.cumsum(1) - 1.0) / mass).amax(dim=1, keepdim=True)
    mass = q.gather(1, ordered.indices)
    return (((mass * ordered.values).cumsum(1) - 1.0) / mass.cumsum(1)).amax(dim=1, keepdim=True)


def level_by_newton(v: Vectors, b: Tensor, q: Tensor | None) -> Tensor:
    """Return the level of the normal form by tangents, with a bracket that is halved if they are slow.

    Args:
        v: the vectors, possibly spread over processes.
        b: rows in [-1, 0] with largest entry 0, without gradient.
        q: rows, 1 at the largest entry, or ``None``.

    Examples:
        >>> b = torch.tensor([[0.0, -0.5, -0.25]], dtype=torch.float64)
        >>> level_by_newton(Vectors("", b, 1), b, None)
        tensor([[-0.5833]], dtype=torch.float64)
    """
    low, high = b.new_full((b.shape[0], 1), -1.0), b.new_zeros((b.shape[0], 1))
    trial = _sampled_level(v, b, q) if v.size > _SAMPLE else low
    for passed in range(_MOST_PASSES):
        mass, moment, count = _sums(v, b, q, trial)
        left = moment - trial * mass >= 1.0
        tangent = torch.where(mass > 0, (moment - 1.0) / mass, low)
        low = torch.maximum(torch.where(left, torch.maximum(low, trial), low), tangent)
        high = torch.where(left, high, torch.minimum(high, trial))
        done = ~((tangent - trial).abs() > _TOLERANCE) | ~(high - low > _TOLERANCE)
        if bool(done.all()):
            break
        if not v.groups and b.shape[0] == 1 and bool(left) and 2 * int(count) < b.shape[1]:
            kept = b > low
            b, q = b[kept][None], None if q is None else q[kept][None]
        slow = passed > 6 and passed % 2 == 0
        trial = torch.where(done, low, (low + high) / 2 if slow else low)
    return low


def _sampled_level(v: Vectors, b: Tensor, q: Tensor | None) -> Tensor:
    """Return an estimate of the level, from every so manyth entry and the same share of the target."""
    stride = max(v.size // _SAMPLE, 1)
    few, some = b[:, ::stride], None if q is None else q[:, ::stride]
    share = v.sum(torch.ones_like(few)) / v.size
    level = b.new_full((b.shape[0], 1), -1.0)
    for _ in range(8):
        mass, moment, _ = _sums(v, few, some, level)
        level = torch.where(mass > 0, (moment - share) / mass, level).clamp(-1.0, 0.0)
    return level


def _sums(v: Vectors, b: Tensor, q: Tensor | None, trial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mass, the moment and the number of the entries above a trial level."""
    active = (b > trial).double()
    count = v.sum(active)
    mass = active if q is None else active * q
    return count if q is None else v.sum(mass), v.sum(mass * b), count


def at_hand(t: Tensor) -> bool:
    """Return whether a loop may stop when the numbers say so: they are on the CPU, and not traced or mapped over.

    Examples:
        >>> at_hand(torch.ones(2)), torch.func.vmap(lambda t: t * at_hand(t))(torch.ones(2)).tolist()
        (True, [0.0, 0.0])
    """
    traced = torch._C._functorch.is_functorch_wrapped_tensor(t)  # pyright: ignore[reportAttributeAccessIssue]  # noqa: SLF001
    return t.device.type == "cpu" and not traced and not torch.compiler.is_compiling()


class Clipped(NamedTuple):
    """A level and the rows clipped around it.

    Attributes:
        theta: the level, ``(batch, 1)``.
        values: :math:`min(max(t_i - theta, 0), cap)`, rows.
        between: where the value is neither 0 nor the cap.
        full: where it is the cap.
    """

    theta: Tensor
    values: Tensor
    between: Tensor
    full: Tensor


def capped_level(v: Vectors, t: Tensor, cap: Tensor | float, total: Tensor | float, count: int) -> Clipped:
    r"""Return :math:`\theta` with :math:`\sum_i \min(\max(t_i - \theta, 0), c) = T`, and the terms, differentiable in t.

    With the m-th largest entry as origin, :math:`m = \lceil T / c \rceil`, and c as unit, the level lies in :math:`[-1, 0]`: at
    -1 there are m full entries, at 0 fewer than m entries that are not 0. It is found by bisection, the same number of steps
    for all data, so nothing waits for the device; then it is recomputed from the entries between, as in :func:`soft_level`.

    Args:
        v: the vectors, not spread over processes, with at least ``count`` entries each.
        t: float64 rows ``(batch, n)``.
        cap: :math:`c \ge 0`, a number or one per row; 0 leaves nothing.
        total: :math:`T \le nc`, likewise.
        count: :math:`m`, between 1 and n.

    Examples:
        >>> x = torch.tensor([3.0, 1.0, 1.5], dtype=torch.float64)
        >>> capped_level(Vectors("", x, None), x[None], 1.0, 2.0, 2).values
        tensor([[1.0000, 0.2500, 0.7500]], dtype=torch.float64)
    """
    point = t.detach()
    c, goal = (torch.as_tensor(a, dtype=t.dtype, device=t.device).expand(t.shape[0], 1) for a in (cap, total))
    unit = torch.where(c > 0, c, 1.0)
    origin = point.kthvalue(t.shape[1] - count + 1, dim=1, keepdim=True).values
    b, share = ((point - origin) / unit).clamp(-1.0, 1.0), goal / unit
    low, high = b.new_full(c.shape, -1.0), b.new_zeros(c.shape)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = v.sum((b - middle).clamp(0.0, 1.0)) >= share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    between, full = (b > low) & (b - low < 1.0), b - low >= 1.0
    base = origin + low * unit
    distance = torch.where(between, t - base, 0.0)
    rest = (v.sum(distance) + c * v.sum(full.double()) - goal) / v.sum(between.double()).clamp_min(1.0)
    inner = torch.minimum(torch.where(between, distance - rest, 0.0).clamp_min(0.0), c)
    return Clipped(base + rest, torch.where(full, c, inner), between, full)
