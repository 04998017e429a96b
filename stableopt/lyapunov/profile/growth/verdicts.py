"""What a finite run can say of the kinds of stability: one verdict, its steps and its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopt.lyapunov.profile.growth.exponents import Exponent, exponent
from stableopt.lyapunov.profile.growth.findings import MATERIAL, Clock, Finding, Kind, drawup, look
from stableopt.lyapunov.profile.growth.windows import Windows

__all__ = ["Verdict", "judge"]

LATE = 0.1
"""The last part of a run: if the largest growth of all windows is much larger with it, it is not settled."""


@dataclass(frozen=True)
class Verdict:
    r"""What a run of T steps says of the growth of perturbations, :math:`K(t, s) = \|\Phi(t, s)\|`.

    Args:
        kind: one of the four verdicts, or ``"inconclusive"``.
        horizon: T, the number of steps that were judged. Nothing is said of later ones.
        exponent: the mean growth per step after the first tenth of the run.
        constant: C. For ``"profile-bounded"`` the largest :math:`K(t, s)` that was seen; for ``"exponentially stable"`` the
            smallest constant found with :math:`K(t, s) \le C \rho^{t-s}`. From factors (:func:`judge_factors`) it holds for
            the windows of *all* boundaries; from a table, for those of its grid; and from the path alone, for
            :math:`K(t, 0)/K(s, 0)`, a lower estimate of K(t, s). NaN for other verdicts.
        rate: :math:`\rho` per step: for ``"exponentially stable"`` the slowest decay that the run does not exclude, for
            ``"exponentially unstable"`` the mean growth. NaN for other verdicts.
        terminal_decay: whether :math:`K(t, 0)` ends below 1 and the means of its logarithm over the quarters of the second half of
            the steps fall, which bounds no :math:`K(t, s)`.
        peak: the largest :math:`\log K(t, s)` that was seen.
        reason: what the verdict rests on, one sentence, in training steps.
        spans: the first and the last training step of each stretch that was judged.
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
    spans: tuple[tuple[int, int], ...] = ()
    estimated: bool = True

    def __str__(self) -> str:
        first, last = (self.spans[0][0], self.spans[-1][1]) if self.spans else (0, self.horizon)
        several = f" ({self.horizon} steps in {len(self.spans)} stretches)" if len(self.spans) > 1 else ""
        text = f"{self.kind} on [{first}, {last}]{several}: {self.reason}"
        if self.kind == "exponentially stable":
            text += f"; K(t, s) <= {self.constant:.3g} * {self.rate:.4g}^(t - s)"
        if self.kind == "profile-bounded":
            text += f"; K(t, s) <= {self.constant:.3g}"
        if self.kind == "exponentially unstable":
            text += f"; by {self.rate:.4g} per step"
        return text + ("; terminal decay" if self.terminal_decay else "")


