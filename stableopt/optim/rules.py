r"""What is known about update maps: the map itself, the limits of its stability, and the energy that it dissipates.

A rule is a set of pure functions of one parameter :math:`\theta`, its gradient, its state and the hyper-parameters of its group, in
the names that torch gives them. Both rules here are heavy-ball methods in a metric P: with the displacement
:math:`d = \theta_t - \theta_{t-1}`, an effective learning rate :math:`\eta'` and an effective momentum :math:`\beta`,

.. math:: d^+ = \beta d - \eta' P^{-1} \nabla F(\theta), \qquad
    V = F(\theta) + \frac{\beta}{2\eta'} \|d\|_P^2, \qquad
    V^+ \le V - \Bigl(\frac{1-\beta}{\eta'} - \frac{L}{2}\Bigr) \|d^+\|_P^2,

where F is the loss plus the weight decay (and the regularizer, if the step ends with its prox and the momentum is set to the
realised displacement) and L the smoothness in the metric P of all but the regularizer (THEORY T4).
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableopt.theory import adamw_energy_limit, sgd_energy_limit

__all__ = ["Adaptive", "HeavyBall", "UpdateRule", "rule_for", "step_sums", "weighted_square"]

State: TypeAlias = dict[str, Any]
Group: TypeAlias = Mapping[str, Any]


class UpdateRule(ABC):
    """The update map of an optimizer, its limits and its energy; one instance serves all parameters.

    Examples:
        >>> import torch
        >>> rule = rule_for(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.5))
        >>> type(rule).__name__
        'HeavyBall'
    """

    @abstractmethod
    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return the next parameter and state; nothing is changed in place."""

    @abstractmethod
    def limit(self, group: Group) -> float:
        r"""Return the largest curvature (eigenvalue of :math:`P^{-1}H`) for which the linearized map is stable, the edge."""

    @abstractmethod
    def energy_limit(self, smoothness: float, group: Group) -> float:
        r"""Return the largest lr for which the energy provably dissipates, for a loss ``smoothness``-smooth in P."""

    @abstractmethod
    def momentum(self, group: Group) -> float:
        r"""Return the effective momentum :math:`\beta`."""

    @abstractmethod
    def effective_lr(self, group: Group, *, first: bool) -> float:
        r"""Return :math:`\eta'`; ``first`` says that this is the first step of a parameter, which has no momentum yet."""

    @abstractmethod
    def metric(self, state: State, group: Group) -> Tensor | float:
        """Return the diagonal of P that the step just taken has used."""

    @abstractmethod
    def buffer(self, state: State) -> Tensor | None:
        """Return the momentum buffer, None if there is none yet."""

    @abstractmethod
    def displacement(self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        """Return the displacement that the momentum buffer stands for."""

    @abstractmethod
    def decay(self, parameter: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        """Return the energy of the weight decay, 0-d float64."""

    @abstractmethod
    def realign(self, correction: Tensor, state: State, metric: Tensor | float, group: Group) -> None:
        r"""Set the buffer to the realised displacement, in place.

        Args:
            correction: :math:`y - \theta^+`, what the prox took off the point :math:`y` that the plain step reached.
            state: of the parameter.
            metric: P of this step.
            group: hyper-parameters.
        """

    def energy(
        self, parameter: Tensor, buffer: Tensor | None, metric: Tensor | float, group: Group, *, first: bool
    ) -> Tensor:
        r"""Return the part of the energy beside the loss and the regularizer: decay plus :math:`\beta/(2\eta') \|d\|_P^2`.

        Args:
            parameter: :math:`\theta`, any shape.
            buffer: its momentum buffer, None for none yet, which means zero.
            metric: P of the step that is judged; the same before and after it.
            group: hyper-parameters.
            first: whether the step judged is the parameter's first.

        Returns:
            0-d float64 tensor.
        """
        beta, eta = self.momentum(group), self.effective_lr(group, first=first)
        total = self.decay(parameter, metric, group)
        if beta == 0.0 or eta == 0.0:
            return total
        if buffer is None:  # zero momentum is not always zero displacement: a decoupled decay moves too
            buffer = torch.zeros_like(parameter)
        return total + beta / (2.0 * eta) * weighted_square(self.displacement(parameter, buffer, metric, group), metric)


def step_sums(
    rule: UpdateRule, group: Group, start: Tensor, buffer: Tensor | None, end: Tensor, state: State
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Return what one parameter adds to the energies of a step.

    Args:
        rule: of the optimizer.
        group: hyper-parameters, those that the step used.
        start: the parameter before the step.
        buffer: its momentum buffer before the step, None if it had none.
        end: the parameter after the step.
        state: its state after the step.

    Returns:
        Five 0-d float64 tensors: the energy before and after without the loss, :math:`\|d\|_P^2/\eta'`,
        :math:`(1-\beta)\|d\|_P^2/\eta'` and :math:`\|d\|^2`.

    Examples:
        >>> group = {"lr": 0.5, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
        >>> [x.item() for x in step_sums(HeavyBall(), group, torch.zeros(1), None, torch.ones(1), {})]
        [0.0, 0.0, 2.0, 2.0, 1.0]
    """
    metric, first = rule.metric(state, group), buffer is None
    eta, prox = rule.effective_lr(group, first=first), group.get("prox")
    d = end - start
    length = weighted_square(d, 1.0)
    square = weighted_square(d, metric) if isinstance(metric, Tensor) else metric * length
    square = square / eta if eta > 0 else torch.zeros_like(length)
    before = rule.energy(start, buffer, metric, group, first=first)
    after = rule.energy(end, rule.buffer(state), metric, group, first=first)
    if prox is not None:  # a set contributes 0: steps begin and end inside
        before, after = before + prox.value(start), after + prox.value(end)
    return before, after, square, (1.0 - rule.momentum(group)) * square, length


def weighted_square(x: Tensor, metric: Tensor | float) -> Tensor:
    r"""Return :math:`\|x\|_P^2 = \sum P_i |x_i|^2`, summed in float64.

    Examples:
        >>> weighted_square(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5])).item()
        3.0
    """
    # A norm and a dot product read what a square and a sum would write and read again: this is most of what the guard computes.
    if not isinstance(metric, Tensor):
        norm = torch.linalg.vector_norm(x, dtype=torch.complex128 if x.is_complex() else torch.float64)
        return metric * norm * norm
    x = x.abs() if x.is_complex() else x
    # the product with the metric is rounded in its own dtype: all terms are positive, so that is one relative rounding
    return torch.dot((metric * x).double().flatten(), x.double().flatten())


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


@dataclass(frozen=True)
class HeavyBall(UpdateRule):
    r"""SGD with momentum :math:`\beta`, dampening :math:`\delta` and coupled weight decay :math:`\omega`; P is the identity.

    torch's buffer :math:`b^+ = \beta b + (1-\delta)(\nabla f + \omega\theta)` stands for :math:`d = -\eta b`, and
    :math:`\eta' = \eta(1-\delta)` (:math:`\eta` in the first step, where torch takes the bare gradient).

    Note:
        For Nesterov's momentum the same energy is used; its dissipation is checked, not proved.

    Examples:
        >>> group = {
        ...     "lr": 0.1,
        ...     "momentum": 0.9,
        ...     "dampening": 0.0,
        ...     "weight_decay": 0.0,
        ...     "nesterov": False,
        ...     "maximize": False,
        ... }
        >>> round(HeavyBall().limit(group), 9), round(HeavyBall().energy_limit(1.0, group), 9)
        (38.0, 0.2)
    """

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return torch's SGD step."""
        lr, beta, omega = _number(group["lr"]), group["momentum"], group["weight_decay"]
        g = (-gradient if group["maximize"] else gradient) + omega * parameter
        if beta == 0:
            return parameter - lr * g, dict(state)
        old = state.get("momentum_buffer")
        buffer = g if old is None else beta * old + (1 - group["dampening"]) * g
        direction = g + beta * buffer if group["nesterov"] else buffer
        return parameter - lr * direction, state | {"momentum_buffer": buffer}

    def limit(self, group: Group) -> float:
        r"""Return :math:`2(1+\beta)/((1-\delta)\eta) - \omega`, with Nesterov :math:`2(1+\beta)/((1+2\beta)\eta) - \omega`."""
        lr, beta, dampening = _number(group["lr"]), group["momentum"], group["dampening"] if group["momentum"] else 0.0
        gain = 1 + 2 * beta if group["nesterov"] else 1 - dampening
        return 2 * (1 + beta) / (gain * lr) - group["weight_decay"] if lr else math.inf

    def energy_limit(self, smoothness: float, group: Group) -> float:
        r"""Return :math:`2(1-\beta)/((1-\delta)(L+\omega))`.

        Raises:
            ValueError: for Nesterov's momentum, for which no dissipating energy is known here, and if ``smoothness`` is
                negative or not finite.
        """
        if group["nesterov"]:
            raise ValueError(
                "no dissipating energy is known for Nesterov's momentum; use nesterov=False for a proved limit."
            )
        momentum, decay = group["momentum"], group["weight_decay"]
        dampening = group["dampening"] if momentum else 0.0
        return sgd_energy_limit(smoothness, momentum=momentum, dampening=dampening, weight_decay=decay)

    def momentum(self, group: Group) -> float:
        r"""Return :math:`\beta`."""
        return float(group["momentum"])

    def effective_lr(self, group: Group, *, first: bool) -> float:
        r"""Return :math:`\eta(1-\delta)`, without dampening in the first step or without momentum."""
        undamped = first or group["momentum"] == 0
        return _number(group["lr"]) * (1.0 if undamped else 1.0 - group["dampening"])

    def metric(self, state: State, group: Group) -> float:
        """Return 1."""
        return 1.0

    def buffer(self, state: State) -> Tensor | None:
        """Return ``momentum_buffer``."""
        return state.get("momentum_buffer")

    def displacement(self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        r"""Return :math:`-\eta b`."""
        return buffer * -_number(group["lr"])

    def decay(self, parameter: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        r"""Return :math:`\frac{\omega}{2}\|\theta\|^2`."""
        omega = group["weight_decay"]
        return 0.5 * omega * weighted_square(parameter, 1.0) if omega else _zero(parameter)

    def realign(self, correction: Tensor, state: State, metric: Tensor | float, group: Group) -> None:
        r"""Add :math:`(y - \theta^+)/\eta` to the buffer."""
        lr, buffer = _number(group["lr"]), self.buffer(state)
        if buffer is not None and lr > 0:
            buffer.add_(correction.to(buffer.dtype), alpha=1.0 / lr)


@dataclass(frozen=True)
class Adaptive(UpdateRule):
    r"""Adam and AdamW: the metric is :math:`P = (1-\beta_1^t)(\sqrt{v/(1-\beta_2^t)} + \epsilon)`.

    The step is :math:`\theta^+ = (1-\eta\omega)\theta - \eta P^{-1} m^+`,
    :math:`m^+ = \beta_1 m + (1-\beta_1)\nabla f`. For fixed P this is a
    heavy ball with :math:`\eta' = \eta(1-\beta_1)`, :math:`\beta = \beta_1(1-\eta\omega)` and the decay energy
    :math:`\frac{\omega}{2}\|\theta\|_P^2`; the buffer m stands for
    :math:`d = -\eta(\omega\theta + P^{-1}m)/(1-\eta\omega)`. Adam couples its decay to the gradient
    instead: then :math:`\beta = \beta_1`, the energy is :math:`\frac{\omega}{2}\|\theta\|^2`, :math:`d = -\eta P^{-1}m`.

    Note:
        P changes from step to step. Both energies of one step are taken in the P of that step; what V changes by when P changes is
        a drift that no step is judged by.

    Examples:
        >>> group = {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.0, "decoupled_weight_decay": True}
        >>> round(Adaptive().limit(group), 9), round(Adaptive().energy_limit(1.0, group), 9)
        (380.0, 2.0)
    """

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return torch's Adam or AdamW step."""
        lr, omega, (beta1, beta2) = _number(group["lr"]), group["weight_decay"], group["betas"]
        g = -gradient if group["maximize"] else gradient
        decayed = parameter
        if group["decoupled_weight_decay"]:
            decayed = parameter * (1 - lr * omega)
        elif omega:
            g = g + omega * parameter
        old = state or {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        new = old | {"step": old["step"] + 1, "exp_avg": old["exp_avg"] + (1 - beta1) * (g - old["exp_avg"])}
        new["exp_avg_sq"] = beta2 * old["exp_avg_sq"] + (1 - beta2) * g * g
        if group["amsgrad"]:
            new["max_exp_avg_sq"] = torch.maximum(
                old.get("max_exp_avg_sq", torch.zeros_like(parameter)), new["exp_avg_sq"]
            )
        return decayed - lr * new["exp_avg"] / self.metric(new, group), new

    def limit(self, group: Group) -> float:
        r"""Return :math:`(2-\eta\omega)(1+\beta_1)/((1-\beta_1)\eta)`.

        It bounds the curvature in the metric :math:`\sqrt{\hat v} + \epsilon`, once the bias correction has died out.
        """
        lr, omega, (beta1, _) = _number(group["lr"]), group["weight_decay"], group["betas"]
        if not lr:
            return math.inf
        shrink = lr * omega if group["decoupled_weight_decay"] else 0.0
        return (2 - shrink) * (1 + beta1) / ((1 - beta1) * lr)

    def energy_limit(self, smoothness: float, group: Group) -> float:
        r"""Return the largest :math:`\eta < 1/\omega` with :math:`\eta(1-\beta_1) \le 2(1-\beta)/(L+\omega)`, for fixed P.

        Raises:
            ValueError: if ``smoothness`` is negative or not finite.
        """
        omega = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0  # a coupled decay belongs to the loss
        proved = adamw_energy_limit(smoothness, beta1=group["betas"][0], weight_decay=omega)
        return min(proved, math.nextafter(1 / omega, 0.0)) if omega else proved

    def momentum(self, group: Group) -> float:
        r"""Return :math:`\beta_1(1-\eta\omega)`."""
        return group["betas"][0] * self._kept(group)

    def effective_lr(self, group: Group, *, first: bool) -> float:
        r"""Return :math:`\eta(1-\beta_1)`."""
        return _number(group["lr"]) * (1 - group["betas"][0])

    def metric(self, state: State, group: Group) -> Tensor:
        """Return P for the state after the step."""
        beta1, beta2 = group["betas"]
        t = state["step"]  # a fused or capturable step counts on its device: reading it would wait
        t = t.double() if isinstance(t, Tensor) and t.device.type != "cpu" else _number(t)
        v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        return (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + group["eps"])

    def buffer(self, state: State) -> Tensor | None:
        """Return ``exp_avg``."""
        return state.get("exp_avg")

    def displacement(self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        r"""Return :math:`-\eta(\omega\theta + P^{-1}m)/(1-\eta\omega)`, infinite for :math:`\eta\omega > 1`: not accepted."""
        lr, kept, moved = _number(group["lr"]), self._kept(group), buffer / metric
        if kept == 1.0:
            return moved * -lr
        return (moved + group["weight_decay"] * parameter) * (-lr / kept if kept > 0 else math.inf)

    def decay(self, parameter: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        r"""Return :math:`\frac{\omega}{2}\|\theta\|_P^2`, for a coupled decay in the Euclidean norm."""
        omega = group["weight_decay"]
        if not omega:
            return _zero(parameter)
        return 0.5 * omega * weighted_square(parameter, metric if group["decoupled_weight_decay"] else 1.0)

    def realign(self, correction: Tensor, state: State, metric: Tensor | float, group: Group) -> None:
        r"""Add :math:`P(y - \theta^+)/\eta` to ``exp_avg``."""
        lr, buffer = _number(group["lr"]), self.buffer(state)
        if buffer is not None and lr > 0:
            buffer.add_((metric * correction).to(buffer.dtype), alpha=1.0 / lr)

    @staticmethod
    def _kept(group: Group) -> float:
        return 1.0 - _number(group["lr"]) * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=like.device)


@singledispatch
def rule_for(optimizer: Optimizer) -> UpdateRule | None:  # noqa: ARG001 - dispatched on
    """Return what is known about an optimizer's update, or None if nothing is registered for its class.

    A subclass of a torch optimizer that has its own ``step`` is another optimizer: nothing is known about it. Register a rule for a
    class with ``rule_for.register``.

    Args:
        optimizer: any torch optimizer.

    Examples:
        >>> rule_for(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
        Adaptive()
        >>> rule_for(torch.optim.Rprop([torch.nn.Parameter(torch.ones(1))])) is None
        True
    """
    return None


@rule_for.register
def _(optimizer: torch.optim.SGD) -> UpdateRule | None:
    return HeavyBall() if _steps_like(optimizer, torch.optim.SGD) else None


@rule_for.register
def _(optimizer: torch.optim.Adam) -> UpdateRule | None:
    return Adaptive() if _steps_like(optimizer, torch.optim.Adam) else None


def _steps_like(optimizer: Optimizer, cls: type[Optimizer]) -> bool:
    return inspect.unwrap(type(optimizer).step) is inspect.unwrap(cls.step)
