r"""Sets of square matrices that are a condition on the eigenvalues of the symmetric part :math:`S = (A + A^\top)/2`.

**Projection.** Symmetric and skew matrices are orthogonal to each other, so the Frobenius projection treats the two parts
apart, and on the symmetric part it clamps the eigenvalues.

**Proof.** Membership is a bound of the largest eigenvalue of the symmetric part of the stored numbers, which
:func:`stableopt.linalg.log_norm` proves up to a small width, relative 1e-14 for 8 x 8 and 2e-12 for 256 x 256; a condition that
holds with equality, as for a matrix of low rank among the positive semidefinite ones, is within that width and cannot be proved
that way. So projections move towards a multiple of the identity until the proof holds. Where the condition is visible without
any rounding, because the discs of Gershgorin lie on the right side when they are summed exactly, it counts as proved, too:
zero, diagonal and diagonally dominant matrices stay what they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stableopt.constraints.arguments import check_number
from stableopt.constraints.matrix_kinds import MatrixSet, check_matrix_dims, pull_until_proved
from stableopt.errors import InfeasibleError
from stableopt.linalg import log_norm

__all__ = ["PSD", "Hurwitz", "clamp_eigenvalues"]


class _SquareSet(MatrixSet):
    """A set of square matrices."""

    advice: ClassVar[str] = "Its eigenvalues are those of a square matrix."

    def _check_shape(self, stored: Tensor) -> None:
        if stored.shape[-1] != stored.shape[-2]:
            raise ValueError(
                f"{type(self).__name__} needs square matrices, got {stored.shape[-2]} x {stored.shape[-1]}; "
                "for other shapes use SpectralBall or NuclearBall."
            )

    def _stored_inside(self, nearest: Tensor, center: float, depth: float, dtype: torch.dtype) -> Tensor:
        identity = torch.eye(len(nearest), dtype=nearest.dtype, device=nearest.device)
        inner = None if depth <= 0 else pull_until_proved(nearest, center * identity, dtype, self._excess, depth)
        if inner is None:
            raise InfeasibleError(
                f"{self!r} is too narrow for {dtype}: not even the multiple {center:g} of the identity can be stored and proved to "
                "lie in it. Widen the limits, or store the tensor in a finer dtype."
            )
        return inner


@dataclass(frozen=True)
class PSD(_SquareSet):
    r"""The symmetric matrices with :math:`l I \preceq A \preceq u I`; by default the cone of the positive semidefinite ones.

    .. math:: P(A) = Q \min(\max(\Lambda,\ l),\ u)\, Q^\top, \qquad \tfrac12 (A + A^\top) = Q \Lambda Q^\top.

    Args:
        low: :math:`l`, finite.
        high: :math:`u > l`, or infinite.
        dims: the two dimensions of one matrix; ``None`` for a tensor with exactly two.

    Raises:
        TypeError: if a limit is not a real number, or ``dims`` not a pair of ints.
        ValueError: if ``low`` is not finite or not below ``high``, or ``dims`` has another length than two.

    Note:
        Results are exactly symmetric, and their eigenvalues are *proved* to lie in the interval as stored. Therefore a singular
        projection gains a small multiple of the identity. Relative to :math:`\|A\|_2` its smallest eigenvalue is then 1e-14 at
        8 x 8, 1e-13 at 64 x 64 and 2e-12 at 256 x 256 in float64, and up to :math:`\varepsilon/4` in shorter dtypes (measured
        on random matrices). In the same way a singular matrix that is not diagonally dominant counts as outside, by about that.
        A projection with entries beyond the range of the dtype is pulled in as far as needed. Real square matrices only. The
        derivative is finite everywhere, also at repeated eigenvalues; at a kink, where an eigenvalue equals a limit, its slope
        is 1.

    References:
        Higham, *Computing a nearest symmetric positive semidefinite matrix*, 1988, theorem 2.1;
        Daleckii and Krein, *Integration and differentiation of functions of Hermitian operators*, 1965 (the derivative).

    Examples:
        >>> import torch
        >>> PSD().project(torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64)).round(decimals=6)
        tensor([[1.5000, 1.5000],
                [1.5000, 1.5000]], dtype=torch.float64)
        >>> PSD(low=0.5, high=2.0).project(torch.diag(torch.tensor([3.0, 1.0, -1.0]))).diagonal()
        tensor([2.0000, 1.0000, 0.5000])
        >>> (
        ...     PSD().violation(torch.diag(torch.tensor([3.0, 0.0]))),
        ...     PSD().violation(torch.diag(torch.tensor([3.0, -1.0]))),
        ... )
        (0.0, 1.0...)
    """

    thin: ClassVar[bool] = True
    low: float = 0.0
    high: float = math.inf
    dims: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the limits and the dimensions."""
        object.__setattr__(self, "low", check_number("PSD", "low", self.low))
        object.__setattr__(
            self, "high", check_number("PSD", "high", self.high, low=self.low, strict=True, finite=False)
        )
        object.__setattr__(self, "dims", check_matrix_dims("PSD", self.dims))

    @property
    def _size(self) -> float:
        return max(abs(self.low), abs(self.high) if math.isfinite(self.high) else 0.0)

    def _excess(self, a: Tensor) -> float:
        top = -math.inf if self.high == math.inf else _excess_over(a, self.high)
        worst = max(_excess_over(-a, -self.low), top)
        if torch.equal(a, a.mT):
            return worst
        return max(worst, float((a.double() / 2 - a.double().mT / 2).abs().max()), math.ulp(0.0))

    def _nearest(self, a: Tensor, scale: Tensor) -> Tensor:
        return clamp_eigenvalues((a + a.mT) / 2, self.low * scale, self.high * scale)

    def _inward(self, nearest: Tensor, dtype: torch.dtype) -> Tensor:
        room = min(self.high, torch.finfo(dtype).max) - self.low
        depth = min(room / 2, max(float(nearest.diagonal().abs().max()), _unit(self.low, dtype)))
        return self._stored_inside(nearest, self.low + depth, depth, dtype)


