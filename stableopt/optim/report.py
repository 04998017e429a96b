"""What one guarded step did and why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Action", "StepReport", "Verdict", "energy_tolerance", "verdict_of"]

Action: TypeAlias = Literal["accepted", "shrunk", "restarted", "undone", "unguarded"]
Verdict: TypeAlias = Literal["decreased", "undecided", "increased", "unobserved", "nonfinite"]


@dataclass(frozen=True)
class StepReport:
    r"""The report of one step, ``optimizer.last_step``.

    Args:
        step: number of the step, from 0, over the life of the optimizer.
        action: ``accepted`` (torch's step as it is), ``shrunk`` (with smaller learning rates), ``restarted`` (with momentum set to
            zero), ``undone`` (parameters and state as before), ``unguarded`` (not checked before it was kept).
        verdict: ``decreased``, ``undecided`` (within rounding), ``increased``, ``unobserved`` (not measured), ``nonfinite``.
        loss: value of the closure before the step; NaN if not measured.
        energy_before: energy before the step on this batch, in the step's own metric and learning rate.
        energy_after: energy after it on the same batch.
        dissipation: ``energy_before - energy_after``.
        predicted: :math:`\sum (1-\beta)/\eta' \|d\|_P^2`, what the law of the rule promises without curvature.
        required: ``armijo * predicted``, what the guard asks for.
        tolerance: the rounding of the two energies that the verdict allows for.
        displacement: Euclidean norm of :math:`d = \theta^+ - \theta` over all parameters.
        scale: factor on all learning rates in this step.
        trials: how many times the step was tried.
        lr: learning rate of each group as used, ``scale`` included.
        reason: one sentence.
        loss_after: loss after the step on the same batch; NaN if not measured.

    Examples:
        >>> report = StepReport.unobserved(step=0, lr=(0.1,), reason="no closure was given")
        >>> report.verdict, report.action
        ('unobserved', 'unguarded')
    """

    step: int
    action: Action
    verdict: Verdict
    loss: float
    energy_before: float
    energy_after: float
    dissipation: float
    predicted: float
    required: float
    tolerance: float
    displacement: float
    scale: float
    trials: int
    lr: tuple[float, ...]
    reason: str
    loss_after: float = math.nan

    @classmethod
    def unobserved(
        cls, *, step: int, lr: tuple[float, ...], reason: str, loss: float = math.nan, scale: float = 1.0
    ) -> StepReport:
        """Return the report of a step that was taken without measuring anything.

        Examples:
            >>> StepReport.unobserved(step=3, lr=(0.1,), reason="guard is off").trials
            1
        """
        nan = math.nan
        return cls(step, "unguarded", "unobserved", loss, nan, nan, nan, nan, nan, nan, nan, scale, 1, lr, reason)


def energy_tolerance(before: float, after: float, eps: float) -> float:
    """Return the rounding that a difference of two energies on the same batch may hide.

    A loss is a mean of terms that are differences of logits of size one and more, so it is uncertain by a few units in the
    last place of 1 however small it is, and of itself when it is large: ``8 eps max(1, |before|, |after|)``.

    Args:
        before: energy before the step.
        after: energy after it.
        eps: machine epsilon of the coarsest dtype in the computation of the loss.

    Examples:
        >>> energy_tolerance(0.5, 0.25, 2.0**-52) == 2.0**-49
        True
    """
    return 8.0 * eps * max(1.0, abs(before), abs(after))


def verdict_of(before: float, after: float, tolerance: float) -> Verdict:
    """Say what the difference of two energies shows.

    Examples:
        >>> (
        ...     verdict_of(1.0, 0.5, 1e-9),
        ...     verdict_of(1.0, 1.0 + 1e-12, 1e-9),
        ...     verdict_of(1.0, 2.0, 1e-9),
        ...     verdict_of(1.0, math.inf, 1e-9),
        ... )
        ('decreased', 'undecided', 'increased', 'nonfinite')
    """
    if not (math.isfinite(before) and math.isfinite(after)):
        return "nonfinite"
    if abs(after - before) <= tolerance:
        return "undecided"
    return "decreased" if after < before else "increased"
