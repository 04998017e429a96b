r"""Residual blocks whose step obeys a stability limit by construction."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, gram_norm, inf_norm, one_norm, spectral_norm
from stableopt.nn.arguments import check_nonnegative, check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.steps import initial_fraction, raw_fraction, rounding_slack
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule
from stableopt.nn.unit_slopes import UNIT_SLOPES, check_unit_slopes

__all__ = ["FoldedBlock", "GradientBlock"]

_SMALLEST = 1e-6
"""Floor of the denominator of the step limit, so that a block with a zero weight has a finite step."""


class FoldedBlock(NamedTuple):
    r"""The numbers of a :class:`GradientBlock` for a certificate, :math:`\tau(2m + \|A\|_2^2) \le 2` proved for them.

    Examples:
        >>> GradientBlock(2, strong=0.5).folded().strong
        0.5
    """

    weight: Tensor
    bias: Tensor
    tau: float
    strong: float
    activation: str


class GradientBlock(nn.Module):
    r"""Residual block that takes a gradient step on a convex function, hence never expands.

    .. math::
        h \mapsto h - \tau\,\bigl(m h + A^\top \sigma(A h + b)\bigr), \qquad
        \tau = \operatorname{sigmoid}(r)\, \frac{2}{2m + U^2}, \quad U \ge \|A\|_2 .

    With slopes of :math:`\sigma` in [0, 1] the Jacobian is symmetric with spectrum in
    :math:`[1 - \tau m - \tau\|A\|_2^2,\; 1 - \tau m]`, so the Lipschitz constant is at most :math:`1 - \tau m \le 1` for every
    value of the parameters :math:`A, b, r`. The limit is sharp: just past it, a bias that makes all units active gives an
    expansion.

    Args:
        dim: number of features of input and output.
        hidden: rows of :math:`A`; None for ``dim``.
        depth: number of blocks in the stack. The initial step is the fraction :math:`1/\max(2, \text{depth})` of its limit:
            with larger steps a deep stack contracts everything at the start and never learns.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.
        strong: :math:`m \ge 0`, the strength of the linear damping.
        step: initial step as a fraction of its limit, in (0, 1); None for the one that fits the depth.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Note:
        :math:`U` comes from Gram iteration, an upper bound in exact arithmetic, and the step is shrunk by a small multiple of the
        machine precision against rounding. What is proved about the stored numbers is said by :func:`stableopt.nn.lipschitz`.
        The denominator has a floor of 1e-6. The branch is in the dtype of the input; the step is computed in at least float32.

    References:
        Meunier, Delattre, Araujo and Allauzen, *A Dynamical System Perspective for Lipschitz Neural Networks*, 2022; Baillon and
        Haddad, 1977 (the limit).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> block = GradientBlock(4, 8, depth=16)
        >>> x, y = torch.randn(4), torch.randn(4)
        >>> bool((block(x) - block(y)).norm() <= (x - y).norm())
        True
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        depth: int = 1,
        activation: str = "relu",
        strong: float = 0.0,
        step: float | None = None,
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        check_sizes(dim=dim, hidden=hidden)
        check_nonnegative(strong=strong)
        fraction = initial_fraction(step, depth)
        check_unit_slopes(activation, "GradientBlock")
        self.activation = activation
        self.strong = float(strong)
        self.weight = nn.Parameter(torch.empty(hidden, dim))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.raw_step = raw_fraction(fraction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new weight with orthonormal rows or columns and set the bias to zero; the step stays."""
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)

    def step_size(self) -> Tensor:
        r"""Return the step :math:`\tau` that ``forward`` uses now, a 0-d tensor, at least float32 and differentiable.

        Examples:
            >>> block = GradientBlock(2, step=0.25)
            >>> _ = nn.init.eye_(block.weight)
            >>> bool(
            ...     0.45 < block.step_size() <= 0.5
            ... )  # a quarter of 2 / ||I||^2, up to the excess of the Gram iteration
            True
        """
        weight = wide(self.weight)
        with full_precision(weight):
            U = gram_norm(weight)
        limit = 2.0 / (2.0 * self.strong + U * U).clamp_min(_SMALLEST)
        return (1.0 - rounding_slack(weight)) * limit * self.raw_step[0].to(weight.dtype).sigmoid()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state; the features are the last dimension of the input."""
        branch = F.linear(UNIT_SLOPES[self.activation](F.linear(input, self.weight, self.bias)), self.weight.mT)
        if self.strong:
            branch = branch + self.strong * input
        return input - self.step_size() * branch

    def folded(self) -> FoldedBlock:
        r"""Return the current numbers with the step rounded down until :math:`\tau(2m + \|A\|_2^2) \le 2` is proved.

        Returns:
            Copies of weight and bias, the step, the damping and the name of the activation. The step differs from
            :meth:`step_size` only if that one exceeds the proved limit.

        Raises:
            ValueError: if a parameter is NaN or infinite.

        Examples:
            >>> block = GradientBlock(3)
            >>> folded = block.folded()
            >>> (folded.tau * spectral_norm(folded.weight) ** 2).upper <= 2.0
            True
        """
        with torch.no_grad():
            weight, bias, tau = self.weight.detach().clone(), self.bias.detach().clone(), float(self.step_size())
        if not (math.isfinite(tau) and bool(bias.isfinite().all())):
            raise ValueError(f"a GradientBlock with NaN or infinite parameters cannot be folded (step {tau}).")
        curvature = Bound.point(self.strong) * 2 + Bound.point(spectral_norm(weight).upper) ** 2
        if curvature.upper > 0:
            tau = min(tau, (2.0 / Bound.point(curvature.upper)).lower)  # rounded down, so the product is at most 2
        return FoldedBlock(weight, bias, tau, self.strong, self.activation)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        hidden, dim = self.weight.shape
        return f"{dim}, {hidden}, activation={self.activation!r}, strong={self.strong}"


@lipschitz_rule.register(GradientBlock)
def _gradient_block(module: GradientBlock, norm: str) -> Bound:
    r"""Bound :math:`I - \tau(mI + A^\top D A)`, :math:`0 \preceq D \preceq I`.

    In l2 by the ends of its spectrum, in linf and l1 by :math:`|1 - \tau m| + \tau\|A^\top\|_\infty\|A\|_\infty` (loose, above 1).
    """
    tau = float(module.step_size().detach())
    if not math.isfinite(tau) or not bool(module.bias.isfinite().all()):
        raise ValueError(f"no bound holds for a GradientBlock with NaN or infinite parameters (step {tau}).")
    smallest = abs(1.0 - Bound.point(tau) * module.strong)
    if norm != "l2":
        return Bound(0.0, (smallest + tau * one_norm(module.weight) * inf_norm(module.weight)).upper)
    U = spectral_norm(module.weight).upper
    largest = abs(1.0 - Bound.point(tau) * (Bound.point(module.strong) + Bound.point(U) ** 2))
    return Bound(0.0, smallest.join(largest).upper)


@uniform_rule.register(GradientBlock)
def _uniform(module: GradientBlock, norm: str) -> Bound | None:  # noqa: ARG001 true for every strength
    return Bound(0.0, 1.0) if norm in {"l2", TOKEN_MAX} else None


@token_rule.register(GradientBlock)
def _token(module: GradientBlock) -> Bound:
    return _gradient_block(module, "l2")
