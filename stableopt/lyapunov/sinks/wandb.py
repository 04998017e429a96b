"""Records as curves in Weights & Biases, or in anything that logs as it does."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.sinks.tracker import TrackerSink

__all__ = ["WandbSink", "ScalarLog"]


@runtime_checkable
class ScalarLog(Protocol):
    """What takes the numbers of one step together, as a run of W&B does.

    Examples:
        >>> class Log:
        ...     def log(self, data, step=None): ...
        >>> isinstance(Log(), ScalarLog), isinstance({}, ScalarLog)
        (True, False)
    """

    def log(self, data: dict[str, Any], /, *, step: int) -> Any:
        """Take the numbers."""
        ...


class WandbSink(TrackerSink):
    """Log the records to Weights & Biases, under the names of :func:`~stableopt.lyapunov.scalars`.

    Args:
        run: an object with ``log(data, step=...)``, which stays open; None starts a run of its own at the first record, which
            :meth:`close` finishes.
        tables: whether to log what there is per parameter, layer and block.
        **init: for ``wandb.init``, where the run is its own. Without ``mode`` the run is offline: it is written to a folder,
            and nothing leaves the machine until you call ``wandb sync``.

    Raises:
        TypeError: if ``run`` has no ``log``, or there are both a run and arguments to start one.
        ImportError: if there is no run and W&B is not installed.

    Note:
        The step of the log is the step of the record. W&B drops what comes with a step before the last, so give a run that you
        log to yourself the same steps; and it takes nothing back, so the steps of a resumed run show when they are new.
        A record after :meth:`close` starts another run.

    Examples:
        >>> class Print:
        ...     def log(self, data, step):
        ...         print(step, data)
        >>> WandbSink(Print()).write(StepRecord(step=3, loss=0.5, trust=0.9))
        3 {'loss': 0.5, 'trust/rho': 0.9}
    """

    def __init__(self, run: ScalarLog | None = None, *, tables: bool = True, **init: Any) -> None:
        super().__init__(tables=tables)
        if run is None:
            self._init, self._arguments = _wandb_init(), {"mode": "offline", **init}
        elif not isinstance(run, ScalarLog):
            raise TypeError(f"WandbSink needs a run with log(data, step=...), or None, got {type(run).__name__}.")
        elif init:
            raise TypeError(f"WandbSink starts no run when it is given one; got a run and {', '.join(sorted(init))}.")
        self._run: Any = run
        self._own = run is None

    def send(self, values: dict[str, float], record: StepRecord) -> None:
        """Log the numbers of one step.

        Examples:
            >>> class Print:
            ...     def log(self, data, step):
            ...         print(step, data)
            >>> WandbSink(Print()).send({"loss": 0.5}, StepRecord(step=3))
            3 {'loss': 0.5}
        """
        if self._run is None:
            self._run = self._init(**self._arguments)
        self._run.log(values, step=record.step)

    def close(self) -> None:
        """Finish a run of its own."""
        if self._own and self._run is not None:
            run, self._run = self._run, None
            self._attempt("finish the run", run.finish)


def _wandb_init() -> Any:
    try:
        return import_module("wandb").init
    except ImportError as error:
        raise ImportError(
            "WandbSink starts a run with the package wandb: install it (pip install wandb), or pass an object with "
            "log(data, step=...)."
        ) from error
