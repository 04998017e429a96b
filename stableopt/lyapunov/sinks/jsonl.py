"""Records as lines of JSON: written one by one, chained, read back, cut off where a run is resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.sinks.base import FileSink
from stableopt.lyapunov.sinks.chain import Links, add_link, first_link, split_link
from stableopt.lyapunov.sinks.lines import is_torn, lines_from_end, whole_lines

__all__ = ["JSONLSink", "iter_records", "last_step", "read_records", "truncate_records"]


class JSONLSink(FileSink):
    """Append records to a file, one JSON object a line, each with a digest of itself and of all lines before it.

    The digest is the last key of the line, ``"chain"``: see :func:`~stableopt.lyapunov.verify_chain`. A file that is there is
    continued; for that its end is read, not the whole. A torn line that an earlier run left is removed first. If the file
    cannot be written, one warning is given, the sink is disabled, and training goes on.

    Args:
        path: the file; its folder is made if it is not there. Opened at the first record.

    Note:
        Survives a killed process, not a power failure: no ``fsync`` per line. One process writes one file: if another one writes
        to it too, there is one warning, and steps that do not rise are an error for readers.

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
        super().__init__(path)
        self._link = self._next = first_link()

    def begin(self) -> None:
        r"""End the file with a line break, dropping a torn line, and find the digest that the next line follows.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     sink = JSONLSink(Path(folder) / "energy.jsonl")
            ...     _ = sink.path.write_bytes(StepRecord(step=1).to_json().encode() + b'\n{"acti')
            ...     sink.begin()
            ...     [record.step for record in read_records(sink.path)], sink.path.read_bytes()[-1:]
            ([1], b'\n')
        """
        self._link = first_link()
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            if (last := _mend(file)) is not None:
                self._link = split_link(last)[1] or first_link(last)

    def line(self, record: StepRecord) -> bytes:
        r"""Return the line of a record, which follows from the last one that was written.

        Examples:
            >>> JSONLSink("energy.jsonl").line(StepRecord(step=1))[-77:-67]
            b'"chain": "'
        """
        line, self._next = add_link(record.to_json().encode("ascii"), self._link)
        return line + b"\n"

    def written(self) -> None:
        """Let the next line follow from the last one asked for.

        Examples:
            >>> sink = JSONLSink("energy.jsonl")
            >>> line = sink.line(StepRecord(step=1))
            >>> sink.line(StepRecord(step=1)) == line
            True
            >>> sink.written()
            >>> sink.line(StepRecord(step=1)) == line
            False
        """
        self._link = self._next

    def truncate(self, step: int) -> None:
        """Drop the records after a step from the file, as :func:`truncate_records` does.

        Args:
            step: the last step to keep, at least 0.

        Raises:
            ValueError: if ``step`` is negative or not an integer, or the end of the file is damaged.
            OSError: if the file cannot be written.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     sink = JSONLSink(Path(folder) / "energy.jsonl")
            ...     for step in (1, 2):
            ...         sink.write(StepRecord(step=step))
            ...     sink.truncate(1)
            ...     [record.step for record in read_records(sink.path)]
            [1]
        """
        self.close()
        truncate_records(self.path, step)


def iter_records(path: str | os.PathLike[str]) -> Iterator[StepRecord]:
    r"""Yield the records of a file in order, one line at a time, and check its chain on the way.

    Args:
        path: as for :func:`read_records`.

    Raises:
        ValueError: as :func:`read_records`, at the line that is wrong.
        OSError: if the file cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "energy.jsonl"
        ...     _ = path.write_text(StepRecord(step=1, loss=0.5).to_json() + "\n")
        ...     max(record.loss for record in iter_records(path))
        0.5
    """
    name, links, before = Path(path).name, Links(), -1
    for number, line in whole_lines(path):
        try:
            content = links.take(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number} {error}.") from None
        record = _record(content, name, number)
        if record.step <= before:
            raise ValueError(
                f"{name}, line {number} is of step {record.step}, after one of step {before}: steps must rise. "
                "Two runs wrote to one file; give each its own run_dir, or use truncate_records before resuming."
            )
        before = record.step
        yield record


def read_records(path: str | os.PathLike[str]) -> list[StepRecord]:
    r"""Return the records of a file in order; a torn last line, as a killed process leaves it, is dropped.

    Args:
        path: a file that :class:`JSONLSink` wrote, of this version or of one that did not chain its lines.

    Raises:
        ValueError: if another line is not a record, does not follow from the line before, or is not of a later step; the
            message names the line.
        OSError: if the file cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "energy.jsonl"
        ...     _ = path.write_text(StepRecord(step=1).to_json() + '\n{"action": "acc')
        ...     len(read_records(path))
        1
    """
    return list(iter_records(path))


def truncate_records(path: str | os.PathLike[str], step: int) -> int:
    r"""Drop the records after a step, so that a run resumed from there writes what an uninterrupted one would have.

    The file is cut where the first of them begins, in one operation; the lines that stay are not touched, nor read.

    Args:
        path: a file that :class:`JSONLSink` wrote; none there means there is nothing to drop.
        step: the last step to keep, at least 0.

    Returns:
        The number of records dropped (a torn last line is dropped too, and not counted).

    Raises:
        ValueError: if ``step`` is negative or not an integer, or a line is damaged that would be dropped, or the last that would
            stay; nothing is dropped then.
        OSError: if the file cannot be written.

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
    with path.open("r+b") as file:
        cut, dropped = file.seek(0, os.SEEK_END), 0
        for begin, line in _whole_lines_from_end(file):
            if _step(line, path) <= step:
                break
            cut, dropped = begin, dropped + 1
        if dropped:
            file.truncate(cut)
        _mend(file)
    return dropped


def last_step(path: str | os.PathLike[str]) -> int:
    r"""Return the step of the last whole record of a file, 0 if there is none or no file; does not read the rest.

    Args:
        path: a file that :class:`JSONLSink` wrote.

    Raises:
        ValueError: if the last line is not a record.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "energy.jsonl"
        ...     _ = path.write_text(StepRecord(step=7).to_json() + '\n{"action": "acc')
        ...     last_step(path), last_step(Path(folder) / "none.jsonl")
        (7, 0)
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return next((_step(line, path) for _, line in _whole_lines_from_end(file)), 0)
    except OSError:  # not there; or not readable, of which the sink will warn when it writes
        return 0


def _record(content: bytes, name: str, number: int) -> StepRecord:
    try:
        return StepRecord.from_json(content.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{name}, line {number} is not a step record: {error}") from error


def _step(line: bytes, path: Path) -> int:
    """Return the step of a line at the end of a file."""
    try:
        return StepRecord.from_json(split_link(line)[0].decode("utf-8")).step
    except ValueError as error:
        raise ValueError(
            f"one of the last lines of {path} is not a step record ({error}); use another run_dir, or repair the file."
        ) from error


def _whole_lines_from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield beginning and content of each line, the last first, without one that is torn."""
    lines = lines_from_end(file)
    begin, last = next(lines)
    if not is_torn(last):
        yield begin, last
    yield from lines


def _mend(file: BinaryIO) -> bytes | None:
    """End a file with a line break, dropping a torn line, and return its last line, None if it has none."""
    lines = lines_from_end(file)
    begin, last = next(lines)
    if not is_torn(last):
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
        return last
    if last:
        file.truncate(begin)
    return next(lines, (0, None))[1]
