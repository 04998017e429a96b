"""Steps that a gradient scaler skips, which no hook of an optimizer ever sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stableopt.lyapunov.events import Event

__all__ = ["ScalerWatch"]


class ScalerWatch:
    """Find the steps that a ``torch.amp.GradScaler`` has skipped since the last look, by the fall of its scale.

    Args:
        scaler: with ``get_scale``, ``get_backoff_factor`` and ``is_enabled``.

    Raises:
        TypeError: if it has none of these.

    Note:
        A skip that a growth of the scale has made up for between two looks is not seen; growth comes after 2000 good steps by
        default.

    Examples:
        >>> import torch
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        >>> watch = ScalerWatch(scaler)
        >>> _ = scaler.scale(torch.ones(1))
        >>> watch.look(1) is None
        True
        >>> scaler.update(2.0)
        >>> print(watch.look(2).what)
        the gradient scaler has skipped about 2 steps: gradients were not finite
    """

    def __init__(self, scaler: Any) -> None:
        for name in ("get_scale", "get_backoff_factor", "is_enabled"):
            if not callable(getattr(scaler, name, None)):
                raise TypeError(f"Monitor needs a torch.amp.GradScaler as scaler, got {type(scaler).__name__}.")
        self._scaler = scaler
        self._scale = float(scaler.get_scale()) if scaler.is_enabled() else math.nan
        self._since, self._goes_on = 0, False

    def begin(self) -> None:
        """Start from the scale of now, or go on from the state that has just been loaded.

        Examples:
            >>> import torch
            >>> ScalerWatch(torch.amp.GradScaler("cpu")).begin()
        """
        if not self._goes_on:
            self._scale = float(self._scaler.get_scale()) if self._scaler.is_enabled() else math.nan
        self._goes_on = False

    def state_dict(self) -> dict[str, float]:
        """Return the scale and the step of the last look.

        Examples:
            >>> import torch
            >>> ScalerWatch(torch.amp.GradScaler("cpu", init_scale=8.0)).state_dict()
            {'scale': 8.0, 'since': 0}
        """
        return {"scale": self._scale, "since": self._since}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a state.

        Examples:
            >>> import torch
            >>> watch = ScalerWatch(torch.amp.GradScaler("cpu"))
            >>> watch.load_state_dict(watch.state_dict())
        """
        self._scale, self._since, self._goes_on = float(state["scale"]), int(state["since"]), True

    def look(self, step: int) -> Event | None:
        """Return what was skipped since the last look, None if nothing was.

        Args:
            step: now, counted from 1.
        """
        if not self._scaler.is_enabled():
            return None
        before, now, since = self._scale, float(self._scaler.get_scale()), self._since
        self._scale, self._since = now, step
        if not now < before:
            return None
        backoff = self._scaler.get_backoff_factor()
        count = max(1, round(math.log(now / before) / math.log(backoff))) if now > 0 and 0 < backoff < 1 else 1
        return Event(
            step,
            "alarm",
            "scaler",
            "observe",
            f"the gradient scaler has skipped about {count} step{'s' * (count > 1)}: gradients were not finite",
            f"its scale fell from {before:g} to {now:g}",
            since + 1,
            "normal while the scale is being found; if it goes on, look for overflow in half precision",
            now,
            before,
        )
