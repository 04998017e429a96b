"""What an alarm looks at, and what it says."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["Alarm", "Channel", "Sample"]


@dataclass(frozen=True, slots=True)
class Sample:
    r"""What the channels are told about one step of an optimizer.

    Args:
        step: number of the step, counted from 1, rising.
        loss: of the batch, before the step; NaN if it is not known. It is what is to fall: the negative of what is maximized.
        loss_after: of the same batch, after the step; like the four fields below NaN where this step was not compared.
        energy_before: energy before the step, on its batch.
        energy_after: energy after it, on the same batch.
        tolerance: the rounding of the two energies.
        verdict: one of ``stableopt.lyapunov.VERDICTS``.
        nonfinite: what is not finite: ``loss``, ``grad:NAME``, ``param:NAME``, ``buffer:NAME``.
        trust: :math:`\rho = (L^+ - L)/(g^\top d)`; NaN if it is not known.
        displacement: :math:`\|d\|` over all parameters; NaN if it is not known.
        weight_norm: :math:`\|\theta\|` over all parameters after the step; NaN if it is not known.
        lr: learning rate of each parameter group.

    Examples:
        >>> Sample(step=1, loss=2.0).rise
        nan
        >>> Sample(step=1, loss=2.0, energy_before=2.0, energy_after=2.5).rise
        0.5
    """

    step: int
    loss: float = math.nan
    loss_after: float = math.nan
    energy_before: float = math.nan
    energy_after: float = math.nan
    tolerance: float = math.nan
    verdict: str = "unobserved"
    nonfinite: tuple[str, ...] = ()
    trust: float = math.nan
    displacement: float = math.nan
    weight_norm: float = math.nan
    lr: tuple[float, ...] = ()

    @property
    def rise(self) -> float:
        """The energy after the step less the energy before it; NaN where they were not compared.

        Examples:
            >>> Sample(step=1, energy_before=2.0, energy_after=1.5).rise
            -0.5
        """
        return self.energy_after - self.energy_before

    @property
    def highest(self) -> float:
        """The higher one of the losses of this batch that are known and finite; NaN if there is none.

        Examples:
            >>> Sample(step=1, loss=2.0).highest, Sample(step=1, loss=2.0, loss_after=3.0).highest
            (2.0, 3.0)
        """
        known = [value for value in (self.loss, self.loss_after) if math.isfinite(value)]
        return max(known) if known else math.nan


@dataclass(frozen=True)
class Alarm:
    """What a channel noticed, in numbers and in words.

    Args:
        channel: name of the channel.
        what: what was noticed.
        evidence: the numbers it rests on, how often a false alarm comes, and under which assumption.
        since: the step since when the evidence has gathered.
        advice: what to do.
        statistic: the value that was compared.
        threshold: with what it was compared; the alarm is given where ``statistic >= threshold``.

    Examples:
        >>> print(Alarm("nonfinite", "The loss is not finite", "loss", 7, "Lower the learning rate.", 1.0, 1.0))
        The loss is not finite (since step 7). Evidence: loss. What to do: Lower the learning rate.
    """

    channel: str
    what: str
    evidence: str
    since: int
    advice: str
    statistic: float = math.nan
    threshold: float = math.nan

    def __str__(self) -> str:
        """Return the reading of the alarm."""
        return f"{self.what} (since step {self.since}). Evidence: {self.evidence}. What to do: {self.advice}"


class Channel(ABC):
    """One way to notice that a run is not well: it sees every sample once, in order, and keeps a fixed amount of memory.

    Attributes:
        name: of the channel, in alarms and events.

    Examples:
        >>> class Impatient(Channel):
        ...     name = "impatient"
        ...
        ...     def update(self, sample):
        ...         if sample.step < 3:
        ...             return None
        ...         return Alarm(self.name, "The third step came", "its number", sample.step, "Stop.")
        ...
        ...     def reset(self):
        ...         pass
        ...
        ...     def state_dict(self):
        ...         return {}
        ...
        ...     def load_state_dict(self, state):
        ...         pass
        >>> channel = Impatient()
        >>> [channel.update(Sample(step)) is None for step in (1, 2, 3)]
        [True, True, False]
    """

    name: ClassVar[str]

    @abstractmethod
    def update(self, sample: Sample) -> Alarm | None:
        """Take the sample of one step, and return an alarm if there is one.

        Args:
            sample: of a later step than all before.
        """

    @property
    def alert(self) -> bool:
        """Whether there is some evidence, far from enough for an alarm: a reason to look at every step for a while."""
        return False

    @abstractmethod
    def reset(self) -> None:
        """Forget the evidence; what was learned about the run, its levels and its noise, stays."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to give the alarms of an uninterrupted one: numbers, strings, lists and dictionaries."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: as :meth:`state_dict` gave it.

        Raises:
            ValueError: if it is the state of something else.
        """
