"""A reading of the layers changes nothing, stops nothing, and says what is missing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from stableopt.lyapunov.layers import LayerProbe, LayerReading
from stableopt.nn import SLL, AveragedResidual, GradientBlock, MaxMin, Sandwich, stabilize
from tests.lyapunov.training import equal, make_closure, make_model, picture, seed_everything


class Euler(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.field, self.step_size = nn.Linear(dim, dim), 0.5
        self.norm, self.drop = nn.BatchNorm1d(dim), nn.Dropout(0.2)

    def forward(self, x):
        return x + self.step_size * self.drop(torch.tanh(self.field(self.norm(x))))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2)
        self.head = nn.Linear(18, 1)

    def forward(self, x):
        return self.head(self.layers(self.tokens(x[:, :3])).flatten(1))


class Energy(nn.Module):
    """A model that differentiates in its forward map."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.inner(x).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0].sum(1, keepdim=True)


MODELS = {
    "noise": make_model,
    "blocks": lambda: nn.Sequential(
        nn.Linear(6, 6), Euler(6), GradientBlock(6), SLL(6), AveragedResidual(nn.Linear(6, 6)), MaxMin(), Sandwich(6, 4),
        stabilize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), method="power"), nn.Linear(4, 1),
    ),
    "tokens": Tokens,
    "recurrent": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.GRU(3, 4, batch_first=True, dropout=0.1, num_layers=2), Last()),
    "energy": Energy,
}  # fmt: skip


class Last(nn.Module):
    def forward(self, x):
        return x[0][:, -1, :1]


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_disturbed_and_readings_repeat(kind, mode):
    seed_everything()
    model = MODELS[kind]().train(mode)
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randint(7, (5, 6)) if kind == "tokens" else torch.randn(5, 6)
    closure = make_closure(model, optimizer, x, torch.randn(5, 1))
    optimizer.step(closure)
    before = copy.deepcopy(picture(model, optimizer))
    gradients = [p.grad for p in model.parameters()]
    objects = [id(t) for t in (*model.parameters(), *model.buffers())]
    probe = LayerProbe(model, closure)
    first, second = probe.measure(), probe.measure()
    assert equal(before, picture(model, optimizer))
    assert all(a is p.grad for a, p in zip(gradients, model.parameters(), strict=True))
    assert objects == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert first.reason == ""
    assert math.isfinite(first.forward_exponent)
    assert (first.gains, first.kinks) == (second.gains, second.kinks)  # the same masks and noise each time
    assert first.forward_exponent == pytest.approx(sum(first.gains.values()) / len(first.gains))


@pytest.mark.parametrize("error", [RuntimeError, StopIteration])
def test_a_probe_that_fails_gives_a_reason_and_what_the_weights_tell(error):
    seed_everything()
    model = make_model()
    before = copy.deepcopy(dict(model.state_dict()))
    generator = torch.get_rng_state()

    def probe():
        model(torch.randn(4, 6))
        raise error("no more data")

    reading = LayerProbe(model, probe).measure()
    assert reading.reason == f"the probe failed: {error.__name__}: no more data"
    assert set(reading.norms) == {"1.weight", "3.weight", "7.weight", "9.weight"}
    assert reading.gains == {}
    assert math.isnan(reading.forward_exponent)
    assert equal(before, dict(model.state_dict()))
    assert torch.equal(generator, torch.get_rng_state())


def test_what_was_not_asked_for_or_cannot_be_has_its_reason():
    layer = nn.Linear(2, 2)
    assert LayerProbe(layer).measure(forward=False).reason == ""
    assert "no probe was given" in LayerProbe(layer).measure().reason
    assert "did not call the model" in LayerProbe(layer, lambda: torch.zeros(())).measure().reason
    assert "the closure must return the loss" in LayerProbe(layer, lambda: layer(torch.ones(1, 2))).measure().reason
    nn.init.zeros_(layer.weight)
    reading = LayerProbe(layer, lambda: layer(torch.ones(1, 2)).sum()).measure()
    assert "does not move with the input" in reading.reason
    assert math.isnan(reading.forward_exponent)


def test_weights_that_are_not_finite_stop_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), GradientBlock(3), AveragedResidual(nn.Linear(3, 3)), Euler(3))
    probe = LayerProbe(model, lambda: model(torch.ones(2, 3)).sum())
    healthy = probe.measure()
    saved = copy.deepcopy(model.state_dict())
    for value in (math.nan, math.inf):
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        reading = probe.measure()
        assert isinstance(reading, LayerReading)
        assert math.isnan(reading.forward_exponent)
        assert reading.reason == "a representation is not finite"
    model.load_state_dict(saved)
    again = probe.measure()
    assert again.gains == healthy.gains
    assert again.norms == pytest.approx(healthy.norms, rel=0.2)


def test_the_weights_bound_the_growth_of_a_chain_of_modules():
    torch.manual_seed(0)
    for _ in range(3):
        model = nn.Sequential(
            nn.Linear(6, 8),
            nn.LeakyReLU(2.0),
            nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
            GradientBlock(8),
            nn.Linear(8, 2),
        )
        probe = LayerProbe(model, lambda model=model: model(torch.randn(16, 6)).square().sum())
        reading = [probe.measure() for _ in range(10)][-1]
        assert reading.forward_exponent <= reading.weight_exponent
    opened = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 1))
    assert math.isnan(LayerProbe(opened, lambda: opened(torch.randn(2, 6)).sum()).measure().weight_exponent)


def test_a_state_continues_the_readings():
    seed_everything()
    model, x = MODELS["blocks"](), torch.randn(5, 6)
    a = LayerProbe(model, lambda: model(x).sum())
    for _ in range(3):
        a.measure()
    b = LayerProbe(model, lambda: model(x).sum())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    first, second = a.measure(), b.measure()
    assert repr(first) == repr(second)
    assert repr(first) != repr(LayerProbe(model, lambda: model(x).sum()).measure())


def test_a_model_that_changes_is_looked_at_anew():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    probe = LayerProbe(model, lambda: model(torch.ones(1, 3)).sum())
    assert set(probe.measure().gains) == {"0", "1"}
    model.append(nn.Linear(3, 2))
    assert set(probe.measure().gains) == {"0", "1", "2"}
    model.forward = lambda x: model[2](model[0](x))  # the same modules, another way
    reading = probe.measure()
    assert "'1' was not called" in reading.reason
    assert set(probe.measure().gains) == {"0", "2"}


def test_the_proved_gaps_are_those_of_the_estimator():
    model = stabilize(nn.Sequential(nn.Linear(4, 4)), method="power")
    assert LayerProbe(model).gaps()["0.weight"] == pytest.approx(1.0, rel=0.1)


def test_a_wrapped_model_is_measured_from_within():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    outer, x = Wrapper(inner), torch.randn(4, 3)
    readings = [LayerProbe(model, lambda: outer(x).sum()).measure() for model in (inner, outer)]
    assert list(readings[0].gains.values()) == list(readings[1].gains.values())
    assert list(readings[1].gains) == ["module.0", "module.2"]
