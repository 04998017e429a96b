"""What the monitor carries from step to step is right again after whatever has gone wrong, and where its tiers meet."""

from __future__ import annotations

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt import optim
from stableopt.lyapunov import Alarms, Every, Monitor, Policy, Sink, StepRecord, read_records
from stableopt.lyapunov.curvature import CurvatureProbe
from stableopt.lyapunov.energy import Start
from tests.lyapunov.training import batches, equal, make_closure, picture

LIGHT = Every(sharpness=None, layers=None, forward=None, gaps=None)
CURVED = Every(sharpness=1, layers=None, forward=None, gaps=None)
QUIET = Every(vitals=1000, energy=1000, sharpness=None, layers=None, forward=None, gaps=None)

watch = functools.partial(Monitor, max_overhead=None, every=LIGHT, policy="observe")


class Training:
    """A linear regression, whose loss has the same curvature everywhere, by gradient descent."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(6, 1)
        self.optimizer = make(self.model.parameters(), **({"lr": 0.01} | options))
        self.x, self.y = batches(1)[0]
        self.closure = make_closure(self.model, self.optimizer, self.x, self.y)

    def step(self) -> None:
        """Step with the closure."""
        self.optimizer.step(self.closure)

    def told(self, monitor: Monitor, loss: float | None = None, parts: int = 1) -> None:
        """Step without the closure; tell the loss of each of so many parts of the batch with its graph, or a number."""
        self.optimizer.zero_grad()
        for x, y in zip(self.x.chunk(parts), self.y.chunk(parts), strict=True):
            value = (self.model(x) - y).square().mean() / parts
            monitor.observe(value if loss is None else loss)
            value.backward()
        self.optimizer.step()


# --- curvature ---


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (Every(energy=None, sharpness=1, layers=None, forward=1, gaps=None), [1, 2, 3, 4, 5, 6, 7]),
        (Every(energy=2, sharpness=3, layers=None, forward=3, gaps=None), [1, 4, 7]),
    ],
)
def test_curvature_is_measured_where_no_energy_is_due(every: Every, steps: list[int]) -> None:
    training = Training()
    with watch(training.model, training.optimizer, every=every) as monitor:
        for _ in range(7):
            training.step()
    measured = {record.step: record.plain_sharpness for record in monitor.records if record.hvp}
    assert list(measured) == steps
    assert list(measured.values()) == pytest.approx([measured[1]] * len(steps), rel=1e-3)


def test_the_edge_is_that_of_the_shrunk_learning_rate_whoever_tells_the_loss() -> None:
    edges = []
    for by_closure in (True, False):
        training = Training()
        monitor = watch(training.model, training.optimizer, every=CURVED, policy=Policy(nonfinite="shrink"))
        with monitor, warnings.catch_warnings(action="ignore"):
            training.told(monitor, math.nan)
            training.step() if by_closure else training.told(monitor)
        record = monitor.last
        assert record.lr == (0.005,)
        assert record.edge == pytest.approx(record.plain_sharpness * 0.005 / 2, rel=1e-6)
        edges.append(record.edge)
    assert edges[0] == pytest.approx(edges[1], rel=1e-3)


def test_the_edge_is_that_of_the_step_which_a_guard_has_scaled() -> None:
    training = Training(optim.SGD, lr=5.0, guard="backtrack")
    with watch(training.model, training.optimizer, every=CURVED) as monitor:
        training.step()
    record = monitor.last
    assert 0.0 < record.scale < 1.0
    assert record.edge == pytest.approx(record.plain_sharpness * 5.0 * record.scale / 2, rel=1e-6)


def test_of_the_losses_of_micro_batches_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = CurvatureProbe.measure, list[Any]()

    def counted(self: CurvatureProbe, *args: Any) -> Any:
        calls.append(args)
        return measure(self, *args)

    monkeypatch.setattr(CurvatureProbe, "measure", counted)
    training = Training()
    with watch(training.model, training.optimizer, every=CURVED) as monitor:
        for _ in range(2):
            training.told(monitor, parts=4)
    assert len(calls) == 2
    assert all(record.hvp == "graph" for record in monitor.records)


# --- states ---


def test_a_state_that_is_refused_leaves_file_and_step_alone(tmp_path: Path) -> None:
    training = Training()
    with watch(training.model, training.optimizer, tmp_path) as monitor:
        training.step()
        state = monitor.state_dict() | {"policy": {"of": "another version"}}
        for _ in range(4):
            training.step()
        with pytest.raises(ValueError, match="state"):
            monitor.load_state_dict(state)
        assert monitor.state_dict()["step"] == len(monitor.records) == 5
        training.step()
    assert [record.step for record in read_records(tmp_path / "energy.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_what_a_scaler_has_skipped_is_in_the_resumed_record_as_in_the_whole(tmp_path: Path) -> None:
    def begin(folder: str) -> tuple[Training, Any, Monitor]:
        training, scaler = Training(), torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(1))
        return training, scaler, watch(training.model, training.optimizer, tmp_path / folder, scaler=scaler)

    def go(training: Training, scaler: Any, steps: range) -> None:
        for step in steps:
            if step in {3, 8}:
                scaler.update(scaler.get_scale() / 2)
            training.step()

    training, scaler, monitor = begin("whole")
    with monitor:
        go(training, scaler, range(1, 5))
        scaler.update(scaler.get_scale() / 2)
        go(training, scaler, range(5, 11))
    training, scaler, monitor = begin("parts")
    with monitor:
        go(training, scaler, range(1, 5))
        scaler.update(scaler.get_scale() / 2)  # the checkpoint lies between a skipped step and the look that finds it
        parts = [training.model, training.optimizer, scaler, monitor]
        states = [copy.deepcopy(part.state_dict()) for part in parts]
        go(training, scaler, range(5, 8))
    training, scaler, monitor = begin("parts")
    for part, state in zip([training.model, training.optimizer, scaler, monitor], states, strict=True):
        part.load_state_dict(state)
    with monitor:
        go(training, scaler, range(5, 11))
    whole, resumed = ((tmp_path / folder / "energy.jsonl").read_text() for folder in ("whole", "parts"))
    assert whole.count("the gradient scaler has skipped about 1 step:") == 3
    assert resumed == whole


def test_a_closure_that_raises_leaves_all_as_it_was_and_its_time_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Start.take

    def slowly(self: Start, **what: Any) -> None:
        time.sleep(0.02)
        take(self, **what)

    monkeypatch.setattr(Start, "take", slowly)
    training, plain = Training(momentum=0.9), Training(momentum=0.9)

    def fails(each: Training) -> Any:
        each.closure()
        raise KeyError("no batch")

    def seen(each: Training) -> dict[str, Any]:
        return picture(each.model, each.optimizer) | {"versions": None}

    with watch(training.model, training.optimizer, policy=Policy(nonfinite="skip", other="shrink")) as monitor:
        training.step()
        plain.step()
        before = monitor.state_dict()
        for each in (training, plain) * 3:
            with pytest.raises(KeyError, match="no batch"):
                each.optimizer.step(functools.partial(fails, each))
        assert equal(monitor.state_dict(), before)
        assert equal(seen(training), seen(plain))
        training.step()
        plain.step()
    assert equal(seen(training), seen(plain))
    assert [(record.step, record.verdict) for record in monitor.records] == [(1, "decreased"), (2, "decreased")]
    assert monitor.seconds > 5 * 0.02


# --- failures ---


def test_one_evaluation_that_fails_after_a_step_does_not_end_comparison_and_three_in_a_row_do() -> None:
    """The step may be at fault: where it leads too far, the loss is not defined."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        if model.weight.detach().abs() > 5.0:
            raise ValueError("the scale is out of its range")
        loss = (model.weight - 1).square().sum()
        loss.backward()
        return loss

    seen, far = "", "-!--!!!--"
    with watch(model, optimizer) as monitor:
        for way in far:
            with torch.no_grad():
                model.weight.fill_(0.0)
            optimizer.param_groups[0]["lr"] = 50.0 if way == "!" else 0.01
            calls = 0
            optimizer.step(closure)
            seen += {"decreased": "-", "unobserved": "!"}[monitor.last.verdict]
            assert (way == "!") <= ("out of its range" in monitor.last.reason)
    assert seen == "-!--!!!!!"
    assert calls == 1