@dataclass(frozen=True)
class Hurwitz(_SquareSet):
    r"""The matrices whose flow :math:`\dot x = Ax` contracts in the Euclidean norm at a rate of at least c.

    .. math:: \mu_2(A) = \lambda_{\max}\tfrac{A + A^\top}{2} \le -c.

    The projection changes the symmetric part only:

    .. math:: P(A) = A - Q \max(\Lambda + c,\ 0)\, Q^\top, \qquad \tfrac12 (A + A^\top) = Q \Lambda Q^\top.

    This is a convex subset of the Hurwitz matrices: every eigenvalue of A has a real part of at most :math:`-c`, and moreover
    :math:`\|e^{tA}\|_2 \le e^{-ct}` for all :math:`t \ge 0`, without a transient. Hurwitz matrices with a transient growth,
    such as :math:`\begin{pmatrix} -1 & 9 \\ 0 & -1 \end{pmatrix}`, are not in it; the set of all Hurwitz matrices is not
    convex.

    Args:
        rate: :math:`c`, finite, :math:`\ge 0`; with 0 the flow does not expand.
        dims: the two dimensions of one matrix; ``None`` for a tensor with exactly two.

    Raises:
        TypeError: if the rate is not a real number, or ``dims`` not a pair of ints.
        ValueError: if the rate is negative or not finite, or ``dims`` has another length than two.

    Note:
        The logarithmic norm of the result is *proved* to be at most :math:`-c` for the stored numbers
        (:func:`stableopt.linalg.log_norm`), for which the symmetric part moves a little further than the limit: in float64 by a
        relative 1e-14 at 8 x 8 and 1e-12 at 256 x 256, in shorter dtypes by about :math:`\varepsilon/8` (measured, relative to
        :math:`\|A\|_2`). A matrix within that of the limit counts as outside, unless its rows show it (skew-symmetric matrices
        are members for rate 0). Real square matrices only. :meth:`map` is the projection: it reproduces what was assigned, but
        directions in which the limit is active have no gradient.

    References:
        Dahlquist, *Stability and error bounds in the numerical integration of ordinary differential equations*, 1959 (the
        logarithmic norm); Trefethen and Embree, *Spectra and Pseudospectra*, 2005, section 17 (transients).

    Examples:
        >>> import torch
        >>> A = torch.tensor([[1.0, 4.0], [-4.0, -2.0]], dtype=torch.float64)
        >>> Hurwitz(rate=0.5).project(A).round(decimals=6)
        tensor([[-0.5000,  4.0000],
                [-4.0000, -2.0000]], dtype=torch.float64)
        >>> Hurwitz().violation(A), Hurwitz().violation(torch.tensor([[0.0, 4.0], [-4.0, 0.0]]))
        (1.0..., 0.0)
    """

    rate: float = 0.0
    dims: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the rate and the dimensions."""
        object.__setattr__(self, "rate", check_number("Hurwitz", "rate", self.rate, low=0.0))
        object.__setattr__(self, "dims", check_matrix_dims("Hurwitz", self.dims))

    @property
    def _size(self) -> float:
        return self.rate

    def _excess(self, a: Tensor) -> float:
        return _excess_over(a, -self.rate)

    def _nearest(self, a: Tensor, scale: Tensor) -> Tensor:
        shift = self.rate * scale
        symmetric = (a + a.mT) / 2 + shift * torch.eye(len(a), dtype=a.dtype, device=a.device)
        return a - clamp_eigenvalues(symmetric, torch.zeros_like(scale), math.inf * torch.ones_like(scale))

    def _inward(self, nearest: Tensor, dtype: torch.dtype) -> Tensor:
        room = torch.finfo(dtype).max - self.rate
        depth = min(room / 2, max(float(nearest.abs().max()), _unit(self.rate, dtype)))
        return self._stored_inside(nearest, -self.rate - depth, depth, dtype)


def clamp_eigenvalues(S: Tensor, low: Tensor, high: Tensor) -> Tensor:
    r"""Return :math:`Q \min(\max(\Lambda, l), u) Q^\top` of a symmetric :math:`S = Q \Lambda Q^\top`.

    The derivative multiplies :math:`Q^\top \dot S Q` entrywise by the divided differences
    :math:`(f_i - f_j)/(\lambda_i - \lambda_j) \in [0, 1]`, and by the slope where they are 0/0, so that it is finite
    everywhere.

    Args:
        S: symmetric float64 matrix.
        low: 0-d tensor.
        high: 0-d tensor, at least ``low``.

    Returns:
        Matrix of the same shape, exactly symmetric, once differentiable, backward and forward.

    Examples:
        >>> one = torch.tensor(1.0, dtype=torch.float64)
        >>> clamp_eigenvalues(3 * torch.eye(2, dtype=torch.float64), 0 * one, one)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    return _Clamped.apply(S, low, high)[0]  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(S: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        values, Q = torch.linalg.eigh(S)
        clamped = values.clamp(low, high)
        product = (Q * clamped) @ Q.mT
        return (product + product.mT) / 2, Q, values, clamped

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.save_for_forward(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _clamped_along(*ctx.saved_tensors, direction=grad), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _clamped_along(*ctx.saved_tensors, direction=tangent), None, None, None


def _clamped_along(Q: Tensor, values: Tensor, clamped: Tensor, direction: Tensor) -> Tensor:
    """Apply the derivative of the clamp, which is its own adjoint, to a direction."""
    slope = (values == clamped).to(values.dtype)
    apart = values[:, None] - values
    same = apart == 0
    quotient = (clamped[:, None] - clamped) / torch.where(same, 1.0, apart)
    A = Q.mT @ ((direction + direction.mT) / 2) @ Q
    return Q @ (torch.where(same, (slope[:, None] + slope) / 2, quotient) * A) @ Q.mT


def _unit(limit: float, dtype: torch.dtype) -> float:
    """Return a depth that is well above the spacing of the dtype at a limit."""
    return max(abs(limit), 2.0 * torch.finfo(dtype).smallest_normal)


def _excess_over(a: Tensor, limit: float) -> float:
    """Return by how much the proved largest eigenvalue of the symmetric part exceeds a limit, -inf if it surely does not."""
    excess = log_norm(a).upper - limit
    return -math.inf if excess >= -1e-3 * abs(limit) and _discs_below(a, limit) else excess


def _discs_below(a: Tensor, limit: float) -> bool:
    r"""Decide exactly whether all Gershgorin discs of the symmetric part end at or below a limit.

    Twice that: :math:`2 a_{ii} + \sum_{j \ne i} |a_{ij} + a_{ji}| \le 2 l`. The sign of a rounded sum of two numbers is exact,
    and so is that of ``math.fsum``; only numbers near the end of the range of float64 are refused.
    """
    A: npt.NDArray[np.float64] = a.detach().to(device="cpu", dtype=torch.float64).numpy()
    if not max(float(np.abs(A).max()), abs(limit)) < 2.0**960:
        return False
    total = A + A.T
    rough = np.abs(total).sum(axis=1) - np.abs(np.diagonal(total)) + np.diagonal(total) - 2.0 * limit
    if float(rough.max()) > 1e-12 * (float(np.abs(total).sum(axis=1).max()) + abs(limit)):
        return False
    signs = np.sign(total)
    np.fill_diagonal(signs, 1.0)
    return all(
        math.fsum([-limit, -limit, *(signs[i] * A[i]).tolist(), *(signs[i] * A[:, i]).tolist()]) <= 0.0
        for i in range(len(A))
    )
