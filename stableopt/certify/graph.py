"""From a torch model to the list of operations that a certificate can speak about.

Each layer is *folded*: read as the operation that it computes in evaluation mode, with the numbers that its parametrizations
produce now. :func:`fold` is a registry, one rule per class; what has no rule is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from stableopt.certify.bounds import WEIGHTED, publish
from stableopt.certify.coverage import KNOWN, uncovered
from stableopt.certify.modules import build
from stableopt.errors import UncertifiableError
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.nn.activations import Abs, GroupSort, Scale
from stableopt.nn.centering import BatchCentering, InputNormalization
from stableopt.nn.dispatch import check_forward, lipschitz_rule
from stableopt.nn.heads import UnitRowLinear
from stableopt.nn.layers import layers
from stableopt.nn.pooling import ScaledAvgPool, root_down
from stableopt.nn.residual.gradient import GradientBlock
from stableopt.nn.rules.spatial import per_axis
from stableopt.nn.sharded import refuse_spread

__all__ = ["Node", "extract", "fold"]

Node: TypeAlias = dict[str, Any]
"""One operation: ``op``, its settings, and the names of its tensors (in the result of a rule: the tensors themselves)."""

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@functools.singledispatch
def fold(module: nn.Module, shape: tuple[int, ...]) -> list[Node]:  # noqa: ARG001 the signature of every rule
    r"""Read a layer as the operations it computes in evaluation mode; the registry behind :func:`stableopt.certify.certify`.

    Register a class of your own with ``@stableopt.certify.fold.register(MyModule)``. The rule returns nodes as in the
    certificate file, but without ``bound`` and with the tensors themselves instead of their names, for example
    ``{"op": "linear", "weight": W, "bias": None}``. Real settings are floats. The certified network consists of these nodes: a
    rule that returns something else than the module computes certifies something else. A class with children needs a rule in
    :func:`stableopt.nn.lipschitz_rule` too, so that it counts as one layer.

    Args:
        module: the layer.
        shape: shape of its input, without the batch dimension.

    Returns:
        The operations in the order in which they run; an empty list for the identity.

    Raises:
        UncertifiableError: for a class without a rule, or settings without a proved bound.

    Examples:
        >>> class Negate(nn.Module):
        ...     def forward(self, x):
        ...         return -x
        >>> @fold.register(Negate)
        ... def _(module, shape):
        ...     return [{"op": "scale", "factor": -1.0}]
        >>> fold(Negate(), (3,))
        [{'op': 'scale', 'factor': -1.0}]
        >>> fold(nn.Tanh(), (3,))
        [{'op': 'activation', 'name': 'tanh'}]
    """
    name = type(module).__name__
    raise UncertifiableError(
        f"{name} has no rule for certificates. Those with one are {KNOWN}. Replace it, or register one that returns the operations "
        f"it computes: @stableopt.certify.fold.register({name})."
    )


def extract(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[Node], dict[str, Tensor]]:
    """Fold a model into named operations and detached CPU copies of their tensors.

    Args:
        model: nested ``nn.Sequential`` of layers with a rule; it is not changed and need not be in evaluation mode.
        shape: shape of one input, without the batch dimension.

    Returns:
        The nodes, without bounds, and the tensors they name.

    Raises:
        UncertifiableError: for a layer without a rule; the message names its class, its path and how to register one.
        ValueError: if a layer does not fit the shape before it, or a weight is not finite.

    Examples:
        >>> nodes, tensors = extract(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (2, 2))
        >>> [node["op"] for node in nodes], sorted(tensors)
        (['flatten', 'linear'], ['1.bias', '1.weight'])
    """
    refuse_spread(model, UncertifiableError)
    with undisturbed(model), torch.no_grad():
        model.eval()  # where the weights are those of a method that trains with an estimate, too
        return _extracted(model, shape)


def _extracted(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[Node], dict[str, Tensor]]:
    nodes: list[Node] = []
    tensors: dict[str, Tensor] = {}
    for path, module in layers(model):
        where = f"'{path}' ({type(module).__name__})" if path else f"the module ({type(module).__name__})"
        rule_class = _rule_class(module)
        if rule_class is object:
            raise UncertifiableError(uncovered(module, path))
        check_forward(module, rule_class, path)
        folded = _folded(module, shape, where)
        for index, operation in enumerate(folded):
            prefix = f"{path}." if path else ""
            node, found = _name_tensors(operation, f"{prefix}{index}." if len(folded) > 1 else prefix)
            for name, value in found.items():
                tensors[name] = _storable(value, name)
            shape = _shape_after(node, tensors, shape, where)
            nodes.append(node)
    if not nodes:
        raise UncertifiableError("the model has no layer, so there is nothing to certify.")
    return nodes, tensors


def _folded(module: nn.Module, shape: tuple[int, ...], where: str) -> list[Node]:
    """Fold a layer, and say in every refusal where it is."""
    try:
        operations = fold(module, shape)
        for operation in operations:
            if operation["op"] not in {*WEIGHTED, "gradient_block"}:
                publish(operation, {})  # refuses settings without a proved bound
    except UncertifiableError as error:
        raise UncertifiableError(f"{where} cannot be certified: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where} cannot be certified: {error}") from None
    return operations


def _rule_class(module: nn.Module) -> type:
    rule = fold.dispatch(type(module))
    return next(c for c in type(module).__mro__ if fold.registry.get(c) is rule)


def _name_tensors(operation: Node, prefix: str) -> tuple[Node, dict[str, Tensor]]:
    found = {prefix + key: value for key, value in operation.items() if isinstance(value, Tensor)}
    node = {key: prefix + key if isinstance(value, Tensor) else value for key, value in operation.items()}
    return node, found


def _storable(value: Tensor, name: str) -> Tensor:
    if value.dtype not in _DTYPES:
        raise UncertifiableError(
            f"tensor '{name}' has dtype {value.dtype}; a certificate stores float64, 32, 16 and bfloat16."
        )
    value = value.detach().cpu().contiguous().clone()
    if value.numel() == 0 or not torch.isfinite(value).all():
        raise ValueError(
            f"tensor '{name}' of shape {tuple(value.shape)} is empty or holds NaN or infinity: nothing holds for it."
        )
    return value


def _shape_after(node: Node, tensors: dict[str, Tensor], shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Run the folded operation once on zeros, in float64, to learn its output shape."""
    image = {"conv": 1, "pool": 1}.get(node["op"], 0) * (node.get("dims", 0) + 1)
    if image and len(shape) != image:
        raise ValueError(f"{where} needs an input of {image} dimensions without the batch, got shape {shape}.")
    doubles = {name: value.double() for name, value in tensors.items() if name in node.values()}
    try:
        with torch.no_grad():
            return tuple(build(node, doubles)(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{where} does not fit the shape {shape} before it: {error}") from None


# ------------------------------------------------------------------------------------------------------------------- rules


@fold.register(nn.Linear)
def _(module: nn.Linear, _shape: tuple[int, ...]) -> list[Node]:
    return [{"op": "linear", "weight": module.weight, "bias": module.bias}]


def _conv(module: nn.Conv1d | nn.Conv2d, _shape: tuple[int, ...]) -> list[Node]:
    if module.padding_mode not in {"zeros", "circular"}:
        raise UncertifiableError(
            f"padding_mode {module.padding_mode!r} has no proved bound; use 'zeros' or 'circular'."
        )
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "same":
        if any(s % 2 for s in spans):
            raise UncertifiableError(
                "padding='same' with an odd dilation * (kernel_size - 1) is uneven; use an odd kernel."
            )
        padding = [s // 2 for s in spans]
    else:
        padding = [0] * len(spans) if module.padding == "valid" else list(per_axis(module.padding, len(spans)))
    if module.padding_mode == "circular" and any(2 * p > s for p, s in zip(padding, spans, strict=True)):
        raise UncertifiableError(
            "circular padding wider than dilation * (kernel_size - 1) / 2 repeats pixels and has no rule."
        )
    return [
        {
            "op": "conv", "dims": len(spans), "weight": module.weight, "bias": module.bias, "padding": padding,
            "stride": list(per_axis(module.stride, len(spans))), "dilation": list(per_axis(module.dilation, len(spans))),
            "groups": int(module.groups),
            "padding_mode": module.padding_mode,
        }
    ]  # fmt: skip


fold.register(nn.Conv1d)(_conv)
fold.register(nn.Conv2d)(_conv)


def _activation(name: str, **settings: str) -> Callable[[nn.Module, tuple[int, ...]], list[Node]]:
    """Make the rule of an activation whose settings are attributes of the module."""

    def rule(module: nn.Module, _shape: tuple[int, ...]) -> list[Node]:
        lipschitz_rule(module, "l2")  # refuses settings for which the module computes something else than its formula
        values = {key: getattr(module, attribute) for key, attribute in settings.items()}
        real = {key: value if key == "group_size" else float(value) for key, value in values.items()}
        return [{"op": "activation", "name": name, **real}]

    return rule


fold.register(nn.ReLU)(_activation("relu"))
fold.register(nn.LeakyReLU)(_activation("leaky_relu", slope="negative_slope"))
fold.register(nn.Tanh)(_activation("tanh"))
fold.register(nn.Sigmoid)(_activation("sigmoid"))
fold.register(nn.Hardtanh)(_activation("hardtanh", min="min_val", max="max_val"))
fold.register(nn.ReLU6)(_activation("hardtanh", min="min_val", max="max_val"))
fold.register(nn.ELU)(_activation("elu", alpha="alpha"))
fold.register(nn.Softplus)(_activation("softplus", beta="beta"))
fold.register(nn.SiLU)(_activation("silu"))
fold.register(GroupSort)(_activation("groupsort", group_size="group_size"))


@fold.register(Abs)
def _(module: Abs, shape: tuple[int, ...]) -> list[Node]:
    if module.fraction != 1.0:
        raise UncertifiableError(
            f"Abs(fraction={module.fraction}) folds some channels only, and the format has the absolute value of all; use Abs() or "
            "MaxMin()."
        )
    return _activation("abs")(module, shape)


@fold.register(nn.GELU)
def _(module: nn.GELU, _shape: tuple[int, ...]) -> list[Node]:
    if module.approximate != "none":
        raise UncertifiableError("the tanh approximation of GELU has no rule; use approximate='none'.")
    return [{"op": "activation", "name": "gelu"}]


@fold.register(Scale)
def _(module: Scale, _shape: tuple[int, ...]) -> list[Node]:
    return [{"op": "scale", "factor": module.factor}]


@fold.register(UnitRowLinear)
def _(module: UnitRowLinear, _shape: tuple[int, ...]) -> list[Node]:
    return [{"op": "linear", "weight": module.unit_weight(), "bias": module.bias}]


def _channelwise(scale: Tensor, shift: Tensor, shape: tuple[int, ...]) -> list[Node]:
    """Multiply each channel by a number and add one: a diagonal matrix, or kernels of one pixel."""
    channels, dims = shape[0], len(shape) - 1
    if scale.ndim and len(scale) != channels:
        raise ValueError(f"it was built for {len(scale)} channels, got {channels} in dimension 0 of the shape {shape}.")
    scale, shift = scale.expand(channels).contiguous(), shift.expand(channels).contiguous()
    if dims == 0:
        return [{"op": "linear", "weight": torch.diag(scale), "bias": shift}]
    if dims > 2:
        raise UncertifiableError(
            f"channels of shape {tuple(shape[1:])} are neither signals nor images, which have a rule."
        )
    return [
        {
            "op": "conv", "dims": dims, "weight": scale.view(channels, 1, *[1] * dims), "bias": shift, "padding": [0] * dims,
            "stride": [1] * dims, "dilation": [1] * dims, "groups": channels, "padding_mode": "zeros",
        }
    ]  # fmt: skip


@fold.register(InputNormalization)
def _(module: InputNormalization, shape: tuple[int, ...]) -> list[Node]:
    std = module.std.double()
    scale, shift = torch.ones_like(std) / std, -module.mean.double() / std
    return _channelwise(scale.to(module.std.dtype), shift.to(module.std.dtype), shape)


@fold.register(BatchCentering)
def _(module: BatchCentering, shape: tuple[int, ...]) -> list[Node]:
    shift = -module.running_mean if module.bias is None else module.bias - module.running_mean
    return _channelwise(torch.ones_like(shift), shift, shape)


@fold.register(nn.BatchNorm1d)
@fold.register(nn.BatchNorm2d)
def _(module: nn.BatchNorm1d, shape: tuple[int, ...]) -> list[Node]:
    if module.running_mean is None or module.running_var is None:
        raise UncertifiableError("without running statistics its map of one sample depends on the others of the batch.")
    axes = (0, 1) if isinstance(module, nn.BatchNorm1d) else (2,)
    if len(shape) - 1 not in axes:
        wanted = "features or signals" if axes == (0, 1) else "images"
        raise ValueError(f"{type(module).__name__} is for {wanted}, got the shape {shape} without the batch.")
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight
    shift = -module.running_mean * scale
    if module.bias is not None:
        shift = shift + module.bias
    return _channelwise(scale.to(module.running_var.dtype), shift.to(module.running_var.dtype), shape)


@fold.register(ScaledAvgPool)
def _(module: ScaledAvgPool, _shape: tuple[int, ...]) -> list[Node]:
    if module.kernel_size is None or len(module.kernel_size) > 2:
        raise UncertifiableError("a ScaledAvgPool has a rule with a kernel_size, for one or two axes.")
    kernel, dims = list(module.kernel_size), len(module.kernel_size)
    pool: Node = {"op": "pool", "name": "avg", "dims": dims, "kernel": kernel, "stride": kernel, "padding": [0] * dims}
    return [pool, {"op": "scale", "factor": root_down(math.prod(kernel))}]


def _nothing(_module: nn.Module, _shape: tuple[int, ...]) -> list[Node]:
    return []


for _class in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout):  # the identity in evaluation mode
    fold.register(_class)(_nothing)


@fold.register(nn.Flatten)
def _(module: nn.Flatten, shape: tuple[int, ...]) -> list[Node]:
    if module.start_dim != 1 or module.end_dim not in {-1, len(shape)}:
        raise UncertifiableError("only Flatten(start_dim=1, end_dim=-1) has a rule.")
    return [{"op": "flatten"}]


def _pool(name: str, dims: int) -> Callable[[Any, tuple[int, ...]], list[Node]]:
    def rule(module: Any, _shape: tuple[int, ...]) -> list[Node]:
        kernel, stride, padding = (list(per_axis(v, dims)) for v in (module.kernel_size, module.stride, module.padding))
        plain = not module.ceil_mode
        if name == "max":
            plain = plain and set(per_axis(module.dilation, dims)) == {1} and not module.return_indices
        else:
            plain = plain and (module.count_include_pad or not any(padding))
            plain = plain and getattr(module, "divisor_override", None) is None
        if not plain:
            raise UncertifiableError(
                "a pool has a rule only without ceil_mode, dilation, return_indices and divisor_override, and with "
                "count_include_pad=True if it pads."
            )
        return [{"op": "pool", "name": name, "dims": dims, "kernel": kernel, "stride": stride, "padding": padding}]

    return rule


def _global_average(dims: int) -> Callable[[Any, tuple[int, ...]], list[Node]]:
    def rule(module: Any, shape: tuple[int, ...]) -> list[Node]:
        size = module.output_size
        if set(size if isinstance(size, tuple | list) else (size,)) != {1}:
            raise UncertifiableError("adaptive average pooling has a rule only for output_size=1.")
        kernel = list(shape[1:])
        return [{"op": "pool", "name": "avg", "dims": dims, "kernel": kernel, "stride": kernel, "padding": [0] * dims}]

    return rule


fold.register(nn.AvgPool1d)(_pool("avg", 1))
fold.register(nn.AvgPool2d)(_pool("avg", 2))
fold.register(nn.MaxPool1d)(_pool("max", 1))
fold.register(nn.MaxPool2d)(_pool("max", 2))
fold.register(nn.AdaptiveAvgPool1d)(_global_average(1))
fold.register(nn.AdaptiveAvgPool2d)(_global_average(2))


@fold.register(GradientBlock)
def _(module: GradientBlock, _shape: tuple[int, ...]) -> list[Node]:
    weight, bias, step, strong, activation = module.folded()
    node: Node = {"op": "gradient_block", "weight": weight, "bias": bias, "step": step, "strong": strong}
    node["activation"] = activation
    return [node | {"slope": 0.01}] if activation == "leaky_relu" else [node]
