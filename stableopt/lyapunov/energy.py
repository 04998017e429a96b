"""The part of an optimizer's energy that is not the loss, before and after one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableopt.constraints.sharding import is_sharded, whole
from stableopt.optim import UpdateRule, rule_for
from stableopt.optim.agree import Alone, Processes
from stableopt.optim.rules import weighted_square
from stableopt.optim.snapshot import Copies, local
from stableopt.optim.sums import Moved, energy_sums

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
    """The parameters and momentum buffers of an optimizer before a step; the memory is used again at the next one.

    Args:
        optimizer: any torch optimizer; read, not changed.
        processes: those that train the model together; None for this one alone.

    Attributes:
        values: parameter -> its values before the step.
        graded: the parameters that had gradients when the step began, and which ones; None if that was not noted.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = torch.optim.SGD([w], lr=0.5)
        >>> start = Start(optimizer)
        >>> start.take()
        >>> w.grad = torch.tensor([2.0])
        >>> optimizer.step()
        >>> start.motion().displacement
        1.0
    """

    def __init__(self, optimizer: Optimizer, processes: Processes = Alone) -> None:
        self._optimizer, self._processes = optimizer, processes
        self._rule: UpdateRule | None = rule_for(optimizer)
        self.values: dict[Tensor, Tensor] = {}
        self._buffers: dict[Tensor, Tensor | None] = {}
        self._key: tuple[tuple[Any, ...], ...] = ()
        self.graded: dict[Tensor, tuple[int, int]] | None = None

    @torch.no_grad()
    def take(self, *, momentum: bool = True) -> None:
        """Keep what is there now.

        Args:
            momentum: also the momentum buffers, which :meth:`motion` needs.
        """
        copies, rule, state = Copies(), self._rule, self._optimizer.state
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.layout is torch.strided]
        key = tuple((id(p), p.data_ptr(), p.dtype, p.shape, p.stride()) for p in parameters)
        self.graded = None
        if key == self._key and not any(map(is_sharded, parameters)):  # the memory fits as it did
            for p, memory in self.values.items():
                copies.into(memory, p.detach())
        else:
            old = self.values
            self.values, self._key = {p: copies.of(p.detach(), old.get(p)) for p in parameters}, key
        kept, self._buffers = self._buffers, {}
        for p in parameters if rule is not None and momentum else ():
            buffer = rule.buffer(state.get(p, {}))  # pyright: ignore[reportOptionalMemberAccess]
            self._buffers[p] = None if buffer is None else copies.of(buffer.detach(), kept.get(p))
        copies.run()

    def grade(self) -> None:
        """Note which parameters have gradients, now that the step is about to use them."""
        graded = (p for p in self.values if p.grad is not None)
        self.graded = {p: (id(p.grad), p.grad._version) for p in graded}  # noqa: SLF001  # pyright: ignore[reportOptionalMemberAccess]

    def same_gradients(self) -> bool:
        """Whether the gradients are those that the step was given."""
        if self.graded is None:
            return True
        now = (self.graded.get(p) == (id(p.grad), p.grad._version) for p in self.values if p.grad is not None)  # noqa: SLF001
        return all(now) and all(p.grad is not None for p in self.graded)

    @torch.no_grad()
    def motion(self) -> Motion:
        """Compare with the parameters and buffers now, after the step."""
        rule, moved, penalties = self._rule, list[Moved](), list[Tensor]()
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p not in self.values or (p.grad is None if self.graded is None else p not in self.graded):
                    continue
                start, share = self.values[p], self._processes.share(p)
                moved.append(
                    Moved(group, start, self._buffers.get(p), p.detach(), self._optimizer.state.get(p, {}), share)
                )
                if rule is not None and group.get("prox") is not None:
                    ends = [whole(group["prox"].value(x)).to("cpu", torch.float64) for x in (start, p.detach())]
                    penalties.append(torch.stack(ends))
        name = "the loss alone: no rule is known for this optimizer"
        if rule is None:
            square, before, after, predicted = _square(moved, self._processes), 0.0, 0.0, math.nan
        else:
            name = f"the loss and the terms of {type(rule).__name__}"
            device = moved[0].start.device if moved else torch.device("cpu")
            sums = self._processes.total(energy_sums(rule, moved, device)).tolist()
            before, after, _, predicted, square = sums
            if penalties:
                before, after = (
                    a + b for a, b in zip((before, after), torch.stack(penalties).sum(0).tolist(), strict=True)
                )
        return Motion(math.sqrt(square) if square >= 0 else math.nan, before, after, predicted, f"energy: {name}")


def _square(moved: list[Moved], processes: Processes) -> float:
    """Return the square of the displacement where no rule is known."""
    rows = [
        one.share * weighted_square(local(one.end) - local(one.start), 1.0).to("cpu", torch.float64) for one in moved
    ]
    return float(processes.total(torch.stack(rows).sum())) if rows else 0.0


def direction(optimizer: Optimizer) -> float:
    """Return 1 if an optimizer minimizes, -1 if it maximizes, 0 if its groups differ and have no common energy.

    Examples:
        >>> direction(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], maximize=True))
        -1.0
    """
    signs = {-1.0 if group.get("maximize") else 1.0 for group in optimizer.param_groups}
    return signs.pop() if len(signs) == 1 else 0.0
