"""The tables and sentences hold the numbers of the runs."""

from __future__ import annotations

import pytest

from stableopt.lyapunov import Event, StepRecord
from stableopt.report import History, Run, tables
from tests.report.folders import watched_records

RUN = Run("a", history=History.of(watched_records(150, fault=50)))


def test_the_headline_says_how_the_run_went():
    words = tables.headline(RUN)
    assert words.startswith("150 records of steps 1 to 150, energy after the step ")
    assert words.endswith(
        "3 alarms, the first at step 54 (increase: the loss of the same batch rose in 4 of the last 5 checked steps)."
    )
    assert tables.headline(Run("b")) == "no step was recorded."
    one = Run("c", history=History.of([StepRecord(step=3, events=(Event(3, "alarm", "level", "warn", "it rose"),))]))
    assert tables.headline(one) == "1 record of steps 3 to 3; 1 alarm, the first at step 3 (level: it rose)."


def test_the_bands_of_the_trust_ratio_add_up():
    rows = dict(tables.trust_shares([RUN, Run("b")]))
    assert sum(int(cells[0].split()[0]) for cells in rows.values()) == 149  # one step was not finite
    assert sum(float(cells[0].split("(")[1].split()[0]) for cells in rows.values()) == pytest.approx(100, abs=0.5)
    assert all(cells[1] == "—" for cells in rows.values())


def test_alarms_are_counted_by_channel_and_no_alarm_is_none():
    rows = dict(tables.summary([RUN, Run("b"), Run("c", history=History.of([StepRecord(step=1)]))]))
    assert rows["alarms"] == ["1 increase, 1 nonfinite, 1 sublevel", "—", "none"]
    assert rows["last share of the stability limit"][0] == f"{RUN.history.curves['edge'].last[1]:.3g}"


def test_what_no_run_measured_is_missing():
    plain = Run("p", history=History.of([StepRecord(step=1, trust=0.5)]))
    assert "trust ratio" not in tables.missing([plain])
    assert "sharpness" in tables.missing([plain])
    assert tables.missing([plain, RUN]) == []


def test_the_cost_is_the_last_one_measured():
    share = f"{100 * RUN.history.curves['overhead'].last[1]:.2g} %"
    (sentence,) = tables.cost([RUN, Run("b")])
    assert sentence == f"a: the monitor took {share} of the time of the training; products with the Hessian: 3 exact."
