"""The operations of torch that move, select, pool and average entries, as operations of a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from stableopt.certify.aten import RULES, Call, register
from stableopt.certify.fold.spatial import add_take
from stableopt.certify.fold.stock import add_permute, add_reshape
from stableopt.certify.program import Builder, Value
from stableopt.errors import UncertifiableError

__all__: list[str] = []


# -------------------------------------------------------------------------------------------------------------------- shapes


@register("view", "reshape", "_unsafe_view", "_reshape_copy", "view_copy")
def _view(call: Call) -> Value:
    value = call.value()
    size = [int(n) for n in call["size" if "size" in call.arguments else "shape"]]
    if -1 in size:
        known = -math.prod(size)
        size[size.index(-1)] = call.batch * math.prod(value.shape) // known if known else 0
    if not size or size[0] != call.batch or math.prod(size[1:]) != math.prod(value.shape):
        raise UncertifiableError(f"the shape {size} joins the batch with other dimensions; keep x.size(0) in front.")
    return add_reshape(call.graph, value, tuple(size[1:]))


@register("flatten")
def _flatten(call: Call) -> Value:
    return call.folded(nn.Flatten(call["start_dim"], call["end_dim"]))


@register("unflatten")
def _unflatten(call: Call) -> Value:
    return call.folded(nn.Unflatten(call["dim"], tuple(call["sizes"])))


@register("unsqueeze")
def _unsqueeze(call: Call) -> Value:
    value, dim = call.value(), call["dim"]
    place = dim % (len(value.shape) + 2)
    if place == 0:
        raise ValueError("a dimension in front of the batch.")
    return add_reshape(call.graph, value, (*value.shape[: place - 1], 1, *value.shape[place - 1 :]))


@register("squeeze")
def _squeeze(call: Call) -> Value:
    value, dims = call.value(), call.get("dim")
    given = range(1, len(value.shape) + 1) if dims is None else dims if isinstance(dims, list | tuple) else [dims]
    dropped = {dim % (len(value.shape) + 1) - 1 for dim in given}
    shape = tuple(n for axis, n in enumerate(value.shape) if axis not in dropped or n != 1)
    return add_reshape(call.graph, value, shape)


@register("permute", "permute_copy")
def _permute(call: Call) -> Value:
    value, dims = call.value(), [d % len(call["dims"]) for d in call["dims"]]
    if dims[0] != 0:
        raise ValueError("the batch does not stay in front.")
    return add_permute(call.graph, value, [d - 1 for d in dims[1:]])


@register("transpose", "transpose_copy", "swapaxes", "swapdims")
def _transpose(call: Call) -> Value:
    value = call.value()
    dims = [call[k] for k in (("dim0", "dim1") if "dim0" in call.arguments else ("axis0", "axis1"))]
    a, b = (call.axis(d, value) for d in dims)
    order = list(range(len(value.shape)))
    order[a], order[b] = order[b], order[a]
    return add_permute(call.graph, value, order)


@register("mT", "movedim", "moveaxis")
def _movedim(call: Call) -> Value:
    value, n = call.value(), len(call.value().shape)
    if call.name == "mT":
        if n < 2:
            raise ValueError("it would move the batch.")
        return add_permute(call.graph, value, [*range(n - 2), n - 1, n - 2])
    source, target = ([call.axis(d, value) for d in _listed(call[k])] for k in ("source", "destination"))
    order: list[int | None] = [None] * n
    for s, t in zip(source, target, strict=True):
        order[t] = s
    rest = iter(axis for axis in range(n) if axis not in source)
    return add_permute(call.graph, value, [next(rest) if axis is None else axis for axis in order])


def _listed(given: Any) -> list[int]:
    return list(given) if isinstance(given, list | tuple) else [given]


@register("expand", "expand_copy")
def _expand(call: Call) -> Value:
    value, size = call.value(), list(call["size"])
    if len(size) != len(value.shape) + 1 or size[0] not in {-1, call.batch}:
        raise UncertifiableError("it expands in front of the batch.")
    for axis, n in enumerate(size[1:]):
        if n not in {-1, value.shape[axis]}:
            value = add_take(call.graph, value, axis, [0] * n)
    return value


# ----------------------------------------------------------------------------------------------------------------- selection


def _slice(graph: Builder, value: Value, axis: int, start: int, stop: int) -> Value:
    if (start, stop) == (0, value.shape[axis]):
        return value
    if not 0 <= start < stop <= value.shape[axis]:
        raise UncertifiableError(f"it selects nothing of axis {axis} of the shape {value.shape}.")
    return graph.add("slice", value, axis=axis, start=start, stop=stop)


@register("slice", "slice_copy")
def _slice_rule(call: Call) -> Value:
    value = call.value()
    if call["dim"] % (len(value.shape) + 1) == 0:
        if call["start"] in {None, 0} and (call["end"] is None or call["end"] >= call.batch) and call["step"] == 1:
            return value  # the whole batch
        raise ValueError("it selects items of the batch.")
    axis = call.axis(call["dim"], value)
    n = value.shape[axis]
    start, stop, step = slice(call["start"], call["end"], call["step"]).indices(n)
    if step == 1:
        return _slice(call.graph, value, axis, start, stop)
    return add_take(call.graph, value, axis, list(range(start, stop, step)))


@register("narrow")
def _narrow(call: Call) -> Value:
    value = call.value()
    axis, start = call.axis(call["dim"], value), int(call["start"])
    start %= value.shape[axis]
    return _slice(call.graph, value, axis, start, start + int(call["length"]))


@register("select", "select_copy")
def _select(call: Call) -> Value:
    value = call.value()
    axis = call.axis(call["dim"], value)
    index = call["index"] % value.shape[axis]
    part = _slice(call.graph, value, axis, index, index + 1)
    return add_reshape(call.graph, part, (*value.shape[:axis], *value.shape[axis + 1 :]))


def _parts(call: Call, value: Value, axis: int, sizes: Sequence[int]) -> list[Value]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(call.graph, value, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@register("split", "split_with_sizes", "chunk", "unbind", "split_copy", "split_with_sizes_copy")
def _split(call: Call) -> list[Value]:
    value = call.value()
    axis = call.axis(call["dim"], value)
    n = value.shape[axis]
    if call.name == "unbind":
        shape = (*value.shape[:axis], *value.shape[axis + 1 :])
        return [add_reshape(call.graph, part, shape) for part in _parts(call, value, axis, [1] * n)]
    given = call.get("split_size", call.get("split_sizes", call.get("sizes")))
    if call.name == "chunk":
        given = -(-n // call["chunks"])
    if isinstance(given, int):
        given = [min(given, n - start) for start in range(0, n, given)]
    return _parts(call, value, axis, [int(size) for size in given])


@register("index_select")
def _index_select(call: Call) -> Value:
    value = call.value("self")
    return add_take(call.graph, value, call.axis(call["dim"], value), call["index"].flatten().tolist())


@register("flip")
def _flip(call: Call) -> Value:
    value = call.value()
    for axis in [call.axis(d, value) for d in call["dims"]]:
        value = add_take(call.graph, value, axis, list(range(value.shape[axis]))[::-1])
    return value


@register("roll")
def _roll(call: Call) -> Value:
    value = call.value()
    if not call["dims"]:
        raise UncertifiableError("it has a rule for given dims.")
    for shift, dim in zip(_listed(call["shifts"]), _listed(call["dims"]), strict=True):
        axis = call.axis(dim, value)
        n = value.shape[axis]
        value = add_take(call.graph, value, axis, [(i - shift) % n for i in range(n)])
    return value


@register("cat", "concat", "concatenate")
def _cat(call: Call) -> Value:
    parts = call["tensors"]
    if not all(isinstance(part, Value) for part in parts):
        raise UncertifiableError("it joins values with numbers; pad by zeros with torch.nn.functional.pad.")
    axis = call.axis(call.get("dim", call.get("axis", 0)), parts[0])
    return parts[0] if len(parts) == 1 else call.graph.add("concat", *parts, axis=axis)


@register("stack")
def _stack(call: Call) -> Value:
    parts = call["tensors"]
    if not all(isinstance(part, Value) for part in parts):
        raise UncertifiableError("it joins values with numbers.")
    place = call["dim"] % (len(parts[0].shape) + 2)
    if place == 0:
        raise ValueError("a dimension in front of the batch.")
    shape = parts[0].shape
    wide = [add_reshape(call.graph, part, (*shape[: place - 1], 1, *shape[place - 1 :])) for part in parts]
    return wide[0] if len(wide) == 1 else call.graph.add("concat", *wide, axis=place - 1)


@register("constant_pad_nd", "pad")
def _pad(call: Call) -> Value:
    padding, value = [int(p) for p in call["pad"]], call.value()
    mode = call.get("mode", "constant")
    kinds: dict[str, Any] = {
        "constant": nn.ConstantPad1d, "reflect": nn.ReflectionPad1d, "replicate": nn.ReplicationPad1d, "circular": nn.CircularPad1d,
    }  # fmt: skip
    if len(padding) > 2 * len(value.shape) or mode not in kinds:
        raise UncertifiableError(f"padding {padding} in the mode {mode!r} has no rule.")
    axes = len(padding) // 2
    for i in range(axes):  # one axis after the other, each as the last one
        pair = (padding[2 * i], padding[2 * i + 1])
        if not any(pair):
            continue
        n = len(value.shape)
        axis = n - 1 - i
        order = [a for a in range(n) if a != axis] + [axis]
        layer = kinds[mode](pair, float(call.get("value") or 0.0)) if mode == "constant" else kinds[mode](pair)
        moved = RULES["_module"](
            Call(call.graph, {"self": add_permute(call.graph, value, order), "module": layer}, call.batch, "")
        )
        value = add_permute(call.graph, moved, [order.index(a) for a in range(n)])
    return value


RULES["_module"] = lambda call: call.folded(call["module"])

# ---------------------------------------------------------------------------------------------------------- averages and pools


def _reduced(call: Call, value: Value, dims: Any, *, keep: bool, reduce: Callable[[Value], Value]) -> Value:
    """Reduce some axes by a function that reduces the last one."""
    n = len(value.shape)
    if dims is None or dims == []:
        raise ValueError("it reduces the batch too; give the dimensions.")
    axes = sorted({call.axis(d, value) for d in _listed(dims)})
    rest = [axis for axis in range(n) if axis not in axes]
    moved = add_permute(call.graph, value, [*rest, *axes])
    kept = [value.shape[axis] for axis in rest]
    joined = add_reshape(call.graph, moved, (*kept, math.prod(value.shape[axis] for axis in axes)))
    shape = [1 if axis in axes else m for axis, m in enumerate(value.shape)] if keep else kept
    return add_reshape(call.graph, reduce(joined), tuple(shape))


def _last_mean(graph: Builder, value: Value) -> Value:
    rows = value if len(value.shape) > 1 else add_reshape(graph, value, (1, *value.shape))
    return graph.add("mean", rows, axis=len(rows.shape) - 1)


@register("mean", "sum")
def _mean(call: Call) -> Value:
    value, dims = call.value(), call.get("dim")
    total = value.shape
    graph = call.graph
    single = [call.axis(d, value) for d in _listed(dims)] if dims is not None else []
    if not call["keepdim"] and len(set(single)) == len(total):
        raise ValueError("it leaves no dimension beside the batch; pass keepdim=True.")
    if len(single) == 1 and len(total) > 1:
        mean = graph.add("mean", value, axis=single[0])
        kept = tuple(1 if axis == single[0] else n for axis, n in enumerate(total))
        mean = add_reshape(graph, mean, kept) if call["keepdim"] else mean
    else:
        mean = _reduced(
            call, value, dims, keep=call["keepdim"] if dims is not None else False, reduce=partial(_last_mean, graph)
        )
    if call.name == "mean":
        return mean
    return graph.add("scale", mean, factor=float(math.prod(total[axis] for axis in set(single))))


@register("amax", "amin")
def _amax(call: Call) -> Value:
    value, graph = call.value(), call.graph
    sign = 1.0 if call.name == "amax" else -1.0

    def largest(v: Value) -> Value:
        *kept, n = v.shape
        rows = add_reshape(graph, v, (math.prod(kept), n))
        pooled = graph.add("pool", rows, name="max", dims=1, kernel=[n], stride=[n], padding=[0])
        return add_reshape(graph, pooled, tuple(kept))

    if sign < 0:
        value = graph.add("scale", value, factor=sign)
    result = _reduced(call, value, call["dim"], keep=call["keepdim"], reduce=largest)
    return result if sign > 0 else graph.add("scale", result, factor=sign)


def _pool_options(call: Call, dims: int, *names: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in names:
        given = call[name]
        if isinstance(given, list | tuple):
            values = [int(v) for v in given]
            given = tuple(values * dims if len(values) == 1 else values) or None
        options[name] = given
    return options


def _pool(kinds: tuple[Any, ...], *names: str) -> Callable[[Call], Any]:
    def rule(call: Call) -> Any:
        dims = int(call.name.split("pool")[1][0])
        return call.folded(kinds[dims - 1](**_pool_options(call, dims, *names)))

    return rule


_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_MAXIMUM = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
RULES["avg_pool1d"] = _pool((nn.AvgPool1d,), *_AVERAGE)
for _name in ("avg_pool2d", "avg_pool3d"):
    RULES[_name] = _pool((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), *_AVERAGE, "divisor_override")
for _dims in ("1d", "2d", "3d"):
    _maximum = _pool((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), *_MAXIMUM)
    RULES[f"max_pool{_dims}"] = _maximum
    RULES[f"max_pool{_dims}_with_indices"] = lambda call, rule=_maximum: [rule(call), None]
    _average = _pool((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), "output_size")
    RULES[f"adaptive_avg_pool{_dims}"] = RULES[f"_adaptive_avg_pool{_dims}"] = _average
    _largest = _pool((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), "output_size")
    RULES[f"adaptive_max_pool{_dims}"] = lambda call, rule=_largest: [rule(call), None]


def _upsample(mode: str) -> Callable[[Call], Any]:
    def rule(call: Call) -> Value:
        size, factors = call.get("output_size"), call.get("scale_factors")
        options: dict[str, Any] = {"size": tuple(size)} if size is not None else {"scale_factor": tuple(factors)}
        if not mode.startswith("nearest"):
            options["align_corners"] = call["align_corners"]
        if any(isinstance(call.get(k), float) for k in ("scales", "scales_h", "scales_w", "scales_d")):
            raise UncertifiableError("it has a rule for a size or factors, not for both.")
        return call.folded(nn.Upsample(mode=mode, **options))

    return rule


for _name, _mode in (
    ("nearest1d", "nearest"), ("nearest2d", "nearest"), ("nearest3d", "nearest"), ("linear1d", "linear"),
    ("bilinear2d", "bilinear"), ("trilinear3d", "trilinear"),
):  # fmt: skip
    RULES[f"upsample_{_name}"] = _upsample(_mode)
