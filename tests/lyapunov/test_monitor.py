"""What is recorded is what happened, on the batch on which it happened."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from stableopt import optim
from stableopt.constraints import L1, SpectralBall
from stableopt.lyapunov import Every, JSONLSink, NormEstimator, Sink, StepRecord, read_records
from stableopt.lyapunov import Monitor as MonitorWithBudget
from stableopt.nn import GradientBlock, constrain, stabilize
from stableopt.optim import as_loss
from tests.lyapunov.training import batches, make_closure, make_model, seed_everything

Monitor = functools.partial(MonitorWithBudget, max_overhead=None, policy="observe")
"""Looks at each step, however long it takes, and warns of nothing."""


class Parabola(nn.Module):
    r"""The loss :math:`\frac{L}{2}\theta^2`, whose steps can be computed by hand."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([start]))

    def forward(self, curvature: float = 1.0):
        return (0.5 * curvature * self.theta**2).sum()


def parabola_closure(model, optimizer, curvature=1.0):
    def closure():
        optimizer.zero_grad()
        loss = model(curvature)
        loss.backward()
        return loss

    return closure


# ---------------------------------------------------------------- energies of plain optimizers


@pytest.mark.parametrize(
    ("lr", "verdict"), [(0.5, "decreased"), (1.99, "decreased"), (2.01, "increased"), (3.0, "increased")]
)
def test_gradient_descent_decreases_up_to_two_over_L_and_not_past_it(lr, verdict):
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with Monitor(model, optimizer) as monitor:
        optimizer.step(parabola_closure(model, optimizer))
    record = monitor.last
    assert record.verdict == verdict
    assert record.loss == record.energy_before == 0.5
    assert record.energy_after == pytest.approx(0.5 * (1 - lr) ** 2, abs=1e-15)
    assert record.dissipation == pytest.approx(lr * (1 - lr / 2), abs=1e-15)  # eta (1 - eta L / 2) |grad|^2
    assert record.dissipation == record.energy_before - record.energy_after
    assert record.displacement == pytest.approx(lr, abs=1e-15)
    assert record.predicted == pytest.approx(lr, abs=1e-15)
    assert record.lr == (lr,)
    assert record.step == 1
    assert record.trials == 1
    assert (record.action, record.scale) == ("unguarded", 1.0)


def test_at_exactly_two_over_L_the_verdict_is_undecided():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    with Monitor(model, optimizer) as monitor:
        optimizer.step(parabola_closure(model, optimizer))
    assert (monitor.last.dissipation, monitor.last.verdict) == (0.0, "undecided")


def test_with_lr_zero_nothing_moves_and_nothing_is_decided():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer) as monitor:
        optimizer.step(parabola_closure(model, optimizer))
    record = monitor.last
    assert (record.displacement, record.predicted, record.dissipation, record.verdict) == (0.0, 0.0, 0.0, "undecided")
    assert record.tolerance > 0


def test_the_energy_of_heavy_ball_decreases_where_the_loss_rises():
    beta, lr = 0.9, 0.09  # within lr <= 2 (1 - beta) / L
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=beta)
    with Monitor(model, optimizer) as monitor:
        for _ in range(80):
            optimizer.step(parabola_closure(model, optimizer))
    theta, speed, losses = 1.0, 0.0, [0.5]
    for record in monitor.records:  # the same run by hand
        assert record.energy_before == pytest.approx(0.5 * theta**2 + 0.5 * beta * lr * speed**2, abs=1e-13)
        speed = beta * speed + theta
        theta -= lr * speed
        losses.append(0.5 * theta**2)
        assert record.energy_after == pytest.approx(losses[-1] + 0.5 * beta * lr * speed**2, abs=1e-13)
        bound = ((1 - beta) / lr - 0.5) * (lr * speed) ** 2
        assert record.dissipation >= bound - 1e-13
        assert record.predicted == pytest.approx((1 - beta) / lr * (lr * speed) ** 2, rel=1e-12)
    assert any(after > before for before, after in pairwise(losses))
    assert monitor.summary()["verdicts"] == {"decreased": 80}


