"""What a figure shows, as data: lines, bands, limits, zones and marks, and the words that go with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stableopt.report.history import Curve

__all__ = ["Band", "Guide", "Line", "Number", "Picture", "Plot", "Point", "Strip", "Zone", "numbers"]


@dataclass(frozen=True)
class Line:
    """A curve with a name; a long one is drawn as its mean within a band from its lowest to its highest values.

    Args:
        label: its name.
        curve: its values.
        style: the number that picks color, dashes and marker.
        faint: whether the band must let others be seen behind it.

    Examples:
        >>> Line("a", Curve(), 0).faint
        False
    """

    label: str
    curve: Curve
    style: int
    faint: bool = False


@dataclass(frozen=True)
class Band:
    """The area between two curves that were measured at the same steps.

    Args:
        low: the lower edge.
        high: the upper edge.
        style: as of a :class:`Line`; None is gray.
        label: its name; empty if the line inside is named.

    Examples:
        >>> Band(Curve(), Curve(), 0).label
        ''
    """

    low: Curve
    high: Curve
    style: int | None
    label: str = ""


@dataclass(frozen=True)
class Guide:
    """A horizontal line at a value that matters, with its name.

    Args:
        value: where.
        label: what it is; empty for none.
        style: as of a :class:`Line`; None is the color of text.

    Examples:
        >>> Guide(1.0, "limit").style is None
        True
    """

    value: float
    label: str
    style: int | None = None


@dataclass(frozen=True)
class Zone:
    """A range of values with a name.

    Args:
        low: its lower end, possibly infinite.
        high: its upper end, possibly infinite.
        label: what it means.
        level: how grave: 0 (good) to 3.

    Examples:
        >>> Zone(0.5, float("inf"), "calm", 0).label
        'calm'
    """

    low: float
    high: float
    label: str
    level: int


@dataclass(frozen=True)
class Point:
    """A place that stands out, with its words.

    Args:
        x: where.
        y: its value.
        label: what it is; empty for none.
        style: as of a :class:`Line`.

    Examples:
        >>> Point(3.0, 1.5, "peak", 0).label
        'peak'
    """

    x: float
    y: float
    label: str
    style: int


@dataclass(frozen=True)
class Plot:
    """A figure of lines.

    Args:
        title: the quantity.
        caption: how to read it.
        lines: the curves.
        bands: areas behind them.
        guides: values that matter.
        zones: ranges that have a name.
        alarms: style of the run -> the steps at which it had an alarm.
        scale: of the vertical axis, see :func:`stableopt.report.figures.scale.choose_scale`.
        window: the widest range of values to show; None for all.
        span: the range of the horizontal axis; None takes that of the lines.
        axis: the name of the horizontal axis.
        points: places that stand out.

    Examples:
        >>> Plot("loss", "falls", (Line("a", Curve(), 0),)).axis
        'step'
    """

    title: str
    caption: str
    lines: tuple[Line, ...]
    bands: tuple[Band, ...] = ()
    guides: tuple[Guide, ...] = ()
    zones: tuple[Zone, ...] = ()
    alarms: Mapping[int, Sequence[int]] = field(default_factory=dict)
    scale: str = "auto"
    window: tuple[float, float] | None = None
    span: tuple[float, float] | None = None
    axis: str = "step"
    points: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Strip:
    """A figure with a row for each kind of occurrence and a mark at each step where a run had one.

    Args:
        title: what occurs.
        caption: how to read it.
        rows: the kinds, from above.
        marks: (row, style of the run) -> steps.
        span: the range of the steps.
        labels: style -> name of the run.

    Examples:
        >>> Strip("actions", "", ("undone",), {("undone", 0): (3,)}, (1, 9), {0: "a"}).rows
        ('undone',)
    """

    title: str
    caption: str
    rows: tuple[str, ...]
    marks: Mapping[tuple[str, int], Sequence[int]]
    span: tuple[float, float]
    labels: Mapping[int, str]


@dataclass(frozen=True)
class Number:
    """One row of the table below a figure: a line in numbers, as text.

    Args:
        label: the name of the line.
        first: value and step of the first point; in the same way ``last``, ``lowest``, ``highest``.
        last: see ``first``.
        lowest: see ``first``.
        highest: see ``first``.
        count: the number of values.

    Examples:
        >>> Number("a", "2 (1)", "1 (9)", "1 (9)", "2 (1)", 9).count
        9
    """

    label: str
    first: str
    last: str
    lowest: str
    highest: str
    count: int


@dataclass(frozen=True)
class Picture:
    """A drawn figure with everything that a page needs to show it, also to those who do not see it.

    Args:
        title: the quantity.
        svg: the drawing, to be put into the page as it is.
        caption: how to read it.
        legend: (drawing of the line, name) of each line; empty where there is nothing to tell apart.
        numbers: the lines in numbers.
        axis: the name of the horizontal axis.

    Examples:
        >>> Picture("loss", "<svg></svg>", "falls").legend
        ()
    """

    title: str
    svg: str
    caption: str
    legend: tuple[tuple[str, str], ...] = ()
    numbers: tuple[Number, ...] = ()
    axis: str = "step"


def numbers(lines: Sequence[Line]) -> tuple[Number, ...]:
    """Return lines in numbers, each value with the place where it stands.

    Examples:
        >>> curve = Curve()
        >>> curve.add(1, 2.0)
        >>> curve.add(2, 1.0)
        >>> numbers([Line("a", curve, 0)])[0].lowest
        '1 (2)'
    """
    return tuple(
        Number(line.label, _at(curve.first), _at(curve.last), _at(curve.lowest), _at(curve.highest), curve.count)
        for line in lines
        for curve in (line.curve,)
    )


def _at(point: tuple[float, float]) -> str:
    x, y = point
    return "—" if math.isnan(y) else f"{y:.4g} ({x:g})" if not float(x).is_integer() else f"{y:.4g} ({int(x)})"
