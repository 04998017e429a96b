"""Everything that a training is at one moment, but for its gradients."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from stableopt.lyapunov.lengths import norms, read
from stableopt.lyapunov.policies.refusal import nonfinite_names
from stableopt.nn.sharded import reshard
from stableopt.optim import RandomState
from stableopt.optim.agree import Alone, Processes
from stableopt.optim.snapshot import OF_SCHEDULERS, OF_THE_GUARD, Copies, Plan, Snapshot, local, same_kind

__all__ = ["Moment", "Soundness", "Still"]


class Moment:
    """The values of modules and optimizers at one step, the states of other objects, and the random states.

    Args:
        modules: whose parameters and buffers are kept; of the first one, those that do not move are not.
        optimizers: with their state and the numbers of their groups.
        others: objects with ``state_dict`` and ``load_state_dict``.

    Attributes:
        step: at which it was taken.
        others: pairs of an object and a copy of its state.
        random: the random states.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> moment = Moment([model], [optimizer], [])
        >>> moment.take(3, Still(model, [optimizer]))
        >>> moment.step, moment.refusal()
        (3, '')
    """

    def __init__(self, modules: Sequence[nn.Module], optimizers: Sequence[Optimizer], others: Sequence[Any]) -> None:
        self.modules, self.optimizers, self._things = modules, optimizers, others
        self._snapshots: list[Snapshot] = []
        self._tensors = _Tensors()
        self.step, self.others, self.random = 0, [], RandomState.capture()

    def take(self, step: int, still: Still) -> None:
        """Keep what is there now, in the memory that there is.

        Args:
            step: its number.
            still: knows the parameters that do not move.
        """
        for module in self.modules:
            reshard(module)  # while weights are gathered, the modules have other tensors than the optimizer
        if self._snapshots:
            for snapshot in self._snapshots:
                snapshot.take()
        else:
            self._snapshots = [
                Snapshot(o, everything=True, gradients=False, numbers=OF_THE_GUARD | self._of_schedulers(o))
                for o in self.optimizers
            ]
        self._tensors.take(self.modules, {p for s in self._snapshots for p in s.parameters}, still)
        self.others = [(thing, copy.deepcopy(thing.state_dict())) for thing in self._things]
        self.step, self.random = step, RandomState.capture()

    def refusal(self) -> str:
        """Say why it cannot be put back; empty if it can.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters())
            >>> moment = Moment([model], [optimizer], [])
            >>> moment.take(1, Still(model, [optimizer]))
            >>> model.weight = nn.Parameter(torch.ones(1, 1))
            >>> moment.refusal()
            "the parameter 'weight' of the model is another object than it was"
        """
        for module in self.modules:
            reshard(module)  # and so that its next forward map gathers what is put back
        return next(filter(None, (s.refusal() for s in self._snapshots)), "") or self._tensors.refusal()

    def plan(self) -> Plan:
        """Plan to put back all tensors and numbers; random states and other objects are left to the caller.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters())
            >>> moment = Moment([model], [optimizer], [])
            >>> moment.take(1, Still(model, [optimizer]))
            >>> _ = model.weight.data.fill_(7.0)
            >>> moment.plan().carry_out()
            >>> model.weight.item() == 7.0
            False
        """
        plan = Plan()
        for snapshot in self._snapshots:
            snapshot.plan(plan)
        self._tensors.plan(plan)
        return plan

    def plan_also(self) -> Plan:
        """Plan to put back all modules and optimizers but the first, and the numbers of the groups of the first optimizer.

        Examples:
            >>> model, average = nn.Linear(1, 1), nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters())
            >>> moment = Moment([model, average], [optimizer], [])
            >>> moment.take(1, Still(model, [optimizer]))
            >>> _ = model.weight.data.fill_(7.0), average.weight.data.fill_(7.0)
            >>> moment.plan_also().carry_out()
            >>> model.weight.item() == 7.0, average.weight.item() == 7.0
            (True, False)
        """
        plan = Plan()
        for snapshot in self._snapshots[1:]:
            snapshot.plan(plan)
        for snapshot in self._snapshots[:1]:
            snapshot.plan_groups(plan)
        for module in self.modules[1:]:
            reshard(module)
        mine = {*self.modules[0].modules()}
        self._tensors.plan(plan, {m for module in self.modules[1:] for m in module.modules()} - mine)
        return plan

    def _of_schedulers(self, optimizer: Optimizer) -> frozenset[str]:
        """Return the numbers of the groups that are kept because a scheduler is kept that goes on from them."""
        scheduled = any(getattr(thing, "optimizer", None) is optimizer for thing in self._things)
        return OF_SCHEDULERS if scheduled else frozenset()


class Soundness:
    """Whether the parameters and buffers of a model are finite, apart from those that were not when this was made: a mask, perhaps.

    Args:
        model: of which they are.
        processes: that look together.

    Examples:
        >>> from stableopt.optim.agree import Alone
        >>> norm = nn.BatchNorm1d(2)
        >>> norm.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        >>> soundness = Soundness(norm, Alone)
        >>> before, _ = soundness.holds(), norm(torch.full((2, 2), torch.nan))
        >>> before, soundness.holds()
        (True, False)
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        self._model, self._processes = model, processes
        self._never = frozenset(nonfinite_names(self._tensors(), Alone))

    def holds(self) -> bool:
        """Look, with one wait for the device; the same answer on all processes.

        Examples:
            >>> from stableopt.optim.agree import Alone
            >>> Soundness(nn.Linear(1, 1), Alone).holds()
            True
        """
        found = {name: None if name in self._never else x for name, x in self._tensors().items()}
        return not nonfinite_names(found, self._processes)

    def _tensors(self) -> dict[str, Tensor | None]:
        both = (*self._model.named_parameters(), *self._model.named_buffers())
        return {name: x if not is_lazy(x) and _has_norm(x) else None for name, x in both}


