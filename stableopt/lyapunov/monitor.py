"""Watch the energy of any torch optimizer step by step, without changing the run."""

from __future__ import annotations

import inspect
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from stableopt.lyapunov.norms import LayerNorms, NormEstimator
from stableopt.lyapunov.observation import Closure, Observation
from stableopt.lyapunov.record import StepRecord
from stableopt.lyapunov.sinks import JSONLSink, Sink, last_step, truncate_records
from stableopt.optim import GuardedOptimizer, StepReport, as_loss

__all__ = ["Monitor"]

_CHECKED = 3  # records at which the closure is also evaluated twice before the step


class Monitor:
    r"""Record, for each step of an optimizer, whether its energy decreased on the batch of that step.

    A stableopt optimizer hands over what its guard saw. For any other ``torch.optim.Optimizer`` that is given a closure, the
    monitor compares the energy before and after the step itself, by one more evaluation of the closure without gradients and with
    the same random numbers. Without a closure there is nothing to compare, and the verdict is "unobserved". In between, it
    estimates the operator norms of the layers.

    Parameters, buffers, gradients, optimizer state, training modes and global random states are bit for bit those of the run
    without a monitor.

    Args:
        model: the model that is trained.
        optimizer: any torch optimizer; its step hooks are used.
        run_dir: folder for ``energy.jsonl``; None writes no file. A file that is there is continued: the steps go on from its
            last one.
        every: record the steps 1, 1 + every, 1 + 2 every, …
        sinks: further receivers of the records; closed with the monitor.
        norms_every: estimate the layer norms at the first recorded step of each stretch of this many steps; None for never.
        gaps_every: prove how far the weights of methods that train with an estimate are from their limits, in the same way; None
            for never. It costs nothing for all other models.
        keep: number of last records in :attr:`records`.

    Raises:
        TypeError: if ``model`` or ``optimizer`` is of another type.
        ValueError: if a number is not a positive integer, or ``energy.jsonl`` is there and damaged.

    Note:
        The closure of an optimizer that is not guarded is evaluated once more per recorded step, three times at the first ones,
        where the monitor checks that it gives the same value again; if it does not (it draws a new batch), nothing is compared.
        What a closure changes by itself (a list it appends to, a random generator of its own) is not put back.
        A file that cannot be written costs one warning and no step. In a distributed run each process records its own batch.

    Examples:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x = torch.randn(8, 2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (model(x) - 1).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> with Monitor(model, optimizer) as monitor:
        ...     for _ in range(3):
        ...         _ = optimizer.step(closure)
        >>> [record.verdict for record in monitor.records]
        ['decreased', 'decreased', 'decreased']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        run_dir: str | os.PathLike[str] | None = None,
        *,
        every: int = 1,
        sinks: Sequence[Sink] = (),
        norms_every: int | None = 10,
        gaps_every: int | None = 100,
        keep: int = 1000,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Monitor needs a torch.nn.Module as model, got {type(model).__name__}.")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Monitor needs a torch.optim.Optimizer as optimizer, got {type(optimizer).__name__}.")
        for name, value in (
            ("every", every),
            ("norms_every", 1 if norms_every is None else norms_every),
            ("gaps_every", 1 if gaps_every is None else gaps_every),
            ("keep", keep),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Monitor needs {name} as an integer >= 1, got {value!r}.")
        self.records: deque[StepRecord] = deque(maxlen=keep)
        self.seconds = 0.0
        self._model, self._optimizer = model, optimizer
        self._every, self._norms_every, self._gaps_every = every, norms_every, gaps_every
        self._path = None if run_dir is None else Path(run_dir) / "energy.jsonl"
        self._sinks: list[Sink] = [*([] if self._path is None else [JSONLSink(self._path)]), *sinks]
        self._estimator = NormEstimator(model)
        self._step = 0 if self._path is None else last_step(self._path)
        self._taken, self._recorded, self._verdicts, self._actions = 0, 0, Counter[str](), Counter[str]()
        self._told: float | None = None
        self._distrust = ""
        self._observation: Observation | None = None
        self._report: StepReport | None = None
        self._frame: FrameType | None = None
        self._handles: list[Any] = []

    @property
    def last(self) -> StepRecord | None:
        """The last record, None before the first.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> Monitor(model, torch.optim.SGD(model.parameters())).last is None
            True
        """
        return self.records[-1] if self.records else None

    def attach(self) -> Self:
        """Begin to watch; does nothing if it does already.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters())
            >>> monitor = Monitor(model, optimizer).attach()
            >>> optimizer.step()
            >>> monitor.close()
            >>> monitor.summary()["verdicts"]
            {'unobserved': 1}
        """
        if not self._handles:
            self._handles = [
                self._optimizer.register_step_pre_hook(self._before),
                self._optimizer.register_step_post_hook(self._after),
            ]
        return self

    def close(self) -> None:
        """Stop watching and close the sinks; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        """Begin to watch."""
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching."""
        self.close()

    def observe(self, loss: object) -> None:
        """Tell the loss of the step to come, where the optimizer gets no closure.

        Args:
            loss: a number, or a tensor or array with one element; it may be NaN.

        Raises:
            ValueError: if it is anything else.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters())
            >>> with Monitor(model, optimizer) as monitor:
            ...     monitor.observe(torch.tensor(0.5))
            ...     optimizer.step()
            >>> monitor.last.loss, monitor.last.verdict
            (0.5, 'unobserved')
        """
        self._told = as_loss(loss)

    def summary(self) -> dict[str, Any]:
        """Count what happened since this monitor began.

        Returns:
            ``steps`` taken, ``records`` made, and how often each of ``verdicts`` and ``actions`` is in them. Kept as the
            run goes; needs no memory per step.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> Monitor(model, torch.optim.SGD(model.parameters())).summary()
            {'steps': 0, 'records': 0, 'verdicts': {}, 'actions': {}}
        """
        return {
            "steps": self._taken,
            "records": self._recorded,
            "verdicts": dict(sorted(self._verdicts.items())),
            "actions": dict(sorted(self._actions.items())),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to write the records of an uninterrupted one.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> Monitor(model, torch.optim.SGD(model.parameters())).state_dict()["step"]
            0
        """
        return {"step": self._step, "norms": self._estimator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; records of later steps are dropped from ``energy.jsonl``, since they are taken again.

        Args:
            state: as :meth:`state_dict` gave it, from the moment of the checkpoint of model and optimizer.

        Raises:
            ValueError: if the step is no integer >= 0, or ``energy.jsonl`` is damaged.

        Examples:
            >>> import torch
            >>> model = nn.Linear(1, 1)
            >>> monitor = Monitor(model, torch.optim.SGD(model.parameters()))
            >>> monitor.load_state_dict(monitor.state_dict())
        """
        step = state["step"]
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"the state of a Monitor needs an integer step >= 0, got {step!r}.")
        for sink in self._sinks:
            sink.close()
        if self._path is not None:
            truncate_records(self._path, step)
        self._estimator.load_state_dict(state["norms"])
        self._step = step
        self.records = deque((record for record in self.records if record.step <= step), maxlen=self.records.maxlen)

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a step: if the guard does not look, prepare to look, with a closure that also tells us the loss."""
        began = time.perf_counter()
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        if self._frame is not None and _is_within(caller, self._frame):
            return None  # an optimizer that calls the step of its base class runs the hooks twice
        self._forget()
        self._frame = caller
        self._report = optimizer.last_step if isinstance(optimizer, GuardedOptimizer) else None
        closure, put = _closure(args, kwargs)
        if self._step % self._every != 0 or (closure is not None and _guards(optimizer)):
            return None
        check = self._recorded < _CHECKED
        self._observation = Observation(self._model, optimizer, closure, check=check, distrust=self._distrust)
        self.seconds += time.perf_counter() - began
        return None if closure is None else put(self._observation.evaluate)

    def _after(self, optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        """After a step: count it, and record it if it is its turn."""
        frame = inspect.currentframe()
        if self._frame is None or frame is None or frame.f_back is not self._frame:
            return  # the step of a base class, within the step that is watched
        began = time.perf_counter()
        self._step += 1
        self._taken += 1
        observation, told = self._observation, self._told
        self._told = None
        report = optimizer.last_step if isinstance(optimizer, GuardedOptimizer) else None
        seen = None if report is self._report else report
        self._forget()
        if (self._step - 1) % self._every == 0:
            self._record(optimizer, seen, observation, told)
        self.seconds += time.perf_counter() - began

    def _record(
        self, optimizer: Optimizer, report: StepReport | None, observation: Observation | None, told: float | None
    ) -> None:
        """Make the record of this step and hand it on."""
        if observation is None:
            facts = _facts(report, told)
        else:
            facts = observation.finish(told)
            self._distrust = observation.distrust
        layers = self._estimator.measure() if self._is_time(self._norms_every) else LayerNorms()
        gaps = self._estimator.gaps() if self._is_time(self._gaps_every) else {}
        facts.setdefault("lr", tuple(float(group["lr"]) for group in optimizer.param_groups))
        record = StepRecord(
            step=self._step, norms=layers.norms, limits=layers.limits, cfl=layers.cfl, norm_gap=gaps, **facts
        )
        self.records.append(record)
        self._recorded += 1
        self._verdicts[record.verdict] += 1
        self._actions[record.action] += 1
        for sink in self._sinks:
            sink.write(record)

    def _is_time(self, interval: int | None) -> bool:
        """Whether this is the first recorded step of a stretch of so many steps."""
        return interval is not None and (self._step - 1) % interval < self._every

    def _forget(self) -> None:
        self._frame, self._report, self._observation = None, None, None


def _is_within(frame: FrameType | None, outer: FrameType) -> bool:
    """Whether ``outer`` is among the callers of ``frame``."""
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer


def _guards(optimizer: Optimizer) -> bool:
    """Whether the optimizer itself compares the energies, if it has a closure."""
    return isinstance(optimizer, GuardedOptimizer) and optimizer.param_groups[0]["guard"] != "off"


def _closure(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Closure | None, Callable[[Closure], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Return the closure among the arguments of ``step`` (the first is the optimizer), and how to put another in its place."""
    if len(args) > 1:
        return args[1], lambda closure: ((args[0], closure, *args[2:]), kwargs)
    return kwargs.get("closure"), lambda closure: (args, {**kwargs, "closure": closure})


def _facts(report: StepReport | None, told: float | None) -> dict[str, Any]:
    """Return the fields of a record that a guard's report fills."""
    if report is None:
        return {"reason": "the guard gave no report"}
    facts = {name: getattr(report, name) for name in _SHARED}
    if told is not None and math.isnan(facts["loss"]):
        facts["loss"] = told
    return facts


_SHARED = tuple({item.name for item in fields(StepReport)} & {item.name for item in fields(StepRecord)} - {"step"})
