"""A run in the terminal, while it trains."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
import warnings
from collections import Counter, deque
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from stableopt.lyapunov import Event, Sink, StepRecord
from stableopt.report.history import Curve, trust_band

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["LiveView", "sparkline"]

_WORDS = {"calm": "green", "aggressive": "yellow", "edge": "dark_orange", "increase": "red"}
_SHOWN = 5  # update ratios, alarms


def sparkline(values: list[float], width: int = 40, *, ascii_only: bool = False) -> str:
    """Return numbers as a row of characters, low ones low.

    Args:
        values: NaN and infinity are shown as "!"; a logarithmic scale is taken where all are above zero and span two decades.
        width: the most characters; of more values each character takes the last of its stretch, or "!" if one of it is not finite.
        ascii_only: whether to do without block characters.

    Examples:
        >>> sparkline([0.0, 1.0, 2.0, float("nan")])
        '▁▅█!'
        >>> sparkline([4.0, 0.0], ascii_only=True)
        '# '
    """
    levels = " .:-=+*#" if ascii_only else "▁▂▃▄▅▆▇█"
    if len(values) > width:
        ends = [k * len(values) // width for k in range(width + 1)]
        parts = [values[start:end] for start, end in pairwise(ends)]
        values = [part[-1] if all(map(math.isfinite, part)) else math.nan for part in parts]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "!" * len(values)
    low, high = min(finite), max(finite)
    if low > 0 and high / low > 100:
        values = [math.log(value) if math.isfinite(value) else value for value in values]
        low, high = math.log(low), math.log(high)
    top = len(levels) - 1
    span = high / 2 - low / 2 or 1.0  # halves, since the difference may be beyond the largest float
    return "".join(
        levels[min(round((value / 2 - low / 2) / span * top), top)] if math.isfinite(value) else "!" for value in values
    )


class LiveView(Sink):
    r"""Show the run in the terminal as it goes: loss, verdicts, trust ratio, edge, updates, the last alarms, the cost of watching.

    It is a sink: give it to a monitor. In a terminal a panel is redrawn in place; elsewhere one line is printed for every
    ``every`` records, and one for each alarm or action. It draws between two steps of the training, in the same thread.

    Args:
        console: where to show it, a ``rich.console.Console``; None for standard output.
        refresh: how often per second the panel is drawn at most.
        every: without a terminal: how many records there are to a line.

    Attributes:
        note: a line of your own above the numbers, such as the epoch.
        failure: why it has stopped to show anything; None as long as it works.

    Raises:
        ImportError: if rich is not installed.
        ValueError: if ``refresh`` is not above 0, or ``every`` is no integer above 0.

    Note:
        Nothing that goes wrong while it draws reaches the training: it gives one warning and shows no more.

    Examples:
        >>> import io
        >>> from rich.console import Console
        >>> view = LiveView(Console(file=io.StringIO(), width=120), every=2)
        >>> for step in (1, 2):
        ...     view.write(StepRecord(step=step, loss=1.0 / step, verdict="decreased", trust=0.9))
        >>> view.close()
        >>> view.console.file.getvalue()
        'step 2 loss 0.5 decreased 2 trust 0.9 calm\n'
    """

    def __init__(self, console: Console | None = None, *, refresh: float = 4.0, every: int = 100) -> None:
        if not refresh > 0:
            raise ValueError(f"LiveView needs refresh > 0, got {refresh!r}.")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"LiveView needs every as an integer >= 1, got {every!r}.")
        rich = _require_rich()
        self.console: Console = rich.console.Console() if console is None else console
        self.note = ""
        self.failure: Exception | None = None
        self._period, self._every = 1.0 / refresh, every
        self._live: Any = None
        self._drawn, self._count, self._step = -math.inf, 0, 0
        self._verdicts, self._actions = Counter[str](), Counter[str]()
        self._latest: dict[str, tuple[int, float]] = {}
        self._updates: tuple[int, list[tuple[str, float]]] = (0, [])
        self._events: deque[Event] = deque(maxlen=_SHOWN)
        self._alarms = 0
        self._loss = Curve(limit=80)

    def write(self, record: StepRecord) -> None:
        """Take one record, and draw if it is time."""
        if self.failure is not None:
            return
        try:
            self._take(record)
            self._show(record)
        except Exception as error:  # whatever it is, the run matters more
            self._fail(error)

    def close(self) -> None:
        """Draw for the last time and give the terminal back; may be called twice."""
        live, self._live = self._live, None
        if live is None:
            return
        try:
            live.update(self._panel(), refresh=True)
            live.stop()
        except Exception as error:
            self._fail(error)

    def __enter__(self) -> Self:
        """Return the view itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the terminal back."""
        self.close()

    def _take(self, record: StepRecord) -> None:
        self._count, self._step = self._count + 1, record.step
        self._verdicts[record.verdict] += 1
        self._actions[record.action] += 1
        self._loss.add(record.step, record.loss)
        for name in ("loss", "energy_after", "trust", "edge", "grad_norm", "overhead"):
            value = getattr(record, name)
            if not math.isnan(value) or (name == "loss" and record.nonfinite):
                self._latest[name] = (record.step, value)
        if record.update_ratio:
            first = {name: math.inf if math.isnan(ratio) else ratio for name, ratio in record.update_ratio.items()}
            largest = sorted(record.update_ratio.items(), key=lambda item: -first[item[0]])[:_SHOWN]
            self._updates = (record.step, largest)
        for event in record.events:
            self._events.append(event)
            self._alarms += event.kind == "alarm"

    def _show(self, record: StepRecord) -> None:
        if not self.console.is_terminal:
            for event in record.events:
                self._print(str(event))
            if self._count % self._every == 0:
                self._print(self._line())
            return
        now = time.monotonic()
        if now - self._drawn < self._period:
            return
        if self._live is None:
            self._live = _require_rich().live.Live(console=self.console, auto_refresh=False, transient=False)
            self._live.start()
        self._live.update(self._panel(), refresh=True)
        self._drawn = now

    def _print(self, words: str) -> None:
        self.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> str:
        """Return what is known in one line."""
        parts = [self.note] if self.note else []
        parts += [f"step {self._step}", f"loss {self._value('loss'):.4g}"]
        parts += [f"{name} {number}" for name, number in sorted(self._verdicts.items())]
        if trust := self._trust():
            parts.append(f"trust {trust[0]} {trust[1]}")
        if "edge" in self._latest:
            parts.append(f"edge {self._value('edge'):.3g}")
        if self._alarms:
            parts.append(f"alarms {self._alarms}")
        if "overhead" in self._latest:
            parts.append(f"overhead {100 * self._value('overhead'):.1f} %")
        return " ".join(parts)

    def _panel(self) -> RenderableType:
        rich = _require_rich()
        text = rich.text.Text
        table = rich.table.Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        if self.note:
            table.add_row("", text(self.note))
        table.add_row("step", text(f"{self._step}"))
        table.add_row("loss", text(f"{self._value('loss'):.4g}  {self._spark()}"))
        table.add_row("energy", text(f"{self._value('energy_after'):.4g}  {_counts(self._verdicts)}"))
        if set(self._actions) - {"unguarded"}:
            table.add_row("guard", text(_counts(self._actions)))
        if trust := self._trust():
            table.add_row("trust", text.assemble(f"{trust[0]} ", (trust[1], _WORDS[trust[1]]), self._age("trust")))
        if "edge" in self._latest:
            share = self._value("edge")
            style = "red" if share >= 1 else ""
            table.add_row("edge", text(f"{share:.3g} of the stability limit{self._age('edge')}", style=style))
        if self._updates[1]:
            table.add_row("updates", text("\n".join(f"{ratio:.1e}  {name}" for name, ratio in self._updates[1])))
        if self._events:
            words = "\n".join(_short(event) for event in self._events)
            table.add_row(f"alarms {self._alarms}", text(words, style="red"))
        if "overhead" in self._latest:
            table.add_row("monitor", text(f"{100 * self._value('overhead'):.1f} % of the time"))
        return rich.panel.Panel(table, title="stability", title_align="left", expand=False)

    def _spark(self) -> str:
        means = [math.nan if stretch.gaps else stretch.mean for stretch in self._loss.stretches]
        return sparkline(means, ascii_only=self.console.encoding.lower() != "utf-8")

    def _trust(self) -> tuple[str, str] | None:
        value = self._value("trust")
        return None if math.isnan(value) else (f"{value:.3g}", trust_band(value))

    def _value(self, name: str) -> float:
        return self._latest.get(name, (0, math.nan))[1]

    def _age(self, name: str) -> str:
        """Say at which step a number was measured, if it was not the last one."""
        step = self._latest[name][0]
        return "" if step == self._step else f" (step {step})"

    def _fail(self, error: Exception) -> None:
        """Stop showing first, warn second."""
        self.failure = error
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(Exception):
                live.stop()
        with contextlib.suppress(RuntimeWarning):  # where warnings are errors, the run goes on all the same
            warnings.warn(
                f"the live view stops ({type(error).__name__}: {error}): training goes on, and so do the other sinks.",
                RuntimeWarning,
                stacklevel=3,
            )


def _short(event: Event) -> str:
    """Return what happened without the evidence, which the record has."""
    return f"step {event.step}, {event.channel or 'policy'} ({event.action}): {event.what}"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))


def _require_rich() -> Any:
    """Import what is needed of rich.

    Raises:
        ImportError: naming the install command.
    """
    try:
        for part in ("console", "live", "panel", "table", "text"):
            importlib.import_module(f"rich.{part}")
        return importlib.import_module("rich")
    except ImportError as error:
        raise ImportError(
            f"the live view needs rich, which cannot be imported ({error}). Install it with: pip install 'stableopt[cli]'"
        ) from error
