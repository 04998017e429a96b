"""Samples of runs that go well and of runs that do not, without a training."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from itertools import starmap

from stableopt.lyapunov.alarms import Alarm, Alarms, Channel, Sample


def descent(steps: int, seed: int = 0, *, noise: float = 0.1, floor: float = 0.1) -> list[float]:
    """Losses that fall from 2 to a floor, with lognormal noise."""
    rng = random.Random(seed)
    return [(2.0 * math.exp(-t / 50) + floor) * math.exp(noise * rng.gauss(0, 1)) for t in range(steps)]


def samples(losses: Iterable[float], *, drop: float = 0.01, displacement: float = 0.1) -> Iterator[Sample]:
    """Samples of steps that lower the energy of their batch by a part of it."""
    return starmap(lambda t, x: whole(t, x, x - drop * abs(x), displacement), enumerate(losses, start=1))


def whole(step: int, loss: float, after: float, displacement: float = 0.1) -> Sample:
    """A sample in which everything is known."""
    verdict = "decreased" if after < loss else "increased" if after > loss else "undecided"
    return Sample(step, loss, after, loss, after, 1e-12, verdict, (), 0.9, displacement, 10.0, (0.1,))


def first(channel: Channel | Alarms, stream: Iterable[Sample]) -> Alarm | None:
    """The first alarm of a stream."""
    for sample in stream:
        alarm = channel.update(sample)
        if isinstance(alarm, Alarm):
            return alarm
        if alarm:
            return alarm[0]
    return None
