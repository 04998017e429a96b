"""Certified accuracy against the radius."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from stableopt.report.figures.compose import picture
from stableopt.report.figures.plot import Guide, Line, Picture, Plot
from stableopt.report.history import LARGEST, Curve
from stableopt.report.runs import Run, as_number

__all__ = ["accuracy_figure", "certified_points"]


def accuracy_figure(runs: Sequence[Run]) -> Picture | None:
    """Draw certified accuracy against the radius of the perturbation, beside the clean accuracy.

    Returns:
        None if no run has a certified accuracy.

    Examples:
        >>> accuracy_figure([Run("a", metrics={"test_accuracy": 0.9})]) is None
        True
    """
    lines, guides = [], []
    for index, run in enumerate(runs):
        points = certified_points(run)
        if not points:
            continue
        curve = Curve()
        for radius, accuracy in points:
            curve.add(radius, accuracy)
        lines.append(Line(run.name, curve, index))
        clean = as_number(run.metrics.get("test_accuracy"))
        if abs(clean) <= LARGEST:
            guides.append(Guide(clean, "", index))
    if not lines:
        return None
    return picture(
        Plot(
            "Certified accuracy",
            "Share of the test inputs whose class provably does not change under any perturbation up to the radius. "
            "Dotted horizontal lines: accuracy without perturbation.",
            tuple(lines),
            guides=tuple(guides),
            scale="linear",
            axis="radius (Euclidean)",
        )
    )


def certified_points(run: Run) -> list[tuple[float, float]]:
    """Return (radius, certified accuracy), radii rising: of ``curve`` if it can be used, else of ``certified_accuracy``.

    Examples:
        >>> certified_points(Run("a", metrics={"certified_accuracy": {"0.5": 0.3, "0.1": 0.8, "x": 1}}))
        [(0.1, 0.8), (0.5, 0.3)]
    """
    curve, table = run.metrics.get("curve"), run.metrics.get("certified_accuracy")
    points: list[tuple[float, float]] = []
    if isinstance(curve, dict):
        radius, accuracy = curve.get("radius"), curve.get("certified_accuracy")
        if isinstance(radius, list) and isinstance(accuracy, list) and len(radius) == len(accuracy):
            points = _drawable(zip(radius, accuracy, strict=True))
    if not points and isinstance(table, dict):
        points = _drawable(table.items())
    return points


def _drawable(pairs: Iterable[tuple[object, object]]) -> list[tuple[float, float]]:
    """Return the pairs of numbers, rising, without the ones that cannot be drawn."""
    points = [(as_number(x), as_number(y)) for x, y in pairs]
    return sorted((x, y) for x, y in points if max(abs(x), abs(y)) <= LARGEST and not math.isnan(x + y))
