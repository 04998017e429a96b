r"""Sets of matrices that are not convex, given by their singular values: bounded rank, and nearly orthogonal.

Both projections keep the singular vectors and move the singular values to the nearest allowed ones (von Neumann's trace
inequality makes that the nearest matrix).

**Bounded rank** cannot be stored exactly: rounding the entries fills up the singular values that were cut off. By Weyl's
inequality they come back with at most :math:`\|E\|_F \le \tfrac{\varepsilon}{2} \|A\|_F`, which is within the tolerance that
:class:`Rank` states.

**Nearly orthogonal** matrices are proved on both sides: the largest singular value by :func:`stableopt.linalg.spectral_norm`,
the smallest by

.. math:: \sigma_{\min}(A)^2 = \lambda_{\min}(A^\top A) \ge -\mu_2(-G) - \gamma_m \|A\|_F^2, \qquad G = \mathrm{fl}(A^\top A).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_number
from stableopt.constraints.matrix_kinds import MatrixSet, check_matrix_dims, pull_until_proved, real_embedding
from stableopt.constraints.rounding import unit_scale
from stableopt.constraints.spectral import apply_to_singular_values, proved_norm
from stableopt.errors import InfeasibleError
from stableopt.linalg import Bound, frobenius_norm, log_norm, round_down, round_up
from stableopt.linalg.proved import as_matrix, gamma

__all__ = ["AlmostOrthogonal", "Rank", "smallest_singular_value_lower"]


@dataclass(frozen=True)
class Rank(MatrixSet):
    r"""The matrices of rank at most k; projection: keep the k largest singular values.

    The rank of a stored matrix of shape ``(m, n)`` counts as at most k when

    .. math:: \sigma_{k+1}(A) \le \bigl(\varepsilon + 4 (m n + 64)\, 2^{-52}\bigr)\, \|A\|_F + \sqrt{m n}\, \tau,

    for a dtype with spacing :math:`\varepsilon` and smallest positive number :math:`\tau`, computed in float64 (for complex
    entries with twice :math:`m n`).

    Args:
        k: the largest rank, an int :math:`\ge 1`.
        dims: the two dimensions of one matrix; ``None`` for a tensor with exactly two.

    Raises:
        TypeError: if ``k`` is not an int, or ``dims`` not a pair of ints.
        ValueError: if ``k`` is less than 1, or ``dims`` has another length than two.

    Note:
        The set is not convex: the projection is not nonexpansive, and not unique where :math:`\sigma_k = \sigma_{k+1}`, near
        which its derivative grows without bound. A projection with entries beyond the range of the dtype is scaled down as a
        whole, which keeps the rank. In half precision the tolerance is coarse: in bfloat16 whatever is left with
        :math:`\sigma_{k+1} / \|A\|_F` below 0.8 % counts as rank k. Results stay below an eighth of the tolerance (measured).
        Complex matrices work.

    References:
        Eckart and Young, *The approximation of one matrix by another of lower rank*, 1936; Mirsky, 1960.

    Examples:
        >>> Rank(1).project(torch.diag(torch.tensor([3.0, -1.0, 2.0])))
        tensor([[3., 0., 0.],
                [0., 0., 0.],
                [0., 0., 0.]])
        >>> Rank(1).violation(torch.diag(torch.tensor([3.0, -1.0]))), Rank(2).violation(torch.eye(2))
        (1.0, 0.0)
    """

    complex_too: ClassVar[bool] = True
    thin: ClassVar[bool] = True
    k: int
    dims: tuple[int, int] | None = None
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the rank and the dimensions."""
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise TypeError(f"Rank needs an int as k, got {self.k!r} ({type(self.k).__name__}).")
        if self.k < 1:
            raise ValueError(f"Rank needs k >= 1, got {self.k!r}; only the zero matrix has rank 0.")
        object.__setattr__(self, "dims", check_matrix_dims("Rank", self.dims))

    def _excess(self, a: Tensor) -> float:
        if self.k >= min(a.shape):
            return -math.inf
        wide = a.to(torch.complex128 if a.is_complex() else torch.float64)
        scale = unit_scale(wide.abs().max())
        unit = wide * scale
        cut = float(torch.linalg.svdvals(unit)[self.k])
        info, count = torch.finfo(a.dtype), a.numel() * (2 if a.is_complex() else 1)
        relative = info.eps + 4.0 * (count + 64) * 2.0**-52
        smallest = info.smallest_normal * info.eps * float(scale)
        if cut <= relative * float(unit.norm()) + math.sqrt(count) * smallest:
            return -math.inf
        return min(cut / float(scale), torch.finfo(torch.float64).max)

    def _nearest(self, a: Tensor, scale: Tensor) -> Tensor:
        def cut(sigma: Tensor) -> tuple[Tensor, Tensor]:
            kept = (torch.arange(len(sigma), device=sigma.device) < self.k).to(sigma.dtype)
            return kept * sigma, kept

        return _into_range(apply_to_singular_values(a, cut), scale, torch.float64)

    def _inward(self, nearest: Tensor, dtype: torch.dtype) -> Tensor:
        return _into_range(nearest, nearest.real.new_ones(()), dtype).to(dtype)


