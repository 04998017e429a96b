"""The rules of modules that are made of other modules: chains, branches side by side, and their sums."""

from __future__ import annotations

import math

from torch import nn

from stableopt.certify.fold.registry import fold
from stableopt.certify.program import Builder, Value
from stableopt.errors import UncertifiableError
from stableopt.nn.branches import refuse_in_place
from stableopt.nn.structure import Concat, Merge, Parallel

__all__ = ["batched_axis"]


def batched_axis(dim: int, dims: int) -> int:
    """Return the axis of one sample that a dimension of a batch is.

    Args:
        dim: the dimension as a module counts it, the batch being 0; it may be negative.
        dims: number of dimensions of one sample.

    Raises:
        ValueError: if there is no such dimension, or it is the batch.

    Examples:
        >>> batched_axis(1, 3), batched_axis(-1, 3)
        (0, 2)
    """
    if not -dims - 1 <= dim <= dims or dim % (dims + 1) == 0:
        raise ValueError(f"dimension {dim} is the batch or none of the {dims} dimensions of a sample.")
    return dim % (dims + 1) - 1


@fold.register(nn.Sequential)
def _(module: nn.Sequential, graph: Builder, value: Value) -> Value:
    for name, child in module._modules.items():  # noqa: SLF001 named_children() drops repeated modules
        if child is not None:
            value = graph.fold(child, value, name)
    return value


def _branches(module: Concat | Merge, graph: Builder, value: Value) -> list[Value]:
    refuse_in_place(module)
    return [graph.fold(branch, value, f"branches.{i}") for i, branch in enumerate(module.branches)]


@fold.register(Concat)
def _(module: Concat, graph: Builder, value: Value) -> Value:
    outputs = _branches(module, graph, value)
    return graph.add("concat", *outputs, axis=batched_axis(module.dim, len(outputs[0].shape)))


@fold.register(Parallel)
def _(module: Parallel, graph: Builder, value: Value) -> Value:
    refuse_in_place(module)
    axis = batched_axis(module.dim, len(value.shape))
    if value.shape[axis] != sum(module.sizes):
        raise ValueError(f"the sizes {module.sizes} must add up to axis {axis} of the shape {value.shape} before it.")
    outputs, start = [], 0
    for index, (branch, size) in enumerate(zip(module.branches, module.sizes, strict=True)):
        part = graph.add("slice", value, axis=axis, start=start, stop=start + size)
        outputs.append(graph.fold(branch, part, f"branches.{index}"))
        start += size
    return graph.add("concat", *outputs, axis=batched_axis(module.dim, len(outputs[0].shape)))


@fold.register(Merge)
def _(module: Merge, graph: Builder, value: Value) -> Value:
    outputs = _branches(module, graph, value)
    shape = outputs[0].shape
    if any(output.shape != shape for output in outputs):
        raise ValueError(f"the branches of a Merge gave different shapes: {[output.shape for output in outputs]}.")
    if module.by == "sum":
        return graph.add("sum", *outputs, factors=list(module.weights))
    if graph.norm == "token_max":
        raise UncertifiableError(
            "a Merge by 'l2' takes entries apart, for which no token_max bound is known; use by='sum'."
        )
    columns = []
    for output, weight in zip(outputs, module.weights, strict=True):
        scaled = graph.add("scale", output, factor=math.sqrt(weight))
        columns.append(graph.add("reshape", scaled, shape=[math.prod(shape), 1]))
    count = len(columns)
    norms = graph.add("l2pool", graph.add("concat", *columns, axis=1), dims=1, kernel=[count], stride=[count])
    return graph.add("reshape", norms, shape=list(shape))
