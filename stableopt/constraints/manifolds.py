r"""Matrices with orthonormal rows or columns. The only file that imports geotorch.

geotorch supplies the maps from skew-symmetric matrices to rotations; the parametrization around them is our own, and so are
those of the other sets (ranks, semidefinite, nearly orthogonal). geotorch 0.4 has classes for these, too, but each of the
following fails there or differs (tests/constraints/test_manifolds.py runs every line), and works here:

* bfloat16 and float16 weights: no class can be registered on them;
* the meta device: no class can be registered there;
* assigning a matrix that is not in the set, or zero: refused, except zero for low rank and semidefinite; ours project;
* wide matrices: ``almost_orthogonal`` cannot be registered; ``orthogonal`` and ``low_rank`` give weights that are not contiguous;
* contiguity: ``orthogonal`` leaves an original parameter that is not contiguous unless it is square;
* registering replaces the weight by a random one and moves the state of the random numbers; ours starts at the nearest point.

What geotorch adds for these sets is a metric on the manifold (its parameters are factors of a decomposition). That changes the
path of an optimizer, not what can be reached, so it is not wrapped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from geotorch.skew import Skew
from geotorch.so import SO
from torch import Tensor, nn

from stableopt.constraints.arguments import check_matrix
from stableopt.constraints.base import Constraint
from stableopt.constraints.layout import carries_derivative, substitute
from stableopt.constraints.retraction import orthogonality_residual, polar_retraction, stated_tolerance
from stableopt.constraints.sharding import is_sharded, on_whole
from stableopt.constraints.spectral import apply_to_singular_values, shrink_until_proved

__all__ = ["Orthogonal", "OrthogonalParametrization", "Stiefel"]

_ADVICE = (
    "Orthogonal planes of a convolution kernel do not make the convolution orthogonal; use stableopt.nn.stabilize."
)
_TRIVIALIZATIONS = tuple(SO.trivializations)


@dataclass(frozen=True)
class Orthogonal(Constraint):
    r"""The matrices with :math:`W^\top W = I` (tall or square) or :math:`W W^\top = I` (wide): all singular values are 1.

    Orthogonality cannot be stored exactly, so a matrix of shape ``(m, n)`` counts as feasible when

    .. math::
        \max_i |\sigma_i^2 - 1| \le \min(4 \varepsilon \sqrt{N},\ \tfrac14) + 8 \varepsilon_c N + 8 h,
        \qquad N = \max(m, n),

    for storing in a dtype with :math:`\varepsilon`, computing in one with :math:`\varepsilon_c` (float32 for half precision),
    and proving in float64 up to :math:`h = 2^{-53} (k (m + n + 24) + 16)`, :math:`k = \min(m, n)`
    (:func:`stableopt.linalg.below.relative_slack`).

    Args:
        triv: how the parametrization maps skew-symmetric matrices to rotations: ``"expm"`` (reaches all of them) or ``"cayley"``
            (cheaper; reaches all without the eigenvalue -1).

    Raises:
        ValueError: if ``triv`` is another word.

    Note:
        The set is not convex: the projection is not nonexpansive, and not unique where a singular value is 0 (a zero matrix
        gives one of the valid points). The first term covers the worst case of rounding; where it is cut off at 1/4, in
        bfloat16 for :math:`N > 64`, that is experience: rounding moves :math:`\sigma_i^2` by 1.5 :math:`\varepsilon` for random
        matrices of every size up to 1024 x 1024 and 4096 x 8, and by 6 :math:`\varepsilon` for products of reflections whose
        entries repeat (measured); 32 :math:`\varepsilon` are allowed. Its result has a *proved* spectral norm :math:`\le 1` in
        its dtype, so it loses a few units in the last place of length. A matrix within the tolerance whose norm is not proved
        is moved by that, although its violation is 0. :meth:`map` and the parametrization are orthogonal up to rounding,
        without a proof.

    References:
        Lezcano-Casado, *Trivializations for gradient-based optimization on manifolds*, 2019 (geotorch);
        Fan and Hoffman, *Some metric inequalities in the space of matrices*, 1955 (the polar factor is nearest).

    Examples:
        >>> Orthogonal().project(torch.tensor([[2.0, 0.0], [0.0, -3.0]], dtype=torch.float64)).round(decimals=6)
        tensor([[ 1.,  0.],
                [ 0., -1.]], dtype=torch.float64)
        >>> Orthogonal().violation(torch.eye(3)), Orthogonal().violation(2 * torch.eye(3))
        (0.0, 3.0)
    """

    triv: str = "expm"
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the name of the map."""
        if self.triv not in _TRIVIALIZATIONS:
            raise ValueError(
                f"{type(self).__name__} knows the maps {', '.join(_TRIVIALIZATIONS)} as triv, got {self.triv!r}."
            )

    def project(self, x: Tensor) -> Tensor:
        r"""Return the polar factor :math:`UV^\top` of :math:`x = U\Sigma V^\top`, shrunk by rounding until its norm is proved.

        Args:
            x: matrix of shape ``(m, n)``; never changed. Near the set all runs on its device, else on the CPU.

        Returns:
            Matrix with proved spectral norm at most 1, ``x`` itself if it is one within the tolerance. NaN or infinity gives
            NaN.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.
            ValueError: if it does not have two dimensions.

        Examples:
            >>> from stableopt.linalg import spectral_norm
            >>> W = Orthogonal().project(torch.zeros(3, 2))
            >>> Orthogonal().violation(W), spectral_norm(W).upper <= 1.0
            (0.0, True)
        """
        check_matrix(type(self).__name__, x, _ADVICE)
        if is_sharded(x):
            return on_whole(type(self).__name__, self.project, x)
        if x.numel() == 0:
            return x
        plain = torch.func.debug_unwrap(x.detach())
        near = polar_retraction(plain)
        if near is plain:
            return x
        if near is not None and not carries_derivative(x):
            return near
        if not bool(x.isfinite().all()):
            return x * math.nan
        polar = apply_to_singular_values(x.double(), lambda s: (torch.ones_like(s), torch.zeros_like(s)))
        return substitute(
            polar.to(x.dtype), near if near is not None else shrink_until_proved(polar.detach(), 1.0, x.dtype)
        )

    def violation(self, x: Tensor) -> float:
        r"""Return :math:`\max_i |\sigma_i^2 - 1|`, computed in float64; 0 within the tolerance, infinite for NaN.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.
            ValueError: if it does not have two dimensions.

        Examples:
            >>> Orthogonal().violation(torch.zeros(2, 2))
            1.0
        """
        check_matrix(type(self).__name__, x, _ADVICE)
        if is_sharded(x):
            return self.violation(x.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
        if x.numel() == 0:
            return 0.0
        if not bool(x.isfinite().all()):
            return math.inf
        if orthogonality_residual(x) <= (tolerance := stated_tolerance(x)):
            return 0.0
        distance = float((torch.linalg.svdvals(x.detach().double()).square() - 1.0).abs().max())
        return 0.0 if distance <= tolerance else distance

    def map(self, x: Tensor) -> Tensor:
        r"""Return the first columns of :math:`\operatorname{triv}(L - L^\top)`, L the entries of ``x`` below the diagonal.

        Smooth everywhere; zero gives the identity. Square results are rotations; :meth:`parametrization` reaches the others.

        Args:
            x: matrix of shape ``(m, n)``; half precision is computed in float32.

        Returns:
            Orthogonal matrix up to rounding, contiguous.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.
            ValueError: if it does not have two dimensions.

        Examples:
            >>> Orthogonal().map(torch.zeros(3, 2))
            tensor([[1., 0.],
                    [0., 1.],
                    [0., 0.]])
        """
        check_matrix(type(self).__name__, x, _ADVICE)
        return self._rotation(x).to(x.dtype).contiguous()

    def parametrization(self, tensor: Tensor) -> nn.Module:
        """Return a map from all matrices to the orthogonal ones, centered where the tensor was last assigned.

        Args:
            tensor: matrix to be parametrized; only its shape, dtype and device matter.

        Returns:
            An :class:`OrthogonalParametrization`, with one buffer.

        Raises:
            TypeError: if ``tensor`` is not a real floating tensor.
            ValueError: if it does not have two dimensions.

        Examples:
            >>> Orthogonal().parametrization(torch.zeros(2, 4)).base.shape
            torch.Size([4, 4])
        """
        check_matrix(type(self).__name__, tensor, _ADVICE)
        return OrthogonalParametrization(self, tensor)

    def _rotation(self, x: Tensor) -> Tensor:
        """Return :meth:`map` in the dtype that it is computed in."""
        work = x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
        if x.shape[0] < x.shape[1]:
            return self._rotation(work.mT).mT
        size, columns = x.shape
        if columns == 0:
            return work
        skew = Skew.frame(F.pad(work, (0, size - columns)), lower=True)
        nothing = (0.0 * work).sum()  # NaN in an entry that the frame ignores must not be swallowed
        return SO.trivializations[self.triv](skew)[:, :columns] + nothing


@dataclass(frozen=True)
class Stiefel(Orthogonal):
    r"""The Stiefel manifold :math:`\{W : W^\top W = I\}`: another name for :class:`Orthogonal`, the usual one for tall matrices.

    Everything is inherited: wide matrices have orthonormal rows, square ones are the orthogonal group. The two names are
    different classes, so a spec keeps the name that was chosen.

    Args:
        triv: as for :class:`Orthogonal`.

    Raises:
        ValueError: if ``triv`` is another word.

    Note:
        The parametrization is that of :class:`Orthogonal`: the first columns of a rotation, centered at the assigned point.

    References:
        Edelman, Arias and Smith, *The geometry of algorithms with orthogonality constraints*, 1998.

    Examples:
        >>> Stiefel().project(torch.tensor([[2.0], [0.0]], dtype=torch.float64)).round(decimals=6)
        tensor([[1.],
                [0.]], dtype=torch.float64)
        >>> Stiefel().spec()
        {'name': 'Stiefel', 'triv': 'expm'}
    """


class OrthogonalParametrization(nn.Module):
    r"""Map a free matrix X to :math:`B \operatorname{map}(X)` with an orthogonal buffer :math:`B` (from the right if wide).

    The buffer is part of the state: without it a square matrix could not change the sign of its determinant, and every assigned
    weight would need a logarithm. It has ``max(m, n)`` rows and columns.

    Args:
        constraint: the set.
        tensor: the matrix to be parametrized.

    Note:
        On the meta device the buffer is uninitialized, so load a state after ``to_empty``. Casting the module casts the buffer,
        which stays orthogonal only to the coarser dtype.

    Examples:
        >>> from torch.nn.utils import parametrize
        >>> layer = nn.Linear(5, 3)
        >>> _ = parametrize.register_parametrization(layer, "weight", Orthogonal().parametrization(layer.weight))
        >>> Orthogonal().violation(layer.weight)
        0.0
    """

    base: Tensor

    def __init__(self, constraint: Orthogonal, tensor: Tensor) -> None:
        super().__init__()
        self.constraint = constraint
        size = max(tensor.shape)
        self.register_buffer("base", torch.eye(size, dtype=tensor.dtype, device=tensor.device))

    def forward(self, x: Tensor) -> Tensor:
        """Return an orthogonal matrix, contiguous, in the dtype of ``x``."""
        rotation = self.constraint._rotation(x)  # noqa: SLF001  same file: the rotation before it is rounded to half precision
        base = self.base.to(rotation.dtype)
        moved = base @ rotation if x.shape[0] >= x.shape[1] else rotation @ base.mT
        return moved.to(x.dtype).contiguous()

    @torch.no_grad()
    def right_inverse(self, x: Tensor) -> Tensor:
        """Center the map at the projection of ``x`` and return zeros, which it maps to exactly that point."""
        if x.is_meta:
            return torch.zeros_like(x, memory_format=torch.contiguous_format)
        point = self.constraint.project(x)
        tall = point if point.shape[0] >= point.shape[1] else point.mT
        completion = torch.linalg.svd(tall.double(), full_matrices=True).U[:, tall.shape[1] :]
        self.base.copy_(torch.cat([tall, completion.to(tall.dtype)], dim=1))
        return torch.zeros_like(x, memory_format=torch.contiguous_format)

    def extra_repr(self) -> str:
        """Show the set."""
        return repr(self.constraint)
