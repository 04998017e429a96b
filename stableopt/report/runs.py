"""A run folder, read without trusting it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from functools import partial
from pathlib import Path
from typing import Any

from stableopt.lyapunov.sinks import iter_records
from stableopt.report.history import History
from stableopt.report.profiles import (
    ARRAYS,
    NUMBERS,
    ProfileSummary,
    has_profile,
    read_arrays,
    read_numbers,
    read_object,
)

__all__ = ["CertificateSummary", "Run", "as_number", "read_run", "round_up_text"]


@dataclass(frozen=True)
class CertificateSummary:
    """What a certificate file says, as numbers; nothing here is verified.

    Args:
        lipschitz: the claimed Lipschitz bound; NaN if there is no such claim.
        lipschitz_hex: the same number as the file spells it, exactly.
        layers: (name, operation, bound) of each layer, in order; NaN for sums and joins, which have none.
        weights_digest: the SHA-256 that the file names for its weights.
        weights_match: whether the weights in the folder have this digest; None if there are none.
        file_digest: the SHA-256 of the certificate file itself.
        norm: in which the bound is, as the file spells it.

    Examples:
        >>> CertificateSummary(1.0, "0x1.0p+0", (), "", None, "").lipschitz
        1.0
    """

    lipschitz: float
    lipschitz_hex: str
    layers: tuple[tuple[str, str, float], ...]
    weights_digest: str
    weights_match: bool | None
    file_digest: str
    norm: str = "l2"


@dataclass(frozen=True)
class Run:
    """The content of one run folder.

    Args:
        name: the name of the folder.
        settings: ``run.json``.
        metrics: ``metrics.json``.
        history: ``energy.jsonl``, condensed.
        certificate: ``model.cert.json``.
        profile: ``profile.json`` and ``profile.safetensors``; empty without them.
        problems: file name -> why it could not be used, or not to its end.
        absent: the files that are not there.

    Examples:
        >>> Run("a").history.count
        0
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=History)
    certificate: CertificateSummary | None = None
    profile: ProfileSummary = field(default_factory=ProfileSummary)
    problems: dict[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run folder; what is absent or damaged is noted, and the rest is read.

    Args:
        folder: holds any of ``run.json``, ``metrics.json``, ``energy.jsonl``, ``model.cert.json``, and the two files of a
            profile, of which one alone is noted as the lack of the other.

    Raises:
        ValueError: if there is no such folder.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "metrics.json").write_text('{"test_accuracy": 0.9}')
        ...     run = read_run(folder)
        >>> run.metrics, run.absent
        ({'test_accuracy': 0.9}, ('run.json', 'energy.jsonl', 'model.cert.json'))
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"a run folder was expected, but {folder} is not a folder. Pass what Monitor got as run_dir.")
    problems: dict[str, str] = {}
    absent: list[str] = []

    def attempt(name: str, read: Any, default: Any) -> Any:
        path = folder / name
        if not path.exists():
            absent.append(name)
            return default
        try:
            return read(path)
        except (OSError, ValueError, RecursionError) as error:
            problems[name] = f"cannot be read: {error}"
            return default

    return Run(
        name=folder.resolve().name,
        settings=attempt("run.json", read_object, {}),
        metrics=attempt("metrics.json", read_object, {}),
        history=attempt("energy.jsonl", partial(_read_history, problems), History()),
        certificate=attempt("model.cert.json", _read_certificate, None),
        profile=ProfileSummary(attempt(NUMBERS, read_numbers, {}), attempt(ARRAYS, read_arrays, {}))
        if has_profile(folder)
        else ProfileSummary(),
        problems=problems,
        absent=tuple(absent),
    )


def as_number(value: object) -> float:
    """Return a number from JSON data: a number, or a string that spells one (decimal or hexadecimal); else NaN.

    Examples:
        >>> as_number(1), as_number("0x1.8p+0"), as_number("inf"), as_number(None)
        (1.0, 1.5, inf, nan)
    """
    if isinstance(value, bool):
        return math.nan
    try:
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            return float.fromhex(value) if "0x" in value.lower() else float(value)
    except (ValueError, OverflowError):
        return math.nan
    return math.nan


def round_up_text(value: float, digits: int = 6) -> str:
    """Return a decimal that is not below the number: a bound must not shrink by being printed.

    Examples:
        >>> round_up_text(1.00000000001), round_up_text(1.0), round_up_text(2 / 3)
        ('1.00001', '1', '0.666667')
        >>> round_up_text(1e30), round_up_text(float("inf"))
        ('1.00001E+30', 'inf')
    """
    if not math.isfinite(value):
        return str(value)
    rounded = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(Decimal(value))
    return format(rounded.normalize(), "f") if 1e-4 <= abs(value) < 10**digits else str(rounded.normalize())


def _read_history(problems: dict[str, str], path: Path) -> History:
    """Read the records up to the first damage, which is a problem."""
    history = History()
    try:
        for record in iter_records(path):
            history.add(record)
    except ValueError as error:
        if history.last is None:
            raise
        problems[path.name] = f"is used up to step {history.last.step}: {error}"
    return history


def _read_certificate(path: Path) -> CertificateSummary:
    """Take the numbers out of a statement; a missing key means that it is not a certificate of this kind."""
    content = path.read_bytes()
    statement = json.loads(content)
    try:
        predicate = statement["predicate"]
        digest = str(statement["subject"][0]["digest"]["sha256"])
        claims = [claim for claim in predicate["claims"]["proved"] if claim["id"] == "lipschitz"]
        spelled = str(claims[0]["L"]) if claims else "nan"
        layers = tuple(_layer(position, node) for position, node in enumerate(predicate["graph"]))
        lipschitz = float.fromhex(spelled)
        norm = str(predicate["input"]["metric"])
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"the layout of a certificate was expected, but {error!r} was met.") from error
    weights = path.parent / "model.safetensors"
    match = _sha256(weights) == digest if weights.exists() else None
    return CertificateSummary(lipschitz, spelled, layers, digest, match, hashlib.sha256(content).hexdigest(), norm)


def _layer(position: int, node: dict[str, Any]) -> tuple[str, str, float]:
    operation = str(node["op"])
    kind = f"{operation} {node['name']}" if "name" in node else operation
    return (
        str(node.get("weight") or f"layer {position}"),
        kind,
        float.fromhex(node["bound"]) if operation not in {"sum", "concat"} else math.nan,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
