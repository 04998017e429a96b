"""A factor on learning rates, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["scaled"]


@contextmanager
def scaled(groups: list[dict[str, Any]], scale: float) -> Iterator[None]:
    """Multiply the learning rates of all groups inside the context; afterwards the very same objects are back.

    Examples:
        >>> group = {"lr": 0.5}
        >>> with scaled([group], 0.5):
        ...     group["lr"]
        0.25
        >>> group["lr"]
        0.5
    """
    kept = [group.get("lr") for group in groups]
    try:
        if scale != 1.0:
            for group, lr in zip(groups, kept, strict=True):
                if lr is not None:
                    group["lr"] = lr * scale
        yield
    finally:
        for group, lr in zip(groups, kept, strict=True):
            if lr is not None:
                group["lr"] = lr
