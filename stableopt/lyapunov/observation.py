"""One step of an optimizer that is not guarded, compared before and after on the same batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.energy import Motion, direction
from stableopt.lyapunov.hooks import Closure
from stableopt.lyapunov.undisturbed import Snapshot, undisturbed
from stableopt.optim import as_loss, energy_tolerance, evaluate_again, verdict_of
from stableopt.optim.agree import Alone, Processes

__all__ = ["Observation"]

_NOT_COMPARED = Motion(math.nan, math.nan, math.nan, math.nan, "")


class Observation:
    """What is kept from before a step, and what the step then turns out to be.

    Args:
        model: its buffers are put back after the second evaluation.
        optimizer: about to step.
        closure: the user's closure, None if there is none.
        processes: those that train the model together: losses are averaged over them.
        again: whether the closure may have to be evaluated a second time.
        check: also evaluate the closure a second time before the step, to see whether it gives the same value.
        distrust: why the closure is not to be evaluated a second time; empty if it may be.
        refuse: is told each loss after its gradients are there, and says what is not finite, if it has taken the gradients away.
        failed: is called if the closure raises, before the error goes on.

    Attributes:
        refused: what ``refuse`` said of the last evaluation.
        first: buffers, modes and random numbers before the first evaluation, where a second one may follow.
        seconds: what was spent here within the step of the optimizer.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> Observation(model, optimizer, None).finish(Motion(0.0, 0.0, 0.0, 0.0, "none"))["verdict"]
        'unobserved'
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        closure: Closure | None,
        *,
        processes: Processes = Alone,
        again: bool = True,
        check: bool = False,
        distrust: str = "",
        refuse: Callable[[Any], tuple[str, ...]] | None = None,
        failed: Callable[[], None] | None = None,
    ) -> None:
        self.distrust = distrust
        self.refused: tuple[str, ...] = ()
        self._model, self._optimizer, self._closure = model, optimizer, closure
        self._failed = failed
        self._processes, self._again_too, self._check, self._refuse = processes, again, check, refuse
        self.first = Snapshot(model) if closure is not None and again else None
        self.seconds = 0.0
        self._value: Any = None
        self._loss: float | None = None
        self._mean_loss, self._loss_eps, self._noted = math.nan, 0.0, False
        self._doubt = distrust if closure is not None else "no closure was given: no second value on the same batch"

    @property
    def closure(self) -> Closure | None:
        """The closure, if it may be evaluated again: its first evaluation gave a loss."""
        return self._closure if self._noted and not self._doubt else None

    def evaluate(self) -> Any:
        """Evaluate the closure for the optimizer, and note the first value."""
        if self._closure is None:
            raise TypeError("this observation has no closure to evaluate.")
        try:
            value = self._closure()
        except BaseException:
            if self._failed is not None:
                self._failed()
            raise
        if torch.is_grad_enabled():  # without gradients it is another observer who looks again
            began = time.perf_counter()
            if not self._noted:
                self._noted = True
                self._note(value)
            if self._refuse is not None:
                self.refused = self._refuse(value)
            self.seconds += time.perf_counter() - began
        return value

    def glance(self) -> dict[str, Any]:
        """Return the loss, if no device has to be waited for, and whether it is finite."""
        if isinstance(self._value, Tensor) and self._value.device.type != "cpu":
            return {}
        loss = self.loss()
        return {"loss": loss, "nonfinite": ("loss",) if self._loss is not None and not math.isfinite(loss) else ()}

    def loss(self, told: float | None = None) -> float:
        """Return the first value of the closure, or else what was told, or NaN."""
        if self._loss is None and self._value is not None:
            self._read()
        known = self._loss if self._loss is not None else told
        return math.nan if known is None else known

    def finish(self, motion: Motion | None, told: float | None = None) -> dict[str, Any]:
        """Return the fields of the record, after the step.

        Args:
            motion: what the step moved; None where the energies are not compared at this step.
            told: the loss, where it is known from elsewhere; the one of the closure comes first.
        """
        loss = self.loss(told)
        known = self._loss is not None or told is not None
        if motion is None:
            motion, self._doubt = _NOT_COMPARED, self._doubt or "not compared at this step"
        value, doubted = self._together(motion, loss)
        loss = self._mean_loss
        facts: dict[str, Any] = {
            "loss": loss,
            "displacement": motion.displacement,
            "predicted": motion.predicted,
            "action": "unguarded",
        }
        if known and not math.isfinite(loss):
            return facts | {
                "verdict": "nonfinite",
                "reason": f"the loss before the step is {loss}",
                "nonfinite": ("loss",),
            }
        if motion is not _NOT_COMPARED and not math.isfinite(motion.displacement):
            return facts | {"verdict": "nonfinite", "reason": "the displacement is not finite"}
        if doubted or not known:
            return facts | {"verdict": "unobserved", "reason": self._doubt or "another process could not compare"}
        return facts | self._compared(motion, loss, value)

    def _together(self, motion: Motion, loss: float) -> tuple[float, bool]:
        """Evaluate the loss after the step, on all processes or on none; return its mean, and whether any process is in doubt."""
        processes = self._processes
        if processes.size == 1:
            self._mean_loss = loss
            good = math.isfinite(loss) and math.isfinite(motion.displacement)
            value = math.nan if self._doubt or not good else self._again()
            return value, bool(self._doubt)
        row = [loss, float(bool(self._doubt))]
        total, doubts = processes.total(torch.tensor(row, dtype=torch.float64)).tolist()
        self._mean_loss = total / processes.size
        if doubts or not math.isfinite(self._mean_loss) or not math.isfinite(motion.displacement):
            return math.nan, doubts > 0
        row = [self._again(), float(bool(self._doubt))]
        total, doubts = processes.total(torch.tensor(row, dtype=torch.float64)).tolist()
        return total / processes.size, doubts > 0

    def _compared(self, motion: Motion, loss: float, value: float) -> dict[str, Any]:
        sign = direction(self._optimizer)
        before, after = sign * loss + motion.before, sign * value + motion.after
        tolerance = energy_tolerance(before, after, self._eps())
        return {
            "loss_after": value,
            "energy_before": before,
            "energy_after": after,
            "dissipation": before - after,
            "tolerance": tolerance,
            "verdict": verdict_of(before, after, tolerance),
            "reason": motion.energy,
            "trials": 1,
        }

    def _note(self, value: object) -> None:
        """Take the first value of the closure, and find out whether a second one can be compared with it."""
        self._value = value.detach().clone() if isinstance(value, Tensor) else value
        if value is None:
            self._doubt = "no loss: the closure returned None"
        if not self._again_too:
            return
        if direction(self._optimizer) == 0.0:
            self._doubt = "some parameter groups maximize and some minimize: they have no common energy"
        if self._check and not self._doubt and math.isfinite(self.loss()):
            before = self.loss()
            again = self._again()
            if not self._doubt and not abs(again - before) <= math.sqrt(self._eps()) * abs(before):
                self._doubt = self.distrust = (
                    f"the closure is not repeatable ({before:.6g}, then {again:.6g} with the same parameters, buffers "
                    "and random numbers): it may draw a new batch. Draw the batch outside of it"
                )

    def _read(self) -> None:
        """Read the first value, for which a device may have to be waited for."""
        value, self._value = self._value, None
        try:
            self._loss = as_loss(value)
        except ValueError as error:
            self._doubt = f"no loss: {error}"
            return
        if isinstance(value, Tensor) and value.is_floating_point():
            self._loss_eps = torch.finfo(value.dtype).eps

    def _eps(self) -> float:
        """Return the coarsest machine epsilon of parameters and loss."""
        dtypes = {p.dtype for group in self._optimizer.param_groups for p in group["params"]}
        return max(self._loss_eps, *(torch.finfo(dtype).eps for dtype in dtypes), 0.0)

    def _again(self) -> float:
        """Evaluate the closure with the buffers and random numbers of its first evaluation, without leaving a trace."""
        if self._closure is None or self.first is None:
            return math.nan
        try:
            with undisturbed(self._model, self.first):
                return evaluate_again(self._closure, self.first.random)
        except Exception as error:  # whatever it is, the run goes on as without a monitor
            self._doubt = self.distrust = f"the closure cannot be evaluated twice: {type(error).__name__}: {error}"
            return math.nan
