"""The Learning Stability Profile in sentences and tables, for a page and for a terminal."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from stableopt.report.profile_words import (
    UNKNOWN,
    as_text,
    forward_blocks,
    interval_text,
    number_of,
    percent_text,
    power_text,
    sup_window,
    time_text,
)
from stableopt.report.profiles import ProfileSummary

__all__ = ["Table", "profile_tables"]

_WIDE = 12  # layers of a table with a column for each


class Table(NamedTuple):
    """A table of text: a caption, the names of the columns, and the rows.

    Examples:
        >>> Table("Lengths.", ("what", "m"), (("a", "1"),)).columns
        ('what', 'm')
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def profile_tables(profile: ProfileSummary) -> list[Table]:
    """Return all that a profile says as tables; what it does not have is left out.

    Examples:
        >>> tables = profile_tables(
        ...     ProfileSummary({"exponents": [{"value": -0.1, "lower": -0.2, "upper": 0.0, "level": 0.95}]})
        ... )
        >>> tables[0].rows[0][:4]
        ('1', '-0.1', '-0.2 … 0', '95 %')
    """
    made = [
        _exponents(profile),
        _transients(profile),
        _energy(profile),
        _gains(profile),
        _finite_size(profile),
        _determinant(profile),
        *_forward(profile),
        _about(profile),
    ]
    return [table for table in made if table.rows]


def _exponents(profile: ProfileSummary) -> Table:
    rows = tuple(
        (
            str(number),
            as_text(row.get("value"), 4),
            interval_text(row),
            percent_text(row.get("level")),
            as_text(row.get("effective"), 4),
            as_text(row.get("count")),
            as_text(row.get("burn_in")),
            as_text(row.get("kind")),
            time_text(number_of(row, "value")) if _decided(row) else UNKNOWN,
        )
        for number, row in enumerate(profile.rows("exponents"), 1)
    )
    columns = ("number", "per step", "interval", "level", "effective samples", "samples", "left out", "kind", "reads")
    return Table("Exponents: mean logarithm of the growth per step, with confidence intervals.", columns, rows)


def _transients(profile: ProfileSummary) -> Table:
    rows = []
    path = [(y, x) for x, y in profile.series("factors/steps", "path") if not math.isnan(y)]
    if path:
        peak, step = max(path)
        rows.append(("largest growth from the first step", power_text(peak), f"at step {step:g}"))
        rows.append(("growth from the first to the last step", power_text(path[-1][0]), f"at step {path[-1][1]:g}"))
    if window := sup_window(profile):
        rows.append(("largest growth of all windows", power_text(window[0]), f"from step {window[1]} to {window[2]}"))
        if (most := profile.number("largest_window", "at_most")) > window[0] + 1e-9:
            rows.append(("no window grows by more than", power_text(most), "not all were looked at"))
    if not math.isnan(peak := profile.number("errors", "peak")):
        count = as_text(profile.table("errors").get("count"))
        rows.append(("largest response to an error of one update", power_text(peak), f"of {count} errors"))
    rows += [
        (f"parameters per unit of {as_text(row.get('name'))}", power_text(last), "at the last step")
        for row in profile.rows("hyper")
        if not math.isnan(last := number_of(row, "last"))
    ]
    return Table(
        "Transient growth ‖Φ(t, s)‖: how much a perturbation was amplified, and where.",
        ("what", "times", "where"),
        tuple(rows),
    )


def _energy(profile: ProfileSummary) -> Table:
    words = {
        "weight": "weight w of the future",
        "smallest": "smallest eigenvalue m of all P",
        "largest": "largest eigenvalue M of all P",
        "constant": "constant √(M/m), between the times of the grid",
        "constant_between": "constant C of C ρ^(t − s), for all windows",
        "largest_rate": "rate ρ of C ρ^(t − s): the largest of √V per step",
        "rate": "mean rate of √V per step, of the whole run alone",
        "reference": "growth that the weights discount",
        "smallest_ratio": "bound over measured growth, smallest",
        "median_ratio": "bound over measured growth, median",
        "worst_ratio": "bound over measured growth, largest",
        "holds": "the bound holds on every window of the grid, and on the largest of all",
    }
    return _pairs(
        "Lyapunov energy V = δᵀPδ synthesized from the profile, and the bound √(M/m) ∏√ρ that it gives.",
        profile.table("energy"),
        words,
    )


