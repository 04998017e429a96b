"""Coverage of the intervals of exponents, and verdicts on random paths whose answer is known, as tables in markdown.

``python -m tests.benchmarks.verdicts coverage | design | heldout | slow [--runs N] [--steps T ...] [--seed S]``

The rules of :func:`stableopt.lyapunov.profile.judge` were made with the paths of :func:`design`. Those of :func:`heldout`
have other laws, noises and sizes. They were run with seed 0 when the rules seemed final. Two things changed afterwards: what a law
that slows down beneath a random walk may be called became stricter, and the walk between walls got its lower wall, which had been
missing. Then a review found the paths of :func:`slow`, and others like them, called bounded: since then *bounded* asks that neither
a rise by more than a doubling nor a random walk of that size is left possible. These rules were changed with those paths in view.
The tables are of seed 5, run after that: fresh paths, of kinds whose first results had been seen.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.exponents import exponent, long_run_variance
from stableopt.lyapunov.profile.growth.verdicts import judge
from stableopt.lyapunov.running import student_quantile

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]

STABLE, BOUNDED, SLOW, UNSTABLE = "exponentially stable", "profile-bounded", "subexponential", "exponentially unstable"
KINDS = (STABLE, BOUNDED, SLOW, UNSTABLE, "inconclusive")


@dataclass(frozen=True)
class Paths:
    """Random paths of one kind: how one of T steps is drawn, and the verdicts that are right."""

    name: str
    truth: tuple[str, ...]
    draw: Draw

    @property
    def grows(self) -> bool:
        """Whether neither stable nor bounded would be true."""
        return STABLE not in self.truth and BOUNDED not in self.truth


def ar(r: np.random.Generator, phi: float, T: int, scale: float = 1.0) -> NDArray[np.float64]:
    """T + 1 values of a Gaussian autoregression of order one with this standard deviation, from its stationary law."""
    x = scale * r.standard_normal(T + 1)
    x[1:] *= math.sqrt(1.0 - phi * phi)
    for t in range(1, T + 1):
        x[t] += phi * x[t - 1]
    return x


def arma(noise: NDArray[np.float64], phi: tuple[float, ...], theta: float = 0.0) -> NDArray[np.float64]:
    """x_t = sum of phi_i x_{t-i} + e_t + theta e_{t-1} from a state of zero."""
    x = noise.copy()
    x[1:] += theta * noise[:-1]
    for t in range(1, x.size):
        for i, p in enumerate(phi, start=1):
            x[t] += p * x[t - i] if t >= i else 0.0
    return x


def time(T: int) -> NDArray[np.float64]:
    """0 .. T."""
    return np.arange(T + 1.0)


def design() -> list[Paths]:
    """The paths that the rules were made with."""

    def wave(r: np.random.Generator, T: int) -> NDArray[np.float64]:
        return np.cos(2.0 * np.pi * time(T) / r.uniform(5.0, 60.0) + 6.0 * r.random())

    def walk(r: np.random.Generator, T: int) -> NDArray[np.float64]:
        return r.standard_normal(T + 1).cumsum()

    return [
        Paths("fast decay", (STABLE,), lambda r, T: -0.1 * time(T) + ar(r, 0.5, T, 0.5)),
        Paths("slow decay", (STABLE,), lambda r, T: -0.01 * time(T) + ar(r, 0.8, T, 0.5)),
        Paths("decay + walk", (STABLE,), lambda r, T: -0.05 * time(T) + 0.3 * walk(r, T)),
        Paths(
            "t^2 exp(-0.05 t)", (STABLE,), lambda r, T: -0.05 * time(T) + 2.0 * np.log1p(time(T)) + ar(r, 0.3, T, 0.1)
        ),
        Paths(
            "t exp(-c t), exact",
            (STABLE,),
            lambda r, T: -r.uniform(0.02, 0.1) * time(T) + np.log1p(r.uniform(1, 5) * time(T)),
        ),
        Paths(
            "decay 0.1, then 0.03",
            (STABLE,),
            lambda r, T: -0.03 * time(T) - 0.07 * np.minimum(time(T), T / 2) + ar(r, 0.5, T, 0.3),
        ),
        Paths("white noise", (BOUNDED,), lambda r, T: 0.5 * r.standard_normal(T + 1)),
        Paths("AR(0.9)", (BOUNDED,), lambda r, T: ar(r, 0.9, T, 0.5)),
        Paths("AR(0.95)", (BOUNDED,), lambda r, T: ar(r, 0.95, T, 0.5)),
        Paths(
            "period 37, exact", (BOUNDED,), lambda r, T: 0.7 * np.cos(2.0 * np.pi * time(T) / 37.0 + 6.0 * r.random())
        ),
        Paths(
            "period + AR(0.5)",
            (BOUNDED,),
            lambda r, T: r.uniform(0.2, 2) * wave(r, T) + ar(r, 0.5, T, r.uniform(0, 0.3)),
        ),
        Paths("saw tooth, exact", (BOUNDED,), lambda r, T: ((time(T) + 40.0 * r.random()) % 40.0) / 20.0),
        Paths("t(3) noise", (BOUNDED,), lambda r, T: 0.4 * r.standard_t(3, T + 1)),
        Paths(
            "transient to a level", (BOUNDED,), lambda r, T: 2.0 * (1.0 - np.exp(-time(T) / 15.0)) + ar(r, 0.7, T, 0.2)
        ),
        Paths(
            "decay to a level", (BOUNDED,), lambda r, T: -5.0 * np.minimum(4.0 * time(T) / T, 1.0) + ar(r, 0.5, T, 0.3)
        ),
        Paths("exp(-0.5 sqrt t)", (BOUNDED,), lambda r, T: -0.5 * np.sqrt(time(T)) + ar(r, 0.5, T, 0.2)),
        Paths("1/t", (BOUNDED,), lambda r, T: -np.log1p(time(T)) + ar(r, 0.5, T, 0.2)),
        Paths("random walk", (SLOW,), lambda r, T: 0.3 * walk(r, T)),
        Paths("random walk, t(3) steps", (SLOW,), lambda r, T: 0.3 * r.standard_t(3, T + 1).cumsum()),
        Paths("t", (SLOW,), lambda r, T: np.log1p(time(T)) + ar(r, 0.5, T, 0.2)),
        Paths("t^0.5", (SLOW,), lambda r, T: 0.5 * np.log1p(time(T)) + ar(r, 0.5, T, 0.2)),
        Paths("sqrt(1 + c t^2), exact", (SLOW,), lambda r, T: 0.5 * np.log1p(r.uniform(0.2, 5.0) * time(T) ** 2)),
        Paths("exp(0.15 sqrt t)", (SLOW,), lambda r, T: 0.15 * np.sqrt(time(T)) + ar(r, 0.5, T, 0.2)),
        Paths("exp(0.5 sqrt t)", (SLOW,), lambda r, T: 0.5 * np.sqrt(time(T)) + ar(r, 0.5, T, 0.2)),
        Paths("exp(0.005 t)", (UNSTABLE,), lambda r, T: 0.005 * time(T) + ar(r, 0.8, T, 0.3)),
        Paths("exp(0.05 t)", (UNSTABLE,), lambda r, T: 0.05 * time(T) + ar(r, 0.8, T, 0.5)),
        Paths("exp(0.02 t) + period", (UNSTABLE,), lambda r, T: 0.02 * time(T) + wave(r, T)),
        Paths(
            "growth 0.1, then 0.03",
            (UNSTABLE,),
            lambda r, T: 0.03 * time(T) + 0.07 * np.minimum(time(T), T / 2) + ar(r, 0.5, T, 0.3),
        ),
        Paths("exp(0.1 t) + walk", (UNSTABLE,), lambda r, T: 0.1 * time(T) + 0.3 * walk(r, T)),
        Paths("t exp(0.05 t), exact", (UNSTABLE,), lambda r, T: 0.05 * time(T) + np.log1p(time(T))),
        Paths(
            "dips, then climbs", (UNSTABLE, SLOW), lambda r, T: 0.05 * np.abs(time(T) - 0.5 * T) + ar(r, 0.5, T, 0.3)
        ),
        Paths(
            "dips, then climbs, + walk",
            (UNSTABLE, SLOW),
            lambda r, T: 0.1 * np.abs(time(T) - 0.4 * T) + 0.2 * walk(r, T),
        ),
        Paths(
            "climbs, then decays",
            (UNSTABLE, SLOW),
            lambda r, T: -0.07 * np.abs(time(T) - 0.45 * T) + ar(r, 0.5, T, 0.3),
        ),
    ]


def _matrices(r: np.random.Generator, T: int, gain: float, spread: float) -> NDArray[np.float64]:
    """log norm of products of random 3 x 3 matrices."""
    P, log, out = np.eye(3), 0.0, [0.0]
    for _ in range(T):
        P = gain * (np.eye(3) + spread * r.standard_normal((3, 3))) @ P
        size = float(np.linalg.norm(P, 2))
        P, log = P / size, log + math.log(size)
        out.append(log)
    return np.array(out)


def _jordan(T: int, rho: float) -> NDArray[np.float64]:
    """log norm of the powers of a 3 x 3 Jordan block, in closed form."""
    out = []
    for t in range(T + 1):
        block = np.eye(3) + t / rho * np.eye(3, k=1) + t * (t - 1) / 2.0 / rho**2 * np.eye(3, k=2)
        out.append(t * math.log(rho) + math.log(float(np.linalg.norm(block, 2))))
    return np.array(out)


def _chaos(r: np.random.Generator, T: int) -> NDArray[np.float64]:
    """Sum of log|f'| along an orbit of x -> 3.8 x (1 - x), whose exponent is 0.43."""
    x, log, out = r.uniform(0.2, 0.8), 0.0, [0.0]
    for _ in range(T):
        log += math.log(abs(3.8 * (1.0 - 2.0 * x)))
        x = 3.8 * x * (1.0 - x)
        out.append(log)
    return np.array(out)


