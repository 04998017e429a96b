r"""What the dense and the convolutional gradient block share: the step, its limit and the proof for the stored numbers."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound
from stableopt.nn.arguments import check_nonnegative
from stableopt.nn.positive import bounded_exp
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.per_unit import (
    UnitSteps,
    damped_factor,
    rounding_of_rows,
    row_curvature,
    row_factor,
    scaled_rows,
    unit_steps,
)
from stableopt.nn.residual.steps import floored, initial_fraction, raw_fraction, rounding_slack
from stableopt.nn.unit_slopes import UNIT_SLOPES, check_unit_slopes
from stableopt.nn.weights.geometry import Geometry

__all__ = ["BOUNDS", "GradientStep", "gradient_step_factor"]

BOUNDS = ("gram", "frobenius", "schur", "rows")
"""How the limit of the step is computed in training; all are upper bounds, from the tightest to the cheapest, and per unit."""


class GradientStep(nn.Module):
    r"""A gradient step on a convex function of the state, :math:`h \mapsto h - \tau(mh + A^\top\sigma(Ah + b))`.

    A subclass says what the operator :math:`A` of its ``weight`` and ``bias`` is, and the exact adjoint of it.

    Args:
        weight: an empty tensor; its first axis counts the hidden units.
        geometry: the operator it is.
        depth: number of blocks in the stack.
        activation: name of :math:`\sigma`, with slopes in [0, 1].
        strong: :math:`m \ge 0`.
        step: initial step as a fraction of its limit; None for the one that fits the depth.
        bound: one of :data:`BOUNDS`.
        limit_gradient: whether the backward pass goes through the limit.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].
    """

    weight: Tensor
    bias: Tensor
    raw_q: Tensor | None
    raw_damping: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        geometry: Geometry,
        *,
        depth: int,
        activation: str,
        strong: float,
        step: float | None,
        bound: str,
        limit_gradient: bool,
    ) -> None:
        super().__init__()
        check_nonnegative(strong=strong)
        fraction = initial_fraction(step, depth)
        check_unit_slopes(activation, type(self).__name__)
        if bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}.")
        self.geometry, self.activation, self.bound = geometry, activation, bound
        self.strong, self.limit_gradient = float(strong), bool(limit_gradient)
        units, rows = len(weight), bound == "rows"
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(units))
        self.raw_step = raw_fraction(fraction, units if rows else 1)
        self.register_parameter("raw_q", nn.Parameter(torch.zeros(units)) if rows else None)
        self.register_parameter("raw_damping", raw_fraction(fraction) if rows and strong else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new weight of norm at most 1 and set the bias to zero; the step stays."""
        with torch.no_grad():
            nn.init.orthogonal_(self.weight).div_(math.sqrt(math.prod(self.weight.shape[2:])))
        nn.init.zeros_(self.bias)

    def step_size(self) -> Tensor:
        r"""Return the step :math:`\tau` that ``forward`` uses now, a 0-d tensor, at least float32 and differentiable.

        Raises:
            ValueError: if every hidden unit has its own, see :meth:`step_sizes`.
        """
        if self.bound == "rows":
            raise ValueError(
                "a block with bound='rows' has a step per hidden unit, so no single one; call step_sizes()."
            )
        weight = wide(self.weight if self.limit_gradient else self.weight.detach())
        with full_precision(weight):
            limit = 2.0 / floored(2.0 * self.strong + _squared_norm(self.geometry, weight, self.bound))
        slack = rounding_slack(weight) + 2.0 * self.geometry.proof_slack(weight)
        return (1.0 - slack) * limit * self.raw_step[0].to(weight.dtype).sigmoid()

    def step_sizes(self) -> Tensor:
        """Return the step of each hidden unit; with ``bound="rows"`` in the dtype of the weight, rounded down."""
        return self._unit_steps().units if self.bound == "rows" else self.step_size().expand(len(self.weight))

    def damping(self) -> Tensor:
        r"""Return :math:`\tau m`, by which the block contracts at least: its constant is at most :math:`1 - \tau m`."""
        return self._damping(self._unit_steps()) if self.bound == "rows" else self.strong * self.step_size()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state."""
        hidden = UNIT_SLOPES[self.activation](self._linear(input))
        if self.bound == "rows":
            steps = self._unit_steps()
            branch = self._adjoint(hidden * self._per_unit(steps.units))
            return input - branch - self._damping(steps) * input if self.strong else input - branch
        branch = self._adjoint(hidden)
        if self.strong:
            branch = branch + self.strong * input
        return input - self.step_size() * branch

    def _settings(self) -> str:
        text = f"activation={self.activation!r}, strong={self.strong}"
        text += "" if self.bound == "gram" else f", bound={self.bound!r}"
        return text if self.limit_gradient else f"{text}, limit_gradient=False"

    @abstractmethod
    def _linear(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return :math:`Ah + b`."""

    @abstractmethod
    def _adjoint(self, hidden: Tensor) -> Tensor:
        r"""Return :math:`A^\top` of a hidden state."""

    @abstractmethod
    def _per_unit(self, steps: Tensor) -> Tensor:
        """Return the steps with axes behind, so that they broadcast over a hidden state."""

    def _unit_steps(self) -> UnitSteps:
        weight, raw_q = self.weight, self.raw_q
        if raw_q is None:
            raise ValueError(f"the steps per unit need bound='rows', got {self.bound!r}.")
        if not self.limit_gradient:
            weight, raw_q = weight.detach(), raw_q.detach()
        fraction = self.raw_step.to(wide(weight).dtype).sigmoid()
        return unit_steps(weight, raw_q, strong=self.strong, fraction=fraction, groups=self.geometry.groups)

    def _damping(self, steps: UnitSteps) -> Tensor:
        if self.raw_damping is None:
            return torch.zeros_like(steps.whole)
        return self.strong * steps.whole * self.raw_damping[0].to(steps.whole.dtype).sigmoid()


