"""The peers of the suite of alarms, at their defaults, called as their documentation says; what is not installed is left out.

Each looks on at the same runs. What one of them would do about its first alarm is not done: the alarm is noted, and it is not asked
again, so that the run goes on as without it and the others see the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import tempfile
from typing import Any

from tests.benchmarks.alarm_streams import Training, Watcher

__all__ = ["Peers", "installed"]

PACKAGES = {
    "arc_vigil": "arc-vigil",
    "trainpulse": "trainpulse",
    "stabilityguard": "stabilityguard",
    "arc": "arc-training",
}


def installed() -> list[str]:
    """Return the names of the peers that are here."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is not None]


class _Vigil:
    """arc-vigil: compares the weights at each step with those of its first 60."""

    def begin(self, training: Training) -> None:
        from arc_vigil import BendexMonitor  # pyright: ignore[reportMissingImports]

        self._monitor = BendexMonitor(training.model)

    def before(self, t: int) -> bool:
        return self._monitor.observe(t) is not None

    def backward(self, t: int, loss: float) -> bool:
        return False


class _Pulse:
    """trainpulse: is told the loss, the norm of the gradient and, if ``told``, the learning rate.

    Its plateau warnings and times of steps are not counted as alarms.
    """

    def __init__(self, *, told: bool) -> None:
        self._told = told

    def begin(self, training: Training) -> None:
        from trainpulse import Monitor  # pyright: ignore[reportMissingImports]

        self._monitor, self._training = Monitor(), training

    def before(self, t: int) -> bool:
        return False

    def backward(self, t: int, loss: float) -> bool:
        found = [*self._monitor.log("loss", t, loss), *self._monitor.log("grad_norm", t, self._training.grad_norm)]
        if self._told:
            found += self._monitor.log("learning_rate", t, float(self._training.watched.param_groups[0]["lr"]))
        return any(alert.detector != "plateau" and str(alert.severity.value) != "info" for alert in found)


class _Guard:
    """stabilityguard: compares the norm of the gradient of each layer with ten times its average."""

    def begin(self, training: Training) -> None:
        from stabilityguard import GuardedOptimizer  # pyright: ignore[reportMissingImports]

        self._guard = GuardedOptimizer(
            _Still(training.watched), training.model, verbose=False, log_dir=tempfile.mkdtemp()
        )

    def before(self, t: int) -> bool:
        return False

    def backward(self, t: int, loss: float) -> bool:
        self._guard.step(loss=loss)
        return bool(self._guard._total_spikes)


class _Still:
    """An optimizer that stands still, so that a wrapper around it looks without stepping."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self, closure: object = None) -> None:
        pass

    def zero_grad(self, *args: object, **kwargs: object) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}


class _Arc:
    """arc-training: its controller; an alarm is what it would roll back."""

    def begin(self, training: Training) -> None:
        import arc  # pyright: ignore[reportMissingImports]

        self._controller, self._found = arc.Controller(training.model, training.watched, verbose=False), False

        def note(action: Any, *args: object, **kwargs: object) -> Any:
            self._found, self.reason = True, str(args[0]) if args else ""
            return action

        self._controller._handle_failure = note

    def before(self, t: int) -> bool:
        return False

    def backward(self, t: int, loss: float) -> bool:
        import torch

        self._controller.step(torch.tensor(loss))
        return self._found


class Peers(Watcher):
    """All peers that are installed; an error of one of them is noted and ends its part."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}
        here = installed()
        self._peers: dict[str, Any] = {}
        if "arc-vigil" in here:
            self._peers["arc-vigil"] = _Vigil()
        if "trainpulse" in here:
            self._peers["trainpulse"] = _Pulse(told=False)
            self._peers["trainpulse, told the rate"] = _Pulse(told=True)
        if "stabilityguard" in here:
            self._peers["stabilityguard"] = _Guard()
        if "arc-training" in here:
            self._peers["arc-training"] = _Arc()
        self._errors: dict[str, str] = {}
        for name in ("stabilityguard", "arc", "arc_vigil"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def begin(self, training: Training) -> None:
        for peer in self._peers.values():
            peer.begin(training)

    def before(self, t: int) -> None:
        self._ask("before", t)

    def backward(self, t: int, loss: float) -> None:
        self._ask("backward", t, loss if math.isfinite(loss) else math.nan)

    def _ask(self, method: str, t: int, *args: float) -> None:
        """Ask each of them that has not given an alarm yet."""
        for name, peer in self._peers.items():
            if name in self._first or name in self._errors:
                continue
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    found = getattr(peer, method)(t, *args)
            except Exception as error:
                self._errors[name] = f"{type(error).__name__}: {error} (step {t})"
                continue
            if found:
                self._first[name] = t

    def alarms(self) -> dict[str, Any]:
        reasons = {
            f"reason of {name}": why for name, peer in self._peers.items() if (why := getattr(peer, "reason", ""))
        }
        return {**self._first, **reasons, **{f"error of {name}": text for name, text in self._errors.items()}}
