"""Trainings with a quirk: the monitor changes none of them, and its records say no more than was seen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt import optim
from stableopt.lyapunov import Every, Monitor, Policy, StepRecord
from tests.lyapunov.training import batches, equal, make_closure, picture, seed_everything

LIGHT = Every(sharpness=None, layers=None, forward=None, gaps=None)
CURVED = Every(sharpness=1, layers=None, forward=None, gaps=None)
Closure = Callable[[], Any]
Observe = Callable[[Any], None]
Scenario = Callable[[Observe], tuple[nn.Module, torch.optim.Optimizer, Closure]]

watch = functools.partial(Monitor, max_overhead=None, every=LIGHT, policy="observe")


def alike(scenario: Scenario, *, versions: bool = True, steps: int = 4, **settings: Any) -> list[StepRecord]:
    """Run without and with a monitor, assert that both end alike, and return the records."""
    ends, monitors = list[Any](), list[Monitor]()

    def observe(loss: Any) -> None:
        for monitor in monitors:
            monitor.observe(loss)

    for on in (False, True):
        seed_everything()
        model, optimizer, step = scenario(observe)
        if on:
            monitors.append(watch(model, optimizer, **settings))
        with monitors[0] if on else nullcontext():
            for _ in range(steps):
                step()
        end = picture(model, optimizer)
        ends.append(end if versions else end | {"versions": None})
    assert equal(*ends)
    assert monitors[0].summary()["steps"] == steps
    return list(monitors[0].records)


class Descent(torch.optim.Optimizer):
    """Gradient descent as others write it, with a quirk."""

    def __init__(self, model: nn.Module, quirk: str = "", **defaults: Any) -> None:
        super().__init__(model.parameters(), defaults)
        self.quirk = quirk

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step, with learning rate 0.1."""
        loss = closure
        if callable(closure):
            with torch.enable_grad():
                loss = closure()
        parameters = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        if self.quirk == "sharpness-aware":
            away = [0.2 * p.grad for p in parameters]
            torch._foreach_add_(parameters, away)
            with torch.enable_grad():
                closure()
            torch._foreach_sub_(parameters, away)
        for p in parameters:
            p.sub_(0.1 * p.grad)
            if self.quirk == "frees gradients":
                p.grad = None
        return loss


