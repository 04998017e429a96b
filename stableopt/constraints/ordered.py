r"""Penalties of the sorted moduli :math:`|x|_{(1)} \ge |x|_{(2)} \ge \dots`: the sorted L1 norm and the k-support norm.

Both are functions of the moduli that do not see their order, so the proximal point has the signs (phases) and the order of
:math:`x`: the moduli are sorted, mapped, and put back.

**SLOPE.** On the cone of sorted nonnegative vectors the penalty is linear, so its prox is the projection of
:math:`|x|_{(\cdot)} - s w` onto the cone: isotonic regression, then :math:`\max(\cdot, 0)` (Bogdan et al. 2015, section 2.1).

**k-support.** Half the squared norm is the minimum of :math:`\tfrac12 \sum_i x_i^2 / \theta_i` over :math:`0 \le \theta_i \le 1`,
:math:`\sum_i \theta_i \le k`. With :math:`\lambda = s w`, minimizing over the proximal point first gives
:math:`u_i = x_i \theta_i / (\theta_i + \lambda)` and leaves :math:`\min_\theta \sum_i x_i^2 / (\theta_i + \lambda)`. This is convex
in :math:`\theta`, and its optimality conditions are
:math:`\theta_i = \min(\max(\alpha |x_i| - \lambda, 0), 1)` with one multiplier :math:`\alpha` for which
:math:`S(\alpha) = \sum_i \theta_i = k` (all nonzero entries have :math:`\theta_i = 1` if they are at most :math:`k`). :math:`S` is
piecewise linear and does not decrease; sorting finds the piece. There the first :math:`q` sorted entries have :math:`\theta_i = 1`,
the following :math:`m` are between, and

.. math::
    |u_i| = \frac{|x_i|}{1 + \lambda} \ (i \le q), \qquad |u_i| = |x_i| - \tau \ (q < i \le q + m), \qquad
    \tau = \frac{\lambda}{\alpha} = \frac{\lambda \sum_{q < i \le q + m} |x_i|}{k - q + \lambda m},

and the rest is 0: the largest entries are shrunk, those in the middle soft-thresholded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_dims, check_number, check_numbers
from stableopt.constraints.isotonic import in_order
from stableopt.constraints.kinds import VectorPenalty
from stableopt.constraints.layout import Vectors
from stableopt.constraints.rounding import unit_scale

__all__ = ["KSupport", "SLOPE"]


@dataclass(frozen=True)
class SLOPE(VectorPenalty):
    r"""The sorted L1 norm :math:`g(x) = \sum_i w_i |x|_{(i)}`, also called OWL: the larger an entry, the more it costs.

    .. math:: |u|_{(\cdot)} = \max\bigl(\operatorname{monotone}(|x|_{(\cdot)} - s w),\ 0\bigr).

    Entries whose moduli the prox would bring out of order become equal in modulus, so correlated features are grouped.

    Args:
        weights: :math:`w_1 \ge w_2 \ge \dots \ge w_n \ge 0`, finite, as many as a vector has entries.
        dims: the dimensions of one vector; ``None`` for all entries.

    Raises:
        TypeError: if the weights are not a sequence of numbers, or ``dims`` are not dimensions.
        ValueError: if a weight is negative, not finite or above the one before it, or ``dims`` names a dimension twice.

    Note:
        Real and complex tensors. A vector with NaN or infinity becomes NaN. At kinks the derivative is one element of the Clarke
        Jacobian. Blocks are found on the CPU, which waits for other devices. There is no exact prox in a diagonal metric.

    References:
        Bogdan, van den Berg, Sabatti, Su and Candès, *SLOPE: adaptive variable selection via convex optimization*, Annals of
        Applied Statistics 9, 2015, section 2; Zeng and Figueiredo, *The ordered weighted L1 norm*, 2014.

    Examples:
        >>> import torch
        >>> SLOPE((2.0, 1.0)).prox(torch.tensor([3.0, -3.25]), step=0.5)
        tensor([ 2.3750, -2.3750])
        >>> SLOPE((2.0, 1.0)).value(torch.tensor([3.0, -4.0])).item()
        11.0
    """

    weights: tuple[float, ...]
    dims: int | tuple[int, ...] | None = None
    complex_too: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the weights."""
        weights = check_numbers("SLOPE", "weights", self.weights, low=0.0)
        for i in range(1, len(weights)):
            if weights[i] > weights[i - 1]:
                raise ValueError(
                    f"SLOPE needs weights that do not rise, got {weights[i - 1]!r} and then {weights[i]!r} at position {i}; "
                    "sort them from the largest to the smallest."
                )
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "dims", check_dims("SLOPE", self.dims))

    def _row(self, v: Vectors) -> Tensor:
        if len(self.weights) != v.size:
            raise ValueError(
                f"SLOPE has {len(self.weights)} weights, got vectors of {v.size} entries (shape {tuple(v.whole.shape)}, "
                f"dims={self.dims!r}); give one weight for each entry of a vector."
            )
        return torch.tensor([self.weights], dtype=torch.float64, device=v.data.device)

    def _value(self, v: Vectors) -> Tensor:
        return v.sum(self._row(v) * v.data.abs().sort(dim=1, descending=True).values)

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        thresholds = (step * self._row(v)).clamp_max(sys.float_info.max / 4)
        return _by_moduli(v.data, lambda a: (-in_order(thresholds - a)).clamp_min(0.0))


