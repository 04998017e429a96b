"""Prox and projection inside the step: in the metric of the rule, with the momentum set to the realised displacement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stableopt.constraints import Constraint, Regularizer, SpectralBall, attached, from_spec
from stableopt.constraints.reuse import project_tracked
from stableopt.optim.entrywise import Line, acts_on_entries, regularize_entries
from stableopt.optim.rules import UpdateRule

__all__ = ["decoded", "encoded", "gather_attached", "regularize", "regularize_all", "regularized", "regularizer_of"]


def regularizer_of(group: dict[str, Any], index: int) -> Regularizer | None:
    """Return the penalty or the set of the parameter at ``index`` of a group.

    Examples:
        >>> from stableopt.constraints import NonNegative
        >>> group = {"params": [0, 1], "prox": None, "constraint": [None, NonNegative()]}
        >>> regularizer_of(group, 0), regularizer_of(group, 1)
        (None, NonNegative())
    """
    if group["prox"] is not None:
        return group["prox"]
    constraint = group["constraint"]
    return constraint[index] if isinstance(constraint, list) else constraint


def regularized(groups: list[dict[str, Any]]) -> Iterator[tuple[Tensor, dict[str, Any], Regularizer]]:
    """Yield the parameters that have a penalty or a set, with their group and it.

    Examples:
        >>> list(regularized([{"params": [0], "prox": None, "constraint": None}]))
        []
    """
    for group in groups:
        if group["prox"] is None and group["constraint"] is None:
            continue
        for index, p in enumerate(group["params"]):
            regularizer = regularizer_of(group, index)
            if regularizer is not None:
                yield p, group, regularizer


@torch.compiler.disable
@torch.no_grad()
def regularize_all(
    rule: UpdateRule,
    todo: list[tuple[Tensor, dict[str, Any], Regularizer, bool]],
    states: Mapping[Tensor, dict[str, Any]],
) -> None:
    """Regularize many parameters: what acts on single entries together, everything else one by one.

    Args:
        rule: of the optimizer.
        todo: parameters where the plain step has ended, with group, regularizer, and whether it is their first step.
        states: of the parameters, after the plain step.

    Examples:
        >>> from stableopt.constraints import L1
        >>> from stableopt.optim.rules import HeavyBall
        >>> w = torch.tensor([1.0, 0.25])
        >>> regularize_all(HeavyBall(), [(w, {"lr": 0.5, "momentum": 0.0}, L1(1.0), True)], {})
        >>> w
        tensor([0.5000, 0.0000])
    """
    together: dict[tuple[int, Regularizer], tuple[dict[str, Any], list[Line]]] = {}
    for p, group, regularizer, first in todo:
        state = states.get(p, {})
        for name, value in state.items():  # of sparse gradients SGD's momentum is sparse; what a prox takes off is not
            if isinstance(value, Tensor) and value.is_sparse:
                state[name] = value.to_dense()
        line = Line.of(p, state, first=first) if acts_on_entries(regularizer) else None
        if line is None:
            regularize(rule, p, group, regularizer, state, first=first)
        else:
            together.setdefault((id(group), regularizer), (group, []))[1].append(line)
    for (_, regularizer), (group, lines) in together.items():
        regularize_entries(rule, lines, group, regularizer)


@torch.no_grad()
def regularize(
    rule: UpdateRule, p: Tensor, group: dict[str, Any], regularizer: Regularizer, state: dict[str, Any], *, first: bool
) -> None:
    r"""Replace a parameter by the proximal point in the metric of the step, and set its momentum to the realised displacement.

    Args:
        rule: of the optimizer.
        p: where the plain step has ended.
        group: hyper-parameters.
        regularizer: the penalty or the set; a set without projection in a diagonal metric is projected on in the Euclidean one.
        state: of the parameter, after the plain step.
        first: whether this is its first step.

    Examples:
        >>> from stableopt.constraints import L1
        >>> from stableopt.optim.rules import HeavyBall
        >>> w = torch.tensor([1.0])
        >>> regularize(HeavyBall(), w, {"lr": 0.5, "momentum": 0.0}, L1(1.0), {}, first=True)
        >>> w
        tensor([0.5000])
    """
    step = rule.effective_lr(group, first=first)
    metric: Tensor | float = 0.0
    if rule.momentum(group) or not isinstance(regularizer, Constraint) or regularizer.diagonal:
        metric = rule.metric(state, group)
    realign = rule.momentum(group) and rule.buffer(state) is not None
    reached = p.detach().clone() if realign else p.detach()
    if isinstance(regularizer, Constraint):
        if isinstance(metric, Tensor) and regularizer.diagonal:
            moved = regularizer.prox(reached, step / metric)
        elif isinstance(regularizer, SpectralBall):
            moved = project_tracked(regularizer, p, reached)
        else:
            moved = regularizer.project(reached)
    else:
        moved = regularizer.prox(reached, step / metric)
    p.copy_(moved)
    if realign:
        rule.realign(reached - p, state, metric, group)


def gather_attached(group: dict[str, Any]) -> None:
    """Take over the sets to which parameters of a group are attached, as its constraint.

    Raises:
        ValueError: if the group asks for something else.

    Examples:
        >>> from stableopt.constraints import NonNegative, attach
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> attach(w, NonNegative())
        >>> group = {"params": [w, torch.nn.Parameter(torch.ones(1))], "prox": None, "constraint": None}
        >>> gather_attached(group)
        >>> group["constraint"]
        [NonNegative(), None]
    """
    tied = [attached(p) for p in group["params"]]
    if all(t is None for t in tied):
        return
    given = [regularizer_of(group, i) for i in range(len(tied))]
    for p, mine, theirs in zip(group["params"], given, tied, strict=True):
        if mine is not None and theirs is not None and mine != theirs:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} was constrained to {theirs!r}, but its group has {mine!r}: "
                "leave the group's own out, or call stableopt.constraints.attach(parameter, None) first."
            )
    if group["prox"] is not None:
        raise ValueError(
            f"a group with prox={group['prox']!r} holds parameters that were constrained to sets: put them into a group of "
            "their own, as stableopt.parameter_groups(model) does."
        )
    both = [mine if mine is not None else theirs for mine, theirs in zip(given, tied, strict=True)]
    group["constraint"] = both[0] if all(b == both[0] for b in both) else both


def encoded(value: Any) -> Any:
    """Return a regularizer, a list of them, or None, as plain data.

    Examples:
        >>> from stableopt.constraints import NonNegative
        >>> encoded([NonNegative(), None])
        [{'name': 'NonNegative'}, None]
    """
    if isinstance(value, list):
        return [encoded(item) for item in value]
    return value.spec() if isinstance(value, Regularizer) else value


def decoded(value: Any) -> Any:
    """Return what :func:`encoded` was given.

    Raises:
        ValueError: if a name is unknown.

    Examples:
        >>> decoded({"name": "NonNegative"})
        NonNegative()
    """
    if isinstance(value, list):
        return [decoded(item) for item in value]
    return from_spec(value) if isinstance(value, dict) else value
