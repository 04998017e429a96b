"""What the guard is told is checked when it is said, and a learning rate in every step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stableopt.errors import StabilityError
from stableopt.optim import SGD, AdamW, guard
from stableopt.optim.settings import GuardSettings, Settings, check_lr, check_number
from tests.optim.problems import closure_of, quadratic


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"guard": "never"}, ValueError), ({"guard": None}, ValueError), ({"every": 0}, ValueError),
        ({"every": 1.0}, ValueError), ({"every": True}, ValueError), ({"max_shrinks": -1}, ValueError),
        ({"max_shrinks": 2.5}, ValueError), ({"shrink": 0.0}, ValueError), ({"shrink": 1.0}, ValueError),
        ({"shrink": math.nan}, ValueError), ({"shrink": "0.5"}, TypeError), ({"shrink": True}, TypeError),
        ({"grow": 0.99}, ValueError), ({"grow": math.inf}, ValueError), ({"grow": math.nan}, ValueError),
        ({"armijo": 1.0}, ValueError), ({"armijo": -1e-9}, ValueError), ({"armijo": None}, TypeError),
        ({"on_nonfinite": "ignore"}, ValueError), ({"over_limit": "skip"}, ValueError), ({"debug": 1}, TypeError),
    ],
)  # fmt: skip
def test_a_setting_without_meaning_is_refused_by_its_name(bad: dict[str, object], error: type[Exception]) -> None:
    name = next(iter(bad))
    with pytest.raises(error, match=name):
        Settings(**bad)
    with pytest.raises(error, match=name):
        SGD([nn.Parameter(torch.ones(1))], **bad)
    with pytest.raises(error, match=name):
        guard(torch.optim.Adagrad([nn.Parameter(torch.ones(1))]), **bad)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    assert Settings(grow=1.0, armijo=0.0, max_shrinks=0, every=1, shrink=1e-300).shrink == 1e-300


def test_lazy_needs_every_step() -> None:
    assert Settings(guard="lazy").every == 1
    with pytest.raises(ValueError, match="every must be 1"):
        Settings(guard="lazy", every=2)


def test_what_a_constructor_takes_is_what_the_settings_hold_and_what_a_group_carries() -> None:
    assert set(GuardSettings.__annotations__) == {*Settings.names(), "prox", "constraint", "smoothness"}
    group = SGD([nn.Parameter(torch.ones(1))], every=7, guard="strict", shrink=0.25).param_groups[0]
    assert Settings.of(group) == Settings(every=7, guard="strict", shrink=0.25)


@pytest.mark.parametrize(
    ("lr", "error"),
    [
        (-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), (-math.inf, ValueError), (True, TypeError),
        ("0.1", TypeError), (None, TypeError), (1j, TypeError), (torch.ones(2), ValueError), (torch.ones(0), ValueError),
        (torch.tensor(math.nan), ValueError), (torch.tensor(True), TypeError), (torch.tensor(1j), TypeError),
    ],
)  # fmt: skip
def test_what_is_no_learning_rate_is_refused(lr: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"lr|learning rate"):
        check_lr(lr)


@pytest.mark.parametrize("lr", [0, 0.0, 1, 1e300, 5e-324, torch.tensor(0.5), torch.tensor([0.5])])
def test_what_is_a_learning_rate_is_taken(lr: object) -> None:
    check_lr(lr)


def test_a_number_is_below_its_bound() -> None:
    check_number("x", 0.0, high=1.0)
    check_number("x", math.nextafter(1.0, 0.0), high=1.0)
    for bad in (1.0, -5e-324, math.nan, math.inf):
        with pytest.raises(ValueError, match="x must be a finite number"):
            check_number("x", bad, high=1.0)


@pytest.mark.parametrize("smoothness", [-1.0, math.nan, math.inf])
def test_a_smoothness_without_meaning_is_refused(smoothness: float) -> None:
    with pytest.raises(ValueError, match="smoothness must be"):
        SGD([nn.Parameter(torch.ones(1))], smoothness=smoothness)


@pytest.mark.parametrize("mode", ["off", "monitor", "strict"])
@pytest.mark.parametrize(
    ("cls", "options", "limit"),
    [
        (SGD, {"momentum": 0.9}, 0.2), (SGD, {"momentum": 0.0}, 2.0),
        (AdamW, {"weight_decay": 0.0}, 2.0),
    ],
)  # fmt: skip
def test_a_rate_above_the_limit_of_a_known_smoothness_is_raised_and_one_below_is_not(
    mode: str, cls: type, options: dict, limit: float
) -> None:
    w, f, smoothness = quadratic()
    for factor in (0.999, 1.001):
        optimizer = cls([w], lr=factor * limit, smoothness=smoothness, guard=mode, **options)
        before = w.detach().clone()
        if factor < 1:
            optimizer.step(closure_of(optimizer, w, f))
            assert not torch.equal(w.detach(), before)
        else:
            with pytest.raises(StabilityError, match=r"exceeds .* smoothness 1; lower it"):
                optimizer.step(closure_of(optimizer, w, f))
            assert torch.equal(w.detach(), before)
            assert optimizer.param_groups[0]["step_count"] == 0


def test_a_clipped_rate_is_that_of_the_step_and_the_users_stays() -> None:
    w, f, smoothness = quadratic()
    v = nn.Parameter(w.detach().clone())
    clipped = SGD([w], lr=5.0, smoothness=smoothness, over_limit="clip", guard="strict", armijo=0.0)
    small = SGD([v], lr=2.0, guard="strict", armijo=0.0)
    for _ in range(10):
        clipped.step(closure_of(clipped, w, f))
        small.step(closure_of(small, v, f))
        assert clipped.param_groups[0]["lr"] == 5.0
        assert clipped.last_step.lr[0] == pytest.approx(2.0, rel=1e-15)
        assert clipped.last_step.scale == 1.0
    torch.testing.assert_close(w.detach(), v.detach(), rtol=1e-12, atol=1e-12)


def test_clipping_scales_all_groups_by_the_one_that_needs_it_most() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [a], "lr": 4.0, "smoothness": 1.0}, {"params": [b], "lr": 0.1}]
    optimizer = SGD(groups, over_limit="clip", guard="off")
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert (a.item(), b.item()) == (-1.0, pytest.approx(0.95))
    assert [g["lr"] for g in optimizer.param_groups] == [4.0, 0.1]


def test_a_rate_above_the_limit_warns_once_and_goes_on() -> None:
    w, f, smoothness = quadratic()
    optimizer = SGD([w], lr=3.0, smoothness=smoothness, over_limit="warn", guard="strict")
    with pytest.warns(UserWarning, match="exceeds 2, the largest one"):
        optimizer.step(closure_of(optimizer, w, f))
    optimizer.step(closure_of(optimizer, w, f))
    assert optimizer.last_step.verdict == "decreased"


def test_the_limit_follows_the_rate_of_a_scheduler() -> None:
    w, f, smoothness = quadratic()
    optimizer = SGD([w], lr=0.5, smoothness=smoothness)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 + 3.0 * t)
    optimizer.step(closure_of(optimizer, w, f))
    scheduler.step()
    optimizer.step(closure_of(optimizer, w, f))  # 2.0, the limit itself
    scheduler.step()
    with pytest.raises(StabilityError, match=r"lr 3\.5"):
        optimizer.step(closure_of(optimizer, w, f))


def test_a_smoothness_is_no_use_where_no_limit_is_known() -> None:
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="no dissipating energy is known"):
        guard(torch.optim.Adagrad([w]), smoothness=1.0)
    with pytest.raises(ValueError, match="no dissipating energy is known"):
        SGD([w], momentum=0.9, nesterov=True, smoothness=1.0)
