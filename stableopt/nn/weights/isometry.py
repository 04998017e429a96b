"""What the weight maps to orthogonal matrices share: orthonormalization, its last step, rounding inwards, the polar factor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stableopt.nn.weights.base import WeightMap, check_radius, grain

__all__ = [
    "HALF",
    "check_matrix",
    "inward",
    "newton_schulz",
    "normal_factor",
    "polar",
    "reduced",
    "round_by_arithmetic",
    "stored",
    "unit_size",
]

_SHIFT = 4.0
_GROWTH = (1.15, 1.6, 1.0)
"""By how much the second and the third factor that are tried leave more room than the rounding of the one before takes."""
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
    check_radius(radius, dtype)
    rank, terms = min(shape), sum(shape)
    lost = grain(dtype, math.prod(shape), radius)
    return radius * max(
        0.0, 1.0 - lost - (8.0 + 2.0 * math.sqrt(terms)) * torch.finfo(dtype).eps - 2.0**-52 * rank * terms
    )


def one_matrix(W: Tensor) -> tuple[Tensor, float]:
    """Return a matrix as a batch of one, and the factor 1: what :func:`stored` measures by default.

    Examples:
        >>> one_matrix(torch.eye(1))
        (tensor([[[1.]]]), 1.0)
    """
    return W[None], 1.0


def stored(
    W: Tensor,
    dtype: torch.dtype,
    radius: float | Tensor,
    folded: Callable[[Tensor], tuple[Tensor, float]] = one_matrix,
) -> Tensor:
    r"""Return a weight of norm at most the radius in the dtype that is stored, contiguous, with a norm still at most the radius.

    In half precision the error :math:`E` of rounding a slightly shrunk weight is known exactly; where
    :math:`\|E\|_2 \le \|(E^\top E)^2\|_F^{1/4}` is within what it was shrunk by, the result is kept. Otherwise the weight is
    shrunk by the worst case, :math:`u\sqrt{\operatorname{rank}}` for a matrix, which is 20 times more for 1000 columns.

    Args:
        W: the weight in the dtype of the computation.
        dtype: what is stored.
        radius: the limit, positive.
        folded: a linear map to matrices the largest norm of which, times the number beside them, is an upper bound of the norm, as
            :meth:`stableopt.nn.weights.Geometry.folded` gives them.

    Examples:
        >>> stored(torch.eye(1), torch.float32, 1.0)
        tensor([[1.]])
    """
    if dtype not in HALF:
        return W.to(dtype).contiguous()
    with torch.no_grad():
        scale = _shrinking(W.detach(), dtype, radius, folded)
    return (scale * W).to(dtype).contiguous()


def _shrinking(
    W: Tensor, dtype: torch.dtype, radius: float | Tensor, folded: Callable[[Tensor], tuple[Tensor, float]]
) -> Tensor | float:
    """Return the factor nearest to 1 that leaves room for its rounding: of the worst case and of a few that are measured."""
    eps = torch.finfo(dtype).eps
    matrices, factor = folded(W)
    lost: Any = grain(dtype, W.numel(), 1.0, factor) / radius
    # a proof of the norm of a kernel may count its rounding by the Riesz factor of stableopt.linalg.conv_correlation
    riesz = math.cos(math.pi / 8) ** max(0, W.ndim - 2)
    worst = 1.0 - 0.51 / riesz * eps * factor * math.sqrt(min(matrices.shape[1:])) - lost
    if isinstance(worst, float) and worst >= 1.0 - 0.8 * eps:
        return worst
    share, branch = 0.9 * riesz, _may_branch(W)
    scale = W.new_full((), 1.0 - 0.8 * eps)
    worst = (W.new_full((), worst) if isinstance(worst, float) else worst).clamp_min(0.0)
    fits, found = torch.zeros_like(worst, dtype=torch.bool), worst
    for growth in _GROWTH:
        enough = share * (1.0 - scale)
        size = _rounding_error(scale * W, dtype, radius, folded, enough)
        found = torch.where(fits | ~(size <= enough), found, torch.maximum(scale, worst))
        fits = fits | (size <= enough)
        if branch and bool(fits):
            break
        scale = 1.0 - (growth / share * size).clamp(0.8 * eps, 1.0)
    return found


def _may_branch(W: Tensor) -> bool:
    """Return whether a number can be read at once: on the CPU, of a plain tensor, outside of compilers and transforms."""
    plain = type(W) in {Tensor, torch.nn.Parameter} and W.device.type == "cpu"
    return plain and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())  # noqa: SLF001 no public question


def _rounding_error(
    W: Tensor,
    dtype: torch.dtype,
    radius: float | Tensor,
    folded: Callable[[Tensor], tuple[Tensor, float]],
    enough: Tensor,
) -> Tensor:
    """Bound the norm of what rounding to a dtype adds to a weight from above, relative to the radius; tightly if not enough."""
    eps = torch.finfo(dtype).eps
    E, factor = folded((_rounded(W, dtype) - W) / radius / eps)
    gram = E.mT @ E if E.shape[-2] >= E.shape[-1] else E @ E.mT
    size = torch.linalg.vector_norm(gram, dim=(-2, -1)).amax() ** 0.5 * (factor * eps)
    if _may_branch(W) and bool(size <= enough):
        return size
    return torch.linalg.vector_norm(gram @ gram, dim=(-2, -1)).amax() ** 0.25 * (factor * eps)


def _rounded(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a dtype without leaving the wider one.

    Compilers leave the cast out, and find no error then. So while compiling it is computed: the spacing of the numbers around each
    entry from the bits of its exponent.
    """
    if not torch.compiler.is_compiling():
        return W.to(dtype).to(W.dtype)
    return round_by_arithmetic(W, dtype)


def round_by_arithmetic(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to the nearest number of a half precision dtype, ties to even, by float32 arithmetic alone.

    Args:
        W: within the range of the dtype.
        dtype: float16, or bfloat16, of which numbers below 2**-119 are rounded more coarsely.

    Examples:
        >>> round_by_arithmetic(torch.tensor([1.001, 3e-8]), torch.float16)
        tensor([1.0010e+00, 5.9605e-08])
    """
    digits, least = {torch.float16: (10, -24), torch.bfloat16: (7, -126)}[dtype]
    exponent = (W.view(torch.int32) >> 23 & 0xFF) - digits
    exponent = exponent.clamp_min(127 + least)  # of the spacing, in the bits of a number
    spacing, inverse = ((e << 23).view(torch.float32) for e in (exponent, 254 - exponent))
    return (W * inverse).round() * spacing


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