def test_a_record_of_an_event_alone_has_the_learning_rate_of_the_step() -> None:
    training = Training()
    settings = {"policy": Policy(nonfinite="shrink", cooldown=1), "alarms": Alarms(cooldown=1), "every": QUIET}
    with warnings.catch_warnings(action="ignore"), watch(training.model, training.optimizer, **settings) as monitor:
        for loss in (math.nan, 1.0, 1.0, math.nan):
            training.told(monitor, loss)
    assert [(record.step, record.lr) for record in monitor.records] == [(1, (0.01,)), (4, (0.005,))]
    assert training.optimizer.param_groups[0]["lr"] == 0.01


class Full(Sink):
    """Takes nothing at one step."""

    def __init__(self, step: int) -> None:
        self.step, self.steps = step, list[int]()

    def write(self, record: StepRecord) -> None:
        """Note its step, or raise."""
        if record.step == self.step:
            raise OSError("no space left")
        self.steps.append(record.step)


def test_a_sink_that_raises_leaves_the_monitor_in_order() -> None:
    training, sink = Training(), Full(3)
    every = Every(vitals=2, energy=2, sharpness=None, layers=None, forward=None, gaps=None)
    with watch(training.model, training.optimizer, every=every, sinks=[sink]) as monitor:
        for step in range(1, 8):
            if step == 3:
                with pytest.raises(OSError, match="no space"):
                    training.step()
            else:
                training.step()
    assert [record.step for record in monitor.records] == [1, 3, 5, 7]
    assert sink.steps == [1, 5, 7]
    assert monitor.summary()["steps"] == 7
    assert {record.verdict for record in monitor.records} == {"decreased"}


def test_a_warning_that_is_an_error_comes_after_record_and_event(tmp_path: Path) -> None:
    training = Training()
    with watch(training.model, training.optimizer, tmp_path, every=CURVED, policy="warn") as monitor:
        with pytest.raises(RuntimeWarning, match="step 1, nonfinite"):
            training.told(monitor, math.nan)
        training.told(monitor, 1.0)
    assert [record.step for record in read_records(tmp_path / "energy.jsonl")] == [1, 2]
    assert [len(record.events) for record in monitor.records] == [1, 0]
    assert [event.step for event in monitor.events] == [1]
    assert monitor.last.loss == 1.0


def test_a_warning_that_is_an_error_leaves_no_curvature_for_the_next_step() -> None:
    training = Training()
    with watch(training.model, training.optimizer, every=CURVED, policy="warn") as monitor:
        training.model.weight.register_hook(lambda g: g * math.nan if not monitor.records else g)
        with pytest.raises(RuntimeWarning, match="step 1, nonfinite"):
            training.told(monitor)
        with torch.no_grad():
            training.model.weight.fill_(1.0)
        training.told(monitor, 1.0)
    assert [record.hvp for record in monitor.records][1:] == [""]
