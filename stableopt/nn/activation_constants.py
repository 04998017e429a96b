r"""The Lipschitz constants of torch's activations: true ones, and a sentence where there is none.

An elementwise :math:`\sigma` has the constant :math:`\sup|\sigma'|` in l2, linf and l1 alike, because its Jacobian is diagonal.
Each rule below says where the supremum is. Three are transcendental; their enclosures are two neighboring floats, and the test
suite confirms both ends on the whole real line by ball arithmetic. The rules of ReLU, LeakyReLU, ELU, GELU, SiLU, Softplus,
Sigmoid, Tanh, Hardtanh and ReLU6 are those of :mod:`stableopt.nn.rules`.
"""

from __future__ import annotations

import math

from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.dispatch import lipschitz_rule

__all__ = ["HARDSWISH_SLOPE", "MISH_SLOPE", "SELU_SLOPE", "activation_constant"]

MISH_SLOPE = Bound(1.0884981612517277, 1.088498161251728)
r"""Largest slope of :math:`x\tanh(\ln(1 + e^x))`, at 1.4905711795; the smallest is -0.11252612239 at -2.2563763964."""
HARDSWISH_SLOPE = Bound.point(1.5)
r"""Largest slope of :math:`x\min(\max(x + 3, 0), 6)/6`: inside :math:`(-3, 3)` it is :math:`(2x + 3)/6`, up to 3/2."""
SELU_SLOPE = Bound.point(1.0507009873554805) * 1.6732632423543772
r"""Largest slope of SELU: :math:`\lambda\alpha = 1.75809934\dots`, approached left of 0, with :math:`\lambda` right of it."""

_HALF = 0.5


def activation_constant(module: nn.Module) -> Bound:
    r"""Return the proved constant of one of torch's activations, the same number that :func:`stableopt.nn.lipschitz` uses.

    .. math:: L = \sup_x |\sigma'(x)|

    Args:
        module: an instance of an elementwise activation class of torch.

    Returns:
        An enclosure of the smallest :math:`L` in l2.

    Raises:
        UncertifiableError: if the activation jumps, grows without limit, or has no rule.
        ValueError: if a slope of it is NaN or infinite.

    Examples:
        >>> activation_constant(nn.Hardswish())
        Bound(lower=1.5, upper=1.5, proved=True)
        >>> activation_constant(nn.GLU())
        Traceback (most recent call last):
        stableopt.errors.UncertifiableError: GLU multiplies one half of its input by the other ...
    """
    return lipschitz_rule(module, "l2")


# Slopes that are numbers.


