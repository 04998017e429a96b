"""Originals that are hard for maps to orthogonal matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FAMILIES: dict[str, Callable[[int, int], Tensor]] = {
    "random": torch.randn,
    "zero": torch.zeros,
    "ones": torch.ones,
    "rank one": lambda m, n: torch.outer(torch.randn(m), torch.randn(n)),
    "one entry": lambda m, n: torch.eye(m, n) * (torch.arange(n) == 0),
    "equal columns": lambda m, n: torch.randn(m, 1).expand(m, n).clone(),
    "columns of very different size": lambda m, n: torch.randn(m, n) * 10.0 ** torch.linspace(0.0, -12.0, n),
    "nearly dependent": lambda m, n: torch.randn(m, 1) + 1e-6 * torch.randn(m, n),
    "identity": torch.eye,
    "skew": lambda m, n: torch.eye(m, n).roll(1, 0) * 50.0,
}
"""By name: functions of the two sizes that return an original of unit scale."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dense_reflector(V: Tensor, m: int, n: int) -> Tensor:
    """The block reflector as it is written down, by an explicit inverse."""
    return (torch.eye(len(V)) - 2.0 * V @ torch.linalg.inv(V.mT @ V) @ V.mT)[:m, :n]
