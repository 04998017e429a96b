r"""Functions of singular values: by the decomposition, with a derivative; the clip also by deflation, and by the matrix sign.

*Deflation.* The projection of :math:`W` on :math:`\|W\|_2 \le r` changes only what exceeds the radius:

.. math:: P = W - \sum_{\sigma_i > r} (\sigma_i - r)\, u_i v_i^\top = W - W V (I - r S^{-1}) V^\top,

with the singular values :math:`S` above the radius and their right vectors :math:`V`. These are found by a block Krylov iteration
from a fixed start, or from the eigenvectors of the Gram matrix in float32, and polished in float64: a function of the matrix
alone, not of a random state, and not of what was projected before.

*How good is a found subspace?* Let :math:`V` be orthonormal with :math:`(WV)^\top (WV) = S^2`, :math:`U = WVS^{-1}` and
:math:`E = W^\top U - VS`. Then :math:`(U, S, V)` are exact singular triplets of :math:`W - U E^\top`. If nothing else exceeds the
radius, the matrix :math:`P` computed from them is the projection of :math:`W - UE^\top`, plus :math:`UE^\top`; as projections do
not expand,

.. math:: \|P - \operatorname{proj}(W)\|_F \le 2 \|E\|_F ,

whatever the gaps. That nothing else exceeds the radius is not believed: the caller proves the norm of the rounded result, and clips
all singular values if the proof fails.

The same without a decomposition at all, by products only, is the matrix sign: good for a GPU, where products are fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "SpectralFunction",
    "apply_to_singular_values",
    "derivative_along",
    "project_by_deflation",
    "project_by_sign",
]

_BLOCK = 16
_CHECKS = (6, 10, 16)  # block steps after which the found subspace is looked at
_SMALLEST = 192  # from this size on the iterations are faster than the decomposition
_LARGEST_RATIO = 1e4  # of the norm to the radius: beyond it float32 would lose what is near the radius
_NEAR = 2.0**-16  # what is below the radius by less is treated as if it might be above
_ROUGH = 2.0**-17  # residual that float32 reaches easily; from there on the subspace is polished in float64
_POLISH_STEPS = 6

Corrector = Callable[[Tensor, Tensor], Tensor]
SpectralFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


def apply_to_singular_values(x: Tensor, function: SpectralFunction) -> Tensor:
    r"""Return :math:`U f(\Sigma) V^*`, with a derivative that is finite also at repeated and zero singular values.

    With :math:`A = U^* \dot X V`, split into its Hermitian and skew parts, the derivative multiplies them entrywise by

    .. math::
        \Gamma^+_{ij} = \frac{f_i - f_j}{\sigma_i - \sigma_j}, \qquad
        \Gamma^-_{ij} = \frac{f_i + f_j}{\sigma_i + \sigma_j},

    and what lies outside the range of U by :math:`f_j / \sigma_j`; a quotient 0/0 is the slope :math:`f'`. All quotients of the
    clip lie in [0, 1], where the usual derivative through the factors U and V divides by :math:`\sigma_i^2 - \sigma_j^2`.

    Args:
        x: float32, float64, complex64 or complex128 matrix.
        function: maps the singular values, in decreasing order, to :math:`f(\sigma)` and the slopes :math:`f'(\sigma)`.

    Returns:
        Matrix of the same shape, once differentiable, backward and forward.

    References:
        Daleckii and Krein, 1965.

    Examples:
        >>> X = torch.eye(2, dtype=torch.float64).requires_grad_()
        >>> doubled = apply_to_singular_values(X, lambda s: (2 * s, torch.full_like(s, 2)))
        >>> torch.autograd.grad(doubled.sum(), X)[0]
        tensor([[2., 2.],
                [2., 2.]], dtype=torch.float64)
    """
    if x.shape[0] < x.shape[1]:
        return apply_to_singular_values(x.mH, function).mH
    return _SingularValueFunction.apply(x, function)[0]  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]


class _SingularValueFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, function: SpectralFunction) -> tuple[Tensor, ...]:
        U, sigma, Vh = torch.linalg.svd(x, full_matrices=False)
        values, slopes = function(sigma)
        return (U * values) @ Vh, U, sigma, Vh, values, slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.save_for_forward(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return derivative_along(*ctx.saved_tensors, direction=grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return derivative_along(*ctx.saved_tensors, direction=tangent), None, None, None, None, None


def derivative_along(U: Tensor, s: Tensor, Vh: Tensor, f: Tensor, slope: Tensor, direction: Tensor) -> Tensor:
    r"""Apply the derivative of :math:`U f(\Sigma) V^*` to a direction, or, what is the same, its adjoint to a gradient.

    Args:
        U: left singular vectors, shape ``(..., m, k)``, :math:`k = \min(m, n) = n`.
        s: singular values, shape ``(..., k)``.
        Vh: right singular vectors, conjugate transposed, shape ``(..., k, n)``.
        f: values :math:`f(\sigma)`.
        slope: slopes :math:`f'(\sigma)`.
        direction: matrix of shape ``(..., m, n)``.

    Examples:
        >>> I, one = torch.eye(2), torch.ones(2)
        >>> derivative_along(I, one, I, 3 * one, 3 * one, I)
        tensor([[3., 0.],
                [0., 3.]])
    """
    mean_slope = (slope[..., :, None] + slope[..., None, :]) / 2
    plus = _quotient(f[..., :, None] - f[..., None, :], s[..., :, None] - s[..., None, :], mean_slope)
    minus = _quotient(f[..., :, None] + f[..., None, :], s[..., :, None] + s[..., None, :], mean_slope)
    A = U.mH @ direction @ Vh.mH
    inside = plus * (A + A.mH) / 2 + minus * (A - A.mH) / 2
    outside = direction @ Vh.mH - U @ A
    return (U @ inside + outside * _quotient(f, s, slope)[..., None, :]) @ Vh


def _quotient(numerator: Tensor, denominator: Tensor, at_zero: Tensor) -> Tensor:
    zero = denominator == 0
    return torch.where(zero, at_zero, numerator / torch.where(zero, 1.0, denominator))


@torch.no_grad()
def project_by_deflation(W: Tensor, radius: float, dtype: torch.dtype) -> Tensor | None:
    r"""Return :math:`W` with its few singular values above the radius clipped, or ``None`` where that is not the way to do it.

    Args:
        W: float64 matrix on the CPU, finite.
        radius: :math:`r > 0`.
        dtype: the dtype in which the result will be stored; it sets the precision that is asked for.

    Returns:
        Float64 matrix within :math:`2^{-1}\varepsilon r` in the Frobenius norm (:math:`\varepsilon` of ``dtype``; in float64
        :math:`2^{-44} r`) of the projection, *provided* that its norm does not exceed the radius, which the caller must prove.
        ``None`` if the matrix is small, far too large for the radius, or no such subspace was found within the budget: in float64
        unless the values above the radius stand apart, otherwise if they are more than a quarter of all.

    Note:
        Two calls with equal matrices of the same memory layout give equal bits; the global random state is neither read nor
        changed.

    References:
        Saad, *Numerical Methods for Large Eigenvalue Problems*, 2011, sections 5.2 and 6.4.

    Examples:
        >>> W = torch.diag(torch.linspace(0, 1, 256, dtype=torch.float64))
        >>> W[0, 0] = 3.0
        >>> P = project_by_deflation(W, 1.5, torch.float32)
        >>> round(P[0, 0].item(), 6)
        1.5
    """
    if W.shape[0] < W.shape[1]:
        P = project_by_deflation(W.mT, radius, dtype)
        return None if P is None else P.mT
    if W.shape[1] < _SMALLEST:
        return None
    A = W / radius
    if not float(A.abs().amax()) < _LARGEST_RATIO:
        return None
    tolerance = 2.0**-46 if dtype == torch.float64 else torch.finfo(dtype).eps / 4
    work = A if dtype == torch.float64 else A.float()
    for subspace in (_krylov_subspace, _spectral_subspace):
        start = subspace(work, A)
        found = None if start is None else _polished(A, *start, tolerance)
        if found is not None:
            V, X, squares = found
            return W - (X * (1.0 - squares.rsqrt()).clamp_min(0.0)) @ (radius * V.mT)
    return None


@torch.no_grad()
def leading_subspace(A: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """Return orthonormal float64 columns near the leading right singular vectors, and estimates of the singular values.

    Args:
        A: float64 matrix on the CPU with entries of size about 1 or less; the iteration runs in float32.
        count: how many columns at most.

    Returns:
        The columns, and estimates (from below, up to rounding in float32) of their singular values and of the next one, the largest
        first.

    Examples:
        >>> V, values = leading_subspace(torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)), 1)
        >>> abs(V[0, 0].item()) > 0.999, [round(s, 3) for s in values]
        (True, [3.0, 2.0])
    """
    W = A.float()
    steps = max(min(_CHECKS[1], W.shape[1] // _BLOCK), 1)
    basis, images = W.new_empty(2, 0, W.shape[1]).unbind()
    block = _start(W, min(_BLOCK, W.shape[1]))
    for _ in range(steps):
        image = (block @ W.mT) @ W
        basis, images = torch.cat([basis, block]), torch.cat([images, image])
        block = _next_block(image, basis)
    small = (basis @ images.mT).double()
    values, Y = torch.linalg.eigh((small + small.mT) / 2)
    count = min(count, values.numel())
    estimates = torch.cat([values.new_zeros(1), values])[-count - 1 :].clamp_min(0.0).sqrt().flip(0)
    return torch.linalg.qr(basis.mT.double() @ Y[:, -count:])[0], estimates.tolist()


def _start(A: Tensor, count: int) -> Tensor:
    """Return orthonormal rows from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(A.shape[1], count, generator=generator, dtype=torch.float64, device="cpu")
    return torch.linalg.qr(start.to(A.dtype))[0].mT