@lipschitz_rule.register(nn.Mish)
def _mish(module: nn.Mish, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    return MISH_SLOPE


@lipschitz_rule.register(nn.Hardswish)
def _hardswish(module: nn.Hardswish, norm: str) -> Bound:  # noqa: ARG001
    return HARDSWISH_SLOPE


@lipschitz_rule.register(nn.SELU)
def _selu(module: nn.SELU, norm: str) -> Bound:  # noqa: ARG001
    return SELU_SLOPE


@lipschitz_rule.register(nn.Hardsigmoid)
def _hardsigmoid(module: nn.Hardsigmoid, norm: str) -> Bound:  # noqa: ARG001
    return Bound.point(1.0) / 6.0


@lipschitz_rule.register(nn.Softsign)
def _softsign(module: nn.Softsign, norm: str) -> Bound:  # noqa: ARG001
    r"""Slope :math:`(1 + |x|)^{-2}`, 1 at 0."""
    return Bound.point(1.0)


@lipschitz_rule.register(nn.LogSigmoid)
def _log_sigmoid(module: nn.LogSigmoid, norm: str) -> Bound:  # noqa: ARG001
    r"""Slope :math:`1/(1 + e^x)`, tending to 1 at :math:`-\infty`."""
    return Bound.point(1.0)


@lipschitz_rule.register(nn.Tanhshrink)
def _tanhshrink(module: nn.Tanhshrink, norm: str) -> Bound:  # noqa: ARG001
    r"""Slope :math:`\tanh^2 x`, tending to 1 at infinity."""
    return Bound.point(1.0)


# Slopes that depend on an argument or on parameters.


@lipschitz_rule.register(nn.CELU)
def _celu(module: nn.CELU, norm: str) -> Bound:  # noqa: ARG001
    r"""Slope :math:`e^{x/\alpha} \le 1` to the left of 0 for :math:`\alpha > 0`; for :math:`\alpha < 0` it grows without limit."""
    if not 0.0 < module.alpha < math.inf:
        raise UncertifiableError(
            f"CELU(alpha={module.alpha}) has slopes exp(x / alpha) without limit; a constant (1) is known for finite alpha > 0."
        )
    return Bound.point(1.0)


@lipschitz_rule.register(nn.PReLU)
def _prelu(module: nn.PReLU, norm: str) -> Bound:  # noqa: ARG001
    r"""Slopes 1 and :math:`a_c`: :math:`\max(1, \max_c|a_c|)`, attained."""
    if not bool(module.weight.isfinite().all()):
        raise ValueError("no bound holds for a PReLU with NaN or infinite slopes.")
    return Bound.point(max([1.0, *module.weight.detach().double().abs().flatten().tolist()]))


@lipschitz_rule.register(nn.RReLU)
def _rrelu(module: nn.RReLU, norm: str) -> Bound:  # noqa: ARG001
    r"""Evaluate: the slope to the left of 0 is the mean of the two limits."""
    if not (math.isfinite(module.lower) and math.isfinite(module.upper)):
        raise ValueError(f"the slopes of RReLU must be finite, got {module.lower!r} and {module.upper!r}.")
    return abs((Bound.point(module.lower) + module.upper) / 2.0).join(1.0)


@lipschitz_rule.register(nn.Softshrink)
def _softshrink(module: nn.Softshrink, norm: str) -> Bound:  # noqa: ARG001
    r"""Evaluate: a proximal map, slopes 0 and 1; with a negative :math:`\lambda` torch itself refuses."""
    if not 0.0 <= module.lambd < math.inf:
        raise UncertifiableError(
            f"Softshrink(lambd={module.lambd}) is no map that torch computes; give a finite lambd >= 0."
        )
    return Bound.point(1.0)


# Maps that jump.


@lipschitz_rule.register(nn.Hardshrink)
def _hardshrink(module: nn.Hardshrink, norm: str) -> Bound:  # noqa: ARG001
    if module.lambd == 0.0:  # the identity
        return Bound.point(1.0)
    raise UncertifiableError(
        f"Hardshrink(lambd={module.lambd}) jumps by lambd at the ends of its dead zone, so it has no Lipschitz constant. "
        "Use nn.Softshrink, which is continuous."
    )


@lipschitz_rule.register(nn.Threshold)
def _threshold(module: nn.Threshold, norm: str) -> Bound:  # noqa: ARG001
    if module.value == module.threshold:  # max(x, threshold)
        return Bound.point(1.0)
    raise UncertifiableError(
        f"Threshold(threshold={module.threshold}, value={module.value}) jumps at its threshold, so it has no Lipschitz constant. "
        "With value == threshold it is continuous and has the constant 1."
    )


# Maps of several entries.


@lipschitz_rule.register(nn.GLU)
def _glu(module: nn.GLU, norm: str) -> Bound:  # noqa: ARG001
    raise UncertifiableError(
        "GLU multiplies one half of its input by the other: its slope grows with the input and no global Lipschitz constant "
        "exists. Use an activation with a constant, for example stableopt.nn.MaxMin, which also halves the work per unit."
    )


@lipschitz_rule.register(nn.Softmax)
@lipschitz_rule.register(nn.Softmax2d)
@lipschitz_rule.register(nn.Softmin)
def _softmax(module: nn.Module, norm: str) -> Bound:  # noqa: ARG001
    r"""Bound :math:`J = \operatorname{diag}(p) - pp^\top` by 1/2, attained at :math:`p = (1/2, 1/2)`.

    Row :math:`i` has the absolute sum :math:`2p_i(1 - p_i) \le 1/2`, which is the linf norm; :math:`J` is symmetric, so it is also
    the l1 norm, and the l2 norm is at most the geometric mean of the two. With a single class the map is constant, hence the 0.
    """
    return Bound(0.0, _HALF)


@lipschitz_rule.register(nn.LogSoftmax)
def _log_softmax(module: nn.LogSoftmax, norm: str) -> Bound:  # noqa: ARG001
    r"""Bound :math:`J = I - \mathbf 1 p^\top`: in linf, row :math:`i` has the absolute sum :math:`2(1 - p_i) < 2`.

    In l2 the norm of this oblique projection is :math:`\|\mathbf 1\|\,\|p\| = \sqrt n\,\|p\|`, in l1 it is up to
    :math:`n - 1`: both grow with the number :math:`n` of classes, which the module does not know.
    """
    if norm == "linf":
        return Bound(0.0, 2.0)
    growth = "the square root of the number of classes" if norm == "l2" else "the number of classes"
    raise UncertifiableError(
        f"the {norm} Lipschitz constant of LogSoftmax grows like {growth}, which the module does not know; "
        "bound the logits instead (a linf bound, 2, exists for every size)."
    )
