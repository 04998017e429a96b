"""The rules of layers that copy, move or interpolate pixels: padding, upsampling, shuffles, windows as columns."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.certify.fold.registry import fold
from stableopt.certify.fold.stock import add_affine, add_permute, add_reshape, need_image
from stableopt.certify.program import Builder, Value
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.pooling import InvertibleDownsampling
from stableopt.nn.rules.spatial import per_axis

__all__ = ["add_along", "add_take"]


def add_take(graph: Builder, value: Value, axis: int, index: list[int]) -> Value:
    """Append a choice of entries along an axis, unless it is all of them in their order.

    Examples:
        >>> graph = Builder((3,))
        >>> add_take(graph, graph.input, 0, [0, 1, 2]) == graph.input
        True
    """
    if index == list(range(value.shape[axis])):
        return value
    return graph.add("take", value, axis=axis, index=index)


def add_along(graph: Builder, value: Value, axis: int, matrix: Tensor) -> Value:
    """Append a matrix that acts on one axis.

    Args:
        graph: the program.
        value: the input.
        axis: the axis, >= 0.
        matrix: shape ``(new size, size of the axis)``; the identity adds nothing.

    Examples:
        >>> graph = Builder((3, 2))
        >>> add_along(graph, graph.input, 0, torch.eye(3)) == graph.input
        True
    """
    if matrix.shape[0] == matrix.shape[1] and bool((matrix == torch.eye(len(matrix))).all()):
        return value
    axes = range(len(value.shape))
    order = [i for i in axes if i != axis] + [axis]
    moved = graph.add(
        "linear", add_permute(graph, value, order), weight=matrix.contiguous(), bias=None, transposed=False
    )
    return add_permute(graph, moved, [order.index(i) for i in axes])


# ----------------------------------------------------------------------------------------------------------------------- padding


def _pairs(padding: Any, dims: int) -> list[tuple[int, int]]:
    """Return (before, after) for each of the last axes, the first of them first."""
    flat = [int(p) for p in (padding if isinstance(padding, tuple | list) else (padding,) * 2 * dims)]
    return list(zip(flat[::2], flat[1::2], strict=True))[::-1]


@fold.register(nn.ConstantPad1d)
@fold.register(nn.ConstantPad2d)
@fold.register(nn.ConstantPad3d)
def _(module: nn.ConstantPad2d, graph: Builder, value: Value) -> Value:
    """Crop, pad by zeros, and add the constant where the padding is."""
    lipschitz_rule(module, "l2")  # refuses a constant that is not finite
    dims = {nn.ConstantPad1d: 1, nn.ConstantPad2d: 2}.get(
        next(k for k in (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d) if isinstance(module, k)), 3
    )
    pairs = _pairs(module.padding, dims)
    start = len(value.shape)
    if start < dims:
        raise ValueError(f"it pads {dims} axes of the shape {value.shape}.")
    inside = torch.ones(value.shape)
    for axis, (before, after) in enumerate(pairs, start=start - dims):
        first, last = max(0, -before), value.shape[axis] - max(0, -after)
        if (first, last) != (0, value.shape[axis]):
            value = graph.add("slice", value, axis=axis, start=first, stop=last)
            inside = inside.narrow(axis, first, last - first)
    more = [[0] * (start - dims) + [max(0, pair[side]) for pair in pairs] for side in (0, 1)]
    if any(map(any, more)):
        value = graph.add("pad", value, before=more[0], after=more[1])
        flat = [n for pair in zip(more[0][::-1], more[1][::-1], strict=True) for n in pair]
        inside = F.pad(inside, flat)
        if module.value:
            value = add_affine(graph, value, None, (1.0 - inside) * module.value, None)
    return value


_COPYING = {
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def _copying(module: Any, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")  # refuses a circular padding that crops and wraps at once
    mode, dims = next((m, i + 1) for m, kinds in _COPYING.items() for i, k in enumerate(kinds) if isinstance(module, k))
    if len(value.shape) < dims:
        raise ValueError(f"it pads {dims} axes of the shape {value.shape}.")
    for axis, pair in enumerate(_pairs(module.padding, dims), start=len(value.shape) - dims):
        places = torch.arange(float(value.shape[axis]), dtype=torch.float64)[None, None]
        value = add_take(graph, value, axis, F.pad(places, pair, mode).long().flatten().tolist())
    return value


for _kinds in _COPYING.values():
    for _kind in _kinds:
        fold.register(_kind)(_copying)


# -------------------------------------------------------------------------------------------------------------------- upsampling


@fold.register(nn.Upsample)
def _(module: nn.Upsample, graph: Builder, value: Value) -> Value:
    """Interpolate along one axis after the other: by copies, or by a matrix of weights."""
    dims = len(value.shape) - 1
    nearest = module.mode.startswith("nearest")
    if not nearest:
        wanted = {"linear": 1, "bilinear": 2, "trilinear": 3}
        if module.mode not in wanted:
            lipschitz_rule(module, "l2")  # the sentence for other modes
        need_image(module, value, wanted.get(module.mode, dims))
    sizes, factors = (_each(v, dims) for v in (module.size, module.scale_factor))
    for axis in range(1, dims + 1):
        size, factor = sizes[axis - 1], factors[axis - 1]
        options: dict[str, Any] = {"size": size, "scale_factor": factor, "mode": module.mode if nearest else "linear"}
        options |= {"recompute_scale_factor": module.recompute_scale_factor} if factor is not None else {}
        options |= {} if nearest else {"align_corners": module.align_corners}
        n = value.shape[axis]
        if nearest:
            places = torch.arange(float(n), dtype=torch.float64)[None, None]
            value = add_take(graph, value, axis, F.interpolate(places, **options).long().flatten().tolist())
        else:
            value = add_along(
                graph, value, axis, F.interpolate(torch.eye(n, dtype=torch.float64)[None], **options)[0].T
            )
    return value


def _each(given: Any, dims: int) -> list[Any]:
    values = list(given) if isinstance(given, tuple | list) else [given] * dims
    if len(values) != dims:
        raise ValueError(f"it has {len(values)} sizes or factors for {dims} spatial axes.")
    return values


# ----------------------------------------------------------------------------------------------------- pixels and channels moved


@fold.register(nn.PixelShuffle)
def _(module: nn.PixelShuffle, graph: Builder, value: Value) -> Value:
    r = module.upscale_factor
    need_image(module, value, 2)
    c, h, w = value.shape
    if c % r**2:
        raise ValueError(f"the {c} channels of the shape {value.shape} are no multiple of {r**2}.")
    parts = add_permute(graph, add_reshape(graph, value, (c // r**2, r, r, h, w)), [0, 3, 1, 4, 2])
    return add_reshape(graph, parts, (c // r**2, h * r, w * r))


def _blocks_into_channels(graph: Builder, value: Value, block: tuple[int, ...]) -> Value:
    """Move the pixels of each block into channels: ``(c, n1, k1, n2, k2) -> (c, k1, k2, n1, n2)``."""
    c, *sizes = value.shape
    dims = len(block)
    if any(n % k for n, k in zip(sizes, block, strict=True)):
        raise ValueError(f"the image sizes of the shape {value.shape} are not divisible by the block {block}.")
    counts = [n // k for n, k in zip(sizes, block, strict=True)]
    split = add_reshape(graph, value, (c, *(m for pair in zip(counts, block, strict=True) for m in pair)))
    order = [0, *(2 * i + 2 for i in range(dims)), *(2 * i + 1 for i in range(dims))]
    return add_reshape(graph, add_permute(graph, split, order), (c * math.prod(block), *counts))


@fold.register(nn.PixelUnshuffle)
def _(module: nn.PixelUnshuffle, graph: Builder, value: Value) -> Value:
    need_image(module, value, 2)
    return _blocks_into_channels(graph, value, (module.downscale_factor,) * 2)


@fold.register(InvertibleDownsampling)
def _(module: InvertibleDownsampling, graph: Builder, value: Value) -> Value:
    need_image(module, value, module.dims)
    return _blocks_into_channels(graph, value, module.block)


@fold.register(nn.ChannelShuffle)
def _(module: nn.ChannelShuffle, graph: Builder, value: Value) -> Value:
    c, *sizes = value.shape
    if c % module.groups or not sizes:
        raise ValueError(
            f"it shuffles {module.groups} groups of the channels of an image, got the shape {value.shape}."
        )
    split = add_reshape(graph, value, (module.groups, c // module.groups, *sizes))
    moved = add_permute(graph, split, [1, 0, *range(2, 2 + len(sizes))])
    return add_reshape(graph, moved, value.shape)


# ------------------------------------------------------------------------------------------------------------ windows as columns


def _window_pixels(size: int, k: int, s: int, d: int) -> tuple[list[int], int]:
    """Return the pixels of all windows along an axis, tap by tap, and the number of windows."""
    count = (size - d * (k - 1) - 1) // s + 1
    return [o * s + j * d for j in range(k) for o in range(count)], count


@fold.register(nn.Unfold)
def _(module: nn.Unfold, graph: Builder, value: Value) -> Value:
    need_image(module, value, 2)
    kernel, stride, dilation, padding = (
        per_axis(v, 2) for v in (module.kernel_size, module.stride, module.dilation, module.padding)
    )
    if any(padding):
        value = graph.add("pad", value, before=[0, *padding], after=[0, *padding])
    counts = []
    for axis in (0, 1):
        index, count = _window_pixels(value.shape[axis + 1], kernel[axis], stride[axis], dilation[axis])
        if count < 1:
            raise ValueError(f"the windows do not fit the shape {value.shape}.")
        value, counts = add_take(graph, value, axis + 1, index), [*counts, count]
    c = value.shape[0]
    split = add_reshape(graph, value, (c, kernel[0], counts[0], kernel[1], counts[1]))
    moved = add_permute(graph, split, [0, 1, 3, 2, 4])
    return add_reshape(graph, moved, (c * math.prod(kernel), math.prod(counts)))


@fold.register(nn.Fold)
def _(module: nn.Fold, graph: Builder, value: Value) -> Value:
    """The adjoint of Unfold: add each window to its pixels, axis by axis, and crop the padding."""
    size, kernel, stride, dilation, padding = (
        per_axis(v, 2) for v in (module.output_size, module.kernel_size, module.stride, module.dilation, module.padding)
    )
    padded = [n + 2 * p for n, p in zip(size, padding, strict=True)]
    (rows, high), (cols, wide) = (_window_pixels(*args) for args in zip(padded, kernel, stride, dilation, strict=True))
    taps = math.prod(kernel)
    if len(value.shape) != 2 or value.shape[0] % taps or value.shape[1] != high * wide:
        raise ValueError(f"Fold needs the shape (channels * {taps}, {high * wide}), got {value.shape}.")
    c = value.shape[0] // taps
    split = add_permute(graph, add_reshape(graph, value, (c, *kernel, high, wide)), [0, 1, 3, 2, 4])
    value = add_reshape(graph, split, (c, kernel[0] * high, kernel[1] * wide))
    for axis, index in ((1, rows), (2, cols)):
        matrix = F.one_hot(torch.tensor(index), padded[axis - 1]).T.to(torch.float32)
        value = add_along(graph, value, axis, matrix)
        if padding[axis - 1]:
            p = padding[axis - 1]
            value = graph.add("slice", value, axis=axis, start=p, stop=p + size[axis - 1])
    return value
