"""Files of records, for the tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from stableopt.lyapunov import JSONLSink, StepRecord, read_records

LATER = {"norm_gap"}  # in a line of schema 1 it may be


def write(path: Path, steps: Iterable[int]) -> Path:
    """Append short records of these steps."""
    sink = JSONLSink(path)
    for step in steps:
        sink.write(StepRecord(step=step, loss=1 / step, reason="ü"))
    sink.close()
    return path


def records_of(path: Path) -> list[int]:
    """The steps that a file holds."""
    return [record.step for record in read_records(path)]


def plain(step: int, schema: int = 2) -> bytes:
    """The line of a record without a chain, as it was written before there was one."""
    data = json.loads(StepRecord(step=step).to_json())
    return json.dumps({**data, "schema": schema}, sort_keys=True).encode()
