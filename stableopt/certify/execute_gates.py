r"""Run a GRU or an LSTM from the zero state, one step after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.certify.operations import operation

__all__: list[str] = []

Node: TypeAlias = dict[str, Any]


@operation("gated")
def _gated(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    x, W = inputs[0], tensors[node["weight"]]
    bias, hidden_bias, R = (
        None if node[key] is None else tensors[node[key]] for key in ("bias", "hidden_bias", "projection")
    )
    if x.is_meta:  # only the shape is asked for
        return x.new_empty(*x.shape[:-1], W.shape[1])
    x = x if node["limit"] is None else x.clamp(-node["limit"], node["limit"])
    step, h = _update if node["kind"] == "gru" else _remember, x.new_zeros(len(x), W.shape[1])
    drive, outputs = F.linear(x, tensors[node["input"]], bias).unbind(1), list[Tensor]()
    memory = h if R is None else x.new_zeros(len(x), R.shape[1])
    for told in reversed(drive) if node["reverse"] else drive:
        h, memory = step(told, F.linear(h, W, hidden_bias), h, memory)
        h = h if R is None else F.linear(h, R)
        outputs.append(h)
    return torch.stack(outputs[::-1] if node["reverse"] else outputs, 1)


def _update(told: Tensor, kept: Tensor, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """One step of a GRU, which resets after the product."""
    (r, z, n), (r_h, z_h, n_h) = told.chunk(3, -1), kept.chunk(3, -1)
    z, new = (z + z_h).sigmoid(), (n + (r + r_h).sigmoid() * n_h).tanh()
    return new + z * (h - new), memory


def _remember(told: Tensor, kept: Tensor, _h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM."""
    i, f, g, o = (told + kept).chunk(4, -1)
    memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
    return o.sigmoid() * memory.tanh(), memory
