"""Units near a kink are counted, for kinks that are placed by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stableopt.lyapunov.layers import LayerProbe, kink_distance
from stableopt.lyapunov.layers.kinks import KinkCounter
from stableopt.lyapunov.layers.readout import Readout
from stableopt.lyapunov.layers.walk import Walk
from stableopt.nn import Abs, GradientBlock, GroupSort, LinearSpline, MaxMin, NActivation


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def share(model, x, ratio=0.01):
    counter, readout = KinkCounter(ratio), Readout()
    with counter:
        Walk(model, lambda: model(x).sum(), counter).run()
    counter.report(readout)
    return {name: value for (_, name), value in readout.fetch().items()}


def points(*near):
    """Return entries at some distance of places, with a root mean square of 10."""
    x = torch.tensor([*near, 0.0, 0.0]).unsqueeze(0)
    far = math.sqrt((100.0 * x.numel() - float(x.square().sum())) / 2.0)
    x[0, -2:] = torch.tensor([far, -far])
    return x


KINKS = {
    "relu": (nn.ReLU, (0.0,)),
    "relu in place": (lambda: nn.ReLU(inplace=True), (0.0,)),
    "leaky": (lambda: nn.LeakyReLU(0.2), (0.0,)),
    "prelu": (nn.PReLU, (0.0,)),
    "rrelu": (nn.RReLU, (0.0,)),
    "relu6": (nn.ReLU6, (0.0, 6.0)),
    "hardtanh": (lambda: nn.Hardtanh(-2.0, 3.0), (-2.0, 3.0)),
    "hardsigmoid": (nn.Hardsigmoid, (-3.0, 3.0)),
    "hardswish": (nn.Hardswish, (-3.0, 3.0)),
    "softshrink": (lambda: nn.Softshrink(0.7), (-0.7, 0.7)),
    "threshold": (lambda: nn.Threshold(1.5, 1.5), (1.5,)),
    "F.relu": (lambda: Function(F.relu), (0.0,)),
    "torch.relu": (lambda: Function(torch.relu), (0.0,)),
    "Tensor.relu": (lambda: Function(lambda x: x.relu()), (0.0,)),
    "Tensor.relu_": (lambda: Function(lambda x: x.clone().relu_()), (0.0,)),
    "F.hardtanh": (lambda: Function(lambda x: F.hardtanh(x, min_val=-4.0, max_val=2.0)), (-4.0, 2.0)),
    "relu by keyword": (lambda: Function(lambda x: torch.relu(input=x)), (0.0,)),
    "selu": (nn.SELU, (0.0,)),
    "elu": (lambda: nn.ELU(2.0), (0.0,)),
    "hardshrink": (lambda: nn.Hardshrink(0.7), (-0.7, 0.7)),
    "abs": (Abs, (0.0,)),
    "zigzag": (lambda: NActivation(6, (-1.0, 2.0)), (-1.0, 2.0)),
    "spline": (lambda: LinearSpline(6, knots=3, span=4.0), (-4.0, 0.0, 4.0)),
}


@pytest.mark.parametrize("kind", KINKS)
def test_the_share_of_units_near_the_kinks(kind):
    make, places = KINKS[kind]
    for place in places:
        x = points(place, place + 0.09, place - 0.09, place + 0.2)  # delta = 0.01 * 10
        assert share(nn.Sequential(make()), x) == {"0": pytest.approx(3.0 / 6.0)}, place
    assert share(nn.Sequential(make()), points(0.5, 0.5, 0.5, 0.5)) == {"0": 0.0}


def test_sorted_groups_have_a_kink_where_neighbors_are_equal():
    x = points(1.0, 1.05, 2.0, 2.5)
    assert share(nn.Sequential(MaxMin()), x) == {"0": pytest.approx(1.0 / 3.0)}  # one of three pairs
    assert share(nn.Sequential(GroupSort(3)), x) == {"0": pytest.approx(1.0 / 4.0)}  # one of two times two gaps
    image = torch.arange(16.0).view(1, 4, 2, 2) * 100.0
    assert share(nn.Sequential(MaxMin()), image) == {"0": 0.0}


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.1])
def test_the_reach_is_the_relative_update_times_the_size_of_the_inputs(ratio):
    torch.manual_seed(0)
    x = torch.randn(1000, 10)
    reach = ratio * float(x.square().mean().sqrt())
    expected = float((x.abs() <= reach).double().mean())
    assert share(nn.Sequential(nn.ReLU()), x, ratio) == {"0": pytest.approx(expected)}


def test_calls_of_one_module_count_together_and_functions_belong_to_the_module_that_calls():
    relu = nn.ReLU()
    model = nn.Sequential(relu, Function(lambda x: F.relu(x) + 1.0), relu, GradientBlock(6))
    found = share(model, points(0.0, 5.0, 5.0, 5.0))
    assert set(found) == {"0", "1", "3"}
    assert found["0"] == pytest.approx((1 + 0) / 12)  # from the second on, everything is above 1


def test_a_loss_with_a_kink_is_not_the_model():
    model, counter, readout = nn.Sequential(nn.ReLU()), KinkCounter(0.1), Readout()
    with counter:
        Walk(model, lambda: F.relu(model(torch.ones(2)) - 1.0).sum(), counter).run()
    counter.report(readout)
    assert readout.fetch() == {("kinks", "0"): 0.0}


def test_smooth_activations_have_none_and_nan_is_nan():
    assert share(nn.Sequential(nn.Tanh(), nn.GELU(), nn.Softplus(), nn.ELU(), nn.CELU(2.0)), torch.randn(3, 2)) == {}
    assert math.isnan(share(nn.Sequential(nn.ReLU()), torch.tensor([1.0, math.nan]))["0"])
    assert share(nn.Sequential(nn.ReLU()), torch.zeros(0, 2)) == {}


def test_an_activation_of_the_user_can_be_registered():
    class Step(nn.Module):
        def forward(self, x):
            return torch.maximum(x, torch.ones(())) + F.relu(x)

    assert share(nn.Sequential(Step()), points(1.0, 5.0, 5.0, 5.0)) == {"0": 0.0}  # the ReLU in it
    kink_distance.register(Step, lambda module, z: (z - 1.0).abs())
    assert share(nn.Sequential(Step()), points(1.0, 5.0, 5.0, 5.0)) == {"0": pytest.approx(1.0 / 6.0)}


def test_a_reading_counts_in_the_same_pass():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([0.0, 1.0, -1.0, 1e-4]))
    probe = LayerProbe(model, lambda: model(torch.ones(3, 2)).sum())
    assert probe.measure(update_ratio=1e-3).kinks == {"1": 0.5}
    assert probe.measure(update_ratio=1e-5).kinks == {"1": 0.25}
    assert probe.measure(update_ratio=0.0).kinks == {"1": 0.25}
    assert probe.measure().kinks == {"1": 0.5}


@pytest.mark.parametrize(
    ("clamp", "places"),
    [
        (lambda x: x.clamp(min=0.5), (0.5,)),
        (lambda x: torch.clamp(x, -1.5, 0.5), (-1.5, 0.5)),
        (lambda x: x.clip(max=0.5), (0.5,)),
        (lambda x: x.clamp_min(0.5), (0.5,)),
        (lambda x: torch.clamp_max(x, max=-0.5), (-0.5,)),
        (lambda x: x.clamp(min=torch.tensor(0.5)), ()),
    ],
)
def test_a_clamp_counts_where_it_is_applied_to_data(clamp, places):
    model = nn.Sequential(Function(clamp))
    for place in places:
        x = points(place, place + 0.09, place - 0.09, place + 0.2)
        assert LayerProbe(model, lambda x=x: model(x).sum()).measure(update_ratio=0.01).kinks == {"0": 0.5}
    if not places:
        assert LayerProbe(model, lambda: model(points(0.5)).sum()).measure(update_ratio=0.01).kinks == {}
    weights = nn.Sequential(Function(lambda x: x * clamp(torch.ones(6))))
    assert LayerProbe(weights, lambda: weights(points(0.5)).sum()).measure().kinks == {}
