"""The ball of the spectral norm, whose members are proved to belong to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from stableopt.constraints.arguments import check_matrix, check_number
from stableopt.constraints.base import Constraint
from stableopt.constraints.layout import substitute
from stableopt.linalg import gram_norm, spectral_norm

__all__ = ["SpectralBall", "apply_to_singular_values", "shrink_until_proved"]

_ADVICE = (
    "The norm of a reshaped convolution kernel is not the norm of the convolution: "
    "use stableopt.nn.stabilize for convolutions, L2Ball or LinfBall for vectors."
)
_HAIR = 2.0**-48


@dataclass(frozen=True)
class SpectralBall(Constraint):
    r"""The matrices with :math:`\|W\|_2 = \sigma_{\max}(W) \le r`; projection :math:`U \min(\Sigma, r) V^\top`.

    Args:
        radius: :math:`r`, finite, :math:`> 0`.

    Raises:
        TypeError: if the radius is not a real number.
        ValueError: if it is not finite or not positive.

    Note:
        A matrix counts as feasible when its norm is *proved* to be at most the radius (:func:`stableopt.linalg.spectral_norm`), in
        its storage dtype. The proof runs on the CPU: :meth:`project` and :meth:`violation` copy the matrix there and wait.
        A matrix whose norm is within the width of the proof below the radius is moved inwards by about that. :meth:`map`
        stays on the device and is an upper bound in exact arithmetic, not a proof.

    References:
        Daleckii and Krein, *Integration and differentiation of functions of Hermitian operators*, 1965 (the derivative).

    Examples:
        >>> SpectralBall(2.0).project(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))).round(decimals=6)
        tensor([[2., 0.],
                [0., 1.]], dtype=torch.float64)
        >>> from stableopt.linalg import spectral_norm
        >>> W = SpectralBall(2.0).project(10 * torch.randn(5, 3)).bfloat16()
        >>> spectral_norm(SpectralBall(2.0).project(W)).upper <= 2.0
        True
    """

    radius: float

    def __post_init__(self) -> None:
        """Check the radius."""
        object.__setattr__(self, "radius", check_number("SpectralBall", "radius", self.radius, low=0.0, strict=True))

    def project(self, x: Tensor) -> Tensor:
        r"""Return ``x`` itself, or ``x`` with its singular values clipped, rounded, and shrunk until the proof holds.

        Each pass of the shrinking rounds :math:`cP` to the dtype and proves its norm; the relative margin doubles, so that after
        at most 54 passes :math:`c = 0`. In practice there are one to four.

        Args:
            x: matrix of shape ``(m, n)``; never changed.

        Returns:
            Matrix with a proved norm. Its distance from the exact projection is a few units in the last place of the dtype,
            in float64 the width of the proof (relative 4e-12 for 128 x 512).
            A matrix with NaN or infinity becomes NaN.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.
            ValueError: if it does not have two dimensions.

        Examples:
            >>> SpectralBall(2.0).project(torch.eye(2))
            tensor([[1., 0.],
                    [0., 1.]])
        """
        check_matrix("SpectralBall", x, _ADVICE)
        if x.numel() == 0:
            return x
        if not bool(x.isfinite().all()):
            return x * math.nan
        if proved_norm(x) <= self.radius:
            return x
        clipped = apply_to_singular_values(x.double(), self._clip)
        value = shrink_until_proved(clipped.detach(), self.radius, x.dtype)
        return substitute(clipped.to(x.dtype), value)

    def violation(self, x: Tensor) -> float:
        """Return by how much the proved norm exceeds the radius; infinite for NaN and infinity.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.
            ValueError: if it does not have two dimensions.

        Examples:
            >>> SpectralBall(2.0).violation(torch.diag(torch.tensor([3.0, 1.0])))
            1.0...
        """
        check_matrix("SpectralBall", x, _ADVICE)
        if not bool(x.isfinite().all()):
            return math.inf
        norm = proved_norm(x)
        return 0.0 if norm <= self.radius else max(norm - self.radius, math.ulp(0.0))

    def map(self, x: Tensor) -> Tensor:
        r"""Return :math:`x \min(1, r / N(x))` with the differentiable bound :math:`N(x) \ge \|x\|_2` of Gram iteration.

        Args:
            x: matrix of shape ``(m, n)``.

        Returns:
            Matrix with norm at most the radius in exact arithmetic, whatever the history; half precision is computed in
            float32 and rounded once. Because N overestimates a little, the image stops a little short of the sphere.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.
            ValueError: if it does not have two dimensions.

        Examples:
            >>> SpectralBall(2.0).map(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))).round(decimals=6)
            tensor([[2.0000, 0.0000],
                    [0.0000, 0.5000]], dtype=torch.float64)
        """
        check_matrix("SpectralBall", x, _ADVICE)
        work = x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
        factor = self.radius / gram_norm(work).double().clamp_min(self.radius)
        return (work * factor.to(work.dtype)).to(x.dtype)

    def parametrization(self, tensor: Tensor) -> nn.Module:
        """Return the stateless module that applies :meth:`map`.

        Args:
            tensor: the matrix to be parametrized.

        Raises:
            TypeError: if ``tensor`` is not a real floating tensor.
            ValueError: if it does not have two dimensions.

        Examples:
            >>> SpectralBall(1.0).parametrization(torch.zeros(2, 3))
            Parametrization(SpectralBall(radius=1.0))
        """
        check_matrix("SpectralBall", tensor, _ADVICE)
        return super().parametrization(tensor)

    def _clip(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return sigma.clamp_max(self.radius), (sigma <= self.radius).to(sigma.dtype)


def proved_norm(x: Tensor) -> float:
    """Return the proved upper bound of the spectral norm, the same for every memory layout of the same matrix.

    Examples:
        >>> 1.0 <= proved_norm(torch.eye(2)) < 1.0 + 1e-12
        True
    """
    return spectral_norm(x.detach().contiguous()).upper


def shrink_until_proved(target: Tensor, radius: float, dtype: torch.dtype) -> Tensor:
    r"""Round a matrix to ``dtype`` so that its spectral norm is proved to be at most ``radius``, scaling it down if needed.

    The result keeps a relative distance :math:`2^{-48}` from the radius, so that proving it again elsewhere, with another order of
    summation, gives the same answer.

    Args:
        target: float64 matrix, finite, with norm about ``radius`` or less.
        radius: limit of the norm, :math:`\ge 0`.
        dtype: float64, float32, bfloat16 or float16.

    Returns:
        New matrix of that dtype.

    Examples:
        >>> A = shrink_until_proved(torch.full((3, 3), 1 / 3, dtype=torch.float64), 1.0, torch.bfloat16)
        >>> spectral_norm(A).upper <= 1.0
        True
    """
    info = torch.finfo(dtype)
    limit = radius * (1.0 - _HAIR)
    factor, margin = 1.0, max(_HAIR, info.eps / 8)
    while True:
        candidate = (target * factor).clamp(info.min, info.max).to(dtype)
        norm = proved_norm(candidate)
        if norm <= limit:
            return candidate
        factor *= min(1.0, limit / norm) * (1.0 - margin)
        margin = min(1.0, 2.0 * margin)


def apply_to_singular_values(x: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    r"""Return :math:`U f(\Sigma) V^\top`, with a derivative that is finite also at repeated and zero singular values.

    With :math:`A = U^\top \dot X V`, split into its symmetric and skew parts, the derivative multiplies them entrywise by

    .. math::
        \Gamma^+_{ij} = \frac{f_i - f_j}{\sigma_i - \sigma_j}, \qquad
        \Gamma^-_{ij} = \frac{f_i + f_j}{\sigma_i + \sigma_j},

    and what lies outside the range of U by :math:`f_j / \sigma_j`; a quotient 0/0 is the slope :math:`f'`. All quotients of the
    clip lie in [0, 1], where the usual derivative through the factors U and V divides by :math:`\sigma_i^2 - \sigma_j^2`.

    Args:
        x: float32 or float64 matrix.
        function: maps the singular values, in decreasing order, to :math:`f(\sigma)` and the slopes :math:`f'(\sigma)`.

    Returns:
        Matrix of the same shape, once differentiable.

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
        return apply_to_singular_values(x.mT, function).mT
    return _SingularValueFunction.apply(x, function)  # pyright: ignore[reportReturnType]


class _SingularValueFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        U, sigma, Vh = torch.linalg.svd(x, full_matrices=False)
        values, slopes = function(sigma)
        ctx.save_for_backward(U, sigma, Vh, values, slopes)
        return (U * values) @ Vh

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        U, s, Vh, f, slope = ctx.saved_tensors  # type: ignore[attr-defined]
        mean_slope = (slope[:, None] + slope) / 2
        plus = _quotient(f[:, None] - f, s[:, None] - s, mean_slope)
        minus = _quotient(f[:, None] + f, s[:, None] + s, mean_slope)
        A = U.mT @ grad @ Vh.mT
        inside = plus * (A + A.mT) / 2 + minus * (A - A.mT) / 2
        outside = grad @ Vh.mT - U @ A
        return (U @ inside + outside * _quotient(f, s, slope)) @ Vh, None


def _quotient(numerator: Tensor, denominator: Tensor, at_zero: Tensor) -> Tensor:
    zero = denominator == 0
    return torch.where(zero, at_zero, numerator / torch.where(zero, 1.0, denominator))
