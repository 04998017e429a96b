"""The figures of a report: plain matplotlib figures, drawn the same way each time, readable without color."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stableopt.lyapunov import ACTIONS, VERDICTS, StepRecord
from stableopt.report.runs import Run, as_number

__all__ = ["Picture", "accuracy_figure", "energy_figure", "layer_figures", "require", "steps_figure", "thin"]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, safe to mix up
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LARGEST = 1e100  # beyond it, the ticks of an axis overflow
_POINTS = 800  # per line: more cannot be seen, and makes the page slow
_LAYERS = 8  # per panel


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Args:
        uri: the SVG as a ``data:`` address, so that the page needs no other file.
        alt: what is to be seen, in words.
        caption: how to read it.

    Examples:
        >>> Picture("data:image/svg+xml;base64,", "a line", "falls").alt
        'a line'
    """

    uri: str
    alt: str
    caption: str


def require(name: str) -> Any:
    """Import an optional dependency of the report.

    Raises:
        ImportError: naming the install command.

    Examples:
        >>> require("matplotlib").__name__
        'matplotlib'
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"a report needs {name.partition('.')[0]}, which cannot be imported ({error}). "
            "Install it with: pip install 'stableopt[cli]'"
        ) from error


def thin(xs: Sequence[float], ys: Sequence[float], limit: int = _POINTS) -> tuple[list[float], list[float]]:
    """Keep the lowest and the highest point of each of ``limit / 2`` equal stretches, so that no spike is lost.

    Args:
        xs: rising; same length as ``ys``.
        ys: numbers; NaN is kept as a gap only where a stretch has nothing else.
        limit: the most points to return, at least 2.

    Examples:
        >>> thin(range(6), [0.0, 9.0, 1.0, 5.0, -3.0, 2.0], limit=2)
        ([1, 4], [9.0, -3.0])
    """
    count = len(xs)
    if count <= limit:
        return list(xs), list(ys)
    stretches = max(1, limit // 2)
    keep: list[int] = []
    for k in range(stretches):
        stretch = range(k * count // stretches, (k + 1) * count // stretches)
        finite = [i for i in stretch if not math.isnan(ys[i])] or [stretch[0]]
        keep += sorted({min(finite, key=lambda i: ys[i]), max(finite, key=lambda i: ys[i])})
    return [xs[i] for i in keep], [ys[i] for i in keep]


def energy_figure(runs: Sequence[Run]) -> Picture | None:
    """Draw energy and loss against the step, with the steps that did not provably decrease marked.

    Returns:
        None if no run has a record.

    Examples:
        >>> energy_figure([Run("a")]) is None
        True
    """
    runs = [run for run in runs if run.records]
    if not runs:
        return None
    with _figure(7.6, 7.2) as (figure, finish):
        energy, loss, marks = figure.subplots(3, 1, sharex=True, height_ratios=(4, 3, 2))
        for index, run in enumerate(runs):
            steps = [record.step for record in run.records]
            style = _style(index)
            _line(energy, steps, [_after(record) for record in run.records], label=_label(run.name), **style)
            _line(loss, steps, [record.loss for record in run.records], **style)
        for axes, name in ((energy, "energy after the step"), (loss, "loss before the step")):
            axes.set_ylabel(name)
            _scale(axes)
            if not any(_has_point(line) for line in axes.lines):
                axes.text(0.5, 0.5, "nothing finite was observed", transform=axes.transAxes, ha="center", va="center")
        _events(marks, runs, "verdict", VERDICTS[1:])
        marks.set_xlabel("step")
        _legend(figure, energy)
        uri = finish()
    words = "; ".join(f"{run.name}: {_verdict_words(run.records)}" for run in runs)
    return Picture(
        uri,
        f"Lines, energy and loss against step, and one row of markers for each verdict but a decrease. {words}.",
        "Energy after each step and loss before it, one line per run. Below, the steps whose energy did not decrease on their "
        "own batch: undecided (the change is within rounding), increased, unobserved, or with a number that is not finite.",
    )


def steps_figure(runs: Sequence[Run]) -> Picture | None:
    """Draw what the guard did at each step, and the factor by which it scaled the step.

    Returns:
        None if no run has a record.

    Examples:
        >>> steps_figure([Run("a")]) is None
        True
    """
    runs = [run for run in runs if run.records]
    if not runs:
        return None
    with _figure(7.6, 5.6) as (figure, finish):
        events, scale = figure.subplots(2, 1, sharex=True)
        _events(events, runs, "action", ACTIONS)
        for index, run in enumerate(runs):
            steps, scales = [record.step for record in run.records], [record.scale for record in run.records]
            _line(scale, steps, scales, label=_label(run.name), **_style(index))
        scale.set_ylabel("scale of the step")
        scale.set_xlabel("step")
        _scale(scale)
        _legend(figure, scale)
        uri = finish()
    words = "; ".join(f"{run.name}: {_action_words(run.records)}" for run in runs)
    return Picture(
        uri,
        f"Upper panel: one row per action, a marker where it was taken. Lower panel: step scale. {words}.",
        "Upper: accepted, shrunk, restarted (momentum set to zero), undone (nothing changed) and unguarded steps. "
        "Lower: the factor by which the guard scaled the step of the optimizer.",
    )


def layer_figures(runs: Sequence[Run]) -> list[Picture]:
    """Draw, for each run that measured them, the norms of the weights against their limits and the CFL use of the blocks.

    Examples:
        >>> layer_figures([Run("a")])
        []
    """
    return [picture for run in runs if (picture := _layer_figure(run)) is not None]


def accuracy_figure(runs: Sequence[Run]) -> Picture | None:
    """Draw certified accuracy against the radius of the perturbation, beside the clean accuracy.

    Returns:
        None if no run has a certified accuracy.

    Examples:
        >>> accuracy_figure([Run("a", metrics={"test_accuracy": 0.9})]) is None
        True
    """
    drawn = [(run, *certified_points(run)) for run in runs]
    drawn = [item for item in drawn if item[1]]
    if not drawn:
        return None
    with _figure(7.6, 4.2) as (figure, finish):
        axes = figure.subplots()
        for index, (run, radius, accuracy) in enumerate(drawn):
            style = _style(index)
            _line(axes, radius, accuracy, label=_label(run.name), **style)
            clean = _shown(as_number(run.metrics.get("test_accuracy")))
            axes.axhline(clean, color=style["color"], linestyle=(0, (1, 3)), linewidth=1)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("radius (Euclidean)")
        axes.set_ylabel("certified accuracy")
        _legend(figure, axes)
        uri = finish()
    words = "; ".join(
        f"{run.name}: {accuracy[0]:.3f} at radius {radius[0]:g}, {accuracy[-1]:.3f} at {radius[-1]:g}"
        for run, radius, accuracy in drawn
    )
    return Picture(
        uri,
        f"Falling lines, certified accuracy against radius. {words}.",
        "Share of the test inputs whose class provably does not change under any perturbation up to the radius. "
        "Dotted horizontal lines: accuracy without perturbation.",
    )


def certified_points(run: Run) -> tuple[list[float], list[float]]:
    """Return radii, rising, and certified accuracies: of ``curve`` if it can be used, else of ``certified_accuracy``."""
    curve, table = run.metrics.get("curve"), run.metrics.get("certified_accuracy")
    points: list[tuple[float, float]] = []
    if isinstance(curve, dict):
        radius, accuracy = curve.get("radius"), curve.get("certified_accuracy")
        if isinstance(radius, list) and isinstance(accuracy, list) and len(radius) == len(accuracy):
            points = _points(zip(radius, accuracy, strict=True))
    if not points and isinstance(table, dict):
        points = _points(table.items())
    return [x for x, _ in points], [y for _, y in points]


def _points(pairs: Iterable[tuple[object, object]]) -> list[tuple[float, float]]:
    """Return the pairs of numbers, rising, without the ones that cannot be drawn."""
    points = [(_shown(as_number(x)), _shown(as_number(y))) for x, y in pairs]
    return sorted((x, y) for x, y in points if not math.isnan(x + y))


def _layer_figure(run: Run) -> Picture | None:
    measured = [record for record in run.records if record.norms or record.cfl]
    if not measured:
        return None
    last = measured[-1]
    norms = _most_used(last.norms, last.limits)
    blocks = _most_used(last.cfl, {})
    with _figure(7.6, 3.6 if not (norms and blocks) else 4.2) as (figure, finish):
        panels = list(figure.subplots(1, bool(norms) + bool(blocks), squeeze=False)[0])
        if norms:
            axes = panels.pop(0)
            for index, name in enumerate(norms):
                style = _style(index)
                _series(axes, measured, "norms", name, style)
                limit = _shown(last.limits.get(name, math.nan))
                axes.axhline(limit, color=style["color"], linestyle=(0, (1, 3)), linewidth=1)
            axes.set_ylabel("operator norm (estimate)")
            _finish_panel(axes)
        if blocks:
            axes = panels.pop(0)
            for index, name in enumerate(blocks):
                _series(axes, measured, "cfl", name, _style(index))
            axes.axhline(1.0, color="black", linestyle=(0, (1, 3)), linewidth=1)
            axes.set_ylabel("share of the step limit (CFL)")
            _finish_panel(axes)
        uri = finish()
    left_out = len(last.norms) - len(norms) + len(last.cfl) - len(blocks)
    words = [f"{name} {last.norms[name]:.3g} (limit {last.limits.get(name, math.nan):.3g})" for name in norms]
    words += [f"block {name} uses {last.cfl[name]:.3g} of its step limit" for name in blocks]
    return Picture(
        uri,
        f"Lines against step for run {run.name}; at the end: {'; '.join(words)}.",
        f"Run {run.name}. Estimates, from below, of the operator norms; dotted lines are the limits."
        + (
            f" The {len(norms) + len(blocks)} nearest to their limits are shown, {left_out} are not."
            if left_out
            else ""
        ),
    )


def _most_used(values: Any, limits: Any) -> list[str]:
    """Return the names nearest to their limit (or the largest, without one), in the order of the names."""

    def use(name: str) -> float:
        share = values[name] / limits.get(name, 1.0) if limits.get(name, 1.0) else math.inf
        return -math.inf if math.isnan(share) else share

    return sorted(sorted(values, key=use, reverse=True)[:_LAYERS], key=natural)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort "2.weight" before "10.weight"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _series(axes: Any, records: Sequence[StepRecord], kind: str, name: str, style: dict[str, Any]) -> None:
    steps = [record.step for record in records]
    _line(axes, steps, [getattr(record, kind).get(name, math.nan) for record in records], label=_label(name), **style)


def _finish_panel(axes: Any) -> None:
    axes.set_xlabel("step")
    _scale(axes)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.22), ncols=2, frameon=False)


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Give a figure and the function that draws it, apart from the settings of the user and from pyplot."""
    import warnings

    matplotlib, figures = require("matplotlib"), require("matplotlib.figure")
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "stableopt",
                "axes.grid": True,
                "grid.alpha": 0.3,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "font.size": 10,
            }
        )
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks is drawn as boxes
        figure = figures.Figure(figsize=(width, height), layout="constrained")

        def finish() -> str:
            out = io.BytesIO()
            _settle(figure)
            figure.savefig(out, format="svg", metadata={"Date": None})
            return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode("ascii")

        yield figure, finish


