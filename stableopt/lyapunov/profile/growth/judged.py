r"""The verdict on the factors of a run: every stretch of it is judged, and the constant holds for the windows of all boundaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.exponents import Exponent, exponent
from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.growth.findings import MATERIAL, drawup
from stableopt.lyapunov.profile.growth.scaled import Scaled
from stableopt.lyapunov.profile.growth.trends import SHORTEST
from stableopt.lyapunov.profile.growth.verdicts import Verdict, judge
from stableopt.lyapunov.profile.growth.windows import Windows, measure_windows

__all__ = ["judge_factors"]

STABLE, BOUNDED, UNSTABLE, UNKNOWN = "exponentially stable", "profile-bounded", "exponentially unstable", "inconclusive"
GROWS = ("subexponential", UNSTABLE)


def judge_factors(
    pieces: Sequence[Factors],
    *,
    windows: Windows | None = None,
    level: float = 0.95,
    grid: int = 200,
    refine: int = 400,
) -> Verdict:
    r"""Judge a run from its factors, from all of its pieces and windows.

    A piece in which every direction followed is annihilated goes on as another stretch from there, with what enters later. Every
    stretch of at least 50 factors is judged, and one that grows takes stability back. The constant C of a bound holds for the
    windows of all boundaries of all stretches: it is the upper end of a search (:func:`measure_windows`), for the bound
    :math:`C\rho^{t-s}` in factors divided by :math:`\rho^{t_{j+1}-t_j}`.

    Args:
        pieces: of a run, one after another.
        windows: those of the last piece, if they are known already.
        level: of the intervals.
        grid: as of :func:`measure_windows`.
        refine: as of :func:`measure_windows`.

    Returns:
        The verdict; ``spans`` says which training steps it is on. Norms are those on the directions that were followed.

    Raises:
        ValueError: if there is no piece, or a factor is not finite.

    Examples:
        >>> factors = Factors(np.full((100, 1, 1), 0.5), np.arange(0, 201, 2), dimension=1)
        >>> print(judge_factors([factors]))
        exponentially stable on [0, 200]: in each eighth of the run ...; K(t, s) <= 1 * 0.7071^(t - s); terminal decay
        >>> judge_factors([factors, Factors(np.full((100, 1, 1), 2.0), np.arange(300, 401), dimension=1)]).kind
        'inconclusive'
    """
    if not pieces:
        raise ValueError("there are no factors to judge.")
    found = []
    for i, piece in enumerate(pieces):
        own = windows if windows is not None and i == len(pieces) - 1 else None
        own = measure_windows(piece, grid=grid, refine=refine) if own is None else own
        found.append(_of_piece(piece, own, level, grid, refine))
    return found[0] if len(found) == 1 else _together(found)


def _of_piece(piece: Factors, windows: Windows, level: float, grid: int, refine: int) -> Verdict:
    """The verdict on one piece."""
    if not np.isneginf(windows.path).any():
        found = judge(windows.path, steps=piece.steps, windows=windows, level=level)
        return _covered(_late(found, piece, windows, level), piece, windows, grid, refine)
    reach = _reach(windows)
    if piece.count >= SHORTEST and 10 * reach <= windows.steps[-1] - windows.steps[0]:
        return _vanishing(piece, windows, reach, level, grid, refine)
    parts, at = [], 0
    while (
        at < piece.count
    ):  # the factors up to an annihilation, without the one that annihilates; then what enters after it
        end = at + len(_path(piece.R[at:])) - 1
        parts.append(Factors(piece.R[at:end], piece.steps[at : end + 1], piece.dimension))
        at = end + 1
    judged = _together([_of_piece(p, measure_windows(p, grid=grid, refine=refine), level, grid, refine) for p in parts])
    # what enters before an annihilation may live on in directions that had died out: the windows of the whole piece
    if judged.kind in (STABLE, BOUNDED) and windows.sup > judged.peak + MATERIAL:
        why = f"{judged.reason}; the window from training step {windows.start} to {windows.end} grows by e^{windows.sup:.3g}"
        judged = replace(judged, kind=UNKNOWN, reason=why, constant=math.nan, rate=math.nan)
    first, last = int(piece.steps[0]), int(piece.steps[-1])
    gone = int(piece.steps[len(_path(piece.R))])
    why = f"what enters at the first step is annihilated at training step {gone}; {judged.reason}"
    whole = replace(judged, reason=why, horizon=last - first, peak=windows.sup, spans=((first, last),))
    return _covered(whole, piece, windows, grid, refine)


def _path(R: NDArray[np.float64]) -> NDArray[np.float64]:
    """The log norms of the products of the first 0, 1, ... factors, as long as they are not zero."""
    product, path = Scaled.of(np.eye(R.shape[-1])), [0.0]
    for factor in R:
        product = Scaled.of(factor) @ product
        path.append(float(product.log_norm()))
        if path[-1] == -math.inf:
            return np.array(path[:-1])
    return np.array(path)


def _late(found: Verdict, piece: Factors, windows: Windows, level: float) -> Verdict:
    """The verdict, if it is none of growth, by the largest of the windows that start late where the path hides it."""
    if found.kind in GROWS or windows.sup <= drawup(windows.path) + MATERIAL:
        return found
    largest = np.nanmax(windows.log_norms, axis=0)
    i = int(windows.index[np.flatnonzero(largest >= largest.max() - MATERIAL)[-1]])
    path = _path(piece.R[i:])
    late = judge(path, steps=piece.steps[i : i + len(path)], level=level)
    if late.kind not in GROWS:
        return found
    why = f"what enters at training step {piece.steps[i]} grows: {late.reason}"
    return replace(found, kind=late.kind, rate=late.rate, constant=math.nan, exponent=late.exponent, reason=why)


def _reach(windows: Windows) -> int:
    """No window of more training steps than this is other than zero."""
    t = windows.steps
    alive = windows.log_norms > -math.inf  # NaN is not
    cells = 2 * int(np.diff(t).max(initial=0)) if len(windows.path) > len(t) else 0
    return int((t[:, None] - t)[alive].max(initial=0)) + cells


def _vanishing(piece: Factors, windows: Windows, reach: int, level: float, grid: int, refine: int) -> Verdict:
    """The verdict where every perturbation is annihilated, whenever it enters, within a small part of the run."""
    slope = -1.0 / reach if reach else -math.inf
    why = f"every window of more than {reach} training steps annihilates all that was followed"
    growth = exponent(np.full(piece.count, -math.inf), level=level)
    horizon = int(piece.spacing.sum())
    spans = ((int(piece.steps[0]), int(piece.steps[-1])),)
    rate = math.exp(slope)
    found = Verdict(STABLE, horizon, growth, 1.0, rate, True, windows.sup, why, spans)
    return _covered(found, piece, windows, grid, refine) if reach else found


def _covered(found: Verdict, piece: Factors, windows: Windows, grid: int, refine: int) -> Verdict:
    """The verdict with a constant that holds for the windows of all boundaries."""
    if found.kind == BOUNDED:
        return replace(found, constant=math.exp(min(max(windows.sup_upper, 0.0), 700.0)))
    if found.kind != STABLE or not found.rate:
        return found
    with np.errstate(over="ignore"):
        scaled = piece.R * np.exp(-math.log(found.rate) * piece.spacing)[:, None, None]
    if not np.isfinite(scaled).all():
        why = f"{found.reason}; no constant is known beside it"
        return replace(found, kind=UNKNOWN, constant=math.nan, rate=math.nan, reason=why)
    over = measure_windows(Factors(scaled, piece.steps, piece.dimension), grid=grid, refine=refine)
    return replace(found, constant=math.exp(min(max(over.sup_upper, 0.0), 700.0)))


def _together(found: Sequence[Verdict]) -> Verdict:
    """One verdict on several stretches: what holds on all of them."""
    judged = [v for v in found if v.exponent.count + v.exponent.burn_in >= SHORTEST] or list(found)
    kinds = {v.kind for v in judged}
    growing = next((v for v in judged if v.kind in GROWS), None)
    worst = max(judged, key=lambda v: -math.inf if math.isnan(v.exponent.value) else v.exponent.value)
    if len(judged) == 1 or len(kinds) == 1:
        kind, reason = worst.kind, worst.reason
    elif kinds <= {STABLE, BOUNDED}:
        weaker = next(v for v in judged if v.kind == BOUNDED)
        kind, reason = BOUNDED, weaker.reason
    else:
        named = growing or next(v for v in judged if v.kind == UNKNOWN)
        others = "; ".join(sorted(kinds - {named.kind}))
        kind, reason = UNKNOWN, f"{_where(named)} {named.kind}, {named.reason}, but elsewhere {others}"
    peak = max(v.peak for v in found)
    if kind in (STABLE, BOUNDED) and peak > max(v.peak for v in judged) + MATERIAL:
        short = max(found, key=lambda v: v.peak)
        kind, reason = UNKNOWN, f"{reason}; but {_where(short)} a window grows by e^{peak:.3g}"
    return Verdict(
        kind,
        sum(v.horizon for v in found),
        _exponent(worst.exponent, judged),
        math.exp(min(_largest_constant(found, judged), 700.0)) if kind in (STABLE, BOUNDED) else math.nan,
        max(v.rate for v in judged) if kind in (STABLE, UNSTABLE) else math.nan,
        all(v.terminal_decay for v in judged),
        peak,
        reason if len(judged) == len(found) else f"{reason} (not judged: what has fewer than {SHORTEST} factors)",
        tuple(span for v in found for span in v.spans),
    )


def _where(verdict: Verdict) -> str:
    return f"from training step {verdict.spans[0][0]} to {verdict.spans[-1][1]}"


def _largest_constant(found: Sequence[Verdict], judged: Sequence[Verdict]) -> float:
    """The logarithm of a constant for all stretches with the largest of the rates, and for the short ones with their peaks."""
    slope = max((math.log(v.rate) for v in judged if v.rate > 0.0), default=0.0)
    known = [math.log(v.constant) for v in judged if not math.isnan(v.constant)]
    return max([*known, *(v.peak - slope * v.horizon for v in found if v not in judged), 0.0])


def _exponent(worst: Exponent, judged: Sequence[Verdict]) -> Exponent:
    if len(judged) == 1:
        return worst
    why = f"the largest of {len(judged)} stretches{'; ' * bool(worst.reason)}{worst.reason}"
    return replace(worst, reason=why)