def regression(size: int = 8) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a model and a batch: the loss is a parabola, with the same curvature everywhere."""
    x, y = batches(1, size)[0]
    return nn.Linear(6, 1), x, y


def by_closure(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Closure:
    return lambda: optimizer.step(make_closure(model, optimizer, x, y))


def by_observe(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, observe: Observe) -> Closure:
    """Return a step whose loss is told before its ``backward``."""

    def step() -> None:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        observe(loss)
        loss.backward()
        optimizer.step()

    return step


# --- models ---


def test_batch_statistics_that_are_nan_do_not_break_the_graph_of_a_loss_that_is_told() -> None:
    def scenario(observe: Observe) -> Any:
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model[1].running_mean.fill_(math.nan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, by_observe(model, optimizer, *batches(1)[0], observe)

    for record in alike(scenario, every=CURVED):
        assert record.hvp == "graph"
        assert record.plain_sharpness > 0.0
        assert record.nonfinite == ("buffer:1.running_mean",)


def test_a_discriminator_whose_closure_runs_the_generator_of_which_a_graph_is_kept() -> None:
    def scenario(_: Observe) -> Any:
        generator = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6))
        discriminator = nn.Linear(6, 1)
        first, second = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (discriminator, generator))
        x, _y = batches(1)[0]

        def closure() -> Tensor:
            first.zero_grad()
            loss = (discriminator(x) - 1).square().mean() + discriminator(generator(x).detach()).square().mean()
            loss.backward()
            return loss

        def step() -> None:
            fake = generator(x)
            first.step(closure)
            second.zero_grad()
            (discriminator(fake) - 1).square().mean().backward()
            second.step()

        return nn.ModuleList([generator, discriminator]), first, step

    assert {record.verdict for record in alike(scenario)} == {"decreased"}


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("parameter", torch.int8), ("parameter", torch.float8_e4m3fn), ("buffer", torch.float8_e4m3fn)],
    ids=str,
)
def test_frozen_numbers_of_one_byte(kind: str, dtype: torch.dtype, closed: bool) -> None:
    def scenario(observe: Observe) -> Any:
        model, x, y = regression()
        code = torch.ones(3).to(dtype)
        if kind == "buffer":
            model.register_buffer("code", code)
        else:
            model.register_parameter("code", nn.Parameter(code, requires_grad=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        step = by_closure(model, optimizer, x, y) if closed else by_observe(model, optimizer, x, y, observe)
        return model, optimizer, step

    for record in alike(scenario):
        assert record.verdict in (
            {"decreased", "undecided"} if closed else {"unobserved"}
        )  # the tolerance is of 8 bits
        assert set(record.update_ratio) == {"weight", "bias"}
        assert not record.notes


def test_a_sparse_buffer() -> None:
    def scenario(_: Observe) -> Any:
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model.register_buffer("neighbors", torch.eye(8).to_sparse())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return model, optimizer, by_closure(model, optimizer, *batches(1)[0])

    assert {record.verdict for record in alike(scenario)} == {"decreased"}


def test_a_sparse_parameter() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(6).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.weight, x.T).T

    def scenario(_: Observe) -> Any:
        model = Mixing()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return model, optimizer, by_closure(model, optimizer, *batches(1)[0])

    assert all(record.loss_after < record.loss for record in alike(scenario, versions=False))


@pytest.mark.parametrize("rows", [3, 1])
def test_parameters_that_are_cut_through_data_between_two_steps(rows: int) -> None:
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = batches(1)[0][0]
    with watch(model, optimizer) as monitor:
        optimizer.step(make_closure(model, optimizer, x, torch.ones(())))
        optimizer.zero_grad()
        model.weight.data, model.bias.data = model.weight.data[:rows], model.bias.data[:rows]
        start = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer.step(make_closure(model, optimizer, x, torch.ones(())))
    record = monitor.last
    moved = float((nn.utils.parameters_to_vector(model.parameters()).detach() - start).norm())
    assert record.displacement == pytest.approx(moved, rel=1e-12)
    assert record.slope == pytest.approx(-(moved**2) / 0.1, rel=1e-12)
    assert record.verdict == "decreased"


# --- optimizers ---


@pytest.mark.parametrize("defaults", [{"lr": None}, {}], ids=["lr None", "no lr"])
def test_an_optimizer_without_a_learning_rate(defaults: dict[str, Any]) -> None:
    def scenario(_: Observe) -> Any:
        model, x, y = regression()
        optimizer = Descent(model, **defaults)
        return model, optimizer, by_closure(model, optimizer, x, y)

    for record in alike(scenario):
        assert record.verdict == "decreased"
        assert math.isfinite(record.trust)
        assert math.isnan(record.batch_sharpness)
        assert [math.isnan(lr) for lr in record.lr] == [True]


def test_an_optimizer_whose_first_argument_is_a_loss() -> None:
    def scenario(_: Observe) -> Any:
        model, x, y = regression()
        optimizer = Descent(model, lr=0.1)

        def step() -> None:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            assert optimizer.step(loss) is loss

        return model, optimizer, step

    assert {record.verdict for record in alike(scenario)} == {"unobserved"}


@pytest.mark.parametrize("way", ["frees gradients", "hook", "hook in place"])
def test_gradients_that_are_gone_after_the_step(way: str) -> None:
    """Displacement and energies are those of the same run whose gradients stay."""

    def scenario(_: Observe, quirk: str = way) -> Any:
        model, x, y = regression()
        heavy = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        optimizer = Descent(model, quirk, lr=0.1) if way == "frees gradients" else heavy
        if quirk.startswith("hook"):
            optimizer.register_step_post_hook(lambda o, *_: o.zero_grad(set_to_none=quirk == "hook"))
        return model, optimizer, by_closure(model, optimizer, x, y)

    plain = alike(functools.partial(scenario, quirk=""))
    found = alike(scenario)
    for a, b in zip(plain, found, strict=True):
        assert b.displacement == a.displacement > 0.0
        assert b.update_ratio == a.update_ratio
        assert (b.energy_before, b.energy_after, b.verdict) == (a.energy_before, a.energy_after, "decreased")
        assert math.isnan(b.slope)
        assert math.isnan(b.grad_norm)
        assert math.isnan(b.trust)
        assert "gradients" in " ".join(b.notes)


@pytest.mark.parametrize("way", ["LBFGS", "sharpness-aware"])
def test_gradients_of_a_second_evaluation_have_no_slope(way: str) -> None:
    def scenario(_: Observe) -> Any:
        model, x, y = regression()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3) if way == "LBFGS" else Descent(model, way, lr=0.1)
        return model, optimizer, by_closure(model, optimizer, x, y)

    for record in alike(scenario, steps=2):
        assert record.verdict == "decreased"
        assert record.displacement > 0.0
        assert all(map(math.isnan, (record.slope, record.grad_norm, record.trust)))
        assert record.grad_norms == {}
        assert "gradients" in " ".join(record.notes)


def test_a_lazy_guard_has_losses_of_the_step_before_and_no_trust() -> None:
    def scenario(_: Observe) -> Any:
        model, x, y = regression()
        optimizer = optim.SGD(model.parameters(), lr=0.01, guard="lazy")
        return model, optimizer, by_closure(model, optimizer, x, y)

    records = alike(scenario)
    assert all(record.slope < 0.0 for record in records)
    assert all(map(math.isnan, (record.trust for record in records)))
    assert all(map(math.isnan, (record.batch_sharpness for record in records)))


# --- closures ---


def flat_gradients() -> Any:
    model, x, y = regression()
    flat = torch.zeros(7)
    model.weight.grad, model.bias.grad = flat[:6].view(1, 6), flat[6:]

    def closure() -> Tensor:
        flat.zero_()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return model, closure


def clamped() -> Any:
    model, x, y = regression()

    def closure() -> Tensor:
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.1, 0.1)
        model.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return model, closure


@pytest.mark.parametrize("make", [flat_gradients, clamped])
def test_a_closure_that_moves_more_than_its_gradients_is_evaluated_once(make: Any) -> None:
    calls = [0]

    def scenario(_: Observe) -> Any:
        model, closure = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        calls[0] = 0

        def counted() -> Tensor:
            calls[0] += 1
            return closure()

        return model, optimizer, lambda: optimizer.step(counted)

    for record in alike(scenario, versions=False):
        assert record.verdict == "unobserved"
        assert "changes parameters, or gradients other than by zero_grad" in record.reason
        assert math.isfinite(record.displacement)
    assert calls[0] == 5  # one check at the first step, none later


def test_a_closure_that_returns_a_tuple_where_steps_are_refused() -> None:
    def scenario(_: Observe) -> Any:
        model, x, y = regression()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        closure = make_closure(model, optimizer, x, y)
        return model, optimizer, lambda: optimizer.step(lambda: (closure(), 1))  # type: ignore[arg-type]

    for record in alike(scenario, policy=Policy(nonfinite="skip")):
        assert record.verdict == "unobserved"
        assert "one real number" in record.reason


def test_a_closure_that_returns_a_loss_from_before_is_not_compared() -> None:
    def scenario(_: Observe) -> Any:
        model, x, y = regression()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def step() -> None:
            loss = make_closure(model, optimizer, x, y)()
            optimizer.step(lambda: loss)

        return model, optimizer, step

    for record in alike(scenario):
        assert record.verdict == "unobserved"
        assert "computes nothing" in record.reason
        assert math.isnan(record.trust)
