"""One step of an optimizer, from before it to what is known of it afterwards."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.energy import direction
from stableopt.lyapunov.hooks import Closure
from stableopt.lyapunov.observation import Observation
from stableopt.lyapunov.policies import Enforcer
from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.tiers import Probe, Tiers, known_before, trust_facts
from stableopt.lyapunov.vitals import Vitals
from stableopt.optim import GuardedOptimizer, StepReport, as_loss
from stableopt.optim.agree import Processes
from stableopt.optim.scaling import scaled

__all__ = ["Watch"]

_CHECKED = 3
"""Comparisons at which the closure is also evaluated twice before the step, and failures in a row after which it never is again."""
_NOTHING: frozenset[str] = frozenset()


class Watch:
    """Watch the steps of an optimizer, one after the other: :meth:`before` each, :meth:`after` each.

    Args:
        model: watched, not changed.
        optimizer: of any kind.
        processes: those that train the model together.
        probe: the batch on which curvature and growth are measured; None for that of the step.
        enforcer: takes away gradients that are not finite, where its policy says so.
        seed: of random directions.

    Attributes:
        tiers: the instruments, with what they cost in this step.
        due: the tiers that look at this step.
        refused: what was not finite in this step, if it was made to change nothing.
        rates: the learning rates that this step uses.

    Examples:
        >>> import torch
        >>> from stableopt.lyapunov.policies import Policy
        >>> from stableopt.optim.agree import Alone
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> watch = Watch(model, optimizer, Alone, None, Enforcer(Policy(), model, optimizer))
        >>> watch.before(None, step=1, trial=False, due=frozenset({"vitals"})) is None
        True
        >>> optimizer.step()
        >>> watch.after()["weight_norm"] > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        processes: Processes,
        probe: Probe | None,
        enforcer: Enforcer,
        seed: int = 0,
    ) -> None:
        self.tiers = Tiers(model, optimizer, processes, probe, seed)
        self._model, self._optimizer, self._processes = model, optimizer, processes
        self._probe, self._enforcer = probe, enforcer
        self._step, self._compared, self._failures, self._distrust = 0, 0, 0, ""
        self._told: Any = None
        self._early: dict[str, Any] | None = None
        self._early_seconds = 0.0
        self.rates: tuple[float, ...] = ()
        self._forget()

    def seconds(self) -> float:
        """Return what was spent since the last call on what was told, and within the step of the optimizer."""
        spent, self._early_seconds = self._early_seconds, 0.0
        return spent + (0.0 if self._observation is None else self._observation.seconds)

    def tell(self, loss: object, *, sharpness: bool) -> None:
        """Take the loss of the step to come.

        Args:
            loss: one number; a tensor on another device is not read.
            sharpness: whether curvature is to be measured with its graph, if it has one and it is needed.

        Raises:
            ValueError: if it is not one number.
        """
        began = time.perf_counter()
        one = isinstance(loss, Tensor) and loss.numel() == 1
        if isinstance(loss, Tensor) and one and loss.device.type != "cpu":
            self._told = loss.detach().clone()
        else:
            self._told = as_loss(loss.detach() if isinstance(loss, Tensor) else loss)
        if (
            sharpness
            and self._probe is None
            and self._early is None
            and isinstance(loss, Tensor)
            and loss.grad_fn is not None
        ):
            with scaled(self._optimizer.param_groups, self._enforcer.factor):  # those of the step to come
                self._early = self.tiers.sharpness(None, loss)
        self._early_seconds += time.perf_counter() - began

    def before(self, closure: Closure | None, *, step: int, trial: bool, due: frozenset[str]) -> Closure | None:
        """Prepare to look at a step.

        Args:
            step: its number.
            closure: of the step.
            trial: whether the step got a ``trial``.
            due: the tiers that look at it.

        Returns:
            What the step is to evaluate instead of the closure, which is the same and tells the loss; None for the closure.
        """
        self._forget()
        optimizer, self._step = self._optimizer, step
        self.tiers.costs, self.due = {}, due
        self._report = optimizer.last_step if isinstance(optimizer, GuardedOptimizer) else None
        self.rates = tuple(_rate(group, wait=bool(due)) for group in optimizer.param_groups)
        self._by_guard = (trial or closure is not None) and _guards(optimizer)
        self._lazy = self._by_guard and optimizer.param_groups[0]["guard"] == "lazy"
        try:
            return self._prepared(closure)
        except Exception as error:  # whatever it is, the step is done as without a monitor
            self._failed = _sentence(error)
            return None

    def after(self) -> dict[str, Any]:
        """Return the fields of the record of the step."""
        optimizer, observation, costs = self._optimizer, self._observation, self.tiers.costs
        report = optimizer.last_step if isinstance(optimizer, GuardedOptimizer) else None
        seen = None if report is self._report else report
        if observation is not None:
            self._distrust, self.refused = observation.distrust, observation.refused
            if "energy" in costs:
                costs["energy"] += observation.seconds
        if self._early is not None:
            costs["sharpness"] = self._early_seconds
        facts = self._facts(seen, observation)
        self._early, self._told = None, None
        return facts

    def state_dict(self) -> dict[str, Any]:
        """Return what is carried from one step to the next."""
        return {"compared": self._compared, "distrust": self._distrust, "tiers": self.tiers.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.tiers.load_state_dict(state["tiers"])
        self._compared, self._distrust = state["compared"], state["distrust"]
        self._told, self._early = None, None

    def _prepared(self, closure: Closure | None) -> Closure | None:
        """Keep what a look after the step needs; return what is to be evaluated instead of the closure."""
        due, guards, start = self.due, self._by_guard, self.tiers.start
        if due & {"vitals", "energy"} and (self._lazy or not guards):
            with self.tiers.timed("vitals"):
                start.take(momentum="energy" in due)
                self._started = True
        refuse = self._enforcer.refuse if self._enforcer.skips else None
        if closure is None:
            start.grade()
            if refuse is not None:
                self.refused = refuse(self._told)
            return None
        compare = "energy" in due and not guards
        again = compare or (bool(due & {"sharpness", "forward"}) and self._probe is None)
        if guards and refuse is None and not again:
            return None
        with self.tiers.timed("energy") if again else nullcontext():
            self._observation = Observation(
                self._model,
                self._optimizer,
                closure,
                processes=self._processes,
                again=again,
                check=compare and self._compared < _CHECKED,
                distrust=self._distrust,
                refuse=refuse,
                failed=self._undo,
                graded=start.grade if self._started else None,
            )
        return self._observation.instead()

    def _undo(self) -> None:
        """Undo what was prepared for a step whose closure has raised."""
        self._enforcer.after(self._step, raised=True)

    def _facts(self, report: StepReport | None, observation: Observation | None) -> dict[str, Any]:
        """Return what is seen of a step; an error of an instrument is a note."""
        if self.refused:
            self._enforcer.after(self._step)  # nothing has moved, and gradients are there again
        facts: dict[str, Any] = {"lr": self.rates}
        try:
            facts |= self._look(report, observation) if self.due else self._glance(report, observation)
        except Exception as error:  # whatever it is, the run goes on as without a monitor
            self._failed = _sentence(error)
        if self._failed:
            facts["notes"] = (*facts.get("notes", ()), f"the monitor could not look: {self._failed}")
        if self.refused:
            facts["nonfinite"] = tuple(dict.fromkeys((*self.refused, *facts.get("nonfinite", ()))))
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
        due, tiers = self.due, self.tiers
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
        return trust_facts(loss, after, slope, facts.get("lr", self.rates), facts.get("tolerance", math.nan))

    def _told_loss(self) -> float | None:
        told, self._told = self._told, None
        return as_loss(told) if isinstance(told, Tensor) else told

    def _forget(self) -> None:
        self._report: StepReport | None = None
        self._observation: Observation | None = None
        self.due, self._failed = _NOTHING, ""
        self.refused: tuple[str, ...] = ()
        self._by_guard, self._lazy, self._started = False, False, False


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
