"""Every limit, found again by bisection on the real optimizer."""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stableopt as so
from stableopt.constraints import L1, Box
from stableopt.optim import rule_for
from stableopt.optim.limits import ScheduleFree, energy_limit, known_limits, max_lr, sharpness_limit

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

TOLERANCE = 0.005
METRIC = torch.tensor([0.5, 2.0], dtype=torch.float64)  # the diagonal of P, the same in all adaptive cases
LATE = 1e15  # a step count at which every bias correction has died out
SLOW = 1 - 1e-12  # a decay of the second moment that freezes it
TURN = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)


def hessian(curvature: float, metric: Tensor) -> Tensor:
    """Return H with the eigenvalues ``curvature`` and 0.3 ``curvature`` in the metric, not diagonal in it."""
    root = metric.sqrt()
    return root[:, None] * (TURN * torch.tensor([curvature, 0.3 * curvature])) @ TURN.T * root


def frozen(optimizer: torch.optim.Optimizer, p: Tensor, metric: Tensor) -> None:
    """Give the optimizer the state of a late step with the second moment of the metric, and no momentum."""
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[p]
    for name, value in (("exp_avg_sq", metric**2), ("square_avg", metric**2), ("exp_avg", 0.0), ("z", 0.0)):
        if name in state:
            state[name].copy_(torch.as_tensor(value))
    for name, number in (("step", LATE), ("mu_product", 0.0)):
        if name in state:
            state[name].fill_(number)
    if "k" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["k"] = int(LATE)


def grows(
    make: Make, H: Tensor, metric: Tensor | None = None, *, steps: int = 400, minimum: Tensor | None = None
) -> bool:
    """Run the optimizer on a quadratic from a tiny perturbation of its minimum, and see whether that grows."""
    at = torch.zeros(2) if minimum is None else minimum
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = make([p])
    frozen(optimizer, p, torch.ones(2) if metric is None else metric)
    size = 1e-12 if minimum is None else 1e-9
    with torch.no_grad():
        p.copy_(at + size * torch.tensor([1.0, 0.7]))
        if "z" in optimizer.state[p]:
            optimizer.state[p]["z"].copy_(p)
    sizes = []
    for _ in range(steps):
        p.grad = H @ (p.detach() - at)
        if minimum is not None:
            p.grad += pull_of(optimizer, at)
        optimizer.step()
        sizes.append((p.detach() - at).norm().item())
        if sizes[-1] > 1e4 * size:
            return True
    half = steps // 2
    return max(sizes[-20:]) > (1 + 1e-6) * max(sizes[half - 20 : half])


def pull_of(optimizer: torch.optim.Optimizer, at: Tensor) -> Tensor:
    """Return the gradient of the loss at a minimum with a penalty or set: it balances that."""
    group = optimizer.param_groups[0]
    if group["prox"] is not None:
        return -group["prox"].weight * at.sign() if hasattr(group["prox"], "weight") else -0.1 * at.sign()
    return torch.where(at >= 1.0, -3.0, 0.0)  # on the face of the box the loss pushes outwards


def threshold(fails: Callable[[float], bool], low: float, high: float) -> float:
    """Bisect between a curvature that is stable and one that is not."""
    assert not fails(low)
    assert fails(high)
    for _ in range(14):
        middle = math.sqrt(low * high) if low > 0 else (low + high) / 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    return low


