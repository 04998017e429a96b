"""Lion: the sign of a momentum."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.lion_step import PlainLion
from stableopt.optim.rules import SignDescent
from stableopt.optim.settings import GuardSettings, check_lr

__all__ = ["Lion"]


class Lion(GuardedOptimizer, PlainLion):
    r"""Lion with projection inside the step and a guard on the loss.

    .. math::
        u = \operatorname{sign}(\beta_1 m + (1-\beta_1)\nabla f(\theta)), \quad
        \theta^+ = P_C\bigl((1-\eta\omega)\theta - \eta u\bigr), \quad m^+ = \beta_2 m + (1-\beta_2)\nabla f(\theta).

    The step is normalized: it has no linear stability limit, but with decay it keeps :math:`\|\theta\|_\infty \le 1/\omega` for
    :math:`\eta\omega \le 1`.

    Args:
        params: parameters, named parameters or groups, as for torch.
        lr: learning rate :math:`\eta`, a finite number :math:`\ge 0` or a tensor with one element; about a tenth of Adam's.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        weight_decay: :math:`\omega \ge 0`, decoupled.
        foreach: whether to treat all parameters of a group at once; None for torch's choice.
        maximize: maximize the loss.
        capturable: as for torch.
        differentiable: as for torch, with ``guard="off"`` and no set only.
        **settings: of the guard, and sets: see :class:`GuardSettings`. It takes no penalty: a normalized step has no metric in
            which a prox would solve the penalized problem. The energy is the loss.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or a penalty is given.

    References:
        Chen et al., *Symbolic discovery of optimization algorithms*, 2023.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = Lion([w], lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> [round(x, 6) for x in w.tolist()]
        [2.9, -1.9]
    """

    rule = SignDescent()
    torch_class = PlainLion

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **settings: Unpack[GuardSettings],
    ) -> None:
        check_lr(lr)
        with self.set_up(settings):
            PlainLion.__init__(
                self, params, lr, betas, weight_decay,
                foreach=foreach, maximize=maximize, capturable=capturable, differentiable=differentiable,
            )  # fmt: skip
