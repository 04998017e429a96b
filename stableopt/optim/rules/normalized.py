"""The rules of normalized steps, of Lion and Muon: they have no linear limit and no metric, but an invariant of their decay."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints import Constraint, Regularizer
from stableopt.linalg.bound import upper
from stableopt.optim.orthogonalize import POLAR_NORM, adjustment, newton_schulz, orthogonalize
from stableopt.optim.rules.base import Group, State, UpdateRule, mixed, number, real_view, unviewed, zero_energy
from stableopt.theory import decayed_norm_bound

__all__ = ["SignDescent", "SpectralDescent"]


class Normalized(UpdateRule):
    r"""What Lion and Muon share: :math:`\theta^+ = (1-\eta\omega)\theta-\eta a D`, :math:`\|D\| \le c` whatever the gradient is.

    The iterates oscillate on the scale of :math:`\eta`, at any curvature: there is no linear limit, and no energy of the momentum
    is known. The metric is 0, so that only the loss and the regularizer are judged, and no more than a decrease is asked for. A
    small enough step without momentum lowers the loss.

    What holds instead is an invariant: if :math:`\eta\omega \le 1`, :math:`\|\theta\| \le ca/\omega` is kept.

    Examples:
        >>> from stableopt.optim.rules import SignDescent
        >>> isinstance(SignDescent(), Normalized)
        True
    """

    complex_too: ClassVar[bool] = True

    def limit(self, group: Group) -> float:
        """Raise: a normalized step has no linearization.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a normalized step (Lion, Muon) has no linear limit: it oscillates on the scale of the learning rate at any "
            "curvature; lower the learning rate over time, and see norm_limit for what its decay guarantees."
        )

    def energy_limit(self, smoothness: float, group: Group) -> float:
        """Raise: nothing is proved.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "no dissipating energy is known for a normalized step (Lion, Muon); use SGD or AdamW for a proved limit."
        )

    def momentum(self, group: Group) -> float:
        """Return 0: the momentum of a normalized step has no energy."""
        return 0.0

    def effective_lr(self, group: Group, *, first: bool) -> float:
        r"""Return :math:`\eta`."""
        return number(group["lr"])

    def metric(self, state: State, group: Group) -> float:
        """Return 0: the length of a step says nothing about its gradient."""
        return 0.0

    def displacement(self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        """Return 0: the buffer is a mean of gradients and stands for no displacement."""
        return torch.zeros_like(buffer)

    def decay(self, parameter: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        """Return 0: a decoupled decay of a normalized step is not the gradient of an energy in any metric."""
        return zero_energy(parameter)

    def realign(self, correction: Tensor, state: State, metric: Tensor | float, group: Group) -> None:
        """Leave the buffer as it is: it stands for no displacement."""

    def takes(self, group: Group, regularizer: Regularizer) -> str | None:
        """Refuse penalties."""
        if isinstance(regularizer, Constraint):
            return None
        return (
            "a normalized step (Lion, Muon) takes sets but no penalties: it has no metric in which a prox would solve the "
            "penalized problem; use a constraint, or SGD or AdamW."
        )

    def norm_limit(self, group: Group, shape: tuple[int, ...]) -> float | None:
        r"""Return :math:`ca/\omega`, None without decay or for :math:`\eta\omega > 1`.

        Args:
            group: hyper-parameters.
            shape: of the parameter.

        Returns:
            The bound, in exact arithmetic: with :math:`\|\theta_0\|` below it, :math:`\|\theta_t\|` stays below it; a larger start
            comes closer with every step. The rounding of the parameter, of a relative size u in each step, adds up to about
            :math:`u/(\eta\omega)` of it.
        """
        omega, norm = number(group.get("weight_decay", 0.0)), self._direction_norm(group)
        if norm is None or omega == 0 or number(group["lr"]) * omega > 1:
            return None
        bound = upper(decayed_norm_bound(0.0, norm, omega, self._adjustment(group, shape)))
        return math.nextafter(math.nextafter(bound, math.inf), math.inf)  # two roundings were to nearest

    @abstractmethod
    def _direction_norm(self, group: Group) -> float | None:
        """Return c, None if nothing is proved."""

    def _adjustment(self, group: Group, shape: tuple[int, ...]) -> float:
        """Return a."""
        return 1.0


@dataclass(frozen=True)
class SignDescent(Normalized):
    r"""Lion: :math:`D = \operatorname{sign}(\beta_1 m+(1-\beta_1)g)`, :math:`m^+ = \beta_2 m+(1-\beta_2)g`.

    The norm of its invariant is the largest modulus of an entry.
    Real and imaginary parts of a complex parameter are parameters of their own.

    References:
        Chen et al., *Symbolic discovery of optimization algorithms*, 2023.

    Examples:
        >>> SignDescent().norm_limit({"lr": 1e-4, "weight_decay": 0.5}, (3,)) <= 2.0 + 1e-15
        True
    """

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return the step of Lion."""
        lr, omega, (beta1, beta2) = number(group["lr"]), number(group.get("weight_decay", 0.0)), group["betas"]
        x, g = real_view(parameter), real_view(-gradient if group.get("maximize") else gradient)
        m = real_view(state["exp_avg"]) if state else torch.zeros_like(x)
        direction = mixed(m, g, 1 - beta1).sign()
        moved = x * (1 - lr * omega) - lr * direction
        return unviewed(moved, parameter), state | {"exp_avg": unviewed(mixed(m, g, 1 - beta2), parameter)}

    def buffer(self, state: State) -> Tensor | None:
        """Return ``exp_avg``."""
        return state.get("exp_avg")

    def _direction_norm(self, group: Group) -> float:
        return 1.0


