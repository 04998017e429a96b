"""How often the weights of exported layers exceed their limit, as stored: ours and the peers'.

Run ``python -m tests.benchmarks.exported [N]`` with N drawn layers for each method and dtype (default 200). Each layer makes some
training steps with a large learning rate, is cast and exported, and its norm is proved from the numbers of the plain layer. The
peers are judged by a *lower* bound of the norm, so an excess is one: the largest singular value of the matrix, of a convolution
that of the operator on images of 8 pixels per axis.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stableopt import nn as stable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE_ONLY = {"bro", "cholesky", "cayley", "expm", "bjorck"}


def dense(rng: torch.Generator) -> nn.Linear:
    """Draw a dense layer."""
    n, m = (int(x) for x in torch.randint(1, 80, (2,), generator=rng))
    return nn.Linear(n, m, bias=False)


def convolution(rng: torch.Generator) -> nn.Conv2d:
    """Draw a convolution."""
    draw: Callable[[int, int], int] = lambda a, b: int(torch.randint(a, b, (), generator=rng))  # noqa: E731 short
    groups, kernel = draw(1, 3), draw(1, 4)
    mode = ("zeros", "circular")[draw(0, 2)]
    return nn.Conv2d(
        groups * draw(1, 6), groups * draw(2, 6), kernel, stride=draw(1, 3), padding=kernel // 2, padding_mode=mode, groups=groups,
        dilation=draw(1, 3), bias=False,
    )  # fmt: skip


def train(layer: nn.Module, rng: torch.Generator, steps: int = 3) -> nn.Module:
    """Make some steps that are too large."""
    opt = torch.optim.SGD(layer.parameters(), lr=2.0)
    inputs = getattr(layer, "in_features", None)
    shape = (16, inputs) if inputs else (4, layer.in_channels, 8, 8)
    for _ in range(steps):
        opt.zero_grad()
        (layer(torch.randn(shape, generator=rng)) - 1.0).square().mean().backward()
        opt.step()
    return layer.eval()


@torch.no_grad()
def witness(layer: nn.Module, dtype: torch.dtype) -> float:
    """Bound the norm of a peer's stored weight from below; infinite for one that has diverged."""
    weight: Tensor = layer.weight.to(dtype).double()
    if not weight.isfinite().all():
        return float("inf")
    return float(torch.linalg.matrix_norm(weight, 2))


def drawn(
    method: str, make: Callable[[torch.Generator], nn.Module], dtype: torch.dtype, n: int
) -> tuple[int, int, float]:
    """Count the layers, those whose proved norm exceeds the limit, and find the largest norm."""
    rng = torch.Generator().manual_seed(0)
    norm = "l2" if "l2" in stable.METHODS[method].norms else "linf"
    count, exceeding, largest = 0, 0, 0.0
    while count < n:
        torch.manual_seed(count)
        layer = make(rng)
        try:
            stable.stabilize(layer, 1.0, method=method, norm=norm)  # pyright: ignore[reportArgumentType]
        except ValueError:  # a kernel of one channel has no orthogonal factors
            continue
        plain = stable.export(train(layer, rng).to(dtype))
        value = stable.lipschitz(plain, norm).upper
        count, exceeding, largest = count + 1, exceeding + (value > 1.0), max(largest, value)
    return count, exceeding, largest


def peers() -> dict[str, Callable[[nn.Linear], nn.Module]]:
    """Return the makers of the peers' dense layers."""
    found: dict[str, Callable[[nn.Linear], nn.Module]] = {
        "torch spectral_norm": parametrizations.spectral_norm,
        "torch orthogonal": parametrizations.orthogonal,
    }
    for name, kind in (("deel.torchlip", "SpectralLinear"), ("orthogonium.layers", "OrthoLinear")):
        try:
            made = getattr(importlib.import_module(name), kind)
        except ImportError as error:
            print(f"{name} is not installed ({error})")
            continue
        found[kind] = lambda layer, made=made: made(layer.in_features, layer.out_features, bias=False)
    return found


def main() -> None:
    """Print the counts."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for method in stable.METHODS:
        for kind, make in (("dense", dense), ("conv", convolution)):
            if method in ({"bcop"} if kind == "dense" else DENSE_ONLY):
                continue
            found = [drawn(method, make, dtype, n) for dtype in DTYPES]
            counts = ", ".join(f"{e} of {c} (largest 1 {v - 1:+.1e})" for c, e, v in found)
            print(f"  {method + ' ' + kind:<18s} fp32, bf16, fp16 above the limit: {counts}", flush=True)
    for name, make in peers().items():
        line = []
        for dtype in DTYPES:
            rng, values = torch.Generator().manual_seed(0), []
            for seed in range(n):
                torch.manual_seed(seed)
                values.append(witness(train(make(dense(rng)), rng), dtype))
            line.append(f"{sum(v > 1.0 for v in values)} of {n} (largest 1 {max(values) - 1:+.1e})")
        print(f"  {name:<18s} fp32, bf16, fp16 above the limit: {', '.join(line)}", flush=True)


if __name__ == "__main__":
    main()