def _switching(r: np.random.Generator, T: int) -> NDArray[np.float64]:
    """Two levels, left with probability 0.1 a step."""
    return 0.8 * ((r.random(T + 1) < 0.1).cumsum() % 2) + 0.1 * r.standard_normal(T + 1)


def _reflected(r: np.random.Generator, T: int) -> NDArray[np.float64]:
    """A random walk between two walls."""
    x, out = 0.0, []
    for step in 0.25 * r.standard_normal(T + 1):
        x += step
        if abs(x) > 1.0:
            x = math.copysign(2.0 - abs(x), x)
        out.append(x)
    return np.array(out)


def _volatile(r: np.random.Generator, T: int) -> NDArray[np.float64]:
    """A random walk whose steps have a scatter that clusters (GARCH)."""
    v, out, x = 0.09, [], 0.0
    for e in r.standard_normal(T + 1):
        step = math.sqrt(v) * e
        v = 0.009 + 0.1 * step**2 + 0.8 * v
        x += step
        out.append(x)
    return np.array(out)


def heldout() -> list[Paths]:
    """The paths that the rules had not seen."""

    def laplace(r: np.random.Generator, T: int, scale: float) -> NDArray[np.float64]:
        return scale * r.laplace(size=T + 1)

    def mixed(r: np.random.Generator, T: int, scale: float) -> NDArray[np.float64]:
        return arma(scale * r.standard_normal(T + 1), (0.7,), 0.4)

    def slopes(T: int, *knees: tuple[float, float]) -> NDArray[np.float64]:
        """Piecewise linear: from the share of the run on, the slope."""
        rate = np.zeros(T + 1)
        for share, slope in knees:
            rate[int(share * T) + 1 :] = slope
        return rate.cumsum()

    return [
        Paths("decay 0.03, ARMA noise", (STABLE,), lambda r, T: -0.03 * time(T) + mixed(r, T, 0.3)),
        Paths(
            "decay 0.008, t(4) AR(0.6)",
            (STABLE,),
            lambda r, T: -0.008 * time(T) + arma(0.25 * r.standard_t(4, T + 1), (0.6,)),
        ),
        Paths("random matrices, contracting", (STABLE,), lambda r, T: _matrices(r, T, 0.9, 0.15)),
        Paths(
            "multiplicative noise, a.s. decay",
            (STABLE,),
            lambda r, T: np.log(np.abs(1.0 - 0.3 * r.exponential(size=T + 1))).cumsum(),
        ),
        Paths("Jordan block, 0.97, exact", (STABLE,), lambda r, T: _jordan(T, r.uniform(0.95, 0.98))),
        Paths(
            "two decays, 0.06 then 0.02",
            (STABLE,),
            lambda r, T: slopes(T, (0.0, -0.06), (0.4, -0.02)) + laplace(r, T, 0.2),
        ),
        Paths(
            "two incommensurate periods",
            (BOUNDED,),
            lambda r, T: (
                np.sin(time(T) / r.uniform(2.0, 8.0))
                + 0.5 * np.sin(time(T) / r.uniform(3.0, 9.0))
                + laplace(r, T, 0.05)
            ),
        ),
        Paths(
            "AR(2) of period 25",
            (BOUNDED,),
            lambda r, T: arma(0.1 * r.standard_normal(T + 1), (1.9 * math.cos(2 * np.pi / 25), -0.9025)),
        ),
        Paths("AR(0.93)", (BOUNDED,), lambda r, T: ar(r, 0.93, T, 0.4)),
        Paths("AR(0.8), Laplace", (BOUNDED,), lambda r, T: arma(laplace(r, T, 0.3), (0.8,))),
        Paths("heavy tails, t(2.5)", (BOUNDED,), lambda r, T: 0.3 * r.standard_t(2.5, T + 1)),
        Paths("two levels, switching", (BOUNDED,), _switching),
        Paths("walk between walls", (BOUNDED,), _reflected),
        Paths(
            "rise to a level, Laplace",
            (BOUNDED,),
            lambda r, T: 3.0 * (1.0 - np.exp(-time(T) / 20.0)) + laplace(r, T, 0.2),
        ),
        Paths("t^-0.7", (BOUNDED,), lambda r, T: -0.7 * np.log1p(time(T)) + mixed(r, T, 0.1)),
        Paths("exp(-0.4 t^0.4)", (BOUNDED,), lambda r, T: -0.4 * time(T) ** 0.4 + laplace(r, T, 0.15)),
        Paths("walk, Laplace steps", (SLOW,), lambda r, T: laplace(r, T, 0.2).cumsum()),
        Paths("walk, AR(0.5) steps", (SLOW,), lambda r, T: ar(r, 0.5, T, 0.2).cumsum()),
        Paths("walk, GARCH steps", (SLOW,), _volatile),
        Paths(
            "walk + white noise",
            (SLOW,),
            lambda r, T: 0.2 * r.standard_normal(T + 1).cumsum() + 0.4 * r.standard_normal(T + 1),
        ),
        Paths("t^0.7, ARMA noise", (SLOW,), lambda r, T: 0.7 * np.log1p(time(T)) + mixed(r, T, 0.1)),
        Paths("t^2, Laplace", (SLOW,), lambda r, T: 2.0 * np.log1p(time(T)) + laplace(r, T, 0.3)),
        Paths("Jordan block, 1, exact", (SLOW,), lambda r, T: _jordan(T, 1.0)),
        Paths("exp(0.1 sqrt t)", (SLOW,), lambda r, T: 0.1 * np.sqrt(time(T)) + mixed(r, T, 0.1)),
        Paths("exp(0.3 sqrt t)", (SLOW,), lambda r, T: 0.3 * np.sqrt(time(T)) + mixed(r, T, 0.1)),
        Paths("exp(sqrt t)", (SLOW,), lambda r, T: np.sqrt(time(T)) + laplace(r, T, 0.3)),
        Paths("exp(0.5 t^(1/3))", (SLOW,), lambda r, T: 0.5 * np.cbrt(time(T)) + laplace(r, T, 0.15)),
        Paths(
            "exp(0.2 sqrt t) + walk",
            (SLOW,),
            lambda r, T: 0.2 * np.sqrt(time(T)) + 0.05 * r.standard_normal(T + 1).cumsum(),
        ),
        Paths("exp(0.004 t)", (UNSTABLE,), lambda r, T: 0.004 * time(T) + arma(laplace(r, T, 0.1), (0.7,))),
        Paths("exp(0.08 t) + walk", (UNSTABLE,), lambda r, T: 0.08 * time(T) + laplace(r, T, 0.25).cumsum()),
        Paths("random matrices, expanding", (UNSTABLE,), lambda r, T: _matrices(r, T, 1.03, 0.15)),
        Paths("chaotic map", (UNSTABLE,), _chaos),
        Paths("exp(0.02 t), GARCH walk", (UNSTABLE,), lambda r, T: 0.02 * time(T) + 0.2 * _volatile(r, T)),
        Paths(
            "growth that starts late",
            (UNSTABLE, SLOW),
            lambda r, T: slopes(T, (0.0, 0.0), (0.5, 0.04)) + laplace(r, T, 0.2),
        ),
        Paths(
            "decay, then growth", (UNSTABLE, SLOW), lambda r, T: slopes(T, (0.0, -0.08), (0.6, 0.05)) + mixed(r, T, 0.1)
        ),
        Paths(
            "hump, then decay", (UNSTABLE, SLOW), lambda r, T: 0.1 * time(T) * (0.8 - time(T) / T) + laplace(r, T, 0.2)
        ),
    ]