@pytest.mark.parametrize(
    ("torchs", "ours", "settings"),
    [
        (torch.optim.SGD, optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.2}),
        (torch.optim.AdamW, optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
        (torch.optim.AdamW, optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    ],
)
def test_a_plain_optimizer_has_the_energy_that_the_guard_would_see(torchs, ours, settings):
    seen = []
    for make in (torchs, lambda p, **given: ours(p, guard="monitor", **given)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        optimizer = make(model.parameters(), **settings)
        with Monitor(model, optimizer) as monitor:
            steps_of(model, optimizer, monitor, batches(15))
        names = (
            "loss",
            "energy_before",
            "energy_after",
            "predicted",
            "tolerance",
            "displacement",
            "lr",
            "verdict",
            "trials",
        )
        seen.append([[getattr(record, name) for name in names] for record in monitor.records])
    assert seen[0] == [[pytest.approx(x, rel=1e-12) if isinstance(x, float) else x for x in row] for row in seen[1]]


def test_the_penalty_of_a_guard_that_is_off_belongs_to_the_energy():
    model = Parabola(start=2.0)
    optimizer = optim.SGD(model.parameters(), lr=0.5, prox=L1(1.0), guard="off")
    with Monitor(model, optimizer) as monitor:
        optimizer.step(parabola_closure(model, optimizer))
    # theta = 2, gradient 2, so prox of 1 with step 0.5 gives 0.5
    assert (monitor.last.energy_before, monitor.last.energy_after) == (2.0 + 2.0, 0.125 + 0.5)


def test_without_a_rule_the_energy_is_the_loss_and_the_record_says_so():
    model = Parabola()
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.1)
    with Monitor(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.step(parabola_closure(model, optimizer))
            assert monitor.last.energy_before == monitor.last.loss
            assert "loss alone" in monitor.last.reason
            assert math.isnan(monitor.last.predicted)


def test_groups_that_go_both_ways_have_no_common_energy():
    a, b = Parabola(), Parabola()
    optimizer = torch.optim.SGD([{"params": a.parameters()}, {"params": b.parameters(), "maximize": True}], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = a() - b()
        loss.backward()
        return loss

    with Monitor(nn.ModuleList([a, b]), optimizer) as monitor:
        optimizer.step(closure)
    assert monitor.last.verdict == "unobserved"
    assert "no common energy" in monitor.last.reason
    assert monitor.last.lr == (0.1, 0.1)


def test_a_learning_rate_in_a_tensor_is_recorded():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.25))
    with Monitor(model, optimizer) as monitor:
        optimizer.step(parabola_closure(model, optimizer))
    assert monitor.last.lr == (0.25,)
    assert monitor.last.verdict == "decreased"


def test_an_ascent_is_watched_as_the_descent_of_minus_the_loss():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, maximize=True)
    with Monitor(model, optimizer) as monitor:
        optimizer.step(parabola_closure(model, optimizer, curvature=-1.0))
    assert monitor.last.loss == -0.5
    assert monitor.last.energy_before == 0.5
    assert monitor.last.verdict == "decreased"
    assert monitor.last.predicted == pytest.approx(0.5)


def test_the_energy_after_is_the_loss_at_the_new_point_on_the_same_batch_with_the_same_noise():
    seed_everything()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer) as monitor:
        for x, y in batches(5):
            start = torch.get_rng_state()
            numpy_start = np.random.get_state()  # noqa: NPY002
            python_start = random.getstate()
            buffers = {name: b.clone() for name, b in model.named_buffers()}
            optimizer.step(make_closure(model, optimizer, x, y))
            end = (torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
            after = {name: b.clone() for name, b in model.named_buffers()}
            torch.set_rng_state(start), np.random.set_state(numpy_start), random.setstate(python_start)  # noqa: NPY002
            model.load_state_dict(buffers, strict=False)
            with torch.no_grad():
                expected = (model(x) - y).square().mean()
            model.load_state_dict(after, strict=False)
            torch.set_rng_state(end[0]), np.random.set_state(end[1]), random.setstate(end[2])  # noqa: NPY002
            assert monitor.last.energy_after == pytest.approx(float(expected), rel=1e-12)


# ---------------------------------------------------------------- no comparison of two batches


def test_without_a_closure_nothing_is_compared_and_the_loss_is_the_one_that_is_told():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer) as monitor:
        for told in (True, False):
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            if told:
                monitor.observe(loss)
            optimizer.step()
    first, second = monitor.records
    assert first.loss == 0.5
    assert math.isnan(second.loss)  # what is told holds for one step
    for record in (first, second):
        assert record.verdict == "unobserved"
        assert "closure" in record.reason
        assert math.isnan(record.energy_before)
        assert math.isnan(record.energy_after)
        assert record.trials == 0
    assert first.displacement == pytest.approx(0.1)
    assert first.predicted == pytest.approx(0.1)


