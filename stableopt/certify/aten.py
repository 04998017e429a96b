"""The operations of torch that modules with a forward of their own call, as operations of a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.certify.fold.normalization import add_stored_norm
from stableopt.certify.fold.registry import fold
from stableopt.certify.fold.simple import clamp
from stableopt.certify.fold.spatial import add_along, add_take
from stableopt.certify.fold.stock import add_affine
from stableopt.certify.fold.structure import batched_axis
from stableopt.certify.program import Builder, Value
from stableopt.errors import UncertifiableError

__all__ = ["RULES", "Call", "bound_arguments", "register"]


@dataclass(frozen=True)
class Call:
    """One operation with its arguments by name: values of the program, tensors of numbers, and settings."""

    graph: Builder
    arguments: dict[str, Any]
    batch: int
    name: str

    def __getitem__(self, key: str) -> Any:
        return self.arguments[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return an argument, or the default if the operation has none of that name.

        Examples:
            >>> Call(Builder((1,)), {"p": 0.5}, 2, "dropout").get("train")
        """
        return self.arguments.get(key, default)

    def value(self, *keys: str) -> Value:
        """Return the first of some arguments, which must be the only one that depends on the input.

        Raises:
            UncertifiableError: if another argument depends on the input.
        """
        first, *others = [k for k in (keys or self.arguments) if isinstance(self.get(k), Value)] or [""]
        found = [k for k, v in self.arguments.items() if isinstance(v, Value) and k != first]
        if not first or others or found:
            raise UncertifiableError(
                f"its arguments {', '.join([*others, *found])} depend on the input, and must be numbers."
            )
        return self[first]

    def axis(self, dim: int, value: Value) -> int:
        """Return the axis of a sample that a dimension is.

        Raises:
            ValueError: if it is the batch.
        """
        return batched_axis(dim, len(value.shape))

    def folded(self, module: nn.Module) -> Value:
        """Fold the module of torch that computes the same for the only argument that depends on the input."""
        return fold(module, self.graph, self.value())


