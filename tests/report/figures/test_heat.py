"""A heat map shows each entry in its place, with its sign and its size, also without color."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from stableopt.report.figures.heat import LEVELS, HeatMap, draw_heat, heat_picture, selection


def heat_of(values, marked=None):
    rows, columns = len(values), len(values[0])
    names = [tuple(str(5 * k) for k in range(n)) for n in (columns, rows)]
    return HeatMap("growth", "caption", tuple(map(tuple, values)), names[0], names[1], "start", "end", marked)


def boxes(svg, shade):
    """Return the corners (x, y, width, height) of the cells of a shade, without the legend."""
    paths = [p.get("d") for p in ET.fromstring(svg).iter("path") if p.get("class") == f"heat {shade}"]
    found = [tuple(map(float, m)) for p in paths for m in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h", p)]
    return [box for box in found if box[3] != 12.0]


def texts(svg, kind):
    return [
        (float(t.get("x", "nan")), float(t.get("y", "nan")), t.text)
        for t in ET.fromstring(svg).iter("text")
        if t.get("class") == kind
    ]


def test_each_cell_stands_in_its_row_and_column_from_below():
    svg = draw_heat(heat_of([[1.0, math.nan], [-1.0, 0.5]]), "")
    ((x1, y1, width, height),) = boxes(svg, "g8")
    ((x2, y2, *_),) = boxes(svg, "s8")
    ((x3, y3, *_),) = boxes(svg, "g4")
    assert x2 == x1
    assert x3 == pytest.approx(x1 + width)
    assert y2 == y3 == pytest.approx(y1 - height)
    assert [(text, x > x3, y > y1) for x, y, text in texts(svg, "cell")] == [
        ("1", False, True),
        ("-1", False, False),
        ("0.5", True, False),
    ]


@pytest.mark.parametrize("scale", [1e-12, 0.37, 1.0, 8.0, 123.0, 1e50])
def test_shades_are_round_steps_that_reach_to_the_largest(scale):
    heat = heat_of([[scale * k / 100 for k in range(-100, 101)]])
    assert scale / LEVELS <= heat.unit * (1 + 1e-9) < 2.5 * scale / LEVELS
    mantissa = heat.unit / 10.0 ** math.floor(math.log10(heat.unit) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 1.25, 2, 2.5, 4, 5)) < 1e-6
    shades = [heat.shade(v) for v in heat.values[0]]
    assert shades == sorted(shades)
    assert shades[100] == 0
    assert all(
        shade * v > 0 and (abs(shade) - 1) * heat.unit < abs(v) <= abs(shade) * heat.unit * (1 + 1e-9)
        for shade, v in zip(shades, heat.values[0], strict=True)
        if v
    )


def test_growth_is_seen_without_color():
    values = [[(i - j) / 10 for j in range(20)] for i in range(20)]
    svg = draw_heat(heat_of(values), "")
    crosses = [p.get("d", "") for p in ET.fromstring(svg).iter("path") if p.get("class") == "cross"]
    assert max(path.count("M") for path in crosses) == 190
    assert not texts(svg, "cell")
    legend = {text for *_, text in texts(svg, "tick")}
    assert {"decays", "grows", "-2", "2", "0"} <= legend
    one_sided = {text for *_, text in texts(draw_heat(heat_of([[0.0, 1.0], [2.0, 3.0]]), ""), "tick")}
    assert "decays" not in one_sided


def test_the_marked_cell_is_framed():
    svg = draw_heat(heat_of([[1.0, 2.0], [3.0, 4.0]], (1, 0)), "")
    (frame,) = [p.get("d", "") for p in ET.fromstring(svg).iter("path") if p.get("class") == "frame"]
    ((x, y, *_),) = boxes(svg, "g6")
    assert frame.startswith(f"M{x:g} {y:g}h")


def test_words_and_numbers_say_where_the_extremes_are():
    picture = heat_picture(heat_of([[1.0, math.nan], [-1.0, 0.5]]))
    words = ET.fromstring(picture.svg).get("aria-label", "")
    assert "highest 1, end 0, start 0. lowest -1, end 5, start 0." in words
    assert [(row.label, row.highest, row.lowest) for row in picture.numbers] == [
        ("start 0", "1 (0)", "-1 (5)"),
        ("start 5", "0.5 (5)", "0.5 (5)"),
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0, 1e100, -1e-300])
@pytest.mark.parametrize("size", [1, 2, 40])
def test_odd_numbers_are_drawn(value, size):
    svg = draw_heat(heat_of([[value] * size] * size), "words")
    words = " ".join(t.text or "" for t in ET.fromstring(svg).iter("text"))
    assert ("nothing finite" in words) == (not abs(value) <= 1e100)
    assert "nan" not in svg
    assert "inf" not in svg.replace("nothing finite", "")


def test_names_are_text():
    evil = '<script>&"\x01'
    svg = draw_heat(HeatMap("t", "c", ((1.0,),), (evil,), (evil,), evil, evil), evil)
    assert "<script" not in svg
    assert ET.fromstring(svg).get("aria-label") == '<script>&"\ufffd'


def test_a_selection_keeps_the_ends_and_what_it_must():
    assert selection(5, 9, [2]) == [0, 1, 2, 3, 4]
    found = selection(1000, 30, [17, 503])
    assert {0, 17, 503, 999} <= set(found)
    assert 30 <= len(found) <= 32
