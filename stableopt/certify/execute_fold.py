r"""The operations that copy entries along an axis and that standardize a vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stableopt.certify.execute_activations import ACTIVATIONS
from stableopt.certify.execute_layout import batched
from stableopt.certify.operations import operation

__all__: list[str] = []

Node: TypeAlias = dict[str, Any]

if "zigzag" not in ACTIVATIONS:
    ACTIVATIONS["zigzag"] = ACTIVATIONS["n_activation"]


@operation("take")
def _take(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    index = torch.tensor(node["index"], dtype=torch.int64, device=inputs[0].device)
    return inputs[0].index_select(batched(node["axis"]), index)


@operation("standardize")
def _standardize(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Divide by the root of mean square plus eps along the last axis, after subtracting the mean if ``centered``."""
    x = inputs[0]
    if node["centered"]:
        x = x - x.mean(-1, keepdim=True)
    size = x.abs().amax(-1, keepdim=True).clamp_min(1.0)  # it cancels; with it no square overflows
    unit = x / size
    return unit / (unit.square().mean(-1, keepdim=True) + node["eps"] / size.square()).sqrt()
