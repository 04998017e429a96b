"""What the guarded optimizers share: settings, prox with realised displacement, the guarded step, state dicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableopt.constraints import Constraint, Regularizer, attached, from_spec
from stableopt.constraints.reuse import project_tracked
from stableopt.optim.guard import Settings, guarded_step, scaled
from stableopt.optim.report import StepReport
from stableopt.optim.rules import UpdateRule, rule_for
from stableopt.optim.trial import as_loss

__all__ = ["GuardedOptimizer"]

_SETTINGS = ("guard", "max_shrinks", "shrink", "grow", "armijo")
_OWN = ("prox", "constraint", *_SETTINGS, "step_scale", "step_count")


class GuardedOptimizer(Optimizer):
    """What the guarded optimizers share; use :class:`SGD` or :class:`AdamW`.

    Attributes:
        last_step: the :class:`StepReport` of the last step, None before the first.
        rule: the :class:`UpdateRule` of the class.

    Examples:
        >>> from stableopt.optim import SGD
        >>> issubclass(SGD, GuardedOptimizer) and issubclass(SGD, torch.optim.SGD)
        True
    """

    rule: ClassVar[UpdateRule]
    torch_class: ClassVar[type[Optimizer]]
    last_step: StepReport | None = None
    _versions: dict[Tensor, int]

    def set_up(self, own: dict[str, Any]) -> None:
        """Keep our settings for the groups that torch's constructor is about to add."""
        Settings(**{k: own[k] for k in _SETTINGS})
        self._own = own | {"step_scale": 1.0, "step_count": 0}
        self._versions = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; ``prox=`` and ``constraint=`` belong to the group.

        Args:
            param_group: ``{"params": ..., "lr": ..., "prox": ..., ...}``.

        Raises:
            TypeError: if a parameter is not floating, or a regularizer is none.
            ValueError: if a value is out of range, both ``prox`` and ``constraint`` are given, a parameter was constrained to
                another set, or the group brings its own settings of the guard, which belong to the whole optimizer.
        """
        own = self.__dict__.get("_own") or {k: self.defaults[k] for k in _OWN}
        given = dict(param_group)
        if "prox" in given or "constraint" in given:  # a group's own regularizer replaces the default of either kind
            own = own | {"prox": None, "constraint": None}
        if self.param_groups:
            own = own | {k: self.param_groups[0][k] for k in _OWN[2:]}
        for key in _SETTINGS:
            if given.get(key, own[key]) != own[key]:
                raise ValueError(
                    f"{key} belongs to the whole optimizer, which has {own[key]!r}; a group asks for {given[key]!r}."
                )
        super().add_param_group(own | given)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        prox, constraint = group["prox"], group["constraint"]
        if prox is not None and constraint is not None:
            raise ValueError(
                f"a group takes prox= or constraint=, got both ({prox!r}, {constraint!r}): "
                "the prox of a sum is not the one after the other."
            )
        if prox is not None and not isinstance(prox, Regularizer):
            raise TypeError(f"prox must be a Regularizer such as stableopt.constraints.L1(0.1), got {prox!r}.")
        if constraint is not None and not isinstance(constraint, Constraint):
            raise TypeError(
                f"constraint must be a Constraint such as stableopt.constraints.Box(0, 1), got {constraint!r}; "
                "a penalty goes to prox=."
            )
        if isinstance(prox, Constraint):
            group["prox"], group["constraint"] = None, prox
        check_lr(group["lr"])
        decay = float(group["weight_decay"])
        if not (math.isfinite(decay) and decay >= 0):
            raise ValueError(f"weight_decay must be a finite number >= 0, got {decay!r}.")
        for p in group["params"]:
            if not (p.dtype.is_floating_point or p.dtype.is_complex):
                raise TypeError(
                    f"an optimizer needs floating parameters, got one of dtype {p.dtype} and shape {tuple(p.shape)}."
                )
            tied = attached(p)
            if tied is not None and tied != group["constraint"]:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} was constrained to {tied!r}, but its group has "
                    f"constraint={group['constraint']!r}: pass stableopt.parameter_groups(model) to the optimizer."
                )
        if any(g["maximize"] != group["maximize"] for g in self.param_groups) and group["guard"] != "off":
            raise ValueError(
                "all groups must maximize or all minimize: otherwise they have no common energy; use guard='off'."
            )
        if group["differentiable"] and (group["guard"] != "off" or group["prox"] or group["constraint"]):
            raise ValueError(
                "differentiable=True is torch's step alone: use it with guard='off' and without prox or constraint."
            )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step: torch's, then prox or projection, then the check of the guard.

        Args:
            closure: as torch asks for it: zero the gradients, evaluate, call ``backward``, return the loss. Without one the step
                cannot be checked: it is torch's step with prox or projection, and the report says ``unobserved``.

        Returns:
            What the closure returned, None without one.

        Raises:
            ValueError: if the closure does not return one real number or None, or a learning rate has become invalid.
        """
        for group in self.param_groups:
            check_lr(group["lr"])
        first = self.param_groups[0]
        settings = Settings(*(first[k] for k in _SETTINGS))
        outside = self._enter()
        try:
            with torch.no_grad():
                if closure is not None and settings.guard != "off":
                    value, report = guarded_step(self, closure, settings)
                else:
                    value, report = self._unguarded_step(closure)
        except BaseException:
            with torch.no_grad():
                for p, kept in outside:
                    p.copy_(kept)
            raise
        if outside:
            report = replace(
                report, reason=f"{report.reason}; parameters that were outside their sets had been projected before"
            )
        self._versions = {p: p._version for p, _ in self._constrained()}  # noqa: SLF001 - the documented way to see a change in place
        self.last_step = report
        first["step_count"] += 1
        return value

    def _unguarded_step(self, closure: Callable[[], Any] | None) -> tuple[Any, StepReport]:
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        self.advance()
        off = self.param_groups[0]["guard"] == "off"
        reason = "guard='off'" if off else "the guard needs a closure: step(closure); nothing was checked"
        lr = tuple(g["lr"] if not isinstance(g["lr"], Tensor) else math.nan for g in self.param_groups)
        return value, StepReport.unobserved(step=self.count, lr=lr, reason=reason)

    @torch.no_grad()
    def _enter(self) -> list[tuple[Tensor, Tensor]]:
        """Project what lies outside its set, before anything is evaluated; return what was moved, with its old value.

        Otherwise the way into the set would count as displacement, and momentum would carry on with it: from a norm of 10 into a
        ball of radius 1 and, in the next step, out on the other side. What nobody has changed since our last step is inside.
        """
        moved: list[tuple[Tensor, Tensor]] = []
        for p, constraint in self._constrained():
            if self._versions.get(p) == p._version or not p.requires_grad:  # noqa: SLF001
                continue
            inside = constraint.project(p.detach())
            if not torch.equal(inside, p):
                moved.append((p, p.detach().clone()))
                p.copy_(inside)
        return moved

    def _constrained(self) -> Iterator[tuple[Tensor, Constraint]]:
        for group in self.param_groups:
            if group["constraint"] is not None:
                for p in group["params"]:
                    yield p, group["constraint"]

    @torch.no_grad()
    def advance(self) -> None:
        """Do torch's own step, then prox or projection with the momentum set to the realised displacement; check nothing."""
        regularized = [
            (p, group, regularizer, self.rule.buffer(self.state.get(p, {})) is None)
            for group in self.param_groups
            if (regularizer := group["prox"] or group["constraint"]) is not None
            for p in group["params"]
            if p.grad is not None
        ]
        step = self.torch_class.step
        # torch wraps the step of a class when its first instance is made; the hooks of this step have run already.
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # type: ignore[attr-defined]
        step(self)
        for p, group, regularizer, first in regularized:
            self._regularize(p, group, regularizer, first=first)

    def _regularize(self, p: Tensor, group: dict[str, Any], regularizer: Regularizer, *, first: bool) -> None:
        state = self.state.get(p, {})
        metric = self.rule.metric(state, group)
        eta = self.rule.effective_lr(group, first=first)
        step = eta / metric if isinstance(metric, Tensor) and regularizer.diagonal else eta
        reached = p.detach().clone()
        if isinstance(regularizer, Constraint) and not isinstance(step, Tensor):
            p.copy_(project_tracked(regularizer, p, reached))
        else:
            p.copy_(regularizer.prox(reached, step))
        if self.rule.momentum(group):
            self.rule.realign(reached - p, state, metric, group)

    @contextmanager
    def scaled_learning_rates(self, scale: float) -> Iterator[None]:
        """Multiply all learning rates inside the context."""
        with scaled(self.param_groups, scale):
            yield

    def learning_rates(self) -> tuple[float, ...]:
        """Return the learning rate of each group as a float."""
        return tuple(float(group["lr"]) for group in self.param_groups)

    @property
    def count(self) -> int:
        """How many steps have been done over the life of the optimizer."""
        return self.param_groups[0]["step_count"]

    @property
    def sign(self) -> float:
        """-1 if the optimizer maximizes: the energy is then that of the negative loss."""
        return -1.0 if self.param_groups[0]["maximize"] else 1.0

    @staticmethod
    def loss_of(value: Any) -> float:
        """Return the loss that a closure gave as a float.

        Raises:
            ValueError: if it is not one real number.
        """
        return as_loss(value.detach() if isinstance(value, Tensor) else value)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; our settings are in the groups, regularizers as plain data."""
        state = super().state_dict()
        for group in state["param_groups"]:
            for key in ("prox", "constraint"):
                group[key] = None if group[key] is None else group[key].spec()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours or of torch's class; what the latter lacks stays as it is.

        Args:
            state_dict: as returned by :meth:`state_dict`.

        Raises:
            ValueError: if the groups do not match, or a regularizer is unknown.
        """
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):
            saved = [
                {k: mine[k] for k in _OWN} | _decoded(group)
                for mine, group in zip(self.param_groups, saved, strict=True)
            ]
        super().load_state_dict(state_dict | {"param_groups": saved})
        self.last_step = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in what older states and torch's own lack; the report of the last step is not kept."""
        self._versions = {}
        super().__setstate__(state)
        fallback = {"prox": None, "constraint": None, **Settings().__dict__, "step_scale": 1.0, "step_count": 0}
        for group in self.param_groups:
            for key in _OWN:
                group.setdefault(key, self.defaults.get(key, fallback[key]))


@rule_for.register
def _(optimizer: GuardedOptimizer) -> UpdateRule | None:
    return optimizer.rule


def check_lr(lr: object) -> None:
    """Refuse what is no learning rate; a number on another device is not read, which would wait for it.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative, NaN, infinite, or a tensor with several elements.

    Examples:
        >>> check_lr(float("nan"))
        Traceback (most recent call last):
        ValueError: lr must be a finite number >= 0, got nan.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"a tensor lr must have one element, got shape {tuple(lr.shape)}.")
        if lr.device.type != "cpu":
            return
        lr = lr.item()
    if isinstance(lr, bool) or not isinstance(lr, int | float):
        raise TypeError(f"lr must be a number, got {lr!r} ({type(lr).__name__}).")
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be a finite number >= 0, got {lr!r}.")


def _decoded(group: dict[str, Any]) -> dict[str, Any]:
    specs = {key: group[key] for key in ("prox", "constraint") if isinstance(group.get(key), dict)}
    return group | {key: from_spec(spec) for key, spec in specs.items()}
