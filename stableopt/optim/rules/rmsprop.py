"""The rule of ``torch.optim.RMSprop``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints import Regularizer
from stableopt.optim.rules.adaptive import refusal_in_metric
from stableopt.optim.rules.base import (
    Group,
    State,
    UpdateRule,
    add_scaled_,
    number,
    real_view,
    unviewed,
    weighted_square,
    zero_energy,
)
from stableopt.theory import sgd_energy_limit

__all__ = ["RootMeanSquare"]


@dataclass(frozen=True)
class RootMeanSquare(UpdateRule):
    r"""RMSprop: heavy ball in the metric :math:`P = \sqrt v+\epsilon`, for the centered form :math:`\sqrt{v-\bar g^2}+\epsilon`.

    torch's buffer :math:`b^+ = \beta b+P^{-1}(\nabla f+\omega\theta)` stands for :math:`d = -\eta b`, whatever P was; with
    :math:`F = f+\frac\omega2\|\theta\|^2` the energy is :math:`F+\frac{\beta}{2\eta}\|d\|_P^2`, which for fixed P falls by
    :math:`(\frac{1-\beta}{\eta}-\frac L2)\|d^+\|_P^2`, L the smoothness of F in P.

    Note:
        P changes from step to step; both energies of one step are taken in the P of that step.

    Examples:
        >>> group = {"lr": 0.5, "momentum": 0.5}
        >>> RootMeanSquare().limit(group), RootMeanSquare().energy_limit(1.0, group)
        (6.0, 1.0)
    """

    complex_too: ClassVar[bool] = True

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return torch's RMSprop step."""
        lr, alpha, beta = number(group["lr"]), group["alpha"], self.momentum(group)
        g = (-gradient if group.get("maximize") else gradient) + self._omega(group) * parameter
        x, g = real_view(parameter), real_view(g)
        step = state["step"] if state else torch.zeros(())

        def old(name: str) -> Tensor:
            return real_view(state[name]) if state else torch.zeros_like(x)

        new = state | {
            "step": step + 1,
            "square_avg": unviewed(alpha * old("square_avg") + (1 - alpha) * g * g, parameter),
        }
        if group.get("centered"):
            mean = old("grad_avg")
            new["grad_avg"] = unviewed(mean + (1 - alpha) * (g - mean), parameter)
        direction = g / self.metric(new, group)
        if beta > 0:
            direction = beta * old("momentum_buffer") + direction
            new["momentum_buffer"] = unviewed(direction, parameter)
        return unviewed(x - lr * direction, parameter), new

    def limit(self, group: Group) -> float:
        r"""Return :math:`2(1+\beta)/\eta` in the metric P; a coupled decay belongs to the curvature.

        A momentum above 1 grows by itself: the limit is then minus infinity.
        """
        lr, beta = number(group["lr"]), self.momentum(group)
        if beta > 1:
            return -math.inf
        return 2 * (1 + beta) / lr if lr else math.inf

    def energy_limit(self, smoothness: float, group: Group) -> float:
        r"""Return :math:`2(1-\beta)/L` for fixed P; L is the smoothness in P of the loss and its coupled decay.

        Raises:
            ValueError: if ``smoothness`` is negative or not finite.
        """
        return sgd_energy_limit(smoothness, momentum=self.momentum(group))

    def momentum(self, group: Group) -> float:
        r"""Return :math:`\beta`."""
        return number(group.get("momentum", 0.0))

    def effective_lr(self, group: Group, *, first: bool) -> float:
        r"""Return :math:`\eta`."""
        return number(group["lr"])

    def metric(self, state: State, group: Group) -> Tensor:
        """Return P for the state after the step."""
        v = real_view(state["square_avg"])
        if group.get("centered"):
            mean = real_view(state["grad_avg"])
            v = v.addcmul(mean, mean, value=-1.0)
        return v.sqrt() + group["eps"]

    def buffer(self, state: State) -> Tensor | None:
        """Return ``momentum_buffer``."""
        return state.get("momentum_buffer")

    def displacement(self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        r"""Return :math:`-\eta b`."""
        return buffer * -number(group["lr"])

    def motion(
        self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group, state: State | None = None
    ) -> Tensor:
        r"""Return :math:`\eta^2\|b\|_P^2`."""
        return number(group["lr"]) ** 2 * weighted_square(buffer, metric)

    def realizes(self, group: Group) -> bool:
        """Return True."""
        return True

    def decay(self, parameter: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        r"""Return :math:`\frac{\omega}{2}\|\theta\|^2`."""
        omega = self._omega(group)
        return 0.5 * omega * weighted_square(parameter, 1.0) if omega else zero_energy(parameter)

    def realign(self, correction: Tensor, state: State, metric: Tensor | float, group: Group) -> None:
        r"""Add :math:`(y - \theta^+)/\eta` to the buffer."""
        lr, buffer = number(group["lr"]), self.buffer(state)
        if buffer is not None and lr > 0:
            add_scaled_(buffer, correction.to(buffer.dtype), 1.0 / lr)

    def takes(self, group: Group, regularizer: Regularizer) -> str | None:
        """Refuse penalties without an exact prox in a diagonal metric."""
        return refusal_in_metric(group, regularizer)

    @staticmethod
    def _omega(group: Group) -> float:
        return number(group.get("weight_decay", 0.0))
