"""Interleaved timing: every contender once per round, so that noise of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(contenders: dict[str, Callable[[], object]], rounds: int = 30, warm_up: int = 3) -> dict[str, float]:
    """Return the median seconds of each contender over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for r in range(warm_up + rounds):
        for name, run in contenders.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if r >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(title: str, seconds: dict[str, float], base: str) -> None:
    """Print milliseconds and the ratio to the base contender."""
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:<44s} {1e3 * value:9.3f} ms   x {value / seconds[base]:.2f}")


def device_name() -> str:
    """The name of the device that is measured."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
