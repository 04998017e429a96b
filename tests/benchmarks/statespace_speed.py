"""Time per training step of state-space layers: ours, neural-ssm and S5, forward and backward, in the same run.

Run ``python -m tests.benchmarks.statespace_speed [--rounds 10] [--lengths 64 256 1024] [--batch 32] [--width 64] [--states 64]``
with ``OMP_NUM_THREADS=1``, and ``PYTHONPATH`` set to this directory where neural-ssm and s5-pytorch are installed in another
environment. What is not installed is left out. On the CPU it is processor time, so that other programs disturb less.

All layers map ``width`` to ``width`` features with ``states`` states: complex ones for ours, the LRU and S5, real ones for
``l2n`` and ``tv``, which thus have half of the memory. *proved* says whether the layer limits its l2 gain.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stableopt.nn import DiagonalStateSpace
from tests.benchmarks.timing import device_name, synchronize

Run = Callable[[Tensor], Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = "stableopt DiagonalStateSpace (proved)"
SLOWEST = 5.0
"""Seconds of one step from which on a contender is left out of longer sequences."""


def contenders(width: int, states: int) -> dict[str, tuple[nn.Module, Run]]:
    """Return each layer and how it is called."""
    ours = DiagonalStateSpace(width, states)
    rows: dict[str, tuple[nn.Module, Run]] = {
        BASE: (ours, ours),
        "stableopt, both directions (proved)": ((both := DiagonalStateSpace(width, states, bidirectional=True)), both),
    }
    try:
        from neural_ssm.ssm import LRU, Block2x2DenseL2SSM, RobustMambaDiagSSM
    except ImportError as error:
        print(f"neural-ssm is left out: {error}")
    else:
        lru = LRU(width, width, states)
        l2n, tv = Block2x2DenseL2SSM(states, width, width), RobustMambaDiagSSM(width, states, width)
        twice = Block2x2DenseL2SSM(2 * states, width, width)
        rows[f"neural-ssm l2n, scan, {2 * states} real states (proved)"] = (twice, lambda x: twice(x, mode="scan")[0])
        for mode in ("scan", "conv", "loop"):
            rows[f"neural-ssm LRU, {mode}"] = (lru, lambda x, mode=mode: lru(x, mode=mode)[0])
        for mode in ("scan", "loop"):
            rows[f"neural-ssm l2n, {mode} (proved)"] = (l2n, lambda x, mode=mode: l2n(x, mode=mode)[0])
            rows[f"neural-ssm tv, {mode} (proved)"] = (tv, lambda x, mode=mode: tv(x, mode=mode)[0])
    try:
        from s5 import S5
    except ImportError as error:
        print(f"s5-pytorch is left out: {error}")
    else:
        s5 = S5(width, states)
        rows["s5-pytorch S5"] = (s5, s5)
    gru = nn.GRU(width, width, batch_first=True)
    rows["torch nn.GRU"] = (gru, lambda x: gru(x)[0])
    return {name: (module.to(DEVICE), run) for name, (module, run) in rows.items()}


def one_step(module: nn.Module, run: Run, x: Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    module.zero_grad(set_to_none=True)
    synchronize()
    start = clock()
    run(x).square().sum().backward()
    synchronize()
    return clock() - start


def measure(width: int, states: int, batch: int, length: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of each contender over interleaved rounds."""
    torch.manual_seed(0)
    rows = contenders(width, states)
    x = torch.randn(batch, length, width, device=DEVICE)
    times: dict[str, list[float]] = {}
    for name, (module, run) in list(rows.items()):
        try:
            first = one_step(module, run, x)
        except Exception as error:
            print(f"{name} fails at length {length}: {type(error).__name__}: {str(error)[:120]}")
            del rows[name]
            continue
        if first > SLOWEST:
            times[name] = [first]
            del rows[name]
    for _ in range(rounds):
        for name, (module, run) in rows.items():
            times.setdefault(name, []).append(one_step(module, run, x))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Read the command line and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--states", type=int, default=64)
    options = parser.parse_args()
    print(f"width {options.width}, {options.states} states, batch {options.batch}, float32, {device_name()}")
    columns = {
        length: measure(options.width, options.states, options.batch, length, options.rounds)
        for length in options.lengths
    }
    print("| layer | " + " | ".join(f"ms at {n} | ratio" for n in columns) + " |")
    print("|---|" + "---|---|" * len(columns))
    for name in sorted(
        {name for seconds in columns.values() for name in seconds}, key=lambda name: (name != BASE, name)
    ):
        cells = []
        for seconds in columns.values():
            base = seconds[BASE]
            value = seconds.get(name)
            cells.append("– | –" if value is None else f"{1e3 * value:.1f} | {value / base:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
