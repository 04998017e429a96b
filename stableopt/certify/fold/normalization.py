"""The rules of torch's normalizations: with stored statistics a diagonal map, with those of the sample a bounded one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from stableopt.certify.fold.registry import fold
from stableopt.certify.fold.stock import add_affine, add_reshape, along_last
from stableopt.certify.program import Builder, Value
from stableopt.nn.dispatch import lipschitz_rule

__all__ = ["add_stored_norm"]

_BATCH_AXES: dict[type[nn.Module], tuple[tuple[int, ...], str]] = {
    nn.BatchNorm1d: ((0, 1), "features or signals"), nn.BatchNorm2d: ((2,), "images"), nn.BatchNorm3d: ((3,), "volumes"),
    nn.InstanceNorm1d: ((1,), "signals"), nn.InstanceNorm2d: ((2,), "images"), nn.InstanceNorm3d: ((3,), "volumes"),
}  # fmt: skip


def _check_axes(module: nn.Module, value: Value) -> None:
    for kind, (axes, wanted) in _BATCH_AXES.items():
        if isinstance(module, kind) and len(value.shape) - 1 not in axes:
            raise ValueError(f"{type(module).__name__} is for {wanted}, got the shape {value.shape} without the batch.")


def _stored(module: Any, graph: Builder, value: Value) -> Value:
    """Fold a normalization by stored statistics: one factor and one summand per channel, computed in float64."""
    lipschitz_rule(module, "l2")  # refuses statistics that are missing, not finite, or not positive
    _check_axes(module, value)
    return add_stored_norm(
        graph, value, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
    )


def add_stored_norm(
    graph: Builder,
    value: Value,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
) -> Value:
    r"""Append :math:`\gamma (x - \mu)/\sqrt{v + \varepsilon} + \beta` per channel, rounded once.

    Examples:
        >>> import torch
        >>> graph = Builder((1,))
        >>> one = torch.ones(1)
        >>> (
        ...     add_stored_norm(graph, graph.input, one, 4 * one, None, None, eps=0.0).shape,
        ...     graph.tensors["0.scale"].item(),
        ... )
        ((1,), 0.5)
    """
    scale = (variance.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    return add_affine(graph, value, scale.to(variance.dtype), shift.to(variance.dtype), 0)


for _kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    fold.register(_kind)(_stored)


def _standardize(graph: Builder, eps: float, *, is_centered: bool = True) -> Callable[[Value], Value]:
    return lambda value: graph.add("standardize", value, eps=float(eps), centered=is_centered)


@fold.register(nn.LayerNorm)
def _(module: nn.LayerNorm, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")  # refuses eps = 0
    middle = _standardize(graph, module.eps)
    return along_last(graph, value, module.normalized_shape, middle, module.weight, module.bias)


@fold.register(nn.RMSNorm)
def _(module: nn.RMSNorm, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")  # refuses eps = None
    middle = _standardize(graph, module.eps or 0.0, is_centered=False)
    return along_last(graph, value, module.normalized_shape, middle, module.weight, None)


def _grouped(module: Any, graph: Builder, value: Value, groups: int) -> Value:
    channels = value.shape[0]
    if channels % groups:
        raise ValueError(f"the {channels} channels of the shape {value.shape} are no multiple of {groups}.")
    rows = add_reshape(graph, value, (groups, math.prod(value.shape) // groups))
    whole = add_reshape(graph, _standardize(graph, module.eps)(rows), value.shape)
    return add_affine(graph, whole, module.weight, module.bias, 0)


@fold.register(nn.GroupNorm)
def _(module: nn.GroupNorm, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")
    if value.shape[0] != module.num_channels:
        raise ValueError(f"it was built for {module.num_channels} channels, got the shape {value.shape}.")
    return _grouped(module, graph, value, module.num_groups)


def _instance_norm(module: Any, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")
    if module.track_running_stats:
        return _stored(module, graph, value)
    _check_axes(module, value)
    return _grouped(module, graph, value, value.shape[0])


for _kind in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
    fold.register(_kind)(_instance_norm)
