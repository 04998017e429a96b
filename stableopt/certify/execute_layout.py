r"""The operations that move, select and add entries.

Half precision is computed in float32 and rounded once at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.certify.operations import operation
from stableopt.nn.activations import at_least_float32

__all__ = ["batched"]

Node = dict[str, Any]


def batched(axis: int) -> int:
    """Return the dimension of a batch that an axis of one sample is.

    Examples:
        >>> batched(0), batched(-1)
        (1, -1)
    """
    return axis + 1 if axis >= 0 else axis


@operation("scale")
def _scale(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    return (at_least_float32(inputs[0]) * node["factor"]).to(inputs[0].dtype)


@operation("sum")
def _sum(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    terms = zip(map(at_least_float32, inputs), node["factors"], strict=True)
    first, *others = (value if factor == 1.0 else value * factor for value, factor in terms)
    for value in others:
        first = first + value
    return first.to(_common_dtype(inputs))


def _common_dtype(inputs: list[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (value.dtype for value in inputs))


@operation("reshape")
def _reshape(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    return inputs[0].reshape(inputs[0].shape[0], *node["shape"])


@operation("permute")
def _permute(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    return inputs[0].permute(0, *(batched(axis) for axis in node["order"]))


@operation("pad")
def _pad(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    sides = zip(reversed(node["before"]), reversed(node["after"]), strict=True)
    return F.pad(inputs[0], [n for pair in sides for n in pair])


@operation("slice")
def _slice(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    x, dim = inputs[0], batched(node["axis"])
    if not 0 <= node["start"] < node["stop"] <= x.shape[dim]:
        raise ValueError(f"a slice from {node['start']} to {node['stop']} does not fit an axis of {x.shape[dim]}.")
    index = [slice(None)] * x.ndim
    index[dim] = slice(node["start"], node["stop"], node.get("step", 1))
    return x[tuple(index)]


@operation("mean")
def _mean(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    return at_least_float32(inputs[0]).mean(batched(node["axis"])).to(inputs[0].dtype)


@operation("concat")
def _concat(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    return torch.cat(inputs, batched(node["axis"]))


@operation("center")
def _center(_node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Subtract the mean along the last axis."""
    x = at_least_float32(inputs[0])
    return (x - x.mean(-1, keepdim=True)).to(inputs[0].dtype)
