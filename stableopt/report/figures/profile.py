"""The Learning Stability Profile: exponents, paths, windows, the energy and the responses of the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stableopt.report.figures.compose import picture
from stableopt.report.figures.heat import HeatMap, heat_picture, selection
from stableopt.report.figures.plot import Band, Guide, Line, Picture, Plot, Point
from stableopt.report.history import Curve
from stableopt.report.profile_words import forward_blocks, layer_names, power_text, sup_window
from stableopt.report.profiles import ProfileSummary
from stableopt.report.runs import Run

__all__ = ["profile_figures"]

_SHOWN = 8  # lines of a figure
_WINDOWS = 30  # columns of a heat map
_ZERO = (Guide(0.0, ""),)


def profile_figures(runs: Sequence[Run]) -> list[Picture]:
    """Draw what the profiles of runs hold: several runs over each other where they can be, else figures for each.

    Examples:
        >>> profile_figures([Run("a")])
        []
    """
    drawn = [found for found in (_running(runs), _path(runs), _parametric(runs)) if found is not None]
    for make in (_spectrum, _windows, _energy, _bound, _mixed, _forward, _updates, _hyper):
        for run in runs:
            several = len(runs) > 1
            drawn += [replace(found, title=f"{found.title}: {run.name}") if several else found for found in make(run)]
    return drawn


def _running(runs: Sequence[Run]) -> Picture | None:
    """Draw the leading exponent of the first steps up to each step, within its interval."""
    lines, bands, settled = [], [], []
    for style, run in enumerate(runs):
        value, low, high = (
            run.profile.series("running/steps", f"running/{name}") for name in ("exponent", "lower", "upper")
        )
        if not value:
            continue
        lines.append(Line(run.name, _curve(value), style))
        if len(low) == len(high) == len(value):
            bands.append(Band(_curve(low), _curve(high), style))
        late = len(value) // 4
        settled += [y for series in (value, low, high) for _, y in series[late:] if math.isfinite(y)]
    if not lines:
        return None
    caption = (
        "Mean logarithm of the growth per step, of all the steps up to here, with its confidence interval. Below 0 perturbations "
        "die out, above 0 they grow. What is wider at first is drawn at the border."
    )
    window = None
    if settled:
        room = 0.15 * (max(*settled, 0.0) - min(*settled, 0.0)) or 1.0
        window = (min(*settled, 0.0) - room, max(*settled, 0.0) + room)
    plot = Plot("Exponent as the run goes", caption, tuple(lines), tuple(bands), _ZERO, scale="linear", window=window)
    return picture(plot)


def _path(runs: Sequence[Run]) -> Picture | None:
    """Draw log K(t, 0) with its peak."""
    lines, points = [], []
    for style, run in enumerate(runs):
        curve = _curve(run.profile.series("factors/steps", "path"))
        if curve.count:
            lines.append(Line(run.name, curve, style))
            step, peak = curve.highest
            points.append(Point(step, peak, f"{power_text(peak)} times", style))
    if not lines:
        return None
    caption = (
        "Logarithm of the growth ‖Φ(t, 0)‖ of a perturbation of the first step. The ring is its peak: a run whose perturbations "
        "die out in the end may amplify them before."
    )
    plot = Plot("Growth from the first step", caption, tuple(lines), guides=_ZERO, scale="linear", points=tuple(points))
    return picture(plot)


def _parametric(runs: Sequence[Run]) -> Picture | None:
    """Draw the parametric block."""
    curves = [_curve(run.profile.series("factors/steps", "parametric/log_norms")) for run in runs]
    lines = tuple(
        Line(run.name, curve, k) for k, (run, curve) in enumerate(zip(runs, curves, strict=True)) if curve.count
    )
    if not lines:
        return None
    caption = "Logarithm of ‖D_θ₀ θ_t‖: how far the parameters move per unit of a change of the initial ones."
    return picture(Plot("Parameters by initial parameters", caption, lines, guides=_ZERO, scale="linear"))


def _spectrum(run: Run) -> list[Picture]:
    """Draw all exponents with their intervals."""
    rows = [ProfileSummary(row) for row in run.profile.rows("exponents")]
    value, low, high = (
        _curve((number, row.number(key)) for number, row in enumerate(rows, 1)) for key in ("value", "lower", "upper")
    )
    if value.count < 2:
        return []
    caption = "The exponents of the directions that were followed, largest first, with their confidence intervals."
    lines, bands = (Line(run.name, value, 0),), (Band(low, high, 0),) if low.count else ()
    return [picture(Plot("Exponents", caption, lines, bands, _ZERO, scale="linear", axis="number of the exponent"))]


def _windows(run: Run) -> list[Picture]:
    """Draw log K(t, s) of all windows."""
    steps, norms = run.profile.times("windows/steps"), run.profile.array("windows/log_norms", 2)
    if len(steps) < 2 or norms.shape != (len(steps), len(steps)):
        return []
    below = np.where(np.tri(len(steps), k=-1, dtype=bool) & np.isfinite(norms), norms, -math.inf)
    top = divmod(int(below.argmax()), len(steps))
    places = selection(len(steps), _WINDOWS, top)
    names = tuple(f"{step:g}" for step in steps[places])
    marked = (places.index(top[0]), places.index(top[1])) if math.isfinite(below[top]) else None
    caption = "Logarithm of ‖Φ(t, s)‖ for perturbations that start at step s, read at step t. "
    if found := sup_window(run.profile):
        where = f"from step {found[1]} to {found[2]}"
        caption += f"The largest, {power_text(found[0])} times, is {where}; framed: the largest of the cells. "
    caption += "A column that turns to growth far from the diagonal: the run is not stable for what starts late."
    table = _cells(norms[np.ix_(places, places)])
    return [heat_picture(HeatMap("Growth of all windows", caption, table, names, names, "start s", "step t", marked))]


def _energy(run: Run) -> list[Picture]:
    """Draw the energy of the leading direction along the training."""
    curve = _curve(run.profile.series("energy/steps", "energy/log_value"))
    if not curve.count:
        return []
    caption = (
        "Logarithm of V(t) = δᵀPδ of the direction that grows most, for the energy that is synthesized from the profile. "
        "Where it falls at each step, the run is stable by Lyapunov's criterion on these steps."
    )
    return [picture(Plot("Lyapunov energy", caption, (Line("log V", curve, 0),), scale="linear"))]


def _bound(run: Run) -> list[Picture]:
    """Draw the bound of the energy against what was measured, from the first step and from the middle."""
    tables = {}
    for name, steps, norms in (
        ("bound", "energy/steps", "energy/bound"),
        ("measured", "windows/steps", "windows/log_norms"),
    ):
        places, table = run.profile.times(steps), run.profile.array(norms, 2)
        if len(places) < 2 or table.shape != (len(places), len(places)):
            return []
        tables[name] = places, table
    common = np.intersect1d(tables["bound"][0], tables["measured"][0])
    lines = []
    for start in sorted({common[0], common[len(common) // 2]}) if len(common) else []:
        for name, (places, table) in tables.items():
            at = int(np.flatnonzero(places == start)[0])
            curve = _curve(zip(places[at:].tolist(), table[at:, at].tolist(), strict=True))
            if curve.count:
                lines.append(Line(f"{name}, from step {start:g}", curve, len(lines)))
    if not lines:
        return []
    caption = (
        "Logarithms of ‖Φ(t, s)‖ and of the bound √(M/m) ∏√ρ that the energy gives, for perturbations of the first step and of one "
        "in the middle of the run."
    )
    return [picture(Plot("Bound of the energy against measured growth", caption, tuple(lines), scale="linear"))]


def _mixed(run: Run) -> list[Picture]:
    """Draw how far each representation moves with the initial parameters."""
    steps, norms = run.profile.times("mixed/steps"), run.profile.array("mixed/log_norms", 2)
    if not norms.size or len(steps) != len(norms):
        return []
    names = layer_names(run.profile.names("layers"), norms.shape[1])
    shown = selection(len(names), _SHOWN)
    curves = [_curve(zip(steps.tolist(), norms[:, k].tolist(), strict=True)) for k in range(len(names))]
    lines = [Line(names[k], curves[k], style) for style, k in enumerate(shown)]
    caption = (
        "Logarithm of ‖D_θ₀ h_l‖ on the probe batch: how far the output of each layer moves per unit of a change of the initial "
        "parameters."
    )
    if len(names) > len(shown):
        caption += f" {len(shown)} layers are drawn; the table below has all {len(names)}."
    plot = Plot("Representations by initial parameters", caption, tuple(lines), scale="linear")
    return [picture(plot, [Line(name, curve, 0) for name, curve in zip(names, curves, strict=True)])]


def _forward(run: Run) -> list[Picture]:
    """Draw the forward block of the first and of the last step at which it was measured."""
    drawn = []
    for step, how, names, logs in forward_blocks(run.profile):
        places = selection(len(names), _WINDOWS)
        labels = tuple(names[k] for k in places)
        caption = (
            f"Logarithm of the norm of D h_l / D h_k on the probe batch, {how}: how much a change of layer k is amplified up to "
            "layer l."
        )
        title = f"Forward block at step {step}"
        table = _cells(logs[np.ix_(places, places)])
        drawn.append(heat_picture(HeatMap(title, caption, table, labels, labels, "from layer k", "to layer l")))
    return drawn


def _updates(run: Run) -> list[Picture]:
    """Draw what becomes of an error in the update of a step."""
    starts, norms = run.profile.times("update/starts"), run.profile.array("update/log_norms", 2)
    if not norms.size or len(starts) != len(norms):
        return []
    lines = [
        Line(f"at step {starts[k]:g}", _curve(enumerate(norms[k].tolist())), style)
        for style, k in enumerate(selection(len(starts), _SHOWN))
    ]
    caption = (
        "Logarithm of ‖D_e θ‖: how far the parameters are off, some steps after an error was added to one update, per unit "
        "of the error."
    )
    plot = Plot(
        "Response to an error of one update",
        caption,
        tuple(lines),
        guides=_ZERO,
        scale="linear",
        axis="steps after the error",
    )
    return [picture(plot)]


def _hyper(run: Run) -> list[Picture]:
    """Draw what a change of a hyper-parameter does to the parameters."""
    lines = []
    for row in run.profile.rows("hyper"):
        name, start = str(row.get("name")), ProfileSummary(row).number("start")
        norms = run.profile.array(f"hyper/{name}", 1)
        if norms.size and len(lines) < _SHOWN:
            first = 1.0 + (start if math.isfinite(start) else 0.0)
            lines.append(Line(name, _curve((first + k, y) for k, y in enumerate(norms.tolist())), len(lines)))
    if not lines:
        return []
    caption = "Logarithm of ‖D_η θ_t‖: how far the parameters move per unit of a change of a hyper-parameter η, made at all steps."
    return [picture(Plot("Parameters by hyper-parameters", caption, tuple(lines), scale="linear"))]


def _curve(points: Iterable[tuple[float, float]]) -> Curve:
    curve = Curve()
    for x, y in points:
        curve.add(int(x) if float(x).is_integer() else x, y)
    return curve


def _cells(table: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
