"""An optimizer of which nothing is known but that it steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stableopt.constraints import Constraint, Regularizer
from stableopt.optim.rules.base import Group, State, UpdateRule, number, zero_energy

__all__ = ["Unknown"]


@dataclass(frozen=True)
class Unknown(UpdateRule):
    """What holds for any optimizer: its energy is the loss, it has no momentum that could be restarted, and no metric.

    A guarded optimizer without a rule of its own is judged by this one: by the loss alone, which a healthy momentum also raises now
    and then, so the guard interferes more often than it need. Register a rule with :func:`stableopt.optim.rule_for` to do better.

    Examples:
        >>> Unknown().metric({}, {}), Unknown().buffer({}) is None
        (0.0, True)
    """

    complex_too: ClassVar[bool] = True

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Raise: the update is not known.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the update of this optimizer is not known; register a rule with rule_for.register.")

    def limit(self, group: Group) -> float:
        """Raise: nothing is known.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "no stability limit is known for this optimizer; register a rule with stableopt.optim.rule_for.register."
        )

    def energy_limit(self, smoothness: float, group: Group) -> float:
        """Raise: nothing is known.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "no dissipating energy is known for this optimizer; register a rule with stableopt.optim.rule_for.register."
        )

    def momentum(self, group: Group) -> float:
        """Return 0."""
        return 0.0

    def effective_lr(self, group: Group, *, first: bool) -> float:
        """Return lr, NaN if the group has none."""
        return number(group.get("lr", math.nan))

    def metric(self, state: State, group: Group) -> float:
        """Return 0: no displacement is measured."""
        return 0.0

    def buffer(self, state: State) -> Tensor | None:
        """Return None."""
        return None

    def displacement(self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        """Return zero."""
        return 0.0 * parameter

    def decay(self, parameter: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        """Return 0."""
        return zero_energy(parameter)

    def realign(self, correction: Tensor, state: State, metric: Tensor | float, group: Group) -> None:
        """Do nothing: no buffer is known."""

    def takes(self, group: Group, regularizer: Regularizer) -> str | None:
        """Take sets; a penalty needs a prox in a metric that is not known."""
        if isinstance(regularizer, Constraint):
            return None
        return (
            f"{regularizer!r} needs the metric of the step, and nothing is known about this optimizer: "
            "use a constraint, or SGD, Adam, AdamW, RAdam or RMSprop of stableopt.optim."
        )
