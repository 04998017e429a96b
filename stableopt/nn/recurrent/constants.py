r"""Constants of one step of a cell: norms between different norms, and rows in the maximum norm, all rounded outwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stableopt.linalg import Bound, frobenius_norm, inf_norm, one_norm, spectral_norm

__all__ = ["check_finite", "from_state", "into_state", "row_constants", "weighted_norm"]


def check_finite(cell: nn.Module) -> None:
    """Refuse a cell whose parameters hold NaN or infinity.

    Raises:
        ValueError: naming the first such parameter.

    Examples:
        >>> check_finite(nn.Linear(2, 2))
    """
    for name, parameter in cell.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(
                f"no bound holds for a {type(cell).__name__} whose parameter {name} has NaN or infinite entries. Load the last "
                "good state, and lower the learning rate."
            )


def into_state(U: Tensor, source: str, state: str, scaling: Tensor | None = None) -> Bound:
    r"""Bound the norm of :math:`DU` from a norm of the input to a norm of the state.

    Args:
        U: matrix of shape ``(hidden, input)``.
        source: ``"l2"``, ``"linf"`` or ``"l1"``, the norm of the input.
        state: ``"l2"`` or ``"linf"``, the norm of the state.
        scaling: the diagonal of D, positive; None for ones.

    Returns:
        A bound from 0 to the norm, attained but for rounding; from linf to l2 it is :math:`(\sum_i \|u_i\|_1^2)^{1/2}`, attained
        for entries of one sign.

    Raises:
        ValueError: if a number is NaN or infinite.

    Examples:
        >>> round(into_state(torch.tensor([[3.0, 4.0]]), "l2", "linf").upper, 9)
        5.0
    """
    W = U.detach().double().cpu()
    rounding = Bound.point(1.0)
    if scaling is not None:
        W = scaling.detach().double().cpu()[:, None] * W
        # each product is off by at most one unit of roundoff, which a spectral norm feels with the root of the rank
        rounding = Bound(1.0, 1.0 + 2.0**-52 * math.sqrt(min(W.shape)))
    if source == state:
        norm = spectral_norm(W) if state == "l2" else inf_norm(W)
    elif source == "l1":  # the largest column
        norm = _largest(_sizes(W.mT, "l2")) if state == "l2" else Bound.point(float(_finite(W).abs().max()))
    elif state == "linf":
        norm = _largest(_sizes(W, "l2"))
    else:
        norm = frobenius_norm(torch.tensor([_sizes(W, "linf")], dtype=torch.float64))
    return Bound(0.0, (norm.upper * rounding).upper)


def weighted_norm(W: Tensor, scaling: Tensor) -> Bound:
    r"""Bound :math:`\|DWD^{-1}\|_2`.

    Args:
        W: ``(n, n)``.
        scaling: the diagonal of D, positive.

    Returns:
        A bound from 0 to the norm.

    Examples:
        >>> bound = weighted_norm(torch.tensor([[0.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 8.0]))
        >>> 0.5 <= bound.upper < 0.5 + 1e-12
        True
    """
    d = scaling.detach().double().cpu()
    M = d[:, None] * W.detach().double().cpu() / d
    # two roundings of each entry, which a spectral norm feels with the root of the rank
    rounding = 1.0 + 2.0**-51 * math.sqrt(len(M))
    return Bound(0.0, (Bound.point(spectral_norm(M).upper) * rounding).upper)


def from_state(state: str, target: str, inverse: Sequence[float]) -> Bound:
    r"""Bound the norm of :math:`D^{-1}` from a norm of the state to a norm of the output.

    Args:
        state: ``"l2"`` or ``"linf"``.
        target: ``"l2"``, ``"linf"`` or ``"l1"``.
        inverse: upper ends of the diagonal of :math:`D^{-1}`, positive; ones for the plain norm.

    Returns:
        A bound from 0 to the norm, attained but for rounding.

    Examples:
        >>> from_state("linf", "l2", [1.0] * 4).upper
        2.0
    """
    if target in {"linf", state}:
        return Bound(0.0, max(inverse))
    power = 1 if (state, target) == ("linf", "l1") else 2
    total = Bound.point(0.0)
    for end in inverse:
        total = total + Bound.point(end) ** power
    return Bound(0.0, total.upper if power == 1 else total.sqrt().upper)


def row_constants(
    A: Tensor, step: Tensor, U: Tensor, source: str, weights: Tensor | None = None
) -> tuple[Bound, Bound, Bound]:
    r"""Bound :math:`h + \alpha \odot (\varphi(Ah + Ux + b) - h)`, slopes in [0, 1], in the norm :math:`\max_i |h_i|/w_i`.

    The row :math:`i` of the Jacobian has the absolute sum :math:`|1 - \alpha_i + \alpha_i d\,a_{ii}| + \alpha_i d \sum_{j\ne i}
    |a_{ij}| w_j / w_i`, convex in the slope :math:`d`, so it is largest at :math:`d = 0` or :math:`d = 1`: call it :math:`f_i`. The
    input adds at most :math:`b_i = \alpha_i \|u_i\|/w_i`. If all rows of the state differ by at most
    :math:`M = \max_i b_i/(1 - f_i)` then so they do after the step, :math:`f_i M + b_i \le M`.

    Args:
        A: ``(n, n)``.
        step: :math:`\alpha`, ``(n,)``.
        U: ``(n, input)``.
        source: norm of the input.
        weights: :math:`w > 0`, ``(n,)``; None for ones.

    Returns:
        Bounds of the largest row of the state, of the input, and of :math:`M` (infinite unless all :math:`f_i < 1`).

    Examples:
        >>> A, step, U = torch.zeros(1, 1), torch.tensor([0.5]), torch.ones(1, 1)
        >>> [round(bound.upper, 9) for bound in row_constants(A, step, U, "linf")]
        [0.5, 0.5, 1.0]
    """
    M, alpha = (t.detach().double().cpu().numpy() for t in (A, step))
    n, diagonal = len(M), np.diagonal(M)
    w = np.ones(n) if weights is None else weights.detach().double().cpu().numpy()
    off = np.abs(M - np.diag(diagonal)) * w / w[:, None]
    # n + 8 operations on numbers of one sign, or of size at most 1 + alpha |a_ii|
    unit = (n + 8) * 2.0**-52
    rows = alpha * off.sum(1)
    active = np.abs(1.0 - alpha + alpha * diagonal) + rows
    active = active + unit * (1.0 + alpha * (1.0 + np.abs(diagonal)) + rows) + 1e-300
    passive = [abs(1.0 - Bound.point(a)).upper for a in alpha.tolist()]
    factors = [max(f, p) for f, p in zip(active.tolist(), passive, strict=True)]
    sizes = [Bound.point(u) / v for u, v in zip(_sizes(U.detach().double().cpu(), source), w.tolist(), strict=True)]
    inputs = [(a * size).upper for a, size in zip(alpha.tolist(), sizes, strict=True)]
    ratios = [(b / (1.0 - Bound.point(f))).upper if f < 1.0 else math.inf for b, f in zip(inputs, factors, strict=True)]
    return tuple(Bound(0.0, max(ends)) for ends in (factors, inputs, ratios))  # type: ignore[return-value]


def _sizes(W: Tensor, source: str) -> list[float]:
    """The norm of each row as a map from vectors in a norm to numbers, rounded up."""
    W = _finite(W)
    if source == "l1":
        return W.abs().amax(1).tolist()
    norm = frobenius_norm if source == "l2" else one_norm
    return [norm(row[None] if source == "l2" else row[:, None]).upper for row in W]


def _largest(sizes: list[float]) -> Bound:
    return Bound(0.0, max(sizes))


def _finite(W: Tensor) -> Tensor:
    if not bool(W.isfinite().all()):
        raise ValueError("no bound holds for an input matrix with NaN or infinite entries.")
    return W
