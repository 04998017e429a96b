r"""Residual blocks whose step obeys a stability limit by construction."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, spectral_norm
from stableopt.nn.arguments import check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.residual.gradient_step import GradientStep, gradient_step_factor
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule
from stableopt.nn.weights.geometry import Geometry

__all__ = ["FoldedBlock", "GradientBlock"]

_HOMOGENEOUS = ("relu", "leaky_relu")
r"""Activations with :math:`\sigma(tz) = t\sigma(z)` for :math:`t \ge 0`, which take a step per unit into the weight."""


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


class GradientBlock(GradientStep):
    r"""Residual block that takes a gradient step on a convex function, hence never expands.

    .. math::
        h \mapsto h - \tau\,\bigl(m h + A^\top \sigma(A h + b)\bigr), \qquad
        \tau = \operatorname{sigmoid}(r)\, \frac{2}{2m + U^2}, \quad U \ge \|A\|_2 .

    With slopes of :math:`\sigma` in [0, 1] the Jacobian is symmetric with spectrum in
    :math:`[1 - \tau m - \tau\|A\|_2^2,\; 1 - \tau m]`, so the Lipschitz constant is at most :math:`1 - \tau m \le 1` for every
    value of the parameters :math:`A, b, r`. The limit is sharp: just past it, a bias that makes all units active gives an
    expansion.

    With ``bound="rows"`` every hidden unit has a step of its own, no norm is needed, and

    .. math::
        h \mapsto (1 - \tau m)\, h - A^\top S\,\sigma(A h + b), \qquad
        s_i = \operatorname{sigmoid}(r_i)\, \frac{2}{2m + \sum_j |AA^\top|_{ij}\, q_j/q_i}

    with learned :math:`q > 0` and a learned :math:`\tau \le 2/(2m + \max_i \sum_j |AA^\top|_{ij}\, q_j/q_i)`. The spectrum
    lies in :math:`[1 - \tau m - \|S^{1/2}A\|_2^2,\; 1 - \tau m]`, and :math:`2\tau m + \|S^{1/2}A\|_2^2 \le 2` by Gershgorin's
    theorem (proof: :mod:`stableopt.nn.residual.per_unit`); without damping, at full steps, it is :class:`stableopt.nn.SLL`.

    Args:
        dim: number of features of input and output.
        hidden: rows of :math:`A`; None for ``dim``.
        depth: number of blocks in the stack. The initial step is the fraction :math:`1/\max(2, \text{depth})` of its limit:
            with larger steps a deep stack contracts everything at the start and never learns.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.
        strong: :math:`m \ge 0`, the strength of the linear damping.
        step: initial step as a fraction of its limit, in (0, 1); None for the one that fits the depth.
        bound: how :math:`U` is computed. ``"gram"``: Gram iteration, 3 % above the norm for 64 units that are orthogonal and less
            for others; ``"frobenius"`` and ``"schur"`` (:math:`U^2 = \|A\|_1\|A\|_\infty`): hardly any cost, and steps that
            are smaller by the rank, and for random entries by 60 times with 256 units. ``"rows"``: a step per unit, for the
            cost of one product :math:`AA^\top`.
        limit_gradient: whether the backward pass goes through the limit of the step. False takes the limit as a constant there,
            which halves the cost of ``"gram"`` and is no gradient of the loss any more; the bound does not depend on it.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Note:
        :math:`U` is an upper bound in exact arithmetic, and the step is shrunk by a small multiple of the machine precision
        against rounding. What is proved about the stored numbers is said by :func:`stableopt.nn.lipschitz`; in the maximum norm
        and its dual that is more than 1. The denominator has a floor of 1e-6 (rows: 1e-8). The branch is in the dtype of the
        input; the step is computed in at least float32, and steps per unit are rounded down to the dtype of the weight.

    References:
        Meunier, Delattre, Araujo and Allauzen, *A Dynamical System Perspective for Lipschitz Neural Networks*, 2022; Baillon and
        Haddad, 1977 (the limit); Araujo, Havens, Delattre, Allauzen and Hu, *A Unified Algebraic Perspective on Lipschitz Neural
        Networks*, 2023 (steps from row sums).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> block = GradientBlock(4, 8, depth=16)
        >>> x, y = torch.randn(4), torch.randn(4)
        >>> bool((block(x) - block(y)).norm() <= (x - y).norm())
        True
        >>> block = GradientBlock(2, step=0.25)
        >>> _ = torch.nn.init.eye_(block.weight)
        >>> bool(0.48 < block.step_size() <= 0.5)  # a quarter of 2 / |I|^2, up to the excess of the Gram iteration
        True
        >>> GradientBlock(2, strong=1.0, bound="rows").step_sizes().round(decimals=3)  # half of 2 / (2 m + 1)
        tensor([0.3330, 0.3330], grad_fn=...)
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
        bound: str = "gram",
        limit_gradient: bool = True,
    ) -> None:
        hidden = dim if hidden is None else hidden
        check_sizes(dim=dim, hidden=hidden)
        super().__init__(
            torch.empty(hidden, dim),
            Geometry("linear"),
            depth=depth,
            activation=activation,
            strong=strong,
            step=step,
            bound=bound,
            limit_gradient=limit_gradient,
        )

    def _linear(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        return F.linear(input, self.weight, self.bias)

    def _adjoint(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight.mT)

    def _per_unit(self, steps: Tensor) -> Tensor:
        return steps

    def folded(self) -> FoldedBlock:
        r"""Return the current numbers with the step rounded down until :math:`\tau(2m + \|A\|_2^2) \le 2` is proved.

        Steps per unit go into the weight where the activation is positively homogeneous:
        :math:`s\,\sigma(z) = \sqrt s\,\sigma(\sqrt s z)`. The step is then 1 and the damping :math:`\tau m`.

        Returns:
            Copies of weight and bias, the step, the damping and the name of the activation. The step differs from
            :meth:`step_size` only if that one exceeds the proved limit.

        Raises:
            UncertifiableError: with ``bound="rows"``, if the activation is not positively homogeneous.
            ValueError: if a parameter is NaN or infinite.

        Examples:
            >>> block = GradientBlock(3)
            >>> folded = block.folded()
            >>> (folded.tau * spectral_norm(folded.weight) ** 2).upper <= 2.0
            True
        """
        with torch.no_grad():
            weight, bias, tau, strong = self._numbers()
        if not (math.isfinite(tau) and math.isfinite(strong) and bool(bias.isfinite().all())):
            raise ValueError(f"a GradientBlock with NaN or infinite parameters cannot be folded (step {tau}).")
        curvature = Bound.point(strong) * 2 + Bound.point(spectral_norm(weight).upper) ** 2
        if curvature.upper > 0:
            tau = min(tau, (2.0 / Bound.point(curvature.upper)).lower)  # rounded down, so the product is at most 2
        return FoldedBlock(weight, bias, tau, strong, self.activation)

    def _numbers(self) -> tuple[Tensor, Tensor, float, float]:
        """Return weight, bias, step and damping of the block with a single step that computes the same."""
        if self.bound != "rows":
            return self.weight.clone(), self.bias.clone(), float(self.step_size()), self.strong
        if self.activation not in _HOMOGENEOUS:
            raise UncertifiableError(
                f"a certificate has one step per block, and steps per unit go into the weight only with "
                f"{' or '.join(_HOMOGENEOUS)}, got {self.activation}. Use one of these, or bound='gram'."
            )
        root = self.step_sizes().sqrt()
        return root[:, None] * self.weight, root * self.bias, 1.0, float(self.damping())

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        hidden, dim = self.weight.shape
        return f"{dim}, {hidden}, {self._settings()}"


@lipschitz_rule.register(GradientBlock)
def _gradient_block(module: GradientBlock, norm: str) -> Bound:
    return gradient_step_factor(module, norm)


@uniform_rule.register(GradientBlock)
def _uniform(module: GradientBlock, norm: str) -> Bound | None:  # noqa: ARG001 true for every strength
    return Bound(0.0, 1.0) if norm in {"l2", TOKEN_MAX} else None


@token_rule.register(GradientBlock)
def _token(module: GradientBlock) -> Bound:
    return gradient_step_factor(module, "l2")
