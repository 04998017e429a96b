"""Learning rates that are smaller for one step, and then what they were."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Rates"]


class Rates:
    """Multiply the learning rates of an optimizer by a factor for the length of one step.

    Afterwards each is the very object that it was. Somebody may have set it anew in the meantime, such as a scheduler that is
    called by a hook of the optimizer. If the new value n lies nearer to the scaled one, factor * lr, than to lr on a logarithmic
    scale (n <= lr * sqrt(factor)), it is taken to be made from the scaled one, and n / factor is set, so that factors do not pile
    up; else n stays. A schedule that falls by more than sqrt(factor) at once within a hook is not shrunk at that step.

    Args:
        optimizer: any torch optimizer; groups without a learning rate are left alone.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.4)
        >>> rates, group = Rates(optimizer), optimizer.param_groups[0]
        >>> rates.scale(0.5)
        >>> group["lr"]
        0.2
        >>> group["lr"] *= 0.75  # a scheduler within the step
        >>> rates.put_back()
        >>> round(group["lr"], 6)
        0.3
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self._factor = optimizer, 1.0
        self._scaled: list[tuple[dict[str, Any], Any, Any, int]] = []

    def scale(self, factor: float) -> None:
        """Multiply by a factor until :meth:`put_back`.

        Args:
            factor: in (0, 1].
        """
        self.put_back()
        if factor == 1.0:
            return
        self._factor = factor
        for group in self._optimizer.param_groups:
            lr = group.get("lr")
            if lr is not None:
                group["lr"] = lr * factor
                self._scaled.append((group, lr, group["lr"], _version(group["lr"])))

    def put_back(self) -> None:
        """Let the learning rates be what they are without the factor; may be called twice."""
        for group, lr, scaled, version in self._scaled:
            now = group.get("lr")
            if now is None:
                continue
            if now is scaled and _version(now) == version:
                group["lr"] = lr
                continue
            value, old = float(now), float(lr)  # somebody has set it: the one case that waits for a device
            made_from_scaled = abs(value) <= abs(old) * math.sqrt(self._factor)
            if value == old * self._factor:
                group["lr"] = lr
            elif isinstance(lr, Tensor) and (now is scaled or (made_from_scaled and isinstance(now, Tensor))):
                group["lr"] = lr.fill_(value / self._factor if made_from_scaled else value)  # schedulers write into it
            elif made_from_scaled:
                group["lr"] = value / self._factor
        self._scaled = []


def _version(lr: Any) -> int:
    return lr._version if isinstance(lr, Tensor) else 0  # noqa: SLF001 - the documented way to see a change in place
