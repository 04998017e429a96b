"""The energy of SGD with momentum, prox and projection never rises below its limit, and does past it; in the naive order it does
anyway.

Nothing here uses the guard: the energies are computed from the definition, V = f + g + βη/2 ‖buf‖², after each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from stableopt.constraints import L1, Box, Constraint, L2Ball, SpectralBall
from stableopt.optim import SGD, Adam

Function = Callable[[Tensor], Tensor]

REGULARIZERS = {
    "none": {},
    "L1": {"prox": L1(0.02)},
    "box": {"constraint": Box(-0.3, 0.3)},
    "l2 ball": {"constraint": L2Ball(0.8)},
    "spectral ball": {"constraint": SpectralBall(0.5)},
}
BETAS = (0.0, 0.5, 0.9, 0.99)
MOMENTA = (0.0, pytest.param(0.5, marks=pytest.mark.slow), 0.9, pytest.param(0.99, marks=pytest.mark.slow))


def quadratic() -> tuple[Tensor, Function, float]:
    """Convex, a matrix as variable, curvatures from 0.01 to 1."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-2, 0, 20).reshape(4, 5)
    center = torch.randn(4, 5, generator=generator)
    return 2 * torch.randn(4, 5, generator=generator), lambda w: 0.5 * (curvature * (w - center).square()).sum(), 1.0


def nonconvex() -> tuple[Tensor, Function, float]:
    """Second derivatives in [-0.5, 1.5]."""
    generator = torch.Generator().manual_seed(1)
    return 4 * torch.randn(4, 5, generator=generator), lambda w: (0.25 * w.square() + w.cos()).sum(), 1.5


def logistic() -> tuple[Tensor, Function, float]:
    """Cross-entropy of a linear classifier of digits: smoothness at most half the largest eigenvalue of the second moment."""
    x, y = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(x[:200] / 16), torch.tensor(y[:200])
    smoothness = 0.5 * float(torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))[-1])
    return torch.zeros(10, 64), lambda w: F.cross_entropy(inputs @ w.T, labels), smoothness


def network() -> tuple[Tensor, Function, float]:
    """Two layers with tanh; its smoothness is measured along each run, see below."""
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(12, 3, generator=generator), torch.randn(12, generator=generator)
    start = 0.7 * torch.randn(4, 5, generator=generator)

    def f(w: Tensor) -> Tensor:
        return 0.5 * (torch.tanh(x @ w[:3, :4]) @ w[3, :4] + w[:, 4].sum() * 0.1 - target).square().mean()

    return start, f, math.nan


PROBLEMS = {f.__name__: f for f in (quadratic, nonconvex, logistic, network)}


def penalty(options: dict[str, Any], w: Tensor) -> float:
    return float(options["prox"].value(w)) if "prox" in options else 0.0