def _next_block(image: Tensor, basis: Tensor) -> Tensor:
    """Return orthonormal rows orthogonal to those of the basis, also where the images lie in its span, as for a multiple of I."""
    for _ in range(3):
        image = torch.linalg.qr((image - (image @ basis.mT) @ basis).mT)[0].mT
    return image


def _krylov_subspace(A: Tensor, exact: Tensor) -> tuple[Tensor, Corrector] | None:
    """Return rough right singular vectors of A with values above 1, by a block Krylov iteration with full orthogonalization."""
    n = A.shape[1]
    basis, images = A.new_empty(2, _BLOCK * _CHECKS[-1], n).unbind()  # rows, so that blocks are contiguous
    block = _start(A, _BLOCK)
    last = 1.0
    for k in range(_CHECKS[-1]):
        here = slice(k * _BLOCK, (k + 1) * _BLOCK)
        basis[here] = block
        images[here] = image = (block @ A.mT) @ A
        seen = basis[: here.stop]
        if k + 1 in _CHECKS:
            vectors, size = _ritz(seen, images[: here.stop])
            if vectors.shape[1] > 0 and size <= _ROUGH:
                return vectors, lambda residual, _: _powers(exact, residual)
            # the next check is half as far again: give up where the decay seen so far would not do
            if vectors.shape[1] > here.stop // 3 or size * (size / last) ** 1.5 > 2.0**-10:
                return None
            last = max(size, 1e-30)
        block = _next_block(image, seen)
    return None


