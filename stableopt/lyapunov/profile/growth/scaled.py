r"""Products of thousands of matrices that neither overflow nor underflow: a power of two is carried for each row.

One scale for a whole product is not enough. When one direction grows by :math:`e^{800}` and shrinks again, the others would have
left the range of floats meanwhile and would be missing at the end. Powers of two are exact: scaling rounds nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["HALF_ULP", "Scaled", "exp_or_inf"]

HALF_ULP = float(np.finfo(np.float64).eps) / 2
"""The unit of rounding of float64."""

_NO_ROW = -(1 << 40)
"""The exponent of a row of zeros: below every other."""


@dataclass(frozen=True)
class Scaled:
    r"""Matrices :math:`\operatorname{diag}(2^{e})M` with the rows of M of size about 1, any number of them at once.

    Args:
        unit: M, ``(..., k, k)``.
        exponent: e, ``(..., k)`` int64.

    Examples:
        >>> A = Scaled.of(np.array([[0.0, 1e300], [1e-300, 0.0]]))
        >>> float((A @ A @ A @ A).log_norm())
        0.0
    """

    unit: NDArray[np.float64]
    exponent: NDArray[np.int64]

    @classmethod
    def of(cls, A: NDArray[np.float64]) -> Scaled:
        """Scale matrices, exactly.

        Args:
            A: ``(..., k, k)``, finite.

        Returns:
            The same matrices.

        Examples:
            >>> Scaled.of(np.array([[12.0]])).exponent
            array([4])
        """
        size = np.abs(A).max(axis=-1)
        exponent = np.frexp(size)[1].astype(np.int64)
        return cls(_times_power(A, -exponent[..., None]), np.where(size > 0, exponent, _NO_ROW))

    def __matmul__(self, other: Scaled) -> Scaled:
        entries = np.where(self.unit != 0, np.frexp(self.unit)[1].astype(np.int64), _NO_ROW)
        reach = (entries + other.exponent[..., None, :]).max(axis=-1)  # the power of the largest term of each row
        shift = other.exponent[..., None, :] - reach[..., None]
        product = Scaled.of(_times_power(self.unit, np.clip(shift, -2200, 1100)) @ other.unit)
        total = product.exponent + reach + self.exponent
        return Scaled(product.unit, np.where(product.exponent > _NO_ROW, total, _NO_ROW))

    def __getitem__(self, index: Any) -> Scaled:
        return Scaled(self.unit[index], self.exponent[index])

    def log_norm(self) -> NDArray[np.float64]:
        r"""Return :math:`\log\|\cdot\|_2`, ``-inf`` for zero.

        Returns:
            ``(...)``.

        Examples:
            >>> float(Scaled.of(np.diag([1e-200, 1.0])).log_norm())
            0.0
        """
        M, power = self._one_scale()
        return _logarithm(np.asarray(np.linalg.svd(M, compute_uv=False)[..., 0], dtype=np.float64), power)

    def log_frobenius(self) -> NDArray[np.float64]:
        r"""Return :math:`\log\|\cdot\|_F`, from :math:`\log\|\cdot\|_2` to :math:`\log\sqrt k` above it.

        Returns:
            ``(...)``.

        Examples:
            >>> float(np.exp(Scaled.of(np.array([[3.0, 4.0], [0.0, 0.0]])).log_frobenius()).round(12))
            5.0
        """
        M, power = self._one_scale()
        return _logarithm(np.sqrt((M**2).sum(axis=(-2, -1))), power)

    def scaled_by_one(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        r"""Return the matrices with one scale each: :math:`e^cM`, the largest entry of M between 1/2 and 1.

        Entries below :math:`10^{-308}` of the largest one of their matrix are lost.

        Returns:
            M, ``(..., k, k)``, and c, ``(...)``; c is 0 for a matrix of zeros.

        Examples:
            >>> M, c = Scaled.of(np.array([[8.0]])).scaled_by_one()
            >>> float(M[0, 0]), round(float(np.exp(c)), 12)
            (0.5, 16.0)
        """
        M, power = self._one_scale()
        return M, (power * math.log(2.0)).astype(np.float64)

    def _one_scale(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        power = self.exponent.max(axis=-1)
        shift = np.clip(self.exponent - power[..., None], -2200, 0)
        return _times_power(self.unit, shift[..., None]), np.where(power > _NO_ROW, power, 0)


def _times_power(A: NDArray[np.float64], power: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.ldexp(A, power).astype(np.float64, copy=False)


def _logarithm(size: NDArray[np.float64], power: NDArray[np.int64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return (np.log(size) + power * math.log(2.0)).astype(np.float64)


def exp_or_inf(log: float) -> float:
    """Return the exponential of a logarithm, infinity where it is too large for a float.

    Examples:
        >>> exp_or_inf(0.0), exp_or_inf(1000.0)
        (1.0, inf)
    """
    return math.exp(log) if log < 709.0 else math.inf
