"""A figure says in words what it shows, and tells its lines apart."""

from __future__ import annotations

import re

from stableopt.lyapunov import Event, StepRecord
from stableopt.report import History, Run
from stableopt.report.figures.compose import alarm_steps, overlay, picture, recorded_span
from stableopt.report.figures.plot import Line, Plot
from stableopt.report.history import Curve
from tests.report.figures.drawing import Drawing

A = Run("a", history=History.of([StepRecord(step=k, trust=0.9 - k / 10) for k in (1, 2, 3)]))
B = Run("b", history=History.of([StepRecord(step=k, loss=1.0) for k in (2, 9)]))
C = Run("c", history=History.of([StepRecord(step=2, trust=0.5)]))


def test_runs_without_the_quantity_keep_their_style_free():
    drawn = overlay([A, B, C], "trust", "trust", "")
    assert drawn is not None
    drawing = Drawing(drawn.svg)
    assert list(drawing.lines) == ["a", "c"]
    assert [group.get("class") for group in drawing.root.iter("g")] == ["c0", "c2"]
    assert [name for _, name in drawn.legend] == ["a", "c"]
    assert [row.label for row in drawn.numbers] == ["a", "c"]
    assert overlay([B], "trust", "trust", "") is None


def test_the_words_and_the_table_hold_the_numbers():
    drawn = overlay([A], "trust", "trust ratio", "caption")
    assert drawn is not None
    words = Drawing(drawn.svg).words
    assert words.startswith("trust ratio against step, each value with its step in brackets. ")
    assert words.endswith(" a: from 0.8 (1) to 0.6 (3), lowest 0.6 (3), highest 0.8 (1).")
    (row,) = drawn.numbers
    assert (row.first, row.last, row.lowest, row.highest, row.count) == ("0.8 (1)", "0.6 (3)", "0.6 (3)", "0.8 (1)", 3)
    assert drawn.legend == ()


def test_of_many_lines_the_first_are_spoken_and_all_are_in_the_table():
    curve = Curve()
    curve.add(1, 1.0)
    drawn = picture(Plot("t", "", tuple(Line(f"n{k}", curve, k) for k in range(12))))
    assert "n7: " in Drawing(drawn.svg).words
    assert "n8: " not in Drawing(drawn.svg).words
    assert Drawing(drawn.svg).words.endswith("and 4 more.")
    assert len(drawn.numbers) == 12


def test_all_figures_of_the_runs_share_the_steps():
    assert recorded_span([A, B, Run("none")]) == (1.0, 9.0)


def test_of_many_alarms_an_even_selection_is_drawn():
    event = Event(1, "alarm", "level", "warn", "it rose")
    records = [StepRecord(step=k, loss=1.0, events=(event,)) for k in range(1, 400)]
    steps = alarm_steps([B, Run("x", history=History.of(records))])
    assert list(steps) == [1]
    assert 20 <= len(steps[1]) <= 40
    drawn = overlay([Run("x", history=History.of(records))], "loss", "loss", "", alarms={0: steps[1]})
    assert drawn is not None
    assert len(re.findall("M", Drawing(drawn.svg).paths("alarm-head")[0])) == len(steps[1])
