r"""Transition norms of a run over all windows, started late too: :math:`K(t,s) = \|\Phi(t,s)\|_2` for all s <= t.

A run whose perturbations shrink from the start to the end may still amplify those that enter midway: being bounded is a statement
about the largest K(t, s), and the path K(t, 0) alone does not make it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.scaled import HALF_ULP, Scaled

__all__ = ["FactorsLike", "Windows", "cell_products", "measure_windows"]


class FactorsLike(Protocol):
    r"""What windows and energies are made from: :class:`~stableopt.lyapunov.profile.Factors`, or three like fields."""

    @property
    def R(self) -> NDArray[np.float64]:  # noqa: N802
        r"""``(n, k, k)``: :math:`\Phi(t_{j+1}, t_j)Q_j = Q_{j+1}R_j` with orthonormal columns :math:`Q_j`."""
        ...

    @property
    def steps(self) -> NDArray[np.int64]:
        """``(n + 1,)``: the times of the boundaries, in training steps."""
        ...

    @property
    def full(self) -> bool:
        """Whether the columns span the whole state."""
        ...


@dataclass(frozen=True)
class Windows:
    r"""The table of :math:`\log K(t_j, t_i)` on a grid of times, and the largest K over the windows of *all* times.

    If ``full`` is False the norms are those of the transition operators *restricted* to the measured directions: estimates from
    below of those of the whole state. Nothing here bounds what was not measured.

    Args:
        steps: ``(m + 1,)`` the times of the grid, in training steps.
        index: ``(m + 1,)`` their places among the boundaries of the factors.
        log_norms: ``(m + 1, m + 1)``, the entry ``[j, i]`` is :math:`\log K(t_j, t_i)` for i <= j, NaN for i > j; ``-inf`` if the
            window maps everything to zero.
        rounding: ``(m + 1, m + 1)``, how far each of them can be off: the products were rounded, and
            :math:`|fl(R\cdots R)-R\cdots R| \le \gamma_p|R|\cdots|R|`.
        path: ``(n + 1,)`` :math:`\log K(t_j, t_0)` at every boundary.
        path_steps: ``(n + 1,)`` their times.
        sup: the largest log K found over the windows of all boundaries, not only of the grid.
        sup_upper: no window of any two boundaries has a larger one; equal to ``sup`` unless ``refine`` was used up.
        start: the time s at which the window of ``sup`` starts.
        end: the time t at which it ends.
        full: whether the measured directions span the whole state.

    Examples:
        >>> from stableopt.lyapunov.profile.growth.factors import Factors
        >>> found = measure_windows(Factors(np.array([[[0.5]], [[4.0]], [[0.25]]]), np.arange(4), dimension=1))
        >>> np.exp(found.log_norms).round(3)
        array([[1.  ,  nan,  nan,  nan],
               [0.5 , 1.  ,  nan,  nan],
               [2.  , 4.  , 1.  ,  nan],
               [0.5 , 1.  , 0.25, 1.  ]])
        >>> found.start, found.end, float(np.exp(found.sup).round(12))
        (1, 2, 4.0)
    """

    steps: NDArray[np.int64]
    index: NDArray[np.int64]
    log_norms: NDArray[np.float64]
    rounding: NDArray[np.float64]
    path: NDArray[np.float64]
    path_steps: NDArray[np.int64]
    sup: float
    sup_upper: float
    start: int
    end: int
    full: bool

    @property
    def running(self) -> NDArray[np.float64]:
        r"""The largest log K of the windows of the grid that end by :math:`t_j`, ``(m + 1,)``: it cannot fall.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> np.exp(measure_windows(Factors(np.array([[[0.5]], [[4.0]]]), np.arange(3), dimension=1)).running).round(
            ...     12
            ... )
            array([1., 1., 4.])
        """
        return np.maximum.accumulate(np.nanmax(self.log_norms, axis=1))

    @property
    def exponent(self) -> float:
        r"""The finite-time exponent :math:`\frac{1}{T}\log K(T, 0)` per training step; NaN without a step.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> measure_windows(Factors(np.array([[[1.0]]]), np.arange(2), dimension=1)).exponent
            0.0
        """
        horizon = int(self.path_steps[-1] - self.path_steps[0])
        return float(self.path[-1]) / horizon if horizon else math.nan

    @property
    def peak(self) -> float:
        r"""The transient peak :math:`\max_t \log K(t, 0)`, at least 0: what the exponent does not show.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> found = measure_windows(Factors(np.array([[[2.0]], [[0.1]]]), np.arange(3), dimension=1))
            >>> round(found.peak, 4), found.exponent < 0
            (0.6931, True)
        """
        return float(self.path.max())

    @property
    def peak_step(self) -> int:
        """The first time of the transient peak.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> measure_windows(Factors(np.array([[[2.0]], [[0.1]]]), np.array([0, 5, 9]), dimension=1)).peak_step
            5
        """
        return int(self.path_steps[int(self.path.argmax())])


def measure_windows(factors: FactorsLike, *, grid: int = 200, refine: int = 400) -> Windows:
    r"""Measure :math:`K(t,s)` over all windows from the triangular factors of a run.

    Products of the factors are :math:`\Phi(t,s)` on the measured directions in orthonormal coordinates, so their spectral norms are
    its norms there. They are made in cells between the times of a grid, and carry a power of two per row: growth by
    :math:`e^{\pm5000}` does no harm. The largest K over *all* windows is then found by bounds: for s in the cell a and t in a later
    cell b

    .. math:: K(t,s) \le K(t, g_b)\, K(g_b, g_{a+1})\, K(g_{a+1}, s),

    and only pairs of cells whose bound exceeds the largest K so far are looked into.

    Args:
        factors: the factors of the run, finite.
        grid: m, at most how many cells; with as many as factors every boundary is on the grid.
        refine: into how many pairs of cells the search looks at most; then ``sup_upper`` says how much it may have missed.

    Returns:
        The table and the largest K.

    Raises:
        ValueError: if a factor is not finite, grid is not positive or refine is negative.

    Note:
        n factors of size k, m cells: O(n²/m + nm) small products in batches, and O(m²/2) spectral norms.

    Examples:
        >>> from stableopt.lyapunov.profile.growth.factors import Factors
        >>> shear = np.tile([[1.0, 1.0], [0.0, 1.0]], (1000, 1, 1))  # one block with the eigenvalue 1: K grows like t
        >>> found = measure_windows(Factors(shear, np.arange(1001), dimension=2), grid=10)
        >>> round(float(np.exp(found.sup)), 3), found.sup == found.sup_upper
        (1000.001, True)
    """
    R = np.asarray(factors.R, dtype=np.float64)
    if not np.isfinite(R).all():
        raise ValueError("the factors must be finite: leave out what comes after the run has overflowed.")
    if grid < 1 or refine < 0:
        raise ValueError(f"grid must be at least 1 and refine at least 0, got {grid} and {refine}.")
    n, steps = len(R), np.asarray(factors.steps, dtype=np.int64)
    index = np.unique(np.round(np.linspace(0, n, min(n, grid) + 1)).astype(np.int64))
    cells = _Cells.of(R, index)
    table, path = _table(cells, n)
    found = _Search.of(cells, table)
    found.look_into_cells(refine)
    return Windows(
        steps=steps[index],
        index=index,
        log_norms=table,
        rounding=_rounding(R, index, table),
        path=path,
        path_steps=steps,
        sup=found.sup,
        sup_upper=max(found.sup, found.upper),
        start=int(steps[found.start]),
        end=int(steps[found.end]),
        full=bool(factors.full),
    )


def _filled(R: NDArray[np.float64], index: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``(m, q, k, k)``: the factors of each cell, then identities."""
    widths, k = np.diff(index), R.shape[-1]
    filled = np.tile(np.eye(k), (len(widths), int(widths.max(initial=1)), 1, 1))
    for a, width in enumerate(widths):
        filled[a, :width] = R[index[a] : index[a + 1]]
    return filled


