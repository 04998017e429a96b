"""What sinks for the dashboards of others have in common."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable

from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.sinks.base import Sink
from stableopt.lyapunov.sinks.scalars import scalars

__all__ = ["TrackerSink"]


class TrackerSink(Sink):
    """Hand the :func:`~stableopt.lyapunov.scalars` of each record to a dashboard, and stop with one warning if that fails.

    Events are counted: ``alarms/<channel>`` and ``actions/<action>`` are the numbers of them that this sink has seen, given with
    each record from the first of the kind on.

    Args:
        tables: whether to hand on what there is per parameter, layer and block.

    Attributes:
        disabled: whether the dashboard has failed; the sink then does nothing any more.

    Note:
        Whatever exception the dashboard raises, training goes on: it is code of others, with disks and connections of its own.

    Examples:
        >>> class Print(TrackerSink):
        ...     def send(self, values, record):
        ...         print(record.step, values)
        >>> Print().write(StepRecord(step=3, loss=0.5))
        3 {'loss': 0.5}
    """

    def __init__(self, *, tables: bool = True) -> None:
        self.disabled = False
        self._tables = tables
        self._events: Counter[str] = Counter()

    @abstractmethod
    def send(self, values: dict[str, float], record: StepRecord) -> None:
        """Hand on the numbers of a record, and from the record itself what is no number."""

    def write(self, record: StepRecord) -> None:
        """Hand on a record, or give up for good with one warning."""
        if self.disabled:
            return
        for event in record.events:
            self._events[f"alarms/{event.channel}" if event.kind == "alarm" else f"actions/{event.action}"] += 1
        values = scalars(record, tables=self._tables)
        values.update((name, float(count)) for name, count in self._events.items())
        self._attempt(f"hand on step {record.step}", lambda: self.send(values, record))

    def _attempt(self, doing: str, call: Callable[[], object]) -> None:
        """Call the dashboard; the first exception is a warning, and the last call."""
        try:
            call()
        except Exception as error:
            self.disabled = True  # first: a warning may be an error here
            warnings.warn(
                f"{type(self).__name__} cannot {doing} ({type(error).__name__}: {error}): "
                "training goes on, later steps are not handed on. Mend the dashboard, and give the next run a new sink.",
                RuntimeWarning,
                stacklevel=3,
            )