def cases(optim: Any) -> Iterator[tuple[str, Make, Tensor | None]]:
    """Yield the optimizers of torch or of the package, with the metric that their state is given."""
    off = {} if optim is torch.optim else {"guard": "off"}
    late = {"betas": (0.9, SLOW), "eps": 1e-9, **off}
    nesterov = {"momentum": 0.8, "nesterov": True}
    yield "GD", lambda p: optim.SGD(p, 0.2, **off), None
    yield "coupled decay", lambda p: optim.SGD(p, 0.2, weight_decay=3.0, **off), None
    yield "momentum", lambda p: optim.SGD(p, 0.2, momentum=0.9, **off), None
    yield "dampening", lambda p: optim.SGD(p, 0.2, momentum=0.9, dampening=0.4, weight_decay=3.0, **off), None
    yield "dampening alone", lambda p: optim.SGD(p, 0.2, dampening=0.4, **off), None
    yield "Nesterov", lambda p: optim.SGD(p, 0.2, **nesterov, **off), None
    yield "Nesterov, decay", lambda p: optim.SGD(p, 0.2, **nesterov, weight_decay=1.0, **off), None
    yield "RMSprop", lambda p: optim.RMSprop(p, 0.2, alpha=SLOW, eps=1e-9, **off), METRIC
    yield "RMSprop, momentum", lambda p: optim.RMSprop(p, 0.2, alpha=SLOW, eps=1e-9, momentum=0.7, **off), METRIC
    yield "Adam", lambda p: optim.Adam(p, 0.2, **late), METRIC
    yield "AdamW", lambda p: optim.AdamW(p, 0.2, weight_decay=0.5, **late), METRIC
    yield "AdamW, half", lambda p: optim.AdamW(p, 0.2, weight_decay=0.5, **(late | {"betas": (0.5, SLOW)})), METRIC
    yield "NAdam", lambda p: optim.NAdam(p, 0.2, **late), METRIC
    yield "NAdam, decay", lambda p: optim.NAdam(p, 0.2, weight_decay=0.5, decoupled_weight_decay=True, **late), METRIC
    yield "RAdam", lambda p: optim.RAdam(p, 0.2, **late), METRIC
    yield "RAdam, decay", lambda p: optim.RAdam(p, 0.2, weight_decay=0.5, decoupled_weight_decay=True, **late), METRIC


CASES = [
    pytest.param(make, metric, id=f"{name} ({whose})")
    for whose, optim in (("torch", torch.optim), ("ours", so.optim))
    for name, make, metric in cases(optim)
]
QUICK = {"Nesterov, decay (ours)", "AdamW (ours)"}
MEASURED = [
    pytest.param(
        *case.values, id=case.id, marks=() if "torch" in str(case.id) or case.id in QUICK else pytest.mark.slow
    )
    for case in CASES
]
"""Ours step like torch's, bit for bit, as the tests of conformance say; most of them are measured in the longer run."""


@pytest.mark.parametrize(("make", "metric"), MEASURED)
def test_the_sharpness_limit_is_where_the_real_optimizer_begins_to_diverge(make: Make, metric: Tensor | None) -> None:
    (limit,) = sharpness_limit(make([torch.nn.Parameter(torch.zeros(2))]))

    def fails(curvature: float) -> bool:
        return grows(make, hessian(curvature, torch.ones(2) if metric is None else metric), metric)

    assert threshold(fails, limit / 5, 3 * limit) == pytest.approx(limit, rel=TOLERANCE)
    assert not fails((1 - TOLERANCE) * limit)
    assert fails((1 + TOLERANCE) * limit)


@pytest.mark.parametrize(("make", "metric"), CASES)
def test_max_lr_is_the_learning_rate_at_which_the_limit_is_the_sharpness(make: Make, metric: Tensor | None) -> None:
    optimizer = make([torch.nn.Parameter(torch.zeros(2))])
    (limit,) = sharpness_limit(optimizer)
    assert max_lr(optimizer, limit) == pytest.approx([0.2], rel=1e-12)
    (lr,) = max_lr(optimizer, 5.0, fraction=0.5)
    optimizer.param_groups[0]["lr"] = lr
    assert sharpness_limit(optimizer) == pytest.approx([10.0], rel=1e-12)
    assert max_lr(optimizer, [5.0], 0.5) == [lr]


@pytest.mark.parametrize("optim", [torch.optim, so.optim], ids=["torch", "ours"])
def test_adamw_bears_negative_curvature_down_to_its_decay(optim: Any) -> None:
    decay = 0.5
    off = {} if optim is torch.optim else {"guard": "off"}

    def fails(depth: float) -> bool:
        def make(p: list[Tensor]) -> torch.optim.Optimizer:
            return optim.AdamW(p, 0.8, betas=(0.9, SLOW), eps=1e-9, weight_decay=decay, **off)

        return grows(make, hessian(-depth, METRIC), METRIC, steps=600)

    assert threshold(fails, decay / 5, 3 * decay) == pytest.approx(decay, rel=TOLERANCE)
    assert not fails((1 - TOLERANCE) * decay)
    assert fails((1 + TOLERANCE) * decay)


