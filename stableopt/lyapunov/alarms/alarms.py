"""All channels together, each of them silent for a while after its alarm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stableopt.lyapunov.alarms.losses import Level, Relapse, Sublevel
from stableopt.lyapunov.alarms.sample import Alarm, Channel, Sample
from stableopt.lyapunov.alarms.steps import Increase, Leap, NonFinite, count

__all__ = ["Alarms"]


class Alarms:
    """Ask every channel at every step, and let each be silent for a while after its alarm.

    Args:
        channels: which; None for :class:`NonFinite`, :class:`Increase`, :class:`Leap`, :class:`Sublevel`, :class:`Relapse` and
            :class:`Level` as they are by default. Their names differ.
        cooldown: for how many steps a channel gives no further alarm, an integer >= 1. In the meantime it goes on to learn the
            levels of the run, but gathers no evidence.

    Raises:
        TypeError: if a channel is none.
        ValueError: if two channels have the same name, or ``cooldown`` is out of range.

    Examples:
        >>> alarms = Alarms()
        >>> [alarms.update(Sample(step, nonfinite=("loss",))) != () for step in (1, 2, 3)]
        [True, False, False]
        >>> print(alarms.update(Sample(101, nonfinite=("loss",)))[0])
        Not finite: loss (since step 101). Evidence: ...
    """

    def __init__(self, channels: Sequence[Channel] | None = None, cooldown: int = 100) -> None:
        if channels is None:
            channels = (NonFinite(), Increase(), Leap(), Sublevel(), Relapse(), Level())
        for channel in channels:
            if not isinstance(channel, Channel):
                raise TypeError(f"Alarms needs channels, got {type(channel).__name__}: derive it from Channel.")
        self.channels, self.cooldown = tuple(channels), count("Alarms", "cooldown", cooldown)
        names = [channel.name for channel in self.channels]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Alarms needs channels of different names, got {', '.join(names)}: name each after what it sees."
            )
        self._silent = dict.fromkeys(names, 0)

    @property
    def alert(self) -> bool:
        """Whether a channel has some evidence, far from enough for an alarm.

        Who does not look at every step should then do so: the alarm comes as many steps later, not as many looks.

        Examples:
            >>> alarms = Alarms()
            >>> _ = alarms.update(Sample(1, 1.0, 2.0, 1.0, 2.0, 1e-9))
            >>> alarms.alert
            True
        """
        return any(channel.alert for channel in self.channels)

    def update(self, sample: Sample) -> tuple[Alarm, ...]:
        """Take the sample of one step and return the alarms it gives.

        Args:
            sample: of a later step than all before.

        Examples:
            >>> Alarms().update(Sample(1, 2.0))
            ()
        """
        found = []
        for channel in self.channels:
            alarm = channel.update(sample)
            if sample.step < self._silent[channel.name]:
                channel.reset()
            elif alarm is not None:
                channel.reset()
                self._silent[channel.name] = sample.step + self.cooldown
                found.append(alarm)
        return tuple(found)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to give the alarms of an uninterrupted one.

        Examples:
            >>> sorted(Alarms([NonFinite()]).state_dict())
            ['channels', 'silent']
        """
        return {
            "channels": {channel.name: channel.state_dict() for channel in self.channels},
            "silent": dict(self._silent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: as :meth:`state_dict` gave it, of the same channels.

        Raises:
            ValueError: if it is of other channels.

        Examples:
            >>> alarms = Alarms()
            >>> alarms.load_state_dict(alarms.state_dict())
        """
        names = [channel.name for channel in self.channels]
        if sorted(state["channels"]) != sorted(names):
            raise ValueError(
                f"these alarms have the channels {', '.join(names)}, the state is of {', '.join(state['channels'])}: "
                "make both alike."
            )
        for channel in self.channels:
            channel.load_state_dict(state["channels"][channel.name])
        self._silent = dict(state["silent"])
