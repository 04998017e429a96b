"""What receives the records of a run, and what a file of them has in common with another."""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO

from stableopt.lyapunov.record import StepRecord

__all__ = ["FileSink", "Sink"]


class Sink(ABC):
    """Receive the records of a run, in order.

    Note:
        An exception that ``write`` raises reaches the training loop, after the step is complete: parameters and optimizer are
        those of the step that was recorded, the sinks before this one have the record, those after it do not. That is right
        for a mistake in the program. A failure of the surroundings (a full disk, a lost connection) is the sink's to catch,
        as the sinks here do: one warning, then they are disabled, and training goes on.

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

    def truncate(self, step: int) -> None:  # noqa: B027 - most receivers cannot take anything back
        """Forget the records after a step, as far as possible, because a resumed run takes them again.

        Args:
            step: the last step to keep, at least 0.

        Examples:
            >>> from stableopt.lyapunov.sinks import MemorySink
            >>> sink = MemorySink()
            >>> for step in (1, 2, 3):
            ...     sink.write(StepRecord(step=step))
            >>> sink.truncate(2)
            >>> sink.column("step")
            [1, 2]
        """

    def close(self) -> None:  # noqa: B027 - most sinks have nothing to let go of
        """Let go of files and connections; may be called twice. A record that comes after it opens them again."""


class FileSink(Sink):
    r"""Append one line per record to a file, and stop with one warning if that cannot be done.

    Each line is handed to the operating system as it is written, so a killed process leaves at most one torn line, the last.

    Args:
        path: the file; its folder is made if it is not there. Opened at the first record.

    Attributes:
        disabled: whether writing has failed; the sink then does nothing any more.

    Note:
        Survives a killed process, not a power failure: no ``fsync`` per line. One process writes one file. After an interrupt, or
        if the file has another size than this sink left it with, its end is looked at anew before the next line; if it has grown,
        so that somebody else writes to it, there is one warning.

    Examples:
        >>> import tempfile
        >>> class Losses(FileSink):
        ...     def begin(self):
        ...         pass
        ...
        ...     def line(self, record):
        ...         return f"{record.step} {record.loss}\n".encode()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = Losses(Path(folder) / "new" / "losses.txt")
        ...     sink.write(StepRecord(step=1, loss=0.5))
        ...     sink.close()
        ...     sink.path.read_text()
        '1 0.5\n'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.disabled = False
        self._file: BinaryIO | None = None
        self._size = 0  # of the file, with the last line
        self._warned = False

    @abstractmethod
    def begin(self) -> None:
        """Make the file fit to be continued; its folder is there, the file may not be. Called before it is opened."""

    @abstractmethod
    def line(self, record: StepRecord) -> bytes:
        """Return what is appended for a record, with its line break."""

    def written(self) -> None:
        """Take note that the last line asked for is in the file."""

    def write(self, record: StepRecord) -> None:
        """Append one line, or give up for good with one warning."""
        if self.disabled:
            return
        try:
            grown = self._file is not None and self._look_again(self._file)
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.begin()
                self._file = self.path.open("ab")
                self._size = os.fstat(self._file.fileno()).st_size
            line = self.line(record)
            self._file.write(line)
            self._file.flush()
            self._size += len(line)
            self.written()
        except OSError as error:
            self._disable(error)
        except BaseException:  # an interrupt: nobody knows what is in the file, so the next record begins with its end
            self._let_go()
            raise
        else:
            if grown:
                self._warn_of_another()

    def _look_again(self, file: BinaryIO) -> bool:
        """Close the file if it is not as this sink left it, and return whether it has grown."""
        status = os.fstat(file.fileno())
        if status.st_size == self._size or not stat.S_ISREG(status.st_mode):
            return False
        self._let_go()
        return status.st_size > self._size

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):
                file.close()

    def _warn_of_another(self) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"somebody else writes to {self.path} too: the records of two runs are mixed there. Give each run its own run_dir.",
            RuntimeWarning,
            stacklevel=3,
        )

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
        self._let_go()  # with the same fault once more; the descriptor is released all the same
        warnings.warn(
            f"cannot write the records of the run to {self.path} ({error}): "
            "training goes on, later steps are not written. Free the disk or choose another file.",
            RuntimeWarning,
            stacklevel=3,
        )
