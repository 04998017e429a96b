"""Differences of gradients: what is left where autograd has no second derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stableopt.optim.curvature.base import Curvature, dot
from stableopt.optim.modules import buffers_put_back

__all__ = ["Difference"]


class Difference(Curvature):
    r"""By the central difference of two gradients: :math:`Hv \approx (g(\theta+hv)-g(\theta-hv))/(2h)`.

    The step is :math:`h\|v\| = \epsilon^{1/3}\max(1, \|\theta\|/\sqrt n)`, which balances the error of the difference,
    :math:`O(h^2)`, and the rounding of the gradients, :math:`O(\epsilon/h)`, with :math:`\epsilon` of the dtype of the parameters.
    Parameters move and come back bit for bit.

    Note:
        A kink of ReLU between the two points enters with its jump over 2h: the mean curvature over the interval, which autograd,
        blind for kinks, does not see. Neither is the wrong one, but they are two quantities: in float32 the second is several times
        larger. It is a curvature of its own where thousands of samples make it smooth; with tens or hundreds of them the products
        are far from symmetric and mean nothing, and the same holds under autocast, by rounding.
        In float32 a metric of very unequal entries (Adam's after its first steps) amplifies the rounding of a difference.

    Raises:
        ValueError: for parameters in half precision, whose rounding is larger than any step that is small.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> with Difference(lambda: (w**3).sum(), [w]) as product:
        ...     round(product([torch.ones(1)])[0].item(), 4)
        6.0
    """

    name = "difference"
    fused = True

    def _open(self) -> None:
        dtypes = {p.dtype for p in self.parameters}
        self._eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        if self._eps > 1e-6:
            raise ValueError(
                "parameters in half precision are too coarse for differences of gradients: use method='exact', or keep the "
                "parameters in float32 and use autocast."
            )
        values = [p.detach() for p in self.parameters]
        rms = math.sqrt(dot(values, values) / max(1, sum(p.numel() for p in values)))
        self._length = self._eps ** (1 / 3) * max(1.0, rms)

    def _product(self, v: list[Tensor]) -> Sequence[Tensor | None]:
        length = math.sqrt(dot(v, v))
        if not 0 < length < math.inf:
            return [None if length == 0 else torch.full_like(x, math.nan) for x in v]
        h = self._length / length
        kept = [p.detach().clone() for p in self.parameters]
        try:
            ahead, behind = (self._at(kept, v, step) for step in (h, -h))
        finally:
            for p, old in zip(self.parameters, kept, strict=True):
                p.data.copy_(old)
        return [_quotient(a, b, 2 * h) for a, b in zip(ahead, behind, strict=True)]

    def _at(self, kept: list[Tensor], v: list[Tensor], step: float) -> tuple[Tensor | None, ...]:
        for p, old, x in zip(self.parameters, kept, v, strict=True):
            # .data: the values come back, so graphs that others have built stay valid; a counted change would break them
            p.data.copy_(old + step * x)
        torch.clear_autocast_cache()
        with buffers_put_back(self.loss):
            return self._gradients(twice=False)


def _quotient(ahead: Tensor | None, behind: Tensor | None, step: float) -> Tensor | None:
    if ahead is None and behind is None:
        return None
    zero: Any = 0.0
    return ((zero if ahead is None else ahead) - (zero if behind is None else behind)) / step
