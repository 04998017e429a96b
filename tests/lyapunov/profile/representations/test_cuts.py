"""Perturbations begin, go on and end at the cuts as told; a pull is the transpose of a push."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.lyapunov.layers.walk import ProbeError
from stableopt.lyapunov.profile.representations.cuts import Passes
from stableopt.lyapunov.profile.representations.pull import Pull
from stableopt.lyapunov.profile.representations.survey import chain_of


def three():
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False))


@pytest.mark.parametrize("together", [True, False])
def test_what_begins_at_a_cut_takes_the_place_of_what_arrives_unless_kept(together):
    model, x = three(), torch.randn(6, 3)
    A, B, C = (layer.weight.detach() for layer in model)
    chain = chain_of(model, x)
    chain.together = together
    v, w = torch.randn(2, 6, 3), torch.randn(2, 6, 4)
    (a, b, c), lengths = chain.push({0: v, 1: w}, {1: torch.tensor([0.0, 1.0]), 2: torch.ones(2)})
    assert torch.allclose(a, v @ A.T)
    size = (v @ A.T).norm(dim=2)
    onwards = torch.stack([w[0], w[1] + (v @ A.T)[1] / size[1][:, None]])
    assert torch.allclose(b, onwards @ B.T)
    second = (onwards @ B.T).norm(dim=2)
    assert torch.allclose(c, (onwards @ B.T / second[:, :, None]) @ C.T)
    assert torch.allclose(lengths, torch.stack([size.log(), second.log()], 1))
    (_, b, c), _ = chain.push({0: v})
    assert not b.any()
    assert not c.any()


def test_a_pull_is_the_transpose_of_a_push():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    for training in (True, False):
        chain = chain_of(model.train(training), x)
        samples = 1 if training else 5
        v, w = torch.randn(3, samples, chain.widths[0]), torch.randn(3, samples, chain.widths[1])
        arrived, _ = chain.push({0: v, 1: w})
        pull = Pull(chain)
        for layer, tangents in enumerate((v, w)):
            u = torch.randn_like(arrived[layer])
            assert torch.allclose((u * arrived[layer]).sum((1, 2)), (pull.back(layer, u) * tangents).sum((1, 2)))
            assert torch.allclose(pull.forward(layer, tangents), arrived[layer])


def test_passes_are_counted():
    chain = chain_of(three(), torch.randn(6, 3), one_by_one=False)
    assert chain.passes == Passes(2, 1)
    chain.push({0: torch.randn(4, 1, 18)})
    assert chain.passes == Passes(3, 5)
    chain.together = False
    chain.push({0: torch.randn(4, 1, 18)})
    assert chain.passes == Passes(7, 9)
    pull = Pull(chain)
    pull.back(1, torch.randn(2, 1, 30))
    assert (chain.passes.forward, chain.passes.adjoints) == (8, pytest.approx(2 / 3))
    assert Passes(1, 1, 1).equivalents == 1.0


def test_other_shapes_and_calls_are_told():
    model, batch = three(), [torch.randn(6, 3)]
    chain = chain_of(model, lambda: model(batch[0]))
    batch[0] = torch.randn(5, 3)
    with pytest.raises(ProbeError, match="another shape"):
        chain.push({0: torch.randn(1, 6, 3)})
    chain = chain_of(model, lambda: model(batch[0]) if len(batch) == 1 else model[0](batch[0]))
    batch.append(batch[0])
    with pytest.raises(ProbeError, match="not called this time"):
        chain.push({0: torch.randn(1, 5, 3)})


def test_an_error_of_the_model_is_that_of_the_model():
    class Breaks(nn.Module):
        broken = False

        def forward(self, x):
            if self.broken:
                raise ZeroDivisionError
            return x

    model = nn.Sequential(nn.Linear(3, 3), Breaks())
    chain = chain_of(model, torch.randn(2, 3))
    model[1].broken = True
    with pytest.raises(ZeroDivisionError):
        chain.push({0: torch.randn(2, 2, 3)})
    assert not model._forward_pre_hooks


def test_a_layer_that_does_not_depend_on_its_input_pulls_back_zeros():
    class Half(nn.Module):
        def forward(self, x):
            return x.detach().sin()

    chain = chain_of(nn.Sequential(nn.Linear(3, 3), Half(), nn.Linear(3, 2)), torch.randn(2, 3), forward=False)
    pull = Pull(chain)
    assert not pull.back(0, torch.ones(1, 2, 3)).any()
    assert not pull.forward(0, torch.ones(1, 2, 3)).any()
