"""The limits of Adam and AdamW are attained for a frozen metric, in which their energy dissipates at the promised rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stableopt.optim.rules import Adaptive, HeavyBall, Rectified, UpdateRule
from tests.optim.rules.laws import growth_at, one_step


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.999)}, {"weight_decay": 0.5}, {"weight_decay": 2.0}])
def test_the_edge_of_adamw_is_attained_for_a_fixed_metric(options: dict[str, object]) -> None:
    """The linear recursion of (w, m) for a frozen P has spectral radius 1 at the limit."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.1, **({"weight_decay": 0.0} | options))
    group = optimizer.param_groups[0]
    lr, beta, omega = group["lr"], group["betas"][0], group["weight_decay"]
    radii = []
    for factor in (0.999, 1.0, 1.001):
        curvature = factor * Adaptive().limit(group)
        step = torch.tensor(
            [[1 - lr * omega - lr * (1 - beta) * curvature, -lr * beta], [(1 - beta) * curvature, beta]]
        )
        radii.append(float(torch.linalg.eigvals(step).abs().max()))
    assert radii[0] < 1 - 1e-6
    assert radii[1] == pytest.approx(1.0, abs=1e-9)
    assert radii[2] > 1 + 1e-6


@pytest.mark.parametrize("omega", [0.0, 0.3])
@pytest.mark.parametrize("penalty", ["none", "L1", "box"])
def test_the_energy_of_adamw_dissipates_at_the_promised_rate_in_its_metric(omega: float, penalty: str) -> None:
    from stableopt.constraints import L1, Box

    prox = {"none": None, "L1": L1(0.3), "box": Box(-0.5, 0.5)}[penalty]
    rule, n = Adaptive(), 5
    group = {
        "lr": 1.0,
        "betas": (0.9, 0.99),
        "eps": 1e-3,
        "weight_decay": omega,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": True,
    }
    for trial in range(60):
        Q = torch.linalg.qr(torch.randn(n, n))[0]
        H = Q @ torch.diag(torch.rand(n) * 3 - 1.5) @ Q.T
        w = torch.randn(n) if penalty != "box" else prox.project(torch.randn(n))
        state = {"step": torch.tensor(float(trial)), "exp_avg": 3 * torch.randn(n), "exp_avg_sq": torch.rand(n)}
        metric = rule.metric(rule.update(w, H @ w, state, group)[1], group)
        smoothness = float(torch.linalg.eigvalsh(H / metric.sqrt() / metric.sqrt()[:, None]).abs().max())
        group["lr"] = rule.energy_limit(smoothness, group) * (0.05 + 0.94 * trial / 59)
        before, after, square = one_step(rule, group, H, w, state, prox)
        rate = 1 - rule.momentum(group) - rule.effective_lr(group, first=False) * (smoothness + omega) / 2
        assert rate >= -1e-12
        assert after <= before - rate * square + 1e-10 * max(1.0, abs(before))


@pytest.mark.parametrize("omega", [0.0, 0.5, 3.0])
def test_the_law_of_adamw_holds_from_its_first_step(omega: float) -> None:
    """Without momentum a decoupled decay still moves: that displacement has energy too."""
    rule, n = Adaptive(), 4
    group = {
        "lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": omega, "amsgrad": False, "maximize": False,
        "decoupled_weight_decay": True,
    }  # fmt: skip
    for trial in range(60):
        Q = torch.linalg.qr(torch.randn(n, n))[0]
        H = Q @ torch.diag(torch.rand(n) * 3 - 1.5) @ Q.T
        w = torch.randn(n)
        metric = rule.metric(rule.update(w, H @ w, {}, group)[1], group)
        smoothness = float(torch.linalg.eigvalsh(H / metric.sqrt() / metric.sqrt()[:, None]).abs().max())
        group["lr"] = rule.energy_limit(smoothness, group) * (0.05 + 0.94 * trial / 59)
        before, after, square = one_step(rule, group, H, w, {})
        rate = 1 - rule.momentum(group) - rule.effective_lr(group, first=True) * (smoothness + omega) / 2
        assert after <= before - rate * square + 1e-10 * max(1.0, abs(before))
        zero = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(n), "exp_avg_sq": torch.zeros(n)}
        assert one_step(rule, group, H, w, zero)[0] == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("rule", [HeavyBall(), Adaptive(), Rectified()])
def test_a_flat_loss_has_no_limit_and_a_smoothness_is_a_number(rule: UpdateRule) -> None:
    group = {
        "lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False,
        "betas": (0.9, 0.999), "decoupled_weight_decay": True,
    }  # fmt: skip
    assert rule.energy_limit(0.0, group) == math.inf
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="smoothness"):
            rule.energy_limit(bad, group)


@pytest.mark.parametrize("smoothness", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("omega", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("dampening", [0.0, 0.4])
@pytest.mark.parametrize("rule", [HeavyBall(), Adaptive(), Rectified()])
def test_the_energy_limit_is_where_the_rate_of_the_law_changes_sign(
    rule: UpdateRule, dampening: float, omega: float, smoothness: float
) -> None:
    """(1−β)/η' − (L+ω)/2 is zero at the limit; for AdamW the limit may also be where a decoupled decay turns θ round, ηω = 1."""
    group = {
        "lr": 0.1, "momentum": 0.8, "dampening": dampening, "weight_decay": omega, "nesterov": False, "maximize": False,
        "betas": (0.8, 0.999), "decoupled_weight_decay": True,
    }  # fmt: skip
    limit = rule.energy_limit(smoothness, group)

    def rate(lr: float) -> float:
        at = group | {"lr": lr}
        return 1 - rule.momentum(at) - rule.effective_lr(at, first=False) * (smoothness + omega) / 2

    assert rate(limit * (1 - 1e-6)) > 0
    if not isinstance(rule, HeavyBall) and omega and limit > 0.999 / omega:
        assert limit * omega < 1
    else:
        assert rate(limit * (1 + 1e-6)) < 0


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("omega", [0.0, 0.5])
@pytest.mark.parametrize("t", [1.0, 3.0, 1e4])
def test_the_edge_of_the_real_optimizer_is_the_limit_in_the_metric_of_each_step(
    cls: type, omega: float, t: float
) -> None:
    options = {"lr": 0.1, "betas": (0.8, 1 - 1e-12), "eps": 1e-3, "weight_decay": omega}
    frozen = {"step": torch.tensor(t), "exp_avg_sq": torch.full((1,), 1.0)}
    for factor, grows in ((0.995, False), (1.005, True)):
        assert (growth_at(cls, options, Adaptive(), frozen, factor) > 0) == grows