@dataclass(frozen=True)
class SpectralDescent(Normalized):
    r"""Muon: :math:`b^+ = \mu b+(1-\mu)g`, D an approximate polar factor of :math:`b^+` or of its look-ahead; the norm is spectral.

    Args:
        polar: whether D is that of :func:`stableopt.optim.orthogonalize`, with :math:`\|D\|_2 \le 1`; else it is that of
            ``torch.optim.Muon``, whose polynomial reaches 1.2024, in bfloat16, of which nothing is proved.

    References:
        Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024.

    Examples:
        >>> group = {"lr": 1e-3, "weight_decay": 0.5}
        >>> SpectralDescent().norm_limit(group, (2, 3)) <= 2.0 + 1e-15
        True
        >>> SpectralDescent(polar=False).norm_limit(group, (2, 3)) is None
        True
    """

    polar: bool = True

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return the step of Muon."""
        lr, omega, mu = number(group["lr"]), number(group.get("weight_decay", 0.0)), number(group["momentum"])
        old = state["momentum_buffer"] if state else torch.zeros_like(gradient)
        buffer = mixed(old, gradient, 1 - mu)
        ahead = mixed(gradient, buffer, mu) if group.get("nesterov", True) else buffer
        steps, eps = group.get("ns_steps", 5), group.get("eps", 1e-7)
        if self.polar:
            direction = orthogonalize(ahead, steps=steps, eps=eps)
        else:
            direction = newton_schulz(ahead, group["ns_coefficients"], steps=steps, eps=eps)
        rate = lr * self._adjustment(group, parameter.shape)
        kept = parameter * (1 - lr * omega)
        moved = kept - rate * direction if isinstance(rate, Tensor) else torch.add(kept, direction, alpha=-rate)
        return moved.to(parameter.dtype), state | {"momentum_buffer": buffer}

    def buffer(self, state: State) -> Tensor | None:
        """Return ``momentum_buffer``."""
        return state.get("momentum_buffer")

    def _direction_norm(self, group: Group) -> float | None:
        return POLAR_NORM if self.polar else None

    def _adjustment(self, group: Group, shape: tuple[int, ...]) -> float:
        return adjustment(group.get("adjust_lr_fn"), shape)
