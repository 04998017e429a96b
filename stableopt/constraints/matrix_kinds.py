r"""What penalties and sets of matrices share: batches, dtypes, complex numbers, shards, scaling; a class adds its formula.

**Scaling.** Formulas see matrices multiplied by a power of two that brings them to size about 1, so that no decomposition
overflows or loses digits to subnormal numbers.

**Complex numbers.** For proofs :math:`A + iB` is replaced by the real matrix

.. math:: \begin{pmatrix} A & -B \\ B & A \end{pmatrix},

which has the same singular values, each twice.

**Feasibility.** A rounded projection can lie outside by a few units in the last place. :func:`pull_until_proved` moves it along
the straight line to a point deep inside, until the set's own proof accepts the stored numbers.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from stableopt.constraints.arguments import check_dims, check_tensor, combined_step
from stableopt.constraints.base import Constraint, Parametrization, Regularizer
from stableopt.constraints.layout import Matrices, substitute
from stableopt.constraints.rounding import COMPLEX_DTYPES, unit_scale
from stableopt.constraints.sharding import is_sharded, on_whole
from stableopt.linalg.below import relative_slack

__all__ = ["MatrixNorm", "MatrixSet", "check_matrix_dims", "each_matrix", "pull_until_proved", "real_embedding"]

_HAIR = 2.0**-48


class MatrixNorm(Regularizer):
    """A weighted norm of matrices that depends on the singular values only; of a batch, the sum.

    Attributes:
        weight: a field that every class has, the factor of the norm.
        dims: a field that every class has: the two dimensions of one matrix, ``None`` for a tensor with exactly two.
    """

    complex_too: ClassVar[bool] = True
    weight: float
    dims: tuple[int, int] | None

    @abstractmethod
    def _norm(self, sigma: Tensor) -> Tensor:
        """Return the norm from the singular values in the last dimension, in decreasing order, at least one."""

    @abstractmethod
    def _prox(self, a: Tensor, threshold: Tensor) -> Tensor:
        """Return the proximal point of one float64 (complex128) matrix for the norm times ``threshold`` (0-d), differentiable."""

    def value(self, x: Tensor) -> Tensor:
        """Return the weighted norm in float64, summed over all matrices (0-d, on the device of ``x``); NaN for NaN and infinity.

        Raises:
            TypeError: if ``x`` has the wrong type.
            ValueError: if its shape does not fit ``dims``.
        """
        if is_sharded(x):
            return self.value(x.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
        m = Matrices(type(self).__name__, x, self.dims, complex_too=True)
        if x.numel() == 0:
            return m.data.real.new_zeros(())
        finite = _finite(m.data)
        safe = torch.where(finite, m.data, 0.0)
        scale = _scale(safe, 0.0)
        norms = self._norm(torch.linalg.svdvals(safe * scale)) / scale.flatten()
        return self.weight * torch.where(finite.flatten(), norms, math.nan).sum()

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the proximal point of each matrix, computed in float64 and rounded to nearest.

        Args:
            x: any shape that fits ``dims``; never changed. A matrix with NaN or infinity becomes NaN.
            step: finite number >= 0, or a tensor with one entry.
            metric: ``None``, or a tensor with one entry that divides the step.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if ``step`` is negative or not finite, a tensor has several entries, or the shape does not fit.
        """
        name = type(self).__name__
        check_tensor(name, x, complex_too=True)
        step = combined_step(name, step, metric, x, diagonal=False)
        if is_sharded(x):
            whole = step.full_tensor() if is_sharded(step) else step  # pyright: ignore[reportAttributeAccessIssue]
            return on_whole(name, lambda t: self.prox(t, whole), x)
        m = Matrices(name, x, self.dims, complex_too=True)
        if x.numel() == 0:
            return x
        threshold = self.weight * torch.as_tensor(step, dtype=torch.float64, device=x.device).reshape(())
        made = each_matrix(m.data, lambda a, scale: self._prox(a, threshold * scale))
        return m.fold(made.to(x.dtype))


