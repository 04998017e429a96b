r"""A block that is the proximal map of a learned convex function: no limit of the step."""

from __future__ import annotations

from stableopt.linalg import Bound
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.implicit.block import ImplicitBlock, bound, uniform
from stableopt.nn.implicit.solvers import Solver
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule

__all__ = ["ProximalBlock"]


class ProximalBlock(ImplicitBlock):
    r"""Proximal map of a convex function, an implicit gradient step of any size.

    .. math::
        x \mapsto \operatorname{prox}_{h\psi}(x) = \arg\min_y \tfrac12\|y - x\|^2 + h\psi(y), \qquad
        \psi(y) = \sum_i \varphi(Ay + b)_i + \tfrac m2\|y\|^2, \quad \varphi' = \sigma, \quad h = \operatorname{softplus}(r) .

    Equivalently :math:`y = x - h\,(m y + A^\top\sigma(Ay + b))`: the step of a :class:`stableopt.nn.GradientBlock` with the
    gradient at its end. **Proof.** For two inputs, :math:`y - y' = (x - x') - h(g - g')` with monotone gradients,
    :math:`\langle g - g', y - y'\rangle \ge m\|y - y'\|^2`, so :math:`(1 + hm)\|y - y'\|^2 \le \langle x - x', y - y'\rangle`:
    firmly nonexpansive, with the constant :math:`1/(1 + hm)`, for every step, weight and bias.

    **What is computed.** With the default solver a fixed number of forward-backward steps, *each of which has that constant, too*
    (:class:`stableopt.nn.implicit.Equation`): :func:`stableopt.nn.lipschitz` is a statement about the map as it is computed. With
    :class:`stableopt.nn.Fista` or :class:`stableopt.nn.Anderson` it is about the exact solution, which the output
    misses by at most :meth:`solution_error`; the bound is then marked ``proved=False``, and what is proved for two inputs is
    :math:`\|y - y'\| \le \|x - x'\|/(1 + hm) + \varepsilon + \varepsilon'`. To certify such a block, give it a
    :class:`ForwardBackward` solver with enough steps: the parameters stay.

    Args:
        dim: number of features of input and output.
        hidden: rows of :math:`A`; None for ``dim``.
        depth: number of blocks in the stack. The initial step is :math:`2/\max(2, \text{depth})`.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.
        strong: :math:`m \ge 0`.
        step: initial step :math:`h`, in [1e-6, 1e6]; None for the one that fits the depth. The learned one stays in that range.
        solver: how the equation is solved; None for ten steps of :class:`stableopt.nn.ForwardBackward`.

    Raises:
        TypeError: if ``solver`` is none.
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Note:
        Undamped Newton steps need not converge (for tanh and :math:`h\|A\|^2 = 20` they cycle); all solvers here do, from every
        start. The constant in linf and l1 is at most :math:`\sqrt n` times that of l2.

    References:
        Moreau, *Proximité et dualité dans un espace hilbertien*, 1965; Bauschke and Combettes, *Convex Analysis and Monotone
        Operator Theory*, 2017.

    Examples:
        >>> import torch
        >>> block = ProximalBlock(1, step=3.0)
        >>> _ = torch.nn.init.ones_(block.weight)
        >>> [round(block(torch.tensor([x])).item(), 2) for x in (-2.0, 2.0)]  # y + 3 relu(y) = x
        [-2.0, 0.5]
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
        super().__init__(
            dim, hidden, depth=depth, activation=activation, strong=strong, step=step, solver=solver, skew=False
        )


lipschitz_rule.register(ProximalBlock, bound)
uniform_rule.register(ProximalBlock, uniform)


@token_rule.register(ProximalBlock)
def _token(module: ProximalBlock) -> Bound:
    return bound(module, "l2")
