"""The ledger of learning rates: its bounds are those of the theory on the whole list, and they hold for real runs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stableopt as so
import stableopt.theory as th
from stableopt.constraints import L1, Box, L2Ball, Sphere
from stableopt.optim.ledger import StabilityLedger

G, N = 1.3, 7


def run(optimizer: torch.optim.Optimizer, lrs: list[float]) -> None:
    """Do a step with each learning rate; gradients are arbitrary."""
    for lr in lrs:
        for group in optimizer.param_groups:
            group["lr"] = lr
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        optimizer.step()


def sgd(**options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1, **options)


@settings(max_examples=25)
@given(st.lists(st.floats(0.0, 0.4), min_size=1, max_size=12), st.floats(0.0, 0.5), st.floats(0.0, 1.0))
def test_the_sums_give_what_the_theory_gives_for_the_list(lrs: list[float], decay: float, mu: float) -> None:
    L = 2.0
    optimizer = sgd(weight_decay=decay)
    ledger = StabilityLedger(optimizer, smoothness=L, smallest_curvature=mu)
    run(optimizer, lrs)
    assert (ledger.steps, ledger.largest, ledger.adapted) == (len(lrs), max(lrs), 0)
    assert ledger.total == pytest.approx(sum(lrs))
    assert ledger.squares == pytest.approx(sum(lr * lr for lr in lrs))
    assert ledger.convex(G, N, smoothness=L) == pytest.approx(th.convex_stability(G, N, lrs, L + decay))
    assert ledger.nonsmooth(G, N) == pytest.approx(th.nonsmooth_stability(G, N, lrs))
    assert ledger.strongly_convex(G, N, strong=0.5, smoothness=L) == pytest.approx(
        th.strongly_convex_stability(G, N, 0.5 + decay)
    )
    rise = max((t + 1) * lr for t, lr in enumerate(lrs))
    expected = th.nonconvex_stability(G, N, L, rise, len(lrs)) if rise else 0.0
    assert ledger.nonconvex(G, N, smoothness=L) == pytest.approx(expected)
    drift, growth = 0.0, 1.0
    for lr in lrs:
        factor = th.gradient_descent_factor(lr, mu + decay, L + decay)
        drift, growth = factor * drift + lr, growth * factor
    assert ledger.drift == pytest.approx(drift)
    assert ledger.growth == pytest.approx(growth)
    assert ledger.propagated(G, N) == pytest.approx(th.accumulated_stability(G, N, drift))
    assert ledger.propagated(G, N) <= ledger.convex(G, N, smoothness=L) * (1 + 1e-12)
    if mu + decay > 0:
        assert ledger.propagated(G, N) <= th.strongly_convex_stability(G, N, mu + decay) * (1 + 1e-9)


def test_without_a_smallest_curvature_the_growth_is_that_of_any_smooth_loss() -> None:
    optimizer = sgd()
    ledger = StabilityLedger(optimizer, smoothness=3.0)
    run(optimizer, [0.1, 0.2])
    assert ledger.growth == pytest.approx(th.nonconvex_growth(0.1, 3.0) * th.nonconvex_growth(0.2, 3.0))
    plain = StabilityLedger(optimizer)
    assert math.isnan(plain.growth)
    with pytest.raises(ValueError, match="make the ledger with smoothness"):
        plain.propagated(G, N)


def samples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 3, generator=generator)
    return x / x.norm(dim=1, keepdim=True), (torch.rand(20, generator=generator) < 0.5).double() * 2 - 1


def logistic(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Convex, 1-Lipschitz and 1/4-smooth in w for rows of norm 1."""
    return F.softplus(-y * (x @ w)).mean()


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("constraint", [None, L2Ball(1.0)])
def test_two_real_runs_on_data_that_differ_in_one_sample_are_no_further_apart_than_said(
    decay: float, constraint: L2Ball | None
) -> None:
    x, y = samples(0)
    other_x, other_y = x.clone(), y.clone()
    other_x[4], other_y[4] = -x[4], y[4]  # the worst replacement: the gradient turns around
    lr, steps, apart = 4.0 if decay == 0 else 1.5, 40, []
    for draw in range(15):
        indices = torch.randint(20, (steps,), generator=torch.Generator().manual_seed(draw))
        ends, ledgers = [], []
        for X, Y in ((x, y), (other_x, other_y)):
            w = nn.Parameter(torch.zeros(3))
            options = {"lr": lr, "weight_decay": decay}
            optimizer = (
                torch.optim.SGD([w], **options)
                if constraint is None
                else so.optim.SGD([w], **options, constraint=constraint, guard="off")
            )
            ledger = StabilityLedger(optimizer, smoothness=0.25, smallest_curvature=0.0)
            for i in indices:
                optimizer.zero_grad()
                logistic(w, X[i : i + 1], Y[i : i + 1]).backward()
                optimizer.step()
            ends.append(w.detach())
            ledgers.append(ledger)
        apart.append(float((ends[0] - ends[1]).norm()))
    (ledger, again), mean = ledgers, sum(apart) / len(apart)
    assert ledger.state_dict() == again.state_dict()
    assert mean > 0.02
    assert mean <= ledger.propagated(1.0, 20)  # G = 1: the loss differs by no more than the parameters
    assert mean <= ledger.convex(1.0, 20, smoothness=0.25)
    assert mean <= ledger.nonsmooth(1.0, 20)
    if decay:
        assert mean <= ledger.strongly_convex(1.0, 20, strong=0.0, smoothness=0.25)


