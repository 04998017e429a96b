"""What is drawn is what was recorded, readable without color, and nothing else."""

from __future__ import annotations

import math
import re

import pytest

from stableopt.report.figures.plot import Band, Guide, Line, Plot, Strip, Zone
from stableopt.report.figures.svg import STYLES, draw_plot, draw_strip, swatch
from stableopt.report.history import Curve
from tests.report.figures.drawing import Drawing, points


def curve_of(values, limit=400):
    curve = Curve(limit)
    for x, y in values:
        curve.add(x, y)
    return curve


def drawing_of(*curves, **options):
    lines = tuple(Line(f"line {k}", curve, k) for k, curve in enumerate(curves))
    return Drawing(draw_plot(Plot("title", "caption", lines, **options), "words"))


@pytest.mark.parametrize(
    "values",
    [
        [(k, math.sin(k)) for k in range(30)],
        [(1000 * k, 10.0 ** (k - 10)) for k in range(20)],
        [(k, 1e-7 * k) for k in range(5)],
        [(5, 0.25), (7, 0.75)],
    ],
)
def test_a_line_read_against_the_ticks_is_its_values(values):
    drawing = drawing_of(curve_of(values))
    read = drawing.lines["line 0"]
    xs, ys = zip(*values, strict=True)
    assert [x for x, _ in read] == pytest.approx(list(xs), abs=1e-3 * (max(xs) - min(xs)))
    if max(ys) / max(min(ys), 1e-300) > 100 and min(ys) > 0:
        assert [math.log(y) for _, y in read] == pytest.approx(
            [math.log(y) for y in ys], abs=5e-3 * math.log(max(ys) / min(ys))
        )
    else:
        assert [y for _, y in read] == pytest.approx(list(ys), abs=5e-3 * (max(ys) - min(ys)))


def test_two_lines_share_the_axes_and_differ_in_color_dashes_and_marker():
    drawing = drawing_of(curve_of([(0, 0.0), (10, 1.0)]), curve_of([(5, 3.0), (20, 2.0)]))
    assert [x for x, _ in drawing.lines["line 1"]] == pytest.approx([5, 20], abs=0.1)
    assert [y for _, y in drawing.lines["line 1"]] == pytest.approx([3, 2], abs=0.02)
    groups = list(drawing.root.iter("g"))
    assert [g.get("class") for g in groups] == ["c0", "c1"]
    assert [g[1].get("class") for g in groups] == ["line d0", "line d1"]


def test_as_many_lines_as_there_are_styles_have_different_markers_and_the_next_ones_other_dashes():
    shapes = [re.sub(r"M[\d.]+ [\d.]+", "M", re.findall(r'd="([^"]+)"', swatch(k))[1], count=1) for k in range(STYLES)]
    assert len(set(shapes)) == STYLES
    looks = {tuple(re.findall(r'class="([^"]+)"', swatch(k))) for k in range(3 * STYLES)}
    assert len(looks) == 3 * STYLES


def test_a_gap_cuts_the_line_and_a_lone_value_is_marked():
    drawing = drawing_of(curve_of([(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, math.inf), (6, 2.0), (7, 1.0)]))
    assert drawing.pieces("line 0") == 3
    assert len(drawing.lines["line 0"]) == 5


def test_a_long_line_has_a_hull_that_reaches_its_spikes():
    values = [(k, 1.0 + (k == 500) * 4.0) for k in range(1000)]
    drawing = drawing_of(curve_of(values, limit=20))
    assert len(drawing.lines["line 0"]) <= 20
    (hull,) = drawing.paths("hull")
    heights = [drawing.at(x, y)[1] for x, y in points(hull)]
    assert max(heights) == pytest.approx(5.0, abs=0.05)
    means = [y for _, y in drawing.lines["line 0"]]
    assert sorted(means)[-2:] == pytest.approx(
        [1.0, 1.0 + 4.0 / 64], abs=0.02
    )  # the mean of the 64 values of a stretch
    assert not drawing_of(curve_of(values[:10])).paths("hull")


def test_a_band_lies_between_its_curves():
    low, high = curve_of([(0, 1.0), (10, 2.0)]), curve_of([(0, 3.0), (10, 6.0)])
    drawing = drawing_of(curve_of([(0, 2.0), (10, 4.0)]), bands=(Band(low, high, 0),))
    corners = [drawing.at(x, y)[1] for x, y in points(drawing.paths("hull")[0])]
    assert corners == pytest.approx([3.0, 6.0, 2.0, 1.0], abs=0.05)
    assert max(v for _, v in drawing.y_ticks) <= 6.0


