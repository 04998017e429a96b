"""Exponents of training beside the packages that say they measure them, on runs whose exponent is known.

Each run is an ordinary torch training. ``stableopt`` profiles it as it runs; arc-training's ``LyapunovMonitor`` looks on at the
same steps, with the learning rate told; deep-lyapunov gets the same training as a function (its automatic way, one call per epoch
of ten steps) and by hand (a checkpoint per epoch). What is not installed is left out.

    python -m tests.benchmarks.profile_peers
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.lyapunov.profile.training import Profile

STEPS, EPOCH = 300, 10


class Point(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, start: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))


@dataclass(frozen=True)
class Run:
    """A training with a known exponent.

    Args:
        name: what it is.
        truth: the exponent, per step.
        start: of the parameters.
        loss: of the parameters and the number of the step.
        optimizer: made for the model.
    """

    name: str
    truth: float
    start: list[float]
    loss: Callable[[Tensor, int], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


def quadratic(*curvatures: float) -> Callable[[Tensor, int], Tensor]:
    """Half a sum of squares."""
    weights = torch.tensor(curvatures, dtype=torch.float64)
    return lambda theta, _: 0.5 * (weights * theta**2).sum()


def noisy(theta: Tensor, step: int) -> Tensor:
    """A quadratic whose curvature is drawn in each step, 0.2 or 2.6."""
    drawn = torch.rand((), generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return 0.5 * (2.6 if drawn < 0.5 else 0.2) * (theta**2).sum()


def chaotic(theta: Tensor, _: int) -> Tensor:
    r"""A loss whose gradient step with rate 1 is the map 4x(1 - x)."""
    return (4.0 / 3.0 * theta**3 - 1.5 * theta**2).sum()


def sgd(lr: float, momentum: float = 0.0) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return what makes torch's SGD."""
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


RUNS = (
    Run("gradient descent, contraction", math.log(0.95), [1.0, 0.7], quadratic(2.0, 1.0), sgd(0.05)),
    Run("gradient descent, beyond the edge", math.log(2.0), [1e-8, 1e-8], quadratic(1.0, 0.5), sgd(3.0)),
    Run("gradient descent, a flat direction", 0.0, [1.0, 0.7], quadratic(1.0, 0.0), sgd(0.1)),
    Run("heavy ball, oscillating", 0.5 * math.log(0.9), [1.0, 0.7], quadratic(1.0, 1.0), sgd(0.1, 0.9)),
    Run("chaotic gradient descent", math.log(2.0), [0.3, 0.41], chaotic, sgd(1.0)),
    Run("random curvature", 0.5 * (math.log(0.9) + math.log(0.3)), [1.0, 0.7], noisy, sgd(0.5)),
)


def steps_of(run: Run, model: Point, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    """Take some steps."""
    for step in range(first, first + count):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = run.loss(model.theta, step)
            loss.backward()
            return loss

        optimizer.step(closure)


def ours(run: Run) -> str:
    """Return what stableopt says."""
    model = Point(run.start)
    optimizer = run.optimizer(model)
    with Profile(model, optimizer, directions=1, cadence=1) as profile:
        steps_of(run, model, optimizer, 0, STEPS)
    reading = profile.result()
    leading = reading.exponents[0]
    interval = f"[{leading.lower:+.4f}, {leading.upper:+.4f}]" if leading.known else "no interval"
    return f"{leading.value:+.4f} {interval}, {reading.verdict.kind}"


def arc(run: Run) -> str:
    """Return what arc-training says."""
    from arc.signals.lyapunov import LyapunovMonitor  # pyright: ignore[reportMissingImports]

    model = Point(run.start)
    optimizer, monitor = run.optimizer(model), LyapunovMonitor()
    state: Any = None
    for step in range(STEPS):
        steps_of(run, model, optimizer, step, 1)
        try:
            state = monitor.update(model, lr=optimizer.param_groups[0]["lr"])
        except (ValueError, ArithmeticError) as error:
            return f"{type(error).__name__} at step {step} ({error})"
    return f"{state.exponent:+.4f}, {state.phase.value}"


def deep(run: Run, *, automatic: bool) -> str:
    """Return what deep-lyapunov says, per step: its figure is the logarithm of a ratio per checkpoint."""
    from deep_lyapunov import StabilityAnalyzer  # pyright: ignore[reportMissingImports]

    logging.disable(logging.CRITICAL)
    model, taken = Point(run.start), 0

    def train(trained: Point, _loader: Any = None, epochs: int = 1) -> dict[str, float]:
        optimizer = run.optimizer(trained)
        for _ in range(epochs):
            steps_of(run, trained, optimizer, taken, EPOCH)
        return {"loss": 0.0}

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            analyzer = StabilityAnalyzer(model, verbose=False, device="cpu")
            if automatic:
                data = torch.utils.data.TensorDataset(torch.zeros(1, 1))
                result = analyzer.analyze(train, torch.utils.data.DataLoader(data), n_epochs=STEPS // EPOCH)
            else:
                analyzer.start_recording()
                for _ in range(STEPS // EPOCH):
                    train(model)
                    taken += EPOCH
                    analyzer.record_checkpoint()
                result = analyzer.compute_metrics()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:50]}"
        finally:
            logging.disable(logging.NOTSET)
    return f"{result.lyapunov / EPOCH:+.4f}, {result.behavior}"


def main() -> None:
    """Print the table."""
    contenders: dict[str, Callable[[Run], str]] = {"stableopt, 95 % interval, verdict": ours}
    if importlib.util.find_spec("arc"):
        contenders["arc-training"] = arc
    if importlib.util.find_spec("deep_lyapunov"):
        contenders["deep-lyapunov, automatic"] = lambda run: deep(run, automatic=True)
        contenders["deep-lyapunov, by hand"] = lambda run: deep(run, automatic=False)
    print(f"| run, {STEPS} steps | exponent | " + " | ".join(contenders) + " |")
    print("|---" * (2 + len(contenders)) + "|")
    for run in RUNS:
        print(f"| {run.name} | {run.truth:+.4f} | " + " | ".join(say(run) for say in contenders.values()) + " |")


if __name__ == "__main__":
    main()
