r"""Residual blocks whose step obeys a stability limit by construction."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, gram_norm, spectral_norm

__all__ = ["FoldedBlock", "GradientBlock"]

_SMALLEST = 1e-6
"""Floor of the denominator of the step limit, so that a block with a zero weight has a finite step."""


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40.0)  # log(1 + e^40) is 40 in float64: no jump where torch switches to the identity


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,  # slope 0.01
    "tanh": torch.tanh,
    "softplus": _softplus,
    "hardtanh": F.hardtanh,
}
"""Activations with all slopes in [0, 1], which is what the proof needs."""

_NEGATIVE_SLOPES = {"gelu": -0.129, "silu": -0.100, "mish": -0.113, "hardswish": -0.5}


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
        for name, size in (("dim", dim), ("hidden", hidden), ("depth", depth)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {size!r}.")
        if not (math.isfinite(strong) and strong >= 0):
            raise ValueError(f"strong must be finite and >= 0, got {strong!r}.")
        fraction = 1.0 / max(2, depth) if step is None else step
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"step is a fraction of the limit and must lie in (0, 1), got {step!r}.")
        _check_activation(activation)
        self.activation = activation
        self.strong = float(strong)
        self.weight = nn.Parameter(torch.empty(hidden, dim))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.raw_step = nn.Parameter(torch.tensor([math.log(fraction / (1.0 - fraction))]))  # fully_shard wants an axis
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
        weight = self.weight.float() if self.weight.dtype in {torch.float16, torch.bfloat16} else self.weight
        with full_precision(weight):
            U = gram_norm(weight)
        limit = 2.0 / (2.0 * self.strong + U * U).clamp_min(_SMALLEST)
        rank, terms = min(weight.shape), sum(weight.shape)
        slack = 4.0 * (terms + 8) * torch.finfo(weight.dtype).eps + 2.0**-50 * rank * terms  # of the norm, of its proof
        return (1.0 - slack) * limit * self.raw_step[0].to(weight.dtype).sigmoid()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state; the features are the last dimension of the input."""
        branch = F.linear(_ACTIVATIONS[self.activation](F.linear(input, self.weight, self.bias)), self.weight.mT)
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


def full_precision(weight: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast does not lower the precision of a norm.

    Examples:
        >>> with full_precision(torch.ones(1)):
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    kind = weight.device.type
    if kind == "meta" or not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def _check_activation(activation: str) -> None:
    if activation in _NEGATIVE_SLOPES:
        raise ValueError(
            f"activation {activation!r} has slopes down to {_NEGATIVE_SLOPES[activation]}; the bound of a GradientBlock needs "
            f"slopes in [0, 1]. Use one of {', '.join(_ACTIVATIONS)}."
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}.")
