"""What the guard is told: the settings that all guarded optimizers share, and the checks of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, TypedDict

from torch import Tensor

from stableopt.constraints import Constraint, Regularizer

__all__ = ["GuardMode", "GuardSettings", "Settings", "check_lr", "check_number"]

GuardMode: TypeAlias = Literal["off", "monitor", "lazy", "backtrack", "strict"]

_MODES = ("off", "monitor", "lazy", "backtrack", "strict")
_CHOICES = {"guard": _MODES, "on_nonfinite": ("skip", "raise"), "over_limit": ("raise", "clip", "warn")}


class GuardSettings(TypedDict, total=False):
    r"""The keyword arguments that every optimizer of the package takes beside torch's.

    Attributes:
        prox: a :class:`stableopt.constraints.Regularizer` g, per group, treated by its proximal operator in the metric of the step.
        constraint: a :class:`stableopt.constraints.Constraint`, per group, or a list with one of them or None for each parameter
            of the group. Parameters that :func:`stableopt.constrain` has attached to a set are taken as constrained to it.
        smoothness: L of the loss in the metric of the step, per group, if it is known: lr is then checked in each step against the
            largest one for which the energy provably falls.
        guard: ``off`` (torch's step), ``monitor`` (check and report), ``lazy`` (judge a step by the loss of the next closure: full
            batch or a fixed batch only), ``backtrack`` (shrink until the energy falls; keep the smallest try if none does),
            ``strict`` (undo it then).
        every: check every k-th step only; the steps between use the scale that the last check has found.
        max_shrinks: how often all learning rates may shrink within one step.
        shrink: the factor of each shrinking, in (0, 1).
        grow: the factor on the last scale with which each checked step begins, at least 1; the scale is never above 1.
        armijo: c in [0, 1), the part of the predicted decrease :math:`\sum (1-\beta)/\eta' \|d\|_P^2` that is asked for:
            learning rates up to :math:`2(1-\beta)(1-c)/L` pass.
        on_nonfinite: what to do if the loss or a gradient is not finite: ``skip`` the step (counted in
            ``param_groups[0]["skipped"]``), or ``raise`` a :class:`stableopt.errors.StabilityError`; parameters and state stay
            as they are either way.
        over_limit: what to do with an lr above the limit that ``smoothness`` gives: ``raise``, ``clip`` (in the step only) or
            ``warn``.
        debug: look for closures that cannot be compared with themselves: evaluate each one twice at the same point, and warn once.

    Examples:
        >>> settings: GuardSettings = {"guard": "strict", "every": 10}
        >>> sorted(settings)
        ['every', 'guard']
    """

    prox: Regularizer | None
    constraint: Constraint | Sequence[Constraint | None] | None
    smoothness: float | None
    guard: GuardMode
    every: int
    max_shrinks: int
    shrink: float
    grow: float
    armijo: float
    on_nonfinite: Literal["skip", "raise"]
    over_limit: Literal["raise", "clip", "warn"]
    debug: bool


@dataclass(frozen=True)
class Settings:
    """How the guard acts, the same for all groups; what :class:`GuardSettings` describes, without what belongs to a group.

    Raises:
        ValueError: if a value is unknown or out of range.
        TypeError: if a value has the wrong type.

    Examples:
        >>> Settings(guard="never")
        Traceback (most recent call last):
        ValueError: guard must be one of off, monitor, lazy, backtrack, strict, got 'never'.
    """

    guard: str = "backtrack"
    every: int = 1
    max_shrinks: int = 10
    shrink: float = 0.5
    grow: float = 1.02
    armijo: float = 0.25
    on_nonfinite: str = "skip"
    over_limit: str = "raise"
    debug: bool = False

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name, least in (("every", 1), ("max_shrinks", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")
        for name, least, most in (("shrink", 0.0, 1.0), ("grow", 1.0, math.inf), ("armijo", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}.")
            if not least <= value < most or (name == "shrink" and value == 0.0):
                raise ValueError(f"{name} must lie between {least:g} and {most:g}, got {value!r}.")
        if not isinstance(self.debug, bool):
            raise TypeError(f"debug must be True or False, got {self.debug!r}.")
        if self.guard == "lazy" and self.every != 1:
            raise ValueError(f"guard='lazy' judges each step by the next loss: every must be 1, got {self.every!r}.")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the settings, in order.

        Examples:
            >>> Settings.names()[:2]
            ('guard', 'every')
        """
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Settings:
        """Return the settings that a parameter group carries.

        Examples:
            >>> Settings.of(vars(Settings(every=3))).every
            3
        """
        return cls(*(group[name] for name in cls.names()))


def check_lr(lr: object) -> None:
    """Refuse what is no learning rate; a number on another device is not read, which would wait for it.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative, NaN, infinite, or a tensor with several elements.

    Examples:
        >>> check_lr(float("nan"))
        Traceback (most recent call last):
        ValueError: Invalid learning rate: nan: lr must be a finite number >= 0, got nan.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}.")
        if lr.device.type != "cpu":
            return
        lr = lr.item()
    try:
        check_number("lr", lr)
    except ValueError as error:
        raise ValueError(f"Invalid learning rate: {lr}: {error}") from None


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf) -> None:
    """Refuse what is not a finite number in [low, high).

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range or not finite.

    Examples:
        >>> check_number("momentum", 1.0, high=1.0)
        Traceback (most recent call last):
        ValueError: momentum must be a finite number >= 0 and < 1, got 1.0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
    if not (math.isfinite(value) and low <= value < high):
        below = f" and < {high:g}" if high < math.inf else ""
        raise ValueError(f"{name} must be a finite number >= {low:g}{below}, got {value!r}.")
