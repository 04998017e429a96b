r"""Norms of the singular values: the nuclear norm, its ball, and the spectral norm as a penalty.

**The nuclear norm, proved.** For *any* factors with :math:`A = PQ + E`,

.. math:: \|A\|_* \le \|P\|_F \|Q\|_F + \sqrt{k}\,\|E\|_F, \qquad k = \min(m, n),

because :math:`\|PQ\|_* \le \|P\|_F \|Q\|_F` and a matrix of rank k has :math:`\|E\|_* \le \sqrt{k}\,\|E\|_F`. With
:math:`P = U \Sigma^{1/2}` and :math:`Q = \Sigma^{1/2} V^\top` from a computed decomposition the first term is the sum of the
singular values, up to rounding, and E is tiny. Nothing about the decomposition has to be believed: if it is wrong, E is large.
The norms are enclosed with all rounding counted, and the product PQ is off by at most :math:`\gamma_k |P||Q|`, whose Frobenius
norm is at most :math:`\gamma_k \|P\|_F \|Q\|_F` (:mod:`stableopt.linalg.proved`, with its assumptions on products).

**One threshold for two operators.** The ball of the nuclear norm is the polar of the ball of the spectral norm. With the level
:math:`\theta \ge 0` at which :math:`\sum_i (\sigma_i - \theta)_+ = r`, the projection onto the nuclear ball subtracts
:math:`\theta` from the singular values, and the prox of the spectral norm clips them at :math:`\theta`. The level depends on
the matrix: :math:`d\theta = \langle U_a V_a^\top, dX \rangle / |a|` with the singular vectors of the values above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from stableopt.constraints.arguments import check_number
from stableopt.constraints.base import Regularizer
from stableopt.constraints.matrix_kinds import (
    MatrixNorm,
    MatrixSet,
    check_matrix_dims,
    pull_until_proved,
    real_embedding,
)
from stableopt.constraints.spectral import SpectralBall, apply_to_singular_values
from stableopt.linalg import Bound, frobenius_norm
from stableopt.linalg.proved import as_matrix, gamma, scale_back, scale_to_unit

__all__ = ["NuclearBall", "NuclearNorm", "SpectralNorm", "nuclear_norm_upper"]

_ADVICE = "For a convolution kernel say what a matrix is: the norm of a reshaped kernel is not that of the convolution."


@dataclass(frozen=True)
class NuclearNorm(MatrixNorm):
    r"""The low-rank penalty :math:`g(X) = \lambda \|X\|_* = \lambda \sum_i \sigma_i(X)`.

    .. math:: \operatorname{prox}_{sg}(X) = U \max(\Sigma - s\lambda,\ 0)\, V^\top.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        dims: the two dimensions of one matrix; ``None`` for a tensor with exactly two.

    Raises:
        TypeError: if the weight is not a real number, or ``dims`` not a pair of ints.
        ValueError: if the weight is negative or not finite, or ``dims`` has another length than two.

    Note:
        Complex matrices work. The prox costs one singular value decomposition in float64. Its derivative is finite everywhere,
        also where singular values coincide or vanish; at the kink :math:`\sigma_i = s\lambda` the slope is 0. The result has
        low rank before it is rounded to the dtype: discarded singular values come back at the size of the rounding.

    References:
        Cai, Candès and Shen, *A singular value thresholding algorithm for matrix completion*, 2010, theorem 2.1.

    Examples:
        >>> import torch
        >>> NuclearNorm(2.0).prox(torch.diag(torch.tensor([3.0, -0.5])), step=0.5)
        tensor([[2., 0.],
                [0., 0.]])
        >>> NuclearNorm(2.0).value(torch.diag(torch.tensor([3.0, -0.5]))).item()
        7.0
    """

    weight: float
    dims: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the weight and the dimensions."""
        object.__setattr__(self, "weight", check_number("NuclearNorm", "weight", self.weight, low=0.0))
        object.__setattr__(self, "dims", check_matrix_dims("NuclearNorm", self.dims))

    def conjugate(self) -> Regularizer:
        """Return the ball of the spectral norm with the weight as radius."""
        return SpectralBall(self.weight, self.dims) if self.weight > 0.0 else super().conjugate()

    def _norm(self, sigma: Tensor) -> Tensor:
        return sigma.sum(dim=-1)

    def _prox(self, a: Tensor, threshold: Tensor) -> Tensor:
        return apply_to_singular_values(a, lambda s: _shrink(s, threshold))


