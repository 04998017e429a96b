"""What a projection on the spectral ball costs, beside clipping by a singular value decomposition, alone and in training.

Run as ``python -m tests.benchmarks.spectral`` with ``OMP_NUM_THREADS=1``; ratios are taken within one run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stableopt.constraints.deflation import project_by_deflation
from stableopt.constraints.reuse import ProvedReference, project_tracked
from stableopt.constraints.spectral import SpectralBall
from tests.benchmarks.timing import device_name, medians, report

N, BATCH, STEPS = 1024, 256, 200


def svd_clip(W: Tensor, radius: float) -> Tensor:
    """The textbook, in the dtype of the matrix; proves nothing."""
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U * sigma.clamp_max(radius)) @ Vh


def with_values_above(count: int) -> Tensor:
    """A matrix with ``count`` singular values from 1.1 to 1.5 and the others evenly from 0.9 to 0."""
    generator = torch.Generator().manual_seed(count)
    U, _, Vh = torch.linalg.svd(torch.randn(N, N, generator=generator, dtype=torch.float64))
    sigma = torch.linspace(0.9, 0.0, N, dtype=torch.float64)
    sigma[:count] = torch.linspace(1.5, 1.1, count, dtype=torch.float64)
    return ((U * sigma) @ Vh).float()


def single_projections() -> None:
    """Print what one projection costs."""
    ball = SpectralBall(1.0)
    for count in (0, 1, 8, 64):
        W = with_values_above(count)
        contenders = {
            "clip by svd, not proved": lambda W=W: svd_clip(W, 1.0),
            "project": lambda W=W: ball.project(W),
        }
        if count:
            contenders["  of it deflation"] = lambda W=W: project_by_deflation(W.double(), 1.0 - 6e-8, W.dtype)
        else:
            contenders["  with a reference"] = proof_from_a_reference(W)
        report(
            f"{N} x {N} float32, {count} singular values exceed the radius, {device_name()}",
            medians(contenders, rounds=5, warm_up=1),
            "clip by svd, not proved",
        )


def proof_from_a_reference(W: Tensor) -> Callable[[], object]:
    """Return what decides about a neighbor of a matrix that was proved."""
    reference, near = ProvedReference(), W + 1e-6 * torch.randn(N, N)
    reference.renew(W, 1.0)
    return lambda: reference.proves(near, 1.0)


@dataclass
class Times:
    """Seconds of every step of a training run."""

    layer: list[float] = field(default_factory=list)
    projection: list[float] = field(default_factory=list)
    svd: list[float] = field(default_factory=list)
    active: int = 0


def train(radius: float, pull: Callable[[int], float], lr: float, *, tracked: bool = True) -> Times:
    """Fit a teacher whose leading direction has a length of its own at each step; project after every step."""
    torch.manual_seed(0)
    layer = nn.Linear(N, N, bias=False)
    with torch.no_grad():
        start = torch.randn(N, N)
        start /= torch.linalg.matrix_norm(start, 2)
        layer.weight.copy_(start)
        u, v = torch.linalg.qr(torch.randn(N, 2))[0].unbind(dim=1)
    ball, optimizer, times = SpectralBall(radius), torch.optim.SGD(layer.parameters(), lr), Times()
    for step in range(STEPS):
        x = torch.randn(BATCH, N)
        y = x @ (start + pull(step) * torch.outer(u, v)).mT + 0.05 * torch.randn(BATCH, N)
        begun = time.perf_counter()
        optimizer.zero_grad()
        (layer(x) - y).square().sum().div(BATCH).backward()
        optimizer.step()
        stepped = time.perf_counter()
        with torch.no_grad():
            reached = layer.weight
            projected = project_tracked(ball, layer.weight, reached) if tracked else ball.project(reached)
            moved = projected is not reached
            if moved:
                layer.weight.copy_(projected)
        ended = time.perf_counter()
        times.layer.append(stepped - begun)
        times.projection.append(ended - stepped)
        times.active += moved
        if step % 50 == 0:
            begun = time.perf_counter()
            svd_clip(reached.detach(), radius)
            times.svd.append(time.perf_counter() - begun)
    return times


def training_runs() -> None:
    """Print what the projection adds to a training run."""
    regimes = {
        "never active": (1.3, lambda _: 0.0, True),
        "rarely active": (1.3, lambda step: 3.15 * math.sin(step / 32), True),  # it reaches the radius once in a period
        "rarely active, no reference": (1.3, lambda step: 3.15 * math.sin(step / 32), False),
        "active at every step, one direction": (1.1, lambda _: 4.0, True),
        "active at every step, the bulk": (0.97, lambda _: 0.0, True),
    }
    for name, (radius, pull, tracked) in regimes.items():
        times = train(radius, pull, 0.005, tracked=tracked)
        layer, svd = statistics.median(times.layer), statistics.median(times.svd)
        mean, median = statistics.fmean(times.projection), statistics.median(times.projection)
        print(
            f"\n{STEPS} steps of a {N} x {N} layer, batch {BATCH}, {name}: active in {times.active} steps\n"
            f"  layer step {1e3 * layer:.1f} ms, clip by svd {1e3 * svd:.0f} ms, projection: median {1e3 * median:.2f} ms, "
            f"mean {1e3 * mean:.2f} ms\n  = {100 * mean / layer:.1f} % of the layer step; "
            f"{svd / mean:.1f} times faster than clipping by svd (median step: {svd / median:.0f})"
        )


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    single_projections()
    training_runs()


if __name__ == "__main__":
    main()
