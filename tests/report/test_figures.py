"""What is drawn is what was recorded."""

from __future__ import annotations

import math

import matplotlib.figure
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopt.lyapunov import ACTIONS, VERDICTS, StepRecord
from stableopt.report import Run
from stableopt.report.figures import accuracy_figure, energy_figure, layer_figures, steps_figure, thin
from tests.report.folders import some_records


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures as they are saved."""
    figures = []
    save = matplotlib.figure.Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def points(line):
    return list(line.get_xdata()), list(line.get_ydata())


RUN = Run("a", records=tuple(some_records(25)))


def test_energy_and_loss_are_the_recorded_ones_and_an_undone_step_stays_where_it_was(drawn):
    energy_figure([RUN])
    energy, loss, _ = drawn[0].axes
    steps = list(range(1, 26))
    stayed = [r.energy_before if r.action == "undone" else r.energy_after for r in RUN.records]
    assert points(energy.lines[0]) == (steps, stayed)
    assert points(loss.lines[0]) == (steps, [r.loss for r in RUN.records])
    assert stayed != [r.energy_after for r in RUN.records]


@pytest.mark.parametrize(
    ("draw", "panel", "kind", "rows"),
    [(energy_figure, 2, "verdict", VERDICTS[1:]), (steps_figure, 0, "action", ACTIONS)],
)
def test_every_event_is_marked_in_its_row_and_in_no_other(drawn, draw, panel, kind, rows):
    other = Run("b", records=tuple(some_records(7)))
    draw([RUN, other])
    axes = drawn[0].axes[panel]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)
    found = {}
    for line in axes.lines:
        for x, y in zip(*points(line), strict=True):
            found.setdefault((rows[round(y)], line.get_marker()), []).append(x)
    for run, marker in ((RUN, "o"), (other, "s")):
        for name in rows:
            expected = [r.step for r in run.records if getattr(r, kind) == name]
            assert found.get((name, marker), []) == expected


def test_runs_differ_without_color(drawn):
    runs = [Run(f"_{k}", records=RUN.records) for k in range(7)]  # matplotlib hides a label that begins with "_"
    energy_figure(runs)
    lines = drawn[0].axes[0].lines
    assert len({line.get_marker() for line in lines}) == 7
    assert [text.get_text().strip() for text in drawn[0].legends[0].get_texts()] == [run.name for run in runs]


def test_the_scale_is_the_recorded_one(drawn):
    steps_figure([RUN])
    assert points(drawn[0].axes[1].lines[0])[1] == [r.scale for r in RUN.records]


def test_norms_stand_beside_their_limits_and_use_beside_one(drawn):
    (picture,) = layer_figures([RUN, Run("empty")])
    norms, use = drawn[0].axes
    measured = [r for r in RUN.records if r.norms]
    lines = {line.get_label().strip(): line for line in norms.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["0.weight", "10.weight"]
    assert points(lines["10.weight"]) == ([r.step for r in measured], [r.norms["10.weight"] for r in measured])
    assert [1.0, 1.0] in [list(line.get_ydata()) for line in norms.lines]
    assert points(use.lines[0])[1] == [0.5] * len(measured)
    assert list(use.lines[1].get_ydata()) == [1.0, 1.0]
    assert "limit 1" in picture.alt
    assert "uses 0.5" in picture.alt


def test_of_many_layers_the_nearest_to_their_limits_are_drawn(drawn):
    norms = {f"{k}.weight": float(k) for k in range(20)}
    limits = {f"{k}.weight": float(k) ** 2 / 5 + 0.1 for k in range(20)}
    (picture,) = layer_figures([Run("a", records=(StepRecord(step=1, norms=norms, limits=limits),))])
    share = sorted(norms, key=lambda name: norms[name] / limits[name])[-8:]
    labels = [text.get_text().strip() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert sorted(labels) == sorted(share)
    assert labels == sorted(labels, key=lambda name: int(name.split(".")[0]))
    assert "12 are not" in picture.caption


def test_certified_accuracy_is_drawn_from_the_curve_and_else_from_the_table(drawn):
    table = {"0.5": 0.5, "10": 0.1, "2": 0.3}
    curve = {"radius": [0.0, 1.0, 2.0], "certified_accuracy": [0.9, 0.5, 0.0]}
    accuracy_figure(
        [
            Run("curve", metrics={"certified_accuracy": table, "curve": curve, "test_accuracy": 0.95}),
            Run("none", metrics={"test_accuracy": 0.95}),
            Run("table", metrics={"certified_accuracy": table}),
            Run("broken", metrics={"certified_accuracy": table, "curve": {"radius": [1], "certified_accuracy": []}}),
        ]
    )
    lines = {line.get_label().strip(): line for line in drawn[0].axes[0].lines if not line.get_label().startswith("_")}
    assert list(lines) == ["curve", "table", "broken"]
    assert points(lines["curve"]) == ([0.0, 1.0, 2.0], [0.9, 0.5, 0.0])
    assert points(lines["table"]) == points(lines["broken"]) == ([0.5, 2.0, 10.0], [0.5, 0.3, 0.1])
    assert [0.95, 0.95] in [list(line.get_ydata()) for line in drawn[0].axes[0].lines]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0])
def test_odd_numbers_are_drawn(value):
    numbers = dict.fromkeys(("loss", "energy_before", "energy_after", "scale"), value)
    run = Run("a", records=tuple(StepRecord(step=k, verdict="nonfinite", **numbers) for k in (1, 2)))
    for draw in (energy_figure, steps_figure):
        picture = draw([run])
        assert picture is not None
        assert picture.uri.startswith("data:image/svg+xml;base64,")


def test_layers_with_odd_numbers_are_drawn(drawn):
    odd = {str(k): x for k, x in enumerate((math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0))}
    (picture,) = layer_figures(
        [Run("a", records=(StepRecord(step=1, norms=odd, limits=dict(reversed(odd.items())), cfl=odd),))]
    )
    assert picture.uri.startswith("data:image/svg+xml;base64,")
    assert len(drawn[0].axes[1].lines) == len(odd) + 1


def test_no_limit_is_drawn_where_there_is_none(drawn):
    layer_figures([Run("a", records=(StepRecord(step=1, norms={"0.weight": 1.0}),))])
    assert all(math.isnan(line.get_ydata()[0]) for line in drawn[0].axes[0].lines[1:])


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=300),
    st.integers(2, 50),
)
def test_thinning_keeps_the_extremes_in_order(ys, limit):
    xs = list(range(len(ys)))
    kept_x, kept_y = thin(xs, ys, limit)
    assert len(kept_x) == len(kept_y) <= max(limit, 2)
    assert kept_x == sorted(set(kept_x))
    assert all(y == ys[x] or (math.isnan(y) and math.isnan(ys[x])) for x, y in zip(kept_x, kept_y, strict=True))
    numbers = [y for y in ys if not math.isnan(y)]
    if numbers:
        kept = [y for y in kept_y if not math.isnan(y)]
        assert max(kept) == max(numbers)
        assert min(kept) == min(numbers)
    if len(ys) <= limit:
        assert kept_x == xs
