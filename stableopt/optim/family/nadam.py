"""NAdam: Adam with Nesterov's momentum."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.rules import AdaptiveNesterov
from stableopt.optim.settings import GuardSettings, check_lr

__all__ = ["NAdam"]


class NAdam(GuardedOptimizer, torch.optim.NAdam):
    r"""torch's NAdam with a guard on its energy.

    The step :math:`\theta^+ = \theta - \eta P^{-1}(a\nabla f + b m^+)`, :math:`P = \sqrt{\hat v} + \epsilon`, is Adam's with the
    gradient mixed into the momentum once more. No energy is proved for it; that of a heavy ball with the same gains,

    .. math:: V = f + g_\omega + \frac{\eta b^2}{2\kappa}\|m\|_{P^{-1}}^2, \qquad \kappa = a + b(1-\beta_1),

    :math:`g_\omega` the energy of the decay, is checked. Gradients are taken at an extrapolated point, which a set need not
    contain: it takes no prox and no constraint.

    Args:
        params: parameters, named parameters or groups, as for torch.
        lr: learning rate, a finite number :math:`\ge 0` or a tensor with one element.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: :math:`\omega \ge 0`.
        momentum_decay: of the schedule of the momentum.
        decoupled_weight_decay: decay the weights, not the gradient, as AdamW does.
        foreach: as for torch.
        maximize: maximize the loss.
        capturable: as for torch.
        differentiable: as for torch, with ``guard="off"`` only.
        **settings: of the guard: see :class:`GuardSettings`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or a prox or a constraint is given.

    References:
        Dozat, *Incorporating Nesterov momentum into Adam*, 2016.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = NAdam([w], lr=1e3, guard="strict")
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

    rule = AdaptiveNesterov()
    torch_class = torch.optim.NAdam

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
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
            torch.optim.NAdam.__init__(
                self, params, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay,
                foreach=foreach, maximize=maximize, capturable=capturable, differentiable=differentiable,
            )  # fmt: skip
