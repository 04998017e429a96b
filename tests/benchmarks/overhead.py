"""What the monitor costs: the same training with and without it, interleaved, with a null control.

Three models on one thread: an MLP (399 thousand parameters, batch 128), a small convolutional net with batch normalization (batch
32), a transformer of two layers (batch 16, 32 tokens). Each contender trains a model of its own on the same batches; in each round
every contender does one block of steps, in an order that changes from round to round, timed by the time of the thread. The null
control is a second training without a monitor: what differs from 1 there is noise.

Where cockpit-for-pytorch 1.0.2 is installed (with backpack-for-pytorch 1.7.1 and setuptools < 81), its economy set, tracked at
every step and at every 10th, trains in the same rounds.

    python -m tests.benchmarks.overhead [--rounds 25] [--steps 40] [--only mlp]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stableopt as so
from stableopt.lyapunov import Every, Monitor
from tests.benchmarks.timing import device_name, synchronize

NEVER = dict.fromkeys(("vitals", "energy", "sharpness", "layers", "forward", "gaps"))


class Transformer(nn.Module):
    """Two layers, 64 wide, on 32 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


def mlp() -> nn.Module:
    """399 thousand parameters."""
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def cnn() -> nn.Module:
    """Two convolutions with batch normalization."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (128, 256)),
    "cnn": (cnn, (32, 3, 32, 32)),
    "transformer": (Transformer, (16, 32, 64)),
}
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "none again (null control)": None,
    "tier 0, every step": {"every": Every(**{**NEVER, "vitals": 1}), "max_overhead": None},
    "tier 0, every 10 steps": {"every": Every(**{**NEVER, "vitals": 10}), "max_overhead": None},
    "tiers 0 and 1, every step": {"every": Every(**{**NEVER, "vitals": 1, "energy": 1}), "max_overhead": None},
    "default": {},
}


def training(name: str, optimizer: str, monitor: dict[str, Any] | None) -> Callable[[int], Monitor | None]:
    """Return what does some steps of a training, and its monitor."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make()
    batches = [(torch.randn(shape), torch.randint(10, shape[:1])) for _ in range(8)]
    opt: Any = {
        "torch AdamW": lambda: torch.optim.AdamW(model.parameters(), 1e-3),
        "torch SGD": lambda: torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9),
        "ours AdamW": lambda: so.optim.AdamW(model.parameters(), 1e-3),
    }[optimizer]()
    watching = None if monitor is None else Monitor(model, opt, **monitor).attach()

    def run(steps: int) -> Monitor | None:
        for step in range(steps):
            x, y = batches[step % 8]

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            opt.step(closure)
        return watching

    return run


def cockpit(name: str, every: int) -> Callable[[int], None] | None:
    """Return what does some steps of a training with SGD under Cockpit's economy set; None where that does not run."""
    try:
        from backpack import extend
        from cockpit import Cockpit
        from cockpit.utils.configuration import configuration
        from cockpit.utils.schedules import linear
    except ImportError:
        return None
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, mean, each = extend(make()), extend(nn.CrossEntropyLoss()), extend(nn.CrossEntropyLoss(reduction="none"))
    batches = [(torch.randn(shape), torch.randint(10, shape[:1])) for _ in range(8)]
    opt = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    instruments = Cockpit(model.parameters(), quantities=configuration("economy", track_schedule=linear(every)))
    count = 0

    def run(steps: int) -> None:
        nonlocal count
        for step in range(steps):
            x, y = batches[step % 8]
            opt.zero_grad()
            loss = mean(model(x), y)
            info = {"batch_size": len(y), "individual_losses": each(model(x), y), "loss": loss, "optimizer": opt}
            with instruments(count, info=info):
                loss.backward(create_graph=instruments.create_graph(count))
            opt.step()
            count += 1

    try:
        with warnings.catch_warnings(action="ignore"):
            run(2)
    except Exception as error:  # what it does not support is no failure of the benchmark
        print(f"  Cockpit does not run on {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return None
    return run


def measure(name: str, optimizer: str, rounds: int, steps: int, warm: int) -> None:
    """Print the ratio of each contender to the training without a monitor: median and quartiles over the rounds."""
    runs: dict[str, Any] = {title: training(name, optimizer, made) for title, made in CONTENDERS.items()}
    cockpits: list[Any] = []
    if optimizer == "torch SGD":
        for every in (1, 10):
            if (run := cockpit(name, every)) is not None:
                runs[f"Cockpit economy, every {every}"] = run
                cockpits.append(run)
    for run in runs.values():
        run(warm if run not in cockpits else 5)  # the default plans its intervals
    ratios: dict[str, list[float]] = {title: [] for title in runs}
    seconds: list[float] = []
    for _ in range(rounds):
        took: dict[str, float] = {}
        for title in random.sample(list(runs), len(runs)):
            synchronize()
            start = time.thread_time()
            runs[title](steps)
            synchronize()
            took[title] = time.thread_time() - start
        seconds.append(took["none"] / steps)
        for title, value in took.items():
            ratios[title].append(value / took["none"])
    print(f"\n{name}, {optimizer}: {1e3 * statistics.median(seconds):.2f} ms a step")
    for title, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        watching = runs[title](0)
        own = "" if watching is None else f"   measured by itself {100 * watching.overhead:5.1f} %"
        print(f"  {title:<28s} x {middle:.3f} [{low:.3f}, {high:.3f}]{own}")


def main() -> None:
    """Measure all models."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm", type=int, default=400)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    print(device_name(), f"torch {torch.__version__}")
    for name in MODELS:
        for optimizer in ("torch AdamW", "torch SGD", "ours AdamW"):
            if given.only in f"{name} {optimizer}":
                measure(name, optimizer, given.rounds, given.steps, given.warm)


if __name__ == "__main__":
    main()
