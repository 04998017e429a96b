r"""The metric of the state: in which units perturbations of the optimizer's state are measured beside those of the parameters.

.. math:: \|(\delta\theta, \delta u)\|^2 = \|\delta\theta\|^2 + \sum_n s_n^2\, \|\delta u_n\|^2,

n the names of the entries of the state.

The numbers s are fixed at the beginning of a profile, one per group and name, and belong to what it states: exponents do not depend
on them, transient peaks and constants do. By default one unit of state is what displaces parameters by about one unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from stableopt.optim.rules import UpdateRule
from stableopt.optim.rules.base import Group, State, number, real_view

__all__ = ["default_unit", "is_second_moment"]


def is_second_moment(name: str) -> bool:
    """Say whether an entry of a state is a mean of squares, by torch's names.

    Examples:
        >>> is_second_moment("exp_avg_sq"), is_second_moment("square_avg"), is_second_moment("exp_avg")
        (True, True, False)
    """
    return name.endswith("_sq") or name.startswith("square_")


def default_unit(rule: UpdateRule, group: Group, name: str, states: Iterable[State]) -> float:
    r"""Return the unit of an entry of the state, in units of the parameters.

    For a momentum it is the median displacement that a unit of it makes: :math:`\eta` for SGD, the median of :math:`\eta/P_i` for
    Adam. For a mean v of squares it is :math:`\eta/(2\,\mathrm{median}\,v)`, which is what a unit of v does to a step of size
    :math:`\eta g/\sqrt v` with :math:`g^2 \approx v`.

    Args:
        rule: of the optimizer.
        group: hyper-parameters.
        name: of the entry.
        states: of the parameters of the group, after a step.

    Returns:
        A positive number; 1 where nothing is known, as with a learning rate of zero.

    Examples:
        >>> from stableopt.optim.rules import HeavyBall
        >>> state = {"momentum_buffer": torch.ones(3)}
        >>> default_unit(HeavyBall(), {"lr": 0.1, "momentum": 0.9}, "momentum_buffer", [state])
        0.1
    """
    lr = abs(number(group["lr"]))
    found = [_unit(rule, group, name, state, lr) for state in states if isinstance(state.get(name), Tensor)]
    usable = sorted(unit for unit in found if math.isfinite(unit) and unit > 0.0)
    return usable[len(usable) // 2] if usable else 1.0


def _unit(rule: UpdateRule, group: Group, name: str, state: State, lr: float) -> float:
    value = real_view(state[name].detach())
    if is_second_moment(name):
        positive = value[value > 0]
        return lr / (2.0 * float(positive.median())) if positive.numel() else math.nan
    buffer = rule.buffer(state)
    if buffer is not state[name]:
        return lr
    metric = rule.metric(state, group)
    per_unit = lr / metric if isinstance(metric, Tensor) else torch.tensor(lr / metric if metric else lr)
    if name == "momentum_buffer":  # SGD and RMSprop keep it in units of steps, whatever the metric
        return lr
    return float(per_unit.median())
