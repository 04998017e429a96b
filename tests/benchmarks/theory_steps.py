"""T4: gradient methods as torch runs them: factors, edges, and the mean square."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import stableopt.theory as th
from tests.benchmarks.theory_rows import (
    Array,
    Pair,
    Row,
    Size,
    climb,
    norm,
    passed,
    roundings_of,
    searched,
    separation,
    symmetric,
    two_points,
    witnessed,
)

FROZEN = 1 - 2.0**-53
"""A decay of second moments that leaves them as they are, to rounding."""
LATE = 1e18
"""A count of steps after which nothing is left of any bias correction."""

Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def one_step(
    make: Maker, w: Array, momentum: Array, name: str, gradient: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Take one step of a real optimizer from parameters and a momentum; return both after it."""
    parameter = nn.Parameter(torch.as_tensor(w).clone())
    optimizer = make([parameter])
    state: dict[str, Any] = {"step": torch.tensor(LATE), "mu_product": torch.tensor(0.0)}
    state |= {"exp_avg_sq": torch.ones(len(w)), "square_avg": torch.ones(len(w))}
    if name:
        optimizer.state[parameter] |= state | {name: torch.as_tensor(momentum).clone()}
    parameter.grad = torch.as_tensor(gradient(w)).clone()
    optimizer.step()
    after = optimizer.state[parameter][name].numpy() if name else np.zeros(len(w))
    return parameter.detach().numpy(), np.asarray(after)


def radii(make: Maker, curvatures: Array, name: str) -> tuple[Array, Array]:
    """Return the spectral radius of the step on (parameter, momentum), for every curvature: read off from two real steps.

    Beside it stands how far it can be off, in half ulps: by the condition of the eigenvectors times a few roundings of the entries.
    """
    ones, zeros = np.ones(len(curvatures)), np.zeros(len(curvatures))
    columns = [one_step(make, w, m, name, lambda x: curvatures * x) for w, m in ((ones, zeros), (zeros, ones))]
    steps = np.array(columns).transpose(2, 1, 0)  # [curvature, of what, by what]
    if name:  # units of the momentum in which the matrix is balanced: no eigenvalue changes
        unit = np.sqrt(np.abs(steps[:, 1, 0] / steps[:, 0, 1]))
        steps[:, 0, 1], steps[:, 1, 0] = steps[:, 0, 1] * unit, steps[:, 1, 0] / unit
    values, vectors = np.linalg.eig(steps)
    sizes = np.linalg.cond(vectors) * np.linalg.norm(steps, axis=(1, 2))
    return np.abs(values).max(axis=1), 20 * sizes