def test_a_closure_that_draws_its_own_batch_is_recognized_and_left_alone():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stream = iter(torch.randn(1000, 8, 3))
    drawn = 0

    def closure():
        nonlocal drawn
        drawn += 1
        optimizer.zero_grad()
        loss = model(next(stream)).square().mean()
        loss.backward()
        return loss

    with Monitor(model, optimizer) as monitor:
        for _ in range(20):
            optimizer.step(closure)
    assert monitor.summary()["verdicts"] == {"unobserved": 20}
    assert all("new batch" in record.reason for record in monitor.records)
    assert all(math.isfinite(record.loss) for record in monitor.records)
    assert drawn == 21  # one extra draw, to find out


def test_a_closure_that_cannot_be_run_twice_does_not_stop_the_run():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer) as monitor:
        for _ in range(3):
            once = iter([None])

            def closure(once=once):
                next(once)
                return parabola_closure(model, optimizer)()

            optimizer.step(closure)
    assert monitor.summary()["verdicts"] == {"unobserved": 3}
    assert "StopIteration" in monitor.last.reason
    assert float(model.theta.detach()) == pytest.approx(0.9**3)


def test_an_error_of_the_closure_itself_passes_and_the_next_step_is_watched():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer) as monitor:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert monitor.last is None
        assert monitor.summary()["steps"] == 0
        optimizer.step(parabola_closure(model, optimizer))
    assert (monitor.last.step, monitor.last.verdict) == (1, "decreased")


@pytest.mark.parametrize("value", [None, torch.ones(3), "loss", 1j])
def test_a_closure_without_a_loss_is_unobserved(value):
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        parabola_closure(model, optimizer)()
        return value

    with Monitor(model, optimizer) as monitor:
        monitor.observe(7)
        assert optimizer.step(closure) is value
    assert monitor.last.verdict == "unobserved"
    assert monitor.last.loss == 7.0


@pytest.mark.parametrize(
    "value", [3, 3.0, torch.tensor(3.0), torch.tensor([[3.0]]), torch.tensor(3), np.float32(3), np.array([3.0])]
)
def test_a_loss_is_any_one_number(value):
    assert as_loss(value) == 3.0


@pytest.mark.parametrize(
    "value", [None, "3", True, 1j, [3.0], torch.zeros(2), torch.zeros(0), torch.tensor(1j), np.zeros(2), np.bool_(True)]
)
def test_what_is_not_one_number_is_no_loss(value):
    model = Parabola()
    monitor = Monitor(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="one real number"):
        monitor.observe(value)


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_recorded_and_the_run_goes_on(bad, tmp_path):
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, tmp_path) as monitor:
        for factor in (1.0, bad, 1.0):

            def closure(factor=factor):
                optimizer.zero_grad()
                loss = model() + factor
                loss.backward()
                return loss

            optimizer.step(closure)
    assert [record.verdict for record in read_records(tmp_path / "energy.jsonl")] == [
        "decreased",
        "nonfinite",
        "decreased",
    ]
    assert str(monitor.records[1].loss) == str(bad)


def test_a_step_into_nan_is_nonfinite():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e308)
    model.theta.data.fill_(10.0)
    with Monitor(model, optimizer) as monitor:
        optimizer.step(parabola_closure(model, optimizer))
        optimizer.step(parabola_closure(model, optimizer))
        monitor.observe(math.nan)
        optimizer.step()
    assert [record.verdict for record in monitor.records] == ["nonfinite"] * 3


def test_a_parameter_that_leaves_the_numbers_is_seen_without_a_closure():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.theta.grad = torch.tensor([math.inf])
    with Monitor(model, optimizer) as monitor:
        optimizer.step()
    assert monitor.last.verdict == "nonfinite"
    assert "displacement" in monitor.last.reason


# ---------------------------------------------------------------- guarded optimizers


@pytest.mark.parametrize("guard", ["monitor", "backtrack", "strict"])
def test_what_the_guard_saw_is_what_is_recorded(guard):
    model = Parabola()
    optimizer = optim.SGD(model.parameters(), lr=5.0, guard=guard)
    calls = 0
    inner = parabola_closure(model, optimizer)

    def closure():
        nonlocal calls
        calls += 1
        return inner()

    with Monitor(model, optimizer, every=Every(sharpness=None, layers=None, forward=None)) as monitor:
        for _ in range(4):
            calls = 0
            optimizer.step(closure)
            report, record = optimizer.last_step, monitor.last
            assert report is not None
            for name in ("loss", "energy_before", "energy_after", "predicted", "tolerance", "displacement", "scale"):
                assert getattr(record, name) == getattr(report, name) or math.isnan(getattr(report, name)), name
            assert (record.verdict, record.action, record.trials) == (report.verdict, report.action, report.trials)
            assert calls <= 1 + report.trials  # the monitor adds no evaluation
    assert monitor.summary()["steps"] == 4
    assert [record.step for record in monitor.records] == [1, 2, 3, 4]


