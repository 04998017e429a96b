"""Every row of the catalogue, and the points on which the laws are checked."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import torch
from torch import Tensor

from stableopt.constraints import Constraint
from tests.constraints import rows
from tests.constraints.rows import Row

ROWS: list[Row] = [
    row
    for module in pkgutil.iter_modules(rows.__path__)
    for row in importlib.import_module(f"{rows.__name__}.{module.name}").ROWS
]
CONVEX = [row for row in ROWS if row.convex]
SETS = [row for row in ROWS if isinstance(row.g, Constraint)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ANY_SHAPE = ((4, 3), (3, 4), (3, 3), (1, 5), (5, 1), (1, 1))


def name_of(row: Row) -> str:
    """Return what a test is called that runs on this row."""
    return repr(row.g)[:80]


def shapes_of(row: Row) -> tuple[tuple[int, ...], ...]:
    return row.shapes or ANY_SHAPE


def random(row: Row, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a random float64 point of this shape in the domain of the row."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x if row.domain is None else row.domain(x)


def pairs(row: Row) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of points, far from and near to each other."""
    made = []
    for shape in shapes_of(row)[:4]:
        for scale in (0.3, 1.0, 10.0):
            generator = torch.Generator().manual_seed(3)
            x, y = (scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).unbind()
            made += [(x, y), (x, x + 1e-3 * y)]
    return made


def points(row: Row, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield named tensors of every awkward kind, finite in ``dtype``."""
    generator = torch.Generator().manual_seed(1)
    info = torch.finfo(dtype)
    huge = min(1e30, info.max / 8)
    for shape in shapes_of(row):
        for scale in (1e-2, 1.0, 50.0):
            x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            yield f"random{shape}*{scale:g}", x.to(dtype)
    for shape in shapes_of(row)[:3]:
        base = torch.randn(shape, generator=generator, dtype=torch.float64)
        yield "zero", torch.zeros(shape, dtype=dtype)
        yield "minus zero", torch.full(shape, -0.0, dtype=dtype)
        yield "huge", (huge * base / base.abs().max()).to(dtype)
        yield "tiny", (1e-3 * info.smallest_normal**0.5 * base).to(dtype)
        yield "subnormal", torch.full(shape, info.smallest_normal * info.eps, dtype=dtype)
        signs = torch.where(base < 0, -1.0, 1.0)
        yield "largest", (info.max * signs).to(dtype)
        yield "uneven", torch.where(base > 0.5, huge, info.smallest_normal * signs).to(dtype)
        yield "ties", torch.ones(shape, dtype=dtype)
        yield "strided", torch.randn(*shape, 2, generator=generator, dtype=torch.float64).to(dtype)[..., 0]
        yield "expanded", torch.tensor(0.7, dtype=dtype).expand(shape)
        if len(shape) == 2:
            yield "transposed", base.to(dtype).mT.contiguous().mT
            yield "identity", torch.eye(*shape, dtype=dtype)
            yield "repeated", 3.0 * torch.eye(*shape, dtype=dtype)
    if row.shapes is None:
        yield "empty", torch.zeros(0, 3, dtype=dtype)
        yield "0-d", torch.tensor(-2.0, dtype=dtype)
        yield "vector", torch.linspace(-3.0, 3.0, 7, dtype=torch.float64).to(dtype)
        yield "kernel", torch.randn(2, 2, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
        yield "nothing", torch.zeros(0, dtype=dtype)
