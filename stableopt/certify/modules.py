"""The operations of a certificate as plain torch modules that hold exactly the certified numbers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.nn.activations import Abs, GroupSort, Scale

__all__ = ["FoldedGradientBlock", "build"]


class FoldedGradientBlock(nn.Module):
    r"""The block :math:`x - \tau (m x + A^\top \sigma(Ax + b))` with a fixed step.

    Args:
        weight: the matrix :math:`A`, shape ``(hidden, dim)``.
        bias: the vector :math:`b`, or None.
        step: the step :math:`\tau \ge 0`.
        strong: the damping :math:`m \ge 0`.
        activation: the module :math:`\sigma`.

    Examples:
        >>> import torch
        >>> block = FoldedGradientBlock(torch.eye(2), None, 0.5, 0.0, nn.ReLU())
        >>> block(torch.tensor([[2.0, -2.0]]))
        tensor([[ 1., -2.]])
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, step: float, strong: float, activation: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.step, self.strong, self.activation = step, strong, activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the image of ``x``."""
        force = self.activation(F.linear(x, self.weight, self.bias)) @ self.weight
        return x - self.step * (self.strong * x + force)


def build(node: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """Return a module that computes one operation with exactly the given tensors.

    Args:
        node: an operation whose real settings are floats.
        tensors: the tensors that it names; they are not copied.

    Raises:
        ValueError: for an unknown operation.

    Examples:
        >>> build({"op": "activation", "name": "leaky_relu", "slope": 0.5}, {})
        LeakyReLU(negative_slope=0.5)
    """
    op = node["op"]
    if op in {"linear", "conv"}:
        layer = _dense(node, tensors) if op == "linear" else _conv(node, tensors)
        layer.weight = nn.Parameter(tensors[node["weight"]], requires_grad=False)
        bias = None if node["bias"] is None else nn.Parameter(tensors[node["bias"]], requires_grad=False)
        layer.register_parameter("bias", bias)
        return layer
    if op == "activation":
        return activation(node)
    if op == "pool":
        return _pool(node)
    if op == "flatten":
        return nn.Flatten()
    if op == "scale":
        return Scale(node["factor"])
    if op == "gradient_block":
        sigma = activation(
            {"name": node["activation"], "slope": node.get("slope"), "min": -1.0, "max": 1.0, "beta": 1.0}
        )
        bias = None if node["bias"] is None else tensors[node["bias"]]
        return FoldedGradientBlock(tensors[node["weight"]], bias, node["step"], node["strong"], sigma)
    raise ValueError(f"the operation {op!r} is unknown.")


def _dense(node: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Linear:
    out_features, in_features = tensors[node["weight"]].shape
    return nn.Linear(in_features, out_features, device="meta")


def _conv(node: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Conv1d | nn.Conv2d:
    out_channels, in_channels, *kernel = tensors[node["weight"]].shape
    kind = nn.Conv1d if node["dims"] == 1 else nn.Conv2d
    stride, padding, dilation = (tuple(node[key]) for key in ("stride", "padding", "dilation"))
    return kind(
        in_channels * node["groups"],
        out_channels,
        tuple(kernel),  # pyright: ignore[reportArgumentType] one entry for Conv1d, two for Conv2d
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=node["groups"],
        padding_mode=node["padding_mode"],
        device="meta",
    )


def activation(node: dict[str, Any]) -> nn.Module:
    """Return the module of an activation.

    Raises:
        ValueError: for an unknown name.

    Examples:
        >>> activation({"name": "tanh"})
        Tanh()
    """
    name = node["name"]
    plain = {"identity": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU}
    plain |= {"gelu": nn.GELU, "abs": Abs}
    if name in plain:
        return plain[name]()
    if name == "softplus":
        return nn.Softplus(node["beta"])
    if name == "hardtanh":
        return nn.Hardtanh(node["min"], node["max"])
    if name == "leaky_relu":
        return nn.LeakyReLU(node["slope"])
    if name == "elu":
        return nn.ELU(node["alpha"])
    if name == "groupsort":
        return GroupSort(node["group_size"])
    raise ValueError(f"the activation {name!r} is unknown.")


def _pool(node: dict[str, Any]) -> nn.Module:
    kernel, stride, padding = (tuple(node[key]) for key in ("kernel", "stride", "padding"))
    if node["name"] == "avg":
        return (nn.AvgPool1d if node["dims"] == 1 else nn.AvgPool2d)(kernel, stride, padding)
    return (nn.MaxPool1d if node["dims"] == 1 else nn.MaxPool2d)(kernel, stride, padding)
