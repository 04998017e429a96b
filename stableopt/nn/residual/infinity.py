r"""Blocks under the exact law of the maximum norm (T3f): row sums instead of spectral norms, one step for each neuron."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, conv_norm, spectral_norm
from stableopt.linalg.proved import gamma
from stableopt.nn.arguments import check_nonnegative, check_positive, check_sizes
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.fields import Field, FieldBound, check_field, damped_bound, lipschitz_of_field
from stableopt.nn.residual.steps import initial_fraction, raw_fraction
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule
from stableopt.nn.unit_slopes import UNIT_SLOPES, check_unit_slopes
from stableopt.theory import leaky_infinity_max_step

__all__ = ["InfNormBlock", "InfNormField"]

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class InfNormField(Field):
    r"""A leaky field that does not expand in the maximum norm, and contracts at a rate if asked to.

    .. math::
        f(h) = -c\,h + \varphi(A h + b), \qquad
        a_{ii} = c - m - \sum_{j \ne i} |a_{ij}| - \log(1 + e^{w_{ii}}), \quad a_{ij} = w_{ij} \; (j \ne i)

    With slopes of :math:`\varphi` in [0, 1] its derivative is :math:`-cI + DA`, and :math:`\mu_\infty(DA) \le \max(\mu_\infty(A),
    0) \le c - m` for every :math:`0 \preceq D \preceq I`: a slope only shrinks a row. So :math:`-m` bounds the logarithmic norm,
    for every matrix :math:`w`, and every A with :math:`\mu_\infty(A) < c - m` has such a :math:`w`.

    With ``kernel_size``, A is a convolution with zero padding that keeps the size; a row then is a kernel of one output channel
    and :math:`a_{ii}` its middle tap of its own channel. A pixel near the border sees a part of the row, so the law
    holds for images of every size.

    Args:
        dim: number of features, or of channels.
        kernel_size: None for a dense matrix; for a convolution the odd sizes of its kernel along each of one to three axes, a
            single number for images with two axes.
        decay: :math:`c > 0`.
        rate: :math:`m`, from 0 to c.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Attributes:
        weight: :math:`w`, of shape ``(dim, dim)`` or ``(dim, dim, *kernel)``.
        bias: :math:`b`.

    Note:
        The sums are computed in at least float32, and the diagonal is rounded down to the dtype of the weight, so that the law
        holds for the numbers that are used.

    References:
        Jafarpour, Davydov, Proskurnikov and Bullo, *Robust Implicit Networks via Non-Euclidean Contractions*, 2021 (the
        parametrization).

    Examples:
        >>> bound = InfNormField(3, rate=0.25).bound("linf")
        >>> bound.rate.lower >= 0.25, bound.max_step > 0.5
        (True, True)
    """

    norm = "linf"

    def __init__(
        self,
        dim: int,
        kernel_size: int | Sequence[int] | None = None,
        *,
        decay: float = 1.0,
        rate: float = 0.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        check_sizes(dim=dim)
        check_positive(decay=decay)
        check_nonnegative(rate=rate)
        check_unit_slopes(activation, type(self).__name__)
        if rate > decay:
            raise ValueError(f"rate must lie in [0, decay], got rate={rate!r} and decay={decay!r}.")
        self.dim, self.decay, self.rate, self.activation = dim, float(decay), float(rate), activation
        self.kernel = _kernel(kernel_size)
        self.weight = nn.Parameter(torch.empty(dim, dim, *self.kernel))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights whose row sums are near 1/2, with the diagonal in the middle of its range, and set the bias to zero."""
        terms = math.prod(self.weight.shape[1:])
        nn.init.normal_(self.weight, std=0.6 / terms)
        nn.init.zeros_(self.bias)

    def matrix(self) -> Tensor:
        r"""Return A as the map uses it, in the shape and dtype of the weight, with its diagonal rounded down.

        Examples:
            >>> A = InfNormField(3).matrix()
            >>> bool((A.diagonal() + (A - A.diagonal().diag()).abs().sum(1) <= 1.0).all())
            True
        """
        weight = wide(self.weight).view(self.dim, self.dim, -1)
        middle = weight.shape[2] // 2
        raw = weight[..., middle].diagonal()
        with full_precision(weight):
            off = _with_diagonal(weight, torch.zeros_like(raw))
            sums, push = off.abs().sum((1, 2)), F.softplus(raw)
            diagonal = (self.decay - self.rate) - sums - push
            terms = 2.0 * (weight[0].numel() + 8) * torch.finfo(weight.dtype).eps
            lost = terms * (self.decay + sums + push) + torch.finfo(self.weight.dtype).eps * diagonal.abs()
            A = _with_diagonal(weight, diagonal - lost)
        return A.to(self.weight.dtype).view_as(self.weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the field at the states; features are the last dimension, channels of a convolution the first of one item."""
        return self._at(input, self.matrix())

    def step_limit(self) -> Tensor:
        r"""Return the smallest of :meth:`step_limits`, the limit of one step for all neurons.

        Examples:
            >>> bool(InfNormField(3).step_limit() <= 1.0)
            True
        """
        return self.step_limits(self.matrix()).amin()

    def step_limits(self, matrix: Tensor) -> Tensor:
        r"""Return :math:`1/(c - \min(a_{ii}, 0))` for each neuron, less a slack for rounding, in at least float32.

        Args:
            matrix: :math:`A`, from :meth:`matrix`.

        Examples:
            >>> field = InfNormField(3, decay=2.0)
            >>> bool((field.step_limits(field.matrix()) <= 0.5).all())
            True
        """
        A = wide(matrix).view(self.dim, self.dim, -1)
        slack = 16.0 * torch.finfo(A.dtype).eps
        return (1.0 - slack) / (self.decay - A[..., A.shape[2] // 2].diagonal().clamp_max(0.0))

    @torch.no_grad()
    def bound(self, norm: str) -> FieldBound:
        """Return rate, Lipschitz constant and step law, proved for the stored numbers.

        Args:
            norm: ``"linf"``, where everything is sharp, ``"l2"`` or ``"l1"``, where only the decay counts.

        Examples:
            >>> InfNormField(3, rate=0.5).bound("linf").rate.lower >= 0.5
            True
        """
        law = RowLaw(self.matrix(), self.decay)
        c = Bound.point(self.decay)
        if norm != "linf":
            return damped_bound(norm, c, law.norm(norm))
        rate = c - max(law.log_norm(), 0.0)
        diagonal = law.diagonal.tolist()
        lipschitz = max((abs(c - a) + s).upper for a, s in zip(diagonal, law.row_sums, strict=True))
        return FieldBound(
            norm,
            rate,
            Bound(0.0, max(self.decay, lipschitz)),
            leaky_infinity_max_step(self.decay, law.diagonal),
            lambda step: law.linf([step] * self.dim),
        )

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        kernel = f", kernel_size={self.kernel}" if self.kernel else ""
        return f"{self.dim}{kernel}, decay={self.decay}, rate={self.rate}, activation={self.activation!r}"

    def _at(self, input: Tensor, matrix: Tensor) -> Tensor:  # noqa: A002
        if not self.kernel:
            moved = F.linear(input, matrix, self.bias)
        else:
            convolve = _CONVOLUTIONS[len(self.kernel) - 1]
            moved = convolve(input, matrix, self.bias, padding=[k // 2 for k in self.kernel])
        return UNIT_SLOPES[self.activation](moved) - self.decay * input


class InfNormBlock(nn.Module):
    r"""Residual block that does not expand in the maximum norm: an Euler step of an :class:`InfNormField`, one step per neuron.

    .. math::
        h_i \mapsto h_i + \tau_i\,\bigl(-c\,h_i + \varphi(A h + b)_i\bigr), \qquad
    \tau_i = \frac{\operatorname{sigmoid}(r_i)}{c - \min(a_{ii}, 0)}

    **Proof.** With a slope d in [0, 1], row i of the derivative has :math:`1 - \tau_i(c - d\,a_{ii}) \ge 0` on the diagonal, so its
    absolute sum is :math:`1 - \tau_i\bigl(c - d\,(a_{ii} + \sum_{j\ne i}|a_{ij}|)\bigr) \le 1 - \tau_i\,m`, exactly, without
    a square of a Lipschitz constant and without a spectral norm. For a convolution it is the same for every size of the image.

    Args:
        dim: number of features, or of channels.
        kernel_size: None for a dense matrix; for a convolution the odd sizes of its kernel along each of one to three axes, a
            single number for images with two axes.
        decay: :math:`c > 0`.
        rate: :math:`m`, from 0 to c; with 0 the constant is 1, else the largest :math:`1 - \tau_i m`.
        depth: number of blocks in the stack; the initial steps are the fraction :math:`1/\max(2, \text{depth})` of their limits.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.
        step: initial step as a fraction of its limit, in (0, 1); None for the one that fits the depth.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Note:
        The promise is one of linf, for perturbations of every entry. In l2 and l1 the constant can be above 1.

    References:
        Jafarpour et al., 2021 (the law of the field); Desoer and Haneda, 1972.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> block = InfNormBlock(4, depth=16)
        >>> x, y = torch.randn(4), torch.randn(4)
        >>> bool((block(x) - block(y)).abs().max() <= (x - y).abs().max())
        True
        >>> images = InfNormBlock(3, kernel_size=3)(torch.zeros(1, 3, 8, 8))
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int | Sequence[int] | None = None,
        *,
        decay: float = 1.0,
        rate: float = 0.0,
        depth: int = 1,
        activation: str = "relu",
        step: float | None = None,
    ) -> None:
        super().__init__()
        self.field = InfNormField(dim, kernel_size, decay=decay, rate=rate, activation=activation)
        self.raw_step = raw_fraction(initial_fraction(step, depth), dim)

    def step_sizes(self) -> Tensor:
        r"""Return the steps :math:`\tau_i` as ``forward`` uses them: in the dtype of the weight, rounded down, differentiable.

        Examples:
            >>> bool((InfNormBlock(3, step=0.5).step_sizes() <= 0.5).all())
            True
        """
        return self._steps(self.field.matrix())

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state; the features are the last dimension, the channels of a convolution the first of one item."""
        A = self.field.matrix()
        steps = self._steps(A).view(-1, *[1] * len(self.field.kernel))
        return input + steps * self.field._at(input, A)  # noqa: SLF001 the field computes its matrix once for both

    def _steps(self, matrix: Tensor) -> Tensor:
        limits = self.field.step_limits(matrix)
        steps = limits * self.raw_step.to(limits.dtype).sigmoid()
        stored = torch.finfo(matrix.dtype)
        room = stored.smallest_normal * stored.eps  # a step among the subnormal numbers is rounded by a part of this
        return (steps * (1.0 - stored.eps) - room).clamp_min(0.0).to(matrix.dtype)


class RowLaw:
    r"""The sums of a stored matrix that say what a step does.

    .. math:: \operatorname{diag}(1 - \tau_i c) + \operatorname{diag}(\tau_i d_i)\,A, \qquad d_i \in [0, 1] .

    Absolute sums are convex in each slope d in [0, 1]: the largest is at an end. All sums are rounded up.

    Args:
        matrix: the matrix or kernel, the output channels first.
        decay: c.

    Examples:
        >>> law = RowLaw(torch.tensor([[-1.0, 0.5], [0.0, 0.5]]), 1.0)
        >>> round(law.linf([Bound.point(0.5)] * 2).upper, 9), round(law.l1([Bound.point(0.5)] * 2).upper, 9)
        (0.75, 1.0)
    """

    def __init__(self, matrix: Tensor, decay: float) -> None:
        if not bool(matrix.isfinite().all()):
            raise ValueError("no bound holds for an InfNormField whose matrix holds NaN or infinity.")
        kernel = matrix.detach().double().cpu()
        taps = kernel.flatten(2).numpy() if kernel.ndim > 2 else kernel.unsqueeze(2).numpy()
        n, self.decay, self.matrix = len(taps), decay, matrix
        own = taps[:, :, taps.shape[2] // 2]
        self.diagonal = np.diagonal(own).copy()
        off = np.abs(taps)
        off[np.arange(n), np.arange(n), taps.shape[2] // 2] = 0.0
        self._up = 1.0 + gamma(taps[0].size + n + 8)
        self.blocks = off.sum(axis=2)
        self.row_sums: list[float] = (self.blocks.sum(axis=1) * self._up).tolist()

    def log_norm(self) -> float:
        r"""Return :math:`\max_i (a_{ii} + \sum_{j\ne i}|a_{ij}|)`, rounded up."""
        sums = zip(self.diagonal.tolist(), self.row_sums, strict=True)
        return max((Bound.point(a) + s).upper for a, s in sums)

    def norm(self, norm: str) -> Bound:
        """Return a bound of the norm of A in l2 or l1, from 0."""
        columns = float((self.blocks.sum(axis=0) * self._up + np.abs(self.diagonal)).max() * self._up)
        if norm == "l1":
            return Bound(0.0, columns)
        exact = spectral_norm(self.matrix) if self.matrix.ndim == 2 else conv_norm(self.matrix)
        return Bound(0.0, exact.upper)

    def linf(self, steps: Sequence[Bound]) -> Bound:
        """Bound the largest row sum of the step."""
        rows = zip(steps, self.diagonal.tolist(), self.row_sums, strict=True)
        return Bound(0.0, max(max(self._idle(t), self._row(t, a, s)) for t, a, s in rows))

    def l1(self, steps: Sequence[Bound]) -> Bound:
        """Bound the largest column sum of the step; the slopes of different rows are independent."""
        taus = np.array([t.upper for t in steps])
        sums: list[float] = (taus @ self.blocks * self._up).tolist()
        columns = zip(steps, self.diagonal.tolist(), sums, strict=True)
        return Bound(
            0.0, max((Bound.point(max(self._idle(t), self._diagonal(t, a).upper)) + s).upper for t, a, s in columns)
        )

    def l2(self, steps: Sequence[Bound]) -> Bound:
        """Bound the spectral norm of the step, by the root of the product of the other two or by its parts."""
        product = (self.l1(steps) * self.linf(steps)).sqrt().upper
        parts = Bound.point(max(self._idle(t) for t in steps)) + max(t.upper for t in steps) * self.norm("l2")
        return Bound(0.0, min(product, parts.upper))

    def _idle(self, step: Bound) -> float:
        return abs(1.0 - step * self.decay).upper

    def _row(self, step: Bound, entry: float, others: float) -> float:
        """Return the absolute sum of a row with slope 1; with the step in one place, rounding does not lift it above 1."""
        left = Bound.point(self.decay) - entry
        if (1.0 - step * left).lower >= 0.0:
            return (1.0 - step * (left - others)).upper
        return (self._diagonal(step, entry) + step * others).upper

    def _diagonal(self, step: Bound, entry: float) -> Bound:
        return abs(1.0 - step * (Bound.point(self.decay) - entry))


def _with_diagonal(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Return a kernel of shape ``(n, n, taps)`` with other middle taps of the own channels."""
    middle = weight.shape[2] // 2
    return torch.select_scatter(weight, torch.diagonal_scatter(weight[..., middle], diagonal), 2, middle)


