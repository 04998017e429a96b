"""What a step costs: torch's optimizers, ours without a guard and with a prox, and whole training steps under the guard.

Every table is one run of interleaved rounds on one thread. The floor of a guarded step is one forward pass without gradients more
than torch's training step; it is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stableopt as so
from stableopt.constraints import L1, Regularizer
from tests.benchmarks.timing import device_name, report, synchronize

SHAPES = {"19 tensors": [(725, 725)] * 19, "909 tensors": [(105, 105)] * 909}
OPTIONS = {"SGD": {"lr": 1e-5, "momentum": 0.9}, "AdamW": {"lr": 1e-5}}


def parameters(shapes: list[tuple[int, int]], device: str) -> list[nn.Parameter]:
    """Parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator).to(device)
    return params


def plain_steps(device: str, rounds: int) -> None:
    """10 million parameters, gradients at hand: the step alone."""
    for title, shapes in SHAPES.items():
        for name, options in OPTIONS.items():

            def made(
                ours: bool, name: str = name, options: dict = options, shapes: list = shapes, **more: object
            ) -> Callable[[], object]:
                cls = getattr(so.optim if ours else torch.optim, name)
                return cls(parameters(shapes, device), **options, **more).step

            prox: dict[str, Regularizer] = {"prox": L1(1e-3)}
            contenders = {
                "torch, default": made(False),
                "torch, foreach": made(False, foreach=True),
                "torch, fused": made(False, fused=True),
                "ours, guard off, fused": made(True, guard="off", fused=True),
                "ours, guard off, foreach": made(True, guard="off", foreach=True),
                "ours, guard off, fused, L1": made(True, guard="off", fused=True, **prox),
            }
            if name == "SGD" and len(shapes) < 100:  # a compiler takes minutes for a thousand tensors
                warm = made(True, guard="off", **prox)
                warm()
                contenders["ours, guard off, L1, compiled"] = torch.compile(warm)
            seconds = means(contenders, rounds, 1)
            report(f"{name}, 10M parameters in {title}, {device_name()}", seconds, "torch, default")
            print(f"    guard off / torch, fused: {seconds['ours, guard off, fused'] / seconds['torch, fused']:.3f}")
            print(
                f"    guard off / torch, foreach: {seconds['ours, guard off, foreach'] / seconds['torch, foreach']:.3f}"
            )
            print(
                f"    with L1 / torch, default: {seconds['ours, guard off, fused, L1'] / seconds['torch, default']:.3f}"
            )


class Attention(nn.Module):
    """A small transformer over 16 tokens of width 64."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.embed, self.blocks, self.head = nn.Linear(16, 64), nn.TransformerEncoder(layer, 3), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        return self.head(self.blocks(self.embed(x)).mean(1))


def problems(batch: int) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """A dense network, a convolutional one, a transformer, and the shapes of their batches."""
    mlp = lambda: nn.Sequential(nn.Linear(256, 700), nn.ReLU(), nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 10))  # noqa: E731
    cnn = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return {
        "MLP, 0.68M": (mlp, (batch, 256)),
        "CNN, 0.06M": (cnn, (batch // 4, 3, 32, 32)),
        "transformer, 0.15M": (Attention, (batch, 16, 16)),
    }


def training_step(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    device: str,
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return one training step, and the forward pass alone."""
    torch.manual_seed(0)
    model = build().to(device)
    optimizer = make(list(model.parameters()))
    x, y = torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    @torch.no_grad()
    def forward() -> Tensor:
        return F.cross_entropy(model(x), y)

    return lambda: optimizer.step(closure), forward


def clock() -> float:
    """Seconds of this thread on a CPU, where other processes may be at work; of the wall on a device."""
    return time.perf_counter() if torch.cuda.is_available() else time.thread_time()


def means(contenders: dict[str, Callable[[], object]], rounds: int, steps: int = 10) -> dict[str, float]:
    """Return the median over interleaved rounds of the mean over consecutive steps: a check every tenth step is in each of them."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for r in range(rounds + 1):
        for name, run in contenders.items():
            synchronize()
            start = clock()
            for _ in range(steps):
                run()
            synchronize()
            if r:
                times[name].append((clock() - start) / steps)
    return {name: statistics.median(values) for name, values in times.items()}


def training_steps(device: str, rounds: int, batch: int) -> None:
    """Whole training steps under the guard, beside their floor."""
    for title, (build, shape) in problems(batch).items():
        for name, options in OPTIONS.items():

            def ours(
                p: list[nn.Parameter], name: str = name, options: dict = options, **more: object
            ) -> torch.optim.Optimizer:
                return getattr(so.optim, name)(p, fused=True, **options, **more)

            plain, forward = training_step(
                build,
                shape,
                lambda p, name=name, options=options: getattr(torch.optim, name)(p, fused=True, **options),
                device,
            )
            contenders = {"torch": plain, "forward pass": forward}
            for label, more in (
                ("guard off", {"guard": "off"}),
                ("backtrack, every=1", {"guard": "backtrack"}),
                ("backtrack, every=10", {"guard": "backtrack", "every": 10}),
            ):
                contenders[label] = training_step(
                    build, shape, lambda p, more=more, ours=ours: ours(p, **more), device
                )[0]
            seconds = means(contenders, rounds)
            report(f"{name}, {title}, batch {shape[0]}, {device_name()}", seconds, "torch")
            floor = 1 + seconds["forward pass"] / seconds["torch"]
            once = seconds["backtrack, every=1"] / seconds["torch"]
            print(f"    floor {floor:.3f}; every=1 is {once / floor:.3f} of the floor")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--only", choices=("plain", "training"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="enable_nested_tensor")
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.only != "training":
        plain_steps(device, arguments.rounds)
    if arguments.only != "plain":
        training_steps(device, arguments.rounds, arguments.batch)


if __name__ == "__main__":
    main()
