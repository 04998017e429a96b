r"""Matrices whose logarithmic norm for the maximum norm is limited for every value of a free parameter.

What residual blocks in the maximum norm (:mod:`stableopt.nn.residual`) and contracting recurrent cells
(:mod:`stableopt.nn.recurrent`) share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.nn.precision import full_precision, wide

__all__ = ["log_norm_bounded"]


def log_norm_bounded(V: Tensor, limit: float, *, scaling: Tensor | None = None, total: float | None = None) -> Tensor:
    r"""Return a matrix with :math:`\mu_\infty(A) = \max_i (a_{ii} + \sum_{j\ne i} |a_{ij}|) \le g` made from any square matrix.

    .. math::
        a_{ij} = c_i v_{ij} \quad (j \ne i), \qquad
        a_{ii} = g - c_i\Bigl(\sum_{j \ne i} |v_{ij}| \frac{w_j}{w_i} + \operatorname{softplus}(v_{ii})\Bigr), \qquad
        c_i = \min\Bigl(1, \frac{R}{\sum_{j\ne i}|v_{ij}| w_j/w_i + \operatorname{softplus}(v_{ii})}\Bigr) .

    Every matrix with :math:`\mu_\infty(A) < g` in the norm :math:`\max_i |x_i|/w_i` is reached (for :math:`R = \infty`).

    Args:
        V: free parameter of shape ``(n, n)``.
        limit: :math:`g`, of either sign.
        scaling: the weights :math:`w > 0` of the norm, of shape ``(n,)``; None for ones.
        total: :math:`R > 0`, which keeps :math:`a_{ii} \ge g - R`; None for no limit of the diagonal.

    Returns:
        The matrix in the dtype of ``V``, differentiable. It is computed in at least float32, and its diagonal is lowered by the
        rounding of the sums, of the cast and of the proof, so that the logarithmic norm of the stored numbers is at most the limit.

    References:
        Jafarpour, Davydov, Proskurnikov and Bullo, *Robust Implicit Networks via Non-Euclidean Contractions*, 2021.

    Examples:
        >>> from stableopt.linalg import log_norm
        >>> _ = torch.manual_seed(0)
        >>> A = log_norm_bounded(torch.randn(5, 5), 0.5)
        >>> log_norm(A, float("inf")).upper <= 0.5
        True
    """
    with full_precision(V):
        W = wide(V)
        n, diagonal = len(W), W.diagonal()
        off = W - torch.diag_embed(diagonal)
        shares = off.abs() if scaling is None else off.abs() * (scaling.to(W.dtype) / scaling.to(W.dtype)[:, None])
        sums = shares.sum(1) + F.softplus(diagonal)
        if total is not None:
            c = (total / sums).clamp_max(1.0)
            off, sums = c[:, None] * off, c * sums
        computed, stored = torch.finfo(W.dtype), torch.finfo(V.dtype)
        rounding = (2 * (n + 10) * computed.eps + stored.eps) * (
            sums + abs(limit)
        ) + n * stored.smallest_normal * stored.eps
        return (off + torch.diag_embed(limit - sums - rounding)).to(V.dtype)
