r"""Weight maps to matrices with orthonormal rows or columns, times the radius: Cholesky, Cayley, exponential, Björck.

All of them compute an isometry :math:`Q` of the taller of the two orientations and end with *Newton-Schulz steps*

.. math:: p(Q) = \tfrac32 Q - \tfrac12 Q Q^\top Q, \qquad \sigma_i(p(Q)) = |\tfrac32 \sigma_i - \tfrac12 \sigma_i^3| .

**Why the result is within the limit.** With :math:`Q = U\Sigma V^\top`, :math:`p(Q) = U p(\Sigma) V^\top`. On [0, 2] the
polynomial takes values in [-1, 1]: its only critical point is 1 with :math:`p(1) = 1`, and :math:`p(0) = 0`, :math:`p(2) = -1`. So
a single step maps *every* matrix with :math:`\|Q\|_2 \le 2` to one with norm at most 1. The algorithm before it may hence be wrong
by as much as its own result, from rounding or ill-conditioning, without touching the limit; and errors of orthogonality
:math:`\varepsilon` become :math:`\tfrac32\varepsilon^2`. What is left is the rounding of the step itself and of the stored
numbers, which the radius is reduced by.

No map has state: the weight depends on the original alone and is the same in training and evaluation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.linalg import gram_norm
from stableopt.nn.precision import full_precision
from stableopt.nn.weights.base import WeightMap
from stableopt.nn.weights.geometry import Geometry
from stableopt.nn.weights.isometry import HALF, check_matrix, inward, newton_schulz, normal_factor, polar, unit_size

__all__ = ["Bjorck", "Cayley", "Cholesky", "Exponential", "Isometry"]


class Isometry(WeightMap):
    """A weight map to matrices with orthonormal rows or columns times the radius; subclasses say how.

    Args:
        geometry: of kind ``"linear"``.
        radius: the limit.
        norm: ``"l2"``.

    Raises:
        TypeError: as :class:`WeightMap`.
        ValueError: as :class:`WeightMap`, or for a convolution: a reshaped kernel with orthonormal rows is no isometry.

    Note:
        The singular values are at most the radius for *every* original. They equal it, up to rounding, where the original is not
        close to a matrix of lower rank; :class:`Cayley` and :class:`Exponential` need not even that.

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> _ = torch.manual_seed(0)
        >>> W = Cholesky(Geometry("linear"), 2.0)(torch.randn(3, 5))
        >>> torch.allclose(W @ W.mT, 4.0 * torch.eye(3), atol=1e-4)
        True
    """

    scale_free: ClassVar[bool] = False
    """Whether the result does not depend on the scale of the original, which is then brought to unit size first."""

    def __init__(self, geometry: Geometry, radius: float = 1.0, norm: str = "l2") -> None:
        super().__init__(geometry, radius, norm)
        if geometry.kind != "linear":
            raise ValueError(
                f"the method {self.name!r} makes matrices, and the geometry is of kind {geometry.kind!r}: a kernel that is "
                "orthogonal as a matrix has another norm as a convolution. Use an orthogonal convolution."
            )

    def forward(self, V: Tensor) -> Tensor:
        """Return the weight: contiguous, of the dtype of the original, within the radius after rounding."""
        check_matrix(V, self)
        if not V.numel():
            return V
        wide = V.float() if V.dtype in HALF else V
        with full_precision(wide):
            tall = V.shape[0] >= V.shape[1]
            if self.scale_free:
                wide = unit_size(wide, V.dtype)
            Q = self.isometry(wide if tall else wide.mT)
            return inward(Q if tall else Q.mT, V.dtype, self.radius)

    @abstractmethod
    def isometry(self, V: Tensor) -> Tensor:
        """Return a matrix of the shape of ``V`` (no fewer rows than columns) whose norm is at most 1 up to its rounding."""

    def right_inverse(self, W: Tensor) -> Tensor:
        """Return an original of the member nearest to ``W``, its polar factor.

        Args:
            W: the weight to come near to.

        Raises:
            TypeError: if it is not real and floating.
            ValueError: if it is no matrix, or holds NaN or infinity.
        """
        check_matrix(W, self)
        if W.is_meta or not W.numel():
            return W
        if not bool(W.isfinite().all()):
            raise ValueError(
                f"no orthogonal matrix is near one of shape {tuple(W.shape)} with NaN or infinite entries."
            )
        return self.original(polar(W)).to(W.dtype).contiguous()

    def original(self, Q: Tensor) -> Tensor:
        """Return an original of a float64 matrix with orthonormal rows or columns. Here: itself."""
        return Q


class Cholesky(Isometry):
    r"""Orthonormal columns by a Cholesky factor, as in a QR decomposition.

    .. math:: Q = V L^{-\top}, \qquad L L^\top = V^\top V + \varepsilon I, \qquad \varepsilon = c\,u\,\operatorname{tr}(V^\top V) .

    :math:`Q^\top Q = I - \varepsilon L^{-1}L^{-\top} \preceq I` for every :math:`V` and :math:`\varepsilon \ge 0`. The
    regularization scales with the trace, so the result does not depend on the scale of the original; a fixed one loses the
    signal of small weights. A Newton-Schulz step removes its effect, except for singular values of the original that are tiny
    beside the largest: below about 2 % for 1000 columns in float32.

    Args:
        geometry: of kind ``"linear"``.
        radius: the limit.
        norm: ``"l2"``.

    Raises:
        TypeError: as :class:`Isometry`.
        ValueError: as :class:`Isometry`.

    Note:
        The factorization cannot fail: where rounding leaves the shifted Gram matrix indefinite, the shift is raised to the trace.
        Directions that the original lacks stay below the radius; zero gives zero, with a finite derivative.

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> Q = Cholesky(Geometry("linear"))(torch.tensor([[3.0], [4.0]]))
        >>> [round(float(q), 3) for q in Q[:, 0]]
        [0.6, 0.8]
    """

    name: ClassVar[str] = "cholesky"
    scale_free: ClassVar[bool] = True

    def isometry(self, V: Tensor) -> Tensor:
        """Return the regularized orthonormal columns, improved once."""
        return newton_schulz(normal_factor(V), 1)


class Cayley(Isometry):
    r"""The Cayley transform of a skew matrix, for rectangular weights its generalisation.

    .. math:: V = \begin{pmatrix} U \\ Y \end{pmatrix}, \quad A = U - U^\top + Y^\top Y, \qquad
              Q = \begin{pmatrix} (I+A)^{-1}(I-A) \\ -2Y(I+A)^{-1} \end{pmatrix} .

    With :math:`X = (I + A)^{-1}` the blocks are :math:`2X - I` and :math:`-2YX`, so

    .. math:: Q^\top Q = I - 2X - 2X^\top + 4X^\top(I + Y^\top Y)X = I
        \quad\text{since}\quad 2(I + Y^\top Y) = (I + A) + (I + A)^\top .

    Args:
        geometry: of kind ``"linear"``.
        radius: the limit.
        norm: ``"l2"``.

    Raises:
        TypeError: as :class:`Isometry`.
        ValueError: as :class:`Isometry`.

    Note:
        A square matrix with the eigenvalue -1 is out of reach (so half of the orthogonal group is): such an eigenvalue becomes
        +1 in ``right_inverse``. Zero gives the identity. Originals so large that :math:`I + A` could not be solved are scaled down.

    References:
        Trockman and Kolter, *Orthogonalizing Convolutional Layers with the Cayley Transform*, 2021; Wang and Manchester, *Direct
        Parameterization of Lipschitz-Bounded Deep Networks*, 2023 (rectangular).

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> Cayley(Geometry("linear"))(torch.zeros(2, 2)).round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])
    """

    name: ClassVar[str] = "cayley"

    def isometry(self, V: Tensor) -> Tensor:
        """Return the transform, improved once."""
        n = V.shape[1]
        V = _capped(V)
        eye = torch.eye(n, dtype=V.dtype, device=V.device)
        U, Y = V[:n], V[n:]
        A = U - U.mT + Y.mT @ Y
        # A is (c U - c U', c Y'Y) for U' = c U, Y' = sqrt(c) Y: still a transform, and I + A stays solvable
        limit = 0.1 / (torch.finfo(V.dtype).eps * math.sqrt(n))
        c = limit / torch.linalg.vector_norm(A).clamp_min(limit)
        X = torch.linalg.solve(eye + c * A, eye)
        return newton_schulz(torch.cat([2.0 * X - eye, -2.0 * c.sqrt() * (Y @ X)]), 1)

    def original(self, Q: Tensor) -> Tensor:
        r"""Return :math:`U, Y` with :math:`I + A = 2(I + Q_1)^{-1}`, regularized where :math:`Q_1` has the eigenvalue -1."""
        if Q.shape[0] < Q.shape[1]:
            return self.original(Q.mT).mT
        top, bottom = Q[: Q.shape[1]], Q[Q.shape[1] :]
        inverse = _damped_inverse(top)
        A = (torch.eye(len(top), dtype=Q.dtype, device=Q.device) - top) @ inverse
        return torch.cat([(A - A.mT) / 4.0, -bottom @ inverse])


class Exponential(Isometry):
    r"""The exponential of a skew matrix; of rectangular weights the first columns of it.

    .. math:: V = \begin{pmatrix} U \\ Y \end{pmatrix}, \qquad
              Q = \exp\begin{pmatrix} U - U^\top & -Y^\top \\ Y & 0 \end{pmatrix} \begin{pmatrix} I \\ 0 \end{pmatrix} .

    Args:
        geometry: of kind ``"linear"``.
        radius: the limit.
        norm: ``"l2"``.

    Raises:
        TypeError: as :class:`Isometry`.
        ValueError: as :class:`Isometry`.

    Note:
        The dearest of the maps, for comparison: prefer :class:`Cayley`, or block reflectors. Square matrices with determinant
        -1 are out of reach. ``right_inverse`` is exact for rotations; for rectangular matrices it returns an original of a matrix
        near the given one. Originals with rotations of many turns are scaled down.

    References:
        Lezcano-Casado and Martínez-Rubio, *Cheap Orthogonal Constraints in Neural Networks*, 2019.

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> quarter = torch.tensor([[0.0, 0.0], [torch.pi / 2, 0.0]])
        >>> Exponential(Geometry("linear"))(quarter).round(decimals=3).abs()
        tensor([[0., 1.],
                [1., 0.]])
    """

    name: ClassVar[str] = "expm"

    def isometry(self, V: Tensor) -> Tensor:
        """Return the first columns of the exponential, improved once."""
        m, n = V.shape
        V = _capped(V)
        whole = torch.nn.functional.pad(V, (0, m - n))
        A = whole - whole.mT
        limit = 2.0 * math.pi * math.sqrt(m)
        A = A * (limit / torch.linalg.vector_norm(A).clamp_min(limit))
        return newton_schulz(torch.linalg.matrix_exp(A)[:, :n], 1)

    def original(self, Q: Tensor) -> Tensor:
        """Return half of the logarithm of the rotation, first of the one whose remaining columns are nearest to those of I."""
        m, n = Q.shape
        if m < n:
            return self.original(Q.mT).mT
        if m > n:
            rest = torch.eye(m, dtype=Q.dtype, device=Q.device)[:, n:]
            Q = torch.cat([Q, polar(rest - Q @ (Q.mT @ rest))], dim=1)
        eye = torch.eye(m, dtype=Q.dtype, device=Q.device)
        A = (eye - Q) @ _damped_inverse(Q)
        angles, vectors = torch.linalg.eigh(1j * (A - A.mT) / 2.0)  # of the Cayley transform: tan(angle / 2)
        logarithm = ((vectors * (2j * angles.arctan())) @ vectors.mH).real
        return torch.cat([logarithm[:n, :n] / 2.0, logarithm[n:, :n]])


class Bjorck(Isometry):
    r"""Newton-Schulz steps on the original divided by an upper bound of its norm.

    .. math:: X_0 = V / U(V), \quad U(V) \ge \|V\|_2, \qquad X_{k+1} = \tfrac32 X_k - \tfrac12 X_k X_k^\top X_k .

    The precondition :math:`\|X_0\|_2 \le 2` of the bound in the module holds with room, whatever the original: a jump of it cannot
    make the steps diverge. Singular values grow towards 1 from below, :math:`\sigma \mapsto \tfrac32\sigma - \tfrac12\sigma^3 \in
    [\sigma, 1]` on [0, 1], and never pass it.

    Args:
        geometry: of kind ``"linear"``.
        radius: the limit.
        norm: ``"l2"``.
        steps: number of steps, at least 1. Singular values of :math:`X_0` above 0.6 are within 1e-5 of 1 after 6 steps; much
            smaller ones grow by half in each.

    Raises:
        TypeError: as :class:`Isometry`.
        ValueError: as :class:`Isometry`, or if ``steps`` is no integer of at least 1.

    References:
        Björck and Bowie, *An Iterative Algorithm for Computing the Best Estimate of an Orthogonal Matrix*, 1971.

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> W = Bjorck(Geometry("linear"))(1e6 * torch.eye(3))
        >>> bool((W - torch.eye(3)).abs().max() < 1e-4)
        True
    """

    name: ClassVar[str] = "bjorck"
    scale_free: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, radius: float = 1.0, norm: str = "l2", *, steps: int = 6) -> None:
        super().__init__(geometry, radius, norm)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps must be an integer >= 1, got {steps!r}.")
        self.steps = steps

    def isometry(self, V: Tensor) -> Tensor:
        """Return the iterate after all steps."""
        return newton_schulz(V / gram_norm(V).clamp_min(2.0**-4), self.steps)  # at least 1 unless the original is tiny

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{super().extra_repr()}, steps={self.steps}"


def _capped(V: Tensor) -> Tensor:
    """Scale a matrix down to entries of at most 1000 times the root of its size, so that nothing overflows."""
    limit = 1e3 * math.sqrt(sum(V.shape))
    return V * (limit / V.abs().amax().clamp_min(limit))


def _damped_inverse(Q: Tensor) -> Tensor:
    r"""Return :math:`(I + Q)^\top((I + Q)(I + Q)^\top + \mu I)^{-1}`, nearly :math:`(I + Q)^{-1}`."""
    eye = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    shifted = eye + Q
    return torch.linalg.solve(shifted @ shifted.mT + 1e-9 * eye, shifted).mT
