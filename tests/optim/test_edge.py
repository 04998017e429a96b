"""The scheduler that caps learning rates at a fraction of the measured limit."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import stableopt as so
from stableopt.errors import StabilityError
from stableopt.optim import limits
from stableopt.optim.agree import Alone
from stableopt.optim.edge import EdgeLR
from stableopt.optim.sharpness import Sharpness
from tests.optim.test_sharpness import problem, train


def quadratic(top: float = 10.0, n: int = 2) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    w, scale = nn.Parameter(torch.ones(n)), torch.linspace(top, 1.0, n)
    return w, lambda: 0.5 * (scale * w * w).sum()


def flat() -> tuple[nn.Parameter, Callable[[], Tensor]]:
    w = nn.Parameter(torch.ones(2))
    return w, lambda: 1e-9 * (w * w).sum()


MAKERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda o: None,
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=17, eta_min=1e-3),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=7),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + 0.1 * t)),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.97),
    "step": lambda o: schedulers.StepLR(o, 5, 0.5),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.95),
    "linear": lambda o: schedulers.LinearLR(o, 0.1, total_iters=10),
    "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=30, power=2.0),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.9, total_steps=41),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.1, 0.8, step_size_up=6),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=6), schedulers.ExponentialLR(o, 0.9)], milestones=[6]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.95)], optimizer=o
    ),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_wrapped_schedule_goes_on_as_if_there_were_no_cap(name: str, tensor: bool) -> None:
    """Capped at every step: the rates in use are the smaller of schedule and cap, the schedule is that of a run without EdgeLR."""
    plain_w, _ = quadratic()
    w, loss = quadratic(top=10.0)
    options = {"lr": torch.tensor(0.8) if tensor else 0.8, "momentum": 0.5}
    plain, capped = torch.optim.SGD([plain_w], **copy.deepcopy(options)), torch.optim.SGD([w], **options)  # type: ignore[arg-type]
    reference, inner = MAKERS[name](plain), MAKERS[name](capped)
    scheduler = EdgeLR(capped, loss, fraction=0.9, every=3, scheduler=inner)
    lr, moved = capped.param_groups[0]["lr"], False
    for _ in range(40):
        plain.step()
        capped.step()
        if reference is not None:
            reference.step()
        scheduler.step()
        scheduled, group = float(plain.param_groups[0]["lr"]), capped.param_groups[0]
        assert scheduler.get_scheduled_lr() == [scheduled]
        assert group["momentum"] == plain.param_groups[0]["momentum"]
        cap = 0.9 * 2 * (1 + group["momentum"]) / 10
        assert float(group["lr"]) == pytest.approx(min(scheduled, cap), rel=1e-6)
        assert float(scheduler.get_last_lr()[0]) == float(group["lr"])
        moved |= scheduler.scale < 1
    assert moved
    if tensor:
        assert capped.param_groups[0]["lr"] is lr
        assert scheduler.get_last_lr()[0] is not lr


def test_it_caps_and_never_raises() -> None:
    w, loss = quadratic()
    optimizer = torch.optim.SGD([w], 1e-3)
    scheduler = EdgeLR(optimizer, loss, every=1)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 1e-3
        assert scheduler.scale == 1.0


def test_a_run_that_diverges_converges_under_the_cap() -> None:
    for capped in (False, True):
        w, loss = quadratic(100.0, 5)
        optimizer = torch.optim.SGD([w], 1.0, momentum=0.9)
        scheduler = EdgeLR(optimizer, loss, fraction=0.5) if capped else None
        start = loss().item()
        for _ in range(200):
            train(optimizer, loss, 1)
            if scheduler is not None:
                scheduler.step()
            if not loss().item() < 1e6 * start:
                break
        assert (loss().item() < 1e-6 * start) is capped


@pytest.mark.parametrize("cls", [torch.optim.AdamW, so.optim.AdamW])
def test_a_net_trained_with_adamw_stays_at_the_fraction(cls: Any) -> None:
    model, loss = problem()
    off = {"guard": "off"} if cls is so.optim.AdamW else {}
    optimizer = cls(model.parameters(), lr=10.0, weight_decay=0.05, **off)
    scheduler = EdgeLR(optimizer, Sharpness(optimizer, loss, tolerance=1e-2, fresh=1), fraction=0.8, every=1)
    assert scheduler.reading is not None
    assert not scheduler.reading.measured  # no metric before the first step
    assert optimizer.param_groups[0]["lr"] == 10.0
    for _ in range(12):
        train(optimizer, loss, 1)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] < 10.0
        edge = scheduler.reading.edge_at(limits.sharpness_limit(optimizer))
        assert edge == pytest.approx(0.8, rel=1e-9)
        assert Sharpness(optimizer, loss, products=60, tolerance=0.0).measure().edge == pytest.approx(0.8, rel=0.05)


def test_it_measures_every_so_many_steps_and_caps_between() -> None:
    w, loss = quadratic()
    calls = []

    def counted() -> Tensor:
        calls.append(1)
        return loss()

    optimizer = torch.optim.SGD([w], 0.1)
    inner = schedulers.LambdaLR(optimizer, lambda t: 1.0 + t)
    scheduler = EdgeLR(optimizer, counted, fraction=1.0, every=4, scheduler=inner)
    seen = []
    for _ in range(9):
        optimizer.step()
        scheduler.step()
        seen.append(len(calls))
    assert seen == [1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_groups_are_capped_jointly() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.01}])
    scheduler = EdgeLR(optimizer, lambda: 5 * a.square().sum() + b.square().sum(), fraction=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.001])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.7})
    optimizer.step()
    scheduler.every = 1
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.001, 0.07])


def test_the_cap_counts_the_weight_decay() -> None:
    """2 (1 + beta) / lr - omega = lambda / fraction, solved for lr."""
    w, loss = quadratic(10.0)
    for lr, decay in ((0.5, 2.0), (5.0, 2.0), (5.0, 200.0)):  # in the last two the decay alone is unstable at first
        optimizer = torch.optim.SGD([w], lr, momentum=0.5, weight_decay=decay)
        scheduler = EdgeLR(optimizer, loss, fraction=0.5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(3.0 / (20 + decay))
        assert scheduler.get_scheduled_lr() == [lr]


def test_what_others_write_is_the_new_schedule() -> None:
    w, loss = quadratic()
    optimizer = torch.optim.SGD([w], 1.0)
    scheduler = EdgeLR(optimizer, loss, fraction=1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert scheduler.get_scheduled_lr() == [0.05]


def test_a_flat_or_concave_loss_is_not_capped() -> None:
    for w, loss in (flat(), (p := nn.Parameter(torch.ones(2)), lambda: -(p * p).sum())):
        optimizer = torch.optim.SGD([w], 3.0)
        EdgeLR(optimizer, loss)
        assert optimizer.param_groups[0]["lr"] == 3.0


def test_warn_leaves_the_rates_and_warns_after_each_measurement() -> None:
    w, loss = quadratic()
    optimizer = torch.optim.SGD([w], 1.0)
    with pytest.warns(UserWarning, match="lr 1 exceeds 0.9 of the linear stability limit, 0.18"):
        scheduler = EdgeLR(optimizer, loss, every=2, over_limit="warn")
    assert optimizer.param_groups[0]["lr"] == 1.0
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    with pytest.warns(UserWarning, match="exceeds"):
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("name", MAKERS)
def test_raise_leaves_everything_as_before(name: str) -> None:
    w, _ = quadratic()
    top = torch.tensor(0.1)

    def loss() -> Tensor:
        return 0.5 * top * (w * w).sum()

    optimizer = torch.optim.SGD([w], 0.8, momentum=0.5)
    inner = MAKERS[name](optimizer)
    scheduler = EdgeLR(optimizer, loss, every=1, scheduler=inner, over_limit="raise")
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    before = copy.deepcopy(
        [scheduler.state_dict(), {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}]
    )
    top.fill_(1e6)
    with pytest.raises(
        StabilityError, match=r"exceeds 0.9 of the linear stability limit, .*sharpness.*estimate from below.*step 6"
    ):
        scheduler.step()
    after = [scheduler.state_dict(), {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}]
    assert str(before) == str(after)
    top.fill_(0.1)
    scheduler.step()  # and it goes on
    assert scheduler.last_epoch == 6


def test_raise_in_the_constructor_leaves_the_rates() -> None:
    w, loss = quadratic()
    optimizer = torch.optim.SGD([w], 1.0)
    with pytest.raises(StabilityError, match="Lower the lr"):
        EdgeLR(optimizer, loss, over_limit="raise")
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_loss_that_fails_leaves_everything_as_before() -> None:
    w, loss = quadratic()
    optimizer = torch.optim.SGD([w], 1.0)
    broken: list[bool] = []

    def sometimes() -> Tensor:
        if broken:
            raise KeyboardInterrupt
        return loss()

    scheduler = EdgeLR(optimizer, sometimes, every=1, scheduler=schedulers.ExponentialLR(optimizer, 0.9))
    before = str(scheduler.state_dict())
    broken.append(True)
    optimizer.step()
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    assert str(scheduler.state_dict()) == before
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.18)


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_run_goes_on_as_the_whole_one(name: str) -> None:
    def build() -> tuple[torch.optim.Optimizer, EdgeLR, Callable[[], Tensor]]:
        model, loss = problem()
        optimizer = torch.optim.SGD(model.parameters(), 30.0, momentum=0.5)
        scheduler = EdgeLR(
            optimizer, Sharpness(optimizer, loss, tolerance=1e-3), every=3, scheduler=MAKERS[name](optimizer)
        )
        scheduler.model = model  # type: ignore[attr-defined]
        return optimizer, scheduler, loss

    def go(optimizer: torch.optim.Optimizer, scheduler: EdgeLR, loss: Callable[[], Tensor], steps: int) -> list[float]:
        used = []
        for _ in range(steps):
            train(optimizer, loss, 1)
            scheduler.step()
            used.append(float(optimizer.param_groups[0]["lr"]))
        return used

    optimizer, scheduler, loss = build()
    go(optimizer, scheduler, loss, 7)
    saved = copy.deepcopy([scheduler.model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])  # type: ignore[attr-defined]
    if name in {"none", "step", "exponential"}:
        saved[2] = json.loads(json.dumps(saved[2]))
    expected = go(optimizer, scheduler, loss, 9)

    optimizer, scheduler, loss = build()
    scheduler.model.load_state_dict(saved[0])  # type: ignore[attr-defined]
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    assert scheduler.last_epoch == 7
    assert float(scheduler.get_last_lr()[0]) == float(optimizer.param_groups[0]["lr"])
    assert go(optimizer, scheduler, loss, 9) == pytest.approx(expected, rel=1e-3)  # the warm direction is not saved


def test_a_state_of_other_groups_or_another_kind_is_refused() -> None:
    w, loss = quadratic()
    one = torch.optim.SGD([w], 1.0)
    state = EdgeLR(one, loss).state_dict()
    two = torch.optim.SGD([{"params": [w]}, {"params": [nn.Parameter(torch.ones(1))]}], 1.0)
    with pytest.raises(ValueError, match="1 groups, the optimizer 2"):
        EdgeLR(two, loss).load_state_dict(state)
    inner = schedulers.ExponentialLR(one, 0.9)
    with pytest.raises(ValueError, match="both wrap"):
        EdgeLR(one, loss, scheduler=inner).load_state_dict(state)


def test_the_plateau_scheduler_gets_its_metric() -> None:
    w, loss = quadratic()
    optimizer = torch.optim.SGD([w], 0.15)
    inner = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    scheduler = EdgeLR(optimizer, loss, fraction=0.5, scheduler=inner)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    for _ in range(4):
        optimizer.step()
        scheduler.step(1.0)
    assert scheduler.get_scheduled_lr() == [0.075]
    assert optimizer.param_groups[0]["lr"] == 0.075


def test_the_guard_and_the_cap_work_together() -> None:
    w, loss = quadratic(10.0)
    optimizer = so.optim.SGD([w], 1.0, momentum=0.9, guard="strict")
    scheduler = EdgeLR(optimizer, loss, fraction=0.05, every=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(200):
        optimizer.step(closure)
        assert optimizer.last_step is not None
        scheduler.step()
    assert loss().item() < 1e-3
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.38, rel=1e-6)


def test_a_warm_up_from_zero_is_measured_as_soon_as_something_moves() -> None:
    w, loss = quadratic()
    optimizer = torch.optim.SGD([w], 1.0)
    scheduler = EdgeLR(optimizer, loss, fraction=1.0, scheduler=schedulers.LambdaLR(optimizer, lambda t: float(t)))
    assert optimizer.param_groups[0]["lr"] == 0.0
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_no_learning_rate_is_stable_with_a_momentum_above_one() -> None:
    w, loss = quadratic()
    optimizer = torch.optim.RMSprop([w], 0.1, momentum=1.5)
    train(optimizer, loss, 1)
    with pytest.raises(StabilityError, match="no learning rate is stable"):
        EdgeLR(optimizer, loss)


def test_wrong_arguments_are_refused_with_a_sentence() -> None:
    w, loss = quadratic()
    optimizer, other = torch.optim.SGD([w], 1.0), torch.optim.SGD([w], 1.0)
    for options, match in (
        ({"every": 0}, "every must be an integer"),
        ({"every": True}, "every must be an integer"),
        ({"over_limit": "stop"}, "over_limit must be"),
        ({"fraction": 1.5}, "fraction must lie"),
        ({"scheduler": schedulers.StepLR(other, 3)}, "the same optimizer"),
    ):
        with pytest.raises(ValueError, match=match):
            EdgeLR(optimizer, loss, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="measures another optimizer"):
        EdgeLR(optimizer, Sharpness(other, loss))
    with pytest.raises(ValueError, match="nothing is known"):
        EdgeLR(torch.optim.Rprop([w]), loss)


def test_torch_does_not_complain_about_the_order_of_calls() -> None:
    w, loss = quadratic()
    optimizer = torch.optim.SGD([w], 1.0)
    scheduler = EdgeLR(optimizer, loss, scheduler=schedulers.StepLR(optimizer, 3))
    assert isinstance(scheduler, schedulers.LRScheduler)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert math.isfinite(float(scheduler.get_lr()[0]))


@pytest.mark.parametrize("ours", [True, False])
def test_the_mean_is_over_the_processes_with_which_the_optimizer_decides(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer that decides alone must not wait for others."""

    class Three:
        size = 3

        @staticmethod
        def total(values: Tensor) -> Tensor:
            return 6 * values  # the others have measured 2.5 times as much

    asked: list[Any] = []
    monkeypatch.setattr(
        "stableopt.optim.agree.Processes.of",
        lambda choice, _device: asked.append(choice) or (Three if choice else Alone),
    )
    w, loss = quadratic()
    optimizer = so.optim.SGD([w], lr=0.01) if ours else torch.optim.SGD([w], lr=0.01)
    if isinstance(optimizer, so.optim.SGD):
        optimizer.decide_with(None)
    reading = EdgeLR(optimizer, loss).reading
    assert set(asked) == ({None} if ours else {"auto"})
    assert reading is not None
    assert reading.plain == pytest.approx(10.0 if ours else 20.0, rel=1e-3)
