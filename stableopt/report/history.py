"""What a report keeps of the records of a run: enough for every figure, in a memory that does not grow with the run."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Self

from stableopt.lyapunov import Event, StepRecord

__all__ = ["BANDS", "Curve", "EventLog", "History", "Marks", "Stretch", "trust_band"]

LARGEST = 1e100
"""Numbers beyond it are not drawn."""

TRUST_SHOWN = (-1.0, 2.0)
"""The range in which trust ratios are drawn: where the slope is nearly zero, single ones are beyond any."""

BANDS = ("calm", "aggressive", "edge", "increase")
"""The readings of the trust ratio, from good to bad."""

_SCALARS = (
    "loss",
    "scale",
    "grad_norm",
    "weight_norm",
    "trust",
    "batch_sharpness",
    "sharpness",
    "edge",
    "plain_sharpness",
    "sharpness_residual",
    "trace",
    "noise_scale",
    "forward_exponent",
    "weight_exponent",
    "overhead",
)
_TABLES = ("grad_norms", "update_ratio", "norms", "cfl", "norm_gap", "growth", "gains", "kinks")


def trust_band(trust: float) -> str:
    r"""Return the reading of a trust ratio :math:`\rho = \Delta L / g^\top d`.

    Args:
        trust: 1 without curvature; :math:`1 - \rho` is the share of the predicted decrease that curvature takes back.

    Returns:
        "calm" above 0.5, "aggressive" above 0.25, "edge" above 0, "increase" (the loss of the same batch rose) otherwise; an
        empty string for NaN.

    Examples:
        >>> [trust_band(rho) for rho in (0.9, 0.5, 0.25, 0.0, math.nan)]
        ['calm', 'aggressive', 'edge', 'increase', '']
    """
    if math.isnan(trust):
        return ""
    return BANDS[0 if trust > 0.5 else 1 if trust > 0.25 else 2 if trust > 0 else 3]


class Stretch(NamedTuple):
    """Neighboring values of a curve: where they are, the lowest, the mean and the highest.

    Args:
        x: the middle of the stretch.
        low: the lowest value; NaN if the stretch is a gap.
        mean: the mean.
        high: the highest.
        gaps: how many values of it are not finite.

    Examples:
        >>> Stretch(1.0, 0.0, 0.5, 1.0).high
        1.0
    """

    x: float
    low: float
    mean: float
    high: float
    gaps: int = 0


class Curve:
    """A series of numbers in bounded memory that loses no spike.

    The first ``limit`` values are kept as they are. Then neighbors are merged, again and again, into stretches of equal
    numbers of values that keep their lowest, mean and highest value and how many are no numbers; there are never more than
    ``limit`` of them.

    Args:
        limit: the most stretches, an even number of at least 2.

    Attributes:
        count: how many values were added.
        first: (x, y) of the first; NaN without one. In the same way ``last``, ``lowest`` and ``highest``, exact ones.

    Examples:
        >>> curve = Curve(limit=2)
        >>> for step, loss in enumerate([0.0, 9.0, 1.0, 5.0, -3.0, 2.0]):
        ...     curve.add(step, loss)
        >>> [(stretch.low, stretch.high) for stretch in curve.stretches]
        [(0.0, 9.0), (-3.0, 2.0)]
        >>> curve.highest
        (1, 9.0)
    """

    def __init__(self, limit: int = 400) -> None:
        if limit < 2 or limit % 2:
            raise ValueError(f"a Curve needs an even limit >= 2, got {limit!r}.")
        self.limit, self.count, self.width = limit, 0, 1
        self.first = self.last = self.lowest = self.highest = (math.nan, math.nan)
        self._rows: list[list[float]] = []  # x of the first and of the last value, low, sum, high, values, taken

    def add(self, x: float, y: float) -> None:
        """Append a value; NaN or a number beyond 1e100 is a gap."""
        if not abs(y) <= LARGEST:
            self._append(x, [x, x, math.nan, 0.0, math.nan, 0, 1])
            return
        if not self.count:
            self.first = self.lowest = self.highest = (x, y)
        elif y < self.lowest[1]:
            self.lowest = (x, y)
        elif y > self.highest[1]:
            self.highest = (x, y)
        self.count, self.last = self.count + 1, (x, y)
        self._append(x, [x, x, y, y, y, 1, 1])

    @property
    def stretches(self) -> list[Stretch]:
        """The curve, in order."""
        return [
            Stretch((start + end) / 2, low, total / values if values else math.nan, high, int(taken - values))
            for start, end, low, total, high, values, taken in self._rows
        ]

    def _append(self, x: float, row: list[float]) -> None:
        last = self._rows[-1] if self._rows else None
        if last is not None and last[6] < self.width:
            _merge(last, row)
            return
        if len(self._rows) == self.limit:
            for left, right in zip(self._rows[::2], self._rows[1::2], strict=True):
                _merge(left, right)
            del self._rows[1::2]
            self.width *= 2
        self._rows.append(row)


def _merge(left: list[float], right: list[float]) -> None:
    """Put the values of the right stretch into the left one."""
    left[1] = right[1]
    if right[5]:
        left[2] = min(left[2], right[2]) if left[5] else right[2]
        left[4] = max(left[4], right[4]) if left[5] else right[4]
        left[3] += right[3]
        left[5] += right[5]
    left[6] += right[6]


class Marks:
    """The steps at which something happened: all of them up to a limit, then an even selection with the first and the last.

    Args:
        limit: the most steps to keep besides the last one, at least 2.

    Examples:
        >>> marks = Marks(limit=3)
        >>> for step in range(1, 10):
        ...     marks.add(step)
        >>> marks.count, marks.steps
        (9, (1, 5, 9))
    """

    def __init__(self, limit: int = 160) -> None:
        self.limit, self.count, self._stride = limit, 0, 1
        self._kept: list[int] = []
        self._last = 0

    def add(self, step: int) -> None:
        """Note one more step."""
        if self.count % self._stride == 0:
            if len(self._kept) == self.limit:
                self._kept = self._kept[::2]
                self._stride *= 2
            if self.count % self._stride == 0:
                self._kept.append(step)
        self.count, self._last = self.count + 1, step

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are kept, rising."""
        return tuple(self._kept) + ((self._last,) if self._kept and self._kept[-1] != self._last else ())


