"""Small trainings for the suite of alarms: data, nets, optimizers, schedules, and faults that begin at a step.

The sets share no seed, no order of the data, no width and no learning rate; each has data that the one before does not have, and
those held out have schedules and dropouts that the first one does not have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import stableopt as so

FAULTS = ("x10", "x30", "x100", "nan batch", "labels")
"""What may happen to a run that goes well so far: factors on the learning rate, one batch of NaN, labels drawn at random."""
STARTS = ("exploding init", "tiny eps")
"""What may be wrong with a run from its first step."""
STEPS, AFTER = 300, 45
"""Steps of a run, and after a fault."""


@dataclass(frozen=True)
class Setting:
    """One training."""

    data: str
    net: str
    optimizer: str
    width: int
    lr: float
    schedule: str
    dropout: float
    accumulation: int
    warm: bool
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        extras = f"{self.schedule}-d{self.dropout:g}-a{self.accumulation}{'-warm' if self.warm else ''}"
        return f"{self.data}-{self.net}-{self.optimizer}-w{self.width}-lr{self.lr:g}-{extras}-s{self.seed}".replace(
            " ", "_"
        )


@dataclass(frozen=True)
class Choice:
    """What the settings of a set are made of."""

    seeds: tuple[int, ...]
    widths: tuple[int, ...]
    vectors: tuple[str, ...]
    sequences: tuple[str, ...]
    schedules: tuple[str, ...]
    dropouts: tuple[float, ...]
    rates: dict[str, tuple[float, ...]]


SETS = {
    "design": Choice(
        seeds=(0, 1, 2),
        widths=(32, 64),
        vectors=("digits", "breast cancer"),
        sequences=("majority", "rows"),
        schedules=("constant", "warm-up", "cosine", "warm-up and cosine"),
        dropouts=(0.0, 0.0, 0.2),
        rates={
            "sgd": (0.1, 0.2),
            "momentum": (0.02, 0.05),
            "adamw": (1e-3, 3e-3),
            "muon": (0.005, 0.02),
            "torch muon": (0.005, 0.02),
            "guarded": (1e-3, 3e-3),
        },
    ),
    "heldout 1": Choice(
        seeds=(1000, 1001, 1002),
        widths=(24, 48, 80),
        vectors=("digits", "diabetes"),
        sequences=("periodic", "columns"),
        schedules=("constant", "warm-up", "cosine", "warm-up and cosine", "restarts"),
        dropouts=(0.0, 0.1, 0.0, 0.3),
        rates={
            "sgd": (0.07, 0.15),
            "momentum": (0.015, 0.03),
            "adamw": (7e-4, 2e-3),
            "muon": (0.01, 0.03),
            "torch muon": (0.01, 0.03),
            "guarded": (7e-4, 2e-3),
        },
    ),
    "heldout 2": Choice(
        seeds=(2000, 2001, 2002),
        widths=(28, 44, 72),
        vectors=("wine", "digits"),
        sequences=("echo", "columns"),
        schedules=("constant", "linear", "restarts", "warm-up and cosine", "warm-up"),
        dropouts=(0.0, 0.15, 0.0, 0.25),
        rates={
            "sgd": (0.08, 0.25),
            "momentum": (0.012, 0.04),
            "adamw": (8e-4, 4e-3),
            "muon": (0.008, 0.025),
            "torch muon": (0.008, 0.025),
            "guarded": (8e-4, 4e-3),
        },
    ),
}
_NETS = ("mlp", "cnn", "residual", "gru", "transformer")
_OPTIMIZERS = ("sgd", "momentum", "adamw", "muon")


def settings(which: str) -> Iterator[Setting]:
    """Yield the trainings of a set: every net with every optimizer, rate and seed, the rest in turn."""
    choice, turn = SETS[which], itertools.count()
    combinations = [
        (net, optimizer) for net in _NETS for optimizer in _OPTIMIZERS if (net, optimizer) != ("cnn", "muon")
    ]
    combinations += [("mlp", "torch muon"), ("mlp", "guarded"), ("residual", "guarded")]
    for seed, (net, optimizer) in itertools.product(choice.seeds, combinations):
        for rate in choice.rates[optimizer]:
            i = next(turn)
            data = (
                ("digits",) if net == "cnn" else choice.sequences if net in {"gru", "transformer"} else choice.vectors
            )
            yield Setting(
                data=data[(i // 2 + i // 46) % len(data)],
                net=net,
                optimizer=optimizer,
                width=choice.widths[i % len(choice.widths)]
                // (4 if net == "cnn" else 2 if net == "transformer" else 1),
                lr=rate,
                schedule=choice.schedules[(i // 2) % len(choice.schedules)],
                dropout=choice.dropouts[i % len(choice.dropouts)],
                accumulation=(1, 1, 1, 2, 1)[i % 5],
                warm=i % 11 == 10,
                seed=seed,
            )


@lru_cache
def table(name: str) -> tuple[Tensor, Tensor, int]:
    """Return inputs, targets, and the number of classes, 0 for a regression."""
    generator = torch.Generator().manual_seed(5)
    if name in {"majority", "periodic", "echo"}:
        return {"majority": _majority, "periodic": _periodic, "echo": _echo}[name](generator)
    load = {"breast cancer": load_breast_cancer, "diabetes": load_diabetes, "wine": load_wine}.get(name, load_digits)
    found = cast("Any", load())
    x = torch.tensor(found.data, dtype=torch.float32)
    if name in {"digits", "rows", "columns"}:
        x = (x - x.mean()) / x.std()
        image = x.view(-1, 8, 8)
        x = {"digits": x, "rows": image, "columns": image.transpose(1, 2).contiguous()}[name]
        return x, torch.tensor(found.target), 10
    x = (x - x.mean(0)) / x.std(0)
    if name == "diabetes":
        y = torch.tensor(found.target, dtype=torch.float32)
        return x, ((y - y.mean()) / y.std()).unsqueeze(1), 0
    return x, torch.tensor(found.target), len(found.target_names)


def _majority(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Return sequences of 9 of 4 symbols, one-hot, and the symbol that most of them are drawn from."""
    y = torch.randint(4, (4000,), generator=generator)
    noise = torch.randint(4, (4000, 9), generator=generator)
    kept = torch.rand(4000, 9, generator=generator) < 0.6
    return F.one_hot(torch.where(kept, y.unsqueeze(1), noise), 4).float(), y, 4


