"""The twin against closed forms and exact tangents; the run that it watches, bit for bit; where it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt import optim
from stableopt.constraints import L1, SpectralBall
from stableopt.lyapunov import Monitor
from stableopt.lyapunov.profile.finite.twin import Twin
from stableopt.optim.trial import loss_with_graph
from tests.lyapunov.training import batches, equal, make_closure, make_model, picture, seed_everything

SPECTRUM = (0.3, 1.0, 2.2)


def quadratic(w: Tensor, optimizer: Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (torch.tensor(SPECTRUM, dtype=w.dtype) * w.square()).sum() + w.sum()
        loss.backward()
        return loss

    return closure


def point(**kwargs: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0, 0.5], **{"dtype": torch.float64} | kwargs))


def grown(optimizer: Optimizer, closure: Callable[[], Any], model: nn.Module, steps: int, **settings: Any) -> Twin:
    with Twin(model, optimizer, **settings) as twin:
        for _ in range(steps):
            optimizer.step(closure)
    return twin


@pytest.mark.parametrize("lr", [0.5, 0.95], ids=["stable", "unstable"])
def test_gradient_descent_on_a_quadratic_grows_as_the_largest_multiplier(lr: float) -> None:
    w = point()
    optimizer = torch.optim.SGD([w], lr=lr)
    twin = grown(optimizer, quadratic(w, optimizer), nn.ParameterList([w]), 150)
    expected = math.log(max(abs(1 - lr * a) for a in SPECTRUM))
    assert twin.growth[-30:].mean() == pytest.approx(expected, abs=1e-7)
    assert twin.renormalized > 0


@pytest.mark.parametrize("lr", [0.5, 1.4], ids=["stable", "unstable"])
def test_heavy_ball_on_a_quadratic_grows_as_the_spectral_radius_of_its_companion(lr: float) -> None:
    beta, w = 0.5, point()
    optimizer = torch.optim.SGD([w], lr=lr, momentum=beta)
    twin = grown(
        optimizer,
        quadratic(w, optimizer),
        nn.ParameterList([w]),
        200 if lr < 1 else 100,
        size=1e-2,  # the map is linear: a large size has no error but that of rounding
        scales={"momentum_buffer": lr},
    )
    roots = np.concatenate([np.roots([1, -(1 + beta - lr * a), beta]) for a in SPECTRUM])
    expected = math.log(np.abs(roots).max())
    assert not twin.stopped
    assert twin.growth[-100:].mean() == pytest.approx(expected, abs=4 / 100)  # complex roots: bounded oscillation
    if lr > 1:
        assert twin.growth[-30:].mean() == pytest.approx(expected, abs=1e-7)


def smooth_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def loss_closure(model: nn.Module, optimizer: Optimizer) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, dtype=torch.float64, generator=generator)
    y = torch.randn(16, 1, dtype=torch.float64, generator=generator)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return closure


def test_the_twin_of_a_smooth_net_grows_as_the_exact_tangent_step_by_step() -> None:
    lr, seed = 0.3, 5
    model = smooth_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    closure = loss_closure(model, optimizer)
    draw = torch.Generator().manual_seed(seed)
    v = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in model.parameters()]
    v = [x / math.sqrt(sum(float(y.square().sum()) for y in v)) for x in v]
    expected = []
    for _ in range(30):  # v - lr H v, at the parameters of each step
        g = torch.autograd.grad(loss_with_graph(closure), [*model.parameters()], create_graph=True)
        hv = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, v, strict=True)), [*model.parameters()])  # type: ignore[arg-type]
        v = [a - lr * b for a, b in zip(v, hv, strict=True)]
        length = math.sqrt(sum(float(x.square().sum()) for x in v))
        v = [x / length for x in v]
        expected.append(math.log(length))
        optimizer.step(closure)
    model = smooth_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    closure = loss_closure(model, optimizer)
    twin = grown(optimizer, closure, model, 30, size=1e-7, seed=seed, renormalize=(1, 1))
    np.testing.assert_allclose(twin.growth, expected, atol=1e-6)


def test_the_twin_of_adamw_grows_as_the_tangent_of_its_formulas() -> None:
    """dm' = b1 dm + (1 - b1) Hd, dv' = b2 dv + 2 (1 - b2) g Hd, and the derivative of the quotient."""
    lr, b1, b2, eps, decay, seed = 0.02, 0.9, 0.99, 1e-3, 0.1, 4
    model = smooth_net()
    parameters = [*model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    closure = loss_closure(model, optimizer)
    draw = torch.Generator().manual_seed(seed)
    d = torch.cat([torch.randn(p.shape, generator=draw, dtype=torch.float64).reshape(-1) for p in parameters])
    d, dm, dv = d / d.norm(), torch.zeros_like(d), torch.zeros_like(d)
    m, v, lengths = torch.zeros_like(d), torch.zeros_like(d), [1.0]
    for t in range(1, 26):
        g = torch.cat(
            [x.reshape(-1) for x in torch.autograd.grad(loss_with_graph(closure), parameters, create_graph=True)]
        )
        hd = torch.cat([x.reshape(-1) for x in torch.autograd.grad(g @ d, parameters)])
        g = g.detach()
        m, dm = b1 * m + (1 - b1) * g, b1 * dm + (1 - b1) * hd
        v, dv = b2 * v + (1 - b2) * g * g, b2 * dv + 2 * (1 - b2) * g * hd
        c1, root = 1 - b1**t, (v / (1 - b2**t)).sqrt()
        droot = dv / (1 - b2**t) / (2 * root)
        d = (1 - lr * decay) * d - lr * (dm / c1 / (root + eps) - m / c1 * droot / (root + eps) ** 2)
        lengths.append(float(d.norm()))
        optimizer.step(closure)
    model = smooth_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    twin = grown(optimizer, loss_closure(model, optimizer), model, 25, size=1e-8, seed=seed)
    np.testing.assert_allclose(twin.growth, np.diff(np.log(lengths)), atol=2e-6)


def test_the_error_of_the_twin_is_first_order_in_its_size() -> None:
    """Growth at eps differs from the tangent by O(eps): a tenth of the size, a tenth of the error."""
    growths = {}
    for size in (1e-2, 1e-3, 1e-7):
        model = smooth_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        closure = loss_closure(model, optimizer)
        growths[size] = grown(optimizer, closure, model, 20, size=size, renormalize=(1, 1)).growth
    coarse, fine = (np.abs(growths[size] - growths[1e-7]).max() for size in (1e-2, 1e-3))
    assert 5.0 < coarse / fine < 20.0


def test_scaling_back_at_each_step_or_seldom_gives_the_same_growth() -> None:
    results = []
    for renormalize in ((1, 1), (0.1, 10)):
        model = smooth_net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        closure = loss_closure(model, optimizer)
        results.append(grown(optimizer, closure, model, 60, size=1e-8, seed=2, renormalize=renormalize).growth)
    np.testing.assert_allclose(*results, atol=2e-5)


class KinkedScalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 1e-3], dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-2, 1e-9])
def test_a_kink_within_the_size_is_felt_by_the_finite_twin_and_not_by_the_small_one(size: float) -> None:
    """The gradient of relu(w)^2/2 + relu(-w)^2/8 is w to the right and w/4 to the left: a large twin sees both sides."""
    model, lr, seed = KinkedScalar(), 0.5, 2
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def closure() -> Tensor:
        optimizer.zero_grad()
        w = model.w
        loss = (w.relu().square() / 2 + (-w).relu().square() / 8).sum()
        loss.backward()
        return loss

    w = model.w.detach().clone()
    v = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other = w + v / v.norm() * size * w.norm()
    assert bool((other < 0).any()) == (size == 1e-2)
    step = [x - lr * torch.where(x > 0, x, x / 4) for x in (w, other)]
    expected = math.log(float((step[1] - step[0]).norm() / (other - w).norm()))
    twin = grown(optimizer, closure, model, 1, size=size, finite_size=size > 1e-6, seed=seed)
    assert twin.kinks == ("relu",)
    assert twin.growth[0] == pytest.approx(expected, abs=1e-6)
    assert (abs(expected - math.log(1 - lr)) < 1e-6) == (size == 1e-9)


def test_a_relu_net_has_another_exponent_at_a_finite_size() -> None:
    growths = {}
    for size in (None, 1e-8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        closure = loss_closure(model, optimizer)
        twin = grown(optimizer, closure, model, 40, size=size, finite_size=size is None)
        assert twin.steps == (40 if size else 30)  # ten steps show how large an update is
        growths[size] = twin.growth[-30:].mean()
        assert ("finite-size exponent" in twin.label) == (size is None)
    assert abs(growths[None] - growths[1e-8]) > 1e-3


def test_two_runs_that_meet_begin_anew() -> None:
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * w.square().sum()
        loss.backward()
        return loss

    twin = grown(optimizer, closure, nn.ParameterList([w]), 2, size=2.0**-14)
    assert twin.growth.tolist() == [-math.inf, -math.inf]
    assert twin.restarts == 2


def test_the_decisions_of_a_guard_are_part_of_the_map() -> None:
    """At lr 3 the guard shrinks to 0.75: the growth is that of the steps that were done."""
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = optim.SGD([w], lr=3.0, guard="backtrack")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * w.square().sum()
        loss.backward()
        return loss

    twin = grown(optimizer, closure, nn.ParameterList([w]), 1)
    scale = optimizer.param_groups[0]["step_scale"]
    assert scale < 1
    assert twin.growth[0] == pytest.approx(math.log(abs(1 - 3.0 * scale)), abs=1e-9)


# The run that is watched.


class Bare(Optimizer):
    """No closure, and state of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})
        self.calls = 0

    def step(self) -> str:  # type: ignore[override]
        self.calls += 1
        for p in self.param_groups[0]["params"]:
            kept = self.state[p].setdefault("kept", torch.zeros_like(p))
            kept.mul_(0.5).add_(p.grad)
            p.data -= self.param_groups[0]["lr"] * kept
        return "done"


