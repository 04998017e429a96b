"""Alarms and policies through the monitor, on real optimizers; and memory that does not grow with the run."""

from __future__ import annotations

import gc
import math
import tracemalloc
import warnings

import pytest
import torch
from torch import nn

from stableopt import optim
from stableopt.errors import StabilityError
from stableopt.lyapunov import Alarms, Every, Monitor, NonFinite, Policy, read_records

LIGHT = Every(sharpness=None, layers=None, forward=None, gaps=None)


def make(kind=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
    return model, kind(model.parameters(), **({"lr": 0.05} | options))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(16, 4, generator=generator)
        yield x, x.prod(1, keepdim=True)


def step(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure)


def bits(model, optimizer):
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    kept = [
        v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")
    ]  # a count of forward passes
    return [t.detach().clone() for t in (*kept, *state)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_batch_that_is_not_finite_is_named_at_once_and_recorded(tmp_path):
    model, optimizer = make()
    with Monitor(model, optimizer, tmp_path, every=LIGHT, max_overhead=None) as monitor:
        for k, (x, y) in enumerate(batches(6), start=1):
            if k == 4:
                x[0] = math.nan
                with pytest.warns(RuntimeWarning, match="nonfinite"):
                    step(model, optimizer, x, y)
            else:
                step(model, optimizer, x, y)
    (event, *_) = monitor.events
    assert (event.step, event.kind, event.channel, event.action, event.since) == (4, "alarm", "nonfinite", "warn", 4)
    record = read_records(tmp_path / "energy.jsonl")[3]
    assert record.events[0] == event or math.isnan(event.threshold)
    assert "loss" in record.nonfinite
    assert {name.partition(":")[0] for name in record.nonfinite} == {"loss", "grad", "param", "buffer"}
    assert record.verdict == "nonfinite"
    assert monitor.summary()["events"] == {"nonfinite": 1}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, optim.AdamW])
@pytest.mark.parametrize("max_overhead", [None, 1e-9])
def test_a_skipped_step_changes_nothing_also_where_nothing_is_due(kind, max_overhead):
    model, optimizer = make(kind)
    with (
        warnings.catch_warnings(action="ignore"),
        Monitor(model, optimizer, every=LIGHT, max_overhead=max_overhead, policy=Policy(nonfinite="skip")) as monitor,
    ):
        for k, (x, y) in enumerate(batches(300 if max_overhead else 12), start=1):
            if k % 6 == 0:
                x[0] = math.inf
                before = bits(model, optimizer)
                step(model, optimizer, x, y)
                assert same(bits(model, optimizer)[: len(before)], before)
                assert monitor.events[-1].step == k
            else:
                step(model, optimizer, x, y)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_raise_comes_after_the_record(tmp_path):
    model, optimizer = make()
    monitor = Monitor(model, optimizer, tmp_path, max_overhead=None, policy=Policy(nonfinite="raise"))
    with monitor, warnings.catch_warnings(action="ignore"):
        for k, (x, y) in enumerate(batches(3), start=1):
            if k == 3:
                x[:] = math.nan
                with pytest.raises(StabilityError, match="nonfinite"):
                    step(model, optimizer, x, y)
            else:
                step(model, optimizer, x, y)
        step(model, optimizer, x, y)  # within the cool-down; the hooks are in order
    assert [record.step for record in read_records(tmp_path / "energy.jsonl")] == [1, 2, 3, 4]


