"""Optimizers of other packages under the guard: tested where those packages are installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stableopt.constraints import Box
from stableopt.optim import GuardedOptimizer, guard
from tests.optim.problems import closure_of, quadratic
from tests.optim.test_snapshot import frozen, same

NAMES = ["Lion", "AdaBelief", "Lamb", "StableAdamW", "Prodigy", "SOAP", "Adan"]
FREE = ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def make(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    if name in FREE:
        optimizer = getattr(pytest.importorskip("schedulefree"), name)(params, **options)
        optimizer.train()
        return optimizer
    return getattr(pytest.importorskip("pytorch_optimizer"), name)(params, **options)


def tanh_net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).float()
    return model, torch.randn(64, 8, dtype=torch.float32), torch.randint(3, (64,))


def net_closure(optimizer: torch.optim.Optimizer, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("mode", ["strict", "backtrack", "lazy"])
@pytest.mark.parametrize("lr", [1e-2, 30.0])
@pytest.mark.parametrize("name", NAMES + FREE)
def test_a_net_learns_at_a_good_and_at_an_absurd_rate(name: str, lr: float, mode: str) -> None:
    model, x, y = tanh_net()
    optimizer = guard(make(name, model.parameters(), lr=lr), guard=mode)
    assert isinstance(optimizer, GuardedOptimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    closure = net_closure(optimizer, model, x, y)
    with torch.no_grad():
        start = float(F.cross_entropy(model(x), y))
    for _ in range(60):
        optimizer.step(closure)
        report = optimizer.last_step
        if mode == "strict":
            assert report.energy_after <= report.energy_before + report.tolerance
    with torch.no_grad():
        end = float(F.cross_entropy(model(x), y))
    assert end < start if mode == "strict" else end < start + 0.1


@pytest.mark.parametrize("mode", ["off", "monitor", "strict"])
@pytest.mark.parametrize("name", NAMES + FREE)
def test_where_every_step_passes_the_run_is_that_of_the_optimizer_behind(name: str, mode: str) -> None:
    runs = []
    for guarded in (False, True):
        model, x, y = tanh_net()
        optimizer = make(name, model.parameters(), lr=1e-4)
        if guarded:
            optimizer = guard(optimizer, guard=mode)
        for _ in range(8):
            optimizer.step(net_closure(optimizer, model, x, y))
            if guarded and mode == "strict" and optimizer.last_step.action != "accepted":
                pytest.skip("a step was refused")
        state = [frozen(s) for s in optimizer.state_dict()["state"].values()]
        runs.append(([p.detach().clone() for p in model.parameters()], state))
    assert same(runs[0], runs[1])


@pytest.mark.parametrize("name", NAMES + FREE)
@pytest.mark.parametrize("before", [0, 4])
def test_an_undone_step_leaves_nothing_behind(name: str, before: int) -> None:
    """After a step that is refused whatever its length, training goes on exactly as without it."""
    runs = []
    for interrupted in (False, True):
        model, x, y = tanh_net()
        optimizer = guard(make(name, model.parameters(), lr=1e-3), guard="strict")
        closure = net_closure(optimizer, model, x, y)
        for _ in range(before):
            optimizer.step(closure)
        if interrupted:
            anchor = [p.detach().clone() for p in model.parameters()]

            def wall(closure: Any = closure, model: Any = model, anchor: Any = anchor) -> torch.Tensor:
                loss = closure()
                moved = not all(map(torch.equal, [p.detach() for p in model.parameters()], anchor))
                return loss + 1000.0 * moved

            optimizer.step(wall)
            if optimizer.last_step.action != "undone" and optimizer.last_step.displacement == 0.0:
                pytest.skip("no try has moved the weights by a unit in the last place")
            assert optimizer.last_step.action == "undone", optimizer.last_step
            assert all(map(torch.equal, [p.detach() for p in model.parameters()], anchor))
        for group in optimizer.param_groups:
            group["step_scale"] = 1.0
        for _ in range(3):
            optimizer.step(closure)
        groups = [{k: v for k, v in g.items() if k not in {"params", "step_count"}} for g in optimizer.param_groups]
        runs.append(([p.detach().clone() for p in model.parameters()], frozen(groups)))
    assert same(runs[0], runs[1])


@pytest.mark.parametrize("name", NAMES + FREE)
def test_parameters_stay_in_their_set(name: str) -> None:
    model, x, y = tanh_net()
    optimizer = guard(make(name, model.parameters(), lr=0.1), guard="strict", constraint=Box(-0.2, 0.2))
    for _ in range(10):
        optimizer.step(net_closure(optimizer, model, x, y))
        assert all(float(p.detach().abs().max()) <= 0.2 for p in model.parameters())


@pytest.mark.parametrize("name", NAMES + FREE)
def test_checkpoints_go_into_the_optimizer_behind_and_back(name: str) -> None:
    model, x, y = tanh_net()
    optimizer = guard(make(name, model.parameters(), lr=1e-3), guard="strict")
    for _ in range(3):
        optimizer.step(net_closure(optimizer, model, x, y))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    ends = []
    for wrapped in (False, True):
        other, x, y = tanh_net()
        other.load_state_dict(weights)
        second = make(name, other.parameters(), lr=0.5)
        if wrapped:
            second = guard(second, guard="off")
        second.load_state_dict(copy.deepcopy(saved))
        if wrapped:
            second.param_groups[0]["guard"] = "off"
        for _ in range(3):
            second.step(net_closure(second, other, x, y))
        ends.append([p.detach() for p in other.parameters()])
    assert same(*ends)


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_modes_go_through(name: str) -> None:
    w, f, _ = quadratic()
    optimizer = guard(make(name, [w], lr=0.1), guard="strict")
    for _ in range(12):  # the first ones of RAdam do not move
        optimizer.step(closure_of(optimizer, w, f))
    y = w.detach().clone()
    optimizer.eval()
    assert not torch.equal(w.detach(), y)
    optimizer.train()
    torch.testing.assert_close(w.detach(), y)
    optimizer.step(closure_of(optimizer, w, f))
    assert optimizer.last_step.verdict in {"decreased", "undecided"}


@pytest.mark.parametrize("name", NAMES)
def test_a_class_may_be_guarded_as_well(name: str) -> None:
    cls = getattr(pytest.importorskip("pytorch_optimizer"), name)
    model, x, y = tanh_net()
    optimizer = guard(cls)(model.parameters(), lr=1e-3, guard="strict")
    for _ in range(3):
        optimizer.step(net_closure(optimizer, model, x, y))
    assert optimizer.last_step.step == 2
    twin = copy.deepcopy(optimizer)
    assert type(twin) is type(optimizer)
