"""What a reading of the layers costs, in units of a forward and backward pass of the same batch.

An MLP (256-512-512-10, batch 128), a small convolutional net with batch normalization (batch 32) and a transformer of two layers
(batch 32, 32 tokens), on one thread, timed by the time of the thread, interleaved.

    python -m tests.benchmarks.layer_readings [--rounds 30]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.lyapunov.layers import LayerProbe, NormEstimator
from stableopt.lyapunov.layers.trunk import find_trunk
from tests.benchmarks.timing import device_name, synchronize

Loss = Callable[[], Tensor]


class Transformer(nn.Module):
    """Two encoder layers, 64 wide, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.tokens, self.layers, self.head = nn.Embedding(64, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(x)))


def cases(device: str) -> Iterator[tuple[str, nn.Module, Loss]]:
    """Iterate over models with a loss each."""
    mlp = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).to(device)
    x, y = torch.randn(128, 256, device=device), torch.randint(10, (128,), device=device)
    yield "MLP", mlp, lambda: F.cross_entropy(mlp(x), y)
    cnn = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
    ).to(device)  # fmt: skip
    images, labels = torch.randn(32, 3, 32, 32, device=device), torch.randint(10, (32,), device=device)
    yield "CNN", cnn, lambda: F.cross_entropy(cnn(images), labels)
    transformer = Transformer().to(device)
    tokens, following = (torch.randint(64, (32, 32), device=device) for _ in range(2))
    yield "transformer", transformer, lambda: F.cross_entropy(transformer(tokens).flatten(0, 1), following.flatten())


def gradient(model: nn.Module, loss: Loss) -> Callable[[], None]:
    """Return the forward and backward pass."""

    def run() -> None:
        model.zero_grad()
        loss().backward()

    return run


def no_grad(loss: Loss) -> Callable[[], None]:
    """Return the forward pass alone."""

    def run() -> None:
        with torch.no_grad():
            loss()

    return run


def seconds(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each, of the thread on a CPU, else of the clock."""
    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for r in range(rounds + 3):
        for name, run in contenders.items():
            synchronize()
            began = clock()
            run()
            synchronize()
            if r >= 3:
                times[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(device_name())
    for name, model, loss in cases(device):
        probe, twin = LayerProbe(model, loss), LayerProbe(model, loss)
        twin._growth.how = "difference"
        reading = probe.measure()
        found = seconds(
            {
                "fb": gradient(model, loss),
                "forward": no_grad(loss),
                "norms": NormEstimator(model).measure,
                f"reading ({reading.how})": probe.measure,
                "reading (difference)": twin.measure,
                "layers (once)": lambda model=model, loss=loss: find_trunk(model, loss),
            },
            rounds,
        )
        print(f"\n{name}: fb {1e3 * found['fb']:.2f} ms, {len(reading.norms)} norms")
        for key, value in found.items():
            print(f"  {key:<24s} {value / found['fb']:.3f} fb")


if __name__ == "__main__":
    main()