def test_a_coupled_decay_of_an_adaptive_optimizer_is_curvature() -> None:
    """The limit is that without decay; the curvature is that of the loss with the decay."""
    for name, options in (
        ("RMSprop", {"alpha": SLOW}),
        ("Adam", {"betas": (0.9, SLOW)}),
        ("RAdam", {"betas": (0.9, SLOW)}),
    ):
        cls, decay = getattr(torch.optim, name), 4.0

        def make(
            p: list[Tensor], cls: Any = cls, options: Any = options, decay: float = decay
        ) -> torch.optim.Optimizer:
            return cls(p, 0.2, eps=1e-9, weight_decay=decay, **options)

        (limit,) = sharpness_limit(make([torch.nn.Parameter(torch.zeros(2))]))
        for part, expected in ((1 - TOLERANCE, False), (1 + TOLERANCE, True)):
            H = hessian(part * limit, METRIC) - decay * torch.eye(2)
            assert grows(make, H, METRIC) is expected, name


def averaging(c: float, make: Make) -> Make:
    """Let a schedule-free optimizer average with a constant weight c for the newest point."""

    def made(p: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = make(p)
        optimizer.train()  # type: ignore[attr-defined]

        def hold(optimizer: Any, args: Any, kwargs: Any) -> None:
            group = optimizer.param_groups[0]
            group["weight_sum"] = group["lr"] ** 2 * (1 / c - 1)
            group["lr_max"] = group["lr"]

        hold(optimizer, None, None)
        optimizer.register_step_pre_hook(hold)
        return optimizer

    return made


class Twin(torch.optim.Optimizer):
    """Schedule-free gradient descent, literally: base point, average, and the gradient between them."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "k": 0,
            "weight_sum": 0.0,
            "lr_max": -1.0,
        }
        super().__init__(params, defaults | {"r": 0.0, "weight_lr_power": 2, "warmup_steps": 0})

    def train(self) -> None:
        """Do nothing."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            eta, beta, group["lr_max"] = group["lr"], group["momentum"], max(group["lr_max"], group["lr"])
            weight = group["lr_max"] ** 2
            group["weight_sum"] += weight
            c, group["k"] = weight / group["weight_sum"], group["k"] + 1
            for p in group["params"]:
                state = self.state[p]
                z = state.setdefault("z", p.detach().clone())
                x = (p - (1 - beta) * z) / beta
                z -= eta * (p.grad + group["weight_decay"] * p)
                x = (1 - c) * x + c * z
                p.copy_((1 - beta) * z + beta * x)


@pytest.mark.parametrize("c", [1e-12, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("name", ["Twin", "SGDScheduleFree", "AdamWScheduleFree"])
def test_the_limit_of_schedule_free_averaging(name: str, c: float, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = None
    if name == "Twin":
        package = types.ModuleType("schedulefree")
        package.SGDScheduleFree = Twin  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "schedulefree", package)
        make = averaging(c, lambda p: Twin(p, 0.2, momentum=0.9, weight_decay=0.5))
    elif name == "SGDScheduleFree":
        package = pytest.importorskip("schedulefree")
        make = averaging(c, lambda p: package.SGDScheduleFree(p, 0.2, momentum=0.9, weight_decay=0.5))
    else:
        package, metric = pytest.importorskip("schedulefree"), METRIC
        options = {"betas": (0.9, SLOW), "eps": 1e-9, "weight_decay": 0.5}
        make = averaging(c, lambda p: package.AdamWScheduleFree(p, 0.2, **options))
    (limit,) = sharpness_limit(make([torch.nn.Parameter(torch.zeros(2))]))
    assert limit == pytest.approx(so.theory.schedule_free_edge(1.0, 0.9, c) / 0.2 - 0.5, rel=1e-9)

    def fails(curvature: float) -> bool:
        return grows(make, hessian(curvature, torch.ones(2) if metric is None else metric), metric, steps=600)

    assert threshold(fails, limit / 5, 3 * limit) == pytest.approx(limit, rel=TOLERANCE)
    assert not fails((1 - TOLERANCE) * limit)
    assert fails((1 + TOLERANCE) * limit)
    optimizer = make([torch.nn.Parameter(torch.zeros(2))])
    assert max_lr(optimizer, limit) == pytest.approx([0.2])
    with pytest.raises(ValueError, match="schedule-free averaging"):
        energy_limit(optimizer, 1.0)


def test_schedule_free_limits_follow_the_warm_up_and_the_age_of_the_average() -> None:
    group = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "k": 0, "weight_sum": 0.0, "lr_max": -1.0}
    group |= {"r": 0.0, "weight_lr_power": 2, "warmup_steps": 0}
    rule = ScheduleFree(adaptive=False)
    assert rule.limit(group) == pytest.approx(2 / 0.5 - 0.25)  # the first average is the newest point alone
    older = group | {"k": 9, "weight_sum": 9 * 0.25}
    assert rule.limit(older) == pytest.approx(so.theory.schedule_free_edge(1.0, 0.5, 0.1) / 0.5 - 0.25)
    assert rule.limit(group | {"warmup_steps": 4}) == pytest.approx(4 * 2 / 0.5 - 0.25)
    assert rule.max_lr(3.75, group | {"warmup_steps": 4}) == pytest.approx(4 * 0.5)
    assert rule.max_lr(1.875, group, fraction=0.5) == pytest.approx(0.5)
    assert rule.limit(group | {"lr": 0.0}) == math.inf
    assert rule.max_lr(-1.0, group) == math.inf
    metric = ScheduleFree(adaptive=True).metric(
        {"exp_avg_sq": torch.tensor([0.75])}, {"betas": (0.9, 0.5), "k": 2, "eps": 0.5}
    )
    assert metric.tolist() == [1.5]


def test_a_schedule_free_class_with_its_own_step_is_another_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Twin):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            """Do nothing."""

    package = types.ModuleType("schedulefree")
    package.SGDScheduleFree = Twin  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "schedulefree", package)
    p = [torch.nn.Parameter(torch.zeros(2))]
    assert known_limits(Twin(p, 0.1)) == ScheduleFree(adaptive=False)
    with pytest.raises(ValueError, match="nothing is known about the update of Other"):
        known_limits(Other(p, 0.1))


