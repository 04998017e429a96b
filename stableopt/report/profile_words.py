"""The words of a Learning Stability Profile: its verdict, its remarks, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stableopt.report.profiles import ProfileSummary

__all__ = [
    "MEANINGS",
    "UNKNOWN",
    "as_text",
    "forward_blocks",
    "interval_text",
    "layer_names",
    "number_of",
    "percent_text",
    "power_text",
    "remarks",
    "sup_window",
    "time_text",
    "verdict_sentence",
]

UNKNOWN = "—"

MEANINGS = {
    "exponentially stable": "every perturbation, started at any step, decays at least as fast as a geometric series",
    "profile-bounded": "no perturbation, started at any step, was amplified beyond a constant",
    "subexponential": "the growth is slower than exponential, but it is not bounded",
    "exponentially unstable": "perturbations grow exponentially",
    "inconclusive": "the run does not decide it",
}
"""What each verdict says about the steps that were watched, and about no others."""

_BACKENDS = {
    "graph": "exact tangents on the graph of the training",
    "exact": "exact tangents, reverse over reverse",
    "forward": "exact tangents, forward over reverse",
    "difference": "finite differences of the gradient: an estimate, no derivative",
}


_STRETCHES = 3
"""How many stretches of a run are named."""


def verdict_sentence(profile: ProfileSummary) -> str:
    """Return the verdict with its horizon, its exponent and its constant.

    Examples:
        >>> verdict = {"kind": "profile-bounded", "horizon": 300, "constant": 4.2, "reason": "no growth."}
        >>> verdict_sentence(ProfileSummary({"verdict": verdict}))
        'profile-bounded on 300 steps: no perturbation, started at any step, was amplified beyond a constant; at most 4.2 times.'
        >>> verdict_sentence(ProfileSummary())
        'no profile.'
    """
    if not profile:
        return "no profile."
    kind = profile.text("verdict", "kind")
    if not kind:
        return "a profile without a verdict."
    sentence = kind + _horizon(profile)
    if kind in MEANINGS:
        sentence += f": {MEANINGS[kind]}"
    constant, rate = profile.number("verdict", "constant"), profile.number("verdict", "rate")
    if kind == "exponentially stable" and not math.isnan(constant + rate):
        sentence += f"; ‖Φ(t, s)‖ ≤ {constant:.4g} · {rate:.6g}^(t − s)"
    elif kind == "profile-bounded" and not math.isnan(constant):
        sentence += f"; at most {constant:.4g} times"
    leading = profile.table("verdict", "exponent") or (profile.rows("exponents") or [{}])[0]
    if not math.isnan(number_of(leading, "value")):
        sentence += f"; exponent {_interval(leading)}"
    if profile.table("verdict").get("terminal_decay") is True and kind != "exponentially stable":
        sentence += "; what was perturbed at the first step has died out at the end, which bounds nothing in between"
    return f"{sentence}."


def remarks(profile: ProfileSummary) -> list[str]:
    """Return what a reader has to know beside the numbers: reasons, refusals, and how far the numbers reach.

    Examples:
        >>> remarks(ProfileSummary({"backend": "graph"}))
        ['Measured with exact tangents on the graph of the training.']
    """
    if not profile:
        return []
    backend = profile.text("backend")
    found = [f"Measured with {_BACKENDS.get(backend, backend)}."] if backend else []
    k, n = profile.number("directions"), profile.number("dimension")
    if profile.content.get("full") is not True and not math.isnan(k + n):
        found.append(
            f"{k:.0f} of {n:.0f} directions were followed: norms, bounds and the verdict are about the subspace that these span, "
            "so norms of the whole are at least these."
        )
    if profile.content.get("windowed") is True:
        found.append(
            "Only windows of the run were followed: growth within them is biased by transients, and nothing is known about what "
            "lasts longer than a window. Paths, windows, the energy and the small gain are those of the last one."
        )
    if reason := profile.text("verdict", "reason"):
        found.append(f"The verdict: {reason}")
    if reason := profile.text("reason"):
        found.append(reason if reason.startswith("the profile ended early") else f"The profile ended early: {reason}")
    missing = [row for row in profile.rows("missing") if row.get("reason")]
    if missing:
        others = f" (and {len(missing) - 1} more looks)" if len(missing) > 1 else ""
        found.append(
            f"The look at step {as_text(missing[0].get('step'))} lacks something{others}: {as_text(missing[0]['reason'])}"
        )
    if profile.text("gains", "verdict") == "not excluded":
        found.append(
            "Small gain: the gains are estimates from below, so that a contraction is not excluded and not shown either."
        )
    refused = [(k, row["reason"]) for k, row in enumerate(profile.rows("exponents"), 1) if row.get("reason")]
    if refused:
        number, reason = refused[0]
        others = f" (and {len(refused) - 1} more for reasons of this kind)" if len(refused) > 1 else ""
        found.append(f"Exponent {number}{others}: {reason}")
    return [text if text.endswith((".", "!")) else f"{text}." for text in found if text]


def sup_window(profile: ProfileSummary) -> tuple[float, int, int] | None:
    r"""Return the largest :math:`\log K(t, s)` of all windows, with :math:`s` and :math:`t`; None if it is not named.

    Examples:
        >>> sup_window(ProfileSummary({"largest_window": {"log_norm": 2.0, "start": 5, "end": 9}}))
        (2.0, 5, 9)
    """
    sup, start, end = (profile.number("largest_window", key) for key in ("log_norm", "start", "end"))
    return (sup, int(start), int(end)) if not math.isnan(sup) and math.isfinite(start + end) else None


def forward_blocks(profile: ProfileSummary) -> list[tuple[str, str, tuple[str, ...], NDArray[np.float64]]]:
    r"""Return the forward block of the first and of the last step at which it was measured.

    Returns:
        For each the step, how it was measured, the names of the representations, and :math:`\log\|D_{h_k}h_l\|` at ``[l, k]``.

    Examples:
        >>> content = {"forward": [{"step": 9, "how": "jacobian", "table_key": "f", "names": ["input", "0"]}]}
        >>> forward_blocks(ProfileSummary(content, {"f": np.array([[0.0, np.nan], [0.5, 0.0]])}))
        [('9', 'exact', ('input', '0'), array([[0. , nan],
               [0.5, 0. ]]))]
    """
    found = []
    rows = profile.rows("forward")
    for row in [rows[0], rows[-1]] if len(rows) > 1 else rows:
        table = profile.array(str(row.get("table_key", "")), 2)
        if not table.size or table.shape[0] != table.shape[1]:
            continue
        size = len(table)
        names = layer_names(ProfileSummary(row).names("names"), size)
        how = "exact" if row.get("how") == "jacobian" else "estimates from below"
        below = np.tri(size, dtype=bool)
        found.append((as_text(row.get("step")), how, tuple(names), np.where(below, table, np.nan)))
    return found


def layer_names(names: Sequence[str], count: int) -> list[str]:
    """Return a name for each of ``count`` representations: the input, then the layers.

    Examples:
        >>> layer_names(["0", "2"], 3), layer_names(["0", "2"], 2), layer_names([], 2)
        (['input', '0', '2'], ['0', '2'], ['h0', 'h1'])
    """
    if len(names) == count:
        return list(names)
    return ["input", *names] if len(names) == count - 1 else [f"h{k}" for k in range(count)]


def _horizon(profile: ProfileSummary) -> str:
    horizon, spans = profile.number("verdict", "horizon"), profile.table("verdict").get("spans")
    whole = profile.content.get("steps")
    stretches = [
        s for s in (spans if isinstance(spans, list) else []) or [whole] if isinstance(s, list) and len(s) == 2
    ]
    words = [f"{as_text(first)} to {as_text(last)}" for first, last in stretches]
    if len(words) > _STRETCHES:
        words = [*words[: _STRETCHES - 1], f"{len(words) - _STRETCHES} more stretches", words[-1]]
    where = f", {' and '.join(words)}" if words else ""
    return "" if math.isnan(horizon) else f" on {horizon:.0f} step{'s' * (horizon != 1)}{where}"


def number_of(row: dict[str, Any], key: str) -> float:
    """Return a number of an object; NaN if it is absent or something else.

    Examples:
        >>> number_of({"value": 1}, "value"), number_of({"value": "1"}, "value")
        (1.0, nan)
    """
    return ProfileSummary(row).number(key)


def interval_text(row: dict[str, Any], digits: int = 4) -> str:
    """Return the interval of an exponent; a refused one says so.

    Examples:
        >>> interval_text({"lower": -1.0, "upper": 2}), interval_text({"reason": "too few"}), interval_text({})
        ('-1 … 2', 'refused', '—')
    """
    lower, upper = number_of(row, "lower"), number_of(row, "upper")
    if math.isnan(lower) and math.isnan(upper):
        return "refused" if row.get("reason") else UNKNOWN
    return f"{as_text(lower, digits)} … {as_text(upper, digits)}"


def percent_text(value: object) -> str:
    """Return a level in percent.

    Examples:
        >>> percent_text(0.95), percent_text(None)
        ('95 %', '—')
    """
    number = number_of({"level": value}, "level")
    return UNKNOWN if math.isnan(number) else f"{100 * number:.4g} %"


def time_text(exponent: float) -> str:
    """Return what an exponent means: after how many steps a perturbation has doubled or halved.

    Examples:
        >>> time_text(-math.log(2) / 7), time_text(math.log(2)), time_text(0.0)
        ('halves in 7 steps', 'doubles in 1 steps', 'neither grows nor shrinks')
    """
    if math.isnan(exponent):
        return UNKNOWN
    if math.isinf(exponent):
        return "vanishes within the run" if exponent < 0 else "leaves the range of numbers"
    if abs(exponent) < 1e-12:
        return "neither grows nor shrinks"
    return f"{'doubles' if exponent > 0 else 'halves'} in {math.log(2) / abs(exponent):.3g} steps"


def power_text(log: float, digits: int = 4) -> str:
    """Return e to a power, also where it is no floating-point number.

    Examples:
        >>> power_text(math.log(2.5)), power_text(-2000.0), power_text(-math.inf), power_text(math.nan)
        ('2.5', '2.58e-869', '0', '—')
    """
    if math.isnan(log):
        return UNKNOWN
    if math.isinf(log):
        return "0" if log < 0 else "∞"
    if abs(log) < 690:
        return f"{math.exp(log):.{digits}g}"
    decimal = log / math.log(10)
    return f"{10 ** (decimal - math.floor(decimal)):.3g}e{math.floor(decimal)}"


def as_text(value: object, digits: int = 6) -> str:
    """Return JSON data as text.

    Examples:
        >>> as_text(1 / 3, 3), as_text(True), as_text(None), as_text([1, 2.5]), as_text({"a": math.nan})
        ('0.333', 'yes', '—', '1, 2.5', 'a: —')
    """
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return UNKNOWN if math.isnan(value) else f"{value:.{digits}g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {as_text(value[key], digits)}" for key in value) or UNKNOWN
    if isinstance(value, list):
        return ", ".join(as_text(entry, digits) for entry in value) or UNKNOWN
    return str(value)


def _interval(row: dict[str, Any]) -> str:
    value = as_text(number_of(row, "value"), 3)
    if math.isnan(number_of(row, "lower") + number_of(row, "upper")):
        return f"{value} per step, without an interval"
    return f"{value} per step ({percent_text(row.get('level'))} interval {interval_text(row, 3)})"
