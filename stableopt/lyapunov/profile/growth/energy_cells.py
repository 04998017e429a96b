"""The search for the weights of an energy, over cells of factors, and its rates rounded outwards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.scaled import HALF_ULP
from stableopt.lyapunov.profile.growth.windows import Windows, cell_products

__all__ = ["EnergyCells", "bounds", "fitting_growth", "summation"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class EnergyCells:
    """The products of the factors over the cells of a grid: ``exp(log_scale) * C``, each C off by ``error`` at most.

    Args:
        C: ``(m, k, k)``.
        log_scale: ``(m,)``.
        error: ``(m,)``, in the spectral norm.
        span: ``(m,)`` their lengths in training steps.

    Examples:
        >>> EnergyCells(np.ones((1, 1, 1)), np.zeros(1), np.zeros(1), np.ones(1)).certified(np.zeros(1))[0].ravel()
        array([2., 1.])
    """

    C: Array
    log_scale: Array
    error: Array
    span: Array  # in training steps

    @classmethod
    def of(cls, R: Array, windows: Windows) -> EnergyCells:
        """Multiply the factors of each cell of the grid of the windows.

        Args:
            R: ``(n, k, k)``, finite.
            windows: the norms of the same factors.

        Returns:
            The cells.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> from stableopt.lyapunov.profile.growth.windows import measure_windows
            >>> R = np.full((4, 1, 1), 2.0)
            >>> cells = EnergyCells.of(R, measure_windows(Factors(R, np.arange(5), dimension=1), grid=2))
            >>> (np.exp(cells.log_scale) * cells.C[:, 0, 0]).round(12)
            array([4., 4.])
        """
        product, moduli = cell_products(R, windows.index)
        C, log_scale = product.scaled_by_one()
        roundings = (np.diff(windows.index) - 1) * R.shape[-1] * HALF_ULP
        error = roundings / (1 - roundings) * np.exp(moduli.log_frobenius() - log_scale)
        return cls(C, log_scale, np.where(roundings > 0, error, 0.0), np.diff(windows.steps).astype(np.float64))

    def references(self, windows: Windows) -> dict[str, Array]:
        """Return what growth per cell the weights may discount.

        Args:
            windows: the norms of the windows.

        Returns:
            Names and growths, each ``(m,)``; those that are not finite are left out.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> from stableopt.lyapunov.profile.growth.windows import measure_windows
            >>> R = np.full((4, 1, 1), 2.0)
            >>> found = measure_windows(Factors(R, np.arange(5), dimension=1))
            >>> list(EnergyCells.of(R, found).references(found))
            ['constant', 'path', 'leading', 'norms', 'windows']
        """
        path = windows.path[windows.index]
        with np.errstate(divide="ignore", invalid="ignore"):
            leading = np.log(np.abs(self.C[:, 0, 0])) + self.log_scale
            norms = np.log(np.linalg.norm(self.C, 2, axis=(1, 2))) + self.log_scale
            mean = np.full(len(path) - 1, (path[-1] - path[0])) * self.span / self.span.sum()
            fitted = np.diff(fitting_growth(windows.log_norms))
            all_of_them = {
                "constant": mean,
                "path": np.diff(path),
                "leading": leading,
                "norms": norms,
                "windows": fitted,
            }
        return {name: growth for name, growth in all_of_them.items() if np.isfinite(growth).all()}

    def search(self, windows: Windows) -> tuple[str, Array]:
        """Return the reference and the weights with the tightest loosest window.

        Args:
            windows: the norms of the windows.

        Returns:
            The name of the reference and the logarithms of the weights, ``(m,)``.

        Examples:
            >>> from stableopt.lyapunov.profile.growth.factors import Factors
            >>> from stableopt.lyapunov.profile.growth.windows import measure_windows
            >>> R = np.full((4, 1, 1), 2.0)  # one dimension: single norms are exact, nothing is to be discounted
            >>> found = measure_windows(Factors(R, np.arange(5), dimension=1))
            >>> EnergyCells.of(R, found).search(found)
            ('norms', array([-inf, -inf, -inf, -inf]))
        """
        if not len(self.C):
            return "constant", np.zeros(0)
        horizon = float(self.span.sum())
        rates = np.geomspace(0.01 / horizon, 8.0 / float(self.span.min()), 25)
        margins = np.concatenate([-rates[rates < 8.0 / horizon][::-1], [0.0], rates])
        best: tuple[float, str, Array] = (math.inf, "norms", np.full(len(self.C), -math.inf))
        best = self._better(best, "norms", best[2][None], windows)[0]
        for name, growth in self.references(windows).items():
            near = margins
            for _ in range(4):
                log_weights = -2.0 * (growth + near[:, None] * self.span)
                best, place = self._better(best, name, log_weights, windows)
                left, right = near[max(place - 1, 0)], near[min(place + 1, len(near) - 1)]
                near = np.linspace(left, right, 9)
        return best[1], best[2]

    def _better(
        self, best: tuple[float, str, Array], name: str, log_weights: Array, windows: Windows
    ) -> tuple[tuple[float, str, Array], int]:
        looseness = self._looseness(log_weights, windows)
        place = int(looseness.argmin())
        if looseness[place] < best[0]:
            best = (float(looseness[place]), name, log_weights[place])
        return best, place

    def _looseness(self, log_weights: Array, windows: Windows) -> Array:
        """Return the largest log ratio of T1's bound to the norm for each of many choices of weights, ``(c, m)``."""
        count, k = len(log_weights), self.C.shape[-1]
        P = np.tile(np.eye(k), (count, 1, 1))
        rates, smallest, largest = np.empty(log_weights.shape), *np.zeros((2, count, len(self.C) + 1))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for j in reversed(range(len(self.C))):
                X = self.C[j].T @ P @ self.C[j]
                w = np.exp(log_weights[:, j] + 2 * self.log_scale[j])
                P = np.eye(k) + w[:, None, None] * X
                sane = np.isfinite(P).all(axis=(1, 2)) & (np.trace(P, axis1=1, axis2=2) < k + HALF_ULP**-0.5)
                P[~sane], X[~sane], w[~sane] = np.nan, np.nan, np.nan
                values = np.full((count, k), np.nan)
                values[sane] = np.linalg.eigvalsh(X[sane])
                low, top = np.maximum(values[:, 0], 0.0), np.maximum(values[:, -1], 0.0)
                rates[:, j] = np.log(top / (1 + w * top)) + 2 * self.log_scale[j]
                smallest[:, j], largest[:, j] = np.log1p(w * low), np.log1p(w * top)
        measured = np.isfinite(windows.log_norms)
        loose = np.full(count, math.inf)
        for c in range(count):
            constant = (largest[c].max() - smallest[c].min()) / 2
            ratio = constant + (bounds(rates[c], 0.0 * smallest[c], 0.0 * largest[c]) - windows.log_norms)[measured]
            loose[c] = ratio.max() if np.isfinite(ratio).all() else math.inf
        return loose

    def certified(self, log_weights: Array) -> tuple[Array, Array, Array, Array]:
        r"""Return P, log rates, log m and log M, rounded outwards.

        With :math:`\hat X` the computed :math:`C^\top PC`, off by :math:`e_1`, and the stored :math:`P_j = I+w\hat X`, off by
        :math:`e_2`: :math:`X \preceq \hat X+e_1I` and :math:`P_j \succeq (1-e_2)I+w\hat X`, so that the rate is at most the
        largest of :math:`(x+e_1)/(1-e_2+wx)` over the spectrum of :math:`\hat X`: monotone in x, hence largest at an end. A true X
        has no negative eigenvalue, so those of :math:`\hat X` are at least :math:`-e_1`.

        Args:
            log_weights: ``(m,)``.

        Returns:
            ``(m + 1, k, k)``, ``(m,)``, ``(m + 1,)`` and ``(m + 1,)``.

        Raises:
            ValueError: if a weight is so large that the energies leave the precision of floats.

        Examples:
            >>> cells = EnergyCells(np.full((1, 1, 1), 0.5), np.zeros(1), np.zeros(1), np.ones(1))
            >>> P, log_rates, log_smallest, log_largest = cells.certified(np.log([2.0]))
            >>> round(float(P[0, 0, 0]), 12), round(math.exp(log_rates[0]), 12)
            (1.5, 0.166666666667)
        """
        m, k = self.C.shape[:2]
        P, rates = np.tile(np.eye(k), (m + 1, 1, 1)), np.empty(m)
        smallest, largest = np.zeros((2, m + 1))
        gamma = 2 * (k + 1) * HALF_ULP / (1 - 2 * (k + 1) * HALF_ULP)
        for j in reversed(range(m)):
            C, P_next = self.C[j], P[j + 1]
            X = C.T @ P_next @ C
            X = (X + X.T) / 2
            values = np.linalg.eigvalsh(X)
            low, top = max(float(values[0]), 0.0), max(float(values[-1]), 0.0)
            moduli = np.abs(C).T @ np.abs(P_next) @ np.abs(C)
            off = float(np.linalg.norm(C, 2) * self.error[j] * 2 + self.error[j] ** 2) * math.exp(largest[j + 1])
            e1 = gamma * float(np.linalg.norm(moduli)) + off + k * k * HALF_ULP * top
            w = math.exp(log_weights[j] + 2 * self.log_scale[j])
            e2 = 2 * k * HALF_ULP * (1 + w * top) + w * k * k * HALF_ULP * top
            if not w * e1 + e2 < 0.5:
                raise ValueError(
                    f"the weight of the cell {j} is so large that the energies leave the precision of floats."
                )
            P[j] = np.eye(k) + w * X
            ends = [(x + e1) / (1 - e2 + w * x) for x in (0.0, top)]
            exact_zero = not C.any() and self.error[j] == 0
            rates[j] = (
                -math.inf if exact_zero else _up(math.log(max(ends)) + 2 * self.log_scale[j], 2 * self.log_scale[j])
            )
            smallest[j], largest[j] = math.log1p(w * (low - e1) - e2), math.log1p(w * (top + e1) + e2)
        return P, rates, smallest, largest


