"""The rules of the activations that are no part of :mod:`stableopt.nn.activation_constants`: the largest slope, in every norm."""

from __future__ import annotations

import math

from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.activations import GroupSort
from stableopt.nn.dispatch import lipschitz_rule

__all__ = ["GELU_SLOPE", "GELU_TANH_SLOPE", "SILU_SLOPE"]

GELU_SLOPE = 1.1289041451851549
r"""Largest slope of :math:`x\Phi(x)`, at :math:`x = \sqrt2`: :math:`(1 + \operatorname{erf} 1)/2 + e^{-1}/\sqrt\pi`, rounded up."""
GELU_TANH_SLOPE = 1.1289930686587719
"""Largest slope of the tanh approximation of GELU, at 1.4185040088, rounded up."""
SILU_SLOPE = 1.0998393201288670
r"""Largest slope of :math:`x/(1 + e^{-x})`, at 2.3993572805, rounded up."""


@lipschitz_rule.register(nn.ReLU)
@lipschitz_rule.register(nn.Tanh)
@lipschitz_rule.register(GroupSort)
def _one(module: nn.Module, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    return Bound.point(1.0)


@lipschitz_rule.register(nn.Sigmoid)
def _sigmoid(module: nn.Sigmoid, norm: str) -> Bound:  # noqa: ARG001
    return Bound.point(0.25)


@lipschitz_rule.register(nn.Hardtanh)
def _hardtanh(module: nn.Hardtanh, norm: str) -> Bound:  # noqa: ARG001
    return Bound.point(1.0)


@lipschitz_rule.register(nn.Softplus)
def _softplus(module: nn.Softplus, norm: str) -> Bound:  # noqa: ARG001
    if not (0 < module.beta < math.inf and module.threshold >= 20):
        raise UncertifiableError(
            f"Softplus(beta={module.beta}, threshold={module.threshold}) jumps where it switches to the identity; "
            "a bound is known for finite beta > 0 and threshold >= 20, where the jump is 2e-9 / beta and counts as rounding."
        )
    return Bound.point(1.0)


@lipschitz_rule.register(nn.LeakyReLU)
def _leaky_relu(module: nn.LeakyReLU, norm: str) -> Bound:  # noqa: ARG001
    return Bound.point(max(1.0, _finite(module.negative_slope, "negative_slope")))


@lipschitz_rule.register(nn.ELU)
def _elu(module: nn.ELU, norm: str) -> Bound:  # noqa: ARG001
    return Bound.point(max(1.0, _finite(module.alpha, "alpha")))


@lipschitz_rule.register(nn.GELU)
def _gelu(module: nn.GELU, norm: str) -> Bound:  # noqa: ARG001
    return Bound(0.0, GELU_SLOPE if module.approximate == "none" else GELU_TANH_SLOPE)


@lipschitz_rule.register(nn.SiLU)
def _silu(module: nn.SiLU, norm: str) -> Bound:  # noqa: ARG001
    return Bound(0.0, SILU_SLOPE)


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}.")
    return abs(float(value))