@dataclass(frozen=True)
class SpectralNorm(MatrixNorm):
    r"""The penalty :math:`g(X) = \lambda \|X\|_2 = \lambda\, \sigma_{\max}(X)`.

    .. math::
        \operatorname{prox}_{sg}(X) = U \min(\Sigma,\ \theta)\, V^\top, \qquad
        \theta = 0 \text{ if } \textstyle\sum_i \sigma_i \le s\lambda, \text{ else } \sum_i (\sigma_i - \theta)_+ = s\lambda.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        dims: the two dimensions of one matrix; ``None`` for a tensor with exactly two.

    Raises:
        TypeError: if the weight is not a real number, or ``dims`` not a pair of ints.
        ValueError: if the weight is negative or not finite, or ``dims`` has another length than two.

    Note:
        Complex matrices work. The derivative is finite everywhere and includes that of the level :math:`\theta`; at a kink it
        is an element of the Clarke Jacobian. :meth:`value` is an estimate, not a proof: use
        :func:`stableopt.linalg.spectral_norm`.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, sections 6.5.1 and 6.7.2.

    Examples:
        >>> import torch
        >>> SpectralNorm(1.0).prox(torch.diag(torch.tensor([3.0, 1.0])))
        tensor([[2., 0.],
                [0., 1.]])
        >>> SpectralNorm(0.5).value(torch.diag(torch.tensor([3.0, 1.0]))).item()
        1.5
    """

    weight: float
    dims: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the weight and the dimensions."""
        object.__setattr__(self, "weight", check_number("SpectralNorm", "weight", self.weight, low=0.0))
        object.__setattr__(self, "dims", check_matrix_dims("SpectralNorm", self.dims))

    def conjugate(self) -> Regularizer:
        """Return the ball of the nuclear norm with the weight as radius."""
        return NuclearBall(self.weight, self.dims)

    def _norm(self, sigma: Tensor) -> Tensor:
        return sigma[..., 0]

    def _prox(self, a: Tensor, threshold: Tensor) -> Tensor:
        level = _Level(a, threshold)
        clipped = apply_to_singular_values(a, lambda s: _clip(s, level.of(s)))
        return torch.where(level.inside, 0.0, clipped + level.moves(a))


@dataclass(frozen=True)
class NuclearBall(MatrixSet):
    r"""The ball :math:`\|X\|_* = \sum_i \sigma_i(X) \le r`, the convex hull of :math:`r\, uv^\top` with unit vectors u and v.

    .. math::
        P(X) = U \max(\Sigma - \theta,\ 0)\, V^\top, \qquad \textstyle\sum_i (\sigma_i - \theta)_+ = r.

    Args:
        radius: :math:`r`, finite, :math:`\ge 0`.
        dims: the two dimensions of one matrix; ``None`` for a tensor with exactly two.

    Raises:
        TypeError: if the radius is not a real number, or ``dims`` not a pair of ints.
        ValueError: if the radius is negative or not finite, or ``dims`` has another length than two.

    Note:
        Complex matrices work. A matrix counts as feasible when :func:`nuclear_norm_upper` of its stored numbers is at most the
        radius, so one within the width of that bound below the radius is moved inwards by about that. Rounding to a dtype with
        :math:`\varepsilon` fills up the discarded singular values, which costs up to :math:`\sqrt{k}\,\varepsilon r` of the
        radius. The proof runs on the CPU; :meth:`map` stays on the device and proves nothing. The derivative on the sphere is
        that of the inside.

    References:
        Cai, Candès and Shen, 2010; Duchi, Shalev-Shwartz, Singer and Chandra, *Efficient projections onto the l1-ball*, 2008
        (the threshold).

    Examples:
        >>> import torch
        >>> X = torch.diag(torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64))
        >>> NuclearBall(3.0).project(X).round(decimals=6)
        tensor([[ 2.,  0.,  0.],
                [ 0., -1.,  0.],
                [ 0.,  0.,  0.]], dtype=torch.float64)
        >>> NuclearBall(3.0).violation(X)
        2.5...
    """

    complex_too: ClassVar[bool] = True
    advice: ClassVar[str] = _ADVICE
    radius: float
    dims: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the radius and the dimensions."""
        object.__setattr__(self, "radius", check_number("NuclearBall", "radius", self.radius, low=0.0))
        object.__setattr__(self, "dims", check_matrix_dims("NuclearBall", self.dims))

    def conjugate(self) -> Regularizer:
        """Return the spectral norm with the radius as weight: the support function of the ball."""
        return SpectralNorm(self.radius, self.dims)

    def _excess(self, a: Tensor) -> float:
        return nuclear_norm_upper(a) - self.radius

    def _nearest(self, a: Tensor, scale: Tensor) -> Tensor:
        level = _Level(a, self.radius * scale)
        shrunk = apply_to_singular_values(a, lambda s: _shrink(s, level.of(s)))
        return torch.where(level.inside, a, shrunk - level.moves(a))

    def _inward(self, nearest: Tensor, dtype: torch.dtype) -> Tensor:
        inner = pull_until_proved(nearest, 0.0, dtype, self._excess, self.radius)
        return torch.zeros_like(nearest, dtype=dtype) if inner is None else inner


