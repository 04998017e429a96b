"""Energy and loss, with the steps that did not provably decrease and the alarms."""

from __future__ import annotations

from collections.abc import Sequence

from stableopt.lyapunov import VERDICTS
from stableopt.report.figures.compose import alarm_steps, overlay, recorded_span, strip_picture
from stableopt.report.figures.plot import Picture, Strip
from stableopt.report.runs import Run

__all__ = ["energy_figures"]

_ROWS = {name: ("verdict", name) for name in VERDICTS[1:]} | {"alarm": ("event", "alarm")}


def energy_figures(runs: Sequence[Run]) -> list[Picture]:
    """Draw energy and loss against the step, and a row of marks for each verdict but a decrease and for the alarms.

    Returns:
        An empty list if no run has a record.

    Examples:
        >>> energy_figures([Run("a")])
        []
    """
    if not any(run.history.count for run in runs):
        return []
    alarms = alarm_steps(runs)
    flagged = " Vertical lines: alarms." if alarms else ""
    energy = overlay(
        runs, "energy", "Energy after the step", f"Where the step left the parameters.{flagged}", alarms=alarms
    )
    loss = overlay(runs, "loss", "Loss before the step", f"On the batch of the step.{flagged}", alarms=alarms)
    return [drawn for drawn in (energy, loss, _verdicts(runs)) if drawn is not None]


def _verdicts(runs: Sequence[Run]) -> Picture | None:
    found = {
        (row, index): marks
        for row, key in _ROWS.items()
        for index, run in enumerate(runs)
        if (marks := run.history.marks.get(key))
    }
    if not found:
        return None
    strip = Strip(
        "Steps that did not decrease",
        "The energy on the step's own batch: undecided (the change is within rounding), increased, unobserved (nothing to "
        "compare), or not finite. Last row: alarms. Of many marks an even selection is drawn; the table counts all.",
        tuple(row for row in _ROWS if any(key[0] == row for key in found)),
        {key: marks.steps for key, marks in found.items()},
        recorded_span(runs),
        {index: run.name for index, run in enumerate(runs) if run.history.count},
    )
    return strip_picture(strip, {key: marks.count for key, marks in found.items()})
