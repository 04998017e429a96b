"""T1 and T6: energies that are made from a measured profile, and the coupled system, theory against measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

import stableopt.theory as th
from stableopt.lyapunov.profile.growth.energies import EnergySynthesis, synthesize
from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.growth.gains import coupled_gains
from stableopt.lyapunov.profile.growth.windows import Windows, measure_windows
from tests.benchmarks.theory_rows import EPS, Array, Pair, Row, Size, norm, passed, searched, symmetric, witnessed


def factors(A: Array, rng: np.random.Generator) -> Factors:
    """Return the triangular factors of one-step matrices, by Benettin's method."""
    Q = np.linalg.qr(rng.standard_normal(A.shape[1:]))[0]
    R = np.empty_like(A)
    for j, step in enumerate(A):
        Q, R[j] = np.linalg.qr(step @ Q)
        sign = np.where(np.diag(R[j]) < 0, -1.0, 1.0)
        Q, R[j] = Q * sign, sign[:, None] * R[j]
    return Factors(R, np.arange(len(A) + 1), dimension=A.shape[1])


def training(size: Size, rng: np.random.Generator) -> Array:
    """Return the derivatives of heavy ball on (θ, θ before) along a run with random Hessians, an unstable stretch among them."""
    n, beta, steps = max(size.dimension // 2, 2), 0.9, 40 + size.draws // 2
    A = np.zeros((steps, 2 * n, 2 * n))
    for t in range(steps):
        H = symmetric(rng, n, 0.05, 4.5 if steps // 3 < t < steps // 2 else 3.0)
        A[t] = np.block([[(1 + beta) * np.eye(n) - H, -beta * np.eye(n)], [np.eye(n), np.zeros((n, n))]])
    return A


def windows_of(energy: EnergySynthesis, found: Windows) -> Iterator[tuple[float, float, float]]:
    """Return bound and norm of every window, the larger of both as the unit: they may leave the range of floats."""
    for j in range(len(found.steps)):
        for i in range(j + 1):
            gap = float(found.log_norms[j, i]) - energy.uniform_bound(i, j)
            yield 1.0, float(np.exp(gap)), 100 + float(found.rounding[j, i]) / (EPS / 2)


def synthesized(size: Size) -> list[Row]:
    """T1: the energy that is made from a run bounds every Φ(t, s) of it."""
    rng, law, rows = np.random.default_rng(15), "K(t,s) ≤ √(M/m) ∏√ρ, energy made from the profile", []
    runs = {
        "heavy ball along random Hessians": training(size, rng),
        "products of random matrices": rng.standard_normal((60, 4, 4)) / 2,
        "one Jordan block with the eigenvalue 1": np.tile([[1.0, 1.0], [0.0, 1.0]], (60, 1, 1)),
    }
    for name, A in runs.items():
        made = factors(A, rng)
        found = measure_windows(made, grid=60)
        rows.append(searched("T1", law, f"{name}, all windows", windows_of(synthesize(made, found), found)))
    normal = np.array([symmetric(rng, 4, 0.2, 0.9)] * 60)
    made = factors(normal, rng)
    found = measure_windows(made)
    whole = list(windows_of(synthesize(made, found), found))[60 * 61 // 2]  # from the first time to the last
    rows.append(witnessed("T1", law, "a constant symmetric step, the whole run", whole[:2], roundings=whole[2]))
    return rows


def coupled(size: Size) -> list[Row]:
    """T6: V = v₁‖δh‖ + v₂‖δθ‖ decays by the radius, on real coupled steps and at its witness."""
    rng, n, law = np.random.default_rng(16), size.dimension, "V⁺ ≤ ρV, V = v₁‖δh‖ + v₂‖δθ‖"

    def drawn() -> Iterator[Pair]:
        for _ in range(max(size.draws // 20, 3)):
            W, U, C = (s * rng.standard_normal((n, n)) / np.sqrt(n) for s in (0.2, 0.3, 0.05))
            H, lr = symmetric(rng, n, 0.2, 1.0), 0.5
            cell = nn.RNNCell(n, n, bias=False)
            with torch.no_grad():
                cell.weight_hh.copy_(torch.as_tensor(W))
                cell.weight_ih.copy_(torch.as_tensor(U))
            h, theta = torch.as_tensor(rng.standard_normal((2, n)))
            blocks: list[list[Array]] = []
            for _ in range(12):
                # the loss of θ is θ'Hθ/2 + θ'Ch: its gradient sees the representation
                joint = torch.autograd.functional.jacobian(
                    lambda h, t, cell=cell: cell(t[None], h[None])[0], (h, theta)
                )
                blocks.append([j.detach().numpy() for j in joint] + [-lr * C, np.eye(n) - lr * H])
                h, theta = (
                    cell(theta[None], h[None])[0].detach(),
                    theta - lr * (torch.as_tensor(H) @ theta + torch.as_tensor(C) @ h),
                )
            gains = coupled_gains(*([norm(b[i]) for b in blocks] for i in range(4)))
            v1, v2 = gains.weights
            x, y = rng.standard_normal((2, n))
            for a, b, c, d in blocks:
                before = v1 * float(np.linalg.norm(x)) + v2 * float(np.linalg.norm(y))
                x, y = a @ x + b @ y, c @ x + d @ y
                yield gains.rate * before, v1 * float(np.linalg.norm(x)) + v2 * float(np.linalg.norm(y))

    gains = coupled_gains(0.5, 0.2, 0.3, 0.6)
    v1, v2 = gains.weights
    right = np.linalg.eig(gains.matrix)[1][:, int(np.linalg.eigvals(gains.matrix).argmax())].real
    h, theta = np.abs(gains.matrix @ right)
    pair = gains.rate * float(v1 * abs(right[0]) + v2 * abs(right[1])), float(v1 * h + v2 * theta)
    past = coupled_gains(0.5, 0.5, 0.42, 0.6)
    state = np.ones(2)
    for _ in range(200):
        state = past.matrix @ state
    return [
        searched("T6", law, "RNN cell and gradient descent, measured gains", drawn()),
        witnessed("T6", law, "gains that are attained, in the Perron direction", pair),
        passed("T6", "bc < (1−a)(1−d)", "bc = 1.05 of it: the norms grow", (2.0, float(state.sum()))),
        *mixed(size, rng),
    ]


def mixed(size: Size, rng: np.random.Generator) -> list[Row]:
    """T6: the mixed block on a fixed batch, by the chain through torch's derivatives."""
    law, n = "‖D_{θ₀}h_{L,t}‖ ≤ ‖D_θh_L‖ ‖D_{θ₀}θ_t‖", size.dimension

    def ratio(f: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], start: Array, steps: int) -> Pair:
        def trained(theta: Tensor) -> Tensor:
            for _ in range(steps):
                theta = theta - 0.1 * torch.autograd.grad(loss(theta), theta, create_graph=True)[0]
            return theta

        theta_0 = torch.as_tensor(start).requires_grad_()
        D = torch.autograd.functional.jacobian
        first, last = norm(D(trained, theta_0).numpy()), norm(D(f, trained(theta_0).detach()).numpy())
        whole = D(lambda t: f(trained(t)), theta_0)
        return float(th.mixed_sensitivity(last, first)), norm(whole.numpy())

    def drawn() -> Iterator[Pair]:
        for _ in range(max(size.draws // 40, 3)):
            x, y = (torch.as_tensor(rng.standard_normal(s)) for s in ((5, 2), (5,)))

            def net(theta: Tensor, x: Tensor = x) -> Tensor:
                return torch.tanh(x @ theta[: 2 * n].reshape(2, n)) @ theta[2 * n :]

            yield ratio(net, lambda t, net=net, y=y: (net(t) - y).square().mean(), rng.standard_normal(3 * n), 5)

    one = ratio(lambda t: 2 * t, lambda t: (1.5 * t).square().sum(), np.ones(1), 5)
    return [
        searched("T6", law, "two-layer nets after 5 steps", drawn()),
        witnessed("T6", law, "one parameter", one),
    ]


LAWS = [synthesized, coupled]