def _gains(profile: ProfileSummary) -> Table:
    words = {
        "a": "representations to representations, a",
        "b": "parameters to representations, b",
        "c": "representations to parameters, c",
        "d": "parameters to parameters, d",
        "radius": "spectral radius of the 2 × 2 matrix",
        "weights": "weights of the joint norm",
        "rate": "rate of growth that the matrix bounds",
        "joint_rate": "the same with the best weights",
        "verdict": "small-gain condition",
        "exact": "the gains are exact (else estimates from below)",
    }
    return _pairs("Small gain of the coupled system of representations and parameters.", profile.table("gains"), words)


def _finite_size(profile: ProfileSummary) -> Table:
    found = profile.table("finite_size")
    if not found:
        return Table("", (), ())
    exponent = profile.table("finite_size", "exponent")
    size, value = as_text(found.get("size"), 3), as_text(exponent.get("value"), 4)
    rows = [("perturbation of finite size", size, value, interval_text(exponent))]
    if beside := (profile.rows("exponents") or [{}])[0]:
        rows.append(("infinitesimal perturbation", "0", as_text(beside.get("value"), 4), interval_text(beside)))
    caption = "The exponent of a perturbation of finite size, relative to the parameters, beside the infinitesimal one."
    if _says(kinks := found.get("kinks")):
        caption += f" The former feels kinks of {as_text(kinks)}."
    if stopped := found.get("stopped"):
        caption += f" It ended early: {as_text(stopped)}."
    return Table(caption, ("what", "size", "per step", "interval"), tuple(rows))


def _determinant(profile: ProfileSummary) -> Table:
    measured = profile.number("determinant", "measured")
    which = "all exponents" if profile.content.get("full") is True else "the exponents that were followed"
    rows = () if math.isnan(measured) else ((f"sum of {which}, measured", as_text(measured, 12)),)
    return Table(
        "Growth of volumes: the logarithm of the determinant of the update map, per step.", ("what", "value"), rows
    )


def _forward(profile: ProfileSummary) -> list[Table]:
    """Return the forward block of the first and the last step: whole if it is small, else layer by layer."""
    made = []
    for step, how, names, logs in forward_blocks(profile):
        caption = (
            f"Forward block at step {step}: norm of the derivative of a layer with respect to an earlier one, {how}"
        )
        cells = [[power_text(value, 3) for value in row] for row in logs.tolist()]
        if len(names) <= _WIDE:
            rows = tuple((name, *row) for name, row in zip(names, cells, strict=True))
            made.append(Table(f"{caption}; of the row to the column.", ("of", *names), rows))
        else:
            columns = ("layer", "to the input", "to the layer before", "of the output to it")
            short = tuple((names[k], cells[k][0], cells[k][max(k - 1, 0)], cells[-1][k]) for k in range(len(names)))
            made.append(Table(f"{caption}.", columns, short))
    return made


def _about(profile: ProfileSummary) -> Table:
    content = profile.content
    rows = [
        (words, as_text(content[key]))
        for key, words in (
            ("backend", "tangents"),
            ("directions", "directions"),
            ("dimension", "dimension of the state"),
            ("full", "all directions"),
            ("steps", "steps"),
            ("followed", "steps that were followed"),
            ("seed", "seed of the directions"),
            ("optimizer", "optimizer"),
        )
        if content.get(key) is not None
    ]
    if metric := profile.table("metric"):
        rows.append(
            ("metric of the state", ", ".join(f"{as_text(weight)} · {name}" for name, weight in metric.items()))
        )
    if not math.isnan(products := profile.number("cost", "products")):
        each = profile.number("cost", "products_per_step")
        per_step = "" if math.isnan(each) else f", {each:.3g} per step"
        rows.append(("products with the derivative of the gradient", f"{products:.0f}{per_step}"))
    return Table("How it was measured.", ("what", "value"), tuple(rows))


def _pairs(caption: str, found: dict[str, Any], words: dict[str, str] | None = None) -> Table:
    """Return a table of names and values; known names are put into words, unknown ones stand as they are."""
    words = words or {}
    keys = [key for key in words if _says(found.get(key))] + [key for key in found if key not in words]
    return Table(
        caption, ("what", "value"), tuple((words.get(key, key.replace("_", " ")), as_text(found[key])) for key in keys)
    )


def _decided(row: dict[str, Any]) -> bool:
    """Whether an exponent has an interval."""
    return not (math.isnan(number_of(row, "lower")) and math.isnan(number_of(row, "upper")))


def _says(value: object) -> bool:
    """Whether JSON data say anything: not so null, an empty list, nor one of nothing else."""
    return any(entry is not None for entry in value) if isinstance(value, list) else value is not None
