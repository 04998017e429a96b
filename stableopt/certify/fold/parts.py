r"""What the rules of blocks have in common: the settings of Euler steps, and sums with an input."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.certify.program import Builder, Value
from stableopt.certify.publish_blocks import storable, storable_down
from stableopt.nn.weights.geometry import Geometry

__all__ = [
    "activation_node", "add_residual", "conv_operator", "euler",
    "linear_operator", "storage",
]  # fmt: skip

Settings = dict[str, Any]

_SETTINGS: dict[str, Settings] = {
    "leaky_relu": {"slope": 0.01},
    "hardtanh": {"min": -1.0, "max": 1.0},
    "softplus": {"beta": 1.0},
}


def activation_node(name: str) -> Settings:
    """Return an activation of :mod:`stableopt.nn.unit_slopes` as an operation that is nested in a block.

    Examples:
        >>> activation_node("leaky_relu")
        {'op': 'activation', 'name': 'leaky_relu', 'slope': 0.01}
    """
    return {"op": "activation", "name": name, **_SETTINGS.get(name, {})}


def linear_operator(weight: Tensor, bias: Tensor | None) -> Settings:
    """Return a dense layer as an operation that is nested in a block.

    Examples:
        >>> sorted(linear_operator(torch.ones(1, 1), None))
        ['bias', 'op', 'transposed', 'weight']
    """
    return {"op": "linear", "weight": weight, "bias": bias, "transposed": False}


def conv_operator(weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Settings:
    """Return a convolution with stride 1 as an operation that is nested in a block.

    Examples:
        >>> geometry = Geometry("conv", dilation=(1,), groups=1, padding=(1,))
        >>> conv_operator(torch.ones(1, 1, 3), None, geometry)["padding"]
        [1]
    """
    dims = weight.ndim - 2
    return {
        "op": "conv", "dims": dims, "weight": weight, "bias": bias, "stride": [1] * dims,
        "padding": [int(p) for p in geometry.padding] or [0] * dims, "dilation": list(geometry.dilation) or [1] * dims,
        "groups": geometry.groups, "padding_mode": geometry.padding_mode, "transposed": False, "output_padding": [0] * dims,
    }  # fmt: skip


def storage(module: nn.Module) -> torch.dtype:
    """Return float64 if a module has a parameter or a buffer of it, or no floating one at all; else float32.

    Examples:
        >>> storage(nn.Linear(1, 1).bfloat16())
        torch.float32
    """
    found = {t.dtype for t in (*module.parameters(), *module.buffers()) if t.dtype.is_floating_point}
    return torch.float64 if not found or torch.float64 in found else torch.float32


def euler(
    operator: Settings,
    activation: str,
    *,
    step: float,
    decay: float | Fraction = 1.0,
    steps: Tensor | None = None,
    skew: Tensor | None = None,
    free: Settings | None = None,
    times: int = 1,
) -> Settings:
    r"""Return the settings of :math:`cx + Kx - \tau A^\top(s \odot \sigma(Ax + b)) + \beta B\sigma(Cx + d)`.

    Numbers that are no tensors are rounded so that they multiply tensors of the dtype of the weight as they are.

    Args:
        operator: A and b, from :func:`linear_operator` or :func:`conv_operator`.
        activation: name of :math:`\sigma`.
        step: :math:`\tau \ge 0`.
        decay: c.
        steps: s, one per hidden unit.
        skew: K, already times the step.
        free: ``inner``, ``outer`` and ``scale`` of the last part.
        times: how often the map is taken.

    Examples:
        >>> euler(linear_operator(torch.ones(1, 1), None), "relu", step=0.5)["decay"]
        1.0
    """
    dtype = operator["weight"].dtype
    if free is not None:
        free = free | {"scale": storable(free["scale"], dtype)}
    return {
        "operator": operator, "steps": steps, "step": storable(step, dtype), "decay": storable(float(decay), dtype), "skew": skew,
        "free": free, "activation": activation_node(activation), "times": times,
    }  # fmt: skip


def add_residual(
    graph: Builder, value: Value, output: Value, factors: Sequence[float | Fraction], dtype: torch.dtype, owner: str
) -> Value:
    """Append a sum of an input and the output of its branch, whose shapes must agree.

    Args:
        graph: the program.
        value: the input.
        output: of the branch.
        factors: of both; positive ones are rounded down to numbers that the dtype multiplies with as they are.
        dtype: of the tensors.
        owner: the class, for the message.

    Raises:
        ValueError: if the branch changes the shape.

    Examples:
        >>> graph = Builder((2,))
        >>> _ = add_residual(graph, graph.input, graph.input, [0.5, 0.5], torch.float32, "AveragedResidual")
        >>> graph.nodes
        [{'op': 'sum', 'in': [0, 0], 'factors': [0.5, 0.5]}]
    """
    if output.shape != value.shape:
        raise ValueError(f"the branch of {owner} gave the shape {output.shape} for an input of shape {value.shape}.")
    return graph.add("sum", value, output, factors=[storable_down(Fraction(factor), dtype) for factor in factors])