def test_a_guard_that_is_off_is_watched_like_any_optimizer():
    records = []
    for make in (lambda p: optim.SGD(p, lr=0.5, guard="off"), lambda p: torch.optim.SGD(p, lr=0.5)):
        model = Parabola()
        optimizer = make(model.parameters())
        with Monitor(model, optimizer) as monitor:
            for _ in range(3):
                optimizer.step(parabola_closure(model, optimizer))
        records.append([(r.step, r.verdict, r.action, r.energy_before, r.energy_after) for r in monitor.records])
    assert records[0] == records[1]
    assert {record[1] for record in records[0]} == {"decreased"}


def test_a_guard_without_a_closure_is_unobserved():
    model = Parabola()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer) as monitor:
        model().backward()
        monitor.observe(0.5)
        optimizer.step()
    assert (monitor.last.verdict, monitor.last.loss) == ("unobserved", 0.5)


def test_an_optimizer_that_calls_its_base_class_is_counted_once():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            super().step()
            return loss

    for parameters in ([nn.Parameter(torch.ones(1))],):
        torch.optim.SGD(parameters)  # this makes torch run the hooks of the base class as well
    model = Parabola()
    optimizer = Twice(model.parameters(), lr=0.1)
    with Monitor(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.step(parabola_closure(model, optimizer))
        assert monitor.summary()["steps"] == 3
        assert monitor.last.displacement == pytest.approx(2 * 0.1 * monitor.records[-1].loss ** 0.5 * 2**0.5, rel=1e-12)
        optimizer.step(closure=parabola_closure(model, optimizer))
    assert [record.verdict for record in monitor.records] == ["decreased"] * 4


def test_two_monitors_see_the_same():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with Monitor(model, optimizer) as a, Monitor(model, optimizer) as b:
        for _ in range(5):
            optimizer.step(parabola_closure(model, optimizer))
    assert [r.to_json() for r in a.records] == [r.to_json() for r in b.records]


# ---------------------------------------------------------------- steps, files, memory


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (2, [1, 3, 5, 7]), (3, [1, 4, 7]), (9, [1])])
def test_every_counts_steps_from_the_first(every, steps, tmp_path):
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = 0
    inner = parabola_closure(model, optimizer)

    def closure():
        nonlocal calls
        calls += 1
        return inner()

    only = Every(vitals=every, energy=every, sharpness=None, layers=None, forward=None)
    with Monitor(model, optimizer, tmp_path, every=only) as monitor:
        for _ in range(7):
            optimizer.step(closure)
    assert [r.step for r in monitor.records] == [r.step for r in read_records(tmp_path / "energy.jsonl")] == steps
    summary = monitor.summary()
    assert math.isnan(summary.pop("overhead"))
    assert summary == {
        "steps": 7,
        "events": {},
        "records": len(steps),
        "verdicts": {"decreased": len(steps)},
        "actions": {"unguarded": len(steps)},
    }
    assert calls == 7 + len(steps) + min(
        3, len(steps)
    )  # the steps, one after each record, one before each of the first


def test_memory_is_bounded_and_the_summary_counts_all():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, keep=5) as monitor:
        for _ in range(50):
            optimizer.step()
    assert [record.step for record in monitor.records] == [46, 47, 48, 49, 50]
    assert monitor.summary()["records"] == 50
    assert monitor.last.step == 50


def steps_of(model, optimizer, monitor, data):
    for x, y in data:
        optimizer.step(make_closure(model, optimizer, x, y))


