"""Sharpness against the limit of the optimizer, the trace, and the noise of the gradient."""

from __future__ import annotations

from collections.abc import Sequence

from stableopt.report.figures.compose import alarm_steps, overlay, picture, recorded_span
from stableopt.report.figures.plot import Band, Guide, Line, Picture, Plot
from stableopt.report.runs import Run

__all__ = ["curvature_figures"]


def curvature_figures(runs: Sequence[Run]) -> list[Picture]:
    """Draw what was measured with products of the Hessian, and the noise scale.

    Examples:
        >>> curvature_figures([Run("a")])
        []
    """
    edge = overlay(
        runs,
        "edge",
        "Share of the stability limit",
        "Sharpness over the largest one at which this optimizer with its settings is linearly stable. At 1 it stands at the edge.",
        guides=(Guide(1.0, "limit"),),
        alarms=alarm_steps(runs),
    )
    sharpness = overlay(
        runs,
        "sharpness",
        "Sharpness",
        "Largest curvature on the probe batch, in the metric of the optimizer; an estimate from below.",
    )
    plain = overlay(
        runs, "plain_sharpness", "Euclidean curvature", "Along the direction of the sharpness, in the Euclidean metric."
    )
    residual = overlay(
        runs,
        "sharpness_residual",
        "Residual of the sharpness",
        "How far the direction is from an eigenvector, relative to the sharpness: above 0.3, do not rely on the sharpness.",
        guides=(Guide(0.3, "unreliable above"),),
    )
    noise = overlay(
        runs,
        "noise_scale",
        "Noise scale of the gradient",
        "Variance of the gradient over its square: the number of samples beyond which a larger batch helps little.",
    )
    return [drawn for drawn in (edge, sharpness, plain, residual, _trace(runs), noise) if drawn is not None]


def _trace(runs: Sequence[Run]) -> Picture | None:
    lines, bands = [], []
    for index, run in enumerate(runs):
        curves = run.history.curves
        if "trace" not in curves:
            continue
        lines.append(Line(run.name, curves["trace"], index))
        if "trace_low" in curves:
            bands.append(Band(curves["trace_low"], curves["trace_high"], index))
    if not lines:
        return None
    return picture(
        Plot(
            "Trace of the Hessian",
            "Hutchinson's estimate on the probe batch; band: 1.96 standard errors to either side.",
            tuple(lines),
            tuple(bands),
            span=recorded_span(runs),
        )
    )
