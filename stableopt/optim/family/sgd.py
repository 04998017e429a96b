"""SGD with momentum, dampening or Nesterov's momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.rules import HeavyBall
from stableopt.optim.settings import GuardSettings, check_lr, check_number

__all__ = ["SGD"]


class SGD(GuardedOptimizer, torch.optim.SGD):
    r"""torch's SGD with prox or projection inside the step and a guard on its energy.

    .. math::
        b^+ = \beta b + (1-\delta)(\nabla f(\theta) + \omega\theta), \quad y = \theta - \eta b^+, \quad
        \theta^+ = \operatorname{prox}_{\eta(1-\delta) g}(y), \quad b^+ := (\theta - \theta^+)/\eta,

    with the energy :math:`V = f + g + \frac{\omega}{2}\|\theta\|^2 + \frac{\beta\eta}{2(1-\delta)}\|b\|^2`,
    which provably falls for :math:`\eta \le 2(1-\beta)/((1-\delta)(L+\omega))`, L the smoothness of f (THEORY T4). Without the last
    assignment, the realised displacement, it need not. In the first step torch does not dampen: read :math:`\delta = 0` there.

    Args:
        params: parameters, named parameters or groups, as for torch.
        lr: learning rate, a finite number :math:`\ge 0` or a tensor with one element.
        momentum: :math:`\beta` in [0, 1).
        dampening: :math:`\delta`.
        weight_decay: :math:`\omega \ge 0`, coupled.
        nesterov: Nesterov's momentum; its energy is checked, not proved, and it takes no regularizer.
        maximize: maximize the loss; the energy is that of its negative.
        foreach: as for torch.
        differentiable: as for torch, with ``guard="off"`` and no regularizer only.
        fused: as for torch.
        **settings: of the guard, and regularizers: see :class:`GuardSettings`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or arguments exclude each other.

    Note:
        A step with a guard costs one forward pass more per try, and waits for the device. Parameters that lie outside their set are
        projected before the closure is evaluated.

    References:
        Ochs, Chen, Brox and Pock, *iPiano*, 2014.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([4.0]))
        >>> from stableopt.constraints import NonNegative
        >>> optimizer = SGD([w], lr=1.0, constraint=NonNegative(), guard="strict")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = ((w + 1) ** 2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(20):
        ...     _ = optimizer.step(closure)
        >>> w.item(), optimizer.last_step.verdict
        (0.0, 'undecided')
    """

    rule = HeavyBall()
    torch_class = torch.optim.SGD

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **settings: Unpack[GuardSettings],
    ) -> None:
        check_lr(lr)
        with self.set_up(settings):
            torch.optim.SGD.__init__(
                self, params, lr, momentum, dampening, weight_decay, nesterov,
                maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
            )  # fmt: skip

    def check_group(self, group: dict[str, Any], others: Sequence[dict[str, Any]] | None = None) -> None:
        """Check the momentum too; the arguments and errors are those of :meth:`GuardedOptimizer.check_group`."""
        check_number("momentum", group["momentum"], high=1.0)
        dampening = group["dampening"]
        plain = group["guard"] == "off" and not (group["prox"] or group["constraint"])
        if not math.isfinite(dampening) or (dampening >= 1 and not plain):
            raise ValueError(
                f"dampening must be a finite number below 1, got {dampening!r}: from 1 on gradients enter the momentum with the "
                "wrong sign or not at all, and no energy falls; guard='off' without prox or constraint takes what torch takes."
            )
        super().check_group(group, others)
