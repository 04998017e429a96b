"""Norms of many tensors of any kind, and what they are as numbers, with one wait for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["has_norm", "norms", "read"]

_TORCH: Any = torch
"""The kernels for lists of tensors, which torch exports without types."""


def has_norm(x: Tensor) -> bool:
    """Say whether the norm of a tensor can be computed: it has numbers, real or complex, of at least two bytes.

    Examples:
        >>> has_norm(torch.ones(2)), has_norm(torch.ones(2, dtype=torch.int64)), has_norm(torch.ones(0))
        (True, False, False)
    """
    floating = (x.is_floating_point() and x.element_size() > 1) or x.is_complex()
    return floating and x.numel() > 0 and x.layout is torch.strided and x.device.type != "meta"


def norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the Euclidean norms, in the same order; a NaN or an infinity makes them so, a sum that is too large does as well.

    Args:
        tensors: dense; those of half precision are summed in float32.

    Examples:
        >>> [x.item() for x in norms([torch.tensor([3.0, 4.0]), torch.full((4,), 200.0, dtype=torch.float16)])]
        [5.0, 400.0]
    """
    found = list(tensors)
    half = [x for x in found if x.element_size() <= 2]
    if not half:
        return [*_TORCH._foreach_norm(found)] if found else []  # noqa: SLF001
    of_half = iter(_TORCH._foreach_norm(half, 2, dtype=torch.float32))  # noqa: SLF001
    wide = [x for x in found if x.element_size() > 2]
    of_wide = iter(_TORCH._foreach_norm(wide) if wide else ())  # noqa: SLF001
    return [next(of_half if x.element_size() <= 2 else of_wide) for x in found]


def read(values: Sequence[Tensor], device: torch.device | None = None) -> list[float]:
    """Return numbers from 0-d tensors of any dtype and device, with one wait.

    Args:
        values: the tensors.
        device: where they are put together; None for that of the first.

    Examples:
        >>> read([torch.tensor(1.0), torch.tensor(2.0, dtype=torch.float64)])
        [1.0, 2.0]
    """
    if not values:
        return []
    where = values[0].device if device is None else device
    if len({(x.dtype, x.device) for x in values}) == 1:
        return torch.stack(list(values)).to(where, torch.float64).tolist()
    return torch.stack([x.to(where, torch.float64) for x in values]).tolist()