def test_a_rollback_takes_model_optimizer_and_scheduler_back():
    model, optimizer = make(torch.optim.SGD, momentum=0.9, lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    told: list[int] = []
    policy = Policy(nonfinite="rollback", snapshot_every=10, margin=5, snapshots=3)
    kept = {}
    with (
        warnings.catch_warnings(action="ignore"),
        Monitor(
            model, optimizer, every=LIGHT, max_overhead=None, policy=policy, also=[scheduler], on_rollback=told.append
        ) as monitor,
    ):
        for k, (x, y) in enumerate(batches(40), start=1):
            kept[k] = bits(model, optimizer)
            if k == 37:
                x[0] = math.nan
            step(model, optimizer, x, y)
            scheduler.step()
            if k == 37:
                break
    assert told == [31]
    assert same(bits(model, optimizer), kept[31])
    assert next(event.action for event in monitor.events if event.kind == "action") == "rollback"
    assert optimizer.param_groups[0]["lr"] == 0.02  # the factor is applied within steps


def test_a_shrinking_multiplies_what_the_scheduler_sets():
    model, optimizer = make(lr=0.1)
    seen = []
    monitor = Monitor(model, optimizer, every=LIGHT, max_overhead=None, policy=Policy(nonfinite="shrink", cooldown=3))
    with monitor, warnings.catch_warnings(action="ignore"):
        for k, (x, y) in enumerate(batches(6), start=1):
            optimizer.param_groups[0]["lr"] = 0.1 / k
            if k == 2:
                x[0] = math.nan
            step(model, optimizer, x, y)
            seen.append(monitor.last.lr[0])
            assert optimizer.param_groups[0]["lr"] == 0.1 / k
    assert seen == pytest.approx([0.1, 0.05, 0.1 / 6, 0.1 / 8, 0.1 / 10, 0.1 / 12])


def test_a_closure_that_raises_leaves_the_learning_rate_of_the_scheduler():
    model, optimizer = make(lr=0.1)
    monitor = Monitor(model, optimizer, every=LIGHT, max_overhead=None, policy=Policy(nonfinite="shrink"))
    with monitor, warnings.catch_warnings(action="ignore"):
        x, y = next(batches(1))
        step(model, optimizer, x * math.nan, y)
        torch.manual_seed(0)
        step(model, optimizer, x, y)
        assert monitor.last.lr == (0.05,)
        with pytest.raises(KeyError):
            optimizer.step(lambda: {}["no batch"])
        assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1


def test_a_hundred_times_the_learning_rate_is_heard_within_five_steps():
    model, optimizer = make(lr=0.02, momentum=0.9)
    with Monitor(model, optimizer, every=LIGHT, max_overhead=None, policy="observe") as monitor:
        for k, (x, y) in enumerate(batches(150), start=1):
            if k == 121:
                assert not monitor.events
                optimizer.param_groups[0]["lr"] *= 100
            step(model, optimizer, x, y)
    assert monitor.events
    assert monitor.events[0].step <= 126
    assert "since step" in str(monitor.events[0])


def test_channels_of_ones_own_and_a_maximized_objective():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, maximize=True)

    def closure():
        optimizer.zero_grad()
        gain = -(model(torch.ones(4, 2)) - 3).square().mean()
        gain.backward()
        return gain

    with Monitor(model, optimizer, alarms=Alarms([NonFinite()]), max_overhead=None) as monitor:
        for _ in range(100):
            optimizer.step(closure)
    assert not monitor.events
    with Monitor(model, optimizer, max_overhead=None, every=LIGHT) as monitor:  # rises towards 0: no alarm
        for _ in range(100):
            optimizer.step(closure)
    assert not monitor.events


@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(tmp_path):
    model, optimizer = nn.Linear(2, 1), None
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(4, 2)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with Monitor(model, optimizer, tmp_path, every=Every(vitals=50, energy=50), keep=20, max_overhead=None) as monitor:
        sizes = []
        tracemalloc.start()
        for _block in range(3):
            for _ in range(700):
                optimizer.step(closure)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert sizes[2] - sizes[1] < 20_000
    assert len(monitor.records) == 20
    assert monitor.summary()["steps"] == 2100


@pytest.mark.parametrize(
    "bad",
    [
        {"max_overhead": 0.0},
        {"max_overhead": -1},
        {"max_overhead": math.nan},
        {"max_overhead": "low"},
        {"policy": "panic"},
    ],
)
def test_what_makes_no_sense_is_refused(bad):
    model, optimizer = make()
    with pytest.raises((ValueError, TypeError), match=r"max_overhead|panic"):
        Monitor(model, optimizer, **bad)