def _powers(A: Tensor, residual: Tensor) -> Tensor:
    """Return the residuals and their images under three powers of the Gram matrix, in float64."""
    blocks = [residual]
    for _ in range(3):
        block = A.mT @ (A @ (blocks[-1] / torch.linalg.vector_norm(blocks[-1], dim=0).clamp_min(1e-300)))
        blocks.append(block)
    return torch.cat(blocks, dim=1)


def _ritz(basis: Tensor, images: Tensor) -> tuple[Tensor, float]:
    """Return the Ritz vectors of the Gram matrix with values above 1, and their largest residual."""
    small = (basis @ images.mT).double()
    values, Y = torch.linalg.eigh((small + small.mT) / 2)
    count = int((values > 1.0 - _NEAR).sum())
    values, Y = values[values.numel() - count :], Y[:, Y.shape[1] - count :].to(basis.dtype)
    residual = images.mT @ Y - (basis.mT @ Y) * values.to(basis.dtype)
    size = torch.linalg.vector_norm(residual, dim=0) / values.clamp_min(1.0).to(basis.dtype)
    return (basis.mT @ Y).double(), float(size.amax()) if count else 0.0


def _spectral_subspace(A: Tensor, _: Tensor) -> tuple[Tensor, Corrector] | None:
    """Return the right singular vectors of A with values above 1, rough, from all eigenvectors of the Gram matrix.

    In float32 that takes less than half the time of a decomposition in float64. The other vectors precondition the polishing: they
    turn a residual into the correction of first order.
    """
    if A.dtype == torch.float64:
        return None
    values, Q = torch.linalg.eigh(A.mT @ A)
    count = int((values > 1.0 - _NEAR).sum())
    if count == 0 or count > A.shape[1] // 4:
        return None
    rest, below = Q[:, :-count], values[:-count]

    def correction(residual: Tensor, squares: Tensor) -> Tensor:
        gaps = (squares.to(A.dtype) - below[:, None]).clamp_min(_NEAR)
        size = torch.linalg.vector_norm(residual, dim=0).clamp_min(torch.finfo(A.dtype).tiny)
        return (rest @ ((rest.mT @ (residual / size).to(A.dtype)) / gaps)).double()

    return Q[:, -count:].double(), correction


