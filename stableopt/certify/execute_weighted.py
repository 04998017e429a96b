r"""The operations with weights: dense layers, convolutions, diagonal maps and reflections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.certify.operations import operation
from stableopt.nn.activations import at_least_float32

__all__ = ["along", "convolve", "keeps_circle", "linear", "plain_convolve"]

Node = dict[str, Any]

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def along(values: Tensor, axis: int | None, x: Tensor) -> Tensor:
    """Return one value per entry of an axis in a shape that broadcasts against a batch; axis 0 is the first after the batch.

    Without an axis there is one value per entry of a sample.

    Examples:
        >>> along(torch.ones(3), 0, torch.zeros(2, 3, 4)).shape, along(torch.ones(4), -1, torch.zeros(2, 3, 4)).shape
        (torch.Size([3, 1]), torch.Size([4]))
    """
    return values.reshape(-1, *[1] * (x.ndim - 2)) if axis == 0 and values.ndim else values


def linear(node: Node, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Multiply the last axis by the weight, or by its transpose.

    Examples:
        >>> W = torch.tensor([[1.0, 2.0]])
        >>> linear({"transposed": True}, W, None, torch.tensor([[3.0]]))
        tensor([[3., 6.]])
    """
    return F.linear(x, weight.T if node["transposed"] else weight, bias)


def convolve(node: Node, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Convolve with the routine of torch, whatever algorithm that chooses.

    Examples:
        >>> node = {"dims": 1, "stride": [1], "padding": [1], "dilation": [1], "groups": 1, "padding_mode": "circular"}
        >>> convolve(node | {"transposed": False}, torch.ones(1, 1, 3), None, torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))
        tensor([[[7., 6., 9., 8.]]])
    """
    stride, padding, dilation = (tuple(node[key]) for key in ("stride", "padding", "dilation"))
    if node["transposed"]:
        kernel = _TRANSPOSED[node["dims"] - 1]
        extra = tuple(node.get("output_padding", [0] * node["dims"]))
        if node["padding_mode"] == "zeros":
            return kernel(x, weight, bias, stride, padding, extra, node["groups"], dilation)
        y = _unwrap(kernel(x, weight, None, stride, 0, extra, node["groups"], dilation), padding)
        return y if bias is None else y + along(bias, 0, y)
    if node["padding_mode"] == "circular":
        x, padding = _wrap(x, padding), 0
    return _CONVOLUTIONS[node["dims"] - 1](x, weight, bias, stride, padding, dilation, node["groups"])


def plain_convolve(node: Node, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Convolve by unfolding and a matrix product: plain sums of products, in some order.

    Examples:
        >>> node = {"dims": 1, "stride": [2], "padding": [1], "dilation": [1], "groups": 1, "padding_mode": "zeros"}
        >>> plain_convolve(node | {"transposed": False}, torch.ones(1, 1, 3), None, torch.ones(1, 1, 4))
        tensor([[[2., 3.]]])
    """
    groups, stride, padding, dilation = node["groups"], node["stride"], node["padding"], node["dilation"]
    kernel = weight.shape[2:]
    if node["transposed"]:  # spread the pixels out and convolve with the reflected kernel
        wrapped, extra = node["padding_mode"] == "circular", node.get("output_padding", [0] * node["dims"])
        if wrapped and keeps_circle(node, kernel):  # each output is one sum
            parts = weight.flip(*range(2, weight.ndim)).unflatten(0, (groups, -1)).transpose(1, 2)
            return _correlate(_wrap(x, padding), parts, bias, stride, dilation)
        crop = [0] * node["dims"] if wrapped else padding
        sides = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, crop, strict=True)]
        x = _spread(x, stride)
        x = F.pad(x, [n for s, e in zip(reversed(sides), reversed(extra), strict=True) for n in (s, s + e)])
        parts = weight.flip(*range(2, weight.ndim)).unflatten(0, (groups, -1)).transpose(1, 2)
        if not wrapped:
            return _correlate(x, parts, bias, [1] * node["dims"], dilation)
        y = _unwrap(_correlate(x, parts, None, [1] * node["dims"], dilation), padding)
        return y if bias is None else y + along(bias, 0, y)
    x = _wrap(x, padding) if node["padding_mode"] == "circular" else F.pad(x, _sides(padding))
    return _correlate(x, weight.unflatten(0, (groups, -1)), bias, stride, dilation)


