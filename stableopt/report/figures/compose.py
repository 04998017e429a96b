"""From the histories of runs to figures: the steps that all figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stableopt.report.figures.plot import Line, Picture, Plot, Strip, numbers
from stableopt.report.figures.svg import band_swatch, draw_plot, draw_strip, swatch
from stableopt.report.runs import Run

__all__ = ["alarm_steps", "natural", "overlay", "picture", "recorded_span", "strip_picture"]

_SPOKEN = 8  # lines that are described in words; the table has all of them
_ALARMS = 40  # vertical lines of a run


def overlay(
    runs: Sequence[Run], field: str, title: str, caption: str, *, exact: str | None = None, **options: Any
) -> Picture | None:
    """Draw one quantity of several runs over each other.

    Args:
        runs: the number of a run picks its color and marker.
        field: which of ``history.curves``.
        title: the quantity.
        caption: how to read it.
        exact: the field whose numbers go into the words and the table, if not the one that is drawn.
        options: of :class:`~stableopt.report.figures.plot.Plot`.

    Returns:
        None if no run has such a number.

    Examples:
        >>> overlay([Run("a")], "trust", "trust ratio", "") is None
        True
    """
    curves = [(index, run.name, run.history.curves.get(field)) for index, run in enumerate(runs)]
    lines = tuple(Line(name, curve, index) for index, name, curve in curves if curve is not None)
    if not lines:
        return None
    plot = Plot(title, caption, lines, span=recorded_span(runs), **options)
    if exact is None:
        return picture(plot)
    return picture(
        plot, spoken=[Line(line.label, runs[line.style].history.curves[exact], line.style) for line in lines]
    )


def picture(plot: Plot, table: Sequence[Line] = (), spoken: Sequence[Line] = ()) -> Picture:
    """Draw a plot and put it into words.

    Args:
        plot: what to draw.
        table: the lines in the table below it; by default the spoken ones.
        spoken: the lines in the words; by default those of the plot.

    Examples:
        >>> from stableopt.report.history import Curve
        >>> curve = Curve()
        >>> curve.add(1, 2.0)
        >>> "a: from 2 (1) to 2 (1)" in picture(Plot("loss", "", (Line("a", curve, 0),))).svg
        True
    """
    rows = numbers(spoken or plot.lines)
    sentence = "; ".join(
        f"{row.label}: from {row.first} to {row.last}, lowest {row.lowest}, highest {row.highest}"
        for row in rows[:_SPOKEN]
    )
    more = f"; and {len(rows) - _SPOKEN} more" if len(rows) > _SPOKEN else ""
    words = f"{plot.title} against {plot.axis}, each value with its {plot.axis} in brackets. {sentence}{more}."
    several = len(plot.lines) > 1
    legend = tuple((swatch(line.style), line.label) for line in plot.lines) if several else ()
    legend += tuple((band_swatch(), band.label) for band in plot.bands if band.label)
    return Picture(
        plot.title, draw_plot(plot, words), plot.caption, legend, numbers(table) if table else rows, plot.axis
    )


def strip_picture(strip: Strip, counts: Mapping[tuple[str, int], int]) -> Picture:
    """Draw a strip and put it into words.

    Args:
        strip: what to draw.
        counts: (row, style of the run) -> how often.

    Examples:
        >>> strip = Strip("actions", "", ("undone",), {("undone", 0): (3,)}, (1, 9), {0: "a"})
        >>> "a: 1 undone" in strip_picture(strip, {("undone", 0): 1}).svg
        True
    """
    spoken = "; ".join(
        f"{label}: " + (", ".join(f"{counts[row, k]} {row}" for row in strip.rows if counts.get((row, k))) or "none")
        for k, label in strip.labels.items()
    )
    words = f"{strip.title}: one row for each, with a mark at every step where it happened. {spoken}."
    legend = tuple((swatch(k), label) for k, label in strip.labels.items()) if len(strip.labels) > 1 else ()
    return Picture(strip.title, draw_strip(strip, words), strip.caption, legend)


def recorded_span(runs: Sequence[Run]) -> tuple[float, float]:
    """Return the first and the last step of all the records.

    Examples:
        >>> recorded_span([Run("a")])
        (0.0, 1.0)
    """
    first = [run.history.first.step for run in runs if run.history.first]
    last = [run.history.last.step for run in runs if run.history.last]
    return (float(min(first)), float(max(last))) if first and last else (0.0, 1.0)


def alarm_steps(runs: Sequence[Run]) -> dict[int, tuple[int, ...]]:
    """Return style of the run -> the steps of its alarms, an even selection of them if there are many.

    Examples:
        >>> alarm_steps([Run("a")])
        {}
    """
    found: dict[int, tuple[int, ...]] = {}
    for index, run in enumerate(runs):
        if marks := run.history.marks.get(("event", "alarm")):
            steps = marks.steps
            found[index] = steps[:: -(-len(steps) // _ALARMS)]
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts "2.weight" before "10.weight".

    Examples:
        >>> sorted(["10.weight", "2.weight"], key=natural)
        ['2.weight', '10.weight']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
