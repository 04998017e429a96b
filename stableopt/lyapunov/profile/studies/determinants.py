r"""What is known of the determinant of one optimizer step :math:`(\theta, u) \mapsto (\theta^+, u^+)`, whatever the loss is.

Every step here is a composition of two: :math:`u^+ = F(\nabla f(\theta), u)` at fixed :math:`\theta`, and then
:math:`\theta^+ = \kappa\theta-\Psi(\nabla f(\theta), u^+)` at fixed :math:`u^+`. The derivative of the first is block triangular
with :math:`\partial F/\partial u` on its diagonal, that of the second with :math:`\kappa I-\frac{\partial\Psi}{\partial g}H`:

.. math:: \det A = \det\frac{\partial F}{\partial u}\cdot\det\Bigl(\kappa I-\frac{\partial\Psi}{\partial g}H\Bigr).

Moments decay by their factors, so the first is a product of those. The second is :math:`\kappa^d` where the step sees the gradient
through :math:`u^+` only:

| step | :math:`\partial F/\partial u` | :math:`\partial\Psi/\partial g` | :math:`\kappa` |
|---|---|---|---|
| SGD | | :math:`\eta` | 1 |
| SGD, momentum (any dampening) | :math:`\beta` | 0 | 1 |
| SGD, Nesterov: :math:`\Psi = \eta(g+\beta b^+)` | :math:`\beta` | :math:`\eta` | 1 |
| Adam, AdamW, RAdam | :math:`\beta_1, \beta_2` | 0 | :math:`1-\eta\omega` if decoupled, else 1 |
| AMSGrad, its maximum | 1 where it is kept, else 0 | 0 | as Adam |
| NAdam: :math:`\Psi = \eta D(ag+bm^+)` | :math:`\beta_1, \beta_2` | :math:`\eta aD` | as Adam |
| RMSprop: :math:`\Psi = \eta Dg` | :math:`\alpha`, twice if centered | :math:`\eta D` | 1 |
| RMSprop, momentum | also :math:`\beta` | 0 | 1 |
| Lion, where no sign changes | :math:`\beta_2` | 0 | :math:`1-\eta\omega` |
| Muon without Nesterov | :math:`\mu` | 0 | :math:`1-\eta\omega` |

Here D is one over the root of the second moment (plus :math:`\epsilon`). A coupled decay :math:`\omega` adds
:math:`\omega I` to H. Nothing of this needs H where :math:`\partial\Psi/\partial g = 0`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stableopt.optim.rules import (
    Adaptive,
    AdaptiveNesterov,
    HeavyBall,
    Rectified,
    RootMeanSquare,
    SignDescent,
    SpectralDescent,
    UpdateRule,
)
from stableopt.optim.rules.adaptive import count_of
from stableopt.optim.rules.base import Group, State, number

__all__ = ["DeterminantFactors", "Step", "determinant_factors", "log_determinant"]

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class DeterminantFactors:
    r"""What the determinant of a step is made of, for some entries of one parameter.

    Args:
        name: of the closed form, in words that a formula has.
        log_decays: :math:`\sum\log` of the factors by which the entries of the state decay, one number per entry.
        kept: :math:`\kappa`, one number per entry.
        direct: :math:`\partial\Psi/\partial g \ge 0`, one number per entry.
        coupled: :math:`\omega` of a coupled decay, which is part of the gradient.
        sign: of the gradient, -1 for ascent.

    Examples:
        >>> one = np.ones(1)
        >>> DeterminantFactors("ln(beta)", math.log(0.9) * one, one, 0 * one).closed
        True
    """

    name: str
    log_decays: Array
    kept: Array
    direct: Array
    coupled: float = 0.0
    sign: float = 1.0

    @property
    def closed(self) -> bool:
        """Whether the determinant does not depend on the loss."""
        return not np.any(self.direct)


def log_determinant(parts: list[DeterminantFactors], H: Array) -> tuple[float, float]:
    r"""Return :math:`\log|\det A|` of a step from what it is made of, and how far rounding can have it off, to first order.

    .. math:: \sum\log|\text{decays}|+\sum_i\log|\lambda_i(\kappa-W^{1/2}KW^{1/2})|, \qquad K = \pm H+\omega I,
        \quad W = \partial\Psi/\partial g,

    which has the determinant of :math:`\kappa-WK` and is symmetric. Without W it is :math:`\sum\log|\kappa|`.

    Args:
        parts: of each parameter, its entries in the order of H.
        H: the Hessian of the loss in these entries, with the asymmetry that it was computed with.

    Examples:
        >>> gd = DeterminantFactors("", np.zeros(2), np.ones(2), 0.5 * np.ones(2))
        >>> value, _ = log_determinant([gd], np.diag([1.0, 4.0]))
        >>> round(value - math.log(0.5 * 1.0), 12)
        0.0
    """
    decays = float(sum(part.log_decays.sum() for part in parts))
    kept, direct = (np.concatenate([getattr(part, name) for part in parts]) for name in ("kept", "direct"))
    if not np.any(direct):
        with np.errstate(divide="ignore"):
            return decays + float(np.log(np.abs(kept)).sum()), 0.0
    omega = np.concatenate([np.full(part.kept.size, part.coupled) for part in parts])
    sign = np.concatenate([np.full(part.kept.size, part.sign) for part in parts])
    K = sign[:, None] * H
    root = np.sqrt(direct)
    M = np.diag(kept - direct * omega) - root[:, None] * (0.5 * (K + K.T)) * root
    values = np.linalg.eigvalsh(M)
    smallest = float(np.min(np.abs(values)))
    if smallest == 0.0:
        return -math.inf, math.inf
    asymmetric = float(np.linalg.norm(root[:, None] * (0.5 * (K - K.T)) * root, 2))
    rounding = len(values) * np.finfo(np.float64).eps * float(np.max(np.abs(values)))
    return decays + float(np.log(np.abs(values)).sum()), (asymmetric + rounding) * float(np.sum(1.0 / np.abs(values)))


@dataclass(frozen=True)
class Step:
    """One step of some entries of a parameter.

    Args:
        group: hyper-parameters.
        before: the state of the entries before the step.
        after: it after the step.
        entries: how many there are.

    Examples:
        >>> Step({"lr": 0.1}, {}, {}, 2).entries
        2
    """

    group: Group
    before: State
    after: State
    entries: int


@singledispatch
def determinant_factors(rule: UpdateRule, step: Step) -> DeterminantFactors | str:  # noqa: ARG001 - for those that know more
    """Return what the determinant of a step is made of, or why that is not known.

    Args:
        rule: of the optimizer.
        step: of it.

    Examples:
        >>> determinant_factors(HeavyBall(), Step({"lr": 0.1, "momentum": 0.5}, {}, {}, 2)).name
        'd ln(beta)'
    """
    return f"no identity is known for the determinant of {type(rule).__name__}"


@determinant_factors.register
def _(rule: HeavyBall, step: Step) -> DeterminantFactors:
    group = step.group
    beta, lr, omega = rule.momentum(group), number(group["lr"]), number(group.get("weight_decay", 0.0))
    if beta and not group.get("nesterov"):
        return _factors("d ln(beta)", step, [beta])
    name = "sum ln|1 - lr (lambda + wd)|" if omega else "sum ln|1 - lr lambda|"
    if beta:
        name = f"d ln(beta) + {name}"
    return _factors(name, step, [beta] if beta else [], direct=lr, coupled=omega)


def _adam(step: Step) -> DeterminantFactors:
    group = step.group
    decays, name = list(group["betas"]), "d ln(beta1 beta2)"
    if group.get("amsgrad"):
        largest, v = step.before["max_exp_avg_sq"], step.after["exp_avg_sq"]
        decays.append((largest > v).double().cpu().numpy())
        name += ", singular where a maximum is replaced"
    return _factors(name, step, decays, decoupled=_decoupled(group))


@determinant_factors.register
def _(rule: Adaptive, step: Step) -> DeterminantFactors:  # noqa: ARG001 - dispatched on
    return _adam(step)


@determinant_factors.register
def _(rule: Rectified, step: Step) -> DeterminantFactors:  # noqa: ARG001 - dispatched on
    return _adam(step)


@determinant_factors.register
def _(rule: AdaptiveNesterov, step: Step) -> DeterminantFactors:  # noqa: ARG001 - dispatched on
    group, after = step.group, step.after
    beta1, beta2 = group["betas"]
    t, product = count_of(after["step"]), count_of(after["mu_product"])
    mu = beta1 * (1.0 - 0.5 * 0.96 ** (t * group["momentum_decay"]))
    D = 1.0 / ((after["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"])
    direct = number(group["lr"]) * (1 - mu) / (1 - product) * D
    decoupled = _decoupled(group)
    coupled = 0.0 if decoupled else number(group.get("weight_decay", 0.0))
    name = "d ln(beta1 beta2) + ln|det(1 - lr a D H)|"
    return _factors(name, step, [beta1, beta2], direct=direct, coupled=coupled, decoupled=decoupled)


@determinant_factors.register
def _(rule: RootMeanSquare, step: Step) -> DeterminantFactors:
    group = step.group
    alpha, beta = group["alpha"], rule.momentum(group)
    decays = [alpha, alpha] if group.get("centered") else [alpha]
    name = "d ln(alpha^2)" if group.get("centered") else "d ln(alpha)"
    if beta > 0:
        return _factors(name.replace(")", " beta)"), step, [*decays, beta])
    coupled = number(group.get("weight_decay", 0.0))
    direct = number(group["lr"]) / rule.metric(step.after, group)
    return _factors(f"{name} + ln|det(1 - lr D H)|", step, decays, direct=direct, coupled=coupled)


@determinant_factors.register
def _(rule: SignDescent, step: Step) -> DeterminantFactors:  # noqa: ARG001 - dispatched on
    return _factors("d ln(beta2)", step, [step.group["betas"][1]], decoupled=True)


@determinant_factors.register
def _(rule: SpectralDescent, step: Step) -> DeterminantFactors | str:  # noqa: ARG001 - dispatched on
    if step.group.get("nesterov", True):
        return (
            "no identity is known for Muon with Nesterov's momentum, whose step sees the gradient of one matrix both ways; "
            "nesterov=False has one"
        )
    return _factors("d ln(mu)", step, [number(step.group["momentum"])], decoupled=True)


def _factors(
    name: str,
    step: Step,
    decays: list[float | Array],
    *,
    direct: float | Tensor = 0.0,
    coupled: float = 0.0,
    decoupled: bool = False,
) -> DeterminantFactors:
    kept, group, entries = 1.0, step.group, step.entries
    if decoupled and number(group.get("weight_decay", 0.0)):
        kept = 1.0 - number(group["lr"]) * number(group["weight_decay"])
        name += " + d ln|1 - lr wd|"
    with np.errstate(divide="ignore"):
        logs = sum((np.log(np.abs(_each(x, entries))) for x in decays), np.zeros(entries))
    each = _each(direct.double().cpu().numpy() if isinstance(direct, Tensor) else direct, entries)
    sign = -1.0 if group.get("maximize") else 1.0
    return DeterminantFactors(name, logs, _each(kept, entries), each, coupled, sign)


def _each(x: float | Array | Tensor, entries: int) -> Array:
    value = x.detach().double().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=np.float64)
    return np.broadcast_to(value, (entries,)).astype(np.float64)


def _decoupled(group: Group) -> bool:
    return bool(group.get("decoupled_weight_decay", False))
