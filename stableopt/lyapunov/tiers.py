"""What the monitor measures at a step, tier by tier, each timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.curvature import CurvatureProbe
from stableopt.lyapunov.energy import Start
from stableopt.lyapunov.hooks import Closure
from stableopt.lyapunov.layers import LayerProbe, LayerReading
from stableopt.lyapunov.observation import Observation
from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.vitals import Names, Vitals, measure_vitals
from stableopt.optim import GuardedOptimizer, StepReport
from stableopt.optim.agree import Processes
from stableopt.optim.modules import buffers_put_back
from stableopt.optim.trial import loss_with_graph

__all__ = ["Probe", "Tiers", "trust_facts"]

Probe = Callable[[], Any] | Sequence[Callable[[], Any]]


class Tiers:
    """The instruments of a monitor.

    Args:
        model: watched, not changed.
        optimizer: of any kind.
        processes: those that train the model together.
        probe: the loss of a fixed batch with its graph, or of several micro-batches; None for the batch of the step.
        seed: of random directions.

    Attributes:
        start: parameters and momentum before the step.
        costs: tier -> seconds of its look at this step.

    Examples:
        >>> import torch
        >>> from stableopt.optim.agree import Alone
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> tiers = Tiers(model, optimizer, Alone)
        >>> facts = tiers.layers(None)
        >>> list(facts["norms"])
        ['weight']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        processes: Processes,
        probe: Probe | None = None,
        seed: int = 0,
    ) -> None:
        self.start = Start(optimizer, processes)
        self._model, self._optimizer, self._processes = model, optimizer, processes
        self._names = Names(model, optimizer)
        self._probe = probe
        self._observation: Observation | None = None
        self.costs: dict[str, float] = {}
        self._layers = LayerProbe(model, self._pass, seed=seed)
        loss: Any = self._loss if probe is None else probe
        self._curvature = CurvatureProbe(model, optimizer, loss, seed=seed)

    @contextmanager
    def timed(self, tier: str) -> Iterator[None]:
        """Add the time inside to what this look of a tier costs."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.costs[tier] = self.costs.get(tier, 0.0) + time.perf_counter() - began

    def vitals(self, before: Mapping[Tensor, Tensor] | None) -> Vitals:
        """Look at parameters, gradients and buffers after the step.

        Args:
            before: the parameters before it, if they are known; None for those kept in ``start``, which are then used up.
        """
        mine = before is None
        values = self.start.values if before is None else before
        return measure_vitals(self._names.parameters(), values, self._processes, self._names.buffers(), overwrite=mine)

    def sharpness(self, observation: Observation | None, graph: Tensor | None = None) -> dict[str, Any]:
        """Measure curvature on the probe batch, or on that of the step.

        Args:
            observation: of this step, whose closure is evaluated if there is no probe.
            graph: the loss of the step, before its ``backward``: then nothing is evaluated.
        """
        if self._probe is None and graph is None and (observation is None or observation.closure is None):
            return {
                "notes": ("curvature was not measured: that takes a probe, or a closure that can be evaluated twice",)
            }
        self._observation = observation
        try:
            reading = self._curvature.measure(graph)
        finally:
            self._observation = None
        facts = {name: getattr(reading, name) for name in _CURVATURE}
        return facts | {"sharpness_residual": reading.residual, "notes": _notes(reading.reason)}

    def layers(
        self, observation: Observation | None, *, forward: bool = False, update_ratio: float = math.nan
    ) -> dict[str, Any]:
        r"""Measure what is known per layer.

        Args:
            observation: of this step, whose closure is the forward pass if there is no probe.
            forward: also what takes a forward pass, where there is something to pass.
            update_ratio: :math:`\|d\|/\|\theta\|` of this step.
        """
        self._observation = observation
        try:
            passes = self._probe is not None or (observation is not None and observation.closure is not None)
            reading = self._layers.measure(forward=forward and passes, update_ratio=update_ratio)
        finally:
            self._observation = None
        return {name: getattr(reading, name) for name in _LAYERS} | {"notes": _notes(reading.reason)}

    def gaps(self) -> dict[str, Any]:
        """Prove how far weights that are trained with an estimate are from their limits."""
        return {"norm_gap": self._layers.gaps()}

    def state_dict(self) -> dict[str, Any]:
        """Return what the instruments carry from one look to the next."""
        return {"layers": self._layers.state_dict(), "curvature": self._curvature.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._layers.load_state_dict(state["layers"])
        self._curvature.load_state_dict(state["curvature"])

    def _pass(self) -> Any:
        """Call the model on the probe batch, or else on that of the step."""
        passed = self._closure() if self._probe is None else self._probe if callable(self._probe) else self._probe[0]
        with buffers_put_back(passed):  # who finds compiled modules there
            return passed()

    def _loss(self) -> Any:
        """Return the loss of the batch of the step, with its graph."""
        first = None if self._observation is None else self._observation.first
        return loss_with_graph(self._closure(), None if first is None else first.random)

    def _closure(self) -> Closure:
        closure = None if self._observation is None else self._observation.closure
        if closure is None:
            raise RuntimeError("there is neither a probe nor a closure to evaluate")
        return closure


def known_before(optimizer: Optimizer, report: StepReport | None) -> Mapping[Tensor, Tensor]:
    """Return the parameters before the step that a guard has just reported, if it has kept them.

    Examples:
        >>> import torch
        >>> known_before(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), None)
        {}
    """
    return optimizer.before_step() if isinstance(optimizer, GuardedOptimizer) and report is not None else {}


def trust_facts(loss: float, after: float, slope: float, lr: Sequence[float], tolerance: float) -> dict[str, float]:
    r"""Return what the loss of one batch before and after a step says with the slope along it.

    Args:
        loss: :math:`L`, before the step.
        after: :math:`L^+`, after it.
        slope: :math:`g^\top d`.
        lr: of each group.
        tolerance: the rounding of the two losses; a slope within it says nothing.

    Returns:
        ``trust`` :math:`\rho=(L^+-L)/(g^\top d)`, ``batch_sharpness`` :math:`2(1-\rho)/\eta`, ``edge_distance`` :math:`1/(1-\rho)`;
        NaN where they say nothing.

    Examples:
        >>> trust_facts(1.0, 0.75, -0.5, [0.1], 1e-9)
        {'trust': 0.5, 'batch_sharpness': 10.0, 'edge_distance': 2.0}
    """
    nan = math.nan
    tolerance = 0.0 if math.isnan(tolerance) else tolerance
    if not (math.isfinite(loss) and math.isfinite(after) and math.isfinite(slope)) or abs(slope) <= tolerance:
        return {"trust": nan, "batch_sharpness": nan, "edge_distance": nan}
    rho = (after - loss) / slope
    rates = set(lr)
    eta = rates.pop() if len(rates) == 1 else nan
    return {
        "trust": rho,
        "batch_sharpness": 2.0 * (1.0 - rho) / eta if eta > 0 else nan,
        "edge_distance": nan if slope > 0 else math.inf if rho >= 1.0 else 1.0 / (1.0 - rho),
    }


def _notes(reason: str) -> tuple[str, ...]:
    return (reason,) if reason else ()


_CURVATURE = ("sharpness", "edge", "plain_sharpness", "trace", "trace_error", "noise_scale", "hvp")
_LAYERS = tuple({item.name for item in fields(LayerReading)} & {item.name for item in fields(StepRecord)} - {"reason"})
"""What a reading of the layers says in a record."""
