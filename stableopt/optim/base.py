"""What the guarded optimizers share: groups with settings and regularizers, the step, copies and state dicts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableopt.constraints import Constraint
from stableopt.errors import StabilityError
from stableopt.optim.agree import GroupChoice, Processes
from stableopt.optim.callers import check_callables, level_outside, refuse_closure_of_scaler
from stableopt.optim.compiled import traced_step
from stableopt.optim.groups import (
    COUNTERS,
    DEFAULTS,
    PER_GROUP,
    SETTINGS,
    check_group,
    check_rate,
    encode_groups,
    filled,
    refuse_foreign,
)
from stableopt.optim.ladder import guarded_step, unguarded_step
from stableopt.optim.lazy import Pending, lazy_step
from stableopt.optim.regularize import regularize_all, regularized
from stableopt.optim.report import StepReport
from stableopt.optim.rules import UpdateRule, rule_for
from stableopt.optim.rules.unknown import Unknown
from stableopt.optim.scaling import scaled
from stableopt.optim.settings import Settings
from stableopt.optim.snapshot import Snapshot, stamp
from stableopt.optim.trial import as_loss

__all__ = ["GuardedOptimizer"]

_RUNTIME = ("last_step", "_versions", "_memory", "_pending", "_process_group", "_warned")
"""What a copy begins anew."""


class GuardedOptimizer(Optimizer):
    """What the guarded optimizers share; use :class:`SGD`, :class:`AdamW` and their like, or :func:`guard`.

    Attributes:
        last_step: the :class:`StepReport` of the last step, None before the first.
        rule: the :class:`UpdateRule` of the class.

    Examples:
        >>> from stableopt.optim import SGD
        >>> issubclass(SGD, GuardedOptimizer) and issubclass(SGD, torch.optim.SGD)
        True
    """

    rule: UpdateRule
    torch_class: ClassVar[type[Optimizer]]
    needs_closure: ClassVar[bool] = False
    """Whether the step of the class evaluates the closure itself, as that of LBFGS does."""
    last_step: StepReport | None = None
    _process_group: GroupChoice = "auto"
    _versions: dict[Tensor, tuple[Any, Constraint]]
    _memory: Snapshot | None = None
    _pending: Pending | None = None
    _warned: frozenset[str] = frozenset()

    @contextmanager
    def set_up(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Keep our settings for the groups that the constructor of torch's class adds inside the context.

        Raises:
            TypeError: if a setting is unknown or has the wrong type.
            ValueError: if a setting is out of range.
        """
        unknown = sorted(set(settings) - {*PER_GROUP, *SETTINGS})
        if unknown:
            known = ", ".join((*PER_GROUP, *SETTINGS))
            raise TypeError(f"{type(self).__name__} got unknown settings {unknown}; beside torch's it takes {known}.")
        own = DEFAULTS | dict(settings)
        Settings.of(own)
        self._own = own
        self._versions, self.last_step = {}, None
        yield
        self.defaults |= self.__dict__.pop("_own")
        if isinstance(self.defaults["constraint"], list | tuple):  # one entry per parameter of the groups so far
            self.defaults["constraint"] = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether gradients may come scaled: only if the step is torch's alone; else GradScaler unscales them before it calls."""
        plain = all(g["guard"] == "off" and g["prox"] is None and g["constraint"] is None for g in self.param_groups)
        return plain and bool(self.__dict__.get("_supports_amp_scaling", False))

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_supports_amp_scaling"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; ``prox=``, ``constraint=`` and ``smoothness=`` belong to the group.

        Args:
            param_group: ``{"params": ..., "lr": ..., "prox": ..., ...}``.

        Raises:
            TypeError: if a parameter is not floating, or a regularizer is none.
            ValueError: if a value is out of range, both ``prox`` and ``constraint`` are given, a parameter was constrained to
                another set, or the group brings its own settings of the guard, which belong to the whole optimizer.
        """
        own = self.__dict__.get("_own") or {k: self.defaults[k] for k in DEFAULTS}
        given = dict(param_group)
        if "prox" in given or "constraint" in given:  # a group's own regularizer replaces the default of either kind
            own = own | {"prox": None, "constraint": None}
        if self.param_groups:
            own = own | {k: self.param_groups[0][k] for k in (*SETTINGS, *COUNTERS)}
        for key in SETTINGS:
            if given.get(key, own[key]) != own[key]:
                raise ValueError(
                    f"{key} belongs to the whole optimizer, which has {own[key]!r}; a group asks for {given[key]!r}."
                )
        super().add_param_group(own | given)
        try:
            self.check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def check_group(self, group: dict[str, Any], others: Sequence[dict[str, Any]] | None = None) -> None:
        """Refuse a group that makes no sense; take over the sets to which its parameters are attached.

        Args:
            group: with its parameters.
            others: the groups beside it, by default those of the optimizer.

        Raises:
            TypeError: as :meth:`add_param_group`.
            ValueError: as :meth:`add_param_group`.
        """
        check_group(self, group, self.param_groups if others is None else others)

    @overload
    def step(
        self, closure: None = None, *, trial: Callable[[], Any] | None = None, loss: Tensor | float | None = None
    ) -> None: ...
    @overload
    def step(
        self, closure: Callable[[], Any], *, trial: Callable[[], Any] | None = None, loss: Tensor | float | None = None
    ) -> Any: ...
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        trial: Callable[[], Any] | None = None,
        loss: Tensor | float | None = None,
    ) -> Any:
        """Do one step: torch's, then prox or projection, then the check of the guard.

        Args:
            closure: as torch asks for it: zero the gradients, evaluate, call ``backward``, return the loss.
            trial: returns the loss of the same batch (with gradient accumulation: of all its parts, averaged as the gradients
                were) at the current parameters, forward only. With it the guard works without a closure, so also under
                ``torch.amp.GradScaler``: ``scaler.step(optimizer, trial=...)``. With a closure, it replaces its second evaluation.
            loss: the loss at the current parameters, where gradients are there already: spares one evaluation of ``trial``, if
                nothing in the model is random. Without ``trial`` it is only looked at for NaN and infinity.

        Returns:
            What the closure returned, None without one.

        Note:
            Without closure and trial no energy is checked. What is guaranteed then: a step whose gradients (or given loss) are
            not finite is skipped, parameters end in their sets, and learning rates keep the scale that earlier checks have
            found. The report says ``unobserved``.

        Raises:
            TypeError: if ``closure`` or ``trial`` cannot be called.
            ValueError: if they do not return one real number (a closure may return None), or a learning rate has become invalid.
            RuntimeError: if ``torch.amp.GradScaler`` passes a closure, whose gradients it would not unscale.
            StabilityError: if lr is above the limit that ``smoothness`` gives, or with ``on_nonfinite="raise"`` something is not
                finite.
        """
        if torch.compiler.is_compiling() and self.param_groups[0]["guard"] == "off":
            return self._compiled_step(closure)
        return self._do_step(closure, trial, loss)

    def _do_step(
        self, closure: Callable[[], Any] | None, trial: Callable[[], Any] | None, loss: Tensor | float | None
    ) -> Any:
        first = self.param_groups[0]
        settings = Settings.of(first)
        check_callables(closure, trial)
        if closure is not None:
            refuse_closure_of_scaler()
        factor = self._rate_factor(settings)
        outside = self._enter()
        try:
            with torch.no_grad(), self.scaled_learning_rates(factor) if factor != 1.0 else nullcontext():
                value, report = self._judged(settings, closure, trial, loss)
        except BaseException:
            with torch.no_grad():
                for p, kept in outside:
                    p.copy_(kept)
            raise
        if outside:
            report = replace(
                report, reason=f"{report.reason}; parameters that were outside their sets had been projected before"
            )
        self._versions = {
            p: (stamp(p), c)
            for p, _, c in regularized(self.param_groups)
            if isinstance(c, Constraint) and p.requires_grad
        }
        self.last_step = report
        if closure is not None or trial is not None or not self._at_rest():
            first["step_count"] += 1
        if report.verdict == "nonfinite" and report.action == "undone":
            first["skipped"] += 1
            if settings.on_nonfinite == "raise":
                raise StabilityError(
                    f"step {report.step}: {report.reason}; on_nonfinite='skip' goes on without the step."
                )
        return value

    def _judged(
        self,
        settings: Settings,
        closure: Callable[[], Any] | None,
        trial: Callable[[], Any] | None,
        loss: Tensor | float | None,
    ) -> tuple[Any, StepReport]:
        if settings.guard == "lazy" and closure is not None:
            return lazy_step(self, settings, closure)
        self.drop_pending()  # what has waited for a verdict is not what the next loss will be of
        if settings.guard == "off" or (closure is None and trial is None):
            return unguarded_step(self, settings, closure, loss)
        return guarded_step(self, settings, closure, trial, loss)

    def _compiled_step(self, closure: Callable[[], Any] | None) -> Any:
        """Do what a compiler can trace: torch's step with prox or projection, without guard and report."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if not traced_step(self):
            self.advance()
        return value

    def _rate_factor(self, settings: Settings) -> float:
        """Check all learning rates; return by what they are too large, as a factor of at most 1, if they are to be clipped."""
        factor = 1.0
        for i, group in enumerate(self.param_groups):
            check_rate(self, group)
            if group["smoothness"] is None:
                continue
            lr, limit = float(group["lr"]), self.rule.energy_limit(group["smoothness"], group)
            if lr <= limit:
                continue
            what = (
                f"lr {lr:.6g} of group {i} exceeds {limit:.6g}, the largest one for which the energy of "
                f"{type(self.rule).__name__} provably "
                f"falls with smoothness {group['smoothness']:.6g}"
            )
            if settings.over_limit == "raise":
                raise StabilityError(f"{what}; lower it, or use over_limit='clip' or 'warn'.")
            if settings.over_limit == "clip":
                factor = min(factor, limit / lr)
            else:
                self.warn_once("limit", f"{what}; the guard checks the energy all the same.")
        return factor

    def warn_once(self, topic: str, message: str) -> None:
        """Warn, but of the same topic only once in the life of this object."""
        if topic not in self._warned:
            self._warned = self._warned | {topic}
            warnings.warn(message, stacklevel=level_outside())

    @torch.no_grad()
    def project_(self) -> None:
        """Project every parameter that lies outside its set onto it, now; each step does so as well before anything is evaluated.

        For parameters that somebody else has moved: a checkpoint, ``model.to(torch.bfloat16)``, an average of weights.

        Examples:
            >>> from stableopt.constraints import NonNegative
            >>> from stableopt.optim import SGD
            >>> w = torch.nn.Parameter(torch.tensor([-1.0]))
            >>> SGD([w], lr=0.1, constraint=NonNegative()).project_()
            >>> w.item()
            0.0
        """
        self._enter()

    @torch.no_grad()
    def _enter(self) -> list[tuple[Tensor, Tensor]]:
        """Project what lies outside its set, before anything is evaluated; return what was moved, with its old value.

        Otherwise the way into the set would count as displacement, and momentum would carry on with it: from a norm of 10 into a
        ball of radius 1 and, in the next step, out on the other side. What nobody has changed since our last step is inside.
        """
        moved: list[tuple[Tensor, Tensor]] = []
        for p, _, constraint in regularized(self.param_groups):
            if not isinstance(constraint, Constraint) or not p.requires_grad:
                continue
            if self._versions.get(p) == (stamp(p), constraint):
                continue
            inside = constraint.project(p.detach())
            if inside is not p and not torch.equal(inside, p):
                moved.append((p, p.detach().clone()))
                p.copy_(inside)
        self._versions = {}  # until the step has ended in the sets
        return moved

    @torch.no_grad()
    def advance(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do torch's own step, then prox or projection with the momentum set to the realised displacement; check nothing.

        Args:
            closure: for a step that evaluates it itself.

        Returns:
            What torch's step returns.
        """
        rule = self.rule
        todo = [
            (p, group, regularizer, rule.buffer(self.state.get(p, {})) is None)
            for p, group, regularizer in regularized(self.param_groups)
            if p.grad is not None
        ]
        step = cast("Any", self.torch_class.step)
        # torch wraps the step of a class when its first instance is made; the hooks of this step have run already.
        while getattr(step, "hooked", False):  # the compiler may have wrapped it once more
            step = step.__wrapped__
        value = step(self, closure) if self.needs_closure else step(self)
        if todo:
            regularize_all(rule, todo, self.state)  # pyright: ignore[reportCallIssue] - its decorator has no types
        return value

    @contextmanager
    def scaled_learning_rates(self, scale: float) -> Iterator[None]:
        """Multiply all learning rates inside the context."""
        with scaled(self.param_groups, scale):
            yield

    def learning_rates(self) -> tuple[float, ...]:
        """Return the learning rate of each group as a float."""
        return tuple(float(group.get("lr", math.nan)) for group in self.param_groups)

    def decide_with(self, group: GroupChoice = "auto") -> None:
        """Say which processes train the model together: energies are summed over them, so that all take the same step.

        Args:
            group: ``"auto"`` (all processes, where ``torch.distributed`` is set up), a process group, or None for this process
                alone.

        Examples:
            >>> from stableopt.optim import SGD
            >>> SGD([torch.nn.Parameter(torch.ones(1))]).decide_with(None)
        """
        self._process_group = group

    def processes(self) -> Processes:
        """Return the processes with which this optimizer decides."""
        device = next((p.device for g in self.param_groups for p in g["params"]), torch.device("cpu"))
        return Processes.of(self._process_group, device)

    def snapshot(self) -> Snapshot:
        """Return a snapshot of now, in the memory of the last one."""
        gradients = self.param_groups[0]["guard"] == "lazy" or not self.contained
        if self._memory is None or self._memory.with_gradients != gradients:
            self._memory = Snapshot(self, everything=not self.contained, gradients=gradients)
        else:
            self._memory.take()
        return self._memory

    def before_step(self) -> Mapping[Tensor, Tensor]:
        """Return the parameters before the last step, where the guard has kept them to compare; empty where it has not.

        Returns:
            Parameter -> its values before; to be read until the next step, not to be changed.

        Examples:
            >>> from stableopt.optim import SGD
            >>> w = torch.nn.Parameter(torch.tensor([2.0]))
            >>> optimizer = SGD([w], lr=0.1)
            >>> def closure():
            ...     optimizer.zero_grad()
            ...     loss = w.square().sum()
            ...     loss.backward()
            ...     return loss
            >>> _ = optimizer.step(closure)
            >>> optimizer.before_step()[w]
            tensor([2.])
        """
        report, guard = self.last_step, self.param_groups[0]["guard"]
        compared = report is not None and not math.isnan(report.energy_after) and guard != "lazy"
        return self._memory.values if self._memory is not None and compared else {}

    def _at_rest(self) -> bool:
        """Whether all learning rates are 0, as torch.distributed.checkpoint sets them to have the state made: that is no step."""
        rates = [group.get("lr") for group in self.param_groups]
        return all(not (isinstance(lr, Tensor) and lr.device.type != "cpu") and lr == 0 for lr in rates)

    @property
    def pending(self) -> Pending | None:
        """The step that waits for its verdict (``guard="lazy"``)."""
        return self._pending

    @pending.setter
    def pending(self, value: Pending | None) -> None:
        """Let a step wait."""
        self._pending = value

    def drop_pending(self) -> None:
        """Forget the step that waits for its verdict: it stays as it is."""
        self._pending = None

    @torch.no_grad()
    def descend(self) -> None:
        """Do a plain gradient step with projection, whatever the optimizer: what remains if its own step cannot be trusted."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-self.sign * float(group.get("lr", 0.0)))
        self._enter()

    @property
    def known(self) -> bool:
        """Whether a rule is known, so that setting the momentum to zero leaves a step that goes downhill."""
        return not isinstance(self.rule, Unknown)

    @property
    def contained(self) -> bool:
        """Whether the step is one of torch's, which changes nothing but parameters with a gradient and their state."""
        return self.torch_class.__module__.startswith(("torch.optim", "stableopt.optim")) and not self.needs_closure

    @property
    def count(self) -> int:
        """How many steps have been done over the life of the optimizer."""
        return self.param_groups[0]["step_count"]

    @property
    def sign(self) -> float:
        """-1 if the optimizer maximizes: the energy is then that of the negative loss."""
        return -1.0 if self.param_groups[0].get("maximize") else 1.0

    @staticmethod
    def loss_of(value: Any) -> float:
        """Return the loss that a closure gave as a float.

        Raises:
            ValueError: if it is not one real number.
        """
        return as_loss(value.detach() if isinstance(value, Tensor) else value)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; our settings are in the groups, regularizers as plain data."""
        handle = self.register_state_dict_post_hook(encode_groups, prepend=True)  # before those of the user see it
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours or of torch's class; what the latter lacks stays as it is. Parameters enter their sets.

        Args:
            state_dict: as returned by :meth:`state_dict`.

        Raises:
            ValueError: if the groups do not match or lack hyper-parameters, as those of another optimizer do, or a regularizer is
                unknown; nothing has changed then.
        """
        super().load_state_dict(state_dict)
        self.project_()

    def __getstate__(self) -> dict[str, Any]:
        """Keep what torch keeps and, of other attributes, what the class behind has set; the last report is not kept."""
        state = super().__getstate__()
        if self._process_group is None:  # a process group is no data; to decide alone is
            state["_process_group"] = None
        if not self.contained:
            kept = {
                k: v
                for k, v in vars(self).items()
                if k not in _RUNTIME and not k.startswith(("_optimizer_", "_zero_grad_profile")) and k != "step"
            }
            state = kept | state
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, from a copy or a checkpoint, and fill in what older ones and torch's own lack."""
        before = self.__dict__.get("param_groups")
        groups = [
            filled(group, before[i] if before is not None and i < len(before) else self.__dict__.get("defaults", {}))
            for i, group in enumerate(state["param_groups"])
        ]
        if before is not None:
            refuse_foreign(self, groups)
            for group in groups:
                self.check_group(group, groups)
        self._versions, self._memory = {}, None
        super().__setstate__(state | {"param_groups": groups})
        self.defaults = DEFAULTS | self.defaults
        self.last_step, self._pending = None, None


# What a compiler must not trace: the guard decides by numbers, and regularizers are applied in pieces.
setattr(GuardedOptimizer, "_do_step", torch.compiler.disable(GuardedOptimizer._do_step))  # noqa: B010, SLF001


@rule_for.register
def _(optimizer: GuardedOptimizer) -> UpdateRule | None:
    return optimizer.rule