def gradient_step_factor(module: GradientStep, norm: str) -> Bound:
    r"""Bound :math:`(1 - \kappa)I - A^\top SDA` for the stored numbers of a block, :math:`\kappa = \tau m`.

    In l2 by the ends of its spectrum. In linf and l1, which are equal as the matrix is symmetric, by its row sums; above 1.

    Args:
        module: the block.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.

    Raises:
        ValueError: if a parameter is NaN or infinite.

    Examples:
        >>> from stableopt.nn import GradientBlock
        >>> gradient_step_factor(GradientBlock(3), "l2").upper
        1.0
    """
    with torch.no_grad():
        steps, weight = module.step_sizes().double().cpu(), module.weight.detach()
        kappa = float(module.damping()) if module.bound == "rows" else float(steps[0])
    if not (math.isfinite(kappa) and bool(steps.isfinite().all()) and bool(module.bias.isfinite().all())):
        raise ValueError(
            f"no bound holds for a {type(module).__name__} with NaN or infinite parameters (step {float(steps.max())})."
        )
    # forward multiplies the input by the damping, or the sum of damping and branch by the step
    damping = Bound.point(kappa) if module.bound == "rows" else Bound.point(kappa) * module.strong
    scaled = scaled_rows(weight, steps)
    groups = module.geometry.groups
    if norm != "l2":
        return row_factor(
            scaled.unflatten(0, (groups, -1)).flatten(3) if scaled.ndim > 2 else scaled[None, ..., None], damping
        )
    if module.raw_q is None:
        return damped_factor(damping, float(steps[0]) * Bound.point(module.geometry.proved(weight).upper) ** 2)
    rounding = rounding_of_rows(scaled) * module.geometry.spread(weight)
    curvature = (Bound.point(module.geometry.proved(scaled).upper) + rounding) ** 2
    by_rows = row_curvature(scaled, steps, bounded_exp(module.raw_q.detach().double().cpu()), groups)
    return damped_factor(damping, Bound.point(min(curvature.upper, by_rows.upper)))


def _squared_norm(geometry: Geometry, weight: Tensor, bound: str) -> Tensor:
    r"""Return an upper bound, in exact arithmetic, of the square of the norm of the operator; differentiable also at 0."""
    if bound == "gram":
        return geometry.upper(weight) ** 2
    if bound == "schur":
        return geometry.upper(weight, "linf") * geometry.upper(weight, "l1")
    return geometry.spread(weight) ** 2 * weight.square().sum()
