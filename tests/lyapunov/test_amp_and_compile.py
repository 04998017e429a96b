"""Half precision, gradient scalers and compilation: training with the monitor is training without it, and nothing is missed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.lyapunov.training import batches, make_closure, picture
from tests.lyapunov.watched import Watch, loss_of, small, train, verdicts, watched

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