class EventLog:
    """The first and the last events of a run, and the number of all.

    Args:
        limit: how many of the first to keep, and how many of the last.

    Examples:
        >>> log = EventLog(limit=1)
        >>> for step in (1, 2, 3):
        ...     log.add(Event(step, "alarm", "level", "warn", "the level rose"))
        >>> [event.step for event in log.kept], log.count, log.counts["alarm", "level", "warn"]
        ([1, 3], 3, 3)
    """

    def __init__(self, limit: int = 100) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self._first: list[Event] = []
        self._last: deque[Event] = deque(maxlen=limit)
        self._limit = limit

    def add(self, event: Event) -> None:
        """Take one event."""
        self.counts[event.kind, event.channel, event.action] += 1
        if len(self._first) < self._limit:
            self._first.append(event)
        else:
            self._last.append(event)

    @property
    def count(self) -> int:
        """The number of all events."""
        return sum(self.counts.values())

    @property
    def kept(self) -> list[Event]:
        """The events that are kept, in order."""
        return [*self._first, *self._last]


class History:
    """The records of a run, condensed: curves, marks, counts and events.

    Attributes:
        count: the number of records.
        first: the first record, None if there is none; ``last`` in the same way.
        curves: field -> its curve; also ``energy``, ``trace_low`` and ``trace_high``, ``lr``, and ``trust_shown``, which is cut to
            :data:`TRUST_SHOWN`.
        tables: field -> name of a layer -> its curve; ``norm_share`` is the norm over its limit.
        across: ``grad_norms`` and ``update_ratio`` -> curves of the least, the median and the largest of all layers.
        marks: (``verdict``, ``action`` or ``event``; its value) -> where it happened.
        bands: how often the trust ratio was in which band.
        products: how often products with the Hessian were made in which way.
        limits: name of a weight -> the last limit of its norm.
        events: alarms and actions.

    Examples:
        >>> history = History.of([StepRecord(step=1, loss=2.0), StepRecord(step=2, loss=1.0, trust=0.9)])
        >>> history.count, history.curves["loss"].last, history.bands["calm"]
        (2, (2, 1.0), 1)
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: StepRecord | None = None
        self.last: StepRecord | None = None
        self.curves: dict[str, Curve] = {}
        self.tables: dict[str, dict[str, Curve]] = {}
        self.across: dict[str, tuple[Curve, Curve, Curve]] = {}
        self.marks: dict[tuple[str, str], Marks] = {}
        self.bands: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.limits: dict[str, float] = {}
        self.events = EventLog()

    @classmethod
    def of(cls, records: Iterable[StepRecord]) -> Self:
        """Condense records; an iterator is read once and never held as a whole."""
        history = cls()
        for record in records:
            history.add(record)
        return history

    def add(self, record: StepRecord) -> None:
        """Take the next record."""
        self.count += 1
        self.first = self.first or record
        self.last = record
        self._add_scalars(record)
        self._add_tables(record)
        for kind, value in (("verdict", record.verdict), ("action", record.action)):
            self._mark(kind, value, record.step)
        for event in record.events:
            self._mark("event", event.kind, record.step)
            self.events.add(event)
        if band := trust_band(record.trust):
            self.bands[band] += 1
        if record.hvp:
            self.products[record.hvp] += 1

    def _add_scalars(self, record: StepRecord) -> None:
        """Add what is known; NaN is "not measured", but a gap where the record says that a number is not finite."""
        broken = record.verdict == "nonfinite" or bool(record.nonfinite)
        values = {name: getattr(record, name) for name in _SCALARS}
        values["energy"] = record.energy_before if record.action == "undone" else record.energy_after
        values["trust_shown"] = min(max(record.trust, TRUST_SHOWN[0]), TRUST_SHOWN[1])
        values["lr"] = max(record.lr, default=math.nan)
        if not math.isnan(record.trace) and record.trace_error >= 0:
            values["trace_low"] = record.trace - 1.96 * record.trace_error
            values["trace_high"] = record.trace + 1.96 * record.trace_error
        for name, value in values.items():
            if not math.isnan(value) or (broken and name in {"loss", "energy"}):
                make = _coarse if name == "trust_shown" else Curve
                _curve(self.curves, name, make).add(record.step, value)

    def _add_tables(self, record: StepRecord) -> None:
        for kind in _TABLES:
            if table := getattr(record, kind):
                self._add_table(kind, record.step, table)
        for name, limit in record.limits.items():
            self.limits[name] = limit
            if limit > 0 and name in record.norms:
                _curve(self.tables.setdefault("norm_share", {}), name, _coarse).add(
                    record.step, record.norms[name] / limit
                )

    def _add_table(self, kind: str, step: int, table: Mapping[str, float]) -> None:
        curves = self.tables.setdefault(kind, {})
        for name, value in table.items():
            _curve(curves, name, _coarse).add(step, value)
        if kind in {"grad_norms", "update_ratio"}:
            values = [value for value in table.values() if abs(value) <= LARGEST]
            if values:
                across = self.across.setdefault(kind, (_coarse(), _coarse(), _coarse()))
                for curve, choose in zip(across, (min, statistics.median, max), strict=True):
                    curve.add(step, choose(values))

    def _mark(self, kind: str, value: str, step: int) -> None:
        marks = self.marks.get((kind, value))
        if marks is None:
            marks = self.marks[kind, value] = Marks()
        marks.add(step)


def _coarse() -> Curve:
    """Return the curve of one layer: there may be a thousand of them."""
    return Curve(limit=120)


def _curve(curves: dict[str, Curve], name: str, make: Callable[[], Curve]) -> Curve:
    curve = curves.get(name)
    if curve is None:
        curve = curves[name] = make()
    return curve
