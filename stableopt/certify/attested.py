r"""Attested claims: what the files of a run say about its training. Nothing of it is proved, nor can it be from the weights.

A *proved* claim follows from the bytes of the weights, a *replayable* one from the weights and a data set. How the weights came
about is in no file that a third party could check: an attestation names the record that tells it, by a digest of its bytes and by
the head of its hash chain, and repeats what the record says. Whoever has the record can check that it is that one, and that it says
so; that it is true, nobody can.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stableopt.files import write_atomically
from stableopt.linalg import upper
from stableopt.lyapunov import iter_records
from stableopt.lyapunov.sinks.chain import Links, add_link, first_link
from stableopt.lyapunov.sinks.lines import whole_lines
from stableopt.optim import StabilityLedger

__all__ = ["attest_ledger", "attest_record", "attest_run", "chain_head", "save_ledger"]

_RECORD, _LEDGER = "energy.jsonl", "ledger.json"
_SUMS = ("total", "squares", "largest", "rise")
_MOST = 1 << 16


def chain_head(path: str | os.PathLike[str]) -> str:
    r"""Return the head of the hash chain over the lines of a file of records, :math:`h_k = \text{sha256}(h_{k-1} \| x_k)`.

    It begins with :math:`h_0 =` :func:`~stableopt.lyapunov.sinks.chain.first_link`; :math:`x_k` is line k without its break and
    without the digest that :class:`~stableopt.lyapunov.JSONLSink` puts at its end. For a file that is chained from its first line
    on this is its last digest, ``verify_chain(path).head``; files that were written without a chain have a head as well.

    Args:
        path: the file; read a line at a time. A torn last line, as a killed process leaves it, is left out.

    Returns:
        64 hexadecimal digits. Whoever changes, drops, adds or moves a line changes them.

    Raises:
        ValueError: if the digests that the lines carry do not follow from one another; the message names the line.
        OSError: if the file cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "energy.jsonl"
        ...     _ = path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
        ...     head = chain_head(path)
        >>> head == hashlib.sha256(
        ...     hashlib.sha256(first_link().encode() + b'{"step": 1}').hexdigest().encode() + b'{"step": 2}'
        ... ).hexdigest()
        True
    """
    links, head = Links(), first_link()
    for number, line in whole_lines(path):
        try:
            content = links.take(line)
        except ValueError as error:
            raise ValueError(f"{Path(path).name}, line {number} {error}.") from None
        head = add_link(content, head)[1]
    return head


def attest_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    r"""Return the claim ``energy_record``: what a file of step records says, and which file it is.

    Args:
        path: a file that :class:`~stableopt.lyapunov.JSONLSink` wrote; read a line at a time.

    Returns:
        ``file``, ``sha256`` of all its bytes, ``hash_chain_head``, ``chained`` (whether each line carries its digest), ``steps``,
        and the counts of steps: ``violations``, where the energy rose by more than the rounding and the step was kept; ``undone``,
        where it rose and the guard took the step back; ``undecided``, ``unobserved`` and ``nonfinite``.

    Raises:
        ValueError: if a line is no record, or does not follow from the line before.
        OSError: if the file cannot be read.

    Examples:
        >>> import tempfile
        >>> from stableopt.lyapunov import StepRecord
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "energy.jsonl"
        ...     _ = path.write_text("".join(StepRecord(step=k, verdict="increased").to_json() + "\n" for k in (1, 2)))
        ...     claim = attest_record(path)
        >>> claim["id"], claim["steps"], claim["violations"], claim["chained"]
        ('energy_record', 2, 2, False)
    """
    counts = dict.fromkeys(("steps", "violations", "undone", "undecided", "unobserved", "nonfinite"), 0)
    for record in iter_records(path):
        counts["steps"] += 1
        if record.verdict == "increased":
            counts["undone" if record.action == "undone" else "violations"] += 1
        elif record.verdict in counts:
            counts[record.verdict] += 1
    links = Links()
    for _, line in whole_lines(path):
        links.take(line)
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "id": "energy_record",
        "file": Path(path).name,
        "sha256": digest,
        "hash_chain_head": chain_head(path),
        "chained": links.chained == links.lines > 0,
        **counts,
    }


def attest_ledger(
    state: StabilityLedger | Mapping[str, Any], bounds: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the claim ``ledger``: the sums of the learning rates of a run, and the bounds that its user drew from them.

    Args:
        state: a ledger, or its ``state_dict()``.
        bounds: name -> a bound of the uniform stability, as ``{"convex": ledger.convex(1.0, 1000, smoothness=4.0)}``. They rest on
            constants of the loss that the ledger cannot see, so they are attested as well.

    Returns:
        ``steps`` and ``adapted`` as integers, the sums and the bounds as hexadecimal floats, the bounds rounded up.

    Raises:
        ValueError: if a number is missing, or is negative or not finite.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> ledger = StabilityLedger(torch.optim.SGD([w], lr=0.5))
        >>> ledger.load_state_dict(ledger.state_dict() | {"steps": 2, "total": 1.0, "largest": 0.5})
        >>> claim = attest_ledger(ledger, {"convex": ledger.convex(1.0, samples=4, smoothness=4.0)})
        >>> claim["steps"], float.fromhex(claim["total"]), float.fromhex(claim["bounds"]["convex"])
        (2, 1.0, 0.5)
    """
    found = state.state_dict() if isinstance(state, StabilityLedger) else dict(state)
    claim: dict[str, Any] = {"id": "ledger"}
    for name in ("steps", "adapted"):
        value = found.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"a ledger needs an integer {name} >= 0, got {value!r}.")
        claim[name] = value
    for name in _SUMS:
        claim[name] = _hex(name, found.get(name))
    claim["bounds"] = {name: _hex(name, upper(value)) for name, value in sorted((bounds or {}).items())}
    return claim


