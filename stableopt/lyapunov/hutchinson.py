r"""The trace of a Hessian by random signs, beside directions that are already known.

For z with independent random signs :math:`\mathbb{E}\,zz^\top = I`, so :math:`\mathbb{E}\,z^\top H z = \operatorname{tr} H`, with
variance :math:`2\sum_{i \ne j} H_{ij}^2`. Where an orthonormal Q and HQ are known,

.. math:: \operatorname{tr} H = \operatorname{tr} Q^\top H Q + \mathbb{E}\, z^\top P H P z, \qquad P = I - QQ^\top,

whose variance is that of PHP: the largest eigenvalues are out of it. Q may depend on H, as long as z is drawn afterwards.

References:
    Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989; Meyer, Musco, Musco and Woodruff, Hutch++, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from stableopt.optim.curvature import Curvature, dot
from stableopt.optim.packing import Packing
from stableopt.optim.rules.base import real_view, unviewed

__all__ = ["Pair", "orthonormal", "random_signs", "trace_beside"]

Pair: TypeAlias = tuple[list[Tensor], list[Tensor]]
"""A vector and its product with H, packed."""


def orthonormal(pairs: Iterable[Pair]) -> list[Pair]:
    """Return an orthonormal basis of a span, with its products.

    Args:
        pairs: vectors with their products; one that is nearly in the span of those before is left out.

    Examples:
        >>> basis = orthonormal([([torch.tensor([2.0, 0.0])], [torch.tensor([6.0, 0.0])])] * 2)
        >>> basis
        [([tensor([1., 0.])], [tensor([3., 0.])])]
    """
    basis: list[Pair] = []
    for v, Hv in pairs:
        q, Hq, before = v, Hv, math.sqrt(dot(v, v))
        for _ in range(2):  # twice is enough
            for b, Hb in basis:
                q, Hq = _without(q, Hq, b, Hb, dot(b, q))
        norm = math.sqrt(dot(q, q))
        if before > 0.0 and norm > 1e-3 * before and math.isfinite(norm):
            basis.append(([x / norm for x in q], [x / norm for x in Hq]))
    return basis


def trace_beside(curvature: Curvature, packing: Packing, known: list[Pair], generator: torch.Generator) -> float:
    r"""Return :math:`z^\top P H P z` for one z, by one product.

    Args:
        curvature: an open context.
        packing: of its parameters.
        known: the orthonormal Q with HQ, packed.
        generator: of z, on the CPU.

    Examples:
        >>> from stableopt.optim.curvature import Exact
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> with Exact(lambda: (w**2).sum(), [w]) as product:
        ...     trace_beside(product, Packing.of([w]), [], torch.Generator())
        6.0
    """
    z = packing.pack([random_signs(p, generator) for p in curvature.parameters])
    Hz = curvature([unviewed(x, p) for x, p in zip(packing.unpack(z), curvature.parameters, strict=True)])
    image = packing.pack([real_view(h) for h in Hz])
    for q, Hq in known:
        z, image = _without(z, image, q, Hq, dot(q, z))
    return dot(z, image)


def random_signs(p: Tensor, generator: torch.Generator) -> Tensor:
    """Return a sign for each number of the real view of a parameter, from one random bit each, the same on every device.

    Args:
        p: the parameter.
        generator: of the bits, on the CPU.

    Examples:
        >>> random_signs(torch.zeros(2, 3), torch.Generator()).abs().sum()
        tensor(6.)
    """
    view = real_view(p.detach())
    drawn = torch.randint(256, (-(-view.numel() // 8),), generator=generator, dtype=torch.uint8).to(p.device)
    bits = (drawn[:, None] >> torch.arange(8, dtype=torch.uint8, device=p.device)) & 1
    return (bits.flatten()[: view.numel()].view(view.shape).to(view.dtype) * 2.0).sub_(1.0)


def _without(v: list[Tensor], Hv: list[Tensor], q: list[Tensor], Hq: list[Tensor], along: float) -> Pair:
    return (
        [x.sub(y, alpha=along) for x, y in zip(v, q, strict=True)],
        [x.sub(y, alpha=along) for x, y in zip(Hv, Hq, strict=True)],
    )
