"""Guard any other torch optimizer."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar, Unpack, cast, overload

from torch.optim import Optimizer

from stableopt.optim import family
from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.groups import closure_is_required, filled
from stableopt.optim.rules import UpdateRule, rule_for
from stableopt.optim.rules.unknown import Unknown
from stableopt.optim.settings import GuardSettings, check_lr

__all__ = ["guard"]

_OptimizerT = TypeVar("_OptimizerT", bound=Optimizer)
_FAMILY: dict[type[Optimizer], type[GuardedOptimizer]] = {
    cls.torch_class: cls for cls in (getattr(family, name) for name in family.__all__)
}


@overload
def guard(optimizer: type[_OptimizerT]) -> type[_OptimizerT]: ...
@overload
def guard(optimizer: Optimizer, **settings: Unpack[GuardSettings]) -> GuardedOptimizer: ...
def guard(optimizer: Any, **settings: Any) -> Any:
    """Return a guarded form of any torch optimizer, or of its class.

    Args:
        optimizer: an instance, or a class. A guarded instance shares parameter groups and state with the one given, which must
            not step any more. A guarded class is a subclass of the one given; its constructor takes the settings beside the
            arguments of that.
        **settings: for an instance: see :class:`GuardSettings`; prox, constraint and smoothness hold for all groups.

    Returns:
        For SGD, Adam, AdamW, NAdam, RAdam and RMSprop of torch, the class of this package; for any other a subclass that
        is judged by the loss alone (:class:`stableopt.optim.rules.unknown.Unknown`), or by the rule registered for it with
        :func:`stableopt.optim.rule_for`.

    Raises:
        TypeError: if it is no optimizer or optimizer class, or settings are given for a class.
        ValueError: if a setting is out of range, the optimizer is guarded already, something has replaced its ``step`` (a learning
            rate scheduler does: make it after guarding), or groups or constructor use a name of a setting for something else.

    Note:
        A step of an optimizer of which nothing is known is undone by putting back all parameters and gradients, all of its
        state, and the numbers and tensors in its groups and among its attributes. One whose step needs the closure (LBFGS)
        evaluates it itself; the guard adds one evaluation
        before and one after it.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = guard(torch.optim.Adagrad([w], lr=1e4), guard="strict")
        >>> isinstance(optimizer, torch.optim.Adagrad), isinstance(optimizer, GuardedOptimizer)
        (True, True)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(30):
        ...     _ = optimizer.step(closure)
        >>> abs(w.item()) < 3.0
        True
        >>> guard(torch.optim.AdamW)
        <class 'stableopt.optim.family.adam.AdamW'>
    """
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        if settings:
            raise TypeError(
                f"guard({optimizer.__name__}) takes no settings: give them to the class that it returns, got {sorted(settings)}."
            )
        _refuse_same_names(optimizer)
        return guarded_class(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"guard needs a torch.optim.Optimizer or a class of such, got {optimizer!r}.")
    if isinstance(optimizer, GuardedOptimizer):
        raise ValueError(  # noqa: TRY004 - its type is right
            f"this {type(optimizer).__name__} is guarded already; change its param_groups instead."
        )
    if "step" in vars(optimizer):
        raise ValueError(
            "the step of this optimizer has been replaced, as a learning rate scheduler does: guard it first, then make the "
            "scheduler for what guard returns."
        )
    return _take_over(optimizer, settings)


@functools.cache
def guarded_class(base: type[Optimizer]) -> type[GuardedOptimizer]:
    """Return the guarded class of an optimizer class: the same object for the same class.

    Examples:
        >>> import torch
        >>> guarded_class(torch.optim.Adamax) is guarded_class(torch.optim.Adamax)
        True
    """
    if issubclass(base, GuardedOptimizer):
        return base
    if base in _FAMILY:
        return _FAMILY[base]

    def construct(self: GuardedOptimizer, *args: Any, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in GuardSettings.__annotations__ if name in kwargs}
        _check_rate(base, args, kwargs)
        with self.set_up(own):
            base.__init__(self, *args, **kwargs)

    def reduce(self: GuardedOptimizer) -> tuple[Any, ...]:
        return _rebuilt, (base,), self.__getstate__()

    body = {
        "__init__": construct,
        "__reduce__": reduce,
        "__doc__": f"{base.__name__} under the guard; made by stableopt.optim.guard.",
        "__module__": __name__,
        "torch_class": base,
        "needs_closure": closure_is_required(base),
        "rule": property(_rule_of),
    }
    return cast("type[GuardedOptimizer]", type(f"Guarded{base.__name__}", (GuardedOptimizer, base), body))


def _refuse_same_names(base: type[Optimizer]) -> None:
    """Refuse a class whose own arguments would be taken for settings of the guard."""
    if issubclass(base, GuardedOptimizer) or base in _FAMILY:
        return
    clash = sorted(set(GuardSettings.__annotations__) & set(inspect.signature(base.__init__).parameters))
    if clash:
        raise ValueError(
            f"{base.__name__} takes arguments {clash} of its own, which are names of settings of the guard: guard an instance "
            f"instead, guard({base.__name__}(...), ...)."
        )


def _check_rate(base: type[Optimizer], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check the learning rate that a constructor is about to get; None is right where it is the default."""
    names = list(inspect.signature(base.__init__).parameters.values())[1:]
    given = dict(zip((p.name for p in names), args, strict=False)) | kwargs
    default = next((p.default for p in names if p.name == "lr"), None)
    if "lr" in given and not (given["lr"] is None and default is None):
        check_lr(given["lr"])


def _rebuilt(base: type[Optimizer]) -> GuardedOptimizer:
    cls = guarded_class(base)
    return cls.__new__(cls)


def _rule_of(optimizer: GuardedOptimizer) -> UpdateRule:
    base = optimizer.torch_class
    bare = base.__new__(base)  # the same optimizer as an object of its own class, of which rules are registered
    bare.__dict__ = vars(optimizer)
    rule = rule_for(bare)
    return Unknown() if rule is None else rule


def _refuse_clash(optimizer: Optimizer, clash: set[str]) -> None:
    if clash:
        raise ValueError(
            f"groups of this {type(optimizer).__name__} have keys {sorted(clash)} of their own, which the guard needs for itself."
        )


def _take_over(optimizer: Optimizer, settings: dict[str, Any]) -> GuardedOptimizer:
    cls = guarded_class(type(optimizer))
    guarded = cls.__new__(cls)
    vars(guarded).update(vars(optimizer))
    guarded.defaults = dict(optimizer.defaults)
    groups, guarded.param_groups = optimizer.param_groups, []
    kept = [dict(group) for group in groups]
    try:
        with guarded.set_up(settings):
            own = vars(guarded)["_own"]
            for group in groups:
                if set(own) <= set(group):  # it has loaded a state of ours
                    group.update(filled(group, own) | settings)
                else:
                    _refuse_clash(optimizer, set(own) & set(group))
                    group.update(own)
                guarded.check_group(group)
                guarded.param_groups.append(group)
    except (TypeError, ValueError):
        for group, old in zip(groups, kept, strict=True):
            group.clear()
            group.update(old)
        raise
    guarded.param_groups = groups
    guarded._patch_step_function()  # noqa: SLF001 - torch calls it in the constructor, which has run for the other object
    return guarded
