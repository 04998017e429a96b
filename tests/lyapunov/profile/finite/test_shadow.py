"""The second state of a run: what it shares, what it has for itself, and that the first one comes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt.lyapunov.profile.finite.shadow import Shadow


def made(lr: float = 0.1, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **settings)
    x = torch.randn(8, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean() + model[0].weight.sum()
        loss.backward()
        return loss

    return model, optimizer, closure


def step(shadow: Shadow, optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> None:
    shadow.begin()
    optimizer.step(closure)
    shadow.run(lambda: optimizer.step(closure))


def mean_off(shadow: Shadow) -> Tensor:
    return next(b - getattr(m, n) for m, n, b in shadow._buffers if n == "running_mean")


def test_without_a_perturbation_it_stays_with_the_run_bit_for_bit() -> None:
    model, optimizer, closure = made(momentum=0.9, nesterov=True)
    shadow = Shadow(model, optimizer)
    for _ in range(5):
        step(shadow, optimizer, closure)
    assert shadow.distance({"momentum_buffer": 1.0}) == 0.0
    for module, name, buffer in shadow._buffers:
        assert torch.equal(buffer, getattr(module, name))


def test_the_perturbation_has_its_length_and_spares_what_is_frozen() -> None:
    model, optimizer, _ = made()
    model[0].weight.requires_grad_(False)
    shadow = Shadow(model, optimizer)
    shadow.perturb(1e-3, seed=1)
    assert shadow.distance() == pytest.approx(1e-3, rel=1e-9)
    assert torch.equal(shadow._values[0], model[0].weight)
    other = Shadow(model, optimizer)
    other.perturb(1e-3, seed=2)
    assert not torch.equal(shadow._values[1], other._values[1])


def test_scaling_moves_the_whole_state_along_the_difference() -> None:
    model, optimizer, closure = made(momentum=0.9)
    shadow = Shadow(model, optimizer)
    shadow.perturb(1e-2)
    for _ in range(3):
        step(shadow, optimizer, closure)
    scales = {"momentum_buffer": 0.7}
    for factor in (0.25, 8.0):
        distance, mean = shadow.distance(scales), mean_off(shadow)
        assert mean.abs().max() > 0
        shadow.rescale(factor)
        assert shadow.distance(scales) == pytest.approx(factor * distance, rel=1e-9)
        torch.testing.assert_close(mean_off(shadow), factor * mean, atol=1e-15, rtol=1e-9)
    assert all(int(b) == 3 for _, n, b in shadow._buffers if n == "num_batches_tracked")


def test_the_metric_counts_what_is_named() -> None:
    model, optimizer, closure = made(momentum=0.9)
    shadow = Shadow(model, optimizer)
    shadow.perturb(1e-2)
    step(shadow, optimizer, closure)
    alone = shadow.distance()
    momentum = math.sqrt(shadow.distance({"momentum_buffer": 1.0}) ** 2 - alone**2)
    by_hand = math.sqrt(
        sum(
            float((shadow._states[p]["momentum_buffer"] - optimizer.state[p]["momentum_buffer"]).square().sum())
            for p in model.parameters()
        )
    )
    assert momentum == pytest.approx(by_hand, rel=1e-6)
    assert shadow.distance({"momentum_buffer": 3.0}) == pytest.approx(math.hypot(alone, 3.0 * momentum), rel=1e-9)


def test_numbers_of_groups_belong_to_the_state_and_counters_stay_whole() -> None:
    """Optimizers that estimate their own rate keep it in a group."""
    model, optimizer, _ = made()
    group = optimizer.param_groups[0]
    group |= {"d": 2.0, "k": 4, "seen": [1.0, 2.0], "count": 3.0}
    shadow = Shadow(model, optimizer)
    shadow._groups[0] |= {"d": 3.0, "k": 6, "seen": [2.0, 2.0], "count": 5.0}
    shadow.rescale(0.5)
    mine = shadow._groups[0]
    assert (mine["k"], mine["seen"], mine["count"]) == (6, [2.0, 2.0], 5.0)  # whole numbers are counters
    shadow._groups[0]["d"] = 2.5
    shadow.rescale(0.5)
    assert shadow._groups[0]["d"] == 2.25
    assert group["d"] == 2.0


def test_scaling_up_leaves_second_moments_nonnegative_and_says_so() -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.Adam([w], lr=0.1)
    w.grad = torch.tensor([0.5, 1.0])
    optimizer.step()
    shadow = Shadow(nn.ParameterList([w]), optimizer)
    real, mine = optimizer.state[w], shadow._states[w]
    mine["exp_avg_sq"][0] *= 0.5
    mine["exp_avg"][0] *= 0.5
    shadow.rescale(10.0)
    mine = shadow._states[w]
    torch.testing.assert_close(mine["exp_avg"], torch.stack([-4.0 * real["exp_avg"][0], real["exp_avg"][1]]))
    torch.testing.assert_close(mine["exp_avg_sq"], torch.stack([torch.zeros(()), real["exp_avg_sq"][1]]))
    assert shadow.clipped == 1
    assert mine["step"] == 1


def test_an_error_in_its_step_leaves_the_run_as_it_was() -> None:
    model, optimizer, closure = made(momentum=0.9)
    shadow = Shadow(model, optimizer)
    shadow.begin()
    optimizer.step(closure)
    before = [p.detach().clone() for p in model.parameters()]
    state = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    objects = {p: optimizer.state[p]["momentum_buffer"] for p in model.parameters()}

    def bad() -> None:
        optimizer.step(closure)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        shadow.run(bad)
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b)
        assert optimizer.state[p]["momentum_buffer"] is objects[p]
        assert torch.equal(state[p], objects[p])


def test_a_scheduler_rules_both_rates() -> None:
    model, optimizer, closure = made(lr=0.1)
    shadow = Shadow(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    shadow.perturb(1e-2)
    step(shadow, optimizer, closure)
    assert shadow.distance() == pytest.approx(1e-2, rel=1e-9)  # nobody has moved


def test_gradients_that_a_closure_adds_to_are_its_own() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    model, optimizer = nn.ParameterList([w]), torch.optim.SGD([w], lr=0.5)
    w.grad = torch.tensor([3.0])

    def closure() -> Tensor:
        loss = (w * w).sum() / 2
        loss.backward()
        return loss

    shadow = Shadow(model, optimizer)
    shadow.perturb(0.5)
    start = float(shadow._values[0])
    step(shadow, optimizer, closure)
    assert w.item() == 1.0 - 0.5 * 4.0
    assert w.grad is not None
    assert w.grad.item() == 4.0
    assert float(shadow._values[0]) == pytest.approx(start - 0.5 * (3.0 + start))


def test_parameters_that_are_not_trained_by_it_keep_their_gradients() -> None:
    model, optimizer, closure = made()
    del optimizer.param_groups[0]["params"][4]
    shadow = Shadow(model, optimizer)
    closure()
    step(shadow, optimizer, closure)
    gradient = model[2].weight.grad  # type: ignore[union-attr]
    shadow.perturb(1e-2)
    shadow.begin()
    optimizer.step(closure)
    kept = gradient.clone()
    shadow.run(lambda: optimizer.step(closure))
    assert model[2].weight.grad is gradient  # type: ignore[union-attr]
    assert torch.equal(kept, gradient)


def test_the_order_is_begin_and_run() -> None:
    model, optimizer, _ = made()
    with pytest.raises(RuntimeError, match=r"begin\(\) comes before"):
        Shadow(model, optimizer).run(lambda: None)


class Decaying(torch.optim.SGD):
    """Lowers its own rate in each step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.param_groups[0]["lr"] *= 0.5
        return loss


def test_a_rate_that_the_step_changes_is_that_of_before_the_step() -> None:
    model, optimizer, closure = made()
    optimizer = Decaying(model.parameters(), lr=0.1)
    shadow = Shadow(model, optimizer)
    for _ in range(3):
        step(shadow, optimizer, closure)
        model.zero_grad()
    assert shadow.distance() == 0.0
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3
