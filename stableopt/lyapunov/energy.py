"""The part of an optimizer's energy that is not the loss, before and after one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableopt.constraints.sharding import whole
from stableopt.optim import rule_for
from stableopt.optim.rules import step_sums, weighted_square

__all__ = ["Motion", "Start", "direction"]


@dataclass(frozen=True)
class Motion:
    r"""What a step moved.

    Args:
        displacement: :math:`\|d\|`, over all parameters.
        before: the energy before the step, without the loss.
        after: the energy after the step, without the loss, in the same metric.
        predicted: :math:`\sum (1-\beta)/\eta' \|d\|_P^2`, the decrease by the law of the rule, curvature aside; NaN without a rule.
        energy: which energy this is, in words.

    Examples:
        >>> Motion(0.0, 0.0, 0.0, 0.0, "the loss alone").displacement
        0.0
    """

    displacement: float
    before: float
    after: float
    predicted: float
    energy: str


class Start:
    """The parameters and momentum buffers of an optimizer before a step.

    Args:
        optimizer: any torch optimizer; read, not changed.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = torch.optim.SGD([w], lr=0.5)
        >>> start = Start(optimizer)
        >>> w.grad = torch.tensor([2.0])
        >>> optimizer.step()
        >>> start.motion().displacement
        1.0
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self._rule = optimizer, rule_for(optimizer)
        self._values = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
        self._buffers: dict[Tensor, Tensor | None] = {}
        if self._rule is not None:
            for p in self._values:
                buffer = self._rule.buffer(optimizer.state.get(p, {}))
                self._buffers[p] = None if buffer is None else buffer.detach().clone()

    @torch.no_grad()
    def motion(self) -> Motion:
        """Compare with the parameters and buffers now, after the step."""
        rows = [
            torch.stack([whole(x).to("cpu", torch.float64) for x in self._row(p, group)])
            for group in self._optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        square, before, after, predicted = torch.stack(rows).sum(0).tolist() if rows else (0.0, 0.0, 0.0, 0.0)
        name = "the loss alone: no rule is known for this optimizer"
        if self._rule is not None:
            name = f"the loss and the terms of {type(self._rule).__name__}"
        return Motion(
            math.sqrt(square), before, after, predicted if self._rule is not None else math.nan, f"energy: {name}"
        )

    def _row(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return, for one parameter, the square of its displacement, its energies before and after, and what is predicted."""
        rule, start = self._rule, self._values[p]
        if rule is None:
            square = weighted_square(p.detach() - start, 1.0)
            zero = torch.zeros_like(square)
            return square, zero, zero, zero
        state = self._optimizer.state.get(p, {})
        before, after, _, predicted, square = step_sums(rule, group, start, self._buffers[p], p.detach(), state)
        return square, before, after, predicted


def direction(optimizer: Optimizer) -> float:
    """Return 1 if an optimizer minimizes, -1 if it maximizes, 0 if its groups differ and have no common energy.

    Examples:
        >>> direction(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], maximize=True))
        -1.0
    """
    signs = {-1.0 if group.get("maximize") else 1.0 for group in optimizer.param_groups}
    return signs.pop() if len(signs) == 1 else 0.0
