r"""Steps per hidden unit, from the row sums of a Gram matrix, and what they prove.

Let :math:`A` be a matrix, or the operator of a convolution with stride 1, and :math:`G = AA^\top`. For every :math:`q > 0` and

.. math:: r_i = \sum_j |G|_{ij}\, \frac{q_j}{q_i}, \qquad G \preceq \operatorname{diag}(r) .

*Proof.* :math:`\operatorname{diag}(r) - G` has, after the similarity with :math:`\operatorname{diag}(q)`, rows in which the entry
on the diagonal is at least the sum of the absolute values of the others: all its eigenvalues are at least 0 (Gershgorin), and
it is symmetric. ∎

For a convolution the row sums run over hidden channels and lags, :math:`q` has one entry per channel, and :math:`r` is the same at
every pixel. Zero padding cuts rows and columns out of the operator on the whole grid, :math:`A = RTE` with restrictions
:math:`R, E^\top`, so :math:`AA^\top \preceq R\,TT^\top R^\top \preceq \operatorname{diag}(r)`. On a torus the lags that meet are
added, whose absolute value is at most the sum of the absolute values: the same :math:`r` is enough for every image.

With a damping :math:`\kappa = \tau m` and steps :math:`S = \operatorname{diag}(s)` the Jacobian of
:math:`x \mapsto (1 - \kappa)x - A^\top S\sigma(Ax + b)` is :math:`(1-\kappa)I - A^\top SDA` with a diagonal
:math:`0 \preceq D \preceq I` (a product of diagonal matrices commutes), so its spectrum lies in
:math:`[1 - \kappa - \lambda,\ 1 - \kappa]`, :math:`\lambda = \lambda_{\max}(S^{1/2} G S^{1/2})`. It is at most
:math:`1 - \kappa` in norm exactly if :math:`2\kappa + \lambda \le 2` (let all units be active). For

.. math:: s_i \le \frac{2}{2m + r_i}, \qquad \tau \le \frac{2}{2m + \max_i r_i}

that holds, because :math:`\lambda \le \max_i s_ir_i \le 2r_{\max}/(2m + r_{\max})`, the quotient growing with :math:`r_i`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stableopt.linalg import Bound, frobenius_norm
from stableopt.nn.pooling import largest_entry
from stableopt.nn.positive import bounded_exp
from stableopt.nn.precision import full_precision, wide
from stableopt.theory import strongly_convex_factor

__all__ = [
    "UnitSteps",
    "damped_factor",
    "rounding_of_rows",
    "row_curvature",
    "row_factor",
    "row_sums",
    "scaled_rows",
    "unit_steps",
]

_SMALLEST = 1e-8
"""Floor of the denominators, so that a row of zeros has a finite step."""


class UnitSteps(NamedTuple):
    r"""Steps under their limits.

    Examples:
        >>> unit_steps(torch.eye(2), torch.zeros(2), strong=1.0).units.round(decimals=4)
        tensor([0.6667, 0.6667])
    """

    units: Tensor
    """:math:`2/(2m + r_i)` times the fraction, in the dtype of the weight, rounded down."""
    whole: Tensor
    """:math:`2/(2m + \\max_i r_i)`, the limit of the step of the damping; 0-d, in at least float32."""


def row_sums(W: Tensor, q: Tensor, groups: int = 1) -> Tensor:
    r"""Return :math:`\sum_j |AA^\top|_{ij}\,q_j/q_i`, over hidden units and, for a kernel, over lags.

    Args:
        W: a matrix of shape ``(hidden, dim)``, or a kernel of shape ``(hidden, channels / groups, *kernel)``.
        q: positive, of shape ``(hidden,)``.
        groups: of the convolution.

    Examples:
        >>> row_sums(torch.tensor([[1.0, 1.0], [1.0, -2.0]]), torch.ones(2))
        tensor([3., 6.])
        >>> row_sums(torch.tensor([[[1.0, -1.0]]]), torch.ones(1))  # the self-correlation is -1, 2, -1
        tensor([4.])
    """
    V, weights = W.unflatten(0, (groups, -1)), q.view(groups, -1, 1)
    total = torch.zeros_like(weights)
    for lag in _half_of_the_lags(W.shape[2:]):
        first, second = (_shifted(V, [side * step for step in lag]) for side in (1, -1))
        overlap = (first.flatten(2) @ second.flatten(2).mT).abs()
        total = total + overlap @ weights
        if any(lag):  # the lag of the other sign
            total = total + overlap.mT @ weights
    return total.flatten() / q


def unit_steps(
    weight: Tensor,
    raw_q: Tensor,
    *,
    strong: float = 0.0,
    fraction: Tensor | None = None,
    groups: int = 1,
) -> UnitSteps:
    r"""Return the largest steps that the row sums allow, or fractions of them; differentiable.

    Rounding is on the safe side: the steps are shrunk by the rounding of the sums in the dtype in which they are made, at least
    float32, and by the excess of a proof.

    Args:
        weight: as in :func:`row_sums`.
        raw_q: the weights of the sums are :math:`q = e^{15\tanh(\text{raw}/15)}`.
        strong: m >= 0.
        fraction: in [0, 1], of shape ``(hidden,)``; None for 1.
        groups: of the convolution.

    Examples:
        >>> steps = unit_steps(torch.diag(torch.tensor([2.0, 1.0])), torch.zeros(2))
        >>> steps.units.round(decimals=4), steps.whole.round(decimals=4)
        (tensor([0.5000, 2.0000]), tensor(0.5000))
    """
    stored, matrix = torch.finfo(weight.dtype), wide(weight)
    with full_precision(matrix):
        info = torch.finfo(matrix.dtype)
        size = largest_entry(matrix, tuple(range(matrix.ndim))).squeeze()  # the products of huge entries would overflow
        q = bounded_exp(raw_q.to(matrix.dtype))
        sums = row_sums(matrix / size, q, groups)
        share = 2.0 * (1.0 - _slack(weight, matrix, groups))
        smallest = max(_SMALLEST, 2.0 * strong)
        damping, floor = ((x / size / size).clamp(info.tiny, info.max / 8.0) for x in (2.0 * strong, _SMALLEST))
        denominator = (sums + damping if strong else sums).maximum(floor)
        units = (share / denominator / size / size).clamp_max(min(share / smallest, stored.max / 8.0))
        units = units if fraction is None else units * fraction.to(units.dtype)
        # one subnormal step less, so that rounding to nearest goes down there too; elsewhere the slack does it
        units = (units - stored.tiny * stored.eps).clamp_min(0.0).to(weight.dtype)
        whole = share / (2.0 * strong + sums.amax() * size * size).clamp_min(smallest)
    return UnitSteps(units, whole)


def scaled_rows(weight: Tensor, steps: Tensor) -> Tensor:
    r"""Return :math:`S^{1/2}A` in float64 on the CPU, each entry rounded by at most 3 units in the last place.

    Args:
        weight: a matrix or a kernel.
        steps: :math:`s \ge 0`, one for each entry of its first axis.

    Examples:
        >>> scaled_rows(torch.ones(2, 1), torch.tensor([4.0, 9.0])).flatten().tolist()
        [2.0, 3.0]
    """
    root = steps.detach().double().cpu().sqrt()
    return root.view(-1, *[1] * (weight.ndim - 1)) * weight.detach().double().cpu()


def rounding_of_rows(scaled: Tensor) -> Bound:
    r"""Bound how far :func:`scaled_rows` is from the exact product, in the Frobenius norm.

    Examples:
        >>> rounding_of_rows(torch.ones(2, 2, dtype=torch.float64)).upper < 1e-15
        True
    """
    return Bound(0.0, 2.0**-51) * frobenius_norm(scaled.flatten(1)).upper + Bound(0.0, 1e-300)


def damped_factor(damping: Bound, curvature: Bound) -> Bound:
    r"""Bound :math:`\|(1-\kappa)I - A^\top SDA\|_2` by the ends of its spectrum, :math:`\max(|1-\kappa|, |1-\kappa-\lambda|)`.

    Args:
        damping: :math:`\kappa = \tau m`.
        curvature: :math:`\lambda \ge \|S^{1/2}A\|_2^2`; the upper end is used.

    Examples:
        >>> damped_factor(Bound.point(0.25), Bound.point(1.5)).upper
        0.75
    """
    factor = strongly_convex_factor(Bound.point(1.0), damping, damping + curvature.upper)
    return Bound(0.0, factor.upper if isinstance(factor, Bound) else factor)


def row_curvature(scaled: Tensor, steps: Tensor, q: Tensor, groups: int = 1) -> Bound:
    r"""Bound :math:`\|S^{1/2}A\|_2^2` by the row sums, for a matrix or a kernel and images of any size.

    With :math:`B = S^{1/2}A` and the weights :math:`q_j/\sqrt{s_j}` the sums are :math:`s_ir_i`. The computed Gram matrix is off by
    :math:`|E_{ij}| \le \gamma|b_i||b_j|` at each of the lags, a matrix whose norm is at most :math:`\gamma\|B\|_F^2` per lag.

    Args:
        scaled: :math:`B` in float64, from :func:`scaled_rows`.
        steps: :math:`s`, which the weights need.
        q: positive, of shape ``(hidden,)``; the bound holds for every one.
        groups: of the convolution.

    Examples:
        >>> two = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
        >>> ones = torch.ones(2, dtype=torch.float64)
        >>> round(row_curvature(two, ones, ones).upper, 12)
        2.0
    """
    weights = q / steps.sqrt().clamp_min(1e-150)
    sums = float(row_sums(scaled, weights, groups).max())
    lags = math.prod([2 * k - 1 for k in scaled.shape[2:]])
    terms, of_sums = scaled[0].numel(), lags * len(scaled) // groups
    size = Bound.point(max(frobenius_norm(part.flatten(1)).upper for part in scaled.chunk(groups))) ** 2
    exact = Bound.point(math.inf if math.isnan(sums) else sums) * (1.0 + (of_sums + 16) * 2.0**-52)
    exact = exact + size * ((terms + 2) * 2.0**-52 * lags) + 1e-280
    drift = rounding_of_rows(scaled) * math.sqrt(math.prod(scaled.shape[2:]))
    return Bound(0.0, ((exact.sqrt() + drift) ** 2).upper)


def row_factor(scaled: Tensor, damping: Bound) -> Bound:
    r"""Bound :math:`\|(1-\kappa)I - B^\top DB\|` in linf, which is the same in l1, since the matrix is symmetric.

    With :math:`n_k` the sum of the absolute values of row k of B, row i of the matrix has the sum

    .. math::
        \Bigl|1 - \kappa - \sum_k d_kB_{ki}^2\Bigr| + \sum_{j \ne i}\Bigl|\sum_k d_kB_{ki}B_{kj}\Bigr|
        \le \max\Bigl(1 - \kappa + \sum_k |B_{ki}|\,(n_k - 2|B_{ki}|)_+,\ \ \sum_k |B_{ki}|\,n_k - (1 - \kappa)\Bigr),

    by the triangle inequality and the largest value over :math:`d \in [0,1]^K` of two linear functions. Where the padding cuts taps
    off, or taps meet on one pixel of a small torus, both sums are smaller: :math:`w(n - 2w)_+` is subadditive in :math:`w` and
    monotone in :math:`n`.

    Args:
        scaled: :math:`B = S^{1/2}A` of shape ``(groups, hidden, columns, taps)``, from :func:`scaled_rows`.
        damping: :math:`\kappa`.

    Examples:
        >>> eye = torch.eye(2, dtype=torch.float64)[None, :, :, None]
        >>> round(row_factor(eye, Bound.point(0.0)).upper, 12), round(row_factor(2.0 * eye, Bound.point(0.0)).upper, 12)
        (1.0, 3.0)
    """
    entries = scaled.abs()
    sums = entries.sum((2, 3), keepdim=True)
    g = (entries[0].numel() + 16) * 2.0**-52  # more than the rounding of any of the sums and products below
    spread = entries * sums * (1.0 + g)
    grown = (spread - 2.0 * entries.square() * (1.0 - g)).clamp_min(0.0)
    tiny = 1e-290 * (1.0 + sums.amax())  # what has underflowed
    largest = [float(torch.nan_to_num(x.sum((1, 3)).amax() * (1.0 + g) + tiny, nan=math.inf)) for x in (grown, spread)]
    kept = 1.0 - damping
    return Bound(0.0, max((abs(kept) + largest[0]).upper, (largest[1] - kept).upper))


def _slack(weight: Tensor, matrix: Tensor, groups: int) -> float:
    lags = math.prod([2 * k - 1 for k in weight.shape[2:]])
    terms = weight.shape[0] // groups * lags + math.prod(weight.shape[1:])
    rounding = (12.0 + 2.0 * math.sqrt(terms)) * torch.finfo(matrix.dtype).eps
    return rounding + torch.finfo(weight.dtype).eps + 2.0**-50 * terms**2


def _half_of_the_lags(kernel: Sequence[int]) -> list[tuple[int, ...]]:
    """Return zero and, of the other lags, one of each sign."""
    every = itertools.product(*[range(1 - k, k) for k in kernel])
    return [lag for lag in every if lag >= (0,) * len(lag)]


def _shifted(V: Tensor, lag: Sequence[int]) -> Tensor:
    """Return the taps whose partner at the lag is in the kernel too."""
    for axis, step in enumerate(lag, start=3):
        V = V.narrow(axis, max(step, 0), V.shape[axis] - abs(step))
    return V
