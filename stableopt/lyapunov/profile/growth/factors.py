r"""The triangular factors of a product of derivatives, and how they are made.

Along a trajectory with one-step derivatives :math:`A_t` let :math:`Q_0` have k orthonormal columns, and

.. math:: \Phi(t_{j+1}, t_j)\, Q_j = Q_{j+1} R_j, \qquad \Phi(t,s) = A_{t-1} \cdots A_s,

with :math:`Q_{j+1}` orthonormal and :math:`R_j` upper triangular, its diagonal not negative (Benettin's method). Then
:math:`\Phi(t_j, t_i) Q_i = Q_j R_{j-1} \cdots R_i`: products of the factors are the transition operators on the span of the
columns, in orthonormal coordinates. Their norms are those of :math:`\Phi` if k is the dimension of the state, and estimates from
below if it is smaller. The means of the logarithms of their diagonals are the largest k Lyapunov exponents, their sum the growth
of volumes.

References:
    Benettin, Galgani, Giorgilli and Strelcyn, Lyapunov characteristic exponents, Meccanica 15, 1980; Dieci and Van Vleck, Lyapunov
    and other spectra, 2002.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Factors", "orthonormalize"]


@dataclass(frozen=True)
class Factors:
    r"""The triangular factors :math:`R_0, \dots, R_{n-1}` of a run.

    Args:
        R: ``(n, k, k)`` float64, upper triangular, diagonals :math:`\ge 0`.
        steps: ``(n + 1,)`` int64, increasing: the factor j goes from ``steps[j]`` to ``steps[j + 1]``.
        dimension: N, of the state that the columns live in.

    Raises:
        ValueError: if the shapes do not fit, the times do not increase, or there are more columns than dimensions.

    Examples:
        >>> factors = Factors(np.array([[[2.0]], [[0.5]]]), np.array([0, 1, 3]), dimension=1)
        >>> factors.full, factors.growth
        (True, array([ 0.69314718, -0.69314718]))
    """

    R: NDArray[np.float64]
    steps: NDArray[np.int64]
    dimension: int

    def __post_init__(self) -> None:
        R, steps = np.asarray(self.R, dtype=np.float64), np.asarray(self.steps, dtype=np.int64)
        if R.ndim != 3 or R.shape[1] != R.shape[2] or R.shape[1] < 1:
            raise ValueError(f"Factors needs R of shape (n, k, k) with k >= 1, got {R.shape}.")
        if steps.shape != (len(R) + 1,):
            raise ValueError(f"Factors needs one more step than factors, {len(R) + 1}, got the shape {steps.shape}.")
        if np.any(np.diff(steps) <= 0):
            raise ValueError("Factors needs steps that increase.")
        if not R.shape[1] <= self.dimension:
            raise ValueError(f"Factors cannot have {R.shape[1]} columns in {self.dimension} dimensions.")
        object.__setattr__(self, "R", R)
        object.__setattr__(self, "steps", steps)

    @property
    def count(self) -> int:
        """The number n of factors.

        Examples:
            >>> Factors(np.ones((0, 1, 1)), np.array([4]), dimension=1).count
            0
        """
        return len(self.R)

    @property
    def directions(self) -> int:
        """The number k of columns.

        Examples:
            >>> Factors(np.ones((0, 1, 1)), np.array([4]), dimension=3).directions
            1
        """
        return self.R.shape[1]

    @property
    def full(self) -> bool:
        """Whether the columns span the whole state, so that norms of products are those of the transition operators.

        Examples:
            >>> Factors(np.ones((0, 1, 1)), np.array([4]), dimension=3).full
            False
        """
        return self.directions == self.dimension

    @property
    def spacing(self) -> NDArray[np.int64]:
        """The number of steps that each factor covers, ``(n,)``.

        Examples:
            >>> Factors(np.ones((2, 1, 1)), np.array([0, 1, 3]), dimension=3).spacing
            array([1, 2])
        """
        return np.diff(self.steps)

    @property
    def log_diagonal(self) -> NDArray[np.float64]:
        r"""The logarithms of the diagonals, ``(n, k)``; :math:`-\infty` where a direction was lost.

        Examples:
            >>> Factors(np.ones((1, 1, 1)), np.array([0, 1]), dimension=1).log_diagonal
            array([[0.]])
        """
        with np.errstate(divide="ignore"):
            return np.log(np.diagonal(self.R, axis1=1, axis2=2))

    @property
    def growth(self) -> NDArray[np.float64]:
        """The logarithmic growth of the leading direction over each factor, ``(n,)``.

        Examples:
            >>> Factors(np.ones((1, 1, 1)), np.array([0, 1]), dimension=1).growth
            array([0.])
        """
        return self.log_diagonal[:, 0]

    @property
    def log_volume(self) -> NDArray[np.float64]:
        r"""The logarithmic growth :math:`\log\det R_j` of the volume of all k directions over each factor, ``(n,)``.

        Examples:
            >>> Factors(np.diag([2.0, 0.5])[None], np.array([0, 1]), dimension=2).log_volume
            array([0.])
        """
        return self.log_diagonal.sum(axis=1)


def orthonormalize(columns: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
    r"""Factor vectors into orthonormal ones and a triangular matrix: :math:`V^\top = Q^\top R`, row by row.

    Args:
        columns: ``(k, N)`` real, the vectors as rows, :math:`k \le N`; finite.

    Returns:
        Orthonormal rows ``(k, N)`` in the dtype of the columns, and R ``(k, k)`` float64 with a diagonal :math:`\ge 0`; where a
        vector is a combination of those before it, its entry there is at the level of rounding or zero, and the row completes the
        basis.

    Raises:
        ValueError: if there are more vectors than dimensions, or one is not finite.

    Note:
        By Householder reflections in float64, whatever the dtype. The span of the first j vectors is that of the first j rows.

    Examples:
        >>> Q, R = orthonormalize(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
        >>> Q, R
        (tensor([[ 0.6000,  0.8000],
                [-0.8000,  0.6000]]), array([[5., 4.],
               [0., 3.]]))
    """
    k, N = columns.shape
    if k == 1:
        return _normalized(columns)
    if k > N:
        raise ValueError(f"at most as many vectors as dimensions are orthonormal, got {k} in {N} dimensions.")
    wide = columns.double()
    scale = torch.linalg.vector_norm(wide, dim=1)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(
            "a vector to be made orthonormal is not finite: it has overflowed, or a derivative does not exist."
        )
    # powers of two: nothing is rounded, and the squares of neither huge nor tiny vectors leave the range
    powers = torch.where(
        scale > 0, torch.exp2(torch.floor(torch.log2(scale.clamp_min(2.0**-1022)))), torch.ones_like(scale)
    )
    Q, R = torch.linalg.qr((wide / powers[:, None]).mT, mode="reduced")
    signs = torch.where(torch.diagonal(R) < 0, -1.0, 1.0).to(R.dtype)
    R = R * signs[:, None] * powers[None, :]
    return (Q * signs).mT.to(columns.dtype).contiguous(), R.cpu().numpy()


def _normalized(column: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
    """Do the same for one vector: its norm, or a unit vector if it is zero."""
    size = float(torch.linalg.vector_norm(column, dtype=torch.float64))
    if not math.isfinite(size):  # it may have overflowed in the squares alone
        largest = float(column.abs().max())
        size = largest * float(torch.linalg.vector_norm(column / largest, dtype=torch.float64))
    if not math.isfinite(size):
        raise ValueError(
            "a vector to be made orthonormal is not finite: it has overflowed, or a derivative does not exist."
        )
    if size < 2.0**-500:  # its squares may have vanished
        largest = float(column.abs().max())
        if largest == 0.0:
            unit = torch.zeros_like(column)
            unit[0, 0] = 1.0
            return unit, np.zeros((1, 1))
        column = column / largest
        Q, R = _normalized(column)
        return Q, R * largest
    return column / size, np.array([[size]])
