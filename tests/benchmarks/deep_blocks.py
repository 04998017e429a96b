"""Deep stacks of residual blocks on scikit-learn's digits: what they learn with a proved constant, and what is left of a gradient.

Run ``python -m tests.benchmarks.deep_blocks [part of a name] [depths] [seeds]`` with ``OMP_NUM_THREADS=1``, for example
``python -m tests.benchmarks.deep_blocks gradient 64,128 0,1,2``. The model is a first layer, the stack and a head; first layer
and head are limited to 1 in the norm of the row. All rows have the same epochs, batches and optimizer. The *proved* constant is
that of the stack; a *violation* is a block above what it promises, looked for after every epoch. *Jacobian* is the mean over the
test images of the largest singular value of the Jacobian of the stack (in the norm of the row: of its operator norm), *smallest*
that of its smallest singular value.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stableopt import nn as stable
from stableopt.linalg import Bound
from tests.nn.training import digits

WIDTH = 64
CHANNELS = 4
ORDER = {"l2": 2, "linf": torch.inf, "l1": 1}


def dense_first() -> nn.Module:
    """Pixels to features."""
    return nn.Linear(64, WIDTH)


def dense_head() -> nn.Module:
    """Features to classes."""
    return nn.Linear(WIDTH, 10)


def conv_first() -> nn.Module:
    """Pixels to channels."""
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, CHANNELS, 3, padding=1))


@dataclass(frozen=True)
class Row:
    """A kind of block.

    Args:
        block: builds one block for a stack of the given depth.
        norm: in which it promises its constant.
        promised: what no block may exceed, whatever its parameters are; infinity for a baseline without a promise.
        lr: of AdamW, tuned for the row.
        first: from 64 pixels to the state.
        head: from the state to 10 classes.
        loss: temperature and offset; margins are smaller in the maximum norm, where a perturbation may move every pixel.
    """

    name: str
    block: Callable[[int], nn.Module]
    norm: Literal["l2", "linf", "l1"] = "l2"
    promised: float = 1.0
    lr: float = 1e-2
    first: Callable[[], nn.Module] = dense_first
    head: Callable[[], nn.Module] = dense_head
    loss: tuple[float, float] = (16.0, 0.4)


GRADIENT = [
    Row("gradient", lambda depth: stable.GradientBlock(WIDTH, depth=depth)),
    Row("gradient, limit a constant", lambda depth: stable.GradientBlock(WIDTH, depth=depth, limit_gradient=False)),
    Row("gradient, rows", lambda depth: stable.GradientBlock(WIDTH, depth=depth, bound="rows")),
    Row("gradient, frobenius", lambda depth: stable.GradientBlock(WIDTH, depth=depth, bound="frobenius")),
    Row(
        "conv gradient",
        lambda depth: stable.ConvGradientBlock(CHANNELS, depth=depth),
        first=conv_first,
        head=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64 * CHANNELS, 10)),
    ),
    Row(
        "conv gradient, rows",
        lambda depth: stable.ConvGradientBlock(CHANNELS, depth=depth, bound="rows"),
        first=conv_first,
        head=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64 * CHANNELS, 10)),
    ),
]


def limited_branch() -> nn.Module:
    """A branch of constant 1: an orthogonal matrix to start from, that stays within the limit, and a sorting activation."""
    return stable.stabilize(nn.Sequential(nn.Linear(WIDTH, WIDTH), stable.GroupSort()), 1.0, init="orthogonal")


AVERAGED = [
    Row("averaged", lambda depth: stable.AveragedResidual(limited_branch(), depth=depth)),
]

FIELDS = [
    Row("maximum norm", lambda depth: stable.InfNormBlock(WIDTH, depth=depth), norm="linf", loss=(64.0, 0.02)),
    Row("dissipative, rate 0.001", lambda depth: stable.DissipativeBlock(WIDTH, rate=1e-3, depth=depth)),
    Row("RK4", lambda depth: stable.RungeKuttaBlock(stable.GradientField(WIDTH), method="rk4", depth=depth)),
]

ROWS: list[Row] = [
    *GRADIENT,
    *FIELDS,
    *AVERAGED,
]
"""The rows of the table; a new kind of block adds one."""


@dataclass
class Result:
    """What one run shows."""

    accuracy: float
    proved: float
    jacobian: float
    smallest: float
    milliseconds: float
    violations: int
    looks: int


def model_of(row: Row, depth: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Return the model and the stack in its middle."""
    stack = nn.Sequential(*[row.block(depth) for _ in range(depth)])
    first, head = (stable.stabilize(layer, 1.0, norm=row.norm) for layer in (row.first(), row.head()))
    return nn.Sequential(first, stack, head), stack


def above(row: Row, stack: nn.Sequential) -> int:
    """The number of blocks whose bound exceeds what they promise."""
    return sum(not stable.lipschitz(block, row.norm).upper <= row.promised for block in stack)


def jacobians(row: Row, stack: nn.Sequential, states: Tensor) -> tuple[float, float]:
    """The mean operator norm and the mean smallest singular value of the Jacobian of the stack."""

    def flat(state: Tensor) -> Tensor:
        return stack(state.unsqueeze(0)).flatten()

    largest, smallest = [], []
    for chunk in states.detach().split(20):
        J = torch.func.vmap(torch.func.jacrev(flat))(chunk).flatten(2).detach()
        largest.append(torch.linalg.matrix_norm(J, ORDER[row.norm]))
        smallest.append(torch.linalg.svdvals(J)[:, -1])
    return float(torch.cat(largest).mean()), float(torch.cat(smallest).mean())


def run(row: Row, depth: int, seed: int = 0, *, epochs: int = 20, points: int | None = None) -> Result:
    """Train one stack in float32.

    Args:
        row: the kind of block.
        depth: number of blocks.
        seed: of weights and batches.
        epochs: passes over the training images.
        points: test images whose Jacobian is taken; None for all.
    """
    torch.manual_seed(seed)
    x, y, x_test, y_test = digits()
    model, stack = model_of(row, depth)
    loss = stable.MarginCrossEntropy(*row.loss)
    opt = torch.optim.AdamW(model.parameters(), lr=row.lr, weight_decay=0.0)
    batches = -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=row.lr, total_steps=epochs * batches)
    violations, looks, seconds = above(row, stack), depth, 0.0
    for _ in range(epochs):
        start = time.perf_counter()
        for batch in torch.randperm(len(x)).split(128):
            opt.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            opt.step()
            schedule.step()
        seconds += time.perf_counter() - start
        violations, looks = violations + above(row, stack), looks + depth
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x_test).argmax(1) == y_test).double().mean())
        proved = Bound.point(1.0)
        for block in stack:
            proved = proved * stable.lipschitz(block, row.norm).upper
        states = model[0](x_test[:points])
    norm, smallest = jacobians(row, stack, states)
    return Result(accuracy, proved.upper, norm, smallest, 1e3 * seconds / (epochs * batches), violations, looks)


def main(part: str = "", depths: str = "64,128", seeds: str = "0") -> None:
    """Print the table."""
    torch.set_default_dtype(torch.float32)
    print("| block | depth | seed | accuracy | proved | Jacobian | smallest | violations | ms per step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        if part.lower() not in row.name.lower():
            continue
        for depth in map(int, depths.split(",")):
            for seed in map(int, seeds.split(",")):
                r = run(row, depth, seed)
                print(
                    f"| {row.name} | {depth} | {seed} | {r.accuracy:.3f} | {r.proved:.6g} | {r.jacobian:.3f} | {r.smallest:.3f} "
                    f"| {r.violations} of {r.looks} | {r.milliseconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
