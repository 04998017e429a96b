"""The rules of pooling, of torch and ours."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stableopt.certify.fold.registry import fold
from stableopt.certify.fold.spatial import add_along, add_take
from stableopt.certify.fold.stock import add_reshape, need_image
from stableopt.certify.program import Builder, Value
from stableopt.errors import UncertifiableError
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.pooling import L2NormPool, ScaledAvgPool, root_down
from stableopt.nn.rules.spatial import per_axis

__all__: list[str] = []

_AVG = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_LP = (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)
_ADAPTIVE_AVG = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_ADAPTIVE_MAX = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)


def _dims(module: nn.Module) -> int:
    families = (_AVG, _MAX, _LP, _ADAPTIVE_AVG, _ADAPTIVE_MAX)
    return next(i + 1 for kinds in families for i, kind in enumerate(kinds) if isinstance(module, kind))


def _pool(graph: Builder, value: Value, name: str, kernel: tuple[int, ...], **other: Any) -> Value:
    stride, padding = other.get("stride", kernel), other.get("padding", (0,) * len(kernel))
    if set(kernel) == set(stride) == {1} and not any(padding):
        return value
    return graph.add(
        "pool",
        value,
        name=name,
        dims=len(kernel),
        kernel=list(kernel),
        stride=list(stride),
        padding=list(padding),
    )


def _count(n: int, k: int, s: int, p: int, d: int = 1, *, ceil: bool) -> int:
    """Return the number of windows along an axis, as torch counts them: none starts in the padding on the right."""
    room = n + 2 * p - d * (k - 1) - 1
    count = (room + (s - 1 if ceil else 0)) // s + 1
    return count - 1 if ceil and (count - 1) * s >= n + p else count


def _more_windows(
    module: Any, value: Value, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> bool:
    """Return whether ``ceil_mode`` gives more windows on this image."""
    sizes = zip(value.shape[1:], kernel, stride, padding, strict=True)
    return module.ceil_mode and any(_count(*s, ceil=True) != _count(*s, ceil=False) for s in sizes)


def _avg_pool(module: Any, graph: Builder, value: Value) -> Value:
    dims = _dims(module)
    need_image(module, value, dims)
    kernel, stride, padding = (per_axis(v, dims) for v in (module.kernel_size, module.stride, module.padding))
    divisor = getattr(module, "divisor_override", None)
    if not _more_windows(module, value, kernel, stride, padding) and (
        divisor or module.count_include_pad or not any(padding)
    ):
        value = _pool(graph, value, "avg", kernel, stride=stride, padding=padding)
    else:  # windows of several sizes: a matrix of weights along each axis
        for axis, (k, s, p) in enumerate(zip(kernel, stride, padding, strict=True), start=1):
            eye = torch.eye(value.shape[axis], dtype=torch.float64)[None]
            matrix = F.avg_pool1d(eye, k, s, p, module.ceil_mode, module.count_include_pad)[0].T
            value = add_along(graph, value, axis, (matrix > 0).double() / k if divisor else matrix)
    return value if not divisor else graph.add("scale", value, factor=math.prod(kernel) / divisor)


def _max_pool(module: Any, graph: Builder, value: Value) -> Value:
    dims = _dims(module)
    need_image(module, value, dims)
    if module.return_indices:
        raise UncertifiableError("it also returns indices; a rule is known for return_indices=False.")
    kernel, stride, padding, dilation = (
        per_axis(v, dims) for v in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    if set(dilation) == {1} and not _more_windows(module, value, kernel, stride, padding):
        return _pool(graph, value, "max", kernel, stride=stride, padding=padding)
    windows = []
    for n, k, s, p, d in zip(value.shape[1:], kernel, stride, padding, dilation, strict=True):
        count = _count(n, k, s, p, d, ceil=module.ceil_mode)
        windows.append([[o * s - p + j * d for j in range(k)] for o in range(count)])
    return _max_over(graph, value, windows)


def _max_over(graph: Builder, value: Value, windows: list[list[list[int]]]) -> Value:
    """Take the maximum over listed windows: each is copied out, a place outside the image replaced by one of the window inside."""
    kernel = []
    for axis, listed in enumerate(windows, start=1):
        inside = [[i for i in window if 0 <= i < value.shape[axis]] for window in listed]
        widest = max(map(len, inside))
        value = add_take(graph, value, axis, [i for w in inside for i in [*w, *[w[-1]] * (widest - len(w))]])
        kernel.append(widest)
    return _pool(graph, value, "max", tuple(kernel))


def _lp_pool(module: Any, graph: Builder, value: Value) -> Value:
    dims, p = _dims(module), float(module.norm_type)
    need_image(module, value, dims)
    kernel = per_axis(module.kernel_size, dims)
    stride = kernel if module.stride is None else per_axis(module.stride, dims)
    lipschitz_rule(module, "l2")  # refuses ceil_mode, and powers that cancel
    if p == 1:
        pooled = _pool(graph, value, "avg", kernel, stride=stride)
        return graph.add("scale", pooled, factor=float(math.prod(kernel)))
    if p != 2:
        raise UncertifiableError(f"norm_type {p} is not in the format; use norm_type 1 or 2.")
    return graph.add("l2pool", value, dims=dims, kernel=list(kernel), stride=list(stride))


def _adaptive(module: Any, graph: Builder, value: Value) -> Value:
    dims, size = _dims(module), module.output_size
    need_image(module, value, dims)
    if getattr(module, "return_indices", False):
        raise UncertifiableError("it also returns indices; a rule is known for return_indices=False.")
    wanted = tuple(size) if isinstance(size, tuple | list) else (size,) * dims
    sizes = [n if o is None else int(o) for n, o in zip(value.shape[1:], wanted, strict=True)]
    average = isinstance(module, _ADAPTIVE_AVG)
    if not any(n % o for n, o in zip(value.shape[1:], sizes, strict=True)):
        kernel = tuple(n // o for n, o in zip(value.shape[1:], sizes, strict=True))
        return _pool(graph, value, "avg" if average else "max", kernel)
    if not average:
        places = zip(value.shape[1:], sizes, strict=True)
        return _max_over(
            graph, value, [[list(range(i * n // o, -(-(i + 1) * n // o))) for i in range(o)] for n, o in places]
        )
    for axis, o in enumerate(sizes, start=1):
        eye = torch.eye(value.shape[axis], dtype=torch.float64)[None]
        value = add_along(graph, value, axis, F.adaptive_avg_pool1d(eye, o)[0].T)
    return value


for _rule, _kinds in (
    (_avg_pool, _AVG), (_max_pool, _MAX), (_lp_pool, _LP), (_adaptive, (*_ADAPTIVE_AVG, *_ADAPTIVE_MAX)),
):  # fmt: skip
    for _kind in _kinds:
        fold.register(_kind)(_rule)


def _window(module: ScaledAvgPool | L2NormPool, value: Value) -> tuple[int, ...]:
    need_image(module, value, module.dims)
    return tuple(value.shape[1:]) if module.kernel_size is None else module.kernel_size


@fold.register(ScaledAvgPool)
def _(module: ScaledAvgPool, graph: Builder, value: Value) -> Value:
    kernel = _window(module, value)
    value = graph.add("scale", _pool(graph, value, "avg", kernel), factor=root_down(math.prod(kernel)))
    return value if module.kernel_size is not None else add_reshape(graph, value, value.shape[:1])


@fold.register(L2NormPool)
def _(module: L2NormPool, graph: Builder, value: Value) -> Value:
    kernel = _window(module, value)
    value = graph.add("l2pool", value, dims=module.dims, kernel=list(kernel), stride=list(kernel))
    return value if module.kernel_size is not None else add_reshape(graph, value, value.shape[:1])
