"""Checks of arguments that many layers share."""

from __future__ import annotations

import math

__all__ = ["check_nonnegative", "check_positive", "check_sizes"]


def check_sizes(**sizes: int) -> None:
    """Refuse sizes that are no positive integers.

    Args:
        **sizes: the sizes by name.

    Raises:
        ValueError: naming the first that is not an integer >= 1.

    Examples:
        >>> check_sizes(dim=3)
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {size!r}.")


def check_nonnegative(**numbers: float) -> None:
    """Refuse numbers that are negative or not finite.

    Args:
        **numbers: the numbers by name.

    Raises:
        ValueError: naming the first that is not finite and >= 0.

    Examples:
        >>> check_nonnegative(strong=0.0)
    """
    for name, number in numbers.items():
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {number!r}.")


def check_positive(**numbers: float) -> None:
    """Refuse numbers that are not positive or not finite.

    Args:
        **numbers: the numbers by name.

    Raises:
        ValueError: naming the first that is not finite and > 0.

    Examples:
        >>> check_positive(gain=1.0)
    """
    for name, number in numbers.items():
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} must be finite and > 0, got {number!r}.")