@pytest.mark.parametrize("kind", ["prox", "constraint"])
def test_proximal_and_projected_gradient_are_stable_up_to_two_over_the_smoothness(kind: str) -> None:
    """Around a minimum that the penalty shifts, and around one that lies on a face of the box in the other coordinate."""
    minimum = torch.tensor([0.7, -0.4]) if kind == "prox" else torch.tensor([0.2, 1.0])
    regularizer = L1(0.1) if kind == "prox" else Box(-1.0, 1.0)

    def make(p: list[Tensor]) -> torch.optim.Optimizer:
        return so.optim.SGD(p, 0.2, guard="off", **{kind: regularizer})  # type: ignore[arg-type]

    (limit,) = sharpness_limit(make([torch.nn.Parameter(torch.zeros(2))]))
    assert limit == pytest.approx(10.0)
    assert so.theory.prox_gradient_energy_limit(10.0) == pytest.approx(0.2)

    def fails(curvature: float) -> bool:
        return grows(make, torch.diag(torch.tensor([curvature, 0.3 * curvature])), minimum=minimum)

    assert threshold(fails, limit / 5, 3 * limit) == pytest.approx(limit, rel=TOLERANCE)
    assert not fails((1 - TOLERANCE) * limit)
    assert fails((1 + TOLERANCE) * limit)


