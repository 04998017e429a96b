"""Steps that are judged by the loss of the next closure: no evaluation more, for a loss that is the same function in each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from stableopt.optim.ladder import (
    RESTARTS,
    SMALLEST_SCALE,
    finite_gradients,
    judged_report,
    nonfinite_report,
    passed,
    undone_report,
)
from stableopt.optim.proposal import Before, Proposal, coarsest_eps, propose
from stableopt.optim.report import StepReport
from stableopt.optim.settings import Settings
from stableopt.optim.snapshot import stamp
from stableopt.optim.trial import graph_eps

if TYPE_CHECKING:
    from stableopt.optim.base import GuardedOptimizer

__all__ = ["Pending", "lazy_step"]


@dataclass(frozen=True)
class Pending:
    """A step that waits for its verdict.

    Args:
        proposal: the step, its energies without the losses.
        step: its number.
        first: the scale of the first try from the same point.
        tries: how many there have been.
        rates: the learning rates that it used, which a scheduler may have changed when it is judged.
        stamps: of the parameters after it; if they have changed, somebody else has moved them, and no verdict is possible.
    """

    proposal: Proposal
    step: int
    first: float
    tries: int
    rates: tuple[float, ...]
    stamps: tuple[Any, ...]


def lazy_step(optimizer: GuardedOptimizer, settings: Settings, closure: Callable[[], Any]) -> tuple[Any, StepReport]:
    """Judge the last step by the loss that the closure gives now; go back and try again, or go on from here.

    Args:
        optimizer: its parameters move.
        settings: of the guard.
        closure: as torch asks for it, the same function of the parameters in each step.

    Returns:
        What the closure returned, and the report of the step that was judged; of a first step ``unobserved``.
    """
    with torch.enable_grad():
        value = closure()
    if value is None:
        return None, _without_loss(optimizer, closure)
    processes, pending = optimizer.processes(), optimizer.pending
    moved = pending is None or pending.stamps != _stamps(optimizer)
    seen = [optimizer.loss_of(value), float(not finite_gradients(optimizer)), float(moved)]
    loss, bad, moved = (x / processes.size for x in processes.total(torch.tensor(seen, dtype=torch.float64)).tolist())
    if moved:  # on any process
        pending = None
    here = math.nan if bad else loss
    if pending is None:
        if not math.isfinite(here):
            optimizer.drop_pending()
            return value, nonfinite_report(optimizer, loss, "a gradient" if math.isfinite(loss) else "the loss")
        _propose(optimizer, settings, here, value, closure)
        return value, _waiting(optimizer, "judged by the loss of the next closure (guard='lazy')", loss)
    judged = pending.proposal.with_loss(here)
    if not judged.accepted and judged.finite:  # looking through the graph takes its time
        judged = pending.proposal.with_loss(here, processes.mean(graph_eps(value)))
    if judged.accepted:
        report = _accepted(optimizer, judged, pending)
        _propose(optimizer, settings, here, value, closure)
        return value, report
    return value, _again(optimizer, settings, judged, pending, closure)


def _without_loss(optimizer: GuardedOptimizer, closure: Callable[[], Any]) -> StepReport:
    """Do a step that no later loss can judge; what is not finite is skipped, and the scale of the last verdict is used."""
    optimizer.drop_pending()
    if optimizer.processes().mean(float(not finite_gradients(optimizer))) > 0:
        return nonfinite_report(optimizer, math.nan, "a gradient")
    with optimizer.scaled_learning_rates(optimizer.param_groups[0]["step_scale"]):
        optimizer.advance(closure)
    return _waiting(optimizer, "the closure returned None instead of the loss", math.nan)


def _accepted(optimizer: GuardedOptimizer, judged: Proposal, pending: Pending) -> StepReport:
    optimizer.param_groups[0]["step_scale"] = judged.scale
    restarted = pending.tries > optimizer.param_groups[0]["max_shrinks"] + 1
    action, reason = passed(judged, restart=restarted)
    report = judged_report(optimizer, _loss_of(judged), action, judged, pending.tries, reason, step=pending.step)
    return replace(report, lr=pending.rates)


def _again(
    optimizer: GuardedOptimizer, settings: Settings, judged: Proposal, pending: Pending, closure: Callable[[], Any]
) -> StepReport:
    """Go back to where the refused step began, with the gradients of that point, and try a smaller one."""
    before = judged.start
    assert before is not None  # noqa: S101 - made by propose
    before.snapshot.restore()
    before.snapshot.restore_gradients()
    tries, scale = pending.tries, judged.scale * settings.shrink
    if tries >= settings.max_shrinks + 1 + RESTARTS:
        optimizer.param_groups[0]["step_scale"] = max(judged.scale, SMALLEST_SCALE)
        optimizer.drop_pending()
        reason = f"no try from scale {pending.first:.3g} down lowered the energy; undone"
        verdict = "increased" if judged.finite else "nonfinite"
        return undone_report(optimizer, before.loss, reason, verdict, last=judged, trials=tries, step=pending.step)
    proposal = _tried(optimizer, before, scale, closure, restart=tries > settings.max_shrinks)
    if proposal is None:
        reason = f"the try at scale {scale:.3g} led to parameters that are not finite; undone"
        return undone_report(
            optimizer, before.loss, reason, "nonfinite", last=judged, trials=tries + 1, step=pending.step
        )
    optimizer.pending = Pending(
        proposal, pending.step, pending.first, tries + 1, _rates(optimizer, scale), _stamps(optimizer)
    )
    return undone_report(
        optimizer,
        before.loss,
        f"the try at scale {judged.scale:.3g} raised the energy to {judged.after:.6g}; undone, and tried at {scale:.3g}",
        "increased",  # a shorter step is under way: nothing is skipped yet
        last=judged,
        trials=tries,
        step=pending.step,
    )


def _propose(
    optimizer: GuardedOptimizer, settings: Settings, loss: float, value: Any, closure: Callable[[], Any]
) -> None:
    scale = min(1.0, settings.grow * optimizer.param_groups[0]["step_scale"])
    before = Before(optimizer.snapshot(), loss, coarsest_eps(optimizer, value), optimizer.processes())
    proposal = _tried(optimizer, before, scale, closure)
    optimizer.pending = (
        None
        if proposal is None
        else Pending(proposal, optimizer.count, scale, 1, _rates(optimizer, scale), _stamps(optimizer))
    )


def _tried(
    optimizer: GuardedOptimizer, before: Before, scale: float, closure: Callable[[], Any], *, restart: bool = False
) -> Proposal | None:
    """Propose a step; if that is interrupted or leads nowhere, everything is as before it, and no step waits for a verdict."""
    try:
        proposal = propose(optimizer, before, scale, restart=restart, closure=closure)
    except BaseException:
        optimizer.drop_pending()
        before.snapshot.restore()
        raise
    if math.isfinite(proposal.displacement):
        return proposal
    optimizer.drop_pending()
    before.snapshot.restore()
    return None


def _loss_of(judged: Proposal) -> float:
    return judged.start.loss if judged.start is not None else math.nan


def _waiting(optimizer: GuardedOptimizer, reason: str, loss: float) -> StepReport:
    pending = optimizer.pending
    scale = pending.first if pending is not None else optimizer.param_groups[0]["step_scale"]
    lr = _rates(optimizer, scale)
    return StepReport.unobserved(step=optimizer.count, lr=lr, reason=reason, loss=loss, scale=scale)


def _rates(optimizer: GuardedOptimizer, scale: float) -> tuple[float, ...]:
    return tuple(rate * scale for rate in optimizer.learning_rates())


def _stamps(optimizer: GuardedOptimizer) -> tuple[Any, ...]:
    return tuple(stamp(p) for group in optimizer.param_groups for p in group["params"])
