"""How much of its proved constant each block and cell uses: the largest spread that an adversary finds, over the bound.

Run ``python -m tests.benchmarks.block_tightness [part of a name]`` with ``OMP_NUM_THREADS=1``. A row draws a module for each of
three seeds, moves its parameters away from their start, and lets :func:`tests.nn.adversary.worst_ratio` climb. The table has the
largest proved constant, the largest spread found, and the best quotient of the two: 1 says that the bound is attained.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stableopt import nn as stable
from stableopt.linalg import Bound
from tests.nn.adversary import worst_ratio


def by_rule(module: nn.Module, norm: str) -> Bound:
    """The bound of :func:`stableopt.nn.lipschitz`."""
    return stable.lipschitz(module, norm)


@dataclass(frozen=True)
class Row:
    """A module, the shape of one input without the batch, and the norm at input and output.

    Args:
        make: builds the module in float64, with the parameters that are to be measured; see :func:`drawn`.
        settings: of the adversary, where its defaults find too little.
        bound: the proved constant, for what is not bounded by :func:`stableopt.nn.lipschitz` (the gain of a cell over a sequence).
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    norm: str = "l2"
    settings: dict[str, Any] = field(default_factory=dict)
    bound: Callable[[nn.Module, str], Bound] = by_rule


def drawn(module: nn.Module, *, scale: float = 0.5, step: float = 4.0) -> nn.Module:
    """Move the parameters to a random place; those of steps near their limit, where the bound is nearest to being attained."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.rsplit(".", 1)[-1] == "raw_step":
                parameter.fill_(step)
            else:
                parameter.add_(scale * torch.randn_like(parameter))
    return module


GRADIENT = [
    Row("GradientBlock", lambda: drawn(stable.GradientBlock(8, 12)), (8,)),
    Row("GradientBlock, strong", lambda: drawn(stable.GradientBlock(8, 12, strong=0.5)), (8,)),
    Row("GradientBlock, linf", lambda: drawn(stable.GradientBlock(8, 12)), (8,), "linf"),
    Row("GradientBlock, rows", lambda: drawn(stable.GradientBlock(8, 12, bound="rows", strong=0.5)), (8,)),
    Row("ConvGradientBlock", lambda: drawn(stable.ConvGradientBlock(4, 6)), (4, 6, 6)),
    Row("ConvGradientBlock, strong", lambda: drawn(stable.ConvGradientBlock(4, 6, strong=0.5)), (4, 6, 6)),
    Row(
        "ConvGradientBlock, circular",
        lambda: drawn(stable.ConvGradientBlock(4, padding_mode="circular", strong=0.5)),
        (4, 6, 6),
    ),
    Row("ConvGradientBlock, rows", lambda: drawn(stable.ConvGradientBlock(4, 6, bound="rows", strong=0.5)), (4, 6, 6)),
    Row("ConvGradientBlock, linf", lambda: drawn(stable.ConvGradientBlock(4, 6)), (4, 6, 6), "linf"),
]


def over_time(cell: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A cell over time, moved to a random place, with units that are mostly active."""
    layer = drawn(stable.Recurrence(cell(2, 6, memory=4, activation="relu", **options)), scale=0.3, step=0.0)
    nn.init.uniform_(layer.cell.bias, 0.0, 2.0)
    return layer


RECURRENT_CELLS = [
    Row("ContractingCell, 24 steps", lambda: over_time(stable.ContractingCell), (24, 2), "linf"),
    Row("ContractingCell, gain 1, 24 steps", lambda: over_time(stable.ContractingCell, gain=1.0), (24, 2), "linf"),
    Row("LeakyCell, 24 steps", lambda: over_time(stable.LeakyCell), (24, 2)),
    Row("LeakyCell linf, 24 steps", lambda: over_time(stable.LeakyCell, norm="linf"), (24, 2), "linf"),
    Row("DiagonalMetricCell, 24 steps", lambda: over_time(stable.DiagonalMetricCell), (24, 2)),
    Row("AntisymmetricCell, 24 steps", lambda: over_time(stable.AntisymmetricCell), (24, 2)),
]


