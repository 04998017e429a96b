"""Train the runs of the suite of alarms once, and keep what each step said: a stream that every detector is then fed with.

A run is trained to the step of its faults; there the process forks for one fault after the other, so that a run with a fault is to
the bit the healthy run until then, on the same batches.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.optim import energy_tolerance, rule_for
from stableopt.optim.rules import step_sums
from tests.benchmarks.alarm_runs import (
    AFTER,
    FAULTS,
    STEPS,
    Setting,
    accuracy,
    loss_of,
    network,
    optimizers,
    pretrained,
    rate,
    table,
)

COLUMNS = (
    "loss",
    "loss_after",
    "energy_before",
    "energy_after",
    "tolerance",
    "trust",
    "displacement",
    "weight_norm",
    "lr",
    "grad_norm",
    "nonfinite",
)


class Watcher(Protocol):
    """Who looks on while a run is trained."""

    def begin(self, training: Training) -> None:
        """See the training before its first step."""

    def before(self, t: int) -> None:
        """See step t before its forward pass, without gradients."""

    def backward(self, t: int, loss: float) -> None:
        """See step t after its backward pass."""

    def after(self, t: int) -> None:
        """See step t after it was taken."""

    def alarms(self) -> dict[str, Any]:
        """Return the step of the first alarm of each who gave one."""


class Training:
    """One training, step by step.

    Args:
        setting: of the training.
        watcher: looks on.
        gain: factor on the initial weights.
        eps: of AdamW.
        stream: whether to measure, for a stream, what a step does.
    """

    def __init__(
        self, setting: Setting, watcher: Watcher, *, gain: float = 1.0, eps: float = 1e-8, stream: bool = True
    ) -> None:
        torch.manual_seed(setting.seed)
        self.setting, self.model = setting, network(setting)
        if setting.warm:
            pretrained(setting, self.model)
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(gain if p.ndim > 1 else 1.0)
        self.optimizers = optimizers(setting, self.model, eps=eps)
        self.batches = torch.Generator().manual_seed(setting.seed + 7)
        self.noise = torch.Generator().manual_seed(setting.seed + 8)
        self.fault, self.began, self.watcher, self.stream = "", STEPS, watcher, stream
        self.rows: list[tuple[float, ...]] = []
        self.grad_norm = math.nan
        watcher.begin(self)

    @property
    def watched(self) -> Optimizer:
        """The optimizer of the matrices, or of all."""
        return self.optimizers[0]

    def batch(self, t: int) -> list[tuple[Tensor, Tensor]]:
        """Draw the batches of a step."""
        x, y, _ = table(self.setting.data)
        size = 32 // self.setting.accumulation
        index = torch.randint(len(x), (self.setting.accumulation, size), generator=self.batches)
        rows = [(x[i], y[i]) for i in index]
        if self.fault == "nan batch" and t == self.began:
            rows[0][0][0, 0] = math.nan
        if self.fault == "labels" and t >= self.began:
            rows = [(a, b[torch.randperm(len(b), generator=self.noise)]) for a, b in rows]
        return rows

    def set_rate(self, t: int) -> None:
        """Set the learning rate of a step, the fault included."""
        factor = rate(self.setting, t)
        if self.fault.startswith("x") and t >= self.began:
            factor *= float(self.fault[1:])
        for i, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                group["lr"] = factor * self.setting.lr * (0.1 if i else 1.0)

    def closure(self, batch: list[tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
        """Return the closure of a step."""

        def closure() -> Tensor:
            self.model.zero_grad()
            total = torch.zeros(())
            for x, y in batch:
                loss = loss_of(self.model, x, y) / len(batch)
                if torch.is_grad_enabled():
                    loss.backward()
                total = total + loss.detach()
            return total

        return closure

    def step(self, t: int) -> None:
        """Take step t, counted from 0, and append a row."""
        self.set_rate(t)
        batch = self.batch(t)
        self.model.zero_grad()
        self.watcher.before(t)
        look = _Look(self.model, self.watched) if self.stream else None
        loss = math.nan

        def closure() -> Tensor:
            nonlocal loss
            value = self.closure(batch)()
            if torch.is_grad_enabled():
                loss = float(value)
                self.grad_norm = math.nan if look is None else look.gradients()
                self.watcher.backward(t, loss)
            return value

        self.watched.step(closure)
        for other in self.optimizers[1:]:
            other.step()
        self.rows.append((loss,) if look is None else look.row(loss, self.closure(batch)))
        self.watcher.after(t)


class _Look:
    """What is kept from before a step."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer, self._rule = model, optimizer, rule_for(optimizer)
        self._parameters = list(model.parameters())
        self._start = [p.detach().clone() for p in self._parameters]
        self._buffers = [b.clone() for b in model.buffers()]
        self._momenta = {
            p: None if (b := self._rule.buffer(optimizer.state.get(p, {}))) is None else b.clone()
            for group in optimizer.param_groups
            for p in (group["params"] if self._rule is not None else ())
        }
        self._random = torch.get_rng_state()
        self._gradients: list[Tensor] = []

    def gradients(self) -> float:
        """Keep the gradients and return their norm."""
        self._gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._parameters]
        return float(torch.nn.utils.get_total_norm(self._gradients))

    @torch.no_grad()
    def row(self, loss: float, closure: Callable[[], Tensor]) -> tuple[float, ...]:
        """Return the row of the step that was taken; the model, its buffers and the random numbers are left as they are."""
        d = torch._foreach_sub(self._parameters, self._start)
        slope = float(sum(torch.sum(a * b) for a, b in zip(d, self._gradients, strict=True)))
        now, buffers = torch.get_rng_state(), [b.clone() for b in self._model.buffers()]
        gradients = [p.grad for p in self._parameters]
        for b, old in zip(self._model.buffers(), self._buffers, strict=True):
            b.copy_(old)
        torch.set_rng_state(self._random)
        after = float(closure())
        torch.set_rng_state(now)
        for p, g in zip(self._parameters, gradients, strict=True):
            p.grad = g
        for b, new in zip(self._model.buffers(), buffers, strict=True):
            b.copy_(new)
        kinetic = self._kinetic()
        displacement = float(torch.nn.utils.get_total_norm(d))
        weights = float(torch.nn.utils.get_total_norm([p.detach() for p in self._parameters]))
        grad_norm = float(torch.nn.utils.get_total_norm(self._gradients))
        bad = (not math.isfinite(loss)) + 2 * (not math.isfinite(grad_norm)) + 4 * (not math.isfinite(weights))
        before, after_energy = loss + kinetic[0], after + kinetic[1]
        lr = float(self._optimizer.param_groups[0]["lr"])
        tolerance = energy_tolerance(before, after_energy, torch.finfo(torch.float32).eps)
        trust = (after - loss) / slope if slope != 0.0 else math.nan
        return (loss, after, before, after_energy, tolerance, trust, displacement, weights, lr, grad_norm, bad)

    def _kinetic(self) -> tuple[float, float]:
        """Return the energies before and after, without the loss."""
        if self._rule is None:
            return 0.0, 0.0
        start = dict(zip(self._parameters, self._start, strict=True))
        rows = [
            torch.stack(
                [
                    x.double()
                    for x in step_sums(self._rule, group, start[p], self._momenta[p], p, self._optimizer.state[p])[:2]
                ]
            )
            for group in self._optimizer.param_groups
            for p in group["params"]
            if p in self._optimizer.state
        ]
        if not rows:
            return 0.0, 0.0
        before, after = torch.stack(rows).sum(0).tolist()
        return before, after


