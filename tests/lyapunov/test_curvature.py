"""The curvature probe: what it reads is what the dense Hessian says, what it costs is bounded, and what it leaves is nothing."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.lyapunov.curvature import CurvatureProbe, CurvatureReading
from tests.optim.test_sharpness import everything, exact_edge, full_hessian, problem, same, train


class Quadratic(nn.Module):
    """Half of w'Hw for a random symmetric H of a given spectrum."""

    def __init__(self, spectrum: Tensor, seed: int = 0) -> None:
        super().__init__()
        n = len(spectrum)
        Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0]
        self.H = (Q * spectrum) @ Q.T
        self.w = nn.Parameter(torch.ones(n))

    def loss(self) -> Tensor:
        return 0.5 * self.w @ self.H @ self.w


def probed(
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor], CurvatureProbe]:
    model, loss = problem()
    rule = optimizer(model.parameters(), lr=0.01)
    return model, rule, loss, CurvatureProbe(model, rule, loss, **settings)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("method", ["auto", "forward", "difference"])
def test_sharpness_and_edge_are_those_of_the_dense_hessian(optimizer: Any, method: Any) -> None:
    _, rule, loss, probe = probed(optimizer, method=method, products=10)
    train(rule, loss, 5)
    reading = probe.measure()
    reading = probe.measure()
    expected = exact_edge(rule, loss)
    assert reading.edge == pytest.approx(expected, rel=1e-3)
    assert reading.edge <= expected * (1 + 1e-6)
    H = full_hessian(loss, [p for g in rule.param_groups for p in g["params"]])
    assert reading.plain_sharpness <= float(torch.linalg.eigvalsh(H)[-1]) * (1 + 1e-6)
    assert reading.residual < 0.05
    assert reading.hvp == ("exact" if method == "auto" else method)
    assert reading.reason == ""


def test_a_reading_follows_training_at_three_products_a_look() -> None:
    _, rule, loss, probe = probed(torch.optim.AdamW)
    errors, products = [], []
    for _ in range(15):
        train(rule, loss, 5)
        reading = probe.measure()
        errors.append(1 - reading.edge / exact_edge(rule, loss))
        products.append(reading.products - 1)  # one for the trace
    assert min(errors) > -1e-9
    assert float(np.median(errors[5:])) < 0.02
    assert max(products) <= 12
    assert all(sum(products[:n]) <= 3 * n + 9 for n in range(1, 16))


def test_what_an_easy_look_saves_is_there_for_a_hard_one() -> None:
    model = Quadratic(torch.tensor([10.0, 1.0, 1.0, 1.0, 0.5, 0.4, 0.3, 0.2]))
    probe = CurvatureProbe(model, torch.optim.SGD(model.parameters(), 0.1), model.loss, traces=0)
    for _ in range(12):
        quiet = probe.measure()
    assert quiet.products <= 2
    other = Quadratic(torch.linspace(1.0, 8.0, 8), seed=5)
    model.H = other.H
    jump = probe.measure()
    assert 3 < jump.products <= 12
    assert jump.sharpness == pytest.approx(8.0, rel=0.01)
    products = []
    for seed in range(8):
        model.H = Quadratic(torch.linspace(1.0, 8.0, 8), seed=seed).H  # never at rest
        products.append(probe.measure().products)
    assert products[0] > 3
    assert products[4:] == [3] * 4


def test_an_eigenvalue_that_overtakes_is_seen_though_the_old_direction_stays_an_eigenvector() -> None:
    model = Quadratic(torch.tensor([4.0, 3.0, 1.0, 0.5, 0.2]))
    probe = CurvatureProbe(model, torch.optim.SGD(model.parameters(), 0.1), model.loss)
    for _ in range(10):
        assert probe.measure().sharpness == pytest.approx(4.0, rel=0.01)
    vectors = torch.linalg.eigh(model.H)[1]
    model.H = model.H + 3.0 * torch.outer(vectors[:, -2], vectors[:, -2])  # the runner-up is now 6
    assert probe.measure().sharpness == pytest.approx(6.0, rel=0.01)


def test_the_trace_is_unbiased_its_error_is_true_and_its_interval_covers() -> None:
    """A large eigenvalue and a bulk, as networks have them."""
    spectrum = torch.cat([torch.tensor([20.0, 15.0]), torch.linspace(-0.5, 1.0, 22)])
    model, true = Quadratic(spectrum), float(spectrum.sum())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    probe = CurvatureProbe(model, optimizer, model.loss)
    for _ in range(5):
        probe.measure()
    covered, estimates, errors = 0, [], []
    for seed in range(40):
        again = CurvatureProbe(model, optimizer, model.loss, seed=seed)
        again.load_state_dict(probe.state_dict() | {"generator": torch.Generator().manual_seed(seed).get_state()})
        again._rest = type(again._rest)()
        for _ in range(6):
            reading = again.measure()
        low, high = reading.trace_interval()
        covered += low <= true <= high
        estimates.append(reading.trace)
        errors.append(reading.trace_error**2)
    spread = float(np.std(estimates, ddof=1))
    assert float(np.mean(estimates)) == pytest.approx(true, abs=3 * spread / math.sqrt(40))
    assert float(np.mean(errors)) == pytest.approx(spread**2, rel=0.6)
    assert covered >= 34  # of 40 at 95 %
    assert reading.trace_count > 5
    full = float(2 * (model.H - torch.diag(model.H.diag())).square().sum())
    assert spread**2 * reading.trace_count < 0.05 * full  # the variance without the large eigenvalues


