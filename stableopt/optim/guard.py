r"""The guard: propose torch's own step, check the energy of its rule on the same batch, keep, shrink, restart or undo it.

A step from :math:`\theta` to :math:`\theta^+` with displacement d is accepted if

.. math:: V(\theta^+) \le V(\theta) - \sum_{groups} \frac{c}{\eta'} \|d\|_P^2 + \text{rounding},

V the energy of the rule (loss, regularizer, decay, kinetic energy of the momentum). Otherwise the learning rates of all groups
shrink jointly and the step is tried again from the same point, with V taken at the learning rates of the try; then without
momentum; then it is undone. The law of the rules says that small enough learning rates pass.

A start outside its set has infinite energy, so that any feasible point would pass. The optimizer therefore projects such a start
before it evaluates anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stableopt.optim.report import Action, StepReport, energy_tolerance, verdict_of
from stableopt.optim.rules import step_sums
from stableopt.optim.trial import RandomState, evaluate_again

if TYPE_CHECKING:
    from stableopt.optim.base import GuardedOptimizer

__all__ = ["Settings", "Snapshot", "guarded_step"]

_RESTARTS = 3
"""How many further learning rates are tried after momentum has been set to zero."""


@dataclass(frozen=True)
class Settings:
    """How the guard acts; read from the first parameter group.

    Args:
        guard: ``off``, ``monitor``, ``backtrack`` or ``strict``.
        max_shrinks: how often the learning rates may shrink within one step.
        shrink: factor of each shrinking, in (0, 1).
        grow: factor on the last scale before the first try of the next step, at least 1.
        armijo: the constant c of the decrease that is asked for, in [0, 1).

    Raises:
        ValueError: if a value is unknown or out of range.
        TypeError: if a value has the wrong type.

    Examples:
        >>> Settings(guard="never")
        Traceback (most recent call last):
        ValueError: guard must be one of off, monitor, backtrack, strict, got 'never'.
    """

    guard: str = "backtrack"
    max_shrinks: int = 10
    shrink: float = 0.5
    grow: float = 1.5
    armijo: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.guard not in {"off", "monitor", "backtrack", "strict"}:
            raise ValueError(f"guard must be one of off, monitor, backtrack, strict, got {self.guard!r}.")
        if isinstance(self.max_shrinks, bool) or not isinstance(self.max_shrinks, int) or self.max_shrinks < 0:
            raise ValueError(f"max_shrinks must be an integer >= 0, got {self.max_shrinks!r}.")
        for name, least, most in (("shrink", 0.0, 1.0), ("grow", 1.0, math.inf), ("armijo", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}.")
            if not least <= value < most or (name == "shrink" and value == 0.0):
                raise ValueError(f"{name} must lie between {least:g} and {most:g}, got {value!r}.")


class Snapshot:
    """The parameters and the state of an optimizer, to go back to.

    Args:
        optimizer: any torch optimizer; only parameters with a gradient are kept, the others do not move.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> w.grad = torch.ones(1)
        >>> optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.9)
        >>> snapshot = Snapshot(optimizer)
        >>> optimizer.step()
        >>> snapshot.restore()
        >>> w.item(), len(optimizer.state)
        (1.0, 0)
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.values = {p: p.detach().clone() for p in self.parameters}
        self.states: dict[Tensor, dict[str, Any]] = {
            p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
            for p in self.parameters
            if p in optimizer.state
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Put back every value; state tensors that existed keep their identity."""
        for p in self.parameters:
            p.copy_(self.values[p])
            if p not in self.states:
                self._optimizer.state.pop(p, None)
                continue
            state, kept = self._optimizer.state[p], self.states[p]
            for name in [k for k in state if k not in kept]:
                del state[name]
            for name, value in kept.items():
                if isinstance(value, Tensor) and isinstance(state.get(name), Tensor):
                    state[name].copy_(value)
                else:
                    state[name] = value.clone() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class _Trial:
    """One proposed step and its energies."""

    scale: float
    before: float
    after: float
    required: float
    predicted: float
    displacement: float
    tolerance: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.before, self.after, self.displacement, self.required)))

    @property
    def accepted(self) -> bool:
        return self.finite and self.after <= self.before - self.required + self.tolerance


def guarded_step(optimizer: GuardedOptimizer, closure: Callable[[], Any], settings: Settings) -> tuple[Any, StepReport]:
    """Do one step under the guard.

    Args:
        optimizer: its parameters move.
        closure: as torch asks for it; evaluated once, and once more without gradients for each trial.
        settings: what to do with a step that raises the energy.

    Returns:
        What the closure returned, and the report.

    Raises:
        ValueError: if the closure does not return one real number or None.
    """
    start = RandomState.capture()
    with torch.enable_grad():
        value = closure()
    lr = optimizer.learning_rates()
    if value is None:
        optimizer.advance()
        return value, StepReport.unobserved(
            step=optimizer.count, lr=lr, reason="the closure returned None instead of the loss"
        )
    loss = optimizer.loss_of(value)
    if settings.guard != "monitor" and not (math.isfinite(loss) and _finite_gradients(optimizer)):
        what = "the loss" if not math.isfinite(loss) else "a gradient"
        return value, _undone(optimizer, loss, f"{what} is not finite; parameters and state are as before", "nonfinite")
    snapshot = Snapshot(optimizer)
    try:
        return value, _Ladder(optimizer, closure, start, loss, _eps(optimizer, value), snapshot).climb(settings)
    except BaseException:
        snapshot.restore()
        raise


class _Ladder:
    """The trials of one step, all from the same point on the same batch."""

    def __init__(
        self,
        optimizer: GuardedOptimizer,
        closure: Callable[[], Any],
        start: RandomState,
        loss: float,
        eps: float,
        snapshot: Snapshot,
    ) -> None:
        self.optimizer, self.closure, self.start = optimizer, closure, start
        self.loss, self.eps, self.snapshot = loss, eps, snapshot
        self.trials: list[_Trial] = []

    def climb(self, settings: Settings) -> StepReport:
        """Propose, then shrink, then restart, then undo."""
        if settings.guard == "monitor":
            return self._report("accepted", self._try(1.0), "monitored: kept whatever the energy does")
        scale = first = min(1.0, settings.grow * self.optimizer.param_groups[0]["step_scale"])
        for restart in (False, True):
            for _ in range(_RESTARTS if restart else settings.max_shrinks + 1):
                trial = self._try(scale, restart=restart)
                if trial.accepted:
                    return self._passed(trial, restart=restart)
                scale *= settings.shrink
        last = self.trials[-1]
        # The next step goes on from here, so that no learning rate is too large for ever.
        self.optimizer.param_groups[0]["step_scale"] = last.scale
        if settings.guard == "backtrack" and last.finite:
            return self._report(
                "restarted", last, f"no try from scale {first:.3g} down lowered the energy; the smallest is kept"
            )
        self.snapshot.restore()
        return _undone(
            self.optimizer,
            self.loss,
            f"no try from scale {first:.3g} down lowered the energy; undone",
            "increased" if last.finite else "nonfinite",
            trial=last,
            trials=len(self.trials),
        )

    def _passed(self, trial: _Trial, *, restart: bool) -> StepReport:
        self.optimizer.param_groups[0]["step_scale"] = trial.scale
        how = "at once" if trial.scale == 1.0 else f"with learning rates scaled by {trial.scale:.3g}"
        how = f"{how} after momentum was set to zero" if restart else how
        action = "restarted" if restart else "accepted" if trial.scale == 1.0 else "shrunk"
        return self._report(action, trial, f"the step passed {how}")

    def _try(self, scale: float, *, restart: bool = False) -> _Trial:
        if self.trials:
            self.snapshot.restore()
        optimizer, values = self.optimizer, self.snapshot.values
        with optimizer.scaled_learning_rates(scale):
            if restart:
                for p in self.snapshot.parameters:
                    buffer = optimizer.rule.buffer(optimizer.state.get(p, {}))
                    if buffer is not None:
                        buffer.zero_()
            buffers = {p: self._start_buffer(p, restart) for p in self.snapshot.parameters}
            optimizer.advance()
            before, after, required, predicted, displacement = self._sums(values, buffers)
        value = evaluate_again(self.closure, self.start) * optimizer.sign if math.isfinite(displacement) else math.inf
        before, after = before + optimizer.sign * self.loss, after + value
        armijo = optimizer.param_groups[0]["armijo"]
        tolerance = energy_tolerance(before, after, self.eps) if math.isfinite(before) and math.isfinite(after) else 0.0
        trial = _Trial(scale, before, after, armijo * required, predicted, math.sqrt(displacement), tolerance)
        self.trials.append(trial)
        return trial

    def _start_buffer(self, p: Tensor, restart: bool) -> Tensor | None:
        buffer = self.optimizer.rule.buffer(self.snapshot.states.get(p, {}))
        return torch.zeros_like(buffer) if restart and buffer is not None else buffer

    def _sums(self, values: dict[Tensor, Tensor], buffers: dict[Tensor, Tensor | None]) -> list[float]:
        r"""Return energy before and after (without the loss), |d|²_P/η', (1-β)|d|²_P/η', |d|², with one wait for the device."""
        rule, state = self.optimizer.rule, self.optimizer.state
        device = self.snapshot.parameters[0].device if self.snapshot.parameters else torch.device("cpu")
        sums = [
            x.to(device, torch.float64)
            for group, p in self._moved()
            for x in step_sums(rule, group, values[p], buffers[p], p.detach(), state.get(p, {}))
        ]
        if not sums:
            return [0.0] * 5
        return torch.stack(sums).view(-1, 5).sum(0).tolist()

    def _moved(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p in self.snapshot.values:
                    yield group, p

    def _report(self, action: Action, trial: _Trial, reason: str) -> StepReport:
        return StepReport(
            step=self.optimizer.count,
            action=action,
            verdict=verdict_of(trial.before, trial.after, trial.tolerance)
            if math.isfinite(trial.displacement)
            else "nonfinite",
            loss=self.loss,
            energy_before=trial.before,
            energy_after=trial.after,
            dissipation=trial.before - trial.after,
            predicted=trial.predicted,
            required=trial.required,
            tolerance=trial.tolerance,
            displacement=trial.displacement,
            scale=trial.scale,
            trials=len(self.trials),
            lr=tuple(lr * trial.scale for lr in self.optimizer.learning_rates()),
            reason=reason,
        )


def _undone(
    optimizer: GuardedOptimizer, loss: float, reason: str, verdict: str, *, trial: _Trial | None = None, trials: int = 0
) -> StepReport:
    """Report a step that was not taken: nothing moved, so its energy is that of before."""
    before = trial.before if trial is not None else math.nan
    return StepReport(
        step=optimizer.count,
        action="undone",
        verdict="nonfinite" if verdict == "nonfinite" else "undecided",
        loss=loss,
        energy_before=before,
        energy_after=before,
        dissipation=0.0 if math.isfinite(before) else math.nan,
        predicted=0.0,
        required=0.0,
        tolerance=trial.tolerance if trial is not None else math.nan,
        displacement=0.0,
        scale=0.0,
        trials=trials,
        lr=tuple(0.0 for _ in optimizer.param_groups),
        reason=reason,
    )


def _finite_gradients(optimizer: GuardedOptimizer) -> bool:
    """Look at all gradients with one wait for the device."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return True
    dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
    sums = [(torch.view_as_real(g) if g.is_complex() else g).sum(dtype=torch.float64) for g in dense]
    total = float(torch.stack([s.to(sums[0].device) for s in sums]).sum())
    if math.isfinite(total):  # a sum keeps every NaN and infinity
        return True
    return all(bool(g.isfinite().all()) for g in dense)  # finite numbers, too, may have an infinite sum


def _eps(optimizer: GuardedOptimizer, value: Any) -> float:
    """Return the machine epsilon of the coarsest dtype in sight: of the loss and of the parameters."""
    dtypes = {p.dtype for group in optimizer.param_groups for p in group["params"]}
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        dtypes.add(value.dtype)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@contextmanager
def scaled(groups: list[dict[str, Any]], scale: float) -> Iterator[None]:
    """Multiply the learning rates of all groups inside the context; afterwards the very same objects are back.

    Examples:
        >>> group = {"lr": 0.5}
        >>> with scaled([group], 0.5):
        ...     group["lr"]
        0.25
        >>> group["lr"]
        0.5
    """
    kept = [group["lr"] for group in groups]
    try:
        if scale != 1.0:
            for group in groups:
                group["lr"] = group["lr"] * scale
        yield
    finally:
        for group, lr in zip(groups, kept, strict=True):
            group["lr"] = lr
