r"""The explicit step of a damped skew flow, with its limit."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, gram_norm, inf_norm, lower, one_norm, spectral_norm, upper
from stableopt.nn.arguments import check_positive, check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.isometric.skew import check_finite, draw_skew
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.steps import initial_fraction, raw_fraction, rounding_slack
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule
from stableopt.theory import skew_damped_factor, skew_damped_max_step

__all__ = ["SkewEulerBlock"]


class SkewEulerBlock(nn.Module):
    r"""Explicit Euler step of a damped skew flow, with its step below its limit.

    .. math::
        x \mapsto x + h\,(Kx - \gamma x) + b, \qquad K = V - V^\top, \qquad
        h = \operatorname{sigmoid}(r)\,\frac{2\gamma}{\gamma^2 + U^2}, \quad U \ge \|K\|_2 .

    :math:`\|(I + h(K - \gamma I))x\|^2 = (1 - h\gamma)^2\|x\|^2 + h^2\|Kx\|^2`, so the norm is
    :math:`\sqrt{(1 - h\gamma)^2 + h^2\|K\|^2}`, at most 1 if and only if :math:`h \le 2\gamma/(\gamma^2 + \|K\|^2)`. Without
    damping it expands at every step; the rotation of a :class:`SkewBlock` does not.

    Args:
        dim: number of features of input and output.
        damping: :math:`\gamma > 0`.
        depth: number of blocks in the stack. The initial step is the fraction :math:`1/\max(2, \text{depth})` of its limit.
        step: initial step as a fraction of its limit, in (0, 1); None for the one that fits the depth.
        bias: whether there is a :math:`b`.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        :math:`U` comes from Gram iteration, as in :class:`stableopt.nn.GradientBlock`, and the step is shrunk against rounding. The
        law is that of a *linear* block; see the trap in :class:`SkewBlock`.

    References:
        Haber and Ruthotto, *Stable Architectures for Deep Neural Networks*, 2017; Chang, Chen, Haber and Chi, *AntisymmetricRNN*,
        2019 (both without the limit).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> block = SkewEulerBlock(4, damping=0.5)
        >>> bool(
        ...     spectral_norm(
        ...         torch.eye(4) + block.step_size() * (block.skew - block.skew.mT - 0.5 * torch.eye(4))
        ...     ).upper
        ...     <= 1.0
        ... )
        True
    """

    bias: nn.Parameter | None

    def __init__(
        self, dim: int, damping: float, *, depth: int = 1, step: float | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        check_sizes(dim=dim)
        check_positive(damping=damping)
        self.damping = float(damping)
        self.skew = nn.Parameter(torch.empty(dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.raw_step = raw_fraction(initial_fraction(step, depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new skew matrix of norm about 1 and set the bias to zero; the step stays."""
        draw_skew(self.skew)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def step_size(self) -> Tensor:
        """Return the step :math:`h` that ``forward`` uses now, a 0-d tensor, at least float32."""
        K = wide(self.skew - self.skew.mT)
        with full_precision(K):
            U = gram_norm(K)
        limit = 2.0 / (self.damping + U * (U / self.damping))
        return (1.0 - rounding_slack(K)) * limit * self.raw_step[0].to(K.dtype).sigmoid()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state; the features are the last dimension of the input."""
        output = input + self.step_size() * (F.linear(input, self.skew - self.skew.mT) - self.damping * input)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{len(self.skew)}, damping={self.damping}, bias={self.bias is not None}"


@lipschitz_rule.register(SkewEulerBlock)
def _skew_euler_block(module: SkewEulerBlock, norm: str) -> Bound:
    r"""Enclose the norm: :math:`\sqrt{(1 - h\gamma)^2 + h^2\|K\|^2}` in l2, :math:`|1 - h\gamma| + h\|K\|` in linf and l1."""
    check_finite(module)
    with torch.no_grad():
        K, h, gamma = module.skew - module.skew.mT, float(module.step_size()), module.damping
    if not math.isfinite(h):
        raise ValueError(f"no bound holds for a SkewEulerBlock whose step is {h}; its skew matrix is too large.")
    if norm != "l2":
        return abs(1.0 - Bound.point(h) * gamma) + h * {"linf": inf_norm, "l1": one_norm}[norm](K)
    omega = spectral_norm(K)
    factor = skew_damped_factor(Bound.point(h), gamma, omega)
    largest = 1.0 if h <= skew_damped_max_step(gamma, omega) else math.inf
    return Bound(min(lower(factor), largest), min(upper(factor), largest))


@uniform_rule.register(SkewEulerBlock)
def _uniform(module: SkewEulerBlock, norm: str) -> Bound:
    rows = Bound.point(1.0 if norm in {"l2", TOKEN_MAX} else float(len(module.skew)))
    return Bound(0.0, rows.sqrt().upper)


@token_rule.register(SkewEulerBlock)
def _token(module: SkewEulerBlock) -> Bound:
    return _skew_euler_block(module, "l2")
