"""The trust ratio of the steps and what it says about the distance to the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stableopt.report.figures.compose import alarm_steps, overlay
from stableopt.report.figures.plot import Guide, Picture, Zone
from stableopt.report.runs import Run

__all__ = ["trust_figures"]

_ZONES = (
    Zone(0.5, math.inf, "calm", 0),
    Zone(0.25, 0.5, "aggressive", 1),
    Zone(0.0, 0.25, "edge", 2),
    Zone(-math.inf, 0.0, "same-batch increase", 3),
)


def trust_figures(runs: Sequence[Run]) -> list[Picture]:
    """Draw the trust ratio in its bands, and the sharpness of the batch.

    Examples:
        >>> trust_figures([Run("a")])
        []
    """
    trust = overlay(
        runs,
        "trust_shown",
        "Trust ratio ρ",
        "Change of the loss of the batch over what its gradient predicts. 1: no curvature is felt. Above 0.5: calm; 0.25 to 0.5: "
        "aggressive; below 0.25: at the edge; 0 or less: the loss of the same batch rose. Values outside -1 … 2 are drawn at "
        "the border; the table has the true ones.",
        zones=_ZONES,
        scale="linear",
        exact="trust",
        guides=(Guide(0.0, ""), Guide(1.0, "")),
        alarms=alarm_steps(runs),
    )
    sharpness = overlay(
        runs,
        "batch_sharpness",
        "Batch sharpness",
        "2 (1 − ρ) / learning rate: for plain SGD the curvature of the batch along its gradient, which stops at 2 / learning rate.",
    )
    return [drawn for drawn in (trust, sharpness) if drawn is not None]