def _kernel(kernel_size: int | Sequence[int] | None) -> tuple[int, ...]:
    if kernel_size is None:
        return ()
    sizes = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
    if not 1 <= len(sizes) <= 3 or any(
        not isinstance(k, int) or isinstance(k, bool) or k < 1 or k % 2 == 0 for k in sizes
    ):
        raise ValueError(f"kernel_size must be one to three odd numbers >= 1, or None, got {kernel_size!r}.")
    return sizes


@lipschitz_rule.register(InfNormBlock)
def _inf_norm(module: InfNormBlock, norm: str) -> Bound:
    check_field(module.field)
    steps = module.step_sizes().detach()
    if not bool(steps.isfinite().all() & module.field.bias.isfinite().all()):
        raise ValueError("no bound holds for an InfNormBlock with NaN or infinite parameters.")
    law = RowLaw(module.field.matrix(), module.field.decay)
    bounds = [Bound.point(t) for t in steps.double().tolist()]
    return {"linf": law.linf, "l1": law.l1, "l2": law.l2}[norm](bounds)


@uniform_rule.register(InfNormBlock)
def _uniform(module: InfNormBlock, norm: str) -> Bound | None:
    check_field(module.field)
    return Bound(0.0, 1.0) if norm == "linf" else None


@token_rule.register(InfNormBlock)
def _token(module: InfNormBlock) -> Bound:
    _refuse_mixing(module.field)
    return _inf_norm(module, "l2")


lipschitz_rule.register(InfNormField)(lipschitz_of_field)


@token_rule.register(InfNormField)
def _field_token(module: InfNormField) -> Bound:
    _refuse_mixing(module)
    return lipschitz_of_field(module, "l2")


def _refuse_mixing(field: InfNormField) -> None:
    if field.kernel:
        raise UncertifiableError(
            "a convolution mixes the entries of different tokens, so it has no token_max bound; use linf."
        )
