"""Cheap estimates of the operator norms of a model while it trains, taken without touching it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from stableopt.constraints.sharding import whole
from stableopt.errors import UncertifiableError
from stableopt.linalg import conv_power_step
from stableopt.lyapunov.layers.cfl import has_law, step_law
from stableopt.lyapunov.layers.readout import Readout
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.nn.gap import norm_gap
from stableopt.nn.limits import limit_of, limited_slots
from stableopt.nn.parametrized import compute
from stableopt.nn.slots import Slot, slots_of
from stableopt.nn.weights import Geometry, WeightMap

__all__ = ["LayerNorms", "NormEstimator"]

_FIRST_STEPS = 8  # from a random vector; afterwards one step follows the slowly changing weight
_TRACKS, _SEARCHES, _RENEWED = 8, 4, 10
_PARTS = ((nn.MultiheadAttention, "qkv"), (nn.LSTM | nn.LSTMCell, "ifgo"), (nn.GRU | nn.GRUCell, "rzn"))
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LayerNorms:
    r"""What the weights tell at one moment.

    Args:
        norms: weight name -> estimate of its operator norm, **from below**: the norm itself is at least this large, up to rounding.
            A weight made of several matrices has one entry for each, as ``attention.in_proj_weight[q]``.
        limits: weight name -> limit of this norm, for the weights that are constrained. A limit that holds by construction bounds
            the norm from above whatever the estimate is; for a method that trains with an estimate
            :meth:`NormEstimator.gaps` proves how far the weight is from it.
        cfl: block name -> share of its step limit in use, an estimate from below because it grows with the norm.

    Examples:
        >>> LayerNorms().norms
        {}
    """

    norms: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    cfl: dict[str, float] = field(default_factory=dict)


class NormEstimator:
    r"""Estimate the operator norm of each weight of a model by one warm power step.

    Measured are the weights that :func:`stableopt.nn.stabilize` knows: linear maps, convolutions (transposed ones, too), the
    matrices of recurrent layers and of attention, and embeddings as the linear maps of one-hot vectors. With :math:`u` from the
    reading before, :math:`v \propto W^\top u`, the estimate is :math:`\|Wv\| \le \|W\|`, and :math:`u' \propto Wv`. For the kernel
    of a convolution eight vectors do the same, each at the frequency where it reaches most
    (:func:`stableopt.linalg.conv_power_step`): the norm is that of the operator on images of any size. They can fall behind when
    a kernel jumps, or settle at a frequency that is not the best: every tenth reading searches from 32 new random vectors beside
    them and goes on with whichever reach more. The frequencies are those of a grid, which may hide another 1 or 2 %.

    A residual block with a known law also gets its CFL use, see :func:`stableopt.lyapunov.layers.cfl.step_law`.

    Args:
        model: read, never changed: the vectors live here, random numbers come from a generator of its own, and a
            parametrization that keeps a state (as torch's ``spectral_norm``) is put back as it was.
        seed: of the first vectors.

    Note:
        Estimates, not bounds; all of them from below, so an estimate above a limit shows that the limit is broken, and one below
        it proves nothing. A weight that is sharded is gathered, so all processes have to ask together.

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
        self._ages: dict[str, int] = {}

    def measure(self) -> LayerNorms:
        """Take one power step for each weight and return what is known now, waiting for each device once."""
        readout = Readout()
        limits = self.begin(readout)
        return self.finish(readout.fetch(), limits)

    def begin(self, readout: Readout) -> dict[str, float]:
        """Start the power steps, leave their results in a readout, and return the limits, for :meth:`finish`.

        Args:
            readout: gets ``("norm", name)`` for each weight and ``("cfl", name)`` for each block with a law.

        Examples:
            >>> estimator, readout = NormEstimator(nn.Linear(2, 2)), Readout()
            >>> limits = estimator.begin(readout)
            >>> list(estimator.finish(readout.fetch(), limits).norms)
            ['weight']
        """
        limits: dict[str, float] = {}
        slots = list(_slots(self._model))
        laws = {path: module for path, module in self._model.named_modules() if has_law(module)}
        with torch.no_grad(), _kept(slots, laws.values()):
            for slot in slots:
                weight = _read(slot.module, slot.name)
                if weight is None:
                    continue
                limit = limit_of(slot.module, slot.name)
                for name, part in _parts(slot, weight):
                    readout.add(("norm", name), self._norm(name, part, slot.geometry))
                    if limit is not None and limit.norm == "l2":
                        limits[name] = float(limit.radius)
            for path, module in laws.items():
                self._block(readout, path, module)
        return limits

    def finish(self, numbers: dict[Any, float], limits: dict[str, float]) -> LayerNorms:
        """Return the estimates out of the numbers that the readout fetched; see :meth:`begin`."""
        found: dict[str, dict[str, float]] = {"norm": {}, "cfl": {}}
        for (kind, *name), value in numbers.items():
            if kind in found:
                found[kind][name[0]] = value
        return LayerNorms(found["norm"], limits, found["cfl"])

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
            ['ages', 'generator', 'vectors']
        """
        vectors = {key: vector.clone() for key, vector in self._vectors.items()}
        return {"vectors": vectors, "ages": dict(self._ages), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` gave.

        Examples:
            >>> estimator = NormEstimator(nn.Linear(2, 2))
            >>> estimator.load_state_dict(estimator.state_dict())
        """
        self._vectors = {key: vector.clone() for key, vector in state["vectors"].items()}
        self._ages = dict(state["ages"])
        self._generator.set_state(state["generator"])

    def _block(self, readout: Readout, path: str, module: nn.Module) -> None:
        """Leave the norm of the operator of a block, and its CFL use, in the readout."""
        weight, law = _read(module, "weight"), step_law(module)
        if weight is None or law is None:
            return
        key = f"{path}.weight" if path else "weight"
        norm = self._norm(key, law.matrix(weight), law.geometry)
        if law.is_weight:
            readout.add(("norm", key), norm)
        readout.add(("cfl", path), law.use(norm))

    def _norm(self, key: str, weight: Tensor, geometry: Geometry) -> Tensor:
        """Make a power step with the vectors of this weight, and keep the new ones."""
        weight = weight.float() if weight.dtype in _HALF else weight
        if geometry.kind != "linear":
            return self._kernel(key, weight, geometry.options(weight.ndim - 2))
        vector, steps = self._vectors.get(key), 1
        if vector is None or vector.shape != weight.shape[:1]:
            vector = torch.randn(weight.shape[0], generator=self._generator, dtype=torch.float64)
            steps = _FIRST_STEPS
        # a model may move between devices or dtypes during a run
        estimate, self._vectors[key] = _power(weight, vector.to(weight), steps)
        return estimate

    def _kernel(self, key: str, weight: Tensor, options: dict[str, Any]) -> Tensor:
        """Make a power step for a kernel; now and then also from fresh vectors: all may stay at a frequency that fell behind."""
        vectors, shape = self._vectors.get(key), (_TRACKS, weight.shape[0], 2)
        if vectors is None or vectors.shape != shape:
            found = self._search(weight, shape, options)
            self._ages.setdefault(key, len(self._ages) % _RENEWED)  # not all kernels at the same reading
        else:
            found = conv_power_step(weight, vectors.to(weight), **options, free=True)
        self._ages[key] += 1
        if self._ages[key] % _RENEWED == 0:
            found = _better(found, self._search(weight, shape, options))
        estimate, self._vectors[key] = found
        return estimate

    def _search(self, weight: Tensor, shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the best of some searches from random vectors: the same ones would always miss the same frequency."""
        best = weight.new_zeros(()), weight.new_zeros(shape)
        for search in range(_SEARCHES):
            u = torch.randn(shape, generator=self._generator, dtype=torch.float64).to(weight)
            estimate = weight.new_zeros(())
            for _ in range(_FIRST_STEPS):
                estimate, u = conv_power_step(weight, u, **options, free=True)
            best = _better(best, (estimate, u)) if search else (estimate, u)
        return best


def _better(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the larger of two estimates with its vectors, the first if one is NaN."""
    larger = b[0] > a[0]
    return torch.where(larger, b[0], a[0]), torch.where(larger, b[1], a[1])


def _power(W: Tensor, u: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the estimate after some power steps and the next vector, with lengths that no square takes out of the dtype."""
    estimate = W.new_zeros(())
    for _ in range(steps):
        v, _ = _unit(W.mT @ u)
        image, estimate = _unit(W @ v)
        u = torch.where(estimate > 0, image, u)
    return estimate, u


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a vector over its length, and the length; zero stays zero."""
    tiny = torch.finfo(x.dtype).tiny
    size = torch.linalg.vector_norm(x, math.inf).clamp_min(tiny)
    x = x / size
    length = torch.linalg.vector_norm(x)
    return x / length.clamp_min(tiny), length * size


def _slots(model: nn.Module) -> Iterator[Slot]:
    """Iterate over the weights that have a linear map; a layer with options that no limit goes with is left out."""
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        try:
            yield from slots_of(module, path)
        except (ValueError, UncertifiableError):
            continue


def _parts(slot: Slot, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the matrices or kernels that are stacked in a weight, with their names."""
    if slot.parts == 1:
        yield slot.key, slot.matrices(weight)[0]
        return
    labels = next((letters for kind, letters in _PARTS if isinstance(slot.module, kind)), "")
    for index, part in enumerate(slot.matrices(weight)):
        yield f"{slot.key}[{labels[index] if len(labels) == slot.parts else index}]", part


def _kept(slots: list[Slot], blocks: Any) -> AbstractContextManager[None]:
    """Keep modes, buffers and random numbers of the parametrizations that will be computed; nothing to keep without them."""
    chains = [_chain(slot.module, slot.name) for slot in slots] + [_chain(block, "weight") for block in blocks]
    found = [chain for chain in chains if chain is not None]
    return undisturbed(nn.ModuleList(found)) if found else nullcontext()


def _chain(module: nn.Module, name: str) -> nn.Module | None:
    return module.get_submodule(f"parametrizations.{name}") if P.is_parametrized(module, name) else None


def _read(module: nn.Module, name: str) -> Tensor | None:
    """Return the weight that the layer uses, None if there are no numbers yet; call it within :func:`_kept`.

    A parametrization is run directly, past the cache of ``torch.nn.utils.parametrize.cached`` (which would keep a tensor without
    a graph), and in evaluation mode, where torch's own keep their state.
    """
    chain = _chain(module, name)
    if chain is not None:
        chain.eval()
        for part in chain.modules():  # a method that trains with an estimate: the weight that training uses
            if isinstance(part, WeightMap) and not part.by_construction:
                part.training = module.training
        try:
            weight: object = compute(chain)
        except ValueError:  # nothing can be proved about NaN
            weight = torch.full_like(chain.original, math.nan)  # pyright: ignore[reportArgumentType, reportCallIssue]
    else:
        weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or isinstance(weight, UninitializedParameter) or weight.numel() == 0:
        return None
    if not weight.is_floating_point() or weight.layout != torch.strided or weight.device.type == "meta":
        return None
    return whole(weight.detach())
