"""The tables and sentences of a report: what the figures show, as text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from stableopt.lyapunov import ACTIONS, VERDICTS, Event
from stableopt.report.figures import natural
from stableopt.report.history import BANDS, History
from stableopt.report.runs import Run, as_number, round_up_text

__all__ = ["Row", "absent", "cost", "counts", "events", "headline", "missing", "settings", "summary", "trust_shares"]

_UNKNOWN = "—"
Row = tuple[str, list[str]]

_MEASURED = (
    ("trust ratio", "curves", "trust"),
    ("sharpness", "curves", "sharpness"),
    ("trace", "curves", "trace"),
    ("noise scale", "curves", "noise_scale"),
    ("update ratios", "tables", "update_ratio"),
    ("gradient norms by layer", "tables", "grad_norms"),
    ("layer norms", "tables", "norms"),
    ("step limits of residual blocks", "tables", "cfl"),
    ("forward exponent", "curves", "forward_exponent"),
    ("kinks", "tables", "kinks"),
)


def headline(run: Run) -> str:
    """Return how a run went, in one sentence.

    Examples:
        >>> from stableopt.lyapunov import StepRecord
        >>> headline(Run("a", history=History.of([StepRecord(step=4, energy_after=2.0)])))
        '1 record of steps 4 to 4, energy after the step 2 at first and 2 at last; no alarm.'
    """
    history = run.history
    if history.first is None or history.last is None:
        return "no step was recorded."
    energy = history.curves.get("energy")
    course = (
        f", energy after the step {energy.first[1]:.4g} at first and {energy.last[1]:.4g} at last"
        if energy and energy.count
        else ""
    )
    alarms = {key: n for key, n in history.events.counts.items() if key[0] == "alarm"}
    alarm = "no alarm"
    if alarms:
        first = next(event for event in history.events.kept if event.kind == "alarm")
        number = sum(alarms.values())
        alarm = f"{number} alarm{'s' * (number > 1)}, the first at step {first.step} ({first.channel}: {first.what})"
    records = f"{history.count} record{'s' * (history.count > 1)}"
    return f"{records} of steps {history.first.step} to {history.last.step}{course}; {alarm}."


def absent(runs: Sequence[Run]) -> list[str]:
    """Return which files are not there, a sentence for each.

    Examples:
        >>> absent([Run("a", absent=("run.json",)), Run("b", absent=("run.json", "metrics.json"))])
        ['metrics.json is not there (b)', 'run.json is not there']
    """
    sentences = []
    for file in sorted({file for run in runs for file in run.absent}):
        names = [run.name for run in runs if file in run.absent]
        sentences.append(f"{file} is not there" + (f" ({', '.join(names)})" if len(names) < len(runs) else ""))
    return sentences


def missing(runs: Sequence[Run]) -> list[str]:
    """Return what no run measured, although there are records.

    Examples:
        >>> missing([Run("a")])
        []
    """
    if not any(run.history.count for run in runs):
        return []
    return [words for words, kind, key in _MEASURED if not any(key in getattr(run.history, kind) for run in runs)]


def summary(runs: Sequence[Run]) -> list[Row]:
    """Return the rows of final numbers; a row that no run fills is left out.

    Examples:
        >>> summary([Run("a", metrics={"test_accuracy": 0.5})])
        [('test accuracy', ['0.5'])]
    """
    rows: list[Row] = [
        ("test accuracy", [_text(run.metrics.get("test_accuracy")) for run in runs]),
        ("train accuracy", [_text(run.metrics.get("train_accuracy")) for run in runs]),
    ]
    for radius in _radii(runs):
        cells = [_text(_table(run.metrics, "certified_accuracy").get(radius)) for run in runs]
        rows.append((f"certified accuracy at {radius}", cells))
    rows += [
        ("proved Lipschitz bound", [_proved(run) for run in runs]),
        ("Lipschitz bound in metrics.json", [_bound(run.metrics.get("lipschitz")) for run in runs]),
        ("steps", [_text(run.metrics.get("steps")) for run in runs]),
        ("seconds", [_text(run.metrics.get("seconds")) for run in runs]),
        ("actions", [_pairs(_table(run.metrics, "actions")) for run in runs]),
        ("verdicts", [_pairs(_table(run.metrics, "verdicts")) for run in runs]),
        ("last recorded step", [_text(run.history.last.step if run.history.last else None) for run in runs]),
        ("last recorded loss", [_text(run.history.last.loss if run.history.last else None) for run in runs]),
        ("last share of the stability limit", [_last(run.history, "edge") for run in runs]),
        ("alarms", [_alarms(run.history) for run in runs]),
    ]
    return [row for row in rows if any(cell != _UNKNOWN for cell in row[1])]


def counts(runs: Sequence[Run], kind: str) -> list[Row]:
    """Return how often each verdict or each action stands in the records, without the ones that never do.

    Args:
        runs: the columns.
        kind: "verdict" or "action".

    Examples:
        >>> from stableopt.lyapunov import StepRecord
        >>> counts([Run("a", history=History.of([StepRecord(step=1)]))], "verdict")
        [('unobserved', ['1'])]
    """
    known = {"verdict": VERDICTS, "action": ACTIONS}[kind]
    return _filled(
        [
            (name, [run.history.marks[kind, name].count if (kind, name) in run.history.marks else 0 for run in runs])
            for name in known
        ]
    )


def trust_shares(runs: Sequence[Run]) -> list[Row]:
    """Return in which share of the checked steps the trust ratio was in which band.

    Examples:
        >>> from stableopt.lyapunov import StepRecord
        >>> trust_shares([Run("a", history=History.of([StepRecord(step=1, trust=0.9)]))])
        [('calm', ['1 (100 %)'])]
    """
    totals = [sum(run.history.bands.values()) for run in runs]
    return [
        (
            band,
            [
                f"{run.history.bands[band]} ({100 * run.history.bands[band] / total:.3g} %)" if total else _UNKNOWN
                for run, total in zip(runs, totals, strict=True)
            ],
        )
        for band in BANDS
        if any(run.history.bands[band] for run in runs)
    ]


def events(runs: Sequence[Run]) -> list[tuple[str, str, Event]]:
    """Return (run, step, event) of all the events that are kept, run by run.

    Examples:
        >>> events([Run("a")])
        []
    """
    return [(run.name, str(event.step), event) for run in runs for event in run.history.events.kept]


def cost(runs: Sequence[Run]) -> list[str]:
    """Return what watching cost, a sentence for each run that measured it.

    Examples:
        >>> from stableopt.lyapunov import StepRecord
        >>> cost([Run("a", history=History.of([StepRecord(step=1, overhead=0.031, hvp="exact")]))])
        ['a: the monitor took 3.1 % of the time of the training; products with the Hessian: 1 exact.']
    """
    sentences = []
    for run in runs:
        curve = run.history.curves.get("overhead")
        if curve is not None and curve.count:
            products = ", ".join(f"{n} {name}" for name, n in sorted(run.history.products.items()))
            more = f"; products with the Hessian: {products}" if products else ""
            sentences.append(
                f"{run.name}: the monitor took {100 * curve.last[1]:.2g} % of the time of the training{more}."
            )
    return sentences


def settings(runs: Sequence[Run]) -> list[Row]:
    """Return the settings of the runs, side by side.

    Examples:
        >>> settings([Run("a", settings={"lr": 0.1}), Run("b")])
        [('lr', ['0.1', '—'])]
    """
    keys = sorted({key for run in runs for key in run.settings})
    return [(key, [_text(run.settings.get(key)) for run in runs]) for key in keys]


def _filled(rows: Sequence[tuple[str, list[int]]]) -> list[Row]:
    return [(name, [str(number) for number in numbers]) for name, numbers in rows if any(numbers)]


def _last(history: History, field: str) -> str:
    curve = history.curves.get(field)
    return f"{curve.last[1]:.3g}" if curve is not None and curve.count else _UNKNOWN


def _alarms(history: History) -> str:
    if not history.count:
        return _UNKNOWN
    found = Counter[str]()
    for (kind, channel, _), number in history.events.counts.items():
        if kind == "alarm":
            found[channel or "other"] += number
    return ", ".join(f"{number} {channel}" for channel, number in sorted(found.items())) or "none"


def _radii(runs: Sequence[Run]) -> list[str]:
    """Return the radii of all the tables of certified accuracies, small ones first."""
    radii = {radius for run in runs for radius in _table(run.metrics, "certified_accuracy")}
    return sorted(radii, key=lambda radius: (math.isnan(as_number(radius)), as_number(radius), radius))


def _table(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _proved(run: Run) -> str:
    if run.certificate is None or math.isnan(run.certificate.lipschitz):
        return _UNKNOWN
    return f"≤ {round_up_text(run.certificate.lipschitz)}"


def _bound(value: object) -> str:
    number = as_number(value)
    return _UNKNOWN if math.isnan(number) else f"≤ {round_up_text(number)}"


def _pairs(table: dict[str, Any]) -> str:
    return ", ".join(f"{_text(table[key])} {key}" for key in sorted(table, key=natural)) or _UNKNOWN


def _text(value: object) -> str:
    """Return JSON data as text: numbers to six digits."""
    if value is None:
        return _UNKNOWN
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(value[key])}" for key in sorted(value)) or _UNKNOWN
    return json.dumps(value, sort_keys=True)
