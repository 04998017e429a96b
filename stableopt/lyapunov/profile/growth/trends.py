"""What the low frequencies of a path say: whether it wanders off, and the law by which it grows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.exponents import cosines
from stableopt.lyapunov.running import student_quantile

__all__ = ["Path", "Trend", "POWERS"]

POWERS = np.round(np.arange(-2.0, 2.001, 0.05), 2)
r"""The powers :math:`\gamma` of the laws of growth that are tried."""
TURNS = np.array([0.0, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0, 11.0, 15.0, 20.0, 28.0, 40.0, 60.0, 100.0, 300.0, 1e4])
r"""The :math:`\kappa` that are tried: the frequency below which the spectrum of a path is flat; 0 is a random walk."""
SHARES = np.array([0.0, *np.geomspace(0.03, 1e5, 22)])
"""The variances of a random walk beneath the noise that are tried, in those of the noise at the lowest frequency."""
POINTS = 4096
"""Longer paths are looked at in so many places."""
LINES, NEIGHBORS = 8, 16
"""At most so many oscillations are taken out, each seen against so many frequencies on both sides."""
SHORTEST = 50
"""Shorter paths are not judged."""


@dataclass(frozen=True)
class Trend:
    r"""A law :math:`a + b\,(t^\gamma - 1)/\gamma` (:math:`a + b\log t` for :math:`\gamma = 0`) fitted to a path.

    Args:
        rise: what the path rises by along the law that fits a line and one that fits a logarithm best, the two estimates.
        error: their standard errors.
        freedom: degrees of freedom.
        power: the :math:`\gamma` that fits best.
        low: lower end of the interval of :math:`\gamma`, -inf if all small ones fit.
        high: its upper end.

    Examples:
        >>> Trend((1.0, 2.0), (0.1, 0.1), 10.0, 1.0, 0.9, 1.1).bounds(0.95)
        (0.777..., 2.222...)
    """

    rise: tuple[float, float]
    error: tuple[float, float]
    freedom: float
    power: float
    low: float
    high: float

    def bounds(self, level: float) -> tuple[float, float]:
        """Enclose the rise, whichever of the two laws holds.

        Args:
            level: of the interval for each law.

        Returns:
            Lower and upper end.

        Examples:
            >>> Trend((1.0, 1.0), (0.0, 0.0), 10.0, 1.0, 1.0, 1.0).bounds(0.99)
            (1.0, 1.0)
        """
        t = student_quantile(0.5 + level / 2.0, self.freedom)
        low = min(r - t * e for r, e in zip(self.rise, self.error, strict=True))
        return low, max(r + t * e for r, e in zip(self.rise, self.error, strict=True))


@dataclass(frozen=True)
class _Design:
    """What is the same for all paths of one length: laws and weights at the low frequencies."""

    level: NDArray[np.float64]  # (q, laws): the laws themselves
    growth: NDArray[np.float64]  # (q + 1, laws): their growth from point to point, the mean first
    weights: NDArray[np.float64]  # (turns, q) of a path
    growth_weights: NDArray[np.float64]  # (turns, q + 1) of its growth
    rise: NDArray[np.float64]  # (laws,) of each law from the first point to the last


def _law(t: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """The law of growth of this power."""
    return np.log(t) if power == 0.0 else (t**power - 1.0) / power


@lru_cache(maxsize=32)
def _design(first: int, count: int, last: int, q: int) -> _Design:
    t = np.linspace(first / last, 1.0, count)
    laws = np.array([_law(t, g) for g in POWERS])
    growth = np.diff(laws, axis=1)
    mean = growth.sum(1, keepdims=True) / math.sqrt(count - 1)
    waves = cosines(growth, q)
    waves[POWERS == 1.0] = 0.0  # a line grows by the same everywhere
    return _Design(
        cosines(laws, q).T,
        np.concatenate([mean, waves], 1).T,
        _weights(count, np.arange(1, q + 1)),
        _weights(count - 1, np.arange(q + 1)),
        laws[:, -1] - laws[:, 0],
    )


def _weights(count: int, j: NDArray[np.int64]) -> NDArray[np.float64]:
    r"""One over the standard deviation of the coefficient j under each :math:`\kappa`, up to a factor.

    A stationary autoregression of order one, :math:`x_t = \varphi x_{t-1} + e_t`, has at the frequency :math:`\omega = \pi j/n` the
    variance :math:`1/((1-\varphi)^2 + 4\varphi\sin^2(\omega/2)) \propto 1/(\kappa^2 + s_j^2)`,
    :math:`s_j = \frac{2n}{\pi}\sin\frac{\omega}{2} \approx j`. A random walk has exactly :math:`1/s_j^2`.
    """
    s = 2.0 * count / np.pi * np.sin(np.pi * j / (2.0 * count))
    return np.sqrt(s**2 + TURNS[:, None] ** 2)


def _without_lines(growth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take out of the growth the oscillations that stand alone in its spectrum: they move a path to and fro, and no further.

    One of at least six periods is a line if its power is over 30 times the median of its neighborhood, which has a chance of
    2^-30 at each frequency of a noise.
    """
    x = growth.copy()
    n = x.size
    window = np.hanning(n)
    for _ in range(LINES):
        power = np.abs(np.fft.rfft(window * (x - x.mean()))) ** 2
        reach = np.lib.stride_tricks.sliding_window_view(np.pad(power, NEIGHBORS, mode="reflect"), 2 * NEIGHBORS + 1)
        beyond = power / np.maximum(np.median(reach, axis=1), np.finfo(float).tiny)
        beyond[:6] = 0.0
        top = int((power * (beyond > 30.0)).argmax())
        if beyond[top] <= 30.0 or power[top] <= (n * np.finfo(float).eps * np.abs(x).max()) ** 2:
            break
        x -= _line(x, window, 2.0 * np.pi * top / n)
    return x


