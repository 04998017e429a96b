"""The rules of torch's layers with weights, of its normalizations, and of maps that rearrange entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.certify.fold.registry import fold
from stableopt.certify.fold.structure import batched_axis
from stableopt.certify.program import Builder, Value
from stableopt.errors import UncertifiableError
from stableopt.nn.rules.spatial import per_axis

__all__ = ["add_affine", "add_permute", "add_reshape", "need_image"]


def need_image(module: nn.Module, value: Value, dims: int) -> None:
    """Refuse an input that is no image with channels and ``dims`` spatial axes.

    Raises:
        ValueError: if it has another number of dimensions.

    Examples:
        >>> need_image(nn.Conv1d(1, 1, 1), Value(0, (1, 5)), 1)
    """
    if len(value.shape) != dims + 1:
        name = type(module).__name__
        raise ValueError(f"{name} needs an input of {dims + 1} dimensions without the batch, got shape {value.shape}.")


def add_reshape(graph: Builder, value: Value, shape: tuple[int, ...]) -> Value:
    """Append a reshape, unless the value has that shape.

    Examples:
        >>> graph = Builder((2,))
        >>> add_reshape(graph, graph.input, (2,)) == graph.input
        True
    """
    return value if value.shape == shape else graph.add("reshape", value, shape=list(shape))


def add_permute(graph: Builder, value: Value, order: list[int]) -> Value:
    """Append a permutation of the axes, unless it is the identity.

    Examples:
        >>> graph = Builder((2, 3))
        >>> add_permute(graph, graph.input, [0, 1]) == graph.input
        True
    """
    return value if order == list(range(len(order))) else graph.add("permute", value, order=order)


def add_affine(graph: Builder, value: Value, scale: Tensor | None, bias: Tensor | None, axis: int | None) -> Value:
    """Append a product with and a sum of one number per entry of an axis, or per entry if the axis is None.

    Args:
        graph: the program.
        value: the input.
        scale: the factors, or None.
        bias: what is added, or None.
        axis: 0, -1, or None.

    Raises:
        ValueError: if the number of entries differs.

    Examples:
        >>> from stableopt.certify import execute
        >>> add_affine(Builder((2,)), Value(0, (2,)), None, None, 0)
        Value(number=0, shape=(2,))
    """
    if scale is None and bias is None:
        return value
    shape = value.shape if axis is None else (value.shape[axis],)
    for part in (scale, bias):
        if part is not None and tuple(part.shape) != shape:
            where = (
                f"channels, got {shape[0]} in dimension {axis}" if axis is not None else f"the shape {shape}, got that"
            )
            raise ValueError(f"it was built for {len(part)} {where} of the shape {value.shape}.")
    return graph.add("affine", value, scale=scale, bias=bias, axis=-1 if len(value.shape) == 1 else axis)


def along_last(
    graph: Builder, value: Value, last: tuple[int, ...], middle: Callable[[Value], Value], scale: Any, bias: Any
) -> Value:
    """Append an operation along the last axis for the last axes joined to one, with a factor and a summand per entry.

    Raises:
        ValueError: if the last axes of the value are others.

    Examples:
        >>> graph = Builder((2, 3))
        >>> along_last(graph, graph.input, (2, 3), lambda value: value, None, None).shape
        (2, 3)
    """
    shape = value.shape
    if shape[len(shape) - len(last) :] != tuple(last):
        raise ValueError(f"it is for the last sizes {tuple(last)}, got the shape {shape}.")
    joined = add_reshape(graph, value, (*shape[: len(shape) - len(last)], math.prod(last)))
    factors, offset = (None if part is None else part.reshape(-1) for part in (scale, bias))
    return add_reshape(graph, add_affine(graph, middle(joined), factors, offset, -1), shape)


# ----------------------------------------------------------------------------------------------------------- layers with weights


@fold.register(nn.Linear)
def _(module: nn.Linear, graph: Builder, value: Value) -> Value:
    return graph.add("linear", value, weight=module.weight, bias=module.bias, transposed=False)


def _conv_padding(module: nn.Conv2d, dims: int) -> tuple[list[int], list[int]]:
    """Return the padding on both sides, and what is padded on the right in addition."""
    if module.padding_mode not in {"zeros", "circular"}:
        raise UncertifiableError(
            f"padding_mode {module.padding_mode!r} has no proved bound; use 'zeros' or 'circular'."
        )
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    more = [0] * dims
    if module.padding == "same":
        padding, more = [s // 2 for s in spans], [s % 2 for s in spans]
    else:
        padding = [0] * dims if module.padding == "valid" else list(per_axis(module.padding, dims))
    if module.padding_mode == "circular" and (any(more) or any(2 * p > s for p, s in zip(padding, spans, strict=True))):
        raise UncertifiableError(
            "circular padding that is uneven, or wider than dilation * (kernel_size - 1) / 2, repeats pixels and has no rule."
        )
    return padding, more


def _conv_settings(module: nn.Conv2d | nn.ConvTranspose2d, dims: int) -> dict[str, Any]:
    """Return what a convolution and a transposed one say in the same words."""
    return {
        "dims": dims,
        "weight": module.weight,
        "bias": module.bias,
        "stride": list(per_axis(module.stride, dims)),
        "dilation": list(per_axis(module.dilation, dims)),
        "groups": int(module.groups),
    }


@fold.register(nn.Conv1d)
@fold.register(nn.Conv2d)
@fold.register(nn.Conv3d)
def _(module: nn.Conv2d, graph: Builder, value: Value) -> Value:
    dims = len(module.kernel_size)
    need_image(module, value, dims)
    padding, more = _conv_padding(module, dims)
    if any(more):  # padding='same' of an even kernel: torch pads the right side by one more
        value = graph.add(
            "pad", value, before=[0, *padding], after=[0, *(p + q for p, q in zip(padding, more, strict=True))]
        )
        padding = [0] * dims
    return graph.add(
        "conv",
        value,
        **_conv_settings(module, dims),
        padding=padding,
        padding_mode=module.padding_mode,
        transposed=False,
        output_padding=[0] * dims,
    )


@fold.register(nn.ConvTranspose1d)
@fold.register(nn.ConvTranspose2d)
@fold.register(nn.ConvTranspose3d)
def _(module: nn.ConvTranspose2d, graph: Builder, value: Value) -> Value:
    dims = len(module.kernel_size)
    need_image(module, value, dims)
    return graph.add(
        "conv",
        value,
        **_conv_settings(module, dims),
        padding=list(per_axis(module.padding, dims)),  # pyright: ignore[reportArgumentType] no string here
        padding_mode="zeros",
        transposed=True,
        output_padding=list(per_axis(module.output_padding, dims)),
    )


# --------------------------------------------------------------------------------------------------- entries in another order


def _nothing(_module: nn.Module, _graph: Builder, value: Value) -> Value:
    return value


for _kind in (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
):  # the identity in evaluation mode  # fmt: skip
    fold.register(_kind)(_nothing)


@fold.register(nn.Flatten)
def _(module: nn.Flatten, graph: Builder, value: Value) -> Value:
    dims = len(value.shape)
    first, last = batched_axis(module.start_dim, dims), batched_axis(module.end_dim, dims)
    middle = math.prod(value.shape[first : last + 1])
    return graph.add("reshape", value, shape=[*value.shape[:first], middle, *value.shape[last + 1 :]])


@fold.register(nn.Unflatten)
def _(module: nn.Unflatten, graph: Builder, value: Value) -> Value:
    if not isinstance(module.dim, int):
        raise UncertifiableError("Unflatten of a named dimension has no rule; give its number.")
    axis = batched_axis(module.dim, len(value.shape))
    size: Any = module.unflattened_size
    sizes = tuple(torch.empty(value.shape[axis], device="meta").unflatten(0, tuple(size)).shape)
    return graph.add("reshape", value, shape=[*value.shape[:axis], *sizes, *value.shape[axis + 1 :]])
