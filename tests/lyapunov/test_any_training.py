"""Ways in which people train: each runs with the monitor as without it, bit for bit, and its records say what happened."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from stableopt import optim
from stableopt.lyapunov import Every, Monitor
from tests.lyapunov.training import batches, make_closure, make_model, picture, seed_everything
from tests.lyapunov.watched import Watch, loss_of, small, train, verdicts, watched

# --- loops ---


def test_with_and_without_a_closure_the_same_is_measured_but_for_the_comparison() -> None:
    found = []
    for closed in (True, False):

        def scenario(watch: Watch, closed: bool = closed) -> Any:
            model = small()
            return train(watch, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), closed=closed)

        found.append(watched(scenario).records)
    for a, b in zip(*found, strict=True):
        assert (a.loss, a.grad_norm, a.weight_norm, a.slope) == (b.loss, b.grad_norm, b.weight_norm, b.slope)
        assert (a.norms, a.update_ratio, a.displacement) == (b.norms, b.update_ratio, b.displacement)
        assert a.verdict != b.verdict == "unobserved"
        assert math.isfinite(a.trust)
        assert math.isnan(b.trust)


def test_attached_and_closed_in_the_middle_of_a_run() -> None:
    def scenario(watch: Watch) -> Any:
        model = small()
        optimizer = optim.SGD(model.parameters(), lr=0.1, guard="strict")
        monitor = watch(model, optimizer)
        for i, (x, y) in enumerate(batches(6)):
            if watch.on and i == 2:
                assert monitor.attach() is monitor.attach()
            if watch.on and i == 5:
                monitor.close()
            optimizer.step(make_closure(model, optimizer, x, y))
        return picture(model, optimizer)

    assert [record.step for record in watched(scenario).records] == [1, 2, 3]


@pytest.mark.parametrize("clip", [False, True])
def test_gradients_are_accumulated_over_micro_batches(clip: bool) -> None:
    def scenario(watch: Watch) -> Any:
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer):
            for i, batch in enumerate(batches(6)):
                (loss_of(model, batch) / 2).backward()
                if i % 2:
                    if clip:
                        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        return picture(model, optimizer)

    records = watched(scenario).records
    assert [record.step for record in records] == [1, 2, 3]
    assert not clip or all(record.grad_norm == pytest.approx(0.5, rel=1e-5) for record in records)
    assert all(record.slope == pytest.approx(-0.1 * record.grad_norm**2) for record in records)


def test_evaluation_between_steps_and_a_model_in_evaluation_mode() -> None:
    def scenario(watch: Watch) -> Any:
        model = make_model().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        seen = []

        def evaluate() -> None:
            with torch.inference_mode():
                seen.append(model(batches(1)[0][0]).sum().item())

        return train(watch, model, optimizer, after=evaluate), seen

    assert not verdicts(watched(scenario)) & {"unobserved", "nonfinite"}


def test_a_generator_of_its_own_and_deterministic_algorithms() -> None:
    def scenario(watch: Watch) -> Any:
        model, generator = small(), torch.Generator().manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer):
            for _ in range(4):
                x = torch.randn(8, 6, generator=generator)
                optimizer.step(make_closure(model, optimizer, x, x.sum(1, keepdim=True)))
        return picture(model, optimizer), generator.get_state()

    torch.use_deterministic_algorithms(mode=True)
    try:
        watched(scenario)
    finally:
        torch.use_deterministic_algorithms(mode=False)


# --- several of everything ---


def test_two_optimizers_on_one_model_each_with_its_monitor() -> None:
    both: list[Monitor] = []

    def scenario(watch: Watch) -> Any:
        model = small()
        first = torch.optim.SGD(model[0].parameters(), lr=0.05)
        second = optim.AdamW(model[2].parameters(), lr=0.01)
        with watch(model, first), watch(model, second):
            for x, y in batches(4):
                for optimizer in (first, second):
                    optimizer.step(make_closure(model, optimizer, x, y))
        both[:] = watch.monitors
        return picture(model, first), second.state_dict()

    watched(scenario)
    assert [set(m.last.update_ratio) for m in both if m.last] == [{"0.weight", "0.bias"}, {"2.weight", "2.bias"}]
    assert [m.summary()["steps"] for m in both] == [4, 4]


def test_two_players() -> None:
    """A generator and a discriminator: neither loss is a loss of the other's parameters alone."""

    def scenario(watch: Watch) -> Any:
        maker, judge = nn.Linear(6, 6), small()
        a, b = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (maker, judge))
        with watch(judge, b), watch(maker, a):
            for x, y in batches(4):
                b.zero_grad()
                (judge(x).square().mean() + (judge(maker(y.expand(-1, 6)).detach()) - 1).square().mean()).backward()
                b.step()
                a.zero_grad()
                judge(maker(y.expand(-1, 6))).square().mean().backward()
                a.step()
        return picture(maker, a), picture(judge, b)

    assert all(record.slope < 0.0 for record in watched(scenario).records)


