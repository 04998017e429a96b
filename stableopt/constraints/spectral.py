r"""The ball of the spectral norm, whose members are proved to belong to it.

A matrix is feasible when :func:`stableopt.linalg.below.norm_is_below` proves :math:`\|W\|_2 \le r`. A projection is proved to end
at :math:`\|P\|_2 \le r(1 - h)`, where :math:`h` is the distance from which on that proof succeeds for any memory layout and any
order of summation (:func:`stableopt.linalg.below.relative_slack`): so it is feasible again wherever it is looked at, and
projecting it again changes no bit. The result is a function of the matrix alone, not of what was projected before.

Complex matrices are real ones twice as large: :math:`A + iB` has the singular values, each twice, of
:math:`\begin{pmatrix} A & -B \\ B & A \end{pmatrix}`.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stableopt.constraints.arguments import check_dims, check_number, check_tensor, combined_step
from stableopt.constraints.base import Constraint, Regularizer
from stableopt.constraints.deflation import (
    SpectralFunction,
    apply_to_singular_values,
    derivative_along,
    project_by_deflation,
    project_by_sign,
)
from stableopt.constraints.layout import Matrices
from stableopt.constraints.sharding import is_sharded, on_whole
from stableopt.linalg import gram_norm, spectral_norm
from stableopt.linalg.below import norm_is_below, relative_slack

__all__ = ["SpectralBall", "apply_to_singular_values", "is_proved_below", "proved_norm", "shrink_until_proved"]

_ADVICE = (
    "The norm of a reshaped convolution kernel is not the norm of the convolution: "
    "use stableopt.nn.stabilize for convolutions, L2Ball or LinfBall for vectors."
)
_HAIR = 2.0**-48


@dataclass(frozen=True)
class SpectralBall(Constraint):
    r"""The matrices with :math:`\|W\|_2 = \sigma_{\max}(W) \le r`; projection :math:`U \min(\Sigma, r) V^*`.

    Args:
        radius: :math:`r`, finite, :math:`> 0`.
        dims: the two dimensions of one matrix, for a tensor that holds a batch of matrices; ``None`` for a matrix.

    Raises:
        TypeError: if the radius is not a real number, or dims are not ints.
        ValueError: if it is not finite or not positive, or dims are not two distinct ones.

    Note:
        A matrix counts as feasible when its norm is *proved* to be at most the radius, in its storage dtype. The proof runs on the
        CPU: :meth:`project` and :meth:`violation` copy the matrix there and wait. A matrix whose norm is below the radius by less
        than the proof can tell (relative 1e-14 for 3 x 3, at most 2.4e-10 for 1024 x 1024) may be moved inwards by about that.
        :meth:`map` stays on the device and is an upper bound in exact arithmetic, not a proof. The derivative at
        :math:`\sigma_i = r` is that of the inside. A DTensor is gathered on every process.

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
        >>> SpectralBall(1.0, dims=(-2, -1)).project(5 * torch.eye(2).expand(4, 2, 2)).diagonal(
        ...     dim1=-2, dim2=-1
        ... ).sum().round()
        tensor(8...)
    """

    complex_too: ClassVar[bool] = True

    radius: float
    dims: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check radius and dims."""
        object.__setattr__(self, "radius", check_number("SpectralBall", "radius", self.radius, low=0.0, strict=True))
        dims = check_dims("SpectralBall", self.dims)
        if dims is not None and (isinstance(dims, int) or len(dims) != 2):
            raise ValueError(f"SpectralBall needs None or the two dimensions of a matrix as dims, got {self.dims!r}.")
        object.__setattr__(self, "dims", dims)

    def project(self, x: Tensor) -> Tensor:
        r"""Return ``x`` itself, or ``x`` with its singular values clipped, rounded, and shrunk until the proof holds.

        What is proved to be inside is returned as it is. Where few singular values exceed the radius they are deflated
        (:mod:`stableopt.constraints.deflation`), on a GPU all are clipped by products of matrices, else by a singular value
        decomposition. Each pass of the shrinking rounds :math:`cP` to the dtype and tries the proof; the relative margin doubles,
        so that after at most 54 passes :math:`c = 0`. In practice there is one.

        Args:
            x: matrix of shape ``(m, n)``, or a tensor that has ``dims``; never changed.

        Returns:
            Tensor whose matrices have a proved norm. The distance of each from the exact projection is a few units in the last
            place of the dtype, in float64 a few times the width of the proof (relative 4e-12 for 64 x 64).
            A matrix with NaN or infinity becomes NaN. The numbers are the same with and without gradients.

        Raises:
            TypeError: if ``x`` is not a floating or complex tensor.
            ValueError: if it does not have the right dimensions.

        Examples:
            >>> SpectralBall(2.0).project(torch.eye(2))
            tensor([[1., 0.],
                    [0., 1.]])
        """
        check_tensor("SpectralBall", x, complex_too=True)
        if is_sharded(x):
            return on_whole("SpectralBall", self.project, x)
        # Inside torch.func transforms a tensor is a wrapper without numbers; a Function's forward gets them.
        if torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001 no public question  # pyright: ignore[reportAttributeAccessIssue]
            return _Projection.apply(x, self)  # pyright: ignore[reportReturnType]
        plain = x.detach() if x.requires_grad else x
        value = self._projected(plain)
        if value is plain:
            return x
        if not (x.requires_grad and torch.is_grad_enabled()):
            return value
        return _Projection.apply(x, self, value)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def _projected(self, x: Tensor) -> Tensor:
        m = Matrices("SpectralBall", x, self.dims, advice=_ADVICE, complex_too=True)
        if x.numel() == 0:
            return x
        old = [m.stored[i] for i in range(m.stored.shape[0])]
        new = [_nearest(W, self.radius) for W in old]
        if all(a is b for a, b in zip(old, new, strict=True)):
            return x
        return m.fold(torch.stack(new))

    def violation(self, x: Tensor) -> float:
        """Return by how much the largest proved norm exceeds the radius; 0.0 if all are proved inside, infinite for NaN, infinity.

        Raises:
            TypeError: if ``x`` is not a floating or complex tensor.
            ValueError: if it does not have the right dimensions.

        Examples:
            >>> SpectralBall(2.0).violation(torch.diag(torch.tensor([3.0, 1.0])))
            1.0...
        """
        check_tensor("SpectralBall", x, complex_too=True)
        if is_sharded(x):
            x = x.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        m = Matrices("SpectralBall", x.detach(), self.dims, advice=_ADVICE, complex_too=True)
        if not bool(x.detach().isfinite().all()):
            return math.inf
        excess = 0.0
        for W in m.stored:
            if not is_proved_below(W, self.radius):
                excess = max(excess, proved_norm(W) - self.radius, math.ulp(0.0))
        return excess

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the projection; step and metric are checked, then have no influence.

        Raises:
            TypeError: if ``x`` or ``step`` has the wrong type.
            ValueError: if ``step`` is negative, not finite, or a tensor with several entries.
        """
        check_tensor("SpectralBall", x, complex_too=True)
        combined_step("SpectralBall", step, metric, x, diagonal=self.diagonal)
        return self.project(x)

    def map(self, x: Tensor) -> Tensor:
        r"""Return :math:`x \min(1, r / N(x))` with the differentiable bound :math:`N(x) \ge \|x\|_2` of Gram iteration.

        Args:
            x: matrix of shape ``(m, n)``, or a tensor that has ``dims``.

        Returns:
            Tensor whose matrices have norm at most the radius in exact arithmetic, whatever the history; half precision is computed
            in float32 and rounded once, also under autocast. Because N overestimates a little, the image stops a little short of
            the sphere.

        Raises:
            TypeError: if ``x`` is not a floating or complex tensor.
            ValueError: if it does not have the right dimensions.

        Examples:
            >>> SpectralBall(2.0).map(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))).round(decimals=6)
            tensor([[2.0000, 0.0000],
                    [0.0000, 0.5000]], dtype=torch.float64)
        """
        m = Matrices("SpectralBall", x, self.dims, advice=_ADVICE, complex_too=True)
        work = m.stored.float() if x.dtype in {torch.float16, torch.bfloat16} else m.stored
        with _full_precision(x):
            factor = self.radius / gram_norm(work).double().clamp_min(self.radius)
        return m.fold((work * factor.to(work.real.dtype)[:, None, None]).to(x.dtype))

    def parametrization(self, tensor: Tensor) -> nn.Module:
        """Return the stateless module that applies :meth:`map`.

        Args:
            tensor: the matrix, or batch of matrices, to be parametrized.

        Raises:
            TypeError: if ``tensor`` is not a floating tensor.
            ValueError: if it does not have the right dimensions.

        Examples:
            >>> SpectralBall(1.0).parametrization(torch.zeros(2, 3))
            Parametrization(SpectralBall(radius=1.0, dims=None))
        """
        Matrices("SpectralBall", tensor, self.dims, advice=_ADVICE, complex_too=True)
        return super().parametrization(tensor.real if tensor.is_complex() else tensor)

    def conjugate(self) -> Regularizer:
        r"""Return the support function :math:`r \|Y\|_*`, the nuclear norm with the radius as weight.

        Examples:
            >>> SpectralBall(2.0).conjugate().weight
            2.0
        """
        from stableopt.constraints.spectra import NuclearNorm

        return NuclearNorm(self.radius, self.dims) if self.dims is not None else NuclearNorm(self.radius)


def proved_norm(x: Tensor) -> float:
    """Return the proved upper bound of the spectral norm, the same for every memory layout of the same matrix.

    Examples:
        >>> 1.0 <= proved_norm(torch.eye(2)) < 1.0 + 1e-12
        True
    """
    return spectral_norm(_embedded(x.detach()).contiguous()).upper


def is_proved_below(x: Tensor, radius: float) -> bool:
    """Return whether the spectral norm of a finite matrix, real or complex, is proved to be at most ``radius``.

    Examples:
        >>> is_proved_below(torch.tensor([[0.6j, 0.8j]]), 1.0 + 1e-6)
        True
    """
    return norm_is_below(_embedded(x.detach()), radius)


def shrink_until_proved(target: Tensor, radius: float, dtype: torch.dtype) -> Tensor:
    r"""Round a matrix to ``dtype`` so that its spectral norm is proved to be at most ``radius``, scaling it down if needed.

    The result keeps the relative distance :func:`stableopt.linalg.below.relative_slack` (at least :math:`2^{-48}`) from the radius,
    so that proving it again elsewhere, with another order of summation, gives the same answer.

    Args:
        target: float64 or complex128 matrix, finite, with norm about ``radius`` or less.
        radius: limit of the norm, :math:`\ge 0`.
        dtype: float64, float32, bfloat16 or float16; complex128 or complex64 for a complex target.

    Returns:
        New matrix of that dtype.

    Examples:
        >>> A = shrink_until_proved(torch.full((3, 3), 1 / 3, dtype=torch.float64), 1.0, torch.bfloat16)
        >>> spectral_norm(A).upper <= 1.0
        True
    """
    hair = _hair(target)
    limit = radius * (1.0 - hair)
    factor, margin = 1.0, max(hair, torch.finfo(dtype).eps / 8)
    while True:
        candidate = _rounded(target * factor, dtype)
        if is_proved_below(candidate, limit):
            return candidate
        norm = proved_norm(candidate)
        factor *= min(1.0, limit / norm) * (1.0 - margin)
        margin = min(1.0, 2.0 * margin)


def _nearest(W: Tensor, radius: float) -> Tensor:
    """Return a matrix itself if it is proved inside, else its projection, proved; NaN for NaN and infinity."""
    if not math.isfinite(float(_parts(W).abs().amax())):
        return W * math.nan
    if is_proved_below(W, radius):
        return W
    hair = _hair(W)
    # Rounding to the dtype may add to the norm, and the proof needs its distance: aim inside, so that the first try holds.
    level = radius * (1.0 - 2.5 * hair - torch.finfo(W.dtype).eps / 2)
    wide = _embedded(W).double()
    if wide.is_cuda:
        found = project_by_sign(wide, level, W.dtype.to_real())
    else:
        found = project_by_deflation(wide, level, W.dtype.to_real())
    if found is not None:
        candidate = _rounded(_extracted(found) if W.is_complex() else found, W.dtype)
        if bool(_parts(candidate).isfinite().all()) and is_proved_below(candidate, radius * (1.0 - hair)):
            return candidate
    wide = W.to(torch.complex128 if W.is_complex() else torch.float64)
    return shrink_until_proved(apply_to_singular_values(wide, _clip_at(level)), radius, W.dtype)


def _clip_at(radius: float) -> SpectralFunction:
    return lambda sigma: (sigma.clamp_max(radius), (sigma <= radius).to(sigma.dtype))


def _hair(W: Tensor) -> float:
    """Return the relative distance at which a projection stops from the radius."""
    m, n = W.shape
    twice = 2 if W.is_complex() else 1
    return max(_HAIR, relative_slack(twice * m, twice * n))


def _rounded(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to nearest, to the largest finite number where that would overflow."""
    if target.is_complex():
        return torch.view_as_complex(_rounded(torch.view_as_real(target.resolve_conj()), dtype.to_real()).contiguous())
    info = torch.finfo(dtype)
    return target.clamp(info.min, info.max).to(dtype)


