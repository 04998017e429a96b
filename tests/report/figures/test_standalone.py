"""A figure that stands alone has its colors, its legend and its words."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from stableopt.report.figures import profile_figures, standalone_svg
from stableopt.report.figures.plot import Picture
from tests.report.figures.test_profile import OTHER, RUN

SVG = "{http://www.w3.org/2000/svg}"


def test_every_figure_stands_alone_with_the_classes_it_uses():
    for picture in profile_figures([RUN, OTHER]):
        file = standalone_svg(picture)
        root = ET.fromstring(file)
        assert root.tag == f"{SVG}svg"
        assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
        assert root.get("aria-label") == ET.fromstring(picture.svg).get("aria-label")
        style = root.findtext(f"{SVG}style") or ""
        used = {name for element in root.iter() for name in (element.get("class") or "").split()} - {"swatch", "d0"}
        assert used <= set(re.findall(r"\.([\w-]+)", style)), picture.title
        assert "prefers-color-scheme: dark" in style
        assert not re.search(r"figure|nav|table|url\(", style)
        texts = [t.text for t in root.iter(f"{SVG}text")]
        assert {picture.title, *(name for _, name in picture.legend)} <= set(texts)


def test_a_legend_has_the_room_that_it_needs():
    swatch = '<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true"></svg>'
    base = '<svg class="plot" viewBox="0 0 420 100" role="img" aria-label="w"></svg>'
    long = tuple((swatch, "name " * 8) for _ in range(5))
    root = ET.fromstring(standalone_svg(Picture("t", base, "c", long)))
    height = float(root.get("viewBox", "").split()[3])
    ends = [float(t.get("x", "0")) + 6.6 * len(t.text or "") for t in root.iter(f"{SVG}text")]
    assert max(ends) <= 420
    assert 124 + 5 * 18 <= height <= 154 + 5 * 18
    assert float(ET.fromstring(standalone_svg(Picture("t", base, "c"))).get("viewBox", "").split()[3]) == 124


def test_what_is_no_drawing_is_refused():
    with pytest.raises(ValueError, match="'loss' has no drawing"):
        standalone_svg(Picture("loss", "<p></p>", ""))