def bound_arguments(schema: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of an operation by their names in its schema, defaults filled in.

    Examples:
        >>> bound_arguments(torch.ops.aten.dropout.default._schema, (1,), {"p": 0.5, "train": False})
        {'input': 1, 'p': 0.5, 'train': False}
    """
    names = [argument.name for argument in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return defaults | dict(zip(names, args, strict=False)) | dict(kwargs)


RULES: dict[str, Callable[[Call], Any]] = {}
"""The rules by the names of the operations without ``aten::``."""


def register(*names: str) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Register a rule: it gives the value, the number or the list of them that an operation makes of its arguments.

    Args:
        names: of the operations, without ``aten::``.

    Examples:
        >>> @register("my_negative")
        ... def _(call):
        ...     return call.graph.add("scale", call.value(), factor=-1.0)
        >>> _ = RULES.pop("my_negative")
    """

    def registered(function: Callable[[Call], Any]) -> Callable[[Call], Any]:
        for name in names:
            RULES[name] = function
        return function

    return registered


# ---------------------------------------------------------------------------------------------------------------- arithmetic


def _numbers(call: Call, number: Any, value: Value) -> tuple[Value, Tensor, int | None]:
    """Return the value, repeated as torch broadcasts it, and the numbers per entry of an axis or per entry (axis None)."""
    tensor = number if isinstance(number, Tensor) else torch.tensor(float(number), dtype=torch.float64)
    if tensor.numel() == 1 and tensor.ndim <= len(value.shape) + 1:
        return value, tensor.reshape(1).expand(value.shape[0]), 0
    full = torch.broadcast_shapes(tuple(tensor.shape), (call.batch, *value.shape))
    if len(full) != len(value.shape) + 1 or full[0] != call.batch:
        raise UncertifiableError(f"numbers of the shape {tuple(tensor.shape)} broadcast the batch of {value.shape}.")
    if tensor.ndim == len(full) and tensor.shape[0] > 1:
        if not bool((tensor == tensor[:1]).all()):
            raise UncertifiableError("numbers that differ between the items of a batch are added or multiplied.")
        tensor = tensor[:1]
    value = _expanded(call.graph, value, full[1:])
    sizes = tuple(tensor.shape) if tensor.ndim == len(full) else (1,) * (len(full) - tensor.ndim) + tuple(tensor.shape)
    wide = [axis for axis, n in enumerate(sizes[1:]) if n != 1]
    if wide in ([0], [len(full) - 2]):
        return value, tensor.reshape(-1), 0 if wide == [0] else -1
    return value, tensor.reshape(sizes)[0].expand(full[1:]), None


def _expanded(graph: Builder, value: Value, shape: tuple[int, ...]) -> Value:
    for axis, (n, wanted) in enumerate(zip(value.shape, shape, strict=True)):
        if n != wanted:
            value = add_take(graph, value, axis, [0] * wanted)
    return value


def _added(call: Call, a: Any, b: Any, first: float, second: float) -> Value:
    graph = call.graph
    if isinstance(a, Value) and isinstance(b, Value):
        if len(a.shape) != len(b.shape):
            raise UncertifiableError(
                f"values of the shapes {a.shape} and {b.shape} are added, which broadcasts the batch."
            )
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = _expanded(graph, a, shape), _expanded(graph, b, shape)
        return graph.add("sum", a, b, factors=[first, second])
    value, factor, number, other = (a, first, b, second) if isinstance(a, Value) else (b, second, a, first)
    value, tensor, axis = _numbers(call, number, value)
    if factor != 1.0:
        value = graph.add("scale", value, factor=factor)
    return add_affine(graph, value, None, tensor * other if other != 1.0 else tensor, axis)


@register("add", "sub")
def _add(call: Call) -> Value:
    sign = 1.0 if call.name == "add" else -1.0
    return _added(call, call["self"], call["other"], 1.0, sign * float(call["alpha"]))


@register("rsub")
def _rsub(call: Call) -> Value:
    return _added(call, call["self"], call["other"], -float(call["alpha"]), 1.0)


@register("neg")
def _neg(call: Call) -> Value:
    return call.graph.add("scale", call.value(), factor=-1.0)


@register("mul", "div")
def _mul(call: Call) -> Value:
    a: Any = call["self"]
    b: Any = call["other"]
    if isinstance(a, Value) and isinstance(b, Value):
        raise UncertifiableError(
            "two values that depend on the input are multiplied or divided, so the slope grows with them."
        )
    if call.name == "div":
        if isinstance(b, Value) or call.get("rounding_mode") is not None:
            raise UncertifiableError("a division by a value that depends on the input, or a rounded one, has no bound.")
        b = 1.0 / b.double() if isinstance(b, Tensor) else 1.0 / float(b)
    value, number = (call["self"], b) if isinstance(a, Value) else (call["other"], a)
    if not isinstance(number, Tensor) or number.numel() == 1:
        if isinstance(number, Tensor) and number.ndim > len(value.shape) + 1:
            raise UncertifiableError("a number with more dimensions than the value broadcasts it.")
        return call.graph.add("scale", value, factor=float(number))
    value, tensor, axis = _numbers(call, number, value)
    return add_affine(call.graph, value, tensor, None, axis)


# ------------------------------------------------------------------------------------------------------------------- weights


@register("linear")
def _linear(call: Call) -> Value:
    return call.graph.add("linear", call.value("input"), weight=call["weight"], bias=call["bias"], transposed=False)


@register("matmul", "mm")
def _matmul(call: Call) -> Value:
    left: Any = call["self"]
    right: Any = call["mat2"] if call.name == "mm" else call["other"]
    if isinstance(left, Value) and isinstance(right, Value):
        raise UncertifiableError("two values that depend on the input are multiplied, so the slope grows with them.")
    if isinstance(left, Value) and right.ndim == 2:
        return call.graph.add("linear", left, weight=right, bias=None, transposed=True)
    if isinstance(right, Value) and isinstance(left, Tensor) and left.ndim == 2 and len(right.shape) >= 2:
        return add_along(call.graph, right, len(right.shape) - 2, left)
    raise UncertifiableError("a matrix product has a rule for a value and one matrix of numbers.")


@register("addmm")
def _addmm(call: Call) -> Value:
    value = call.value("mat1")
    if call["beta"] != 1 or call["alpha"] != 1 or call["self"].ndim != 1:
        raise UncertifiableError("it has a rule for beta = alpha = 1 and a vector that is added.")
    return call.graph.add("linear", value, weight=call["mat2"], bias=call["self"], transposed=True)


@register("convolution", *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)))
def _conv(call: Call) -> Value:
    weight, value = call["weight"], call.value("input")
    dims = weight.ndim - 2
    transposed = bool(call.get("transposed", "transpose" in call.name))
    kind: Any = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )[dims - 1]
    groups, padding = call["groups"], call["padding"]
    channels = [weight.shape[1] * groups, weight.shape[0]]
    options = {key: _axes(call[key], dims) for key in ("stride", "dilation")} | {"groups": groups, "device": "meta"}
    options["padding"] = padding if isinstance(padding, str) else _axes(padding, dims)
    if transposed:
        channels = [weight.shape[0], weight.shape[1] * groups]
        options["output_padding"] = _axes(call["output_padding"], dims)
    layer = kind(*channels, tuple(weight.shape[2:]), bias=False, **options)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if call["bias"] is None else nn.Parameter(call["bias"], requires_grad=False)
    return fold(layer, call.graph, value)


def _axes(given: Any, dims: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in (given if isinstance(given, tuple | list) else [given]))
    return values * dims if len(values) == 1 else values


