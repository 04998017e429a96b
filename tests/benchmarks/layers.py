"""What a constrained layer costs in training, beside a plain layer and torch's own parametrizations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations

import stableopt as so
from tests.benchmarks.timing import device_name, medians, report


def passes(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs the layer forward and backward."""

    def run() -> None:
        layer.zero_grad()
        layer(x).square().sum().backward()

    return run


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for n in (128, 512, 1024):
        x = torch.randn(256, n, device=device)
        contenders = {
            "nn.Linear": nn.Linear(n, n),
            "stabilize (differentiable upper bound)": so.stabilize(nn.Sequential(nn.Linear(n, n))),
            "torch spectral_norm (estimate, 1 step)": parametrizations.spectral_norm(nn.Linear(n, n)),
            "torch orthogonal (matrix exponential)": parametrizations.orthogonal(nn.Linear(n, n)),
        }
        report(
            f"dense {n} x {n}, batch 256, forward and backward, {device_name()}",
            medians({name: passes(layer.to(device), x) for name, layer in contenders.items()}, rounds=10),
            "nn.Linear",
        )
    x = torch.randn(32, 32, 16, 16, device=device)
    contenders = {
        "nn.Conv2d": nn.Conv2d(32, 32, 3, padding=1),
        "stabilize (operator norm)": so.stabilize(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))),
        "torch spectral_norm (norm of the reshaped kernel)": parametrizations.spectral_norm(
            nn.Conv2d(32, 32, 3, padding=1)
        ),
    }
    report(
        f"convolution 32 -> 32, 3 x 3, 16 x 16 images, batch 32, {device_name()}",
        medians({name: passes(layer.to(device), x) for name, layer in contenders.items()}, rounds=10),
        "nn.Conv2d",
    )


if __name__ == "__main__":
    main()
