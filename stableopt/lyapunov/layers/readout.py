"""Numbers that are still on a device, fetched together so that a reading waits for each device once."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor

__all__ = ["Readout"]


class Readout:
    """Collect 0-d tensors under names, and turn them into floats with one wait per device.

    Examples:
        >>> readout = Readout()
        >>> readout.add("a", torch.tensor(2.0))
        >>> readout.add("b", 3.0)
        >>> readout.fetch()
        {'a': 2.0, 'b': 3.0}
    """

    def __init__(self) -> None:
        self._pending: dict[Hashable, Tensor] = {}
        self._known: dict[Hashable, float] = {}

    def add(self, name: Hashable, value: Tensor | float) -> None:
        """Keep a number; the tensor must not change until :meth:`fetch`.

        Args:
            name: what it is found under; a second number of the same name takes its place.
            value: a real number, or a tensor with one element.
        """
        if isinstance(value, Tensor):
            self._known.setdefault(name, math.nan)
            self._pending[name] = value.detach().reshape(())
        else:
            self._known[name] = float(value)

    def fetch(self) -> dict[Hashable, float]:
        """Return all numbers in the order in which their names came."""
        devices = dict.fromkeys(value.device for value in self._pending.values())
        for device in devices:
            here = {name: value for name, value in self._pending.items() if value.device == device}
            wide = torch.float32 if device.type == "mps" else torch.float64
            numbers = torch.stack([value.to(wide) for value in here.values()]).tolist()
            self._known.update(zip(here, numbers, strict=True))
        self._pending.clear()
        return dict(self._known)
