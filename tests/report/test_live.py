"""The live view says what the records say, draws rarely, and never disturbs the run."""

from __future__ import annotations

import io
import math
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from stableopt.lyapunov import Event, Monitor, StepRecord
from stableopt.report import live
from stableopt.report.live import LiveView, sparkline
from tests.report.folders import watched_records

RECORDS = watched_records(150, fault=50)
OVERHEAD = f"{100 * RECORDS[-1].overhead:.1f} %"


def terminal(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)


def pipe() -> Console:
    return Console(file=io.StringIO(), width=60)


def output(view: LiveView) -> str:
    assert isinstance(view.console.file, io.StringIO)
    return view.console.file.getvalue()


def last_panel(view: LiveView) -> str:
    """Return the panel that is on the screen at the end."""
    return "╭" + output(view).rpartition("╭")[2]


def test_without_a_terminal_there_is_a_line_per_so_many_records_and_one_per_event():
    with LiveView(pipe(), every=50) as view:
        for record in RECORDS:
            view.write(record)
    lines = output(view).splitlines()
    events = [str(event) for record in RECORDS for event in record.events]
    assert [line for line in lines if line in events] == events
    rest = [line for line in lines if line not in events]
    assert [line.split(" loss")[0] for line in rest] == ["step 50", "step 100", "step 150"]
    assert (
        f"loss {RECORDS[149].loss:.4g} decreased 61 increased 88 nonfinite 1 trust {RECORDS[149].trust:.3g} calm"
        in rest[2]
    )
    assert rest[2].endswith(f"edge {RECORDS[149].edge:.3g} alarms 3 overhead {OVERHEAD}")
    assert "\x1b" not in output(view)


def test_in_a_terminal_the_panel_shows_everything():
    view = LiveView(terminal())
    view.note = "epoch 3/8"
    for record in RECORDS:
        view.write(record)
    view.close()
    shown = last_panel(view)
    assert view.failure is None
    for words in (
        "epoch 3/8",
        "150",
        "61 decreased, 88 increased, 1 nonfinite",
        "149 accepted, 1 undone",
        "calm",
        "of the stability limit",
    ):
        assert words in shown, words
    for words in ("alarms 3", "step 54, increase (shrink): the loss of the same batch rose", f"{OVERHEAD} of the time"):
        assert words in shown, words
    largest = sorted(RECORDS[-1].update_ratio.items(), key=lambda item: -item[1])
    assert all(f"{ratio:.1e}  {name}" in shown for name, ratio in largest[:5])
    assert largest[5][0] not in shown


def test_what_was_not_measured_is_not_shown():
    view = LiveView(terminal())
    view.write(StepRecord(step=1, loss=1.0))
    view.close()
    assert not any(words in last_panel(view) for words in ("trust", "edge", "updates", "alarms", "guard", "% of"))


def test_an_older_number_says_of_which_step_it_is():
    view = LiveView(terminal())
    view.write(StepRecord(step=1, edge=0.5, trust=0.9))
    view.write(StepRecord(step=2))
    view.close()
    assert "0.5 of the stability limit (step 1)" in last_panel(view)


def test_it_draws_at_most_so_often(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    view = LiveView(terminal(), refresh=2.0)
    for k in range(100):
        now[0] = k * 0.1
        view.write(StepRecord(step=k + 1, loss=1.0))
    drawn = output(view).count("╭")
    view.close()
    assert 18 <= drawn <= 22  # 10 s at 2 per second, and the first


@pytest.mark.parametrize("width", [10, 25, 44])
def test_a_narrow_terminal_is_enough(width):
    view = LiveView(terminal(width))
    for record in RECORDS[:60]:
        view.write(record)
    view.close()
    assert view.failure is None


def test_a_terminal_without_blocks_gets_plain_characters():
    raw = io.BytesIO()
    view = LiveView(Console(file=io.TextIOWrapper(raw, encoding="ascii"), force_terminal=True, width=80))
    for record in RECORDS:
        view.write(record)
    view.close()
    view.console.file.flush()
    assert view.failure is None
    assert b"loss" in raw.getvalue()


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("closed"), UnicodeEncodeError("ascii", "x", 0, 1, "no")])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_console_that_fails_costs_one_warning_and_no_step(error, is_terminal):
    class Broken(io.StringIO):
        def write(self, _):
            raise error

    view = LiveView(Console(file=Broken(), force_terminal=is_terminal, width=80), every=1)
    with pytest.warns(RuntimeWarning, match="the live view stops") as caught:
        view.write(RECORDS[0])
    view.write(RECORDS[1])  # where warnings are errors, as here, a second one would be raised
    view.close()
    assert len(caught) == 1
    assert view.failure is not None