def methods(
    rng: np.random.Generator,
) -> Iterator[tuple[str, str, Callable[[float], float], Callable[[float], Maker], str]]:
    """Return law, setting, edge of a curvature, maker of the optimizer for an lr, and the name of the momentum."""
    b, b1 = float(rng.choice([0.5, 0.9, 0.99])), float(rng.choice([0.5, 0.9]))
    d, w = rng.uniform(0, 0.9), rng.uniform(0, 0.5)
    optim, buffer = torch.optim, "momentum_buffer"

    def sgd(**options: Any) -> Callable[[float], Maker]:
        return lambda lr: lambda ps: optim.SGD(ps, lr=lr, **options)

    def adam(kind: Any, **options: Any) -> Callable[[float], Maker]:
        return lambda lr: lambda ps: kind(ps, lr=lr, betas=(b1, FROZEN), eps=0.0, **options)

    yield "GD: ηL ≤ 2", "torch SGD", th.gradient_descent_edge, sgd(), ""
    yield "heavy ball: ηL ≤ 2(1+β)", f"torch SGD, β = {b}", lambda L: th.heavy_ball_edge(L, b), sgd(momentum=b), buffer
    yield (
        "Nesterov: ηL ≤ 2(1+β)/(1+2β)", f"torch SGD, β = {b}",
        lambda L: th.nesterov_edge(L, b), sgd(momentum=b, nesterov=True), buffer,
    )  # fmt: skip
    yield (
        "SGD, dampening d, decay ω: 2(1+β)/((1−d)(L+ω))", f"torch SGD, β = {b}, d = {d:.2f}, ω = {w:.2f}",
        lambda L: th.sgd_edge(L, momentum=b, dampening=d, weight_decay=w), sgd(momentum=b, dampening=d, weight_decay=w), buffer,
    )  # fmt: skip
    yield (
        "Adam, frozen: ηL ≤ 2(1+β₁)/(1−β₁)",
        f"torch Adam, β₁ = {b1}",
        lambda L: th.adam_edge(L, b1),
        adam(optim.Adam),
        "exp_avg",
    )
    yield (
        "AdamW, frozen: ηL ≤ (2−ηω)(1+β₁)/(1−β₁)", f"torch AdamW, β₁ = {b1}, ω = {w:.2f}",
        lambda L: th.adamw_edge(L, b1, w), adam(optim.AdamW, weight_decay=w), "exp_avg",
    )  # fmt: skip
    yield (
        "NAdam, frozen: ηL ≤ 2(1+β₁)/((1−β₁)(1+2β₁))", f"torch NAdam, β₁ = {b1}",
        lambda L: th.nadam_edge(L, b1), adam(optim.NAdam), "exp_avg",
    )  # fmt: skip
    yield (
        "RMSprop, frozen: ηL ≤ 2(1+β)", f"torch RMSprop, β = {b}", lambda L: th.rmsprop_edge(L, b),
        lambda lr: lambda ps: optim.RMSprop(ps, lr=lr, alpha=FROZEN, eps=0.0, momentum=b), buffer,
    )  # fmt: skip


