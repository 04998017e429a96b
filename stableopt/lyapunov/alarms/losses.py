"""Channels that look at the losses of the batches: do they leave the level sets that the run has come down through?"""

from __future__ import annotations

import math
from typing import Any

from stableopt.lyapunov.alarms.detector import EDetector, finite_number
from stableopt.lyapunov.alarms.levels import Levels, RecentHighest
from stableopt.lyapunov.alarms.sample import Alarm, Channel, Sample
from stableopt.lyapunov.alarms.steps import count, rate_in_words

__all__ = ["Level", "Relapse", "Sublevel"]


class _Losses(Channel):
    """A channel with one detector and the levels of the losses."""

    detector: EDetector

    def __init__(self, detector: EDetector, block: int) -> None:
        self.detector, self._levels = detector, Levels(block)

    @property
    def alert(self) -> bool:
        """Whether there is some evidence, far from enough for an alarm."""
        return self.detector.alert

    def reset(self) -> None:
        """Forget the evidence."""
        self.detector.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the evidence and the levels."""
        return {"detector": self.detector.state_dict(), "levels": self._levels.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: as :meth:`state_dict` gave it.
        """
        self.detector.load_state_dict(state["detector"])
        self._levels.load_state_dict(state["levels"])

    def _alarm(self, what: str, evidence: str, units: str, advice: str, block: int = 0) -> Alarm:
        """Put an alarm into words."""
        came, seen, since = self.detector.evidence
        return Alarm(
            self.name,
            what,
            f"{came} of {seen} {units} {evidence}; {rate_in_words(self.detector, units)}",
            max(since - block, 0),
            advice,
            self.detector.statistic,
            self.detector.run_length,
        )


