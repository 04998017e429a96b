"""What a constrained layer costs in training and in evaluation, and how much of its limit it uses, beside the peers.

Run ``python -m tests.benchmarks.layers dense|conv|manifold|evaluation|sizes`` with ``OMP_NUM_THREADS=1``. A training step is
``zero_grad``, the forward map, a mean squared error, the backward pass into weights *and* input, and a step of SGD with momentum;
all contenders of a table run interleaved. The peers (torch's own parametrizations, geotorch, deel-torchlip, orthogonium) are
taken where they are installed. *Largest* and *smallest* are the true singular values of the matrix or of the operator on images
that the layer uses in the next training step, the extreme ones over some more steps.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from stableopt import nn as stable
from stableopt import optim
from tests.benchmarks.timing import device_name, medians

Make = Callable[[], nn.Module]

DEAR = 2000
"""Rows or columns from which on the methods that take seconds are left out."""


def peer(name: str) -> ModuleType | None:
    """Return a peer's module, or None and a line that says so."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{name} is not installed ({error})")
        return None


def limited(method: str, layer: nn.Module) -> nn.Module:
    """Return a layer with one of our weight maps and the limit 1."""
    return stable.stabilize(layer, 1.0, method=method)


def dense(n: int, m: int, few: bool) -> dict[str, Make]:
    """Return the makers of dense layers from n to m features."""
    ours = ("power", "frobenius", "schur", "bro")
    ours += () if few else ("gram", "aol", "cholesky", "cayley", "bjorck")
    ours += () if few or max(n, m) > 1200 else ("expm",)
    found: dict[str, Make] = {"nn.Linear": lambda: nn.Linear(n, m)}
    for method in ours:
        found[f"stabilize, {method}"] = lambda method=method: limited(method, nn.Linear(n, m))
    found["stabilize, rowsum (linf)"] = lambda: stable.stabilize(nn.Linear(n, m), 1.0, norm="linf", method="rowsum")
    if n == m and not few:
        found["SLL"] = lambda: stable.SLL(n)
        found["Sandwich"] = lambda: stable.Sandwich(n, n)
    found["torch spectral_norm"] = lambda: parametrizations.spectral_norm(nn.Linear(n, m))
    if few:
        return found
    for kind in ("cayley",) if max(n, m) > 1200 else ("matrix_exp", "cayley"):
        found[f"torch orthogonal, {kind}"] = lambda kind=kind: parametrizations.orthogonal(
            nn.Linear(n, m), orthogonal_map=kind
        )
    if max(n, m) <= 1200 and (geotorch := peer("geotorch")):

        def by_geotorch() -> nn.Module:
            layer = nn.Linear(n, m)
            geotorch.orthogonal(layer, "weight")
            return layer

        found["geotorch orthogonal"] = by_geotorch
    if torchlip := peer("deel.torchlip"):
        found["torchlip SpectralLinear"] = lambda: torchlip.SpectralLinear(n, m)
    if orthogonium := peer("orthogonium.layers"):
        found["orthogonium OrthoLinear"] = lambda: orthogonium.OrthoLinear(n, m)
    return found


def convolutions(channels: int) -> dict[str, Make]:
    """Return the makers of 3 x 3 convolutions with as many outputs as inputs."""

    def plain(mode: str = "zeros") -> nn.Conv2d:
        return nn.Conv2d(channels, channels, 3, padding=1, padding_mode=mode)

    found: dict[str, Make] = {"nn.Conv2d": plain}
    for method in ("power", "gram", "frobenius", "schur", "aol", "bcop"):
        found[f"stabilize, {method}"] = lambda method=method: limited(method, plain())
    found["stabilize, bcop, circular"] = lambda: limited("bcop", plain("circular"))
    found["stabilize, rowsum (linf)"] = lambda: stable.stabilize(plain(), 1.0, norm="linf", method="rowsum")
    found["torch spectral_norm (of the matrix)"] = lambda: parametrizations.spectral_norm(plain())
    if torchlip := peer("deel.torchlip"):
        found["torchlip SpectralConv2d"] = lambda: torchlip.SpectralConv2d(channels, channels, (3, 3), padding="same")
    if orthogonium := peer("orthogonium.layers"):
        found["orthogonium AdaptiveOrthoConv2d"] = lambda: orthogonium.AdaptiveOrthoConv2d(
            channels, channels, 3, padding="same", padding_mode="circular"
        )
    return found


