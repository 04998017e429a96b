"""What the weight maps to orthogonal matrices share: orthonormalization, its last step, rounding inwards, the polar factor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stableopt.nn.weights.base import WeightMap

__all__ = [
    "HALF",
    "check_matrix",
    "inward",
    "newton_schulz",
    "normal_factor",
    "polar",
    "reduced",
    "stored",
    "unit_size",
]

_SHIFT = 4.0
HALF = frozenset({torch.float16, torch.bfloat16})
"""The dtypes that are computed in float32."""


def newton_schulz(Q: Tensor, steps: int) -> Tensor:
    r"""Return :math:`Q` after steps :math:`Q \mapsto \tfrac32 Q - \tfrac12 Q Q^\top Q`: of norm 1 at most if :math:`\|Q\|_2 \le 2`.

    Args:
        Q: matrix with no fewer rows than columns.
        steps: number of steps.

    Examples:
        >>> float(newton_schulz(torch.tensor([[2.0]]), 1)), float(newton_schulz(torch.tensor([[0.0]]), 3))
        (-1.0, 0.0)
    """
    for _ in range(steps):
        Q = 1.5 * Q - Q @ (0.5 * (Q.mT @ Q))
    return Q


def unit_size(V: Tensor, stored: torch.dtype) -> Tensor:
    """Return ``V`` with its largest absolute entry 1, or below if it is tiny: the derivative must be finite at zero.

    Args:
        V: the original in the dtype of the computation.
        stored: the dtype of the original, in which its gradient has to be finite.

    Note:
        For maps that do not depend on the scale, so no derivative is taken through the factor.

    Examples:
        >>> unit_size(torch.tensor([1e-9, -2e-9]), torch.float32).tolist()
        [0.5, -1.0]
    """
    floor = {torch.float16: 1.0, torch.float64: 1e-30}.get(stored, 1e-12)
    return V / V.detach().abs().amax().clamp_min(floor)


def normal_factor(V: Tensor) -> Tensor:
    r"""Return :math:`V L^{-\top}` with :math:`LL^\top = V^\top V + \varepsilon I`: the columns of ``V`` made orthonormal.

    Args:
        V: matrix with no fewer rows than columns, float32 or float64, of unit size.

    Examples:
        >>> normal_factor(torch.tensor([[1.0], [0.0]])).round(decimals=3)
        tensor([[1.],
                [0.]])
    """
    eps = torch.finfo(V.dtype).eps
    S = V.mT @ V
    trace = S.diagonal().sum()
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    shift = eps * (_SHIFT + 0.25 * math.sqrt(len(V))) * (trace + 1.0)  # the 1: for an original of zeros
    with torch.no_grad():  # rounding can leave the shifted matrix indefinite; the trace is always enough
        failed = torch.linalg.cholesky_ex(S + shift * eye).info > 0
    L = torch.linalg.cholesky_ex(S + torch.where(failed, trace, shift) * eye).L
    return torch.linalg.solve_triangular(L.mT, V, upper=True, left=False)


def inward(Q: Tensor, dtype: torch.dtype, radius: float) -> Tensor:
    r"""Return ``radius * Q`` in a dtype, reduced so that its norm is at most the radius, for :math:`\|Q\|_2 \le 1` up to rounding.

    Args:
        Q: the matrix in the dtype of the computation.
        dtype: what is stored.
        radius: the limit.

    Examples:
        >>> W = inward(torch.eye(2), torch.bfloat16, 1.0)
        >>> bool(0.99 < W.amax() <= 1.0), W.dtype
        (True, torch.bfloat16)
    """
    return stored(reduced(radius, Q.shape, Q.dtype) * Q, dtype, radius)


def reduced(radius: float, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> float:
    """Return the radius less the rounding of the last matrix products and of the proof, for a matrix of such a shape.

    Examples:
        >>> 1.0 - 1e-12 < reduced(1.0, (4, 4), torch.float64) < 1.0
        True
    """
    rank, terms = min(shape), sum(shape)
    return radius * (1.0 - (8.0 + 2.0 * math.sqrt(terms)) * torch.finfo(dtype).eps - 2.0**-52 * rank * terms)


def stored(W: Tensor, dtype: torch.dtype, radius: float) -> Tensor:
    r"""Return a matrix of norm at most the radius in the dtype that is stored, contiguous, with a norm still at most the radius.

    In half precision the error :math:`E` of rounding a slightly shrunk matrix is known exactly; where
    :math:`\|E\|_2 \le \|(E^\top E)^2\|_F^{1/4}` is within what it was shrunk by, the result is kept. Otherwise the matrix is
    shrunk by the worst case, :math:`u\sqrt{\operatorname{rank}}`, which is 20 times more for 1000 columns.

    Args:
        W: the matrix in the dtype of the computation.
        dtype: what is stored.
        radius: the limit.

    Examples:
        >>> stored(torch.eye(1), torch.float32, 1.0)
        tensor([[1.]])
    """
    if dtype not in HALF:
        return W.to(dtype).contiguous()
    kind = torch.finfo(dtype)
    subnormal = kind.smallest_normal * kind.eps * math.sqrt(W.numel()) / radius
    result = (max(0.0, 1.0 - 0.51 * kind.eps * math.sqrt(min(W.shape)) - subnormal) * W).to(dtype)
    for margin in (1.6, 0.8):  # the tightest that is proved
        shrunk = (1.0 - margin * kind.eps) * W
        candidate = shrunk.to(dtype)
        with torch.no_grad():
            E = (candidate.to(W.dtype) - shrunk) / radius
            gram = E.mT @ E if W.shape[0] >= W.shape[1] else E @ E.mT
            size = torch.linalg.vector_norm(gram @ gram) ** 0.25
        result = torch.where(size <= 0.9 * margin * kind.eps, candidate, result)
    return result.contiguous()


def polar(W: Tensor) -> Tensor:
    r"""Return the matrix with orthonormal rows or columns nearest to ``W``, in float64: :math:`UV^\top` of its singular vectors.

    Args:
        W: a finite matrix.

    Examples:
        >>> polar(torch.tensor([[3.0], [4.0]])).round(decimals=6).flatten().tolist()
        [0.6, 0.8]
    """
    A = W.detach().double()
    tall = A if A.shape[0] >= A.shape[1] else A.mT
    gram = tall.mT @ tall
    size = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if bool(
        torch.linalg.vector_norm(gram - size * eye) < 0.1 * size
    ):  # a multiple of the answer already: much faster than an SVD
        tall = newton_schulz(tall / size.sqrt(), 5)
        return tall if A.shape[0] >= A.shape[1] else tall.mT
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    return U @ Vh


def check_matrix(W: Tensor, method: WeightMap) -> None:
    """Refuse what is no real floating matrix.

    Args:
        W: the tensor.
        method: the map it is for.

    Raises:
        TypeError: if it is not real and floating.
        ValueError: if it has other than two dimensions.

    Examples:
        >>> from stableopt.nn.weights import METHODS, Geometry
        >>> check_matrix(torch.zeros(2, 2), METHODS["cayley"](Geometry("linear")))
    """
    if not W.is_floating_point():
        raise TypeError(f"the method {method.name!r} needs a real floating matrix, got dtype {W.dtype}.")
    if W.ndim != 2:
        raise ValueError(f"the method {method.name!r} needs a matrix, got shape {tuple(W.shape)}.")