@dataclass(frozen=True)
class AlmostOrthogonal(MatrixSet):
    r"""The matrices with all singular values in :math:`[1 - t,\ 1 + t]`: near the orthogonal ones, with room to move.

    .. math:: P(X) = U \min(\max(\Sigma,\ 1 - t),\ 1 + t)\, V^\top.

    Args:
        tolerance: :math:`t`, :math:`0 < t < 1`.
        dims: the two dimensions of one matrix; ``None`` for a tensor with exactly two.

    Raises:
        TypeError: if the tolerance is not a real number, or ``dims`` not a pair of ints.
        ValueError: if the tolerance is not between 0 and 1, or ``dims`` has another length than two.

    Note:
        Both limits are *proved* for the stored numbers, so a layer with such a weight is Lipschitz with :math:`1 + t`, and if
        it is tall or square its inverse on the range with :math:`1/(1 - t)`. A matrix within the width of the proof (1e-14 at 8
        x 8, 6e-12 at 256 x 256) of a limit is moved. Rounding alone moves singular values by about :math:`\varepsilon`: in
        bfloat16 0.01 is about the smallest useful t; where nothing can be proved, :meth:`project` raises
        :class:`stableopt.errors.InfeasibleError`. The set is not convex: the projection is not nonexpansive, not unique where a
        singular value is 0 (a zero matrix gives one of the valid points), and its derivative is unbounded there. Complex
        matrices work.

    References:
        Lezcano-Casado and Martínez-Rubio, *Cheap orthogonal constraints in neural networks*, 2019; geotorch has the open set.

    Examples:
        >>> X = torch.diag(torch.tensor([3.0, 1.0, -0.1], dtype=torch.float64))
        >>> AlmostOrthogonal(0.25).project(X).diagonal().round(decimals=6)
        tensor([ 1.2500,  1.0000, -0.7500], dtype=torch.float64)
        >>> AlmostOrthogonal(0.25).violation(torch.eye(3)), AlmostOrthogonal(0.25).violation(2 * torch.eye(3))
        (0.0, 0.75...)
    """

    complex_too: ClassVar[bool] = True
    tolerance: float
    dims: tuple[int, int] | None = None
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the tolerance and the dimensions."""
        tolerance = check_number("AlmostOrthogonal", "tolerance", self.tolerance, low=0.0, strict=True)
        if tolerance >= 1.0:
            raise ValueError(
                f"AlmostOrthogonal needs a tolerance between 0 and 1, got {tolerance!r}; without a lower limit it is SpectralBall."
            )
        object.__setattr__(self, "tolerance", tolerance)
        object.__setattr__(self, "dims", check_matrix_dims("AlmostOrthogonal", self.dims))

    @property
    def _size(self) -> float:
        return 1.0 + self.tolerance

    def _excess(self, a: Tensor) -> float:
        high = round_down(Fraction(1) + Fraction(self.tolerance))
        low = round_up(Fraction(1) - Fraction(self.tolerance))
        return max(proved_norm(a) - high, low - smallest_singular_value_lower(a))

    def _nearest(self, a: Tensor, scale: Tensor) -> Tensor:
        low, high = (1.0 - self.tolerance) * scale, (1.0 + self.tolerance) * scale

        def clamp(sigma: Tensor) -> tuple[Tensor, Tensor]:
            clamped = sigma.clamp(low, high)
            return clamped, (clamped == sigma).to(sigma.dtype)

        return apply_to_singular_values(a, clamp)

    def _inward(self, nearest: Tensor, dtype: torch.dtype) -> Tensor:
        U, _, Vh = torch.linalg.svd(nearest, full_matrices=False)
        inner = pull_until_proved(nearest, U @ Vh, dtype, self._excess, self.tolerance)
        if inner is None:
            raise InfeasibleError(
                f"{self!r} is too narrow for {dtype} at shape {tuple(nearest.shape)}: rounding the nearest orthogonal matrix "
                "moves its singular values further than the tolerance. Raise the tolerance, or store the tensor in a finer dtype."
            )
        return inner


def smallest_singular_value_lower(A: Tensor) -> float:
    r"""Bound :math:`\sigma_{\min(m, n)}(A)` of the stored numbers from below, with all rounding counted.

    Args:
        A: real or complex matrix of shape ``(m, n)``, not empty, any device (the proof runs on the CPU).

    Returns:
        A float :math:`\ge 0`, not above the smallest singular value. Squaring loses what is below a relative 1e-7 of the
        largest.

    Raises:
        TypeError: if ``A`` is not a floating tensor.
        ValueError: if it is not a matrix or holds NaN or infinity.

    Examples:
        >>> 1.0 - 1e-12 < smallest_singular_value_lower(torch.eye(3)) <= 1.0
        True
    """
    wide = real_embedding(A.detach())
    scale = unit_scale(wide.double().abs().max())
    a = as_matrix(wide.contiguous()) * float(scale)
    if a.shape[0] < a.shape[1]:
        a = a.T.copy()
    error = frobenius_norm(a) ** 2 * gamma(len(a)) + 4.0 * a.size * 2.0**-1074
    square = -log_norm(-(a.T @ a), 2) - error
    # scaling rounds entries that become subnormal, each by less than 2**-1074
    unit = Bound(max(0.0, square.lower), max(0.0, square.upper)).sqrt() - a.size * 2.0**-1074
    return max(0.0, (unit / float(scale)).lower)


def _into_range(a: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix, or a multiple of it whose entries divided by the scale are numbers of the dtype."""
    limit = torch.finfo(dtype).max * scale * (1.0 - 2.0**-50)
    top = a.detach().abs().max()
    return a * torch.where(top > limit, limit / torch.where(top > 0, top, 1.0), 1.0)
