"""The rules of activations, of torch and ours, and of our layers without branches."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from stableopt.certify.fold.registry import fold
from stableopt.certify.fold.stock import add_affine, add_reshape, along_last
from stableopt.certify.fold.structure import batched_axis
from stableopt.certify.program import Builder, Value
from stableopt.errors import UncertifiableError
from stableopt.nn.activations import Abs, GroupSort, NActivation, Scale, SoftAbs
from stableopt.nn.attention.transformer import JoinTokens, Positions
from stableopt.nn.centering import BallProjection, BatchCentering, InputNormalization, LayerCentering
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.heads import UnitRowLinear
from stableopt.nn.householder import Householder
from stableopt.nn.splines import LinearSpline

__all__ = ["clamp"]


def _activation(name: str, **settings: str) -> Callable[[nn.Module, Builder, Value], Value]:
    """Make the rule of an activation whose settings are attributes of the module."""

    def rule(module: nn.Module, graph: Builder, value: Value) -> Value:
        lipschitz_rule(module, "l2")  # refuses settings for which the module computes something else than its formula
        real = {key: float(getattr(module, attribute)) for key, attribute in settings.items()}
        return graph.add("activation", value, name=name, **real)

    return rule


_NAMES: dict[type[nn.Module], tuple[str, dict[str, str]]] = {
    nn.ReLU: ("relu", {}), nn.Tanh: ("tanh", {}), nn.Sigmoid: ("sigmoid", {}), nn.SiLU: ("silu", {}), nn.SELU: ("selu", {}),
    nn.LeakyReLU: ("leaky_relu", {"slope": "negative_slope"}), nn.ELU: ("elu", {"alpha": "alpha"}),
    nn.CELU: ("celu", {"alpha": "alpha"}), nn.Softplus: ("softplus", {"beta": "beta"}), nn.Mish: ("mish", {}),
    nn.Hardswish: ("hardswish", {}), nn.Hardsigmoid: ("hardsigmoid", {}), nn.Softsign: ("softsign", {}),
    nn.LogSigmoid: ("logsigmoid", {}), nn.Tanhshrink: ("tanhshrink", {}), nn.Softshrink: ("softshrink", {"lambd": "lambd"}),
    SoftAbs: ("soft_abs", {"delta": "delta"}),
}  # fmt: skip
for _kind, (_name, _settings) in _NAMES.items():
    fold.register(_kind)(_activation(_name, **_settings))


def clamp(graph: Builder, value: Value, low: float | None, high: float | None) -> Value:
    """Append ``min(max(x, low), high)`` with an end left out where it is None or infinite.

    Examples:
        >>> graph = Builder((2,))
        >>> clamp(graph, graph.input, -math.inf, None) == graph.input
        True
    """
    low, high = (None if end is None or math.isinf(end) else float(end) for end in (low, high))
    if low is not None and high is not None:
        if low >= high:
            raise UncertifiableError(f"limits from {low} to {high} make a constant, for which there is no rule.")
        return graph.add("activation", value, name="hardtanh", min=low, max=high)
    if low is not None:
        return graph.add("activation", value, name="threshold", min=low)
    if high is not None:  # min(x, h) = -max(-x, -h)
        flipped = graph.add("activation", graph.add("scale", value, factor=-1.0), name="threshold", min=-high)
        return graph.add("scale", flipped, factor=-1.0)
    return value


@fold.register(nn.Hardtanh)
def _(module: nn.Hardtanh, graph: Builder, value: Value) -> Value:
    return clamp(graph, value, module.min_val, module.max_val)


@fold.register(nn.Threshold)
def _(module: nn.Threshold, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")  # refuses one that jumps
    return clamp(graph, value, module.threshold, None)


@fold.register(nn.Hardshrink)
def _(module: nn.Hardshrink, _graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")  # refuses one that jumps: what is left is the identity
    return value


@fold.register(nn.RReLU)
def _(module: nn.RReLU, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")
    return graph.add("activation", value, name="leaky_relu", slope=(module.lower + module.upper) / 2)


@fold.register(nn.GELU)
def _(module: nn.GELU, graph: Builder, value: Value) -> Value:
    return graph.add("activation", value, name="gelu" if module.approximate == "none" else "gelu_tanh")


def _channels(tensor: Tensor, value: Value, name: str) -> None:
    if not value.shape or value.shape[0] != tensor.shape[-1]:
        raise ValueError(f"{name} was built for {tensor.shape[-1]} channels, got the shape {value.shape}.")


@fold.register(nn.PReLU)
def _(module: nn.PReLU, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")  # refuses NaN
    if module.weight.numel() == 1:
        return graph.add("activation", value, name="leaky_relu", slope=float(module.weight))
    _channels(module.weight, value, "PReLU")
    return graph.add("activation", value, name="prelu", weight=module.weight, axis=0)


@fold.register(NActivation)
def _(module: NActivation, graph: Builder, value: Value) -> Value:
    _channels(module.thresholds, value, "NActivation")
    ordered = module.thresholds.sort(dim=0, stable=True).values
    return graph.add("activation", value, name="zigzag", thresholds=ordered, axis=0)


@fold.register(LinearSpline)
def _(module: LinearSpline, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")  # refuses NaN
    _channels(module.bias, value, "LinearSpline")
    slopes = module.limited_slopes()
    return graph.add("activation", value, name="spline", slopes=slopes, bias=module.bias, span=module.span, axis=0)


@fold.register(Abs)
def _(module: Abs, graph: Builder, value: Value) -> Value:
    channels = value.shape[0] if value.shape else 0
    first = channels if module.fraction == 1.0 else math.floor(module.fraction * channels)
    if first == channels:
        return graph.add("activation", value, name="abs")
    if first == 0:
        return value
    folded = graph.add("slice", value, axis=0, start=0, stop=first)
    rest = graph.add("slice", value, axis=0, start=first, stop=channels)
    return graph.add("concat", graph.add("activation", folded, name="abs"), rest, axis=0)


@fold.register(GroupSort)
def _(module: GroupSort, graph: Builder, value: Value) -> Value:
    if value.shape[0] % module.group_size:
        raise ValueError(f"the channels of the shape {value.shape} are not divisible by {module.group_size}.")
    return graph.add("groupsort", value, group_size=module.group_size, axis=0)


@fold.register(Householder)
def _(module: Householder, graph: Builder, value: Value) -> Value:
    if value.shape[0] != module.direction.numel():
        raise ValueError(f"it was built for {module.direction.numel()} channels, got the shape {value.shape}.")
    return graph.add("householder", value, vectors=module.direction, axis=0)


def _softmax(module: nn.Softmax, graph: Builder, value: Value) -> Value:
    dim = -3 if isinstance(module, nn.Softmax2d) else module.dim
    if dim is None:
        raise UncertifiableError("the dimension of a softmax is guessed by torch if it is not given; give dim.")
    if isinstance(module, nn.Softmin):
        value = graph.add("scale", value, factor=-1.0)
    return graph.add("softmax", value, axis=batched_axis(dim, len(value.shape)))


for _kind in (nn.Softmax, nn.Softmax2d, nn.Softmin):
    fold.register(_kind)(_softmax)


# -------------------------------------------------------------------------------------------------------------------- our layers


@fold.register(Scale)
def _(module: Scale, graph: Builder, value: Value) -> Value:
    return graph.add("scale", value, factor=module.factor)


@fold.register(UnitRowLinear)
def _(module: UnitRowLinear, graph: Builder, value: Value) -> Value:
    return graph.add("linear", value, weight=module.unit_weight(), bias=module.bias, transposed=False)


@fold.register(InputNormalization)
def _(module: InputNormalization, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")  # refuses numbers that a cast has made 0 or infinite
    std = module.std.double()
    scale, shift = std.reciprocal(), -module.mean.double() / std
    if std.ndim == 0:
        scale, shift = scale.expand(value.shape[0]), shift.expand(value.shape[0])
    dtype = module.std.dtype
    return add_affine(graph, value, scale.to(dtype), shift.to(dtype), 0)


@fold.register(BatchCentering)
def _(module: BatchCentering, graph: Builder, value: Value) -> Value:
    shift = -module.running_mean if module.bias is None else module.bias - module.running_mean
    return add_affine(graph, value, None, shift, 0)


@fold.register(LayerCentering)
def _(module: LayerCentering, graph: Builder, value: Value) -> Value:
    return along_last(graph, value, module.normalized_shape, lambda v: graph.add("center", v), None, module.bias)


@fold.register(BallProjection)
def _(module: BallProjection, graph: Builder, value: Value) -> Value:
    return graph.add("ball", value, radius=module.radius, center=None)


@fold.register(Positions)
def _(module: Positions, graph: Builder, value: Value) -> Value:
    if len(value.shape) < 2 or value.shape[-2] > len(module.vectors) or value.shape[-1] != module.vectors.shape[1]:
        raise ValueError(f"it has vectors of the shape {tuple(module.vectors.shape)}, got the shape {value.shape}.")
    vectors = module.vectors[: value.shape[-2]].expand(value.shape)
    return add_affine(graph, value, None, vectors, None)


@fold.register(JoinTokens)
def _(module: JoinTokens, graph: Builder, value: Value) -> Value:
    if len(value.shape) < 2 or value.shape[-2] != module.tokens:
        raise ValueError(f"it joins {module.tokens} tokens, got the shape {value.shape}.")
    joined = add_reshape(graph, value, (*value.shape[:-2], value.shape[-2] * value.shape[-1]))
    return graph.add("scale", joined, factor=1.0 / module.divisor)
