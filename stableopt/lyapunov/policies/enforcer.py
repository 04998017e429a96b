"""What a policy does about alarms: warn, raise, skip a step, shrink the learning rates, go back to a snapshot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.alarms import Alarm
from stableopt.lyapunov.events import Event
from stableopt.lyapunov.policies.heard import Heard, heard_by_all
from stableopt.lyapunov.policies.moment import Soundness
from stableopt.lyapunov.policies.policy import ACTING, Policy
from stableopt.lyapunov.policies.rates import Rates
from stableopt.lyapunov.policies.refusal import Refusal
from stableopt.lyapunov.policies.rollback import Checkpoints, Restoration
from stableopt.optim import GuardedOptimizer
from stableopt.optim.agree import Alone, Processes
from stableopt.optim.callers import level_outside

__all__ = ["Enforcer"]

_ALL = ""
"""The cool-down of all channels, after a rollback."""
_NEVER = -(1 << 62)
"""Longer ago than any cool-down."""
_NAMED = 8
"""Names in an event; a model may have thousands."""
_SMALLEST = 2.0**-10
"""Learning rates are not shrunk below this part of what the scheduler asks for, but for the first time."""


class Enforcer:
    """Carry out a policy: around each step of an optimizer, and on its alarms.

    The order within a step is :meth:`before`, :meth:`refuse` once the gradients are there, the optimizer's step, :meth:`after`,
    :meth:`act`, and :meth:`warn` once the record is written. All processes that train the model call all of them in the same
    order, and all do the same; a policy that only observes and warns asks no other process.

    Args:
        policy: what to do.
        model: what is trained.
        optimizer: any torch optimizer.
        also: what a rollback takes back beside model and optimizer, as :class:`Checkpoints` takes it.
        on_rollback: is called with the step that a rollback went back to, for what has no ``state_dict``: a data loader.
        processes: that train the model; None for those with which the optimizer decides, or all.

    Attributes:
        policy: the policy.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> enforcer = Enforcer(Policy(level="shrink"), model, optimizer)
        >>> alarm = Alarm("level", "the loss stays high", "4 of 5 blocks", 3, "lower the learning rate")
        >>> events = enforcer.act([alarm], step=7)
        >>> print(events[-1])
        step 7, level (shrink): all learning rates are multiplied by 0.5; evidence: the loss stays high (4 of 5 blocks); ...
        >>> enforcer.before(8)
        >>> optimizer.param_groups[0]["lr"]
        0.05
        >>> enforcer.after(8)
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """

    def __init__(
        self,
        policy: Policy,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        also: Sequence[Any] = (),
        on_rollback: Callable[[int], Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.policy = policy
        self._optimizer, self._on_rollback = optimizer, on_rollback
        self._processes = _processes_of(optimizer) if processes is None else processes
        self._refusal = Refusal(model, optimizer, self._processes) if policy.nonfinite == "skip" else None
        self._checkpoints = Checkpoints(model, optimizer, also, policy.snapshots) if policy.uses("rollback") else None
        self._soundness = None if self._checkpoints is None else Soundness(model, self._processes)
        self._rates = Rates(optimizer)
        self._undone: Restoration | None = None
        self._unsaid: list[Event] = []
        self._open, self._refused = False, list[tuple[int, tuple[str, ...]]]()
        self._together = self._processes.size > 1 and policy.uses(*ACTING)
        self._until: dict[str, int] = {}
        self._shrunk, self._retries, self._skips, self._calm_from, self._troubled = 0, 0, 0, 0, _NEVER

    @property
    def factor(self) -> float:
        """By what the learning rates are multiplied, 1 where nothing is shrunk.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> Enforcer(Policy(), model, torch.optim.SGD(model.parameters())).factor
            1.0
        """
        return self.policy.factor**self._shrunk

    @property
    def skips(self) -> bool:
        """Whether steps are skipped that are not finite, so that :meth:`refuse` has to be called.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> Enforcer(Policy(nonfinite="skip"), model, torch.optim.SGD(model.parameters())).skips
            True
        """
        return self._refusal is not None

    def before(self, step: int, *, with_closure: bool = False) -> None:
        """Prepare a step: take a snapshot if it is time, and shrink the learning rates for this step if they are to be.

        Args:
            step: its number, counted from 1.
            with_closure: whether the step evaluates a closure.
        """
        self.after(step, raised=True)  # of a step that has ended in an error
        if self._undone is not None:
            self._undone.repeat()  # what the loop has called since belongs to the step that was undone
            self._undone = None
        self._keep(step)
        self._open = True
        if self._refusal is not None:
            self._refusal.begin(with_closure=with_closure)
        self._rates.scale(self.factor)

    def refuse(self, loss: Tensor | float | None) -> tuple[str, ...]:
        """Let a step change nothing if its loss or a gradient is not finite, where the policy is to skip such steps.

        Args:
            loss: of the step, if it is known.

        Returns:
            What is not finite, ``loss`` or ``grad:NAME``; empty if the step is not refused.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> enforcer = Enforcer(Policy(nonfinite="skip"), model, optimizer)
            >>> enforcer.before(1)
            >>> enforcer.refuse(float("nan"))
            ('loss',)
            >>> enforcer.after(1)
        """
        return () if self._refusal is None else self._refusal.look(loss)

    def after(self, step: int, *, raised: bool = False) -> None:
        """Undo what is for one step only: learning rates and gradients are the very objects they were; may be called twice.

        A learning rate that somebody else has set within the step stays as it is, unless it was made from the scaled one
        (:class:`Rates`).

        Args:
            step: its number.
            raised: whether the step has ended in an error. Call it at once then: until :meth:`after`, learning rates are those
                of the step, and a checkpoint that is written in between has them.
        """
        self._rates.put_back()
        if self._refusal is not None and self._open:
            self._refusal.end(raised=raised)
            if self._refusal.names and not raised:
                self._refused.append((step, self._refusal.names))
            self._skips = self._skips + 1 if self._refusal.names else 0
        self._open = False

    def act(self, alarms: Iterable[Alarm], step: int) -> tuple[Event, ...]:
        """Do what the policy says about the alarms of a step; to be called for a step without alarms as well.

        Args:
            alarms: of this process.
            step: its number.

        Returns:
            The alarms as events, and then what was done. Once the record is written the caller calls :meth:`warn`, and for an
            action ``raise`` raises :class:`StabilityError` with it.
        """
        mine = list(alarms)
        self._unsaid = []
        if not mine and not self._together and not self._refused and self._shrunk == self._retries == 0:
            return ()
        heard = heard_by_all(self.policy, mine, self._processes if self._together else Alone)
        seen = {*(a.channel for a in mine), *heard, *(["nonfinite"] if self._refused else [])}
        due = {channel for channel in seen if self._is_due(channel, step)}
        events = [self._alarm(a, step, due) for a in mine]
        here = {self.policy.slot(a.channel) for a in mine}
        events += [
            h.event(step, "alarm", getattr(self.policy, h.slot) if h.slot in due else "observe", h.what, "")
            for h in heard.values()
            if h.slot not in here and getattr(self.policy, h.slot) in ACTING
        ]
        for channel in due:
            self._until[self._key(channel)] = step + self.policy.cooldown
        for slot in heard:
            if getattr(self.policy, slot) in ACTING:
                self._calm_from = max(self._calm_from, step)
            if getattr(self.policy, slot) == "rollback" or (slot == "nonfinite" and self._refusal is None):
                self._troubled = step
        done = [*self._skipped(), *self._intervene({s: h for s, h in heard.items() if s in due}, step)]
        done += self._recovered(step)
        # of steps that are skipped one after another only some are told of
        told = {"shrink", "rollback", "observe"} | ({"skip"} if "nonfinite" in due else set())
        self._unsaid = [*(e for e in events if e.action == "warn"), *(e for e in done if e.action in told)]
        return (*events, *done)

    def warn(self) -> None:
        """Warn of what the last :meth:`act` has found and done; a second call says nothing.

        Raises:
            RuntimeWarning: where the filters make warnings errors.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> enforcer = Enforcer(Policy(), model, torch.optim.SGD(model.parameters()))
            >>> _ = enforcer.act([Alarm("level", "the loss stays high", "4 of 5 blocks", 3, "wait")], step=7)
            >>> with warnings.catch_warnings(record=True, action="always") as caught:
            ...     enforcer.warn(), enforcer.warn()
            (None, None)
            >>> print(*(w.message for w in caught))
            step 7, level (warn): the loss stays high; evidence: 4 of 5 blocks; since step 3; wait
        """
        said, self._unsaid = self._unsaid, []
        for event in said:
            warnings.warn(str(event), RuntimeWarning, stacklevel=level_outside())

    def renew(self) -> None:
        """Take what is there now for sound: to be called when the watching begins, once model and optimizer have their values.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> Enforcer(Policy(nonfinite="skip"), model, torch.optim.SGD(model.parameters())).renew()
        """
        self._undone = None
        if self._refusal is not None:
            self._refusal.keep_buffers()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on alike; snapshots are not in it.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> Enforcer(Policy(), model, torch.optim.SGD(model.parameters())).state_dict()["shrunk"]
            0
        """
        return {name: getattr(self, f"_{name}") for name in _COUNTS} | {"until": dict(self._until)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; snapshots of what was before are dropped. Load model and optimizer first.

        Args:
            state: as :meth:`state_dict` gave it.

        Raises:
            ValueError: if it is something else.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> enforcer = Enforcer(Policy(), model, torch.optim.SGD(model.parameters()))
            >>> enforcer.load_state_dict(enforcer.state_dict())
        """
        names = {*_COUNTS, "until"}
        if not isinstance(state, dict) or state.keys() != names:
            raise ValueError(f"the state of an Enforcer has {', '.join(sorted(names))}, got {state!r}.")
        until, counts = state["until"], [state[name] for name in _COUNTS]
        if not isinstance(until, dict) or not all(type(n) is int for n in (*counts, *until.values())):
            raise ValueError(f"the state of an Enforcer has integers, got {state!r}.")
        for name in _COUNTS:
            setattr(self, f"_{name}", state[name])
        self._until = dict(until)
        self._refused, self._unsaid = [], []
        if self._checkpoints is not None:
            self._checkpoints.drop(after=-1)
        self.renew()

    def _keep(self, step: int) -> None:
        """Take a snapshot if it is time and the training is sound; a forward pass before the step may have spoilt buffers."""
        if self._checkpoints is None or self._soundness is None:
            return
        last = max(self._checkpoints.steps, default=None)
        due = last is None or step - last >= self.policy.snapshot_every
        if due and step - self._troubled > self.policy.cooldown and self._soundness.holds():
            self._checkpoints.take(step)

    def _key(self, channel: str) -> str:
        """Return under which name a channel cools down: what all processes do together has one for all."""
        return self.policy.slot(channel) if self.policy.action(channel) in ACTING else channel

    def _is_due(self, channel: str, step: int) -> bool:
        """Whether an alarm of a channel has an effect now."""
        if channel == "nonfinite" and self.policy.nonfinite == "rollback":
            return True  # waiting mends no parameter
        return step > max(self._until.get(_ALL, 0), self._until.get(self._key(channel), 0))

    def _alarm(self, alarm: Alarm, step: int, due: set[str]) -> Event:
        """Return the event of an alarm of this process."""
        action = self.policy.action(alarm.channel) if alarm.channel in due else "observe"
        if action == "skip" and not self._refused:
            action = "warn"  # what is not finite is no loss and no gradient
        return Heard.of(self.policy.slot(alarm.channel), alarm).event(step, "alarm", action, alarm.what, alarm.evidence)

    def _skipped(self) -> list[Event]:
        """Return the events of steps that were skipped since the last time."""
        events = []
        for step, names in self._refused:
            found = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
            what = "the step has changed nothing: loss or gradients are not finite"
            heard = Heard("nonfinite", step, advice="look at the batch; lower the learning rate if it goes on")
            events.append(heard.event(step, "action", "skip", what, found))
        if events and self._skips >= self.policy.patience:
            what = f"{self._skips} steps in a row are not finite: skipping does not help"
            heard = Heard("nonfinite", events[-1].step, advice="go back to a checkpoint, and lower the learning rate")
            events.append(heard.event(events[-1].step, "action", "raise", what, events[-1].evidence))
        self._refused = []
        return events

    def _intervene(self, asked: dict[str, Heard], step: int) -> list[Event]:
        """Do the strongest thing that the channels ask for."""
        for action in ACTING:
            for slot in self.policy.channels:
                if slot in asked and getattr(self.policy, slot) == action:
                    heard = asked[slot]
                    if action == "raise":
                        return [heard.done(step, "raise", "the run is stopped, as the policy asks")]
                    return self._shrink(heard, step) if action == "shrink" else self._roll_back(heard, step)
        return []

    def _shrink(self, heard: Heard, step: int) -> list[Event]:
        """Shrink all learning rates."""
        if all(group.get("lr") is None for group in self._optimizer.param_groups):
            return [heard.done(step, "observe", "no parameter group has a learning rate that could be shrunk")]
        if self._shrunk > 0 and self.factor * self.policy.factor < _SMALLEST:
            return [
                heard.done(step, "observe", f"learning rates are multiplied by {self.factor:g} and not shrunk further")
            ]
        self._shrunk += 1
        return [heard.done(step, "shrink", f"all learning rates are multiplied by {self.factor:g}")]

    def _roll_back(self, heard: Heard, step: int) -> list[Event]:
        """Go back to before the fault and shrink; where that is not possible, shrink or, if parameters are lost, raise."""
        if self._retries >= self.policy.retries:
            return [heard.done(step, "raise", f"{self._retries} rollbacks have not helped")]
        assert self._checkpoints is not None  # noqa: S101 - the policy has a rollback
        processes = self._processes if self._together else Alone
        ready, why = self._checkpoints.prepare_before(heard.since, self.policy.margin, processes)
        if ready is None:
            if heard.slot == "nonfinite":
                return [heard.done(step, "raise", f"no rollback is possible: {why}")]
            return [heard.done(step, "observe", f"no rollback is possible: {why}"), *self._shrink(heard, step)]
        target = ready.commit()
        self._undone = ready
        self._retries += 1
        shrunk = self._shrink(heard, step)
        # the place of the fault has to be passed before the learning rates recover
        self._calm_from, self._troubled = step + (step - target), step
        self._until[_ALL] = step + self.policy.cooldown
        if self._on_rollback is not None:
            self._on_rollback(target)
        return [heard.done(step, "rollback", f"the training is back to where it was before step {target}"), *shrunk]

    def _recovered(self, step: int) -> list[Event]:
        """Undo one shrinking after enough steps without an alarm; with the last one rollbacks are allowed again."""
        if step - self._calm_from < self.policy.patience:
            return []
        if self._shrunk == 0:
            self._retries = 0
            return []
        self._shrunk, self._calm_from = self._shrunk - 1, step
        what = f"all learning rates are multiplied by {self.factor:g}"
        if self._shrunk == 0:
            self._retries, what = 0, "the learning rates are what the optimizer and its scheduler say"
        return [Event(step, "action", "", "restore", what, f"{self.policy.patience} steps without an alarm")]


_COUNTS = ("shrunk", "retries", "skips", "calm_from", "troubled")


def _processes_of(optimizer: Optimizer) -> Processes:
    if isinstance(optimizer, GuardedOptimizer):
        return optimizer.processes()
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    return Processes.of("auto", device)
