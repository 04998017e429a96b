r"""The operations on windows and on groups of entries: pools, sorting, projections and normalizations.

Half precision is computed in float32 and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.certify.execute_layout import batched
from stableopt.certify.operations import operation
from stableopt.nn.activations import at_least_float32

__all__: list[str] = []

Node = dict[str, Any]

_AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAXIMA = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


@operation("pool")
def _pool(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    kernel, stride, padding = (tuple(node[key]) for key in ("kernel", "stride", "padding"))
    if node["name"] == "avg":
        x = at_least_float32(inputs[0])
        return _AVERAGES[node["dims"] - 1](x, kernel, stride, padding).to(inputs[0].dtype)
    if node["name"] == "max":
        return _MAXIMA[node["dims"] - 1](inputs[0], kernel, stride, padding)
    raise ValueError(f"the pool {node['name']!r} is unknown.")


@operation("l2pool")
def _l2pool(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Return the 2-norm of each window; each is first divided by its largest entry, so that no square over- or underflows."""
    x = _windows(node, at_least_float32(inputs[0])).flatten(-node["dims"])
    size = x.abs().amax(-1, keepdim=True)
    size = torch.where(size == 0, torch.ones_like(size), size)
    return ((x / size).square().sum(-1).sqrt() * size.squeeze(-1)).to(inputs[0].dtype)


def _windows(node: Node, x: Tensor) -> Tensor:
    for k, s in zip(node["kernel"], node["stride"], strict=True):
        x = x.unfold(-node["dims"], k, s)  # each adds a dimension at the end, so the next axis has the same number
    return x


@operation("groupsort")
def _groupsort(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    dim, size = batched(node["axis"]), node["group_size"]
    x = inputs[0]
    dim = dim % x.ndim
    groups = x.unflatten(dim, (x.shape[dim] // size, size))
    if size == 2:  # faster than sorting
        return torch.stack([groups.amin(dim + 1), groups.amax(dim + 1)], dim + 1).flatten(dim, dim + 1)
    return groups.sort(dim + 1).values.flatten(dim, dim + 1)


@operation("softmax")
def _softmax(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    return at_least_float32(inputs[0]).softmax(batched(node["axis"])).to(inputs[0].dtype)


@operation("ball")
def _ball(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Project each sample, or each vector along the last axis, onto a Euclidean ball.

    The largest entry is taken out, so that no square over- or underflows.
    """
    x = at_least_float32(inputs[0])
    middle = None if node["center"] is None else tensors[node["center"]]
    away = x if middle is None else x - middle
    dims = (-1,) if node.get("axis") == -1 else tuple(range(1, x.ndim))
    size = away.abs().amax(dims, keepdim=True)
    size = torch.where(size == 0, torch.ones_like(size), size)
    norm = (away / size).square().sum(dims, keepdim=True).sqrt()  # at least 1, or 0
    near = away / size * (node["radius"] / norm.clamp_min(1.0))
    inside = size * norm <= node["radius"]
    return torch.where(inside, x, near if middle is None else near + middle).to(inputs[0].dtype)
