"""Watch any torch training step by step, without changing it."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.errors import StabilityError
from stableopt.lyapunov.alarms import Alarms, Sample
from stableopt.lyapunov.budget import TIERS, Every, Schedule
from stableopt.lyapunov.energy import direction
from stableopt.lyapunov.events import Event
from stableopt.lyapunov.hooks import Closure, StepHooks
from stableopt.lyapunov.observation import Observation
from stableopt.lyapunov.policies import Enforcer, Policy
from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.scaler import ScalerWatch
from stableopt.lyapunov.sinks import JSONLSink, Sink, last_step
from stableopt.lyapunov.tiers import Probe, Tiers, known_before, trust_facts
from stableopt.lyapunov.vitals import Vitals
from stableopt.optim import GuardedOptimizer, StepReport, as_loss
from stableopt.optim.agree import GroupChoice, Processes
from stableopt.optim.scaling import scaled

__all__ = ["Monitor"]

_CHECKED = 3  # comparisons at which the closure is also evaluated twice before the step
_NOTHING: frozenset[str] = frozenset()


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
        self._model, self._optimizer, self._probe = model, optimizer, probe
        device = next((p.device for g in optimizer.param_groups for p in g["params"]), torch.device("cpu"))
        self._processes = Processes.of(process_group, device)
        self._schedule = Schedule(Every.of(every), max_overhead, self._processes)
        self._tiers = Tiers(model, optimizer, self._processes, probe, seed)
        self._alarms = Alarms() if alarms is None else alarms
        self._enforcer = Enforcer(
            Policy.of(policy), model, optimizer, also=also, on_rollback=on_rollback, processes=self._processes
        )
        self._scaler = None if scaler is None else ScalerWatch(scaler)
        self._path = None if run_dir is None else Path(run_dir) / "energy.jsonl"
        self._sinks: list[Sink] = [*([] if self._path is None else [JSONLSink(self._path)]), *sinks]
        self._step = 0 if self._path is None else last_step(self._path)
        self._taken, self._recorded, self._compared = 0, 0, 0
        self._verdicts, self._actions, self._seen = Counter[str](), Counter[str](), Counter[str]()
        self._told: Any = None
        self._early: dict[str, Any] | None = None
        self._early_seconds = 0.0
        self._distrust = ""
        self._observation: Observation | None = None
        self._report: StepReport | None = None
        self._due: frozenset[str] = _NOTHING
        self._refused: tuple[str, ...] = ()
        self._by_guard, self._lazy, self._started, self._failed = False, False, False, ""
        self._rates: tuple[float, ...] = ()
        self._spent, self._spent_now, self._carried, self._ended, self._failures = 0.0, 0.0, 0.0, 0.0, 0
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
            if self._scaler is not None:
                self._scaler.begin()
        return self

    def close(self) -> None:
        """Stop watching and close the sinks; may be called twice."""
        self._hooks.remove()
        self._forget()
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
        began = time.perf_counter()
        with_graph = isinstance(loss, Tensor) and loss.grad_fn is not None and loss.numel() == 1
        if isinstance(loss, Tensor) and loss.device.type != "cpu" and loss.numel() == 1:
            self._told = loss.detach().clone()
        else:
            self._told = as_loss(loss.detach() if isinstance(loss, Tensor) else loss)
        if with_graph and self._probe is None and self._early is None and "sharpness" in self._due_at(self._step + 1):
            with scaled(self._optimizer.param_groups, self._enforcer.factor):  # those of the step to come
                self._early = self._tiers.sharpness(None, loss)
        self._early_seconds += time.perf_counter() - began

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
            "compared": self._compared,
            "distrust": self._distrust,
            "schedule": self._schedule.state_dict(),
            "tiers": self._tiers.state_dict(),
            "alarms": self._alarms.state_dict(),
            "policy": self._enforcer.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; records of later steps are dropped from the sinks, since they are taken again.

        Args:
            state: as :meth:`state_dict` gave it, from the moment of the checkpoint of model and optimizer.

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
        if missing := sorted({"compared", "distrust", "schedule", "tiers", "alarms", "policy"} - state.keys()):
            raise ValueError(f"the state of a Monitor lacks {', '.join(missing)}: it is not one of this version.")
        self._tiers.load_state_dict(state["tiers"])
        self._schedule.load_state_dict(state["schedule"])
        self._alarms.load_state_dict(state["alarms"])
        self._enforcer.load_state_dict(state["policy"])
        if self._scaler is not None and state.get("scaler") is not None:
            self._scaler.load_state_dict(state["scaler"])
        for sink in self._sinks:  # last, when nothing can be refused any more
            sink.truncate(step)
        self._step, self._compared, self._distrust = step, state["compared"], state["distrust"]
        self._told, self._early = None, None
        self.records = deque((record for record in self.records if record.step <= step), maxlen=self.records.maxlen)
        self.events = deque((event for event in self.events if event.step <= step), maxlen=self.events.maxlen)

    def _before(self, closure: Closure | None, trial: bool) -> Closure | None:
        """Before a step: prepare to look, with a closure that also tells us the loss."""
        began = time.perf_counter()
        optimizer, step = self._optimizer, self._step + 1
        self._carried += self._spent  # of a step that ended in an error
        self._forget()
        self._tiers.costs = {}
        self._report = optimizer.last_step if isinstance(optimizer, GuardedOptimizer) else None
        self._due = self._due_at(step)
        self._enforcer.before(step, with_closure=closure is not None)
        self._rates = tuple(_rate(group, wait=bool(self._due)) for group in optimizer.param_groups)
        self._by_guard = (trial or closure is not None) and _guards(optimizer)
        self._lazy = self._by_guard and optimizer.param_groups[0]["guard"] == "lazy"
        try:
            other = self._prepared(closure)
        except Exception as error:  # whatever it is, the step is done as without a monitor
            self._failed, other = _sentence(error), None
        if self._early is not None:
            self._tiers.costs["sharpness"] = self._early_seconds
        self._spent = time.perf_counter() - began + self._early_seconds
        self._early_seconds = 0.0
        return other

    def _due_at(self, step: int) -> frozenset[str]:
        """Return the tiers that look at a step: those whose turn it is, and while an alarm is near those that it takes."""
        due = self._schedule.due(step)
        if self._processes.size == 1 and self._alarms.alert:
            due |= {"vitals", "energy"} & self._schedule.base.keys()
        return due

    def _prepared(self, closure: Closure | None) -> Closure | None:
        """Keep what a look after the step needs; return what is to be evaluated instead of the closure."""
        due, guards, start = self._due, self._by_guard, self._tiers.start
        if due & {"vitals", "energy"} and (self._lazy or not guards):
            with self._tiers.timed("vitals"):
                start.take(momentum="energy" in due)
                self._started = True
        refuse = self._enforcer.refuse if self._enforcer.skips else None
        if closure is None:
            start.grade()
            if refuse is not None:
                self._refused = refuse(self._told)
            return None
        compare = "energy" in due and not guards
        again = compare or (bool(due & {"sharpness", "forward"}) and self._probe is None)
        if guards and refuse is None and not again:
            return None
        with self._tiers.timed("energy") if again else nullcontext():
            self._observation = Observation(
                self._model,
                self._optimizer,
                closure,
                processes=self._processes,
                again=again,
                check=compare and self._compared < _CHECKED,
                distrust=self._distrust,
                refuse=refuse,
                failed=lambda: self._enforcer.after(self._step + 1, raised=True),
                graded=start.grade if self._started else None,
            )
        return self._observation.instead()

    def _after(self) -> None:
        """After a step: count it, and look if it is time."""
        began = time.perf_counter()
        self._step += 1
        self._taken += 1
        optimizer, observation = self._optimizer, self._observation
        report = optimizer.last_step if isinstance(optimizer, GuardedOptimizer) else None
        seen = None if report is self._report else report
        if observation is not None:
            self._spent += observation.seconds
            if observation.seconds and "energy" in self._tiers.costs:
                self._tiers.costs["energy"] += observation.seconds
            self._distrust, self._refused = observation.distrust, observation.refused
        facts = self._seen_facts(seen, observation)
        self._enforcer.after(self._step)
        events = self._judge(facts)
        record = self._recorded_as(facts, events) if self._due or events else None
        due, costs = self._due, self._tiers.costs
        self._forget()
        self._early, self._told = None, None
        if record is not None:
            write = time.perf_counter()
            try:
                for sink in self._sinks:
                    sink.write(record)
            finally:
                tier = min(due, default="vitals", key=TIERS.index)
                costs[tier] = costs.get(tier, 0.0) + time.perf_counter() - write
                self._timed(due, costs, began)
        else:
            self._timed(due, costs, began)
        self._announce(events)

    def _timed(self, due: frozenset[str], costs: dict[str, float], began: float) -> None:
        now = time.perf_counter()
        monitor = self._spent_now + self._carried + now - began
        run = max(0.0, now - self._ended - monitor)
        self._carried = 0.0
        self._schedule.stepped(self._step, due, run=run, monitor=monitor, costs=costs)
        self._ended = time.perf_counter()

    def _announce(self, events: tuple[Event, ...]) -> None:
        """Warn, and raise what a policy raises, now that the step is recorded."""
        failed = next((event for event in events if event.kind == "action" and event.action == "raise"), None)
        if events:
            self._enforcer.warn()
        if failed is not None:
            raise StabilityError(str(failed))

    def _seen_facts(self, report: StepReport | None, observation: Observation | None) -> dict[str, Any]:
        """Return what is seen of a step; an error of an instrument is a note."""
        if self._refused:
            self._enforcer.after(self._step)  # nothing has moved, and gradients are there again
        facts: dict[str, Any] = {"lr": self._rates}
        try:
            facts |= self._look(report, observation) if self._due else self._glance(report, observation)
        except Exception as error:  # whatever it is, the run goes on as without a monitor
            self._failed = _sentence(error)
        if self._failed:
            facts["notes"] = (*facts.get("notes", ()), f"the monitor could not look: {self._failed}")
        if self._refused:
            facts["nonfinite"] = tuple(dict.fromkeys((*self._refused, *facts.get("nonfinite", ()))))
        return facts

    def _glance(self, report: StepReport | None, observation: Observation | None) -> dict[str, Any]:
        """Return what is known of a step without looking."""
        told, self._told = self._told, None
        told = None if isinstance(told, Tensor) else told  # a tensor on a device is not waited for
        if report is not None and (self._by_guard or observation is None):
            return self._reported(report, told)
        if observation is not None:
            return observation.glance() if self._processes.size == 1 else {}
        return {} if told is None else {"loss": told, "nonfinite": () if math.isfinite(told) else ("loss",)}

    def _look(self, report: StepReport | None, observation: Observation | None) -> dict[str, Any]:
        """Return what the tiers find whose turn it is."""
        due, tiers = self._due, self._tiers
        facts: dict[str, Any] = {}
        if report is not None and (self._by_guard or observation is None):
            facts |= self._reported(report, self._told_loss())
        elif self._started:
            watched = observation or Observation(self._model, self._optimizer, None)
            with tiers.timed("energy" if "energy" in due else "vitals"):
                facts |= watched.finish(tiers.start.motion() if "energy" in due else None, self._told_loss())
            self._weigh(watched, facts["verdict"])
        else:
            facts |= {"reason": "not compared at this step", **self._glance(None, observation)}
        if due & {"vitals", "energy"}:
            with tiers.timed("vitals"):
                before = None if self._started else known_before(self._optimizer, report)
                same = tiers.start.same_gradients() and (observation is None or observation.evaluations < 2)
                facts = _with_vitals(facts, tiers.vitals(before), same_gradients=same)
            facts |= self._trust(facts)
        notes = facts.get("notes", ())
        if "sharpness" in due and self._early is None:
            # the guard may have stepped with smaller learning rates than those of the groups
            scale = facts.get("scale", 1.0) if self._by_guard and facts.get("scale", 1.0) > 0 else 1.0
            with tiers.timed("sharpness"), scaled(self._optimizer.param_groups, scale):
                self._early = tiers.sharpness(observation)
        if self._early is not None:
            facts |= self._early | {"notes": (*notes, *self._early.get("notes", ()))}
        if due & {"layers", "forward"}:
            with tiers.timed("forward" if "forward" in due else "layers"):
                layers = tiers.layers(observation, forward="forward" in due, update_ratio=_ratio(facts))
            facts |= layers | {"notes": (*facts.get("notes", ()), *layers["notes"])}
        if "gaps" in due:
            with tiers.timed("gaps"):
                facts |= tiers.gaps()
        return facts

    def _reported(self, report: StepReport, told: float | None) -> dict[str, Any]:
        """Return the fields of a record that a guard's report fills."""
        facts: dict[str, Any] = {name: getattr(report, name) for name in _SHARED}
        if told is not None and math.isnan(facts["loss"]):
            facts["loss"] = told
        known = self._by_guard or told is not None
        if known and report.verdict == "nonfinite" and not math.isfinite(facts["loss"]):
            facts["nonfinite"] = ("loss",)
        return facts

    def _weigh(self, observation: Observation, verdict: str) -> None:
        """Learn from a comparison, or from one that failed: after three in a row the closure is not evaluated again."""
        self._compared += verdict in {"decreased", "undecided", "increased"}
        self._failures = self._failures + 1 if observation.failed_after else 0
        self._distrust = observation.distrust
        if self._failures >= _CHECKED and not self._distrust:
            self._distrust = observation.doubt

    def _trust(self, facts: dict[str, Any]) -> dict[str, float]:
        if self._lazy:  # the losses are those of the step before, the slope is of this one
            return {}
        sign = direction(self._optimizer)
        loss, after, slope = (sign * facts.get(name, math.nan) for name in ("loss", "loss_after", "slope"))
        return trust_facts(loss, after, slope, facts.get("lr", self._rates), facts.get("tolerance", math.nan))

    def _judge(self, facts: dict[str, Any]) -> tuple[Event, ...]:
        """Return the alarms of this step and what was done about them."""
        found: list[Event] = []
        if self._scaler is not None and self._due and (event := self._scaler.look(self._step)) is not None:
            found.append(event)
        if self._due or self._refused or self._processes.size == 1:
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

    def _told_loss(self) -> float | None:
        told, self._told = self._told, None
        return as_loss(told) if isinstance(told, Tensor) else told

    def _forget(self) -> None:
        self._spent_now = self._spent
        self._report, self._observation, self._due, self._spent = None, None, _NOTHING, 0.0
        self._refused, self._by_guard, self._lazy, self._started, self._failed = (), False, False, False, ""


