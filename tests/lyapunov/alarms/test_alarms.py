"""All channels together."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
import torch
from torch import nn

from stableopt.lyapunov.alarms import Alarm, Alarms, Increase, Leap, NonFinite, Sample
from tests.lyapunov.alarms.streams import descent, samples, whole


def mixed(steps: int, seed: int = 0) -> list[Sample]:
    """A run that goes wrong at times, in each of the ways."""
    rng, found = random.Random(seed), []
    for t, loss in enumerate(descent(steps, seed), start=1):
        phase = t // 60 % 5
        after = loss * (1.6 if phase == 2 else 0.99)
        loss = loss + (3.0 if phase == 3 else 0.0)
        sample = whole(t, loss, after + loss - loss, (10.0 if phase == 4 else 0.1) * math.exp(0.1 * rng.gauss(0, 1)))
        found.append(Sample(t, nonfinite=("loss",)) if rng.random() < 0.002 else sample)
    return found


def said(alarms: Alarms, stream: list[Sample]) -> list[tuple[int, Alarm]]:
    return [(sample.step, alarm) for sample in stream for alarm in alarms.update(sample)]


def test_a_run_that_goes_well_is_silent() -> None:
    assert said(Alarms(), list(samples(descent(2000)))) == []


def test_every_channel_speaks_and_then_is_silent_for_the_cooldown() -> None:
    found = said(Alarms(cooldown=50), mixed(1500))
    assert {alarm.channel for _, alarm in found} >= {"nonfinite", "increase", "leap", "relapse"}
    for name in {alarm.channel for _, alarm in found}:
        steps = [step for step, alarm in found if alarm.channel == name]
        assert all(b - a >= 50 for a, b in pairwise(steps))


def test_what_happens_in_the_cooldown_is_no_evidence() -> None:
    stream = [whole(t, 1.0, 1.1 if t < 60 else 0.9) for t in range(1, 200)]
    assert [step for step, _ in said(Alarms([Increase()], cooldown=51), stream)] == [9]
    assert [step for step, _ in said(Alarms([Increase()], cooldown=40), stream)] == [9, 57]


def test_a_fault_that_stays_is_reported_again() -> None:
    found = said(Alarms([NonFinite()], cooldown=10), [Sample(t, nonfinite=("loss",)) for t in range(1, 35)])
    assert [step for step, _ in found] == [1, 11, 21, 31]


@pytest.mark.parametrize("cut", [1, 37, 150, 333, 640, 999])
def test_a_resumed_run_gives_the_alarms_of_an_uninterrupted_one(cut: int) -> None:
    stream = mixed(1000)
    whole_run = said(Alarms(), stream)
    first, second = Alarms(), Alarms()
    before = said(first, stream[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + said(second, stream[cut:]) == whole_run
    third = Alarms()
    third.load_state_dict(second.state_dict())
    assert third.state_dict() == second.state_dict()


def size(state: object) -> int:
    if isinstance(state, dict):
        return sum(map(size, state.values())) + len(state)
    return sum(map(size, state)) + 1 if isinstance(state, list) else 1


@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    alarms, sizes = Alarms(), []
    for t in range(200_000):
        alarms.update(whole(t + 1, 1.0 + 0.1 * math.sin(t), 0.9))
        if t in {1999, 19999, 199_999}:
            sizes.append(size(alarms.state_dict()))
    assert sizes[0] == sizes[1] == sizes[2] < 1000


def test_steps_may_be_left_out() -> None:
    sparse = [s if s.step % 7 == 0 else Sample(s.step, s.loss) for s in samples(descent(1000))]
    assert said(Alarms(), sparse) == []


def test_who_looks_rarely_and_at_once_when_alerted_is_only_one_interval_late() -> None:
    losses = [*descent(400), *[2.5] * 20]
    alarms, looked, found = Alarms(), 0, []
    for sample in samples(losses):
        if sample.step % 8 == 0 or alarms.alert:
            looked += 1
            found += [(sample.step, alarm.channel) for alarm in alarms.update(sample)]
    assert looked < 80
    assert 400 < found[0][0] <= 400 + 8 + 4


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(TypeError, match="Alarms needs channels, got str: derive it from Channel"):
        Alarms(["level"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Alarms needs channels of different names, got leap, leap"):
        Alarms([Leap(), Leap()])
    with pytest.raises(ValueError, match="Alarms needs cooldown as an integer >= 1, got 0"):
        Alarms(cooldown=0)
    with pytest.raises(
        ValueError, match="these alarms have the channels leap, the state is of increase: make both alike"
    ):
        Alarms([Leap()]).load_state_dict(Alarms([Increase()]).state_dict())


@pytest.mark.parametrize("fault", [1.0, 100.0])
def test_a_learning_rate_a_hundred_times_too_high_is_noticed_within_five_steps(fault: float) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer, alarms = torch.optim.SGD(model.parameters(), lr=0.05), Alarms()
    began, found = 150, []
    for t in range(1, began + 6):
        if t == began:
            optimizer.param_groups[0]["lr"] *= fault
        x = torch.randn(32, 6)
        y = x.square().mean(1, keepdim=True)
        start = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            after = float((model(x) - y).square().mean())
            d = float(torch.nn.utils.get_total_norm([p - q for p, q in zip(model.parameters(), start, strict=True)]))
        sample = Sample(t, loss.item(), after, loss.item(), after, 1e-12, displacement=d)
        found += [(t, alarm.channel) for alarm in alarms.update(sample)]
    assert [t for t, _ in found if t < began] == []
    assert (found != []) is (fault > 1.0)
