r"""Rounding a row of nonnegative numbers to a dtype such that the stored numbers have an exact sum in real arithmetic.

Everything is integers :math:`k_i` on a grid :math:`Q`, a power of two chosen so that the sum is :math:`r = RQ` with :math:`R <
2^{61}` (and never finer than the smallest subnormal). A dtype with :math:`p` bits represents :math:`k` exactly if :math:`k` is
a multiple of its unit :math:`u = 2^c`, where :math:`c = \max(\text{bit length of } k - p,\ 0)` is called its class.

**Step 1** rounds down to integers and spreads what is missing to :math:`R` in proportion to the entries.

**Step 2** sorts the entries by class, fine to coarse, keeps the order of positions inside a class, and rounds the prefix sums
:math:`G_i` instead of the entries: with :math:`C_c` the prefix sum at the end of class :math:`c`, the last prefix of a class
becomes

.. math:: S_c = \min_{d \ge c} 2^{d+1} \lfloor C_d / 2^{d+1} \rfloor \quad (S_c = R \text{ where } C_c = R),

and the prefixes inside become :math:`P_i = \min(2^c \lfloor G_i / 2^c \rfloor - L_i,\ S_c)`. Here :math:`L_i` grows, in
multiples of the unit, from 0 to the deficit :math:`D_c = 2^c \lfloor C_c / 2^c \rfloor - S_c`, in proportion to the prefix, if
:math:`2 D_c` is at most the sum :math:`T_c` of the class; else it is 0. The results are the differences of the :math:`P_i`.

*They are right.* (a) The last :math:`P_i` is :math:`R`, so the sum is exact. (b) :math:`S_c` is a multiple of the next unit
(and so is :math:`S_d`, :math:`d > c`), and :math:`R`, a number of the dtype not below any :math:`k_i`, is one of the last unit:
so each :math:`P_i`, and the prefix before a class, is a multiple of the unit of its class, hence so is each result. (c) If
:math:`S_{c-1} = S_c < 2^c \lfloor C_{c-1}/2^c \rfloor`, all prefixes of class c are equal and the results 0. Else
:math:`S_{c-1} = 2^c \lfloor C_{c-1}/2^c \rfloor` is the rounded prefix, and a result is at most :math:`k_i` rounded up to its
unit: at most :math:`2^{c+p}`, so it is representable, and not above any number of the dtype that is at least :math:`k_i`, such
as a cap. (d) The results are not negative: :math:`L` grows on an entry by less than :math:`k_i / 2` plus one half, and one unit
for rounding to the grid, which is at most :math:`k_i` rounded down, because :math:`k_i` has at least :math:`2^{p-1}` units,
:math:`p \ge 8`, unless the unit is 1, and then by at most :math:`\lceil k_i / 2 \rceil`; an entry 0 does not move a prefix and
stays 0.

*They are near.* A result differs from :math:`k_i` by less than two units of its class plus its share of :math:`D_c`, which is
less than one unit of the next coarser class present. A class whose sum is below that unit may be rounded to 0 altogether.

**Before that**, without a cap, something simpler is tried, which suffices for nearly all rows: the entries are rounded to nearest,
and what is missing to :math:`R`, or is too much, is made up by moving entries by one unit of their class each, from coarse classes
to fine ones, in each the first ones. The few entries below an empty class are rounded to the unit above it first, and stay. A
number of p bits plus or minus its unit is one of p bits again, so nothing can go wrong but that entries run out before the gap
is closed; then the steps above are taken.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stableopt.constraints.threshold import at_hand

__all__ = ["apportion", "exactly_sums_to", "grid_of"]

_BITS = 61  # the sum has at most as many, so that sums of two such numbers fit into 63


def grid_of(total: float, dtype: torch.dtype) -> tuple[int, int]:
    """Return the exponent of the grid and the sum as an integer on it.

    Args:
        total: a positive number that the dtype represents.
        dtype: float64, float32, bfloat16 or float16.

    Examples:
        >>> grid_of(1.0, torch.float16)
        (-24, 16777216)
    """
    info = torch.finfo(dtype)
    finest = math.frexp(info.smallest_normal * info.eps)[1] - 1
    exponent = max(math.frexp(total)[1] - _BITS, finest)
    return exponent, int(math.ldexp(total, -exponent))


def apportion(t: Tensor, total: float, dtype: torch.dtype, cap: float | None = None) -> Tensor:
    r"""Round nonnegative rows, which sum to about ``total``, to numbers of a dtype that sum to it exactly.

    Args:
        t: float64 rows ``(batch, n)``, entries :math:`\ge 0` and not above ``cap``, sums equal to ``total`` up to rounding.
        total: :math:`r > 0`, a number that the dtype represents.
        dtype: float64, float32, bfloat16 or float16.
        cap: what no result may exceed, a number that the dtype represents, or ``None``.

    Returns:
        Rows in ``dtype``. If ``t`` holds NaN, or its sum is far from ``total``, the numbers have no meaning.

    Examples:
        >>> third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
        >>> p = apportion(third, 1.0, torch.bfloat16)
        >>> p.sum(dtype=torch.float64).item(), p.double().sub(1 / 3).abs().max().item() < 2.0**-9
        (1.0, True)
    """
    if cap is None and t.shape[0] == 1 and at_hand(t):
        (positive,) = (t[0] > 0).nonzero(as_tuple=True)
        if 0 < 2 * len(positive) < t.shape[1]:  # zeros stay zeros, so the rest can be rounded on its own
            rounded = apportion(t[:, positive], total, dtype)
            return torch.zeros_like(t, dtype=dtype).index_copy(1, positive, rounded)
    exponent, R = grid_of(total, dtype)
    bits = 1 - math.frexp(torch.finfo(dtype).eps)[1] + 1
    if cap is not None or R.bit_length() <= bits:
        highest = None if cap is None else min(int(math.ldexp(min(cap, total), -exponent)), R)
        return _scaled(_in_two_steps(t, exponent, R, bits, highest).double(), exponent).to(dtype)
    k, exact = _corrected(t, exponent, R, bits, dtype)
    if not (at_hand(t) and bool(exact.all())):
        k = torch.where(exact, k, _in_two_steps(t, exponent, R, bits, None))
    return _scaled(k.double(), exponent).to(dtype)


def _in_two_steps(t: Tensor, exponent: int, R: int, bits: int, highest: int | None) -> Tensor:
    """Return integers that sum to ``R`` by the two steps of the module."""
    scaled = _scaled(t.detach().nan_to_num(nan=0.0), -exponent)
    k = scaled.clamp(0.0, float(R if highest is None else highest)).to(torch.int64)
    k = _balanced(k, t > 0, R, highest)
    return _representable(k, R, bits) if R.bit_length() > bits else k


def _corrected(t: Tensor, exponent: int, R: int, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return integers rounded to nearest, some of them moved by one unit, and for each row whether they sum to ``R``."""
    nearest = t.detach().nan_to_num(nan=0.0).clamp_min(0.0).to(dtype).double()
    k = (
        _scaled(nearest, -exponent).clamp_max(float(2 * R)).to(torch.int64)
    )  # truncated: still no more than so many bits
    c = ((k.double().view(torch.int64) >> 52) - (1022 + bits)).clamp(-1, R.bit_length() - bits)
    c = torch.where(k > 0, c.clamp_min(0), -1) + 1  # class 0 holds the zeros, which stay
    classes = R.bit_length() - bits + 2
    count = torch.zeros(k.shape[0], classes, dtype=torch.int64, device=k.device).scatter_add(1, c, torch.ones_like(k))
    floor = _finest_unit(count)
    k = torch.where(k.sum(dim=1, keepdim=True) == R, k, (k + (1 << floor >> 1)) >> floor << floor)
    gap = R - k.sum(dim=1)
    left, moved = gap.abs(), torch.zeros_like(count)
    for j in range(classes - 1, 0, -1):  # the coarsest first: they need the fewest entries
        able = torch.where(floor.squeeze(1) < j, count[:, j], 0)
        moved[:, j] = torch.minimum(able, left >> (j - 1))
        left = left - (moved[:, j] << (j - 1))
    order = _stable_order(c.to(torch.uint8))
    rank = torch.empty_like(order).scatter(1, order, torch.arange(k.shape[1], device=k.device).expand_as(order))
    rank = rank - (count.cumsum(1) - count).gather(1, c)
    unit = torch.where(rank < moved.gather(1, c), 1 << (c - 1).clamp_min(0), 0)
    return k + unit * gap.sign().unsqueeze(1), left.unsqueeze(1) == 0


