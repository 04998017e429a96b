"""Following the largest eigenvalue of the Hessian during training: how near, at how many products a step?

Run ``python -m tests.benchmarks.sharpness``, with ``--seeds N``, ``--steps N``, ``--every N`` and ``--only WORD``.

Small nets on the digits that scikit-learn ships, so that the truth is at hand: the Hessian of the probe batch (256 samples), column
by column, scaled by the metric of the optimizer, and all its eigenvalues. A look is taken every ten steps and compared with the
truth at the same parameters; the first fifth of the run is burn-in. Errors are relative. The products are all there are, burn-in
and the reserve of three looks that is there from the start included, without those for the trace. ``cold power`` is the power
iteration from a random direction at each look, as several peers do it; it finds the eigenvalue of the largest modulus. The
differences are there to see what kinks do to them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from stableopt.lyapunov.curvature import CurvatureProbe
from stableopt.optim.preconditioner import Preconditioner

PROBE = 256
BURN_IN = 0.2
GOAL = 0.02


@dataclass(frozen=True)
class Run:
    """A net, its optimizer and the size of the batches, None for all of the probe batch."""

    activation: type[nn.Module]
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    batch: int | None


RUNS = {
    "GD, tanh, lr 0.5": Run(nn.Tanh, lambda p: torch.optim.SGD(p, 0.5), None),
    "SGD, tanh, batch 32": Run(nn.Tanh, lambda p: torch.optim.SGD(p, 0.1), 32),
    "GD, ReLU, lr 0.5": Run(nn.ReLU, lambda p: torch.optim.SGD(p, 0.5), None),
    "AdamW, tanh, batch 64": Run(nn.Tanh, lambda p: torch.optim.AdamW(p, 3e-3), 64),
    "momentum, ReLU, batch 32": Run(nn.ReLU, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), 32),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"relative error, median / 95 % quantile, and products a step; {given.seeds} seeds, {given.steps} steps")
    missed = []
    for name, run in RUNS.items():
        if given.only not in name:
            continue
        errors: dict[str, list[float]] = {}
        products: dict[str, list[float]] = {}
        for seed in range(given.seeds):
            for who, (error, count) in follow(run, seed, given.steps, given.every).items():
                errors.setdefault(who, []).extend(error[int(BURN_IN * len(error)) :])
                products.setdefault(who, []).append(count / given.steps)
        print(f"\n{name}")
        for who, error in errors.items():
            median, high = np.median(np.abs(error)), np.quantile(np.abs(error), 0.95)
            print(f"  {who:<28s} {100 * median:6.2f} % {100 * high:6.1f} %   {np.mean(products[who]):.3f}")
            if who == "probe" and median > GOAL:
                missed.append(name)
    print(f"\nmedian above {100 * GOAL:g} %: {', '.join(missed) or 'none'}")


def follow(run: Run, seed: int, steps: int, every: int) -> dict[str, tuple[list[float], int]]:
    """Train, look, and return the errors and the number of products of each contender."""
    torch.manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16.0 - 0.5, dtype=torch.float32), torch.tensor(digits.target)
    act = run.activation
    model = nn.Sequential(nn.Linear(64, 12), act(), nn.Linear(12, 12), act(), nn.Linear(12, 10))
    parameters = list(model.parameters())
    optimizer = run.optimizer(parameters)

    def loss() -> Tensor:
        return F.cross_entropy(model(x[:PROBE]), y[:PROBE])

    probes = {
        "probe": CurvatureProbe(model, optimizer, loss, traces=0),
        "probe by difference": CurvatureProbe(model, optimizer, loss, traces=0, method="difference"),
    }
    results: dict[str, tuple[list[float], int]] = {}
    for step in range(steps):
        batch = torch.arange(PROBE) if run.batch is None else torch.randint(0, 1024, (run.batch,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if step % every != every - 1:
            continue
        scaled = dense(loss, optimizer)
        truth = float(torch.linalg.eigvalsh(scaled)[-1])
        looks = {}
        for name, probe in probes.items():
            reading = probe.measure()
            looks[name] = reading.edge, reading.products
        for count in (5, 20):
            looks[f"cold power, {count} a look"] = power(scaled, count, step), count
        for name, (value, count) in looks.items():
            before, used = results.get(name, ([], 0))
            results[name] = [*before, 1.0 - value / truth], used + count
    return results


def dense(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    """Return D^{-1/2} H D^{-1/2}."""
    metric = Preconditioner.of(optimizer)
    assert isinstance(metric, Preconditioner)
    grads = torch.autograd.grad(loss(), metric.parameters, create_graph=True)
    g = torch.cat([x.flatten() for x in grads])
    rows = torch.autograd.grad(g, metric.parameters, torch.eye(len(g)), is_grads_batched=True)
    H = torch.cat([x.flatten(1) for x in rows], dim=1).double()
    root = torch.cat([x.flatten() for x in metric.roots]).double()
    return root[:, None] * (H + H.T) / 2.0 * root


def power(matrix: Tensor, count: int, seed: int) -> float:
    """Return the Rayleigh quotient after a power iteration with so many products."""
    v = torch.randn(len(matrix), generator=torch.Generator().manual_seed(seed), dtype=matrix.dtype)
    value = 0.0
    for _ in range(count):
        v /= v.norm()
        image = matrix @ v
        value, v = float(v @ image), image
    return value


if __name__ == "__main__":
    main()