class Outputs(nn.Module):
    """The output sequence of a recurrent layer of torch, the first of the two things that it returns."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


def stock(kind: Callable[..., nn.Module], *, scale: float = 3.0, **options: Any) -> Outputs:
    """A layer of torch with weights at the limits that keep it contracting."""
    rnn = kind(2, 4, batch_first=True)
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            parameter.mul_(1.0 if name.startswith("bias") else scale)
    return Outputs(stable.contracting(rnn, 0.9, **options))


def of_outputs(module: nn.Module, norm: str) -> Bound:
    """The bound of the layer inside."""
    return stable.lipschitz(module.get_submodule("rnn"), norm)


STOCK_LAYERS = [
    Row("nn.RNN, contracting, 24 steps", lambda: stock(nn.RNN), (24, 2), "l2", {"scale": 0.1}, of_outputs),
    Row("nn.RNN, contracting, 24 steps", lambda: stock(nn.RNN, norm="linf"), (24, 2), "linf", {"scale": 0.1}, of_outputs),
    *[
        Row(f"nn.{kind.__name__}, contracting, 24 steps", functools.partial(stock, kind, input_bound=1.0), (24, 2), norm,
            {"scale": 0.3}, of_outputs)
        for kind in (nn.GRU, nn.LSTM) for norm in ("linf", "token_max", "l2")
    ],
]  # fmt: skip

STATE_SPACES = [
    Row("DiagonalStateSpace, 24 steps", lambda: drawn(stable.DiagonalStateSpace(2, 8)), (24, 2)),
    Row("DiagonalStateSpace, token_max", lambda: drawn(stable.DiagonalStateSpace(2, 8)), (24, 2), "token_max"),
    Row("DiagonalStateSpace, linf", lambda: drawn(stable.DiagonalStateSpace(2, 8)), (24, 2), "linf"),
    Row(
        "DiagonalStateSpace, both directions",
        lambda: drawn(stable.DiagonalStateSpace(2, 8, bidirectional=True)),
        (24, 2),
    ),
    Row("StateSpaceBlock, 24 steps", lambda: drawn(stable.StateSpaceBlock(4, 8)), (24, 4)),
    Row("StateSpaceStack, 3 blocks, gain 5", lambda: drawn(stable.StateSpaceStack(2, 8, 8, 3, 2, gain=5.0)), (24, 2)),
    Row("CappedLinear", lambda: drawn(stable.CappedLinear(8, 6)), (8,)),
]


def mlp(hidden: int = 8) -> nn.Module:
    """A plain branch."""
    return nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 6))


BUDGETED = [
    Row("AveragedResidual", lambda: drawn(stable.AveragedResidual(mlp())), (6,)),
    Row("AveragedResidual", lambda: drawn(stable.AveragedResidual(mlp())), (6,), "linf"),
    Row("AveragedResidual", lambda: drawn(stable.AveragedResidual(mlp())), (3, 6), "token_max"),
    Row("ResidualStack, 4 branches, G = 4", lambda: drawn(stable.ResidualStack([mlp() for _ in range(4)], 4.0)), (6,)),
    Row(
        "ResidualStack, 4 branches, G = 4",
        lambda: drawn(stable.ResidualStack([mlp() for _ in range(4)], 4.0, norm="linf")),
        (6,),
        "linf",
    ),
    Row(
        "CompensatedPair",
        lambda: drawn(stable.CompensatedPair(stable.GradientBlock(6, strong=1.0), mlp())),
        (6,),
    ),
    Row("cfl, averaged", lambda: drawn(stable.cfl(mlp(), "averaged")), (6,)),
    Row("cfl, growth of 2", lambda: drawn(stable.cfl(mlp(), "lipschitz", growth=2.0)), (6,)),
]


def implicit(block: nn.Module, *, step: float = 3.0) -> nn.Module:
    """An implicit or isometric block at a random place, with units that are mostly off: there its bound is nearest."""
    drawn(block, step=step)
    for name, parameter in block.named_parameters():
        if name.rsplit(".", 1)[-1].startswith("bias"):
            nn.init.uniform_(parameter, -2.0, 0.0)
    return block


IMPLICIT = [
    Row("ProximalBlock", lambda: implicit(stable.ProximalBlock(8, 12)), (8,)),
    Row("ProximalBlock, strong", lambda: implicit(stable.ProximalBlock(8, 12, strong=0.5)), (8,)),
    Row(
        "ProximalBlock, 2 steps", lambda: implicit(stable.ProximalBlock(8, 12, solver=stable.ForwardBackward(2))), (8,)
    ),
    Row("ResolventBlock, strong", lambda: implicit(stable.ResolventBlock(8, 12, strong=0.5)), (8,)),
    Row(
        "BackwardEulerBlock, gradient",
        lambda: implicit(stable.BackwardEulerBlock(stable.GradientField(8, 12, strong=0.5))),
        (8,),
    ),
    Row(
        "BackwardEulerBlock, dissipative",
        lambda: implicit(stable.BackwardEulerBlock(stable.DissipativeField(8, 12))),
        (8,),
    ),
]

ISOMETRIC = [
    Row("SkewBlock", lambda: implicit(stable.SkewBlock(8, 0.5)), (8,)),
    Row("SkewEulerBlock", lambda: drawn(stable.SkewEulerBlock(8, 0.5)), (8,)),
    Row("HamiltonianBlock, growth 2", lambda: drawn(stable.HamiltonianBlock(8, 12, activation="relu")), (8,)),
    Row(
        "HamiltonianBlock, growth 2, depth 8",
        lambda: drawn(stable.HamiltonianBlock(8, 12, depth=8, activation="relu")),
        (8,),
    ),
]

TOKENS = [
    Row("ClippedAttention, 1 head", lambda: stable.ClippedAttention(8), (6, 8), "token_max"),
    Row("ClippedAttention, 2 heads", lambda: stable.ClippedAttention(8, 2), (6, 8), "token_max"),
    Row("ClippedAttention, 4 heads", lambda: stable.ClippedAttention(8, 4), (6, 8), "token_max"),
    Row("ClippedAttention, causal", lambda: stable.ClippedAttention(8, 2, causal=True), (6, 8), "token_max"),
    Row("ClippedAttention", lambda: stable.ClippedAttention(8, 2), (6, 8), "l2"),
    Row("TransformerBlock", lambda: drawn(stable.TransformerBlock(8, 2)), (6, 8), "token_max"),
    Row("BoundedNorm", lambda: stable.BoundedNorm(8), (8,)),
    Row("JoinTokens", lambda: stable.JoinTokens(4), (4, 3), "l2"),
]

FIELDS = [
    Row("DissipativeBlock", lambda: drawn(stable.DissipativeBlock(8, 12, rate=0.5)), (8,)),
    Row("DissipativeBlock, no free part", lambda: drawn(stable.DissipativeBlock(8, 12, rate=0.5, free=0.0)), (8,)),
    Row("DissipativeBlock, linf", lambda: drawn(stable.DissipativeBlock(8, 12, rate=0.5)), (8,), "linf"),
    Row("InfNormBlock", lambda: drawn(stable.InfNormBlock(8), scale=0.2), (8,), "linf"),
    Row("InfNormBlock, rate 0.5", lambda: drawn(stable.InfNormBlock(8, rate=0.5), scale=0.2), (8,), "linf"),
    Row("InfNormBlock, 3 x 3", lambda: drawn(stable.InfNormBlock(2, 3), scale=0.2), (2, 5, 5), "linf"),
    Row("InfNormBlock, l2", lambda: drawn(stable.InfNormBlock(8), scale=0.2), (8,)),
    Row("RungeKuttaBlock, Euler x 4", lambda: drawn(stable.RungeKuttaBlock(stable.GradientField(8, 12))), (8,)),
    Row("RungeKuttaBlock, RK4", lambda: drawn(stable.RungeKuttaBlock(stable.GradientField(8, 12), method="rk4")), (8,)),
    Row(
        "RungeKuttaBlock, SSPRK(3,3), dissipative",
        lambda: drawn(stable.RungeKuttaBlock(stable.DissipativeField(8, 12, rate=0.5), method="ssprk33")),
        (8,),
    ),
    Row(
        "ContinuousDepth",
        lambda: drawn(stable.ContinuousDepth(stable.DissipativeField(8, 12, rate=0.5), steps=4)),
        (8,),
    ),
    Row(
        "ContinuousDepth, linf",
        lambda: drawn(stable.ContinuousDepth(stable.InfNormField(8, rate=0.5), steps=4)),
        (8,),
        "linf",
    ),
]

ROWS: list[Row] = [
    *GRADIENT,
    *FIELDS,
    *TOKENS,
    *RECURRENT_CELLS,
    *STOCK_LAYERS,
    *STATE_SPACES,
    *BUDGETED,
    *IMPLICIT,
    *ISOMETRIC,
]
"""The rows of all tables; a new block or cell adds a list."""


def measure(row: Row, seeds: int = 3) -> tuple[float, float, float]:
    """Return the largest proved constant, the largest spread found and the largest quotient of the two."""
    proved, found, quotient = 0.0, 0.0, 0.0
    for seed in range(seeds):
        torch.manual_seed(seed)
        module = row.make().double().eval()
        with torch.no_grad():
            bound = row.bound(module, row.norm)
        best = worst_ratio(module, row.shape, row.norm, **{"starts": 32, "steps": 300, **row.settings})
        if not bound.proved or best > bound.upper * (1 + 1e-9):
            raise AssertionError(f"{row.name}, seed {seed}: found {best} above the bound {bound}.")
        proved, found, quotient = max(proved, bound.upper), max(found, best), max(quotient, best / bound.upper)
    return proved, found, quotient


def main(part: str = "") -> None:
    """Print the table of the rows whose name has ``part`` in it."""
    torch.set_default_dtype(torch.float64)
    print("| block | norm | proved | best found | found / proved |\n|---|---|---|---|---|")
    for row in ROWS:
        if part.lower() in row.name.lower():
            proved, found, quotient = measure(row)
            print(f"| {row.name} | {row.norm} | {proved:.4g} | {found:.4g} | {quotient:.3f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
