"""RAdam has the edge of Adam in its own metric, before and after the rectification, and dissipates there."""

from __future__ import annotations

import math

import pytest
import torch

from stableopt.optim.rules import Rectified
from tests.optim.rules.laws import PENALTIES, group_of, growth_at, one_step, smoothness_in, symmetric


@pytest.mark.parametrize(("omega", "decoupled"), [(0.0, False), (0.5, False), (0.5, True)])
@pytest.mark.parametrize("t", [1.0, pytest.param(4.0, marks=pytest.mark.slow), 1e12])
def test_the_edge_of_the_real_optimizer_is_the_limit_in_the_metric_of_each_step(
    omega: float, decoupled: bool, t: float
) -> None:
    options = {
        "lr": 0.1,
        "betas": (0.8, 1 - 1e-12),
        "eps": 1e-3,
        "weight_decay": omega,
        "decoupled_weight_decay": decoupled,
    }
    frozen = {"step": torch.tensor(t), "exp_avg_sq": torch.full((1,), 1.0)}
    for factor, grows in ((0.995, False), (1.005, True)):
        assert (growth_at(torch.optim.RAdam, options, Rectified(), frozen, factor) > 0) == grows


def test_the_metric_is_flat_before_the_rectification_and_adams_in_the_end() -> None:
    group = group_of(torch.optim.RAdam, betas=(0.9, 0.999), eps=0.5)
    v = torch.tensor([1.0, 4.0])
    for t in range(1, 6):  # rho_t <= 5 for t <= 5
        metric = Rectified().metric({"step": torch.tensor(float(t)), "exp_avg_sq": v}, group)
        torch.testing.assert_close(metric, torch.full((2,), 1 - 0.9**t), rtol=1e-14, atol=0.0)
    metric = Rectified().metric({"step": torch.tensor(6.0), "exp_avg_sq": v}, group)
    longest, beta = 1999.0, 0.999**6
    length = longest - 12 * beta / (1 - beta)
    r = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    assert length > 5
    torch.testing.assert_close(metric, (1 - 0.9**6) * (v.sqrt() + 0.5) / (r * math.sqrt(1 - beta)), rtol=1e-9, atol=0.0)
    late = Rectified().metric({"step": torch.tensor(1e7), "exp_avg_sq": v}, group)
    torch.testing.assert_close(late, v.sqrt() + 0.5, rtol=1e-9, atol=0.0)


def test_a_step_that_is_counted_on_a_device_gives_the_same_metric() -> None:
    """One number per entry takes the path that never reads the count."""
    group = group_of(torch.optim.RAdam)
    for t in (1.0, 5.0, 6.0, 50.0):
        v = torch.rand(3)
        read = Rectified().metric({"step": torch.tensor(t), "exp_avg_sq": v}, group)
        kept = Rectified().metric({"step": torch.full((3,), t), "exp_avg_sq": v}, group)
        torch.testing.assert_close(read, kept, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("omega", [0.0, 0.3])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("start", [0.0, 3.0, 30.0])
def test_the_energy_dissipates_at_the_promised_rate_in_the_metric(omega: float, penalty: str, start: float) -> None:
    rule, prox, n = Rectified(), PENALTIES[penalty], 5
    group = group_of(torch.optim.RAdam, betas=(0.9, 0.99), eps=1e-3, weight_decay=omega, decoupled_weight_decay=True)
    for trial in range(30):
        H, w = symmetric(n), torch.randn(n)
        w = prox.project(w) if penalty == "box" else w
        state = {"step": torch.tensor(start), "exp_avg": 3 * torch.randn(n), "exp_avg_sq": torch.rand(n)}
        state = state if start else {}
        smoothness = smoothness_in(H, rule.metric(rule.update(w, H @ w, state, group)[1], group))
        group["lr"] = rule.energy_limit(smoothness, group) * (0.05 + 0.94 * trial / 29)
        before, after, square = one_step(rule, group, H, w, state, prox)
        rate = 1 - rule.momentum(group) - rule.effective_lr(group, first=False) * (smoothness + omega) / 2
        assert rate >= -1e-12
        assert after <= before - rate * square + 1e-10 * max(1.0, abs(before))
