"""RMSprop is a heavy ball in its metric: its edge is attained there and its energy dissipates."""

from __future__ import annotations

import math

import pytest
import torch

from stableopt.optim.rules import RootMeanSquare
from tests.optim.rules.laws import PENALTIES, group_of, growth_at, one_step, smoothness_in, symmetric


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("omega", [0.0, 0.5])
def test_the_edge_of_the_real_optimizer_is_the_limit_in_the_metric(beta: float, centered: bool, omega: float) -> None:
    options = {"lr": 0.1, "alpha": 1 - 1e-12, "momentum": beta, "centered": centered, "weight_decay": omega}
    frozen = {"step": torch.tensor(9.0), "square_avg": torch.full((1,), 4.0)}
    frozen |= {"grad_avg": torch.full((1,), 1.0)} if centered else {}
    for factor, grows in ((0.995, False), (1.005, True)):
        assert (growth_at(torch.optim.RMSprop, options, RootMeanSquare(), frozen, factor) > 0) == grows


def test_the_metric_of_the_centered_form_is_the_deviation() -> None:
    group = group_of(torch.optim.RMSprop, centered=True, eps=0.5)
    state = {"square_avg": torch.tensor([5.0, 4.0]), "grad_avg": torch.tensor([-1.0, 0.0])}
    assert RootMeanSquare().metric(state, group).tolist() == [2.5, 2.5]
    assert RootMeanSquare().limit(group | {"momentum": 1.5}) == -math.inf
    assert RootMeanSquare().limit(group | {"lr": 0.0}) == math.inf


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("omega", [0.0, 0.3])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("centered", [False, True])
def test_the_energy_dissipates_at_the_promised_rate_in_the_metric(
    beta: float, omega: float, penalty: str, centered: bool
) -> None:
    """L is the smoothness of the loss and its coupled decay together."""
    rule, prox, n = RootMeanSquare(), PENALTIES[penalty], 5
    group = group_of(torch.optim.RMSprop, alpha=0.9, eps=1e-2, momentum=beta, weight_decay=omega, centered=centered)
    for trial in range(30):
        H, w = symmetric(n), torch.randn(n)
        w = prox.project(w) if penalty == "box" else w
        state = {"step": torch.tensor(3.0), "square_avg": torch.rand(n) + 0.1}
        state |= {"momentum_buffer": 10 * torch.randn(n)} if beta else {}
        state |= {"grad_avg": torch.rand(n) / 10} if centered else {}
        state = state if trial % 3 else {}
        smoothness = smoothness_in(H + omega * torch.eye(n), rule.metric(rule.update(w, H @ w, state, group)[1], group))
        group["lr"] = rule.energy_limit(smoothness, group) * (0.05 + 0.95 * trial / 29)
        before, after, square = one_step(rule, group, H, w, state, prox)
        rate = 1 - beta - group["lr"] * smoothness / 2
        assert rate >= -1e-12
        assert after <= before - rate * square + 1e-10 * max(1.0, abs(before))


def test_past_the_limit_the_energy_can_rise() -> None:
    rule = RootMeanSquare()
    group = group_of(torch.optim.RMSprop, alpha=1 - 1e-12, eps=0.0, momentum=0.5)
    for factor, rises in ((0.99, False), (1.01, True)):
        group["lr"] = factor * rule.energy_limit(0.25, group)  # H = 1 and P = 4
        worst = -math.inf
        for x in torch.linspace(-80, 80, 801):
            state = {
                "step": torch.tensor(1.0),
                "square_avg": torch.tensor([16.0]),
                "momentum_buffer": torch.tensor([-1 / group["lr"]]),
            }
            before, after, _ = one_step(rule, group, torch.eye(1), x[None], state)
            worst = max(worst, after - before)
        assert (worst > 1e-6) == rises