def _periodic(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Return noisy sequences of 12 steps whose period is 2 to 6, and the period."""
    y = torch.randint(5, (4000,), generator=generator)
    phase = 0.8 * torch.rand(4000, 1, generator=generator)
    time = torch.arange(12.0)
    wave = torch.sin(6.283 * time / (y.unsqueeze(1) + 2.0) + phase)
    noise = 0.2 * torch.randn(4000, 12, generator=generator)
    return torch.stack([wave + noise, torch.ones_like(wave)], -1), y, 5


def _echo(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Return sequences of 7 of 5 symbols, one-hot, and the first one of each."""
    symbols = torch.randint(5, (4000, 7), generator=generator)
    return F.one_hot(symbols, 5).float(), symbols[:, 0], 5


class Recurrent(nn.Module):
    """A GRU with a linear layer on its last state."""

    def __init__(self, inputs: int, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.gru, self.drop, self.out = (
            nn.GRU(inputs, width, batch_first=True),
            nn.Dropout(dropout),
            nn.Linear(width, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.gru(x)[0][:, -1]))


class Transformer(nn.Module):
    """Two blocks with attention, layer norms first, and a mean over the positions."""

    def __init__(self, inputs: int, width: int, outputs: int, dropout: float, length: int) -> None:
        super().__init__()
        self.enter, self.place = nn.Linear(inputs, width), nn.Parameter(0.02 * torch.randn(length, width))
        block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.blocks(self.enter(x) + self.place)).mean(1))


class Residual(nn.Module):
    """x + a small net of x."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def network(setting: Setting) -> nn.Module:
    """Make the net of a training."""
    x, _, classes = table(setting.data)
    n, p, outputs = setting.width, setting.dropout, max(classes, 1)
    if setting.net == "gru":
        return Recurrent(x.shape[-1], n, outputs, p)
    if setting.net == "transformer":
        return Transformer(x.shape[-1], n, outputs, p, x.shape[1])
    if setting.net == "residual":
        return nn.Sequential(nn.Linear(x.shape[-1], n), *(Residual(n, p) for _ in range(2)), nn.Linear(n, outputs))
    if setting.net == "cnn":
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, n, 3, padding=1, bias=False),
            nn.BatchNorm2d(n),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(n, n, 3, padding=1, bias=False),
            nn.BatchNorm2d(n),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(p),
            nn.Linear(16 * n, outputs),
        )
    bias = setting.optimizer != "torch muon"  # it takes matrices only
    return nn.Sequential(
        nn.Linear(x.shape[-1], n, bias=bias),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(n, n, bias=bias),
        nn.ReLU(),
        nn.Linear(n, outputs, bias=bias),
    )


def optimizers(setting: Setting, model: nn.Module, *, eps: float = 1e-8) -> list[Optimizer]:
    """Make the optimizer that is watched, and after it the one for what is no matrix, where there is one."""
    lr, parameters = setting.lr, list(model.parameters())
    if setting.optimizer == "sgd":
        return [torch.optim.SGD(parameters, lr=lr)]
    if setting.optimizer == "momentum":
        return [torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)]
    if setting.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, lr=lr, eps=eps)]
    if setting.optimizer == "guarded":
        return [so.optim.AdamW(parameters, lr=lr, eps=eps)]
    if setting.optimizer == "torch muon":
        return [torch.optim.Muon(parameters, lr=lr)]
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    watched = so.optim.Muon(matrices, lr=lr, guard="off")
    return [watched, *([torch.optim.AdamW(others, lr=0.1 * lr)] if others else [])]


def rate(setting: Setting, t: int) -> float:
    """Return the factor of the schedule on the learning rate at step t, counted from 0."""
    if setting.schedule == "linear":
        return 1.0 - t / STEPS
    if setting.schedule == "restarts":
        return 0.5 + 0.5 * math.cos(math.pi * (t % 100) / 100)
    factor = min(1.0, (t + 1) / 40) if "warm-up" in setting.schedule else 1.0
    return factor * (0.5 + 0.5 * math.cos(math.pi * t / STEPS) if "cosine" in setting.schedule else 1.0)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy, or the mean of the squared residuals."""
    return F.mse_loss(model(x), y) if y.is_floating_point() else F.cross_entropy(model(x), y)


def pretrained(setting: Setting, model: nn.Module) -> None:
    """Train a net for a while, before anyone looks."""
    optimizer, generator = (
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        torch.Generator().manual_seed(setting.seed + 99),
    )
    x, y, _ = table(setting.data)
    for _ in range(400):
        index = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        loss_of(model, x[index], y[index]).backward()
        optimizer.step()


def accuracy(setting: Setting, model: nn.Module) -> float:
    """Return the accuracy on all data, or for a regression one minus the fraction of unexplained variance."""
    x, y, classes = table(setting.data)
    model.eval()
    with torch.no_grad():
        z = model(x)
    model.train()
    return float((z.argmax(1) == y).float().mean()) if classes else 1.0 - float(F.mse_loss(z, y) / y.var())