class Still:
    """Parameters of a model that nobody is known to move: they need no gradient and are in no optimizer.

    Args:
        model: of which they are.
        optimizers: that move others.
        moving: modules whose parameters are taken to move.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> _ = model.weight.requires_grad_(False)
        >>> still = Still(model, [torch.optim.SGD([model.bias])])
        >>> model.weight in still.find(), model.weight in still.find()
        (True, True)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> still.find()
        {}
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], moving: Sequence[nn.Module] = ()) -> None:
        self._model, self._optimizers, self._moving = model, optimizers, moving
        self._norms: dict[Tensor, float] = {}
        self._moved: set[Tensor] = set()

    def find(self) -> dict[Tensor, float]:
        """Return those that have had the same norm at every look so far, with their norms."""
        held = {p for o in self._optimizers for group in o.param_groups for p in group["params"]}
        held |= {p for module in self._moving for p in module.parameters()}
        quiet = [p for p in self._model.parameters() if not p.requires_grad and p not in held and p not in self._moved]
        now = _norms(quiet)
        self._moved |= {p for p, norm in now.items() if self._norms.get(p, norm) != norm}
        self._norms = now
        return {p: norm for p, norm in now.items() if p not in self._moved}


class _Tensors:
    """The parameters of modules that no optimizer has, and the buffers, at one moment."""

    def __init__(self) -> None:
        self._values: dict[Any, Tensor] = {}
        self._objects: dict[tuple[nn.Module, str], weakref.ref[Tensor]] = {}
        self._parameters: list[tuple[str, nn.Module, str, Tensor | None]] = []
        self._buffers: list[tuple[str, nn.Module, str, Tensor | None]] = []
        self._still: dict[Tensor, float] = {}

    @torch.no_grad()
    def take(self, modules: Sequence[nn.Module], held: set[Tensor], still: Still) -> None:
        """Keep the values, but for those that an optimizer's snapshot has, and those that do not move."""
        copies, old, self._still = Copies(), self._values, still.find()
        parts = [
            (f"{name}.{key}", m, key) for owner in modules for name, m in owner.named_modules() for key in _keys(m)
        ]
        self._parameters = [(name, m, key, m._parameters[key]) for name, m, key in parts if key in m._parameters]  # noqa: SLF001
        self._buffers = [(name, m, key, m._buffers[key]) for name, m, key in parts if key in m._buffers]  # noqa: SLF001
        self._values, self._objects = {}, {}
        for _, _, _, p in self._parameters:
            if p is not None and p not in held and p not in self._still and p not in self._values:
                self._values[p] = copies.of(p.detach(), old.get(p))
        for _, module, key, buffer in self._buffers:
            if buffer is not None:  # one that is assigned anew in each step is another object each time
                self._values[module, key] = copies.of(buffer.detach(), old.get((module, key)))
                self._objects[module, key] = weakref.ref(buffer)
        copies.run()

    def refusal(self) -> str:
        """Say why the values cannot be put back; empty if they can."""
        for name, module, key, p in self._parameters:
            now = module._parameters.get(key)  # noqa: SLF001
            if now is not p:
                return f"the parameter {name.strip('.')!r} of the model is another object than it was"
            if p is not None and p in self._values and not same_kind(p, self._values[p]):
                return f"the parameter {name.strip('.')!r} of the model has another shape, dtype or device than it had"
        changed = [p for p, norm in _norms(self._still).items() if norm != self._still[p]]
        name = next((name for name, _, _, p in self._parameters if any(p is q for q in changed)), "")
        if changed:
            return (
                f"the parameter {name.strip('.')!r} needs no gradient and is in no optimizer, and yet has changed since; "
                "name the module that it belongs to in also="
            )
        return ""

    def plan(self, plan: Plan, among: Collection[nn.Module] | None = None) -> None:
        """Plan to put back the values, of all modules or of those ``among`` them."""
        for p in {
            p for _, m, _, p in self._parameters if p is not None and (among is None or m in among)
        } & self._values.keys():
            plan.into(p, self._values[p])
        for _, module, key, buffer in self._buffers:
            if among is not None and module not in among:
                continue
            if buffer is None:
                plan.put(module._buffers, key, None)  # noqa: SLF001
            else:
                plan.fill(module._buffers, key, self._values[module, key], self._objects[module, key]())  # noqa: SLF001


def _keys(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers]  # noqa: SLF001 - named_parameters would leave out shared ones


def _has_norm(x: Tensor) -> bool:
    return (x.is_floating_point() or x.is_complex()) and torch.finfo(x.dtype).bits >= 16


@torch.no_grad()
def _norms(tensors: Iterable[Tensor]) -> dict[Tensor, float]:
    """Return the norms of the parts that this process holds, with one wait for the device; numbers of 8 bits have none."""
    wide = [x for x in tensors if _has_norm(x)]
    if not wide:
        return {}
    return dict(zip(wide, read(norms(local(x) for x in wide)), strict=True))
