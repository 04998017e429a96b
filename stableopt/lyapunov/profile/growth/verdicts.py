"""What a finite run can say of the kinds of stability: one verdict, its horizon and its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopt.lyapunov.profile.growth.exponents import Exponent, exponent
from stableopt.lyapunov.profile.growth.trends import SHORTEST, Path, Trend
from stableopt.lyapunov.running import student_quantile

__all__ = ["Verdict", "judge"]

FORGETS, WANDERS = 7.0, 1.5
"""Log likelihood ratios from which on a noise is known to forget, and up to which it is taken for a random walk."""
EXPONENTIAL, STRETCHED = 0.6, 0.9
"""A law is exponential if its power is surely above the first, and slower if it is surely below the second."""
SATURATED = -0.25
"""A growth whose power is surely below this has come to its end."""
STRICT = 0.99
"""Level of the intervals that show a trend; a decay that is mere chance is to be one in two hundred."""
MATERIAL = math.log(2.0)
"""A rise that at most doubles a norm is not called growth."""
LONG = 240
"""In fewer steps what comes back slowly cannot be told from a random walk without a drift."""
PARTS = 8
"""Into so many parts a path is cut to see whether it grows or falls in all of them."""

Kind = Literal["exponentially stable", "profile-bounded", "subexponential", "exponentially unstable", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    r"""What a run of T steps says of the growth of perturbations, :math:`K(t, s) = \|\Phi(t, s)\|`.

    Args:
        kind: one of the four verdicts, or ``"inconclusive"``.
        horizon: T. Nothing is said of later steps.
        exponent: the mean growth per step after the first tenth of the run.
        constant: C. For ``"profile-bounded"`` the largest :math:`K(t, s)` that was seen; for ``"exponentially stable"`` the
            smallest constant with :math:`K(t, s) \le C \rho^{t-s}` for all windows that were seen. NaN for other verdicts.
            Without a table of windows it is from :math:`K(t, s) \ge K(t, 0)/K(s, 0)`, a lower estimate.
        rate: :math:`\rho` per step: for ``"exponentially stable"`` the slowest decay that the run does not exclude, for
            ``"exponentially unstable"`` the mean growth. NaN for other verdicts.
        terminal_decay: whether :math:`K(t, 0)` falls along the second half and ends below 1, which bounds no :math:`K(t, s)`.
        peak: the largest :math:`\log K(t, s)` that was seen.
        reason: what the verdict rests on, one sentence.
        estimated: True, for it is a statistical statement and no proof.

    Examples:
        >>> print(judge(np.log(0.9) * np.arange(201.0)))
        exponentially stable on [0, 200]: the path falls ...; K(t, s) <= 1 * 0.9^(t - s); terminal decay
    """

    kind: Kind
    horizon: int
    exponent: Exponent
    constant: float
    rate: float
    terminal_decay: bool
    peak: float
    reason: str
    estimated: bool = True

    def __str__(self) -> str:
        text = f"{self.kind} on [0, {self.horizon}]: {self.reason}"
        if self.kind == "exponentially stable":
            text += f"; K(t, s) <= {self.constant:.3g} * {self.rate:.4g}^(t - s)"
        if self.kind == "profile-bounded":
            text += f"; K(t, s) <= {self.constant:.3g}"
        if self.kind == "exponentially unstable":
            text += f"; by {self.rate:.4g} per step"
        return text + ("; terminal decay" if self.terminal_decay else "")


@dataclass(frozen=True)
class _Finding:
    """What a part of the path says."""

    kind: Kind
    reason: str
    slope: float = math.nan  # per step, the largest that is not excluded
    falls: bool = False
    resolved: bool = True  # whether the power of the law is known to be that of the kind


def judge(log_norms: ArrayLike, *, windows: ArrayLike | None = None, level: float = 0.95) -> Verdict:
    r"""Judge the stability of a run from the norms of its sensitivities.

    The path is :math:`\ell_t = \log K(t, 0) = m(t) + S_t`, a law of growth :math:`m(t) = a + b (t^\gamma - 1)/\gamma` and a noise
    S. After the first tenth, two questions are asked of its low frequencies (:class:`Path`): whether S forgets, or wanders off
    like a random walk, by a likelihood ratio that one walk in two hundred passes; and the intervals of the rise and of
    :math:`\gamma`, which is 1 for an exponential, 1/2 for :math:`\exp(c\sqrt t)`, 0 for a power of t and negative for what
    comes to an end.

    ==========================  ====================================================================================
    verdict                     where it is given
    ==========================  ====================================================================================
    ``exponentially stable``    a fall at the level 0.99, and :math:`\gamma > 0.6` surely, or not surely below 0.9 if S wanders
    ``profile-bounded``         S forgets and there is no rise beyond a doubling or twice the scatter of S; or a fall whose law
                                is slower or not resolved: then it is the weaker statement, which holds for both
    ``subexponential``          a rise with :math:`\gamma < 0.9` surely; or S wanders, and its mean is within a standard error of 0
    ``exponentially unstable``  a rise with :math:`\gamma > 0.6` surely
    ``inconclusive``            everything else, with the reason
    ==========================  ====================================================================================

    If the growth is not steady along the run, it is looked at in eighths of it: rates of one sign within a factor of two are
    exponential, and rates of one sign that rise or fall all along give the power. Otherwise the later half is judged, with time
    counted from its own beginning and from that of the run, and the weaker statement is kept: growth there is growth, while a
    decay there after a growth before it is inconclusive, with the flag of terminal decay.

    Args:
        log_norms: :math:`\log K(t, 0)`, t = 0 .. T, shape (T + 1,); -inf from where a perturbation is annihilated.
        windows: table of :math:`\log K(t_j, t_i)` in row j and column i, on a grid of equal steps over [0, T]; NaN above the
            diagonal. It can only take back a statement of stability, and raise the constant.
        level: of the intervals.

    Returns:
        The verdict. The horizon is part of it: no finite run tells :math:`\exp(c t^{0.95})` from an exponential, a slow rise
        below the noise from none, or a walk that is pulled back once in the run from one that is not.

    Raises:
        ValueError: if log_norms is not a sequence of at least two, or windows not a square table.

    Examples:
        >>> t = np.arange(1001.0)
        >>> judge(np.log1p(t)).kind, judge(0.5 * np.sqrt(t)).kind, judge(0.01 * t).kind
        ('subexponential', 'subexponential', 'exponentially unstable')
        >>> noise = np.random.default_rng(0).standard_normal(1001)
        >>> print(judge(0.3 * noise))
        profile-bounded on [0, 1000]: the path comes back to its level...; K(t, s) <= 6.79
    """
    ell = np.asarray(log_norms, float)
    if ell.ndim != 1 or ell.size < 2:
        raise ValueError(f"log_norms is a sequence of at least two numbers, got shape {ell.shape}.")
    table = None if windows is None else np.asarray(windows, float)
    if table is not None and (table.ndim != 2 or table.shape[0] != table.shape[1] or not table.size):
        raise ValueError(
            f"windows is a square table, a row for each end and a column for each start; got shape {table.shape}."
        )
    T = ell.size - 1
    with np.errstate(invalid="ignore"):
        lam = exponent(np.diff(ell), level=level)
    if not np.isfinite(ell).all():
        return _not_finite(ell, lam)
    found = _look(ell, T // 10, level)
    if table is not None and found.kind in ("exponentially stable", "profile-bounded"):
        found = _compared(found, table, _drawup(ell), level)
    rate = constant = math.nan
    if found.kind == "exponentially stable":
        slope = min(found.slope, 0.0)
        rate, constant = math.exp(slope), _constant(ell, table, slope)
    elif found.kind == "profile-bounded":
        constant = _constant(ell, table, 0.0)
    elif found.kind == "exponentially unstable":
        rate = math.exp(min(lam.value, 700.0))
    peak = max(float(ell.max()), -math.inf if table is None else float(np.nanmax(table)))
    return Verdict(found.kind, T, lam, constant, rate, _falls_at_the_end(ell, level), peak, found.reason)


def _not_finite(ell: NDArray[np.float64], lam: Exponent) -> Verdict:
    """The verdict on a path with a value that is not finite."""
    T = ell.size - 1
    k = int(np.flatnonzero(~np.isfinite(ell))[0])
    peak = float(ell[:k].max()) if k else math.nan
    if k and (ell[k:] == -math.inf).all():
        why = f"the perturbation is annihilated at step {k}"
        return Verdict("exponentially stable", T, lam, math.exp(min(_drawup(ell[:k]), 700.0)), 0.0, True, peak, why)
    return Verdict("inconclusive", T, lam, math.nan, math.nan, False, peak, f"the log norm at step {k} is {ell[k]}")


def _drawup(ell: NDArray[np.float64]) -> float:
    """The largest rise from any step to a later one, a lower estimate of the largest log K(t, s)."""
    return float((ell - np.minimum.accumulate(ell)).max())


def _constant(ell: NDArray[np.float64], table: NDArray[np.float64] | None, slope: float) -> float:
    """The smallest C with log K(t, s) <= log C + slope (t - s) for all windows that are known."""
    top = _drawup(ell - slope * np.arange(ell.size))
    if table is not None:
        steps = np.linspace(0.0, ell.size - 1.0, table.shape[0])
        top = max(top, float(np.nanmax(table - slope * np.maximum(steps[:, None] - steps, 0.0))))
    return math.exp(min(top, 700.0))


def _falls_at_the_end(ell: NDArray[np.float64], level: float) -> bool:
    """Whether the second half falls, to below 1."""
    half = ell[(ell.size - 1) // 2 :]
    if ell[-1] >= 0.0 or half.size - 1 < SHORTEST:
        return False
    return _look(half, 0, level).falls


def _compared(found: _Finding, table: NDArray[np.float64], drawup: float, level: float) -> _Finding:
    """A finding of stability, taken back if windows that start late grow beyond what the path from 0 shows."""
    if float(np.nanmax(table)) <= drawup + MATERIAL:
        return found
    start = int(np.nanmax(table, axis=0).argmax())
    column = table[start:, start]
    why = f"windows from the grid step {start} on reach K = {math.exp(min(np.nanmax(column), 700.0)):.3g}"
    if column.size - 1 >= 2 * SHORTEST and np.isfinite(column).all():
        late = _look(column, column.size // 10, level)
        if late.kind in ("subexponential", "exponentially unstable"):
            return _Finding(late.kind, f"{why}: {late.reason}")
    early, late = column[: (column.size + 1) // 2], column[(column.size + 1) // 2 :]
    if late.size and np.nanmax(late) > np.nanmax(early) + MATERIAL:
        return _Finding(
            "inconclusive", f"{why} and still grow at the end, though the path from step 0 says {found.kind}"
        )
    return replace(found, reason=f"{found.reason}; {why}")


def _look(ell: NDArray[np.float64], first: int, level: float) -> _Finding:
    """Judge a path from the step ``first`` on."""
    T = ell.size - 1
    if T - first < SHORTEST:
        return _Finding("inconclusive", f"{T - first} steps after the first {first} are too few, {SHORTEST} are needed")
    found = _moves(Path(ell, first), ell, first, level)
    rise = _drawup(ell[first:])
    if rise <= MATERIAL and found.kind == "inconclusive":
        return _Finding(
            "profile-bounded", f"the path rises by at most {math.exp(rise):.3g} times; {found.reason}", found.slope
        )
    return found


def _moves(path: Path, ell: NDArray[np.float64], first: int, level: float) -> _Finding:
    """Judge a path that is long enough, by whether its growth is steady."""
    part = ell[first:]
    slopes = np.array([(p[-1] - p[0]) / (p.size - 1) for p in np.array_split(part, PARTS)])
    both = not bool(slopes.min() > 0.0 or slopes.max() < 0.0)
    drifts = exponent(np.diff(part), burn_in=0).kind == "finite time"
    if path.stationary() < FORGETS and (drifts or path.steady() < FORGETS):
        # the mean growth is no constant: one law, if all parts agree on its sign, or one thing after another
        found = _Finding("inconclusive", "") if both else _law(path, slopes)
        return found if found.kind != "inconclusive" else _changed(ell, first, level, falls=slopes.max() < 0.0)
    found = _regime(path, part, level)
    if found.kind == "inconclusive":
        later = _changed(ell, first, level)
        return later if later.kind == "profile-bounded" else found
    return found


def _regime(path: Path, part: NDArray[np.float64], level: float) -> _Finding:
    """Judge a part along which the growth is steady, by whether its noise forgets."""
    ratio = path.stationary()
    if ratio >= FORGETS:
        return _forgets(path, level)
    wanders = _wanders(path, part, level)
    if ratio <= WANDERS:
        return wanders
    forgets = _forgets(path, level)
    if forgets.kind == wanders.kind:
        return wanders
    why = f"whether it wanders off like a random walk or comes back is undecided (log likelihood ratio {ratio:.1f})"
    return _Finding("inconclusive", why, falls=forgets.falls and wanders.falls)


def _changed(ell: NDArray[np.float64], first: int, level: float, *, falls: bool = False) -> _Finding:
    """Judge a path along which the growth changes, by its later half."""
    middle = (ell.size - 1 + first) // 2
    half = ell[middle:]
    skip = half.size // 10
    if half.size - 1 - skip < SHORTEST:
        return _Finding("inconclusive", "the growth changes along the run, and its halves are too short to be judged")
    late = _weaker(*(_regime(path, half[skip:], level) for path in (Path(half, skip), Path(ell, middle + skip))))
    why = f"the growth changes along the run; from step {middle} on {late.reason}"
    if late.kind in ("subexponential", "exponentially unstable"):
        return _Finding(late.kind, why, late.slope)
    if late.kind == "profile-bounded" and _drawup(ell[first:]) <= 1.5 * max(_drawup(half), MATERIAL):
        return _Finding("profile-bounded", why, late.slope, late.falls)
    if late.kind == "exponentially stable" and falls and late.resolved:
        return _Finding(late.kind, f"the path falls all along; {why}", late.slope, True)
    if late.kind != "inconclusive":
        why += ", after a rise" if _drawup(ell[:middle]) > MATERIAL else ", and fell in another way before"
    return _Finding("inconclusive", why, late.slope, late.falls)


def _weaker(own: _Finding, old: _Finding) -> _Finding:
    """What holds whether the law of a part began with it (``own``) or with the run (``old``)."""
    kinds = {own.kind, old.kind}
    if len(kinds) == 1:
        return replace(own, resolved=own.resolved and old.resolved)
    if kinds == {"exponentially stable", "profile-bounded"}:
        return own if own.kind == "profile-bounded" else old
    for other in (own, old):
        if "exponentially" in own.kind + old.kind and "exponentially" not in other.kind:
            return replace(
                other, kind="inconclusive", reason=f"{other.reason}; a law that is exponential is not excluded"
            )
    return own


def _law(path: Path, slopes: NDArray[np.float64]) -> _Finding:
    """Judge a path that grows, or falls, in all of its parts, though not at one rate with a noise upon it."""
    least, most = np.sort(np.abs(slopes))[[0, -1]]
    if least >= most / 2.0:
        why = f"in each eighth of the run the path moves by between {slopes.min():.3g} and {slopes.max():.3g} per step"
        kind: Kind = "exponentially stable" if slopes[0] < 0.0 else "exponentially unstable"
        return _Finding(kind, why, float(slopes.max()), slopes[0] < 0.0)
    if (np.diff(np.abs(slopes)) < 0.0).all() or (np.diff(np.abs(slopes)) > 0.0).all():
        middles = path.times[0] + (np.arange(PARTS) + 0.5) / PARTS * (1.0 - path.times[0])
        power = 1.0 + math.log(slopes[-1] / slopes[PARTS // 2]) / math.log(middles[-1] / middles[PARTS // 2])
        exact = Trend((0.0, 0.0), (0.0, 0.0), 1.0, power, power, power)
        return _growth(exact, float(slopes.max())) if slopes[0] > 0.0 else _fall(exact, float(slopes.max()))
    return _Finding("inconclusive", "the growth itself wanders along the run, so that it has no mean")


def _slope(path: Path, trend: Trend, level: float) -> float:
    """The largest slope of a line that is not excluded."""
    rise = trend.rise[0] + student_quantile(0.5 + level / 2.0, trend.freedom) * trend.error[0]
    return rise / path.steps


def _forgets(path: Path, level: float) -> _Finding:
    """Judge a path whose noise comes back to the law of growth."""
    trend = path.trend(level, walk=False)
    low, high = trend.bounds(STRICT)
    slope = _slope(path, trend, level)
    if low > 0.0:
        return _growth(trend, slope)
    if high < 0.0:
        return _fall(trend, slope)
    most = trend.bounds(level)[1]
    if most <= max(MATERIAL, 2.0 * path.scatter()):
        why = f"the path comes back to its level, and rises by at most {math.exp(min(most, 700.0)):.2g} times"
        return _Finding("profile-bounded", why, slope)
    return _Finding(
        "inconclusive", f"no growth is seen, and one by {math.exp(min(most, 700.0)):.2g} times is not excluded", slope
    )


def _powers(trend: Trend) -> str:
    low, high = (f"{v:.2g}" if math.isfinite(v) else "any" for v in (trend.low, trend.high))
    return f"power of t between {low} and {high}"


def _growth(trend: Trend, slope: float) -> _Finding:
    """Name a rise."""
    if trend.high <= SATURATED:
        return _Finding("profile-bounded", f"the path rises and comes to an end ({_powers(trend)})", slope)
    if trend.high <= STRETCHED:
        return _Finding("subexponential", f"the path rises, slower and slower ({_powers(trend)})", slope)
    if trend.low >= EXPONENTIAL:
        return _Finding("exponentially unstable", f"the path rises like a line ({_powers(trend)})", slope)
    return _Finding("inconclusive", f"growth, exponential not excluded ({_powers(trend)})", slope)


def _fall(trend: Trend, slope: float) -> _Finding:
    """Name a fall along a path that comes back to it."""
    if trend.low >= EXPONENTIAL:
        return _Finding("exponentially stable", f"the path falls ({_powers(trend)}), like exp(-c t)", slope, True)
    if trend.high <= STRETCHED:
        return _Finding("profile-bounded", f"the path falls, slower and slower ({_powers(trend)})", slope, True)
    return _Finding("profile-bounded", f"the path falls, exponentially or slower ({_powers(trend)})", slope, True)


def _wanders(path: Path, part: NDArray[np.float64], level: float) -> _Finding:
    """Judge a path whose noise is a random walk, by its mean growth."""
    lam, strict = (exponent(np.diff(part), burn_in=0, level=p) for p in (level, STRICT))
    if not lam.known:
        return _Finding("inconclusive", lam.reason)
    trend = path.trend(level, walk=True)
    walk = f"the path wanders like a random walk, by {lam.value:.3g} in [{lam.lower:.3g}, {lam.upper:.3g}] per step"
    if lam.lower > 0.0:
        found = _growth(trend, lam.upper)
        return replace(found, reason=f"{walk}; {found.reason}")
    if strict.upper < 0.0:
        if trend.high > STRETCHED:
            return _Finding(
                "exponentially stable", f"{walk}, like exp(-c t)", lam.upper, True, trend.low >= EXPONENTIAL
            )
        return _Finding("inconclusive", f"{walk}, and falls slower than it wanders in the end", lam.upper, True)
    error = (lam.upper - lam.lower) / 2.0 / student_quantile(0.5 + level / 2.0, 30.0)
    if abs(lam.value) <= error and part.size > LONG:
        return _Finding("subexponential", f"{walk}: its largest value grows without a rate", lam.upper)
    why = (
        "neither zero nor a rate is excluded"
        if part.size > LONG
        else f"{part.size - 1} steps cannot tell it from a slow return"
    )
    return _Finding("inconclusive", f"{walk}: {why}", lam.upper)
