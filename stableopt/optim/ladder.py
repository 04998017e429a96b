r"""The guard: propose torch's own step, check the energy of its rule on the same batch, keep, shrink, restart or undo it.

A step from :math:`\theta` to :math:`\theta^+` with displacement d is accepted if

.. math:: V(\theta^+) \le V(\theta) - c \sum_{groups} \frac{1-\beta}{\eta'} \|d\|_P^2 + \text{rounding},

V the energy of the rule (loss, regularizer, decay, kinetic energy of the momentum). Otherwise the learning rates of all groups
shrink jointly and the step is tried again from the same point, with V taken at the learning rates of the try; then, or at once if
the try led uphill, without momentum; then it is undone. The law of the rules says that small enough learning rates pass.

A start outside its set has infinite energy, so that any feasible point would pass. The optimizer therefore projects such a start
before it evaluates anything. Where several processes train together, every number that decides is summed over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stableopt.optim.proposal import Before, Proposal, coarsest_eps, propose, uphill
from stableopt.optim.report import Action, StepReport, verdict_of
from stableopt.optim.settings import Settings
from stableopt.optim.snapshot import local
from stableopt.optim.trial import Again, RandomState

if TYPE_CHECKING:
    from stableopt.optim.base import GuardedOptimizer

__all__ = [
    "RESTARTS",
    "finite_gradients",
    "guarded_step",
    "has_gradient",
    "judged_report",
    "undone_report",
    "unguarded_step",
    "nonfinite_report",
    "passed",
]

SMALLEST_SCALE = 2.0**-60
"""What the scale of the learning rates does not fall below from step to step."""

RESTARTS = 3
"""How many further learning rates are tried after momentum has been set to zero."""

_NOTHING_TO_COMPARE = "the guard needs a closure, step(closure), or a trial, step(trial=...); nothing was checked"

Closure = Callable[[], Any]


def unguarded_step(
    optimizer: GuardedOptimizer, settings: Settings, closure: Closure | None, loss: Tensor | float | None
) -> tuple[Any, StepReport]:
    """Do one step that nothing is compared for: the guard is off, or there is nothing to compare with.

    Args:
        optimizer: its parameters move.
        settings: of the guard; unless it is off, what is not finite is skipped, and the scale of the last check is used.
        closure: as torch asks for it.
        loss: the loss, if it is known.

    Returns:
        What the closure returned, and the report.
    """
    if optimizer.needs_closure and closure is None:
        raise ValueError(
            f"the step of {optimizer.torch_class.__name__} evaluates the closure itself: call step(closure)."
        )
    value: Any = None
    if closure is not None and not optimizer.needs_closure:
        with torch.enable_grad():
            value = closure()
    if settings.guard in {"off", "monitor"}:
        returned = optimizer.advance(closure)
        reason = "guard='off'" if settings.guard == "off" else _NOTHING_TO_COMPARE
        return returned if optimizer.needs_closure else value, _unobserved(optimizer, 1.0, reason, loss)
    known = math.nan if loss is None else optimizer.loss_of(loss)
    undone = _nonfinite(optimizer, None if loss is None else known)
    if undone is not None:
        return value, undone
    scale = optimizer.param_groups[0]["step_scale"]
    with optimizer.scaled_learning_rates(scale):
        optimizer.advance(closure)
    return value, _unobserved(optimizer, scale, _NOTHING_TO_COMPARE, loss)


def guarded_step(
    optimizer: GuardedOptimizer,
    settings: Settings,
    closure: Closure | None,
    trial: Closure | None,
    loss: Tensor | float | None,
) -> tuple[Any, StepReport]:
    """Do one step under the guard.

    Args:
        optimizer: its parameters move.
        settings: what to do with a step that raises the energy.
        closure: as torch asks for it; evaluated once, and once more without gradients for each try unless ``trial`` is given.
        trial: the loss of the same batch, forward only.
        loss: the loss before the step, where gradients are there already.

    Returns:
        What the closure returned, and the report.

    Raises:
        ValueError: if the closure or the trial does not return one real number (a closure may return None).
    """
    start, value = RandomState.capture(), None
    if closure is not None:
        with torch.enable_grad():
            value = closure()
        if value is None and trial is None:
            return None, _without_loss(optimizer, settings, closure, loss)
    again = _again(closure, trial, start, value)
    checked = optimizer.count % settings.every == 0
    known = value if value is not None else loss
    if known is None:
        known = again() if checked else math.nan
    here = optimizer.loss_of(known)
    monitor = settings.guard == "monitor"
    undone = (
        None if monitor else _nonfinite(optimizer, here if value is not None or checked or loss is not None else None)
    )
    if undone is not None:
        return value, undone
    if not checked:
        scale = 1.0 if monitor else optimizer.param_groups[0]["step_scale"]
        with optimizer.scaled_learning_rates(scale):
            optimizer.advance(closure)
        return value, _unobserved(optimizer, scale, f"checked every {settings.every} steps, not in this one", here)
    if not has_gradient(optimizer) and (optimizer.contained or optimizer.needs_closure):
        if optimizer.contained:
            optimizer.advance(closure)
        return value, _unobserved(optimizer, 1.0, "no gradient in any parameter: nothing to do", here)
    if settings.debug:
        _look_for_surprises(optimizer, here, again)
    before = Before.of(optimizer, here, coarsest_eps(optimizer, known))
    try:
        return value, _Ladder(optimizer, before, again, closure).climb(settings)
    except BaseException:
        before.snapshot.restore()
        raise


def _again(closure: Closure | None, trial: Closure | None, start: RandomState, value: Any) -> Again:
    """Return what evaluates the loss of the same batch with the same random numbers at the current parameters."""
    evaluate = trial or closure
    assert evaluate is not None  # noqa: S101 - the caller has one of them
    return Again(evaluate, start, value)


def _without_loss(
    optimizer: GuardedOptimizer, settings: Settings, closure: Closure, loss: Tensor | float | None
) -> StepReport:
    monitor = settings.guard == "monitor"
    undone = None if monitor else _nonfinite(optimizer, None if loss is None else optimizer.loss_of(loss))
    if undone is not None:
        return undone
    scale = 1.0 if monitor else optimizer.param_groups[0]["step_scale"]
    with optimizer.scaled_learning_rates(scale):
        optimizer.advance(closure)
    return _unobserved(optimizer, scale, "the closure returned None instead of the loss", loss)


def _look_for_surprises(optimizer: GuardedOptimizer, here: float, again: Callable[[], float]) -> None:
    """Warn once about a closure that is not a function of the parameters alone."""
    before = [p._version for g in optimizer.param_groups for p in g["params"]]  # noqa: SLF001
    there = again()
    if before != [p._version for g in optimizer.param_groups for p in g["params"]]:  # noqa: SLF001
        optimizer.warn_once(
            "changes", "the closure changes parameters: the guard compares energies at points that it has not chosen."
        )
    eps = coarsest_eps(optimizer, here)
    if not abs(here - there) <= 64 * eps * max(1.0, abs(here)):
        optimizer.warn_once(
            "differs",
            f"the closure gave {here:.6g} and, at the same parameters with the same random numbers, "
            f"{there:.6g}: the energies that the guard "
            "compares are not of the same function; draw the batch outside of the closure.",
        )


class _Ladder:
    """The tries of one step, all from the same point on the same batch.

    A try that fails is followed by a shorter one. If it leads uphill, no shorter one does better: it is the momentum that does,
    so it is set to zero. After ``max_shrinks`` it is set to zero in any case.
    """

    def __init__(
        self, optimizer: GuardedOptimizer, before: Before, again: Callable[[], float], closure: Closure | None
    ) -> None:
        self.optimizer, self.before, self.again, self.closure = optimizer, before, again, closure
        self.tries: list[Proposal] = []

    def climb(self, settings: Settings) -> StepReport:
        """Propose, then shrink, then restart, then undo."""
        if settings.guard == "monitor":
            return self._report("accepted", self._try(1.0), "monitored: kept whatever the energy does")
        scale = first = min(1.0, settings.grow * self.optimizer.param_groups[0]["step_scale"])
        restart = False
        for tried in range(settings.max_shrinks + 1 + RESTARTS):
            proposal = self._try(scale, restart=restart)
            if proposal.accepted:
                return self._passed(proposal, restart=restart)
            if not restart and self._deaf():
                restart, scale = True, first
            elif not restart and uphill(self.optimizer, self.before):
                restart = True
            else:
                restart = restart or tried == settings.max_shrinks
                scale *= settings.shrink
        last = self.tries[-1]
        # The next step goes on from here, so that no learning rate is too large for ever.
        self.optimizer.param_groups[0]["step_scale"] = max(last.scale, SMALLEST_SCALE)
        if settings.guard == "backtrack" and last.finite:
            return self._report(
                "restarted", last, f"no try from scale {first:.3g} down lowered the energy; the smallest is kept"
            )
        self.before.snapshot.restore()
        return undone_report(
            self.optimizer,
            self.before.loss,
            f"no try from scale {first:.3g} down lowered the energy; undone",
            "increased" if last.finite else "nonfinite",
            last=last,
            trials=len(self.tries),
        )

    def _deaf(self) -> bool:
        """Whether a step of which nothing is known does not become shorter with the learning rate: shrinking is no help then."""
        if self.optimizer.known or len(self.tries) < 2:
            return False
        return self.tries[-1].displacement > 0.9 * self.tries[-2].displacement

    def _passed(self, proposal: Proposal, *, restart: bool) -> StepReport:
        self.optimizer.param_groups[0]["step_scale"] = proposal.scale
        action, reason = passed(proposal, restart=restart)
        return self._report(action, proposal, reason)

    def _try(self, scale: float, *, restart: bool = False) -> Proposal:
        if self.tries:
            self.before.snapshot.restore()
        proposal = propose(self.optimizer, self.before, scale, restart=restart, closure=self.closure).judged(self.again)
        self.tries.append(proposal)
        return proposal

    def _report(self, action: Action, proposal: Proposal, reason: str) -> StepReport:
        return judged_report(self.optimizer, self.before.loss, action, proposal, len(self.tries), reason)


def passed(proposal: Proposal, *, restart: bool) -> tuple[Action, str]:
    """Return what a step that has passed is called, and why.

    Examples:
        >>> passed(Proposal(1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 0.0), restart=False)
        ('accepted', 'the step passed at once')
    """
    how = "at once" if proposal.scale == 1.0 else f"with learning rates scaled by {proposal.scale:.3g}"
    how = f"{how} after momentum was set to zero" if restart else how
    action: Action = "restarted" if restart else "accepted" if proposal.scale == 1.0 else "shrunk"
    return action, f"the step passed {how}"


def judged_report(
    optimizer: GuardedOptimizer,
    loss: float,
    action: Action,
    proposal: Proposal,
    trials: int,
    reason: str,
    *,
    step: int | None = None,
) -> StepReport:
    """Report a step whose energies were compared."""
    finite = math.isfinite(proposal.displacement)
    return StepReport(
        step=optimizer.count if step is None else step,
        action=action,
        verdict=verdict_of(proposal.before, proposal.after, proposal.tolerance) if finite else "nonfinite",
        loss=loss,
        energy_before=proposal.before,
        energy_after=proposal.after,
        dissipation=proposal.before - proposal.after,
        predicted=proposal.predicted,
        required=proposal.required,
        tolerance=proposal.tolerance,
        displacement=proposal.displacement,
        scale=proposal.scale,
        trials=trials,
        lr=tuple(lr * proposal.scale for lr in optimizer.learning_rates()),
        reason=reason,
        loss_after=proposal.loss,
    )


def undone_report(
    optimizer: GuardedOptimizer,
    loss: float,
    reason: str,
    verdict: str,
    *,
    last: Proposal | None = None,
    trials: int = 0,
    step: int | None = None,
) -> StepReport:
    """Report a step that was not taken: nothing moved, so its energy is that of before."""
    before = last.before if last is not None else math.nan
    return StepReport(
        step=optimizer.count if step is None else step,
        action="undone",
        verdict="nonfinite" if verdict == "nonfinite" else "undecided",
        loss=loss,
        energy_before=before,
        energy_after=before,
        dissipation=0.0 if math.isfinite(before) else math.nan,
        predicted=0.0,
        required=0.0,
        tolerance=last.tolerance if last is not None else math.nan,
        displacement=0.0,
        scale=0.0,
        trials=trials,
        lr=tuple(0.0 for _ in optimizer.param_groups),
        reason=reason,
        loss_after=loss,
    )


def _unobserved(optimizer: GuardedOptimizer, scale: float, reason: str, loss: Tensor | float | None) -> StepReport:
    rates = (
        group.get("lr", math.nan) for group in optimizer.param_groups
    )  # a tensor is not read: that may wait for its device
    lr = tuple(math.nan if isinstance(rate, Tensor) else rate * scale for rate in rates)
    known = math.nan if loss is None or isinstance(loss, Tensor) else float(loss)
    return StepReport.unobserved(step=optimizer.count, lr=lr, reason=reason, loss=known, scale=scale)


def _nonfinite(optimizer: GuardedOptimizer, loss: float | None) -> StepReport | None:
    """Return the report of a step that is not taken because the loss or a gradient is not finite, on any process."""
    processes = optimizer.processes()
    good_loss, good_gradients = loss is None or math.isfinite(loss), finite_gradients(optimizer)
    if processes.size > 1:
        seen = [not good_loss, not good_gradients, math.nan if loss is None else loss]
        *bad, total = processes.total(torch.tensor(seen, dtype=torch.float64)).tolist()
        good_loss, good_gradients = (count == 0 for count in bad)
        loss = None if loss is None else total / processes.size
    if good_loss and good_gradients:
        return None
    return nonfinite_report(optimizer, math.nan if loss is None else loss, "a gradient" if good_loss else "the loss")


def nonfinite_report(optimizer: GuardedOptimizer, loss: float, what: str) -> StepReport:
    """Report a step that was not taken because of what it would have been made of."""
    return undone_report(optimizer, loss, f"{what} is not finite; parameters and state are as before", "nonfinite")


def has_gradient(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether any parameter has a gradient.

    Examples:
        >>> has_gradient(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]))
        False
    """
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def finite_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Look at all gradients with one wait for the device, on this process.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> w.grad = torch.tensor([1.0, float("nan")])
        >>> finite_gradients(torch.optim.SGD([w]))
        False
    """
    grads = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return True
    dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
    norms = torch._foreach_norm(dense)  # noqa: SLF001  # pyright: ignore[reportPrivateImportUsage]
    total = float(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).sum())
    if math.isfinite(total):  # a norm keeps every NaN and infinity
        return True
    return all(bool(g.isfinite().all()) for g in dense)  # finite numbers, too, may have an infinite norm
