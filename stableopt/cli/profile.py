"""The Learning Stability Profile of a run in the terminal: what a folder holds, or what training the run again measures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from stableopt.cli.data import Dataset
from stableopt.cli.subject import load_subject
from stableopt.cli.train import train_again
from stableopt.lyapunov import Profile
from stableopt.report.profile_tables import Table, profile_tables
from stableopt.report.profile_words import remarks, verdict_sentence
from stableopt.report.profiles import ARRAYS, NUMBERS, ProfileSummary, read_arrays, read_numbers

__all__ = ["measure_profile", "measure_subject", "profile_json", "profile_text", "read_profile"]

_PROBE = 32  # inputs of the probe


def measure_profile(folder: Path, *, steps: int = 300, directions: int = 4) -> None:
    """Take the first steps of a run again with a profile attached, and write the profile into the folder of the run.

    Args:
        folder: left by ``stableopt train``.
        steps: how many steps, at most.
        directions: how many perturbations are followed.

    Raises:
        FileNotFoundError: if there is nothing to train again.
        ValueError: if the run cannot be trained again, or cannot be followed.
    """
    if not (folder / "checkpoint.pt").is_file():
        raise FileNotFoundError(
            f"'{folder}' holds neither a profile nor a run of `stableopt train` that could be trained again for one."
        )

    def watch(model: nn.Module, optimizer: Optimizer, data: Dataset) -> Profile:
        options = {"directions": directions, "probe": data.x_train[:_PROBE], "look_every": max(steps // 6, 1)}
        return Profile(model, optimizer, folder, errors=max(steps // 6, 1), hyper=("lr",), **options)

    _announce(str(folder), steps, directions)
    train_again(folder, steps, watch)


def measure_subject(place: str, folder: Path, *, steps: int = 300, directions: int = 4) -> None:
    """Train what a function in a file of the user makes, on its one batch, and write the profile into a folder.

    Args:
        place: ``FILE.py:FUNCTION``, as for ``stableopt doctor``; an optimizer must be among what it returns.
        folder: made if absent.
        steps: how many steps.
        directions: how many perturbations are followed.

    Raises:
        ValueError: if there is no optimizer, ``steps`` is below 1, or the function does not return what it should.
        FileNotFoundError: if there is no such file.
    """
    if steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}.")
    model, loss, optimizer = load_subject(place)
    if optimizer is None:
        raise ValueError(
            f"'{place}' returns no optimizer: a profile follows its steps, so return it beside model and loss."
        )

    def closure() -> Any:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    _announce(place, steps, directions)
    with Profile(model, optimizer, folder, directions=directions, probe=loss, look_every=max(steps // 6, 1)):
        for _ in range(steps):
            optimizer.step(closure)


def read_profile(folder: Path) -> ProfileSummary:
    """Read the two files of a profile.

    Args:
        folder: a run folder.

    Returns:
        What they say.

    Raises:
        FileNotFoundError: if one of the two is not there.
        ValueError: if one of them is damaged, or there is no such folder.

    Examples:
        >>> read_profile(Path("."))
        Traceback (most recent call last):
        FileNotFoundError: '.' holds no profile: profile.json and profile.safetensors are written by Profile(..., run_dir=...).
    """
    if not folder.is_dir():
        raise ValueError(f"a run folder was expected, but {folder} is not a folder. Pass what Monitor got as run_dir.")
    found: dict[str, Any] = {}
    for name, read in ((NUMBERS, read_numbers), (ARRAYS, read_arrays)):
        if (folder / name).exists():
            try:
                found[name] = read(folder / name)
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"'{folder / name}' cannot be read: {error}") from error
    lacking = [name for name in (NUMBERS, ARRAYS) if not (folder / name).is_file()]
    if len(lacking) == 2:
        raise FileNotFoundError(
            f"'{folder}' holds no profile: {NUMBERS} and {ARRAYS} are written by Profile(..., run_dir=...)."
        )
    if lacking:
        raise FileNotFoundError(
            f"'{folder}' holds one half of a profile: {lacking[0]} is not there. "
            "A run of `stableopt train` is measured anew by --again."
        )
    return ProfileSummary(found[NUMBERS], found[ARRAYS])


def profile_text(profile: ProfileSummary) -> str:
    """Return a profile as text: the verdict, what has to be known beside it, and all tables.

    Examples:
        >>> print(profile_text(ProfileSummary({"schema": 1, "verdict": {"kind": "inconclusive", "horizon": 9}})))
        inconclusive on 9 steps: the run does not decide it.
    """
    head = "\n".join([verdict_sentence(profile), *remarks(profile)])
    return "\n\n".join([head, *map(_table_text, profile_tables(profile))])


def profile_json(profile: ProfileSummary) -> dict[str, Any]:
    """Return what ``profile.json`` says.

    Examples:
        >>> profile_json(ProfileSummary({"schema": 1}))
        {'schema': 1}
    """
    return profile.content


def _table_text(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (table.columns, *table.rows)
    ]
    return "\n".join([table.caption, *(f"  {line}" for line in lines)])


def _announce(subject: str, steps: int, directions: int) -> None:
    print(f"taking up to {steps} steps of '{subject}' with {directions} perturbations", file=sys.stderr)  # noqa: T201