def batches_and_steps(Hs: list[Tensor], size: int, lr: float) -> list[Tensor]:
    """Return the step of torch's SGD on every batch without replacement, as matrices read off the real optimizer."""
    steps = []
    for batch in itertools.combinations(Hs, size):
        columns = []
        for e in torch.eye(len(Hs[0])):
            p = torch.nn.Parameter(e.clone())
            p.grad = sum(batch, torch.zeros_like(Hs[0])) @ e / size
            torch.optim.SGD([p], lr).step()
            columns.append(p.detach())
        steps.append(torch.stack(columns, dim=1))
    return steps


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_mean_square_limit_of_sgd_against_all_batches(size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(2, 1, generator=generator) for _ in range(5)]
    Hs = [f @ f.T for f in factors]
    edge = so.theory.mean_square_edge([H.numpy() for H in Hs], size)

    def fails(lr: float) -> bool:
        steps = [A.numpy() for A in batches_and_steps(Hs, size, lr)]
        mean = sum(np.kron(A, A) for A in steps) / len(steps)
        return float(np.abs(np.linalg.eigvals(mean)).max()) > 1

    assert threshold(fails, edge / 5, 3 * edge) == pytest.approx(edge, rel=TOLERANCE)
    assert not fails((1 - TOLERANCE) * edge)
    assert fails((1 + TOLERANCE) * edge)
    sufficient = min(
        2 / np.linalg.eigvalsh(sum(b) / size)[-1] for b in itertools.combinations([H.numpy() for H in Hs], size)
    )
    assert sufficient <= edge * (1 + 1e-9) <= 2 / np.linalg.eigvalsh(sum(H.numpy() for H in Hs) / 5)[-1] * (1 + 2e-9)


def test_sgd_is_stable_for_every_sequence_iff_every_batch_is() -> None:
    generator = torch.Generator().manual_seed(4)
    factors = [torch.randn(2, 1, generator=generator) for _ in range(4)]
    Hs = [f @ f.T for f in factors]
    sharpest = max(float(torch.linalg.eigvalsh(sum(b) / 2)[-1]) for b in itertools.combinations(Hs, 2))
    for part, expected in ((1 - TOLERANCE, False), (1 + TOLERANCE, True)):
        steps = batches_and_steps(Hs, 2, part * 2 / sharpest)
        # a symmetric step repeated grows iff its norm exceeds 1; if none does, no sequence grows
        assert any(float(torch.linalg.matrix_norm(A, 2)) > 1 for A in steps) is expected
        worst = max(steps, key=lambda A: float(torch.linalg.matrix_norm(A, 2)))
        assert (float(torch.linalg.matrix_norm(torch.linalg.matrix_power(worst, 1000), 2)) > 1) is expected


def test_sharpness_aware_minimization_on_the_optimizer_of_torch() -> None:
    """The ascent by hand, the descent by torch: the component along the top eigenvector shrinks or grows in the step."""
    lr, radius, norm = 0.2, 0.3, 0.5
    limit = norm / (2 * radius) * (math.sqrt(1 + 8 * radius / (lr * norm)) - 1)  # Long and Bartlett
    assert so.theory.sam_edge(limit, norm, radius) == pytest.approx(lr)
    assert limit < sharpness_limit(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr))[0]

    def fails(curvature: float) -> bool:
        H = hessian(curvature, torch.ones(2))
        g = norm * TURN @ torch.tensor([0.6, 0.8])
        p = torch.nn.Parameter(torch.linalg.solve(H, g))
        before = abs(float(TURN[:, 0] @ p.detach()))
        p.grad = H @ (p.detach() + radius * g / g.norm())
        torch.optim.SGD([p], lr).step()
        return abs(float(TURN[:, 0] @ p.detach())) > before

    assert threshold(fails, limit / 5, 3 * limit) == pytest.approx(limit, rel=TOLERANCE)