def slow() -> list[Paths]:
    """Slow growth in a large noise, and what it is like: a review found the rules before the present ones wrong on these."""

    def noise(r: np.random.Generator, T: int, phi: float, scale: float) -> NDArray[np.float64]:
        return ar(r, phi, T, scale)

    grown = (SLOW, UNSTABLE)
    return [
        Paths("exp(0.003 t), AR(0.9) of sd 3", grown, lambda r, T: 0.003 * time(T) + noise(r, T, 0.9, 3.0)),
        Paths("exp(0.003 t), AR(0.5) of sd 3", grown, lambda r, T: 0.003 * time(T) + noise(r, T, 0.5, 3.0)),
        Paths("exp(0.005 t), AR(0.5) of sd 3", grown, lambda r, T: 0.005 * time(T) + noise(r, T, 0.5, 3.0)),
        Paths("exp(0.001 t), AR(0.9) of sd 3", grown, lambda r, T: 0.001 * time(T) + noise(r, T, 0.9, 3.0)),
        Paths("exp(0.05 sqrt t), AR(0.9)", (SLOW,), lambda r, T: 0.05 * np.sqrt(time(T)) + noise(r, T, 0.9, 0.5)),
        Paths("t^0.5, AR(0.9)", (SLOW,), lambda r, T: 0.5 * np.log1p(time(T)) + noise(r, T, 0.9, 0.5)),
        Paths(
            "walk of 0.05 a step, AR(0.9)",
            (SLOW,),
            lambda r, T: 0.05 * r.standard_normal(T + 1).cumsum() + noise(r, T, 0.9, 0.5),
        ),
        Paths("AR(0.9) of sd 3", (BOUNDED,), lambda r, T: noise(r, T, 0.9, 3.0)),
        Paths("AR(0.5) of sd 3", (BOUNDED,), lambda r, T: noise(r, T, 0.5, 3.0)),
        Paths("AR(0.9) of sd 0.2", (BOUNDED,), lambda r, T: noise(r, T, 0.9, 0.2)),
    ]


