"""Snapshots of a whole training in memory, and the way back to one: all of it or nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stableopt.lyapunov.policies.moment import Moment, Still
from stableopt.optim import GuardedOptimizer
from stableopt.optim.agree import Processes
from stableopt.optim.snapshot import MOMENTA, OF_SCHEDULERS

__all__ = ["Checkpoints", "Restoration"]


class Checkpoints:
    r"""The last k snapshots of a training, in memory, each to be put back bit for bit.

    A snapshot has the parameters and buffers of the model, the state of the optimizer and what numbers its groups have, the random
    states of torch, numpy and Python, and all of ``also``. Learning rates and what else a scheduler writes into the groups, the
    momentum too, are in it if a scheduler of this optimizer is in ``also``; else they stay what they are. The memory of the
    oldest snapshot is used for the next one: in all it is k times that of the model and of the optimizer's state.

    Args:
        model: what is trained; in several processes each keeps its own part.
        optimizer: any torch optimizer.
        also: what else belongs to the training: modules (an average of the weights), optimizers, and objects with ``state_dict``
            and ``load_state_dict`` (schedulers, a ``GradScaler``).
        k: how many snapshots to keep.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if k is no integer >= 1.

    Note:
        Parameters of the model that need no gradient and are in no optimizer are not copied, as long as their norms are found to be
        the same at each snapshot: a frozen model takes no memory here. A teacher that is moved by hand is copied from the second
        snapshot on; in ``also`` it is copied from the first.
        What a module keeps outside of its parameters and buffers is not known here, nor is a wrapped optimizer that keeps its state
        to itself: give those in ``also``.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> checkpoints = Checkpoints(model, optimizer)
        >>> checkpoints.take(1)
        >>> kept = model.weight.detach().clone()
        >>> model(torch.ones(2)).backward()
        >>> optimizer.step()
        >>> checkpoints.restore(before=1)
        1
        >>> torch.equal(model.weight, kept), len(optimizer.state)
        (True, 0)
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, also: Sequence[Any] = (), k: int = 2
    ) -> None:
        if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
            got = f"{type(model).__name__} and {type(optimizer).__name__}"
            raise TypeError(f"Checkpoints needs a torch.nn.Module and a torch.optim.Optimizer, got {got}.")
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"Checkpoints needs the number of snapshots k as an integer >= 1, got {k!r}.")
        known = {id(x): x for x in also if x is not model and x is not optimizer}
        for x in known.values():
            if not (callable(getattr(x, "state_dict", None)) and callable(getattr(x, "load_state_dict", None))):
                raise TypeError(
                    "also= takes modules, optimizers and objects with state_dict and load_state_dict, "
                    f"got {type(x).__name__}: leave it out, or give it these two methods."
                )
        self._modules = [model, *(x for x in known.values() if isinstance(x, nn.Module))]
        self._optimizers = [optimizer, *(x for x in known.values() if isinstance(x, torch.optim.Optimizer))]
        self._others = [x for x in known.values() if not isinstance(x, nn.Module | torch.optim.Optimizer)]
        self._still = Still(model, self._optimizers, self._modules[1:])
        self._k = k
        self._ring: list[Moment] = []
        self._free: list[Moment] = []

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the snapshots, oldest first.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> checkpoints = Checkpoints(model, torch.optim.SGD(model.parameters()))
            >>> for step in (1, 5, 9):
            ...     checkpoints.take(step)
            >>> checkpoints.steps
            (5, 9)
        """
        return tuple(moment.step for moment in self._ring)

    def take(self, step: int) -> None:
        """Keep what is there before a step; the oldest snapshot gives way.

        Args:
            step: number of the step that comes next, not before that of the last snapshot.

        Raises:
            ValueError: if it lies before the last snapshot.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> checkpoints = Checkpoints(model, torch.optim.SGD(model.parameters()), k=1)
            >>> checkpoints.take(3)
            >>> checkpoints.take(2)
            Traceback (most recent call last):
            ValueError: the last snapshot is of step 3, so the next is not of step 2.
        """
        if self._ring and step < self._ring[-1].step:
            raise ValueError(f"the last snapshot is of step {self._ring[-1].step}, so the next is not of step {step}.")
        if len(self._ring) == self._k:
            self._free.append(self._ring.pop(0))
        moment = self._free.pop() if self._free else Moment(self._modules, self._optimizers, self._others)
        moment.take(step, self._still)
        self._ring.append(moment)

    def newest(self, before: int) -> int | None:
        """Return the step of the newest snapshot that is not later than a step, None if there is none.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> checkpoints = Checkpoints(model, torch.optim.SGD(model.parameters()))
            >>> checkpoints.take(5)
            >>> checkpoints.newest(4), checkpoints.newest(5)
            (None, 5)
        """
        return max((step for step in self.steps if step <= before), default=None)

    def restore(self, before: int) -> int:
        """Go back to the newest snapshot that is not later than a step; later ones are dropped.

        Parameters, buffers and tensors of the state keep their identity; entries of the state that came later are gone. Gradients
        are left alone.

        Args:
            before: a step; the snapshot of a step is what there was before it.

        Returns:
            The step of the snapshot.

        Raises:
            LookupError: if there is no such snapshot.
            RuntimeError: if it does not fit what is there now; nothing has changed then.

        Examples:
            >>> norm = nn.BatchNorm1d(2)
            >>> checkpoints = Checkpoints(norm, torch.optim.SGD(norm.parameters()))
            >>> checkpoints.take(1)
            >>> _ = norm(torch.rand(4, 2))
            >>> checkpoints.restore(before=10), int(norm.num_batches_tracked)
            (1, 0)
        """
        return self.prepare(before).commit()

    def prepare(self, before: int) -> Restoration:
        """Prepare to go back, as :meth:`restore` does, and check that it is possible.

        Args:
            before: a step.

        Returns:
            What is ready to be put back, or to be left.

        Raises:
            LookupError: if there is no such snapshot.
            RuntimeError: if it does not fit what is there now; nothing has changed then.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> checkpoints = Checkpoints(model, torch.optim.SGD(model.parameters()))
            >>> checkpoints.take(5)
            >>> checkpoints.prepare(7).commit()
            5
        """
        moment = next((m for m in reversed(self._ring) if m.step <= before), None)
        if moment is None:
            kept = f"those of steps {', '.join(map(str, self.steps))}" if self._ring else "none"
            raise LookupError(f"there is no snapshot from before step {before}: kept are {kept}.")
        return Restoration(self, moment)

    def prepare_before(self, since: int, margin: int, processes: Processes) -> tuple[Restoration | None, str]:
        """Prepare to go back to before a fault, to the same step on all processes; where that is impossible, drop what is of it.

        Args:
            since: the step at which the fault has begun.
            margin: steps before it at which a snapshot is taken to be sound; the first of all is sound if anything is.
            processes: all call this together.

        Returns:
            What is ready to be put back, or None and why there is nothing.

        Examples:
            >>> from stableopt.optim.agree import Alone
            >>> model = nn.Linear(1, 1)
            >>> checkpoints = Checkpoints(model, torch.optim.SGD(model.parameters()))
            >>> checkpoints.prepare_before(7, 2, Alone)
            (None, 'no snapshot is from before step 7')
            >>> checkpoints.take(5)
            >>> checkpoints.prepare_before(7, 2, Alone)[0].commit()
            5
        """
        target = self.newest(since - margin)
        if target is None:
            target = next((first for first in self.steps[:1] if first <= since), None)
        ready, why = None, f"no snapshot is from before step {since}"
        if target is not None:
            try:
                ready = self.prepare(target)
            except RuntimeError as error:
                why = str(error)
        if processes.size > 1:
            where = 0 if target is None else target
            codes = torch.tensor([ready is None, where, -where], dtype=torch.int64)
            failed, most, least = processes.maximum(codes).tolist()
            if ready is not None and (failed or most != -least):
                ready.abandon()
                ready, why = None, "another process cannot go back to the same step"
        if ready is None:
            self.drop(after=since)
        return ready, why

    def drop(self, after: int) -> None:
        """Drop the snapshots of later steps; their memory is used again.

        Args:
            after: the last step whose snapshot is kept.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> checkpoints = Checkpoints(model, torch.optim.SGD(model.parameters()))
            >>> for step in (1, 5):
            ...     checkpoints.take(step)
            >>> checkpoints.drop(after=4)
            >>> checkpoints.steps
            (1,)
        """
        self._free += [moment for moment in self._ring if moment.step > after]
        self._ring = [moment for moment in self._ring if moment.step <= after]


class Restoration:
    """A way back that is ready: everything fits, memory is there, and objects with a ``load_state_dict`` have taken their state.

    Args:
        checkpoints: of which the snapshot is.
        moment: the snapshot.

    Raises:
        RuntimeError: if it does not fit what is there now; nothing has changed then.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> checkpoints = Checkpoints(model, torch.optim.SGD(model.parameters()))
        >>> checkpoints.take(5)
        >>> isinstance(checkpoints.prepare(5), Restoration)
        True
    """

    def __init__(self, checkpoints: Checkpoints, moment: Moment) -> None:
        self._checkpoints, self._moment = checkpoints, moment
        refusal = moment.refusal()
        if refusal:
            raise RuntimeError(
                f"cannot go back to step {moment.step}: {refusal}. Nothing has changed; a snapshot that is taken now fits again."
            )
        self._plan = moment.plan()  # all memory is there before anything is written
        self._loaded: list[tuple[Any, Any]] = []
        groups = [group for optimizer in moment.optimizers for group in optimizer.param_groups]
        self._rates = [(group, {k: group[k] for k in (OF_SCHEDULERS | MOMENTA) & group.keys()}) for group in groups]
        for thing, state in moment.others:
            try:
                self._loaded.append((thing, copy.deepcopy(thing.state_dict())))
                thing.load_state_dict(copy.deepcopy(state))  # some take entries out of it, or keep it
            except Exception as error:
                self.abandon()
                raise RuntimeError(
                    f"cannot go back to step {moment.step}: {type(thing).__name__}.load_state_dict failed with "
                    f"{type(error).__name__}: {error}. Nothing has changed; leave it out of also=, or mend it."
                ) from error

    def commit(self) -> int:
        """Put everything back, and drop the later snapshots.

        Returns:
            The step of the snapshot.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> checkpoints = Checkpoints(model, torch.optim.SGD(model.parameters()))
            >>> checkpoints.take(5)
            >>> ready = checkpoints.prepare(5)
            >>> with torch.no_grad():
            ...     _ = model.weight.fill_(torch.nan)
            >>> ready.commit(), bool(model.weight.isnan())
            (5, False)
        """
        try:
            self._write()
        except BaseException:
            self._write()  # an interruption in between leaves all of it, not a part
            raise
        self._checkpoints.drop(after=self._moment.step)
        return self._moment.step

    def repeat(self) -> None:
        """Put back once more what is in ``also`` and goes along with the steps: modules, optimizers and schedulers.

        A training loop goes on after the step that was undone and calls the scheduler, or updates an average of the weights, as
        it does after each step. Before the next step that is undone, too. Other objects are left alone: a ``GradScaler`` is in the
        middle of its own step then.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            >>> checkpoints = Checkpoints(model, optimizer, [scheduler])
            >>> checkpoints.take(1)
            >>> ready = checkpoints.prepare(1)
            >>> optimizer.step(), ready.commit(), scheduler.step()
            (None, 1, None)
            >>> ready.repeat()
            >>> scheduler.last_epoch, optimizer.param_groups[0]["lr"]
            (0, 0.5)
        """
        for thing, state in self._moment.others:
            if any(getattr(thing, "optimizer", None) is o for o in self._moment.optimizers):
                thing.load_state_dict(copy.deepcopy(state))
        self._moment.plan_also().carry_out()

    def abandon(self) -> None:
        """Leave everything as it was before this was prepared.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> checkpoints = Checkpoints(model, torch.optim.SGD(model.parameters()))
            >>> checkpoints.take(1)
            >>> checkpoints.prepare(1).abandon()
        """
        for thing, state in reversed(self._loaded):
            thing.load_state_dict(state)
        for group, rates in self._rates if self._loaded else ():  # some schedulers write into the groups at once
            group.update(rates)
        self._loaded = []

    def _write(self) -> None:
        self._plan.carry_out()
        for optimizer in self._moment.optimizers:
            if isinstance(optimizer, GuardedOptimizer):
                optimizer.drop_pending()
        self._moment.random.restore()
