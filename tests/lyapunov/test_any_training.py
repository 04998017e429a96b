"""Ways in which people train: each runs with the monitor as without it, bit for bit, and its records say what happened."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from stableopt import optim
from stableopt.lyapunov import Every, Monitor
from stableopt.lyapunov.budget import TIERS
from tests.lyapunov.training import batches, equal, make_closure, make_model, picture, seed_everything

ALL = Every(**dict.fromkeys(TIERS, 1))
Scenario = Callable[["Watch"], Any]


class Watch:
    """Hands out monitors, or nothing that watches."""

    def __init__(self, *, on: bool) -> None:
        self.on, self.monitors = on, list[Monitor]()

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> Any:
        if not self.on:
            return nullcontext()
        monitor = Monitor(model, optimizer, **{"policy": "observe", "max_overhead": None, "every": ALL, **settings})
        self.monitors.append(monitor)
        return monitor

    def observe(self, loss: Tensor) -> None:
        for monitor in self.monitors:
            monitor.observe(loss)


def watched(scenario: Scenario) -> Monitor:
    """Run a scenario without and with monitors, assert that both end alike, and return the last monitor."""
    ends = []
    for on in (False, True):
        seed_everything()
        watch = Watch(on=on)
        end = scenario(watch)
        ends.append((end, torch.get_rng_state()))
    assert equal(*ends)
    return watch.monitors[-1]


def small(inputs: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, 1))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def train(
    watch: Watch,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    closed: bool = True,
    steps: int = 4,
    after: Callable[[], Any] = lambda: None,
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor] = loss_of,
    **settings: Any,
) -> Any:
    with watch(model, optimizer, **settings):
        for batch in batches(steps):

            def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
                optimizer.zero_grad()
                value = loss(model, batch)
                value.backward()
                return value

            if closed:
                optimizer.step(closure)
            else:
                watch.observe(closure())
                optimizer.step()
            after()
    return picture(model, optimizer)


def verdicts(monitor: Monitor) -> set[str]:
    return {record.verdict for record in monitor.records}


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


# --- half precision ---


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(closed: bool, dtype: torch.dtype) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype):
            return loss_of(model, (batch[0].float(), batch[1].float()))

    def scenario(watch: Watch) -> Any:
        model = small().float()
        return train(watch, model, torch.optim.AdamW(model.parameters(), lr=0.01), closed=closed, loss=loss)

    monitor = watched(scenario)
    assert verdicts(monitor) <= ({"decreased", "undecided"} if closed else {"unobserved"})


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_is_noticed_and_logged(fused: bool) -> None:
    """An optimizer that knows scalers is called, and skips by itself; any other is not called at all."""

    def scenario(watch: Watch) -> Any:
        model = small().float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        norms = []
        with watch(model, optimizer, scaler=scaler):
            for i, (x, y) in enumerate(batches(5)):
                optimizer.zero_grad()
                loss = loss_of(model, (x.float(), y.float()))
                scaler.scale(loss * (math.inf if i in {1, 2} else 1.0)).backward()
                if i not in {1, 2}:
                    grads = torch.autograd.grad(loss_of(model, (x.float(), y.float())), list(model.parameters()))
                    norms.append(torch.stack([g.norm() for g in grads]).norm().item())
                scaler.step(optimizer)
                scaler.update()
        return picture(model, optimizer), scaler.get_scale(), norms

    found: list[Any] = []

    def noted(watch: Watch) -> Any:
        found[:] = [scenario(watch)]
        return found[0]

    monitor = watched(noted)
    norms = found[0][2]
    taken = [record for record in monitor.records if not record.nonfinite]
    assert len(taken) == 3
    assert [record.grad_norm for record in taken] == pytest.approx(norms, rel=1e-5)  # as they are without a scale
    skipped = [event for event in monitor.events if event.channel == "scaler"]
    assert "skipped about" in skipped[-1].what
    if fused:
        assert [bool(record.nonfinite) for record in monitor.records] == [False, True, True, False, False]
        assert all(record.displacement == 0.0 for record in monitor.records if record.nonfinite)
        assert [event.step for event in skipped] == [3, 4]
    else:
        assert len(monitor.records) == 3
        assert [(event.step, "about 2 steps" in event.what) for event in skipped] == [(2, True)]


def test_a_run_of_which_a_scaler_skips_every_step_is_heard_at_the_end() -> None:
    def scenario(watch: Watch) -> Any:
        model = small().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with watch(model, optimizer, scaler=scaler):
            for x, _ in batches(3):
                optimizer.zero_grad()
                scaler.scale(model(x.float()).sum() * math.nan).backward()
                scaler.step(optimizer)
                scaler.update()
        return picture(model, optimizer)

    monitor = watched(scenario)
    assert monitor.summary()["steps"] == 0
    assert ["about 3 steps" in event.what for event in monitor.events] == [True]
    assert monitor.summary()["events"] == {"scaler": 1}


# --- compilation ---


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("closed", [True, False])
def test_a_compiled_model(wrapped: bool, closed: bool) -> None:
    def scenario(watch: Watch) -> Any:
        torch._dynamo.reset()
        model = small()
        compiled: Any = torch.compile(model, backend="eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with watch(compiled if wrapped else model, optimizer):
            for x, y in batches(3):
                closure = make_closure(compiled, optimizer, x, y)
                if closed:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        return picture(model, optimizer)

    records = watched(scenario).records
    names = {name.removeprefix("_orig_mod.") for name in records[-1].grad_norms}
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not closed or all(record.hvp and math.isfinite(record.forward_exponent) for record in records), records[
        0
    ].notes


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of torch's own code
def test_a_compiled_step() -> None:
    def scenario(watch: Watch) -> Any:
        torch._dynamo.reset()
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
        step = torch.compile(lambda: optimizer.step(), backend="eager")
        with watch(model, optimizer):
            for x, y in batches(3):
                make_closure(model, optimizer, x, y)()
                step()
        return picture(model, optimizer)

    records = watched(scenario).records
    assert [record.step for record in records] == [1, 2, 3]
    assert all(record.displacement > 0 and record.lr == (pytest.approx(0.01),) for record in records)


# --- parameters of every kind ---


def test_frozen_unused_and_shared_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.frozen, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.tied = nn.Linear(6, 6)
            self.tied.weight = self.first.weight
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(torch.tanh(self.frozen(self.first(x)))).sum(1, keepdim=True) + self.empty.sum()

    def scenario(watch: Watch) -> Any:
        model = Odd()
        groups = [{"params": list(model.parameters())}, {"params": [], "lr": 7.0}]
        return train(watch, model, torch.optim.SGD(groups, lr=0.05, momentum=0.9))

    records = watched(scenario).records
    assert not verdicts(watched(scenario)) & {"unobserved", "nonfinite"}
    assert set(records[0].grad_norms) == {"first.weight", "first.bias", "tied.bias"}
    assert all(records[0].update_ratio[f"frozen.{name}"] == 0.0 for name in ("weight", "bias"))
    assert records[0].lr == (0.05, 7.0)


def test_parameters_that_the_model_does_not_have() -> None:
    def scenario(watch: Watch) -> Any:
        model, scale = small(), nn.Parameter(torch.ones(()))
        optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.05)
        return train(watch, model, optimizer, loss=lambda m, b: loss_of(m, b) * scale.exp()), scale.detach().clone()

    assert "group 0, parameter 4" in watched(scenario).records[0].grad_norms


def test_a_rate_of_zero_moves_nothing() -> None:
    def scenario(watch: Watch) -> Any:
        model = small()
        return train(watch, model, torch.optim.AdamW(model.parameters(), lr=0.0))

    for record in watched(scenario).records:
        assert record.displacement == 0.0
        assert record.verdict == "undecided"
        assert math.isnan(record.trust)
        assert math.isnan(record.batch_sharpness)
        assert math.isnan(record.edge)
        assert "every learning rate is zero" in str(record.notes)


def test_groups_with_rates_of_their_own() -> None:
    def scenario(watch: Watch) -> Any:
        model = small()
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
        return train(watch, model, torch.optim.SGD(groups, momentum=0.9))

    for record in watched(scenario).records:
        assert record.lr == (0.1, 0.01)
        assert math.isfinite(record.trust)
        assert math.isnan(record.batch_sharpness)  # 2 (1 - rho) / lr has no one lr
        assert record.edge > 0.0


def test_a_group_and_a_dtype_that_change_on_the_way() -> None:
    def scenario(watch: Watch) -> Any:
        model = small()
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.05)
        with watch(model, optimizer):
            for i, (x, y) in enumerate(batches(6)):
                if i == 2:
                    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
                if i == 4:
                    model.float()
                x, y = x.to(model[0].weight.dtype), y.to(model[0].weight.dtype)
                optimizer.step(make_closure(model, optimizer, x, y))
        return picture(model, optimizer)

    records = watched(scenario).records
    assert [len(record.update_ratio) for record in records] == [2, 2, 4, 4, 4, 4]
    assert {record.verdict for record in records} == {"decreased"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, optim.SGD], ids=["SGD", "AdamW", "ours"])
def test_parameters_of_coarse_types(dtype: torch.dtype, make: Any) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0].to(dtype)) - batch[1].to(dtype)).square().mean()

    def scenario(watch: Watch) -> Any:
        model = small().to(dtype)
        eps = {"eps": 1e-3} if make is torch.optim.AdamW else {}  # its default is zero in half precision
        return train(watch, model, make(model.parameters(), lr=0.01, **eps), loss=loss)

    for record in watched(scenario).records:
        assert record.verdict in {"decreased", "undecided", "increased"}
        assert math.isfinite(record.grad_norm)
        assert record.plain_sharpness > 0.0, record.notes


@pytest.mark.parametrize("closed", [True, False])
def test_complex_parameters(closed: bool) -> None:
    def scenario(watch: Watch) -> Any:
        model = nn.Sequential(nn.Linear(6, 4, dtype=torch.complex128), nn.Linear(4, 1, dtype=torch.complex128))

        def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
            return (m(b[0].to(torch.complex128)) - b[1]).abs().square().mean()

        return train(watch, model, torch.optim.SGD(model.parameters(), lr=0.01), loss=loss, closed=closed)

    records = watched(scenario).records
    assert all(math.isfinite(record.grad_norm) and record.slope < 0.0 for record in records)
    assert not closed or all(record.verdict == "decreased" and 0.5 < record.trust < 1.0 for record in records)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch's own code
def test_sparse_gradients(make: Any, closed: bool) -> None:
    def scenario(watch: Watch) -> Any:
        table = nn.EmbeddingBag(20, 3, sparse=True, mode="sum")
        words = torch.randint(0, 20, (8, 4), generator=torch.Generator().manual_seed(1))

        def loss(m: nn.Module, _: Any) -> Tensor:
            return (m(words).sum(1) - 1.0).square().mean()

        return train(watch, table, make(table.parameters(), lr=0.01), loss=loss, closed=closed)

    records = watched(scenario).records
    assert all(record.grad_norm > 0.0 and record.displacement > 0.0 for record in records)
    assert not closed or {record.verdict for record in records} <= {"decreased", "increased"}


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


# --- models ---


class Reader(nn.Module):
    """Words through an embedding, a recurrent and an attending layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.cell(self.words(x))[0]).mean(1))


def seeing() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.MaxPool2d(2, padding=1), nn.Flatten(), nn.LazyLinear(5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 1),
    )  # fmt: skip


@pytest.mark.parametrize("make", [Reader, seeing], ids=["reader", "seeing"])
@pytest.mark.parametrize("train_mode", [True, False])
def test_models_of_the_field(make: Callable[[], nn.Module], train_mode: bool) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = (3 * batch[0].abs()).long().clamp_max(8) if make is Reader else batch[0]
        return (model(x) - batch[1]).square().mean()

    def scenario(watch: Watch) -> Any:
        model = make().train(train_mode)
        loss(model, batches(1)[0])  # a lazy layer gets its shape
        return train(watch, model, torch.optim.AdamW(model.parameters(), lr=0.01), steps=3, loss=loss)

    for record in watched(scenario).records:
        assert record.verdict in {"decreased", "undecided", "increased"}, record.reason
        assert math.isfinite(record.plain_sharpness), record.notes
        assert math.isfinite(record.forward_exponent), record.notes
        assert record.norms


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
    import random

    import numpy as np

    torch.set_rng_state(seen["torch"])
    np.random.set_state(seen["numpy"])  # noqa: NPY002
    random.setstate(seen["python"])