def _settle(figure: Any) -> None:
    """Do the layout once and round it: its solver is off by a different last bit each time, which changes the SVG."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position([round(float(number), 5) for number in axes.get_position().bounds])


def _style(index: int) -> dict[str, Any]:
    """Return color, line and marker of the run or layer with this index: no two of 7 share a marker."""
    return {
        "color": _COLORS[index % len(_COLORS)],
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


def _label(name: str, length: int = 40) -> str:
    """Return a name that matplotlib shows as it is: no formula, no hidden label, nothing that XML forbids."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in name)
    text = text if len(text) <= length else text[: length - 1] + "…"
    return " " + text.replace("$", r"\$")  # a leading "_" would hide it


def _shown(value: float) -> float:
    return value if abs(value) <= _LARGEST else math.nan


def _line(axes: Any, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:
    xs, ys = thin(xs, [_shown(y) for y in ys])
    axes.plot(xs, ys, linewidth=1.4, markersize=4, markevery=_every(xs), **style)


def _every(xs: Sequence[float]) -> int:
    return max(1, len(xs) // 12)


def _has_point(line: Any) -> bool:
    return any(not math.isnan(y) for y in line.get_ydata())


def _after(record: StepRecord) -> float:
    """Return the energy where the step left the parameters: before it, if the step was undone."""
    return record.energy_before if record.action == "undone" else record.energy_after


def _events(axes: Any, runs: Sequence[Run], kind: str, rows: Sequence[str]) -> None:
    """Draw one row per kind of event, with a marker of the run where it happened; runs one below the other."""
    for index, run in enumerate(runs):
        style = _style(index)
        shift = 0.8 * ((index + 1) / (len(runs) + 1) - 0.5)
        for row, name in enumerate(rows):
            steps = _spread([record.step for record in run.records if getattr(record, kind) == name], 160)
            height = [row + shift] * len(steps)
            axes.plot(
                steps,
                height,
                linestyle="none",
                marker=style["marker"],
                color=style["color"],
                markersize=4,
                fillstyle="none",
            )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _spread(steps: list[int], limit: int) -> list[int]:
    """Return at most ``limit`` of the steps, evenly, with the first and the last."""
    if len(steps) <= limit:
        return steps
    return [steps[k * (len(steps) - 1) // (limit - 1)] for k in range(limit)]


def _scale(axes: Any) -> None:
    """Take a logarithmic axis where the values are positive and span more than two decades."""
    values = [y for line in axes.lines if line.get_transform() == axes.transData for y in line.get_ydata()]
    values = [y for y in values if not math.isnan(y)]
    if not values:
        return
    if min(values) > 0 and max(values) / min(values) > 100:
        axes.set_yscale("log")
    elif max(map(abs, values)) > 1e6:
        axes.set_yscale("symlog")


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _verdict_words(records: Sequence[StepRecord]) -> str:
    counts = Counter(record.verdict for record in records)
    first, last = _after(records[0]), _after(records[-1])
    return f"{len(records)} records, energy {first:.4g} to {last:.4g}, " + ", ".join(
        f"{number} {verdict}" for verdict, number in sorted(counts.items())
    )


def _action_words(records: Sequence[StepRecord]) -> str:
    counts = Counter(record.action for record in records)
    return ", ".join(f"{counts[action]} {action}" for action in ACTIONS if counts[action])
