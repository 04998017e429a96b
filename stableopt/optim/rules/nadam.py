"""The rule of ``torch.optim.NAdam``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.constraints import Regularizer
from stableopt.optim.rules.adaptive import Moments, count_of
from stableopt.optim.rules.base import Group, State, number, real_view, weighted_square, zero_energy

__all__ = ["AdaptiveNesterov"]

_MOMENTUM_DECAY = 4e-3
"""torch's default."""


@dataclass(frozen=True)
class AdaptiveNesterov(Moments):
    r"""NAdam: Adam with a look-ahead, :math:`\theta^+ = (1-\eta\omega)\theta-\eta(\sqrt{\hat v}+\epsilon)^{-1}(ag+bm^+)`.

    With :math:`\mu_t = \beta_1(1-\frac12 0.96^{t\psi})`, :math:`a = \frac{1-\mu_t}{1-\prod_{i\le t}\mu_i}` and
    :math:`b = \frac{\mu_{t+1}}{1-\prod_{i\le t+1}\mu_i}`. Frozen in time the step is stable for a curvature (of
    :math:`(\sqrt{\hat v}+\epsilon)^{-1}H`) below

    .. math:: \frac{(1+\beta_1)(2-\eta\omega)}{\eta\,s_t}, \qquad s_t = a(1+\beta_1)+b(1-\beta_1).

    *Proof.* The step on :math:`(\theta, m)` has the trace
    :math:`\kappa+\beta_1-\eta\lambda(a+b(1-\beta_1))` and the determinant :math:`\beta_1(\kappa-\eta\lambda a)`,
    :math:`\kappa = 1-\eta\omega`. Jury's test asks for :math:`1+\text{trace}+\det > 0`, which is the formula, and
    :math:`\det > -1`, which follows: at the formula :math:`1+\det` is proportional to
    :math:`(1+\beta_1\kappa)s_t-(1+\beta_1)(1+\kappa)a\beta_1`, linear in :math:`\kappa` with the values
    :math:`(1-\beta_1)s_t` and :math:`(1-\beta_1^2)(a+b)` at -1 and 1.

    The metric of the rule is :math:`P = \frac{s_\infty}{s_t}(\sqrt{\hat v}+\epsilon)`, so that one limit holds for all t. While
    :math:`\mu_t` grows from :math:`\beta_1/2` to :math:`\beta_1` (over thousands of steps by default) :math:`s_t` falls fourfold.

    The energy is that of a heavy ball with the same two gains: one step takes
    :math:`\kappa_t = a+b(1-\beta_1)` of the gradient and :math:`b\beta_1` of the momentum before it, so that

    .. math:: V = f + g_\omega + \frac{\eta b^2}{2\kappa_t}\|m\|_{P^{-1}}^2, \qquad P = \sqrt{\hat v}+\epsilon,

    :math:`g_\omega` the energy of the decay.

    Note:
        The dissipation of this energy is checked, not proved: the step is not where the momentum says.

    References:
        Dozat, *Incorporating Nesterov momentum into Adam*, 2016 (the method).

    Examples:
        >>> round(AdaptiveNesterov().limit({"lr": 1.0, "betas": (0.5, 0.999)}), 9)
        3.0
    """

    def limit(self, group: Group) -> float:
        r"""Return :math:`\frac{(1+\beta_1)(2-\eta\omega)}{\eta(1+\beta_1-2\beta_1\mu_\infty)}`, in the metric P of the step.

        :math:`\mu_\infty = \beta_1`, or half of it if the momentum does not grow (``momentum_decay=0``). With the former this is
        :math:`\frac{(1+\beta_1)(2-\eta\omega)}{(1-\beta_1)(1+2\beta_1)\eta}`.
        """
        lr, beta1 = number(group["lr"]), group["betas"][0]
        return (1.0 + self._kept(group)) * ((1 + beta1) / _late_gain(group)) / lr if lr else math.inf

    def energy_limit(self, smoothness: float, group: Group) -> float:
        """Raise: nothing is proved.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "no dissipating energy is known for NAdam, whose momentum is Nesterov's; use Adam or AdamW for a proved limit."
        )

    def metric(self, state: State, group: Group) -> Tensor:
        """Return P for the state after the step."""
        beta1, beta2 = group["betas"]
        a, b = _weights(state, group)
        gain = a * (1 + beta1) + b * (1 - beta1)
        root = (real_view(state["exp_avg_sq"]) / (1 - beta2 ** count_of(state["step"]))).sqrt() + group["eps"]
        return _late_gain(group) / gain * root

    def momentum(self, group: Group) -> float:
        r"""Return :math:`\beta_1\mu_\infty`, with a decoupled decay times :math:`1-\eta\omega`."""
        return group["betas"][0] * _late_momentum(group) * self._kept(group)

    def effective_lr(self, group: Group, *, first: bool) -> float:
        r"""Return :math:`\eta(1-\beta_1)(1+\mu_\infty)`, the late :math:`\eta\kappa`."""
        return number(group["lr"]) * (1 - group["betas"][0]) * (1 + _late_momentum(group))

    def motion(
        self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group, state: State | None = None
    ) -> Tensor:
        r"""Return what makes :math:`\frac{\beta}{2\eta'}\|d\|_P^2` the kinetic energy of the class."""
        lr, beta, beta1 = number(group["lr"]), self.momentum(group), group["betas"][0]
        if not state or beta <= 0 or lr <= 0:
            return zero_energy(parameter)
        a, b = _weights(state, group)
        gain = a * (1 + beta1) + b * (1 - beta1)
        kinetic = (
            0.5 * lr * b * b / (a + b * (1 - beta1)) * (_late_gain(group) / gain)
        )  # P holds late over present gain
        square = weighted_square(real_view(buffer), 1.0 / metric)
        return kinetic * 2 * self.effective_lr(group, first=False) / beta * square

    def realizes(self, group: Group) -> bool:
        """Return False: the step looks ahead of its momentum."""
        return False

    def takes(self, group: Group, regularizer: Regularizer) -> str | None:
        """Refuse everything."""
        return (
            "NAdam takes no prox or constraint: no dissipating energy is known for the pair, and its gradient is taken at an "
            "extrapolated point, which need not be feasible; use Adam, AdamW or RAdam."
        )

    def _further(self, new: State, old: State, group: Group) -> State:
        product = old["mu_product"] if old else torch.ones(())
        return new | {"mu_product": product * _momentum_at(count_of(new["step"]), group)}

    def _direction(self, gradient: Tensor, mean: Tensor, new: State, group: Group) -> Tensor:
        a, b = _weights(new, group)
        root = (real_view(new["exp_avg_sq"]) / (1 - group["betas"][1] ** count_of(new["step"]))).sqrt() + group["eps"]
        return a * (gradient / root) + b * (mean / root)


def _momentum_at(t: float | Tensor, group: Group) -> float | Tensor:
    return group["betas"][0] * (1.0 - 0.5 * 0.96 ** (t * group.get("momentum_decay", _MOMENTUM_DECAY)))


def _weights(state: State, group: Group) -> tuple[Any, Any]:
    t, product = count_of(state["step"]), count_of(state["mu_product"])
    following = _momentum_at(t + 1, group)
    return (1 - _momentum_at(t, group)) / (1 - product), following / (1 - product * following)


def _late_momentum(group: Group) -> float:
    beta1 = group["betas"][0]
    return beta1 if group.get("momentum_decay", _MOMENTUM_DECAY) > 0 else beta1 / 2


def _late_gain(group: Group) -> float:
    beta1 = group["betas"][0]
    return 1 + beta1 - 2 * beta1 * _late_momentum(group)
