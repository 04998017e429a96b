"""Models with every kind of weight that stabilize finds: how to build one, an input, and where its weights are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopt import nn as snn
from stableopt.nn import GroupSort
from stableopt.nn.residual import AveragedResidual
from stableopt.nn.structure import Concat, Merge


class Pair(nn.Module):
    """A Bilinear form of one input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x)


class Attend(nn.Module):
    """Self-attention, with or without a common embedding of query, key and value."""

    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=kdim, vdim=kdim, batch_first=True)
        self.kdim = kdim

    def forward(self, x: Tensor) -> Tensor:
        key = x if self.kdim is None else torch.cat([x, x], dim=-1)
        return self.attention(x, key, key)[0]


class Recur(nn.Module):
    """The outputs of a recurrent layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Cell(nn.Module):
    """Two steps of a recurrent cell."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        state = self.inner(x)
        state = self.inner(x, state)
        return state[0] if isinstance(state, tuple) else state


def stabilize(model: nn.Module, lipschitz: float | None = None, **options: Any) -> nn.Module:
    """Limit a model as :func:`stableopt.nn.stabilize` does, by default in l2 with the bound that holds in training as well.

    Laws of limits that hold in every mode, to the last bit and without state, are about that one.
    """
    if options.get("norm", "l2") == "l2" and options.get("by") != "projection" and options.get("method") is None:
        options["method"] = "gram"
    return snn.stabilize(model, lipschitz, **options)


@dataclass(frozen=True)
class Animal:
    """A model, an input, and the numbers of matrices of its weights in the order of the modules."""

    name: str
    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    parts: tuple[int, ...]

    def stabilized(self, radius: float = 0.7, **options: object) -> nn.Module:
        """The model with a radius for each weight, without the warning that no bound of the whole follows."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return stabilize(self.make(), radius=radius, **options)  # type: ignore[arg-type]

    def estimated(self, radius: float = 0.7) -> nn.Module:
        """The same with the method that trains with an estimate."""
        return self.stabilized(radius, method="power")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), GroupSort(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3))


def branched() -> nn.Sequential:
    mixed = Concat(AveragedResidual(nn.Sequential(nn.Linear(6, 4), GroupSort(), nn.Linear(4, 6))), nn.Identity())
    return nn.Sequential(nn.Linear(6, 6), mixed, Merge(nn.Linear(12, 3), nn.Linear(12, 3)), nn.Tanh())


ZOO = [
    Animal("mlp", mlp, lambda: torch.randn(5, 6), (1, 1, 1)),
    Animal("branches", branched, lambda: torch.randn(5, 6), (1,) * 5),
    Animal("conv1d", lambda: nn.Conv1d(2, 4, 3, padding=1), lambda: torch.randn(2, 2, 7), (1,)),
    Animal("conv2d", lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), lambda: torch.randn(2, 2, 5, 5), (1,)),
    Animal("conv3d", lambda: nn.Conv3d(2, 3, (2, 1, 2)), lambda: torch.randn(1, 2, 3, 3, 3), (1,)),
    Animal("transposed 1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), lambda: torch.randn(2, 2, 4), (1,)),
    Animal("transposed 2d", lambda: nn.ConvTranspose2d(4, 2, 3, groups=2), lambda: torch.randn(1, 4, 3, 3), (1,)),
    Animal("transposed 3d", lambda: nn.ConvTranspose3d(1, 2, 2), lambda: torch.randn(1, 1, 2, 2, 2), (1,)),
    Animal("embedding", lambda: nn.Embedding(7, 3, padding_idx=0), lambda: torch.tensor([[1, 2, 0], [6, 5, 4]]), (1,)),
    Animal("bilinear", Pair, lambda: torch.randn(5, 4), (1,)),
    Animal("attention", Attend, lambda: torch.randn(2, 3, 4), (3, 1)),
    Animal("cross attention", lambda: Attend(8), lambda: torch.randn(2, 3, 4), (1, 1, 1, 1)),
    Animal("rnn", lambda: Recur(nn.RNN(3, 4, bidirectional=True)), lambda: torch.randn(5, 2, 3), (1,) * 4),
    Animal("lstm", lambda: Recur(nn.LSTM(3, 4, 2)), lambda: torch.randn(5, 2, 3), (4,) * 4),
    Animal("gru", lambda: Recur(nn.GRU(3, 4)), lambda: torch.randn(5, 2, 3), (3,) * 2),
    Animal("rnn cell", lambda: Cell(nn.RNNCell(3, 4)), lambda: torch.randn(2, 3), (1, 1)),
    Animal("lstm cell", lambda: Cell(nn.LSTMCell(3, 4)), lambda: torch.randn(2, 3), (4, 4)),
    Animal("gru cell", lambda: Cell(nn.GRUCell(3, 4)), lambda: torch.randn(2, 3), (3, 3)),
    Animal(
        "transformer", lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        lambda: torch.randn(2, 3, 4), (3, 1, 1, 1),
    ),
]  # fmt: skip
ANIMALS = {animal.name: animal for animal in ZOO}
