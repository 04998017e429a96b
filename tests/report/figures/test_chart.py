"""A chart of any numbers: all lines and guides are in it, in the words too, and it stands alone."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

import pytest

from stableopt.report.figures import line_chart


def test_a_chart_names_its_lines_and_guides_and_stands_alone() -> None:
    wave = [(t, math.sin(t / 5)) for t in range(40)]
    text = line_chart(
        "Position", "time", {"measured": wave, "model": [(x, 0.9 * y) for x, y in wave]}, guides={"limit": 0.5}
    )
    root = ET.fromstring(text)
    words = " ".join(root.itertext())
    assert all(name in words for name in ("Position", "time", "measured", "model", "limit"))
    assert "var(--paper)" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_points_are_drawn_where_they_are() -> None:
    low, high = (line_chart("y", "x", {"a": [(0, 0.0), (1, v), (2, 10.0)]}, scale="linear") for v in (1.0, 9.0))
    assert low != high


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one line"):
        line_chart("a", "b", {})
    with pytest.raises(ValueError, match="the line 'c' has no point"):
        line_chart("a", "b", {"c": []})