def matrices(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.ndim == 2]


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "Muon": lambda p: torch.optim.Muon(matrices(p), lr=0.02),
    "guarded AdamW": lambda p: optim.AdamW(p, lr=0.3, guard="backtrack"),
    "guarded SGD with prox": lambda p: optim.SGD(p, lr=0.5, momentum=0.9, prox=L1(0.01), guard="strict"),
    "guarded SGD in a set": lambda p: optim.SGD(matrices(p), lr=0.5, constraint=SpectralBall(1.0), guard="backtrack"),
    "guarded third party": lambda p: optim.guard(torch.optim.Adagrad)(p, lr=0.1, guard="strict"),
    "third party": Bare,
}


def run(make: Callable[[Any], Optimizer], *, twin: bool, monitor: bool = False) -> tuple[Any, Any, Twin | None]:
    """Train with a scheduler, as a user would, and return the picture of the end."""
    seed_everything(0)
    model = make_model()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    losses = []
    watcher = Monitor(model, optimizer, max_overhead=None).attach() if monitor else None
    pair = Twin(model, optimizer, finite_size=True, size=1e-2) if twin else None
    for x, y in batches(6):
        closure = make_closure(model, optimizer, x, y)
        if pair is not None:
            losses.append(pair.step(closure))
        elif isinstance(optimizer, Bare):
            closure()
            losses.append(optimizer.step())
        else:
            losses.append(optimizer.step(closure))
        scheduler.step()
    records = []
    if watcher is not None:
        watcher.close()
        records = [(r.step, r.loss, r.energy_before, r.energy_after, r.trials, r.displacement) for r in watcher.records]
    return picture(model, optimizer), (losses, records), pair


