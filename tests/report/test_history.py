"""What is kept of a run has its extremes, its order and its counts, and never grows."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopt.lyapunov import Event, StepRecord
from stableopt.report.history import BANDS, Curve, EventLog, History, Marks, trust_band

ALARM = Event(3, "alarm", "level", "warn", "the level rose")


def curve_of(values, limit):
    curve = Curve(limit)
    for x, y in enumerate(values):
        curve.add(x, y)
    return curve


@given(
    st.lists(
        st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf])), min_size=1, max_size=300
    ),
    st.integers(1, 25).map(lambda half: 2 * half),
)
def test_a_curve_keeps_every_extreme_in_its_place_and_never_grows(ys, limit):
    curve = curve_of(ys, limit)
    stretches = curve.stretches
    assert len(stretches) <= limit
    assert [s.x for s in stretches] == sorted({s.x for s in stretches})
    width = curve.width
    for k, stretch in enumerate(stretches):
        part = [y for y in ys[k * width : (k + 1) * width] if math.isfinite(y)]
        if part:
            assert (stretch.low, stretch.high) == (min(part), max(part))
            assert stretch.mean == pytest.approx(sum(part) / len(part), rel=1e-9, abs=1e-9)
        else:
            assert math.isnan(stretch.low)
            assert math.isnan(stretch.mean)
    finite = [(x, y) for x, y in enumerate(ys) if math.isfinite(y)]
    assert curve.count == len(finite)
    if finite:
        assert (curve.first, curve.last) == (finite[0], finite[-1])
        assert curve.lowest == min(finite, key=lambda point: (point[1], point[0]))
        assert curve.highest == max(finite, key=lambda point: (point[1], -point[0]))
    if len(ys) <= limit:
        assert [s.x for s in stretches] == list(range(len(ys)))


def test_a_spike_of_a_long_run_is_kept():
    curve = curve_of([1.0 + (x == 77_777) * 99.0 for x in range(100_000)], 400)
    spike = max(curve.stretches, key=lambda stretch: stretch.high)
    assert spike.high == 100.0
    assert abs(spike.x - 77_777) <= curve.width
    assert curve.highest == (77_777, 100.0)


@pytest.mark.parametrize("limit", [0, 1, 3, -2])
def test_an_odd_limit_is_refused(limit):
    with pytest.raises(ValueError, match="even limit"):
        Curve(limit)


@given(st.integers(0, 500), st.integers(2, 20))
def test_marks_are_all_there_or_evenly_spread_with_the_first_and_the_last(count, limit):
    marks = Marks(limit)
    for step in range(1, count + 1):
        marks.add(step)
    steps = marks.steps
    assert marks.count == count
    if count <= limit:
        assert steps == tuple(range(1, count + 1))
    else:
        assert limit / 2 <= len(steps) <= limit + 1
        assert (steps[0], steps[-1]) == (1, count)
        gaps = [b - a for a, b in pairwise(steps[:-1])]
        assert len(set(gaps)) <= 1


@pytest.mark.parametrize(
    ("trust", "band"),
    [
        (1.5, "calm"),
        (0.5001, "calm"),
        (0.5, "aggressive"),
        (0.25, "edge"),
        (1e-9, "edge"),
        (0.0, "increase"),
        (-3, "increase"),
    ],
)
def test_bands_end_where_they_are_said_to(trust, band):
    assert trust_band(trust) == band
    assert band in BANDS


def test_the_first_and_the_last_events_are_kept_and_all_are_counted():
    log = EventLog(limit=3)
    for step in range(10):
        log.add(Event(step, "alarm", "level", "warn", "it rose"))
    assert [event.step for event in log.kept] == [0, 1, 2, 7, 8, 9]
    assert log.count == 10


def test_what_was_not_measured_is_no_point_and_what_is_not_finite_is_a_gap():
    history = History.of(
        [
            StepRecord(step=1, loss=2.0, edge=0.5),
            StepRecord(step=2, loss=1.0),
            StepRecord(step=3, verdict="nonfinite", nonfinite=("loss",)),
            StepRecord(step=4, loss=math.inf, verdict="nonfinite"),
            StepRecord(step=5, loss=3.0, edge=0.25),
        ]
    )
    assert [s.x for s in history.curves["edge"].stretches] == [1, 5]
    assert [s.mean for s in history.curves["loss"].stretches] == pytest.approx(
        [2.0, 1.0, math.nan, math.nan, 3.0], nan_ok=True
    )
    assert "trace" not in history.curves


def test_an_undone_step_stays_where_it_was():
    history = History.of([StepRecord(step=1, energy_before=1.0, energy_after=9.0, action="undone")])
    assert history.curves["energy"].last == (1, 1.0)


def test_layers_have_curves_shares_of_their_limits_and_a_spread_over_all():
    tables = {
        "update_ratio": {"a": 1e-3, "b": 3e-3, "c": 2e-3},
        "norms": {"a": 0.5, "b": 2.0},
        "limits": {"a": 2.0, "c": 0.0},
    }
    history = History.of([StepRecord(step=1, **tables), StepRecord(step=2), StepRecord(step=3, **tables)])
    assert history.tables["norm_share"].keys() == {"a"}
    assert history.tables["norm_share"]["a"].last == (3, 0.25)
    assert history.tables["norms"]["b"].count == 2
    assert [curve.last[1] for curve in history.across["update_ratio"]] == [1e-3, 2e-3, 3e-3]
    assert history.limits == {"a": 2.0, "c": 0.0}


def test_counts_and_events_are_those_of_the_records():
    events = (ALARM, Event(3, "action", "", "shrink", "lr halved"))
    history = History.of(
        [StepRecord(step=k, trust=0.9, hvp="exact", events=events if k == 3 else ()) for k in range(1, 6)]
    )
    assert history.marks["event", "alarm"].steps == (3,)
    assert history.marks["verdict", "unobserved"].count == 5
    assert history.events.counts["action", "", "shrink"] == 1
    assert (history.bands["calm"], history.products["exact"]) == (5, 5)


def test_the_interval_of_the_trace_is_of_two_standard_errors():
    history = History.of([StepRecord(step=1, trace=10.0, trace_error=2.0), StepRecord(step=2, trace=5.0)])
    assert history.curves["trace_low"].last == (1, pytest.approx(10 - 2 * 1.96))
    assert history.curves["trace_high"].last == (1, pytest.approx(10 + 2 * 1.96))
    assert history.curves["trace"].count == 2


def test_the_memory_of_a_history_does_not_depend_on_the_number_of_records():
    def size(count):
        records = (
            StepRecord(
                step=k, loss=1.0 / (1 + k % 7), update_ratio={"a": 1e-3 * (k % 5)}, verdict="increased", events=(ALARM,)
            )
            for k in range(1, count + 1)
        )
        history = History.of(records)
        return (
            sum(len(curve.stretches) for curve in history.curves.values())
            + len(history.marks["verdict", "increased"].steps),
            len(history.events.kept),
        )

    small, large = size(1_000), size(4_000)
    assert large[0] <= small[0] * 2
    assert small[1] == large[1] == 200


def test_gaps_are_counted_also_once_stretches_are_merged():
    ys = [1.0, math.nan, 2.0, 3.0, math.inf, math.nan, 4.0, 5.0]
    curve = curve_of(ys, 4)
    assert curve.width == 2
    assert [s.gaps for s in curve.stretches] == [1, 0, 2, 0]
    assert [s.gaps for s in curve_of(ys, 2).stretches] == [1, 2]
    assert [s.gaps for s in curve_of(ys, 8).stretches] == [0, 1, 0, 0, 1, 1, 0, 0]
