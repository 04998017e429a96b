"""How far a method that trains with an estimate is from its limit at the moment."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.constraints.sharding import whole
from stableopt.nn.budget import Budgeted
from stableopt.nn.limits import Stacked
from stableopt.nn.weights import WeightMap

__all__ = ["norm_gap"]


def norm_gap(module: nn.Module, name: str = "weight") -> float | None:
    r"""Return the proved norm of the weight in training over its limit, for a method that trains with an estimate.

    A weight :math:`W` whose norm is limited by :math:`r` through an estimate may have :math:`\|W\| > r` in training. The gap is an
    upper bound of :math:`\|W\| / r`, proved for the numbers that training uses now; it is near 1 while the estimate follows the
    weight, and in evaluation and after :func:`stableopt.nn.export` it is at most 1 in any case.

    Args:
        module: a layer. Neither its parameters nor its buffers change.
        name: its limited weight.

    Returns:
        The gap, the largest of all parts of the weight; None for a weight without such a method, or without numbers.

    Raises:
        ValueError: if the weight holds NaN or infinity.

    Note:
        A proof costs about as much as a few dozen products of the weight with a vector and one with its own transpose, in float64,
        so it is taken now and then, not in each step. Where ``fully_shard`` has spread the weight, all processes must ask together.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> layer = stabilize(nn.Linear(8, 8), method="power")
        >>> bool(0.9 < norm_gap(layer) < 1.1), norm_gap(stabilize(nn.Linear(8, 8), method="gram"))
        (True, None)
    """
    if not P.is_parametrized(module, name):
        return None
    chain: Any = module.get_submodule(f"parametrizations.{name}")
    *inner, outer = chain
    unit = outer.unit if isinstance(outer, Budgeted) else outer
    maps: list[Any] = list(unit.maps) if isinstance(unit, Stacked) else [unit]
    if any(not isinstance(one, WeightMap) or one.by_construction for one in maps):
        return None
    with torch.no_grad():
        values = [whole(p) for p in ([chain.original] if chain.is_tensor else _originals(chain))]
        if inner:  # of somebody else's, on which the limit acts; copies, for some of them keep a state
            first, *others = copy.deepcopy(inner)
            values = [first(*values)]
            for other in others:
                values = [other(*values)]
        (V,) = values
        if V.is_meta or not V.numel():
            return None
        flat = isinstance(unit, Stacked) and unit.flat
        parts = [part.flatten(1) if flat else part for part in V.chunk(len(maps))]
        return max(one.gap(part).upper for one, part in zip(maps, parts, strict=True))


def _originals(chain: Any) -> list[Tensor]:
    return [getattr(chain, f"original{i}") for i in range(chain.ntensors)]
