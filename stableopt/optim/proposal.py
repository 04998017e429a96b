"""One proposed step and its energies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stableopt.constraints.sharding import whole
from stableopt.optim.agree import Processes
from stableopt.optim.report import energy_tolerance
from stableopt.optim.snapshot import Snapshot, local
from stableopt.optim.sums import Moved, energy_sums
from stableopt.optim.trial import Again

if TYPE_CHECKING:
    from stableopt.optim.base import GuardedOptimizer

__all__ = ["Before", "Proposal", "coarsest_eps", "propose", "uphill"]


_BEGINNING = 2.0**-6
"""The part of a step at which a penalty is looked at to see where it leads: a kink that lies farther away does not count."""


@dataclass(frozen=True)
class Before:
    """The point from which steps are proposed.

    Args:
        snapshot: parameters and state.
        loss: there, the mean over the processes.
        eps: machine epsilon of the coarsest dtype among the loss and the parameters.
        processes: those that decide together.
    """

    snapshot: Snapshot
    loss: float
    eps: float
    processes: Processes

    @classmethod
    def of(cls, optimizer: GuardedOptimizer, loss: float, eps: float) -> Before:
        """Take a snapshot of now."""
        processes = optimizer.processes()
        return cls(optimizer.snapshot(), processes.mean(loss), eps, processes)


@dataclass(frozen=True)
class Proposal:
    """A step that was taken for trial.

    Args:
        scale: factor on all learning rates.
        before: energy before it; without the loss until it is judged.
        after: energy after it; the same.
        required: the decrease that is asked for.
        predicted: the decrease that the law of the rule promises without curvature.
        displacement: its Euclidean length.
        tolerance: the rounding of both energies.
        start: where it was taken from.
        sign: -1 if the loss is maximized.
        loss: the loss after it; NaN until it is judged.

    Examples:
        >>> Proposal(1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 0.0).accepted
        True
    """

    scale: float
    before: float
    after: float
    required: float
    predicted: float
    displacement: float
    tolerance: float
    start: Before | None = None
    sign: float = 1.0
    loss: float = math.nan

    @property
    def finite(self) -> bool:
        """Whether all energies are numbers."""
        return all(map(math.isfinite, (self.before, self.after, self.displacement, self.required)))

    @property
    def accepted(self) -> bool:
        """Whether the energy has fallen as asked for, up to rounding."""
        return self.finite and self.after <= self.before - self.required + self.tolerance

    def judged(self, again: Callable[[], float]) -> Proposal:
        """Return this proposal with the losses in its energies.

        Args:
            again: evaluates the loss at the current parameters, on this process.
        """
        assert self.start is not None  # noqa: S101 - made by propose
        processes = self.start.processes
        # the displacement is the same on all processes, so all evaluate or none
        value = processes.mean(again()) if math.isfinite(self.displacement) else math.inf
        judged = self.with_loss(value, getattr(again, "eps", 0.0))
        if not judged.accepted and judged.finite and isinstance(again, Again):
            again.look_closer()
            return self.with_loss(value, processes.mean(again.eps))
        return judged

    def with_loss(self, value: float, cast: float = 0.0) -> Proposal:
        """Return this proposal with the losses in its energies.

        Args:
            value: the loss after it, the mean over the processes.
            cast: machine epsilon of what autocast computes in, 0 without autocast. The loss itself is a sum in float32 over many
                samples, whose roundings are no more than one unit of 1 together.
        """
        assert self.start is not None  # noqa: S101 - made by propose
        before, after = self.before + self.sign * self.start.loss, self.after + self.sign * value
        finite = math.isfinite(before) and math.isfinite(after)
        tolerance = energy_tolerance(before, after, max(self.start.eps, cast / 8)) if finite else 0.0
        return replace(self, before=before, after=after, tolerance=tolerance, loss=value)


def propose(
    optimizer: GuardedOptimizer,
    before: Before,
    scale: float,
    *,
    restart: bool = False,
    closure: Callable[[], Any] | None = None,
) -> Proposal:
    """Take one step for trial, and sum its energies without the loss.

    Args:
        optimizer: at the point of the snapshot.
        before: that point.
        scale: factor on all learning rates.
        restart: set the momentum to zero before; without a rule, take a plain gradient step.
        closure: for steps that evaluate it themselves.

    Returns:
        The proposal, to be judged.
    """
    rule, snapshot = optimizer.rule, before.snapshot
    with optimizer.scaled_learning_rates(scale):
        if restart:
            for p in snapshot.parameters:
                buffer = rule.buffer(optimizer.state.get(p, {}))
                if buffer is not None:
                    buffer.zero_()
        buffers = {p: _start_buffer(optimizer, snapshot, p, restart=restart) for p in snapshot.parameters}
        if restart and not optimizer.known:
            optimizer.descend()
        else:
            optimizer.advance(closure)
        armijo = optimizer.param_groups[0]["armijo"]
        low, high, _, predicted, square = _sums(optimizer, before, buffers)
    displacement = math.sqrt(square) if square >= 0 else math.nan
    return Proposal(
        scale, low, high, armijo * predicted, predicted, displacement, 0.0, start=before, sign=optimizer.sign
    )


def _start_buffer(optimizer: GuardedOptimizer, snapshot: Snapshot, p: Tensor, *, restart: bool) -> Tensor | None:
    buffer = optimizer.rule.buffer(snapshot.states.get(p, {}))
    return torch.zeros_like(buffer) if restart and buffer is not None else buffer


def _sums(optimizer: GuardedOptimizer, before: Before, buffers: dict[Tensor, Tensor | None]) -> list[float]:
    """Return the sums over all parameters on all processes, with one wait for the device."""
    snapshot, processes = before.snapshot, before.processes
    device = snapshot.parameters[0].device if snapshot.parameters else torch.device("cpu")
    moved = [
        Moved(group, snapshot.values[p], buffers[p], p.detach(), optimizer.state.get(p, {}), processes.share(p))
        for group, p in _pairs(optimizer, snapshot)
    ]
    total = energy_sums(optimizer.rule, moved, device)
    for group, p in _pairs(optimizer, snapshot):
        penalty = group["prox"]
        if penalty is not None:  # a set contributes 0: steps begin and end inside
            ends = [whole(penalty.value(x)).to(total) / processes.size for x in (snapshot.values[p], p.detach())]
            total[:2] += torch.stack(ends)
    return processes.total(total).tolist()


@torch.no_grad()
def uphill(optimizer: GuardedOptimizer, before: Before) -> bool:
    """Whether the step just proposed goes uphill: then it is not its length that is wrong.

    The loss counts to first order. Penalty and decay count, too, with what they change by at the beginning of the step: near the
    optimum the loss alone may rise along every good step.

    Args:
        optimizer: after the step, with the gradients of the point before it.
        before: that point.
    """
    snapshot, processes = before.snapshot, before.processes
    slope = (
        torch.zeros(1, dtype=torch.float64, device=next(iter(snapshot.values.values())).device)
        if snapshot.values
        else torch.zeros(1)
    )
    for group, p in _pairs(optimizer, snapshot):
        if p.grad is None:
            continue
        start, metric = snapshot.values[p], optimizer.rule.metric(optimizer.state.get(p, {}), group)
        ahead = start + _BEGINNING * (p - start)
        rise = _beside(optimizer, group, ahead, metric) - _beside(optimizer, group, start, metric)
        slope += rise.to(slope) / (_BEGINNING * processes.size)
        gradient = local(p.grad)
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        d = (local(p) - local(start)).to(gradient.dtype)
        dot = (
            torch.vdot(gradient.reshape(-1), d.reshape(-1)).real
            if d.is_complex()
            else torch.dot(gradient.reshape(-1), d.reshape(-1))
        )
        slope += processes.share(p) * optimizer.sign * dot.to(slope)
    return float(processes.total(slope)) > 0.0


def _beside(optimizer: GuardedOptimizer, group: dict[str, Any], x: Tensor, metric: Tensor | float) -> Tensor:
    """Return penalty and decay of a parameter."""
    decay = whole(optimizer.rule.decay(x, metric, group))
    penalty = group["prox"]
    return decay if penalty is None else decay + whole(penalty.value(x)).to(decay)


def _pairs(optimizer: GuardedOptimizer, snapshot: Snapshot) -> Iterator[tuple[dict[str, Any], Tensor]]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in snapshot.values:
                yield group, p


def coarsest_eps(optimizer: GuardedOptimizer, value: Any) -> float:
    """Return the machine epsilon of the coarsest dtype in sight: of the loss and of the parameters; autocast is seen elsewhere.

    Examples:
        >>> from stableopt.optim import SGD
        >>> coarsest_eps(SGD([torch.nn.Parameter(torch.ones(1))]), torch.tensor(1.0, dtype=torch.float64)) == 2.0**-23
        True
    """
    dtypes = {local(p).dtype for group in optimizer.param_groups for p in group["params"]}
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        dtypes.add(value.dtype)
    return max(torch.finfo(dtype).eps for dtype in dtypes)