def test_steepest_descent_in_the_largest_norm_is_stable_up_to_two_over_its_generalized_sharpness() -> None:
    """d = sign(g), step lr |g|_1 d: the limit is max over |d|_inf <= 1 of d'Hd = 2 / lr."""
    lr, shape = 0.1, torch.tensor([[1.0, 0.4], [0.4, 1.0]])
    corners = [torch.tensor(c) for c in itertools.product((-1.0, 1.0), repeat=2)]
    sharpness = max(float(c @ shape @ c) for c in corners)

    def fails(curvature: float) -> bool:
        H, growing = curvature / sharpness * shape, False
        for start in (*corners, torch.tensor([1.0, -0.3])):
            p = torch.nn.Parameter(1e-3 * start)
            optimizer = torch.optim.SGD([p], lr)
            values = []
            for _ in range(300):
                g = H @ p.detach()
                p.grad = g.abs().sum() * g.sign()
                optimizer.step()
                values.append(float(p.detach() @ H @ p.detach()))
            growing |= values[-1] > values[10]
        return growing

    assert threshold(fails, 0.2 * 2 / lr, 3 * 2 / lr) == pytest.approx(2 / lr, rel=TOLERANCE)


def test_lion_stays_within_one_over_its_decay_and_comes_near_it() -> None:
    decay, w = 0.5, torch.nn.Parameter(torch.tensor([0.3, -1.0, 0.1]))
    optimizer = so.optim.Lion([w], lr=0.1, weight_decay=decay, guard="off")
    bound = rule_for(optimizer).norm_limit(optimizer.param_groups[0], w.shape)  # type: ignore[union-attr]
    assert bound == pytest.approx(1 / decay)
    generator = torch.Generator().manual_seed(0)
    for t in range(400):
        w.grad = -torch.ones(3) if t > 200 else 1e6 * torch.randn(3, generator=generator)
        optimizer.step()
        assert w.abs().max() <= max(1.0, bound) * (1 + 1e-12)
    assert w.abs().max() >= (1 - TOLERANCE) * bound
    with torch.no_grad():
        w.fill_(3.0)  # from outside it only goes down
    for _ in range(100):
        w.grad = -torch.ones(3)
        optimizer.step()
        assert w.abs().max() <= 3.0
    with pytest.raises(ValueError, match="no linear limit"):
        sharpness_limit(optimizer)


def test_muon_of_torch_exceeds_one_over_its_decay_by_a_fifth_and_ours_does_not() -> None:
    decay, lr, shape = 0.5, 0.2, (2, 2)

    def reach(cls: Any, gradient: Tensor, **options: Any) -> float:
        W = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        optimizer = cls([W], lr=lr, weight_decay=decay, momentum=0.0, nesterov=False, **options)
        for _ in range(80):
            W.grad = gradient.clone()
            optimizer.step()
        return float(torch.linalg.matrix_norm(W.detach().double(), 2))

    # the five steps take a singular value of 0.0041 of the norm furthest
    angles = [*np.linspace(0.004, 0.0043, 6), *np.linspace(0.01, 0.78, 10)]
    candidates = [torch.diag(torch.tensor([math.sin(a), math.cos(a)], dtype=torch.float32)) for a in angles]
    steps = [reach(torch.optim.Muon, g) * decay for g in candidates]
    c = so.theory.newton_schulz_norm()
    assert max(steps) > 1.2  # above 1: the witness
    assert max(steps) <= c * (1 + 2**-6)  # bfloat16 rounds
    assert max(steps) == pytest.approx(c, rel=TOLERANCE)
    optimizer = so.optim.Muon([torch.nn.Parameter(torch.zeros(shape))], lr=lr, weight_decay=decay, guard="off")
    bound = rule_for(optimizer).norm_limit(optimizer.param_groups[0], torch.Size(shape))  # type: ignore[union-attr]
    assert bound == pytest.approx(1 / decay)
    ours = [reach(so.optim.Muon, g, guard="off") for g in candidates]
    assert max(ours) <= bound
    assert max(ours) >= 0.99 * bound
    torch_optimizer = torch.optim.Muon([torch.nn.Parameter(torch.zeros(shape))], lr=lr, weight_decay=decay)
    # in bfloat16 nothing is proved about it
    assert rule_for(torch_optimizer).norm_limit(torch_optimizer.param_groups[0], torch.Size(shape)) is None  # type: ignore[union-attr]


