"""What is done about an alarm, step by step: cool-down, escalation, recovery, and nothing that outlives a step by accident."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from stableopt import optim
from stableopt.errors import StabilityError
from stableopt.lyapunov.alarms import Alarm
from stableopt.lyapunov.events import Event
from stableopt.lyapunov.policies.enforcer import Enforcer
from stableopt.lyapunov.policies.policy import Policy

SGD: Callable[[Any], Optimizer] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)  # noqa: E731


def alarm(channel: str = "level", since: int = 1) -> Alarm:
    return Alarm(channel, f"{channel} has gone wrong", "5 of 6 steps", since, "lower the learning rate", 7.0, 5.0)


class Run:
    """A training that goes through an enforcer as the monitor does it."""

    def __init__(self, policy: Policy, make: Callable[[Any], Optimizer] = SGD, **more: Any) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.optimizer = make(self.model.parameters())
        self.enforcer = Enforcer(policy, self.model, self.optimizer, **more)
        self.now, self.lr, self.events, self.warned = 0, [], [], []
        self.scheduler: Any = None

    def step(self, *alarms: Alarm, bad: bool = False) -> list[Event]:
        self.now += 1
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(8, 3)).square().mean() * (torch.nan if bad else 1.0)
        loss.backward()
        self.enforcer.before(self.now)
        self.enforcer.refuse(loss.detach())
        self.lr.append(self.optimizer.param_groups[0].get("lr"))
        self.optimizer.step()
        self.enforcer.after(self.now)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            events = list(self.enforcer.act(alarms, self.now))
            assert caught == []
            self.enforcer.warn()
        self.warned += [str(w.message) for w in caught]
        assert all(issubclass(w.category, RuntimeWarning) for w in caught)
        assert all(w.filename == __file__ for w in caught)
        self.events += events
        if self.scheduler is not None:
            self.scheduler.step()
        return events

    def steps(self, count: int) -> list[Event]:
        return [event for _ in range(count) for event in self.step()]

    def numbers(self) -> list[Tensor]:
        return [x.detach().clone() for x in self.model.state_dict().values()]


def said(events: Sequence[Event]) -> list[tuple[str, str, str]]:
    return [(event.kind, event.channel, event.action) for event in events]


# --- observe, warn, raise ---


def test_observing_says_nothing() -> None:
    run = Run(Policy.observe())
    assert said(run.step(alarm(), alarm("mine"))) == [("alarm", "level", "observe"), ("alarm", "mine", "observe")]
    assert run.warned == []


def test_one_warning_with_the_full_reading_per_channel_and_cool_down() -> None:
    run = Run(Policy(cooldown=2))
    for _ in range(7):  # at steps 1, 4 and 7
        run.step(alarm())
    assert [e.action for e in run.events] == ["warn", "observe", "observe", "warn", "observe", "observe", "warn"]
    assert len(run.warned) == 3
    assert run.warned[0] == (
        "step 1, level (warn): level has gone wrong; evidence: 5 of 6 steps; since step 1; lower the learning rate"
    )
    run.step(alarm("mine"), alarm("yours"))  # other channels have cool-downs of their own
    assert len(run.warned) == 5


def test_a_run_is_stopped_with_the_evidence() -> None:
    run = Run(Policy(sublevel="raise"))
    events = run.step(alarm("sublevel"), alarm("level"))
    assert said(events) == [("alarm", "sublevel", "raise"), ("alarm", "level", "warn"), ("action", "sublevel", "raise")]
    assert "sublevel has gone wrong (5 of 6 steps)" in str(events[-1])
    assert (events[-1].statistic, events[-1].threshold, events[-1].since) == (7.0, 5.0, 1)
    assert all("raise" not in text for text in run.warned)


def test_what_is_done_for_a_channel_of_ones_own_bears_its_name() -> None:
    run = Run(Policy(other="shrink"))
    assert said(run.step(alarm("mine"))) == [("alarm", "mine", "shrink"), ("action", "mine", "shrink")]
    assert said(run.step(alarm("yours"))) == [("alarm", "yours", "observe")]  # it cools down with all the others
    assert len(run.warned) == 1


# --- shrink and restore ---


@pytest.mark.parametrize("tensor", [False, True])
def test_rates_are_shrunk_within_the_step_only_and_come_back(tensor: bool) -> None:
    first = torch.tensor(0.1) if tensor else 0.1
    run = Run(Policy(level="shrink", cooldown=1, patience=3), lambda p: torch.optim.AdamW(p, lr=first))
    group = run.optimizer.param_groups[0]
    original = group["lr"]
    run.step()
    events = run.step(alarm())
    assert said(events) == [("alarm", "level", "shrink"), ("action", "level", "shrink")]
    assert run.warned[-1].startswith("step 2, level (shrink): all learning rates are multiplied by 0.5")
    run.step(alarm())  # cools down
    run.step(alarm())
    assert run.enforcer.factor == 0.25
    assert said(run.steps(2)) == []
    assert said(run.step()) == [("action", "", "restore")]  # three steps after the last alarm
    assert said(run.steps(3)) == [("action", "", "restore")]
    run.step()
    assert [round(float(lr), 6) for lr in run.lr] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.025, 0.05, 0.05, 0.05, 0.1]
    assert group["lr"] is original
    if tensor:
        assert float(original) == 0.1


def test_the_parameters_move_as_with_a_smaller_rate() -> None:
    run = Run(Policy(level="shrink", factor=0.1))
    run.step(alarm())
    other = Run(Policy(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    other.step()
    other.optimizer.param_groups[0]["lr"] = 0.1 * 0.1
    for _ in range(3):
        torch.manual_seed(5)
        run.step()
        torch.manual_seed(5)
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(run.numbers(), other.numbers(), strict=True))


@pytest.mark.parametrize(
    "schedule",
    [lambda o: lr_scheduler.ExponentialLR(o, 0.9), lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=30)],
)
def test_a_scheduler_never_sees_the_factor(schedule: Any) -> None:
    rates = []
    for policy in (Policy(), Policy(level="shrink", patience=6, cooldown=1)):
        run = Run(policy)
        run.scheduler = schedule(run.optimizer)
        for step in range(20):
            run.step(*([alarm()] if step in {2, 4} else []))
        rates.append([float(lr) for lr in run.lr])
        rates.append([run.optimizer.param_groups[0]["lr"], run.scheduler.get_last_lr()])
    assert rates[1] == rates[3]
    share = [b / a for a, b in zip(rates[0], rates[2], strict=True)]
    # of steps 1 to 20: alarms after the third and the fifth, recovery after the eleventh and the seventeenth
    assert share == pytest.approx([1.0] * 3 + [0.5] * 2 + [0.25] * 6 + [0.5] * 6 + [1.0] * 3)


def test_a_rate_that_somebody_sets_within_the_step_stays() -> None:
    run = Run(Policy(level="shrink"))
    run.step(alarm())
    run.enforcer.before(2)
    run.optimizer.param_groups[0]["lr"] = 0.7
    run.enforcer.after(2)
    assert run.optimizer.param_groups[0]["lr"] == 0.7


def test_a_step_that_ends_in_an_error_leaves_nothing_behind() -> None:
    run = Run(Policy(level="shrink", nonfinite="skip"))
    run.step(alarm())
    lr, gradients = run.optimizer.param_groups[0]["lr"], [p.grad for p in run.model.parameters()]
    run.enforcer.before(2)
    assert run.enforcer.refuse(float("nan")) == ("loss",)
    assert run.optimizer.param_groups[0]["lr"] != lr
    run.enforcer.before(2)  # the step has raised: the monitor comes back with the next one
    run.enforcer.after(2)
    assert run.optimizer.param_groups[0]["lr"] is lr
    assert all(p.grad is g for p, g in zip(run.model.parameters(), gradients, strict=True))
    assert said(run.enforcer.act([], 2)) == []


def test_shrinking_ends_and_says_so() -> None:
    run = Run(Policy(level="shrink", cooldown=0, factor=0.1))
    for _ in range(5):
        run.step(alarm())
    assert run.enforcer.factor == pytest.approx(1e-3)
    assert [e.what for e in run.events if e.kind == "action"][
        -1
    ] == "learning rates are multiplied by 0.001 and not shrunk further"
    assert [e.action for e in run.events if e.kind == "action"] == ["shrink"] * 3 + ["observe"] * 2


def test_without_a_rate_there_is_nothing_to_shrink() -> None:
    class Rateless(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            pass

    run = Run(Policy(level="shrink"), Rateless)
    assert run.step(alarm())[-1].what == "no parameter group has a learning rate that could be shrunk"
    assert run.enforcer.factor == 1.0


def test_a_guarded_optimizer_shrinks_and_keeps_its_own_scale() -> None:
    run = Run(Policy(level="shrink"), lambda p: optim.SGD(p, lr=0.1, guard="strict"))
    run.step(alarm())
    run.step()
    assert run.optimizer.last_step.lr == (0.05,)
    assert run.optimizer.param_groups[0]["lr"] == 0.1
    assert run.optimizer.param_groups[0]["step_scale"] == 1.0


# --- skip ---


def test_bad_steps_are_skipped_with_an_event_each_and_a_warning_at_times() -> None:
    run = Run(Policy(nonfinite="skip", cooldown=2))
    run.steps(2)
    there = run.numbers()
    for _ in range(4):
        events = run.step(alarm("nonfinite", run.now + 1), bad=True)
        assert events[-1].action == "skip"
        assert events[-1].evidence.startswith("loss, grad:0.weight")
        assert events[-1].since == run.now
    now = run.numbers()
    assert all(torch.equal(a, b) for a, b in zip(there[:2] + there[7:], now[:2] + now[7:], strict=True))
    assert len(run.warned) == 2
    assert said(run.step()) == []


def test_a_step_is_skipped_without_an_alarm_and_recorded_later_if_nobody_asked() -> None:
    run = Run(Policy(nonfinite="skip"))
    for step in (1, 2):  # the monitor does not ask at every step
        run.enforcer.before(step)
        run.enforcer.refuse(float("inf"))
        run.enforcer.after(step)
    run.now = 2
    assert [(e.step, e.action) for e in run.step()] == [(1, "skip"), (2, "skip")]
    assert len(run.warned) == 2


def test_skipping_without_end_raises() -> None:
    run = Run(Policy(nonfinite="skip", patience=4, cooldown=100))
    for _ in range(3):
        assert said(run.step(bad=True)) == [("action", "nonfinite", "skip")]
    run.step()  # a good one in between: the count begins anew
    for _ in range(3):
        run.step(bad=True)
    events = run.step(bad=True)
    assert said(events) == [("action", "nonfinite", "skip"), ("action", "nonfinite", "raise")]
    assert events[-1].what == "4 steps in a row are not finite: skipping does not help"
    with pytest.raises(StabilityError, match="4 steps in a row"):
        raise StabilityError(str(events[-1]))


def test_what_cannot_be_skipped_is_warned_of() -> None:
    run = Run(Policy(nonfinite="skip"))
    assert said(run.step(alarm("nonfinite"))) == [("alarm", "nonfinite", "warn")]  # of a parameter or a buffer, perhaps
    assert len(run.warned) == 1


# --- rollback ---

ROLLBACK = Policy(level="rollback", sublevel="rollback", snapshot_every=10, margin=4, cooldown=5, patience=8, retries=2)


def test_a_rollback_goes_to_the_newest_snapshot_that_is_old_enough_and_shrinks() -> None:
    for since, target in ((25, 21), (24, 11), (15, 11), (14, 11), (11, 11)):
        told: list[int] = []
        run = Run(ROLLBACK, on_rollback=told.append)
        values = {}
        for step in range(1, 27):
            if step in {1, 11, 21}:  # the monitor takes snapshots before these; buffers have moved by then
                values[step] = [p.detach().clone() for p in run.model.parameters()]
            run.step()
        events = run.step(alarm(since=since))
        assert said(events[1:]) == [("action", "level", "rollback"), ("action", "level", "shrink")]
        assert events[1].what == f"the training is back to where it was before step {target}"
        assert told == [target]
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), values[target], strict=True))
        assert run.enforcer.factor == 0.5
        assert len(run.warned) == 2


def test_the_first_snapshot_is_used_where_none_is_old_enough() -> None:
    run = Run(ROLLBACK)
    run.steps(3)
    assert [e.action for e in run.step(alarm(since=2))] == ["rollback", "rollback", "shrink"]


def test_without_a_snapshot_from_before_the_fault_rates_shrink_or_the_run_stops() -> None:
    for channel, actions in (("level", ["observe", "shrink"]), ("nonfinite", ["raise"])):
        run = Run(Policy(level="rollback", nonfinite="rollback", snapshot_every=10, margin=4))
        run.steps(35)
        events = run.step(alarm(channel, since=5))
        assert [e.action for e in events[1:]] == actions
        assert events[1].what == "no rollback is possible: no snapshot is from before step 5"
        assert run.enforcer._checkpoints.steps == ()  # both are of the fault


def test_a_rollback_that_fails_shrinks_and_says_why() -> None:
    run = Run(ROLLBACK)
    run.steps(12)
    run.model[0].weight = nn.Parameter(torch.ones(4, 3))
    there = run.numbers()
    events = run.step(alarm(since=8))
    assert [e.action for e in events[1:]] == ["observe", "shrink"]
    assert "'0.weight' of the model is another object" in events[1].what
    assert torch.equal(run.numbers()[0], there[0])


def test_no_snapshot_is_taken_of_a_run_in_trouble() -> None:
    run = Run(ROLLBACK)
    steps = []
    for step in range(1, 40):
        run.step(*([alarm()] if step == 20 else []))
        steps.append(run.enforcer._checkpoints.steps[-1])
    # the alarm of step 20 goes back to step 11; what was kept later is dropped, and the next is kept after the cool-down
    assert steps[:10] == [1] * 10
    assert steps[10:20] == [11] * 9 + [1]  # since step 1: back to the first one
    assert steps[20:25] == [1] * 5
    assert steps[25] == 26
    assert steps[35] == 36


def test_after_a_rollback_all_channels_cool_down_and_retries_are_counted() -> None:
    run = Run(ROLLBACK)
    run.steps(25)
    run.step(alarm("level", 24))
    assert said(run.step(alarm("sublevel", 25))) == [("alarm", "sublevel", "observe")]
    run.steps(4)
    assert [e.action for e in run.step(alarm("sublevel", 25))] == ["rollback", "rollback", "shrink"]
    assert run.enforcer.factor == 0.25
    run.steps(5)
    events = run.step(alarm("level", 30))
    assert said(events[1:]) == [("action", "level", "raise")]
    assert events[1].what == "2 rollbacks have not helped"


def test_rates_recover_once_the_place_of_the_fault_is_passed_and_retries_with_them() -> None:
    run = Run(ROLLBACK)
    run.steps(25)
    run.step(alarm("level", 24))  # at step 26, back to 11: 15 steps to do again, and 8 of patience
    assert said(run.step(alarm("level", 26))) == [
        ("alarm", "level", "observe")
    ]  # an alarm on the way does not bring that forward
    assert said(run.steps(21)) == []
    assert said(run.step()) == [("action", "", "restore")]
    assert run.now == 26 + 15 + 8
    assert run.enforcer.factor == 1.0
    for _ in range(2):  # there are two retries again
        assert run.step(alarm("level", run.now))[1].action == "rollback"
        run.steps(5)


def test_parameters_that_are_not_finite_are_taken_back_at_once_each_time() -> None:
    run = Run(Policy(nonfinite="rollback", snapshot_every=10, margin=4, retries=2))
    run.steps(15)
    for _ in range(2):
        run.step(bad=True)  # the parameters are lost
        assert bool(run.model[0].weight.isnan().all())
        events = run.step(alarm("nonfinite", run.now))
        assert events[1].action == "rollback"
        assert bool(run.model[0].weight.isfinite().all())
        assert bool(run.model[1].running_mean.isfinite().all())
    run.step(bad=True)
    assert [e.action for e in run.step(alarm("nonfinite", run.now))] == ["rollback", "raise"]


def test_a_scheduler_and_the_random_numbers_go_back_if_they_are_named() -> None:
    torch.manual_seed(1)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    enforcer = Enforcer(ROLLBACK, model, optimizer, also=[scheduler])
    enforcer.before(1)
    there, expected = scheduler.state_dict() | {}, torch.rand(2)
    enforcer.after(1)
    optimizer.step()
    scheduler.step()
    with warnings.catch_warnings(action="ignore"):
        enforcer.act([alarm()], 1)
    assert {k: v for k, v in scheduler.state_dict().items() if k != "_last_lr"} == {
        k: v for k, v in there.items() if k != "_last_lr"
    }
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(torch.rand(2), expected)


def test_a_rollback_within_the_step_of_a_gradient_scaler() -> None:
    torch.manual_seed(1)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    enforcer = Enforcer(ROLLBACK, model, optimizer, also=[scaler])
    now = [0]

    def before(*_: Any) -> None:
        now[0] += 1
        enforcer.before(now[0])

    def after(*_: Any) -> None:
        enforcer.after(now[0])
        with warnings.catch_warnings(action="ignore"):
            enforcer.act([alarm()] if now[0] == 4 else [], now[0])

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    scales = []
    there = model.weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(3)).square().sum()).backward()
        scaler.step(optimizer)
        if now[0] == 4:
            assert torch.equal(model.weight, there)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [16.0, 32.0, 64.0, 16.0, 32.0]  # the step that is taken back counts as one without effect


def test_the_strongest_action_is_taken_once() -> None:
    policy = Policy(
        nonfinite="warn", increase="shrink", sublevel="rollback", level="rollback", snapshot_every=10, margin=4
    )
    run = Run(policy)
    run.steps(3)
    events = run.step(alarm("increase"), alarm("level"), alarm("sublevel"), alarm("nonfinite"))
    assert [e.action for e in events] == ["shrink", "rollback", "rollback", "warn", "rollback", "shrink"]
    assert run.enforcer.factor == 0.5


# --- states ---


def test_a_state_goes_on_alike() -> None:
    policy = Policy(level="shrink", nonfinite="skip", cooldown=4, patience=5)
    run, other = Run(policy), Run(policy)
    for each in (run, other):
        torch.manual_seed(3)
        each.steps(2)
        each.step(alarm())
        each.step(bad=True)
    resumed = Enforcer(policy, other.model, other.optimizer)
    state = json.loads(json.dumps(other.enforcer.state_dict()))
    resumed.load_state_dict(state)
    other.enforcer = resumed
    for each in (run, other):
        torch.manual_seed(4)
        each.step(alarm())
        each.steps(12)
    assert [str(e) for e in run.events] == [str(e) for e in other.events]
    assert run.lr == other.lr
    assert all(torch.equal(a, b) for a, b in zip(run.numbers(), other.numbers(), strict=True))


@pytest.mark.parametrize(
    "change", [{"shrunk": 1.5}, {"shrunk": True}, {"until": 3}, {"until": {"level": "x"}}, {"more": 1}]
)
def test_a_state_of_something_else_is_refused(change: dict[str, Any]) -> None:
    run = Run(Policy())
    with pytest.raises(ValueError, match="the state of an Enforcer has"):
        run.enforcer.load_state_dict(run.enforcer.state_dict() | change)
    with pytest.raises(ValueError, match="the state of an Enforcer has"):
        run.enforcer.load_state_dict({})


# --- nothing by default ---


def test_a_policy_that_does_not_act_changes_nothing() -> None:
    run, alone = Run(Policy()), Run(Policy.observe())
    for step in range(6):
        torch.manual_seed(step)
        run.step(alarm(), alarm("nonfinite"))
        state = torch.get_rng_state()
        torch.manual_seed(step)
        alone.step()
        assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(run.numbers(), alone.numbers(), strict=True))
    assert run.enforcer._checkpoints is None
    assert not run.enforcer.skips


# --- what is sound ---


def test_no_snapshot_is_taken_while_a_buffer_is_spoilt() -> None:
    run = Run(Policy(nonfinite="skip", level="rollback", snapshot_every=10, margin=0, cooldown=0))
    run.model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))  # which is no fault
    run.enforcer = Enforcer(run.enforcer.policy, run.model, run.optimizer)
    run.steps(10)
    run.optimizer.zero_grad()
    loss = run.model(torch.full((8, 3), torch.nan)).square().mean()  # before the step, so before the snapshot
    loss.backward()
    run.enforcer.before(11)
    assert run.enforcer.refuse(loss.detach())
    run.optimizer.step()
    run.enforcer.after(11)
    assert run.enforcer._checkpoints.steps == (1,)
    run.now = 11
    run.steps(2)
    assert run.enforcer._checkpoints.steps == (1, 12)
    assert run.step(alarm("level", 13))[-2].action == "rollback"
    assert bool(run.model[1].running_mean.isfinite().all())


@pytest.mark.parametrize("resumed", [False, True])
def test_buffers_that_the_very_first_step_spoils_are_mended(resumed: bool) -> None:
    run = Run(Policy(nonfinite="skip"))
    if resumed:
        run.model[1].running_mean.fill_(3.0)
        run.enforcer.load_state_dict(run.enforcer.state_dict())
    there = run.model[1].running_mean.clone()
    run.model(torch.full((8, 3), torch.nan)).sum().backward()
    run.enforcer.before(1)
    assert run.enforcer.refuse(None)
    run.optimizer.step()
    run.enforcer.after(1)
    assert torch.equal(run.model[1].running_mean, there)


def test_snapshots_of_what_is_abandoned_go_when_a_state_is_loaded() -> None:
    run = Run(ROLLBACK)
    run.steps(2)
    state = run.enforcer.state_dict()
    run.steps(30)
    assert run.enforcer._checkpoints.steps == (21, 31)
    run.enforcer.load_state_dict(state)
    assert run.enforcer._checkpoints.steps == ()
    run.now = 2
    run.steps(1)
    assert run.enforcer._checkpoints.steps == (3,)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (lambda o: lr_scheduler.ExponentialLR(o, 0.9), 0.1 * 0.9**6),
        (lambda o: lr_scheduler.ExponentialLR(o, 1.0), 0.1),
        (lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.95**step), 0.1 * 0.95**6),
    ],
)
def test_a_scheduler_within_the_step_does_not_make_the_factor_pile_up(schedule: Any, last: float, tensor: bool) -> None:
    run = Run(Policy(level="shrink"), lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1) if tensor else 0.1))
    scheduler = schedule(run.optimizer)
    run.optimizer.register_step_post_hook(lambda *_: scheduler.step())
    run.step(alarm())
    run.steps(5)
    assert float(run.optimizer.param_groups[0]["lr"]) == pytest.approx(last)
    assert tensor or run.lr[-1] == pytest.approx(0.5 * last / (last / 0.1) ** (1 / 6))


def test_what_the_loop_calls_after_the_undone_step_is_undone_at_the_next() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    second = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.5)
    enforcer = Enforcer(
        Policy(level="rollback", snapshot_every=3, margin=0), model, optimizer, also=[scheduler, average, second]
    )

    def there() -> list[Any]:
        w = second.param_groups[0]["params"][0]
        values = [x.clone() for x in average.state_dict().values()]
        return [scheduler.last_epoch, optimizer.param_groups[0]["lr"], w.item(), *values]

    seen = {}
    for step in range(1, 7):
        model(torch.randn(4, 3)).square().mean().backward()
        enforcer.before(step)
        seen[step] = there()
        factor = enforcer.factor
        optimizer.step()
        enforcer.after(step)
        acted = enforcer.act([alarm("level", 4)] if step == 5 else [], step)
        assert any(e.action == "rollback" for e in acted) == (step == 5)
        scheduler.step()
        average.update_parameters(model)
        second.param_groups[0]["params"][0].grad = torch.ones(1)
        second.step()
    assert factor == 0.5
    assert seen[6][1] == seen[4][1] * factor  # within the step
    for now, then in zip(seen[6][:1] + seen[6][2:], seen[4][:1] + seen[4][2:], strict=True):
        assert torch.equal(torch.as_tensor(now), torch.as_tensor(then))
    assert scheduler.last_epoch == seen[4][0] + 1


def test_the_first_shrinking_is_always_allowed() -> None:
    run = Run(Policy(level="shrink", factor=1e-4, cooldown=0))
    assert run.step(alarm())[-1].action == "shrink"
    assert run.enforcer.factor == 1e-4
    assert run.step(alarm())[-1].what == "learning rates are multiplied by 0.0001 and not shrunk further"


def test_rollbacks_are_allowed_again_where_nothing_can_be_shrunk() -> None:
    class Rateless(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.param_groups[0]["lr"] = None

        def step(self, closure: Any = None) -> None:
            pass

    run = Run(Policy(level="rollback", snapshot_every=1, margin=0, cooldown=0, patience=3, retries=1), Rateless)
    for _ in range(3):
        run.steps(1)
        assert [e.action for e in run.step(alarm("level", run.now + 1))][1:] == ["rollback", "observe"]
        run.steps(4)
    run.step(alarm("level", run.now + 1))
    assert run.step(alarm("level", run.now + 1))[-1].action == "raise"


@pytest.mark.parametrize(("cooldown", "steps"), [(0, [1, 2, 3, 4, 5, 6]), (1, [1, 3, 5]), (2, [1, 4]), (3, [1, 5])])
def test_as_many_steps_are_quiet_as_the_cool_down_says(cooldown: int, steps: list[int]) -> None:
    run = Run(Policy(cooldown=cooldown))
    for _ in range(6):
        run.step(alarm())
    assert [e.step for e in run.events if e.action == "warn"] == steps


def test_warnings_that_are_errors_lose_nothing() -> None:
    run = Run(Policy())
    with warnings.catch_warnings(action="error"):
        events = run.enforcer.act([alarm(), alarm("mine")], 1)
        assert [e.action for e in events] == ["warn", "warn"]
        with pytest.raises(RuntimeWarning, match="level has gone wrong"):
            run.enforcer.warn()
        run.enforcer.warn()  # what was raised is not said again