def cell_products(R: NDArray[np.float64], index: NDArray[np.int64]) -> tuple[Scaled, Scaled]:
    r"""Return the product of the factors of each cell, and the product of their moduli, which bounds its rounding.

    Args:
        R: ``(n, k, k)`` the factors, finite.
        index: ``(m + 1,)`` where the cells begin and end.

    Returns:
        Two stacks of m matrices: :math:`C_a` and :math:`|C|_a` with
        :math:`|fl(C_a) - C_a| \le \gamma_p |C|_a`, p = k times the number of factors.

    Examples:
        >>> C, moduli = cell_products(np.array([[[2.0]], [[-3.0]], [[1.0]]]), np.array([0, 2, 3]))
        >>> C.scaled_by_one()[0].ravel(), moduli.scaled_by_one()[0].ravel()
        (array([-0.75,  0.5 ]), array([0.75, 0.5 ]))
    """
    filled = Scaled.of(_filled(R, index))
    moduli = Scaled(np.abs(filled.unit), filled.exponent)
    product, bound = filled[:, 0], moduli[:, 0]
    for t in range(1, filled.unit.shape[1] if len(filled.unit) else 0):
        product, bound = filled[:, t] @ product, moduli[:, t] @ bound
    return product, bound


@dataclass(frozen=True)
class _Cells:
    """Cells of factors, filled up with identities to one width q."""

    index: NDArray[np.int64]  # (m + 1,)
    prefix: Scaled  # (m, q + 1): from the start of the cell to each of its times
    suffix: Scaled  # (m, q + 1): from each of its times to its end
    inside: tuple[float, int, int]  # the largest log norm of a window within one cell

    @classmethod
    def of(cls, R: NDArray[np.float64], index: NDArray[np.int64]) -> _Cells:
        step = Scaled.of(_filled(R, index))
        (m, q), k = step.unit.shape[:2], R.shape[-1]
        late = Scaled.of(np.tile(np.eye(k), (m, q + 1, 1, 1)))
        prefix = Scaled.of(np.tile(np.eye(k), (m, q + 1, 1, 1)))
        best = (0.0, 0, 0)
        for t in range(q if m else 0):
            pushed = step[:, t, None] @ late[:, : t + 1]
            late.unit[:, : t + 1], late.exponent[:, : t + 1] = pushed.unit, pushed.exponent
            prefix.unit[:, t + 1], prefix.exponent[:, t + 1] = pushed.unit[:, 0], pushed.exponent[:, 0]
            places = np.argwhere(pushed.log_frobenius() > best[0])  # the others have no larger spectral norm
            if len(places):
                sizes = pushed[tuple(places.T)].log_norm()
                a, s = places[int(sizes.argmax())]
                if sizes.max() > best[0]:
                    ends = int(index[a + 1])
                    best = (float(sizes.max()), min(int(index[a] + s), ends), min(int(index[a]) + t + 1, ends))
        return cls(index, prefix, late, best)

    def product(self, a: int) -> Scaled:
        return self.suffix[a, 0]

    def widths(self) -> NDArray[np.int64]:
        return np.diff(self.index)