def _guards(optimizer: Optimizer) -> bool:
    """Whether the optimizer itself compares the energies, if it has a closure."""
    return isinstance(optimizer, GuardedOptimizer) and optimizer.param_groups[0]["guard"] != "off"


def _rate(group: dict[str, Any], *, wait: bool) -> float:
    """Return the learning rate of a group; NaN if it has none, or it is on a device that is not to be waited for."""
    lr = group.get("lr")
    if lr is None or (isinstance(lr, Tensor) and lr.device.type != "cpu" and not wait):
        return math.nan
    return float(lr)


def _sentence(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"


def _ratio(facts: dict[str, Any]) -> float:
    """Return the size of the step over that of the weights."""
    weight = facts.get("weight_norm", math.nan)
    return facts["displacement"] / weight if weight > 0 else math.nan


def _with_vitals(facts: dict[str, Any], vitals: Vitals, *, same_gradients: bool) -> dict[str, Any]:
    """Return the facts with what the vitals add; the displacement is that of the energy, where it is known."""
    found = {item.name: getattr(vitals, item.name) for item in fields(vitals)}
    if not same_gradients:
        found |= {"grad_norm": math.nan, "slope": math.nan, "grad_norms": {}}
        said = "the gradients are no longer those that the step began with: no norm and no slope"
        facts = facts | {"notes": (*facts.get("notes", ()), said)}
    if not math.isnan(known := facts.get("displacement", math.nan)):
        found["displacement"] = known
    return facts | found | {"nonfinite": (*facts.get("nonfinite", ()), *vitals.nonfinite)}


_SHARED = tuple({item.name for item in fields(StepReport)} & {item.name for item in fields(StepRecord)} - {"step"})
_SAMPLED = (
    "energy_before", "energy_after", "tolerance", "trust", "displacement", "weight_norm",
)  # fmt: skip
