"""A figure of a report as a file of its own, with its title, its legend, and its colors for light and dark."""

from __future__ import annotations

import re
from importlib import resources

from stableopt.report.figures.plot import Picture
from stableopt.report.figures.svg import coordinate, text_at

__all__ = ["standalone_svg"]

_WIDTH = 420
_ROW, _SWATCH, _LETTER = 18, 34, 6.6
_TITLE = 24  # height of the title
_VIEW = re.compile(r'^<svg class="plot" viewBox="0 0 420 ([\d.]+)"')
_KEPT = re.compile(r"^(:root|@media screen|\.(?!figures|legend|swatch|scroll|tables|note|problem|narrow))")


def standalone_svg(picture: Picture) -> str:
    """Return the drawing of a figure as an SVG file: for a page of documentation, or a slide.

    Args:
        picture: a figure.

    Returns:
        The text of the file. It follows the color scheme of the reader, on a ground of its own.

    Examples:
        >>> from stableopt.report.figures.compose import picture
        >>> from stableopt.report.figures.plot import Line, Plot
        >>> from stableopt.report.history import Curve
        >>> curve = Curve()
        >>> curve.add(1, 2.0)
        >>> file = standalone_svg(picture(Plot("loss", "", (Line("a", curve, 0), Line("b", curve, 1)))))
        >>> (
        ...     file.startswith('<svg xmlns="http://www.w3.org/2000/svg" class="plot"'),
        ...     file.count("<svg"),
        ...     "--paper" in file,
        ... )
        (True, 3, True)
    """
    match = _VIEW.match(picture.svg)
    if match is None:
        raise ValueError(f"the figure '{picture.title}' has no drawing that can stand alone.")
    height, legend = float(match.group(1)), ""
    x, y = 12.0, height + 14
    for drawing, name in picture.legend:
        width = _SWATCH + 6 + _LETTER * len(name) + 16
        if x > 12.0 and x + width > _WIDTH:
            x, y = 12.0, y + _ROW
        placed = f'<svg x="{coordinate(x)}" y="{coordinate(y - 10)}" width="{_SWATCH}" height="12" '
        legend += drawing.replace("<svg ", placed, 1) + text_at(x + _SWATCH + 6, y, name, "start", "cell")
        x += width
    total = coordinate(_TITLE + (y + 8 if picture.legend else height))
    title = text_at(12, 17, picture.title, "start", "title")
    ground = f'<rect width="{_WIDTH}" height="{total}" fill="var(--paper)"/>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="{_WIDTH}" height="{total}" viewBox="0 0 {_WIDTH} {total}"'
    rest = picture.svg[match.end() :]
    head, _, body = rest.partition(">")
    moved = f'<g transform="translate(0 {_TITLE})">{body.removesuffix("</svg>")}{legend}</g>'
    return f"{start}{head}><style>{_style()}</style>{ground}{title}{moved}</svg>\n"


def _style() -> str:
    """Return what a drawing needs of the style of the page."""
    text = resources.files("stableopt.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    text, _, _ = text.partition("@media print")
    blocks = re.findall(r"[^{}]+\{(?:[^{}]|\{[^{}]*\})*\}", text)
    kept = [block.strip() for block in blocks if _KEPT.match(block.strip())]
    own = ".plot { font-family: system-ui, sans-serif; } .plot .title { fill: var(--ink); font-size: 14px; font-weight: 600; } "
    return own + " ".join(" ".join(kept).split())