def _table(cells: _Cells, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the log norms between the times of the grid, and those from the start to every time."""
    m, k, widths = len(cells.index) - 1, cells.suffix.unit.shape[-1], cells.widths()
    table = np.where(np.eye(m + 1) > 0, 0.0, np.nan)
    path = np.zeros(n + 1)
    late = Scaled.of(np.tile(np.eye(k), (m + 1, 1, 1)))
    for b in range(m):
        inner = cells.prefix[b, 1 : widths[b] + 1] @ late[0]
        path[cells.index[b] + 1 : cells.index[b + 1] + 1] = inner.log_norm()
        pushed = cells.product(b) @ late[: b + 1]
        late.unit[: b + 1], late.exponent[: b + 1] = pushed.unit, pushed.exponent
        table[b + 1, : b + 1] = pushed.log_norm()
    return table, path


def _rounding(R: NDArray[np.float64], index: NDArray[np.int64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    r"""Return how far the logarithms of the table can be off, from the products of the moduli.

    A product of p matrices of size k is off by :math:`\gamma_{pk}|R|\cdots|R|` entry by entry (Higham, Accuracy and stability, 3.5,
    in any order of multiplication), its singular values by that and :math:`k^2` roundings of the largest, the logarithm by its own
    roundings. The moduli are multiplied in floating point themselves, which is of second order.
    """
    k, m = R.shape[-1], len(index) - 1
    late, allowance = Scaled.of(np.tile(np.eye(k), (m + 1, 1, 1))), np.where(np.isnan(table), np.nan, 0.0)
    cells = cell_products(R, index)[1]
    for b in range(m):
        pushed = cells[b] @ late[: b + 1]
        late.unit[: b + 1], late.exponent[: b + 1] = pushed.unit, pushed.exponent
        roundings = (index[b + 1] - index[: b + 1]) * k * HALF_ULP
        log_norm = table[b + 1, : b + 1]
        vanished = np.isneginf(log_norm)
        excess = pushed.log_frobenius() - np.where(vanished, 0.0, log_norm)
        relative = np.exp(np.minimum(excess, 700.0)) * roundings / (1 - roundings) + k * k * HALF_ULP
        off = -np.log1p(-np.minimum(relative, 1.0 - HALF_ULP)) + 4 * HALF_ULP * np.abs(log_norm)
        allowance[b + 1, : b + 1] = np.where(vanished, 0.0, off)
    return allowance


@dataclass
class _Search:
    """The search for the largest norm over the windows of all times."""

    cells: _Cells
    sup: float
    start: int  # among the boundaries
    end: int
    bounds: NDArray[
        np.float64
    ]  # (m, m): for windows from the cell of the column to the cell of the row; -inf elsewhere
    upper: float = -math.inf  # above all windows that were not looked at

    @classmethod
    def of(cls, cells: _Cells, table: NDArray[np.float64]) -> _Search:
        m = len(cells.index) - 1
        sup, start, end = cells.inside
        if m:
            j, i = np.unravel_index(int(np.nanargmax(table)), table.shape)
            if table[j, i] > sup:
                sup, start, end = float(table[j, i]), cells.index[i], cells.index[j]
        bounds = np.full((m, m), -math.inf)
        if m and int(cells.widths().max()) > 1:
            grown, before = cells.prefix.log_norm().max(axis=1), cells.suffix.log_norm().max(axis=1)
            earlier = np.tri(m, k=-1, dtype=bool)
            between = table[:m, 1:]  # [b, a] is log K(g_b, g_{a+1})
            bounds[earlier] = (grown[:, None] + between + before[None, :])[earlier]
        return cls(cells, float(sup), int(start), int(end), bounds)

    def look_into_cells(self, pairs: int) -> None:
        """Look into the pairs with the largest bounds, as long as one may hold a larger norm."""
        order = np.argsort(self.bounds, axis=None)[::-1]
        for count, flat in enumerate(order):
            b, a = (int(x) for x in np.unravel_index(int(flat), self.bounds.shape))
            bound = float(self.bounds[b, a])
            if bound <= self.sup:
                return
            if count >= pairs:
                self.upper = bound
                return
            self._look_into(a, b)

    def _look_into(self, a: int, b: int) -> None:
        late = self.cells.suffix[a]
        for between in range(a + 1, b):
            late = self.cells.product(between) @ late
        norms = (self.cells.prefix[b, :, None] @ late[None]).log_norm()  # [t, s]
        t, s = np.unravel_index(int(norms.argmax()), norms.shape)
        if norms[t, s] > self.sup:
            index = self.cells.index
            self.sup = float(norms[t, s])
            self.start, self.end = int(min(index[a] + s, index[a + 1])), int(min(index[b] + t, index[b + 1]))
