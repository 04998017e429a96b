"""What was measured layer by layer, one figure for each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stableopt.report.figures.compose import natural, overlay, picture, recorded_span
from stableopt.report.figures.plot import Band, Guide, Line, Picture, Plot, Zone
from stableopt.report.history import Curve
from stableopt.report.runs import Run

__all__ = ["exponent_figures", "gradient_figures", "limit_figures", "update_figures"]

_SHOWN = 8  # layers per figure
_LIMIT = (Guide(1.0, "limit"),)

_MEASURED: tuple[tuple[str, str, str, tuple[Guide, ...]], ...] = (
    ("norm_share", "Norm over its limit", "Estimate, from below, of the operator norm over its limit.", _LIMIT),
    ("norm_gap", "Proved norm over its limit", "For methods that train with an estimate of the norm.", _LIMIT),
    ("norms", "Operator norm", "Estimate, from below.", ()),
    ("cfl", "Share of the step limit", "How much of its step limit each residual block uses; an estimate.", _LIMIT),
    ("growth", "Growth of residual blocks", "1 + τ L of the blocks that have no step limit; an estimate.", ()),
    ("gains", "Gain of each layer", "Logarithm of the measured growth of a perturbation; below 0 it shrinks.", ()),
    ("kinks", "Units near a kink", "The fraction of the units of a layer.", ()),
)


def update_figures(runs: Sequence[Run]) -> list[Picture]:
    """Draw the relative size of the updates of each layer.

    Examples:
        >>> update_figures([Run("a")])
        []
    """
    zones = (Zone(1e-1, math.inf, "large", 2), Zone(0.0, 1e-5, "small", 1))
    plots = [
        _layers(
            run,
            "update_ratio",
            "Update over weight",
            "Size of the update of each layer relative to its weights. Around 1e-3 (dotted) is common; below 1e-5 a layer "
            "hardly learns, above 0.1 it is overwritten.",
            _outer,
            scale="log",
            guides=(Guide(1e-3, ""),),
            zones=zones,
        )
        for run in runs
    ]
    return _named(plots, runs)


def gradient_figures(runs: Sequence[Run]) -> list[Picture]:
    """Draw the norm of the gradient, of all parameters and of each layer.

    Examples:
        >>> gradient_figures([Run("a")])
        []
    """
    whole = overlay(runs, "grad_norm", "Norm of the gradient", "Over all parameters, as the optimizer was given it.")
    plots = [
        _layers(
            run, "grad_norms", "Norm of the gradient by layer", "As the optimizer was given it.", _outer, scale="log"
        )
        for run in runs
    ]
    return ([whole] if whole else []) + _named(plots, runs)


def limit_figures(runs: Sequence[Run]) -> list[Picture]:
    """Draw norms and steps of the layers against their limits, how much they let a perturbation grow, and the kinks.

    Examples:
        >>> limit_figures([Run("a")])
        []
    """
    drawn: list[Picture] = []
    for kind, title, caption, guides in _MEASURED:
        drawn += _named([_layers(run, kind, title, caption, _largest, guides=guides) for run in runs], runs)
    return drawn


def exponent_figures(runs: Sequence[Run]) -> list[Picture]:
    """Draw the exponents of the forward pass.

    Examples:
        >>> exponent_figures([Run("a")])
        []
    """
    zero = (Guide(0.0, ""),)
    forward = overlay(
        runs,
        "forward_exponent",
        "Forward exponent",
        "Mean over the layers of the logarithm of the measured growth of a perturbation: above 0 it grows with depth.",
        scale="linear",
        guides=zero,
    )
    weights = overlay(
        runs,
        "weight_exponent",
        "Exponent of the weights",
        "Mean over the layers of the logarithm of their constants, by estimated norms.",
        scale="linear",
        guides=zero,
    )
    return [picture for picture in (forward, weights) if picture is not None]


def _layers(
    run: Run,
    kind: str,
    title: str,
    caption: str,
    choose: Callable[[Mapping[str, Curve]], list[str]],
    **options: Any,
) -> Picture | None:
    """Draw the layers of a run: all of them, or the ones that stand out before a band of all."""
    curves = run.history.tables.get(kind, {})
    if not curves:
        return None
    names = sorted(curves, key=natural)
    bands: tuple[Band, ...] = ()
    shown = names
    if len(names) > _SHOWN:
        shown = sorted(choose(curves), key=natural)
        caption += f" The {len(shown)} that stand out are drawn; the table below has all {len(names)}."
        if across := run.history.across.get(kind):
            bands = (Band(across[0], across[2], None, f"all {len(names)} layers"),)
    lines = tuple(Line(name, curves[name], style, faint=len(shown) > 2) for style, name in enumerate(shown))
    table = [Line(name, curves[name], 0) for name in names]
    return picture(Plot(title, caption, lines, bands, span=recorded_span([run]), **options), table)


def _largest(curves: Mapping[str, Curve]) -> list[str]:
    """Return the names of the curves that end highest."""
    return sorted(curves, key=lambda name: (-_order(curves[name].last[1]), natural(name)))[:_SHOWN]


def _outer(curves: Mapping[str, Curve]) -> list[str]:
    """Return the names of the curves that reach highest and lowest."""
    high = sorted(curves, key=lambda name: (-_order(curves[name].highest[1]), natural(name)))[: _SHOWN // 2]
    rest = [name for name in curves if name not in high]
    low = sorted(rest, key=lambda name: (_order(curves[name].lowest[1], math.inf), natural(name)))[: _SHOWN // 2]
    return high + low


def _order(value: float, last: float = -math.inf) -> float:
    return last if math.isnan(value) else value


def _named(pictures: Sequence[Picture | None], runs: Sequence[Run]) -> list[Picture]:
    """Put the name of the run into the title where there are several."""
    found = [(drawn, run) for drawn, run in zip(pictures, runs, strict=True) if drawn is not None]
    return [replace(drawn, title=f"{drawn.title}: {run.name}") if len(runs) > 1 else drawn for drawn, run in found]
