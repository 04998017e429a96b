"""A sum with the input is told from everything else by its graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stableopt.lyapunov.layers.skip import is_sum

W = torch.tensor([[0.3, -1.0, 0.2], [0.5, 0.1, 0.4], [-0.2, 0.6, 0.7]], dtype=torch.float64)
SUMS = {
    "plus": lambda x: x + 0.5 * torch.tanh(x @ W),
    "minus": lambda x: x - 0.5 * torch.tanh(x @ W),
    "last": lambda x: 0.5 * (x @ W) + x,
    "in place": lambda x: x.clone().add_(torch.tanh(x), alpha=0.5),
    "addcmul": lambda x: torch.addcmul(x, x.sin(), x.cos(), value=0.5),
    "addmm": lambda x: torch.addmm(x, x.tanh(), W, alpha=-0.5),
    "turned": lambda x: (x.T + 0.5 * (W @ x.T)).T,
    "reshaped": lambda x: (x.reshape(-1) + 0.5 * x.reshape(-1).sin()).view(x.shape),
    "linear field": lambda x: x + 0.5 * (2.0 * x),
    "twice": lambda x: (lambda h: h + 0.5 * h.sin())(x + 0.5 * x.cos()),
    "cast": lambda x: (x.float() + 0.5 * x.float().sin()).double(),
    "lerp": lambda x: torch.lerp(x, x.tanh(), 0.5),
    "mix": lambda x: 0.5 * x + 0.5 * torch.tanh(x),
}
OTHERS = {
    "map": lambda x: F.linear(x, W, torch.ones(3)),
    "softmax": lambda x: F.gumbel_softmax(x, tau=0.5),
    "hard softmax": lambda x: F.gumbel_softmax(x, tau=0.5, hard=True),
    "after": lambda x: torch.relu(x + 0.5 * x.sin() + 9.0),
    "normalized": lambda x: F.layer_norm(x + 0.5 * x.sin(), (3,)),
    "transposed": lambda x: x.T + 0.5 * x.sin(),
    "doubled": lambda x: 2.0 * x + x.sin(),
    "negative": lambda x: x.sin() - x,
    "gate": lambda x: x * x.sigmoid(),
    "shape": lambda x: x[:2] + x[:2].sin(),
    "constant": lambda x: torch.ones(3, 3),
    "many sums": lambda x: _doubled(x.sin(), 40),
}


def _doubled(x, times):
    for _ in range(times):
        x = x + 0.5 * x
    return x


@pytest.mark.parametrize("kind", SUMS)
def test_a_sum(kind):
    x = torch.randn(3, 3).requires_grad_()
    assert is_sum(SUMS[kind](x), x, 0.5)


@pytest.mark.parametrize("kind", OTHERS)
def test_no_sum(kind):
    x = torch.randn(3, 3).requires_grad_()
    assert not is_sum(OTHERS[kind](x), x, 0.5)


def test_a_mix_is_one_with_the_step_of_the_block():
    x = torch.randn(3, 3).requires_grad_()
    y = 0.9 * x + 0.1 * x.tanh()
    assert is_sum(y, x, 0.1)
    assert not is_sum(y, x, 0.5)
    assert not is_sum(y, x)
