"""An adversary for Lipschitz bounds: it climbs from random pairs of inputs to those that a module spreads the most.

What it finds is a lower bound of the true constant, so a proved bound below it is wrong, and the quotient of the two is how tight
the bound is known to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

EPS = torch.finfo(torch.float64).eps


def size(x: Tensor, norm: str) -> Tensor:
    """The norm of each item of a batch."""
    if norm == "token_max":
        return (
            torch.linalg.vector_norm(x, dim=-1).flatten(1).amax(1)
            if x.ndim > 2
            else torch.linalg.vector_norm(x, dim=-1)
        )
    return torch.linalg.vector_norm(x.flatten(1), {"l2": 2, "linf": math.inf, "l1": 1}[norm], dim=1)


def worst_ratio(
    module: nn.Module | Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    norm: str = "l2",
    *,
    starts: int = 16,
    steps: int = 60,
    scale: float = 1.0,
    distance: float = 1e-3,
    lr: float = 0.05,
) -> float:
    r"""The largest :math:`\|f(x) - f(y)\| / \|x - y\|` that gradient ascent over pairs finds, in evaluation and float64.

    Args:
        module: a map that treats the items of a batch alone.
        shape: of one input, without the batch.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``, at input and output.
        starts: number of pairs that climb at once, at scales from a tenth of ``scale`` to ten times ``scale``.
        steps: of Adam.
        scale: of the inputs.
        distance: size of the entries of :math:`x - y` at the start.
        lr: of Adam, relative to the scales.
    """
    if isinstance(module, nn.Module):
        module.eval()
    scales = scale * torch.logspace(-1, 1, starts, dtype=torch.float64).view(-1, *[1] * len(shape))
    x = torch.randn(starts, *shape, dtype=torch.float64).requires_grad_()
    d = torch.randn(starts, *shape, dtype=torch.float64)
    d[1::2] = d[1::2].sign()  # what the maximum norm likes
    d = d.requires_grad_()
    opt = torch.optim.Adam([x, d], lr=lr)
    best = 0.0
    for _ in range(steps):
        first = scales * x
        second = first + distance * scales * d
        gap = size(second - first, norm)
        ratio = size(module(second) - module(first), norm) / gap
        with torch.no_grad():
            noise = 256 * EPS * (size(first, norm) + 1.0) / gap  # of the difference of two outputs
            best = max(best, float((ratio - noise * (1.0 + ratio)).max()))
        opt.zero_grad()
        (-ratio.clamp_min(1e-30).log().sum()).backward()
        opt.step()
    return best
