r"""The weights of evaluation of a method that trains with an estimate: scaled until proved, and kept while nothing changes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.errors import StabilityError
from stableopt.nn.precision import full_precision
from stableopt.nn.weights.geometry import Geometry
from stableopt.nn.weights.isometry import HALF
from stableopt.nn.weights.power_steps import STEPS, scaled, settled

__all__ = ["Folded", "fold", "proved_weight"]


@dataclass
class Folded:
    """A weight for evaluation, the original that it belongs to, and the vectors for a derivative once one is needed."""

    original: Tensor
    weight: Tensor
    scale: float
    radius: float
    geometry: Geometry
    vectors: Tensor | None = None

    def fits(self, V: Tensor, radius: float, geometry: Geometry) -> bool:
        """Return whether it is what these numbers, this radius and this operator give."""
        mine = self.original
        return (
            (self.radius, self.geometry) == (radius, geometry)
            and (mine.shape, mine.dtype, mine.device) == (V.shape, V.dtype, V.device)
            and torch.equal(mine, V)
        )

    @torch.no_grad()
    def settled_vectors(self) -> Tensor:
        """Return the vectors of the weight, for a derivative, made at the first use."""
        if self.vectors is None:
            V = self.original.float() if self.original.dtype in HALF else self.original
            with full_precision(V):
                self.vectors = settled(scaled(V)[0], self.geometry, 10 * STEPS)
        return self.vectors


@torch.no_grad()
def fold(V: Tensor, radius: float, geometry: Geometry) -> Folded:
    """Scale a weight until its stored numbers are proved to be within the radius.

    Args:
        V: the original.
        radius: the limit.
        geometry: the operator.

    Raises:
        StabilityError: if no scale can be proved in the dtype.
        ValueError: if the original holds NaN or infinity.

    Examples:
        >>> folded = fold(10.0 * torch.eye(2), 1.0, Geometry("linear"))
        >>> bool(0.999 < folded.weight[0, 0] <= 1.0), bool(0.0999 < folded.scale <= 0.1)
        (True, True)
    """
    original = V.clone()  # a proof reads numbers through numpy, after which fully_shard cannot free the storage
    norm = geometry.proved(original).upper
    if norm <= radius:
        return Folded(original, V.clone(memory_format=torch.contiguous_format), 1.0, radius, geometry)
    margin = max(2.0**-48, torch.finfo(V.dtype).eps / 8)
    for _ in range(24):
        scale = radius / norm * (1.0 - min(margin, 1.0))
        W = (V.double() * scale).to(V.dtype).contiguous()
        if geometry.proved(W).upper <= radius:
            return Folded(original, W, scale, radius, geometry)
        margin *= 2.0
    raise StabilityError(
        f"no scaled weight of shape {tuple(V.shape)} in {V.dtype} is proved to have norm at most {radius}; "
        "use a wider dtype."
    )


_KEPT: OrderedDict[tuple[Any, ...], Folded] = OrderedDict()
"""What compiled graphs keep, by the place of the original in memory; the numbers are compared before each use."""
_KEPT_BYTES = 2**30


@torch.library.custom_op("stableopt::proved_weight", mutates_args=())
def proved_weight(V: Tensor, vectors: Tensor, radius: float, geometry: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the proved weight of an original and the scale between the two, and vectors for a derivative in place of some."""
    folded = _kept_in_graphs(V, radius, geometry)
    scale = torch.tensor(folded.scale, dtype=_wide(V), device=V.device)
    if vectors.numel():
        vectors = folded.settled_vectors()
    return folded.weight.clone(), scale, vectors.clone()


@proved_weight.register_fake
def _(V: Tensor, vectors: Tensor, radius: float, geometry: str) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001 as above
    weight = torch.empty_like(V, memory_format=torch.contiguous_format)
    return weight, V.new_empty((), dtype=_wide(V)), torch.empty_like(vectors)


def _kept_in_graphs(V: Tensor, radius: float, spec: str) -> Folded:
    """Return what is kept for an original, or prove it; the oldest go where there is no room."""
    key, geometry = (V.data_ptr(), V.shape, V.dtype, radius, spec), Geometry.from_spec(spec)
    folded = _KEPT.pop(key, None)
    if folded is None or not folded.fits(V, radius, geometry):
        folded = fold(V, radius, geometry)
    _KEPT[key] = folded
    while len(_KEPT) > 1 and sum(2 * one.original.nbytes for one in _KEPT.values()) > _KEPT_BYTES:
        _KEPT.popitem(last=False)
    return folded


def _wide(V: Tensor) -> torch.dtype:
    return torch.float32 if V.dtype in HALF else V.dtype
