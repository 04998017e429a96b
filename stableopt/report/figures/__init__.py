"""The figures of a report: drawn the same way each time, in light and in dark, readable without color."""

from __future__ import annotations

from stableopt.report.figures.accuracy import accuracy_figure
from stableopt.report.figures.chart import line_chart
from stableopt.report.figures.compose import natural
from stableopt.report.figures.curvature import curvature_figures
from stableopt.report.figures.energy import energy_figures
from stableopt.report.figures.layers import exponent_figures, gradient_figures, limit_figures, update_figures
from stableopt.report.figures.plot import Picture
from stableopt.report.figures.profile import profile_figures
from stableopt.report.figures.standalone import standalone_svg
from stableopt.report.figures.steps import step_figures
from stableopt.report.figures.trust import trust_figures

__all__ = [
    "Picture",
    "accuracy_figure",
    "curvature_figures",
    "energy_figures",
    "exponent_figures",
    "gradient_figures",
    "limit_figures",
    "line_chart",
    "natural",
    "profile_figures",
    "standalone_svg",
    "step_figures",
    "trust_figures",
    "update_figures",
]