def test_past_its_hypothesis_the_sum_bounds_nothing_and_is_refused() -> None:
    """Quadratics h x^2 / 2 ± G x, gradients on a small interval: at lr above 2 / h two runs separate faster than the sum grows."""
    h, steps = 1.0, 40
    for lr, within in ((1.9, True), (2.5, False)):
        ends = []
        for sign in (1.0, -1.0):
            w = nn.Parameter(torch.zeros(1))
            optimizer = torch.optim.SGD([w], lr)
            ledger = StabilityLedger(optimizer, smoothness=h, smallest_curvature=0.0)
            for t in range(steps):
                w.grad = h * w.detach() + (sign if t == 0 else 1.0)  # the replaced sample is drawn once
                optimizer.step()
            ends.append(w.item())
        naive = 2.0 * ledger.total  # with n = 1 and G = 1
        assert (abs(ends[0] - ends[1]) <= naive) is within
        assert abs(ends[0] - ends[1]) <= ledger.propagated(1.0, 1)
        if within:
            assert ledger.convex(1.0, 1, smoothness=h) == pytest.approx(naive)
        else:
            with pytest.raises(ValueError, match="largest lr must be at most"):
                ledger.convex(1.0, 1, smoothness=h)


def test_what_the_theorems_do_not_speak_of_is_refused_with_a_sentence() -> None:
    p = nn.Parameter(torch.ones(2))
    for optimizer, match in (
        (sgd(momentum=0.9), "without momentum, but momentum 0.9"),
        (torch.optim.AdamW([p], 0.1), "for SGD; AdamW steps in a metric"),
        (torch.optim.Rprop([p], 0.1), "for SGD; Rprop"),
        (so.optim.AdamW([p], 0.1, guard="off"), "for SGD; AdamW"),
        (so.optim.SGD([p], 0.1, constraint=Sphere(1.0), guard="off"), "convex penalties and sets"),
    ):
        ledger = StabilityLedger(optimizer, smoothness=1.0)
        run(optimizer, [0.1, 0.1])
        assert ledger.total == pytest.approx(0.2)
        for bound in (
            lambda led: led.convex(G, N, smoothness=1.0),
            lambda led: led.strongly_convex(G, N, strong=0.5, smoothness=1.0),
            lambda led: led.nonconvex(G, N, smoothness=1.0),
            lambda led: led.nonsmooth(G, N),
            lambda led: led.propagated(G, N),
        ):
            with pytest.raises(ValueError, match=match):
                bound(ledger)


def test_convex_penalties_and_sets_are_fine() -> None:
    for regularizer in ({"prox": L1(0.1)}, {"constraint": Box(-1.0, 1.0)}):
        optimizer = so.optim.SGD([nn.Parameter(torch.ones(2))], 0.1, guard="off", **regularizer)  # type: ignore[arg-type]
        ledger = StabilityLedger(optimizer)
        run(optimizer, [0.1, 0.1])
        assert ledger.convex(1.0, 10, smoothness=1.0) == pytest.approx(2 / 10 * 0.2)


def test_large_learning_rates_and_overshooting_decays_are_refused() -> None:
    optimizer = sgd(weight_decay=1.0)
    ledger = StabilityLedger(optimizer)
    run(optimizer, [0.6])
    with pytest.raises(ValueError, match=r"at most 1 / \(smoothness \+ weight decay\) = 0.5"):
        ledger.strongly_convex(G, N, strong=0.5, smoothness=1.0)
    with pytest.raises(ValueError, match="strong cannot exceed"):
        ledger.strongly_convex(G, N, strong=0.5, smoothness=0.4)
    assert ledger.convex(G, N, smoothness=1.0) > 0
    with pytest.raises(ValueError, match=r"largest lr must be at most 2 / smoothness = 0\.5"):
        ledger.convex(G, N, smoothness=3.0)  # below 2 / 3, but the decay is curvature, too
    run(optimizer, [1.5])
    with pytest.raises(ValueError, match=r"reached 1\.5, at most 1"):
        ledger.nonsmooth(G, N)
    assert ledger.nonconvex(G, N, smoothness=1.0) > 0
    run(optimizer, [2.5])
    with pytest.raises(ValueError, match=r"reached 2.5, at most 2"):
        ledger.nonconvex(G, N, smoothness=1.0)


