"""One step of an optimizer that is not guarded, compared before and after on the same batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.energy import Start, direction
from stableopt.lyapunov.undisturbed import Snapshot, undisturbed
from stableopt.optim import as_loss, energy_tolerance, evaluate_again, verdict_of

__all__ = ["Observation"]

Closure = Callable[[], Any]


class Observation:
    """What is kept from before a step, and what the step then turns out to be.

    Args:
        model: its buffers are put back after the second evaluation.
        optimizer: about to step.
        closure: the user's closure, None if there is none.
        check: also evaluate the closure a second time before the step, to see whether it gives the same value.
        distrust: why the closure is not to be evaluated a second time; empty if it may be.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> Observation(model, optimizer, None).finish()["verdict"]
        'unobserved'
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        closure: Closure | None,
        *,
        check: bool = False,
        distrust: str = "",
    ) -> None:
        self.distrust = distrust
        self._model, self._optimizer, self._closure, self._check = model, optimizer, closure, check
        self._start = Start(optimizer)
        self._first = None if closure is None else Snapshot(model)
        self._loss: float | None = None
        self._eps = max((torch.finfo(p.dtype).eps for g in optimizer.param_groups for p in g["params"]), default=0.0)
        self._noted = False
        self._doubt = distrust if closure is not None else "no closure was given: no second value on the same batch"

    def evaluate(self) -> Any:
        """Evaluate the closure for the optimizer, and note the first value."""
        if self._closure is None:
            raise TypeError("this observation has no closure to evaluate.")
        value = self._closure()
        if not self._noted and torch.is_grad_enabled():  # without gradients it is another observer who looks again
            self._noted = True
            self._note(value)
        return value

    def finish(self, told: float | None = None) -> dict[str, Any]:
        """Return the fields of the record, after the step.

        Args:
            told: the loss, where it is known from elsewhere; the one of the closure comes first.
        """
        loss = told if self._loss is None else self._loss
        motion = self._start.motion()
        facts: dict[str, Any] = {
            "loss": math.nan if loss is None else loss,
            "displacement": motion.displacement,
            "predicted": motion.predicted,
            "action": "unguarded",
        }
        if loss is not None and not math.isfinite(loss):
            return facts | {"verdict": "nonfinite", "reason": f"the loss before the step is {loss}"}
        if not math.isfinite(motion.displacement):
            return facts | {"verdict": "nonfinite", "reason": "the displacement is not finite"}
        value = math.nan if self._doubt else self._again()
        if self._doubt or loss is None:
            return facts | {"verdict": "unobserved", "reason": self._doubt}
        sign = direction(self._optimizer)
        before, after = sign * loss + motion.before, sign * value + motion.after
        tolerance = energy_tolerance(before, after, self._eps)
        return facts | {
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
        try:
            self._loss = as_loss(value.detach() if isinstance(value, Tensor) else value)
        except ValueError as error:
            self._doubt = f"no loss: {error}"
            return
        if isinstance(value, Tensor) and value.is_floating_point():
            self._eps = max(self._eps, torch.finfo(value.dtype).eps)
        if direction(self._optimizer) == 0.0:
            self._doubt = "some parameter groups maximize and some minimize: they have no common energy"
        if self._check and not self._doubt and math.isfinite(self._loss):
            again = self._again()
            if not self._doubt and not abs(again - self._loss) <= math.sqrt(self._eps) * abs(self._loss):
                self._doubt = self.distrust = (
                    f"the closure is not repeatable ({self._loss:.6g}, then {again:.6g} with the same parameters, buffers "
                    "and random numbers): it may draw a new batch. Draw the batch outside of it"
                )

    def _again(self) -> float:
        """Evaluate the closure with the buffers and random numbers of its first evaluation, without leaving a trace."""
        if self._closure is None or self._first is None:
            return math.nan
        try:
            with undisturbed(self._model, self._first):
                return evaluate_again(self._closure, self._first.random)
        except Exception as error:  # whatever it is, the run goes on as without a monitor
            self._doubt = self.distrust = f"the closure cannot be evaluated twice: {type(error).__name__}: {error}"
            return math.nan