def save(path: Path, training: Training, facts: dict[str, Any]) -> None:
    """Write the rows of a training and what is known about it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, rows=np.asarray(training.rows, dtype=np.float64), facts=json.dumps(facts))
    partial.rename(path)


def load(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Read what :func:`save` wrote."""
    with np.load(path) as data:
        return data["rows"], json.loads(str(data["facts"]))


def fault_step(setting: Setting) -> int:
    """Return the step, counted from 0, at which the faults of a run begin: at random, after the first 30."""
    draw = torch.Generator().manual_seed(setting.seed * 7919 + sum(map(ord, setting.name)))
    return int(torch.randint(30, STEPS - AFTER, (1,), generator=draw))


def record(setting: Setting, folder: Path, watchers: Callable[[], Watcher], *, stream: bool = True) -> None:
    """Train a run, and from its fault on once for each fault; the files that are there are kept.

    Args:
        setting: of the training.
        folder: for the files.
        watchers: makes one who looks on.
        stream: whether to keep what each step said, beside its loss.
    """
    healthy = folder / "healthy" / f"{setting.name}.npz"
    if healthy.exists():
        return
    began, watcher = fault_step(setting), watchers()
    training = Training(setting, watcher, stream=stream)
    start = accuracy(setting, training.model)
    for t in range(STEPS):
        if t == began:
            for fault in FAULTS:
                _forked(training, fault, folder, watcher)
        training.step(t)
    facts = {"began": began, "start": start, "end": accuracy(setting, training.model), "alarms": watcher.alarms()}
    save(healthy, training, facts)


def record_start(setting: Setting, start: str, folder: Path, watchers: Callable[[], Watcher]) -> None:
    """Train a run in which something is wrong from its first step."""
    path = folder / start.replace(" ", "_") / f"{setting.name}.npz"
    if path.exists():
        return
    watcher = watchers()
    gain, eps = (6.0, 1e-8) if start == "exploding init" else (1.0, 1e-30)
    training = Training(setting, watcher, gain=gain, eps=eps)
    for t in range(AFTER + 20):
        training.step(t)
    save(path, training, {"began": 0, "alarms": watcher.alarms(), "end": accuracy(setting, training.model)})


def _forked(training: Training, fault: str, folder: Path, watcher: Watcher) -> None:
    """Continue a training with a fault, in a child of this process."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError(f"{training.setting.name} with {fault} ended with {status}.")
        return
    try:
        began = len(training.rows)
        training.fault, training.began = fault, began
        for t in range(began, began + (8 if fault == "nan batch" else AFTER)):
            training.step(t)
        save(
            folder / fault.replace(" ", "_") / f"{training.setting.name}.npz",
            training,
            {"began": began, "alarms": watcher.alarms(), "end": accuracy(training.setting, training.model)},
        )
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