def _finest_unit(count: Tensor) -> Tensor:
    """Return for each row the logarithm of the unit of the class below which one is empty, counted down from the fullest one.

    Entries below that are few. They are rounded to that unit, so that the gap is one of its multiples, and each class between can
    make up for what the one above leaves.
    """
    places = torch.arange(count.shape[1], device=count.device)
    fullest = torch.where(places > 0, count, 0).argmax(dim=1, keepdim=True)
    empty = (count == 0) & (places < fullest)
    return torch.where(empty, places, 0).amax(dim=1, keepdim=True)


def exactly_sums_to(stored: Tensor, total: float) -> Tensor:
    """Return whether rows of a dtype are not negative and sum to ``total`` in exact arithmetic, ``(batch, 1)``.

    Entries that are not on the grid of :func:`grid_of` count as wrong, even where they sum to it: at least two of them are
    then smaller than the sum by the factor 2^-61 or have bits that small.

    Args:
        stored: rows ``(batch, n)`` in the dtype.
        total: a positive number that the dtype represents.

    Examples:
        >>> exactly_sums_to(torch.tensor([[0.5, 0.5], [0.5, 0.25]]), 1.0).flatten()
        tensor([ True, False])
    """
    exponent, R = grid_of(total, stored.dtype)
    wide = stored.detach().double()
    scaled = _scaled(wide, -exponent)
    k = scaled.nan_to_num(nan=0.0).clamp(0.0, float(R)).to(torch.int64)
    on_grid = (k.double() == scaled).all(dim=1, keepdim=True)  # False also for negative, too large, and NaN
    # The integers may wrap around at 2^64, which is more than four times R: then the rounded sum is far off.
    near = (scaled.sum(dim=1, keepdim=True) - float(R)).abs() < float(R)
    return on_grid & near & (k.sum(dim=1, keepdim=True) == R)


