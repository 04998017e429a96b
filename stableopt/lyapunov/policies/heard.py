"""The alarms of all processes, the same on each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from stableopt.lyapunov.alarms import Alarm
from stableopt.lyapunov.events import Event
from stableopt.lyapunov.policies.policy import Policy
from stableopt.optim.agree import Processes

__all__ = ["Heard", "heard_by_all"]

_FAR = 1 << 62
"""More than any step; as an integer, so that no process rounds it."""


@dataclass(frozen=True)
class Heard:
    """The alarm of a channel, of this process or of another one.

    Args:
        slot: the channel whose action holds.
        since: the step since when its evidence has gathered, on all processes.
        what: what was noticed.
        evidence: the numbers, where it was noticed.
        advice: what to do.
        statistic: the value that was compared.
        threshold: with what.
        channel: the channel itself; empty if it is the same.

    Examples:
        >>> print(Heard("level", 3, "the loss stays high", "4 of 5 blocks").done(7, "shrink", "halved"))
        step 7, level (shrink): halved; evidence: the loss stays high (4 of 5 blocks); since step 3
    """

    slot: str
    since: int
    what: str = ""
    evidence: str = ""
    advice: str = ""
    statistic: float = math.nan
    threshold: float = math.nan
    channel: str = ""

    @classmethod
    def of(cls, slot: str, alarm: Alarm) -> Heard:
        """Return an alarm of this process.

        Examples:
            >>> Heard.of("other", Alarm("mine", "it rose", "3 of 4", 5, "wait")).since
            5
        """
        return cls(
            slot, alarm.since, alarm.what, alarm.evidence, alarm.advice, alarm.statistic, alarm.threshold, alarm.channel
        )

    def event(self, step: int, kind: str, action: str, what: str, evidence: str) -> Event:
        """Return an event of this channel.

        Examples:
            >>> Heard("level", 3).event(7, "action", "shrink", "halved", "it rose").since
            3
        """
        channel = self.channel or self.slot
        return Event(
            step, kind, channel, action, what, evidence, self.since, self.advice, self.statistic, self.threshold
        )

    def done(self, step: int, action: str, what: str) -> Event:
        """Return the event of something that was done, on the evidence of the alarm.

        Examples:
            >>> Heard("level", 3, "it rose", "3 of 4").done(7, "shrink", "halved").evidence
            'it rose (3 of 4)'
        """
        return self.event(
            step, "action", action, what, f"{self.what} ({self.evidence})" if self.evidence else self.what
        )


def heard_by_all(policy: Policy, alarms: Iterable[Alarm], processes: Processes) -> dict[str, Heard]:
    """Return the alarms of all processes: of each channel the earliest beginning, in the words of this process if it has any.

    Args:
        policy: has the channels.
        alarms: of this process.
        processes: all call this together.

    Returns:
        Channel of the policy -> alarm; the same keys and beginnings on each process.

    Examples:
        >>> from stableopt.optim.agree import Alone
        >>> heard_by_all(Policy(), [Alarm("mine", "it rose", "3 of 4", 5, "wait")], Alone)["other"].what
        'it rose'
    """
    slots, found = policy.channels, dict[str, Heard]()
    for alarm in sorted(alarms, key=lambda a: a.since):
        found.setdefault(policy.slot(alarm.channel), Heard.of(policy.slot(alarm.channel), alarm))
    if processes.size == 1:
        return found
    rank = processes.size - dist.get_rank(processes.group)
    mine = [_FAR - found[s].since if s in found else 0 for s in slots] + [rank if s in found else 0 for s in slots]
    codes = processes.maximum(torch.tensor(mine, dtype=torch.int64)).tolist()
    for slot, begun, whose in zip(slots, codes[: len(slots)], codes[len(slots) :], strict=True):
        if begun:
            other = Heard(slot, _FAR, f"process {processes.size - whose} has noticed it")
            found[slot] = replace(found.get(slot, other), since=_FAR - begun)
    return found