class Sublevel(_Losses):
    r"""Alarm where the losses leave the sublevel set in which the run began.

    The sublevel sets of a Lyapunov function are invariant: a run that goes well does not come out of the set it began in. A
    violation is a step with a loss above

    .. math::
        \text{start} + \max\bigl(\mathit{margin}\cdot\text{fall},\ 8\cdot\text{scatter},\ 2\,(\text{highest}-\text{start})\bigr),

    where highest and start are the maximum and the median of the losses of the first steps, fall is how far the level has come down
    since, and scatter by how much batches differ.

    Args:
        null: :math:`p_0`, the share of such losses that a healthy run may have.
        run_length: mean number of steps until a false alarm, at least.
        margin: which part of the fall the loss must be above the start.
        first: how many steps are the first ones; before there are as many there is no alarm.

    Raises:
        ValueError: if a number is out of range.

    Note:
        Assumption: given its past, a loss of a healthy run is a violation with a probability of at most ``null``.

    Examples:
        >>> channel = Sublevel()
        >>> losses = [2.0] * 20 + [1.0] * 20 + [4.0] * 7
        >>> alarms = [channel.update(Sample(t, loss)) for t, loss in enumerate(losses, start=1)]
        >>> [alarm.since for alarm in alarms if alarm is not None][0]
        41
    """

    name = "sublevel"

    def __init__(self, null: float = 0.1, run_length: float = 1e5, margin: float = 0.25, first: int = 20) -> None:
        super().__init__(EDetector(null, run_length), first)
        self._highest = -math.inf
        self.margin = finite_number("Sublevel", "margin", margin, low=0.0)

    def update(self, sample: Sample) -> Alarm | None:
        """Take the sample of one step.

        Args:
            sample: of a later step than all before; where no loss is known it is no evidence.
        """
        value, levels = sample.highest, self._levels
        if math.isnan(value):
            return None
        if levels.blocks == 0:
            levels.update(value)
            self._highest = max(self._highest, value)
            return None
        start = levels.start
        bound = start + max(self.margin * levels.fall, 8.0 * levels.scatter, 2.0 * (self._highest - start))
        statistic = self.detector.update(value > bound, sample.step)
        levels.update(value)
        if not statistic >= self.detector.run_length:
            return None
        return self._alarm(
            f"The loss has left the set in which the run began ({value:.4g}, above {bound:.4g})",
            f"are above it, where the run began at {start:.4g} and had come down to {levels.best:.4g}",
            "steps",
            "The run diverges: go back to weights from before, with a lower learning rate.",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the evidence, the levels and the highest loss of the first steps."""
        return super().state_dict() | {"highest": self._highest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: as :meth:`state_dict` gave it.
        """
        super().load_state_dict(state)
        self._highest = state["highest"]


class Relapse(_Losses):
    r"""Alarm where a run loses in a few steps a good part of what it had come down.

    A violation is a step with a loss above every one of the last ``window`` (the last few left out) and above

    .. math::
        \text{last level} + \max(\mathit{margin}\cdot\text{fall},\ 8\cdot\text{scatter}).

    Args:
        null: :math:`p_0`, the share of such losses that a healthy run may have.
        run_length: mean number of steps until a false alarm, at least.
        margin: which part of the fall must be lost.
        window: how many losses are compared with, once there are as many; before there are 20, no alarm is given.

    Raises:
        ValueError: if a number is out of range.

    Note:
        Assumption: given its past, a loss of a healthy run is a violation with a probability of at most ``null``. Were the order
        of the losses random, whatever they are distributed like, a loss above all n before would come with probability 1/(n + 1)
        on average.

    Examples:
        >>> channel = Relapse(window=20)
        >>> losses = [2.0 - t / 50 for t in range(50)] + [1.8] * 5
        >>> alarms = [channel.update(Sample(t, loss)) for t, loss in enumerate(losses, start=1)]
        >>> [alarm.since for alarm in alarms if alarm is not None][0]
        51
    """

    name = "relapse"

    def __init__(self, null: float = 0.02, run_length: float = 1e5, margin: float = 0.25, window: int = 100) -> None:
        super().__init__(EDetector(null, run_length, rates=(0.2, 0.5, 0.9)), 10)
        self.margin = finite_number("Relapse", "margin", margin, low=0.0)
        self._recent = RecentHighest(count("Relapse", "window", window))

    def update(self, sample: Sample) -> Alarm | None:
        """Take the sample of one step.

        Args:
            sample: of a later step than all before; where no loss is known it is no evidence.
        """
        value, levels, recent = sample.highest, self._levels, self._recent
        if math.isnan(value):
            return None
        statistic = 0.0
        usual = recent.highest
        if recent.enough and levels.blocks:
            bound = levels.last + max(self.margin * levels.fall, 8.0 * levels.scatter)
            statistic = self.detector.update(value > max(usual, bound), sample.step)
        levels.update(value)
        recent.update(value)
        if not statistic >= self.detector.run_length:
            return None
        lost = value - levels.best
        share = f"{lost / levels.fall:.0%}" if lost < levels.fall else "all"
        return self._alarm(
            f"The loss has come back up ({value:.4g}, above all of {recent.window} before: at most {usual:.4g})",
            f"did so, with {share} of the descent from {levels.start:.4g} to {levels.best:.4g} lost",
            "steps",
            "Look at the learning rate, the data and the labels of these steps; go back to weights from before if it stays.",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the evidence, the levels and the losses."""
        return super().state_dict() | {"recent": self._recent.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: as :meth:`state_dict` gave it.
        """
        super().load_state_dict(state)
        self._recent.load_state_dict(state["recent"])


class Level(_Losses):
    r"""Alarm where the level of the losses rises and stays up.

    A violation is a block of steps whose median is above that of each of the last ``window`` blocks (the last few left out) and
    above :math:`\text{best} + \max(\mathit{margin}\cdot\text{fall},\ 6\cdot\text{scatter})`.

    Args:
        null: :math:`p_0`, the share of such blocks that a healthy run may have.
        run_length: mean number of blocks until a false alarm, at least.
        margin: which part of the fall the level must be above the best one.
        block: number of steps in a block.
        window: how many blocks are compared with, once there are as many; before there are 3, no alarm is given.

    Raises:
        ValueError: if a number is out of range.

    Note:
        Assumption: given its past, a block of a healthy run is a violation with a probability of at most ``null``.

    Examples:
        >>> channel = Level()
        >>> losses = [2.0] * 20 + [1.0] * 180 + [1.8] * 60
        >>> alarms = [channel.update(Sample(t, loss)) for t, loss in enumerate(losses, start=1)]
        >>> [alarm.since for alarm in alarms if alarm is not None][0]
        201
    """

    name = "level"

    def __init__(
        self, null: float = 0.1, run_length: float = 1e4, margin: float = 0.2, block: int = 10, window: int = 10
    ) -> None:
        super().__init__(EDetector(null, run_length, rates=(0.4, 0.7, 0.95)), block)
        self.margin = finite_number("Level", "margin", margin, low=0.0)
        self._recent = RecentHighest(count("Level", "window", window), delay=6, least=3)

    def update(self, sample: Sample) -> Alarm | None:
        """Take the sample of one step.

        Args:
            sample: of a later step than all before; where no loss is known it is no evidence.
        """
        value, levels, recent = sample.loss, self._levels, self._recent
        if not math.isfinite(value):
            return None
        best, fall, scatter = levels.best, levels.fall, levels.scatter
        level = levels.update(value)
        if level is None:
            return None
        statistic = 0.0
        if recent.enough:
            bound = max(best + max(self.margin * fall, 6.0 * scatter), recent.highest)
            statistic = self.detector.update(level > bound, sample.step)
        recent.update(level)
        if not statistic >= self.detector.run_length:
            return None
        return self._alarm(
            f"The level of the losses has risen and stays up ({level:.4g}, the best was {best:.4g})",
            f"of {levels.block} steps have a median above all before, where the run began at {levels.start:.4g}",
            "blocks",
            "Lower the learning rate, or go back to the weights of the best level.",
            block=levels.block - 1,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the evidence and the levels."""
        return super().state_dict() | {"recent": self._recent.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: as :meth:`state_dict` gave it.
        """
        super().load_state_dict(state)
        self._recent.load_state_dict(state["recent"])
