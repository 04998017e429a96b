"""The measured edge, against the eigenvalues of the whole Hessian, and against the optimizer itself."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stableopt as so
from stableopt.optim import rule_for
from stableopt.optim.limits import sharpness_limit
from stableopt.optim.sharpness import Sharpness, SharpnessReading
from tests.optim.problems import Network


def problem(activation: type[nn.Module] = nn.Tanh, *, seed: int = 0) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 12), activation(), nn.Linear(12, 3))
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    return model, lambda: F.cross_entropy(model(x), y)


def train(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def full_hessian(loss: Callable[[], Tensor], parameters: list[Tensor]) -> Tensor:
    grads = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in grads]
    return torch.stack([torch.cat([h.flatten() for h in row]) for row in rows])


def metric_of(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the diagonal of D = limit x P over all parameters."""
    rule, parts = rule_for(optimizer), []
    for group, limit in zip(optimizer.param_groups, sharpness_limit(optimizer), strict=True):
        for p in group["params"]:
            P = rule.metric(optimizer.state.get(p, {}), group)  # type: ignore[union-attr]
            parts.append((torch.as_tensor(P).expand(p.shape) * limit).flatten())
    return torch.cat(parts)


def exact_edge(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], decay: float = 0.0) -> float:
    H = full_hessian(loss, [p for group in optimizer.param_groups for p in group["params"]])
    root = metric_of(optimizer).rsqrt()
    return float(torch.linalg.eigvalsh(root[:, None] * (H + decay * torch.eye(len(H))) * root)[-1])


OPTIMIZERS: list[Any] = [
    lambda p: torch.optim.SGD(p, 0.1),
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    lambda p: torch.optim.RMSprop(p, 0.001),
    lambda p: torch.optim.NAdam(p, 0.001),
    lambda p: torch.optim.RAdam(p, 0.01),
    lambda p: so.optim.SGD(p, 0.1, momentum=0.5, guard="off"),
    lambda p: so.optim.AdamW(p, 0.01, guard="off"),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("method", ["exact", "forward", "difference"])
def test_the_edge_is_the_top_eigenvalue_in_the_metric_of_the_optimizer(make: Any, method: Any) -> None:
    model, loss = problem()
    optimizer = make(model.parameters())
    train(optimizer, loss, 8)
    expected = exact_edge(optimizer, loss)
    reading = Sharpness(optimizer, loss, method=method, products=40, tolerance=0.0).measure()
    assert reading.edge == pytest.approx(expected, rel=1e-5)
    assert reading.edge <= expected * (1 + 1e-8)
    assert reading.method == method
    assert reading.measured
    (limit,) = sharpness_limit(optimizer)
    assert reading.sharpness == pytest.approx(reading.edge * limit)
    assert reading.edge_at([limit]) == pytest.approx(reading.edge)
    assert reading.edge_at([2 * limit]) == pytest.approx(reading.edge / 2)
    assert reading.residual < 1e-2 * reading.edge


@pytest.mark.slow
def test_once_warm_one_product_per_measurement_follows_a_moving_top_eigenvalue() -> None:
    model, loss = problem()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    sharpness = Sharpness(optimizer, loss)
    train(optimizer, loss, 3)
    first = sharpness.measure()
    assert 3 < first.products <= 20
    assert first.edge == pytest.approx(exact_edge(optimizer, loss), rel=0.05)
    errors, products = [], []
    for _ in range(40):
        train(optimizer, loss, 1)
        reading, expected = sharpness.measure(), exact_edge(optimizer, loss)
        assert reading.edge <= expected * (1 + 1e-9)
        assert reading.residual <= 0.05 * reading.edge
        errors.append(1 - reading.edge / expected)
        products.append(reading.products)
    assert max(errors) < 0.03
    assert sorted(products)[len(products) // 2] == 1
    assert sum(products) <= 2.5 * len(products)  # fresh starts included


def test_after_a_jump_a_measurement_takes_the_products_it_needs() -> None:
    model, loss = problem()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    sharpness = Sharpness(optimizer, loss)
    sharpness.measure()
    sharpness.measure()
    other, _ = problem(seed=7)
    model.load_state_dict(other.state_dict())
    reading = sharpness.measure()
    assert reading.products > 1
    assert reading.edge == pytest.approx(exact_edge(optimizer, loss), rel=0.05)
    assert Sharpness(optimizer, loss, products=2).measure().products == 2


def test_with_equal_momenta_in_several_groups_the_edge_is_exact() -> None:
    """The update is linear on a quadratic: it diverges iff the edge is above 1, whatever the learning rates of the groups are."""
    torch.manual_seed(1)
    A = torch.randn(4, 4)
    H = A @ A.T
    for scale in (0.999, 1.001):
        a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

        def loss(a: Tensor = a, b: Tensor = b) -> Tensor:
            x = torch.cat([a, b])
            return 0.5 * x @ H @ x

        optimizer = torch.optim.SGD([{"params": [a], "lr": 0.03}, {"params": [b], "lr": 0.3}], momentum=0.8)
        edge = Sharpness(optimizer, loss, products=30, tolerance=0.0).measure().edge
        for group in optimizer.param_groups:
            group["lr"] *= scale / edge
        assert Sharpness(optimizer, loss, products=30, tolerance=0.0).measure().edge == pytest.approx(scale, rel=1e-9)
        train(optimizer, loss, 3000)
        assert (loss().item() > 1) is (scale > 1)


def test_a_block_of_one_group_is_measured_alone() -> None:
    model, loss = problem()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.3}])
    sharpness = Sharpness(optimizer, loss, products=40, tolerance=0.0)
    whole = sharpness.measure()
    for i, block in enumerate((parameters[:2], parameters[2:])):
        H = full_hessian(loss, block)
        reading = sharpness.measure(group=i)
        assert reading.sharpness == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-5)
        assert reading.plain == pytest.approx(reading.sharpness)
        assert reading.weights[1 - i] == 0
        assert reading.edge <= whole.edge * (1 + 1e-6)
    with pytest.raises(ValueError, match="group must be a number from 0 to 1"):
        sharpness.measure(group=2)