@dataclass(frozen=True)
class KSupport(VectorPenalty):
    r"""Half the squared k-support norm, :math:`g(x) = \tfrac{\lambda}{2} \bigl(\|x\|_{k}^{sp}\bigr)^2`.

    The unit ball of the norm is the convex hull of the vectors with at most :math:`k` nonzero entries and Euclidean norm 1: the
    tightest convex relaxation of sparsity together with a Euclidean bound. For :math:`k = 1` it is the L1 norm, for
    :math:`k \ge n` the Euclidean norm. With the :math:`q < k` for which
    :math:`|x|_{(q)} > \tfrac{1}{k-q} \sum_{i > q} |x|_{(i)} \ge |x|_{(q+1)}`,

    .. math:: \bigl(\|x\|_{k}^{sp}\bigr)^2 = \sum_{i \le q} |x|_{(i)}^2 + \frac{1}{k - q} \Bigl(\sum_{i > q} |x|_{(i)}\Bigr)^2.

    The prox shrinks the largest entries, soft-thresholds those in the middle and sets the others to 0 (see the module).

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        k: how many entries, an int :math:`\ge 1`.
        dims: the dimensions of one vector; ``None`` for all entries.

    Raises:
        TypeError: if the weight is not a real number, ``k`` not an int, or ``dims`` are not dimensions.
        ValueError: if the weight is negative or not finite, ``k < 1``, or ``dims`` names a dimension twice.

    Note:
        Real and complex tensors; :math:`O(n \log n)`, without waiting for the device. A vector with NaN or infinity becomes NaN. At
        kinks the derivative is one element of the Clarke Jacobian. There is no exact prox in a diagonal metric.

    References:
        Argyriou, Foygel and Srebro, *Sparse prediction with the k-support norm*, NeurIPS 2012, proposition 2.1; McDonald, Pontil
        and Stamos, *New perspectives on k-support and cluster norms*, JMLR 17, 2016, section 5.

    Examples:
        >>> import torch
        >>> KSupport(1.0, k=2).prox(torch.tensor([6.0, -2.0, 1.6, 0.1]))
        tensor([ 3.0000, -0.8000,  0.4000,  0.0000])
        >>> KSupport(1.0, k=1).value(torch.tensor([3.0, -4.0])).item()
        24.5
    """

    weight: float
    k: int
    dims: int | tuple[int, ...] | None = None
    complex_too: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "weight", check_number("KSupport", "weight", self.weight, low=0.0))
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise TypeError(f"KSupport needs an int as k, got {self.k!r} ({type(self.k).__name__}).")
        if self.k < 1:
            raise ValueError(f"KSupport needs k >= 1, got {self.k}.")
        object.__setattr__(self, "dims", check_dims("KSupport", self.dims))

    def _value(self, v: Vectors) -> Tensor:
        a = v.data.abs().sort(dim=1, descending=True).values
        k = min(self.k, max(v.size, 1))
        position = torch.arange(1, a.shape[1] + 1, device=a.device)
        # Entry j is large if a_j (k - j) > a_{j+1} + ... + a_n, hence j < k. If j + 1 is, so is j: counting finds q.
        large = a * (k - position) > _sums_behind(a)
        q = large.sum(dim=1, keepdim=True)
        head = torch.where(position <= q, a, 0.0)
        return self.weight / 2 * (v.sum(head.square()) + v.sum(a - head).square() / (k - q))

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        k = min(self.k, max(v.size, 1))
        shrink = (step * self.weight).clamp_max(sys.float_info.max / (4 * k + 4 * v.size))  # its multiples are finite
        return _by_moduli(v.data, lambda a: _shrink_or_threshold(a, shrink, k))