@register("batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(call: Call) -> Any:
    if call.get("training"):
        raise UncertifiableError(
            "it takes the statistics of the batch, so the map of one sample depends on the others."
        )
    parts = [call[key] for key in ("running_mean", "running_var", "weight", "bias")]
    value = add_stored_norm(call.graph, call.value("input"), *parts, eps=call["eps"])
    return value if call.name == "batch_norm" else [value, None, None]


@register("layer_norm", "native_layer_norm")
def _layer_norm(call: Call) -> Any:
    layer = nn.LayerNorm(list(call["normalized_shape"]), call["eps"], device="meta")
    layer.weight, layer.bias = _parameter(call["weight"]), _parameter(call["bias"])
    value = fold(layer, call.graph, call.value("input"))
    return value if call.name == "layer_norm" else [value, None, None]


@register("group_norm")
def _group_norm(call: Call) -> Value:
    value = call.value("input")
    layer = nn.GroupNorm(call["num_groups"], value.shape[0], call["eps"], device="meta")
    layer.weight, layer.bias = _parameter(call["weight"]), _parameter(call["bias"])
    return fold(layer, call.graph, value)


def _parameter(tensor: Tensor | None) -> Any:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


# --------------------------------------------------------------------------------------------------------------- activations


_ACTIVATIONS: dict[str, Callable[[Call], nn.Module]] = {
    "relu": lambda _: nn.ReLU(), "tanh": lambda _: nn.Tanh(), "sigmoid": lambda _: nn.Sigmoid(), "silu": lambda _: nn.SiLU(),
    "selu": lambda _: nn.SELU(), "mish": lambda _: nn.Mish(), "hardswish": lambda _: nn.Hardswish(), "relu6": lambda _: nn.ReLU6(),
    "hardsigmoid": lambda _: nn.Hardsigmoid(), "log_sigmoid": lambda _: nn.LogSigmoid(),
    "gelu": lambda c: nn.GELU(c["approximate"]), "leaky_relu": lambda c: nn.LeakyReLU(float(c["negative_slope"])),
    "celu": lambda c: nn.CELU(float(c["alpha"])), "softplus": lambda c: nn.Softplus(float(c["beta"]), float(c["threshold"])),
    "softshrink": lambda c: nn.Softshrink(float(c["lambd"])), "hardshrink": lambda c: nn.Hardshrink(float(c["lambd"])),
    "threshold": lambda c: nn.Threshold(float(c["threshold"]), float(c["value"])),
    "softmax": lambda c: nn.Softmax(c["dim"]), "_softmax": lambda c: nn.Softmax(c["dim"]),
    "pixel_shuffle": lambda c: nn.PixelShuffle(c["upscale_factor"]),
    "pixel_unshuffle": lambda c: nn.PixelUnshuffle(c["downscale_factor"]),
    "channel_shuffle": lambda c: nn.ChannelShuffle(c["groups"]), "native_channel_shuffle": lambda c: nn.ChannelShuffle(c["groups"]),
}  # fmt: skip


def _by_module(call: Call) -> Value:
    return call.folded(_ACTIVATIONS[call.name](call))


for _name in _ACTIVATIONS:
    RULES[_name] = _by_module


@register("abs")
def _abs(call: Call) -> Value:
    return call.graph.add("activation", call.value(), name="abs")


@register("elu")
def _elu(call: Call) -> Value:
    if call["scale"] != 1 or call["input_scale"] != 1:
        raise UncertifiableError("it has a rule for scale = input_scale = 1.")
    return call.folded(nn.ELU(float(call["alpha"])))


@register("prelu")
def _prelu(call: Call) -> Value:
    layer = nn.PReLU(call["weight"].numel(), device="meta")
    layer.weight = _parameter(call["weight"])
    return fold(layer, call.graph, call.value("self"))


@register("clamp", "hardtanh", "clamp_min", "clamp_max")
def _clamp(call: Call) -> Value:
    low, high = call.get("min", call.get("min_val")), call.get("max", call.get("max_val"))
    if isinstance(low, Tensor | Value) or isinstance(high, Tensor | Value):
        raise UncertifiableError("it has a rule for limits that are single numbers.")
    return clamp(call.graph, call.value("self"), low, high)


@register("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
def _dropout(call: Call) -> Value:
    if call["train"] and call["p"]:
        raise UncertifiableError("it drops entries at random in evaluation too; pass training=self.training.")
    return call.value("input")


@register(
    "clone", "detach", "alias", "contiguous", "to", "_to_copy", "lift_fresh_copy", "type_as", "_unsafe_view_same", "positive",
)  # fmt: skip
def _same(call: Call) -> Value:
    dtype = call.get("dtype")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise UncertifiableError(f"a cast to {dtype} is a step function.")
    return call.value("self") if "self" in call.arguments else call.value()