@pytest.mark.parametrize("spectrum", [[-50.0, -3.0, 1.0, 2.0], [-50.0, -49.0, 0.5, 0.6], [-5.0, -3.0, -2.0, -1.0]])
def test_negative_eigenvalues_of_larger_modulus_do_not_win(spectrum: list[float]) -> None:
    Q = torch.linalg.qr(torch.randn(4, 4))[0]
    H = Q * torch.tensor(spectrum) @ Q.T
    w = nn.Parameter(torch.randn(4))
    sharpness = Sharpness(torch.optim.SGD([w], 1.0), lambda: 0.5 * w @ H @ w, tolerance=1e-6)
    assert sharpness.measure().plain == pytest.approx(spectrum[-1], abs=1e-6)
    for _ in range(3):
        assert sharpness.measure().plain == pytest.approx(spectrum[-1], abs=1e-6)


def test_one_product_per_call_climbs_to_the_largest_and_not_to_the_largest_in_modulus() -> None:
    """From a random start, power steps alone: the shift is what lets them."""
    spectrum = torch.tensor([-4.0, -1.0, 0.5, 3.0])
    Q = torch.linalg.qr(torch.randn(4, 4))[0]
    w = nn.Parameter(torch.randn(4))
    sharpness = Sharpness(
        torch.optim.SGD([w], 1.0), lambda: 0.5 * w @ (Q * spectrum @ Q.T) @ w, products=2, tolerance=0.0
    )
    values = [sharpness.measure().plain for _ in range(60)]
    assert values[-1] == pytest.approx(3.0, rel=1e-3)


def test_a_direction_that_has_lost_its_way_is_looked_for_again() -> None:
    w = nn.Parameter(torch.randn(3))
    spectrum = torch.tensor([5.0, 1.0, 2.0])
    optimizer = torch.optim.SGD([w], 1.0)
    sharpness = Sharpness(optimizer, lambda: 0.5 * (spectrum * w * w).sum(), tolerance=1e-6)
    for _ in range(3):
        assert sharpness.measure().plain == pytest.approx(5.0)
    spectrum.copy_(torch.tensor([-5.0, 1.0, 2.0]))  # what was the sharpest direction is now concave
    assert sharpness.measure().plain == pytest.approx(2.0)
    sharpness.restart()
    assert sharpness.measure().plain == pytest.approx(2.0)


