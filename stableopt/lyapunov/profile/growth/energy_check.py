"""How loose the bounds of an energy are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["EnergyCheck"]


@dataclass(frozen=True)
class EnergyCheck:
    r"""The bounds of an energy beside the measured norms of all windows of a grid, and the largest norm of all windows.

    Args:
        holds: whether every bound is at least the measured norm, up to ``rounding`` of the table and of the sums.
        margin: the smallest log bound - log K + rounding; negative if it does not hold.
        log_ratio: ``(count,)`` log bound - log K of every window with :math:`K > 0`.
        start: where the loosest window starts, in training steps.
        end: where it ends.

    Examples:
        >>> EnergyCheck(True, 0.0, np.array([0.0, 0.5, 3.0]), 0, 2).median
        0.5
    """

    holds: bool
    margin: float
    log_ratio: NDArray[np.float64]
    start: int
    end: int

    @property
    def smallest(self) -> float:
        """The log ratio of the tightest window.

        Examples:
            >>> EnergyCheck(True, 0.0, np.array([0.0, 0.5, 3.0]), 0, 2).smallest
            0.0
        """
        return float(self.log_ratio.min())

    @property
    def median(self) -> float:
        """The median of the log ratios.

        Examples:
            >>> EnergyCheck(True, 0.0, np.array([0.0, 0.5]), 0, 2).median
            0.25
        """
        return float(np.median(self.log_ratio))

    @property
    def largest(self) -> float:
        """The log ratio of the loosest window.

        Examples:
            >>> EnergyCheck(True, 0.0, np.array([0.0, 0.5, 3.0]), 0, 2).largest
            3.0
        """
        return float(self.log_ratio.max())
