"""Whether a training is where it should be: after a step where the rule takes it, before one where the last one left it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Agreement", "Footprint", "NotTheRuleError", "copied", "some"]

_COMPARED = 1 << 14
"""About how many numbers of a large tensor are compared with what the rule makes of them, in each step."""
_REMEMBERED = 1 << 10
"""About how many numbers of a large tensor are remembered from step to step."""


class NotTheRuleError(RuntimeError):
    """A step that the pure update map does not give: what was pushed through it is not the derivative of the run.

    Examples:
        >>> raise NotTheRuleError("the step is another one")
        Traceback (most recent call last):
        stableopt.lyapunov.profile.tangents.agreement.NotTheRuleError: the step is another one
    """


class Agreement:
    """Whether the pure update map took parameters where the optimizer did.

    Examples:
        >>> agreement = Agreement()
        >>> agreement.add(torch.zeros(2), torch.ones(2), torch.ones(2))
        >>> agreement.check("HeavyBall")
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._eps = 0.0

    def add(self, start: Tensor, predicted: Tensor, end: Tensor) -> None:
        """Take in some numbers of a parameter.

        Args:
            start: before the step.
            predicted: what the rule makes of them.
            end: after the step.
        """
        norms = [torch.linalg.vector_norm(x) for x in (predicted - end, end - start, end)]
        self._sums.append(torch.stack(norms).double() ** 2)
        self._eps = max(self._eps, torch.finfo(end.dtype).eps)

    def check(self, rule: str) -> None:
        """Compare, with one wait for the device.

        Args:
            rule: its name.

        Raises:
            NotTheRuleError: if the two are further apart than rounding makes them.
        """
        device = self._sums[0].device
        wrong, moved, size = torch.stack([s.to(device) for s in self._sums]).sum(0).sqrt().tolist()
        if not wrong <= math.sqrt(self._eps) * moved + 32.0 * self._eps * size:
            raise NotTheRuleError(
                f"the step moved the parameters by {moved:.3g} and ended {wrong:.3g} from where the rule {rule} takes them"
            )


class Footprint:
    """Where a step has left parameters and the state of an optimizer, by some of their numbers.

    Args:
        optimizer: after its step.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> footprint = Footprint(optimizer)
        >>> footprint.change(optimizer)
        ''
        >>> w.data.zero_()
        tensor([0., 0.])
        >>> footprint.change(optimizer)
        'parameters or the state of the optimizer were changed between two steps'
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._ids, self._numbers = _seen(optimizer)

    @torch.no_grad()
    def change(self, optimizer: Optimizer) -> str:
        """Say what is different now, in one sentence without its point; empty if nothing is.

        Args:
            optimizer: the same.
        """
        ids, numbers = _seen(optimizer)
        if ids != self._ids:
            return "other parameters are trained than before: begin a new profile"
        if any(names != old for (names, _), (old, _) in zip(numbers, self._numbers, strict=True)):
            return "the state of the optimizer has other entries than after the step before"
        pairs = [
            (a, b) for (_, x), (_, y) in zip(numbers, self._numbers, strict=True) for a, b in zip(x, y, strict=True)
        ]
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
            return ""
        return "parameters or the state of the optimizer were changed between two steps"


@torch.no_grad()
def _seen(optimizer: Optimizer) -> tuple[list[int], list[tuple[list[str], list[Tensor]]]]:
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    numbers = []
    for p in trained:
        state = {n: v for n, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor) and not v.is_sparse}
        numbers.append((list(state), [some(x, _REMEMBERED) for x in (p, *state.values())]))
    return [id(p) for p in trained], numbers


def some(x: Any, count: int = _COMPARED) -> Any:
    """Return copies of evenly spread numbers of a tensor, of all if there are few; anything else as it is.

    Args:
        x: a tensor, in row-major order.
        count: about how many.

    Examples:
        >>> some(torch.arange(10), 3), some("text")
        (tensor([0, 3, 6, 9]), 'text')
    """
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    return x.reshape(-1)[:: x.numel() // count].clone() if x.numel() >= 2 * count else x.clone()


def copied(value: Any) -> Any:
    """Return a detached copy of a tensor; anything else as it is.

    Examples:
        >>> copied(torch.ones(1)), copied("text")
        (tensor([1.]), 'text')
    """
    return value.detach().clone() if isinstance(value, Tensor) else value
