"""Read a drawing as a person does: places against the ticks of the axes."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET


class Drawing:
    """The lines, marks and words of an SVG in the units of its axes."""

    def __init__(self, svg: str) -> None:
        self.root = ET.fromstring(svg)
        self.words = self.root.get("aria-label", "")
        texts = [(t.get("class"), t.get("text-anchor"), _xy(t), t.text or "") for t in self.root.iter("text")]
        self.texts = [text for *_, text in texts]
        bottom = max(place[1] for *_, place, _ in texts)
        numbers = [(anchor, place, text) for kind, anchor, place, text in texts if kind == "tick" and _is_number(text)]
        self.x_ticks = [(place[0], value(text)) for anchor, place, text in numbers if anchor == "middle"]
        self.y_ticks = [(place[1] - 4, value(text)) for anchor, place, text in numbers if anchor == "end"]
        self.axis = next(text for *_, place, text in texts if place[1] == bottom)

    @property
    def lines(self) -> dict[str, list[tuple[float, float]]]:
        """Name of a line -> its points, without the gaps."""
        found = {}
        for group in self.root.iter("g"):
            path = group.find("path[@class]")
            assert path is not None
            found[group.findtext("title")] = [self.at(x, y) for x, y in points(path.get("d", ""))]
        return found

    def pieces(self, label: str) -> int:
        """Return into how many pieces a line is cut by gaps."""
        group = next(group for group in self.root.iter("g") if group.findtext("title") == label)
        path = group.find("path")
        assert path is not None
        return path.get("d", "").count("M")

    def paths(self, kind: str) -> list[str]:
        """Return the paths whose class has this word."""
        return [path.get("d", "") for path in self.root.iter("path") if kind in (path.get("class") or "").split()]

    def levels(self, kind: str) -> list[float]:
        """Return the values at which paths of a kind begin."""
        return [self.at(*points(path)[0])[1] for path in self.paths(kind)]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the values at a place."""
        return _between(self.x_ticks, x), _between(self.y_ticks, y)


def points(path: str) -> list[tuple[float, float]]:
    """Return the corners of a path of moves and lines."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def value(text: str) -> float:
    """Return the number that a tick names."""
    return float(text.replace("k", "e3").replace("M", "e6"))


def _between(ticks: list[tuple[float, float]], place: float) -> float:
    """Read a place between the outermost ticks: on a logarithmic axis if the ticks rise by factors."""
    (a, low), (b, high) = min(ticks), max(ticks)
    values = sorted(v for _, v in ticks)
    share = (place - a) / (b - a)
    if len(values) > 2 and values[0] > 0 and math.isclose(values[1] / values[0], values[2] / values[1], rel_tol=1e-6):
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)


def _is_number(text: str) -> bool:
    try:
        value(text)
    except ValueError:
        return False
    return True


def _xy(element: ET.Element) -> tuple[float, float]:
    return float(element.get("x", "nan")), float(element.get("y", "nan"))
