"""RAdam: Adam whose first steps are those of SGD."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.rules import Rectified
from stableopt.optim.settings import GuardSettings, check_lr

__all__ = ["RAdam"]


class RAdam(GuardedOptimizer, torch.optim.RAdam):
    r"""torch's RAdam with prox or projection in the metric of the step and a guard on its energy.

    As long as the variance of the second moment is too large, the metric is :math:`P = 1-\beta_1^t`; then it is
    :math:`P = (1-\beta_1^t)(\sqrt{\hat v} + \epsilon)/r_t`, up to torch's place of :math:`\epsilon`, :math:`r_t` the rectification.
    Everything else is as for :class:`Adam`, with a decoupled decay as for :class:`AdamW`.

    Args:
        params: parameters, named parameters or groups, as for torch.
        lr: learning rate, a finite number :math:`\ge 0` or a tensor with one element.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: :math:`\omega \ge 0`.
        decoupled_weight_decay: decay the weights, not the gradient, as AdamW does.
        foreach: as for torch.
        maximize: maximize the loss.
        capturable: as for torch.
        differentiable: as for torch, with ``guard="off"`` and no regularizer only.
        **settings: of the guard, and regularizers: see :class:`GuardSettings` and :class:`AdamW`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or a penalty has no exact prox in a diagonal metric.

    References:
        Liu et al., *On the variance of the adaptive learning rate and beyond*, 2020.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = RAdam([w], lr=1e3, guard="strict")
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

    rule = Rectified()
    torch_class = torch.optim.RAdam

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **settings: Unpack[GuardSettings],
    ) -> None:
        check_lr(lr)
        with self.set_up(settings):
            torch.optim.RAdam.__init__(
                self, params, lr, betas, eps, weight_decay, decoupled_weight_decay,
                foreach=foreach, maximize=maximize, capturable=capturable, differentiable=differentiable,
            )  # fmt: skip
