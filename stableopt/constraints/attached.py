"""Which parameters have to be projected after each step: a weak registry that layers fill and optimizers read."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from stableopt.constraints.base import Constraint

__all__ = ["attach", "attached"]

_ATTACHED = WeakTensorKeyDictionary()


def attach(parameter: Tensor, constraint: Constraint | None) -> None:
    """Record that a parameter must satisfy a constraint. Nothing is projected here, and the parameter is not kept alive.

    Args:
        parameter: the tensor itself, known by identity. A copy (``deepcopy``, ``.clone()``) is another tensor without a constraint.
        constraint: the set, or ``None`` to forget it.

    Raises:
        TypeError: if the arguments are not a tensor and a constraint.
        ValueError: if another constraint is attached: one tensor has one set.

    Examples:
        >>> import torch
        >>> from stableopt.constraints import NonNegative
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> attach(weight, NonNegative())
        >>> attached(weight)
        NonNegative()
        >>> attach(weight, None)
        >>> attached(weight) is None
        True
    """
    if not isinstance(parameter, Tensor) or not (constraint is None or isinstance(constraint, Constraint)):
        raise TypeError(
            "attach needs a tensor and a Constraint or None, "
            f"got {type(parameter).__name__} and {type(constraint).__name__}."
        )
    if constraint is None:
        _ATTACHED.pop(parameter, None)
        return
    old = attached(parameter)
    if old is not None and old != constraint:
        raise ValueError(
            f"the parameter of shape {tuple(parameter.shape)} is already constrained to {old!r}, got {constraint!r}. "
            "Call attach(parameter, None) first to replace the set."
        )
    _ATTACHED[parameter] = constraint


def attached(parameter: Tensor) -> Constraint | None:
    """Return the constraint attached to a parameter, or ``None``.

    Args:
        parameter: the tensor itself, known by identity.

    Examples:
        >>> import torch
        >>> attached(torch.ones(2)) is None
        True
    """
    return _ATTACHED.get(parameter, None)