def test_the_noise_scale_is_the_unbiased_one() -> None:
    """Gradients G + noise with a known covariance; and the two-batch form, written out."""
    torch.manual_seed(3)
    m, b, n = 8, 4, 30
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(n))
    G, targets = torch.randn(n), torch.randn(m, b, n)
    losses = [lambda i=i: ((G + 2.0 * targets[i]) @ model.w).mean() for i in range(m)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reading = CurvatureProbe(model, optimizer, losses, batch_size=b, traces=0).measure()
    small = (G + 2.0 * targets.mean(1)).square().sum(1).mean()
    large = (G + 2.0 * targets.mean((0, 1))).square().sum()
    signal = (m * b * large - b * small) / (m * b - b)
    noise = (small - large) / (1 / b - 1 / (m * b))
    assert reading.noise_scale == pytest.approx(float(noise / signal), rel=1e-10)
    assert reading.noise_scale == pytest.approx(4.0 * n / float(G.square().sum()), rel=0.4)
    assert math.isnan(CurvatureProbe(model, optimizer, losses[0], traces=0).measure().noise_scale)
    cancel = [lambda: model.w.sum(), lambda: -model.w.sum()]
    assert CurvatureProbe(model, optimizer, cancel, traces=0).measure().noise_scale == math.inf


def test_the_loss_of_several_micro_batches_is_their_mean() -> None:
    model, _ = problem()
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parts = [lambda i=i: F.cross_entropy(model(x[i::4]), y[i::4]) for i in range(4)]
    whole = CurvatureProbe(model, optimizer, lambda: F.cross_entropy(model(x), y)).measure()
    split = CurvatureProbe(model, optimizer, parts).measure()
    assert split.sharpness == pytest.approx(whole.sharpness, rel=1e-9)
    assert split.trace == pytest.approx(whole.trace, rel=1e-9)
    assert split.noise_scale > 0


class Busy(nn.Module):
    """What a look could disturb: running statistics, dropout, a frozen layer, a tied weight, draws from three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.out = nn.Linear(6, 6)
        self.out.weight = self.inner.weight
        self.frozen = nn.Linear(6, 3)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1e-3 * random.random() + 1e-3 * float(np.random.rand())  # noqa: NPY002
        return self.frozen(self.out(self.drop(self.norm(torch.tanh(self.inner(x))))))


@pytest.mark.parametrize("method", ["auto", "forward", "difference"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_look_changes_nothing_and_looks_alike(method: Any, fails: bool) -> None:
    model, x, y = Busy(), torch.randn(16, 6), torch.randint(3, (16,))
    model.out.eval()  # a mode that is not that of the whole
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    calls: list[int] = []

    def broken() -> Tensor:
        calls.append(1)
        model.eval()
        value = loss()
        if len(calls) > 1 or method != "difference":
            raise RuntimeError("the disk is full")
        return value

    train(optimizer, loss, 2)
    pending = loss()
    grads, versions = [p.grad for p in model.parameters()], [p._version for p in model.parameters()]
    before, state = everything(model, optimizer), copy.deepcopy(optimizer.state_dict())
    probe = CurvatureProbe(model, optimizer, [broken, broken] if fails else [loss, loss], method=method)
    first = probe.measure()
    assert same(before, everything(model, optimizer))
    assert same(state, optimizer.state_dict())
    assert all(g is p.grad for g, p in zip(grads, model.parameters(), strict=True))
    assert versions == [p._version for p in model.parameters()]
    pending.backward()
    if fails:
        assert first.reason == "the curvature was not measured: RuntimeError: the disk is full"
        assert math.isnan(first.sharpness)
        return
    assert first.reason == ""
    torch.rand(3)
    random.random()
    np.random.rand()  # noqa: NPY002
    again = CurvatureProbe(model, optimizer, [loss, loss], method=method).measure()
    assert again == first  # whatever the random state is


def test_a_graph_that_is_there_saves_the_evaluation() -> None:
    _, rule, loss, probe = probed(torch.optim.AdamW)
    train(rule, loss, 3)
    pending = loss()
    reading = probe.measure(pending)
    assert reading.hvp == "graph"
    pending.backward()
    assert probe.measure(pending).hvp == "exact"
    _, _, _, other = probed(torch.optim.AdamW)
    train(other.optimizer, other.losses[0], 3)
    assert other.measure().edge == pytest.approx(reading.edge, rel=1e-9)


def test_what_has_no_metric_is_measured_plainly_and_says_so() -> None:
    import stableopt as so

    model, loss = problem()
    H = full_hessian(loss, list(model.parameters()))
    for optimizer in (so.optim.Lion(model.parameters(), 0.01, guard="off"), torch.optim.Rprop(model.parameters())):
        reading = CurvatureProbe(model, optimizer, loss, products=10).measure()
        assert math.isnan(reading.sharpness)
        assert math.isnan(reading.edge)
        assert reading.plain_sharpness == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)
        assert reading.reason.startswith("only the plain sharpness: ")
    _, _, _, probe = probed(torch.optim.AdamW)
    early = probe.measure()
    assert early.reason == "the optimizer has taken no step, so its metric does not exist yet"
    assert math.isnan(early.sharpness)
    assert math.isfinite(early.trace)
    assert early.hvp == "exact"


def test_a_resumed_run_joins() -> None:
    _, rule, loss, probe = probed(torch.optim.AdamW)
    for _ in range(4):
        train(rule, loss, 2)
        probe.measure()
    import io

    file = io.BytesIO()
    torch.save(probe.state_dict(), file)
    file.seek(0)
    other = CurvatureProbe(probe.model, rule, loss)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        train(rule, loss, 2)
        assert other.measure() == probe.measure()


def test_bad_arguments_are_refused_with_a_sentence() -> None:
    model, loss = problem()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (loss, {"products": 0}, ValueError, "products must be an integer >= 1, got 0"),
        (loss, {"traces": -1}, ValueError, "traces must be an integer >= 0, got -1"),
        (loss, {"batch_size": 1.5}, ValueError, "batch_size must be an integer >= 1, got 1.5"),
        (loss, {"method": "magic"}, ValueError, "method must be one of auto, exact, forward, difference, got 'magic'"),
        (3, {}, TypeError, "got int"),
        ([], {}, TypeError, "got list"),
        ([loss, 3], {}, TypeError, "got int"),
    ]
    for given, settings, error, said in cases:
        with pytest.raises(error, match=said):
            CurvatureProbe(model, optimizer, given, **settings)
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module as model, got int"):
        CurvatureProbe(3, optimizer, loss)  # type: ignore[arg-type]
    not_a_number = CurvatureProbe(model, optimizer, lambda: loss() * math.nan).measure()
    assert not_a_number.reason == "the curvature is not finite"
    assert math.isnan(not_a_number.trace)
    assert math.isnan(CurvatureReading.missing("x").trace_interval()[0])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_model_in_its_ddp_wrapper_neither_waits_nor_talks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        inner.unused = nn.Linear(1, 1)
        model = nn.parallel.DistributedDataParallel(inner, find_unused_parameters=True)
        x, talked = torch.randn(8, 4), []
        monkeypatch.setattr(model, "_sync_buffers", lambda: talked.append(1))

        def loss() -> Tensor:
            return model(x).square().mean()

        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        probe = CurvatureProbe(model, optimizer, loss)
        for _ in range(3):
            train(optimizer, loss, 1)
            flags = model.require_forward_param_sync, model.require_backward_grad_sync
            talked.clear()
            assert probe.measure().reason == ""
            assert talked == []
            assert (model.require_forward_param_sync, model.require_backward_grad_sync) == flags
    finally:
        torch.distributed.destroy_process_group()
