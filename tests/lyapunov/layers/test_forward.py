"""The growth of a perturbation is that of the derivatives, in forward mode and by differences."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import nn

from stableopt.lyapunov.layers import LayerProbe
from stableopt.lyapunov.layers.forward import Growth, relative_step
from stableopt.lyapunov.layers.readout import Readout
from stableopt.lyapunov.layers.trunk import Trunk, find_trunk
from stableopt.lyapunov.layers.walk import ProbeError

WAYS = ["forward", "difference"]


def norms(model, x, way="forward", seed=0):
    growth, readout = Growth(model, seed=seed), Readout()
    growth.how = way

    def probe():
        return model(x).square().sum()

    growth.measure(probe, find_trunk(model, probe), readout)
    return [value for (kind, _), value in readout.fetch().items() if kind == "growth"], growth


@pytest.mark.parametrize("way", WAYS)
def test_a_chain_of_matrices_grows_by_their_products(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 4))
    found, growth = norms(model, torch.randn(6, 5), way)
    v, expected = growth._kept, []
    for layer in (None, *model):
        v = v if layer is None else v @ layer.weight.T
        expected.append(float(v.detach().norm()))
    assert found == pytest.approx(expected, rel=1e-9 if way == "forward" else 1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_every_direction_of_a_multiple_of_an_isometry_grows_alike(way):
    q = torch.linalg.qr(torch.randn(4, 4))[0]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    factors = (3.0, 0.5, 2.0)
    with torch.no_grad():
        for layer, factor in zip(model, factors, strict=True):
            layer.weight.copy_(factor * q)
    for seed in range(3):
        found, _ = norms(model, torch.randn(6, 4), way, seed)
        assert [b / a for a, b in pairwise(found)] == pytest.approx(factors, rel=1e-6)
    reading = LayerProbe(model, lambda: model(torch.ones(2, 4)).sum()).measure()
    assert reading.forward_exponent == pytest.approx(math.log(3.0) / 3.0)
    assert reading.weight_exponent == pytest.approx(math.log(3.0) / 3.0)
    assert reading.gains == {str(i): pytest.approx(math.log(f)) for i, f in enumerate(factors)}


@pytest.mark.parametrize("way", WAYS)
def test_a_relu_lets_its_active_half_pass(way):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.copy_(torch.eye(4))
        model[0].bias.copy_(torch.tensor([9.0, 9.0, -9.0, -9.0]))
    found, growth = norms(model, torch.randn(6, 4), way)
    assert found[1] == pytest.approx(float(growth._kept[:, :2].norm()), rel=1e-6)


class WritesFirst(nn.Linear):
    def forward(self, x):
        return super().forward(x.mul_(3.0))


@pytest.mark.parametrize(
    "x", [torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)], ids=["ones", "zero"]
)
def test_layers_that_write_into_their_input_and_inputs_of_zeros_do_not_matter(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), WritesFirst(4, 4))
    assert norms(model, x, "difference")[0] == pytest.approx(norms(model, x)[0], rel=1e-6)


def nets():
    torch.manual_seed(0)
    x, image = torch.randn(4, 6), torch.randn(2, 3, 8, 8)
    yield "mlp", nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)), x
    yield (
        "cnn",
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 2)),
        image,
    )
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0, activation="gelu")
    yield "encoder", nn.Sequential(nn.Linear(6, 6), layer), torch.randn(2, 3, 6)


def test_both_ways_agree_on_smooth_nets():
    for name, model, x in nets():
        torch.manual_seed(1)
        exact, _ = norms(model, x)
        near, growth = norms(model, x, "difference")
        assert growth.how == "difference"
        assert near == pytest.approx(exact, rel=1e-4), name


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def test_an_operation_without_forward_mode_is_measured_by_differences_from_then_on():
    model, x = Last().float(), torch.randn(4, 6, 3, dtype=torch.float32)  # the kernel of float32 has none
    found, growth = norms(model, x)
    assert growth.how == "difference"
    jacobian = torch.autograd.functional.jacobian(model, x)
    v = growth._kept
    assert found[-1] == pytest.approx(float(torch.einsum("bocti,cti->bo", jacobian, v).norm()), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_measured_coarsely(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(32, 64)
    exact, _ = norms(model, x)
    model.to(dtype)
    for way in WAYS:
        assert norms(model, x.to(dtype), way)[0] == pytest.approx(exact, rel=0.02), way


def test_autocast_counts_for_the_size_of_a_difference():
    model, x = (
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).float(),
        torch.randn(4, 8, dtype=torch.float32),
    )

    def probe():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().sum()

    readings = []
    for way in WAYS:
        layers = LayerProbe(model, probe)
        layers._growth.how = way
        readings.append(layers.measure().forward_exponent)
    assert readings[1] == pytest.approx(readings[0], abs=0.05)
    assert relative_step([torch.float64]) < relative_step([torch.float32]) < relative_step([torch.bfloat16])


def test_a_layer_that_is_not_called_this_time_is_told():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ProbeError, match="'gone' was not called"):
        Growth(model).measure(lambda: model(torch.ones(1, 2)).sum(), Trunk(("0", "gone")), Readout())


def test_the_direction_is_not_drawn_like_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=generator)
    _, growth = norms(nn.Sequential(nn.Linear(3, 3)), x)
    assert abs(float(torch.nn.functional.cosine_similarity(growth._kept.flatten(), x.flatten(), dim=0))) < 0.9


class Scales(nn.Module):
    """Writes into its input, as an image model that divides by 255."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        x /= 255.0
        return self.layer(x)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_writes_into_its_input_changes_neither_the_direction_nor_the_data(way):
    model, x = Scales(), torch.full((4, 3), 255.0)
    layers = LayerProbe(model, lambda: model(x).sum())
    layers._growth.how = way
    first = layers.measure()
    kept = layers._growth._kept.clone()
    assert [layers.measure().forward_exponent for _ in range(3)] == [first.forward_exponent] * 3
    assert torch.equal(layers._growth._kept, kept)
    assert torch.equal(x, torch.full((4, 3), 255.0))
    v = kept / 255.0 @ model.layer.weight.detach().T
    assert first.forward_exponent == pytest.approx(math.log(float(v.norm() / kept.norm())), rel=1e-5)


def test_after_an_error_that_passes_dual_numbers_are_tried_again():
    model, x, calls, broken = nn.Sequential(nn.Linear(3, 3)), torch.randn(4, 3), [], True

    def probe():
        calls.append(1)
        if broken and fwd._current_level >= 0:
            raise RuntimeError("a worker died")
        return model(x).sum()

    growth, trunk = Growth(model), Trunk(("0",))

    def how():
        calls.clear()
        growth.measure(probe, trunk, Readout())
        return growth.how, len(calls)

    assert how() == ("difference", 3)
    broken = False
    assert how() == ("forward", 1)
    broken = True
    assert [how() for _ in range(4)] == [("difference", 3)] * 3 + [("difference", 2)]  # three times in a row are enough
    broken = False
    assert how() == ("difference", 2)


def test_an_operation_without_forward_mode_is_not_tried_again():
    model, x, calls = Last().float(), torch.randn(4, 6, 3, dtype=torch.float32), []
    model.register_forward_hook(lambda *_: calls.append(1))
    growth = Growth(model)
    for _ in range(2):
        calls.clear()
        growth.measure(lambda: model(x).sum(), Trunk(("",)), Readout())
    assert len(calls) == 2
