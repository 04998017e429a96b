"""What a token may attend to: a mask, padding and causality in one, without rows that divide by zero."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Allowed", "allowed"]


class Allowed(NamedTuple):
    """A mask for the softmax, the rows that are allowed nothing, and whether the kernel makes the causal mask itself.

    Examples:
        >>> Allowed(None, None, False).mask is None
        True
    """

    mask: Tensor | None
    empty: Tensor | None
    causal: bool


def allowed(q: Tensor, k: Tensor, mask: Tensor | None, padding: Tensor | None, *, causal: bool) -> Allowed:
    r"""Combine the masks of an attention into one that broadcasts to the logits.

    A row that is allowed nothing has no softmax (0/0). It is given all columns, and its output is to be replaced.

    Args:
        q: queries of shape ``(..., heads, N, d)``.
        k: keys of shape ``(..., heads, M, d)``.
        mask: True where row i may attend to column j, or numbers to add to the logits, minus infinity to forbid.
        padding: of shape ``(..., M)``, True for columns that are forbidden to all.
        causal: whether columns after the row are forbidden.

    Raises:
        ValueError: if a mask does not fit, padding is not Boolean, or a causal attention has another number of keys than queries.

    Examples:
        >>> q = torch.zeros(1, 1, 2, 3)
        >>> allowed(q, q, None, torch.tensor([[False, True]]), causal=True).mask.squeeze().tolist()
        [[True, False], [True, False]]
    """
    N, M = q.shape[-2], k.shape[-2]
    if causal and N != M:
        raise ValueError(
            f"causal attention needs as many keys as queries, got {M} and {N}; leave the context out or pass a mask."
        )
    if mask is None and padding is None:
        return Allowed(None, None, causal)
    if mask is not None:
        _check_mask(mask, (*q.shape[:-1], M))
    if padding is not None:
        if padding.dtype != torch.bool or padding.shape != (*k.shape[:-3], M):
            raise ValueError(
                f"padding must be Boolean of shape {(*k.shape[:-3], M)}, True for tokens to ignore, got {padding.dtype} of shape "
                f"{tuple(padding.shape)}."
            )
        padding = padding[..., None, None, :]
    forbidden = _forbidden(q, M, padding, causal=causal)
    if mask is None or mask.dtype == torch.bool:
        open_ = ~forbidden if mask is None else mask & ~forbidden
        empty = ~open_.any(-1, keepdim=True)
        return Allowed(open_ | empty, empty, False)
    lowest = torch.finfo(q.dtype).min  # a number that half precision cannot hold forbids nothing
    added = torch.where(mask == -math.inf, mask, mask.clamp_min(lowest)).to(q.dtype).masked_fill(forbidden, -math.inf)
    empty = (added == -math.inf).all(-1, keepdim=True)
    return Allowed(added.masked_fill(empty, 0.0), empty, False)


def _forbidden(q: Tensor, M: int, padding: Tensor | None, *, causal: bool) -> Tensor:
    """Return what padding and causality forbid, of a shape that broadcasts to that of the logits."""
    nothing = torch.zeros((), dtype=torch.bool, device=q.device)
    padding = nothing if padding is None else padding
    if not causal:
        return padding
    return padding | torch.ones(q.shape[-2], M, dtype=torch.bool, device=q.device).triu(1)


def _check_mask(mask: Tensor, logits: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"a mask must be Boolean or hold numbers to add to the logits, got {mask.dtype}.")
    fits = mask.ndim in {2, len(logits)} and all(
        m in {1, n} for m, n in zip(reversed(mask.shape), reversed(logits), strict=False)
    )
    if not fits:
        raise ValueError(
            f"a mask must have the shape (N, M) = {logits[-2:]} or one that broadcasts to {logits}, got {tuple(mask.shape)}. For "
            "one mask per item of the batch, insert the dimension of the heads: mask.unsqueeze(-3)."
        )
