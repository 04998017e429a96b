"""Cheap estimates of the operator norms of a model while it trains, taken without touching it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from stableopt.linalg import gram_conv_norm, power_step
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.nn import GradientBlock, layer_limit
from stableopt.nn.gap import norm_gap
from stableopt.nn.limits import limited_slots
from stableopt.nn.parametrized import compute
from stableopt.nn.weights import WeightMap

__all__ = ["LayerNorms", "NormEstimator"]

_FIRST_STEPS = 8  # from a random vector; afterwards one step follows the slowly changing weight
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerNorms:
    """Estimates of one moment.

    Args:
        norms: weight name -> estimate of its operator norm.
        limits: weight name -> limit of this norm, for the weights that are constrained.
        cfl: block name -> share of its step limit in use.

    Examples:
        >>> LayerNorms().norms
        {}
    """

    norms: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    cfl: dict[str, float] = field(default_factory=dict)


class NormEstimator:
    r"""Estimate the operator norm of each weight of a model.

    The weights of ``Linear`` layers and gradient blocks, and every constrained matrix, by one warm power step
    (from below); the weights of convolutions by :func:`stableopt.linalg.gram_conv_norm` (from above, in exact arithmetic).
    A gradient block also gets its CFL use :math:`\tau\,(2m + \|A\|^2)/2`, which is at most 1 while the block is nonexpansive.

    Args:
        model: read, never changed: the vectors live here, random numbers come from a generator of its own, and a
            parametrization that keeps a state (as torch's ``spectral_norm``) is put back as it was.
        seed: of the first vectors.

    Note:
        Estimates, not bounds. Convolutions with a padding other than zeros or circular are left out.

    Examples:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        >>> round(NormEstimator(nn.Sequential(layer)).measure().norms["0.weight"], 3)
        3.0
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        self._model = model
        self._generator = torch.Generator().manual_seed(seed)
        self._vectors: dict[str, Tensor] = {}

    def measure(self) -> LayerNorms:
        """Take one power step for each weight and return what is known now."""
        result = LayerNorms()
        with torch.no_grad():
            for path, module in self._model.named_modules():
                if not _has_norm(module) or (weight := _read(module)) is None:
                    continue
                key = f"{path}.weight" if path else "weight"
                result.norms[key] = self._norm(key, module, weight)
                if (limit := layer_limit(module)) is not None:
                    result.limits[key] = limit
                if isinstance(module, GradientBlock):
                    result.cfl[path] = _cfl_use(module, result.norms[key])
        return result

    def gaps(self) -> dict[str, float]:
        """Prove how far the weights of methods that train with an estimate are from their limits now, in training.

        Returns:
            Weight name -> :func:`stableopt.nn.norm_gap`; empty if there are none. A weight with NaN or infinity has the gap NaN.

        Examples:
            >>> from stableopt.nn import stabilize
            >>> found = NormEstimator(stabilize(nn.Sequential(nn.Linear(4, 4)), method="power")).gaps()
            >>> list(found), bool(0.9 < found["0.weight"] < 1.1)
            (['0.weight'], True)
        """
        gaps: dict[str, float] = {}
        for slot, limit in limited_slots(self._model):
            if limit.exact:
                continue
            try:
                gap = norm_gap(slot.module, slot.name)
            except ValueError:
                gap = math.nan
            if gap is not None:
                gaps[slot.key] = gap
        return gaps

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors and the state of the generator.

        Examples:
            >>> sorted(NormEstimator(nn.Linear(2, 2)).state_dict())
            ['generator', 'vectors']
        """
        vectors = {key: vector.clone() for key, vector in self._vectors.items()}
        return {"vectors": vectors, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` gave.

        Examples:
            >>> estimator = NormEstimator(nn.Linear(2, 2))
            >>> estimator.load_state_dict(estimator.state_dict())
        """
        self._vectors = {key: vector.clone() for key, vector in state["vectors"].items()}
        self._generator.set_state(state["generator"])

    def _norm(self, key: str, module: nn.Module, weight: Tensor) -> float:
        if isinstance(module, _CONV):
            return float(gram_conv_norm(weight, groups=module.groups))
        weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        vector, steps = self._vectors.get(key), 1
        if vector is None or vector.shape != weight.shape[:1]:
            vector = torch.randn(weight.shape[0], generator=self._generator, dtype=torch.float64)
            steps = _FIRST_STEPS
        vector = vector.to(weight)  # a model may move between devices or dtypes during a run
        largest, safe = float(torch.linalg.vector_norm(weight, math.inf)), torch.finfo(weight.dtype).max ** 0.25
        scale = 1.0 if not 0.0 < largest < math.inf or 1.0 / safe < largest < safe else largest
        value, following = _power(
            weight if scale == 1.0 else weight / scale, vector, steps
        )  # else squares leave the dtype
        self._vectors[key] = following
        return value * scale


def _power(weight: Tensor, vector: Tensor, steps: int) -> tuple[float, Tensor]:
    """Return the estimate after some power steps, and the vector for the next one; a NaN in the weight leaves the vector alone."""
    estimate = weight.new_zeros(())
    for _ in range(steps):
        estimate, vector = power_step(weight, vector)
    return float(estimate), vector


def _has_norm(module: nn.Module) -> bool:
    """Whether the operator norm of ``module.weight`` is a norm of the layer."""
    if isinstance(module, _CONV):
        return module.padding_mode in {"zeros", "circular"}
    return isinstance(module, (nn.Linear, GradientBlock))


def _read(module: nn.Module) -> Tensor | None:
    """Return the weight that the layer uses, None if there are no numbers yet.

    A parametrization is run directly, past the cache of ``torch.nn.utils.parametrize.cached`` (which would keep a tensor without
    a graph), and in evaluation mode, where torch's own keep their state; buffers are put back in any case.
    """
    weight: object = None
    if any(path == "parametrizations.weight" for path, _ in module.named_modules()):
        chain = module.get_submodule("parametrizations.weight")
        with undisturbed(chain):
            chain.eval()
            for part in chain.modules():  # a method that trains with an estimate: the weight that training uses
                if isinstance(part, WeightMap) and not part.by_construction:
                    part.training = module.training
            try:
                weight = compute(chain)
            except ValueError:  # nothing can be proved about NaN
                weight = torch.full_like(chain.original, math.nan)  # pyright: ignore[reportArgumentType, reportCallIssue]
    else:
        weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, UninitializedParameter) or weight.numel() == 0:
        return None
    dense = weight.is_floating_point() and weight.layout == torch.strided and weight.device.type != "meta"
    return weight if dense else None


def _cfl_use(block: GradientBlock, norm: float) -> float:
    r"""Return :math:`\tau\,(2m + \|A\|^2)/2`."""
    return float(block.step_size()) * (2.0 * block.strong + norm * norm) / 2.0
