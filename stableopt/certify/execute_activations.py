r"""The elementwise activations, each as its formula says: without the thresholds beyond which libraries switch to another one.

Half precision is computed in float32 and rounded once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stableopt.certify.execute_weighted import along
from stableopt.certify.operations import operation
from stableopt.nn.activations import at_least_float32

__all__ = ["ACTIVATIONS", "SELU_ALPHA", "SELU_SCALE"]

Node: TypeAlias = dict[str, Any]
Function: TypeAlias = Callable[[Tensor, Node, Mapping[str, Tensor]], Tensor]

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _softplus(x: Tensor) -> Tensor:
    return x.clamp_min(0.0) + x.abs().neg().exp().log1p()


def _elu(x: Tensor, alpha: float, width: float = 1.0) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp_max(0.0) / width))


def _prelu(x: Tensor, node: Node, tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.where(x > 0, x, x * along(tensors[node["weight"]].to(x.dtype), node["axis"], x))


def _zigzag(x: Tensor, node: Node, tensors: Mapping[str, Tensor]) -> Tensor:
    low, high = (
        along(row, node["axis"], x) for row in tensors[node["thresholds"]].to(x.dtype).sort(dim=0).values.unbind()
    )
    return torch.where(x < low, x - 2 * low, torch.where(x > high, x - 2 * high, -x))


def _spline(x: Tensor, node: Node, tensors: Mapping[str, Tensor]) -> Tensor:
    """Go through the bias at 0 with the slopes between knots that are uniform on [-span, span], as stableopt.nn.LinearSpline."""
    s, bias, span = tensors[node["slopes"]].to(x.dtype), tensors[node["bias"]].to(x.dtype), node["span"]
    channels, pieces = s.shape
    h = 2 * span / (pieces - 2)
    values = torch.cat([torch.zeros_like(s[:, :1]), (h * s[:, 1:-1]).cumsum(1)], 1)
    values = values - values[:, (pieces - 1) // 2, None] + bias[:, None]
    piece = ((x + span) / h).floor().nan_to_num(nan=0.0).clamp(-1, pieces - 2).long() + 1
    start = (piece - 1).clamp_min(0)
    offset = along(torch.arange(channels, device=x.device), node["axis"], x)
    slope, value = s.flatten()[piece + offset * pieces], values.flatten()[start + offset * (pieces - 1)]
    return value + slope * (x - (start.to(x.dtype) * h - span))


ACTIVATIONS: dict[str, Function] = {
    "identity": lambda x, _n, _t: x,
    "relu": lambda x, _n, _t: x.relu(),
    "abs": lambda x, _n, _t: x.abs(),
    "hardtanh": lambda x, n, _t: x.clamp(n["min"], n["max"]),
    "threshold": lambda x, n, _t: x.clamp_min(n["min"]),
    "leaky_relu": lambda x, n, _t: torch.where(x > 0, x, x * n["slope"]),
    "prelu": _prelu,
    "softshrink": lambda x, n, _t: x - x.clamp(-n["lambd"], n["lambd"]),
    "zigzag": _zigzag,
    "spline": _spline,
    "hardsigmoid": lambda x, _n, _t: (x / 6 + 0.5).clamp(0.0, 1.0),
    "hardswish": lambda x, _n, _t: x * ((x + 3).clamp(0.0, 6.0) / 6),
    "softsign": lambda x, _n, _t: x / (1 + x.abs()),
    "tanh": lambda x, _n, _t: x.tanh(),
    "sigmoid": lambda x, _n, _t: x.sigmoid(),
    "tanhshrink": lambda x, _n, _t: x - x.tanh(),
    "softplus": lambda x, n, _t: _softplus(n["beta"] * x) / n["beta"],
    "logsigmoid": lambda x, _n, _t: -_softplus(-x),
    "elu": lambda x, n, _t: _elu(x, n["alpha"]),
    "celu": lambda x, n, _t: _elu(x, n["alpha"], n["alpha"]),
    "selu": lambda x, _n, _t: SELU_SCALE * _elu(x, SELU_ALPHA),
    "gelu": lambda x, _n, _t: 0.5 * x * torch.erfc(-math.sqrt(0.5) * x),
    "gelu_tanh": lambda x, _n, _t: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh()),
    "silu": lambda x, _n, _t: x * x.sigmoid(),
    "mish": lambda x, _n, _t: x * _softplus(x).tanh(),
    "soft_abs": lambda x, n, _t: torch.hypot(x, torch.full_like(x, n["delta"])) - n["delta"],
}
"""Name -> ``(x, settings, tensors) -> y``, for ``x`` in float32 or float64."""


@operation("activation")
def _activation(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    if node["name"] not in ACTIVATIONS:
        raise ValueError(f"the activation {node['name']!r} is unknown.")
    return ACTIVATIONS[node["name"]](at_least_float32(inputs[0]), node, tensors).to(inputs[0].dtype)