def _line(x: NDArray[np.float64], window: NDArray[np.float64], omega: float) -> NDArray[np.float64]:
    """The oscillation near a frequency, by least squares in amplitude, phase and frequency (Gauss-Newton)."""
    t = np.arange(x.size) - (x.size - 1.0) / 2.0
    line = np.zeros_like(x)
    for _ in range(8):
        c, s = np.cos(omega * t), np.sin(omega * t)
        columns = np.stack([c, s, np.ones(x.size), t * c, t * s], 1)
        a, b, _mean, tc, ts = np.linalg.lstsq(columns * window[:, None], window * x, rcond=None)[0]
        line = a * c + b * s
        # d/d omega of a cos + b sin is t (b cos - a sin)
        omega += float(np.clip((b * tc - a * ts) / (a * a + b * b), -2.0 / x.size, 2.0 / x.size))
    return line


class Path:
    r"""The part of a path that is judged, at its low frequencies.

    A path :math:`\ell_t = a + b\,g_\gamma(t) + S_t` is a law of growth and a noise S. The coefficients of S at the q lowest cosines
    are independent in the limit, with variance :math:`\propto 1/(\kappa^2 + j^2)`: :math:`\kappa = 0` if S is a random walk, larger
    the faster S forgets. How S moves from one step to the next does not matter.

    Args:
        log_norms: :math:`\ell_0, \ldots, \ell_T`.
        first: the step from which on it is judged; time of the laws is counted from 0.

    Raises:
        ValueError: if fewer than 50 steps are left.

    Examples:
        >>> walk = np.random.default_rng(0).standard_normal(2001).cumsum()
        >>> Path(walk, 200).stationary() < 6.0 < Path(np.diff(walk), 200).stationary()
        True
    """

    def __init__(self, log_norms: NDArray[np.float64], first: int):
        last = log_norms.size - 1
        if last - first < SHORTEST:
            raise ValueError(f"a path of {last - first} steps is too short to be judged, {SHORTEST} are needed.")
        stride = -(-(last - first) // POINTS)
        first = last - stride * ((last - first) // stride)
        self.path = log_norms[first::stride]
        self.steps = last - first
        n = self.path.size
        q = max(8, min(48, n // 5))
        self.design = _design(max(first, 1), n, last, q)
        self.times = np.linspace(max(first, 1) / last, 1.0, n)
        self.rounding = float(np.finfo(float).eps) * (1.0 + float(np.abs(self.path).max())) * n
        growth = _without_lines(np.diff(self.path))
        self.level = cosines(np.concatenate([[0.0], np.cumsum(growth)]), q)
        self.growth = np.concatenate([[growth.sum() / math.sqrt(n - 1)], cosines(growth, q)])

    def stationary(self) -> float:
        r"""The log likelihood ratio of a noise that forgets to a random walk, whatever the law of growth.

        Returns:
            At least 0; over 7 in one random walk in two hundred.

        Examples:
            >>> walks = np.random.default_rng(0).standard_normal((200, 301)).cumsum(1)
            >>> sum(Path(walk, 30).stationary() > 7.0 for walk in walks)
            1
        """
        return self._ratio(self.level, self.design.level, self.design.weights)

    def steady(self) -> float:
        """The same for the growth: whether it forgets, or itself wanders off, so that it has no mean.

        Returns:
            At least 0; over 7 in one sum of random walks in two hundred.

        Examples:
            >>> both_ways = np.abs(np.linspace(-10.0, 10.0, 1001))
            >>> noise = 0.01 * np.random.default_rng(0).standard_normal(1001).cumsum()
            >>> Path(both_ways + noise, 100).steady() < 6.0 < Path(noise, 100).steady()
            True
        """
        return self._ratio(self.growth[1:], self.design.growth[1:], self.design.growth_weights[:, 1:])

    def _ratio(self, y: NDArray[np.float64], laws: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
        scores = self._scores(y, laws, weights)
        return float(scores.max() - scores[0])

    def _scores(
        self, y: NDArray[np.float64], laws: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The log likelihood of each turn, its variance and the law of growth chosen for it."""
        rest = self._rest(y, laws, weights).min(1)
        return np.log(weights).sum(1) - 0.5 * y.size * np.log(rest)

    def _rest(
        self, y: NDArray[np.float64], laws: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The weighted sum of squares that each law leaves, (turns, laws)."""
        Y = (weights * y)[:, :, None]
        G = weights[:, :, None] * laws
        squares = (G**2).sum(1, keepdims=True)
        left = Y - (Y * G).sum(1, keepdims=True) / np.where(squares > 0.0, squares, 1.0) * G
        return (left**2).sum(1) + self.rounding**2 * (weights**2).mean(1, keepdims=True)

    def trend(self, level: float, *, walk: bool) -> Trend:
        r"""Fit the laws of growth.

        Args:
            level: of the interval of the power.
            walk: whether the noise is a random walk, so that its growth is looked at; otherwise the path itself.

        Returns:
            The trend. The interval of the power is the set of those that are not rejected beside the best one.

        Examples:
            >>> t = np.arange(1001.0)
            >>> found = Path(np.sqrt(t), 100).trend(0.95, walk=False)
            >>> found.power, round(found.rise[0], 1)
            (0.5, 20.5)
        """
        d = self.design
        y, laws, weights = (self.growth, d.growth, d.growth_weights) if walk else (self.level, d.level, d.weights)
        kept = slice(1, None) if walk else slice(None)
        turn = max(int(self._scores(y[kept], laws[kept], weights[:, kept]).argmax()), int(walk))
        w = weights[turn]
        rest = self._rest(y, laws, w[None])[0]
        freedom = y.size - 2.0
        best = int(rest.argmin())
        t = student_quantile(0.5 + level / 2.0, freedom)
        kept_powers = np.flatnonzero(rest <= rest[best] * (1.0 + t**2 / freedom))
        low, high = int(kept_powers[0]) - 1, int(kept_powers[-1]) + 1
        rises, errors = [], []
        for k in (int(np.flatnonzero(POWERS == 1.0)[0]), int(np.flatnonzero(POWERS == 0.0)[0])):
            g = w * laws[:, k]
            b = float((w * y) @ g / (g @ g))
            rises.append(b * float(d.rise[k]))
            errors.append(math.sqrt(float(rest[k]) / (freedom + 1.0) / float(g @ g)) * float(d.rise[k]))
        return Trend(
            (rises[0], rises[1]),
            (errors[0], errors[1]),
            freedom + 1.0,
            float(POWERS[best]),
            float(POWERS[low]) if low >= 0 else -math.inf,
            float(POWERS[high]) if high < POWERS.size else math.inf,
        )

    def walk(self, level: float) -> float:
        r"""Return the largest standard deviation, over the part that is judged, of a random walk that is not excluded.

        The noise is taken as the sum of one that forgets and a walk: the coefficient j has the variance
        :math:`A/(\kappa^2 + s_j^2) + B/s_j^2`, and a walk with steps of variance :math:`\sigma^2` has
        :math:`B = \sigma^2 n^2/\pi^2`. Not excluded is what has a likelihood within :math:`\frac12\chi^2_1` of the largest.

        Args:
            level: one-sided, of the likelihood.

        Returns:
            At least the truth in about eight of ten paths: a law of growth that fits a walk takes some of it.

        Examples:
            >>> noise = np.random.default_rng(0).standard_normal(1001)
            >>> round(Path(0.3 * noise, 100).walk(0.95), 1), round(Path(0.3 * noise.cumsum(), 100).walk(0.95)) > 5
            (0.1, True)
        """
        d, n = self.design, self.path.size
        s2 = d.weights[0] ** 2
        kappa2 = TURNS[2:-1:2, None, None] ** 2
        variance = 1.0 / (kappa2 + s2) + SHARES[:, None] / (kappa2 + s2[0]) * s2[0] / s2
        weights = 1.0 / np.sqrt(variance.reshape(-1, s2.size))
        rest = self._rest(self.level, d.level, weights)
        # the likelihood of what the law leaves, and the mean over the laws: none of them is known
        squares = (weights**2 @ d.level**2) / (d.level**2).sum(0)
        freedom = s2.size - 1.0
        scores = np.log(weights).sum(1, keepdims=True) - 0.5 * np.log(squares) - 0.5 * freedom * np.log(rest)
        best = scores.max(1, keepdims=True)
        shares = np.exp(scores - best)
        total = best[:, 0] + np.log(shares.mean(1))
        left = (shares * rest).sum(1) / shares.sum(1) / freedom
        B = left.reshape(kappa2.size, -1) * (SHARES * s2[0] / (kappa2[:, 0] + s2[0]))
        allowed = total >= total.max() - 0.5 * student_quantile(level, freedom) ** 2
        return math.pi * math.sqrt(float(B.ravel()[allowed].max()) / n)