OFTEN = {"SGD momentum", "AdamW", "guarded AdamW", "guarded SGD in a set", "third party"}


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS])
def test_the_run_is_the_same_bit_for_bit(name: str) -> None:
    alone, (losses, _), _ = run(OPTIMIZERS[name], twin=False)
    beside, (same, _), twin = run(OPTIMIZERS[name], twin=True)
    assert twin is not None
    assert twin.steps == 6
    assert np.isfinite(twin.growth).all()
    assert equal(alone, beside)
    assert equal(losses, same)


def test_a_monitor_sees_the_steps_of_the_run_only_and_the_same() -> None:
    alone, (losses, quiet), _ = run(OPTIMIZERS["guarded AdamW"], twin=False, monitor=True)
    beside, (same, seen), _ = run(OPTIMIZERS["guarded AdamW"], twin=True, monitor=True)
    assert equal(alone, beside)
    assert equal(losses, same)
    assert len(quiet) == 6
    assert equal(quiet, seen)


def test_the_twin_uses_the_random_numbers_of_the_run() -> None:
    """With other masks and noise the distance would be of the order of an update, a million times its size."""
    seed_everything(0)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    twin = Twin(model, optimizer, finite_size=True, size=1e-9)
    for x, y in batches(5):
        twin.step(make_closure(model, optimizer, x, y))
    assert np.abs(twin.growth).max() < 1.0


# Where it refuses.


def test_half_precision_is_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        w = point(dtype=dtype)
        with pytest.raises(ValueError, match=f"a parameter is {str(dtype)[6:]}, too coarse"):
            Twin(nn.ParameterList([w]), torch.optim.SGD([w]), finite_size=True)
    w = point(dtype=torch.float32)
    Twin(nn.ParameterList([w]), torch.optim.SGD([w]))


