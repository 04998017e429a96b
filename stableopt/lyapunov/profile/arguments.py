"""What the arguments of a profile must be, and where it cannot be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stableopt.lyapunov.profile.finite.twin import Twin
from stableopt.optim import GuardedOptimizer

__all__ = ["check_count", "check_surroundings", "check_window", "twin_of"]


def twin_of(model: nn.Module, optimizer: Optimizer, size: float | bool | None, seed: int) -> Twin | None:
    """Return the twin of a size, None for none.

    Args:
        model: that is trained.
        optimizer: of it.
        size: relative; True for the median of the first updates; None or False for none.
        seed: of its direction.

    Raises:
        ValueError: if there cannot be one.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> twin_of(model, torch.optim.SGD(model.parameters()), None, 0) is None
        True
    """
    if size is None or size is False:
        return None
    return Twin(model, optimizer, None if size is True else size, seed=seed, finite_size=True)


def check_surroundings(optimizer: Optimizer) -> None:
    """Refuse what a profile of one process and of one step at a time cannot follow.

    Raises:
        ValueError: if the guard is lazy, or several processes train.

    Examples:
        >>> check_surroundings(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    """
    if isinstance(optimizer, GuardedOptimizer) and optimizer.param_groups[0]["guard"] == "lazy":
        raise ValueError(
            "a lazy guard judges a step by the next one, and may undo it then; use guard='backtrack' for a profile."
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "a profile is of a training in one process, and there are several: their gradients are averaged where it cannot see "
            "it; profile the same training in one of them, with the whole batch."
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no integer from a number on.

    Raises:
        ValueError: if it is none.

    Examples:
        >>> check_count("cadence", 2)
        >>> check_count("cadence", 0)
        Traceback (most recent call last):
        ValueError: Profile needs cadence as an integer >= 1, got 0.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Profile needs {name} as an integer >= {least}, got {value!r}.")


def check_window(window: Any) -> None:
    """Refuse what is no window.

    Raises:
        ValueError: if it is neither None nor a pair of integers (W, K) with 1 <= W <= K.

    Examples:
        >>> check_window((10, 100))
    """
    if window is None:
        return
    pair = isinstance(window, tuple) and len(window) == 2 and all(isinstance(n, int) for n in window)
    if not (pair and 1 <= window[0] <= window[1]):
        raise ValueError(f"Profile needs window as (W, K) with integers 1 <= W <= K, got {window!r}.")
