"""Certified accuracy: the same net, loss, optimizer, epochs and choice of learning rates, only the layers differ.

Run ``python -m tests.benchmarks.certified digits``, ``… mnist FILE`` or ``… patches FILE``, with FILE an archive with MNIST as
``stableopt train --data`` takes it. The peers (deel-torchlip, orthogonium) are taken where they are installed.

Every contender is judged alike: its layers are read off as plain matrices, their norms are proved from these numbers
(a layer that exceeds its limit of 1 pays for it), and the head counts with the exact constant of each pair of classes.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from stableopt import nn as stable
from stableopt.cli.data import Dataset, load_data
from stableopt.linalg import Bound, spectral_norm
from stableopt.nn.heads import UnitRowLinear, margin_constants, margin_radii
from stableopt.nn.pooling import InvertibleDownsampling
from tests.benchmarks.timing import device_name

Body = Callable[[int, int], nn.Module]
"""Makes a dense layer from the numbers of inputs and outputs."""

WIDTH = 256
HIDDEN = 3


def peer(name: str) -> ModuleType | None:
    """Return a peer's module, or None and a line that says so."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{name} is not installed ({error})")
        return None


def limited(method: Any) -> Body:
    """Return a maker of plain layers with one of our weight maps; without bias at the start, as the peers' have it."""

    def make(n: int, m: int) -> nn.Module:
        layer = nn.Linear(n, m)
        nn.init.zeros_(layer.bias)
        return stable.stabilize(layer, 1.0, method=method, init="orthogonal")

    return make


def contenders() -> dict[str, tuple[Body, Body, Callable[[], nn.Module]]]:
    """Return for each contender its hidden layer, its head and its activation."""
    ours = {"cholesky": "cholesky", "bro": "bro", "bjorck 12": functools.partial(stable.METHODS["bjorck"], steps=12)}
    found = {f"ours, {name}": (limited(m), UnitRowLinear, stable.GroupSort) for name, m in ours.items()}
    if torchlip := peer("deel.torchlip"):
        found["torchlip SpectralLinear"] = (torchlip.SpectralLinear, torchlip.FrobeniusLinear, torchlip.GroupSort2)
    if orthogonium := peer("orthogonium.layers"):
        found["orthogonium OrthoLinear"] = (orthogonium.OrthoLinear, orthogonium.UnitNormLinear, stable.GroupSort)
    return found


def network(body: Body, head: Body, activation: Callable[[], nn.Module], inputs: int, classes: int) -> nn.Sequential:
    """Make the net: dense hidden layers with a sorting activation, and the head."""
    layers: list[nn.Module] = [nn.Flatten()]
    for n in (inputs, *[WIDTH] * (HIDDEN - 1)):
        layers += [body(n, WIDTH), activation()]
    return nn.Sequential(*layers, head(WIDTH, classes))


@torch.no_grad()
def plain(layer: nn.Module, inputs: int) -> Tensor:
    """Read the matrix off a dense layer, in evaluation."""
    basis = torch.eye(inputs)
    return (layer(basis) - layer(torch.zeros(1, inputs))).T.contiguous()


class Saturated(nn.Module):
    r"""Bounded margin loss :math:`(1 - p^q) / q`: what cannot be won any more has no pull (Zhang and Sabuncu, 2018).

    :math:`p` is the softmax of the label with its logit lowered by the offset, times the temperature; q = 0 is the cross entropy.
    """

    def __init__(self, temperature: float, offset: float, q: float) -> None:
        super().__init__()
        self.margin, self.q = stable.MarginCrossEntropy(temperature, offset), q

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        if not self.q:
            return self.margin(z, y)
        lowered = z - self.margin.offset * nn.functional.one_hot(y, z.shape[1])
        p = (self.margin.temperature * lowered).softmax(1).gather(1, y[:, None])
        return ((1.0 - p.clamp_min(1e-7) ** self.q) / self.q).mean()


