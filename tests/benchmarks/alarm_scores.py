"""Feed the streams of the suite of alarms to the detectors, and count what they found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stableopt.lyapunov.alarms import Alarms, Sample
from stableopt.optim import verdict_of
from tests.benchmarks.alarm_runs import FAULTS, STARTS, STEPS, Setting, settings
from tests.benchmarks.alarm_streams import load

QUICK, SLOW = 5, 40
"""Within how many steps an alarm is to come."""
GOOD_RATIO, GOOD_ACCURACY = 0.6, 0.9
"""A run is good if the mean of its last losses is this part of that of its first ones; a warm one if it keeps its accuracy."""
WORSE = 0.1
"""A run has got worse if it has lost this part of its descent, compared with the healthy run on the same batches."""


def samples(rows: np.ndarray) -> Iterator[Sample]:
    """Yield the samples of a stream."""
    for t, row in enumerate(rows.tolist(), start=1):
        loss, after, before, energy, tolerance, trust, displacement, weights, lr, _, bad = row
        names = tuple(n for bit, n in ((1, "loss"), (2, "grad:all"), (4, "param:all")) if int(bad) & bit)
        verdict = verdict_of(before, energy, tolerance)
        yield Sample(t, loss, after, before, energy, tolerance, verdict, names, trust, displacement, weights, (lr,))


def found(rows: np.ndarray) -> list[tuple[int, str]]:
    """Return the step, counted from 0, and the channel of each alarm of a stream."""
    alarms = Alarms()
    return [(sample.step - 1, alarm.channel) for sample in samples(rows) for alarm in alarms.update(sample)]


def good(setting: Setting, rows: np.ndarray, facts: dict[str, Any]) -> bool:
    """Whether a run without a fault went well, judged from its first and last losses and its accuracy alone."""
    loss = rows[:, 0]
    if not np.isfinite(rows[:, 0]).all():
        return False
    if setting.warm:
        return facts["end"] >= min(GOOD_ACCURACY, facts["start"]) and loss[-40:].mean() <= 1.1 * loss[:40].mean()
    return bool(loss[-40:].mean() < GOOD_RATIO * loss[:10].mean())


def worse(healthy: np.ndarray, faulty: np.ndarray, began: int) -> bool:
    """Whether a fault has done harm: the mean of the losses from its step 10 on against that of the run without it."""
    a, b = healthy[began + 10 : len(faulty), 0], faulty[began + 10 :, 0]
    if not np.isfinite(b).all() or not len(b):
        return True
    fall = max(np.mean(healthy[:10, 0]) - np.mean(a), 0.0)
    return bool(np.mean(b) - np.mean(a) > max(WORSE * fall, 3.0 * np.std(a) / math.sqrt(len(a))))


def acting(faulty: np.ndarray, began: int) -> int:
    """Return the first step longer than all before the fault: with a schedule near zero it may come well after the fault."""
    longer = np.flatnonzero(~(faulty[began:, 6] <= np.max(faulty[:began, 6])))
    return began + int(longer[0]) if len(longer) else began


PEERS = ("arc-vigil", "trainpulse", "trainpulse, told the rate", "stabilityguard", "arc-training")


@dataclass
class Score:
    """What one detector found in all runs with one fault."""

    runs: int = 0
    early: int = 0
    quick: int = 0
    slow: int = 0
    worse: int = 0
    worse_quick: int = 0
    worse_slow: int = 0
    acting: int = 0
    delays: list[int] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    channels: Counter[str] = field(default_factory=Counter)

    def add(
        self, name: str, first: int | None, began: int, acts: int, harm: bool, *, early: bool = False, channel: str = ""
    ) -> None:
        """Count one run, whose first alarm at or after its fault came at step ``first``."""
        delay = math.inf if first is None else first - began + 1
        self.acting += first is not None and first - acts + 1 <= QUICK
        self.runs, self.early, self.worse = self.runs + 1, self.early + early, self.worse + harm
        self.quick, self.slow = self.quick + (delay <= QUICK), self.slow + (delay <= SLOW)
        self.worse_quick += harm and delay <= QUICK
        self.worse_slow += harm and delay <= SLOW
        if delay <= SLOW:
            self.delays.append(int(delay))
            self.channels[channel] += 1
        else:
            self.missed.append(f"{'worse' if harm else 'unhurt'} {name}")


def verified(which: str, folder: Path) -> Iterable[tuple[Setting, np.ndarray, dict[str, Any]]]:
    """Yield the runs of a set that went well."""
    for setting in settings(which):
        path = folder / "healthy" / f"{setting.name}.npz"
        if path.exists():
            rows, facts = load(path)
            if good(setting, rows, facts):
                yield setting, rows, facts


def score(which: str, folder: Path, monitored: Path | None = None) -> tuple[list[Any], dict[str, dict[str, Score]]]:
    """Return the false alarms, one row a run, and for each fault and detector what it found.

    Args:
        which: name of the set.
        folder: of the streams.
        monitored: of the same runs under a Monitor; the alarms are then those.
    """

    def mine(kind: str, name: str, rows: np.ndarray) -> list[tuple[int, str]]:
        if monitored is None:
            return found(rows)
        path = monitored / kind / f"{name}.npz"
        return [(t, channel) for t, channel in load(path)[1]["alarms"]["found"]] if path.exists() else []

    healthy: list[Any] = []
    table: dict[str, dict[str, Score]] = {fault: {} for fault in (*FAULTS, *STARTS)}
    for setting, rows, facts in verified(which, folder):
        healthy.append((setting.name, mine("healthy", setting.name, rows), facts["alarms"]))
        for fault in (*FAULTS, *STARTS):
            kind = fault.replace(" ", "_")
            path = folder / kind / f"{setting.name}.npz"
            if not path.exists():
                continue
            faulty, told = load(path)
            began, harm = told["began"], fault == "nan batch" or worse(rows, faulty, told["began"])
            acts = acting(faulty, began) if fault.startswith("x") else began
            first = min((a for a in mine(kind, setting.name, faulty) if a[0] >= began), default=(None, ""))
            title = f"{fault}, guarded" if setting.optimizer == "guarded" else fault
            scores = table.setdefault(title, {})
            scores.setdefault("stableopt", Score()).add(setting.name, first[0], began, acts, harm, channel=first[1])
            for peer in PEERS:
                step = told["alarms"].get(peer)
                early = isinstance(step, int) and step < began
                late = step if isinstance(step, int) and not early else None
                scores.setdefault(peer, Score()).add(setting.name, late, began, acts, harm, early=early)
    return healthy, table


def show(which: str, folder: Path, *, monitored: Path | None = None, details: bool = False) -> None:
    """Print the tables."""
    healthy, table = score(which, folder, monitored)
    n = len(healthy)
    print(
        f"\n{which}: {n} of {sum(1 for _ in settings(which))} runs of {STEPS} steps are verified good, without any monitor"
    )
    print("\nruns with a false alarm")
    ours = [(name, alarms) for name, alarms, _ in healthy if alarms]
    print(f"  {'stableopt':<28s} {len(ours):3d} / {n}   {dict(Counter(c for _, a in ours for _, c in a[:1]))}")
    for peer in PEERS:
        count = sum(isinstance(told.get(peer), int) for _, _, told in healthy)
        errors = sum(f"error of {peer}" in told for _, _, told in healthy)
        print(f"  {peer:<28s} {count:3d} / {n}" + (f"   and {errors} errors" if errors else ""))
    for name, alarms in ours if details else ():
        print(f"      {name}: {alarms}")
    for fault, scores in table.items():
        if not scores:
            continue
        s = scores["stableopt"]
        print(f"\n{fault}: {s.runs} runs, {s.worse} of them got worse")
        for detector, s in scores.items():
            middle = f"median {int(np.median(s.delays))}" if s.delays else ""
            print(
                f"  {detector:<28s} within {QUICK}: {s.quick:3d}  within {SLOW}: {s.slow:3d}   "
                f"of the worse: {s.worse_quick:3d}, {s.worse_slow:3d} of {s.worse:3d}   early {s.early:3d}   "
                f"within {QUICK} of the first longer step: {s.acting:3d}   {middle} "
                f"{dict(s.channels) if detector == 'stableopt' else ''}"
            )
        for line in scores["stableopt"].missed if details else ():
            print(f"      missed {line}")
