"""What the forward and the mixed block of the profile cost, in units of one forward and backward pass of the same model.

Run ``OMP_NUM_THREADS=1 python -m tests.benchmarks.profile_forward``. The unit is the loss and its backward pass into all weights,
in float32; all contenders run interleaved, and the numbers are medians. *Counted* is what the passes add up to where a backward
pass does the work of two forward ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stableopt.lyapunov.profile.representations.forward import forward_profile, growth_along
from stableopt.lyapunov.profile.representations.mixed import representation_tangents
from stableopt.lyapunov.profile.representations.survey import chain_of
from tests.benchmarks.timing import device_name, medians


def models() -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Yield the name, the model, a batch and its labels."""
    mlp = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    yield "MLP 256-512-512-10, batch 128", mlp, torch.randn(128, 256), torch.randint(10, (128,))
    cnn = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2048, 10),
    )  # fmt: skip
    yield "CNN 2 convolutions + linear (26 k), batch 32", cnn, torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    deep = nn.Sequential(*[part for _ in range(12) for part in (nn.Linear(64, 64), nn.Tanh())])
    yield "MLP 12 layers of 64, batch 32", deep, torch.randn(32, 64), torch.randint(64, (32,))


def measure(name: str, model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> None:
    """Print the table of one model."""
    layers = growth_along(model, x).names[1:]
    chain = chain_of(model, x, one_by_one=False)
    d = {k: [torch.randn(k, *p.shape) for p in model.parameters()] for k in (1, 8)}

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    contenders = {
        "forward and backward": step,
        "growth_along, layers known": lambda: growth_along(model, x, layers=layers),
        "growth_along": lambda: growth_along(model, x),
        "representation_tangents, 1": lambda: representation_tangents(model, x, d[1]),
        "representation_tangents, 1, chain known": lambda: representation_tangents(model, x, d[1], chain=chain),
        "representation_tangents, 8, chain known": lambda: representation_tangents(model, x, d[8], chain=chain),
    }
    seconds = medians(contenders, rounds)
    unit = seconds["forward and backward"]
    print(f"\n{name}: one forward and backward pass takes {1e3 * unit:.2f} ms, {device_name()}")
    print(f"  {'':<44s} {'measured':>9s} {'counted':>9s}  result")
    counted = {name: run().cost for name, run in contenders.items() if "," in name}
    for key, value in seconds.items():
        print(f"  {key:<44s} {value / unit:9.2f} {counted.get(key, float('nan')):9.2f}")
    for title, exact in (("forward_profile, derivatives", True), ("forward_profile, estimate, 8 steps", False)):
        if exact and max(x[0].numel(), 1) > 512:
            continue
        result = forward_profile(model, x, exact=exact, iterations=8)
        run = medians({title: lambda exact=exact: forward_profile(model, x, exact=exact, iterations=8)}, 1, 0)
        print(f"  {title:<44s} {run[title] / unit:9.1f} {result.cost:9.1f}  {result}")


if __name__ == "__main__":
    torch.manual_seed(0)
    for entry in models():
        measure(*entry, rounds=30)
