"""A learning-rate scheduler that keeps an optimizer below its measured stability limit."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stableopt.errors import StabilityError
from stableopt.optim.agree import Processes
from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.limits import check_fraction, known_limits
from stableopt.optim.sharpness import Sharpness, SharpnessReading

__all__ = ["EdgeLR", "OverLimit"]

OverLimit: TypeAlias = Literal["clip", "warn", "raise"]


class EdgeLR(LRScheduler):
    r"""Cap the learning rates of all groups, jointly, at a fraction of the measured stability limit; never raise them.

    Every ``every`` steps of the scheduler the sharpness is measured in the metric of the optimizer
    (:class:`stableopt.optim.Sharpness`). In each step the learning rates that ``scheduler`` asks for are multiplied by the largest
    :math:`s \le 1` with

    .. math:: v^\top H v \le \text{fraction} \cdot \sum_g \ell_g(s\eta_g)\,\|v_g\|_P^2,

    v the sharpest direction and :math:`\ell_g` the limit of group g. The wrapped scheduler never sees the cap: it finds the
    learning rates that it left, so recursive and closed-form schedules go on as if there were none.

    Args:
        optimizer: one of ours, of torch's, or of schedulefree.
        loss: returns the loss with its graph (forward only), or a :class:`stableopt.optim.Sharpness` of this optimizer.
        fraction: of the limit, in (0, 1].
        every: steps of the scheduler between two measurements, >= 1.
        scheduler: a scheduler of the same optimizer, made before this one and stepped by it alone; None keeps the learning rates of
            the groups, and what others write there.
        over_limit: ``clip`` caps; ``warn`` leaves the learning rates and warns after each measurement that finds them beyond;
            ``raise`` raises.

    Attributes:
        reading: the last :class:`stableopt.optim.SharpnessReading`; None before the first.
        scale: s of the last step.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, belongs to another optimizer, or nothing is known about the optimizer.
        StabilityError: with ``over_limit="raise"``, also from :meth:`step`; everything is then as before the step.

    Note:
        The loss is evaluated once when the scheduler is made, so that already the first step is capped. Where that gives no reading
        (an adaptive optimizer has no metric before its first step), each step tries again. The sharpness is estimated from below:
        the cap is no guarantee, which only a guard gives. In several processes the mean over those decides with which the
        optimizer decides (:meth:`GuardedOptimizer.decide_with`, for others all), the same on each.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> scheduler = EdgeLR(optimizer, lambda: 0.5 * (torch.tensor([10.0, 1.0]) * w**2).sum(), fraction=0.5)
        >>> round(scheduler.get_last_lr()[0], 4)  # half of 2 / 10
        0.1
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss: Callable[[], Tensor] | Sharpness,
        fraction: float = 0.9,
        every: int = 20,
        scheduler: LRScheduler | None = None,
        over_limit: OverLimit = "clip",
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every!r}.")
        if over_limit not in {"clip", "warn", "raise"}:
            raise ValueError(f"over_limit must be clip, warn or raise, got {over_limit!r}.")
        if scheduler is not None and getattr(scheduler, "optimizer", None) is not optimizer:
            raise ValueError("scheduler must be a scheduler of the same optimizer, made before this one.")
        self.sharpness = loss if isinstance(loss, Sharpness) else Sharpness(optimizer, loss)
        if self.sharpness.optimizer is not optimizer:
            raise ValueError("the Sharpness given as loss measures another optimizer.")
        self.fraction, self.every, self.scheduler = check_fraction(fraction), every, scheduler
        self.over_limit: OverLimit = over_limit
        self.reading: SharpnessReading | None = None
        self.scale = 1.0
        self._measured_at = -1
        self._scheduled: list[float] = []
        self._used: list[float] = []
        super().__init__(optimizer)

    def _initial_step(self) -> None:
        """Cap what the groups have now; torch's constructor calls this."""
        self._step_count = 1
        self.last_epoch = 0
        self._finish()

    def step(self, epoch: Any = None) -> None:
        """Let the wrapped scheduler go on, measure if it is time, and cap.

        Args:
            epoch: passed to the wrapped scheduler if not None: the epoch, or the metric of ``ReduceLROnPlateau``.

        Raises:
            StabilityError: with ``over_limit="raise"``, if a learning rate is beyond the fraction of its limit. Then, and if the
                loss fails, learning rates and both schedulers are as before.
        """
        before = self._memory()
        try:
            self._uncap()
            if self.scheduler is not None:
                self.scheduler.step() if epoch is None else self.scheduler.step(epoch)
            self._step_count += 1
            self.last_epoch += 1
            self._finish()
        except BaseException:
            self._recall(before)
            raise

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rates in use, capped."""
        return self._last_lr

    def get_scheduled_lr(self) -> list[float]:
        """Return the learning rates without the cap."""
        return list(self._scheduled)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates in use."""
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: the counts, the learning rates with and without the cap, the last reading, the wrapped scheduler."""
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "scale": self.scale,
            "measured_at": self._measured_at,
            "scheduled": list(self._scheduled),
            "used": list(self._used),
            "reading": None if self.reading is None else asdict(self.reading),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a state was saved; the learning rates of the groups are set, too. The settings stay those given here.

        Args:
            state_dict: as returned by :meth:`state_dict`.

        Raises:
            ValueError: if the number of groups differs, or one has a wrapped scheduler and the other has none.
        """
        groups = self.optimizer.param_groups
        if len(state_dict["used"]) != len(groups):
            raise ValueError(f"the state has {len(state_dict['used'])} groups, the optimizer {len(groups)}.")
        if (state_dict["scheduler"] is None) != (self.scheduler is None):
            raise ValueError("the state and this scheduler must both wrap a scheduler or both none.")
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["scheduler"])
        self._step_count, self.last_epoch = state_dict["step_count"], state_dict["last_epoch"]
        self.scale, self._measured_at = state_dict["scale"], state_dict["measured_at"]
        reading = state_dict["reading"]
        self.reading = reading and SharpnessReading(**(reading | {"weights": tuple(reading["weights"])}))
        self._scheduled, self._used = list(state_dict["scheduled"]), list(state_dict["used"])
        for group, lr in zip(groups, self._used, strict=True):
            _set_lr(group, lr)
        self._last_lr = [_copied(group["lr"]) for group in groups]

    def _finish(self) -> None:
        """Read what is scheduled, measure if due, cap."""
        groups = self.optimizer.param_groups
        self._scheduled = [float(group["lr"]) for group in groups]
        due = self.reading is None or not self.reading.measured or self.last_epoch - self._measured_at >= self.every
        if due:
            self.reading = self._measure()
            self._measured_at = self.last_epoch
        self.scale = self._largest_scale()
        if self.scale < 1.0:
            self._beyond(new=due)
        self._used = []
        for group, lr in zip(groups, self._scheduled, strict=True):
            if self.scale < 1.0:
                _set_lr(group, self.scale * lr)
            self._used.append(float(group["lr"]))
        self._last_lr = [_copied(group["lr"]) for group in groups]

    def _measure(self) -> SharpnessReading:
        """Measure; where the decay alone makes the update unstable, at the learning rates at which it does not."""
        reading = self.reading = self._agreed(self.sharpness.measure())
        if reading.measured or reading.edge != math.inf:
            return reading
        kept = [_copied(group["lr"]) for group in self.optimizer.param_groups]
        scale = self._largest_scale()
        try:
            for group, lr in zip(self.optimizer.param_groups, self._scheduled, strict=True):
                _set_lr(group, scale * lr)
            again = self._agreed(self.sharpness.measure())
        finally:
            for group, lr in zip(self.optimizer.param_groups, kept, strict=True):
                _set_lr(group, float(lr))
        return again if again.measured else reading

    def _beyond(self, *, new: bool) -> None:
        if self.over_limit == "raise":
            raise StabilityError(self._complaint())
        if self.over_limit == "warn":
            if new:
                warnings.warn(self._complaint(), UserWarning, stacklevel=4)
            self.scale = 1.0

    def _complaint(self) -> str:
        allowed = ", ".join(f"{self.scale * lr:.4g}" for lr in self._scheduled)
        asked = ", ".join(f"{lr:.4g}" for lr in self._scheduled)
        reading = self.reading
        if reading is None or not reading.measured:
            found = "the update is unstable at any curvature, since the weight decay overshoots"
        else:
            found = (
                f"the sharpness in the optimizer's metric is {reading.sharpness:.4g}, an estimate from below by {reading.products} "
                f"products with the Hessian at scheduler step {self._measured_at}"
            )
        return (
            f"lr {asked} exceeds {self.fraction:g} of the linear stability limit, {allowed}: {found}. "
            "Lower the lr, or let over_limit='clip' do it."
        )

    def _agreed(self, reading: SharpnessReading) -> SharpnessReading:
        """Return the mean over the processes, so that all of them use one learning rate."""
        optimizer = self.optimizer
        if isinstance(optimizer, GuardedOptimizer):  # it knows with whom it decides
            processes = optimizer.processes()
        else:
            parameter = next((p for group in optimizer.param_groups for p in group["params"]), torch.empty(0))
            processes = Processes.of("auto", parameter.device)
        if processes.size == 1:
            return reading
        weights = reading.weights or (math.nan,) * len(self.optimizer.param_groups)
        numbers = torch.tensor(
            [reading.edge, reading.sharpness, reading.plain, reading.curvature, *weights], dtype=torch.float64
        )
        edge, sharpness, plain, curvature, *weights = (processes.total(numbers) / processes.size).tolist()
        if not math.isfinite(curvature):
            return SharpnessReading.missing("at least one process has measured nothing", edge=edge)
        return SharpnessReading(
            edge, sharpness, plain, curvature, tuple(weights), reading.residual, reading.products, reading.method, reading.reason
        )  # fmt: skip

    def _largest_scale(self) -> float:
        """Return the largest s <= 1 for which the limits allow the reading."""
        if self._allowed(1.0):
            return 1.0
        edge = self._edge(1.0)
        # Limits rise at least as fast as 1 / s, so this much is allowed; with weight decay a little more is.
        low, high = (self.fraction / edge if math.isfinite(edge) else 0.0), 1.0
        for _ in range(80):
            if high - low <= 1e-12 * high:
                break
            middle = (low + high) / 2
            low, high = (middle, high) if self._allowed(middle) else (low, middle)
        if low == 0.0:
            raise StabilityError(
                "no learning rate is stable: the momentum of a group is too large; it must be below 1."
            )
        return low

    def _allowed(self, scale: float) -> bool:
        reading = self.reading
        if reading is None or not reading.measured:
            decay_alone = reading is not None and reading.edge == math.inf
            return not decay_alone or min(self._limits(scale / self.fraction)) > 0
        return self._edge(scale) <= self.fraction

    def _edge(self, scale: float) -> float:
        reading = self.reading
        if reading is None or not reading.measured:
            return math.inf
        return reading.edge_at(self._limits(scale))

    def _limits(self, scale: float) -> list[float]:
        rule = known_limits(self.optimizer)
        return [
            float(rule.limit({**group, "lr": scale * lr}))
            for group, lr in zip(self.optimizer.param_groups, self._scheduled, strict=True)
        ]

    def _uncap(self) -> None:
        """Put back what was scheduled, except where somebody has written another learning rate since."""
        for i, group in enumerate(self.optimizer.param_groups):
            if i < len(self._used) and float(group["lr"]) == self._used[i]:
                _set_lr(group, self._scheduled[i])

    def _memory(self) -> dict[str, Any]:
        own = {k: v for k, v in self.__dict__.items() if k not in {"optimizer", "scheduler", "sharpness"}}
        return {
            "own": copy.copy(own),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
            # a wrapped scheduler may change more than lr: momentum, betas
            "groups": [
                {k: _copied(v) for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups
            ],
        }

    def _recall(self, memory: dict[str, Any]) -> None:
        self.__dict__.update(memory["own"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(memory["scheduler"])
        for group, kept in zip(self.optimizer.param_groups, memory["groups"], strict=True):
            lr = kept.pop("lr")
            group.update(kept)
            _set_lr(group, float(lr))


def _set_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
