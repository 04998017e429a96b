"""Factors on learning rates leave no trace, and a gradient scaler never runs a closure whose gradients it has not unscaled."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stableopt.constraints import Box
from stableopt.optim import SGD, AdamW, guard
from stableopt.optim.callers import refuse_closure_of_scaler
from stableopt.optim.scaling import scaled
from tests.optim.problems import Network, closure_of, quadratic

ALL = [(SGD, {"momentum": 0.9}), (AdamW, {}), (AdamW, {"fused": True}), (guard(torch.optim.Adagrad), {})]


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("fails", [False, True])
def test_after_scaling_the_very_same_objects_are_back(scale: float, fails: bool) -> None:
    tensor = torch.tensor(0.5)
    groups: list[dict[str, Any]] = [{"lr": 0.1}, {"lr": tensor}, {}, {"lr": None}]

    def use() -> None:
        assert [float(g["lr"]) for g in groups[:2]] == [0.1 * scale, 0.5 * scale]
        if fails:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), scaled(groups, scale):
        use()
    assert groups[0]["lr"] == 0.1
    assert groups[1]["lr"] is tensor
    assert tensor.item() == 0.5
    assert groups[2:] == [{}, {"lr": None}]


def test_nested_factors_multiply() -> None:
    group = {"lr": 1.0}
    with scaled([group], 0.5), scaled([group], 0.5):
        assert group["lr"] == 0.25
    assert group["lr"] == 1.0


def train(optimizer: Any, w: nn.Parameter, f: Any, scaler: Any, steps: int = 15) -> list[Any]:
    reports = []
    for _ in range(steps):
        optimizer.zero_grad()
        scaler.scale(f(w)).backward()
        scaler.step(optimizer, trial=lambda: f(w))
        scaler.update()
        reports.append(optimizer.last_step)
    return reports


@pytest.mark.parametrize(("cls", "options"), ALL)
@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_with_a_trial_gives_the_steps_of_a_closure(cls: type, options: dict, enabled: bool) -> None:
    """The scale is a power of two: gradients are unscaled exactly, so that parameters agree bit for bit."""
    w, f, _ = quadratic()
    optimizer = cls([w], lr=0.5, guard="strict", **options)
    reports = train(optimizer, w, f, torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled))
    v, _, _ = quadratic()
    other = cls([v], lr=0.5, guard="strict", **options)
    for report in reports:
        other.step(closure_of(other, v, f))
        mine = other.last_step
        assert (mine.action, mine.scale, mine.trials) == (report.action, report.scale, report.trials)
        assert (mine.energy_before, mine.energy_after) == (report.energy_before, report.energy_after)
    assert torch.equal(v.detach(), w.detach())
    assert {r.verdict for r in reports} <= {"decreased", "undecided"}


@pytest.mark.parametrize(("cls", "options"), ALL)
@pytest.mark.parametrize("mode", ["off", "monitor", "lazy", "strict"])
def test_infinite_gradients_are_skipped_by_the_scaler_and_the_next_step_is_right(
    cls: type, options: dict, mode: str
) -> None:
    w, f, _ = quadratic()
    optimizer = cls([w], lr=0.01, guard=mode, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    train(optimizer, w, f, scaler, 2)
    value, count = w.detach().clone(), optimizer.param_groups[0]["step_count"]
    optimizer.zero_grad()
    scaler.scale(f(w)).backward()
    w.grad[0] = math.inf
    scaler.step(optimizer, trial=lambda: f(w))
    scaler.update()
    assert torch.equal(w.detach(), value)
    assert optimizer.param_groups[0]["step_count"] in {count, count + 1}
    assert scaler.get_scale() == 2.0**9
    train(optimizer, w, f, scaler, 1)
    assert not torch.equal(w.detach(), value)
    assert bool(w.detach().isfinite().all())


@pytest.mark.parametrize(("cls", "options"), ALL)
@pytest.mark.parametrize("mode", ["off", "monitor", "lazy", "strict", "backtrack"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_positional_closure_is_refused_before_anything_moves(
    cls: type, options: dict, mode: str, scheduled: bool
) -> None:
    w, f, _ = quadratic()
    optimizer = cls([w], lr=0.01, guard=mode, **options)
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 5)
    optimizer.register_step_pre_hook(lambda *_: None)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(f(w)).backward()
    value, calls = w.detach().clone(), []

    def closure() -> torch.Tensor:
        calls.append(1)
        return f(w)

    with pytest.raises(RuntimeError, match=r"GradScaler\.step got a closure.*trial="):
        scaler.step(optimizer, closure)
    assert calls == []
    assert torch.equal(w.detach(), value)


def test_none_in_its_place_and_a_scaler_that_is_off_are_allowed() -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(f(w)).backward()
    scaler.step(optimizer, None)
    assert optimizer.last_step.verdict == "unobserved"
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.step(optimizer, closure_of(optimizer, w, f))
    assert optimizer.last_step.verdict == "decreased"


def test_a_closure_of_an_ordinary_step_is_no_business_of_a_scaler() -> None:
    refuse_closure_of_scaler()
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(f(w)).backward()

    class Trainer:  # a step of the same name
        def step(self, optimizer: SGD, closure: Any) -> Any:
            return optimizer.step(closure)

        def is_enabled(self) -> bool:
            return True

    Trainer().step(optimizer, closure_of(optimizer, w, f))
    assert optimizer.last_step.verdict == "decreased"


def test_a_scaler_may_hand_over_its_scale_only_to_torchs_own_step() -> None:
    """The fused step unscales by itself; with a prox or a guard, gradients must be unscaled before."""
    for options, expected in [
        ({"guard": "off"}, True), ({"guard": "monitor"}, False), ({"guard": "off", "constraint": Box(-1.0, 1.0)}, False),
    ]:  # fmt: skip
        optimizer = AdamW([nn.Parameter(torch.ones(1))], fused=True, **options)
        assert optimizer._step_supports_amp_scaling is expected
        assert AdamW([nn.Parameter(torch.ones(1))], fused=False, **options)._step_supports_amp_scaling is False


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_clipping_between_unscaling_and_the_step(cls: type) -> None:
    w, f, _ = quadratic()
    v = nn.Parameter(w.detach().clone())
    ours, theirs = cls([w], lr=0.05, guard="strict"), cls.torch_class([v], lr=0.05)
    for optimizer, p, extra in ((ours, w, {"trial": lambda: f(w)}), (theirs, v, {})):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(f(p)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p], 0.5)
            scaler.step(optimizer, **extra)
            scaler.update()
    assert ours.last_step.verdict == "decreased"
    assert torch.equal(w.detach(), v.detach())


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_an_accumulated_gradient_with_a_trial_of_all_parts_is_the_full_batch(cls: type) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    reports: list[list[Any]] = [[], []]
    ends = []
    for accumulated in (0, 1):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        optimizer = cls(model.parameters(), lr=3.0, guard="strict")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

        def mean_loss(model: nn.Module = model) -> torch.Tensor:
            parts = [F.cross_entropy(model(a), b) for a, b in zip(x.chunk(4), y.chunk(4), strict=True)]
            return torch.stack(parts).mean()

        for _ in range(10):
            if accumulated:
                optimizer.zero_grad()
                for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
                    scaler.scale(F.cross_entropy(model(a), b) / 4).backward()
                scaler.step(optimizer, trial=mean_loss)
                scaler.update()
            else:
                optimizer.step(closure_of(optimizer, model, lambda model: F.cross_entropy(model(x), y)))
            reports[accumulated].append(optimizer.last_step)
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*reports, strict=True):
        assert (a.action, a.scale, a.trials) == (b.action, b.scale, b.trials)
        assert a.energy_after == pytest.approx(b.energy_after, rel=1e-9)
    assert {r.action for r in reports[0]} != {"accepted"}
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_trial_under_autocast_sees_the_weights_that_have_moved() -> None:
    torch.manual_seed(0)
    model = Network().float()
    x, y = torch.randn(32, 8, dtype=torch.float32), torch.randint(3, (32,))
    optimizer = SGD(model.parameters(), lr=0.5, guard="strict")
    scaler = torch.amp.GradScaler("cpu")

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x).float(), y)

    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimizer, trial=loss)
        scaler.update()
        assert optimizer.last_step.energy_after != optimizer.last_step.energy_before
