"""The limits of SGD are attained, and its energy dissipates at the promised rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stableopt.optim import SGD
from stableopt.optim.rules import HeavyBall
from tests.optim.rules.laws import SGDS, group_of, one_step


@pytest.mark.parametrize("options", [o for o in SGDS if not o.get("maximize") and o.get("dampening", 0.0) < 1])
def test_the_edge_of_sgd_is_attained_by_torch(options: dict[str, float]) -> None:
    """On f = λ/2 w² the iterates stay bounded just below the limit and grow just above it."""
    probe = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, **options)
    limit = HeavyBall().limit(probe.param_groups[0])
    sizes = []
    for factor in (0.99, 1.01):
        w = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([w], lr=0.1, **options)
        for _ in range(3000):
            w.grad = factor * limit * w.detach()
            optimizer.step()
        sizes.append(float(w.detach().abs()))
    assert sizes[0] < 1.0 < 1e3 < sizes[1]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("omega", [0.0, 0.3])
@pytest.mark.parametrize("penalty", ["none", "L1", "box"])
def test_the_energy_of_heavy_ball_dissipates_at_the_promised_rate_up_to_the_limit(
    beta: float, omega: float, penalty: str
) -> None:
    """V⁺ ≤ V − ((1−β)/η' − (L+ω)/2)‖d‖² from any point and any momentum, with prox and realised displacement."""
    from stableopt.constraints import L1, Box

    prox = {"none": None, "L1": L1(0.3), "box": Box(-0.5, 0.5)}[penalty]
    rule, n = HeavyBall(), 5
    group = {"lr": 1.0, "momentum": beta, "dampening": 0.0, "weight_decay": omega, "nesterov": False, "maximize": False}
    for trial in range(40):
        Q = torch.linalg.qr(torch.randn(n, n))[0]
        H = Q @ torch.diag(torch.rand(n) * 3 - 1.5) @ Q.T
        smoothness = float(torch.linalg.eigvalsh(H).abs().max())
        group["lr"] = rule.energy_limit(smoothness, group) * (0.1 + 0.9 * trial / 39)
        w = torch.randn(n) if penalty != "box" else prox.project(torch.randn(n))
        state = {"momentum_buffer": 10 * torch.randn(n)} if beta and trial % 4 else {}
        before, after, square = one_step(rule, group, H, w, state, prox)
        rate = 1 - rule.momentum(group) - group["lr"] * (smoothness + omega) / 2
        assert rate >= -1e-12
        assert after <= before - rate * square + 1e-11 * max(1.0, abs(before))


def test_beyond_its_limit_the_energy_of_heavy_ball_can_rise() -> None:
    """On f = w²/2 with a momentum of size one, the worst start keeps the energy just below the limit and raises it just above."""
    rule, beta = HeavyBall(), 0.5
    group = {"lr": 0.0, "momentum": beta, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    for factor, rises in ((0.99, False), (1.01, True)):
        group["lr"] = factor * rule.energy_limit(1.0, group)
        worst = -math.inf
        for x in torch.linspace(-20, 20, 4001):
            state = {"momentum_buffer": torch.tensor([-1.0 / group["lr"]])}
            before, after, _ = one_step(rule, group, torch.eye(1), torch.tensor([float(x)]), state)
            worst = max(worst, after - before)
        assert (worst > 1e-6) == rises


def test_without_the_realised_displacement_projected_momentum_raises_the_energy() -> None:
    """The trap: clamping after torch's step breaks the law that the corrected buffer keeps, at 0.999 of the limit."""
    from stableopt.constraints import Box

    H = torch.diag(torch.linspace(0.02, 1.0, 8))
    center = torch.linspace(-3, 3, 8)
    beta, box = 0.9, Box(-0.5, 0.5)
    lr = 0.999 * 2 * (1 - beta)
    violations = {}
    for corrected in (True, False):
        w, buffer, count = torch.full((8,), 0.4), torch.zeros(8), 0
        energy = math.inf
        for _ in range(400):
            buffer = beta * buffer + H @ (w - center)
            reached = w - lr * buffer
            new = box.project(reached)
            if corrected:
                buffer = buffer + (reached - new) / lr
            w = new
            f = 0.5 * (w - center) @ H @ (w - center)
            value = float(f + beta * lr / 2 * buffer.square().sum())
            count += value > energy + 1e-12
            energy = value
        violations[corrected] = count
    assert violations[True] == 0
    assert violations[False] > 0


def test_nesterov_has_no_proved_limit_and_a_zero_rate_has_no_edge() -> None:
    group = {"lr": 0.0, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": True, "maximize": False}
    with pytest.raises(ValueError, match="Nesterov"):
        HeavyBall().energy_limit(1.0, group)
    assert HeavyBall().limit(group) == math.inf


@pytest.mark.parametrize("dampening", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("penalty", ["L1", "box", "ball"])
def test_the_law_of_heavy_ball_holds_with_dampening_and_from_the_first_step(dampening: float, penalty: str) -> None:
    from stableopt.constraints import L1, Box, L2Ball

    prox = {"L1": L1(0.3), "box": Box(-0.5, 0.5), "ball": L2Ball(0.7)}[penalty]
    rule, n, beta = HeavyBall(), 4, 0.8
    group = {
        "lr": 1.0,
        "momentum": beta,
        "dampening": dampening,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
    }
    for trial in range(60):
        Q = torch.linalg.qr(torch.randn(n, n))[0]
        H = Q @ torch.diag(torch.rand(n) * 3 - 1.5) @ Q.T
        smoothness = float(torch.linalg.eigvalsh(H).abs().max())
        state = {"momentum_buffer": 10 * torch.randn(n)} if trial % 2 else {}
        group["lr"] = (
            (rule.energy_limit(smoothness, group) if state else 2 * (1 - beta) / smoothness) * (trial + 1) / 60
        )
        w = torch.randn(n) if penalty == "L1" else prox.project(torch.randn(n))
        before, after, square = one_step(rule, group, H, w, state, prox)
        rate = 1 - beta - rule.effective_lr(group, first=not state) * smoothness / 2
        assert rate >= -1e-12
        assert after <= before - rate * square + 1e-11 * max(1.0, abs(before))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Box", "L1", "L2Ball"])
@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("convex", [True, False])
def test_our_sgd_keeps_the_law_that_a_prox_after_torchs_step_breaks(name: str, beta: float, convex: bool) -> None:
    """0.999 of the limit, 300 steps: no violation with the realised displacement, some without it."""
    from stableopt import constraints

    regularizer = {"Box": constraints.Box(-0.5, 0.5), "L1": constraints.L1(0.5), "L2Ball": constraints.L2Ball(0.6)}[
        name
    ]
    scale, center = torch.linspace(0.02, 1.0, 8), torch.linspace(-3, 3, 8)
    smoothness = 1.0 if convex else 1.5

    def f(w: torch.Tensor) -> torch.Tensor:
        x = w - center
        return 0.5 * (scale * x * x).sum() if convex else (0.25 * x * x + (2 * x).cos() / 4).sum()

    lr = 0.999 * 2 * (1 - beta) / smoothness
    rate = (1 - beta) / lr - smoothness / 2
    counts = {}
    for corrected in (True, False):
        w = nn.Parameter(regularizer.prox(torch.linspace(2.0, -1.0, 8)))
        if corrected:
            optimizer = SGD([w], lr=lr, momentum=beta, guard="off", prox=regularizer)
        else:
            optimizer = torch.optim.SGD([w], lr=lr, momentum=beta)
        energy, count = float(f(w.detach()) + regularizer.value(w.detach())), 0
        for _ in range(300):
            old = w.detach().clone()
            optimizer.zero_grad()
            f(w).backward()
            optimizer.step()
            if not corrected:
                with torch.no_grad():
                    w.copy_(regularizer.prox(w.detach(), lr))
            kinetic = beta * lr / 2 * optimizer.state[w]["momentum_buffer"].square().sum()
            new = float(f(w.detach()) + regularizer.value(w.detach()) + kinetic)
            count += new > energy - rate * float((w.detach() - old).square().sum()) + 1e-12
            energy = new
        counts[corrected] = count
    assert counts[True] == 0
    assert counts[False] > 0


def test_momentum_above_one_and_dampening_from_one_have_the_limits_of_their_recursion() -> None:
    """The companion matrix of w and the buffer decides."""

    def radius(beta: float, gain: float, curvature: float, lr: float = 0.1) -> float:
        step = torch.tensor([[1 - lr * gain * curvature, -lr * beta], [gain * curvature, beta]])
        return float(torch.linalg.eigvals(step).abs().max())

    rule = HeavyBall()
    assert rule.limit(group_of(torch.optim.SGD, lr=0.1, momentum=1.1)) == -math.inf
    assert all(radius(1.1, 1.0, c) > 1 for c in torch.linspace(0.01, 50, 50))
    assert rule.limit(group_of(torch.optim.SGD, lr=0.1, momentum=0.5, dampening=1.0)) == math.inf
    assert rule.limit(group_of(torch.optim.SGD, lr=0.1, momentum=0.5, dampening=1.5, weight_decay=0.25)) == -0.25
    assert radius(0.5, -0.5, 0.01) > 1 > radius(0.5, -0.5, -0.01)