def confusion(paths: list[Paths], T: int, runs: int, seed: int = 0) -> Iterator[str]:
    """Judge so many paths of each kind, and yield the rows of the table."""
    yield f"T = {T}, {runs} paths of each kind, shares in %"
    yield ""
    yield "| paths | truth | stable | bounded | subexp. | unstable | inconclusive | right where given | terminal decay |"
    yield "|---|---|---|---|---|---|---|---|---|"
    right = given = unsafe = growing = implied = 0
    for k, kind in enumerate(paths):
        r = np.random.default_rng([seed, T, k])
        verdicts = [judge(kind.draw(r, T)) for _ in range(runs)]
        counts = Counter(v.kind for v in verdicts)
        said, hit = runs - counts["inconclusive"], sum(counts[t] for t in kind.truth)
        right, given = right + hit, given + said
        implied += counts[BOUNDED] if kind.truth == (STABLE,) else 0
        growing += runs if kind.grows else 0
        unsafe += counts[STABLE] + counts[BOUNDED] if kind.grows else 0
        shares = " | ".join(f"{100.0 * counts[name] / runs:.3g}" for name in KINDS)
        truth = " or ".join(kind.truth).replace("exponentially ", "").replace("profile-", "")
        share = f"{100.0 * hit / said:.3g}" if said else "-"
        ends = 100.0 * sum(v.terminal_decay for v in verdicts) / runs
        yield f"| {kind.name} | {truth} | {shares} | {share} | {ends:.3g} |"
    everything = runs * len(paths)
    yield ""
    yield (
        f"All: a verdict for {100.0 * given / everything:.1f} %, right where given {100.0 * right / given:.1f} % (with bounded for "
        f"stable, which it implies, {100.0 * (right + implied) / given:.1f} %); stable or bounded for paths that grow "
        f"{100.0 * unsafe / growing:.2f} %."
    )
    yield ""


