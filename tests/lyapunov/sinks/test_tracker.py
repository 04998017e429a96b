"""A dashboard that fails costs one warning, and events are counted."""

from __future__ import annotations

import pytest

from stableopt.lyapunov import StepRecord
from stableopt.lyapunov.events import Event
from stableopt.lyapunov.sinks import TrackerSink


class Keep(TrackerSink):
    def __init__(self, error=None, **options):
        super().__init__(**options)
        self.sent = []
        self.error = error

    def send(self, values, record):
        if self.error is not None:
            raise self.error
        self.sent.append((record.step, values))


def alarm(step, channel="level"):
    return Event(step, "alarm", channel, "warn", "what")


def test_events_are_counted_from_the_first_of_their_kind():
    sink = Keep()
    sink.write(StepRecord(step=1, loss=1.0))
    sink.write(StepRecord(step=2, events=(alarm(2), alarm(2), Event(2, "action", "level", "shrink", "what"))))
    sink.write(StepRecord(step=3))
    sink.write(StepRecord(step=4, events=(alarm(4), alarm(4, "nonfinite"))))
    assert sink.sent == [
        (1, {"loss": 1.0}),
        (2, {"alarms/level": 2.0, "actions/shrink": 1.0}),
        (3, {"alarms/level": 2.0, "actions/shrink": 1.0}),
        (4, {"alarms/level": 3.0, "actions/shrink": 1.0, "alarms/nonfinite": 1.0}),
    ]


@pytest.mark.parametrize("tables", [True, False])
def test_the_tables_may_be_left_out(tables):
    sink = Keep(tables=tables)
    sink.write(StepRecord(step=1, loss=1.0, norms={"a": 2.0}))
    assert sink.sent == [(1, {"loss": 1.0, "norm/a": 2.0} if tables else {"loss": 1.0})]


@pytest.mark.parametrize("error", [OSError("disk"), ConnectionError("gone"), RuntimeError("x"), ValueError("y")])
def test_an_error_of_the_dashboard_costs_one_warning(error):
    sink = Keep(error)
    with pytest.warns(
        RuntimeWarning, match=rf"Keep cannot hand on step 7 \({type(error).__name__}: .*training goes on"
    ):
        sink.write(StepRecord(step=7))
    sink.write(StepRecord(step=8))  # a warning here would be an error
    assert sink.disabled


def test_the_warning_may_be_an_error_and_the_sink_is_disabled_all_the_same():
    sink = Keep(OSError("disk"))
    with pytest.raises(RuntimeWarning):
        sink.write(StepRecord(step=1))
    sink.write(StepRecord(step=2))


def test_an_interrupt_is_no_failure():
    sink = Keep(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sink.write(StepRecord(step=1))
    assert not sink.disabled
