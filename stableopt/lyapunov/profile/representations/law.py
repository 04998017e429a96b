"""Bounds of the layers of a chain that follow from their weights, to compare measured norms with."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch.nn.utils.parametrize as P
from numpy.typing import NDArray
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.lyapunov.profile.representations.cuts import Chain
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.nn import lipschitz
from stableopt.nn.weights import WeightMap

__all__ = ["log_law"]


def log_law(chain: Chain) -> NDArray[np.float64]:
    r"""Return for each layer the logarithm of a bound of its Lipschitz constant (T2), NaN where none is known.

    The bound of a layer is the product of those that :func:`stableopt.nn.lipschitz` proves for its modules, if modules are all
    that the trunk consists of. Those speak of evaluation mode: in training, dropout multiplies by :math:`1/(1-p)`, and
    normalization with batch statistics has no bound.

    Args:
        chain: of which.

    Examples:
        >>> import torch
        >>> from stableopt.lyapunov.profile.representations.survey import chain_of
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _ = nn.init.constant_(model[0].weight, 1.0)
        >>> log_law(chain_of(model, torch.ones(1, 2))).round(6)
        array([0.693147])
    """
    bounds = np.zeros(len(chain.layers)) if chain.path else np.full(len(chain.layers), math.nan)
    modules, layer = dict(chain.model.named_modules()), 0
    for name in chain.path:
        if layer + 1 < len(chain.layers) and name == chain.layers[layer + 1]:
            layer += 1
        bounds[layer] += _log_bound(modules[name.partition("#")[0]])
    return bounds


def _log_bound(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training:  # noqa: SLF001 torch has no other name for all of them
        return -math.log1p(-module.p) if module.p < 1.0 else -math.inf
    if any(part.training and _differs_in_training(part) for part in module.modules()):
        return math.nan
    try:
        with undisturbed(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            upper = lipschitz(module).upper
    except (UncertifiableError, ValueError, TypeError):
        return math.nan
    return math.log(upper) if upper > 0.0 else -math.inf


def _differs_in_training(module: nn.Module) -> bool:
    """Return whether a module computes another map in training than in evaluation, or may do so."""
    if P.is_parametrized(module):
        chains = module.parametrizations
        maps = [one for chain in chains.values() for one in chain]  # pyright: ignore[reportCallIssue]
        return not all(isinstance(one, WeightMap) and one.by_construction for one in maps)
    known = nn.modules.dropout._DropoutNd | nn.modules.batchnorm._NormBase | nn.RNNBase | nn.MultiheadAttention  # noqa: SLF001
    return isinstance(module, known)