def coverage(runs: int) -> Iterator[str]:
    """Yield the table of how often the intervals of level 0.95 cover the mean of an autoregression."""
    yield f"{runs} series each, level 95 %"
    yield ""
    yield "| φ | T | effective | interval given | covers where given | covers, given or not | batch means | as if independent |"
    yield "|---|---|---|---|---|---|---|---|"
    for phi in (0.0, 0.5, 0.9, 0.97):
        for T in (200, 1000, 4000):
            r = np.random.default_rng([int(100 * phi), T])
            known, counts = 0, np.zeros(4)
            for _ in range(runs):
                x = ar(r, phi, T - 1)
                found = exponent(x, burn_in=0)
                known += found.known
                counts[0] += found.lower <= 0.0 <= found.upper
                variance, freedom = long_run_variance(x)
                counts[1] += abs(x.mean()) <= student_quantile(0.975, round(freedom, 1)) * math.sqrt(variance / T)
                batches = min(20, max(8, T // 50))
                means = x[T % batches :].reshape(batches, -1).mean(1)
                counts[2] += abs(x.mean()) <= student_quantile(0.975, batches - 1.0) * means.std(ddof=1) / math.sqrt(
                    batches
                )
                counts[3] += abs(x.mean()) <= 1.96 * x.std(ddof=1) / math.sqrt(T)
            share = f"{100.0 * counts[0] / known:.1f}" if known > 50 else "-"
            rest = " | ".join(f"{100.0 * c / runs:.1f}" for c in counts[1:])
            yield f"| {phi} | {T} | {T * (1 - phi) / (1 + phi):.0f} | {100.0 * known / runs:.1f} | {share} | {rest} |"
    yield ""


SETS = {"design": design, "heldout": heldout, "slow": slow}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["coverage", *SETS])
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000, 4000])
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.which == "coverage":
        for row in coverage(chosen.runs or 2000):
            print(row, flush=True)
        return
    for T in chosen.steps:
        for row in confusion(SETS[chosen.which](), T, chosen.runs or 400, chosen.seed):
            print(row, flush=True)


if __name__ == "__main__":
    main()