def fitting_growth(log_norms: Array) -> Array:
    r"""Return the accumulated growth :math:`\sigma_j` that fits all windows best.

    It minimizes c under :math:`0 \le \log K(t_j,t_i) - (\sigma_j - \sigma_i) \le c`: no bound of the form
    :math:`Ce^{\sigma_j-\sigma_i}` with such a growth is tighter where it is loosest. For a given c these are differences of two
    unknowns, which all can be met iff a graph has no negative cycle; the :math:`\sigma` are its shortest paths. c is found by
    bisection, to a thousandth.

    Args:
        log_norms: ``(m + 1, m + 1)``, the entry ``[j, i]`` for i <= j; what is not finite is left out.

    Returns:
        ``(m + 1,)``, 0 at first.

    Examples:
        >>> K = np.array([[0.0, np.nan, np.nan], [-1.0, 0.0, np.nan], [1.0, 2.0, 0.0]])
        >>> fitting_growth(K).round(2)
        array([ 0., -1.,  1.])
    """
    m = len(log_norms)
    j, i = np.nonzero(np.isfinite(log_norms) & np.tri(m, k=-1, dtype=bool))
    measured, low, high = log_norms[j, i], 0.0, 1.0
    sigma = None
    while high - low > 1e-3 * high or sigma is None:
        c = high if sigma is None else (low + high) / 2
        edges = np.full((m, m), math.inf)  # [u, v] bounds sigma_v - sigma_u
        edges[i, j], edges[j, i] = measured, c - measured
        np.fill_diagonal(edges, 0.0)
        for k in range(m):
            np.minimum(edges, edges[:, k, None] + edges[None, k], out=edges)
        if (np.diag(edges) < -m * HALF_ULP * np.abs(measured).max(initial=1.0)).any():
            low, high = c, (2 * high if sigma is None else high)
        else:
            high, sigma = c, edges.min(axis=0)
    return sigma - sigma[0]


