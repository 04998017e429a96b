r"""What happens between the times of a grid: the bound of an energy on windows that start or end there.

An energy lives at the times :math:`g_0 < g_1 < \cdots` of a grid. For boundaries s and t of the factors, with a the first time of
the grid from s on, and b the last one up to t,

.. math:: K(t,s) \le K(t, g_b)\, K(g_b, g_a)\, K(g_a, s):

the bound of the energy in the middle, and norms within a cell on either side. A window that has no time of the grid inside is at
most the product of the norms of its factors, and at most the largest norm of all windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.scaled import HALF_ULP, Scaled
from stableopt.lyapunov.profile.growth.windows import Windows

__all__ = ["Between"]

Array = NDArray[np.float64]

_LOWEST = -1e4
"""In sums of logarithms for what vanishes: far below every float, and such sums stay exact enough."""


@dataclass(frozen=True)
class Between:
    r"""The norms within the cells of a grid, rounded up.

    Args:
        steps: ``(n + 1,)`` the times of all boundaries, in training steps.
        index: ``(m + 1,)`` the places of the grid among them.
        before: ``(n + 1,)`` :math:`\log K(g_a, s)`, to the next time of the grid; 0 on it.
        after: ``(n + 1,)`` :math:`\log K(t, g_b)`, from the last time of the grid; 0 on it.
        single: ``(n,)`` the log norms of the factors.
        sup: the largest log K of all windows.

    Examples:
        >>> from stableopt.lyapunov.profile.growth.factors import Factors
        >>> from stableopt.lyapunov.profile.growth.windows import measure_windows
        >>> R = np.array([[[0.5]], [[8.0]], [[0.25]]])
        >>> found = Between.of(R, measure_windows(Factors(R, np.arange(4), dimension=1), grid=1))
        >>> np.exp(found.before).round(3), np.exp(found.after).round(3)
        (array([1.  , 2.  , 0.25, 1.  ]), array([1. , 0.5, 4. , 1. ]))
    """

    steps: NDArray[np.int64]
    index: NDArray[np.int64]
    before: Array
    after: Array
    single: Array
    sup: float

    @classmethod
    def of(cls, R: Array, windows: Windows) -> Between:
        """Measure the norms within the cells.

        Args:
            R: ``(n, k, k)`` the factors, finite.
            windows: the norms of their windows, on the grid.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> from stableopt.lyapunov.profile.growth.windows import measure_windows
            >>> R = np.full((4, 1, 1), 2.0)
            >>> found = Between.of(R, measure_windows(Factors(R, np.arange(5), dimension=1), grid=2))
            >>> np.exp(found.after).round(3)
            array([1., 2., 1., 2., 1.])
        """
        step = Scaled.of(R)
        size = Scaled(np.abs(step.unit), step.exponent)
        before, after = (_inside(step, size, windows.index, turned=turned) for turned in (True, False))
        single = _upper(step, size, 1)
        off = windows.rounding[np.isfinite(windows.rounding)].max(initial=0.0)
        sup = windows.sup_upper + off + 8 * HALF_ULP * abs(windows.sup_upper)
        return cls(np.asarray(windows.path_steps), windows.index, before, after, single, float(sup))

    def place(self, step: int) -> int:
        """Return the place of a time among the boundaries.

        Args:
            step: a training step.

        Raises:
            ValueError: if the factors have no boundary there.

        Examples:
            >>> none = np.zeros(3)
            >>> Between(np.array([0, 4, 8]), np.array([0, 2]), none, none, none[1:], 0.0).place(4)
            1
        """
        place = int(np.searchsorted(self.steps, step))
        if place >= len(self.steps) or self.steps[place] != step:
            raise ValueError(f"no factor begins or ends at step {step}.")
        return place

    def bound(self, table: Array, s: int, t: int) -> float:
        r"""Return the log of the bound on the window from one boundary to another.

        Args:
            table: ``(m + 1, m + 1)`` log bounds for the windows of the grid, ``[j, i]`` for i <= j.
            s: the place where the window starts.
            t: where it ends, at least s.

        Examples:
            >>> none = np.zeros(3)
            >>> found = Between(np.arange(3), np.array([0, 2]), np.array([0, 1.0, 0]), none, none[1:], 9.0)
            >>> found.bound(np.array([[0.0, 0.0], [5.0, 0.0]]), 1, 2), found.bound(np.zeros((2, 2)), 0, 1)
            (1.0, 0.0)
        """
        i, j = int(np.searchsorted(self.index, s)), int(np.searchsorted(self.index, t, side="right")) - 1
        if i > j:
            logs = np.maximum(self.single[s:t], _LOWEST)
            return min(float(logs.sum() + len(logs) * HALF_ULP * np.abs(logs).sum()), self.sup)
        return float(self.before[s] + table[j, i] + self.after[t])

    def constant(self, log_constant: float, log_rate: float) -> float:
        r"""Return the log of a constant C' with :math:`K(t,s) \le C'\rho^{t-s}` for all boundaries, not those of the grid alone.

        Args:
            log_constant: log C, of a bound :math:`C\rho^{t-s}` for the windows of the grid.
            log_rate: :math:`\log\rho` per training step.

        Returns:
            At least log C; infinite for the rate 0 with times between those of the grid.

        Examples:
            >>> none = np.zeros(3)
            >>> Between(np.arange(3), np.array([0, 2]), none, none, none[1:], 9.0).constant(0.5, 0.0)
            0.5
        """
        if len(self.steps) == len(self.index):
            return log_constant
        if log_rate == -np.inf:
            return np.inf
        place = np.searchsorted(self.index, np.arange(len(self.steps)))  # of the next time of the grid
        ahead = self.steps[self.index[place]] - self.steps
        since = self.steps - self.steps[self.index[np.where(ahead > 0, place - 1, place)]]
        sides = float((self.before - ahead * log_rate).max() + (self.after - since * log_rate).max())
        lost = np.concatenate([[0.0], np.cumsum(np.maximum(self.single, _LOWEST) - np.diff(self.steps) * log_rate)])
        inside = 0.0
        for start, end in zip(self.index[:-1], self.index[1:], strict=True):
            part = lost[start : end + 1]
            inside = max(inside, float((part - np.minimum.accumulate(part)).max()))
        longest = float(np.diff(self.steps[self.index]).max())
        inside = min(inside + len(lost) * HALF_ULP * float(np.abs(lost).max()), self.sup - longest * min(log_rate, 0.0))
        return max(log_constant + max(sides, 0.0), inside)


def _inside(step: Scaled, size: Scaled, index: NDArray[np.int64], *, turned: bool) -> Array:
    """Return the log norms from the start of a cell to each boundary in it, or from there to its end."""
    found, starts, widths = np.zeros(len(step.unit) + 1), index[:-1], np.diff(index)
    cells = np.arange(len(widths))
    product, moduli = step[:0], size[:0]
    for t in range(1, int(widths.max(initial=1))):
        kept = widths[cells] > t
        cells = cells[kept]
        places = (starts + widths)[cells] - t if turned else starts[cells] + t - 1
        if t == 1:
            product, moduli = step[places], size[places]
        else:
            product, moduli = (
                old[kept] @ new[places] if turned else new[places] @ old[kept]
                for old, new in ((product, step), (moduli, size))
            )
        found[places if turned else places + 1] = _upper(product, moduli, t)
    return found


def _upper(product: Scaled, moduli: Scaled, count: int) -> Array:
    """Return log norms of products of some factors, above what rounding may have taken from them."""
    k = product.unit.shape[-1]
    roundings = count * k * HALF_ULP
    size, most = product.log_norm(), moduli.log_frobenius()
    highest = np.logaddexp(size, most + np.log(roundings / (1 - roundings) + k * k * HALF_ULP))
    return highest + 8 * HALF_ULP * np.where(np.isfinite(highest), np.abs(highest) + 1.0, 0.0)
