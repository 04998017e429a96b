"""Channels that look at one step: at what is not finite, at the energy of its batch, at its length."""

from __future__ import annotations

import math
from typing import Any

from stableopt.lyapunov.alarms.detector import EDetector, finite_number
from stableopt.lyapunov.alarms.levels import Levels, RecentHighest
from stableopt.lyapunov.alarms.sample import Alarm, Channel, Sample

__all__ = ["Increase", "Leap", "NonFinite"]


class NonFinite(Channel):
    """Alarm at once where something is NaN or infinite. There is no false alarm: what it reports is a fact.

    Examples:
        >>> channel = NonFinite()
        >>> channel.update(Sample(step=1, loss=2.0)) is None
        True
        >>> channel.update(Sample(step=2, nonfinite=("loss", "grad:0.weight"))).what
        'Not finite: loss, grad:0.weight'
    """

    name = "nonfinite"

    def update(self, sample: Sample) -> Alarm | None:
        """Take the sample of one step.

        Args:
            sample: of a later step than all before.
        """
        found = list(sample.nonfinite)
        if math.isinf(sample.loss) and "loss" not in found:
            found.append("loss")
        if not math.isnan(sample.energy_before) and not math.isfinite(sample.energy_after):
            found.append("the energy after the step")
        if sample.verdict == "nonfinite" and not found:
            found.append("the energy or the step")
        if not found:
            return None
        shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        advice = "Look at the batch and at the learning rate; go back to weights from before, the momentum may hold it as well."
        if all(name.startswith("grad:") for name in found):
            advice = "Skip this step; with a gradient scaler an overflow now and then is its way to find the scale."
        return Alarm(
            self.name,
            f"Not finite: {shown}",
            f"{len(found)} of the values of this step are NaN or infinite, a fact",
            sample.step,
            advice,
            float(len(found)),
            1.0,
        )

    def reset(self) -> None:
        """There is nothing to forget."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to continue."""


class Increase(Channel):
    r"""Alarm where steps raise the energy of their own batch too often.

    A violation is a step with

    .. math::
        E^+ - E > \max(\text{tolerance},\ \mathit{noticeable}\cdot\text{fall},\ \mathit{noticeable}\cdot\text{scatter}):

    more than rounding, and more than a small part of what the loss of the run has come down and of what its batches differ by.

    Args:
        null: :math:`p_0`, the share of violations that a healthy run may have.
        run_length: mean number of compared steps until a false alarm, at least.
        noticeable: that small part.

    Raises:
        ValueError: if a number is out of range.

    Note:
        Assumption: given its past, a step of a healthy run is a violation with a probability of at most ``null``. It is one about
        training, no theorem. The steps may depend on each other in any way.

    Examples:
        >>> channel = Increase()
        >>> alarms = [channel.update(Sample(t, 1.0, 2.0, 1.0, 2.0, 1e-9)) for t in range(1, 12)]
        >>> [alarm is not None for alarm in alarms].index(True)
        8
        >>> alarms[8].since
        1
    """

    name = "increase"

    def __init__(self, null: float = 0.2, run_length: float = 1e5, noticeable: float = 1e-2) -> None:
        self.detector = EDetector(null, run_length)
        self.noticeable = finite_number("Increase", "noticeable", noticeable, low=0.0, high=1.0)
        self._levels = Levels()

    def update(self, sample: Sample) -> Alarm | None:
        """Take the sample of one step.

        Args:
            sample: of a later step than all before; where its energies are not known it is no evidence.
        """
        levels = self._levels
        if math.isfinite(sample.loss):
            levels.update(sample.loss)
        rise = sample.rise
        if math.isnan(rise):
            return None
        scale = max(levels.fall, levels.scatter) if levels.blocks else 0.0
        violated = rise > max(sample.tolerance if sample.tolerance > 0 else 0.0, self.noticeable * scale)
        statistic = self.detector.update(violated, sample.step)
        if not statistic >= self.detector.run_length:
            return None
        came, seen, since = self.detector.evidence
        return Alarm(
            self.name,
            "Steps raise the energy of their own batch",
            f"{came} of {seen} compared steps did; {rate_in_words(self.detector, 'compared steps')}",
            since,
            "Lower the learning rate (or raise the momentum's damping); a guarded optimizer would not have kept these steps.",
            statistic,
            self.detector.run_length,
        )

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