def _up(x: float, term: float) -> float:
    """Return x rounded up beyond the roundings of a logarithm, a product and a sum."""
    return x + 4 * HALF_ULP * (abs(x) + abs(term))


def bounds(log_rates: Array, log_smallest: Array, log_largest: Array) -> Array:
    """Return the log bounds of all windows, ``[j, i]``; a cell of zeros counts as one with the rate 1.

    Args:
        log_rates: ``(m,)``.
        log_smallest: ``(m + 1,)``.
        log_largest: ``(m + 1,)``.

    Returns:
        ``(m + 1, m + 1)``; what is above the diagonal has no meaning.

    Examples:
        >>> float(bounds(np.log([0.25]), np.zeros(2), np.log([4.0, 1.0]))[1, 0])
        0.0
    """
    total = np.concatenate([[0.0], np.cumsum(np.where(np.isneginf(log_rates), 0.0, log_rates))])
    return ((total - log_smallest)[:, None] + (log_largest - total)[None, :]) / 2


def summation(log_rates: Array, log_smallest: Array, log_largest: Array) -> float:
    """Return how far the sums of :func:`bounds` can be off.

    Args:
        log_rates: ``(m,)``.
        log_smallest: ``(m + 1,)``.
        log_largest: ``(m + 1,)``.

    Returns:
        A bound on their rounding.

    Examples:
        >>> 0 < summation(np.log([0.25]), np.zeros(2), np.log([4.0, 1.0])) < 1e-14
        True
    """
    sizes = np.abs(np.where(np.isneginf(log_rates), 0.0, log_rates)).sum() + log_smallest.max() + log_largest.max()
    return float((len(log_rates) + 4) * HALF_ULP * sizes)
