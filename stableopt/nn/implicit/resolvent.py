r"""A block that is the resolvent of a monotone operator: an implicit step that may rotate, without a limit."""

from __future__ import annotations

from stableopt.linalg import Bound
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.implicit.block import ImplicitBlock, bound, uniform
from stableopt.nn.implicit.solvers import Fista, Solver
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule

__all__ = ["ResolventBlock"]


class ResolventBlock(ImplicitBlock):
    r"""Resolvent of a monotone operator, the sum of the gradient of a convex function and a skew matrix.

    .. math::
        y = (I + hT)^{-1}(x), \quad T(y) = my + A^\top\sigma(Ay + b) - Ky, \qquad
        K = V - V^\top, \quad h = \operatorname{softplus}(r) .

    It is the backward Euler step of a flow :math:`-T` that is dissipated and rotated. **Proof.** For the difference
    :math:`\delta` of two outputs, and the slopes :math:`0 \preceq D \preceq I` between them,
    :math:`\langle\delta, \delta_T\rangle = m\|\delta\|^2 + \langle A\delta, DA\delta\rangle \ge m\|\delta\|^2`: the skew part does
    not enter. So :math:`\delta + h\delta_T = \delta_x` gives :math:`(1 + hm)\|\delta\|^2 \le \langle\delta, \delta_x\rangle`, the
    constant :math:`1/(1 + hm)` for every step. The explicit step expands for every :math:`h` if :math:`m = 0` and :math:`K \ne 0`.

    **What is computed.** As for :class:`stableopt.nn.ProximalBlock`: with :class:`ForwardBackward` every iterate has the constant
    :math:`1/(1 + hm)` itself, because the skew part is solved exactly in each step, through one Cayley transform per call; with
    :class:`Anderson` the exact solution has it, and :meth:`solution_error` says how far that is.

    Args:
        dim: number of features of input and output.
        hidden: rows of :math:`A`; None for ``dim``.
        depth: number of blocks in the stack. The initial step is :math:`2/\max(2, \text{depth})`.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.
        strong: :math:`m \ge 0`.
        step: initial step :math:`h`, in [1e-6, 1e6]; None for the one that fits the depth. The learned one stays in that range.
        solver: how the equation is solved; None for ten steps of :class:`ForwardBackward`.

    Raises:
        TypeError: if ``solver`` is none, or :class:`Fista`, which minimises: the skew part is no gradient.
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Note:
        It may rotate, which no :class:`stableopt.nn.ProximalBlock` can: the Jacobian of a proximal map is symmetric.

    References:
        Butcher, *A stability property of implicit Runge-Kutta methods*, 1975 (B-stability); Winston and Kolter, *Monotone Operator
        Equilibrium Networks*, 2020.

    Examples:
        >>> block = ResolventBlock(3, strong=0.5, step=2.0)
        >>> round(bound(block, "l2").upper, 6)
        0.5
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
        solver: Solver | None = None,
    ) -> None:
        if isinstance(solver, Fista):
            raise TypeError(
                "a ResolventBlock has a skew part, which is the gradient of nothing: use Anderson, not Fista."
            )
        super().__init__(
            dim, hidden, depth=depth, activation=activation, strong=strong, step=step, solver=solver, skew=True
        )


lipschitz_rule.register(ResolventBlock, bound)
uniform_rule.register(ResolventBlock, uniform)


@token_rule.register(ResolventBlock)
def _token(module: ResolventBlock) -> Bound:
    return bound(module, "l2")
