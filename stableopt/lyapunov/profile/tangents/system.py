r"""Perturbations of parameters and optimizer state, pushed through the steps of a training.

One step is :math:`(\theta, u) \mapsto U(\theta, u, \nabla f(\theta))`. Its derivative along :math:`(\delta\theta, \delta u)` is the
derivative of the pure update map U at :math:`\delta g = H\delta\theta`, parameter by parameter (:func:`push`), after that of what
clips the gradient, if something does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from stableopt.constraints import Regularizer
from stableopt.constraints.sharding import is_sharded
from stableopt.lyapunov.profile.growth.factors import orthonormalize
from stableopt.lyapunov.profile.tangents.agreement import Agreement, Footprint, NotTheRuleError, copied, some
from stableopt.lyapunov.profile.tangents.clipping import Clipping
from stableopt.lyapunov.profile.tangents.formulas import Stage, has_formula, written
from stableopt.lyapunov.profile.tangents.metric import default_unit
from stableopt.lyapunov.profile.tangents.products import Gradient
from stableopt.lyapunov.profile.tangents.push import push, tangent_names
from stableopt.optim import GuardedOptimizer, UpdateRule, rule_for
from stableopt.optim.regularize import regularizer_of
from stableopt.optim.rules import RootMeanSquare
from stableopt.optim.rules.adaptive import Moments
from stableopt.optim.rules.base import State, number, real_view, unviewed

__all__ = ["PARAMETER", "Before", "System"]

PARAMETER = ""
"""The name of the parameter itself among the entries of its state."""

Column = dict[str, Tensor]
"""Perturbations of one parameter and its state: name -> ``(k, *shape)``."""


@dataclass(frozen=True)
class Entry:
    """One parameter of the optimizer, with what rules it."""

    parameter: Tensor
    group: int
    regularizer: Regularizer | None


@dataclass
class Before:
    """Where a step begins: parameters, states and hyper-parameters, all of them copies.

    Args:
        parameters: values of the parameters.
        states: of the optimizer for each parameter.
        groups: hyper-parameters of each group.
    """

    parameters: list[Tensor]
    states: list[State]
    groups: list[dict[str, Any]] = field(default_factory=list)


class System:
    """The state of a training and k perturbations of it.

    Args:
        optimizer: any with a rule (:func:`stableopt.optim.rule_for`).
        clipping: what is done to gradients between backward and step.

    Attributes:
        columns: for each parameter, its perturbations and those of its state by name, ``(k, *shape)``.
        units: (group, name) -> unit of that entry of the state, once its state is there.

    Raises:
        ValueError: if there is no rule, nothing to perturb, or a parameter is sharded or in half precision.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> system = System(torch.optim.SGD([w], lr=0.1, momentum=0.5))
        >>> system.dimension, system.stateless
        (2, False)
    """

    def __init__(self, optimizer: Optimizer, clipping: Clipping | None = None) -> None:
        self.optimizer, self.clipping = optimizer, clipping or Clipping()
        self.rule = _rule_of(optimizer)
        self.entries = [
            Entry(p, g, regularizer_of(group, i) if isinstance(optimizer, GuardedOptimizer) else None)
            for g, group in enumerate(optimizer.param_groups)
            for i, p in enumerate(group["params"])
            if p.requires_grad
        ]
        self.parameters = [entry.parameter for entry in self.entries]
        _check_parameters(self.parameters)
        self.columns: list[Column] = []
        self._left: Footprint | None = None
        self.units: dict[tuple[int, str], float] = {}

    @property
    def dimension(self) -> int:
        """The dimension of the state: that of the parameters, and of the optimizer's state where it is there."""
        names = [self.names(entry) for entry in self.entries]
        return sum(real_view(e.parameter).numel() * (1 + len(n)) for e, n in zip(self.entries, names, strict=True))

    @property
    def stateless(self) -> bool:
        """Whether the optimizer keeps no state that could be perturbed."""
        return not any(_keeps_state(self.rule, group) for group in self.optimizer.param_groups)

    @property
    def complete(self) -> bool:
        """Whether the state of the optimizer is there, or it has none: asked after a step, with its gradients."""
        keeps = [_keeps_state(self.rule, group) for group in self.optimizer.param_groups]
        return all(
            bool(self.names(entry)) or not keeps[entry.group] or entry.parameter.grad is None for entry in self.entries
        )

    def change(self) -> str:
        """Say what was changed since the last step, in one sentence without its point; empty if nothing was."""
        return "" if self._left is None else self._left.change(self.optimizer)

    def leave(self) -> None:
        """Remember where a step has left parameters and state."""
        self._left = Footprint(self.optimizer)

    def names(self, entry: Entry) -> tuple[str, ...]:
        """Return the entries of the state of a parameter that carry perturbations."""
        return tangent_names(self.rule, self._state(entry), entry.parameter)

    def begin(self, directions: int, seed: int) -> None:
        """Begin with random orthonormal perturbations, of the parameters alone while there is no state yet.

        Args:
            directions: k.
            seed: of the random numbers, drawn on the CPU.

        Raises:
            ValueError: if k is larger than the dimension.
        """
        if not 1 <= directions <= self.dimension:
            raise ValueError(
                f"directions must be from 1 to the dimension {self.dimension} of the state at its beginning, got {directions!r}."
            )
        generator = torch.Generator().manual_seed(seed)
        self.columns = []
        for entry in self.entries:
            names = (PARAMETER, *self.names(entry))
            self.columns.append({n: _drawn(directions, entry.parameter, generator) for n in names})
        self._set_units()
        self.orthonormalize(directions)

    @torch.no_grad()
    def before(self, *, hyper: bool = False) -> Before:
        """Copy the point at which a step begins: all of it where its derivative needs that, else some numbers to compare.

        Args:
            hyper: whether hyper-parameters have tangents.
        """
        parameters, states = [], []
        for entry in self.entries:
            keep = copied if hyper or not self._is_written(entry) else some
            parameters.append(keep(entry.parameter))
            states.append({name: keep(value) for name, value in self._state(entry).items()})
        groups = [{k: copied(v) for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return Before(parameters, states, groups)

    def directions(self) -> list[Tensor]:
        """Return the perturbations of the parameters, ``(k, *shape)`` each."""
        return [column[PARAMETER] for column in self.columns]

    @torch.no_grad()
    def advance(
        self,
        before: Before,
        gradient: Gradient,
        used: Sequence[Tensor | None],
        d_hyper: dict[str, Tensor] | None = None,
    ) -> None:
        """Push the perturbations through the step that was just taken.

        Args:
            before: where it began.
            gradient: of the loss at its beginning, with its derivative along the perturbations.
            used: the gradients that the optimizer found.
            d_hyper: tangents of hyper-parameters, ``(k,)`` each.

        Raises:
            NotTheRuleError: if parameters are not where the rule takes them, or gradients are not those of the loss, clipped as
                stated. The perturbations are then those before the step.
        """
        report = self.optimizer.last_step if isinstance(self.optimizer, GuardedOptimizer) else None
        if report is not None and report.action == "undone":
            return
        along = self.clipping.push(gradient, used)
        columns, check = list(self.columns), Agreement()
        for i, entry in enumerate(self.entries):
            group, state, column, g = before.groups[entry.group], before.states[i], self.columns[i], used[i]
            tangents = d_hyper
            if report is not None:
                if (
                    d_hyper is not None and "lr" in d_hyper and group["lr"]
                ):  # the guard takes a share of the rate that was asked for
                    share = report.lr[entry.group] / number(group["lr"])
                    tangents = d_hyper | {"lr": d_hyper["lr"] * share}
                group = group | {"lr": report.lr[entry.group]}
                if report.action == "restarted":
                    state, column = _restarted(self.rule, state, column)
            start, end = before.parameters[i], entry.parameter.detach()
            if g is None:  # torch leaves it alone
                check.add(start, start, end if start.shape == end.shape else some(end))
            elif d_hyper is None and self._is_written(entry):
                columns[i], predicted = self._by_formula(entry, group, start, g, state, column, along[i])
                check.add(start, predicted, some(end))
            else:
                columns[i], predicted = self._by_push(entry, group, start, g, state, column, along[i], tangents)
                check.add(start, predicted, end)
        check.check(type(self.rule).__name__)
        self.columns = columns
        self._set_units()

    def _is_written(self, entry: Entry) -> bool:
        """Whether the tangents of a parameter follow from the gradient and the state after the step, entry by entry."""
        group, p = self.optimizer.param_groups[entry.group], entry.parameter
        if entry.regularizer is not None or not has_formula(self.rule) or p.is_complex() or not p.is_contiguous():
            return False
        # a coupled decay needs the parameter before the step, but that of SGD is linear, and amsgrad the old maximum
        coupled = number(group.get("weight_decay", 0.0)) and not group.get("decoupled_weight_decay", False)
        return not group.get("amsgrad") and not (coupled and isinstance(self.rule, Moments | RootMeanSquare))

    def _by_formula(
        self,
        entry: Entry,
        group: dict[str, Any],
        start: Tensor,
        gradient: Tensor,
        state: State,
        column: Column,
        along: Tensor,
    ) -> tuple[Column, Tensor]:
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        p = entry.parameter.detach()
        stage = Stage(self.rule, group, p, gradient, state, self._state(entry))
        d_state = {n: d for n, d in column.items() if n != PARAMETER}
        found = written(stage, column[PARAMETER], along, d_state)
        if found is None:
            raise NotTheRuleError(f"there are no formulas for this step of {type(self.rule).__name__}")
        predicted, _ = self.rule.update(start, some(gradient), state, group)
        return {PARAMETER: found[0], **d_state, **found[1]}, predicted

    def _by_push(
        self, entry: Entry, group: dict[str, Any], start: Tensor, gradient: Tensor, state: State, column: Column, along: Tensor,
        d_hyper: dict[str, Tensor] | None,
    ) -> tuple[Column, Tensor]:  # fmt: skip
        d_state = {n: d for n, d in column.items() if n != PARAMETER}
        pushed = push(
            self.rule, group, start, gradient, state, column[PARAMETER], along, d_state,
            regularizer=entry.regularizer, d_hyper=d_hyper,
        )  # fmt: skip
        return {PARAMETER: pushed.d_parameter, **pushed.d_state}, pushed.parameter

    @torch.no_grad()
    def orthonormalize(self, rows: int) -> NDArray[np.float64]:
        """Make the first rows of the perturbations orthonormal in the metric of the state, and return the triangular factor.

        Args:
            rows: how many; the others stay as they are.

        Returns:
            R, ``(rows, rows)``.
        """
        parts = self._parts(rows)
        Q, R = orthonormalize(torch.cat([part for _, _, part in parts], dim=1))
        start = 0
        for column, name, part in parts:
            width = part.shape[1]
            rest = Q[:, start : start + width]
            start += width
            unit = self._unit_of(column, name)
            value = self.columns[column][name]
            shape = real_view(value[:rows]).shape
            self.columns[column][name] = torch.cat(
                [unviewed((rest / unit).reshape(shape).to(real_view(value).dtype), value), value[rows:]]
            )
        return R

    def gram(self, rows: int) -> NDArray[np.float64]:
        r"""Return the inner products of the parameter parts of the first perturbations, ``(rows, rows)``."""
        total = torch.zeros(rows, rows, dtype=torch.float64, device=self.parameters[0].device)
        for column in self.columns:
            part = real_view(column[PARAMETER][:rows]).reshape(rows, -1).double()
            total += (part @ part.mT).to(total.device)
        return total.cpu().numpy()

    def _parts(self, rows: int) -> list[tuple[int, str, Tensor]]:
        found: list[tuple[int, str, Tensor]] = []
        for i, column in enumerate(self.columns):
            for name, value in column.items():
                part = real_view(value[:rows]).reshape(rows, -1)
                found.append((i, name, part.to(self.parameters[0].device, self._dtype()) * self._unit_of(i, name)))
        return found

    def _unit_of(self, column: int, name: str) -> float:
        return 1.0 if name == PARAMETER else self.units[self.entries[column].group, name]

    def _dtype(self) -> torch.dtype:
        dtype = torch.float32
        for p in self.parameters:
            dtype = torch.promote_types(dtype, real_view(p).dtype)
        return dtype

    def _set_units(self) -> None:
        if all((e.group, n) in self.units for e, c in zip(self.entries, self.columns, strict=True) for n in c if n):
            return
        for g, group in enumerate(self.optimizer.param_groups):
            here = [i for i, entry in enumerate(self.entries) if entry.group == g]
            names = {n for i in here for n in self.columns[i] if n != PARAMETER}
            for name in sorted(names):
                if (g, name) not in self.units:
                    states = [self._state(self.entries[i]) for i in here]
                    self.units[g, name] = default_unit(self.rule, group, name, states)

    def _state(self, entry: Entry) -> State:
        return self.optimizer.state.get(entry.parameter, {})


def _rule_of(optimizer: Optimizer) -> UpdateRule:
    rule = optimizer.rule if isinstance(optimizer, GuardedOptimizer) and optimizer.known else rule_for(optimizer)
    if rule is None:
        raise ValueError(
            f"nothing is known about the update of {type(optimizer).__name__}, so no derivative can be pushed through it: "
            "register a rule with stableopt.optim.rule_for.register, or use Twin, which compares two runs."
        )
    return rule


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    if not parameters:
        raise ValueError("the optimizer has no parameter that requires a gradient: there is nothing to perturb.")
    for p in parameters:
        if is_sharded(p):
            raise ValueError(
                "a profile needs whole parameters, got sharded ones: profile an unsharded copy of the model."
            )
        if real_view(p).dtype not in {torch.float32, torch.float64}:
            raise ValueError(
                f"a profile needs parameters in float32 or float64, got {p.dtype}: derivatives in half precision are noise; "
                "profile a copy of the model in float32."
            )


def _keeps_state(rule: UpdateRule, group: dict[str, Any]) -> bool:
    """Whether the rule will have a state in a group: asked of a step on one number."""
    like = next((p for p in group["params"] if p.requires_grad), None)
    if like is None:
        return False
    zero = torch.zeros((1, 1), dtype=like.dtype)  # what normalizes matrices needs one
    _, state = rule.update(zero, torch.ones_like(zero), {}, {k: v for k, v in group.items() if k != "params"})
    return bool(tangent_names(rule, state, zero))


def _restarted(rule: UpdateRule, state: State, column: Column) -> tuple[State, Column]:
    """Return the state with its momentum set to zero, and the perturbations of it as well."""
    buffer = rule.buffer(state)
    names = [n for n, v in state.items() if v is buffer and buffer is not None]
    return (
        state | {n: torch.zeros_like(state[n]) for n in names},
        column | {n: torch.zeros_like(column[n]) for n in names if n in column},
    )


def _drawn(rows: int, p: Tensor, generator: torch.Generator) -> Tensor:
    view = real_view(p.detach())
    drawn = torch.randn(rows, *view.shape, generator=generator, dtype=torch.float64)
    return unviewed(drawn.to(view), p)
