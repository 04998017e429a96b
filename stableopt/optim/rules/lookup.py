"""Which rule an optimizer follows."""

from __future__ import annotations

import inspect
from functools import singledispatch

import torch
from torch.optim import Optimizer

from stableopt.optim.lion_step import PlainLion
from stableopt.optim.rules.adaptive import Adaptive
from stableopt.optim.rules.base import UpdateRule
from stableopt.optim.rules.heavy_ball import HeavyBall
from stableopt.optim.rules.nadam import AdaptiveNesterov
from stableopt.optim.rules.normalized import SignDescent, SpectralDescent
from stableopt.optim.rules.radam import Rectified
from stableopt.optim.rules.rmsprop import RootMeanSquare

__all__ = ["rule_for"]


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


def _registered(cls: type[Optimizer], rule: UpdateRule) -> None:
    """Register a rule for a class and its subclasses with the same ``step``."""

    @rule_for.register(cls)
    def _(optimizer: Optimizer) -> UpdateRule | None:
        kind = getattr(
            type(optimizer), "torch_class", type(optimizer)
        )  # a guarded class does the step of the one behind it
        return rule if inspect.unwrap(kind.step) is inspect.unwrap(cls.step) else None


_registered(torch.optim.SGD, HeavyBall())
_registered(torch.optim.Adam, Adaptive())  # AdamW is a subclass
_registered(torch.optim.NAdam, AdaptiveNesterov())
_registered(torch.optim.RAdam, Rectified())
_registered(torch.optim.RMSprop, RootMeanSquare())
_registered(torch.optim.Muon, SpectralDescent(polar=False))
_registered(PlainLion, SignDescent())
