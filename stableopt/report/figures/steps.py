"""What the guard did to the steps, and how long they were."""

from __future__ import annotations

from collections.abc import Sequence

from stableopt.lyapunov import ACTIONS
from stableopt.report.figures.compose import overlay, recorded_span, strip_picture
from stableopt.report.figures.plot import Picture, Strip
from stableopt.report.runs import Run

__all__ = ["step_figures"]

_ROWS = {name: ("action", name) for name in ACTIONS if name != "unguarded"} | {"policy": ("event", "action")}


def step_figures(runs: Sequence[Run]) -> list[Picture]:
    """Draw the actions of the guard and of the policies, the scale of the steps and the learning rate.

    Examples:
        >>> step_figures([Run("a")])
        []
    """
    return [drawn for drawn in (_actions(runs), _scale(runs), _rate(runs)) if drawn is not None]


def _actions(runs: Sequence[Run]) -> Picture | None:
    found = {
        (row, index): marks
        for row, key in _ROWS.items()
        for index, run in enumerate(runs)
        if (marks := run.history.marks.get(key))
    }
    if not found:
        return None
    strip = Strip(
        "Actions",
        "The guard accepted a step, shrunk it, restarted (momentum set to zero), or undid it (nothing changed). Last "
        "row: actions of the policies. Of many marks an even selection is drawn; the table counts all.",
        tuple(row for row in _ROWS if any(key[0] == row for key in found)),
        {key: marks.steps for key, marks in found.items()},
        recorded_span(runs),
        {index: run.name for index, run in enumerate(runs) if run.history.count},
    )
    return strip_picture(strip, {key: marks.count for key, marks in found.items()})


def _scale(runs: Sequence[Run]) -> Picture | None:
    """Draw the scale unless it never was other than 1."""
    curves = [run.history.curves["scale"] for run in runs if "scale" in run.history.curves]
    if all(curve.lowest[1] == curve.highest[1] == 1.0 for curve in curves):
        return None
    return overlay(
        runs, "scale", "Scale of the step", "The factor by which the guard scaled the step of the optimizer."
    )


def _rate(runs: Sequence[Run]) -> Picture | None:
    return overlay(runs, "lr", "Learning rate", "The largest of the parameter groups.")
