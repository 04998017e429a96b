"""The precision in which norms and limits are computed, whatever the model runs in."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

__all__ = ["full_precision", "wide"]


def full_precision(weight: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast does not lower the precision of a norm.

    Examples:
        >>> with full_precision(torch.ones(1)):
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    kind = weight.device.type
    if kind == "meta" or not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def wide(weight: Tensor) -> Tensor:
    """Return the weight in at least float32, the dtype in which its norm and its step are computed.

    Examples:
        >>> wide(torch.ones(1, dtype=torch.float16)).dtype, wide(torch.ones(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return weight.float() if weight.dtype in {torch.float16, torch.bfloat16} else weight
