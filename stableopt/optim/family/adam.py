"""Adam and AdamW."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.rules import Adaptive
from stableopt.optim.settings import GuardSettings, check_lr

__all__ = ["Adam", "AdamW"]


class Adam(GuardedOptimizer, torch.optim.Adam):
    r"""torch's Adam with prox or projection in the metric of the step and a guard on its energy.

    With :math:`P = (1-\beta_1^t)(\sqrt{\hat v} + \epsilon)` and :math:`\eta' = \eta(1-\beta_1)`,

    .. math::
        y = \theta - \eta P^{-1} m^+, \quad \theta^+ = \operatorname{prox}^P_{\eta' g}(y), \quad
        m^+ := P(\theta - \theta^+)/\eta,

    and the energy :math:`V = f + g + \frac{\omega}{2}\|\theta\|^2 + \frac{\beta_1}{2\eta'}\|d\|_P^2` falls for fixed P and
    :math:`\eta' \le 2(1-\beta_1)/L`, L the smoothness in P of f with the decay, which is coupled to the gradient. Since P
    changes, the decrease is *checked* in the P of each step, not assumed. With ``decoupled_weight_decay=True`` the law is that
    of :class:`AdamW`.

    Args:
        params: parameters, named parameters or groups, as for torch.
        lr: learning rate :math:`\eta`, a finite number :math:`\ge 0` or a tensor with one element.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        eps: :math:`\epsilon`.
        weight_decay: :math:`\omega \ge 0`, coupled; decoupled with ``decoupled_weight_decay=True``, which is :class:`AdamW`.
        amsgrad: use the largest second moment so far.
        foreach: as for torch.
        maximize: maximize the loss.
        capturable: as for torch.
        differentiable: as for torch, with ``guard="off"`` and no regularizer only.
        fused: as for torch.
        decoupled_weight_decay: as for torch.
        **settings: of the guard, and regularizers: see :class:`GuardSettings` and :class:`AdamW`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, arguments exclude each other, or a penalty has no exact prox in a
            diagonal metric.

    References:
        Kingma and Ba, *Adam*, 2015.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = Adam([w], lr=1e6, guard="strict")
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

    rule = Adaptive()
    torch_class = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **settings: Unpack[GuardSettings],
    ) -> None:
        check_lr(lr)
        with self.set_up(settings):
            torch.optim.Adam.__init__(
                self, params, lr, betas, eps, weight_decay, amsgrad,
                foreach=foreach, maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
                decoupled_weight_decay=decoupled_weight_decay,
            )  # fmt: skip


class AdamW(GuardedOptimizer, torch.optim.AdamW):
    r"""torch's AdamW with prox or projection in the metric of the step and a guard on its energy.

    With :math:`P = (1-\beta_1^t)(\sqrt{\hat v} + \epsilon)`, :math:`\eta' = \eta(1-\beta_1)` and
    :math:`\theta_\omega = (1-\eta\omega)\theta`,

    .. math::
        y = \theta_\omega - \eta P^{-1} m^+, \quad \theta^+ = \operatorname{prox}^P_{\eta' g}(y), \quad
        m^+ := P(\theta_\omega - \theta^+)/\eta,

    and the energy :math:`V = f + g + \frac{\omega}{2}\|\theta\|_P^2 + \frac{\beta}{2\eta'}\|d\|_P^2`,
    :math:`\beta = \beta_1(1-\eta\omega)`, falls for fixed P and :math:`\eta' \le 2(1-\beta)/(L+\omega)`, L the smoothness of f
    in P. Since P changes, the decrease is *checked* in the P of each step, not assumed.

    Args:
        params: parameters, named parameters or groups, as for torch.
        lr: learning rate :math:`\eta`, a finite number :math:`\ge 0` or a tensor with one element.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        eps: :math:`\epsilon`.
        weight_decay: :math:`\omega \ge 0`, decoupled.
        amsgrad: use the largest second moment so far.
        maximize: maximize the loss.
        foreach: as for torch.
        capturable: as for torch.
        differentiable: as for torch, with ``guard="off"`` and no regularizer only.
        fused: as for torch.
        **settings: of the guard, and regularizers: see :class:`GuardSettings`. A penalty needs an exact prox in a diagonal metric:
            thresholds are scaled per coordinate. A set with an exact projection in a diagonal metric is projected on so; on any
            other the projection is Euclidean, not in the metric: feasible all the same, and the decrease is checked.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, arguments exclude each other, or a penalty has no exact prox in a
            diagonal metric.

    References:
        Yun, Lozano and Yang, *Adaptive proximal gradient methods for structured neural networks*, 2021 (the prox in the metric).

    Examples:
        >>> from stableopt.constraints import L1
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 0.1]))
        >>> optimizer = AdamW([w], lr=0.1, weight_decay=0.0, prox=L1(0.5), guard="strict")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * ((w - torch.tensor([2.0, 0.2])) ** 2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(500):
        ...     _ = optimizer.step(closure)
        >>> [round(x, 3) for x in w.tolist()]  # the soft threshold of (2, 0.2)
        [1.5, 0.0]
    """

    rule = Adaptive()
    torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **settings: Unpack[GuardSettings],
    ) -> None:
        check_lr(lr)
        with self.set_up(settings):
            torch.optim.AdamW.__init__(
                self, params, lr, betas, eps, weight_decay, amsgrad,
                maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
            )  # fmt: skip