def test_where_warnings_are_errors_the_run_goes_on_all_the_same(monkeypatch):
    view = LiveView(pipe(), every=1)

    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(view, "_line", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view.write(RECORDS[0])
    assert isinstance(view.failure, ZeroDivisionError)


def test_an_interrupt_is_not_swallowed(monkeypatch):
    view = LiveView(pipe(), every=1)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(view, "_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        view.write(RECORDS[0])


def test_standard_output_is_given_back():
    before = sys.stdout
    view = LiveView(terminal())
    view.write(RECORDS[0])
    view.close()
    view.close()
    assert sys.stdout is before
    view.write(RECORDS[1])  # opens it again
    view.close()
    assert sys.stdout is before


def test_names_are_no_markup():
    view = LiveView(terminal())
    view.note = "[red]note[/red]"
    event = Event(1, "alarm", "[b]", "warn", "[bold]what[/nonsense]")
    view.write(StepRecord(step=1, update_ratio={"[link=x]": 0.5}, events=(event,)))
    view.close()
    assert view.failure is None
    assert all(words in last_panel(view) for words in ("[red]note[/red]", "[link=x]", "[bold]what[/nonsense]"))
    plain = LiveView(pipe())
    plain.write(StepRecord(step=1, events=(event,)))
    assert str(event) in output(plain)


def test_it_is_a_sink_of_the_monitor_and_changes_nothing():
    def train(sinks):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(16, 3)

        def closure():
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        with Monitor(model, optimizer, sinks=sinks, max_overhead=None):
            for _ in range(5):
                optimizer.step(closure)
        return model.weight.detach().clone(), torch.get_rng_state()

    view = LiveView(pipe(), every=5)
    weight, state = train([view])
    assert output(view).startswith("step 5 loss ")
    assert "decreased 5 trust" in output(view)
    other, other_state = train([])
    assert torch.equal(weight, other)
    assert torch.equal(state, other_state)


@pytest.mark.parametrize(
    "arguments", [{"refresh": 0.0}, {"refresh": math.nan}, {"every": 0}, {"every": 1.5}, {"every": True}]
)
def test_wrong_numbers_are_refused(arguments):
    with pytest.raises(ValueError, match="LiveView needs"):
        LiveView(pipe(), **arguments)


def test_without_rich_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"rich.*pip install 'stableopt\[cli\]'"):
        LiveView()


@given(st.lists(st.floats(), max_size=100), st.integers(1, 50), st.booleans())
def test_a_sparkline_has_a_character_per_value_or_is_as_wide_as_asked(values, width, ascii_only):
    line = sparkline(values, width, ascii_only=ascii_only)
    assert len(line) == min(len(values), width)
    assert line.isascii() or not ascii_only
    if len(values) <= width:
        assert [c == "!" for c in line] == [not math.isfinite(value) for value in values]


def test_a_sparkline_rises_where_the_values_do_and_by_factors_over_decades():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([10.0**k for k in range(8)]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0]) == "▁▁"


def test_an_update_that_is_not_a_number_comes_first():
    view = LiveView(terminal())
    ratios = {"a": 0.1, "b": math.nan, **{f"c{k}": 0.2 + 0.1 * k for k in range(6)}, "d": math.inf, "e": math.nan}
    view.write(StepRecord(step=1, update_ratio=ratios))
    view.close()
    assert [name for name, _ in view._updates[1]] == ["b", "d", "e", "c5", "c4"]


def test_a_loss_that_was_not_finite_for_a_step_of_a_long_run_is_seen():
    view = LiveView(terminal())
    for step in range(1, 1001):
        view.write(StepRecord(step=step, loss=math.nan if step == 500 else 1.0, nonfinite=("loss",) * (step == 500)))
    view.close()
    assert last_panel(view).count("!") == 1
