r"""Steps of the power method for matrices and kernels, with what keeps them going at every scale."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from stableopt.linalg import conv_power_start
from stableopt.nn.weights.geometry import Geometry

__all__ = ["direction", "fresh", "half_steps", "quick_half_steps", "scaled", "settled"]

STEPS, TRACKS = 30, 8
_MIXED = 0.01


def settled(V: Tensor, geometry: Geometry, steps: int = STEPS) -> Tensor:
    """Return vectors that know no other than this weight, after so many steps.

    Args:
        V: the weight, of moderate size.
        geometry: the operator.
        steps: how many; on the meta device none is made.

    Examples:
        >>> bool(settled(torch.diag(torch.tensor([3.0, 1.0])), Geometry("linear"))[0].abs() > 0.99)
        True
    """
    if geometry.kind != "linear":
        return conv_power_start(V, **geometry.options(V.ndim - 2), tracks=TRACKS, steps=steps)
    u = direction(V)
    for _ in range(0 if V.is_meta else steps):
        u = half_steps(V, u)[0]
    return u


def quick_half_steps(V: Tensor, u: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """Make a power step as :func:`half_steps` does, with numbers that are known at once."""
    tiny = torch.finfo(V.dtype).tiny
    v = torch.add(u, direction(V), alpha=_MIXED) @ V
    first = float(torch.linalg.vector_norm(v))
    v *= 1.0 / max(first, tiny)
    image = V @ v
    second = float(torch.linalg.vector_norm(image))
    image *= 1.0 / max(second, tiny)
    return image, v, first, second


def fresh(vectors: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return vectors of length 1, or 0 where there are no numbers: after to_empty() anything can be in there."""
    length = torch.linalg.vector_norm(vectors, dim=dims, keepdim=True, dtype=torch.float64)
    return torch.nan_to_num(vectors / length, 0.0, 0.0, 0.0).to(vectors.dtype)


def half_steps(V: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make a power step; return the new vectors, and the lengths after each half."""
    z = direction(V)
    v, first = _unit(V.mT @ u.add(z, alpha=_MIXED))
    image, second = _unit(V @ v)
    return torch.where(second > 0, image, z), v, first, second


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a vector over its length, and the length in float64, where its square cannot overflow; zero stays zero."""
    length = torch.linalg.vector_norm(x, dtype=torch.float64)
    return x / length.clamp_min(torch.finfo(x.dtype).tiny), length


def scaled(V: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor over its largest absolute value, and that, as a constant."""
    size = V.detach().abs().amax().clamp_min(torch.finfo(V.dtype).tiny)
    return V / size, size


def direction(V: Tensor) -> Tensor:
    """Return a fixed unit vector without pattern, one entry per row."""
    make = _make_direction if torch.compiler.is_compiling() else _kept_direction
    return make(V.shape[0], V.dtype, V.device)


def _make_direction(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    i = torch.arange(1, rows + 1, device=device, dtype=torch.float64)
    z = torch.cos(i * i * 2.399963229728653)
    return (z / torch.linalg.vector_norm(z)).to(dtype)


_kept_direction = functools.lru_cache(maxsize=256)(_make_direction)