def _by_moduli(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Map rows by a function of their moduli, sorted from the largest to the smallest."""
    if x.numel() == 0:
        return x
    finite = x.isfinite().all(dim=1, keepdim=True)
    safe = torch.where(finite, x, 0.0)
    if x.is_complex():
        size = safe.abs()
        phase = safe / torch.where(size > 0, size, 1.0)
    else:  # not abs, whose derivative at 0 is 0 even where the map is smooth
        phase = torch.where(safe.detach() < 0, -1.0, 1.0).to(safe.dtype)
        size = phase * safe
    order = size.detach().sort(dim=1, descending=True, stable=True).indices
    mapped = function(size.gather(1, order))
    back = torch.zeros_like(mapped).scatter(1, order, mapped)
    return torch.where(finite, phase * back, torch.nan)


def _sums_behind(a: Tensor) -> Tensor:
    """Return at each position the sum of what follows, added from the end: for descending rows, the smallest first."""
    sums = a.flip(1).cumsum(1).flip(1)
    return torch.cat([sums[:, 1:], torch.zeros_like(sums[:, :1])], dim=1)


def _shrink_or_threshold(a: Tensor, shrink: Tensor, k: int) -> Tensor:
    """Return the moduli of the proximal point of the k-support penalty, given those of the point in descending order."""
    scale = unit_scale(a.detach().amax(dim=1, keepdim=True))  # sums of 1e308 must not overflow
    unit = a * scale
    q, m = _piece(unit.detach(), shrink.detach(), k)
    position = torch.arange(a.shape[1], device=a.device)
    between = (position >= q) & (position < q + m)
    total = torch.where(between, unit, 0.0).sum(dim=1, keepdim=True)
    # Where nothing is between, k - q may be 0; the quotient is then not used.
    share = torch.where(m > 0, k - q + shrink * m, 1.0)
    threshold = shrink * (total / share)
    middle = torch.where(between, (unit - threshold).clamp_min(0.0) / scale, 0.0)
    return torch.where(position < q, a / (1.0 + shrink), middle)


def _piece(a: Tensor, shrink: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""Return how many entries have :math:`\theta = 1`, and for how many it lies between 0 and 1.

    The breakpoints of :math:`S` are where an entry enters, :math:`\alpha = \lambda / a_i`, and where it is full,
    :math:`\alpha = (1 + \lambda) / a_i`. The sums over entries in between are differences of sums from the small end: no entry in
    them is larger than those in between, so that little cancels.
    """
    enter = torch.where(a > 0, shrink / a, torch.inf)
    full = torch.where(a > 0, (1.0 + shrink) / a, torch.inf)
    alpha = torch.cat([enter, full], dim=1).sort(dim=1).values
    behind = torch.cat([a.sum(dim=1, keepdim=True), _sums_behind(a)], dim=1)
    entered = torch.searchsorted(enter, alpha, right=True)
    filled = torch.searchsorted(full, alpha, right=True)
    load = filled + alpha * (behind.gather(1, filled) - behind.gather(1, entered)) - shrink * (entered - filled)
    below = alpha.isfinite() & (load <= k)
    last = (below.sum(dim=1, keepdim=True) - 1).clamp_min(0)
    q, t = filled.gather(1, last), entered.gather(1, last)
    # At most k nonzero entries: all of them are full, and of the zeros as many as there is room for.
    room = (a > 0).sum(dim=1, keepdim=True) <= k
    q = torch.where(room, k, q)
    return q, torch.where(room, 0, t - q)
