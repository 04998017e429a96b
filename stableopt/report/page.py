"""Run folders in, one HTML page out."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from stableopt._version import __version__
from stableopt.files import write_atomically
from stableopt.report import figures, tables
from stableopt.report.figures import Picture
from stableopt.report.profile_tables import Table, profile_tables
from stableopt.report.profile_words import remarks, verdict_sentence
from stableopt.report.runs import Run, read_run, round_up_text

__all__ = ["write_report"]


class Section(NamedTuple):
    """A part of the page: sentences by run, figures, tables of (caption, rows) with a column for each run, and tables by run."""

    key: str
    title: str
    pictures: Sequence[Picture]
    grids: Sequence[tuple[str, list[tables.Row]]] = ()
    sentences: Sequence[tuple[str, Sequence[str]]] = ()
    tables: Sequence[tuple[str, Sequence[Table]]] = ()


def write_report(
    run_dirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> Path:
    """Write one self-contained HTML page about one or several runs.

    The page holds, for what was recorded, figures of energy and loss with the alarms, the trust ratio in its bands, sharpness
    against the limit, updates, gradients and norms of the layers against their limits, and the actions of the guard, the runs
    overlaid, and the learning stability profile; and tables of the final numbers, the events, the claims of the certificates
    and the settings. A file that is absent or damaged is named. The same folders give the same bytes.

    Args:
        run_dirs: one run folder, or several to compare.
        out: the HTML file; replaced as a whole if it is there.

    Returns:
        The path of the page.

    Raises:
        ValueError: if there is no run folder, one is not a folder, or ``out`` is a folder.
        ImportError: if jinja2 is not installed.

    Note:
        Shows what the files say and proves nothing; a certificate is checked by ``stableopt verify``.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = Path(folder, "a")
        ...     run.mkdir()
        ...     _ = (run / "metrics.json").write_text('{"test_accuracy": 0.9, "certified_accuracy": {"0.1": 0.8}}')
        ...     page = write_report(run, Path(folder, "report.html")).read_text(encoding="utf-8")
        >>> "<td>0.9</td>" in page, "<script" in page, "model.cert.json is not there" in page
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
    write_atomically(out, page.encode("utf-8", errors="replace"))
    return out


def _render(runs: Sequence[Run], names: Sequence[str]) -> str:
    jinja2 = _require_jinja2()
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(_template),
    )
    environment.filters["bound"] = round_up_text
    runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    return environment.get_template("report.html").render(
        version=__version__,
        title=", ".join(names),
        names=names,
        headlines=[(run.name, tables.headline(run)) for run in runs],
        summary=tables.summary(runs),
        missing=tables.missing(runs),
        damaged=[(run.name, sorted(run.problems.items())) for run in runs if run.problems],
        absent=tables.absent(runs),
        sections=[section for section in _sections(runs) if section.pictures or section.sentences],
        events=tables.events(runs),
        event_count=sum(run.history.events.count for run in runs),
        cost=tables.cost(runs),
        accuracy=figures.accuracy_figure(runs),
        certificates=[(run.name, run.certificate) for run in runs if run.certificate],
        settings=tables.settings(runs),
    )


def _sections(runs: Sequence[Run]) -> list[Section]:
    verdicts = ("Recorded steps by verdict.", tables.counts(runs, "verdict"))
    shares = ("Checked steps by band of the trust ratio.", tables.trust_shares(runs))
    actions = ("Recorded steps by action.", tables.counts(runs, "action"))
    return [
        Section("energy", "Energy and loss", figures.energy_figures(runs), [verdicts]),
        Section("trust", "Trust in the steps", figures.trust_figures(runs), [shares]),
        Section("curvature", "Sharpness against its limit", figures.curvature_figures(runs)),
        _profile_section(runs),
        Section("updates", "Updates by layer", figures.update_figures(runs)),
        Section("gradients", "Gradients", figures.gradient_figures(runs)),
        Section(
            "layers", "Layers against their limits", [*figures.limit_figures(runs), *figures.exponent_figures(runs)]
        ),
        Section("steps", "Steps and what was done to them", figures.step_figures(runs), [actions]),
    ]


def _profile_section(runs: Sequence[Run]) -> Section:
    """Return the section about the profiles; empty if no run has one, else a sentence also for those that have none."""
    profiled = any(run.profile for run in runs)
    return Section(
        "profile",
        "Learning Stability Profile",
        figures.profile_figures(runs),
        sentences=[(run.name, [verdict_sentence(run.profile), *remarks(run.profile)]) for run in runs]
        if profiled
        else [],
        tables=[(run.name, profile_tables(run.profile)) for run in runs if run.profile],
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the folder names, numbered where two are the same."""
    counts = Counter(run.name for run in runs)
    return [f"{run.name} ({k})" if counts[run.name] > 1 else run.name for k, run in enumerate(runs, start=1)]


def _template(name: str) -> str:
    return resources.files("stableopt.report").joinpath("templates", name).read_text(encoding="utf-8")


def _require_jinja2() -> Any:
    try:
        return importlib.import_module("jinja2")
    except ImportError as error:
        raise ImportError(
            f"a report needs jinja2, which cannot be imported ({error}). Install it with: pip install 'stableopt[cli]'"
        ) from error
