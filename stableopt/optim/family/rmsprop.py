"""RMSprop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.rules import RootMeanSquare
from stableopt.optim.settings import GuardSettings, check_lr, check_number

__all__ = ["RMSprop"]


class RMSprop(GuardedOptimizer, torch.optim.RMSprop):
    r"""torch's RMSprop with prox or projection in the metric of the step and a guard on its energy.

    With :math:`P = \sqrt{v} + \epsilon` (centered: the variance in the place of v),

    .. math::
        b^+ = \beta b + P^{-1}(\nabla f(\theta) + \omega\theta), \quad y = \theta - \eta b^+, \quad
        \theta^+ = \operatorname{prox}^P_{\eta g}(y), \quad b^+ := (\theta - \theta^+)/\eta,

    and the energy :math:`V = f + g + \frac{\omega}{2}\|\theta\|^2 + \frac{\beta}{2\eta}\|d\|_P^2` falls for fixed P and
    :math:`\eta \le 2(1-\beta)/L`, L the smoothness in P of f with the decay. Since P changes, the decrease is *checked*.

    Args:
        params: parameters, named parameters or groups, as for torch.
        lr: learning rate :math:`\eta`, a finite number :math:`\ge 0` or a tensor with one element.
        alpha: how slowly the second moment forgets.
        eps: :math:`\epsilon`.
        weight_decay: :math:`\omega \ge 0`, coupled.
        momentum: :math:`\beta` in [0, 1).
        centered: subtract the square of the mean gradient from the second moment.
        capturable: as for torch.
        foreach: as for torch.
        maximize: maximize the loss.
        differentiable: as for torch, with ``guard="off"`` and no regularizer only.
        **settings: of the guard, and regularizers: see :class:`GuardSettings` and :class:`AdamW`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or a penalty has no exact prox in a diagonal metric.

    References:
        Tieleman and Hinton, *RMSprop*, 2012.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = RMSprop([w], lr=1e3, momentum=0.5, guard="strict")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(50):
        ...     _ = optimizer.step(closure)
        >>> abs(w.item()) < 3.0
        True
    """

    rule = RootMeanSquare()
    torch_class = torch.optim.RMSprop

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **settings: Unpack[GuardSettings],
    ) -> None:
        check_lr(lr)
        with self.set_up(settings):
            torch.optim.RMSprop.__init__(
                self, params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize,
                differentiable,
            )  # fmt: skip

    def check_group(self, group: dict[str, Any], others: Sequence[dict[str, Any]] | None = None) -> None:
        """Check the momentum too; the arguments and errors are those of :meth:`GuardedOptimizer.check_group`."""
        check_number("momentum", group["momentum"], high=1.0)
        super().check_group(group, others)
