"""Every regularizer of the package, and the points on which the laws are checked. A new class adds a row."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stableopt.constraints import (
    L1,
    Box,
    Constraint,
    L2Ball,
    L2Squared,
    LinfBall,
    NonNegative,
    Orthogonal,
    Regularizer,
    SpectralBall,
)

PENALTIES: list[Regularizer] = [L1(0.3), L1(0.0), L2Squared(0.7), L2Squared(0.0)]
CONVEX_SETS: list[Constraint] = [
    Box(-0.55, 0.8),
    Box(-math.inf, 0.1),
    Box(0.1, math.inf),
    NonNegative(),
    LinfBall(0.7),
    L2Ball(1.3),
    L2Ball(1e-3),
    SpectralBall(0.9),
    SpectralBall(30.1),
]
MANIFOLDS: list[Constraint] = [Orthogonal(), Orthogonal("cayley")]
DEGENERATE_SETS: list[Constraint] = [LinfBall(0.0), L2Ball(0.0), Box(0.5, 0.5), Box(-math.inf, math.inf)]

CONVEX: list[Regularizer] = [*PENALTIES, *CONVEX_SETS]
SETS: list[Constraint] = [*CONVEX_SETS, *MANIFOLDS, *DEGENERATE_SETS]
ALL: list[Regularizer] = [*PENALTIES, *SETS]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def only_matrices(regularizer: Regularizer) -> bool:
    return isinstance(regularizer, SpectralBall | Orthogonal)


def matrices(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield named matrices of every awkward kind, finite in ``dtype``."""
    generator = torch.Generator().manual_seed(1)
    info = torch.finfo(dtype)
    for shape in ((4, 3), (3, 4), (3, 3), (1, 5), (5, 1), (1, 1)):
        for scale in (1e-2, 1.0, 50.0):
            x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            yield f"random{shape}*{scale:g}", x.to(dtype)
    base = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    huge = min(1e30, info.max / 8)
    yield "zero", torch.zeros(3, 2, dtype=dtype)
    yield "minus zero", torch.full((2, 2), -0.0, dtype=dtype)
    yield "huge", (huge * base / base.abs().max()).to(dtype)
    yield "tiny", (1e-3 * info.smallest_normal**0.5 * base).to(dtype)
    yield "subnormal", torch.full((2, 3), info.smallest_normal * info.eps, dtype=dtype)
    yield "largest", torch.tensor([[info.max, -info.max], [info.max, info.max]], dtype=dtype)
    yield "uneven", torch.tensor([[huge, 1.0], [info.smallest_normal, -0.0]], dtype=dtype)
    yield "repeated", 3.0 * torch.eye(3, dtype=dtype)
    yield "rank one", torch.ones(3, 4, dtype=dtype)
    yield "identity", torch.eye(3, 2, dtype=dtype)
    yield "transposed", base.to(dtype).mT
    yield "strided", torch.randn(6, 6, generator=generator, dtype=torch.float64).to(dtype)[::2, 1::2]
    yield "expanded", torch.tensor([[2.0, -1.0, 0.5]], dtype=dtype).expand(3, 3)
    yield "empty", torch.zeros(0, 3, dtype=dtype)


def tensors(regularizer: Regularizer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices, and for what is not about matrices also other shapes."""
    yield from matrices(dtype)
    if not only_matrices(regularizer):
        yield "0-d", torch.tensor(-2.0, dtype=dtype)
        yield "vector", torch.linspace(-3.0, 3.0, 7, dtype=torch.float64).to(dtype)
        yield (
            "kernel",
            torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype),
        )
        yield "nothing", torch.zeros(0, dtype=dtype)