def _scaled(x: Tensor, exponent: int) -> Tensor:
    """Return ``x * 2^exponent``, in two steps because the power alone may be out of range."""
    half = exponent // 2
    return x * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


def _balanced(k: Tensor, positive: Tensor, R: int, cap: int | None) -> Tensor:
    """Return integers near ``k`` that sum to ``R``; entries that are not positive stay 0 unless a cap leaves no other room."""
    gap = R - k.sum(dim=1, keepdim=True)
    share = _prefix_share(torch.where(gap > 0, k + positive, k), gap)
    change = share.diff(dim=1, prepend=torch.zeros_like(gap))
    if cap is None:
        return k + change
    room = torch.where(positive, cap - k, 0).clamp_max(2**62 // max(k.shape[1], 1))
    room = torch.where(room.sum(dim=1, keepdim=True) >= gap, room, (cap - k).clamp_max(2**62 // max(k.shape[1], 1)))
    change = torch.minimum(change, room)
    left = gap - change.sum(dim=1, keepdim=True)
    filled = torch.minimum((room - change.clamp_min(0)).cumsum(1), left.clamp_min(0))
    return k + change + filled.diff(dim=1, prepend=torch.zeros_like(left))


def _prefix_share(weights: Tensor, amount: Tensor) -> Tensor:
    """Return integers that grow from 0 to ``amount`` in proportion to the prefix sums of the weights."""
    prefix = weights.cumsum(1).double()
    part = (prefix / prefix[:, -1:].clamp_min(1.0) * amount).trunc().to(torch.int64)
    return torch.where(prefix == prefix[:, -1:], amount, part)


def _representable(k: Tensor, R: int, bits: int) -> Tensor:
    """Return integers with at most so many significant bits, and the same sum ``R``; step 2 of the module."""
    # The exponent field of a double; a huge integer may round up, which only coarsens its unit.
    length = (k.double().view(torch.int64) >> 52) - 1022
    highest = R.bit_length() - bits
    c = (length - bits).clamp(0, highest)
    order = _stable_order(c.to(torch.uint8))
    c = c.gather(1, order)
    sorted_k = k.gather(1, order)
    G = sorted_k.cumsum(1)
    j = torch.arange(highest + 1, device=k.device)
    T = torch.zeros(k.shape[0], len(j), dtype=torch.int64, device=k.device).scatter_add(1, c, sorted_k)
    C = T.cumsum(1)
    S = torch.where(C == R, R, _floored(C, j + 1)).flip(1).cummin(1).values.flip(1)
    D = _floored(C, j) - S
    slope = torch.where(2 * D <= T, D.double() / T.double().clamp_min(1.0), 0.0)
    inside = (G - (C - T).gather(1, c)).double() * slope.gather(1, c)
    L = torch.minimum(_floored(inside.to(torch.int64), c), D.gather(1, c))
    P = torch.minimum(_floored(G, c) - L, S.gather(1, c))
    return torch.empty_like(k).scatter(1, order, P.diff(dim=1, prepend=torch.zeros_like(P[:, :1])))


def _stable_order(keys: Tensor) -> Tensor:
    """Return the positions that sort each row of small integers, equal ones in order of position."""
    if at_hand(keys):  # numpy counts bytes, which is several times faster than sorting them
        return torch.from_numpy(np.argsort(keys.numpy(), axis=1, kind="stable"))
    return keys.argsort(dim=1, stable=True)


def _floored(integers: Tensor, bits: Tensor) -> Tensor:
    """Return integers with their lowest bits set to 0."""
    return (integers >> bits) << bits
