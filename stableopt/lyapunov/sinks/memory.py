"""The last records of a run, in memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.sinks.base import Sink
from stableopt.lyapunov.sinks.scalars import scalars

__all__ = ["MemorySink"]

_FIELDS = frozenset(item.name for item in fields(StepRecord))


class MemorySink(Sink):
    """Keep the last records; memory does not grow with the number of steps.

    Args:
        keep: how many.

    Attributes:
        records: the records, the oldest first; a deque that drops the oldest when it is full.

    Raises:
        ValueError: if ``keep`` is no integer >= 1.

    Examples:
        >>> sink = MemorySink(keep=2)
        >>> for step in (1, 2, 3):
        ...     sink.write(StepRecord(step=step, loss=1 / step, update_ratio={"0.weight": 1e-3}))
        >>> len(sink), sink.column("loss"), sink.column("update_ratio/0.weight")
        (2, [0.5, 0.3333333333333333], [0.001, 0.001])
    """

    def __init__(self, keep: int = 1000) -> None:
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise ValueError(f"MemorySink needs keep, the number of records, as an integer >= 1, got {keep!r}.")
        self.records: deque[StepRecord] = deque(maxlen=keep)

    def write(self, record: StepRecord) -> None:
        """Keep a record."""
        self.records.append(record)

    def truncate(self, step: int) -> None:
        """Drop the records after a step.

        Args:
            step: the last step to keep.

        Examples:
            >>> sink = MemorySink()
            >>> sink.write(StepRecord(step=2))
            >>> sink.truncate(1)
            >>> len(sink)
            0
        """
        while self.records and self.records[-1].step > step:
            self.records.pop()

    def column(self, name: str) -> list[Any]:
        """Return one value of each record, the oldest first.

        Args:
            name: a field of :class:`~stableopt.lyapunov.StepRecord`, or a name of
                :func:`~stableopt.lyapunov.scalars`; a record that has no such number gives NaN then.

        Raises:
            KeyError: if it is no field, and no record that is kept has a number of that name.

        Examples:
            >>> sink = MemorySink()
            >>> sink.write(StepRecord(step=1, trust=0.9))
            >>> sink.write(StepRecord(step=2))
            >>> sink.column("verdict"), sink.column("trust/rho")
            (['unobserved', 'unobserved'], [0.9, nan])
        """
        if name in _FIELDS:
            return [getattr(record, name) for record in self.records]
        values = [scalars(record).get(name, math.nan) for record in self.records]
        if all(map(math.isnan, values)):
            known = sorted({name for record in self.records for name in scalars(record)})
            raise KeyError(
                f"no record that is kept has {name!r}; there are {', '.join(known) or 'none'}, and the fields."
            )
        return values

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.records)