def save_ledger(
    folder: str | os.PathLike[str], ledger: StabilityLedger, bounds: Mapping[str, Any] | None = None
) -> Path:
    """Write the claim of a ledger into a run folder, as ``ledger.json``, for :func:`attest_run` to find.

    Args:
        folder: the run folder.
        ledger: of the optimizer of the run.
        bounds: as for :func:`attest_ledger`.

    Raises:
        ValueError: as :func:`attest_ledger`.
        OSError: if the file cannot be written.

    Examples:
        >>> import tempfile, torch
        >>> ledger = StabilityLedger(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_ledger(folder, ledger).name
        'ledger.json'
    """
    path = Path(folder) / _LEDGER
    write_atomically(path, (json.dumps(attest_ledger(ledger, bounds), indent=1, sort_keys=True) + "\n").encode())
    return path


def attest_run(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the attested claims of a run folder, for ``claims.attested`` of a certificate.

    Args:
        folder: holds ``energy.jsonl`` and ``ledger.json``, or one of them, or neither.

    Returns:
        One claim per file that is there: ``energy_record`` (:func:`attest_record`), ``ledger`` (:func:`attest_ledger`).

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a file is damaged.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     attest_run(folder)
        []
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder '{folder}': give the folder of a run.")
    claims: list[dict[str, Any]] = []
    if (folder / _RECORD).is_file():
        claims.append(attest_record(folder / _RECORD))
    if (folder / _LEDGER).is_file():
        claims.append(_read_ledger(folder / _LEDGER))
    return claims


def _read_ledger(path: Path) -> dict[str, Any]:
    """Read ``ledger.json`` as strictly as the certificate that it goes into."""
    if path.stat().st_size > _MOST:
        raise ValueError(f"'{path}' is larger than {_MOST} bytes: it is no ledger.")
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.pop("id", None) != "ledger":
            raise ValueError("it is no claim of a ledger")  # noqa: TRY301 - one message for all that is wrong
        numbers = {name: float.fromhex(data[name]) for name in _SUMS}
        bounds = {str(name): float.fromhex(value) for name, value in data["bounds"].items()}
        if set(data) != {*_SUMS, "steps", "adapted", "bounds"}:
            raise ValueError("it has other keys than a ledger")  # noqa: TRY301
        return attest_ledger(data | numbers, bounds)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"'{path}' cannot be read: {error}.") from None


def _hex(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"a ledger needs a finite number {name} >= 0, got {value!r}.")
    return float(value).hex()