def keeps_circle(node: Node, kernel: Sequence[int]) -> bool:
    """Return whether a transposed convolution on a circle gives each pixel as one sum: its image keeps its size.

    Examples:
        >>> keeps_circle({"stride": [1], "padding": [1], "dilation": [1]}, [3])
        True
    """
    rows = zip(node["stride"], node["padding"], node["dilation"], kernel, strict=True)
    return all(s == 1 and 2 * p == d * (k - 1) for s, p, d, k in rows)


def _correlate(x: Tensor, parts: Tensor, bias: Tensor | None, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Sum products of the entries of a kernel (groups, out, in, *kernel) and of each window; the bias is one product more."""
    dims, kernel = len(stride), parts.shape[3:]
    for axis in range(dims):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, span, stride[axis])[..., :: dilation[axis]]  # (batch, channels, *image, *kernel)
    image = x.shape[2 : 2 + dims]
    columns = x.unflatten(1, (parts.shape[0], -1)).movedim(list(range(3, 3 + dims)), list(range(-dims, 0)))
    columns = columns.flatten(-dims).flatten(2, -2)  # (batch, groups, in * taps, pixels)
    rows = parts.flatten(2)
    if bias is not None:
        rows = torch.cat([rows, bias.reshape(*rows.shape[:2], 1)], 2)
        columns = torch.cat([columns, torch.ones_like(columns[:, :, :1])], 2)
    return (rows @ columns).flatten(1, 2).unflatten(2, image)


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Put zeros between the pixels."""
    for axis, s in enumerate(stride):
        if s > 1:
            dim = 2 + axis
            zeros = torch.zeros_like(x).unsqueeze(dim + 1).expand(*[-1] * (dim + 1), s - 1, *[-1] * (x.ndim - dim - 1))
            x = torch.cat([x.unsqueeze(dim + 1), zeros], dim + 1).flatten(dim, dim + 1)
            x = x.narrow(dim, 0, x.shape[dim] - s + 1)
    return x


def _sides(padding: Sequence[int]) -> list[int]:
    return [n for p in reversed(padding) for n in (p, p)]


def _wrap(x: Tensor, padding: Sequence[int]) -> Tensor:
    return F.pad(x, _sides(padding), mode="circular") if any(padding) else x


def _unwrap(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Add what lies outside the image on the other side: the transpose of circular padding."""
    for axis, p in enumerate(padding):
        if p:
            dim, size = 2 + axis, x.shape[2 + axis] - 2 * p
            left, inside, right = x.narrow(dim, 0, p), x.narrow(dim, p, size), x.narrow(dim, p + size, p)
            rest = torch.zeros_like(inside.narrow(dim, 0, size - p))
            x = inside + torch.cat([rest, left], dim) + torch.cat([right, rest], dim)
    return x


def _weight_and_bias(node: Node, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return tensors[node["weight"]], None if node["bias"] is None else tensors[node["bias"]]


@operation("linear")
def _linear(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    return linear(node, *_weight_and_bias(node, tensors), inputs[0])


@operation("conv")
def _conv(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    return convolve(node, *_weight_and_bias(node, tensors), inputs[0])


@operation("affine")
def _affine(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    x = at_least_float32(inputs[0])
    if node["scale"] is not None:
        x = x * along(tensors[node["scale"]], node["axis"], x)
    if node["bias"] is not None:
        x = x + along(tensors[node["bias"]], node["axis"], x)
    return x.to(inputs[0].dtype)


@operation("householder")
def _householder(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Reflect the groups with v . z < 0 at the hyperplane of v, of any length; a zero vector leaves its group as it is."""
    x, v = at_least_float32(inputs[0]), tensors[node["vectors"]]
    dim = 1 if node["axis"] == 0 else x.ndim - 1
    z = x.unflatten(dim, tuple(v.shape))
    v = v / v.abs().amax(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)  # so that no square over- or underflows
    square = v.square().sum(1, keepdim=True)
    square = torch.where(square == 0, torch.ones_like(square), square)
    shape = [1] * (z.ndim - dim - 2)
    v, square = v.reshape(*v.shape, *shape), square.reshape(*square.shape, *shape)
    side = (v * z).sum(dim + 1, keepdim=True).clamp_max(0)
    return (z - 2 * side / square * v).flatten(dim, dim + 1).to(inputs[0].dtype)
