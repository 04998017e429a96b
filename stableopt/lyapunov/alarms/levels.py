"""What the values of a run were so far, in a fixed amount of memory."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

__all__ = ["Levels", "RecentHighest"]


class Levels:
    r"""The level of a noisy sequence at its start, at its lowest and now, and how much it scatters.

    The sequence is cut into blocks; the level of a block is its median. The scatter is an average over the last blocks of the
    median distance from the level plus what the level rose since the block before. All numbers move along if the sequence is
    shifted or scaled, so nothing that is derived from them depends on the unit of a loss, on its sign or on where its zero is.

    Args:
        block: number of values in a block, an integer >= 3.

    Raises:
        ValueError: if ``block`` is no such integer.

    Examples:
        >>> levels = Levels(block=5)
        >>> for value in [9.0, 8.0, 9.0, 8.5, 9.5, 3.0, 2.0, 2.5, 2.0, 2.5]:
        ...     _ = levels.update(value)
        >>> levels.start, levels.last, levels.best, levels.fall
        (9.0, 2.5, 2.5, 6.5)
    """

    def __init__(self, block: int = 10) -> None:
        if not isinstance(block, int) or isinstance(block, bool) or block < 3:
            raise ValueError(f"Levels needs block as an integer >= 3, got {block!r}.")
        self.block = block
        self.start, self.last, self.best, self.scatter = math.nan, math.nan, math.nan, math.nan
        self.blocks = 0
        self._values: list[float] = []

    @property
    def fall(self) -> float:
        """How far the level has come down at most; NaN before the first block is full.

        Examples:
            >>> Levels().fall
            nan
        """
        return self.start - self.best

    def update(self, value: float) -> float | None:
        """Take a finite value, and return the level of the block if it is full now.

        Args:
            value: the next one.

        Examples:
            >>> levels = Levels(block=3)
            >>> [levels.update(x) for x in (1.0, 5.0, 2.0)]
            [None, None, 2.0]
        """
        self._values.append(value)
        if len(self._values) < self.block:
            return None
        level = _median(self._values)
        scatter = _median([abs(x - level) for x in self._values])
        self.blocks += 1
        if level > self.last:
            scatter += level - self.last
        if self.blocks == 1:
            self.start, self.best, self.scatter = level, level, scatter
        self.best, self.last = min(self.best, level), level
        self.scatter += (scatter - self.scatter) / min(self.blocks, 8)
        self._values.clear()
        return level

    def state_dict(self) -> dict[str, Any]:
        """Return the levels and the block that is not full yet.

        Examples:
            >>> Levels().state_dict()["values"]
            []
        """
        names = ("start", "last", "best", "scatter", "blocks")
        return {name: getattr(self, name) for name in names} | {"values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: as :meth:`state_dict` gave it.

        Examples:
            >>> levels = Levels()
            >>> levels.load_state_dict(levels.state_dict())
        """
        for name in ("start", "last", "best", "scatter", "blocks"):
            setattr(self, name, state[name])
        self._values = list(state["values"])


class RecentHighest:
    r"""The highest one of the last values, without the very last ones.

    If the order of the values says nothing (they are exchangeable), the next one is higher than all of n before it with a
    probability of at most 1/(n+1), whatever they are distributed like. The very last ones are left out so that a sudden rise is
    not measured against itself.

    Args:
        window: n, how many values are compared with.
        delay: how many of the last ones are left out.
        least: how many there are to be for a comparison.

    Examples:
        >>> recent = RecentHighest(window=3, delay=1, least=3)
        >>> for value in (5.0, 1.0, 2.0, 3.0, 9.0):
        ...     recent.update(value)
        >>> recent.enough, recent.highest
        (True, 3.0)
    """

    def __init__(self, window: int = 100, delay: int = 10, least: int = 20) -> None:
        self.window, self.least = window, min(least, window)
        self._late: deque[float] = deque(maxlen=delay)
        self._values: deque[float] = deque(maxlen=window)
        self.highest = -math.inf

    @property
    def enough(self) -> bool:
        """Whether there are enough values to compare with.

        Examples:
            >>> RecentHighest().enough
            False
        """
        return len(self._values) >= self.least

    def update(self, value: float) -> None:
        """Take a value."""
        if len(self._late) == self._late.maxlen:
            entering, leaving = self._late[0], self._values[0] if len(self._values) == self.window else -math.inf
            self._values.append(entering)
            if entering >= self.highest:
                self.highest = entering
            elif leaving >= self.highest:
                self.highest = max(self._values)
        self._late.append(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the values.

        Examples:
            >>> RecentHighest().state_dict()
            {'late': [], 'values': []}
        """
        return {"late": list(self._late), "values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: as :meth:`state_dict` gave it.

        Examples:
            >>> recent = RecentHighest()
            >>> recent.load_state_dict(recent.state_dict())
        """
        self._late = deque(state["late"], maxlen=self._late.maxlen)
        self._values = deque(state["values"], maxlen=self.window)
        self.highest = max(self._values, default=-math.inf)


def _median(values: list[float]) -> float:
    """Return the upper one of the middle values."""
    return sorted(values)[len(values) // 2]
