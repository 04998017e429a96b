"""T5: proxes, projections, subgradients and kinks, theory against measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

import stableopt as so
import stableopt.theory as th
from stableopt import constraints as con
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
from tests.benchmarks.theory_steps import one_step


def nonsmooth(size: Size) -> list[Row]:
    """T5: proxes and projections are firmly nonexpansive; projections on sets that are not convex are not."""
    rng, n, rows = np.random.default_rng(7), size.dimension, []
    maps = {
        "L1": lambda x: con.L1(0.5).prox(x, 1.0),
        "ElasticNet": lambda x: con.ElasticNet(0.5, 0.3).prox(x, 1.0),
        "Box": con.Box(-0.5, 0.5).project,
        "L2Ball": con.L2Ball(1.0).project,
        "L1Ball": con.L1Ball(1.0).project,
        "Simplex": con.Simplex().project,
        "SpectralBall": lambda x: con.SpectralBall(1.0).project(x.reshape(2, -1)).reshape(-1),
        "NuclearNorm": lambda x: con.NuclearNorm(0.5).prox(x.reshape(2, -1), 1.0).reshape(-1),
    }
    law = "prox and projection: ‖Px−Py‖² ≤ ⟨Px−Py, x−y⟩"
    for name, P in maps.items():

        def pairs(P: Callable[[Tensor], Tensor] = P) -> Iterator[tuple[float, float, float]]:
            for _ in range(size.draws):
                x = 2 * torch.as_tensor(rng.standard_normal(2 * n))
                y = x + 10.0 ** rng.uniform(-3, 1) * torch.as_tensor(rng.standard_normal(2 * n))
                d, lengths = P(x) - P(y), float(x.norm() + y.norm())
                if d.any():  # each of the two images is off by roundings of its point, whatever their distance
                    yield float(d @ (x - y)), float(d @ d), 2 * (2 * n) ** 2 * lengths / float(d.norm())

        rows.append(searched("T5", law, name, pairs()))
    inside = torch.full((2 * n,), 0.01), torch.full((2 * n,), -0.02)
    d = maps["Box"](inside[0]) - maps["Box"](inside[1])
    rows.append(witnessed("T5", law, "two points of the set", (float(d @ (inside[0] - inside[1])), float(d @ d))))
    x, y = torch.tensor([1e-3, 1.0]), torch.tensor([-1e-3, 1.0])
    sphere = con.Rank(1).project
    X, Y = torch.diag(torch.tensor([1.0 + 1e-3, 1.0])), torch.diag(torch.tensor([1.0 - 1e-3, 1.0]))
    gap = float(torch.linalg.vector_norm(sphere(X) - sphere(Y)) / torch.linalg.vector_norm(X - Y))
    rows.append(
        passed(
            "T5", "projection: ‖Px−Py‖ ≤ ‖x−y‖", "rank 1, not a convex set: the law does not speak of it", (1.0, gap)
        )
    )
    shrink = con.L2Squared(0.8)
    pair = (
        float(th.prox_factor(1.5, 0.8)),
        float(torch.linalg.vector_norm(shrink.prox(x, 1.5) - shrink.prox(y, 1.5)) / torch.linalg.vector_norm(x - y)),
    )
    rows.append(witnessed("T5", "prox of an m-strongly convex g: 1/(1+τm)", "L2Squared", pair))
    rows += subgradients(size, rng)
    return rows


def subgradients(size: Size, rng: np.random.Generator) -> list[Row]:
    """T5: two subgradient runs on the same sample."""
    law, G, lr = "subgradient step: √(‖δ‖² + 4η²G²)", 1.3, 0.2

    def step(x: float) -> float:
        w = nn.Parameter(torch.tensor([x]))
        optimizer = torch.optim.SGD([w], lr=lr)
        (G * w.abs()).sum().backward()
        optimizer.step()
        return float(w.detach())

    def drawn() -> Iterator[Pair]:
        for x, y in rng.standard_normal((size.draws, 2)):
            yield float(th.subgradient_separation(abs(x - y), lr, G)), abs(step(x) - step(y))

    near = 1e-3
    pair = float(th.subgradient_separation(2 * near, lr, G)), abs(step(near) - step(-near))
    return [
        searched("T5", law, "torch SGD on G|θ|", drawn()),
        witnessed("T5", law, "two points on either side of the kink", pair),
    ]


def prox_gradient(size: Size) -> list[Row]:
    """T5: one step of proximal gradient, with our optimizer: the law of gradient descent, over 1 + ηm."""
    rng, n, law = np.random.default_rng(18), size.dimension, "prox-gradient: max(|1−ημ|, |1−ηL|)/(1+ηm)"

    def step(H: Array, lr: float, penalty: con.Regularizer) -> Callable[[Array], Array]:
        def make(ps: list[nn.Parameter]) -> torch.optim.Optimizer:
            return so.optim.SGD([{"params": ps, "prox": penalty}], lr=lr, guard="off")

        return lambda x: one_step(make, x, x, "", lambda x: H @ x)[0]

    def drawn() -> Iterator[tuple[float, float, float]]:
        for _ in range(max(size.draws // 50, 2)):
            mu, m, lr = rng.uniform(0, 1), rng.choice([0.0, 0.7]), rng.uniform(0.1, 1.2)
            run = step(symmetric(rng, n, mu, 2.0), lr, con.ElasticNet(0.4, m) if m else con.L1(0.4))

            def value(z: Array, run: Callable[[Array], Array] = run) -> float:
                return separation(run, *two_points(z))

            bound = float(th.prox_gradient_factor(lr, mu, 2.0, m))
            found = climb(value, rng.standard_normal(2 * n), size.climb, rng)
            yield bound, found, roundings_of(n, lr, 2.0, bound)

    H = symmetric(rng, n, 0.5, 2.0)
    v, m, lr = np.linalg.eigh(H)[1][:, -1], 0.7, 1.2
    pair = float(th.prox_gradient_factor(lr, 0.5, 2.0, m)), separation(step(H, lr, con.L2Squared(m)), v, 2 * v)
    more = separation(step(H, 1.01, con.L1(1e-3)), 50 * v, 100 * v)
    return [
        searched("T5", law, "so.optim.SGD with L1 and ElasticNet, two points", drawn()),
        witnessed("T5", law, "L2Squared, along an eigenvector", pair),
        passed(
            "T5", "prox-gradient, convex: nonexpansive up to 2/L", "L1, η = 1.01 of it, far from the kink", (1.0, more)
        ),
    ]


def kinks(size: Size) -> list[Row]:
    """T5: every element of the chain of Clarke derivatives at a point where all units stand on their kink."""
    rng, n, law = (
        np.random.default_rng(19),
        min(size.dimension, 6),
        "ReLU net at kinks: ‖W₂DW₁‖ ≤ ‖W₂‖‖W₁‖ for all D in diag[0, 1]",
    )

    def largest(W2: Array, W1: Array) -> float:
        return max(norm(W2 * np.array(d) @ W1) for d in itertools.product((0.0, 1.0), repeat=n))  # convex in D

    def drawn() -> Iterator[Pair]:
        for _ in range(max(size.draws // 10, 3)):
            W2, W1 = rng.standard_normal((2, n, n))
            yield float(th.product_factor([norm(W2), norm(W1)])), largest(W2, W1)

    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return [
        searched("T5", law, "random weights, all vertices", drawn()),
        witnessed("T5", law, "W₂ = 2Qᵀ, W₁ = Q orthogonal", (2.0, largest(2 * Q.T, Q))),
    ]


LAWS = [nonsmooth, prox_gradient, kinks]
