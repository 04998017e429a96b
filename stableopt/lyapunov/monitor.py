"""Watch any torch training step by step, without changing it."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from stableopt.errors import StabilityError
from stableopt.lyapunov.alarms import Alarms, Sample
from stableopt.lyapunov.budget import TIERS, Every, Schedule
from stableopt.lyapunov.energy import direction
from stableopt.lyapunov.events import Event
from stableopt.lyapunov.hooks import Closure, StepHooks
from stableopt.lyapunov.policies import Enforcer, Policy
from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.scaler import ScalerWatch
from stableopt.lyapunov.sinks import JSONLSink, Sink, last_step
from stableopt.lyapunov.tiers import Probe
from stableopt.lyapunov.watch import Watch
from stableopt.optim.agree import GroupChoice, Processes

__all__ = ["Monitor"]


class Monitor:
    r"""Watch each step of an optimizer: whether its energy falls, how near it is to the edge, what is not finite; raise alarms.

    A stableopt optimizer hands over what its guard saw. For any other ``torch.optim.Optimizer`` that is given a closure, the
    monitor compares the energy before and after the step itself, by one more evaluation of the closure without gradients and with
    the same random numbers. Without a closure there is nothing to compare, and the verdict is "unobserved"; all else is measured.

    Parameters, buffers, gradients, optimizer state, training modes and global random states are bit for bit those of the run
    without a monitor, unless a policy that acts is asked for.

    Args:
        model: the model that is trained.
        optimizer: any torch optimizer; its step hooks are used.
        run_dir: folder for ``energy.jsonl``; None writes no file. A file that is there is continued: the steps go on from its
            last one.
        every: the smallest intervals at which to look, an :class:`Every`; a number is for vitals and energy.
        probe: returns the loss of a fixed batch with its graph, without ``backward``; or several such functions, of micro-batches
            of one size, for the noise scale, too. Curvature and the forward exponent are then those of this batch, and comparable
            over time; None takes the batch of the step, by its closure.
        max_overhead: the largest share of the time of the run that the monitor may take; it spaces its looks out to keep it. None
            for no limit and no clock: the records then depend on the run alone, and a resumed run writes the same bytes.
        policy: what to do about alarms: a :class:`Policy`, or one of its words for all channels; by default ``warn``.
        alarms: the channels; None for the default ones.
        also: what a rollback takes back beside model and optimizer: objects with ``state_dict`` and ``load_state_dict``
            (schedulers, a ``GradScaler``).
        on_rollback: is called with the step that a rollback went back to.
        scaler: a ``torch.amp.GradScaler``, whose skipped steps never reach the optimizer: they are found by its scale, at the next
            step that is looked at or at :meth:`close`.
        sinks: further receivers of the records; closed with the monitor.
        keep: number of last records in :attr:`records`, and of last events in :attr:`events`.
        process_group: the processes that train this model, as for ``GuardedOptimizer.decide_with``: "auto" for all, None for
            this one alone.
        seed: of random directions.

    Attributes:
        records: the last records.
        events: the last alarms and actions.

    Raises:
        TypeError: if ``model`` or ``optimizer`` is of another type.
        ValueError: if a number is out of range, or ``energy.jsonl`` is there and damaged.

    Note:
        The closure of an optimizer that is not guarded is evaluated once more per comparison, three times at the first ones,
        where the monitor checks that it gives the same value again; if it does not (it draws a new batch), nothing is compared.
        What a closure changes by itself (a list it appends to, a random generator of its own) is not put back.
        The slope is that of ``.grad``: where gradients are clipped, the trust ratio is that of the clipped gradient.
        A file that cannot be written costs one warning and no step. In several processes energies are means over all, and all
        look, and act, at the same steps.

    Examples:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x = torch.randn(8, 2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (model(x) - 1).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> with Monitor(model, optimizer) as monitor:
        ...     for _ in range(3):
        ...         _ = optimizer.step(closure)
        >>> [record.verdict for record in monitor.records]
        ['decreased', 'decreased', 'decreased']
        >>> 0 < monitor.last.trust < 1
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        run_dir: str | os.PathLike[str] | None = None,
        *,
        every: int | Every = 1,
        probe: Probe | None = None,
        max_overhead: float | None = 0.05,
        policy: Policy | str = "warn",
        alarms: Alarms | None = None,
        also: Sequence[Any] = (),
        on_rollback: Callable[[int], Any] | None = None,
        scaler: Any = None,
        sinks: Sequence[Sink] = (),
        keep: int = 1000,
        process_group: GroupChoice = "auto",
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Monitor needs a torch.nn.Module as model, got {type(model).__name__}.")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Monitor needs a torch.optim.Optimizer as optimizer, got {type(optimizer).__name__}.")
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise ValueError(f"Monitor needs keep as an integer >= 1, got {keep!r}.")
        if max_overhead is not None and not (isinstance(max_overhead, (int, float)) and 0.0 < max_overhead < math.inf):
            raise ValueError(f"Monitor needs max_overhead as a number > 0 or None, got {max_overhead!r}.")
        self.records: deque[StepRecord] = deque(maxlen=keep)
        self.events: deque[Event] = deque(maxlen=keep)
        self._optimizer = optimizer
        device = next((p.device for g in optimizer.param_groups for p in g["params"]), torch.device("cpu"))
        self._processes = Processes.of(process_group, device)
        self._schedule = Schedule(Every.of(every), max_overhead, self._processes)
        self._alarms = Alarms() if alarms is None else alarms
        self._enforcer = Enforcer(
            Policy.of(policy), model, optimizer, also=also, on_rollback=on_rollback, processes=self._processes
        )
        self._watch = Watch(model, optimizer, self._processes, probe, self._enforcer, seed)
        self._scaler = None if scaler is None else ScalerWatch(scaler)
        self._path = None if run_dir is None else Path(run_dir) / "energy.jsonl"
        self._sinks: list[Sink] = [*([] if self._path is None else [JSONLSink(self._path)]), *sinks]
        self._step = 0 if self._path is None else last_step(self._path)
        self._taken, self._recorded, self._spent, self._ended = 0, 0, 0.0, 0.0
        self._verdicts, self._actions, self._seen = Counter[str](), Counter[str](), Counter[str]()
        self._hooks = StepHooks(optimizer, self._before, self._after)

    @property
    def last(self) -> StepRecord | None:
        """The last record, None before the first.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> Monitor(model, torch.optim.SGD(model.parameters())).last is None
            True
        """
        return self.records[-1] if self.records else None

    @property
    def seconds(self) -> float:
        """What the monitor has taken so far.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> Monitor(model, torch.optim.SGD(model.parameters())).seconds
            0.0
        """
        return self._schedule.seconds

    @property
    def overhead(self) -> float:
        """Seconds of the monitor over seconds of the run without it, so far; NaN before the first step, or without a clock.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> Monitor(model, torch.optim.SGD(model.parameters())).overhead
            nan
        """
        return self._schedule.overhead

    def attach(self) -> Self:
        """Begin to watch; does nothing if it does already.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters())
            >>> monitor = Monitor(model, optimizer).attach()
            >>> optimizer.step()
            >>> monitor.close()
            >>> monitor.summary()["verdicts"]
            {'unobserved': 1}
        """
        if self._hooks.attach():
            self._ended = time.perf_counter()
            self._enforcer.renew()
            if self._scaler is not None:
                self._scaler.begin()
        return self

    def close(self) -> None:
        """Stop watching and close the sinks; may be called twice."""
        self._hooks.remove()
        self._enforcer.after(self._step, raised=True)
        if self._scaler is not None and (event := self._scaler.look(self._step + 1)) is not None:
            self.events.append(event)  # of steps that no later one has told of
            self._seen[event.channel] += 1
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        """Begin to watch."""
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching."""
        self.close()

    def observe(self, loss: object) -> None:
        """Tell the loss of the step to come, where the optimizer gets no closure.

        Args:
            loss: a number, or a tensor or array with one element; it may be NaN. A tensor on another device is not read before
                the step looks. Told before ``backward``, a tensor with its graph also serves to measure curvature, when it is time
                and there is no probe.

        Raises:
            ValueError: if it is anything else.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters())
            >>> with Monitor(model, optimizer) as monitor:
            ...     monitor.observe(torch.tensor(0.5))
            ...     optimizer.step()
            >>> monitor.last.loss, monitor.last.verdict
            (0.5, 'unobserved')
        """
        self._watch.tell(loss, sharpness="sharpness" in self._due_at(self._step + 1))

    def summary(self) -> dict[str, Any]:
        """Count what happened since this monitor began.

        Returns:
            ``steps`` taken, ``records`` made, how often each of ``verdicts`` and ``actions`` is in them, how many ``events`` of
            each channel there were, and the measured ``overhead``, NaN without a clock. Kept as the run goes; needs no memory per
            step.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> Monitor(model, torch.optim.SGD(model.parameters()), max_overhead=None).summary()
            {'steps': 0, 'records': 0, 'verdicts': {}, 'actions': {}, 'events': {}, 'overhead': nan}
        """
        return {
            "steps": self._taken,
            "records": self._recorded,
            "verdicts": dict(sorted(self._verdicts.items())),
            "actions": dict(sorted(self._actions.items())),
            "events": dict(sorted(self._seen.items())),
            "overhead": self.overhead,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as an uninterrupted one.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> Monitor(model, torch.optim.SGD(model.parameters())).state_dict()["step"]
            0
        """
        return {
            "step": self._step,
            "watch": self._watch.state_dict(),
            "schedule": self._schedule.state_dict(),
            "alarms": self._alarms.state_dict(),
            "policy": self._enforcer.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; records of later steps are dropped from the sinks, since they are taken again.

        Args:
            state: as :meth:`state_dict` gave it, from the moment of the checkpoint of model and optimizer, which are loaded first.

        Raises:
            ValueError: if the step is no integer >= 0, the state is of another version, or ``energy.jsonl`` is damaged.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> monitor = Monitor(model, torch.optim.SGD(model.parameters()))
            >>> monitor.load_state_dict(monitor.state_dict())
        """
        step = state["step"]
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"the state of a Monitor needs an integer step >= 0, got {step!r}.")
        if missing := sorted({"watch", "schedule", "alarms", "policy"} - state.keys()):
            raise ValueError(f"the state of a Monitor lacks {', '.join(missing)}: it is not one of this version.")
        self._watch.load_state_dict(state["watch"])
        self._schedule.load_state_dict(state["schedule"])
        self._alarms.load_state_dict(state["alarms"])
        self._enforcer.load_state_dict(state["policy"])
        if self._scaler is not None and state.get("scaler") is not None:
            self._scaler.load_state_dict(state["scaler"])
        for sink in self._sinks:  # last, when nothing can be refused any more
            sink.truncate(step)
        self._step = step
        self.records = deque((record for record in self.records if record.step <= step), maxlen=self.records.maxlen)
        self.events = deque((event for event in self.events if event.step <= step), maxlen=self.events.maxlen)

    def _before(self, closure: Closure | None, trial: bool) -> Closure | None:
        """Before a step: prepare to look, with a closure that also tells us the loss."""
        began = time.perf_counter()
        step = self._step + 1
        self._spent += self._watch.seconds()  # also of a step that ended in an error
        self._enforcer.before(step, with_closure=closure is not None)
        other = self._watch.before(closure, step=step, trial=trial, due=self._due_at(step))
        self._spent += time.perf_counter() - began
        return other

    def _due_at(self, step: int) -> frozenset[str]:
        """Return the tiers that look at a step: those whose turn it is, and while an alarm is near those that it takes."""
        due = self._schedule.due(step)
        if self._processes.size == 1 and self._alarms.alert:
            due |= {"vitals", "energy"} & self._schedule.base.keys()
        return due

    def _after(self) -> None:
        """After a step: count it, and look if it is time."""
        began = time.perf_counter()
        watch = self._watch
        self._step += 1
        self._taken += 1
        facts = watch.after()
        self._enforcer.after(self._step)
        events = self._judge(facts)
        record = self._recorded_as(facts, events) if watch.due or events else None
        try:
            if record is not None:
                with watch.tiers.timed(min(watch.due, default="vitals", key=TIERS.index)):
                    for sink in self._sinks:
                        sink.write(record)
        finally:
            now = time.perf_counter()
            monitor, self._spent = self._spent + watch.seconds() + now - began, 0.0
            run = max(0.0, now - self._ended - monitor)
            self._schedule.stepped(self._step, watch.due, run=run, monitor=monitor, costs=watch.tiers.costs)
            self._ended = time.perf_counter()
        self._announce(events)

    def _announce(self, events: tuple[Event, ...]) -> None:
        """Warn, and raise what a policy raises, now that the step is recorded."""
        failed = next((event for event in events if event.kind == "action" and event.action == "raise"), None)
        try:
            if events:
                self._enforcer.warn()
        finally:
            if failed is not None:
                raise StabilityError(str(failed))

    def _judge(self, facts: dict[str, Any]) -> tuple[Event, ...]:
        """Return the alarms of this step and what was done about them."""
        found: list[Event] = []
        if self._scaler is not None and self._watch.due and (event := self._scaler.look(self._step)) is not None:
            found.append(event)
        if self._watch.due or self._watch.refused or self._processes.size == 1:
            sign = direction(self._optimizer) or math.nan
            sample = Sample(
                step=self._step,
                loss=sign * facts.get("loss", math.nan),
                loss_after=sign * facts.get("loss_after", math.nan),
                **{name: facts.get(name, math.nan) for name in _SAMPLED},
                verdict=facts.get("verdict", "unobserved"),
                nonfinite=facts.get("nonfinite", ()),
                lr=facts.get("lr", ()),
            )
            found += self._enforcer.act(self._alarms.update(sample), self._step)
        if any(event.action == "rollback" and event.kind == "action" for event in found):
            for channel in self._alarms.channels:  # what they had gathered is of steps that are undone
                channel.reset()
        self.events += found
        self._seen.update(event.channel or "policy" for event in found)
        return tuple(found)

    def _recorded_as(self, facts: dict[str, Any], events: tuple[Event, ...]) -> StepRecord:
        """Make the record of this step."""
        record = StepRecord(step=self._step, overhead=self.overhead, events=events, **facts)
        self.records.append(record)
        self._recorded += 1
        self._verdicts[record.verdict] += 1
        self._actions[record.action] += 1
        return record


_SAMPLED = (
    "energy_before", "energy_after", "tolerance", "trust", "displacement", "weight_norm",
)  # fmt: skip