def test_the_energy_limit_of_an_optimizer_is_that_of_its_law() -> None:
    p = [torch.nn.Parameter(torch.zeros(2))]
    for optim in (torch.optim, so.optim):
        assert energy_limit(optim.SGD(p, 0.2, momentum=0.9, weight_decay=1.0), 3.0) == [
            so.theory.sgd_energy_limit(3.0, momentum=0.9, weight_decay=1.0)
        ]
        with pytest.raises(ValueError, match="Nesterov"):
            energy_limit(optim.SGD(p, 0.2, momentum=0.9, nesterov=True), 3.0)
        assert energy_limit(optim.Adam(p, 0.2), 3.0) == [so.theory.adamw_energy_limit(3.0, 0.9, 0.0)]
    two = torch.optim.SGD([{"params": p}, {"params": [torch.nn.Parameter(torch.zeros(1))], "momentum": 0.5}], 0.2)
    assert energy_limit(two, 2.0) == [1.0, 0.5]
    assert energy_limit(two, [2.0, 4.0]) == [1.0, 0.25]
    assert sharpness_limit(two) == pytest.approx([10.0, 15.0])
    assert max_lr(two, [10.0, 15.0]) == pytest.approx([0.2, 0.2])
    assert max_lr(two, torch.tensor(10.0)) == pytest.approx([0.2, 0.3])  # type: ignore[arg-type]


def test_the_limits_read_a_tensor_learning_rate_and_an_lr_of_zero() -> None:
    p = [torch.nn.Parameter(torch.zeros(2))]
    assert sharpness_limit(torch.optim.SGD(p, torch.tensor(0.2))) == pytest.approx([10.0])
    assert sharpness_limit(torch.optim.SGD(p, 0.0)) == [math.inf]


def test_a_guarded_optimizer_has_the_limits_of_what_it_guards() -> None:
    p = [torch.nn.Parameter(torch.zeros(2))]
    for plain in (torch.optim.SGD(p, 0.2, momentum=0.5), torch.optim.AdamW(p, 0.2)):
        expected = sharpness_limit(plain)
        assert sharpness_limit(so.optim.guard(plain)) == expected
    with pytest.raises(ValueError, match="no stability limit is known"):
        sharpness_limit(so.optim.guard(torch.optim.Rprop(p)))


def test_what_has_no_limits_is_refused_with_a_sentence() -> None:
    p = [torch.nn.Parameter(torch.zeros(2))]

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    for optimizer in (torch.optim.Rprop(p), torch.optim.LBFGS(p), Own(p, 0.1)):
        for call in (sharpness_limit, lambda o: energy_limit(o, 1.0), lambda o: max_lr(o, 1.0)):
            with pytest.raises(ValueError, match=r"nothing is known.*rule_for\.register"):
                call(optimizer)
    with pytest.raises(TypeError, match="an optimizer is needed"):
        sharpness_limit("SGD")  # type: ignore[arg-type]
    sgd = torch.optim.SGD(p, 0.1)
    for wrong, error in (
        (0.0, ValueError),
        (1.1, ValueError),
        (math.nan, ValueError),
        (True, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match="fraction must"):
            max_lr(sgd, 1.0, wrong)  # type: ignore[arg-type]
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="sharpness must be a finite"):
            max_lr(sgd, wrong)
        with pytest.raises(ValueError, match="smoothness must be a finite"):
            energy_limit(sgd, wrong)
    with pytest.raises(ValueError, match="smoothness must be a finite"):
        energy_limit(sgd, -1.0)
    with pytest.raises(ValueError, match="one per group, of which there are 1, got 2"):
        max_lr(sgd, [1.0, 2.0])


def test_the_numbers_of_an_optimizer_may_be_tensors() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    plain = so.optim.AdamW([w], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    betas = torch.tensor(0.9), torch.tensor(0.99)
    tensors = so.optim.AdamW([w], lr=torch.tensor(0.1), betas=betas, weight_decay=0.5, foreach=False)
    for ask in (sharpness_limit, lambda o: energy_limit(o, 1.0), lambda o: max_lr(o, 3.0)):
        assert ask(tensors) == pytest.approx(ask(plain), rel=1e-9)
