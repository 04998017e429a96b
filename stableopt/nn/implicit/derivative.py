r"""Derivatives of the solution of an implicit equation by the implicit function theorem, of any order.

For :math:`F(y; x, \theta) = 0` and :math:`M = \partial F/\partial y`, a cotangent :math:`g` of :math:`y` is one
:math:`u = M^{-\top} g` of :math:`x`, and :math:`-(\partial F/\partial\theta)^\top u` of a parameter. The solution of the linear
equation has a derivative of the same kind, so derivatives of derivatives are right, too. No iterate is kept. There is no
derivative in forward mode (:func:`torch.func.jacfwd`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.nn.implicit.equation import SLOPES, Equation
from stableopt.nn.implicit.solvers import Anderson, ConjugateGradient, ToTolerance
from stableopt.nn.unit_slopes import UNIT_SLOPES

__all__ = ["solve_implicitly"]


def solve_implicitly(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skew: Tensor | None,
    step: Tensor,
    *,
    strong: float,
    activation: str,
    solver: ToTolerance,
) -> Tensor:
    """Return the solution of a block's equation, differentiable by the input and all numbers of the equation.

    Args:
        x: right-hand side, of shape ``(..., dim)``.
        weight: see :class:`stableopt.nn.implicit.Equation`.
        bias: see there.
        skew: see there.
        step: see there.
        strong: see there.
        activation: name of the activation.
        solver: for the equation, and with its tolerance for the linear equations of the derivatives.

    Examples:
        >>> import torch
        >>> x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        >>> one, zero = torch.ones(1, 1).double(), torch.zeros(1).double()
        >>> settings = {"strong": 0.0, "activation": "relu", "solver": Anderson()}
        >>> y = solve_implicitly(x, one, zero, None, torch.tensor(3.0).double(), **settings)
        >>> y.backward()
        >>> round(y.item(), 6), round(x.grad.item(), 6)
        (0.5, 0.25)
    """
    return _Solution.apply(x, weight, bias, skew, step, strong, activation, solver)  # type: ignore[no-any-return]


class _Solution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        skew: Tensor | None,
        step: Tensor,
        strong: float,
        activation: str,
        solver: ToTolerance,
    ) -> Tensor:
        return solver.solve(Equation(weight, bias, skew, step, strong, UNIT_SLOPES[activation]), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, bias, skew, step, ctx.strong, ctx.activation, ctx.solver = inputs
        ctx.save_for_backward(weight, bias, skew, step, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, skew, step, y = ctx.saved_tensors
        z = F.linear(y, weight, bias)
        slopes = SLOPES[ctx.activation](z)
        transposed = None if skew is None else -skew  # of the Jacobian: K^T = -K
        u = _LinearSolution.apply(cotangents[0], slopes, weight, transposed, step, ctx.strong, ctx.solver)
        inner, active = slopes * F.linear(u, weight), UNIT_SLOPES[ctx.activation](z)
        field = F.linear(active, weight.mT) + ctx.strong * y
        if skew is not None:
            field = field - F.linear(y, skew)
        return (
            u,
            -step * (_outer(active, u) + _outer(inner, y)),
            -step * inner.flatten(0, -2).sum(0) if inner.ndim > 1 else -step * inner,
            None if skew is None else step * _outer(u, y),
            -(u * field).sum(),
            None,
            None,
            None,
        )


class _LinearSolution(torch.autograd.Function):
    r"""Solve :math:`((1 + hm)I - hK + hA^\top\operatorname{diag}(s)A)\,u = g`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, slopes: Tensor, weight: Tensor, skew: Tensor | None, step: Tensor, strong: float, solver: ToTolerance
    ) -> Tensor:
        settings = {name: getattr(solver, name) for name in ("tolerance", "max_iterations", "check_every")}
        method = (ConjugateGradient if skew is None else Anderson)(**settings)
        return method.solve(Equation(weight, None, skew, step, strong, lambda z: slopes * z), g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, slopes, weight, skew, step, ctx.strong, ctx.solver = inputs
        ctx.save_for_backward(slopes, weight, skew, step, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        slopes, weight, skew, step, u = ctx.saved_tensors
        transposed = None if skew is None else -skew
        v = _LinearSolution.apply(cotangents[0], slopes, weight, transposed, step, ctx.strong, ctx.solver)
        Au, Av = F.linear(u, weight), F.linear(v, weight)
        field = F.linear(slopes * Au, weight.mT) + ctx.strong * u
        if skew is not None:
            field = field - F.linear(u, skew)
        return (
            v,
            -step * Au * Av,
            -step * (_outer(slopes * Au, v) + _outer(slopes * Av, u)),
            None if skew is None else step * _outer(v, u),
            -(v * field).sum(),
            None,
            None,
        )


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sum over all vectors of the outer products."""
    return rows.reshape(-1, rows.shape[-1]).mT @ columns.reshape(-1, columns.shape[-1])
