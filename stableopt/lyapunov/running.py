"""A mean that forgets, with an honest standard error and interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["RunningMean", "student_quantile"]


@dataclass
class RunningMean:
    r"""The mean of a stream in which older values count less, and what it is known to.

    With weights :math:`w_i = \rho^{n-i}`, :math:`W = \sum w_i` and :math:`W_2 = \sum w_i^2`,

    .. math:: m = \frac{\sum w_i x_i}{W}, \qquad s^2 = \frac{\sum w_i (x_i - m)^2}{W - W_2/W}, \qquad
              \mathrm{se} = s\,\frac{\sqrt{W_2}}{W} .

    For independent values of one mean and variance, m is unbiased, :math:`s^2` is an unbiased estimate of their variance and
    :math:`\mathrm{se}^2` one of that of m. The mean moves as :math:`W^2/W_2` equal values would; that tends to
    :math:`(1+\rho)/(1-\rho)`.

    Args:
        keep: :math:`\rho`, how much of the weight of older values is kept, in (0, 1].
        weight: :math:`W`.
        squares: :math:`W_2`.
        mean: m, 0 before the first value.
        deviation: :math:`\sum w_i (x_i - m)^2`.

    Note:
        The standard error knows the scatter of the values and nothing else. Where their mean drifts, m lags behind by
        :math:`\rho/(1-\rho)` values, which it does not tell.

    Examples:
        >>> running = RunningMean(keep=1.0)
        >>> for x in (1.0, 2.0, 6.0):
        ...     running.add(x)
        >>> running.mean, round(running.error, 4), running.count
        (3.0, 1.5275, 3.0)
    """

    keep: float = 0.9
    weight: float = 0.0
    squares: float = 0.0
    mean: float = 0.0
    deviation: float = 0.0

    def add(self, *values: float) -> None:
        """Take in values that are equally old; the ones before lose weight once.

        Args:
            values: one or more finite numbers.

        Examples:
            >>> running = RunningMean(keep=0.5)
            >>> running.add(1.0)
            >>> running.add(4.0, 4.0)
            >>> running.mean  # (1 / 2 + 4 + 4) / 2.5
            3.4
        """
        self.weight *= self.keep
        self.squares *= self.keep**2
        self.deviation *= self.keep
        for x in values:
            self.weight += 1.0
            self.squares += 1.0
            step = x - self.mean
            self.mean += step / self.weight
            self.deviation += step * (x - self.mean)

    @property
    def count(self) -> float:
        r"""How many equal values would say as much, :math:`W^2/W_2`; 0 before the first.

        Examples:
            >>> RunningMean().count
            0.0
        """
        return self.weight**2 / self.squares if self.squares else 0.0

    @property
    def error(self) -> float:
        """The standard error of the mean, NaN before the second value.

        Examples:
            >>> RunningMean().error
            nan
        """
        free = self.weight - self.squares / self.weight if self.weight else 0.0
        if free <= 1e-9 * self.weight:
            return math.nan
        return math.sqrt(max(self.deviation, 0.0) / free * self.squares) / self.weight


@lru_cache(maxsize=1024)
def student_quantile(probability: float, freedom: float) -> float:
    r"""Return the quantile of Student's t distribution with any positive number of degrees of freedom.

    With :math:`t = \sqrt\nu \tan\varphi` the density is proportional to :math:`\cos^{\nu-1}\varphi`, which is summed numerically.

    Args:
        probability: between 0 and 1.
        freedom: :math:`\nu > 0`.

    Returns:
        The quantile, to about five digits for probabilities between 0.005 and 0.995 and :math:`\nu \ge 1`.

    Examples:
        >>> round(student_quantile(0.975, 10.0), 3), round(student_quantile(0.975, 1.0), 2)
        (2.228, 12.71)
    """
    ends = np.linspace(0.0, math.pi / 2.0, 40001)
    density = np.cos((ends[1:] + ends[:-1]) / 2.0) ** (freedom - 1.0)
    beyond_half = np.concatenate([[0.0], np.cumsum(density)]) / (2.0 * density.sum())
    phi = float(np.interp(abs(probability - 0.5), beyond_half, ends))
    return math.copysign(math.sqrt(freedom) * math.tan(phi), probability - 0.5)
