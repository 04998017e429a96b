r"""What the rule of an optimizer says about its learning rate and the sharpness of the loss.

Two limits, by name, since they differ (19-fold for a momentum of 0.9): the *sharpness limit* is the linear edge, sharp and local: a
quadratic of larger curvature diverges; the *energy limit* is the largest learning rate for which an energy provably falls.
Curvature and smoothness are in the metric P of the rule: the identity for SGD, the preconditioner of its last step for Adam.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from stableopt.optim.rules import rule_for

__all__ = ["Limits", "ScheduleFree", "energy_limit", "known_limits", "max_lr", "sharpness_limit"]


class Limits(Protocol):
    """What a rule must know to be asked for limits: every :class:`stableopt.optim.UpdateRule` does.

    Examples:
        >>> limits: Limits = ScheduleFree(adaptive=False)
    """

    def limit(self, group: Mapping[str, Any]) -> float:
        """Return the largest curvature for which the linearized update is stable."""
        ...

    def energy_limit(self, smoothness: float, group: Mapping[str, Any]) -> float:
        """Return the largest learning rate for which the energy provably falls."""
        ...

    def max_lr(self, sharpness: float, group: Mapping[str, Any], fraction: float = 1.0) -> float:
        """Return the learning rate at which ``sharpness`` is the fraction of the limit."""
        ...

    def metric(self, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor | float:
        """Return the diagonal of P."""
        ...


def sharpness_limit(optimizer: Optimizer) -> list[float]:
    r"""Return, for each group, the curvature below which the optimizer is linearly stable with its present hyper-parameters.

    For SGD :math:`2(1+\beta)/((1-\delta)\eta)-\omega`, for Adam :math:`2(1+\beta_1)/((1-\beta_1)\eta)` and so on
    (:mod:`stableopt.theory.gradient`).

    Args:
        optimizer: one of ours, of torch's, or ``SGDScheduleFree`` and ``AdamWScheduleFree`` of schedulefree.

    Returns:
        One number per group: the limit on the eigenvalues of :math:`P^{-1/2}HP^{-1/2}`; infinite for a learning rate of 0.

    Raises:
        ValueError: if nothing is known about the optimizer.

    Note:
        Local and linear: on a quadratic the limit is sharp, elsewhere it speaks of the neighborhood, and of the P of the moment.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> [round(x, 6) for x in sharpness_limit(torch.optim.SGD([w], lr=0.1, momentum=0.9))]
        [38.0]
        >>> [round(x, 6) for x in sharpness_limit(torch.optim.Adam([w], lr=0.1))]
        [380.0]
        >>> sharpness_limit(torch.optim.Rprop([w]))
        Traceback (most recent call last):
        ValueError: nothing is known about the update of Rprop, so it has no limits; register a rule: ...
    """
    limits = known_limits(optimizer)
    return [float(limits.limit(group)) for group in optimizer.param_groups]


def energy_limit(optimizer: Optimizer, smoothness: float | Iterable[float]) -> list[float]:
    r"""Return, for each group, the largest learning rate for which the energy of the rule provably falls.

    For SGD :math:`2(1-\beta)/((1-\delta)(L+\omega))`; for Adam in a metric that is frozen.

    Args:
        optimizer: as for :func:`sharpness_limit`.
        smoothness: L in the metric P, of the loss along the step; one number, or one per group.

    Returns:
        One learning rate per group. With several groups and one L the limits hold jointly, for a metric P that is fixed.

    Raises:
        ValueError: if nothing is known about the optimizer or no energy is known for its update (Nesterov's momentum), or a
            smoothness is negative or not finite.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> [round(x, 6) for x in energy_limit(torch.optim.SGD([w], lr=0.1, momentum=0.9), 38.0)]
        [0.005263]
    """
    limits = known_limits(optimizer)
    values = _per_group("smoothness", smoothness, optimizer)
    for L in values:
        if not (math.isfinite(L) and L >= 0):
            raise ValueError(f"smoothness must be a finite number >= 0, got {L!r}.")
    return [float(limits.energy_limit(L, group)) for L, group in zip(values, optimizer.param_groups, strict=True)]


def max_lr(optimizer: Optimizer, sharpness: float | Iterable[float], fraction: float = 1.0) -> list[float]:
    r"""Return, for each group, the learning rate at which a sharpness is the given fraction of the limit.

    Args:
        optimizer: as for :func:`sharpness_limit`; its momenta and decays are used, its learning rates are not.
        sharpness: :math:`\lambda` of :math:`P^{-1/2}HP^{-1/2}`, measured for instance with
            :class:`stableopt.optim.Sharpness`; one number, or one per group.
        fraction: in (0, 1].

    Returns:
        One learning rate per group: :math:`\lambda` is ``fraction`` times :func:`sharpness_limit` there.

    Raises:
        ValueError: if nothing is known about the optimizer, a sharpness is not finite, or the fraction is out of range.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> [round(x, 6) for x in max_lr(torch.optim.SGD([w], lr=7.0, momentum=0.9), sharpness=38.0)]
        [0.1]
        >>> [round(x, 6) for x in max_lr(torch.optim.Adam([w]), sharpness=38.0, fraction=0.5)]
        [0.5]
    """
    limits = known_limits(optimizer)
    values = _per_group("sharpness", sharpness, optimizer)
    for x in values:
        if not math.isfinite(x):
            raise ValueError(f"sharpness must be a finite number, got {x!r}.")
    check_fraction(fraction)
    return [float(limits.max_lr(x, group, fraction)) for x, group in zip(values, optimizer.param_groups, strict=True)]


def known_limits(optimizer: Optimizer) -> Limits:
    """Return the rule of an optimizer, also where the optimizer is of a package that need not be installed.

    Args:
        optimizer: any torch optimizer.

    Raises:
        TypeError: if it is no optimizer.
        ValueError: if nothing is known about it.

    Examples:
        >>> import torch
        >>> known_limits(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
        HeavyBall()
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"an optimizer is needed, a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    rule = _schedule_free(optimizer) or rule_for(optimizer)
    if rule is None:
        raise ValueError(
            f"nothing is known about the update of {type(optimizer).__name__}, so it has no limits; "
            "register a rule: stableopt.optim.rule_for.register."
        )
    return rule


@dataclass(frozen=True)
class ScheduleFree:
    r"""The limits of ``SGDScheduleFree`` and ``AdamWScheduleFree``: :math:`\frac{2(2-c)}{\eta((2-c)(1-\beta)+c\beta)}-\omega`.

    c is the weight that the next step has in the average, and :math:`\eta` includes the warm-up. c falls like 1/t, and the limit
    rises to :math:`2/((1-\beta)\eta)-\omega`. The decay acts on the preconditioned gradient, so it is in the metric P.

    Args:
        adaptive: whether gradients are preconditioned as in Adam.

    Examples:
        >>> group = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.0, "k": 10**9, "weight_sum": 10.0**9, "lr_max": 1.0}
        >>> group |= {"r": 0.0, "weight_lr_power": 2.0, "warmup_steps": 0}
        >>> round(ScheduleFree(adaptive=False).limit(group), 6)
        8.0
    """

    adaptive: bool

    def limit(self, group: Mapping[str, Any]) -> float:
        """Return the limit with the weight and the warm-up of the next step."""
        lr = float(group["lr"]) * self._warmup(group)
        return self._edge(group) / lr - group["weight_decay"] if lr > 0 else math.inf

    def energy_limit(self, smoothness: float, group: Mapping[str, Any]) -> float:
        """Raise: no energy is known that falls.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "no dissipating energy is known for schedule-free averaging; use sharpness_limit, or guard SGD or AdamW of "
            "stableopt.optim for a checked one."
        )

    def max_lr(self, sharpness: float, group: Mapping[str, Any], fraction: float = 1.0) -> float:
        """Return the learning rate, before the warm-up, at which ``sharpness`` is the fraction of the limit."""
        total = sharpness / fraction + group["weight_decay"]
        return self._edge(group) / (total * self._warmup(group)) if total > 0 else math.inf

    def metric(self, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor | float:
        r"""Return :math:`\sqrt{v/(1-\beta_2^k)}+\epsilon`, or 1."""
        if not self.adaptive:
            return 1.0
        return (state["exp_avg_sq"] / (1 - group["betas"][1] ** group["k"])).sqrt() + group["eps"]

    @staticmethod
    def _edge(group: Mapping[str, Any]) -> float:
        """Return the edge for curvature 1."""
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        # as in the step that comes next, so that the limit is not too large while the average is young
        largest = max(float(group["lr"]) * ScheduleFree._warmup(group), group["lr_max"])
        weight = (group["k"] + 1) ** group["r"] * largest ** group["weight_lr_power"] if largest > 0 else 0.0
        c = weight / (group["weight_sum"] + weight) if weight > 0 else 1.0
        return 2.0 * (2.0 - c) / ((2.0 - c) * (1.0 - beta) + c * beta)

    @staticmethod
    def _warmup(group: Mapping[str, Any]) -> float:
        k, steps = group["k"], group["warmup_steps"]
        return (k + 1) / steps if k < steps else 1.0


def _schedule_free(optimizer: Optimizer) -> ScheduleFree | None:
    """Look the classes of schedulefree up where they have been imported: an instance of them proves that they have been."""
    package = sys.modules.get("schedulefree")
    for name, adaptive in (("SGDScheduleFree", False), ("AdamWScheduleFree", True)):
        cls = getattr(package, name, None)
        # a guarded subclass takes the step of torch_class; any other step is another optimizer
        if cls is not None and isinstance(optimizer, cls):
            step = getattr(optimizer, "torch_class", type(optimizer)).step
            return ScheduleFree(adaptive) if inspect.unwrap(step) is inspect.unwrap(cls.step) else None
    return None


def check_fraction(fraction: object) -> float:
    """Return a fraction of a limit if it is one.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not in (0, 1].

    Examples:
        >>> check_fraction(1.5)
        Traceback (most recent call last):
        ValueError: fraction must lie in (0, 1], got 1.5: beyond the limit the update is unstable.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"fraction must be a number in (0, 1], got {fraction!r}.")
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction!r}: beyond the limit the update is unstable.")
    return float(fraction)


def _per_group(name: str, value: float | Iterable[float], optimizer: Optimizer) -> list[float]:
    count = len(optimizer.param_groups)
    if isinstance(value, Iterable) and not isinstance(value, Tensor):
        values = [float(x) for x in value]
        if len(values) != count:
            raise ValueError(
                f"{name} must be one number or one per group, of which there are {count}, got {len(values)}."
            )
        return values
    return [float(value)] * count
