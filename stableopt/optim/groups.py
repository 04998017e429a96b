"""Parameter groups: what they must satisfy, what they carry, and their form in a state dict."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from stableopt.constraints import Constraint, Regularizer
from stableopt.optim.regularize import decoded, encoded, gather_attached, regularized
from stableopt.optim.settings import Settings, check_lr, check_number

if TYPE_CHECKING:
    from stableopt.optim.base import GuardedOptimizer

__all__ = [
    "COUNTERS",
    "DEFAULTS",
    "PER_GROUP",
    "SETTINGS",
    "check_group",
    "check_rate",
    "closure_is_required",
    "encode_groups",
    "filled",
    "refuse_foreign",
]

SETTINGS = Settings.names()
"""What belongs to the whole optimizer; every group carries it."""

PER_GROUP = ("prox", "constraint", "smoothness")
COUNTERS = {"step_scale": 1.0, "step_count": 0, "skipped": 0}
DEFAULTS: dict[str, Any] = dict.fromkeys(PER_GROUP) | vars(Settings()) | COUNTERS


def check_group(optimizer: GuardedOptimizer, group: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    """Refuse a group that makes no sense; take over the sets to which its parameters are attached.

    Args:
        optimizer: to which it belongs.
        group: with its parameters.
        others: the groups beside it.

    Raises:
        TypeError: if a parameter is not floating, or a value has the wrong type.
        ValueError: if a value is out of range, or arguments exclude each other.
    """
    check_rate(optimizer, group)
    for name in ("weight_decay", "eps"):
        if name in group and not isinstance(group[name], Tensor | tuple):
            check_number(name, group[name])
    if group["smoothness"] is not None:
        check_number("smoothness", group["smoothness"])
        optimizer.rule.energy_limit(group["smoothness"], group)  # refuses where no limit is known
    for p in group["params"]:
        if not (p.dtype.is_floating_point or p.dtype.is_complex):
            raise TypeError(
                f"an optimizer needs floating parameters, got one of dtype {p.dtype} and shape {tuple(p.shape)}."
            )
    _check_regularizers(group)
    gather_attached(group)
    for _, _, regularizer in regularized([group]):
        refusal = optimizer.rule.takes(group, regularizer)
        if refusal is not None:
            raise ValueError(refusal)
    busy = group["guard"] != "off" or group["prox"] is not None or group["constraint"] is not None
    if busy and not optimizer.rule.complex_too and any(p.dtype.is_complex for p in group["params"]):
        raise TypeError(
            f"{type(optimizer).__name__} has no real metric for complex parameters: use torch.view_as_real, "
            "or guard='off' without prox or constraint."
        )
    signs = {bool(g.get("maximize")) for g in (*others, group)}
    if len(signs) > 1 and group["guard"] != "off":
        raise ValueError(
            "all groups must maximize or all minimize: otherwise they have no common energy; use guard='off'."
        )
    if busy and group.get("differentiable"):
        raise ValueError(
            "differentiable=True is torch's step alone: use it with guard='off' and without prox or constraint."
        )


def check_rate(optimizer: GuardedOptimizer, group: dict[str, Any]) -> None:
    """Check the learning rate of a group; None is right only for an optimizer that takes None.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range.
    """
    if group.get("lr") is not None or optimizer.defaults.get("lr") is not None:
        check_lr(group.get("lr"))


def _check_regularizers(group: dict[str, Any]) -> None:
    prox, constraint = group["prox"], group["constraint"]
    if prox is not None and constraint is not None:
        raise ValueError(
            f"a group takes prox= or constraint=, got both ({prox!r}, {constraint!r}): "
            "the prox of a sum is not the one after the other."
        )
    if prox is not None and not isinstance(prox, Regularizer):
        raise TypeError(f"prox must be a Regularizer such as stableopt.constraints.L1(0.1), got {prox!r}.")
    if isinstance(prox, Constraint):
        group["prox"], group["constraint"] = None, prox
        return
    if isinstance(constraint, list | tuple):
        if len(constraint) != len(group["params"]):
            raise ValueError(
                f"a list of constraints needs one entry for each of the {len(group['params'])} parameters of the group "
                f"(None for none), got {len(constraint)}."
            )
        group["constraint"] = sets = list(constraint)
    else:
        sets = [constraint]
    for one in sets:
        if one is not None and not isinstance(one, Constraint):
            raise TypeError(
                f"constraint must be a Constraint such as stableopt.constraints.Box(0, 1), got {one!r}; "
                "a penalty goes to prox=."
            )


def filled(group: dict[str, Any], fallback: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with our settings, regularizers as objects; what it lacks comes from the fallback.

    Examples:
        >>> filled({"lr": 0.1, "constraint": {"name": "NonNegative"}}, {})["constraint"]
        NonNegative()
    """
    mine = {k: fallback.get(k, default) for k, default in DEFAULTS.items()}
    return mine | group | {k: decoded(group[k]) for k in ("prox", "constraint") if k in group}


def refuse_foreign(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Raise for groups that lack a number which the constructor of the class takes.

    Raises:
        ValueError: naming what they lack.
    """
    mine = {k: v for k, v in optimizer.defaults.items() if k not in DEFAULTS}
    for i, group in enumerate(groups):
        missing = sorted(set(mine) - set(group))
        if any(not isinstance(mine[k], bool | str | None) for k in missing):  # flags may be younger than the state
            raise ValueError(
                f"the state is not one of {type(optimizer).__name__}: its group {i} lacks {', '.join(missing)}; "
                "load the state of the same "
                "optimizer class."
            )


def encode_groups(_optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Write regularizers as plain data, in place.

    Examples:
        >>> from stableopt.constraints import NonNegative
        >>> state = {"param_groups": [{"prox": None, "constraint": NonNegative()}]}
        >>> encode_groups(None, state)
        >>> state["param_groups"][0]["constraint"]
        {'name': 'NonNegative'}
    """
    for group in state["param_groups"]:
        for key in ("prox", "constraint"):
            group[key] = encoded(group.get(key))


def closure_is_required(cls: type[Optimizer]) -> bool:
    """Return whether the step of an optimizer class cannot be called without a closure.

    Examples:
        >>> import torch
        >>> closure_is_required(torch.optim.LBFGS), closure_is_required(torch.optim.SGD)
        (True, False)
    """
    parameter = inspect.signature(inspect.unwrap(cls.step)).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty
