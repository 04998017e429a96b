"""Draw plots as SVG that takes its colors from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence

from stableopt.report.figures.plot import Band, Guide, Line, Plot, Point, Strip, Zone
from stableopt.report.figures.scale import Scale, choose_scale
from stableopt.report.history import Stretch

__all__ = ["STYLES", "band_swatch", "coordinate", "draw_plot", "draw_strip", "escape", "swatch", "text_at", "whole"]

STYLES = 8
"""The number of combinations of color and marker; beyond it, the dashes differ."""

_WIDTH, _HEIGHT = 420, 250
_TOP, _RIGHT, _BOTTOM = 12, 12, 38
_LETTER = 6.6  # the width of a letter, roughly, in units of the drawing
_MARKED = 9  # markers on a line

_SHAPES: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f"M{coordinate(x - 3)} {coordinate(y)}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    lambda x, y: f"M{coordinate(x - 3)} {coordinate(y - 3)}h6v6h-6z",
    lambda x, y: f"M{coordinate(x)} {coordinate(y - 4)}l3.6 6.6h-7.2z",
    lambda x, y: f"M{coordinate(x)} {coordinate(y - 4)}l4 4l-4 4l-4 -4z",
    lambda x, y: f"M{coordinate(x)} {coordinate(y + 4)}l3.6 -6.6h-7.2z",
    lambda x, y: f"M{coordinate(x - 4)} {coordinate(y)}h8M{coordinate(x)} {coordinate(y - 4)}v8",
    lambda x, y: f"M{coordinate(x - 3)} {coordinate(y - 3)}l6 6m0 -6l-6 6",
    lambda x, y: f"M{coordinate(x - 3)} {coordinate(y - 3)}h6v6h-6zm-1.5 -1.5v9h9v-9z",
)


def draw_plot(plot: Plot, words: str) -> str:
    """Return the drawing of a plot.

    Args:
        plot: what to draw.
        words: what is to be seen, for those who do not see it.

    Examples:
        >>> from stableopt.report.history import Curve
        >>> draw_plot(Plot("loss", "", (Line("a", Curve(), 0),)), "no value")[:45]
        '<svg class="plot" viewBox="0 0 420 250" role='
    """
    x, y = _scales(plot)
    ticks = y.ticks()
    left = 10 + _LETTER * max((len(name) for _, name in ticks), default=1)
    frame = _Frame(x, y, left, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM)
    parts = [*_zones(frame, plot.zones), *_grid(frame, ticks, plot.axis)]
    parts += [_band(frame, band) for band in plot.bands]
    parts += [_hull(frame, line) for line in plot.lines if line.curve.width > 1]
    parts += [_alarm(frame, style, steps) for style, steps in plot.alarms.items()]
    parts += [part for guide in plot.guides for part in _guide(frame, guide)]
    parts += [_line(frame, line) for line in plot.lines]
    parts += [_point(frame, point) for point in plot.points]
    parts += _zone_names(frame, plot.zones)
    if not any(line.curve.count for line in plot.lines):
        parts.append(text_at((left + _WIDTH) / 2, _HEIGHT / 2 - 10, "nothing finite was observed", "middle"))
    return whole(parts, _HEIGHT, words)


def draw_strip(strip: Strip, words: str) -> str:
    """Return the drawing of a strip, see :func:`draw_plot`.

    Examples:
        >>> drawing = draw_strip(Strip("actions", "", ("undone",), {("undone", 0): (3,)}, (1, 9), {0: "a"}), "one")
        >>> drawing.count("undone"), 'aria-label="one"' in drawing
        (1, True)
    """
    row_height = 16 + 8 * len(strip.labels)
    height = _TOP + row_height * len(strip.rows) + _BOTTOM
    left = 12 + _LETTER * max(map(len, strip.rows))
    x, y = _span(strip.span), Scale(0.0, 1.0)
    frame = _Frame(x, y, left, _WIDTH - _RIGHT, _TOP, height - _BOTTOM)
    parts = list(_horizontal(frame, "step"))
    styles = sorted(strip.labels)
    for index, row in enumerate(strip.rows):
        top = _TOP + row_height * index
        parts.append(f'<path class="grid" d="M{coordinate(left)} {coordinate(top + row_height)}H{_WIDTH - _RIGHT}"/>')
        parts.append(text_at(left - 6, top + row_height / 2 + 4, row, "end"))
        for place, style in enumerate(styles):
            middle = top + 12 + 8 * place if len(styles) > 1 else top + row_height / 2
            shapes = "".join(_shape(style, frame.x(step), middle) for step in strip.marks.get((row, style), ()))
            if shapes:
                parts.append(f'<path class="mark c{style % STYLES}" d="{shapes}"/>')
    return whole(parts, height, words)


def swatch(style: int) -> str:
    """Return the little drawing of a line for a legend.

    Examples:
        >>> swatch(1)[:58]
        '<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true"'
    """
    color, dashes = f"c{style % STYLES}", _dashes(style)
    return (
        f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true"><path class="line {color} {dashes}" d="M1 6H33"/>'
        f'<path class="mark {color}" d="{_shape(style, 17, 6)}"/></svg>'
    )


def band_swatch() -> str:
    """Return the little drawing of a gray band for a legend.

    Examples:
        >>> "hull soft" in band_swatch()
        True
    """
    return (
        '<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true"><path class="hull soft" d="M1 1h32v10H1z"/></svg>'
    )


class _Frame:
    """The rectangle of the data within a drawing."""

    def __init__(self, x: Scale, y: Scale, left: float, right: float, top: float, bottom: float) -> None:
        self.x_scale, self.y_scale = x, y
        self.left, self.right, self.top, self.bottom = left, right, top, bottom

    def x(self, value: float) -> float:
        return self.left + self.x_scale(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.y_scale(value) * (self.bottom - self.top)


def _scales(plot: Plot) -> tuple[Scale, Scale]:
    stretches = [s for line in plot.lines for s in line.curve.stretches]
    values = [v for s in stretches if not math.isnan(s.mean) for v in ((s.low, s.high))]
    edges = [s for band in plot.bands for curve in (band.low, band.high) for s in curve.stretches]
    values += [v for s in edges if not math.isnan(s.mean) for v in ((s.low, s.high))]
    values += [guide.value for guide in plot.guides]
    values += [point.y for point in plot.points]
    if plot.points and plot.scale == "linear":  # room for their words above
        values.append(max(values) + 0.12 * (max(values) - min(values)))
    span = plot.span
    if span is None:
        places = [s.x for s in stretches]
        span = (min(places, default=0.0), max(places, default=1.0))
    return _span(span), choose_scale(values, plot.scale, plot.window)


def _span(span: tuple[float, float]) -> Scale:
    """Return the axis of the steps, with a little room for the marker of the first and the last one."""
    low, high = span
    room = 0.02 * (high - low) or 0.5
    return Scale(low - room, high + room)


def _grid(frame: _Frame, ticks: Sequence[tuple[float, str]], axis: str) -> Iterator[str]:
    for value, name in ticks:
        height = frame.y(value)
        yield f'<path class="grid" d="M{coordinate(frame.left)} {coordinate(height)}H{coordinate(frame.right)}"/>'
        yield text_at(frame.left - 5, height + 4, name, "end")
    yield from _horizontal(frame, axis)


def _horizontal(frame: _Frame, axis: str) -> Iterator[str]:
    yield f'<path class="axis" d="M{coordinate(frame.left)} {coordinate(frame.bottom)}H{coordinate(frame.right)}"/>'
    last = -math.inf
    for value, name in frame.x_scale.ticks(5):
        place, half = frame.x(value), _LETTER * len(name) / 2
        if place - half < max(last + 6, 2) or place + half > _WIDTH - 2:
            continue
        last = place + half
        yield f'<path class="axis" d="M{coordinate(place)} {coordinate(frame.bottom)}v4"/>'
        yield text_at(place, frame.bottom + 17, name, "middle")
    yield text_at((frame.left + frame.right) / 2, frame.bottom + 33, axis, "middle")


def _zones(frame: _Frame, zones: Sequence[Zone]) -> Iterator[str]:
    for zone, top, bottom in _visible(frame, zones):
        yield (
            f'<path class="zone z{zone.level}" d="M{coordinate(frame.left)} {coordinate(top)}H{coordinate(frame.right)}'
            f'V{coordinate(bottom)}H{coordinate(frame.left)}z"/>'
        )


def _zone_names(frame: _Frame, zones: Sequence[Zone]) -> list[str]:
    return [
        text_at(frame.right - 4, top + 13, zone.label, "end", "halo")
        for zone, top, bottom in _visible(frame, zones)
        if bottom - top >= 15 and zone.label
    ]


def _visible(frame: _Frame, zones: Sequence[Zone]) -> Iterator[tuple[Zone, float, float]]:
    for zone in zones:
        if zone.high > frame.y_scale.low and zone.low < frame.y_scale.high:
            yield zone, frame.y(zone.high), frame.y(zone.low)


def _guide(frame: _Frame, guide: Guide) -> Iterator[str]:
    if not frame.y_scale.low <= guide.value <= frame.y_scale.high:
        return
    height = frame.y(guide.value)
    color = "ink" if guide.style is None else f"c{guide.style % STYLES}"
    yield f'<path class="guide {color}" d="M{coordinate(frame.left)} {coordinate(height)}H{coordinate(frame.right)}"/>'
    if guide.label:
        above = height - 5 if height - frame.top > 16 else height + 14
        yield text_at(frame.left + 4, above, guide.label, "start", "halo")


def _alarm(frame: _Frame, style: int, steps: Sequence[int]) -> str:
    lines = "".join(
        f"M{coordinate(frame.x(step))} {coordinate(frame.top)}V{coordinate(frame.bottom)}" for step in steps
    )
    heads = "".join(f"M{coordinate(frame.x(step))} {coordinate(frame.top)}l-4.5 -8h9z" for step in steps)
    return f'<path class="alarm" d="{lines}"/><path class="alarm-head c{style % STYLES}" d="{heads}"/>'


def _line(frame: _Frame, line: Line) -> str:
    color, dashes = f"c{line.style % STYLES}", _dashes(line.style)
    pieces = list(_pieces(line.curve.stretches))
    path = "".join(_path([(frame.x(s.x), frame.y(s.mean)) for s in piece]) for piece in pieces)
    every = max(1, sum(map(len, pieces)) // _MARKED)
    places = [s for piece in pieces for s in (piece[every // 2 :: every] or piece[:1])]
    marks = "".join(_shape(line.style, frame.x(s.x), frame.y(s.mean)) for s in places)
    title, gaps = f"<title>{escape(line.label)}</title>", sum(s.gaps for s in line.curve.stretches)
    more = f"<title>{escape(line.label)}: {gaps} not finite</title>" if gaps else ""
    return (
        f'<g class="{color}">{title}<path class="line {dashes}" d="{path}">{more}</path>'
        f'<path class="mark" d="{marks}">{more}</path></g>'
    )


def _point(frame: _Frame, point: Point) -> str:
    """Return a ring around a place, with its words where they fit."""
    x, y = frame.x(point.x), frame.y(point.y)
    ring = f'<path class="ring c{point.style % STYLES}" d="M{coordinate(x - 6)} {coordinate(y)}a6 6 0 1 0 12 0a6 6 0 1 0 -12 0z"/>'
    if not point.label:
        return ring
    half = _LETTER * len(point.label) / 2
    place = min(max(x, frame.left + half), frame.right - half)
    height = y - 10 if y - frame.top > 20 else y + 20
    return ring + text_at(place, height, point.label, "middle", "halo")


def _hull(frame: _Frame, line: Line) -> str:
    """Return the area from the lowest to the highest value of each stretch."""
    area = "".join(
        _area([(frame.x(s.x), frame.y(s.low), frame.y(s.high)) for s in piece])
        for piece in _pieces(line.curve.stretches)
    )
    return f'<path class="{"faint" if line.faint else "hull"} c{line.style % STYLES}" d="{area}"/>'


def _band(frame: _Frame, band: Band) -> str:
    pairs = [
        (frame.x(low.x), frame.y(low.low), frame.y(high.high))
        for low, high in zip(band.low.stretches, band.high.stretches, strict=False)
        if not math.isnan(low.low + high.high)
    ]
    color = "soft" if band.style is None else f"c{band.style % STYLES}"
    return f'<path class="hull {color}" d="{_area(pairs)}"/>'


def _pieces(stretches: Sequence[Stretch]) -> Iterator[list[Stretch]]:
    """Cut a curve at its gaps, and after stretches that have some."""
    piece: list[Stretch] = []
    for stretch in stretches:
        if not math.isnan(stretch.mean):
            piece.append(stretch)
        if piece and stretch.gaps:
            yield piece
            piece = []
    if piece:
        yield piece


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points)


def _area(edges: Sequence[tuple[float, float, float]]) -> str:
    """Return the area between lower and upper edges, at least a hair high so that it is seen."""
    if not edges:
        return ""
    there = [(x, high - 0.5) for x, _, high in edges]
    back = [(x, low + 0.5) for x, low, _ in reversed(edges)]
    return _path([*there, *back]) + "z"


def _shape(style: int, x: float, y: float) -> str:
    return _SHAPES[style % len(_SHAPES)](x, y)


def _dashes(style: int) -> str:
    """Return the dashes: a full line first; beyond :data:`STYLES` lines they shift against the colors."""
    return f"d{(style + style // STYLES) % 4}"


def text_at(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    """Return words at a place, without markup.

    Examples:
        >>> text_at(1.0, 2.0, "<", "middle")
        '<text class="tick" x="1" y="2" text-anchor="middle">&lt;</text>'
    """
    return f'<text class="{kind}" x="{coordinate(x)}" y="{coordinate(y)}" text-anchor="{anchor}">{escape(words)}</text>'


def whole(parts: Sequence[str], height: float, words: str) -> str:
    """Return the drawing that parts make up, with the words for those who do not see it.

    Examples:
        >>> whole([], 50.0, "empty")
        '<svg class="plot" viewBox="0 0 420 50" role="img" aria-label="empty"></svg>'
    """
    body = "".join(parts)
    return f'<svg class="plot" viewBox="0 0 {_WIDTH} {coordinate(height)}" role="img" aria-label="{escape(words)}">{body}</svg>'


def escape(words: str) -> str:
    r"""Return text for a page: no markup, and nothing that cannot be printed.

    Examples:
        >>> escape("a < b\0")
        'a &lt; b\ufffd'
    """
    return html.escape("".join(c if c.isprintable() else "\ufffd" for c in words))


def coordinate(value: float) -> str:
    """Return a coordinate to a tenth of a unit.

    Examples:
        >>> coordinate(1.04), coordinate(-0.01)
        ('1', '0')
    """
    text = f"{value:.1f}"
    return "0" if text in {"0.0", "-0.0"} else text.removesuffix(".0")
