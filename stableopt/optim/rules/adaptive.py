"""The rules of Adam's family: an exponential mean of the gradients, divided by a metric that is learned."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stableopt.constraints import Constraint, Regularizer
from stableopt.constraints.sharding import is_sharded
from stableopt.optim.rules.base import (
    Group,
    Scratch,
    State,
    UpdateRule,
    add_scaled_,
    inner,
    number,
    real_view,
    unviewed,
    weighted_square,
    zero_energy,
)
from stableopt.theory import adamw_energy_limit

__all__ = ["Adaptive", "Moments", "count_of", "refusal_in_metric"]


class Moments(UpdateRule):
    r"""What the rules of Adam, AdamW, RAdam and NAdam share: :math:`m^+ = \beta_1 m + (1-\beta_1)\nabla f`, a metric P.

    The step is :math:`\theta^+ = (1-\eta\omega)\theta - \eta P^{-1} m^+`. For fixed P this is a heavy ball with
    :math:`\eta' = \eta(1-\beta_1)`, :math:`\beta = \beta_1(1-\eta\omega)` and the decay energy
    :math:`\frac{\omega}{2}\|\theta\|_P^2`; the buffer m stands for
    :math:`d = -\eta(\omega\theta + P^{-1}m)/(1-\eta\omega)`. A coupled decay enters the gradient
    instead: then :math:`\beta = \beta_1`, the energy is :math:`\frac{\omega}{2}\|\theta\|^2`, :math:`d = -\eta P^{-1}m`.

    Real and imaginary parts of a complex parameter are parameters of their own: its metric has the shape of its
    :func:`~stableopt.optim.rules.base.real_view`.

    Note:
        P changes from step to step. Both energies of one step are taken in the P of that step; what V changes by when P changes is
        a drift that no step is judged by.

    Examples:
        >>> from stableopt.optim.rules import Adaptive
        >>> isinstance(Adaptive(), Moments)
        True
    """

    complex_too: ClassVar[bool] = True

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return torch's step."""
        lr, omega, (beta1, beta2) = number(group["lr"]), self._omega(group), group["betas"]
        x, g = real_view(parameter), real_view(-gradient if group.get("maximize") else gradient)
        decayed = x
        if self._decoupled(group):
            decayed = x * (1 - lr * omega)
        elif omega:
            g = g + omega * x
        step = state["step"] if state else torch.zeros(())
        m, v = (real_view(state[name]) if state else torch.zeros_like(x) for name in ("exp_avg", "exp_avg_sq"))
        m, v = m + (1 - beta1) * (g - m), beta2 * v + (1 - beta2) * g * g
        new = state | {"step": step + 1, "exp_avg": unviewed(m, parameter), "exp_avg_sq": unviewed(v, parameter)}
        new = self._further(new, state, group)
        return unviewed(decayed - lr * self._direction(g, m, new, group), parameter), new

    def _further(self, new: State, old: State, group: Group) -> State:
        """Complete the state after the step."""
        return new

    def _direction(self, gradient: Tensor, mean: Tensor, new: State, group: Group) -> Tensor:
        """Return what the learning rate multiplies; all tensors are real views."""
        return mean / self.metric(new, group)

    @abstractmethod
    def limit(self, group: Group) -> float:
        """Return the edge in the metric of the step."""

    def energy_limit(self, smoothness: float, group: Group) -> float:
        r"""Return the largest :math:`\eta < 1/\omega` with :math:`\eta(1-\beta_1) \le 2(1-\beta)/(L+\omega)`, for fixed P.

        Raises:
            ValueError: if ``smoothness`` is negative or not finite.
        """
        omega = self._omega(group) if self._decoupled(group) else 0.0  # a coupled decay belongs to the loss
        proved = adamw_energy_limit(smoothness, beta1=number(group["betas"][0]), weight_decay=omega)
        return min(proved, math.nextafter(1 / omega, 0.0)) if omega else proved

    def momentum(self, group: Group) -> float:
        r"""Return :math:`\beta_1(1-\eta\omega)`."""
        return group["betas"][0] * self._kept(group)

    def effective_lr(self, group: Group, *, first: bool) -> float:
        r"""Return :math:`\eta(1-\beta_1)`."""
        return number(group["lr"]) * (1 - group["betas"][0])

    def buffer(self, state: State) -> Tensor | None:
        """Return ``exp_avg``."""
        return state.get("exp_avg")

    def displacement(self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        r"""Return :math:`-\eta(\omega\theta + P^{-1}m)/(1-\eta\omega)`, infinite for :math:`\eta\omega > 1`: not accepted."""
        lr, kept, moved = number(group["lr"]), self._kept(group), unviewed(real_view(buffer) / metric, buffer)
        if kept == 1.0:
            return moved * -lr
        return (moved + self._omega(group) * parameter) * (-lr / kept if kept > 0 else math.inf)

    def motion(
        self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group, state: State | None = None
    ) -> Tensor:
        r"""Return :math:`\|d\|_P^2` of the displacement, without writing it down.

        .. math:: \frac{\eta^2}{(1-\eta\omega)^2}
            \bigl(\langle m, P^{-1}m\rangle + 2\omega\langle\theta, m\rangle + \omega^2\|\theta\|_P^2\bigr).
        """
        lr, kept = number(group["lr"]), self._kept(group)
        if kept <= 0 or parameter.is_complex() or is_sharded(parameter):
            return super().motion(parameter, buffer, metric, group, state)
        square = inner(buffer / metric, buffer)
        if kept < 1.0:
            omega = self._omega(group)
            square = square + 2 * omega * inner(parameter, buffer) + omega**2 * weighted_square(parameter, metric)
        return (lr / kept) ** 2 * square

    def realizes(self, group: Group) -> bool:
        """Return True: the momentum of Adam is the displacement, in units of the metric."""
        return self._kept(group) > 0

    def decay(self, parameter: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        r"""Return :math:`\frac{\omega}{2}\|\theta\|_P^2`, for a coupled decay in the Euclidean norm."""
        omega = self._omega(group)
        if not omega:
            return zero_energy(parameter)
        return 0.5 * omega * weighted_square(parameter, metric if self._decoupled(group) else 1.0)

    def realign(self, correction: Tensor, state: State, metric: Tensor | float, group: Group) -> None:
        r"""Add :math:`P(y - \theta^+)/\eta` to ``exp_avg``."""
        lr, buffer = number(group["lr"]), self.buffer(state)
        if buffer is not None and lr > 0:
            moved = unviewed(metric * real_view(correction), correction)
            add_scaled_(buffer, moved.to(buffer.dtype), 1.0 / lr)

    def takes(self, group: Group, regularizer: Regularizer) -> str | None:
        """Refuse penalties without an exact prox in a diagonal metric."""
        return refusal_in_metric(group, regularizer)

    @staticmethod
    def _omega(group: Group) -> float:
        return number(group.get("weight_decay", 0.0))

    @staticmethod
    def _decoupled(group: Group) -> bool:
        return bool(group.get("decoupled_weight_decay", False))

    def _kept(self, group: Group) -> float:
        return 1.0 - number(group["lr"]) * self._omega(group) if self._decoupled(group) else 1.0


@dataclass(frozen=True)
class Adaptive(Moments):
    r"""Adam and AdamW: the metric is :math:`P = (1-\beta_1^t)(\sqrt{v/(1-\beta_2^t)} + \epsilon)`.

    Examples:
        >>> group = {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.0, "decoupled_weight_decay": True}
        >>> round(Adaptive().limit(group), 9), round(Adaptive().energy_limit(1.0, group), 9)
        (380.0, 2.0)
    """

    def limit(self, group: Group) -> float:
        r"""Return :math:`(2-\eta\omega)(1+\beta_1)/((1-\beta_1)\eta)`.

        It bounds the curvature in the metric P of the step, which is :math:`\sqrt{\hat v} + \epsilon` once the bias correction has
        died out. A coupled decay belongs to the curvature.
        """
        lr, beta1 = number(group["lr"]), group["betas"][0]
        return (1.0 + self._kept(group)) * ((1 + beta1) / (1 - beta1)) / lr if lr else math.inf

    def metric(self, state: State, group: Group) -> Tensor:
        """Return P for the state after the step."""
        beta1, beta2 = group["betas"]
        t = count_of(state["step"])
        v = real_view(state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"])
        return (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + group["eps"])

    def quick_sums(
        self, group: Group, start: Tensor, buffer: Tensor | None, end: Tensor, state: State, scratch: Scratch
    ) -> tuple[float, ...] | None:
        """Return the sums from the metric, three products with it, and at most six dot products."""
        eta, lr, kept, t = (
            self.effective_lr(group, first=False),
            number(group["lr"]),
            self._kept(group),
            count_of(state["step"]),
        )
        if eta <= 0 or kept <= 0 or isinstance(t, Tensor):
            return None
        beta1, beta2 = group["betas"]
        v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        bias = 1 - beta1**t
        P = torch.sqrt(v, out=scratch.line(0, start)).mul_(bias / math.sqrt(1 - beta2**t)).add_(bias * group["eps"])
        d, product = torch.sub(end, start, out=scratch.line(1, start)), scratch.line(2, start)
        length, beta = scratch.dot(d, d), self.momentum(group)
        energy = scratch.dot(torch.mul(P, d, out=product), d)
        omega, decoupled = self._omega(group), self._decoupled(group)
        cross = scratch.dot(product if decoupled else d, start) if omega else 0.0
        here = 0.0
        if omega:
            here = scratch.dot(torch.mul(P, start, out=product) if decoupled else start, start)
        motion = omega**2 * here if decoupled else 0.0
        if beta and buffer is not None:
            motion += scratch.dot(torch.div(buffer, P, out=product), buffer)
            motion += 2 * omega * scratch.dot(start, buffer) if decoupled and omega else 0.0
        before = 0.5 * omega * here + 0.5 * beta / eta * (lr / kept) ** 2 * motion
        after = 0.5 * omega * (here + 2 * cross + (energy if decoupled else length)) + 0.5 * beta / eta * energy
        return before, after, energy / eta, (1.0 - beta) * energy / eta, length

    def _further(self, new: State, old: State, group: Group) -> State:
        if not group.get("amsgrad"):
            return new
        v = new["exp_avg_sq"]
        largest = old.get("max_exp_avg_sq", torch.zeros_like(v))
        return new | {"max_exp_avg_sq": unviewed(torch.maximum(real_view(largest), real_view(v)), v)}


def count_of(value: Any) -> float | Tensor:
    """Return a number of the state, such as the step count, as a float.

    What is kept on another device stays there, for reading it would wait, and so does one number per entry.

    Examples:
        >>> count_of(torch.tensor(3.0))
        3.0
    """
    if isinstance(value, Tensor) and (value.device.type != "cpu" or value.numel() != 1):
        return value.double()
    return number(value)


def refusal_in_metric(group: Group, regularizer: Regularizer) -> str | None:
    """Say why a penalty or a set does not fit a step in a learned diagonal metric, None if it does.

    Examples:
        >>> from stableopt.constraints import L1, NuclearNorm
        >>> refusal_in_metric({}, L1(0.5)) is None, refusal_in_metric({}, NuclearNorm(0.5)) is None
        (True, False)
    """
    if any(p.is_complex() for p in group.get("params", ())):
        return (
            "an adaptive optimizer has no real metric for complex parameters, so it takes no prox or constraint for them: "
            "use torch.view_as_real, or SGD."
        )
    if isinstance(regularizer, Constraint) or regularizer.diagonal:
        return None
    return (
        f"{regularizer!r} has no exact prox in the metric of an adaptive optimizer; "
        "use a penalty that has (its `diagonal` is True, such as L1), a constraint, or SGD."
    )