def test_a_direction_that_is_overtaken_is_given_up_at_the_next_fresh_start() -> None:
    w = nn.Parameter(torch.randn(3))
    spectrum = torch.tensor([5.0, 1.0, 2.0])
    optimizer = torch.optim.SGD([w], 1.0)
    sharpness = Sharpness(optimizer, lambda: 0.5 * (spectrum * w * w).sum(), tolerance=1e-6, fresh=7)
    for _ in range(5):
        sharpness.measure()
    spectrum.copy_(torch.tensor([3.0, 100.0, 2.0]))
    assert [round(sharpness.measure().plain) for _ in range(2)] == [3, 100]  # the sixth and the seventh measurement
    always = Sharpness(optimizer, lambda: 0.5 * (spectrum * w * w).sum(), tolerance=1e-6, fresh=1)
    first = always.measure()
    spectrum.copy_(torch.tensor([3.0, 1.0, 50.0]))
    assert first.plain == pytest.approx(100.0)
    assert always.measure().plain == pytest.approx(50.0)


def test_a_maximizing_optimizer_sees_the_negative_of_the_loss() -> None:
    w = nn.Parameter(torch.randn(2))
    optimizer = torch.optim.SGD([w], 0.1, maximize=True)
    reading = Sharpness(optimizer, lambda: -0.5 * (torch.tensor([4.0, 1.0]) * w * w).sum()).measure()
    assert reading.edge == pytest.approx(4 / 20)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "maximize": False})
    with pytest.raises(ValueError, match="agree on maximize"):
        Sharpness(optimizer, lambda: w.sum()).measure()


def test_a_coupled_decay_that_the_limit_leaves_out_is_added_to_the_curvature() -> None:
    model, loss = problem()
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.5)
    train(optimizer, loss, 8)
    assert Sharpness(optimizer, loss, products=60, tolerance=0.0).measure().edge == pytest.approx(
        exact_edge(optimizer, loss, 0.5), rel=1e-4
    )
    sgd = torch.optim.SGD(model.parameters(), 0.01, weight_decay=0.5)  # here it is in the limit
    assert Sharpness(sgd, loss, products=60, tolerance=0.0).measure().edge == pytest.approx(
        exact_edge(sgd, loss), rel=1e-5
    )


def test_before_the_first_step_of_an_adaptive_optimizer_nothing_is_measured() -> None:
    model, loss = problem()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    reading = Sharpness(optimizer, loss).measure()
    assert not reading.measured
    assert math.isnan(reading.edge)
    assert "no step" in reading.reason
    assert math.isnan(reading.edge_at([1.0]))


def test_parameters_without_a_state_or_without_a_gradient_are_left_out() -> None:
    model, loss = problem()
    unused = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([*model.parameters(), unused], 0.01)
    train(optimizer, loss, 5)
    alone = torch.optim.Adam(model.parameters(), 0.01)
    alone.load_state_dict(
        {
            "state": {i: s for i, s in optimizer.state_dict()["state"].items() if i < 4},
            "param_groups": [dict(optimizer.state_dict()["param_groups"][0], params=[0, 1, 2, 3])],
        }
    )
    expected = exact_edge(alone, loss)
    assert Sharpness(optimizer, loss, products=60, tolerance=0.0).measure().edge == pytest.approx(expected, rel=1e-5)
    model[0].weight.requires_grad_(False)
    assert Sharpness(optimizer, loss, products=60, tolerance=0.0).measure().edge < expected


def test_a_learning_rate_of_zero_and_a_decay_that_overshoots() -> None:
    model, loss = problem()
    reading = Sharpness(torch.optim.SGD(model.parameters(), 0.0), loss).measure()
    assert not reading.measured
    assert "zero" in reading.reason
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=21.0)
    train(optimizer, loss, 1)
    reading = Sharpness(optimizer, loss).measure()
    assert reading.edge == math.inf
    assert "unstable at any curvature" in reading.reason
    first, *rest = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": rest}], 0.1)  # type: ignore[assignment]
    block = float(torch.linalg.eigvalsh(full_hessian(loss, rest))[-1])
    reading = Sharpness(optimizer, loss, products=60, tolerance=0.0).measure()
    assert reading.edge == pytest.approx(block / 20, rel=1e-5)
    assert reading.weights[0] == 0