def test_the_same_run_writes_the_same_bytes_also_when_it_is_resumed(tmp_path):
    data = batches(12)

    def begin(folder):
        seed_everything()
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        return model, optimizer, Monitor(model, optimizer, folder, every=Every(layers=2))

    for folder in ("a", "b"):
        model, optimizer, monitor = begin(tmp_path / folder)
        with monitor:
            steps_of(model, optimizer, monitor, data)
    whole = (tmp_path / "a" / "energy.jsonl").read_bytes()
    assert (tmp_path / "b" / "energy.jsonl").read_bytes() == whole

    model, optimizer, monitor = begin(tmp_path / "c")
    with monitor:
        steps_of(model, optimizer, monitor, data[:5])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), monitor.state_dict()))
        state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        steps_of(model, optimizer, monitor, data[5:8])  # lost in the crash
    model, optimizer, monitor = begin(tmp_path / "c")
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    monitor.load_state_dict(saved[2])
    torch.set_rng_state(state[0]), np.random.set_state(state[1]), random.setstate(state[2])  # noqa: NPY002
    with monitor:
        steps_of(model, optimizer, monitor, data[5:])
    assert (tmp_path / "c" / "energy.jsonl").read_bytes() == whole


def test_a_folder_that_holds_records_is_continued(tmp_path):
    for _ in range(2):
        model = Parabola()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Monitor(model, optimizer, tmp_path / "deep" / "run") as monitor:
            optimizer.step(parabola_closure(model, optimizer))
            optimizer.step(parabola_closure(model, optimizer))
    assert [record.step for record in read_records(tmp_path / "deep" / "run" / "energy.jsonl")] == [1, 2, 3, 4]
    assert monitor.summary()["steps"] == 2


def test_training_goes_on_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, tmp_path / "file") as monitor:
        with pytest.warns(RuntimeWarning, match="training goes on"):
            optimizer.step(parabola_closure(model, optimizer))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(parabola_closure(model, optimizer))
    assert monitor.summary()["records"] == 2


def test_all_sinks_get_all_records_and_are_closed(tmp_path):
    class Keep(Sink):
        def __init__(self):
            self.records: list[StepRecord] = []
            self.closed = 0

        def write(self, record):
            self.records.append(record)

        def close(self):
            self.closed += 1

    keep, file = Keep(), JSONLSink(tmp_path / "other.jsonl")
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, tmp_path, sinks=[keep, file]) as monitor:
        optimizer.step(parabola_closure(model, optimizer))
    assert keep.records == list(monitor.records)
    assert keep.closed == 1
    assert (tmp_path / "other.jsonl").read_bytes() == (tmp_path / "energy.jsonl").read_bytes()
    assert json.loads((tmp_path / "energy.jsonl").read_text())["step"] == 1


@pytest.mark.parametrize(
    "bad", [{"every": 0}, {"every": 1.5}, {"every": True}, {"keep": True}, {"keep": 0}, {"keep": -1}]
)
def test_wrong_numbers_are_refused(bad):
    model = Parabola()
    with pytest.raises(ValueError, match="integer >= 1"):
        Monitor(model, torch.optim.SGD(model.parameters()), **bad)


def test_wrong_objects_are_refused(tmp_path):
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="Module"):
        Monitor(optimizer, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Optimizer"):
        Monitor(model, model)  # type: ignore[arg-type]
    (tmp_path / "energy.jsonl").write_text("no record\n")
    with pytest.raises(ValueError, match="last line"):
        Monitor(model, optimizer, tmp_path)
    monitor = Monitor(model, optimizer)
    with pytest.raises(ValueError, match="integer step"):
        monitor.load_state_dict({"step": -1, "norms": {}})


def test_the_time_of_the_monitor_is_measured():
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer) as monitor:
        assert monitor.seconds == 0.0
        optimizer.step(parabola_closure(model, optimizer))
    assert 0.0 < monitor.seconds < 5.0


# ---------------------------------------------------------------- layer norms in the records


def test_norms_and_limits_come_at_their_steps():
    model = nn.Sequential(stabilize(nn.Linear(4, 4), 0.5), GradientBlock(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(8, 4)
    with Monitor(model, optimizer, every=Every(vitals=2, energy=2, layers=5)) as monitor:
        for _ in range(12):
            optimizer.step(make_closure(model, optimizer, x, x))
    measured = [record.step for record in monitor.records if record.norms]
    assert measured == [1, 6, 11]
    assert [record.step for record in monitor.records] == [1, 3, 5, 6, 7, 9, 11]
    for record in monitor.records:
        if record.norms:
            assert set(record.norms) == {"0.weight", "1.weight"}
            assert record.limits == {"0.weight": 0.5}
            assert record.norms["0.weight"] <= 0.5 * (1 + 1e-12)
            assert 0 < record.cfl["1"] <= 1


def test_a_projected_weight_has_its_limit():
    layer = constrain(nn.Linear(4, 4), "weight", SpectralBall(0.7), by="projection")
    assert NormEstimator(nn.Sequential(layer)).measure().limits == {"0.weight": 0.7}
