"""The parameters and the state of an optimizer at one moment, to go back to."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableopt.optim.copies import Copies, Numbers, Plan, copied, local, same_kind

__all__ = ["MOMENTA", "OF_SCHEDULERS", "OF_THE_GUARD", "Copies", "Plan", "Snapshot", "local", "same_kind", "stamp"]

OF_THE_GUARD = frozenset({"step_scale", "step_count", "skipped"})
"""Numbers of a group with which the guard goes on counting and scaling whether a step is undone or not."""
OF_SCHEDULERS = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"})
"""Numbers of a group that belong to the user or to a scheduler."""
_NOT_KEPT = frozenset({"params", "prox", "constraint"}) | OF_SCHEDULERS | OF_THE_GUARD
_LIMITS = frozenset({"base_momentum", "max_momentum"})
"""What a scheduler leaves in a group whose momentum it sets."""
MOMENTA = frozenset({"momentum", "betas"})
"""Numbers of a group that belong to a scheduler, too, where it has left such limits."""
_NOT_OF_THE_STEP = {"last_step", "pending", "_memory", "_process_group", "_versions", "_opt_called", "defaults"} | {
    f"_optimizer_{name}_hooks"
    for name in (
        "step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post",
    )
}  # fmt: skip
"""Attributes of the guard, of schedulers and of torch, which no step of an optimizer sets."""


def stamp(x: Tensor) -> tuple[Any, ...]:
    """Return what changes when somebody changes a tensor: in place, or its dtype or memory.

    A sharded tensor counts the changes made through it, and its part here those made to the part. torch does not count what is done
    through ``.data``.

    Examples:
        >>> x = torch.ones(2)
        >>> before = stamp(x)
        >>> _ = x.mul_(2)
        >>> stamp(x) == before
        False
    """
    with torch.no_grad():
        part = local(x)
    return x._version, part._version, part.dtype, part.data_ptr()  # noqa: SLF001 - the documented way to see a change in place


class Snapshot:
    """The parameters and the state of an optimizer, to go back to; it may be taken again, in the memory it has.

    Args:
        optimizer: any torch optimizer.
        everything: keep all parameters and gradients, all state, and what numbers and tensors there are in the groups and among the
            attributes, as an optimizer needs of which nothing is known: many write the weight decay into the gradient.
            Otherwise only what a torch optimizer changes: parameters with a gradient and their state. Lists and dictionaries
            of numbers and tensors count, too. The momentum of a group stays where a scheduler sets it, unless ``numbers``
            has the learning rate.
        gradients: keep the gradients as well, for :meth:`restore_gradients`; None for: with everything, and then :meth:`restore`
            puts them back, too.
        numbers: keys of the groups that are kept as well, of :data:`OF_THE_GUARD` and :data:`OF_SCHEDULERS`; with everything.

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

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        everything: bool = False,
        gradients: bool | None = None,
        numbers: Collection[str] = (),
    ) -> None:
        # the optimizer holds its snapshot: a weak way back frees the memory of both with the last reference to the optimizer
        self._optimizer = weakref.ref(optimizer)
        self._everything, self.with_gradients = everything, everything if gradients is None else gradients
        self._spared = _NOT_KEPT - frozenset(numbers)
        self.parameters: list[Tensor] = []
        self.values: dict[Tensor, Tensor] = {}
        self.states: dict[Any, Any] = {}
        self.gradients: dict[Tensor, Tensor] = {}
        self._objects: dict[tuple[Any, str], weakref.ref[Tensor]] = {}
        self._groups: list[tuple[dict[str, Any], Numbers]] = []
        self._attributes: Numbers | None = None
        self.take()

    @torch.no_grad()
    def take(self) -> None:
        """Keep what is there now; the memory of the last time is used again where shape, dtype and device are the same."""
        optimizer, copies = self._alive(), Copies()
        self.parameters = [
            p for group in optimizer.param_groups for p in group["params"] if self._everything or p.grad is not None
        ]
        old = self.values
        self.values = {p: copies.of(p.detach(), old.get(p)) for p in self.parameters}
        kept, self.states, self._objects = self.states, {}, {}
        keys = list(optimizer.state) if self._everything else [p for p in self.parameters if p in optimizer.state]
        for key in keys:
            before, state = kept.get(key, {}), optimizer.state[key]
            if not isinstance(state, dict):  # a number under a name, where torch has a dictionary under a parameter
                self.states[key] = copied(state)
                continue
            self._objects |= {(key, name): weakref.ref(x) for name, x in state.items() if isinstance(x, Tensor)}
            self.states[key] = {
                name: copies.of(value, before.get(name)) if isinstance(value, Tensor) else copied(value)
                for name, value in state.items()
            }
        if self.with_gradients:
            mine = self.gradients
            self.gradients = {
                p: p.grad.detach().clone()
                if p.grad.layout is not torch.strided
                else copies.of(p.grad.detach(), mine.get(p))
                for p in self.parameters
                if p.grad is not None
            }
        copies.run()
        if self._everything:
            self._groups = [(group, Numbers(group, self._spared)) for group in optimizer.param_groups]
            self._attributes = Numbers(vars(optimizer), _NOT_OF_THE_STEP)

    def restore(self) -> None:
        """Put back every value; tensors that existed keep their identity."""
        plan = Plan()
        self.plan(plan)
        plan.carry_out()
        if self._everything and self.with_gradients:
            self.restore_gradients()

    @torch.no_grad()
    def plan(self, plan: Plan) -> None:
        """Plan to put back every value but the gradients; nothing is written yet.

        Examples:
            >>> w = torch.nn.Parameter(torch.ones(1))
            >>> optimizer = torch.optim.SGD([w])
            >>> snapshot, plan = Snapshot(optimizer, everything=True), Plan()
            >>> _ = w.data.zero_()
            >>> snapshot.plan(plan)
            >>> w.item(), plan.carry_out(), w.item()
            (0.0, None, 1.0)
        """
        optimizer = self._alive()
        for p in self.parameters:
            plan.into(p, self.values[p])
        for key in [k for k in optimizer.state if k not in self.states and (self._everything or k in self.values)]:
            plan.remove(optimizer.state, key)
        for key, kept in self.states.items():
            state = optimizer.state.get(key)
            if not isinstance(kept, dict) or not isinstance(state, dict):
                plan.put(optimizer.state, key, copied(kept))
                continue
            for name in [k for k in state if k not in kept]:
                plan.remove(state, name)
            for name, value in kept.items():
                original = self._objects.get((key, name))
                plan.fill(state, name, value, None if original is None else original())
        self.plan_groups(plan)
        if self._attributes is not None:
            self._attributes.plan(plan, vars(optimizer))

    def plan_groups(self, plan: Plan) -> None:
        """Plan to put back the numbers of the groups alone.

        Examples:
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], momentum=0.5)
            >>> snapshot, plan = Snapshot(optimizer, everything=True), Plan()
            >>> optimizer.param_groups[0]["momentum"] = 0.9
            >>> snapshot.plan_groups(plan)
            >>> plan.carry_out()
            >>> optimizer.param_groups[0]["momentum"]
            0.5
        """
        for group, numbers in self._groups:
            scheduled = "lr" in self._spared and not _LIMITS.isdisjoint(group)
            numbers.plan(plan, group, MOMENTA if scheduled else ())

    def refusal(self) -> str:
        """Say why the values cannot be put back; empty if they can.

        Examples:
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = torch.optim.SGD([w])
            >>> snapshot = Snapshot(optimizer, everything=True)
            >>> optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
            >>> snapshot.refusal()
            'the optimizer SGD has other parameters or groups than it had'
        """
        optimizer = self._alive()
        parts = zip(self._groups, optimizer.param_groups, strict=False)
        now = [p for group in optimizer.param_groups for p in group["params"]]
        if self._everything and (
            len(self._groups) != len(optimizer.param_groups)
            or any(kept is not group for (kept, _), group in parts)
            or [*map(id, now)] != [*map(id, self.parameters)]
        ):
            return f"the optimizer {type(optimizer).__name__} has other parameters or groups than it had"
        for p, value in self.values.items():
            if not same_kind(p, value):
                return f"a parameter of shape {tuple(value.shape)}, {value.dtype}, on {value.device} is of another kind now"
        return ""

    @torch.no_grad()
    def restore_gradients(self) -> None:
        """Put back the gradients, into the tensors that hold them now; where there was none there is none."""
        for group in self._alive().param_groups:
            for p in group["params"]:
                value = self.gradients.get(p)
                if value is None:
                    p.grad = None
                elif p.grad is None or not same_kind(p.grad, value):
                    p.grad = value.clone()
                else:
                    p.grad.copy_(value)

    def _alive(self) -> Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the optimizer of this snapshot does not exist any more.")
        return optimizer