def _parts(W: Tensor) -> Tensor:
    return torch.view_as_real(W.resolve_conj()) if W.is_complex() else W


def _embedded(W: Tensor) -> Tensor:
    """Return the real matrix that acts as ``W`` on real and imaginary parts; a real one as it is."""
    if not W.is_complex():
        return W
    A, B = W.real, W.imag
    return torch.cat([torch.cat([A, -B], dim=1), torch.cat([B, A], dim=1)])


def _extracted(E: Tensor) -> Tensor:
    """Return the complex matrix whose embedding is nearest to a real one of twice the size."""
    m, n = E.shape[0] // 2, E.shape[1] // 2
    return torch.complex((E[:m, :n] + E[m:, n:]) / 2, (E[m:, :n] - E[:m, n:]) / 2)


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast does not lower the precision of a norm."""
    kind = x.device.type
    if kind == "meta" or not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


class _Projection(torch.autograd.Function):
    """The projection with its derivative, for which the decomposition is made when a derivative is asked for."""

    @staticmethod
    def forward(x: Tensor, ball: SpectralBall, value: Tensor | None = None) -> Tensor:
        value = ball._projected(x) if value is None else value  # noqa: SLF001
        return value.clone() if value is x else value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.ball = inputs[1]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def derivative(ball: SpectralBall, x: Tensor, direction: Tensor) -> Tensor:
        """Apply the derivative at x, which is its own adjoint, to a direction."""
        if x.numel() == 0:
            return direction
        m = Matrices("SpectralBall", x, ball.dims, complex_too=True)
        d = Matrices("SpectralBall", direction, ball.dims, complex_too=True)
        if not bool(_parts(x).isfinite().all()):
            return direction * math.nan
        tall = m.data.shape[-2] >= m.data.shape[-1]
        W, D = (m.data, d.data) if tall else (m.data.mH, d.data.mH)
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        moved = derivative_along(U, sigma, Vh, *_clip_at(ball.radius)(sigma), D)
        return m.fold(moved if tall else moved.mH).to(x.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:  # noqa: ARG004
        """Project the points of a batch one by one."""
        x, ball = args[:2]
        if in_dims[0] is None:
            return _Projection.apply(x, ball), None
        return torch.stack([_Projection.apply(one, ball) for one in x.unbind(in_dims[0])]), 0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Projection.derivative(ctx.ball, ctx.saved_tensors[0], grad), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return _Projection.derivative(ctx.ball, ctx.saved_tensors[0], tangent)