def _polished(A: Tensor, V: Tensor, correct: Corrector, tolerance: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Improve vectors until the residual of their triplets is within the tolerance; return V, AV and the squares of the values.

    Each step is a Rayleigh-Ritz step, in float64, in the span of the vectors and their corrections.
    """
    count, Q = V.shape[1], torch.linalg.qr(V)[0]
    for _ in range(_POLISH_STEPS):
        X = A @ Q
        squares, Y = torch.linalg.eigh(X.mT @ X)
        squares, Y = squares[-count:], Y[:, -count:]
        V, X = Q @ Y, X @ Y
        residual = A.mT @ X - V * squares  # of the Gram matrix: that of the triplets times the values
        if float(torch.linalg.matrix_norm(residual / squares.sqrt())) <= tolerance:
            return V, X, squares
        update = correct(residual, squares)
        update = update - V @ (V.mT @ update)
        Q = torch.linalg.qr(torch.cat([V, update / torch.linalg.vector_norm(update, dim=0).clamp_min(1e-300)], dim=1))[
            0
        ]
    return None


@torch.no_grad()
def project_by_sign(W: Tensor, radius: float, dtype: torch.dtype) -> Tensor:
    r"""Return :math:`W` with its singular values clipped, computed with products of matrices only.

    With :math:`A = W/r`, the sign :math:`S` of :math:`I - A^\top A` and the polar factor :math:`Q` of :math:`A`, both by
    Newton-Schulz iterations,

    .. math:: P = W - (W - rQ)\,\tfrac{1}{2}(I - S).

    A singular value :math:`\sigma` becomes :math:`\sigma - (\sigma - r)\pi` with :math:`\pi \in [0, 1]`, which is 1 above the
    radius and 0 below it. The sign is ill-conditioned at the radius, its use here is not: there :math:`\sigma - r` is as small as
    :math:`\pi` is uncertain. And Q needs to have converged only for values above r/2, because the others are multiplied by 0.

    Args:
        W: float64 matrix, finite, on any device.
        radius: :math:`r > 0`.
        dtype: the dtype in which the result will be stored; it sets the number of iterations.

    Returns:
        Float64 matrix on the device of ``W``, within about :math:`\varepsilon r / 8` of the projection (in float64 within
        :math:`10^{-13}\sqrt{n} \|W\|_2`). Its norm may exceed the radius by as much: the caller shrinks it until it is proved.

    References:
        Higham, *Functions of Matrices*, 2008, chapters 5 and 8.

    Examples:
        >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        >>> project_by_sign(W, 2.0, torch.float64).round(decimals=6)
        tensor([[2., 0.],
                [0., 1.],
                [0., 0.]], dtype=torch.float64)
    """
    if W.shape[0] < W.shape[1]:
        return project_by_sign(W.mT, radius, dtype).mT
    A = W / radius
    sums = A.abs().sum(dim=0).amax() * A.abs().sum(dim=1).amax()
    square = float(torch.minimum(A.square().sum(), sums)) * (1.0 + 2.0**-40)  # of a bound of the norm of A
    if square <= 1.0:
        return W
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    resolution = torch.finfo(dtype).eps / 8
    S = (eye - A.mT @ A) / square
    for _ in range(_newton_schulz_steps(square / resolution)):
        S = 1.5 * S - 0.5 * (S @ S) @ S
        S = (S + S.mT) / 2
    Q = A / math.sqrt(square)
    for _ in range(_newton_schulz_steps(2.0 * math.sqrt(square))):
        Q = 1.5 * Q - 0.5 * Q @ (Q.mT @ Q)
    return W - (W - radius * Q) @ (eye - S) / 2


def _newton_schulz_steps(ratio: float) -> int:
    """Return after how many steps values from 1/ratio to 1 have become 1: small ones grow by 1.5, the end is quadratic."""
    return math.ceil(math.log(max(ratio, 1.0)) / math.log(1.5)) + 7