def _shrink(sigma: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    return (sigma - theta).clamp_min(0.0), torch.where(theta > 0, (sigma > theta).to(sigma.dtype), 1.0)


def _clip(sigma: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    return sigma.clamp_max(theta), (sigma <= theta).to(sigma.dtype)


def _threshold(sigma: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\theta` with :math:`\sum_i (\sigma_i - \theta)_+ = r`, and whether the sum of all is at most r, then 0."""
    count = torch.arange(1, len(sigma) + 1, dtype=sigma.dtype, device=sigma.device)
    sums = sigma.cumsum(0)
    inside = sums[-1] <= radius
    # the last index at which the value still exceeds the level of the values so far; the first always does
    above = (sigma * count > sums - radius).to(sigma.dtype) * count
    last = (above.amax().clamp_min(1.0) - 1.0).long()
    level = ((sums.gather(0, last[None])[0] - radius) / (last + 1)).clamp_min(0.0)
    return torch.where(inside, 0.0, level), inside


class _Level:
    r"""The level of a matrix: :math:`\theta` with :math:`\sum_i (\sigma_i - \theta)_+ = r`, 0 if the sum of all is below r.

    What works on the singular values of another decomposition takes the level of those (:meth:`of`): the two differ in the last
    bit, and on one side of the level the slope is 1, on the other 0.

    Attributes:
        inside: whether the nuclear norm is at most r, 0-d.
    """

    def __init__(self, a: Tensor, radius: Tensor) -> None:
        self._radius = radius
        tall = a.shape[0] >= a.shape[1]
        U, sigma, Vh = torch.linalg.svd(a.detach() if tall else a.detach().mH, full_matrices=False)
        theta, self.inside = _threshold(sigma, radius)
        active = (sigma > theta).to(sigma.dtype)
        polar = (U * active) @ Vh
        self._polar = polar if tall else polar.mH
        self._count = active.sum().clamp_min(1.0)

    def of(self, sigma: Tensor) -> Tensor:
        """Return the level of the singular values of another decomposition, 0-d, without gradient."""
        return _threshold(sigma.detach(), self._radius)[0]

    def moves(self, a: Tensor) -> Tensor:
        r"""Return zeros with the derivative :math:`U_a V_a^\top d\theta`."""
        size = (self._polar.conj() * a).real.sum()
        return self._polar * torch.where(self.inside, 0.0, (size - size.detach()) / self._count)


def nuclear_norm_upper(A: Tensor) -> float:
    r"""Bound the nuclear norm :math:`\|A\|_* = \sum_i \sigma_i(A)` of the stored numbers from above, with all rounding counted.

    Args:
        A: matrix of shape ``(m, n)``, real or complex, any floating dtype, any device (the proof runs on the CPU).

    Returns:
        A float :math:`\ge \|A\|_*`, too large by a relative 1e-14 for 8 x 8, 2e-12 for 128 x 128 and 3e-11 for 512 x 512;
        exactly 0 for zero and empty matrices.

    Raises:
        TypeError: if ``A`` is not a floating tensor.
        ValueError: if it is not a matrix or holds NaN or infinity.

    Examples:
        >>> 7.0 <= nuclear_norm_upper(torch.diag(torch.tensor([3.0, -4.0]))) < 7.0 + 1e-12
        True
    """
    a = as_matrix(real_embedding(A.detach()).contiguous())
    if a.size == 0 or not a.any():
        return 0.0
    a, exponent = scale_to_unit(a)
    k = min(a.shape)
    U, sigma, Vh = np.linalg.svd(a, full_matrices=False)
    root = np.sqrt(sigma)
    P, Q = U * root, root[:, None] * Vh
    size = Bound(0.0, frobenius_norm(P).upper) * frobenius_norm(Q).upper
    # the difference is rounded once: what it misses is at most 2u times itself
    residual = frobenius_norm(a - P @ Q).upper * Bound(0.0, 1.0 + 2.0**-51)
    underflow = 4.0 * (k + 1) * a.size * 2.0**-1074
    error = residual + size * gamma(k) + underflow
    total = size + error * Bound.point(float(k)).sqrt()
    return scale_back(Bound(0.0, total.upper), exponent - (1 if A.is_complex() else 0)).upper
