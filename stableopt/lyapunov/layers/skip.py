r"""Whether a block is a residual sum: its output is its input plus something, in the graph of one evaluation.

Looked for is a path from the output back to the input that leads only through sums, products, casts, copies and views, along which
the derivative is that of :math:`h + K(h)`, the identity, or that of the mix :math:`(1 - \tau)h + \tau\,g(h)`, :math:`1 - \tau`.
A step that is something else, such as the temperature of a softmax, leaves no such path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["is_sum"]

_THROUGH = frozenset({
    "Add", "Sub", "Rsub", "Mul", "Div", "Addcmul", "Addcdiv", "Addmm", "Addmv", "Addbmm", "Baddbmm", "Lerp",
    "Clone", "Alias", "ToCopy", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute",
})  # fmt: skip
_MOST = 300
"""Steps of the search; what is not found by then is no plain sum."""


def is_sum(y: Tensor, x: Tensor, step: float | None = None) -> bool:
    r"""Return whether an output is its input plus something, or a mix of the two.

    Args:
        y: the output, with its graph.
        x: the input, a leaf that requires a gradient, of the shape of the output.
        step: :math:`\tau` of a mix, if the block is one.

    Note:
        The derivatives of single operations are evaluated, past all hooks.

    Examples:
        >>> x = torch.ones(3, requires_grad=True)
        >>> is_sum(x - 0.5 * x.tanh(), x), is_sum(0.5 * x.tanh(), x), is_sum(0.9 * x + 0.1 * x.tanh(), x, 0.1)
        (True, False, True)
    """
    if y.shape != x.shape or y.grad_fn is None:
        return False
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(y)
    wanted = [1.0] if step is None else [1.0, 1.0 - step]
    pending: list[tuple[Any, Tensor]] = [(y.grad_fn, w)]
    for _ in range(_MOST):
        if not pending:
            return False
        node, part = pending.pop()
        if getattr(node, "variable", None) is x:
            if any(_near(part, factor * w) for factor in wanted):
                return True
            continue
        kind = (
            node.name().removesuffix("0").removesuffix("1").removesuffix("2").removesuffix("3").removesuffix("Backward")
        )
        if kind not in _THROUGH:
            continue
        ways = [(edge[0], grad) for edge, grad in zip(node.next_functions, _parts(node, part), strict=False)]
        pending += [(after, grad) for after, grad in reversed(ways) if after is not None and grad is not None]
    return False


def _parts(node: Any, part: Tensor) -> tuple[Tensor | None, ...]:
    with torch.no_grad():
        parts = node(part)
    return parts if isinstance(parts, tuple) else (parts,)


def _near(part: Tensor, other: Tensor) -> bool:
    if part.shape != other.shape:
        return False
    apart = part.detach().to(torch.float64) - other.to(part.device, torch.float64)
    return bool(torch.linalg.vector_norm(apart) <= 0.02 * torch.linalg.vector_norm(other))
