"""What a path says of the kind of stability: whether it moves, by which law, and how far that is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.exponents import exponent
from stableopt.lyapunov.profile.growth.trends import SHORTEST, Path, Trend
from stableopt.lyapunov.running import student_quantile

__all__ = ["MATERIAL", "Clock", "Finding", "Kind", "drawup", "look"]

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
SIGMAS = 2.0
"""So many times the largest random walk beneath the noise that is not excluded is no chance movement of it."""
LONG = 240
"""In fewer places what comes back slowly cannot be told from a random walk without a drift."""
PARTS = 8
"""Into so many parts a path is cut to see whether it grows or falls in all of them."""

Kind = Literal["exponentially stable", "profile-bounded", "subexponential", "exponentially unstable", "inconclusive"]


@dataclass(frozen=True)
class Clock:
    """The training steps of the places of a path: the first one, and how many lie between two."""

    start: int = 0
    stride: int = 1

    def at(self, place: int) -> int:
        """Return the training step of a place.

        Args:
            place: in the path, from 0.

        Examples:
            >>> Clock(300, 8).at(2)
            316
        """
        return self.start + self.stride * place


@dataclass(frozen=True)
class Finding:
    """What a part of the path says.

    Args:
        kind: of stability.
        reason: one sentence, in training steps.
        slope: the largest growth per training step that is not excluded.
        falls: whether it falls.
        resolved: whether the power of the law is known to be that of the kind.
    """

    kind: Kind
    reason: str
    slope: float = math.nan
    falls: bool = False
    resolved: bool = True


def drawup(ell: NDArray[np.float64]) -> float:
    """Return the largest rise from any place to a later one, a lower estimate of the largest log K(t, s).

    Args:
        ell: the path, finite.

    Examples:
        >>> drawup(np.array([0.0, -3.0, -1.0, -2.0]))
        2.0
    """
    return float((ell - np.minimum.accumulate(ell)).max())


def look(ell: NDArray[np.float64], first: int, level: float, clock: Clock) -> Finding:
    """Judge a path from one of its places on.

    Args:
        ell: the path, finite, at equal distances.
        first: how many places at the beginning are left out.
        level: of the intervals.
        clock: the training steps of the places.

    Examples:
        >>> look(-0.1 * np.arange(101.0), 10, 0.95, Clock(stride=2)).slope.__round__(6)
        -0.05
    """
    last = ell.size - 1
    if last - first < SHORTEST:
        known = f"the norm is known at {max(last - first, 0)} boundaries after training step {clock.at(first)}"
        why = f"{known}, which are too few: {SHORTEST} are needed"
        return Finding("inconclusive", why)
    found = _moves(Path(ell, first), ell, first, level, clock)
    rise = drawup(ell[first:])
    if rise <= MATERIAL and found.kind == "inconclusive":
        why = f"the path rises by at most {math.exp(rise):.3g} times; {found.reason}"
        return Finding("profile-bounded", why, found.slope)
    return found


def _moves(path: Path, ell: NDArray[np.float64], first: int, level: float, clock: Clock) -> Finding:
    """Judge a path that is long enough, by whether its growth is steady."""
    part = ell[first:]
    slopes = np.array([(p[-1] - p[0]) / (p.size - 1) for p in np.array_split(part, PARTS)]) / clock.stride
    both = not bool(slopes.min() > 0.0 or slopes.max() < 0.0)
    drifts = exponent(np.diff(part), burn_in=0).kind == "finite time"
    if path.stationary() < FORGETS and (drifts or path.steady() < FORGETS):
        # the mean growth is no constant: one law, if all parts agree on its sign, or one thing after another
        found = Finding("inconclusive", "") if both else _law(path, slopes)
        if found.kind != "inconclusive":
            return found
        return _changed(path, ell, first, level, clock, falls=bool(slopes.max() < 0.0))
    found = _regime(path, part, level, clock)
    if found.kind == "inconclusive":
        later = _changed(path, ell, first, level, clock)
        return later if later.kind == "profile-bounded" else found
    return found


def _regime(path: Path, part: NDArray[np.float64], level: float, clock: Clock) -> Finding:
    """Judge a part along which the growth is steady, by whether its noise forgets."""
    ratio = path.stationary()
    if ratio >= FORGETS:
        return _forgets(path, level, clock)
    wanders = _wanders(path, part, level, clock)
    if ratio <= WANDERS:
        return wanders
    forgets = _forgets(path, level, clock)
    if forgets.kind == wanders.kind:
        return wanders
    why = f"whether it wanders off like a random walk or comes back is undecided (log likelihood ratio {ratio:.1f})"
    return Finding("inconclusive", why, falls=forgets.falls and wanders.falls)


def _changed(
    path: Path, ell: NDArray[np.float64], first: int, level: float, clock: Clock, *, falls: bool = False
) -> Finding:
    """Judge a path along which the growth changes, by its later half."""
    middle = (ell.size - 1 + first) // 2
    half = ell[middle:]
    skip = half.size // 10
    if half.size - 1 - skip < SHORTEST:
        return Finding("inconclusive", "the growth changes along the run, and its halves are too short to be judged")
    late = _weaker(*(_regime(p, half[skip:], level, clock) for p in (Path(half, skip), Path(ell, middle + skip))))
    why = f"the growth changes along the run; from step {clock.at(middle)} on {late.reason}"
    if late.kind in ("subexponential", "exponentially unstable"):
        return Finding(late.kind, why, late.slope)
    rises = path.trend(level, walk=False).bounds(level)[1]  # along the whole path, whatever its later half says
    if (
        late.kind == "profile-bounded"
        and rises <= MATERIAL
        and drawup(ell[first:]) <= 1.5 * max(drawup(half), MATERIAL)
    ):
        return Finding("profile-bounded", why, late.slope, late.falls)
    if late.kind == "exponentially stable" and falls and late.resolved:
        return Finding(late.kind, f"the path falls all along; {why}", late.slope, True)
    if late.kind != "inconclusive":
        why += ", after a rise" if drawup(ell[:middle]) > MATERIAL else ", and fell in another way before"
    return Finding("inconclusive", why, late.slope, late.falls)


def _weaker(own: Finding, old: Finding) -> Finding:
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


def _law(path: Path, slopes: NDArray[np.float64]) -> Finding:
    """Judge a path that grows, or falls, in all of its parts, though not at one rate with a noise upon it."""
    least, most = np.sort(np.abs(slopes))[[0, -1]]
    if least >= most / 2.0:
        why = f"in each eighth of the run the path moves by between {slopes.min():.3g} and {slopes.max():.3g} per step"
        kind: Kind = "exponentially stable" if slopes[0] < 0.0 else "exponentially unstable"
        return Finding(kind, why, float(slopes.max()), slopes[0] < 0.0)
    if (np.diff(np.abs(slopes)) < 0.0).all() or (np.diff(np.abs(slopes)) > 0.0).all():
        middles = path.times[0] + (np.arange(PARTS) + 0.5) / PARTS * (1.0 - path.times[0])
        power = 1.0 + math.log(slopes[-1] / slopes[PARTS // 2]) / math.log(middles[-1] / middles[PARTS // 2])
        exact = Trend((0.0, 0.0), (0.0, 0.0), 1.0, power, power, power)
        return _growth(exact, float(slopes.max())) if slopes[0] > 0.0 else _fall(exact, float(slopes.max()))
    return Finding("inconclusive", "the growth itself wanders along the run, so that it has no mean")


def _slope(path: Path, trend: Trend, level: float, clock: Clock) -> float:
    """The largest slope of a line that is not excluded, per training step."""
    rise = trend.rise[0] + student_quantile(0.5 + level / 2.0, trend.freedom) * trend.error[0]
    return rise / (path.steps * clock.stride)


def _forgets(path: Path, level: float, clock: Clock) -> Finding:
    """Judge a path whose noise comes back to the law of growth."""
    trend = path.trend(level, walk=False)
    low, high = trend.bounds(STRICT)
    slope = _slope(path, trend, level, clock)
    if low > 0.0:
        found = _growth(trend, slope)
    elif high < 0.0:
        found = _fall(trend, slope)
    else:
        found = _level(trend.bounds(level)[1], slope)
    if found.kind in ("inconclusive", "subexponential"):
        return found
    walk = path.walk(level)
    moves = found.falls or found.kind == "exponentially unstable"
    if SIGMAS * walk <= max(low, -high) or (walk <= MATERIAL and not moves):
        return found
    doubt = "a random walk" if moves else "bounded or slow growth: a random walk"
    why = f"{found.reason}, but {doubt} beneath the noise that moves by e^{walk:.2g} is not excluded"
    return Finding("inconclusive", why, slope, found.falls)


def _level(most: float, slope: float) -> Finding:
    """Judge a path that is not seen to move, by the largest rise that is not excluded."""
    if most <= MATERIAL:
        why = f"the path comes back to its level, and rises by at most {math.exp(most):.2g} times"
        return Finding("profile-bounded", why, slope)
    why = f"bounded or slow growth: no growth is seen, and a rise by up to e^{most:.2g} is not excluded"
    return Finding("inconclusive", why, slope)


def _powers(trend: Trend) -> str:
    low, high = (f"{v:.2g}" if math.isfinite(v) else "any" for v in (trend.low, trend.high))
    return f"power of t between {low} and {high}"


def _growth(trend: Trend, slope: float) -> Finding:
    """Name a rise."""
    if trend.high <= SATURATED:
        return Finding("profile-bounded", f"the path rises and comes to an end ({_powers(trend)})", slope)
    if trend.high <= STRETCHED:
        return Finding("subexponential", f"the path rises, slower and slower ({_powers(trend)})", slope)
    if trend.low >= EXPONENTIAL:
        return Finding("exponentially unstable", f"the path rises like a line ({_powers(trend)})", slope)
    return Finding("inconclusive", f"growth, exponential not excluded ({_powers(trend)})", slope)


def _fall(trend: Trend, slope: float) -> Finding:
    """Name a fall along a path that comes back to it."""
    if trend.low >= EXPONENTIAL:
        return Finding("exponentially stable", f"the path falls ({_powers(trend)}), like exp(-c t)", slope, True)
    if trend.high <= STRETCHED:
        return Finding("profile-bounded", f"the path falls, slower and slower ({_powers(trend)})", slope, True)
    return Finding("profile-bounded", f"the path falls, exponentially or slower ({_powers(trend)})", slope, True)


def _wanders(path: Path, part: NDArray[np.float64], level: float, clock: Clock) -> Finding:
    """Judge a path whose noise is a random walk, by its mean growth."""
    lam, strict = (exponent(np.diff(part), burn_in=0, level=p, spacing=clock.stride) for p in (level, STRICT))
    if not lam.known:
        return Finding("inconclusive", lam.reason)
    trend = path.trend(level, walk=True)
    walk = f"the path wanders like a random walk, by {lam.value:.3g} in [{lam.lower:.3g}, {lam.upper:.3g}] per step"
    if lam.lower > 0.0:
        found = _growth(trend, lam.upper)
        return replace(found, reason=f"{walk}; {found.reason}")
    if strict.upper < 0.0:
        if trend.high > STRETCHED:
            return Finding("exponentially stable", f"{walk}, like exp(-c t)", lam.upper, True, trend.low >= EXPONENTIAL)
        return Finding("inconclusive", f"{walk}, and falls slower than it wanders in the end", lam.upper, True)
    error = (lam.upper - lam.lower) / 2.0 / student_quantile(0.5 + level / 2.0, 30.0)
    if abs(lam.value) <= error and part.size > LONG:
        return Finding("subexponential", f"{walk}: its largest value grows without a rate", lam.upper)
    why = (
        "neither zero nor a rate is excluded"
        if part.size > LONG
        else f"{clock.stride * (part.size - 1)} steps cannot tell it from a slow return"
    )
    return Finding("inconclusive", f"{walk}: {why}", lam.upper)
