"""Tables of logarithms as heat maps: growth and decay in two colors, growth also marked by crosses, numbers where there is room."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from stableopt.report.figures.plot import Line, Picture, numbers
from stableopt.report.figures.svg import coordinate, escape, text_at, whole
from stableopt.report.history import LARGEST, Curve

__all__ = ["HeatMap", "draw_heat", "heat_picture", "selection"]

LEVELS = 8
"""The number of shades of growth, and of decay."""

_WIDTH, _RIGHT, _TOP, _BOTTOM = 420, 12, 10, 38
_LETTER = 6.6
_LEGEND = 44  # height of the legend below the map
_NOTHING = 1e-9  # what is smaller than this share of the largest is neither growth nor decay


@dataclass(frozen=True)
class HeatMap:
    """A figure of a table whose entries are logarithms of growth.

    Args:
        title: the quantity.
        caption: how to read it.
        values: rows from below, columns from the left; NaN is an empty cell.
        columns: their names.
        rows: their names.
        across: the name of the horizontal axis.
        up: the name of the vertical axis.
        marked: (row, column) of a cell to be framed.

    Examples:
        >>> HeatMap("growth", "", ((0.0, 1.0),), ("0", "1"), ("0",), "start", "end").unit
        0.125
    """

    title: str
    caption: str
    values: tuple[tuple[float, ...], ...]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    across: str
    up: str
    marked: tuple[int, int] | None = None

    @cached_property
    def cells(self) -> list[tuple[int, int, float]]:
        """Row, column and value of each cell that has one."""
        return [(i, j, v) for i, row in enumerate(self.values) for j, v in enumerate(row) if abs(v) <= LARGEST]

    @cached_property
    def unit(self) -> float:
        """What one shade stands for: a round number, so that all the values have a shade."""
        largest = max((abs(value) for *_, value in self.cells), default=0.0)
        if largest <= 1e-290:
            return 1.0
        rough = largest / LEVELS
        power = 10.0 ** math.floor(math.log10(rough))
        return next((f * power for f in (1, 1.25, 2, 2.5, 4, 5, 10) if f * power >= rough * (1 - 1e-9)), 10 * power)

    def shade(self, value: float) -> int:
        """Return the shade of a value: 0 for none, 1 to 8 for growth, -1 to -8 for decay."""
        share = value / self.unit
        if abs(share) <= _NOTHING * LEVELS:
            return 0
        level = min(max(math.ceil(abs(share) - 1e-9), 1), LEVELS)
        return level if share > 0 else -level


def draw_heat(heat: HeatMap, words: str) -> str:
    """Return the drawing of a heat map.

    Args:
        heat: what to draw.
        words: what is to be seen, for those who do not see it.

    Examples:
        >>> drawing = draw_heat(
        ...     HeatMap("growth", "", ((0.0, 1.0),), ("a", "b"), ("c",), "start", "end"), "one cell grows"
        ... )
        >>> drawing.count("heat g8"), 'aria-label="one cell grows"' in drawing
        (2, True)
    """
    left = 26 + _LETTER * min(max(map(len, heat.rows), default=1), 12)
    side = min((_WIDTH - _RIGHT - left) / max(len(heat.columns), 1), 44.0)
    height = min(side, 300.0 / max(len(heat.rows), 1)) if len(heat.rows) > 1 else 30.0
    grid = _Grid(left, _TOP, side, height, len(heat.rows))
    bottom = _TOP + height * len(heat.rows)
    parts = [*_cells(heat, grid), *_labels(heat, grid, bottom), *_legend(heat, bottom + _BOTTOM + 6)]
    return whole(parts, bottom + _BOTTOM + _LEGEND, words)


def heat_picture(heat: HeatMap) -> Picture:
    """Draw a heat map and put it into words and numbers: each column is a line.

    Examples:
        >>> picture = heat_picture(
        ...     HeatMap("growth", "", ((0.0, 1.0), (2.0, 3.0)), ("0", "5"), ("1", "6"), "start", "end")
        ... )
        >>> picture.numbers[1].label, picture.numbers[1].highest, "highest 3, end 6, start 5" in picture.svg
        ('start 5', '3 (6)', True)
    """
    words = f"{heat.title}: logarithms by {heat.across} and {heat.up}."
    if found := heat.cells:
        high, low = max(found, key=lambda c: c[2]), min(found, key=lambda c: c[2])
        words += "".join(
            f" {name} {value:.4g}, {heat.up} {heat.rows[i]}, {heat.across} {heat.columns[j]}."
            for name, (i, j, value) in (("highest", high), ("lowest", low))
        )
    lines = [_column(heat, j) for j in range(len(heat.columns))]
    rows = numbers([line for line in lines if line.curve.count])
    return Picture(heat.title, draw_heat(heat, words), heat.caption, (), rows, heat.up)


@dataclass(frozen=True)
class _Grid:
    """Where the cells are."""

    left: float
    top: float
    width: float
    height: float
    rows: int

    def x(self, column: float) -> float:
        return self.left + self.width * column

    def y(self, row: float) -> float:
        return self.top + self.height * (self.rows - row)


def _column(heat: HeatMap, j: int) -> Line:
    curve = Curve()
    for i, row in enumerate(heat.values):
        name = heat.rows[i]
        if abs(row[j]) <= LARGEST:
            curve.add(float(name) if _is_number(name) else float(i), row[j])
    return Line(f"{heat.across} {heat.columns[j]}", curve, j)


def _cells(heat: HeatMap, grid: _Grid) -> Iterator[str]:
    """Draw all cells of a shade as one path, the crosses of growth, the frame and the numbers."""
    shapes: dict[int, str] = {}
    crosses = ""
    arm = min(grid.width, grid.height) / 5
    small = grid.width < 34 or grid.height < 15
    for i, j, value in heat.cells:
        shade = heat.shade(value)
        x, y = grid.x(j), grid.y(i + 1)
        shapes[shade] = shapes.get(shade, "") + _box(x, y, grid.width, grid.height)
        if shade > 0 and small and arm >= 1:
            crosses += _cross(x + grid.width / 2, y + grid.height / 2, arm)
    for shade in sorted(shapes):
        yield f'<path class="heat {_name(shade)}" d="{shapes[shade]}"/>'
    if crosses:
        yield f'<path class="cross" d="{crosses}"/>'
    if heat.marked is not None:
        x, y = grid.x(heat.marked[1]), grid.y(heat.marked[0] + 1)
        yield f'<path class="frame" d="{_box(x, y, grid.width, grid.height)}"/>'
    if not small:
        for i, j, value in heat.cells:
            yield text_at(grid.x(j + 0.5), grid.y(i + 0.5) + 4, _short(value), "middle", "cell")
    if not heat.cells:
        yield text_at(_WIDTH / 2, grid.top + 16, "nothing finite was observed", "middle")


def _labels(heat: HeatMap, grid: _Grid, bottom: float) -> Iterator[str]:
    longest = max((len(name[:12]) for name in heat.columns), default=1)
    stride = math.ceil((_LETTER * longest + 6) / grid.width)
    for j in range(0, len(heat.columns), stride):
        yield text_at(grid.x(j + 0.5), bottom + 15, heat.columns[j][:12], "middle")
    above = math.inf
    for i, name in enumerate(heat.rows):
        place = grid.y(i + 0.5) + 4
        if place <= above - 15:
            above = place
            yield text_at(grid.left - 5, place, name[:12], "end")
    turned = f"translate(12 {coordinate((grid.top + bottom) / 2)}) rotate(-90)"
    yield f'<text class="tick" text-anchor="middle" transform="{turned}">{escape(heat.up)}</text>'
    yield text_at((grid.left + grid.x(len(heat.columns))) / 2, bottom + 31, heat.across, "middle")


def _legend(heat: HeatMap, top: float) -> Iterator[str]:
    """Draw the shades that can occur, with the values between them."""
    found = [heat.shade(value) for *_, value in heat.cells]
    low = -LEVELS if min(found, default=0) < 0 else 0
    high = LEVELS if max(found, default=0) > 0 else 0
    shades = [shade for shade in range(low, high + 1) if shade]
    if not shades:
        yield text_at(_WIDTH / 2, top + 12, "neither growth nor decay", "middle")
        return
    width = min(20.0, 330.0 / len(shades))
    left = (_WIDTH - width * len(shades)) / 2
    for place, shade in enumerate(shades):
        x = left + width * place
        yield f'<path class="heat {_name(shade)}" d="{_box(x, top, width, 12.0)}"/>'
        if shade > 0:
            yield f'<path class="cross" d="{_cross(x + width / 2, top + 6, 2.5)}"/>'
    for bound in range(low, high + 1, 4):
        yield text_at(left + width * (bound - low), top + 27, _short(bound * heat.unit), "middle")
    yield text_at(left - 8, top + 10, "decays" if low else "0", "end")
    yield text_at(left + width * len(shades) + 8, top + 10, "grows" if high else "0", "start")


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{coordinate(x)} {coordinate(y)}h{coordinate(width)}v{coordinate(height)}h{coordinate(-width)}z"


def _cross(x: float, y: float, arm: float) -> str:
    there, back = coordinate(2 * arm), coordinate(-arm)
    return f"M{coordinate(x - arm)} {coordinate(y)}h{there}m{back} {back}v{there}"


def _name(shade: int) -> str:
    return f"{'g' if shade > 0 else 's' if shade < 0 else 'n'}{abs(shade)}"


def _short(value: float) -> str:
    """Return a number in at most five characters, if it has so few."""
    if abs(value) < 5e-4:
        return "0"
    return f"{value:.3g}" if abs(value) >= 10 else f"{value:.2g}"


def _is_number(name: str) -> bool:
    return name.removeprefix("-").replace(".", "", 1).isdecimal()


def selection(count: int, most: int, kept: Sequence[int] = ()) -> list[int]:
    """Return an even selection of ``count`` places with the first and the last, and with the ones that must be kept.

    Examples:
        >>> selection(11, 3), selection(11, 3, [4]), selection(2, 9)
        ([0, 5, 10], [0, 4, 5, 10], [0, 1])
    """
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)} | set(kept))