def test_groups_count_with_one_learning_rate_only() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "weight_decay": 0.5}], 0.1)
    ledger = StabilityLedger(optimizer, smoothness=1.0, smallest_curvature=0.0)
    run(optimizer, [0.1])
    assert ledger.drift == pytest.approx(0.1)
    assert ledger.growth == pytest.approx(1.0)  # one group has no decay
    assert ledger.strongly_convex(G, N, strong=0.2, smoothness=1.0) == pytest.approx(2 * G * G / (0.2 * N))
    optimizer.param_groups[1]["lr"] = 0.2
    optimizer.step()
    with pytest.raises(ValueError, match="in 1 steps they differed"):
        ledger.convex(G, N, smoothness=1.0)


def closure_of(optimizer: torch.optim.Optimizer, w: Tensor, top: float) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * top * (w * w).sum()
        loss.backward()
        return loss

    return closure


def test_of_a_guarded_step_the_learning_rate_in_use_is_counted() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = so.optim.SGD([w], 0.5, guard="strict", grow=1.0)
    ledger = StabilityLedger(optimizer)
    optimizer.step(closure_of(optimizer, w, 1.0))
    assert (ledger.total, ledger.adapted) == (0.5, 0)
    optimizer.step(closure_of(optimizer, w, 10.0))
    assert optimizer.last_step is not None
    assert optimizer.last_step.action == "shrunk"
    assert ledger.total == 0.5 + optimizer.last_step.lr[0] < 1.0
    assert ledger.adapted == 1
    with pytest.raises(ValueError, match="in 1 steps a guard fitted the learning rate to the data"):
        ledger.convex(1.0, 4, smoothness=1.0)
    assert ledger.convex(1.0, 4, smoothness=1.0, same_rates=True) == pytest.approx(2 / 4 * ledger.total)
    before = ledger.total
    optimizer.step(closure_of(optimizer, w, math.nan))
    assert optimizer.last_step.action == "undone"
    assert ledger.total == before
    assert ledger.steps == 3


def test_a_tensor_learning_rate_is_read() -> None:
    for cls, options in ((torch.optim.SGD, {}), (so.optim.SGD, {"guard": "off"})):
        w = nn.Parameter(torch.ones(2))
        optimizer = cls([w], torch.tensor(0.25), **options)
        ledger = StabilityLedger(optimizer)
        w.grad = torch.ones(2)
        optimizer.step()
        assert ledger.total == 0.25


def test_a_saved_ledger_goes_on_and_is_plain_numbers() -> None:
    optimizer = sgd(weight_decay=0.1)
    whole = StabilityLedger(optimizer, smoothness=1.0)
    first = StabilityLedger(optimizer, smoothness=1.0)
    run(optimizer, [0.1, 0.3])
    saved = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = StabilityLedger(optimizer, smoothness=1.0)
    second.load_state_dict(saved)
    run(optimizer, [0.2])
    assert first.steps == 2
    assert second.state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match=r"smoothness=1\.0, this ledger has 2\.0"):
        StabilityLedger(optimizer, smoothness=2.0).load_state_dict(saved)
    del saved["drift"]
    with pytest.raises(ValueError, match="needs drift"):
        second.load_state_dict(saved)


def test_it_records_what_a_scheduler_does() -> None:
    optimizer = sgd()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    ledger = StabilityLedger(optimizer)
    for _ in range(3):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert ledger.total == pytest.approx(0.1 + 0.05 + 0.025)
    assert ledger.rise == pytest.approx(0.1)


def test_wrong_arguments_are_refused_with_a_sentence() -> None:
    with pytest.raises(TypeError, match="an optimizer is needed"):
        StabilityLedger("SGD")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs smoothness"):
        StabilityLedger(sgd(), smallest_curvature=0.0)
    with pytest.raises(ValueError, match="cannot exceed"):
        StabilityLedger(sgd(), smoothness=1.0, smallest_curvature=2.0)

    class NoRate(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([nn.Parameter(torch.ones(1))], {})

    with pytest.raises(ValueError, match="without lr"):
        StabilityLedger(NoRate())
    with pytest.raises(ValueError, match="samples"):
        StabilityLedger(sgd()).convex(G, 0, smoothness=1.0)


def test_ascent_on_a_convex_loss_has_no_bound() -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=0.1, maximize=True)
    ledger = StabilityLedger(optimizer)
    w.grad = torch.ones(1)
    optimizer.step()
    with pytest.raises(ValueError, match="maximized"):
        ledger.convex(1.0, 10, smoothness=1.0)


@pytest.mark.parametrize("curvature", [None, 0.0, 0.5])
def test_the_growth_of_descent_is_no_bound_for_ascent(curvature: float | None) -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=0.1, maximize=True)
    ledger = StabilityLedger(optimizer, smoothness=1.0, smallest_curvature=curvature)
    assert ledger.propagated(1.0, 10) == 0.0
    w.grad = torch.ones(1)
    optimizer.step()
    with pytest.raises(ValueError, match="maximized"):
        ledger.propagated(1.0, 10)