def train(
    model: nn.Module, data: Dataset, *, epochs: int, temperature: float, offset: float, lr: float, batch: int, seed: int,
    late: float = 0.0,
) -> float:  # fmt: skip
    """Train with Adam, one cycle of the learning rate; return the seconds of the processor.

    After 60 % of the epochs the loss is bounded, with the exponent ``late``.
    """
    torch.manual_seed(seed)
    early, saturated = Saturated(temperature, offset, 0.0), Saturated(temperature, offset, late)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    x, y = data.x_train, data.y_train
    steps = epochs * (len(x) // batch)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start = time.process_time()
    model.train()
    for epoch in range(epochs):
        criterion = early if epoch < 0.6 * epochs else saturated
        for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            optimizer.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()
            cycle.step()
    model.eval()
    return time.process_time() - start


@torch.no_grad()
def certified(model: nn.Sequential, L: Bound, K: Tensor, data: Dataset, radii: tuple[float, ...]) -> list[float]:
    """Return the accuracy, and the certified accuracy at each radius."""
    x, y = data.x_test, data.y_test
    z = torch.cat([model(part) for part in x.split(1000)])
    r = margin_radii(z, K, L, y)
    correct = z.argmax(1) == y
    return [float(correct.double().mean())] + [float((r > radius).double().mean()) for radius in radii]


RATES = (3e-3, 6e-3, 1.2e-2)
"""Each contender gets the learning rate with which it certifies most of the *training* data at the middle radius."""


def compare(data: Dataset, radii: tuple[float, ...], seeds: int, **settings: float) -> None:
    """Train every contender on the same data and print what is certified."""
    inputs, classes = math.prod(data.shape), data.classes
    print(
        f"\n{data.name}: {inputs} -> {HIDDEN} x {WIDTH} -> {classes}, {settings}, mean of {seeds} seeds; {device_name()}"
    )
    print(f"  {'':<26s} {'accuracy':>9s}" + "".join(f"  eps {r:<5g}" for r in radii) + "   norm of the body   seconds")
    seen = replace(data, x_test=data.x_train[:10_000], y_test=data.y_train[:10_000])
    middle = radii[len(radii) // 2 : len(radii) // 2 + 1]
    for name, (body, head, activation) in contenders().items():
        found: dict[float, list[tuple[float, list[float], float, float]]] = {lr: [] for lr in RATES}
        for lr in RATES:
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = network(body, head, activation, inputs, classes)
                seconds = train(model, data, seed=seed, lr=lr, **settings)  # pyright: ignore[reportArgumentType]
                L, n = Bound(1.0, 1.0), inputs
                for layer in model[1:-1:2]:
                    W = plain(layer, n)
                    L, n = L * spectral_norm(W), len(W)
                K = margin_constants(plain(model[-1], n))
                score = certified(model, L, K, seen, middle)[1]
                found[lr].append((score, certified(model, L, K, data, radii), L.upper, seconds))
        lr = max(RATES, key=lambda rate: sum(run[0] for run in found[rate]))
        runs = found[lr]
        means = [100 * sum(column) / seeds for column in zip(*(run[1] for run in runs), strict=True)]
        line = "".join(f"  {v:9.2f}" for v in means)
        norm, seconds = max(run[2] for run in runs), sum(run[3] for run in runs) / seeds
        print(f"  {name:<26s}{line}   {norm:16.6f}   {seconds:7.1f}   lr {lr:g}", flush=True)


def patch_net(classes: int) -> nn.Sequential:
    """Make a small convolutional net for images of 28 by 28 pixels in which every layer but the head is an isometry."""
    body: list[nn.Module] = [InvertibleDownsampling(4)]
    for _ in range(3):
        body += [nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), stable.GroupSort()]
    body += [nn.Flatten(), nn.Linear(784, 512), stable.GroupSort(), nn.Linear(512, 512), stable.GroupSort()]
    model = nn.Sequential(*body)
    stable.stabilize(model, 1.0, method={"linear": "cholesky", "conv": "bcop"}, init="orthogonal")
    return model.append(UnitRowLinear(512, classes))


def reach(data: Dataset, radii: tuple[float, ...], epochs: int, *settings_of_loss: float) -> None:
    """Train the convolutional net for one radius, prove its layers, and print what is certified."""
    data = data.as_images()
    torch.manual_seed(0)
    model = patch_net(data.classes)
    names = ("temperature", "offset", "lr", "late")
    settings = {"epochs": epochs, "batch": 512, **dict(zip(names, settings_of_loss, strict=True))}
    seconds = train(model, data, seed=0, **settings)  # pyright: ignore[reportArgumentType]
    plain_model = stable.export(model)
    L = stable.lipschitz(plain_model[:-1])
    head: UnitRowLinear = plain_model[-1]  # pyright: ignore[reportAssignmentType]
    values = certified(plain_model, L, margin_constants(head.unit_weight().detach()), data, radii)
    print(f"\n{data.name}, convolutional net, {settings}: {seconds:.0f} s of the processor, body proved {L.upper:.7f}")
    reached = ", ".join(f"at {r:g}: {100 * v:.2f}" for r, v in zip(radii, values[1:], strict=True))
    print(f"  accuracy {100 * values[0]:.2f}, {reached}")


def main() -> None:
    """Run what is named on the command line."""
    torch.set_num_threads(1)
    kind = sys.argv[1] if len(sys.argv) > 1 else "digits"
    if kind == "digits":
        compare(load_data("digits"), (0.1, 0.25, 0.5), 2, epochs=40, temperature=8.0, offset=1.0, batch=64)
    elif kind == "mnist":
        compare(load_data(sys.argv[2]), (0.1, 0.3, 1.58), 1, epochs=3, temperature=8.0, offset=2.0, batch=256)
    elif kind == "patches":
        epochs, *settings = (float(word) for word in sys.argv[3:8])
        reach(load_data(sys.argv[2]), (0.1, 0.3, 1.0, 1.58), int(epochs), *settings)
    else:
        raise SystemExit(f"digits, mnist FILE or patches FILE EPOCHS TEMPERATURE OFFSET LR LATE, got {kind!r}.")


if __name__ == "__main__":
    main()
