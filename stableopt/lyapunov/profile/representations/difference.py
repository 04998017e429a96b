r"""Central differences where an operation has no derivative in forward mode, refused where they lie.

With :math:`x` all that is perturbed together, along :math:`v`,

.. math:: \frac{h(x + sv) - h(x - sv)}{2s}, \qquad s = \varepsilon\,\frac{\|x\|}{\|v\|},

:math:`\varepsilon = 10^{-6}` in float64 and :math:`10^{-3}` in float32, there for smooth models only: with kinks no size
reproduces the derivative (smaller ones drown in rounding, larger ones cross them). float16 and bfloat16 are too coarse for any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stableopt.lyapunov.layers.forward import relative_step
from stableopt.lyapunov.layers.kinked import is_kinked
from stableopt.lyapunov.lengths import read

__all__ = ["Operations", "central_differences", "size_of_difference"]


class Operations(TorchDispatchMode):
    """Records which operations with kinks are computed, and in which types.

    Attributes:
        kinks: their names.
        dtypes: of all real floating-point results.

    Examples:
        >>> with Operations() as seen:
        ...     _ = torch.nn.functional.relu(torch.ones(1))
        >>> sorted(seen.kinks), seen.dtypes == {torch.ones(1).dtype}
        (['relu'], True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinks: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record an operation."""
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2].rstrip("_")  # noqa: SLF001 torch has no public access
        floats = [t.dtype for t in tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()]
        self.dtypes.update(floats)
        if floats and is_kinked(name, args):
            self.kinks.add(name)
        return results


def size_of_difference(seen: Operations) -> float:
    r"""Return :math:`\varepsilon` for an evaluation.

    Args:
        seen: what it computes.

    Raises:
        NotImplementedError: if no size is right: kinks in less than float64, or float16 and bfloat16.

    Examples:
        >>> with Operations() as seen:
        ...     _ = torch.ones(1, dtype=torch.float32).relu()
        >>> size_of_difference(seen)
        Traceback (most recent call last):
        NotImplementedError: an operation has no derivative in forward mode, and a finite difference in float32 is no substitute ...
    """
    coarse = sorted(str(d).removeprefix("torch.") for d in seen.dtypes - {torch.float32, torch.float64})
    if coarse:
        raise NotImplementedError(
            "an operation has no derivative in forward mode, and a finite difference is rounding in "
            f"{' and '.join(coarse)}: evaluate in float32 or float64"
        )
    if seen.kinks and torch.float32 in seen.dtypes:
        raise NotImplementedError(
            "an operation has no derivative in forward mode, and a finite difference in float32 is no substitute across the "
            f"kinks of {', '.join(sorted(seen.kinks))}: evaluate in float64"
        )
    return relative_step(list(seen.dtypes))


def central_differences(
    evaluate: Callable[[Sequence[Tensor]], list[Tensor]],
    points: Sequence[Tensor],
    tangents: Sequence[Tensor],
    epsilon: float,
) -> list[Tensor]:
    r"""Return :math:`(h(x + sv) - h(x - sv)) / 2s` for every direction.

    Args:
        evaluate: :math:`h`, of tensors like ``points``.
        points: :math:`x`, together.
        tangents: :math:`v`, for each point ``(k, *shape)``.
        epsilon: the size relative to :math:`\|x\|`, to 1 if that is zero.

    Examples:
        >>> x, v = torch.tensor([3.0], dtype=torch.float64), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> central_differences(lambda x: [x[0].square()], [x], [v], 1e-6)[0].round(decimals=6).flatten()
        tensor([ 6., 12.], dtype=torch.float64)
    """
    size = _length(points) or 1.0
    found: list[list[Tensor]] = []
    for i in range(tangents[0].shape[0]):
        direction = [t[i] for t in tangents]
        s = epsilon * size / (_length(direction) or 1.0)
        above = evaluate([x + s * v for x, v in zip(points, direction, strict=True)])
        below = evaluate([x - s * v for x, v in zip(points, direction, strict=True)])
        found.append([(a - b) / (2.0 * s) for a, b in zip(above, below, strict=True)])
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def _length(tensors: Sequence[Tensor]) -> float:
    return float(
        torch.tensor(read([torch.linalg.vector_norm(t.double()) for t in tensors]), dtype=torch.float64).norm()
    )