class NoSecond(torch.autograd.Function):
    """A square whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x**2).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def attention_loss() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(8, 24, dtype=torch.float32)
    x = torch.randn(2, 6, 8, dtype=torch.float32)

    def loss() -> Tensor:
        q, k, v = model(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).square().mean()

    return model, loss


def test_where_autograd_has_no_second_derivative_auto_takes_differences_and_says_so() -> None:
    w = nn.Parameter(torch.randn(3))
    sharpness = Sharpness(torch.optim.SGD([w], 0.5), lambda: NoSecond.apply(w))
    reading = sharpness.measure()
    assert reading.edge == pytest.approx(0.5, rel=1e-8)
    assert reading.method == "difference"
    assert reading.reason.startswith("by difference, which also sees kinks, since exact said: ")
    assert "; forward said: " in reading.reason
    assert sharpness.measure().edge == pytest.approx(0.5, rel=1e-8)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        Sharpness(torch.optim.SGD([w], 0.5), lambda: NoSecond.apply(w), method="exact").measure()

    half = nn.Parameter(torch.randn(2))  # a part of the loss has no second derivative: it must not count as flat
    sharpness = Sharpness(torch.optim.SGD([w, half], 0.5), lambda: 3 * NoSecond.apply(w) + (half**2).sum())
    assert sharpness.measure().edge == pytest.approx(1.5, rel=1e-8)

    model, loss = attention_loss()
    exact, forward, near = (
        Sharpness(torch.optim.SGD(model.parameters(), 0.5), loss, method=m, products=30, tolerance=0.0).measure()
        for m in ("auto", "forward", "difference")
    )
    assert (exact.method, exact.reason) == ("exact", "")
    assert exact.edge == pytest.approx(forward.edge, rel=1e-5)
    assert exact.edge == pytest.approx(near.edge, rel=2e-3)


def test_a_linear_loss_has_no_curvature() -> None:
    w = nn.Parameter(torch.randn(3))
    assert abs(Sharpness(torch.optim.SGD([w], 0.5), lambda: w.sum()).measure().edge) < 1e-9


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    grads = [p.grad for p in model.parameters()]
    return copy.deepcopy(
        [
            [t.detach().clone() for t in tensors],
            [None if g is None else g.clone() for g in grads],
            [m.training for m in model.modules()],
            optimizer.state_dict(),
            torch.get_rng_state(),
            np.random.get_state(),  # noqa: NPY002
            random.getstate(),
        ]
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray):
        return type(a) is type(b) and bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("method", ["exact", "forward", "difference"])
@pytest.mark.parametrize("with_grad", [True, False])
def test_a_measurement_leaves_no_trace(method: Any, with_grad: bool) -> None:
    model = Network()
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def loss() -> Tensor:
        np.random.rand()  # noqa: NPY002
        random.random()
        return F.cross_entropy(model(x), y)

    if with_grad:
        train(optimizer, loss, 2)
    versions = [p._version for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    before = everything(model, optimizer)
    sharpness = Sharpness(optimizer, loss, method=method, products=3, tolerance=0.0)
    first = sharpness.measure()
    sharpness.measure()
    assert same(before, everything(model, optimizer))
    assert [p._version for p in model.parameters()] == versions
    assert all(a is p.grad for a, p in zip(grads, model.parameters(), strict=True))
    sharpness.restart()
    assert sharpness.measure() == first  # the same masks of dropout, the same statistics


@pytest.mark.parametrize("method", ["exact", "forward", "difference"])
def test_a_graph_that_somebody_has_built_before_is_still_good(method: Any) -> None:
    model, loss = problem()
    parameters, pending = list(model.parameters()), loss()
    expected = torch.autograd.grad(loss(), parameters)
    Sharpness(torch.optim.SGD(parameters, 0.1), loss, method=method).measure()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(pending, parameters), expected, strict=True))


def test_a_failing_loss_leaves_no_trace_either() -> None:
    model, loss = problem()
    calls = []

    def failing() -> Tensor:
        calls.append(torch.rand(1))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss()

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        Sharpness(optimizer, failing, method="difference").measure()
    assert same(before, everything(model, optimizer))


def test_under_autocast_the_perturbed_weights_are_cast_anew() -> None:
    model = nn.Linear(4, 2, dtype=torch.float32)
    x = torch.randn(16, 4, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_difference = Sharpness(optimizer, loss, method="difference").measure().edge
        exact = Sharpness(optimizer, loss, method="exact").measure().edge
        assert Sharpness(optimizer, loss, method="forward").measure().edge == pytest.approx(exact, rel=0.05)
    assert by_difference == pytest.approx(
        exact, rel=0.3
    )  # bfloat16 has three digits, and this is a difference of gradients


def test_half_precision_is_measured_by_autograd_only() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([w], 0.5)
    assert Sharpness(optimizer, lambda: (w.float() ** 2).sum()).measure().edge == pytest.approx(0.5, rel=1e-2)
    with pytest.raises(ValueError, match="half precision"):
        Sharpness(optimizer, lambda: (w.float() ** 2).sum(), method="difference").measure()


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    w = nn.Parameter(torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128))
    weights = torch.tensor([3.0, 1.0])
    for optimizer, method in ((torch.optim.SGD([w], 0.1), "exact"), (torch.optim.Adam([w], 0.1), "forward")):

        def loss() -> Tensor:
            return 0.5 * (weights * (w.real**2 + 2 * w.imag**2)).sum()

        train(optimizer, loss, 1)
        reading = Sharpness(optimizer, loss, method=method, tolerance=1e-6).measure()  # type: ignore[arg-type]
        metric = rule_for(optimizer).metric(optimizer.state[w], optimizer.param_groups[0])  # type: ignore[union-attr]
        H = torch.stack([weights, 2 * weights], dim=1)
        assert reading.sharpness == pytest.approx(float((H / metric).max()), rel=1e-6)


def test_sparse_gradients_are_taken_by_difference() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), 0.1)
    reading = Sharpness(optimizer, lambda: table(torch.tensor([1, 1, 3])).square().sum(), method="difference").measure()
    assert reading.edge == pytest.approx(4 / 20)  # row 1 counts twice


def test_a_device_of_its_own(device: torch.device) -> None:
    w = nn.Parameter(torch.tensor([1.0, 1.0], device=device))
    scale = torch.tensor([4.0, 1.0], device=device)
    optimizer = torch.optim.Adam([w], 0.1)
    train(optimizer, lambda: 0.5 * (scale * w * w).sum(), 2)
    for method in ("exact", "difference"):
        reading = Sharpness(optimizer, lambda: 0.5 * (scale * w * w).sum(), method=method).measure()  # type: ignore[arg-type]
        assert reading.edge > 0


def test_schedule_free_optimizers_are_measured_in_their_metric() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model, loss = problem()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    assert not Sharpness(optimizer, loss).measure().measured
    optimizer.train()
    with warnings.catch_warnings():
        train(optimizer, loss, 5)
    reading = Sharpness(optimizer, loss, products=60, tolerance=0.0).measure()
    H = full_hessian(loss, list(model.parameters()))
    group = optimizer.param_groups[0]
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()])
    root = ((v / (1 - 0.999 ** group["k"])).sqrt() + group["eps"]).rsqrt()
    assert reading.sharpness == pytest.approx(float(torch.linalg.eigvalsh(root[:, None] * H * root)[-1]), rel=1e-4)


def test_what_cannot_be_measured_is_refused_with_a_sentence() -> None:
    w = nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([w], 0.1)
    with pytest.raises(ValueError, match="nothing is known"):
        Sharpness(torch.optim.Rprop([w]), lambda: w.sum())
    with pytest.raises(ValueError, match="no linear limit"):
        Sharpness(torch.optim.Muon([nn.Parameter(torch.ones(2, 2))]), lambda: w.sum())
    with pytest.raises(TypeError, match="loss must be a function"):
        Sharpness(sgd, w.sum())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method must be"):
        Sharpness(sgd, lambda: w.sum(), method="magic")  # type: ignore[arg-type]
    for options in (
        {"products": 0},
        {"products": True},
        {"products": 1.5},
        {"fresh": 0},
        {"tolerance": -1.0},
        {"tolerance": math.nan},
    ):
        with pytest.raises(ValueError, match="must be a"):
            Sharpness(sgd, lambda: w.sum(), **options)  # type: ignore[arg-type]
    for bad in (lambda: 1.0, lambda: w, lambda: w.sum() * 1j):
        with pytest.raises(ValueError, match="one real number"):
            Sharpness(sgd, bad).measure()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no graph"):
        Sharpness(sgd, lambda: w.sum().detach()).measure()


def test_a_curvature_that_is_not_finite_is_not_measured() -> None:
    w = nn.Parameter(torch.ones(2))
    for method in ("exact", "difference"):
        sharpness = Sharpness(torch.optim.SGD([w], 0.1), lambda: (w**2).sum() * math.nan, method=method)  # type: ignore[arg-type]
        reading = sharpness.measure()
        assert not reading.measured
        assert "not finite" in reading.reason


def test_the_edge_at_other_limits() -> None:
    reading = SharpnessReading(0.5, 2.0, 2.0, 0.5, (0.125, 0.125, 0.0), 0.0, 1, "exact", "")
    assert reading.edge_at([4.0, 4.0, 9.0]) == 0.5
    assert reading.edge_at([8.0, 4.0, math.inf]) == pytest.approx(1 / 3)
    assert reading.edge_at([math.inf, 4.0, 1.0]) == 0.0
    assert reading.edge_at([4.0, -1.0, 1.0]) == math.inf
