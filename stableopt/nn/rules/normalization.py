r"""The rules of normalizations.

With statistics that are stored, a normalization is a diagonal map. With statistics of its input it is not, and its constant is
attained where the input has no spread: :math:`\max|\gamma|/\sqrt\varepsilon`, 316 for the default :math:`\varepsilon` of torch.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.dispatch import lipschitz_rule

__all__ = ["largest_gain"]

_OfSample: TypeAlias = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | _NormBase


@lipschitz_rule.register(nn.BatchNorm1d)
@lipschitz_rule.register(nn.BatchNorm2d)
@lipschitz_rule.register(nn.BatchNorm3d)
@lipschitz_rule.register(nn.SyncBatchNorm)
def _batch_norm(module: nn.BatchNorm1d, norm: str) -> Bound:
    if module.running_mean is None or module.running_var is None:
        raise UncertifiableError(
            f"no {norm} Lipschitz rule is known for {type(module).__name__} without running statistics: its map of one sample "
            "depends on the others of the batch. Build it with track_running_stats=True."
        )
    return _stored(module)


@lipschitz_rule.register(nn.InstanceNorm1d)
@lipschitz_rule.register(nn.InstanceNorm2d)
@lipschitz_rule.register(nn.InstanceNorm3d)
def _instance_norm(module: nn.InstanceNorm1d, norm: str) -> Bound:
    """Bound it like GroupNorm with one channel per group, or like BatchNorm if it tracks statistics."""
    if module.track_running_stats:
        return _stored(module)
    return _of_sample(module, norm, None)


@lipschitz_rule.register(nn.GroupNorm)
def _group_norm(module: nn.GroupNorm, norm: str) -> Bound:
    return _of_sample(module, norm, None)


@lipschitz_rule.register(nn.LayerNorm)
def _layer_norm(module: nn.LayerNorm, norm: str) -> Bound:
    r"""Bound :math:`J = \frac1s \Gamma(P - zz^\top/n)`, :math:`z = (x - \mu)/s`, :math:`s^2 = v + \varepsilon`.

    Here :math:`P = I - 11^\top/n`. As :math:`z \perp 1` and :math:`\|z\|^2/n = v/s^2 < 1`, the bracket lies between 0 and
    :math:`P`: the l2 norm is at most :math:`\max|\gamma|/\sqrt\varepsilon`, attained by equal :math:`\gamma` at a constant input.
    """
    return _of_sample(module, norm, math.prod(module.normalized_shape))


@lipschitz_rule.register(nn.RMSNorm)
def _rms_norm(module: nn.RMSNorm, norm: str) -> Bound:
    r"""Bound :math:`J = \frac1s \Gamma(I - zz^\top/n)` as LayerNorm; :math:`z = x/s`, :math:`s^2 = \|x\|^2/n + \varepsilon`."""
    if module.eps is None:
        raise UncertifiableError(
            "RMSNorm(eps=None) takes the machine precision of its input as eps, which the module does not know; pass eps."
        )
    return _of_sample(module, norm, math.prod(module.normalized_shape), centered=False)


def _of_sample(module: _OfSample, norm: str, n: int | None, *, centered: bool = True) -> Bound:
    r"""Bound a normalization by the statistics of :math:`n` entries of its input.

    In linf and l1 the symmetric matrix :math:`(P - zz^\top/n)/s` is bounded by its rows. With :math:`w = v/s^2 = \|z\|^2/n`,
    :math:`1/s = \sqrt{(1-w)/\varepsilon}`; row :math:`i` has at most the absolute sum :math:`c + |z_i|\sum_{j\ne i}|z_j|/n`, with
    :math:`c = 2(n-1)/n` (or 1 without centering), because :math:`z_i^2 \le (n-1)w` keeps its diagonal entry non-negative, and
    without centering :math:`z_i^2 \le nw` does. The product is at most :math:`w\sqrt{n-1}/2`, and
    :math:`w\sqrt{1-w} \le 2/\sqrt{27}`: together :math:`(c + \sqrt{(n-1)/27})/\sqrt\varepsilon`.
    """
    eps = float(module.eps or 0.0)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps of {type(module).__name__} must be finite and positive, got {eps!r}.")
    if eps == 0:
        raise UncertifiableError(
            f"{type(module).__name__}(eps=0) divides by a spread that may be 0; pass a positive eps."
        )
    _check_finite(None if isinstance(module, nn.RMSNorm) else module.bias, module)
    steepest = largest_gain(module.weight, module) / Bound.point(eps).sqrt()
    if n == 1 and centered:
        return Bound.point(0.0)
    if norm == "l2":
        return Bound(0.0, steepest.upper)
    if n is None:
        raise UncertifiableError(
            f"the {norm} Lipschitz constant of {type(module).__name__} grows with the number of entries it averages over, which "
            "the module does not know; an l2 bound exists for every size."
        )
    rows = (Bound.point(n - 1) / 27).sqrt() + (Bound.point(2 * (n - 1)) / n if centered else 1.0)
    return Bound(0.0, (rows * steepest).upper)


def _stored(module: _NormBase) -> Bound:
    r"""Enclose :math:`\max_c |\gamma_c| / \sqrt{v_c + \varepsilon}`, the constant in every norm.

    A computed quotient is off by at most three roundings, of the sum, its root and the quotient.
    """
    variance, eps = module.running_var, float(module.eps)
    if variance is None or module.running_mean is None:
        raise UncertifiableError(
            f"{type(module).__name__} has no running statistics; build it with track_running_stats=True."
        )
    for values in (module.running_mean, variance, module.bias):
        _check_finite(values, module)
    largest_gain(module.weight, module)  # refuses NaN
    total = variance.detach().to("cpu", torch.float64) + eps
    if not bool((total > 0).all()) or not math.isfinite(eps):
        raise ValueError(f"no bound holds for a {type(module).__name__} with running_var + eps <= 0 or not finite.")
    gain = torch.ones_like(total) if module.weight is None else module.weight.detach().to("cpu", torch.float64).abs()
    ratio = float((gain / total.sqrt()).max()) if total.numel() else 0.0
    tiny = 0.0 if ratio == 0.0 and not bool(gain.any()) else 2.0**-1073
    bound = Bound.point(ratio) * Bound(1 - 2.0**-50, 1 + 2.0**-50)
    return Bound(max(0.0, (bound - tiny).lower), (bound + tiny).upper)


def largest_gain(weight: Tensor | None, module: nn.Module) -> Bound:
    r"""Return :math:`\max|\gamma|` of a normalization, 1 for one without a weight.

    Raises:
        ValueError: if an entry is NaN or infinite.

    Examples:
        >>> largest_gain(torch.tensor([-3.0, 2.0]), nn.LayerNorm(2)).upper
        3.0
    """
    if weight is None:
        return Bound.point(1.0)
    _check_finite(weight, module)
    return Bound.point(float(weight.detach().abs().max()) if weight.numel() else 0.0)


def _check_finite(values: Tensor | None, module: nn.Module) -> None:
    if values is not None and not bool(values.isfinite().all()):
        raise ValueError(f"no bound holds for a {type(module).__name__} with NaN or infinite numbers.")
