"""The optimizers: torch's own classes, each with its rule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stableopt.constraints import Constraint, Regularizer
from stableopt.optim.base import GuardedOptimizer, check_lr
from stableopt.optim.rules import Adaptive, HeavyBall

__all__ = ["SGD", "AdamW"]


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
        prox: a :class:`stableopt.constraints.Regularizer` g, per group.
        constraint: a :class:`stableopt.constraints.Constraint`, per group; its indicator is g.
        guard: ``off`` (torch's step), ``monitor`` (check and report), ``backtrack`` (shrink until the energy falls; keep the
            smallest try if none does), ``strict`` (undo it then).
        max_shrinks: how often all learning rates may shrink within one step.
        shrink: the factor of each shrinking.
        grow: the factor by which the scale recovers after an accepted step.
        armijo: c of the decrease that is asked for.
        maximize: maximize the loss; the energy is that of its negative.
        foreach: as for torch.
        differentiable: as for torch, with ``guard="off"`` and no regularizer only.
        fused: as for torch.

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
        prox: Regularizer | None = None,
        constraint: Constraint | None = None,
        guard: str = "backtrack",
        max_shrinks: int = 10,
        shrink: float = 0.5,
        grow: float = 1.5,
        armijo: float = 1e-4,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_lr(lr)
        own = {
            "prox": prox,
            "constraint": constraint,
            "guard": guard,
            "max_shrinks": max_shrinks,
            "shrink": shrink,
            "grow": grow,
            "armijo": armijo,
        }
        self.set_up(own)
        torch.optim.SGD.__init__(
            self, params, lr, momentum, dampening, weight_decay, nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self.defaults |= self.__dict__.pop("_own")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_fraction("momentum", group["momentum"])
        dampening = group["dampening"]
        plain = group["guard"] == "off" and not (group["prox"] or group["constraint"])
        if not math.isfinite(dampening) or (dampening >= 1 and not plain):
            raise ValueError(
                f"dampening must be a finite number below 1, got {dampening!r}: from 1 on gradients enter the momentum with the "
                "wrong sign or not at all, and no energy falls; guard='off' without prox or constraint takes what torch takes."
            )
        if group["nesterov"] and (group["prox"] or group["constraint"]):
            raise ValueError(
                "nesterov=True takes no prox or constraint: no dissipating energy is known for the pair; use nesterov=False."
            )


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
        prox: a :class:`stableopt.constraints.Regularizer` with an exact prox in a diagonal metric, per group:
            thresholds are scaled per coordinate.
        constraint: a :class:`stableopt.constraints.Constraint`, per group. A set with an exact projection in a
            diagonal metric is projected on so; on any other
            the projection is Euclidean, not in the metric: feasible all the same, and the decrease is checked.
        guard: ``off``, ``monitor``, ``backtrack`` or ``strict``, see :class:`SGD`.
        max_shrinks: how often all learning rates may shrink within one step.
        shrink: the factor of each shrinking.
        grow: the factor by which the scale recovers after an accepted step.
        armijo: c of the decrease that is asked for.
        maximize: maximize the loss.
        foreach: as for torch.
        capturable: as for torch.
        differentiable: as for torch, with ``guard="off"`` and no regularizer only.
        fused: as for torch.

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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        prox: Regularizer | None = None,
        constraint: Constraint | None = None,
        guard: str = "backtrack",
        max_shrinks: int = 10,
        shrink: float = 0.5,
        grow: float = 1.5,
        armijo: float = 1e-4,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_lr(lr)
        own = {
            "prox": prox,
            "constraint": constraint,
            "guard": guard,
            "max_shrinks": max_shrinks,
            "shrink": shrink,
            "grow": grow,
            "armijo": armijo,
        }
        self.set_up(own)
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self.defaults |= self.__dict__.pop("_own")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not math.isfinite(group["eps"]):
            raise ValueError(f"eps must be a finite number >= 0, got {group['eps']!r}.")
        plain = group["guard"] == "off" and not (group["prox"] or group["constraint"])
        if not plain and any(p.dtype.is_complex for p in group["params"]):
            raise TypeError(
                "AdamW has no real metric for complex parameters: use torch.view_as_real, "
                "or guard='off' without prox or constraint."
            )
        if group["prox"] is not None and not group["prox"].diagonal:
            raise ValueError(
                f"{group['prox']!r} has no exact prox in the metric of AdamW; "
                "use a penalty that has (its `diagonal` is True, such as L1), a constraint, or SGD."
            )


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}.")
