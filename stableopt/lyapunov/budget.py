r"""When to look: intervals that keep the cost of the monitor within a share of the time of the run.

Each tier i costs :math:`c_i` seconds when it looks. With interval :math:`n_i` and :math:`\bar s` seconds per step of the run
itself the overhead is :math:`\sum_i c_i / (n_i \bar s)`. Tiers that fit at their own intervals keep them; what is left is
divided among the others in proportion to their weights.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import median

import torch

from stableopt.optim.agree import Processes

__all__ = ["TIERS", "Every", "Schedule", "intervals"]

TIERS = ("vitals", "energy", "sharpness", "layers", "forward", "gaps")
WEIGHTS = {"vitals": 3.0, "energy": 4.0, "sharpness": 2.0, "layers": 1.0, "forward": 1.0, "gaps": 1.0}
"""How the budget is divided where it does not suffice for all."""

_PLANS = (8, 16, 32, 64)
_PLAN_EVERY = 128
"""Steps after which intervals are planned anew."""

GRACE = 0.5
"""Seconds that the monitor may take, the first look of each tier aside, before it plans: short runs are watched step by step."""

LEAST = 0.2
"""The part of the budget that looks have in any case, also where the hooks alone take it all or there is much to make up for."""

PAUSE = 10.0
"""What takes longer than so many steps between two steps is a pause or an evaluation, and counts as so many."""


@dataclass(frozen=True)
class Every:
    """The intervals at which the tiers look, in steps; None for never.

    Args:
        vitals: norms of gradients and weights, update-to-weight ratios, slope, what is not finite.
        energy: the energy before and after the step on the same batch, trust ratio, batch sharpness; needs a closure.
        sharpness: curvature by products with the Hessian: sharpness against the limit, trace, noise scale; needs ``probe`` or a
            closure.
        layers: operator norms against limits, and the CFL use of blocks that follows from them.
        forward: the growth of a perturbation along the data, layer by layer, kinks, blocks that are measured at the data; needs
            ``probe`` or a closure.
        gaps: proofs of how far weights that are trained with an estimate are from their limits; free for all other models.

    Raises:
        ValueError: if an interval is no integer >= 1.

    Examples:
        >>> Every(energy=10).energy, Every.of(3).vitals, Every.of(30).layers
        (10, 3, 30)
    """

    vitals: int | None = 1
    energy: int | None = 1
    sharpness: int | None = 100
    layers: int | None = 10
    forward: int | None = 100
    gaps: int | None = 100

    def __post_init__(self) -> None:
        """Check each interval."""
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"Every needs {item.name} as an integer >= 1 or None, got {value!r}.")

    @classmethod
    def of(cls, every: int | Every) -> Every:
        """Return the intervals; of a number, those that look at most so often.

        Args:
            every: the intervals, or one number for vitals and energy, which the others do not go below.

        Raises:
            ValueError: if it is neither.

        Examples:
            >>> Every.of(200) == Every(vitals=200, energy=200, sharpness=200, layers=200, forward=200, gaps=200)
            True
        """
        if isinstance(every, Every):
            return every
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"Monitor needs every as an integer >= 1 or an Every, got {every!r}.")
        default = cls()
        return cls(every, every, *(max(every, getattr(default, name) or every) for name in TIERS[2:]))


def intervals(costs: Mapping[str, float], base: Mapping[str, int], budget: float) -> dict[str, int]:
    """Return the interval of each tier.

    Args:
        costs: tier -> seconds of one look.
        base: tier -> smallest interval.
        budget: seconds per step that all tiers together may take.

    Returns:
        Intervals with ``sum(costs / intervals) <= budget``, none below its base; infinite costs or no budget give 2^30.

    Examples:
        >>> intervals({"vitals": 1.0, "energy": 8.0}, {"vitals": 1, "energy": 1}, budget=3.0)
        {'vitals': 1, 'energy': 4}
        >>> intervals({"vitals": 1.0, "energy": 8.0}, {"vitals": 1, "energy": 1}, budget=9.0)
        {'vitals': 1, 'energy': 1}
    """
    left, waiting, plan = budget, sorted(costs), dict[str, int]()
    while waiting:
        total = sum(WEIGHTS[name] for name in waiting)
        fitting = [name for name in waiting if costs[name] / base[name] <= left * WEIGHTS[name] / total]
        if not fitting:
            break
        for name in fitting:
            plan[name] = base[name]
            left -= costs[name] / base[name]
        waiting = [name for name in waiting if name not in fitting]
    total = sum(WEIGHTS[name] for name in waiting)
    for name in waiting:
        share = left * WEIGHTS[name] / total
        steps = costs[name] / share if share > 0 else math.inf
        plan[name] = max(base[name], min(2**30, math.ceil(min(steps, 2.0**30))))
    return {name: plan[name] for name in costs}


class Schedule:
    """Which tiers look at a step; measures what they cost, and spaces them out where that is too much.

    Args:
        every: the smallest intervals.
        limit: the largest overhead, seconds of the monitor over seconds of the run; None for no limit and no clock: then the steps
            at which tiers look depend on nothing but the step.
        processes: those that must look at the same steps.

    Note:
        Plans are made after 8, 16, 32, 64 and then each 128 steps, from the median cost of the last looks and of the last steps; a
        run that is over its limit so far gets less. Until the monitor has taken :data:`GRACE` seconds every tier looks at its own
        interval.

    Examples:
        >>> schedule = Schedule(Every(vitals=2, energy=None), None)
        >>> for step in (1, 2, 3):
        ...     due = schedule.due(step)
        ...     schedule.stepped(step, due)
        ...     sorted(due)
        ['forward', 'gaps', 'layers', 'sharpness', 'vitals']
        []
        ['vitals']
    """

    def __init__(self, every: Every, limit: float | None, processes: Processes | None = None) -> None:
        self.base: dict[str, int] = {name: value for name in TIERS if (value := getattr(every, name)) is not None}
        self.limit, self._processes = limit, processes
        self.interval = dict(self.base)
        self.next = dict.fromkeys(self.base, 1)
        self.seconds, self.run_seconds = 0.0, 0.0
        self._pause, self._first, self._count = math.inf, 0.0, 0
        self._costs: dict[str, deque[float]] = {name: deque(maxlen=5) for name in self.base}
        self._steps: deque[float] = deque(maxlen=32)
        self._hooks: deque[float] = deque(maxlen=32)  # what a step costs at which nothing is looked at
        self._beside: deque[float] = deque(maxlen=32)  # what looks cost beside their tiers: the same, and a little more

    @property
    def overhead(self) -> float:
        """Seconds of the monitor over seconds of the run, so far; NaN without a limit.

        Examples:
            >>> Schedule(Every(), None).overhead
            nan
        """
        return self.seconds / self.run_seconds if self.limit is not None and self.run_seconds > 0 else math.nan

    def due(self, step: int) -> frozenset[str]:
        """Return the tiers that look at a step.

        Args:
            step: counted from 1.

        Examples:
            >>> sorted(Schedule(Every(sharpness=None, layers=None, forward=None, gaps=None), None).due(1))
            ['energy', 'vitals']
        """
        return frozenset(name for name, at in self.next.items() if step >= at)

    def stepped(
        self,
        step: int,
        due: frozenset[str],
        *,
        run: float = 0.0,
        monitor: float = 0.0,
        costs: Mapping[str, float] | None = None,
    ) -> None:
        """Note that a step has been taken and the time of it, and plan anew if it is time.

        Args:
            step: counted from 1.
            due: the tiers that have looked.
            run: seconds since the end of the step before, without the monitor.
            monitor: seconds of the monitor in this step.
            costs: tier -> the part of them that its look took.

        Examples:
            >>> schedule = Schedule(Every(energy=None, sharpness=None, layers=None, forward=None, gaps=None), 0.1)
            >>> for step in range(1, 9):
            ...     schedule.stepped(step, frozenset({"vitals"}), run=1.0, monitor=1.0, costs={"vitals": 1.0})
            >>> schedule.interval  # 10 would do from here on, but it is to make up for the beginning as well
            {'vitals': 40}
        """
        for name in due:
            interval = self.interval[name]
            # without a clock the looks stay on the grid 1, 1 + n, 1 + 2n, ... also where a run goes on in its middle
            self.next[name] = step + interval if self.limit is not None else step + interval - (step - 1) % interval
        self.seconds += monitor
        self.run_seconds += min(run, self._pause)
        if self.limit is None:
            return
        self._steps.append(run)
        (self._beside if due else self._hooks).append(monitor - sum((costs or {}).values()))
        for name, seconds in (costs or {}).items():
            if name in self._costs:
                self._first += 0.0 if self._costs[name] else seconds
                self._costs[name].append(seconds)
        self._count += 1
        if self._count in _PLANS or self._count % _PLAN_EVERY == 0:
            self._plan(step)

    def _plan(self, step: int) -> None:
        assert self.limit is not None  # noqa: S101 - the caller has looked
        self._pause = PAUSE * median(self._steps)
        alone = self._processes is None or self._processes.size == 1
        spent = self.seconds - self._first
        if alone and spent < GRACE:
            return
        most = self.limit * median(self._steps)
        budget = most - (median(self._hooks) if self._hooks else min(self._beside, default=0.0))
        if spent > self.limit * self.run_seconds:
            budget *= max(0.25, self.limit * self.run_seconds / spent)
        budget = max(budget, LEAST * most)
        costs = {name: _typical(seen) for name, seen in self._costs.items() if seen}
        plan = intervals(costs, {name: self.base[name] for name in costs}, budget)
        if not alone:
            plan = self._agreed(dict(self.interval) if spent < GRACE else plan)
        for name, interval in plan.items():
            last = self.next[name] - self.interval[name]
            self.interval[name] = interval
            self.next[name] = max(step + 1, last + interval)

    def _agreed(self, plan: dict[str, int]) -> dict[str, int]:
        """Return the mean of the plans of all processes, the same on each; those that have no cost yet keep their interval."""
        assert self._processes is not None  # noqa: S101 - the caller has looked
        mine = [float(plan.get(name, self.interval[name])) for name in self.base]
        total = self._processes.total(torch.tensor(mine, dtype=torch.float64)).tolist()
        return {name: math.ceil(value / self._processes.size) for name, value in zip(self.base, total, strict=True)}

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Return the intervals and the next looks.

        Examples:
            >>> sorted(Schedule(Every(), None).state_dict())
            ['interval', 'next']
        """
        return {"interval": dict(self.interval), "next": dict(self.next)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from a state; tiers that it does not know begin at once.

        Examples:
            >>> schedule = Schedule(Every(), None)
            >>> schedule.load_state_dict(schedule.state_dict())
        """
        for name in self.base:
            self.interval[name] = max(self.base[name], state["interval"].get(name, self.base[name]))
            self.next[name] = state["next"].get(name, 1)


def _typical(seen: deque[float]) -> float:
    """Return what a look costs: the first one prepares what later ones use, and says little."""
    return seen[0] / 4.0 if len(seen) == 1 else median(list(seen)[1:])
