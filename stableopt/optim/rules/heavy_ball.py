"""The rule of ``torch.optim.SGD``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints import Regularizer
from stableopt.optim.rules.base import (
    Group,
    Scratch,
    State,
    UpdateRule,
    add_scaled_,
    number,
    weighted_square,
    zero_energy,
)
from stableopt.theory import sgd_energy_limit

__all__ = ["HeavyBall"]


@dataclass(frozen=True)
class HeavyBall(UpdateRule):
    r"""SGD with momentum :math:`\beta`, dampening :math:`\delta` and coupled weight decay :math:`\omega`; P is the identity.

    torch's buffer :math:`b^+ = \beta b + (1-\delta)(\nabla f + \omega\theta)` stands for :math:`d = -\eta b`, and
    :math:`\eta' = \eta(1-\delta)` (:math:`\eta` in the first step, where torch takes the bare gradient).

    Note:
        For Nesterov's momentum the same energy is used; its dissipation is checked, not proved.

    Examples:
        >>> group = {"lr": 0.1, "momentum": 0.9}
        >>> round(HeavyBall().limit(group), 9), round(HeavyBall().energy_limit(1.0, group), 9)
        (38.0, 0.2)
    """

    complex_too: ClassVar[bool] = True

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return torch's SGD step."""
        lr, beta, omega = number(group["lr"]), self.momentum(group), number(group.get("weight_decay", 0.0))
        g = (-gradient if group.get("maximize") else gradient) + omega * parameter
        if beta == 0:
            return parameter - lr * g, dict(state)
        old = state.get("momentum_buffer")
        buffer = g if old is None else beta * old + (1 - self._dampening(group)) * g
        direction = g + beta * buffer if group.get("nesterov") else buffer
        return parameter - lr * direction, state | {"momentum_buffer": buffer}

    def limit(self, group: Group) -> float:
        r"""Return :math:`2(1+\beta)/((1-\delta)\eta) - \omega`, with Nesterov :math:`2(1+\beta)/((1+2\beta)\eta) - \omega`.

        It bounds the curvature of the loss alone. A momentum above 1 grows by itself: the limit is then minus infinity. A dampening
        of 1 lets no gradient in (no limit), one above 1 turns gradients round (only a concave loss is stable).
        """
        lr, beta = number(group["lr"]), self.momentum(group)
        gain = 1 + 2 * beta if group.get("nesterov") else 1 - self._dampening(group)
        if beta > 1:
            return -math.inf
        if lr == 0 or gain == 0:
            return math.inf
        return (2 * (1 + beta) / gain / lr if gain > 0 else 0.0) - number(group.get("weight_decay", 0.0))

    def energy_limit(self, smoothness: float, group: Group) -> float:
        r"""Return :math:`2(1-\beta)/((1-\delta)(L+\omega))`.

        Raises:
            ValueError: for Nesterov's momentum, for which no dissipating energy is known here, and if ``smoothness`` is
                negative or not finite.
        """
        if group.get("nesterov"):
            raise ValueError(
                "no dissipating energy is known for Nesterov's momentum; use nesterov=False for a proved limit."
            )
        omega = number(group.get("weight_decay", 0.0))
        return sgd_energy_limit(
            smoothness, momentum=self.momentum(group), dampening=self._dampening(group), weight_decay=omega
        )

    def momentum(self, group: Group) -> float:
        r"""Return :math:`\beta`."""
        return number(group.get("momentum", 0.0))

    def effective_lr(self, group: Group, *, first: bool) -> float:
        r"""Return :math:`\eta(1-\delta)`, without dampening in the first step or without momentum."""
        return number(group["lr"]) * (1.0 if first else 1.0 - self._dampening(group))

    def metric(self, state: State, group: Group) -> float:
        """Return 1."""
        return 1.0

    def buffer(self, state: State) -> Tensor | None:
        """Return ``momentum_buffer``."""
        return state.get("momentum_buffer")

    def displacement(self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        r"""Return :math:`-\eta b`."""
        return buffer * -number(group["lr"])

    def motion(
        self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group, state: State | None = None
    ) -> Tensor:
        r"""Return :math:`\eta^2\|b\|^2`."""
        return number(group["lr"]) ** 2 * weighted_square(buffer, 1.0)

    def realizes(self, group: Group) -> bool:
        """Return whether the buffer is the displacement: not with Nesterov's momentum."""
        return not group.get("nesterov")

    def quick_sums(
        self, group: Group, start: Tensor, buffer: Tensor | None, end: Tensor, state: State, scratch: Scratch
    ) -> tuple[float, ...] | None:
        """Return the sums from at most four dot products."""
        eta, beta = self.effective_lr(group, first=buffer is None), self.momentum(group)
        if group.get("nesterov") or eta <= 0:
            return None
        d = torch.sub(end, start, out=scratch.line(0, start))
        length = scratch.dot(d, d)
        square = length / eta
        before, after = 0.0, 0.5 * beta * square
        if beta and buffer is not None:
            before = 0.5 * beta / eta * number(group["lr"]) ** 2 * scratch.dot(buffer, buffer)
        omega = number(group.get("weight_decay", 0.0))
        if omega:
            here = scratch.dot(start, start)
            before, after = (
                before + 0.5 * omega * here,
                after + 0.5 * omega * (here + 2 * scratch.dot(start, d) + length),
            )
        return before, after, square, (1.0 - beta) * square, length

    def decay(self, parameter: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        r"""Return :math:`\frac{\omega}{2}\|\theta\|^2`."""
        omega = number(group.get("weight_decay", 0.0))
        return 0.5 * omega * weighted_square(parameter, 1.0) if omega else zero_energy(parameter)

    def realign(self, correction: Tensor, state: State, metric: Tensor | float, group: Group) -> None:
        r"""Add :math:`(y - \theta^+)/\eta` to the buffer."""
        lr, buffer = number(group["lr"]), self.buffer(state)
        if buffer is not None and lr > 0:
            add_scaled_(buffer, correction.to(buffer.dtype), 1.0 / lr)

    def takes(self, group: Group, regularizer: Regularizer) -> str | None:
        """Refuse everything for Nesterov's momentum."""
        if group.get("nesterov"):
            return (
                "nesterov=True takes no prox or constraint: no dissipating energy is known for the pair, "
                "and the gradient is taken at an extrapolated point, which need not be feasible; use nesterov=False."
            )
        return None

    def _dampening(self, group: Group) -> float:
        """Return the dampening, which acts only with momentum."""
        return number(group.get("dampening", 0.0)) if self.momentum(group) else 0.0
