"""Records as curves in TensorBoard, or in anything that takes scalars as it does."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.sinks.tracker import TrackerSink

__all__ = ["ScalarWriter", "TensorBoardSink"]


@runtime_checkable
class ScalarWriter(Protocol):
    """What takes one number of one step, as ``torch.utils.tensorboard.SummaryWriter`` does.

    Examples:
        >>> class Writer:
        ...     def add_scalar(self, tag, value, step): ...
        >>> isinstance(Writer(), ScalarWriter), isinstance("runs", ScalarWriter)
        (True, False)
    """

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Take the number."""
        ...


@runtime_checkable
class _TextWriter(Protocol):
    def add_text(self, tag: str, text_string: str, global_step: int, /) -> Any: ...


class TensorBoardSink(TrackerSink):
    """Draw the records in TensorBoard, under the names of :func:`~stableopt.lyapunov.scalars`.

    The reading of each event goes to the text tab (``events/<channel>``), where the writer has ``add_text``.

    Args:
        writer: an object with ``add_scalar(tag, value, step)``, which stays open; or a folder, to which a ``SummaryWriter`` of
            torch writes. It is opened at the first record, and closed with the sink.
        tables: whether to draw what there is per parameter, layer and block. A folder gets all numbers of a step in one event;
            a ``SummaryWriter`` of yours takes them one by one, which costs some 0.1 ms each.

    Raises:
        TypeError: if ``writer`` is neither.
        ImportError: if it is a folder and TensorBoard is not installed.

    Note:
        After :meth:`truncate`, TensorBoard no longer shows the later steps of the run before. A killed process loses what the
        ``SummaryWriter`` had not written yet, up to two minutes.

    Examples:
        >>> class Print:
        ...     def add_scalar(self, tag, value, step):
        ...         print(step, tag, value)
        >>> TensorBoardSink(Print()).write(StepRecord(step=3, loss=0.5, trust=0.9))
        3 loss 0.5
        3 trust/rho 0.9
    """

    def __init__(self, writer: ScalarWriter | str | os.PathLike[str], *, tables: bool = True) -> None:
        super().__init__(tables=tables)
        self._writer: Any = None
        self._folder: _Folder | None = None
        if isinstance(writer, (str, os.PathLike)):
            self._folder = _Folder(os.fspath(writer))
        elif isinstance(writer, ScalarWriter):
            self._writer = writer
        else:
            raise TypeError(
                "TensorBoardSink needs a folder, or an object with add_scalar(tag, value, step) such as "
                f"torch.utils.tensorboard.SummaryWriter, got {type(writer).__name__}."
            )

    def send(self, values: dict[str, float], record: StepRecord) -> None:
        """Add the numbers and the readings of the events.

        Examples:
            >>> class Print:
            ...     def add_scalar(self, tag, value, step):
            ...         print(step, tag, value)
            >>> TensorBoardSink(Print()).send({"loss": 0.5}, StepRecord(step=3))
            3 loss 0.5
        """
        if self._folder is not None:
            self._folder.add_scalars(values, record.step)
        else:
            for name, value in values.items():
                self._writer.add_scalar(name, value, record.step)
        writer = self._writer if self._folder is None else self._folder.writer
        if record.events and isinstance(writer, _TextWriter):
            for event in record.events:
                writer.add_text(f"events/{event.channel or event.action}", str(event), record.step)

    def truncate(self, step: int) -> None:
        """Let TensorBoard leave out what a folder holds of later steps, once the run goes on; nothing for a writer of yours.

        Args:
            step: the last step to keep, at least 0.

        Examples:
            >>> class Write:
            ...     def add_scalar(self, tag, value, step): ...
            >>> TensorBoardSink(Write()).truncate(3)
        """
        self.close()
        if self._folder is not None:
            self._folder.purge = step + 1

    def close(self) -> None:
        """Close the writer of a folder; the next record opens another."""
        if self._folder is not None:
            self._attempt("close the writer", self._folder.close)


class _Folder:
    """A ``SummaryWriter`` that is opened when it is needed, and given all numbers of a step in one event."""

    def __init__(self, path: str) -> None:
        try:
            self._open = import_module("torch.utils.tensorboard").SummaryWriter
            self._summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        except ImportError as error:
            raise ImportError(
                "TensorBoardSink writes to a folder with torch.utils.tensorboard, which needs the package tensorboard: "
                "install it (pip install tensorboard), or pass an object with add_scalar(tag, value, step)."
            ) from error
        self._path = path
        self.writer: Any = None
        self.purge: int | None = None

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        if self.writer is None:
            self.writer = self._open(self._path, max_queue=1000, purge_step=self.purge)
            self.purge = None
        value = self._summary.Value
        summary = self._summary(value=[value(tag=name, simple_value=number) for name, number in values.items()])
        self.writer.file_writer.add_summary(summary, step)

    def close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()