def judge(
    log_norms: ArrayLike, *, steps: ArrayLike | None = None, windows: Windows | None = None, level: float = 0.95
) -> Verdict:
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
    ``profile-bounded``         S forgets, and neither a rise beyond a doubling nor a random walk beneath S that moves by more is
                                left possible; or a fall whose law is slower or not resolved, the weaker statement
    ``subexponential``          a rise with :math:`\gamma < 0.9` surely; or S wanders, and its mean is within a standard error of 0
    ``exponentially unstable``  a rise with :math:`\gamma > 0.6` surely
    ``inconclusive``            everything else, with the reason
    ==========================  ====================================================================================

    If the growth is not steady along the run, it is looked at in eighths of it: rates of one sign within a factor of two are
    exponential, and rates of one sign that rise or fall all along give the power. Otherwise the later half is judged, with time
    counted from its own beginning and from that of the run, and the weaker statement is kept: growth there is growth, while a
    decay there after a growth before it is inconclusive, with the flag of terminal decay.

    Boundaries need not lie at equal distances: between them the path is a line, looked at in steps of the largest distance, back
    from the last boundary.

    Args:
        log_norms: :math:`\log K(t_j, t_0)` at the boundaries, shape (n + 1,).
        steps: the training steps :math:`t_j`, increasing; None is 0 .. n.
        windows: the norms of the windows of the same boundaries. They can only take back a statement of stability, and raise the
            constant.
        level: of the intervals.

    Returns:
        The verdict. The horizon is part of it: no finite run tells :math:`\exp(c t^{0.95})` from an exponential, or a walk that is
        pulled back once in the run from one that is not.

    Raises:
        ValueError: if log_norms is no sequence, or the steps are not as many or do not increase.

    Examples:
        >>> t = np.arange(1001.0)
        >>> judge(np.log1p(t)).kind, judge(0.5 * np.sqrt(t)).kind, judge(0.01 * t).kind
        ('subexponential', 'subexponential', 'exponentially unstable')
        >>> noise = np.random.default_rng(0).standard_normal(1001)
        >>> print(judge(0.3 * noise))
        profile-bounded on [0, 1000]: the path comes back to its level...; K(t, s) <= 6.79
    """
    ell = np.asarray(log_norms, float)
    if ell.ndim != 1 or not ell.size:
        raise ValueError(f"log_norms is a sequence of numbers, got shape {ell.shape}.")
    times = np.arange(ell.size) if steps is None else np.asarray(steps, dtype=np.int64)
    if times.shape != ell.shape or not (np.diff(times) > 0).all():
        raise ValueError(f"steps are as many as log_norms, {ell.size}, and increase; got shape {times.shape}.")
    with np.errstate(invalid="ignore"):
        lam = exponent(np.diff(ell), level=level, spacing=np.diff(times))
    found = _found(ell, times, windows, level)
    seen = _largest(ell, windows)
    rate = constant = math.nan
    if found.kind == "exponentially stable":
        rate, constant = math.exp(min(found.slope, 0.0)), _constant(ell, times, windows, min(found.slope, 0.0))
    elif found.kind == "profile-bounded":
        constant = max(seen, 0.0 if windows is None else windows.sup_upper)
        constant = math.exp(min(constant, 700.0))
    elif found.kind == "exponentially unstable":
        rate = math.exp(min(lam.value, 700.0))
    spans = ((int(times[0]), int(times[-1])),)
    return Verdict(
        found.kind,
        int(times[-1] - times[0]),
        lam,
        constant,
        rate,
        _ends_in_decay(ell, times),
        seen,
        found.reason,
        spans,
    )


def _found(ell: NDArray[np.float64], times: NDArray[np.int64], windows: Windows | None, level: float) -> Finding:
    """What the path and its windows say together."""
    bad = np.flatnonzero(~np.isfinite(ell))
    if bad.size:
        k = int(bad[0])
        what = "the perturbation is annihilated" if ell[k] == -math.inf else f"the log norm is {ell[k]}"
        return Finding("inconclusive", f"{what} at training step {times[k]}")
    even, clock = _even(ell, times)
    found = look(even, (even.size - 1) // 10, level, clock)
    if found.kind not in ("exponentially stable", "profile-bounded"):
        return found
    if windows is not None:
        found = _compared(found, ell, windows, level)
    return _settled(found, ell, times, windows)


def _even(ell: NDArray[np.float64], times: NDArray[np.int64]) -> tuple[NDArray[np.float64], Clock]:
    """The path at equal distances, the largest that there is, back from its end; and their training steps."""
    if ell.size < 2:
        return ell, Clock(int(times[0]), 1)
    stride = int(np.diff(times).max())
    count = int(times[-1] - times[0]) // stride
    at = times[-1] - stride * np.arange(count, -1, -1)
    return np.interp(at, times, ell), Clock(int(at[0]), stride)


def _largest(ell: NDArray[np.float64], windows: Windows | None) -> float:
    """The largest log K(t, s) that was seen."""
    finite = ell[: np.flatnonzero(np.append(~np.isfinite(ell), True))[0]]  # up to what is not finite
    seen = drawup(finite) if finite.size else math.nan
    return seen if windows is None else max(seen, windows.sup)


def _constant(ell: NDArray[np.float64], times: NDArray[np.int64], windows: Windows | None, slope: float) -> float:
    """The smallest C with log K(t, s) <= log C + slope (t - s) for the windows from the start and of the grid."""
    top = drawup(ell - slope * times)
    if windows is not None:
        t = windows.steps
        top = max(top, float(np.nanmax(windows.log_norms - slope * np.maximum(t[:, None] - t, 0))))
    return math.exp(min(top, 700.0))


def _ends_in_decay(ell: NDArray[np.float64], times: NDArray[np.int64]) -> bool:
    """Whether the last norm is below 1 and the second half of the steps falls, by the means of its quarters."""
    if ell.size < 3 or not ell[-1] < 0.0:
        return False
    if ell[-1] == -math.inf:
        return True
    if not np.isfinite(ell).all():
        return False
    at = np.linspace((times[0] + times[-1]) / 2.0, times[-1], 400)
    half = np.interp(at, times, ell)
    means = half.reshape(4, -1).mean(1)
    return bool((np.diff(means) < 0.0).all() and means[0] - means[-1] > 0.15 * float(np.ptp(half)))


def _compared(found: Finding, ell: NDArray[np.float64], windows: Windows, level: float) -> Finding:
    """A finding of stability, taken back if windows that start late grow beyond what the path from the start shows."""
    if windows.sup <= drawup(ell) + MATERIAL:
        return found
    table, times = windows.log_norms, windows.steps
    why = f"the window from training step {windows.start} to {windows.end} has K = {math.exp(min(windows.sup, 700.0)):.3g}"
    i = int(
        np.flatnonzero(np.nanmax(table, axis=0) >= np.nanmax(table) - MATERIAL)[-1]
    )  # the last start of such growth
    column = table[i:, i]
    if np.isfinite(column).all() and np.nanmax(column) > drawup(ell) + MATERIAL:
        even, clock = _even(column, times[i:])
        late = look(even, even.size // 10, level, clock)
        if late.kind in ("subexponential", "exponentially unstable"):
            return Finding(late.kind, f"{why}; from training step {times[i]} on: {late.reason}")
        half = (column.size + 1) // 2
        if column.size > half and np.nanmax(column[half:]) > np.nanmax(column[:half]) + MATERIAL:
            grown = "windows from there still grow at the end, though the path from the start says"
            return Finding("inconclusive", f"{why}; {grown} {found.kind}")
    return replace(found, reason=f"{found.reason}; {why}")


def _settled(found: Finding, ell: NDArray[np.float64], times: NDArray[np.int64], windows: Windows | None) -> Finding:
    """A finding of stability, taken back if the end of the run makes the largest growth of a window much larger."""
    before = times[-1] - LATE * (times[-1] - times[0])
    early = drawup(ell[times <= before])
    if windows is not None:
        early = max(early, float(windows.running[windows.steps <= before][-1]))
        if windows.end <= before:
            return found
    last = _largest(ell, windows)
    if last <= 1.5 * early + MATERIAL:
        return found
    grown = f"the largest log K(t, s), {early:.3g} by training step {before:.0f}, is {last:.3g} at the end: it is not settled"
    return Finding("inconclusive", f"{found.reason}; {grown}", found.slope, found.falls)
