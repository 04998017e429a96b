"""Lyapunov exponents from the growth along one run, with intervals that cover and a refusal where they would not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopt.lyapunov.running import student_quantile

__all__ = ["Exponent", "exponent", "spectrum", "mean_square_exponent", "long_run_variance", "cosines", "MIN_EFFECTIVE"]

MIN_EFFECTIVE = 30.0
"""With fewer effective values no interval is given."""
COSINES = 16
"""How many low frequencies the variance of a mean is taken from; of fewer values than 256, one in 16, but at least 6."""
MIN_MEMBERS = 10.0
"""A mean square is followed for as long as this many members of the ensemble, and a third of them, carry it."""
FOLLOWED = 4
"""A mean square that cannot be followed for so many steps is not given: where it breaks off is chance."""
DRIFT_LEVEL = 0.998
"""A drift of the growth along the run is one that a stationary growth would show in two runs of a thousand."""

Kind = Literal["almost sure", "mean square", "finite time"]


@dataclass(frozen=True)
class Exponent:
    r"""A growth rate per step and what it is known to.

    Args:
        value: the estimate, per training step.
        lower: lower end of the interval, NaN where none is given.
        upper: upper end, NaN where none is given.
        level: nominal probability that an interval made in this way covers.
        effective: how many independent values would say as much; for ``mean square`` how many members carry the mean.
        count: how many values it is from, the burn-in left out.
        burn_in: how many values were left out at the beginning.
        kind: ``"almost sure"``: the limit of :math:`\frac1t\log\|\delta_t\|` along a run whose growth is stationary;
            ``"mean square"``: that of :math:`\frac1{2t}\log E\|\delta_t\|^2`; ``"finite time"``: a mean over this run that is no
            estimate of a limit, because the growth drifts or is not finite.
        reason: why there is no interval, or what limits the estimate; empty otherwise.

    Examples:
        >>> fall = Exponent(-0.1, -0.12, -0.08, 0.95, 200.0, 900, 100, "almost sure", "")
        >>> fall.known, fall.sign
        (True, -1)
        >>> print(fall)
        -0.1 per step (almost sure), 95 % interval [-0.12, -0.08], 200 effective of 900 values
    """

    value: float
    lower: float
    upper: float
    level: float
    effective: float
    count: int
    burn_in: int
    kind: Kind
    reason: str

    @property
    def known(self) -> bool:
        """Whether there is an interval.

        Examples:
            >>> exponent([0.1, 0.2]).known
            False
        """
        return not math.isnan(self.lower)

    @property
    def sign(self) -> int:
        """The sign of the exponent where the interval leaves no doubt of it, otherwise 0.

        Examples:
            >>> exponent(np.random.default_rng(0).standard_normal(1000)).sign
            0
        """
        return int(self.lower > 0.0) - int(self.upper < 0.0)

    def __str__(self) -> str:
        interval = (
            f"{self.level * 100:g} % interval [{self.lower:.4g}, {self.upper:.4g}]" if self.known else "no interval"
        )
        text = f"{self.value:.4g} per step ({self.kind}), {interval}, {self.effective:.0f} effective of {self.count} values"
        return f"{text}; {self.reason}" if self.reason else text


def cosines(values: ArrayLike, highest: int) -> NDArray[np.float64]:
    r"""The coefficients of a sequence at the lowest cosines, :math:`\sqrt{2/n}\sum_t x_t \cos(\pi j (t + \frac12)/n)`.

    Args:
        values: shape (..., n); along the last axis.
        highest: of the frequencies j = 1, 2, ..., below n.

    Returns:
        Array (..., ``highest``). The cosines are orthonormal, and orthogonal to constants.

    Examples:
        >>> C = cosines(np.eye(50), 3)
        >>> bool(np.allclose(C.T @ C, np.eye(3))), bool(np.allclose(C.sum(0), 0.0))
        (True, True)
    """
    x = np.asarray(values, float)
    n = x.shape[-1]
    j = np.arange(1, highest + 1)
    waves = np.fft.rfft(x, 2 * n, axis=-1)[..., 1 : highest + 1]
    return math.sqrt(2.0 / n) * (waves * np.exp(-0.5j * np.pi * j / n)).real


def _frequencies(count: int) -> int:
    """How many low frequencies of so many values are looked at."""
    return min(COSINES, max(6, count // 16))


def long_run_variance(values: ArrayLike) -> tuple[float, float]:
    r"""Estimate :math:`\omega^2 = \lim_n n \operatorname{Var}(\bar x_n)` of a stationary sequence.

    An autoregression of order one takes out most of the correlation, and the low frequencies of what it leaves give the rest:

    .. math:: \omega^2 = \frac{\frac1q\sum_{j=1}^q e_j^2}{(1 - \varphi)^2}, \qquad
              \nu = 2\Big/\Big(\frac2q + \frac{4(1+\varphi)}{n(1-\varphi)}\Big),

    with e_j the coefficient at the cosine of frequency j of the residuals :math:`\sqrt{1-\varphi^2}\,x_0`,
    :math:`x_t - \varphi x_{t-1}`, with :math:`\varphi` the correlation of neighbors plus its bias :math:`(1 + 3\varphi)/n`, and
    :math:`\nu` the degrees of freedom that a chi-square of the same relative variance has. Where the correlation decays like that
    of an autoregression of order one nothing is lost by the fit, otherwise the low frequencies still see the variance of the mean.

    Args:
        values: at least eight numbers.

    Returns:
        :math:`\omega^2` and :math:`\nu`.

    References:
        Lazarus, Lewis, Stock and Watson, HAR inference: recommendations for practice (2018), for the cosines;
        Andrews and Monahan (1992) for the prewhitening; Marriott and Pope (1954) for the bias.

    Examples:
        >>> x = np.random.default_rng(0).standard_normal(4000)
        >>> variance, freedom = long_run_variance(x[1:] + x[:-1])  # 4
        >>> round(variance, 1), round(freedom)
        (4.4, 16)
    """
    z = np.asarray(values, float)
    z = z - z.mean()
    n = z.size
    scatter = float(z @ z)
    if scatter == 0.0:
        return 0.0, float(n - 1)
    phi = float(z[1:] @ z[:-1]) / scatter
    phi = max(-0.97, min(phi + (1.0 + 3.0 * phi) / n, 1.0 - 1.0 / n)) if phi > 0.0 else max(phi, -0.97)
    q = _frequencies(n)
    start = z[:1] * math.sqrt(
        1.0 - phi * phi
    )  # the first value counts as much as an innovation, in a stationary sequence
    e = cosines(np.concatenate([start, z[1:] - phi * z[:-1]]), q)
    freedom = 2.0 / (2.0 / q + 4.0 * (1.0 + phi) / (n * (1.0 - phi)))
    return float(e @ e) / q / (1.0 - phi) ** 2, freedom


def exponent(
    growth: ArrayLike, *, level: float = 0.95, burn_in: int | None = None, spacing: int | ArrayLike = 1
) -> Exponent:
    r"""Estimate the almost sure exponent :math:`\lim \frac1T \log\|\delta_T\|` from the growth of each step or window.

    .. math:: \hat\lambda = \frac{\sum_j x_j}{\sum_j n_j}, \qquad
              \hat\lambda \pm t_\nu \sqrt{\omega^2 / n}, \qquad n_{\mathrm{eff}} = n \min(1, \operatorname{Var}(x)/\omega^2),

    with :math:`\omega^2` and :math:`\nu` from :func:`long_run_variance`: neighboring values of a growth are correlated, and the
    scatter of a mean of n of them is not that of n independent ones.

    Args:
        growth: :math:`x_j`, the growth of log norm over the j-th window, shape (n,); -inf where a perturbation is annihilated.
        level: nominal coverage of the interval, in (0, 1).
        burn_in: how many values at the beginning are left out; None is a tenth of them.
        spacing: :math:`n_j`, the steps of each window, one number or an array (n,).

    Returns:
        The exponent per step. The interval is NaN, with the reason, where fewer than 30 effective values are left, or where
        the growth drifts along the run, so that its mean estimates no limit. It is never narrower than the rounding of the
        numbers it is made from, :math:`\epsilon(1 + \max|x|)`, nor than the range of :math:`\sum_{i \le j}(x_i - \hat\lambda)`
        over n: the mean of what goes to and fro, as of directions that turn, depends by so much on where it ends.

    Raises:
        ValueError: if growth is not a sequence, the level is not in (0, 1), the burn-in leaves nothing, or windows have no steps.

    Note:
        It covers where the growth is stationary and its correlation dies out within a small part of the run; an interval
        does not see what happens less often than once in the run.

    Examples:
        >>> x = -0.1 + 0.5 * np.random.default_rng(1).standard_normal(1000)
        >>> print(exponent(x))
        -0.1261 per step (almost sure), 95 % interval [-0.1632, -0.08894], 820 effective of 900 values
        >>> exact = exponent(np.full(100, np.log(0.9)))
        >>> exact.upper - exact.lower < 1e-15
        True
    """
    x = np.asarray(growth, float)
    if x.ndim != 1:
        raise ValueError(f"growth is a sequence of numbers, one per step or window; got shape {x.shape}.")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is a probability between 0 and 1, got {level}.")
    steps = np.broadcast_to(np.asarray(spacing, float), x.shape)
    if not (steps > 0.0).all():
        raise ValueError("spacing is the number of steps of each window, all positive.")
    first = x.size // 10 if burn_in is None else int(burn_in)
    if first < 0 or (x.size and first >= x.size):
        raise ValueError(
            f"burn_in leaves out {first} of {x.size} values; expected at least 0 and fewer than there are."
        )
    bad = np.flatnonzero(~np.isfinite(x))
    if bad.size or not x.size:
        return _without_numbers(x, bad, level, first)
    return _from_numbers(x[first:], steps[first:], level, first)


def _without_numbers(x: NDArray[np.float64], bad: NDArray[np.intp], level: float, first: int) -> Exponent:
    """The exponent of no values, or of values of which one is not finite."""
    nan = math.nan
    if not x.size:
        return Exponent(nan, nan, nan, level, 0.0, 0, 0, "finite time", "there are no values")
    k = int(bad[0])
    count = x.size - first
    if x[k] == -math.inf and np.isfinite(x[k:]).any():
        why = f"the perturbation is annihilated in window {k}; what is measured later enters there"
        return Exponent(-math.inf, nan, nan, level, 0.0, count, first, "finite time", why)
    if x[k] == -math.inf:
        why = f"the perturbation is annihilated in window {k}"
        return Exponent(-math.inf, -math.inf, -math.inf, level, float(count), count, first, "almost sure", why)
    value = math.inf if x[k] == math.inf else nan
    return Exponent(value, nan, nan, level, 0.0, count, first, "finite time", f"the growth is {x[k]} in window {k}")


def _from_numbers(x: NDArray[np.float64], steps: NDArray[np.float64], level: float, first: int) -> Exponent:
    """The exponent of finite values."""
    n = x.size
    value = float(x.sum() / steps.sum())
    # g = value + what the ratio of sums leaves: its mean is the value, and its long-run variance that of the ratio
    g = value + (x - value * steps) / float(steps.mean())
    rounding = float(np.finfo(float).eps) * (1.0 + float(np.abs(g).max()))
    if float(np.abs(g - value).max()) <= 8.0 * rounding:
        variance, freedom, effective = 0.0, math.inf, float(n)
    elif n < 8:
        variance, freedom, effective = 0.0, 1.0, 0.0
    else:
        variance, freedom = long_run_variance(g)
        effective = n * min(1.0, float(g.var()) / variance) if variance else float(n)
    kind: Kind = "almost sure"
    reason = ""
    if n < MIN_EFFECTIVE:
        reason = f"{n} values are too few for an interval, {MIN_EFFECTIVE:g} are needed"
    elif variance and _drifts(g):
        kind, (a, b) = "finite time", (float(part.mean()) for part in np.array_split(g, 2))
        reason = f"the growth drifts along the run, from {a:.3g} to {b:.3g} per step between its halves: the mean is no limit"
    elif effective < MIN_EFFECTIVE:
        reason = f"{n} values are worth {effective:.0f} independent ones, {MIN_EFFECTIVE:g} are needed"
    if reason:
        return Exponent(value, math.nan, math.nan, level, effective, n, first, kind, reason)
    wide = student_quantile(0.5 + level / 2.0, round(freedom, 1)) * math.sqrt(variance / n) if variance else 0.0
    beyond = np.cumsum(g - value)  # the path about its line: where it ends by chance moves the mean by as much
    half = max(wide, rounding, float(np.ptp(beyond)) / n)
    return Exponent(value, value - half, value + half, level, effective, n, first, kind, reason)


def _drifts(g: NDArray[np.float64]) -> bool:
    """Whether the growth has a trend: a line through it, against what the low frequencies leave beside the line."""
    n = g.size
    y, line = cosines(np.stack([g, np.arange(n)]), _frequencies(n))
    slope = float(y @ line / (line @ line))
    rest = y - slope * line
    freedom = y.size - 1.0
    error = math.sqrt(float(rest @ rest) / freedom / float(line @ line))
    return abs(slope) > student_quantile(0.5 + DRIFT_LEVEL / 2.0, freedom) * error


def spectrum(
    log_diagonal: ArrayLike, *, level: float = 0.95, burn_in: int | None = None, spacing: int | ArrayLike = 1
) -> tuple[Exponent, ...]:
    r"""Estimate all exponents from the logarithms of the diagonals of the QR factors, column by column.

    Args:
        log_diagonal: :math:`\log (R_j)_{ii}`, shape (n, k), as :attr:`Factors.log_diagonal`.
        level: nominal coverage of each interval (not of all together).
        burn_in: how many windows at the beginning are left out; None is a tenth of them.
        spacing: the steps of each window, one number or an array (n,).

    Returns:
        One :class:`Exponent` for each column. Columns are the exponents in falling order once the burn-in has aligned them.

    Raises:
        ValueError: if log_diagonal is not an array (n, k).

    Examples:
        >>> rates = np.log([2.0, 1.0, 0.5])
        >>> [round(e.value, 3) for e in spectrum(np.tile(rates, (50, 1)))]
        [0.693, 0.0, -0.693]
    """
    x = np.asarray(log_diagonal, float)
    if x.ndim != 2:
        raise ValueError(f"log_diagonal is an array of windows by directions, got shape {x.shape}.")
    return tuple(exponent(column, level=level, burn_in=burn_in, spacing=spacing) for column in x.T)


def mean_square_exponent(
    log_norms: ArrayLike, *, level: float = 0.95, burn_in: int | None = None, window: int | None = None
) -> Exponent:
    r"""Estimate :math:`\lim \frac1{2t}\log E\|\delta_t\|^2` from an ensemble of tangents with independent randomness.

    .. math:: \hat\lambda = \frac{1}{2(t - s)}\Big(\log\frac1m\sum_i \|\delta^i_t\|^2 - \log\frac1m\sum_i \|\delta^i_s\|^2\Big),

    with the error by the jackknife over members. It is at least the almost sure exponent, and may be positive where that is
    negative: ever fewer members carry the mean. With :math:`w_i \propto \|\delta^i_t\|^2`, the number of members that carry it is
    :math:`1/\sum w_i^2`, and t is the last step up to which that is at least a third of m, and 10. Beyond, an ensemble of this
    size does not see the rare members that make the mean, and its growth falls back to the almost sure one.

    Args:
        log_norms: :math:`\log\|\delta^i_t\|`, shape (T + 1, m): m members from the same start, each with batches of its own.
        level: nominal coverage of the interval.
        burn_in: s; None is a tenth of t, or of T with windows.
        window: W; all windows of W steps after the burn-in are used, each begun with equal norms,
            :math:`\frac1{2W}\log E\,\|\delta_{t+W}\|^2/\|\delta_t\|^2`, which uses long runs up and is exact for a scalar, or where
            growth does not depend on the direction; otherwise its limit for large W is. None is the one window from s to t.

    Returns:
        The exponent; ``count`` is how many steps it is from and ``effective`` the number of members that carry the mean. The
        reason says where t is before T. There is no interval with fewer than 30 members or where a few carry the mean.

    Raises:
        ValueError: if log_norms is not an array of at least two steps, the level is not in (0, 1), or the window not in 1 .. T.

    Note:
        An ensemble of m cannot see what happens to fewer than one in m: with heavy tails the true mean square is larger than any
        estimate from it, and an interval from members does not know.

    Examples:
        >>> a = 1.0 - 0.5 * np.random.default_rng(0).exponential(size=(200, 100))  # E a^2 = 1 - 1 + 0.5
        >>> path = np.vstack([np.zeros(100), np.cumsum(np.log(np.abs(a)), 0)])
        >>> print(mean_square_exponent(path, window=1))
        -0.347 per step (mean square), 95 % interval [-0.3545, -0.3396], 99 effective of 180 values
        >>> round(math.log(0.5) / 2, 4), round(float(path[-1].mean()) / 200, 2)  # the truth, and what is almost sure
        (-0.3466, -0.66)
    """
    ell = np.asarray(log_norms, float)
    if ell.ndim != 2 or ell.shape[0] < 2 or not ell.shape[1]:
        raise ValueError(f"log_norms is an array of at least two steps by members, got shape {ell.shape}.")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is a probability between 0 and 1, got {level}.")
    if window is not None and not 1 <= window < ell.shape[0]:
        raise ValueError(f"window is a number of steps between 1 and {ell.shape[0] - 1}, got {window}.")
    T, m = ell.shape[0] - 1, ell.shape[1]
    t, few = T, ""
    if window is None:
        enough = min(max(MIN_MEMBERS, m / 3.0), m)
        low = np.flatnonzero(~(_carrying(ell) >= enough))
        if low.size:
            t = max(int(low[0]) - 1, 0)
            few = f"from step {t + 1} on fewer than {enough:.0f} of {m} members carry the mean square"
    s = t // 10 if burn_in is None else int(burn_in)
    over = t - s if window is None else window
    if s < 0 or s + over > t or over < 1:
        nan, why = math.nan, few or f"a burn-in of {s} leaves nothing of {t} steps"
        return Exponent(nan, nan, nan, level, 0.0, 0, max(s, 0), "mean square", why)
    starts = np.arange(s, t - over + 1, over)
    before = np.full(m, math.log(starts.size)) if window else 2.0 * ell[s]
    after = _log_sum(2.0 * (ell[starts + over] - ell[starts])) if window else 2.0 * ell[t]
    return _of_members(
        before, after, over, Exponent(0.0, 0.0, 0.0, level, 0.0, over * starts.size, s, "mean square", few)
    )


def _of_members(before: NDArray[np.float64], after: NDArray[np.float64], over: int, known: Exponent) -> Exponent:
    """The exponent from the logarithms of each member's square before and after so many steps, by the jackknife."""
    m = before.size
    carried = float(_carrying(after / 2.0))
    value = float(_log_sum(after) - _log_sum(before)) / (2.0 * over)
    why = ""
    if not math.isfinite(value):
        why = "a norm is not finite"
    elif m < MIN_EFFECTIVE:
        why = f"{m} members are too few for an interval, {MIN_EFFECTIVE:g} are needed"
    elif carried < max(MIN_MEMBERS, m / 3.0):
        why = f"{carried:.0f} of {m} members carry the mean square, {max(MIN_MEMBERS, m / 3.0):.0f} are needed"
    elif known.count < FOLLOWED:
        why = f"{known.reason}: {known.count} steps are too few, look at windows"
    if why:
        return replace(known, value=value, lower=math.nan, upper=math.nan, effective=carried, reason=why)
    shares = [np.exp(log - _log_sum(log)) for log in (before, after)]
    without = (np.log1p(-shares[1]) - np.log1p(-shares[0])) / (2.0 * over)  # what each member's absence changes
    error = math.sqrt((m - 1.0) * float(without.var()))
    rounding = float(np.finfo(float).eps) * (1.0 + float(np.abs([before, after]).max()))
    half = max(student_quantile(0.5 + known.level / 2.0, round(carried - 1.0, 1)) * error, rounding)
    return replace(known, value=value, lower=value - half, upper=value + half, effective=carried)


def _log_sum(log: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the sum of exp over the first axis, NaN where one of them is not a number."""
    top = log.max(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return top + np.log(np.exp(log - top).sum(0))


def _carrying(ell: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many of the members, along the last axis, carry the mean of exp(2 ell)."""
    top = ell.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        w = np.exp(2.0 * (ell - top))
        return w.sum(-1) ** 2 / (w**2).sum(-1)
