r"""Lipschitz bounds that hold for all values of the parameters, so that training cannot break them."""

from __future__ import annotations

import functools

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.activations import NActivation
from stableopt.nn.dispatch import check_forward, registered_class, require_norm
from stableopt.nn.rules import lipschitz
from stableopt.nn.rules.normalization import largest_gain

__all__ = ["uniform_bound", "uniform_rule"]


def uniform_bound(module: nn.Module, norm: str = "l2") -> Bound | None:
    r"""Bound a module for all values of its trainable parameters.

    .. math:: \sup_\theta \operatorname{Lip}(f_\theta)

    :func:`stableopt.nn.lipschitz` bounds a module as it is now. This bound may be relied on while the module is trained: a plain
    :class:`torch.nn.Linear` has none, a :class:`NActivation` has 1.

    Running statistics count as parameters that training changes, unless they cannot move (``momentum=0.0``): a BatchNorm whose
    :math:`\gamma` is frozen has the bound :math:`\max|\gamma|/\sqrt\varepsilon`, that of a variance of 0.

    Args:
        module: the module; a module that training does not change has the bound that it has now.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.

    Returns:
        A bound from 0 to an upper end that is proved, or None if none is known.

    Raises:
        TypeError: if ``module`` is no module.
        UncertifiableError: if a module that training does not change has no rule, or its class does not tell its forward map.
        ValueError: if the norm is unknown.

    Examples:
        >>> uniform_bound(nn.Linear(2, 2)) is None
        True
        >>> uniform_bound(nn.Sequential(NActivation(2), nn.ReLU())).upper
        1.0
    """
    require_norm(norm)
    if not isinstance(module, nn.Module):
        raise TypeError(f"uniform_bound needs a torch.nn.Module, got {type(module).__name__}.")
    if not _trained(module) and not any(map(_moves, module.modules())):
        bound = lipschitz(module, norm)
        return Bound(0.0, bound.upper, bound.proved)
    for kind in type(module).__mro__:
        if kind in uniform_rule.registry and kind is not object:
            if registered_class(module) is not None:
                check_forward(module, kind)
            return uniform_rule(module, norm)
    return None


@functools.singledispatch
def uniform_rule(module: nn.Module, norm: str) -> Bound | None:  # noqa: ARG001 the interface of the rules
    """Return the uniform bound of one class; the registry behind :func:`uniform_bound`, None for a class without an entry.

    Args:
        module: the module; a rule may read its settings, but no trainable parameter.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.

    Examples:
        >>> uniform_rule(nn.Linear(1, 1), "l2") is None
        True
    """
    return None


def uniform_parts(parts: list[nn.Module], norm: str) -> list[Bound] | None:
    """Return the uniform bounds of all parts, or None if one of them has none.

    Examples:
        >>> uniform_parts([nn.ReLU(), nn.Linear(1, 1)], "l2") is None
        True
    """
    bounds = [uniform_bound(part, norm) for part in parts]
    known = [bound for bound in bounds if bound is not None]
    return known if len(known) == len(bounds) else None


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _moves(part: nn.Module) -> bool:
    """Return whether a forward pass in training mode changes the buffers that the map of evaluation depends on."""
    if isinstance(part, _NormBase):
        return part.running_var is not None and part.track_running_stats and part.momentum != 0.0
    return isinstance(part, _SpectralNorm)  # the vectors of its power iteration


@uniform_rule.register(nn.BatchNorm1d)
@uniform_rule.register(nn.BatchNorm2d)
@uniform_rule.register(nn.BatchNorm3d)
@uniform_rule.register(nn.SyncBatchNorm)
@uniform_rule.register(nn.InstanceNorm1d)
@uniform_rule.register(nn.InstanceNorm2d)
@uniform_rule.register(nn.InstanceNorm3d)
def _running(module: _NormBase, norm: str) -> Bound | None:
    """Bound it for every variance that averages of the present one and of later ones, at least 0, can be."""
    if _trained(module) or not 0.0 <= (module.momentum or 0.0) <= 1.0:
        return None
    now = lipschitz(module, norm)  # refuses what is not finite; larger than the bound below for a negative variance
    if not module.eps > 0.0:
        return None
    steepest = largest_gain(module.weight, module) / Bound.point(float(module.eps)).sqrt()
    rounding = 1.0 + 2.0**-48  # that of the rule itself, so that what it says later is not above
    return Bound(0.0, max(now.upper, (steepest * rounding).upper), now.proved)


@uniform_rule.register(NActivation)
def _n_activation(module: NActivation, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    return Bound(0.0, 1.0)


@uniform_rule.register(nn.Sequential)
def _sequential(module: nn.Sequential, norm: str) -> Bound | None:
    try:
        bounds = uniform_parts(list(module), norm)
    except UncertifiableError:
        return None
    if bounds is None:
        return None
    product = Bound.point(1.0)
    for bound in bounds:
        product = product * bound
    return Bound(0.0, product.upper, product.proved)
