"""Hooks see each step once, with its closure wherever it stands."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.lyapunov.hooks import StepHooks
from stableopt.lyapunov.scaler import ScalerWatch


class Twice(torch.optim.SGD):
    """Calls the step of its base class, whose hooks run as well."""

    def step(self, closure=None):
        super().step()
        return super().step(closure)


def make(kind=torch.optim.SGD):
    w = nn.Parameter(torch.ones(1))
    w.grad = torch.ones(1)
    return kind([w], lr=0.1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Twice])
def test_once_a_step(kind):
    said: list[str] = []
    opt = make(kind)
    hooks = StepHooks(opt, lambda closure, trial: said.append("before"), lambda: said.append("after"))
    hooks.attach()
    opt.step()
    opt.step()
    hooks.remove()
    opt.step()
    assert said == ["before", "after"] * 2


@pytest.mark.parametrize("named", [False, True])
def test_the_closure_is_handed_over_and_replaced(named):
    opt, seen = make(), []
    mine, other = lambda: torch.tensor(1.0), lambda: torch.tensor(2.0)

    def before(closure, trial):
        seen.append(closure)
        return other

    StepHooks(opt, before, lambda: None).attach()
    result = opt.step(closure=mine) if named else opt.step(mine)
    assert seen == [mine]
    assert result == 2.0


def test_a_step_that_ends_in_an_error_is_followed_by_a_step_that_is_seen():
    opt, said = make(), []
    StepHooks(opt, lambda closure, trial: said.append("before"), lambda: said.append("after")).attach()

    def fails():
        raise KeyError("data")

    with pytest.raises(KeyError):
        opt.step(fails)
    opt.step()
    assert said == ["before", "before", "after"]


def test_skipped_steps_are_counted_by_the_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    w = nn.Parameter(torch.ones(1, dtype=torch.float32))
    opt = torch.optim.SGD([w], lr=0.1)
    watch = ScalerWatch(scaler)

    def step(gradient: float) -> None:
        opt.zero_grad()
        scaler.scale((w * gradient).sum()).backward()
        scaler.step(opt)
        scaler.update()

    step(1.0)
    assert watch.look(1) is None
    for _ in range(3):
        step(float("inf"))
    event = watch.look(4)
    assert event is not None
    assert "about 3 steps" in event.what
    assert (event.statistic, event.threshold) == (2.0**7, 2.0**10)
    assert event.since == 2
    for _ in range(2):
        step(1.0)  # the scale grows: nothing was skipped
    assert watch.look(6) is None


def test_a_scaler_that_is_off_skips_nothing_and_other_things_are_refused():
    assert ScalerWatch(torch.amp.GradScaler("cpu", enabled=False)).look(3) is None
    with pytest.raises(TypeError, match="GradScaler"):
        ScalerWatch(3)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Twice])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of torch's own code
def test_a_compiled_step_is_seen_once_and_not_compiled_into_the_hooks(kind, whole):
    torch._dynamo.reset()
    said: list[bool] = []
    opt = make(kind)
    StepHooks(
        opt,
        lambda closure, trial: said.append(torch.compiler.is_compiling()),
        lambda: said.append(torch.compiler.is_compiling()),
    ).attach()
    step = torch.compile((lambda: opt.step()) if whole else opt.step, backend="eager")
    for _ in range(3):
        step()
    assert said == [False] * 6
    assert opt.param_groups[0]["params"][0].item() == pytest.approx(1.0 - 0.3 * (2 if kind is Twice else 1))