def test_limits_and_zones_stand_where_they_are_and_have_names():
    zones = (Zone(0.5, math.inf, "calm", 0), Zone(-math.inf, 0.5, "grave", 3), Zone(7.0, 8.0, "unseen", 1))
    drawing = drawing_of(
        curve_of([(0, 0.0), (10, 1.0)]), guides=(Guide(0.75, "limit"), Guide(0.25, "", 1)), zones=zones
    )
    assert drawing.levels("guide") == pytest.approx([0.75, 0.25], abs=0.01)
    assert {"limit", "calm", "grave"} <= set(drawing.texts)
    assert "unseen" not in drawing.texts
    (top, bottom) = points(drawing.paths("z0")[0])[0][1], float(re.findall(r"V([\d.]+)H", drawing.paths("z0")[0])[0])
    assert drawing.at(50, bottom)[1] == pytest.approx(0.5, abs=0.01)
    assert top < bottom


def test_a_limit_is_on_the_axis_also_far_above_the_values():
    drawing = drawing_of(curve_of([(0, 0.2), (10, 0.3)]), guides=(Guide(1.0, "limit"),))
    assert max(v for _, v in drawing.y_ticks) == 1.0


def test_alarms_are_lines_at_their_steps_with_a_head():
    drawing = drawing_of(curve_of([(0, 0.0), (100, 1.0)]), alarms={0: (25, 75)})
    places = [float(x) for x in re.findall(r"M([\d.]+) ", drawing.paths("alarm")[0])]
    assert [drawing.at(x, 50)[0] for x in places] == pytest.approx([25, 75], abs=0.3)
    assert drawing.paths("alarm-head")[0].count("M") == 2


def test_values_outside_a_window_are_at_its_border():
    drawing = drawing_of(curve_of([(0, -50.0), (5, 0.5), (10, 70.0)]), window=(-1.0, 2.0), scale="linear")
    assert [y for _, y in drawing.lines["line 0"]] == pytest.approx([-1.0, 0.5, 2.0], abs=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0, 1e100, -1e100])
@pytest.mark.parametrize("scale", ["auto", "linear", "log"])
def test_odd_numbers_are_drawn(value, scale):
    drawing = drawing_of(curve_of([(1, value), (2, value)]), scale=scale)
    assert ("nothing finite was observed" in drawing.texts) == (not abs(value) <= 1e100)
    assert "nan" not in draw_plot(Plot("", "", (Line("", curve_of([(1, value)]), 0),)), "")


def test_names_are_text():
    evil = "<script>alert('x')</script>&\"\x01\ud800"
    svg = draw_plot(Plot("", "", (Line(evil, curve_of([(1, 1.0)]), 0),)), evil)
    assert "<script" not in svg
    assert "\x01" not in svg
    assert "<script>alert('x')</script>&\"\ufffd\ufffd" in Drawing(svg).lines
    assert Drawing(svg).words.startswith("<script>")


def test_every_mark_of_a_strip_stands_in_its_row_and_at_its_step():
    marks = {("up", 0): (10, 40), ("up", 1): (30,), ("down", 1): (20, 25)}
    svg = draw_strip(Strip("", "", ("up", "down"), marks, (0, 50), {0: "a", 1: "b"}), "words")
    drawing = Drawing(svg)
    rows = {text: float(re.findall(rf'y="([\d.]+)"[^>]*>{text}<', svg)[0]) for text in ("up", "down")}
    assert rows["up"] < rows["down"]
    left, right = (path.split("M", 1)[1] for path in drawing.paths("c1"))
    assert [len(drawing.paths(f"c{k}")) for k in (0, 1)] == [1, 2]
    (a, low), (b, high) = drawing.x_ticks[0], drawing.x_ticks[-1]
    for path, step in ((left, 30), (right, 20)):
        assert float(path.split(" ")[0]) + 3 == pytest.approx(a + (b - a) * (step - low) / (high - low), abs=0.2)
    assert all(
        abs(float(path.split(" ")[1].split("h")[0]) - row) < 12
        for path, row in zip((left, right), rows.values(), strict=True)
    )


def test_a_gap_cuts_the_line_also_within_a_stretch_and_is_told():
    curve = curve_of([(x, math.nan if x == 3 else 1.0 + x) for x in range(8)], 4)
    drawing = drawing_of(curve)
    assert [s.gaps for s in curve.stretches] == [0, 1, 0, 0]
    assert drawing.pieces("line 0") == 2
    assert "1 not finite" in [t.text.partition(": ")[2] for t in drawing.root.iter("title") if t.text]
