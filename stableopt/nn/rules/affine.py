"""The rules of layers with a weight, and of maps that only rearrange, drop or scale entries."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.activations import Scale
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.weights.geometry import Geometry

__all__: list[str] = []

_Weighted: TypeAlias = (
    nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)


@lipschitz_rule.register(nn.Linear)
@lipschitz_rule.register(nn.Conv1d)
@lipschitz_rule.register(nn.Conv2d)
@lipschitz_rule.register(nn.Conv3d)
@lipschitz_rule.register(nn.ConvTranspose1d)
@lipschitz_rule.register(nn.ConvTranspose2d)
@lipschitz_rule.register(nn.ConvTranspose3d)
def _weighted(module: _Weighted, norm: str) -> Bound:
    """Bound the operator that the stored weight makes with the stride, dilation, groups and padding of the layer."""
    geometry = Geometry.of(module)
    bound = geometry.proved(module.weight, norm)
    return bound if geometry.kind == "linear" and norm == "l2" else Bound(0.0, bound.upper, bound.proved)


@lipschitz_rule.register(Scale)
def _scale(module: Scale, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    return Bound.point(abs(module.factor))


@lipschitz_rule.register(nn.Identity)
@lipschitz_rule.register(nn.Flatten)
@lipschitz_rule.register(nn.Unflatten)
@lipschitz_rule.register(nn.Dropout)
@lipschitz_rule.register(nn.Dropout1d)
@lipschitz_rule.register(nn.Dropout2d)
@lipschitz_rule.register(nn.Dropout3d)
@lipschitz_rule.register(nn.AlphaDropout)
@lipschitz_rule.register(nn.FeatureAlphaDropout)
@lipschitz_rule.register(nn.PixelShuffle)
@lipschitz_rule.register(nn.PixelUnshuffle)
@lipschitz_rule.register(nn.ChannelShuffle)
def _rearranged(module: nn.Module, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    """Return 1: in evaluation mode the entries keep their values, at most in another order."""
    return Bound.point(1.0)


@lipschitz_rule.register(nn.Bilinear)
def _bilinear(module: nn.Bilinear, norm: str) -> Bound:  # noqa: ARG001 refused whatever its numbers
    raise UncertifiableError(
        f"no {norm} Lipschitz rule is known for Bilinear: it multiplies its two inputs, so its slope grows with them. Keep both "
        "inputs in a ball and bound the product by hand, or concatenate the inputs and use nn.Linear."
    )
