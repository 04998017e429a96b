r"""Normalizations: constants of :math:`\max|\gamma|/\sqrt\varepsilon` where 1 is assumed, and statistics of the batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from stableopt.certify.audit.findings import Finding
from stableopt.certify.audit.scene import Scene, called
from stableopt.certify.audit.search import generator, quotient, steepest
from stableopt.errors import UncertifiableError
from stableopt.nn import lipschitz

__all__ = ["batch_statistics", "sample_normalizations"]

_ADVICE = (
    "Use stableopt.nn.LayerCentering or BoundedNorm (constant at most 1), a BatchNorm with stored statistics, or an eps as large "
    "as the spread that you expect."
)


def sample_normalizations(scene: Scene) -> Iterator[Finding]:
    r"""Find LayerNorm, RMSNorm, GroupNorm, InstanceNorm and LocalResponseNorm with a constant above 1.

    The pair of the witness lies around a constant input, where :math:`J = \Gamma P/\sqrt\varepsilon` (without P for RMSNorm).

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> found = next(sample_normalizations(scene(nn.LayerNorm(8, dtype=torch.float64), ())))
        >>> found.kind, found.attained > 316
        ('sample-normalization', True)
    """
    for path, module in scene.modules():
        if not isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | _InstanceNorm | nn.LocalResponseNorm):
            continue
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            continue
        x, bound, f = _flat_input(module), _upper(module), _alone(scene, path, module)
        scale = math.sqrt(_eps(module)) if _eps(module) > 0 else 1e-8
        found = steepest(f, x, scale=scale, iterations=50)
        if found.gain > 1 + 1e-9:
            yield Finding(
                path,
                "sample-normalization",
                f"{called(module)} divides by the spread of its input, so its Lipschitz constant is max|gamma|/sqrt(eps), "
                "reached where the input is constant.",
                "serious",
                _ADVICE,
                claimed=1.0,
                attained=found.gain,
                bound=bound,
                witness=found,
                numbers={"eps": _eps(module)},
            )


def batch_statistics(scene: Scene) -> Iterator[Finding]:
    """Find BatchNorm (or InstanceNorm) in training mode, or without statistics: its map of a sample depends on the other samples.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> [f.severity for f in batch_statistics(scene(nn.BatchNorm1d(2, dtype=torch.float64), ()))]
        ['weak']
    """
    for path, module in scene.modules():
        if not isinstance(module, _NormBase) or isinstance(module, _InstanceNorm):
            continue
        stored = module.running_mean is not None and module.running_var is not None
        if stored and path not in scene.training:
            continue
        layer = copy.deepcopy(scene.exact.get_submodule(path)).train()
        moved, pair = _moved_by_others(layer)
        yield Finding(
            path,
            "batch-statistics",
            f"{called(module)} {'is in training mode' if stored else 'has no running statistics'}, so the output of one "
            "sample changes when only other samples of its batch do; no statement about single inputs holds.",
            "weak" if stored else "serious",
            "Call model.eval() before the model is used or certified."
            if stored
            else "Build it with track_running_stats=True.",
            claimed=0.0,
            attained=moved,
            witness=pair,
        )


def _moved_by_others(layer: nn.Module) -> tuple[float, Any]:
    """Return how far the output of the first sample moves when the others grow tenfold."""
    dims = {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
    axes = next((d for kind, d in dims.items() if isinstance(layer, kind)), 0)
    features = int(getattr(layer, "num_features", 1))
    x = torch.randn(4, features, *[2] * axes, generator=generator(), dtype=torch.float64)
    y = torch.cat([x[:1], 10 * x[1:]])
    with torch.no_grad():
        return float((layer(x)[0] - layer(y)[0]).norm()), quotient(layer, x, y)


def _alone(scene: Scene, path: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the map of a normalization in float64; an RMSNorm without eps takes that of the dtype that it is used in."""
    exact = copy.deepcopy(scene.exact.get_submodule(path))
    if isinstance(module, nn.RMSNorm):
        exact.eps = _eps(module)  # type: ignore[assignment] - torch reads a float
    return exact


def _eps(module: nn.Module) -> float:
    if isinstance(module, nn.LocalResponseNorm):
        return float(module.k)
    eps: Any = module.eps
    if eps is not None:
        return float(eps)
    dtypes = [p.dtype for p in module.parameters()]
    return torch.finfo(dtypes[0] if dtypes else torch.get_default_dtype()).eps


def _flat_input(module: nn.Module) -> Tensor:
    """Return an input without any spread, of the smallest shape that the module takes."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return torch.zeros(1, *module.normalized_shape, dtype=torch.float64)
    if isinstance(module, nn.GroupNorm):
        return torch.zeros(1, module.num_channels, 4, dtype=torch.float64)
    if isinstance(module, nn.LocalResponseNorm):
        return torch.zeros(1, module.size, 2, dtype=torch.float64)
    dims = next(
        d for d, k in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), 1) if isinstance(module, k)
    )
    return torch.zeros(1, int(getattr(module, "num_features", 1)), *[4] * dims, dtype=torch.float64)


def _upper(module: nn.Module) -> float:
    try:
        return lipschitz(module).upper
    except (UncertifiableError, ValueError):
        if isinstance(module, nn.RMSNorm) and module.eps is None:
            other = copy.deepcopy(module)
            other.eps = _eps(module)
            return lipschitz(other).upper
        return math.inf