class Leap(Channel):
    r"""Alarm where the steps are suddenly much longer than all before.

    A violation is a step whose length :math:`\|d\|` is greater than that of every step so far and more than ``factor`` times that
    of every one of the last ``window`` (the last few left out, so that a leap is not compared with itself).

    Args:
        null: :math:`p_0`, the share of such steps that a healthy run may have.
        run_length: mean number of steps until a false alarm, at least.
        factor: how many times longer, > 1.
        window: how many steps are compared with, once there are as many; before there are 20, no alarm is given.

    Raises:
        ValueError: if a number is out of range.

    Note:
        Assumption: given its past, a step of a healthy run is a violation with a probability of at most ``null``. Were the order
        of the lengths random, a new longest one among n + 1 would come with probability 1/(n + 1), without the factor. A learning
        rate that is raised on purpose by more than the factor and beyond all before is reported as well; a warm restart that only
        comes back to the rate from the start is not.

    Examples:
        >>> channel = Leap(window=20)
        >>> lengths = [1.0] * 40 + [30.0] * 5
        >>> alarms = [channel.update(Sample(t, displacement=d)) for t, d in enumerate(lengths, start=1)]
        >>> [alarm.since for alarm in alarms if alarm is not None][0]
        41
    """

    name = "leap"

    def __init__(self, null: float = 0.01, run_length: float = 1e5, factor: float = 5.0, window: int = 100) -> None:
        self.detector = EDetector(null, run_length, rates=(0.2, 0.5, 0.9))
        self.factor = finite_number("Leap", "factor", factor, low=1.0)
        self._recent = RecentHighest(count("Leap", "window", window))
        self._longest = 0.0

    def update(self, sample: Sample) -> Alarm | None:
        """Take the sample of one step.

        Args:
            sample: of a later step than all before; where its displacement is not known it is no evidence.
        """
        d, recent = sample.displacement, self._recent
        if not math.isfinite(d):
            return None
        statistic = 0.0
        usual = recent.highest
        if recent.enough and usual > 0.0:
            statistic = self.detector.update(d > max(self._longest, self.factor * usual), sample.step)
        recent.update(d)
        self._longest = max(self._longest, recent.highest)
        if not statistic >= self.detector.run_length:
            return None
        came, seen, since = self.detector.evidence
        share = f", {d / sample.weight_norm:.2g} of the norm of the weights" if sample.weight_norm > 0.0 else ""
        return Alarm(
            self.name,
            f"The steps are suddenly {d / usual:.2g} times longer than the longest of the last {recent.window}",
            f"{came} of {seen} steps are longer than all before, the last one {d:.3g}{share}; "
            + rate_in_words(self.detector, "steps"),
            since,
            "Look at the learning rate and its schedule; if they are meant to be so, nothing is wrong.",
            statistic,
            self.detector.run_length,
        )

    @property
    def alert(self) -> bool:
        """Whether there is some evidence, far from enough for an alarm."""
        return self.detector.alert

    def reset(self) -> None:
        """Forget the evidence."""
        self.detector.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the evidence and the lengths."""
        return {"detector": self.detector.state_dict(), "recent": self._recent.state_dict(), "longest": self._longest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: as :meth:`state_dict` gave it.
        """
        self.detector.load_state_dict(state["detector"])
        self._recent.load_state_dict(state["recent"])
        self._longest = state["longest"]


def rate_in_words(detector: EDetector, units: str) -> str:
    """Say how often a false alarm comes, and under which assumption.

    Examples:
        >>> rate_in_words(EDetector(null=0.1, run_length=1e4), "steps")
        'if a healthy run does so with a probability of at most 0.1 given its past, ...once in 1e+04 steps'
    """
    return (
        f"if a healthy run does so with a probability of at most {detector.null:g} given its past, "
        f"a false alarm comes on average at most once in {detector.run_length:.2g} {units}"
    )


def count(owner: str, name: str, value: object) -> int:
    """Return a number of steps.

    Args:
        owner: who needs it, for the message.
        name: of the argument, for the message.
        value: what was given.

    Raises:
        ValueError: if it is no integer >= 1.

    Examples:
        >>> count("Leap", "window", 100)
        100
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner} needs {name} as an integer >= 1, got {value!r}.")
    return value
