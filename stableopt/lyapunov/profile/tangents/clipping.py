r"""What a training does to its gradients between backward and step, and the derivative of that.

.. math:: g \mapsto \min\Bigl(1, \frac{c}{\|g\| + 10^{-6}}\Bigr) g \quad\text{(by norm)}, \qquad
          g \mapsto \max(-c, \min(c, g)) \quad\text{(by value)} .
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.lyapunov.profile.tangents.products import Gradient
from stableopt.optim.rules.base import real_view

__all__ = ["Clipping", "NotTheGradientError"]

_SMALL = 1e-6
"""What torch adds to a norm before it divides by it."""


class NotTheGradientError(RuntimeError):
    """Gradients at the step that are not those of the loss, clipped as stated.

    Examples:
        >>> raise NotTheGradientError("another gradient")
        Traceback (most recent call last):
        stableopt.lyapunov.profile.tangents.clipping.NotTheGradientError: another gradient
    """


@dataclass(frozen=True)
class Clipping:
    """How gradients are clipped: as ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_`` do.

    Args:
        norm: the largest Euclidean norm of all gradients together; None for no such clipping.
        value: the largest modulus of an entry; None for no such clipping. With both, the norm is clipped first.

    Raises:
        ValueError: if a limit is not a positive number.

    Note:
        Where a limit is just reached, the derivative is that of the gradient which is not clipped.

    Examples:
        >>> clipping = Clipping(norm=1.0)
        >>> raw = Gradient([torch.tensor([3.0, 4.0])], [torch.tensor([[3.0, 4.0], [4.0, -3.0]])], "graph", 2)
        >>> clipping.push(raw, [torch.tensor([0.6, 0.8])])[0].round(decimals=4).abs()
        tensor([[0.0000, 0.0000],
                [0.8000, 0.6000]])
    """

    norm: float | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("norm", self.norm), ("value", self.value)):
            if limit is not None and not (math.isfinite(limit) and limit > 0.0):
                raise ValueError(f"clip_{name} must be a finite number > 0 or None, got {limit!r}.")

    @torch.no_grad()
    def push(self, gradient: Gradient, used: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the derivatives of the gradients that are used.

        Args:
            gradient: of the loss, with its derivatives.
            used: what the optimizer found.

        Raises:
            NotTheGradientError: if that is not the gradient of the loss, clipped as stated.
        """
        values, along = list(gradient.values), list(gradient.along)
        total = math.sqrt(math.fsum(size**2 for size in _norms(g for g in values if g is not None)))
        if not math.isfinite(total):
            raise NotTheGradientError("the gradient is not finite")
        if self.norm is not None:
            values, along = _by_norm(values, along, self.norm, total)
        if self.value is not None:
            values, along = _by_value(values, along, self.value)
        if not _same(values, used, total):
            raise NotTheGradientError(
                "the gradients that the optimizer found are not those of the loss: say clip_norm= or clip_value= if they are "
                "clipped; gradients that are scaled or changed otherwise have no derivative here"
            )
        return along


def _norms(tensors: Iterable[Tensor]) -> list[float]:
    """Return the norms of some tensors, with one wait for the device."""
    found = [torch.linalg.vector_norm(t.flatten()).double() for t in tensors]
    return torch.stack([norm.to(found[0].device) for norm in found]).tolist() if found else []


def _same(mine: Sequence[Tensor | None], theirs: Sequence[Tensor | None], total: float) -> bool:
    """Whether gradients are equal up to rounding: their own, and what is left of terms of the size of all of them.

    None is as good as zeros: ``zero_grad`` may leave zeros where the loss does not reach.
    """
    pairs = [(x, y) for x, y in zip(mine, theirs, strict=True) if x is not None or y is not None]
    if any(y is None for _, y in pairs):
        return False
    apart = _norms(y if x is None else x - y for x, y in pairs if y is not None)
    sizes = _norms(y if x is None else x for x, y in pairs if y is not None)
    allowed = [
        0.0 if x is None else torch.finfo(x.dtype).eps * (64.0 * size + 8.0 * total)
        for (x, _), size in zip(pairs, sizes, strict=True)
    ]
    return all(difference <= most for difference, most in zip(apart, allowed, strict=True))


def _by_norm(
    values: list[Tensor | None], along: list[Tensor], limit: float, total: float
) -> tuple[list[Tensor | None], list[Tensor]]:
    if not limit / (total + _SMALL) < 1.0:
        return values, along
    factor = limit / (total + _SMALL)
    inner = torch.stack([_rows_dot(d, g) for d, g in zip(along, values, strict=True) if g is not None]).sum(0)
    bent = inner / (total * (total + _SMALL))
    return (
        [None if g is None else factor * g for g in values],
        [
            d if g is None else factor * (d - bent.reshape(-1, *[1] * g.ndim).to(d.dtype) * g)
            for d, g in zip(along, values, strict=True)
        ],
    )


def _by_value(
    values: list[Tensor | None], along: list[Tensor], limit: float
) -> tuple[list[Tensor | None], list[Tensor]]:
    return (
        [None if g is None else g.clamp(-limit, limit) for g in values],
        [d if g is None else d * (g.abs() <= limit) for d, g in zip(along, values, strict=True)],
    )


def _rows_dot(rows: Tensor, g: Tensor) -> Tensor:
    flat = real_view(rows).reshape(len(rows), -1).double()
    return flat @ real_view(g).reshape(-1).double()
