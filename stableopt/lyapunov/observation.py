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
from stableopt.optim.snapshot import local, stamp

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
        graded: is called when the gradients of the first evaluation are there.

    Attributes:
        distrust: why the closure is not to be evaluated a second time in later steps either.
        failed_after: whether it could not be evaluated after this step, which may be the fault of the step.
        refused: what ``refuse`` said.
        evaluations: how often the step has evaluated the closure.
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
        graded: Callable[[], None] | None = None,
    ) -> None:
        self.distrust, self.failed_after = distrust, False
        self.refused: tuple[str, ...] = ()
        self.evaluations, self.seconds = 0, 0.0
        self._model, self._optimizer, self._closure = model, optimizer, closure
        self._failed, self._graded = failed, graded
        self._processes, self._again_too, self._check, self._refuse = processes, again, check, refuse
        self.first = Snapshot(model) if closure is not None and again else None
        self._value: Any = None
        self._loss: float | None = None
        self._mean_loss, self._loss_eps = math.nan, 0.0
        self._doubt = distrust if closure is not None else "no closure was given: no second value on the same batch"

    @property
    def closure(self) -> Closure | None:
        """The closure, if it may be evaluated again: its first evaluation gave a loss, on every process."""
        return self._closure if self.evaluations and not self._doubt else None

    @property
    def doubt(self) -> str:
        """Why nothing was compared at this step; empty if it was."""
        return self._doubt

    def instead(self) -> Closure:
        """Return what the step evaluates instead of the closure: the same, and the value is noted."""
        closure = self._closure
        if closure is None:
            raise TypeError("this observation has no closure to evaluate.")

        def watched() -> Any:
            return self._evaluate(closure)

        vars(watched)["__wrapped__"] = closure
        return watched

    def _evaluate(self, closure: Closure) -> Any:
        try:
            value = closure()
        except BaseException:
            if self._failed is not None:
                self._failed()
            raise
        if torch.is_grad_enabled():  # without gradients it is another observer who looks again
            began = time.perf_counter()
            self.evaluations += 1
            if self._graded is not None and self.evaluations == 1:
                self._graded()
            if self.evaluations == 1:
                self._note(value)
            if self._refuse is not None:
                self.refused = self._refuse(value if isinstance(value, Tensor | int | float) else None) or self.refused
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
            motion, value, doubted = _NOT_COMPARED, math.nan, True
            self._mean_loss = self._processes.mean(loss)
        else:
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
            why = (
                "not compared at this step"
                if motion is _NOT_COMPARED
                else "the closure gave no loss with gradients enabled"
            )
            return facts | {"verdict": "unobserved", "reason": self._doubt or why}
        return facts | self._compared(motion, loss, value)

    def _together(self, motion: Motion, loss: float) -> tuple[float, bool]:
        """Evaluate the loss after the step, on all processes or on none; return its mean, and whether any process is in doubt."""
        processes = self._processes
        if processes.size == 1:
            self._mean_loss = loss
            good = math.isfinite(loss) and math.isfinite(motion.displacement)
            value = math.nan if self._doubt or not good else self._again()
            return value, bool(self._doubt)
        total, doubts = processes.total(torch.tensor([loss, float(bool(self._doubt))], dtype=torch.float64)).tolist()
        self._mean_loss = total / processes.size
        if doubts or not math.isfinite(self._mean_loss) or not math.isfinite(motion.displacement):
            self._share(doubts)
            return math.nan, doubts > 0
        value = self._again()
        total, doubts = processes.total(torch.tensor([value, float(bool(self._doubt))], dtype=torch.float64)).tolist()
        self._share(doubts)
        return total / processes.size, doubts > 0

    def _share(self, doubts: float) -> None:
        """Doubt what another process doubts."""
        if doubts and not self._doubt:
            self._doubt = "another process could not compare"

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
        if not self._check:
            return
        ready = not self._doubt and math.isfinite(self.loss())
        if self._anywhere(not ready):  # all check, or none: an evaluation may have to meet those of others
            return
        if self._check_now():
            self.distrust = self._doubt
        if self._anywhere(bool(self.distrust)) and not self.distrust:
            self._doubt = self.distrust = "the closure of another process cannot be evaluated twice"

    def _anywhere(self, flag: bool) -> bool:
        """Whether it holds on any process."""
        return flag if self._processes.size == 1 else bool(self._processes.maximum(torch.tensor([float(flag)])))

    def _check_now(self) -> str:
        """Evaluate the closure again before the step, see whether it gives the same value and changes nothing, and say what not."""
        before, kept = self.loss(), _Held(self._optimizer)
        again = self._again()
        if kept.put_back():
            self._doubt = "the closure changes parameters, or gradients other than by zero_grad and backward"
        elif not self._doubt and not abs(again - before) <= math.sqrt(self._eps()) * abs(before):
            self._doubt = (
                f"the closure is not repeatable ({before:.6g}, then {again:.6g} with the same parameters, buffers "
                "and random numbers): it may draw a new batch. Draw the batch outside of it"
            )
        return self._doubt

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
        known = (torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex)
        return max(self._loss_eps, *known, 0.0)

    def _again(self) -> float:
        """Evaluate the closure with the buffers and random numbers of its first evaluation, without leaving a trace."""
        if self._closure is None or self.first is None:
            return math.nan
        try:
            with undisturbed(self._model, self.first):
                return evaluate_again(self._closure, self.first.random, must_compute=True)
        except Exception as error:  # whatever it is, the run goes on as without a monitor
            said = str(error).strip().splitlines()
            self._doubt = f"the closure cannot be evaluated twice: {type(error).__name__}: {said[0] if said else ''}"
            self.failed_after = True
            return math.nan


class _Held:
    """Parameters and gradients of an optimizer, to be put back if something changes them that should not."""

    def __init__(self, optimizer: Optimizer) -> None:
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [p.grad for p in tensors if p.grad is not None]
        self._held = [(x, local(x).detach().clone(), stamp(x)) for x in tensors if x.layout is torch.strided]

    def put_back(self) -> bool:
        """Put back what has changed, and say whether something has."""
        changed = [(x, bits) for x, bits, was in self._held if stamp(x) != was]
        for x, bits in changed:
            local(x).data.copy_(bits)  # .data: graphs of others stay valid
        return bool(changed)
