"""What stands out in a run: an alarm, or what a policy did about one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["KINDS", "POLICIES", "Event"]

KINDS = ("alarm", "action")
POLICIES = ("observe", "warn", "raise", "skip", "shrink", "restore", "rollback")


@dataclass(frozen=True)
class Event:
    """An alarm, or an action of a policy, with what it rests on.

    Args:
        step: the step at which it was noticed, counted from 1.
        kind: one of :data:`KINDS`.
        channel: which channel noticed it (``nonfinite``, ``increase``, ``sublevel``, ``level``); may be empty for an action.
        action: one of :data:`POLICIES`.
        what: what was noticed, or done, in one sentence.
        evidence: the numbers that it rests on, with the rate of false alarms and under which assumption.
        since: the step since when the evidence has gathered.
        advice: what to do.
        statistic: the value that was compared; NaN if there is none.
        threshold: with what; NaN if there is none.

    Raises:
        ValueError: if a kind or an action is not known, or a step is no integer >= 0.
        TypeError: if another field has the wrong type.

    Examples:
        >>> event = Event(
        ...     7, "alarm", "nonfinite", "warn", "the loss is nan", "loss = nan", 7, "lower the learning rate"
        ... )
        >>> print(event)
        step 7, nonfinite (warn): the loss is nan; evidence: loss = nan; since step 7; lower the learning rate
        >>> Event.from_dict(event.as_dict()).what == event.what
        True
    """

    step: int
    kind: str
    channel: str
    action: str
    what: str
    evidence: str = ""
    since: int = 0
    advice: str = ""
    statistic: float = math.nan
    threshold: float = math.nan

    def __post_init__(self) -> None:
        """Check every field, so that an event from a file is as good as one from a run."""
        for name in ("step", "since"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"an Event needs an integer {name} >= 0, got {value!r}.")
        for name, known in (("kind", KINDS), ("action", POLICIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"an Event needs {name} in {known}, got {getattr(self, name)!r}.")
        for name in ("channel", "what", "evidence", "advice"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"an Event needs {name} in words, got {getattr(self, name)!r}.")
        for name in ("statistic", "threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"an Event needs a number for {name}, got {value!r}.")
            object.__setattr__(self, name, float(value))

    def __str__(self) -> str:
        """Return the reading of the event, in one line."""
        parts = [f"step {self.step}, {self.channel or 'policy'} ({self.action}): {self.what}"]
        if self.evidence:
            parts.append(f"evidence: {self.evidence}")
        if self.since:
            parts.append(f"since step {self.since}")
        if self.advice:
            parts.append(self.advice)
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as they are; a number may be NaN or infinite.

        Examples:
            >>> Event(1, "action", "", "restore", "the learning rate is the scheduler's again").as_dict()["action"]
            'restore'
        """
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Event:
        """Return the event of a dictionary that :meth:`as_dict` gave.

        Args:
            data: every field, and nothing else.

        Raises:
            ValueError: if a field is missing or unknown, or a value is not allowed.

        Examples:
            >>> Event.from_dict({"step": 1})
            Traceback (most recent call last):
            ValueError: an event has the fields action, advice, ..., got step.
        """
        names = sorted(item.name for item in fields(cls))
        if not isinstance(data, dict) or sorted(map(str, data)) != names:
            got = ", ".join(sorted(map(str, data))) if isinstance(data, dict) else repr(data)
            raise ValueError(f"an event has the fields {', '.join(names)}, got {got}.")
        try:
            return cls(**data)
        except TypeError as error:  # in a file it is the content that is wrong
            raise ValueError(str(error)) from error