def violations(
    start: Tensor,
    f: Function,
    smoothness: float,
    beta: float,
    options: dict[str, Any],
    *,
    steps: int = 200,
    factor: float = 0.999,
    naive: bool = False,
) -> tuple[int, list[Tensor]]:
    """Count the steps that raise the energy by more than rounding; return the path as well."""
    constraint = options.get("constraint")
    w = nn.Parameter(start.clone() if constraint is None else constraint.project(start).clone())
    lr = factor * 2 * (1 - beta) / smoothness
    plain = {"lr": lr, "momentum": beta}
    optimizer = torch.optim.SGD([w], **plain) if naive else SGD([w], guard="off", **plain, **options)
    count, energy, path = 0, float(f(w.detach())) + penalty(options, w.detach()), [w.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        f(w).backward()
        optimizer.step()
        if naive:
            regularizer = options.get("prox", constraint)
            with torch.no_grad():
                w.copy_(regularizer.prox(w.detach(), lr))
        buffer = optimizer.state[w].get("momentum_buffer") if beta else None
        kinetic = 0.0 if buffer is None else 0.5 * beta * lr * float(buffer.square().sum())
        after = float(f(w.detach())) + penalty(options, w.detach()) + kinetic
        count += after > energy + 1e-12 * max(1.0, abs(energy))
        energy = after
        path.append(w.detach().clone())
    return count, path


def largest_curvature(f: Function, path: list[Tensor]) -> float:
    """Return the largest eigenvalue of the Hessian in modulus on the segments of a path."""
    points = [a + t * (b - a) for a, b in pairwise(path) for t in (0.0, 0.25, 0.5, 0.75)]
    hessian = torch.func.jacrev(torch.func.grad(lambda v: f(v.reshape(path[0].shape))))
    hessians = torch.func.vmap(hessian)(torch.stack([p.flatten() for p in points]))
    return float(torch.linalg.eigvalsh(hessians).abs().max())


@pytest.mark.parametrize("beta", MOMENTA)
@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_just_below_the_limit_no_step_raises_the_energy(problem: str, regularizer: str, beta: float) -> None:
    start, f, smoothness = PROBLEMS[problem]()
    options = REGULARIZERS[regularizer]
    if problem != "network":
        assert violations(start, f, smoothness, beta, options)[0] == 0
        return
    smoothness = 0.5
    for _ in range(20):  # until the curvature met on the way is below the one that set the learning rate
        count, path = violations(start, f, smoothness, beta, options, steps=60)
        met = largest_curvature(f, path)
        if met <= smoothness:
            break
        smoothness = 1.02 * met
    assert met <= smoothness
    assert count == 0


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("factor", "rises"), [(0.999, False), (1.001, True)])
def test_the_limit_is_sharp(beta: float, factor: float, rises: bool) -> None:
    """A steady motion on f = w²/2 with g = (1-β) buf makes every inequality of the proof an equality."""
    lr = factor * 2 * (1 - beta)
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = SGD([w], lr=lr, momentum=beta, guard="off")
    buffer = 1.0 / (1 - beta)
    if beta:
        optimizer.state[w]["momentum_buffer"] = torch.tensor([buffer])
    before = 0.5 + 0.5 * beta * lr * buffer**2
    w.grad = w.detach().clone()
    optimizer.step()
    kinetic = 0.5 * beta * lr * optimizer.state[w]["momentum_buffer"].item() ** 2 if beta else 0.0
    change = 0.5 * w.item() ** 2 + kinetic - before
    assert (change > 0) == rises
    law = -((1 - beta) / lr - 0.5) * (w.item() - 1.0) ** 2
    assert change == pytest.approx(law, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("beta", MOMENTA[1:])
@pytest.mark.parametrize("regularizer", ["L1", "box", "l2 ball"])
@pytest.mark.parametrize("problem", ["quadratic", "nonconvex"])
def test_a_projection_after_the_momentum_step_breaks_the_law(problem: str, regularizer: str, beta: float) -> None:
    """What everybody does: step, then prox. The momentum winds up, and the same harness counts."""
    start, f, smoothness = PROBLEMS[problem]()
    options = REGULARIZERS[regularizer] if regularizer != "L1" else {"prox": L1(0.5)}
    assert violations(start, f, smoothness, beta, options, steps=400, naive=True)[0] > 0
    assert violations(start, f, smoothness, beta, options, steps=400)[0] == 0


def test_a_set_contains_every_point_of_the_path() -> None:
    start, f, smoothness = quadratic()
    for options in REGULARIZERS.values():
        constraint = options.get("constraint")
        if isinstance(constraint, Constraint):
            path = violations(start, f, smoothness, 0.9, options, steps=50)[1]
            assert all(constraint.violation(w) == 0.0 for w in path)


@pytest.mark.parametrize("regularizer", ["none", "L1", "box", "l2 ball"])
@pytest.mark.parametrize("beta", MOMENTA[:3])
@pytest.mark.parametrize("problem", ["quadratic", "nonconvex"])
def test_adam_with_a_fixed_metric_obeys_its_law(problem: str, beta: float, regularizer: str) -> None:
    """β₂ so close to 1 that P stays what the state says: V = f + g + β₁/(2η') ‖d‖²_P, η' = η (1-β₁) ≤ 2 (1-β₁)/L_P."""
    start, f, smoothness = PROBLEMS[problem]()
    options = REGULARIZERS[regularizer]
    constraint = options.get("constraint")
    metric = torch.logspace(-1, 1, start.numel()).reshape(start.shape)
    in_metric = smoothness / float(metric.min())
    w = nn.Parameter(start.clone() if constraint is None else constraint.project(start).clone())
    lr = 0.999 * 2 / in_metric
    optimizer = Adam([w], lr=lr, betas=(beta, 1 - 2.0**-52), eps=0.0, guard="off", **options)
    steps = 10.0**9  # no bias is left
    v = metric.square() * (1 - (1 - 2.0**-52) ** steps)
    optimizer.state[w] = {"step": torch.tensor(steps), "exp_avg": torch.zeros_like(w), "exp_avg_sq": v}
    energy = float(f(w.detach())) + penalty(options, w.detach())
    for _ in range(200):
        optimizer.zero_grad()
        f(w).backward()
        old = w.detach().clone()
        optimizer.step()
        d = w.detach() - old
        kinetic = beta / (2 * lr * (1 - beta)) * float((metric * d.square()).sum())
        after = float(f(w.detach())) + penalty(options, w.detach()) + kinetic
        assert after <= energy + 1e-8 * max(1.0, abs(energy))
        energy = after
