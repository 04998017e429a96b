"""Evaluations with dual numbers: other kernels have the same values, and nothing of a transform stays behind."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from stableopt.lyapunov.layers.forward import dual_numbers
from stableopt.lyapunov.profile.representations.inside import (
    LinearByHand,
    plain_kernels,
    primal,
    private_buffers,
    tangent_of,
)


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_weight_normalization_has_the_same_value_and_its_derivative(dim):
    layer = parametrizations.weight_norm(nn.Linear(3, 4), dim=dim)
    x, (g, v) = torch.randn(2, 3), [p.detach() for p in layer.parametrizations.weight.parameters()]
    expected = layer(x)
    with plain_kernels():
        assert torch.allclose(layer(x), expected, rtol=1e-14)
        with dual_numbers():
            w = torch._weight_norm(fwd.make_dual(v, v), g, -1 if dim is None else dim)
            assert torch.allclose(tangent_of(w), torch.zeros_like(v), atol=1e-15)  # its length does not matter
            w = torch._weight_norm(v, fwd.make_dual(g, g), -1 if dim is None else dim)
            assert torch.allclose(tangent_of(w), primal(w))


def test_a_tangent_goes_through_a_linear_map_as_torch_says():
    x, v, W, b = torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    for args in ((x, W, b), (x, W)):
        with dual_numbers():
            known = fwd.unpack_dual(F.linear(fwd.make_dual(x, v), *args[1:]))
            with LinearByHand():
                found = fwd.unpack_dual(F.linear(fwd.make_dual(x, v), *args[1:]))
                both = F.linear(fwd.make_dual(x, v), fwd.make_dual(W, W), b)
                assert torch.equal(F.linear(*args), F.linear(x, *args[1:]))
            assert torch.equal(found.primal, known.primal)
            assert torch.allclose(found.tangent, known.tangent)
            assert torch.allclose(tangent_of(both), v @ W.T + x @ W.T)  # left to torch


def test_buffers_and_attributes_are_those_before_also_after_an_error():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.last = torch.zeros(2)

        def forward(self, x):
            self.count.add_(1)
            self.last = x
            if x.sum() > 10.0:
                raise ValueError
            return x

    model = Keeps()
    count, last, version = model.count, model.last, model.count._version
    for x in (torch.ones(2), torch.full((2,), 9.0)):
        try:
            with private_buffers(model):
                model(x)
        except ValueError:
            pass
        assert model.count is count
        assert model.last is last
        assert (float(count), count._version) == (0.0, version)


def test_switches_are_put_back_after_an_error():
    before = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    with pytest.raises(ValueError, match="stop"), plain_kernels():
        raise ValueError("stop")
    assert before == (torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled())
