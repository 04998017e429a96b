"""An estimate is near the norm, from below, and taking it changes nothing."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from stableopt.linalg import conv_norm
from stableopt.lyapunov import NormEstimator
from stableopt.nn import GradientBlock, stabilize
from tests.lyapunov.training import equal, make_model, seed_everything


def norm(weight) -> float:
    return float(np.linalg.norm(weight.detach().double().numpy(), 2))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (40, 40), (1, 7)])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_estimate_is_below_the_norm_and_reaches_it(shape, scale):
    layer = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        layer.weight.mul_(scale)
    estimator = NormEstimator(layer)
    exact = norm(layer.weight)
    estimates = [estimator.measure().norms["weight"] for _ in range(150)]
    assert all(value <= exact * (1 + 1e-12) for value in estimates)
    assert estimates[0] >= 0.85 * exact  # eight steps from a random vector
    assert estimates[-1] == pytest.approx(exact, rel=1e-3)
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(estimates))  # one warm step each


def test_one_step_follows_a_weight_that_changes_slowly():
    layer = nn.Linear(30, 30)
    estimator = NormEstimator(layer)
    for _ in range(150):
        estimator.measure()
    for _ in range(50):
        with torch.no_grad():
            layer.weight.add_(0.001 * torch.randn(30, 30))
        assert estimator.measure().norms["weight"] == pytest.approx(norm(layer.weight), rel=0.02)


def test_a_zero_weight_has_norm_zero_and_recovers():
    layer = nn.Linear(3, 3)
    estimator = NormEstimator(layer)
    for value in (0.0, math.nan, math.inf, 1e200, 0.0):
        with torch.no_grad():
            layer.weight.fill_(value)
        found = estimator.measure().norms["weight"]
        exact = 3.0 * value  # of a matrix of ones
        assert found == pytest.approx(exact, rel=1e-6) if math.isfinite(exact) else not math.isfinite(found)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
    assert estimator.measure().norms["weight"] == pytest.approx(1.0)


def test_a_weight_of_another_shape_or_type_is_measured_anew():
    model = nn.Sequential(nn.Linear(3, 3))
    estimator = NormEstimator(model)
    estimator.measure()
    model[0] = nn.Linear(3, 7)
    assert 0 < estimator.measure().norms["0.weight"] <= norm(model[0].weight) * (1 + 1e-12)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model.to(dtype)
        assert 0 < estimator.measure().norms["0.weight"] <= norm(model[0].weight) * (1 + 1e-5)


CONVS = {
    "plain": lambda: nn.Conv1d(2, 3, 3),
    "strided and grouped": lambda: nn.Conv1d(4, 4, 4, stride=2, padding=1, groups=2),
    "dilated": lambda: nn.Conv1d(2, 2, 3, dilation=2, padding=2),
    "circular": lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose1d(2, 3, 4, stride=2),
    "two axes": lambda: nn.Conv2d(1, 2, 3, padding=1),
}


def operator_norm(conv: nn.Module, size: int) -> float:
    """Return the norm of the linear map on images of one size, exactly."""
    shape = (1, conv.in_channels, *[size] * (conv.weight.ndim - 2))
    zero = torch.zeros(shape)
    columns = [(conv(e.view(shape)) - conv(zero)).flatten() for e in torch.eye(zero.numel())]
    return float(torch.linalg.matrix_norm(torch.stack(columns).detach(), 2))


@pytest.mark.parametrize("kind", CONVS)
def test_a_convolution_is_measured_as_an_operator(kind):
    torch.manual_seed(0)
    conv = CONVS[kind]()
    options = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups, "padding": conv.padding}
    options |= {"padding_mode": conv.padding_mode, "transposed": kind == "transposed"}
    estimator = NormEstimator(conv)
    found = [estimator.measure().norms["weight"] for _ in range(10)]
    assert all(value <= conv_norm(conv.weight.detach(), **options).upper for value in found)  # from below
    assert found[-1] == pytest.approx(operator_norm(conv, 10 if conv.weight.ndim > 3 else 40), rel=0.04)


def test_a_convolution_survives_what_passes():
    conv = nn.Conv2d(2, 2, 3)
    estimator, kernel = NormEstimator(conv), conv.weight.detach().clone()
    before = estimator.measure().norms["weight"]
    for value in (math.nan, math.inf, 0.0):
        nn.init.constant_(conv.weight, value)
        estimator.measure()
        nn.init.constant_(conv.weight[0], 1.0)
        estimator.measure()
    with torch.no_grad():
        conv.weight.copy_(kernel)
    assert [estimator.measure().norms["weight"] for _ in range(20)][-1] == pytest.approx(before, rel=0.01)


def test_the_reshaped_kernel_would_be_wrong():
    conv = nn.Conv1d(1, 1, 3, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)  # a moving sum: amplifies a constant image by 3
    assert norm(conv.weight.reshape(1, -1)) == pytest.approx(math.sqrt(3))
    assert NormEstimator(conv).measure().norms["weight"] == pytest.approx(3.0)


def test_what_has_no_operator_norm_is_left_out():
    model = nn.Sequential(
        nn.LayerNorm(4), nn.LazyLinear(3), nn.Linear(2, 2, device="meta"), nn.Identity(), nn.PReLU(),
        nn.Embedding(3, 2, max_norm=1.0),
    )  # fmt: skip
    assert NormEstimator(model).measure().norms == {}


def settled(module: nn.Module) -> dict[str, float]:
    estimator = NormEstimator(module)
    return [estimator.measure() for _ in range(60)][-1].norms


def test_a_weight_of_several_matrices_has_one_norm_for_each():
    attention, lstm, gru = (
        nn.MultiheadAttention(6, 2),
        nn.LSTM(3, 4, bidirectional=True),
        nn.GRUCell(3, 4),
    )
    found = settled(attention)
    for label, part in zip("qkv", attention.in_proj_weight.chunk(3), strict=True):
        assert found[f"in_proj_weight[{label}]"] == pytest.approx(norm(part), rel=1e-4)
    assert found["out_proj.weight"] == pytest.approx(norm(attention.out_proj.weight), rel=1e-4)
    found = settled(lstm)
    assert len(found) == 16
    for label, part in zip("ifgo", lstm.weight_hh_l0_reverse.chunk(4), strict=True):
        assert found[f"weight_hh_l0_reverse[{label}]"] == pytest.approx(norm(part), rel=1e-3)
    found = settled(gru)
    assert len(found) == 6
    for label, part in zip("rzn", gru.weight_ih.chunk(3), strict=True):
        assert found[f"weight_ih[{label}]"] == pytest.approx(norm(part), rel=1e-3)


def test_parts_have_their_limit_and_keep_their_names_under_a_constraint():
    attention = stabilize(nn.Sequential(nn.Linear(4, 4)), 3.0)  # the same machinery that splits weights into parts
    assert NormEstimator(attention).measure().limits == {"0.weight": pytest.approx(3.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recurrent = stabilize(nn.GRU(3, 4), radius=0.5)
    found = NormEstimator(recurrent).measure()
    assert found.limits == dict.fromkeys(found.norms, 0.5)
    assert len(found.norms) == 6
    assert all(value <= 0.5 * (1 + 1e-9) for value in found.norms.values())


def test_an_embedding_is_the_linear_map_of_one_hot_vectors():
    embedding = nn.Embedding(5, 3)
    assert settled(embedding)["weight"] == pytest.approx(norm(embedding.weight), rel=1e-4)


def test_a_reading_waits_for_the_device_once(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), GradientBlock(4), nn.Conv1d(4, 4, 3), nn.GRU(3, 4), nn.Embedding(5, 3))
    estimator = NormEstimator(model)
    estimator.measure()
    waits = []
    for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "cpu"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, _f=plain, _n=name, **kw: (waits.append(_n), _f(*args, **kw))[1]
        )
    estimator.measure()
    assert waits == ["tolist"]


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("strong", [0.0, 0.3])
def test_the_use_of_the_step_limit_is_the_share_that_the_block_takes(fraction, strong):
    block = GradientBlock(6, 9, step=fraction, strong=strong)
    estimator = NormEstimator(nn.Sequential(block))
    for _ in range(200):
        found = estimator.measure()
    tau, exact = float(block.step_size().detach()), norm(block.weight)
    assert found.cfl == {"0": pytest.approx(tau * (2 * strong + exact**2) / 2, rel=1e-6)}
    assert found.cfl["0"] <= fraction  # the rest is the excess of the block's own bound
    assert found.cfl["0"] >= 0.8 * fraction


def test_the_limit_is_the_one_of_the_constraint():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    assert NormEstimator(model).measure().limits == {}
    stabilize(model, 4.0)
    limits = NormEstimator(model).measure().limits
    assert limits == {"0.weight": pytest.approx(2.0), "2.weight": pytest.approx(2.0)}


def test_measuring_changes_nothing():
    seed_everything()
    model = make_model()
    model(torch.randn(4, 6)).sum().backward()
    state = torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [p.grad for p in model.parameters()]
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    modes = [module.training for module in model.modules()]
    estimator = NormEstimator(model)
    for _ in range(3):
        assert set(estimator.measure().norms) == {"1.weight", "3.weight", "7.weight", "9.weight"}
    assert equal(before, dict(model.state_dict()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(a is p.grad for a, p in zip(gradients, model.parameters(), strict=True))
    assert [module.training for module in model.modules()] == modes
    assert versions == [t._version for t in (*model.parameters(), *model.buffers())]


def test_a_parametrization_that_draws_random_numbers_draws_the_same_next():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, weight):
            self.calls += 1
            return weight + torch.rand_like(weight)

    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Noisy())
    state, calls = torch.get_rng_state(), layer.parametrizations.weight[0].calls.clone()
    NormEstimator(layer).measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer.parametrizations.weight[0].calls, calls)


def test_a_cached_parametrization_keeps_its_graph():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)))
    with parametrize.cached():
        NormEstimator(model).measure()
        model(torch.randn(2, 3)).sum().backward()
    assert model[0].parametrizations.weight.original.grad is not None


def test_the_state_continues_the_estimates():
    model = make_model()
    a, b = NormEstimator(model), NormEstimator(model)
    for _ in range(4):
        a.measure()
    b.load_state_dict(a.state_dict())
    assert a.measure() == b.measure()
    assert a.measure() != NormEstimator(model).measure()


def test_the_same_seed_gives_the_same_estimates():
    model = make_model()
    torch.manual_seed(1)
    first = NormEstimator(model).measure()
    torch.manual_seed(2)
    assert NormEstimator(model).measure() == first


def test_a_kernel_does_not_stay_at_a_frequency_that_is_not_the_largest():
    shares = []
    for seed in (1, 23, 29):
        torch.manual_seed(seed)
        conv = nn.Conv2d(8, 8, 3, bias=False)
        estimator = NormEstimator(nn.Sequential(conv))
        for _ in range(11):
            found = estimator.measure().norms["0.weight"]
        symbol = torch.fft.fft2(nn.functional.pad(conv.weight.detach(), (0, 29, 0, 29))).permute(2, 3, 0, 1)
        shares.append(found / float(torch.linalg.matrix_norm(symbol, 2).max()))
    assert min(shares) > 0.99
    assert max(shares) < 1.001