def edges(size: Size) -> list[Row]:
    """The spectral radius of one step on a quadratic is at most 1 up to the edge, 1 at it, and above 1 past it."""
    rng, drawn, rows = np.random.default_rng(8), {}, []
    for k in range(max(size.draws // 10, 3)):
        L = 10.0 ** rng.uniform(-2, 2)
        for law, setting, edge, maker, name in methods(rng):
            lr = edge(L)
            curvatures = L * np.concatenate([np.sort(rng.uniform(0.01, 0.99, 50)), [1.0]])
            found, roundings = radii(maker(lr), curvatures, name)
            drawn.setdefault(law, []).append((1.0, float(found.max()), float(roundings[found.argmax()])))
            if k == 0:
                pair, name_of_row = (1.0, float(found[-1])), f"{setting}, λ = L, η at the edge"
                rows.append(witnessed("T4", law, name_of_row, pair, roundings=float(roundings[-1])))
                more = radii(maker(1.01 * lr), np.array([L]), name)[0]
                rows.append(passed("T4", law, f"{setting}, η = 1.01 of it", (1.0, float(more[0]))))
    searches = [searched("T4", law, "λ in (0, L], random settings", pairs) for law, pairs in drawn.items()]
    return [row for pair in zip(searches, rows[::2], rows[1::2], strict=True) for row in pair]


def factors(size: Size) -> list[Row]:
    """One step of gradient descent separates two points by at most max(|1−ημ|, |1−ηL|)."""
    rng, n, law, rows = np.random.default_rng(9), size.dimension, "GD: max(|1−ημ|, |1−ηL|)", []

    def sgd(lr: float, gradient: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return lambda x: one_step(lambda ps: torch.optim.SGD(ps, lr=lr), x, x, "", gradient)[0]

    for name, low in (("convex", 0.0), ("strongly convex", 0.3), ("not convex", -0.7)):

        def drawn(low: float = low) -> Iterator[tuple[float, float, float]]:
            for _ in range(max(size.draws // 50, 2)):
                L, lr, A = rng.uniform(1, 4), 10.0 ** rng.uniform(-1, 0.3), np.linalg.qr(rng.standard_normal((n, n)))[0]
                step = sgd(lr, lambda x, A=A, L=L: low * x + (L - low) * A.T @ np.tanh(A @ x))

                def value(z: Array, step: Callable[[Array], Array] = step) -> float:
                    return separation(step, *two_points(z))

                bound = float(th.gradient_descent_factor(lr, low, L))
                found = climb(value, rng.standard_normal(2 * n), size.climb, rng)
                yield bound, found, roundings_of(n, lr, L, bound)

        rows.append(searched("T4", law, f"{name}, torch SGD on two points, not quadratic", drawn()))
    for name, low, lr in (
        ("convex, η = 2/L", 0.0, 1.0),
        ("not convex: 1 + η|μ|", -0.7, 0.5),
        ("strongly convex, η = 2/(μ+L)", 0.5, 0.8),
    ):
        H = symmetric(rng, n, low, 2.0)
        for v in (np.linalg.eigh(H)[1][:, i] for i in ((0,) if low < 0 else (-1,))):
            pair = float(th.gradient_descent_factor(lr, low, 2.0)), separation(sgd(lr, lambda x, H=H: H @ x), v, 2 * v)
            rows.append(witnessed("T4", law, f"{name}, along an eigenvector", pair))
    v = np.linalg.eigh(H := symmetric(rng, n, 0.0, 2.0))[1][:, -1]
    rows.append(passed("T4", law, "convex, η = 1.01 · 2/L", (1.0, separation(sgd(1.01, lambda x: H @ x), v, 2 * v))))
    return rows


def mean_squares(size: Size) -> list[Row]:
    """Second moments of a stochastic step, from the real steps on all batches."""
    rng, n, rows = np.random.default_rng(10), 3, []

    def steps(Hs: Sequence[Array], batch: int, lr: float) -> list[Array]:
        def matrix(H: Array) -> Array:
            columns = [
                one_step(lambda ps: torch.optim.SGD(ps, lr=lr), e, e, "", lambda x: H @ x)[0] for e in np.eye(len(H))
            ]
            return np.array(columns).T

        return [matrix(np.mean([Hs[i] for i in b], axis=0)) for b in itertools.combinations(range(len(Hs)), batch)]

    def psd(rank: int) -> Array:
        A = rng.standard_normal((rank, n))
        return A.T @ A

    def drawn() -> Iterator[Pair]:
        for _ in range(max(size.draws // 20, 3)):
            Hs = [psd(2) for _ in range(4)]
            mu, s = float(np.linalg.eigvalsh(np.mean(Hs, axis=0))[0]), norm(np.mean([H @ H for H in Hs], axis=0))
            lr = rng.uniform(0.1, 2) * mu / s
            M = np.mean([A.T @ A for A in steps(Hs, 1, lr)], axis=0)
            yield float(th.mean_square_factor(lr, mu, s)), norm(M)

    law = "SGD: E‖δ⁺‖² ≤ (1 − 2ημ + η²‖E H²‖)‖δ‖²"
    rows.append(searched("T4", law, "four random samples of rank 2", drawn()))
    scalar = [np.array([[h]]) for h in (0.5, 1.0, 3.0)]
    mu, s = 1.5, float(np.mean([h**2 for h in (0.5, 1.0, 3.0)]))
    limit = th.mean_square_max_lr(mu, s)
    for kind, lr in ((witnessed, 0.5 * limit), (witnessed, limit), (passed, 1.01 * limit)):
        measured = float(np.mean([A[0, 0] ** 2 for A in steps(scalar, 1, lr)]))
        predicted = 1.0 if kind is passed else float(th.mean_square_factor(lr, mu, s))
        rows.append(kind("T4", law, f"three curvatures, η = {lr / limit:.2f} of its limit", (predicted, measured)))
    law = "SGD, exact edge of the mean square (Mulayoff, Michaeli)"
    for k in range(max(size.draws // 100, 1)):
        Hs, batch = [psd(3) for _ in range(4)], int(rng.integers(1, 4))
        edge = th.mean_square_edge(Hs, batch)

        def radius(lr: float, Hs: Sequence[Array] = Hs, batch: int = batch) -> float:
            return th.spectral_radius(np.mean([np.kron(A, A) for A in steps(Hs, batch, lr)], axis=0))

        rows.append(
            witnessed(
                "T4",
                law,
                f"four samples, all batches of {batch}, at the edge ({k})",
                (1.0, radius(edge)),
                roundings=4 * 9**2,  # 9 rows, symmetric
            )
        )
        rows.append(passed("T4", law, f"the same, η = 1.01 of it ({k})", (1.0, radius(1.01 * edge))))
    return rows


def exponents(size: Size) -> list[Row]:
    """Two exponents of the same noise, from all sequences of real steps: the one is negative, the other positive."""
    curvatures, lr, length = (0.6, 2.9), 1.0, 6 + size.draws // 200
    a = [1 - lr * h for h in curvatures]

    def step(x: Array, h: float) -> Array:
        return one_step(lambda ps: torch.optim.SGD(ps, lr=lr), x, x, "", lambda x: h * x)[0]

    ends = np.ones(1)  # of all sequences of samples so far
    for _ in range(length):
        ends = np.concatenate([step(ends, h) for h in curvatures])
    logs = np.log(np.abs(ends)) / length
    almost_sure, mean_square = float(logs.mean()), float(np.log((ends**2).mean()) / 2 / length)
    name = f"1 − ηh is 0.4 or −1.9, all 2^{length} sequences"
    return [
        witnessed(
            "T4", "almost sure: e^λ, λ = E log|1−ηh|", name, (np.exp(th.almost_sure_exponent(a)), np.exp(almost_sure))
        ),
        witnessed("T4", "mean square: √E(1−ηh)²", name, (np.exp(th.mean_square_exponent(a)), np.exp(mean_square))),
    ]


def growths(size: Size) -> list[Row]:
    """The growth of a step in the stability of Hardt, Recht and Singer."""
    rng, n = np.random.default_rng(20), size.dimension

    def sgd(H: Array, lr: float) -> Callable[[Array], Array]:
        return lambda x: one_step(lambda ps: torch.optim.SGD(ps, lr=lr), x, x, "", lambda x: H @ x)[0]

    def strong() -> Iterator[Pair]:
        for _ in range(max(size.draws // 4, 10)):
            m, L = sorted(rng.uniform(0.1, 3, 2))
            lr, (x, y) = rng.random() * 2 / (m + L), rng.standard_normal((2, n))
            yield float(th.strongly_convex_growth(lr, m, L)), separation(sgd(symmetric(rng, n, m, L), lr), x, y)

    def any_loss() -> Iterator[Pair]:
        for _ in range(max(size.draws // 4, 10)):
            L, lr, (x, y) = rng.uniform(0.1, 3), rng.random(), rng.standard_normal((2, n))
            yield float(th.nonconvex_growth(lr, L)), separation(sgd(symmetric(rng, n, -L, L), lr), x, y)

    x, y = rng.standard_normal((2, n))
    pair = float(th.nonconvex_growth(0.4, 2.0)), separation(sgd(-2 * np.eye(n), 0.4), x, y)
    return [
        searched("T4", "growth, m-strongly convex: 1 − ηLm/(L+m)", "torch SGD on quadratics", strong(), tight=False),
        searched("T4", "growth, any L-smooth loss: 1 + ηL", "torch SGD on quadratics", any_loss()),
        witnessed("T4", "growth, any L-smooth loss: 1 + ηL", "f = −L/2 ‖θ‖²", pair),
    ]


LAWS = [factors, edges, mean_squares, exponents, growths]
