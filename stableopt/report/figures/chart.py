"""Any numbers against any others, drawn as the figures of a report are: for a page of documentation, or a slide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stableopt.report.figures.compose import picture
from stableopt.report.figures.plot import Guide, Line, Plot
from stableopt.report.figures.standalone import standalone_svg
from stableopt.report.history import Curve

__all__ = ["line_chart"]


def line_chart(
    title: str,
    axis: str,
    lines: Mapping[str, Iterable[tuple[float, float]]],
    *,
    guides: Mapping[str, float] | None = None,
    scale: str = "auto",
) -> str:
    """Draw curves into an SVG file.

    Args:
        title: the quantity, with its unit.
        axis: the name of the horizontal axis.
        lines: name -> points (x, y), with x increasing.
        guides: name -> value of a horizontal line.
        scale: ``"linear"``, ``"log"``, or ``"auto"``, which picks the logarithm for positive values over several decades.

    Returns:
        The text of the file.

    Raises:
        ValueError: if there is no line, or a line has no point.

    Examples:
        >>> line_chart("Error", "step", {"a": [(1, 2.0), (2, 1.0)]}).startswith("<svg")
        True
    """
    if not lines:
        raise ValueError("a chart needs at least one line.")
    drawn = []
    for style, (name, points) in enumerate(lines.items()):
        curve, pairs = Curve(), list(points)
        if not pairs:
            raise ValueError(f"the line {name!r} has no point.")
        for x, y in pairs:
            curve.add(int(x) if float(x).is_integer() else x, float(y))
        drawn.append(Line(name, curve, style))
    marks = tuple(Guide(value, name) for name, value in (guides or {}).items())
    return standalone_svg(picture(Plot(title, "", tuple(drawn), guides=marks, scale=scale, axis=axis)))
