"""What the user sees while a model trains: a live bar in a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stableopt.lyapunov import StepRecord
from stableopt.report.live import LiveView

__all__ = ["LiveProgress"]


class LiveProgress:
    r"""Show epochs, loss, energy, accepted and shrunk steps, and the proved bound; use it as a context manager.

    Args:
        console: where to show it; without a terminal, one line is printed per epoch.
        epochs: how many epochs the run has in all.
        live: show the panel of :class:`~stableopt.report.live.LiveView` in place of the bar.

    Examples:
        >>> with LiveProgress(Console(file=__import__("io").StringIO()), epochs=1) as progress:
        ...     progress.epoch(0, proved=1.0, accuracy=0.97)
        ...     progress.console.file.getvalue()
        'epoch 1/1 loss nan energy nan accepted 0 shrunk 0 undone 0 bound 1.000000 accuracy 0.9700\n'
    """

    def __init__(self, console: Console, epochs: int, *, live: bool = False) -> None:
        self.console, self.epochs = console, epochs
        self._counts = {"accepted": 0, "shrunk": 0, "undone": 0}
        self._loss = self._energy = self._proved = math.nan
        columns = (
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(20),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=live or not console.is_terminal)
        self._view = LiveView(console) if live else None
        self._shown: StepRecord | None = None
        self._task = self._bar.add_task("", total=epochs, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._view is not None:
            self._view.close()

    def step(self, epoch: int, record: StepRecord) -> None:
        """Count a step: accepted, shrunk (smaller or restarted), or undone."""
        kind = {"accepted": "accepted", "unguarded": "accepted", "undone": "undone"}.get(record.action, "shrunk")
        self._counts[kind] += 1
        self._loss, self._energy = record.loss, record.energy_after
        if not self._bar.disable:
            self._bar.update(self._task, completed=epoch, text=self._text())
        if self._view is not None and record is not self._shown:
            self._view.note = self._view.note or f"epoch {epoch + 1}/{self.epochs}"
            self._view.write(record)
        self._shown = record

    def epoch(self, epoch: int, proved: float, accuracy: float) -> None:
        """Show the proved bound and the accuracy at the end of an epoch."""
        self._proved = proved
        if self._view is not None:
            self._view.note = f"epoch {epoch + 1}/{self.epochs} bound {proved:.6f} accuracy {accuracy:.4f}"
        if self._bar.disable and not (self._view is not None and self.console.is_terminal):
            line = f"epoch {epoch + 1}/{self.epochs} {self._text()} accuracy {accuracy:.4f}"
            self.console.print(line, highlight=False, soft_wrap=True)
        else:
            self._bar.update(self._task, completed=epoch + 1, text=f"{self._text()} accuracy {accuracy:.4f}")

    def _text(self) -> str:
        counts = " ".join(f"{name} {n}" for name, n in self._counts.items())
        return f"loss {self._loss:.4f} energy {self._energy:.4f} {counts} bound {self._proved:.6f}"
