"""The Learning Stability Profile of a run folder, read without trusting it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stableopt.files import decode_safetensors
from stableopt.lyapunov.profile.files import ARRAYS, KINDS, NUMBERS, SCHEMA

__all__ = ["ARRAYS", "NUMBERS", "ProfileSummary", "has_profile", "read_arrays", "read_numbers", "read_object"]


@dataclass(frozen=True)
class ProfileSummary:
    """What the two files of a profile say; nothing here is measured again.

    Args:
        content: ``profile.json``.
        arrays: ``profile.safetensors``, by name.

    Examples:
        >>> profile = ProfileSummary({"verdict": {"peak": 1.5, "horizon": None}}, {"path": np.array([0.0, 1.5])})
        >>> profile.number("verdict", "peak"), profile.number("verdict", "horizon"), profile.number("energy", "rate")
        (1.5, nan, nan)
        >>> profile.array("path", 1), profile.array("path", 2).size, profile.array("windows/steps", 1).size
        (array([0. , 1.5]), 0, 0)
    """

    content: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is a profile."""
        return bool(self.content)

    def table(self, *keys: str) -> dict[str, Any]:
        """Return an object of ``profile.json``; empty if it is absent or something else."""
        found: Any = self.content
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def number(self, *keys: str) -> float:
        """Return a number of ``profile.json``; the texts "inf" and "-inf" are one, anything else is NaN."""
        return _number(self.table(*keys[:-1]).get(keys[-1]))

    def text(self, *keys: str) -> str:
        """Return a text of ``profile.json``; empty if it is absent or something else."""
        found = self.table(*keys[:-1]).get(keys[-1])
        return found if isinstance(found, str) else ""

    def rows(self, key: str) -> list[dict[str, Any]]:
        """Return a list of objects of ``profile.json``, without the entries that are something else."""
        found = self.content.get(key)
        return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []

    def names(self, key: str) -> list[str]:
        """Return a list of texts of ``profile.json``."""
        found = self.content.get(key)
        return [str(name) for name in found] if isinstance(found, list) else []

    def array(self, name: str, dimensions: int) -> NDArray[np.float64]:
        """Return an array in float64; empty if it is absent or has another number of dimensions."""
        found = self.arrays.get(name)
        if found is None or found.ndim != dimensions:
            return np.empty((0,) * dimensions)
        return found.astype(np.float64)

    def times(self, name: str) -> NDArray[np.float64]:
        """Return the steps that an array names; empty if one of them is not finite.

        Examples:
            >>> profile = ProfileSummary(arrays={"a": np.array([0, 5]), "b": np.array([0.0, np.inf])})
            >>> profile.times("a"), profile.times("b"), profile.times("c")
            (array([0., 5.]), array([], dtype=float64), array([], dtype=float64))
        """
        found = self.array(name, 1)
        return found if np.isfinite(found).all() else np.empty(0)

    def series(self, places: str, values: str) -> list[tuple[float, float]]:
        """Return the pairs of two arrays; values that belong to the intervals between places stand at the ends of these.

        Returns:
            Nothing if the numbers of places and values do not fit.

        Examples:
            >>> profile = ProfileSummary(
            ...     arrays={"steps": np.array([0, 5]), "path": np.array([0.0, 1.5]), "growth": np.array([1.5])}
            ... )
            >>> profile.series("steps", "path"), profile.series("steps", "growth"), profile.series("growth", "path")
            ([(0.0, 0.0), (5.0, 1.5)], [(5.0, 1.5)], [])
        """
        x, y = self.times(places), self.array(values, 1)
        x = x[1:] if len(x) == len(y) + 1 else x
        return list(zip(x.tolist(), y.tolist(), strict=True)) if len(x) == len(y) else []


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it holds something else.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.json").write_text('{"a": 1}')
        ...     read_object(Path(folder, "a.json"))
        {'a': 1}
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(  # noqa: TRY004 - the content of a file is wrong, not an argument
            f"a JSON object was expected, got a {type(data).__name__}."
        )
    return data


def has_profile(folder: Path) -> bool:
    """Whether a folder holds a profile, or one of its files.

    Examples:
        >>> has_profile(Path("nowhere"))
        False
    """
    return any((folder / name).exists() for name in (NUMBERS, ARRAYS))


def read_numbers(path: Path) -> dict[str, Any]:
    """Read ``profile.json``.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is no JSON object, or has a layout that this version does not know.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, NUMBERS).write_text('{"schema": 9}')
        ...     read_numbers(Path(folder, NUMBERS))
        Traceback (most recent call last):
        ValueError: schema 1 was expected, got 9: it was written by another version of stableopt.
    """
    content = read_object(path)
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"schema {SCHEMA} was expected, got {content.get('schema')!r}: it was written by another version of stableopt."
        )
    return content


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read ``profile.safetensors``.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is cut, or its header does not describe it (:func:`stableopt.files.decode_safetensors`).

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, ARRAYS).write_bytes(b"short")
        ...     read_arrays(Path(folder, ARRAYS))
        Traceback (most recent call last):
        ValueError: it ends within its header, after 5 bytes.
    """
    found: dict[str, NDArray[np.generic]] = {}
    for name, (kind, shape, numbers) in decode_safetensors(path.read_bytes()).items():
        if kind not in KINDS:
            raise ValueError(f"its header does not describe '{name}': {kind} is none of {', '.join(KINDS)}.")
        found[name] = np.frombuffer(numbers, KINDS[kind]).reshape(shape)
    return found


def _number(value: object) -> float:
    if isinstance(value, str) and value in {"inf", "-inf"}:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
