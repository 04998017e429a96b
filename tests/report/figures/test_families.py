"""Each family of figures draws its fields, against its limits, and nothing where nothing was measured."""

from __future__ import annotations

import math
import re

import pytest

from stableopt.lyapunov import ACTIONS, VERDICTS, StepRecord
from stableopt.report import History, Run, figures
from tests.report.figures.drawing import Drawing
from tests.report.folders import some_records, watched_records

RECORDS = watched_records(300, fault=100)
RUN = Run("a", history=History.of(RECORDS))
OTHER = Run("b", history=History.of(watched_records(200, seed=1, layers=20)))
EVERY = Run("c", history=History.of(some_records(25)))
FAMILIES = [
    figures.energy_figures,
    figures.trust_figures,
    figures.curvature_figures,
    figures.update_figures,
    figures.gradient_figures,
    figures.limit_figures,
    figures.exponent_figures,
    figures.step_figures,
]


def of(pictures, title):
    return next(picture for picture in pictures if picture.title == title)


def drawing(pictures, title):
    return Drawing(of(pictures, title).svg)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_records_there_is_no_figure(family):
    assert family([Run("a")]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_figure_has_a_title_a_caption_and_words_and_fits_several_runs(family):
    for runs in ([RUN], [RUN, OTHER, Run("empty"), EVERY]):
        pictures = family(runs)
        assert pictures
        assert len({picture.title for picture in pictures}) == len(pictures)
        assert all(picture.caption and len(Drawing(picture.svg).words) > 40 for picture in pictures)


def test_energy_and_loss_are_the_recorded_ones_with_the_alarms():
    records = watched_records(60, fault=40)
    pictures = figures.energy_figures([Run("a", history=History.of(records))])
    loss = drawing(pictures, "Loss before the step")
    assert [y for _, y in loss.lines["a"]] == pytest.approx([r.loss for r in records], rel=0.05)
    stayed = [r.energy_before if r.action == "undone" else r.energy_after for r in records]
    assert [y for _, y in drawing(pictures, "Energy after the step").lines["a"]] == pytest.approx(stayed, rel=0.05)
    assert loss.paths("alarm-head")[0].count("M") == sum(e.kind == "alarm" for r in records for e in r.events) == 2


def test_every_kind_of_verdict_and_action_has_its_row_and_is_counted():
    strip = drawing(figures.energy_figures([EVERY]), "Steps that did not decrease")
    assert [text for text in strip.texts if text in VERDICTS] == list(VERDICTS[1:])
    assert all(f"5 {verdict}" in strip.words for verdict in VERDICTS[1:])
    strip = drawing(figures.step_figures([EVERY]), "Actions")
    assert [text for text in strip.texts if text in ACTIONS] == [name for name in ACTIONS if name != "unguarded"]
    strip = drawing(figures.step_figures([RUN]), "Actions")
    assert [text for text in strip.texts if text in (*ACTIONS, "policy")] == ["accepted", "undone", "policy"]


def test_a_run_without_a_guard_has_no_figure_of_actions_and_scales():
    records = [StepRecord(step=k, loss=1.0, lr=(0.1, 0.2)) for k in (1, 2)]
    pictures = figures.step_figures([Run("a", history=History.of(records))])
    assert [picture.title for picture in pictures] == ["Learning rate"]
    assert pictures[0].numbers[0].last == "0.2 (2)"


def test_a_healthy_run_has_no_row_of_increases():
    titles = [p.title for p in figures.energy_figures([Run("a", history=History.of(watched_records(50)))])]
    assert titles == ["Energy after the step", "Loss before the step"]


def test_the_trust_ratio_stands_in_its_bands():
    records = watched_records(110, fault=10)
    pictures = figures.trust_figures([Run("a", history=History.of(records))])
    trust = drawing(pictures, "Trust ratio ρ")
    assert {"calm", "aggressive", "edge", "same-batch increase"} <= set(trust.texts)
    assert [trust.levels(f"z{level}")[0] for level in (1, 2, 3)] == pytest.approx([0.5, 0.25, 0.0], abs=0.02)
    ends = [float(re.findall(r"V([\d.]+)H", trust.paths(f"z{level}")[0])[0]) for level in (0, 1, 2)]
    assert [trust.at(50, y)[1] for y in ends] == pytest.approx([0.5, 0.25, 0.0], abs=0.02)
    assert all(-1.01 <= y <= 2.01 for _, y in trust.lines["a"])
    measured = [r for r in records if not math.isnan(r.trust)]
    clipped = [min(max(r.trust, -1.0), 2.0) for r in measured]
    assert [y for _, y in trust.lines["a"]] == pytest.approx(clipped, abs=0.02)
    assert of(pictures, "Trust ratio ρ").numbers[0].lowest == "-44.5 (99)"
    assert "lowest -44.5 (99)" in trust.words


def test_the_share_of_the_limit_is_drawn_with_the_limit_and_the_trace_with_its_interval():
    pictures = figures.curvature_figures([RUN])
    assert [picture.title for picture in pictures] == [
        "Share of the stability limit",
        "Sharpness",
        "Euclidean curvature",
        "Residual of the sharpness",
        "Trace of the Hessian",
        "Noise scale of the gradient",
    ]
    edge = drawing(pictures, "Share of the stability limit")
    assert "limit" in edge.texts
    assert edge.levels("guide") == pytest.approx([1.0], abs=0.01)
    assert [y for _, y in edge.lines["a"]] == pytest.approx([r.edge for r in RECORDS if r.hvp], abs=0.01)
    assert (
        drawing(pictures, "Trace of the Hessian").paths("hull")[0].count("L")
        == 2 * sum(bool(r.hvp) for r in RECORDS) - 1
    )


def test_of_few_layers_all_are_drawn_and_of_many_the_outermost_before_a_band_of_all():
    few = figures.update_figures([RUN])[0]
    assert sorted(Drawing(few.svg).lines) == sorted(RECORDS[0].update_ratio)
    many = figures.update_figures([OTHER])[0]
    names = list(Drawing(many.svg).lines)
    assert len(names) == 8
    curves = OTHER.history.tables["update_ratio"]
    assert max(curves, key=lambda name: curves[name].highest[1]) in names
    assert min(curves, key=lambda name: curves[name].lowest[1]) in names
    assert many.legend[-1][1] == "all 20 layers"
    assert "table below has all 20" in many.caption
    assert [row.label for row in many.numbers][:3] == [
        "blocks.0.linear.weight",
        "blocks.0.out.weight",
        "blocks.1.linear.weight",
    ]
    assert len(many.numbers) == 20


def test_norms_stand_against_their_limits_and_only_those_that_have_one():
    pictures = figures.limit_figures([RUN])
    share = drawing(pictures, "Norm over its limit")
    assert "limit" in share.texts
    assert share.levels("guide") == pytest.approx([1.0], abs=0.01)
    last = [r for r in RECORDS if r.norms][-1]
    assert share.lines.keys() == last.limits.keys()
    name = "blocks.0.out.weight"
    assert share.lines[name][-1][1] == pytest.approx(last.norms[name] / 1.4, abs=0.01)
    assert drawing(pictures, "Operator norm").lines.keys() == last.norms.keys()
    assert drawing(pictures, "Share of the step limit").lines.keys() == last.cfl.keys()
    assert [picture.title for picture in pictures] == [
        "Norm over its limit",
        "Operator norm",
        "Share of the step limit",
        "Growth of residual blocks",
        "Gain of each layer",
        "Units near a kink",
    ]
    assert [p.title for p in figures.exponent_figures([RUN])] == ["Forward exponent", "Exponent of the weights"]
    assert drawing(figures.exponent_figures([RUN]), "Forward exponent").levels("guide") == pytest.approx(
        [0.0], abs=0.01
    )


def test_of_many_layers_the_nearest_to_their_limits_are_drawn():
    norms = {f"{k}.weight": float(k) for k in range(20)}
    limits = {f"{k}.weight": float(k) ** 2 / 5 + 0.1 for k in range(20)}
    run = Run("a", history=History.of([StepRecord(step=1, norms=norms, limits=limits)]))
    share = sorted(norms, key=lambda name: norms[name] / limits[name])[-8:]
    labels = list(drawing(figures.limit_figures([run]), "Norm over its limit").lines)
    assert sorted(labels) == sorted(share)
    assert labels == sorted(labels, key=lambda name: int(name.split(".")[0]))


def test_figures_by_layer_name_their_run_where_there_are_several():
    assert figures.update_figures([RUN])[0].title == "Update over weight"
    assert [p.title for p in figures.update_figures([RUN, OTHER])] == ["Update over weight: a", "Update over weight: b"]
    assert figures.gradient_figures([RUN, OTHER])[0].title == "Norm of the gradient"


def test_certified_accuracy_is_drawn_from_the_curve_and_else_from_the_table():
    table = {"0.5": 0.5, "10": 0.1, "2": 0.3}
    curve = {"radius": [0.0, 1.0, 2.0], "certified_accuracy": [0.9, 0.5, 0.0]}
    drawn = figures.accuracy_figure(
        [
            Run("curve", metrics={"certified_accuracy": table, "curve": curve, "test_accuracy": 0.95}),
            Run("none", metrics={"test_accuracy": 0.95}),
            Run("table", metrics={"certified_accuracy": table}),
            Run("broken", metrics={"certified_accuracy": table, "curve": {"radius": [1], "certified_accuracy": []}}),
        ]
    )
    assert drawn is not None
    lines = Drawing(drawn.svg).lines
    assert list(lines) == ["curve", "table", "broken"]
    assert [y for _, y in lines["curve"]] == pytest.approx([0.9, 0.5, 0.0], abs=0.01)
    assert [x for x, _ in lines["table"]] == pytest.approx([0.5, 2.0, 10.0], abs=0.05)
    assert lines["table"] == lines["broken"]
    assert len(Drawing(drawn.svg).paths("guide")) == 1
    assert Drawing(drawn.svg).axis == "radius (Euclidean)"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0])
def test_odd_numbers_are_drawn(value):
    scalars = dict.fromkeys(
        ("loss", "energy_after", "scale", "trust", "edge", "trace", "trace_error", "grad_norm"), value
    )
    tables = {
        name: {"0": value, "1": 1.0} for name in ("norms", "limits", "cfl", "update_ratio", "grad_norms", "kinks")
    }
    records = [StepRecord(step=k, verdict="nonfinite", **scalars, **tables) for k in (1, 2)]
    run = Run("a", history=History.of(records))
    for family in FAMILIES:
        for picture in family([run]):
            Drawing(picture.svg)