def test_an_optimizer_for_each_parameter_that_steps_within_backward() -> None:
    def scenario(watch: Watch) -> Any:
        model = small()
        optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}

        def step(p: Tensor) -> None:
            optimizers[p].step()  # type: ignore[index]
            optimizers[p].zero_grad()  # type: ignore[index]

        for p in optimizers:
            p.register_post_accumulate_grad_hook(step)
        with watch(model, optimizers[model[2].weight]):
            for batch in batches(4):
                loss_of(model, batch).backward()
        return [p.detach().clone() for p in model.parameters()]

    records = watched(scenario).records
    assert [set(record.grad_norms) for record in records] == [{"2.weight"}] * 4


def test_averages_of_the_weights() -> None:
    def scenario(watch: Watch) -> Any:
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        rates = swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)

        def after() -> None:
            average.update_parameters(model)
            rates.step()

        end = train(watch, model, optimizer, after=after)
        swa_utils.update_bn([x for x, _ in batches(2)], average)
        return end, average.state_dict()

    assert verdicts(watched(scenario)) == {"decreased"}


# --- schedulers ---


def in_turn(o: Any) -> lr_scheduler.SequentialLR:
    parts = [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)]
    return lr_scheduler.SequentialLR(o, parts, milestones=[3])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": in_turn,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rate_of_each_step_is_recorded_whatever_sets_it(name: str) -> None:
    rates: list[tuple[float, ...]] = []

    def scenario(watch: Watch) -> Any:
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        rates.clear()

        def after() -> None:
            rates.append(tuple(float(group["lr"]) for group in optimizer.param_groups))
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))

        return train(watch, model, optimizer, steps=6, after=after, every=Every(layers=None)), rates[:]

    monitor = watched(scenario)
    assert [record.lr for record in monitor.records] == rates
    assert len(set(rates)) > 1
    assert not verdicts(monitor) & {"unobserved", "nonfinite"}


# --- checkpoints ---


MAKES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
    "SGD strict": lambda p: optim.SGD(p, lr=0.3, momentum=0.9, guard="strict"),
    "SGD monitor": lambda p: optim.SGD(p, lr=0.02, momentum=0.9, guard="monitor"),
}


@pytest.mark.parametrize(
    ("name", "probe"),
    [
        ("AdamW", False), ("SGD strict", True), ("SGD monitor", True),
        *(pytest.param(*way, marks=pytest.mark.slow) for way in (("AdamW", True), ("SGD strict", False), ("SGD monitor", False))),
    ],
)  # fmt: skip
def test_a_resumed_record_is_that_of_the_uninterrupted_run_line_by_line(name: str, probe: bool, tmp_path: Any) -> None:
    data, cut = batches(12), 5

    def begin(folder: str) -> tuple[nn.Module, torch.optim.Optimizer, Monitor]:
        seed_everything()
        model = make_model()
        optimizer = MAKES[name](model.parameters())
        x, y = batches(1)[0]
        fixed = [lambda: (model(x) - y).square().mean(), lambda: (model(2 * x) - y).square().mean()] if probe else None
        every = Every(vitals=1, energy=2, sharpness=3, layers=2, forward=3, gaps=4)
        monitor = Monitor(
            model, optimizer, tmp_path / folder, every=every, probe=fixed, max_overhead=None, policy="observe"
        )
        return model, optimizer, monitor

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, part: Any) -> None:
        for x, y in part:
            optimizer.step(make_closure(model, optimizer, x, y))

    model, optimizer, monitor = begin("whole")
    with monitor:
        go(model, optimizer, data)
    model, optimizer, monitor = begin("parts")
    with monitor:
        go(model, optimizer, data[:cut])
        things = (model, optimizer, monitor)
        torch.save([copy.deepcopy(thing.state_dict()) for thing in things], tmp_path / "checkpoint")
        generators = picture(model, optimizer)
        go(model, optimizer, data[cut:9])  # lost
    model, optimizer, monitor = begin("parts")
    for thing, state in zip((model, optimizer, monitor), torch.load(tmp_path / "checkpoint"), strict=True):
        thing.load_state_dict(state)
    put_back(generators)
    with monitor:
        go(model, optimizer, data[cut:])
    lines = [(tmp_path / folder / "energy.jsonl").read_text().splitlines() for folder in ("whole", "parts")]
    assert len(lines[0]) == len(data)
    for a, b in zip(*lines, strict=True):
        assert a == b


def put_back(seen: dict[str, Any]) -> None:
    torch.set_rng_state(seen["torch"])
    np.random.set_state(seen["numpy"])  # noqa: NPY002
    random.setstate(seen["python"])
