r"""A backward Euler step along a field of which a step limit is proved: the implicit step itself has no limit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound
from stableopt.nn.arguments import check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.positive import positive, raw_positive
from stableopt.nn.residual.fields import Field, check_field, field_bound, field_norm
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule

__all__ = ["BackwardEulerBlock"]


class BackwardEulerBlock(nn.Module):
    r"""Backward Euler step along a dissipative field, solved by steps that do not expand.

    .. math:: y = x + h f(y), \qquad h = \operatorname{softplus}(r) .

    With the rate :math:`m \ge 0` of the field, :math:`\langle f(y) - f(y'), y - y'\rangle \le -m\|y - y'\|^2`, the solution has the
    constant :math:`1/(1 + hm)` for every step. It is the fixed point of an Euler step along the field, averaged with the input:

    .. math:: y_{k+1} = \frac{h\,\bigl(y_k + \tau f(y_k)\bigr) + \tau x}{h + \tau}, \qquad y_0 = x, \quad \tau = \rho\,\tau_{\max} .

    **Proof.** If Euler's step at :math:`\tau` has the constant :math:`F(\tau) \le 1` in some norm, the iterates have
    :math:`c_{k+1} \le (hF(\tau)c_k + \tau)/(h + \tau)` in that norm, :math:`c_0 = 1`: every iterate is nonexpansive, and its
    constant falls to :math:`\tau/(h + \tau - hF(\tau))`, which is :math:`1/(1 + hm)` where :math:`F(\tau) = 1 - \tau m`. So what
    :func:`stableopt.nn.lipschitz` says is about the map as it is computed, with as many iterations as there are.

    Args:
        field: a :class:`stableopt.nn.Field`, which knows its limit; it must keep the shape.
        iterations: how many, at least 1. The distance to the solution shrinks by :math:`hF(\tau)/(h + \tau)` in each.
        relaxation: :math:`\rho` in (0, 1], the share of Euler's limit. Without a rotation :math:`F = 1 - \tau m` for all up to 1/2.
        depth: number of blocks in the stack. The initial step is :math:`2/\max(2, \text{depth})`.
        step: initial step :math:`h`, in [1e-6, 1e6]; None for the one that fits the depth. The learned one stays in that range.

    Raises:
        TypeError: if the field is no :class:`stableopt.nn.Field`.
        ValueError: if an argument is out of range.

    Note:
        For a gradient, or a gradient and a rotation, :class:`stableopt.nn.ProximalBlock` and :class:`stableopt.nn.ResolventBlock`
        need fewer iterations and have the best constant at each.

    References:
        Butcher, *A stability property of implicit Runge-Kutta methods*, 1975 (B-stability).

    Examples:
        >>> from stableopt.nn import GradientField
        >>> block = BackwardEulerBlock(GradientField(3, strong=0.5), step=2.0, iterations=100)
        >>> round(_backward_euler(block, "l2").upper, 4)
        0.5
    """

    def __init__(
        self,
        field: Field,
        *,
        iterations: int = 10,
        relaxation: float = 0.5,
        depth: int = 1,
        step: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(field, Field):
            raise TypeError(
                f"the field of a BackwardEulerBlock must be a Field, which knows its step limit, got {type(field).__name__}. "
                "Derive a class from stableopt.nn.Field, or use GradientField, DissipativeField or InfNormField."
            )
        check_sizes(iterations=iterations, depth=depth)
        if not 0.0 < relaxation <= 1.0:
            raise ValueError(f"relaxation is a share of the limit and must lie in (0, 1], got {relaxation!r}.")
        self.field = field
        self.iterations = iterations
        self.relaxation = float(relaxation)
        self.raw_step = raw_positive(2.0 / max(2, depth) if step is None else step)

    def step_size(self) -> Tensor:
        """Return the step :math:`h` that ``forward`` uses now, a 0-d tensor, at least float32."""
        return positive(self.raw_step)[0]

    def splitting(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`\tau` and the weights of the Euler step and of the input, rounded so that their sum is at most 1.

        Examples:
            >>> from stableopt.nn import GradientField
            >>> tau, keep, mix = BackwardEulerBlock(GradientField(2), step=1.0).splitting()
            >>> bool(keep + mix <= 1.0), bool(tau <= 1.0)
            (True, True)
        """
        limit = self.field.step_limit()
        eps = torch.finfo(limit.dtype).eps
        h, tau = self.step_size().to(limit.dtype), (1.0 - 4.0 * eps) * self.relaxation * limit
        inverse = (1.0 - 4.0 * eps) / (h + tau)
        return tau, h * inverse, tau * inverse

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the last iterate."""
        tau, keep, mix = self.splitting()
        y = input
        for _ in range(self.iterations):
            y = keep * (y + tau * self.field(y)) + mix * input
        return y

    @torch.no_grad()
    def solution_error(self, input: Tensor) -> Bound:  # noqa: A002 the name torch uses
        r"""Bound the l2 distance of the output from the exact solution by :math:`\|y - hf(y) - x\|/(1 + hm)`.

        Args:
            input: of shape ``(..., dim)``.

        Returns:
            A bound from 0 to the largest error over all vectors of the last dimension. It is not marked as proved, because the
            residual is evaluated in the dtype of the input, by the field itself.

        Raises:
            ValueError: if a parameter is NaN or infinite.
        """
        y, h = self(input), self.step_size()
        size = torch.linalg.vector_norm(y - h * self.field(y) - input, dim=-1)
        m = max(0.0, field_bound(self.field, "l2").rate.lower)
        return Bound(0.0, float(size.amax()) / (1.0 + float(h) * m) if size.numel() else 0.0, proved=False)

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        return f"iterations={self.iterations}, relaxation={self.relaxation}"


@lipschitz_rule.register(BackwardEulerBlock)
def _backward_euler(module: BackwardEulerBlock, norm: str) -> Bound:
    r"""Bound the last iterate by :math:`c_{k+1} \le \kappa F(\tau) c_k + \mu` with the stored numbers."""
    bound = field_bound(module.field, norm)
    with torch.no_grad():
        tau, keep, mix = (float(number) for number in module.splitting())
    if not all(map(math.isfinite, (tau, keep, mix))):
        raise ValueError(f"no bound holds for a BackwardEulerBlock with NaN or infinite parameters (step {tau}).")
    factor = bound.factor(tau).upper
    c = 1.0
    for _ in range(module.iterations):
        c = (Bound.point(keep) * factor * c + mix).upper
    nonexpansive = factor <= 1.0 and (Bound.point(keep) + mix).upper <= 1.0
    return Bound(0.0, min(c, 1.0) if nonexpansive else c)


@uniform_rule.register(BackwardEulerBlock)
def _uniform(module: BackwardEulerBlock, norm: str) -> Bound | None:
    own = module.field.norm
    check_field(module.field)
    return Bound(0.0, 1.0) if norm == own or (norm == TOKEN_MAX and own == "l2") else None


@token_rule.register(BackwardEulerBlock)
def _token(module: BackwardEulerBlock) -> Bound:
    return _backward_euler(module, field_norm(module.field, TOKEN_MAX))
