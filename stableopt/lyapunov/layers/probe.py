"""What is known per layer, in one reading: norms, limits, steps of blocks, growth along the data, kinks."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from stableopt.lyapunov.layers.branch import PULLS_BACK, Branches
from stableopt.lyapunov.layers.cfl import constant_of, fraction_of_limit, growth_of_steps, mix_of
from stableopt.lyapunov.layers.forward import END, Growth
from stableopt.lyapunov.layers.kinks import KinkCounter
from stableopt.lyapunov.layers.norms import LayerNorms, NormEstimator
from stableopt.lyapunov.layers.readout import Readout
from stableopt.lyapunov.layers.trunk import Trunk, find_trunk
from stableopt.lyapunov.layers.walk import ProbeError
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.nn.residual.averaged import AveragedResidual
from stableopt.nn.sharded import is_spread
from stableopt.optim import RandomState

__all__ = ["LayerProbe", "LayerReading"]

TYPICAL_RATIO = 1e-3
"""The relative size of an update in a healthy run, where it is not known."""


@dataclass(frozen=True)
class LayerReading:
    r"""What is known per layer at one moment: estimates, none of them proved (that is :meth:`LayerProbe.gaps`).

    Args:
        norms: weight name -> operator norm, estimated from below.
        limits: weight name -> limit of the norm that is enforced; see :class:`LayerNorms`.
        cfl: block name -> share of its step limit in use, at most 1 for a block that does not expand: from the weights where the
            law of the block is known (estimated from below), else at the data of the probe.
        growth: block name -> bound of the growth :math:`1 + \tau L` of a residual block that has no step limit (T3, class a),
            estimated from below.
        forward_exponent: :math:`\Lambda`, the mean of ``gains``: measured growth of a perturbation of the input per layer.
        weight_exponent: mean of :math:`\log(L_\sigma \|W_l\|)` per layer with the estimated norms; with the norms themselves no
            perturbation grows faster. NaN unless the model is a chain of modules whose constants are known.
        gains: layer name -> its share of the growth, :math:`g_l`.
        kinks: activation or module name -> share of units within reach of a kink.
        how: ``"forward"`` for derivatives, ``"difference"`` for a finite difference, ``""`` if nothing was measured.
        reason: why something is missing; empty if nothing is.

    Examples:
        >>> LayerReading().reason
        ''
    """

    norms: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    cfl: dict[str, float] = field(default_factory=dict)
    growth: dict[str, float] = field(default_factory=dict)
    forward_exponent: float = math.nan
    weight_exponent: float = math.nan
    gains: dict[str, float] = field(default_factory=dict)
    kinks: dict[str, float] = field(default_factory=dict)
    how: str = ""
    reason: str = ""


class LayerProbe:
    """Take readings of the layers of a model in training, without leaving a trace.

    Parameters, buffers, gradients, training modes and global random states are afterwards what they were, bit for bit, and the
    hooks are gone, also after an error; an error becomes the reason in a reading. Random layers draw the same numbers at each
    reading.

    Args:
        model: the model.
        probe_input: evaluates the loss of a fixed batch by calling the model, in its present mode; a training closure will do. None
            leaves what needs data out. The first tensor that the model gets is perturbed, or what an embedding makes of it.
        seed: of all directions.

    Note:
        In a distributed run all processes have to ask together; each perturbs its own batch.
        What the model itself does in Python stays done; so do hooks that a forward map of a residual block puts on tensors: they
        see derivatives that belong to no training. Backward hooks of modules do not.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _ = model.requires_grad_(False)[0].weight.copy_(3.0 * torch.eye(2))
        >>> reading = LayerProbe(model, lambda: model(torch.tensor([[1.0, 2.0]])).sum()).measure()
        >>> round(reading.norms["0.weight"], 3), round(reading.forward_exponent, 3) == round(math.log(3.0), 3)
        (3.0, True)
        >>> reading.kinks
        {'1': 0.0}
    """

    def __init__(self, model: nn.Module, probe_input: Callable[[], Any] | None = None, *, seed: int = 0) -> None:
        self._model, self._probe, self._seed = model, probe_input, seed
        self._estimator = NormEstimator(model, seed=seed)
        self._branches = Branches(seed=seed)
        self._growth = Growth(model, seed=seed)
        self._trunk: Trunk | None = None
        self._paths: tuple[str, ...] = ()

    def measure(self, *, forward: bool = True, update_ratio: float = math.nan) -> LayerReading:
        r"""Take a reading, waiting for each device once.

        Args:
            forward: also evaluate the probe: growth, kinks, and blocks of unknown make.
            update_ratio: :math:`\|d\|/\|\theta\|` of the last update, for the kinks; :math:`10^{-3}` if it is not known.
        """
        readout, reasons, limits, trunk = Readout(), [], {}, None
        try:
            limits = self._estimator.begin(readout)
            for path, module in self._model.named_modules():
                if isinstance(module, AveragedResidual):
                    readout.add(("mix", path), mix_of(module))
                for kind, read in (("use", fraction_of_limit), ("expansion", growth_of_steps)):
                    if (value := read(module)) is not None:
                        readout.add((kind, path), value)
        except Exception as error:  # whatever it is, the run goes on
            reasons.append(f"the weights could not be measured: {_sentence(error)}")
        if forward:
            try:
                trunk = self._evaluate(readout, update_ratio if math.isfinite(update_ratio) else TYPICAL_RATIO)
            except Exception as error:
                reasons.append(
                    _sentence(error) if isinstance(error, ProbeError) else f"the probe failed: {_sentence(error)}"
                )
        return self._reading(readout.fetch(), limits, trunk, reasons)

    def gaps(self) -> dict[str, float]:
        """Prove how far weights that are trained with an estimate are from their limits: :meth:`NormEstimator.gaps`.

        Returns:
            Weight name -> proved bound of the norm over the limit; empty for all other models.

        Examples:
            >>> LayerProbe(nn.Linear(2, 2)).gaps()
            {}
        """
        return self._estimator.gaps()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next reading depends on.

        Examples:
            >>> sorted(LayerProbe(nn.Linear(2, 2)).state_dict())
            ['branches', 'norms']
        """
        branches = {name: vector.clone() for name, vector in self._branches.vectors.items()}
        return {"norms": self._estimator.state_dict(), "branches": branches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` gave.

        Args:
            state: the state.

        Examples:
            >>> probe = LayerProbe(nn.Linear(2, 2))
            >>> probe.load_state_dict(probe.state_dict())
        """
        self._estimator.load_state_dict(state["norms"])
        self._branches.vectors = {name: vector.clone() for name, vector in state["branches"].items()}

    def _evaluate(self, readout: Readout, ratio: float) -> Trunk:
        """Evaluate the probe, and leave what it shows in the readout."""
        if self._probe is None:
            raise ProbeError("no probe was given, so only what the weights tell is known")
        start = _random_state(self._seed, torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
        with torch.no_grad(), undisturbed(self._model):
            trunk = self._find_trunk(start)
            kinks = KinkCounter(ratio)
            also = [kinks] if is_spread(self._model) else [kinks, self._branches]
            try:
                with kinks:
                    self._growth.measure(self._probe, trunk, readout, start, also)
                kinks.report(readout)
                self._branches.measure(readout, start)
            except ProbeError:
                self._trunk = None  # other layers are called than before
                raise
            finally:
                self._branches.start()
        return trunk

    def _find_trunk(self, start: RandomState) -> Trunk:
        paths = tuple(path for path, _ in self._model.named_modules())
        if self._trunk is None or self._paths != paths:
            self._paths = paths
            try:
                self._trunk = find_trunk(self._model, self._probe or (lambda: None), start)
            except ProbeError:
                raise
            except Exception:  # the operations cannot be recorded: the whole model counts as one layer
                self._trunk = Trunk(("",))
        return self._trunk

    def _reading(
        self,
        numbers: dict[Any, float],
        limits: dict[str, float],
        trunk: Trunk | None,
        reasons: list[str],
    ) -> LayerReading:
        """Put the numbers in their places."""
        layers = self._estimator.finish(numbers, limits)
        cfl, growth = dict(layers.cfl), {}
        self._mixes(numbers, layers, cfl, growth)
        for (kind, *name), value in numbers.items():
            if kind == "branch" and numbers["pull", name[0]] >= PULLS_BACK:
                cfl[name[0]] = value / 2.0
            elif kind == "branch":
                growth[name[0]] = 1.0 + value
            elif kind == "use":
                cfl[name[0]] = value
            elif kind == "expansion":
                growth[name[0]] = value
        kinks = {self._label(name[0]): value for (kind, *name), value in numbers.items() if kind == "kinks"}
        gains = {} if trunk is None else _gains(numbers, trunk)
        total = sum(gains.values()) / len(gains) if gains else math.nan
        if gains and not math.isfinite(total):
            still = any(value == 0.0 for (kind, *_), value in numbers.items() if kind == "growth")
            reasons.append("the output does not move with the input" if still else "a representation is not finite")
        return LayerReading(
            norms=layers.norms,
            limits=layers.limits,
            cfl={self._label(name): use for name, use in cfl.items()},
            growth={self._label(name): factor for name, factor in growth.items()},
            forward_exponent=total if math.isfinite(total) else math.nan,
            weight_exponent=math.nan if trunk is None else self._weight_exponent(trunk, layers.norms),
            gains={self._label(name): value for name, value in gains.items()},
            kinks=kinks,
            how=self._growth.how if gains else "",
            reason="; ".join(reasons),
        )

    def _mixes(
        self, numbers: dict[Any, float], layers: LayerNorms, cfl: dict[str, float], growth: dict[str, float]
    ) -> None:
        """Add the convex mixes: their use is the weight of a branch that does not expand, else they grow."""
        known = layers.norms | layers.limits
        for (kind, *name), mix in numbers.items():
            if kind != "mix":
                continue
            path = f"{name[0]}.branch" if name[0] else "branch"
            inner = constant_of(self._model.get_submodule(path), path, known)
            if inner <= 1.0:
                cfl[name[0]] = mix
            elif inner > 1.0:
                growth[name[0]] = 1.0 + mix * (inner - 1.0)

    def _weight_exponent(self, trunk: Trunk, norms: dict[str, float]) -> float:
        modules = dict(self._model.named_modules())
        calls = [name.partition("#")[0] for name in trunk.modules]
        constants = [constant_of(modules[path], path, norms) for path in calls]
        if not constants or not all(c > 0.0 for c in constants):
            return math.nan
        return sum(map(math.log, constants)) / trunk.depth

    def _label(self, name: str) -> str:
        return name or type(self._model).__name__


def _gains(numbers: dict[Any, float], trunk: Trunk) -> dict[str, float]:
    norms = [numbers["growth", name] for name in (*trunk.layers, END)]
    logs = [math.log(n) if n > 0.0 else -math.inf if n == 0.0 else math.nan for n in norms]
    return {name: after - before for name, before, after in zip(trunk.layers, logs, logs[1:], strict=False)}


@functools.lru_cache(maxsize=4)
def _random_state(seed: int, devices: int) -> RandomState:
    """Return the random state that a seed gives, without touching the global one."""
    cpu = torch.Generator().manual_seed(seed).get_state()
    cuda = tuple(torch.Generator(f"cuda:{i}").manual_seed(seed).get_state() for i in range(devices))
    return RandomState(cpu, cuda, np.random.RandomState(seed).get_state(), random.Random(seed).getstate())  # noqa: S311


def _sentence(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, ProbeError) else f"{type(error).__name__}: {text}"
