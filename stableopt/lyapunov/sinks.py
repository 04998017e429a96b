"""Where records go, and how they are read back."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from abc import ABC, abstractmethod
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

from stableopt.lyapunov.record import StepRecord

__all__ = ["JSONLSink", "Sink", "read_records", "truncate_records"]


class Sink(ABC):
    """Receive the records of a run, in order.

    Note:
        An exception that ``write`` raises reaches the training loop, after the step is complete. A sink for which the run
        matters more than the record catches it, as :class:`JSONLSink` does for a disk that is full.

    Examples:
        >>> class Losses(Sink):
        ...     def __init__(self):
        ...         self.losses = []
        ...
        ...     def write(self, record):
        ...         self.losses.append(record.loss)
        >>> sink = Losses()
        >>> sink.write(StepRecord(step=1, loss=0.5))
        >>> sink.losses
        [0.5]
    """

    @abstractmethod
    def write(self, record: StepRecord) -> None:
        """Take one record."""

    def close(self) -> None:  # noqa: B027 - most sinks have nothing to let go of
        """Let go of files and connections; may be called twice."""


class JSONLSink(Sink):
    """Append records to a file, one JSON object a line.

    Each line is handed to the operating system as it is written, so a killed process leaves at most one torn line, the last.
    A torn line that an earlier run left is removed first. If the file cannot be written, one warning is given, the sink is
    disabled, and training goes on.

    Args:
        path: the file; its folder is made if it is not there. Opened at the first record.

    Note:
        Survives a killed process, not a power failure: no ``fsync`` per line.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> sink = JSONLSink(Path(folder.name) / "energy.jsonl")
        >>> for step in (1, 2):
        ...     sink.write(StepRecord(step=step))
        >>> sink.close()
        >>> [record.step for record in read_records(sink.path)]
        [1, 2]
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.disabled = False
        self._file: TextIOWrapper | None = None

    def write(self, record: StepRecord) -> None:
        """Append one line, or give up for good with one warning."""
        if self.disabled:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _mend_last_line(self.path)
                self._file = self.path.open("a", encoding="utf-8", newline="\n", buffering=1)
            self._file.write(record.to_json() + "\n")
        except OSError as error:
            self._disable(error)

    def close(self) -> None:
        """Close the file; the next record opens it again."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.close()
        except OSError as error:
            self._disable(error)

    def _disable(self, error: OSError) -> None:
        """Stop writing first, warn second: a warning may be an error here."""
        self.disabled = True
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # the same fault once more; the descriptor is released all the same
                file.close()
        warnings.warn(
            f"cannot write the records of the run to {self.path} ({error}): "
            "training goes on, later steps are not written. Free the disk or choose another run_dir.",
            RuntimeWarning,
            stacklevel=2,
        )


def read_records(path: str | os.PathLike[str]) -> list[StepRecord]:
    r"""Return the records of a file in order; a torn last line, as a killed process leaves it, is dropped.

    Args:
        path: a file that :class:`JSONLSink` wrote.

    Raises:
        ValueError: if another line is not a record, or the steps do not rise; the message names the line.
        OSError: if the file cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "energy.jsonl"
        ...     _ = path.write_text(StepRecord(step=1).to_json() + '\n{"action": "acc')
        ...     len(read_records(path))
        1
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # what follows the last line break: nothing, unless the process was killed while writing
    records: list[StepRecord] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = StepRecord.from_json(line.decode("utf-8"))
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise ValueError(f"{path.name}, line {number} is not a step record: {error}") from error
        _append_later(records, record, path, number)
    if (last := _parse(torn)) is not None:
        _append_later(records, last, path, len(lines) + 1)
    return records


def truncate_records(path: str | os.PathLike[str], step: int) -> int:
    r"""Drop the records after a step, so that a run resumed from there writes what an uninterrupted one would have.

    The file is replaced as a whole: after a crash it holds either all the old lines or only the kept ones.

    Args:
        path: a file that :class:`JSONLSink` wrote; none there means there is nothing to drop.
        step: the last step to keep, at least 0.

    Returns:
        The number of records dropped (a torn last line is dropped too, and not counted).

    Raises:
        ValueError: if ``step`` is negative or not an integer, or the file is corrupt.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "energy.jsonl"
        ...     _ = path.write_text("".join(StepRecord(step=k).to_json() + "\n" for k in (1, 2, 3)))
        ...     truncate_records(path, 2), [record.step for record in read_records(path)]
        (1, [1, 2])
    """
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"truncate_records needs the last step to keep as an integer >= 0, got {step!r}.")
    path = Path(path)
    if not path.exists():
        return 0
    records = read_records(path)
    kept = [record for record in records if record.step <= step]
    _replace(path, "".join(record.to_json() + "\n" for record in kept).encode("utf-8"))
    return len(records) - len(kept)


def _append_later(records: list[StepRecord], record: StepRecord, path: Path, number: int) -> None:
    if records and record.step <= records[-1].step:
        raise ValueError(
            f"{path.name}, line {number} is of step {record.step}, after one of step {records[-1].step}: steps must rise. "
            "Two runs wrote to one file; give each its own run_dir, or use truncate_records before resuming."
        )
    records.append(record)


def _parse(line: bytes) -> StepRecord | None:
    """Return the record of a line that may be torn, None if it is."""
    try:
        return StepRecord.from_json(line.decode("utf-8"))
    except ValueError:
        return None


def last_step(path: Path) -> int:
    """Return the step of the last whole record of a file, 0 if there is none; does not read the rest."""
    try:
        with path.open("rb") as file:
            tail = _tail(file, lines=2)
    except OSError:  # not there; or not readable, of which the sink will warn when it writes
        return 0
    *whole, torn = tail.split(b"\n")
    if (record := _parse(torn)) is not None:
        return record.step
    if not whole:
        return 0
    try:
        return StepRecord.from_json(whole[-1].decode("utf-8")).step
    except ValueError as error:
        raise ValueError(
            f"the last line of {path} is not a step record ({error}); use another run_dir, or repair the file."
        ) from error


def _tail(file: BinaryIO, lines: int) -> bytes:
    """Return the end of a file with this many line breaks, or all of it; in blocks, for files of 10^7 lines."""
    tail, start = b"", file.seek(0, os.SEEK_END)
    while start > 0 and tail.count(b"\n") < lines:
        block = min(start, 1 << 16)
        start -= block
        file.seek(start)
        tail = file.read(block) + tail
    return tail


def _mend_last_line(path: Path) -> None:
    """End the file with a line break, dropping what a killed process left after the last one unless it is whole."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        torn = _tail(file, lines=1).rpartition(b"\n")[2]
        if not torn:
            return
        end = file.seek(0, os.SEEK_END)
        if _parse(torn) is not None:
            file.write(b"\n")
        else:
            file.truncate(end - len(torn))


def _replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of an old one: all of it or nothing, also if the process dies meanwhile."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777)  # mkstemp makes it private; keep what the user had
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
