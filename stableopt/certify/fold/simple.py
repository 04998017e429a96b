"""The rules of activations, of torch and ours, and of our layers without branches."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from stableopt.certify.fold.registry import fold
from stableopt.certify.program import Builder, Value
from stableopt.nn.activations import GroupSort, Scale
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.heads import UnitRowLinear

__all__: list[str] = []


def _activation(name: str, **settings: str) -> Callable[[nn.Module, Builder, Value], Value]:
    """Make the rule of an activation whose settings are attributes of the module."""

    def rule(module: nn.Module, graph: Builder, value: Value) -> Value:
        lipschitz_rule(module, "l2")  # refuses settings for which the module computes something else than its formula
        real = {key: float(getattr(module, attribute)) for key, attribute in settings.items()}
        return graph.add("activation", value, name=name, **real)

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


@fold.register(GroupSort)
def _(module: GroupSort, graph: Builder, value: Value) -> Value:
    return graph.add("groupsort", value, group_size=module.group_size, axis=0)


@fold.register(Scale)
def _(module: Scale, graph: Builder, value: Value) -> Value:
    return graph.add("scale", value, factor=module.factor)


@fold.register(UnitRowLinear)
def _(module: UnitRowLinear, graph: Builder, value: Value) -> Value:
    return graph.add("linear", value, weight=module.unit_weight(), bias=module.bias, transposed=False)
