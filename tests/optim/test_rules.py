"""Rules are torch's update maps, with limits that are attained and energies that dissipate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stableopt.optim import SGD, AdamW, Adaptive, HeavyBall, rule_for

SGDS = [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True},
    {"momentum": 0.7, "weight_decay": 0.1}, {"momentum": 0.9, "maximize": True}, {"weight_decay": 0.2},
]  # fmt: skip
ADAMS = [
    {},
    {"betas": (0.5, 0.9)},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"maximize": True},
    {"amsgrad": True, "weight_decay": 0.3},
]
CASES = [
    *((torch.optim.SGD, o) for o in SGDS),
    *((cls, o) for cls in (torch.optim.Adam, torch.optim.AdamW) for o in ADAMS),
]


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_the_pure_update_is_the_step_of_torch(cls: type[torch.optim.Optimizer], options: dict[str, object]) -> None:
    w = nn.Parameter(torch.randn(4, 3))
    optimizer = cls([w], lr=0.05, **options)
    rule, group = rule_for(optimizer), optimizer.param_groups[0]
    value, state = w.detach().clone(), {}
    for _ in range(7):
        gradient = torch.randn(4, 3)
        kept, old = value.clone(), {k: v.clone() for k, v in state.items()}
        new_value, new_state = rule.update(value, gradient, state, group)
        assert torch.equal(value, kept)  # pure
        assert all(torch.equal(state[k], old[k]) for k in old)
        value, state = new_value, new_state
        w.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(value, w.detach(), rtol=1e-12, atol=1e-14)
    for name, tensor in optimizer.state[w].items():
        if tensor is not None and name in state:
            torch.testing.assert_close(
                state[name], tensor, rtol=1e-6 if name == "step" else 1e-12, atol=1e-14, check_dtype=False
            )


@pytest.mark.parametrize("options", [o for o in SGDS if not o.get("maximize")])
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


def one_step(
    rule: HeavyBall | Adaptive,
    group: dict[str, object],
    H: torch.Tensor,
    w: torch.Tensor,
    state: dict[str, torch.Tensor],
    prox=None,
):
    """Energy before and after a step on ½ wᵀHw, and |d|²_P / η', with P fixed to that of the step."""
    new, after = rule.update(w, H @ w, state, group)
    metric = rule.metric(after, group)
    eta = rule.effective_lr(group, first=rule.buffer(state) is None)
    after = {k: v.clone() for k, v in after.items()}
    penalty = [0.0, 0.0]
    if prox is not None:
        reached, step = new, eta / metric if isinstance(metric, torch.Tensor) else eta
        new = prox.prox(reached, step)
        rule.realign(reached - new, after, metric, group)
        penalty = [float(prox.value(w)), float(prox.value(new))]
    first = rule.buffer(state) is None
    before = 0.5 * w @ H @ w + rule.energy(w, rule.buffer(state), metric, group, first=first) + penalty[0]
    later = 0.5 * new @ H @ new + rule.energy(new, rule.buffer(after), metric, group, first=first) + penalty[1]
    d = new - w
    return float(before), float(later), float((d * metric * d).sum()) / eta, new, after, metric


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
        before, after, square, *_ = one_step(rule, group, H, w, state, prox)
        rate = 1 - rule.momentum(group) - group["lr"] * (smoothness + omega) / 2
        assert rate >= -1e-12
        assert after <= before - rate * square + 1e-11 * max(1.0, abs(before))


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
        before, after, square, *_ = one_step(rule, group, H, w, state, prox)
        rate = 1 - rule.momentum(group) - rule.effective_lr(group, first=False) * (smoothness + omega) / 2
        assert rate >= -1e-12
        assert after <= before - rate * square + 1e-10 * max(1.0, abs(before))


def test_beyond_its_limit_the_energy_of_heavy_ball_can_rise() -> None:
    """On f = w²/2 with a momentum of size one, the worst start keeps the energy just below the limit and raises it just above."""
    rule, beta = HeavyBall(), 0.5
    group = {"lr": 0.0, "momentum": beta, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    for factor, rises in ((0.99, False), (1.01, True)):
        group["lr"] = factor * rule.energy_limit(1.0, group)
        worst = -math.inf
        for x in torch.linspace(-20, 20, 4001):
            state = {"momentum_buffer": torch.tensor([-1.0 / group["lr"]])}
            before, after, *_ = one_step(rule, group, torch.eye(1), torch.tensor([float(x)]), state)
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


def test_rules_are_found_by_class_and_never_for_a_stranger() -> None:
    w = [nn.Parameter(torch.ones(1))]

    class Other(torch.optim.SGD):
        def step(self, closure=None):
            return None

    class Renamed(torch.optim.SGD):
        pass

    assert rule_for(torch.optim.SGD(w)) == rule_for(SGD(w)) == rule_for(Renamed(w)) == HeavyBall()
    assert rule_for(torch.optim.Adam(w)) == rule_for(torch.optim.AdamW(w)) == rule_for(AdamW(w)) == Adaptive()
    assert rule_for(Other(w)) is None
    assert rule_for(torch.optim.RMSprop(w)) is None


def test_nesterov_has_no_proved_limit_and_a_zero_rate_has_no_edge() -> None:
    group = {"lr": 0.0, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": True, "maximize": False}
    with pytest.raises(ValueError, match="Nesterov"):
        HeavyBall().energy_limit(1.0, group)
    assert HeavyBall().limit(group) == math.inf


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
        before, after, square, *_ = one_step(rule, group, H, w, {})
        rate = 1 - rule.momentum(group) - rule.effective_lr(group, first=True) * (smoothness + omega) / 2
        assert after <= before - rate * square + 1e-10 * max(1.0, abs(before))
        zero = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(n), "exp_avg_sq": torch.zeros(n)}
        assert one_step(rule, group, H, w, zero)[0] == pytest.approx(before, rel=1e-12)


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
        before, after, square, *_ = one_step(rule, group, H, w, state, prox)
        rate = 1 - beta - rule.effective_lr(group, first=not state) * smoothness / 2
        assert rate >= -1e-12
        assert after <= before - rate * square + 1e-11 * max(1.0, abs(before))


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


@pytest.mark.parametrize("rule", [HeavyBall(), Adaptive()])
def test_a_flat_loss_has_no_limit_and_a_smoothness_is_a_number(rule: HeavyBall | Adaptive) -> None:
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
@pytest.mark.parametrize("rule", [HeavyBall(), Adaptive()])
def test_the_energy_limit_is_where_the_rate_of_the_law_changes_sign(
    rule: HeavyBall | Adaptive, dampening: float, omega: float, smoothness: float
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
    if isinstance(rule, Adaptive) and omega and limit > 0.999 / omega:
        assert limit * omega < 1
    else:
        assert rate(limit * (1 + 1e-6)) < 0
