"""Run folders in, one HTML page out."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from stableopt._version import __version__
from stableopt.lyapunov import ACTIONS, VERDICTS
from stableopt.report.figures import accuracy_figure, energy_figure, layer_figures, natural, require, steps_figure
from stableopt.report.runs import Run, as_number, read_run, round_up_text

__all__ = ["write_report"]

_UNKNOWN = "—"
Row = tuple[str, list[str]]


def write_report(
    run_dirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> Path:
    """Write one self-contained HTML page about one or several runs.

    The page holds the curves of energy, loss, step scale, layer norms and certified accuracy, the runs overlaid, and tables of
    the final numbers, the claims of the certificates and the settings. A file that is absent or damaged is named where its
    content would be. The same folders give the same bytes.

    Args:
        run_dirs: one run folder, or several to compare.
        out: the HTML file; replaced as a whole if it is there.

    Returns:
        The path of the page.

    Raises:
        ValueError: if there is no run folder, one is not a folder, or ``out`` is a folder.
        ImportError: if matplotlib or jinja2 is not installed.

    Note:
        Shows what the files say and proves nothing; a certificate is checked by ``stableopt verify``.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = Path(folder, "a")
        ...     run.mkdir()
        ...     _ = (run / "metrics.json").write_text('{"test_accuracy": 0.9, "certified_accuracy": {"0.1": 0.8}}')
        ...     page = write_report(run, Path(folder, "report.html")).read_text(encoding="utf-8")
        >>> "<td>0.9</td>" in page, "<script" in page, "model.cert.json is absent" in page
        (True, False, True)
    """
    folders = [run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else list(run_dirs)
    if not folders:
        raise ValueError("a report needs at least one run folder, got none.")
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"the report is one file, but {out} is a folder. Give a name such as {out / 'report.html'}.")
    runs = [read_run(folder) for folder in folders]
    page = _render(runs, _names(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    _replace(out, page.encode("utf-8", errors="replace"))
    return out


def _render(runs: Sequence[Run], names: Sequence[str]) -> str:
    jinja2 = require("jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["bound"] = round_up_text
    text = resources.files("stableopt.report").joinpath("templates/report.html").read_text(encoding="utf-8")
    runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    problems = [(run.name, sorted(run.problems.items())) for run in runs if run.problems]
    return environment.from_string(text).render(
        version=__version__,
        title=", ".join(names),
        names=names,
        summary=_summary(runs),
        damaged=problems,
        energy=energy_figure(runs),
        counts=_counts(runs),
        steps=steps_figure(runs),
        layers=layer_figures(runs),
        accuracy=accuracy_figure(runs),
        certificates=[(run.name, run.certificate) for run in runs],
        settings=_settings(runs),
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the folder names, numbered where two are the same."""
    counts = Counter(run.name for run in runs)
    return [f"{run.name} ({k})" if counts[run.name] > 1 else run.name for k, run in enumerate(runs, start=1)]


def _summary(runs: Sequence[Run]) -> list[Row]:
    """Return the rows of final numbers; a row that no run fills is left out."""
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
        ("last recorded step", [_text(run.records[-1].step if run.records else None) for run in runs]),
        ("last recorded loss", [_text(run.records[-1].loss if run.records else None) for run in runs]),
    ]
    return [row for row in rows if any(cell != _UNKNOWN for cell in row[1])]


def _counts(runs: Sequence[Run]) -> list[Row]:
    """Return how often each verdict and each action stands in the records, without the ones that never do."""
    rows: list[Row] = []
    for kind, known in (("verdict", VERDICTS), ("action", ACTIONS)):
        counts = [Counter(getattr(record, kind) for record in run.records) for run in runs]
        rows += [(name, [str(count[name]) for count in counts]) for name in known if any(c[name] for c in counts)]
    return rows


def _settings(runs: Sequence[Run]) -> list[Row]:
    keys = sorted({key for run in runs for key in run.settings})
    return [(key, [_text(run.settings.get(key)) for run in runs]) for key in keys]


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
        return _pairs_colon(value)
    return json.dumps(value, sort_keys=True)


def _pairs_colon(table: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {_text(table[key])}" for key in sorted(table)) or _UNKNOWN


def _replace(path: Path, content: bytes) -> None:
    """Put the new page in the place of the old one, all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