@pytest.mark.parametrize(
    ("dtype", "below", "resolved"),
    [(torch.float32, 6.0e-4, 6.2e-4), (torch.float64, 1.1e-12, 1.2e-12)],
)
def test_sizes_below_the_resolution_are_refused(dtype: torch.dtype, below: float, resolved: float) -> None:
    w = point(dtype=dtype)
    optimizer = torch.optim.SGD([w])
    Twin(nn.ParameterList([w]), optimizer, resolved)
    with pytest.raises(ValueError, match="the resolution of the parameters"):
        Twin(nn.ParameterList([w]), optimizer, below)


def test_large_sizes_are_finite_sizes() -> None:
    w = point()
    optimizer = torch.optim.SGD([w])
    Twin(nn.ParameterList([w]), optimizer, 1e-2)
    Twin(nn.ParameterList([w]), optimizer, 1.1e-2, finite_size=True)
    with pytest.raises(ValueError, match="not small"):
        Twin(nn.ParameterList([w]), optimizer, 1.1e-2)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(), nn.MaxPool1d(2), nn.Tanh()], ids=lambda a: type(a).__name__
)
def test_kinks_are_refused_in_float32(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), activation).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4, dtype=torch.float32)).square().sum()
        loss.backward()
        return loss

    if isinstance(activation, nn.Tanh):
        assert grown(optimizer, closure, model, 2).size == 1e-3
        return
    with pytest.raises(ValueError, match=r"the model has kinks .* no size in float32"):
        grown(optimizer, closure, model, 1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert grown(optimizer, closure, model, 2, size=1e-3, finite_size=True).steps == 2


def test_with_kinks_in_float64_the_size_is_small() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    closure = loss_closure(model, optimizer)
    assert grown(optimizer, closure, model, 1).size == 1e-6
    assert grown(optimizer, closure, model, 1, size=1e-6).steps == 1
    with pytest.raises(ValueError, match="above the size 1e-06"):
        grown(optimizer, closure, model, 1, size=1.1e-6)


def test_autocast_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 1)).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.ones(2, 4, dtype=torch.float32)).square().sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="autocast"):
        grown(optimizer, closure, model, 1)


def test_what_has_no_twin_is_refused() -> None:
    w = point()
    optimizer = torch.optim.SGD([w])
    model = nn.ParameterList([w])
    w.grad = torch.zeros_like(w)
    with Twin(model, optimizer), pytest.raises(ValueError, match=r"call optimizer.step\(closure\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="lazy guard"):
        Twin(model, optim.SGD([w], lr=0.1, guard="lazy"))
    with pytest.raises(ValueError, match="0 < lo <= 1 <= hi"):
        Twin(model, optimizer, renormalize=(0.0, 10.0))
    momentum = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="no tensor called 'momentum'; it has momentum_buffer"):
        grown(momentum, quadratic(w, momentum), model, 2, scales={"momentum": 1.0})
    zero = nn.Parameter(torch.zeros(2))
    nothing = torch.optim.SGD([zero])
    with pytest.raises(ValueError, match="norm of the parameters, which is 0"):
        grown(nothing, lambda: (zero * 1.0).sum(), nn.ParameterList([zero]), 1)


def test_a_run_that_outgrows_the_size_stops_the_twin_and_goes_on() -> None:
    w = point()
    optimizer = torch.optim.SGD([w], lr=10.0)
    twin = grown(optimizer, quadratic(w, optimizer), nn.ParameterList([w]), 12)
    assert "have grown" in twin.stopped
    assert 0 < twin.steps < 12


def test_updates_that_are_not_resolved_stop_the_twin_and_not_the_run() -> None:
    for lr, why in ((0.0, "must be positive"), (1e-14, "the resolution")):
        w = point()
        optimizer = torch.optim.SGD([w], lr=lr)
        twin = grown(optimizer, quadratic(w, optimizer), nn.ParameterList([w]), 12, finite_size=True)
        assert twin.steps == 0
        assert twin.stopped.startswith("the median update cannot be a size")
        assert why in twin.stopped
    w = point()
    optimizer = torch.optim.SGD([w], lr=1e-2)
    twin = grown(optimizer, quadratic(w, optimizer), nn.ParameterList([w]), 12, finite_size=True)
    assert twin.steps == 2
    assert twin.size == pytest.approx(1e-2, rel=0.9)


def test_second_moments_stay_where_they_can_be() -> None:
    """Scaling up by ten would make some of them negative."""
    model = smooth_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    twin = grown(optimizer, loss_closure(model, optimizer), model, 50, size=1e-2, renormalize=(0.9, 10.0))
    shadow = twin._shadow
    assert shadow is not None
    assert all(bool((s["exp_avg_sq"] >= 0).all()) for s in shadow._states.values())
    assert np.isfinite(twin.growth).all()