def step_of(layer: nn.Module, x: Tensor, target: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """Return a function that makes a training step."""

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()

    return step


@torch.no_grad()
def singular_values(layer: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the largest and the smallest singular value of the affine map of a layer on one input like those of x.

    The layer keeps its mode. For images the largest comes from 200 power steps, about 0.1 % below, and the smallest is NaN.
    """
    shape, n = x.shape[1:], x[0].numel()
    if len(shape) == 1:
        matrix = (layer(torch.eye(n)) - layer(torch.zeros(1, n))).double()
        values = torch.linalg.svdvals(matrix)
        return float(values[0]), float(values[-1])
    with torch.enable_grad():  # one graph of the layer, so that no step of an estimate moves it
        zero = torch.zeros(1, *shape, requires_grad=True)
        y = layer(zero)
        dual = torch.zeros_like(y, requires_grad=True)
        (back,) = torch.autograd.grad(
            y, zero, dual, create_graph=True
        )  # linear in dual, so its derivative is the layer
    v = torch.randn(zero.shape, generator=torch.Generator().manual_seed(0))
    size = torch.zeros(())
    for _ in range(200):
        (image,) = torch.autograd.grad(back, dual, v / v.norm(), retain_graph=True)
        size = image.norm()
        (v,) = torch.autograd.grad(y, zero, image, retain_graph=True)
    return float(size), float("nan")


@torch.no_grad()
def enlarged(layer: nn.Module) -> nn.Module:
    """Return the layer with a weight that wants to be three times as large, so that a limit is in force."""
    chain = getattr(layer, "parametrizations", None)
    if chain is not None and "weight" in chain and chain["weight"].is_tensor:
        chain["weight"].original.mul_(3.0)
    return layer


def compare(
    title: str, makers: dict[str, Make], x: Tensor, out: tuple[int, ...], rounds: int, *, look: bool = True
) -> None:
    """Time the training steps of all contenders, and print their singular values."""
    target = torch.randn(len(x), *out)
    x = x.requires_grad_()
    layers: dict[str, nn.Module] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        layers[name] = enlarged(make())
        steps[name] = step_of(layers[name], x, target, torch.optim.SGD(layers[name].parameters(), 0.05, momentum=0.9))
    times = medians(steps, rounds=rounds)
    base = next(iter(times.values()))
    print(f"\n{title}, {device_name()}: training step; largest and smallest singular value in training")
    for name, seconds in times.items():
        line = f"  {name:<38s} {1e3 * seconds:9.2f} ms   x {seconds / base:6.2f}"
        if look and name != next(iter(times)) and "linf" not in name and name not in {"SLL", "Sandwich"}:
            found = []
            for _ in range(10 if x.ndim == 2 and x.shape[1] < DEAR else 3):
                steps[name]()
                found.append(singular_values(layers[name], x.detach()))
            largest, smallest = zip(*found, strict=True)
            line += f"   {min(largest):.4f} - {max(largest):.4f}, smallest {min(smallest):.4f}"
        print(line, flush=True)


class Products(TorchDispatchMode):
    """Counts the multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the multiplications of a product of two matrices."""
        if func.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}:
            self.count += args[-2].numel() * args[-1].shape[-1]
        return func(*args, **(kwargs or {}))


def manifold(n: int, batch: int, rounds: int) -> None:
    """Print what a step on the orthogonal matrices costs beside a plain one, and how many products it makes."""
    x, target = torch.randn(batch, n, requires_grad=True), torch.randn(batch, n)
    layers, forward, step, orthogonal = {}, {}, {}, "on the manifold"
    for name in ("nn.Linear", orthogonal):
        torch.manual_seed(0)
        layer = nn.Linear(n, n)
        if name == orthogonal:
            stable.stabilize(layer, 1.0, by="projection", method="orthogonal", init="orthogonal")
            optimizer: Any = optim.SGD(stable.parameter_groups(layer), lr=0.05, momentum=0.9, guard="off")
        else:
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
        layers[name] = layer
        forward[name] = lambda layer=layer: F.mse_loss(layer(x), target).backward()
        step[name] = step_of(layer, x, target, optimizer)
    passes, whole = medians(forward, rounds), medians(step, rounds)
    with Products() as plain:
        step["nn.Linear"]()
    with Products() as counted:
        step[orthogonal]()
    W = layers[orthogonal].weight.detach().double()
    values = torch.linalg.svdvals(W)
    print(
        f"\northogonal {n} x {n} on the manifold, batch {batch}, {device_name()}: forward and backward x "
        f"{passes[orthogonal] / passes['nn.Linear']:.2f} of a plain layer, whole step x "
        f"{whole[orthogonal] / whole['nn.Linear']:.2f}; "
        f"{(counted.count - plain.count) / n**3:.2f} products of n x n matrices more in the step; "
        f"singular values {values[-1]:.9f} to {values[0]:.9f}"
    )


@contextmanager
def evaluating(layer: nn.Module) -> Iterator[nn.Module]:
    """A layer in evaluation without gradients."""
    with torch.no_grad():
        yield layer.eval()


def evaluation() -> None:
    """Print what a forward map in evaluation costs: in place, where the weight is kept, and exported."""
    for title, plain, x, methods in (
        (
            "dense 1024 x 1024, batch 256",
            lambda: nn.Linear(1024, 1024),
            torch.randn(256, 1024),
            ("power", "gram", "bro"),
        ),
        ("dense 1024 x 1024, batch 1", lambda: nn.Linear(1024, 1024), torch.randn(1, 1024), ("power", "gram", "bro")),
        (
            "convolution 32 -> 32, 3 x 3, 16 x 16 images, batch 32",
            lambda: nn.Conv2d(32, 32, 3, padding=1),
            torch.randn(32, 32, 16, 16),
            ("power", "gram", "bcop"),
        ),
    ):
        layers = {"plain": plain()}
        for method in methods:
            layers[f"{method}, kept"] = limited(method, plain())
            layers[f"{method}, exported"] = stable.export(layers[f"{method}, kept"])

        def run(layer: nn.Module, x: Tensor = x) -> None:
            with evaluating(layer) as calm:
                calm(x)

        times = medians({name: lambda layer=layer: run(layer) for name, layer in layers.items()}, rounds=40)
        found = ", ".join(f"{name} x {seconds / times['plain']:.2f}" for name, seconds in times.items())
        print(f"\nevaluation, {title}, {device_name()}: {found}")


def main() -> None:
    """Run what is named on the command line, else everything."""
    torch.set_num_threads(1)
    kinds = sys.argv[1:] or ["dense", "conv", "manifold", "evaluation", "sizes"]
    if "dense" in kinds:
        n = 1024
        compare(f"dense {n} x {n}, batch 256", dense(n, n, few=False), torch.randn(256, n), (n,), rounds=5)
    if "sizes" in kinds:
        for n, m, batch in (
            (n, m, batch) for n, m in ((256, 256), (1024, 1024), (1024, 4096)) for batch in (256, 2048)
        ):
            makers = dense(n, m, few=True)
            compare(
                f"dense {m} x {n}, batch {batch}", makers, torch.randn(batch, n), (m,), rounds=15 if m < DEAR else 7
            )
    if "conv" in kinds:
        for channels in (32, 64):
            x, shape = torch.randn(32, channels, 16, 16), (channels, 16, 16)
            compare(
                f"convolution {channels} -> {channels}, 3 x 3, batch 32, 16 x 16",
                convolutions(channels),
                x,
                shape,
                rounds=15,
            )
    if "manifold" in kinds:
        for n, batch, rounds in ((256, 256, 30), (256, 2048, 20), (1024, 256, 15), (1024, 2048, 7)):
            manifold(n, batch, rounds)
    if "evaluation" in kinds:
        evaluation()


if __name__ == "__main__":
    main()
