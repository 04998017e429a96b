r"""The equation of an implicit block, :math:`(1 + hm)\,y - hKy + hA^\top\sigma(Ay + b) = x`, and the splitting that solves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.linalg import gram_norm
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.steps import rounding_slack
from stableopt.nn.weights import Geometry
from stableopt.nn.weights.orthogonal import Cayley

__all__ = ["SLOPES", "Equation", "Splitting"]

SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: (z > 0).to(z.dtype),
    "leaky_relu": lambda z: torch.where(z > 0, 1.0, 0.01).to(z.dtype),
    "tanh": lambda z: 1.0 - z.tanh().square(),
    "softplus": torch.sigmoid,
    "hardtanh": lambda z: ((z > -1) & (z < 1)).to(z.dtype),
}
"""The slope of each activation of :data:`stableopt.nn.unit_slopes.UNIT_SLOPES`; at a kink, the one that autograd takes."""

_SMALLEST = 1e-6
"""Floor of the square of the norm of the weight, so that a zero weight has a finite splitting step."""

_ROTATION = Cayley(Geometry("linear"))


class Splitting(NamedTuple):
    r"""The numbers of the step :math:`y \mapsto \tfrac12(I + Q)\bigl(\kappa y - \nu A^\top\sigma(Ay + b) + \mu x\bigr)`.

    Attributes:
        keep: :math:`\kappa`.
        move: :math:`\nu`, with :math:`\nu\|A\|_2^2 \le 2\kappa`.
        mix: :math:`\mu`, with :math:`\kappa + \mu \le 1`.
        start: :math:`y_0 = \text{start} \cdot x`.
        rotation: :math:`Q`, orthogonal, or None for the identity.

    Examples:
        >>> one = torch.ones(1, 1)
        >>> equation = Equation(one, None, None, torch.tensor(1.0), 0.0, torch.relu)
        >>> [round(float(number), 3) for number in equation.splitting()[:4]]
        [0.333, 0.667, 0.667, 1.0]
    """

    keep: Tensor
    move: Tensor
    mix: Tensor
    start: Tensor
    rotation: Tensor | None

    def advance(self, equation: Equation, x: Tensor, y: Tensor) -> Tensor:
        """Return the next iterate."""
        z = self.keep * y - self.move * equation.branch(y) + self.mix * x
        return z if self.rotation is None else 0.5 * (z + F.linear(z, self.rotation))


class Equation(NamedTuple):
    r"""The equation :math:`(1 + hm)\,y - hKy + hA^\top\sigma(Ay + b) = x` for :math:`y`; vectors are the last dimension.

    With slopes of :math:`\sigma` in [0, 1] and skew :math:`K` its Jacobian :math:`M` has the symmetric part
    :math:`(1 + hm)I + hA^\top DA \succeq (1 + hm)I`: one solution, which depends on :math:`x` with the constant
    :math:`1/(1 + hm)`.

    **Splitting.** For every :math:`w > 0` and :math:`\alpha = w/h` the solution is the fixed point of

    .. math:: y \mapsto \bigl(aI - wK\bigr)^{-1}\bigl(y - wA^\top\sigma(Ay + b) + \alpha x\bigr), \qquad a = 1 + \alpha + wm .

    For :math:`w\|A\|_2^2 \le 2` the inner map keeps distances of :math:`y`, and the resolvent of the skew matrix has the norm
    :math:`1/a` at most: :math:`(aI - wK)^{-1} = (I + Q)/(2a)` with the Cayley transform :math:`Q` of :math:`wK/a`. So the
    derivative of the :math:`k`-th iterate by :math:`x` obeys

    .. math:: c_{k+1} \le \frac{c_k + \alpha}{1 + \alpha + wm}, \qquad\text{with the fixed point}\quad \frac{1}{1 + hm} ,

    and started at :math:`y_0 = x/(1 + hm)` *every* iterate has the constant :math:`1/(1 + hm)` of the solution itself. Distances to
    the solution shrink by :math:`1/a` per step. Without :math:`K` the step is that of gradient descent, with the best step for its
    condition number.

    Attributes:
        weight: :math:`A`, of shape ``(hidden, dim)``.
        bias: :math:`b`, or None.
        skew: :math:`K = V - V^\top`, or None for zero.
        step: :math:`h > 0`, a 0-d tensor.
        strong: :math:`m \ge 0`.
        activate: :math:`\sigma`, elementwise.

    Examples:
        >>> equation = Equation(torch.eye(2), None, None, torch.tensor(0.5), 1.0, torch.relu)
        >>> equation.residual(torch.tensor([4.0, -3.0]), torch.tensor([2.0, -2.0])).tolist()  # 1.5 y + 0.5 relu(y) = x
        [0.0, 0.0]
    """

    weight: Tensor
    bias: Tensor | None
    skew: Tensor | None
    step: Tensor
    strong: float
    activate: Callable[[Tensor], Tensor]

    def branch(self, y: Tensor) -> Tensor:
        r"""Return :math:`A^\top\sigma(Ay + b)`."""
        return F.linear(self.activate(F.linear(y, self.weight, self.bias)), self.weight.mT)

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return :math:`(1 + hm)\,y - hKy + hA^\top\sigma(Ay + b) - x`."""
        field = self.branch(y)
        if self.strong:
            field = field + self.strong * y
        if self.skew is not None:
            field = field - F.linear(y, self.skew)
        return (y - x) + self.step * field

    def square(self) -> Tensor:
        r"""Return an upper bound of :math:`\|A\|_2^2` in exact arithmetic, at least a small positive number."""
        weight = wide(self.weight)
        with full_precision(weight):
            return gram_norm(weight).square().clamp_min(_SMALLEST)

    def size(self) -> Tensor:
        r"""Return :math:`1 + h(m + U^2 + \|K\|_F)`, at least the norm of every Jacobian."""
        rest = self.square() + self.strong
        if self.skew is not None:
            rest = rest + torch.linalg.vector_norm(wide(self.skew))
        return 1.0 + self.step * rest

    def splitting(self, *, inward: bool = True) -> Splitting:
        """Return the numbers of the splitting.

        Args:
            inward: whether they are rounded so that the conditions of the proof hold for them. That moves the fixed point by a few
                units in the last place; otherwise it is the solution, up to rounding.
        """
        weight = wide(self.weight)
        eps = torch.finfo(weight.dtype).eps
        slack, last = (rounding_slack(weight), 8.0 * eps) if inward else (0.0, 0.0)
        w = 2.0 * (1.0 - slack) / self.square()
        alpha = w / self.step
        inverse = (1.0 - last) / (1.0 + alpha + self.strong * w)
        rotation = None
        if self.skew is not None:
            B = (w * inverse) * wide(self.skew)
            if inward:  # the half: Cayley takes the difference of a matrix and its transpose
                rotation = _ROTATION((-0.5 * B).to(self.skew.dtype))
            else:
                eye = torch.eye(len(B), dtype=B.dtype, device=B.device)
                rotation = torch.linalg.solve(eye - B, eye + B)
        return Splitting(inverse, w * inverse, alpha * inverse, 1.0 / (1.0 + self.step * self.strong), rotation)
