"""Policies in two processes: what one of them sees, both act on, and both end at the same bits.

Both processes are started once and run every check in the same order; each check is one test here.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from stableopt import optim
from stableopt.lyapunov.alarms import Alarm
from stableopt.lyapunov.events import Event
from stableopt.lyapunov.policies.enforcer import Enforcer
from stableopt.lyapunov.policies.policy import Policy
from stableopt.optim.snapshot import local
from tests.lyapunov import spread_training
from tests.optim.spread import (
    SPREADS,
    Net,
    Noisy,
    batches,
    inner,
    loss_of,
    mine,
    momenta,
    numbers,
    same,
    same_everywhere,
    seeded,
)
from tests.two_processes import shared_outcomes

CHECKS: dict[str, Callable[[], None]] = {}

MAKES: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "our SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, guard="strict"),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


def alarm(channel: str = "level", since: int = 1) -> Alarm:
    return Alarm(channel, f"{channel} has gone wrong", "5 of 6", since, "lower the learning rate")


class Run:
    """A training spread over both processes that goes through an enforcer as the monitor does it."""

    def __init__(
        self, spread: str, policy: Policy, make: str = "AdamW", net: type[nn.Module] = Net, also: Any = (), **more: Any
    ) -> None:
        self.model = SPREADS[spread](seeded(net))
        self.optimizer = MAKES[make](self.model.parameters())
        made = [a(self.optimizer) if isinstance(a, type) else a for a in also]
        self.enforcer = Enforcer(policy, self.model, self.optimizer, also=made, **more)
        self.now, self.events, self.refused = 0, list[Event](), ()
        self.batches = batches(100)

    def step(
        self, *alarms: Alarm, spoil: Callable[[Tensor], Tensor] = lambda loss: loss, damage: bool = False
    ) -> list[Event]:
        self.now += 1
        half = mine(next(self.batches))

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = spoil(loss_of(self.model, half))
            loss.backward()
            if damage and dist.get_rank() == 1:  # as a fault of one device
                grad = next(p.grad for p in self.model.parameters() if p.grad is not None and local(p.grad).numel())
                local(grad).view(-1)[0] = torch.nan
            self.refused = self.enforcer.refuse(loss.detach()) or self.refused
            return loss

        self.enforcer.before(self.now, with_closure=True)
        self.optimizer.step(closure)
        self.enforcer.after(self.now)
        with warnings.catch_warnings(action="ignore"):
            events = list(self.enforcer.act(alarms, self.now))
        self.events += events
        return events

    def state(self) -> dict[str, Tensor]:
        return numbers(self.model) | momenta(self.model, self.optimizer)

    def agree(self) -> None:
        # running statistics are those of each process until the next forward pass
        same_everywhere({k: v for k, v in self.state().items() if "running" not in k})
        same_everywhere([(e.step, e.action, e.since) for e in self.events if e.kind == "action"])
        same_everywhere(repr(self.enforcer.state_dict()))


def only(rank: int, *alarms: Alarm) -> tuple[Alarm, ...]:
    return alarms if dist.get_rank() == rank else ()


def spoilt_on(rank: int) -> Callable[[Tensor], Tensor]:
    return lambda loss: loss * (torch.nan if dist.get_rank() == rank else 1.0)


# --- steps that are not finite ---


def check_skipped(spread: str, make: str) -> None:
    """A loss that is NaN on one process, or one entry of a gradient there, stops the step on both."""
    for kind in ("loss", "gradient"):
        run = Run(spread, Policy(nonfinite="skip"), make)
        for _ in range(2):
            assert run.step() == []
        there = run.state()
        events = run.step(spoil=spoilt_on(1)) if kind == "loss" else run.step(damage=True)
        assert run.refused, kind
        assert [e.action for e in events] == ["skip"], kind
        same_everywhere([run.refused, events[0].evidence])
        same(run.state(), there)
        run.step()
        run.agree()
        assert any(not torch.equal(a, there[k]) for k, a in run.state().items())


for _spread in ("ddp", "fsdp"):
    for _make in MAKES if _spread == "ddp" else ("AdamW", "our SGD"):  # torch's LBFGS takes no uneven shards
        CHECKS[f"{_spread} {_make} skipped"] = lambda s=_spread, m=_make: check_skipped(s, m)


# --- alarms ---


def check_shrunk(spread: str) -> None:
    """An alarm of one process shrinks the rates of both, and both recover at the same step."""
    run = Run(spread, Policy(level="shrink", other="raise", cooldown=2, patience=3))
    run.step()
    events = run.step(*only(1, alarm(since=2)))
    assert [(e.kind, e.action, e.since) for e in events] == [("alarm", "shrink", 2), ("action", "shrink", 2)]
    words = "level has gone wrong" if dist.get_rank() == 1 else "process 1 has noticed it"
    assert events[0].what == words
    run.step(*only(0, alarm(since=1)), *only(1, alarm(since=3)))
    assert run.enforcer.factor == 0.5  # it cools down on both
    for _ in range(3):
        run.step()
    assert run.enforcer.factor == 1.0
    assert [e.action for e in run.step(*only(0, alarm("mine")))][-1] == "raise"
    run.agree()


def check_rolled_back(spread: str, make: str, net: type[nn.Module]) -> None:
    """Both go back to the same snapshot: the one from before the earliest beginning of the fault."""
    told: list[int] = []
    policy = Policy(level="rollback", snapshot_every=4, margin=2, cooldown=3)
    scheduler = type(
        "Decay",
        (lr_scheduler.ExponentialLR,),
        {"__init__": lambda s, o: lr_scheduler.ExponentialLR.__init__(s, o, 0.9)},
    )
    run = Run(spread, policy, make, net, also=[scheduler], on_rollback=told.append)
    random.seed(dist.get_rank())
    kept, tensors = {}, [*run.model.parameters()]
    for step in range(1, 12):
        if step in {1, 5, 9}:
            kept[step] = run.state(), torch.get_rng_state()
        run.step()
    # of the beginnings 11 and 8, the latter counts: two steps before it, there is the snapshot of step 5
    events = run.step(*only(0, alarm(since=11)), *only(1, alarm(since=8)))
    assert [e.action for e in events] == ["rollback", "rollback", "shrink"]
    assert told == [5]
    same(run.state(), kept[5][0])
    assert torch.equal(torch.get_rng_state(), kept[5][1])
    assert all(a is b for a, b in zip(run.model.parameters(), tensors, strict=True))
    run.agree()
    for _ in range(2):
        run.step()
    run.agree()


def check_rollback_refused(spread: str) -> None:
    """If one process cannot go back, neither does, and both shrink."""

    class Grumpy:
        value = 0

        def state_dict(self) -> dict[str, int]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, int]) -> None:
            if dist.get_rank() == 1 and state["value"] == 0:
                raise KeyError("no")
            self.value = state["value"]

    thing = Grumpy()
    run = Run(spread, Policy(level="rollback", snapshot_every=4, margin=2), also=[thing])
    for _ in range(3):
        run.step()
    thing.value = 7
    there = run.state()
    events = [e for e in run.step(*only(0, alarm())) if e.kind == "action"]
    assert [e.action for e in events] == ["observe", "shrink"]
    words = (
        "Grumpy.load_state_dict failed" if dist.get_rank() == 1 else "another process cannot go back to the same step"
    )
    assert words in events[0].what
    assert thing.value == 7
    assert any(not torch.equal(a, there[k]) for k, a in run.state().items())  # the step itself was done
    run.agree()


def check_alone() -> None:
    """A policy that only warns asks no other process: it may watch in one of them alone."""
    run = Run("ddp", Policy())
    for _ in range(2):
        run.step()
    if dist.get_rank() == 0:
        with warnings.catch_warnings(action="ignore"):
            assert [e.action for e in run.enforcer.act([alarm()], 3)] == ["warn"]
    same_everywhere(numbers(run.model))


for _spread in ("ddp", "fsdp"):
    CHECKS[f"{_spread} shrunk"] = lambda s=_spread: check_shrunk(s)
    CHECKS[f"{_spread} rollback refused by one"] = lambda s=_spread: check_rollback_refused(s)
    for _make in ("AdamW", "our SGD"):
        CHECKS[f"{_spread} {_make} rolled back"] = lambda s=_spread, m=_make: check_rolled_back(s, m, Net)
CHECKS["ddp AdamW rolled back with statistics"] = lambda: check_rolled_back("ddp", "AdamW", Noisy)
CHECKS["hsdp AdamW rolled back"] = lambda: check_rolled_back("hsdp", "AdamW", Net)
CHECKS["warnings of one process"] = check_alone


def check_guard_after_evaluation() -> None:
    """Weights that a forward pass without a backward one has left gathered are not those after a rollback."""
    run = Run("fsdp as one", Policy(level="rollback", snapshot_every=4, margin=0))
    x, _ = mine(next(batches(1)))
    with torch.no_grad():
        before = run.model(x)
    for _ in range(2):
        run.step()
    with torch.no_grad():
        assert not torch.equal(run.model(x), before)
    with warnings.catch_warnings(action="ignore"):
        run.enforcer.act([alarm()], 3)
    with torch.no_grad():
        assert torch.equal(run.model(x), before)
    assert inner(run.model) is run.model


CHECKS["gathered weights"] = check_guard_after_evaluation
CHECKS |= spread_training.CHECKS


FURTHER = [n for n in CHECKS if "watched" in n and (n.startswith(("hsdp", "fsdp as one")) or "lazy" in n)]
FIRST = [n for n in CHECKS if n not in FURTHER]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return shared_outcomes(__name__, FIRST, tmp_path_factory)


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return shared_outcomes(__name__, FURTHER, tmp_path_factory)


@pytest.mark.distributed
@pytest.mark.parametrize("name", FIRST)
def test_two_processes(name: str, first: list[dict[str, str]]) -> None:
    for outcome in first:
        assert not outcome[name], outcome[name][-4000:]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", FURTHER)
def test_two_processes_with_further_layouts(name: str, further: list[dict[str, str]]) -> None:
    for outcome in further:
        assert not outcome[name], outcome[name][-4000:]
