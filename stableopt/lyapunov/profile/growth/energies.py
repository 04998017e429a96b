r"""T1 backwards: an energy from a measured profile, and the bound that it implies for every window.

Let :math:`\Phi(t_{j+1},t_j)Q_j = Q_{j+1}R_j` be the triangular factors of a run, of the whole state or of the leading k directions.
For weights :math:`w_j \ge 0`

.. math:: P_n = I, \qquad P_j = I + w_j R_j^\top P_{j+1} R_j .

*These are the energies of the operators themselves, in the coordinates of* :math:`Q_j`. The energy of T1 is
:math:`\mathcal P_j = \sum_{r \ge j} w_j \cdots w_{r-1} \Phi(t_r,t_j)^\top \Phi(t_r,t_j)`, and

.. math:: Q_j^\top \mathcal P_j Q_j = \sum_r w_j \cdots w_{r-1} (Q_r R_{r-1} \cdots R_j)^\top (Q_r R_{r-1} \cdots R_j)
    = \sum_r w_j \cdots w_{r-1} (R_{r-1} \cdots R_j)^\top (R_{r-1} \cdots R_j) = P_j,

since :math:`Q_r^\top Q_r = I`. A perturbation :math:`\delta = Q_j x` goes to :math:`Q_{j+1} R_j x`: it stays in the span, so that
:math:`V_j(\delta) = x^\top P_j x` and its rates are those of :math:`\mathcal P_j` on the span; for the whole state if k is its
dimension.

*The rates have a closed form.* With :math:`X = R_j^\top P_{j+1} R_j` we have :math:`P_j = I + w_j X`: both are diagonal in one
basis, and the smallest :math:`\rho_j` with :math:`X \preceq \rho_j P_j` is the largest :math:`x/(1+w_jx)` over the eigenvalues x
of X, which rises with x: :math:`\rho_j = \lambda/(1+w_j\lambda)` with :math:`\lambda = \lambda_{\max}(X)`. The weight 0 gives
:math:`P_j = I` and the norms of the single steps; the larger the weight, the closer is :math:`\rho_j` to :math:`1/w_j`, and the
larger P.

*The bound.* :math:`m_j\|\delta_j\|^2 \le V_j \le \rho_i \cdots \rho_{j-1} V_i \le \rho_i \cdots \rho_{j-1} M_i
\|\delta_i\|^2`, hence :math:`K(t_j,t_i) \le \sqrt{M_i/m_j} \prod_r \sqrt{\rho_r}`, never above T1's
:math:`\sqrt{M/m} \prod_r \sqrt{\rho_r}`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.between import Between
from stableopt.lyapunov.profile.growth.energy_cells import EnergyCells, bounds, summation
from stableopt.lyapunov.profile.growth.energy_check import EnergyCheck
from stableopt.lyapunov.profile.growth.scaled import exp_or_inf
from stableopt.lyapunov.profile.growth.windows import FactorsLike, Windows, measure_windows

__all__ = ["EnergyCheck", "EnergySynthesis", "synthesize"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class EnergySynthesis:
    r"""Energies :math:`V_j(\delta) = x^\top P_j x`, :math:`\delta = Q_j x`, and what they prove about the measured factors.

    Rates and constants are rounded outwards: with the *stored* P the inequalities hold for the exact products of the factors.
    If ``full`` is False they hold for perturbations in the span of the measured directions, and say nothing about others.

    Args:
        steps: ``(m + 1,)`` the times :math:`t_j`, in training steps.
        P: ``(m + 1, k, k)`` symmetric, at least the identity.
        log_weights: ``(m,)`` :math:`\log w_j`; ``-inf`` for the weight 0.
        log_rates: ``(m,)`` :math:`\log \rho_j`, rounded up; above 0 where the run expands.
        log_smallest: ``(m + 1,)`` :math:`\log m_j`, rounded down.
        log_largest: ``(m + 1,)`` :math:`\log M_j`, rounded up.
        cells: ``(m, k, k)`` the products of the factors from :math:`t_j` to :math:`t_{j+1}`, but for a scale.
        log_scales: ``(m,)`` their scales.
        reference: which growth the weights discount: ``constant``, ``path``, ``leading``,
            ``norms``, ``windows``, or ``given``.
        full: whether the directions span the whole state.
        between: the norms within the cells, for windows that start or end between the times of the grid.

    Examples:
        >>> from stableopt.lyapunov.profile.growth.factors import Factors
        >>> factors = Factors(np.tile([[0.5, 4.0], [0.0, 0.5]], (30, 1, 1)), np.arange(31), dimension=2)
        >>> energy = synthesize(factors)
        >>> energy.rate < 1, energy.check(measure_windows(factors)).holds
        (True, True)
    """

    steps: NDArray[np.int64]
    P: Array
    log_weights: Array
    log_rates: Array
    log_smallest: Array
    log_largest: Array
    cells: Array
    log_scales: Array
    reference: str
    full: bool
    between: Between

    @property
    def smallest(self) -> float:
        r"""T1's m: :math:`mI \preceq P_j` for all j.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> round(synthesize(Factors(np.array([[[0.5]]]), np.arange(2), dimension=1), weight=2.0).smallest, 12)
            1.0
        """
        return math.exp(float(self.log_smallest.min()))

    @property
    def largest(self) -> float:
        r"""T1's M: :math:`P_j \preceq MI` for all j.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> round(synthesize(Factors(np.array([[[0.5]]]), np.arange(2), dimension=1), weight=2.0).largest, 12)
            1.5
        """
        return math.exp(float(self.log_largest.max()))

    @property
    def constant(self) -> float:
        r"""T1's constant :math:`C = \sqrt{M/m}`, for windows between the times of the grid.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> round(synthesize(Factors(np.array([[[0.5]]]), np.arange(2), dimension=1)).constant, 12)
            1.0
        """
        return math.exp(float(self.log_largest.max() - self.log_smallest.min()) / 2)

    @property
    def rate(self) -> float:
        r"""The mean rate of :math:`\sqrt V` per training step, :math:`\prod_j\rho_j^{1/(2T)}`; NaN without a step.

        It bounds the whole run alone, not the windows in it: see :attr:`largest_rate`.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> round(synthesize(Factors(np.array([[[0.25]]]), np.array([0, 2]), dimension=1)).rate, 12)
            0.5
        """
        horizon = int(self.steps[-1] - self.steps[0])
        return exp_or_inf(float(self.log_rates.sum()) / (2 * horizon)) if horizon else math.nan

    @property
    def largest_rate(self) -> float:
        r"""The largest rate of :math:`\sqrt V` per training step over all cells; NaN without a step.

        :math:`K(t,s) \le C\rho^{t-s}` with this :math:`\rho`: for the times of the grid with :attr:`constant`, for all boundaries
        with :attr:`constant_between`.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> energy = synthesize(Factors(np.array([[[0.5]], [[2.0]]]), np.arange(3), dimension=1))
            >>> round(energy.largest_rate, 12), round(energy.rate, 12)
            (2.0, 1.0)
        """
        return exp_or_inf(self._log_rate) if len(self.log_rates) else math.nan

    @property
    def constant_between(self) -> float:
        r"""C' with :math:`K(t,s) \le C'\rho^{t-s}` for all boundaries of the factors, :math:`\rho` the :attr:`largest_rate`.

        Infinite where the rate is 0, or it is no float.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> spike = Factors(np.array([[[10.0]], [[0.1]]]), np.arange(3), dimension=1)
            >>> energy = synthesize(spike, grid=1)
            >>> round(energy.constant, 6), round(energy.largest_rate, 6), round(energy.constant_between, 6)
            (1.0, 1.0, 10.0)
        """
        log_constant = float(self.log_largest.max() - self.log_smallest.min()) / 2
        log = self.between.constant(log_constant, self._log_rate) if len(self.log_rates) else log_constant
        return exp_or_inf(log)

    @property
    def _log_rate(self) -> float:
        return float((self.log_rates / np.diff(self.steps)).max()) / 2

    def window_bound(self, start: int, end: int) -> float:
        r"""Return the log of the bound on :math:`K(t,s)` for any boundaries of the factors, also between the times of the grid.

        Args:
            start: s, in training steps.
            end: t, at least s.

        Raises:
            ValueError: if no factor begins or ends there, or t is before s.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> spike = Factors(np.array([[[10.0]], [[0.1]]]), np.arange(3), dimension=1)
            >>> round(math.exp(synthesize(spike, grid=1).window_bound(0, 1)), 6)
            10.0
        """
        s, t = self.between.place(start), self.between.place(end)
        if s > t:
            raise ValueError(f"a window needs start <= end, got {start} and {end}.")
        return self.between.bound(self._bounds, s, t)

    def bound(self, i: int, j: int) -> float:
        r"""Return the log of the bound on :math:`K(t_j, t_i)`: :math:`\sqrt{M_i/m_j}\prod_{r=i}^{j-1}\sqrt{\rho_r}`.

        Args:
            i: where the window starts, an index of ``steps``.
            j: where it ends, at least i.

        Returns:
            The logarithm, ``-inf`` for a window that maps everything to zero.

        Raises:
            ValueError: if not ``0 <= i <= j <= m``.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> energy = synthesize(Factors(np.full((3, 1, 1), 0.5), np.arange(4), dimension=1))
            >>> round(math.exp(energy.bound(0, 3)), 12)
            0.125
        """
        return self._window(i, j, float(self.log_largest[i]), float(self.log_smallest[j]))

    def uniform_bound(self, i: int, j: int) -> float:
        r"""Return the log of T1's bound, with one m and M for all times: :math:`\sqrt{M/m}\prod_{r=i}^{j-1}\sqrt{\rho_r}`.

        Args:
            i: where the window starts, an index of ``steps``.
            j: where it ends, at least i.

        Returns:
            The logarithm; never below :meth:`bound`.

        Raises:
            ValueError: if not ``0 <= i <= j <= m``.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> energy = synthesize(Factors(np.full((3, 1, 1), 0.5), np.arange(4), dimension=1), weight=2.0)
            >>> energy.uniform_bound(1, 3) >= energy.bound(1, 3)
            True
        """
        return self._window(i, j, float(self.log_largest.max()), float(self.log_smallest.min()))

    def _window(self, i: int, j: int, largest: float, smallest: float) -> float:
        if not 0 <= i <= j < len(self.steps):
            raise ValueError(f"a window needs 0 <= i <= j <= {len(self.steps) - 1}, got i={i} and j={j}.")
        return (largest - smallest + math.fsum(self.log_rates[i:j])) / 2

    @cached_property
    def _bounds(self) -> Array:
        return bounds(self.log_rates, self.log_smallest, self.log_largest)

    def check(self, windows: Windows) -> EnergyCheck:
        r"""Compare the bound of every window of the grid with its measured norm, and that of the largest window of all.

        Args:
            windows: the norms of the same directions, at times that both have.

        Returns:
            Whether every bound holds, and how loose they are.

        Raises:
            ValueError: if they have no time in common.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> factors = Factors(np.full((3, 1, 1), 0.5), np.arange(4), dimension=1)
            >>> abs(synthesize(factors).check(measure_windows(factors)).largest) < 1e-14
            True
        """
        _, ours, theirs = np.intersect1d(self.steps, windows.steps, return_indices=True)
        if not len(ours):
            raise ValueError("the energies and the windows have no time in common.")
        table, slack = (x[np.ix_(theirs, theirs)] for x in (windows.log_norms, windows.rounding))
        log_ratio = self._bounds[np.ix_(ours, ours)] - table
        slack = slack + summation(self.log_rates, self.log_smallest, self.log_largest)
        j, i = np.nonzero(np.isfinite(table))
        worst = int(log_ratio[j, i].argmax())
        margin = float((log_ratio + slack)[j, i].min())
        if {windows.start, windows.end} <= set(
            self.between.steps.tolist()
        ):  # the largest one, which may be off the grid
            most = float(slack[np.isfinite(slack)].max())
            margin = min(margin, self.window_bound(windows.start, windows.end) + most - windows.sup)
        return EnergyCheck(
            margin >= 0,
            margin,
            log_ratio[j, i],
            int(windows.steps[theirs[i[worst]]]),
            int(windows.steps[theirs[j[worst]]]),
        )

    def along(self, start: Array) -> Array:
        r"""Return :math:`\log V_j` along the tangent that starts as :math:`Q_0 x_0`: :math:`x_{j+1} = R_jx_j`.

        Args:
            start: :math:`x_0`, ``(k,)``, not zero.

        Returns:
            ``(m + 1,)``; it rises by at most ``log_rates[j]`` from j to j + 1.

        Raises:
            ValueError: if the start is not a vector of k numbers other than zero.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> energy = synthesize(Factors(np.full((2, 1, 1), 0.5), np.arange(3), dimension=1))
            >>> np.exp(energy.along(np.ones(1))).round(12)
            array([1.    , 0.25  , 0.0625])
        """
        x = np.asarray(start, dtype=np.float64)
        if x.shape != self.P.shape[1:2] or not np.isfinite(x).all() or not x.any():
            raise ValueError(f"start must be {self.P.shape[1]} numbers, not all zero, got {start!r}.")
        scale, path, scales = 0.0, [], []
        for j in range(len(self.steps)):
            if j:
                x, scale = self.cells[j - 1] @ x, scale + float(self.log_scales[j - 1])
            size = float(np.abs(x).max())
            if size > 0:
                x, scale = x / size, scale + math.log(size)
            path.append(x)
            scales.append(scale)
        return self.energies(np.array(path)) + 2 * np.array(scales)

    def energies(self, coordinates: Array) -> Array:
        r"""Return :math:`\log V_j = \log x_j^\top P_j x_j` of any perturbations, given in the coordinates of :math:`Q_j`.

        Args:
            coordinates: :math:`x_j = Q_j^\top\delta_j`, ``(m + 1, k)``.

        Returns:
            ``(m + 1,)``, ``-inf`` for zero.

        Raises:
            ValueError: if the shape is another one.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> energy = synthesize(Factors(np.full((1, 1, 1), 0.5), np.arange(2), dimension=1), weight=4.0)
            >>> np.exp(energy.energies(np.array([[1.0], [2.0]]))).round(12)
            array([2., 4.])
        """
        x = np.asarray(coordinates, dtype=np.float64)
        if x.shape != self.P.shape[:2]:
            raise ValueError(f"coordinates must have the shape {self.P.shape[:2]}, got {x.shape}.")
        with np.errstate(divide="ignore"):
            return np.log(np.einsum("ja,jab,jb->j", x, self.P, x))


def synthesize(
    factors: FactorsLike,
    windows: Windows | None = None,
    *,
    directions: int | None = None,
    weight: float | None = None,
    grid: int = 200,
) -> EnergySynthesis:
    r"""Build a Lyapunov energy from the factors of a run, with weights that make its bounds as sharp as they get.

    The weights discount a reference growth :math:`g_j` and a margin a per training step: :math:`w_j = e^{-2(g_j+a(t_{j+1}-t_j))}`.
    References are the mean growth of the run (T1's constant weight), the growth of K(t, 0), that of the leading direction, the
    norms of the cells, and the growth that fits the norms of all windows best. Of all of them, each with a from a grid that is
    refined three times, the energy is kept whose *loosest* window is tightest: the largest ratio of T1's bound, with one m and one
    M, to the measured norm. The weight 0 is among them, so that the bound is never looser than the product of the norms of the
    cells.

    Args:
        factors: the factors of the run.
        windows: the norms of its windows, to take their grid and to compare with; measured if None, or if ``directions`` is given.
        directions: r, to use the leading r directions only; their factors are the leading blocks, since R is triangular. For large
            states: exact on their span, silent about the rest.
        weight: T1's w per training step, :math:`w_j = w^{t_{j+1}-t_j}`, > 0, in place of the search.
        grid: at most how many cells, if the windows are measured here.

    Returns:
        The energies at the times of the grid.

    Raises:
        ValueError: if a factor is not finite, directions are not in 1..k, or the weight is not positive or so large that the
            energies leave the precision of floats.

    Note:
        Energies with M above :math:`\epsilon^{-1/2}` are passed over: their smallest eigenvalues would be rounding.
        Rates above 1 are what a run that expands gives: an energy that grows at a known rate, and still a bound on every window.
        On a finite horizon every profile has such energies; that they bound it uniformly as the horizon grows is T1's hypothesis.

    Examples:
        >>> from stableopt.lyapunov.profile.growth.factors import Factors
        >>> factors = Factors(np.tile([[0.5, 0.0], [0.0, 0.25]], (9, 1, 1)), np.arange(10), dimension=2)
        >>> round(synthesize(factors).rate, 12), round(synthesize(factors).constant, 12)
        (0.5, 1.0)
    """
    R = np.asarray(factors.R, dtype=np.float64)
    if directions is not None:
        if not 1 <= directions <= R.shape[-1]:
            raise ValueError(f"directions must lie in 1..{R.shape[-1]}, got {directions}.")
        leading = _Leading(R[:, :directions, :directions], factors.steps, factors.full and directions == R.shape[-1])
        factors, R, windows = leading, leading.R, None
    if weight is not None and not weight > 0:
        raise ValueError(f"weight must be positive, got {weight!r}.")
    found = measure_windows(factors, grid=grid, refine=0) if windows is None else windows
    cells = EnergyCells.of(R, found)
    if weight is None:
        reference, log_weights = cells.search(found)
    else:
        reference, log_weights = "given", math.log(weight) * np.diff(found.steps)
    try:
        P, rates, smallest, largest = cells.certified(log_weights)
    except ValueError:
        if weight is not None:
            raise
        reference, log_weights = "norms", np.full(len(log_weights), -math.inf)  # nothing is lost in P = I
        P, rates, smallest, largest = cells.certified(log_weights)
    C, scale = cells.C, cells.log_scale
    return EnergySynthesis(
        found.steps,
        P,
        log_weights,
        rates,
        smallest,
        largest,
        C,
        scale,
        reference,
        bool(factors.full),
        Between.of(R, found),
    )


@dataclass(frozen=True)
class _Leading:
    R: Array
    steps: NDArray[np.int64]
    full: bool
