"""Records as a table of comma-separated values, for spreadsheets and plots."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from typing import BinaryIO

from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.sinks.base import FileSink
from stableopt.lyapunov.sinks.lines import lines_from_end

__all__ = ["COLUMNS", "CSVSink"]

COLUMNS = (
    "step", "verdict", "action", "loss", "loss_after", "energy_before", "energy_after", "dissipation", "predicted", "tolerance",
    "scale", "trials", "displacement", "grad_norm", "weight_norm", "slope", "trust", "batch_sharpness", "edge_distance",
    "sharpness", "edge", "plain_sharpness", "sharpness_residual", "trace", "trace_error", "noise_scale", "hvp",
    "forward_exponent", "weight_exponent", "overhead", "reason", "lr", "nonfinite", "events", "notes",
)  # fmt: skip


class CSVSink(FileSink):
    """Append records to a table with one row a record and the columns :data:`COLUMNS`, in this order.

    Numbers are written so that ``float`` reads them back exactly, also ``nan`` (unknown), ``inf`` and ``-inf``. ``lr``,
    ``nonfinite`` and ``notes`` are JSON lists, ``events`` a JSON list of the events' readings. The tables by parameter, layer and
    block are left out, since their size is the model's: they are in the records of :class:`~stableopt.lyapunov.JSONLSink`. A text
    is on one line: a line break in it is a space here.

    Args:
        path: the file; its folder is made if it is not there. A table that is there is continued with its own columns. What
            follows the last line break is dropped, whole or not: a row has no end that could be recognized.

    Raises:
        ValueError: if there is a file that is no such table.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = CSVSink(Path(folder) / "energy.csv")
        ...     sink.write(StepRecord(step=1, loss=0.5, lr=(0.1,)))
        ...     sink.close()
        ...     (row,) = csv.DictReader(sink.path.read_text().splitlines())
        >>> row["step"], float(row["loss"]), row["energy_after"], row["lr"]
        ('1', 0.5, 'nan', '[0.1]')
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._columns = COLUMNS
        if self.path.is_file():
            self._read_header()

    def begin(self) -> None:
        r"""Write the header if there is none, and drop a torn last line.

        Examples:
            >>> import tempfile
            >>> from pathlib import Path
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     sink = CSVSink(Path(folder) / "energy.csv")
            ...     _ = sink.path.write_text("step,loss\n1,0.5\n2,0.2")
            ...     sink.begin()
            ...     sink.path.read_text()
            'step,loss\n1,0.5\n'
        """
        if self.path.exists():
            with self.path.open("r+b") as file:
                _drop_after_last_break(file)
        if not self.path.exists() or self.path.stat().st_size == 0:
            self._columns = COLUMNS
            self.path.write_bytes(_row(COLUMNS))
        else:
            self._read_header()

    def line(self, record: StepRecord) -> bytes:
        r"""Return the row of a record.

        Examples:
            >>> CSVSink("none.csv").line(StepRecord(step=1, verdict="decreased"))[:28]
            b'1,decreased,unguarded,nan,na'
        """
        return _row([_cell(getattr(record, name, "")) for name in self._columns])

    def truncate(self, step: int) -> None:
        """Drop the rows after a step.

        Args:
            step: the last step to keep, at least 0.

        Raises:
            ValueError: if a row that would be dropped, or the last that would stay, does not begin with a step.
            OSError: if the file cannot be written.

        Examples:
            >>> import tempfile
            >>> from pathlib import Path
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     sink = CSVSink(Path(folder) / "energy.csv")
            ...     for step in (1, 2, 3):
            ...         sink.write(StepRecord(step=step))
            ...     sink.truncate(1)
            ...     [row["step"] for row in csv.DictReader(sink.path.read_text().splitlines())]
            ['1']
        """
        self.close()
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            _drop_after_last_break(file)
            lines = lines_from_end(file)
            cut, _ = next(lines)  # what follows the last line break: nothing any more
            end = cut
            for begin, line in lines:
                if begin == 0 or self._step(line) <= step:
                    break
                cut = begin
            if cut < end:
                file.truncate(cut)

    def _step(self, row: bytes) -> int:
        cell = row.partition(b",")[0]
        if not cell.isdigit():
            raise ValueError(
                f"a row of {self.path} begins with {cell!r}, not with a step; repair the file or use another."
            )
        return int(cell)

    def _read_header(self) -> None:
        """Take the columns of a table that is there, so that its rows stay alike."""
        with self.path.open("rb") as file:
            header = file.readline(1 << 16)
        if not header.endswith(b"\n"):  # empty, or torn when it was written: it is written anew
            if _row(COLUMNS).startswith(header):
                return
        else:
            columns = tuple(header.decode("utf-8", "replace").rstrip("\r\n").split(","))
            if columns[0] == "step" and set(columns) <= set(COLUMNS):
                self._columns = columns
                return
        raise ValueError(
            f"CSVSink needs a new file, or a table that it wrote, with columns among {', '.join(COLUMNS)}; "
            f"{self.path} begins with {header[:60]!r}. Choose another file."
        )


def _row(cells: tuple[str, ...] | list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: object) -> str:
    """Return the text of a field, on one line."""
    if isinstance(value, str):
        return " ".join(value.splitlines())
    if isinstance(value, tuple):
        return json.dumps([item if isinstance(item, float) and math.isfinite(item) else str(item) for item in value])
    return repr(value)


def _drop_after_last_break(file: BinaryIO) -> None:
    begin, torn = next(lines_from_end(file))
    if torn:
        file.truncate(begin)
