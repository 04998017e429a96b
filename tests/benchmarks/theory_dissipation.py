"""T4: energies of gradient methods, invariants of normalized ones, and the sensitivity to the data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import stableopt as so
import stableopt.theory as th
from stableopt.constraints import L1, Box
from tests.benchmarks.theory_rows import (
    EPS,
    Array,
    Pair,
    Row,
    Size,
    climbed,
    norm,
    passed,
    searched,
    symmetric,
    witnessed,
)
from tests.benchmarks.theory_steps import FROZEN, Maker, one_step

Energy = Callable[[Array, Array], float]


def dissipation(
    make: Callable[[float], Maker], name: str, energy: Callable[[Array, Array], float], gradient: Callable[[Array], Array],
    lr: float, state: tuple[Array, Array], kappa: float,
) -> tuple[float, float, float]:  # fmt: skip
    """Return the promised and the real decrease of an energy in one step, and the roundings of their ratio."""
    w, m = state
    after, m_after = one_step(make(lr), w, m, name, gradient)
    before, end = energy(w, m), energy(after, m_after)
    promised, real = kappa * float((after - w) @ (after - w)), before - end
    slack = 50 * (abs(before) + abs(end))  # both energies are sums of some 2n terms of either sign, in half ulps
    if abs(real) * 2 / EPS <= slack and promised - real <= slack * EPS / 2:
        return 0.0, abs(real), math.inf  # lost in rounding
    return promised, real, slack / abs(real)


def energies(size: Size) -> list[Row]:
    """Energies fall by at least the promised dissipation; the ratio is promised to real decrease."""
    rng, n, rows = np.random.default_rng(11), size.dimension, []
    penalties: dict[str, tuple[dict[str, Any], Callable[[Array], float], Callable[[Array], Array]]] = {
        "no penalty": ({}, lambda x: 0.0, lambda x: x),
        "L1": ({"prox": L1(0.4)}, lambda x: 0.4 * float(np.abs(x).sum()), lambda x: x),
        "box": ({"constraint": Box(-1.0, 1.0)}, lambda x: 0.0, lambda x: np.clip(x, -1, 1)),
    }

    def heavy_ball(name: str, beta: float) -> Iterator[Sequence[float]]:
        options, g, feasible = penalties[name]
        for _ in range(max(size.draws // 40, 3)):
            H, a = symmetric(rng, n, -1.0, 2.0), rng.random()
            L = 2.0 + a
            lr = rng.uniform(0.05, 1.0) * th.heavy_ball_energy_limit(L, beta)

            def make(lr: float, options: dict[str, Any] = options) -> Maker:
                return lambda ps: so.optim.SGD([{"params": ps, **options}], lr=lr, momentum=beta, guard="off")

            def energy(x: Array, b: Array, H: Array = H, a: float = a, lr: float = lr) -> float:
                value = float(x @ H @ x / 2 + a * np.cos(x).sum()) + g(x)
                return float(th.heavy_ball_energy(value, lr, beta, float(np.linalg.norm(b))))

            kappa = float(th.heavy_ball_dissipation(lr, L, beta))

            def pair(z: Array, H: Array = H, a: float = a, lr: float = lr, kappa: float = kappa) -> Sequence[float]:
                def gradient(x: Array) -> Array:
                    return H @ x - a * np.sin(x)

                state = feasible(z[:n]), beta * z[n:]
                return dissipation(make, "momentum_buffer" if beta else "", energy, gradient, lr, state, kappa)

            yield climbed(pair, rng.choice([0.3, 1.0, 3.0], 2 * n) * rng.standard_normal(2 * n), size.climb, rng)

    for beta, formula in (
        (0.0, "GD and prox-gradient: κ = 1/η − L/2"),
        (0.9, "heavy ball (+ prox): κ = (1−β)/η − L/2"),
    ):
        law = f"V⁺ ≤ V − κ‖d‖², {formula}"
        rows += [
            searched("T4", law, f"not convex, {p}, β = {beta}", heavy_ball(p, beta), lower=True) for p in penalties
        ]
        rows += quadratic_energies(law, beta, 0.0) + quadratic_energies(law, beta, 0.4)[:1]
    for omega, law in (
        (0.0, "Adam, frozen: V⁺ ≤ V − (1/η − L/2)‖d‖²_P"),
        (0.05, "AdamW, frozen: V⁺ ≤ V − κ‖d‖²_P"),
    ):
        rows += adaptive_energies(size, law, omega)
    return rows


def quadratic_energies(law: str, beta: float, weight: float) -> list[Row]:
    """The energy of L/2 θ² + weight |θ|: attained where the displacement repeats itself and the penalty is linear; past the limit.

    There the descent lemma, Young's inequality and the prox inequality are equalities.
    """
    L, x, name = 2.0, np.array([3.0]), "momentum_buffer" if beta else ""
    buffer = (L * x + weight) / (1 - beta) if beta else 0 * x
    options = {"prox": L1(weight)} if weight else {}
    limit = th.heavy_ball_energy_limit(L, beta)

    def fall(lr: float) -> tuple[float, float, float, float]:
        def make(lr: float) -> Maker:
            return lambda ps: so.optim.SGD([{"params": ps, **options}], lr=lr, momentum=beta, guard="off")

        def energy(x: Array, b: Array) -> float:
            return float(th.heavy_ball_energy(float(L / 2 * x @ x + weight * np.abs(x).sum()), lr, beta, norm(b[None])))

        kappa = float(th.heavy_ball_dissipation(lr, L, beta))
        return energy(x, buffer), *dissipation(make, name, energy, lambda x: L * x, lr, (x, buffer), kappa)

    _, promised, real, roundings = fall(0.4 * limit)
    start, _, rise, _ = fall(1.01 * limit)
    kind = f"d⁺ = d on a quadratic, β = {beta}, {'L1' if weight else 'no penalty'}"
    return [
        witnessed("T4", law, kind, (promised, real), roundings=roundings, lower=True),
        passed("T4", law, f"β = {beta}, η = 1.01 of the limit: V⁺ beside V", (start, start - rise)),
    ]


def adaptive_energies(size: Size, law: str, omega: float) -> list[Row]:
    """The energies of Adam and AdamW in a frozen metric P = I."""
    rng, n, beta, L = np.random.default_rng(14), size.dimension, 0.9, 2.0

    def rate(lr: float, L: float) -> float:
        return float(th.adamw_dissipation(lr, L, beta, omega) if omega else th.adam_dissipation(lr, L))

    def maker(lr: float) -> Maker:
        return lambda ps: torch.optim.AdamW(ps, lr=lr, betas=(beta, FROZEN), eps=0.0, weight_decay=omega)

    def energy_of(lr: float, f: Callable[[Array], float]) -> Callable[[Array, Array], float]:
        def energy(x: Array, m: Array) -> float:
            if not omega:
                return float(th.adam_energy(f(x), lr, beta, float(m @ m)))
            d = th.adamw_displacement(x, m, np.ones(len(x)), lr, omega)
            return float(th.adamw_energy(f(x), float(x @ x), float(d @ d), lr=lr, beta1=beta, weight_decay=omega))

        return energy

    def drawn() -> Iterator[Sequence[float]]:
        for _ in range(max(size.draws // 40, 3)):
            H, a = symmetric(rng, n, -1.0, 2.0), rng.random()
            lr = rng.uniform(0.05, 1) * th.adamw_energy_limit(2 + a, beta, omega)
            energy = energy_of(lr, lambda x, H=H, a=a: float(x @ H @ x / 2 + a * np.cos(x).sum()))

            def pair(z: Array, H: Array = H, a: float = a, lr: float = lr, energy: Energy = energy) -> Sequence[float]:
                def gradient(x: Array) -> Array:
                    return H @ x - a * np.sin(x)

                return dissipation(maker, "exp_avg", energy, gradient, lr, (z[:n], z[n:]), rate(lr, 2 + a))

            yield climbed(pair, 2 * rng.standard_normal(2 * n), size.climb, rng)

    def fall(lr: float) -> tuple[float, float, float, float]:
        energy = energy_of(lr, lambda x: float(L / 2 * x @ x))
        state = np.ones(1), np.array([repeating(lr, omega, beta, L)])
        return energy(*state), *dissipation(maker, "exp_avg", energy, lambda x: L * x, lr, state, rate(lr, L))

    limit = th.adamw_energy_limit(L, beta, omega)
    _, promised, real, roundings = fall(0.6 * limit)
    start, _, rise, _ = fall(1.01 * limit)
    return [
        searched("T4", law, f"torch AdamW, not convex, ω = {omega}", drawn(), lower=True),
        witnessed("T4", law, "d⁺ = d on a quadratic", (promised, real), roundings=roundings, lower=True),
        passed("T4", law, "η = 1.01 of the limit: V⁺ beside V", (start, start - rise)),
    ]


def repeating(lr: float, omega: float, beta: float, L: float) -> float:
    """Return the momentum at θ = 1 with which a step of AdamW on L/2 θ² repeats the displacement before it."""
    shrink = 1 - lr * omega
    return (shrink * (omega + (1 - beta) * L) - omega) / (1 - beta * shrink)


def normalized(size: Size) -> list[Row]:
    """The invariant of normalized methods with decay."""
    rng, n, rows = np.random.default_rng(12), size.dimension, []

    def run(make: Maker, start: Array, gradients: Iterator[Array], size_of: Callable[[Array], float]) -> float:
        w = nn.Parameter(torch.as_tensor(start).clone())
        optimizer, largest = make([w]), 0.0
        for g in gradients:
            w.grad = torch.as_tensor(g).clone()
            optimizer.step()
            largest = max(largest, size_of(w.detach().numpy()))
        return largest

    law = "Lion, decay ω: max|W_t| ≤ max(max|W₀|, 1/ω)"

    def entry(x: Array) -> float:
        return float(np.abs(x).max())

    def lion(lr: float, omega: float) -> Maker:
        return lambda ps: so.optim.Lion(ps, lr=lr, weight_decay=omega, guard="off")

    def drawn() -> Iterator[tuple[float, float, float]]:
        for _ in range(max(size.draws // 20, 3)):
            lr, omega, start = 10.0 ** rng.uniform(-2, -0.5), rng.uniform(0.2, 2), 3 * rng.standard_normal(n)
            found = run(lion(lr, omega), start, (rng.standard_normal(n) + 1 for _ in range(100)), entry)
            yield float(th.decayed_norm_bound(entry(start), 1.0, omega)), found, 400

    rows.append(searched("T4", law, "so.optim.Lion, random gradients", drawn()))
    found = run(lion(0.5, 0.5), np.zeros(n), (np.ones(n) for _ in range(100)), entry)
    rows.append(
        witnessed(
            "T4", law, "gradients of one sign", (float(th.decayed_norm_bound(0.0, 1.0, 0.5)), found), roundings=4 * 100
        )
    )
    law, bits = "Muon, decay ω: ‖W_t‖ ≤ max(‖W₀‖, 1.2024/ω)", 2.0**-8

    def muon() -> Iterator[tuple[float, float, float]]:
        for _ in range(max(size.draws // 50, 2)):
            start = rng.standard_normal((n, n))
            made = lambda ps: torch.optim.Muon(ps, lr=0.3, weight_decay=0.5)  # noqa: E731
            found = run(made, start, itertools.repeat(rng.standard_normal((n, n)), 40), norm)
            yield float(th.decayed_norm_bound(norm(start), th.newton_schulz_norm(), 0.5)), found, 15 * bits / (EPS / 2)

    rows.append(searched("T4", law, "torch Muon, its directions in bfloat16", muon(), tight=False))
    return rows


def data(size: Size) -> list[Row]:
    """Replace one of n samples: how far two runs of torch SGD come apart, in units of the loss."""
    rng, rows = np.random.default_rng(13), []

    def run(gradients: Sequence[Callable[[Array], Array]], lrs: Sequence[float], radius: float, start: Array) -> Array:
        w = nn.Parameter(torch.as_tensor(start).clone())
        constraint = {"constraint": Box(-radius, radius)} if math.isfinite(radius) else {}
        optimizer = so.optim.SGD([{"params": [w], **constraint}], lr=1.0, guard="off")
        for lr in lrs:
            optimizer.param_groups[0]["lr"] = lr
            w.grad = torch.as_tensor(np.mean([g(w.detach().numpy()) for g in gradients], axis=0))
            optimizer.step()
        return w.detach().numpy().copy()

    law = "uniform stability, convex: 2G²/n Σηₜ"

    def convex() -> Iterator[Pair]:
        for _ in range(max(size.draws // 40, 3)):
            n, G, lrs = int(rng.integers(2, 9)), rng.uniform(0.5, 2), rng.uniform(0, 2, 20) / 1.0
            A = rng.standard_normal((n + 1, 3))
            A *= np.sqrt(1 / (np.linalg.norm(A, axis=1) ** 2 + 1e-300))[:, None] * min(1.0, G)
            samples = [
                lambda w, a=a, s=s: a * np.tanh(a @ w - s) for a, s in zip(A, rng.standard_normal(n + 1), strict=True)
            ]
            g = float(np.linalg.norm(A, axis=1).max())
            lrs = np.minimum(lrs, 2 / g**2)
            x, y = run(samples[:n], lrs, math.inf, np.zeros(3)), run(samples[1:], lrs, math.inf, np.zeros(3))
            yield float(th.convex_stability(g, n, lrs, g**2)), g * float(np.linalg.norm(x - y))

    rows.append(searched("T4", law, "log cosh of random samples, full batches", convex()))
    G, n, lrs = 1.5, 7, [0.3, 0.1, 0.6]
    fair = [lambda w: np.array([G])] * n
    unfair = [*fair[1:], lambda w: np.array([-G])]
    apart = G * abs(float((run(fair, lrs, math.inf, np.zeros(1)) - run(unfair, lrs, math.inf, np.zeros(1)))[0]))
    rows.append(
        witnessed(
            "T4",
            law,
            "linear losses, the replaced one turned round",
            (float(th.convex_stability(G, n, lrs, 0.0)), apart),
        )
    )
    law, m, n = "uniform stability, m-strongly convex, projected: 2G²/(mn)", 0.8, 100
    # the samples m/2 w² − s w with |s| = G − mr on |w| <= r are G-Lipschitz there; s of the others has the mean 0
    r = G / (m * n + m)
    s = (G - m * r) * np.resize([1.0, -1.0], n - 1)
    s[-1] = 0.0

    def sample(c: float) -> Callable[[Array], Array]:
        return lambda w: m * w - c

    others = [sample(c) for c in s]
    x, y = (run([*others, sample(sign * (G - m * r))], [1 / m] * 40, r, np.zeros(1)) for sign in (1.0, -1.0))
    rows.append(
        witnessed(
            "T4",
            law,
            "opposite samples among 100",
            (float(th.strongly_convex_stability(G, n, m)), G * abs(float((x - y)[0]))),
        )
    )
    law = "nonsmooth: E‖θ−θ′‖ ≤ 2G√Ση² + 4G/n Ση"

    def kinks() -> Iterator[Pair]:
        for _ in range(max(size.draws // 40, 3)):
            n, lrs = int(rng.integers(2, 9)), rng.uniform(0, 1, 20)
            centers = rng.standard_normal((n + 1, 1))
            samples = [lambda w, c=c: np.sign(w - c) for c in centers]
            x, y = run(samples[:n], lrs, math.inf, np.zeros(1)), run(samples[1:], lrs, math.inf, np.zeros(1))
            yield float(th.nonsmooth_displacement(1.0, n, lrs)), abs(float((x - y)[0]))

    rows.append(searched("T4", law, "|θ − c| of random samples", kinks(), tight=False))
    return rows


LAWS = [energies, normalized, data]
