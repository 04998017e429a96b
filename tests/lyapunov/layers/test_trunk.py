"""The layers of a model are found whatever its forward map is written like."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from stableopt.lyapunov.layers.trunk import find_trunk
from stableopt.lyapunov.layers.walk import ProbeError
from stableopt.nn import AveragedResidual, GradientBlock


class Model(nn.Module):
    """A model with some modules and a forward map."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.map = forward

    def forward(self, x):
        return self.map(self, x)


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def in_place(m, x):
    y = m.b(F.relu(m.a(x), inplace=True))
    y += x
    return m.relu(y)


def gpt(m, indices):
    x = m.drop(m.tokens(indices) + m.places(torch.arange(indices.shape[1])))
    for layer in m.layers:
        x = layer(x)
    return m.head(m.norm(x))


def block() -> nn.Module:
    return Model(in_place, a=linear(), b=linear(), relu=nn.ReLU(inplace=True))


def encoder(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, **options)


X, TOKENS = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64)
CASES = {
    "chain": (lambda: nn.Sequential(linear(), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(), linear()), X, ("0", "4")),
    "nested": (lambda: nn.Sequential(nn.Flatten(), nn.Sequential(linear(), nn.ReLU()), linear()), X, ("1.0", "2")),
    "one layer": (linear, X, ("",)),
    "no layer": (nn.ReLU, X, ("",)),
    "functions": (
        lambda: Model(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=linear(), b=linear(), c=linear()), X, ("a", "b", "c"),
    ),
    "residual": (lambda: nn.Sequential(linear(), block(), block(), linear()), X, ("0", "1", "2", "3")),
    "ours": (lambda: nn.Sequential(GradientBlock(4), AveragedResidual(linear()), linear()), X, ("0", "1", "2")),
    "skip over all": (lambda: Model(lambda m, x: x + m.b(m.a(x)), a=linear(), b=linear()), X, ("",)),
    "dense": (lambda: Model(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=linear(), b=nn.Linear(8, 1)), X, ("",)),
    "shared": (lambda: Model(lambda m, x: m.a(m.a(m.a(x).tanh()).tanh()), a=linear()), X, ("a", "a#2", "a#3")),
    "recurrent": (lambda: Model(lambda m, x: m.b(m.a(x)[0]), a=nn.LSTM(4, 4), b=linear()), X, ("a", "b")),
    "side": (lambda: Model(lambda m, x: m.b(m.a(x)) + m.c(torch.ones(4)), a=linear(), b=linear(), c=linear()), X, ("a", "b")),
    "checkpoint": (
        lambda: Model(
            lambda m, x: m.b(torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False)), a=linear(), b=linear()
        ), X, ("a", "b"),
    ),
    "encoders": (lambda: nn.Sequential(encoder(), encoder(norm_first=True)), torch.ones(1, 3, 4, dtype=torch.float64), ("0", "1")),
    "tokens": (
        lambda: Model(
            gpt, tokens=nn.Embedding(5, 4), places=nn.Embedding(3, 4), drop=nn.Dropout(), layers=nn.ModuleList([encoder()]),
            norm=nn.LayerNorm(4), head=linear(),
        ), TOKENS, ("layers.0", "head"),
    ),
    "embedding in a part": (
        lambda: Model(lambda m, x: m.b(m.a(x)), a=nn.Sequential(nn.Embedding(5, 4), linear()), b=linear()), TOKENS, ("a.1", "b"),
    ),
    "two heads": (lambda: Model(lambda m, x: (m.b(m.a(x)), m.c(x)), a=linear(), b=linear(), c=linear()), X, ("",)),
    "writes": (
        lambda: Model(lambda m, x: m.b(torch.zeros(2, 8).index_copy(1, torch.arange(4), m.a(x))), a=linear(), b=nn.Linear(8, 1)),
        X, ("a", "b"),
    ),
    "written in place": (
        lambda: Model(lambda m, x: m.b(_written(m.a(x))), a=linear(), b=nn.Linear(8, 1)), X, ("a", "b"),
    ),
}  # fmt: skip


def _written(x):
    out = torch.zeros(len(x), 8)
    out[:, :4] = x
    return out


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES)
def test_the_layers_are_those_in_a_row(case, mode):
    make, x, layers = CASES[case]
    model = make().train(mode)
    assert find_trunk(model, lambda: sum(y.sum() for y in _outputs(model(x)))).layers == layers


def _outputs(y):
    return y if isinstance(y, tuple) else (y,)


def test_modules_are_named_only_if_there_is_nothing_else():
    closed = nn.Sequential(
        nn.Flatten(), linear(), nn.ReLU(inplace=True), nn.Identity(), nn.Sequential(linear(), nn.Tanh())
    )
    assert find_trunk(closed, lambda: closed(X).sum()).modules == ("1", "2", "3", "4.0", "4.1")
    for between in (F.relu, lambda x: 2.0 * x, lambda x: x.unsqueeze(0).expand(9, *x.shape)):
        opened = Model(lambda m, x, f=between: m.b(f(m.a(x))), a=linear(), b=linear())
        assert find_trunk(opened, lambda m=opened: m(X).sum()).modules == ()
    view = Model(lambda m, x: m.b(m.a(x).view(1, 2, 4)), a=linear(), b=linear())
    assert find_trunk(view, lambda: view(X).sum()).modules == ("a", "b")


def test_an_output_that_ignores_the_input_has_no_layers():
    model = Model(lambda m, x: m.a(torch.ones(4)), a=linear())
    with pytest.raises(ProbeError, match="does not depend on the input"):
        find_trunk(model, lambda: model(X).sum())


def test_outputs_that_hide_their_tensors_are_the_reason():
    @dataclass
    class Out:
        y: torch.Tensor

    class Hides(nn.Linear):
        def forward(self, x):
            return Out(super().forward(x))

    model = Hides(2, 2)
    with pytest.raises(ProbeError, match=r"returns a Out in which no tensors .* torch\.export\.register_dataclass"):
        find_trunk(model, lambda: model(torch.ones(1, 2)).y.sum())
    torch.export.register_dataclass(Out)
    assert find_trunk(model, lambda: model(torch.ones(1, 2)).y.sum()).layers == ("",)