class MatrixSet(Constraint):
    """A set of matrices whose members are recognized by a proof, or a tolerance, for the stored numbers.

    Attributes:
        dims: a field that every class has: the two dimensions of one matrix, ``None`` for a tensor with exactly two.
        complex_too: whether complex matrices work.
        thin: whether the set has no interior, so that the projection has a derivative other than 1 at its own points.
        advice: what to do instead when the shape does not fit.
    """

    complex_too: ClassVar[bool] = False
    thin: ClassVar[bool] = False
    advice: ClassVar[str] = ""
    dims: tuple[int, int] | None

    @abstractmethod
    def _excess(self, a: Tensor) -> float:
        """Return how far one finite stored matrix is outside: ``<= 0`` exactly if it is a member for sure."""

    @abstractmethod
    def _nearest(self, a: Tensor, scale: Tensor) -> Tensor:
        """Return the projection of one float64 (complex128) matrix onto the set times ``scale`` (0-d), differentiable."""

    @abstractmethod
    def _inward(self, nearest: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a member in ``dtype`` next to a float64 (complex128) projection."""

    @property
    def _size(self) -> float:
        """The size of the numbers that define the set, so that scaling keeps them finite."""
        return 0.0

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest point of the set, rounded into it; ``x`` itself if it is a member.

        Args:
            x: any shape that fits ``dims``; never changed. A matrix with NaN or infinity becomes NaN. The proof copies it to
                the CPU.

        Raises:
            TypeError: if ``x`` has the wrong type.
            ValueError: if its shape does not fit ``dims``.
            InfeasibleError: if the dtype of ``x`` has no number for what the set asks.
        """
        m = self._matrices(x)
        if m is None:
            return on_whole(type(self).__name__, self.project, x)
        members = [self._project_one(a) for a in m.stored.unbind(0)] if x.numel() else []
        if all(moved is None for moved in members):
            return x
        pairs = zip(members, m.stored.unbind(0), strict=True)
        return m.fold(torch.stack([a if moved is None else moved for moved, a in pairs]))

    def violation(self, x: Tensor) -> float:
        """Return the largest excess of a matrix; 0.0 exactly if all are members, infinite for NaN and infinity.

        Raises:
            TypeError: if ``x`` has the wrong type.
            ValueError: if its shape does not fit ``dims``.
        """
        m = self._matrices(x)
        if m is None:
            return self.violation(x.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
        if x.numel() == 0:
            return 0.0
        if not bool(x.isfinite().all()):
            return math.inf
        worst = max(self._excess(a.detach().contiguous()) for a in m.stored.unbind(0))
        return 0.0 if worst <= 0.0 else max(worst, math.ulp(0.0))

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the projection; step and metric are checked, then have no influence.

        Raises:
            TypeError: if ``x`` or ``step`` has the wrong type. ValueError: if ``step`` is negative, not finite, or a tensor
            with several entries, or the shape does not fit ``dims``.
        """
        name = type(self).__name__
        check_tensor(name, x, complex_too=self.complex_too)
        combined_step(name, step, metric, x, diagonal=False)
        return self.project(x)

    def map(self, x: Tensor) -> Tensor:
        """Return the projection rounded to nearest, without its proof: it stays on the device and never waits.

        Args:
            x: any shape that fits ``dims``. A matrix with NaN or infinity becomes NaN.

        Returns:
            Contiguous tensor, in the set up to rounding.

        Raises:
            TypeError: if ``x`` has the wrong type.
            ValueError: if its shape does not fit ``dims``.
        """
        m = self._matrices(x)
        if m is None:
            return on_whole(type(self).__name__, self.map, x)
        if x.numel() == 0:
            return x
        return m.fold(each_matrix(m.data, self._nearest, self._size).to(x.dtype)).contiguous()

    def parametrization(self, tensor: Tensor) -> nn.Module:
        """Return the stateless module that applies :meth:`map`.

        Args:
            tensor: the tensor to be parametrized.

        Raises:
            TypeError: if ``tensor`` has the wrong type.
            ValueError: if its shape does not fit ``dims``.
        """
        self._matrices(tensor)
        return Parametrization(self)

    def _matrices(self, x: Tensor) -> Matrices | None:
        """Return the view of ``x`` as matrices, after all checks; ``None`` for a DTensor, which must be gathered first."""
        name = type(self).__name__
        check_tensor(name, x, complex_too=self.complex_too)
        if is_sharded(x):
            return None
        m = Matrices(name, x, self.dims, advice=self.advice, complex_too=self.complex_too)
        self._check_shape(m.stored)
        return m

    def _check_shape(self, stored: Tensor) -> None:
        """Refuse a batch of matrices of the wrong shape."""

    def _project_one(self, a: Tensor) -> Tensor | None:
        """Return the projection of one stored matrix, ``None`` if it is a member and nothing has to be differentiated."""
        if not bool(a.isfinite().all()):
            return a * math.nan
        member = self._excess(a.detach().contiguous()) <= 0.0
        tracked = (torch.is_grad_enabled() and a.requires_grad) or unpack_dual(a).tangent is not None
        if member and not (self.thin and tracked):
            return None
        wide = a.to(torch.complex128 if a.dtype in COMPLEX_DTYPES else torch.float64)
        nearest = each_matrix(wide[None], self._nearest, self._size)[0]
        return substitute(nearest.to(a.dtype), a if member else self._inward(nearest.detach(), a.dtype))


def check_matrix_dims(owner: str, dims: object) -> tuple[int, int] | None:
    """Return the two dimensions of one matrix, or ``None``.

    Raises:
        TypeError: if ``dims`` is neither ``None`` nor a pair of ints.
        ValueError: if it has another number of entries than two, or names a dimension twice.

    Examples:
        >>> check_matrix_dims("PSD", [-2, -1])
        (-2, -1)
    """
    checked = check_dims(owner, dims)
    if checked is None:
        return None
    if isinstance(checked, int) or len(checked) != 2:
        raise ValueError(f"{owner} needs None or two dimensions as dims, such as (-2, -1), got {dims!r}.")
    return checked[0], checked[1]


def real_embedding(a: Tensor) -> Tensor:
    """Return a real matrix with the singular values of a complex one, each twice; a real matrix as it is.

    Examples:
        >>> real_embedding(torch.tensor([[1.0 + 2.0j]]))
        tensor([[ 1., -2.],
                [ 2.,  1.]])
    """
    if not a.is_complex():
        return a
    return torch.cat([torch.cat([a.real, -a.imag], -1), torch.cat([a.imag, a.real], -1)], -2)


def each_matrix(data: Tensor, function: Callable[[Tensor, Tensor], Tensor], size: float = 0.0) -> Tensor:
    """Apply a function to each matrix of a batch, scaled to size about 1.

    Args:
        data: shape ``(batch, m, n)``, float64 or complex128, not empty.
        function: maps a matrix times a power of two, and that power (0-d), to a matrix of the same shape and scale.
        size: largest number that matters besides the entries; it is brought to size 1 at most.

    Returns:
        Tensor like ``data``, scaled back, clipped to the range of float64; NaN where a matrix is not finite.

    Examples:
        >>> each_matrix(torch.full((1, 1, 1), 8.0, dtype=torch.float64), lambda a, scale: a + scale)
        tensor([[[9.]]], dtype=torch.float64)
    """
    finite = _finite(data)
    safe = torch.where(finite, data, 0.0)
    scale = _scale(safe, size)
    pairs = zip((safe * scale).unbind(0), scale.flatten().unbind(0), strict=True)
    made = _clipped(torch.stack([function(a, c) for a, c in pairs]) / scale, torch.float64)
    return torch.where(finite, made, math.nan)


def pull_until_proved(
    target: Tensor, center: Tensor | float, dtype: torch.dtype, excess: Callable[[Tensor], float], depth: float
) -> Tensor | None:
    r"""Round :math:`sT + (1 - s)C` to ``dtype``, with the largest tried s in [0, 1] for which it is proved to lie in a set.

    For a convex excess e with :math:`e(C) = -d` and :math:`e(T) = \eta > 0` every :math:`s \le d / (d + \eta)` is enough up to
    rounding; the margin for rounding doubles with each pass, so that at most 60 passes end at C. In practice there are one to
    four. On one machine a proof always gives the same answer. A result also keeps a distance from the limit, about the width
    of the proofs (:func:`stableopt.linalg.below.relative_slack` / 8), so that another library of matrix products, whose sums
    round differently, is unlikely to disagree.

    Args:
        target: float64 or complex128 matrix, finite.
        center: point deep inside the set, in the shape of the target.
        dtype: what to round to; numbers out of its range are clipped.
        excess: the proof: how far a stored matrix is outside, ``<= 0`` if it is a member, -inf if it is one exactly.
        depth: :math:`d`, minus the excess of the center.

    Returns:
        New matrix of that dtype, ``None`` if not even the rounded center is proved to belong.

    Examples:
        >>> target = torch.tensor([[1 / 3]], dtype=torch.float64)
        >>> low = pull_until_proved(target, 0.0, torch.float16, lambda a: float(a) - 1 / 3, 1 / 3)
        >>> low is not None and float(low) < 1 / 3
        True
    """
    hair = max(_HAIR, relative_slack(*target.shape) / 8)
    share, margin = 1.0, max(hair, torch.finfo(dtype).eps / 8)
    while True:
        point = target if share == 1.0 else share * target + (1.0 - share) * center
        candidate = _clipped(point, dtype).to(dtype)
        outside = excess(candidate)
        if outside <= -hair * depth or (outside <= 0.0 and share == 0.0):
            return candidate
        if share == 0.0:
            return None
        inner = depth / (depth + max(outside, 0.0)) if depth + outside > 0.0 else 0.0
        share *= min(1.0, inner) * (1.0 - margin)
        margin = min(1.0, 2.0 * margin)


def _clipped(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers, or the largest ones of the dtype where they are out of its range."""
    if a.is_complex():
        return torch.view_as_complex(_clipped(torch.view_as_real(a.resolve_conj()), dtype.to_real()))
    info = torch.finfo(dtype)
    return a.clamp(info.min, info.max)


def _finite(data: Tensor) -> Tensor:
    return data.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)


def _scale(safe: Tensor, size: float) -> Tensor:
    parts = torch.maximum(safe.detach().real.abs(), safe.detach().imag.abs()) if safe.is_complex() else safe.detach()
    top = parts.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(size)
    return unit_scale(torch.where(top > 0, top, 1.0))
