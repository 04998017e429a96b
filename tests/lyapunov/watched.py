"""A training that is run without and with a monitor, and must end alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.lyapunov import Every, Monitor
from stableopt.lyapunov.budget import TIERS
from tests.lyapunov.training import batches, equal, picture, seed_everything

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
