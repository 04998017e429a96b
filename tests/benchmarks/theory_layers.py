"""T2, T3 and T5: layers, residual blocks and nonsmooth maps, theory against measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

import stableopt.theory as th
from stableopt.linalg import conv_norm
from tests.benchmarks.theory_rows import (
    Array,
    Pair,
    Row,
    Size,
    climb,
    derivative_norm,
    norm,
    passed,
    searched,
    witnessed,
)

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (torch.relu, 1.0),
    "tanh": (torch.tanh, 0.0),
    "sigmoid": (torch.sigmoid, 0.0),
    "gelu": (nn.functional.gelu, math.sqrt(2.0)),
    "silu": (nn.functional.silu, 2.399357280520),
}
"""Name, function, and a point with the largest slope."""


def affine(W: Array, b: Array, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the layer as torch runs it."""
    layer = nn.Linear(*reversed(W.shape))
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(W))
        layer.bias.copy_(torch.as_tensor(b))
    return lambda x: activation(layer(x))


def feedforward(size: Size) -> list[Row]:
    """T2: one layer, all partial products of a net, a convolution."""
    rng, n, law = np.random.default_rng(2), size.dimension, "one layer: L_σ ‖W‖₂"

    def one_layer() -> Iterator[Pair]:
        for name, (activation, _) in ACTIVATIONS.items():
            L = th.slope_lipschitz(th.clarke_slopes(name))
            for _ in range(max(size.draws // 100, 1)):
                W, b = rng.standard_normal((n, n + 1)), rng.standard_normal(n)
                f = affine(W, b, activation)
                yield (
                    float(th.layer_factor(norm(W), L)),
                    climb(lambda x, f=f: derivative_norm(f, x), rng.standard_normal(n + 1), size.climb, rng),
                )

    rows = [searched("T2", law, f"random layers, {', '.join(ACTIVATIONS)}", one_layer())]
    for name, (activation, steepest) in ACTIVATIONS.items():
        W, x = rng.standard_normal((n, n)), rng.standard_normal(n)
        L = th.slope_lipschitz(th.clarke_slopes(name))
        measured = derivative_norm(affine(W, steepest - W @ x, activation), x)
        rows.append(witnessed("T2", law, f"{name}, every unit at its steepest point", (L * norm(W), measured)))
    return rows + networks(size, rng) + convolutions(size, rng)


def networks(size: Size, rng: np.random.Generator) -> list[Row]:
    """T2: every block of the forward profile, D_{h_k} h_l for all k <= l."""
    law, n, depth = "net: every D_{h_k}h_l by the product of factors k..l−1", size.dimension, 4

    def ratios(Ws: list[Array], x: Array, activation: Callable[[Tensor], Tensor]) -> Iterator[Pair]:
        bounds = th.partial_products([norm(W) for W in Ws])
        layers, h = [affine(W, np.zeros(len(W)), activation) for W in Ws], [torch.as_tensor(x)]
        for layer in layers:
            h.append(layer(h[-1]).detach())
        for k in range(depth):
            for l in range(k + 1, depth + 1):

                def from_k(y: Tensor, k: int = k, l: int = l) -> Tensor:
                    for layer in layers[k:l]:
                        y = layer(y)
                    return y

                yield float(bounds[l][k]), derivative_norm(from_k, h[k].numpy())

    def drawn() -> Iterator[Pair]:
        for _ in range(size.draws // 10):
            Ws = [rng.standard_normal((n, n)) / math.sqrt(n) for _ in range(depth)]
            yield from ratios(Ws, rng.standard_normal(n), torch.tanh)

    u = rng.uniform(0.5, 1.0, (depth + 1, n))
    u /= np.linalg.norm(u, axis=1)[:, None]
    aligned = [s * np.outer(u[l + 1], u[l]) for l, s in enumerate((0.5, 3.0, 0.25, 2.0))]
    attained = min(ratios(aligned, u[0], torch.relu), key=lambda p: p[1] / p[0])
    return [
        searched("T2", law, f"random nets of depth {depth}, tanh", drawn()),
        witnessed("T2", law, "ReLU, aligned singular vectors: the loosest block", attained),
    ]


def convolutions(size: Size, rng: np.random.Generator) -> list[Row]:
    """T2: the norm of a convolution on images, whatever their size."""
    law = "convolution: ‖W‖₂ on images ≤ the supremum of the symbol"

    def on_images(kernel: Array, side: int) -> float:
        n = kernel.shape[1] * side * side
        images = torch.eye(n).reshape(n, kernel.shape[1], side, side)
        return norm(nn.functional.conv2d(images, torch.as_tensor(kernel), padding=1).reshape(n, -1).numpy())

    def drawn() -> Iterator[Pair]:
        for _ in range(max(size.draws // 40, 2)):
            kernel = rng.standard_normal((2, 2, 3, 3))
            yield float(conv_norm(kernel).upper), on_images(kernel, 6)

    average = np.full((1, 1, 3, 3), 1 / 9)
    pair = float(conv_norm(average).upper), on_images(average, 24)
    return [
        searched("T2", law, "random 3×3 kernels on 6×6 images, zero padding", drawn()),
        witnessed("T2", law, "the mean of 3×3 pixels on 24×24 images", pair),
    ]


def linear_blocks(size: Size) -> list[Row]:
    """T3 a, b, e: the derivative of the branch is a matrix J."""
    rng, n, rows = np.random.default_rng(3), size.dimension, []

    def block(J: Array, tau: float) -> float:
        return derivative_norm(lambda h: h + tau * torch.as_tensor(J) @ h, rng.standard_normal(len(J)))

    def any_branch() -> Iterator[Pair]:
        for _ in range(size.draws):
            J, tau = rng.standard_normal((n, n)), 10.0 ** rng.uniform(-2, 1)
            yield float(th.lipschitz_factor(tau, norm(J))), block(J, tau)

    def dissipative() -> Iterator[tuple[float, float, float]]:
        for _ in range(size.draws):
            S = rng.standard_normal((n, n))
            J = -rng.uniform(0, 2) * S @ S.T / n + 10.0 ** rng.uniform(-1, 1) * (S - S.T)
            m, L, tau = -float(np.linalg.eigvalsh(J + J.T)[-1]) / 2, norm(J), 10.0 ** rng.uniform(-2, 1)
            bound = float(th.dissipative_factor(tau, min(m, L), L))
            yield bound, block(J, tau), 4 * n * n * (1 + tau * L) ** 2 / bound**2  # a difference of larger numbers

    rows.append(searched("T3a", "1 + τL", "random branches", any_branch()))
    rows.append(
        witnessed("T3a", "1 + τL", "f(h) = Lh", (float(th.lipschitz_factor(0.3, 2.0)), block(2 * np.eye(n), 0.3)))
    )
    law, m, L = "√(1 − 2τm + τ²L²), at most 1 up to τ = 2m/L²", 0.6, 2.0
    w = math.sqrt(L * L - m * m)
    rotation, limit = np.array([[-m, w], [-w, -m]]), th.dissipative_max_step(m, L)
    rows.append(searched("T3b", law, "random dissipative branches", dissipative()))
    for name, tau in (("the best step m/L²", th.dissipative_best_step(m, L)), ("τ = 2m/L²", limit)):
        pair = float(th.dissipative_factor(tau, m, L)), block(rotation, tau)
        rows += [witnessed("T3b", law, f"a scaled rotation, {name}", pair)]
    rows.append(passed("T3b", law, "the same, τ = 1.01 · 2m/L²", (1.0, block(rotation, 1.01 * limit))))

    def skew() -> Iterator[Pair]:
        for _ in range(size.draws):
            S, gamma, tau = rng.standard_normal((n, n)), rng.uniform(0, 2), 10.0 ** rng.uniform(-2, 1)
            K = S - S.T
            yield float(th.skew_damped_factor(tau, gamma, norm(K))), block(K - gamma * np.eye(n), tau)

    law = "√((1−τγ)² + τ²ω²), at most 1 up to 2γ/(γ²+ω²)"
    K, limit = np.array([[0.0, 1.5], [-1.5, 0.0]]), th.skew_damped_max_step(0.5, 1.5)
    damped = K - 0.5 * np.eye(2)
    rows.append(searched("T3e", law, "random skew branches with damping", skew()))
    rows.append(witnessed("T3e", law, "at the limit", (1.0, block(damped, limit))))
    rows.append(passed("T3e", law, "τ = 1.01 of it", (1.0, block(damped, 1.01 * limit))))

    def implicit() -> Iterator[tuple[float, float, float]]:
        for _ in range(size.draws):
            S, m, tau = rng.standard_normal((n, n)), rng.uniform(0, 2), 10.0 ** rng.uniform(-2, 2)
            J = S - S.T - m * np.eye(n) - 0.1 * S @ S.T
            m = max(-float(np.linalg.eigvalsh(J + J.T)[-1]) / 2, 0.0)
            M = np.eye(n) - tau * J
            yield float(th.implicit_factor(tau, m)), norm(np.linalg.inv(M)), 4 * n * n * np.linalg.cond(M)

    rows.append(searched("T3", "implicit block: 1/(1+τm), any τ", "random dissipative branches", implicit()))
    pair = float(th.implicit_factor(50.0, 0.4)), norm(np.linalg.inv(np.eye(n) + 50.0 * 0.4 * np.eye(n)))
    rows.append(witnessed("T3", "implicit block: 1/(1+τm), any τ", "f = −mh, τ = 50", pair))
    return rows


def gradient_blocks(size: Size) -> list[Row]:
    """T3 c, d: the branch is minus the gradient of a convex function, with ReLU and tanh."""
    rng, n, rows = np.random.default_rng(4), size.dimension, []

    def block(
        A: Array, b: Array, m: float, tau: float, sigma: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        T, c = torch.as_tensor(A), torch.as_tensor(b)
        return lambda h: h - tau * (m * h + T.T @ sigma(T @ h + c))

    def drawn(strong: bool) -> Iterator[Pair]:
        for _ in range(size.draws // 20):
            A, b, m = rng.standard_normal((n, n)), rng.standard_normal(n), strong * rng.uniform(0, 2)
            L = float(th.gradient_branch_smoothness(norm(A), strong=m))
            tau = rng.choice([0.5, 1.0, 1.5, 2.5]) * th.cocoercive_max_step(L)
            bound = th.strongly_convex_factor(tau, m, L) if strong else th.cocoercive_factor(tau, L)
            f = block(A, b, m, tau, (torch.relu, torch.tanh)[int(rng.integers(2))])
            yield float(bound), climb(lambda h, f=f: derivative_norm(f, h), rng.standard_normal(n), size.climb, rng)

    A, m = np.diag(np.linspace(0.5, 2.0, n)), 0.7
    active, silent, x = np.full(n, 9.0), np.full(n, -9.0), np.zeros(n)
    law = "max(1, |1−τL|): nonexpansive up to τ = 2/L"
    limit = th.cocoercive_max_step(4.0)
    at, past = (derivative_norm(block(A, active, 0.0, t * limit, torch.relu), x) for t in (1.0, 1.01))
    rows.append(searched("T3c", law, "−Aᵀσ(Ah+b), ReLU and tanh, adversarial h", drawn(strong=False)))
    rows.append(witnessed("T3c", law, "every unit active, τ = 2/L", (1.0, at)))
    rows.append(passed("T3c", law, "the same, τ = 1.01 · 2/L", (1.0, past)))
    law = "max(|1−τm|, |1−τL|)"
    rows.append(searched("T3d", law, "the same with m > 0", drawn(strong=True)))
    for tau, b in ((1.3 * 2 / (m + 4.0 + m), active), (0.2, silent)):
        pair = float(th.strongly_convex_factor(tau, m, 4.0 + m)), derivative_norm(block(A, b, m, tau, torch.relu), x)
        rows.append(witnessed("T3d", law, f"τ = {tau:.3g}: the end {'L' if b is active else 'm'}", pair))
    return rows


def maximum_norm(size: Size) -> list[Row]:
    """T3 f, g, i: the law in the maximum norm, averaged blocks, budgets."""
    rng, n, rows = np.random.default_rng(5), size.dimension, []

    def exact() -> Iterator[Pair]:
        for _ in range(size.draws):
            J = rng.standard_normal((n, n)) - np.diag(rng.uniform(0, 5, n))
            tau = rng.uniform(0, 1) * min(th.infinity_max_step(J), 10.0)
            yield float(th.infinity_law(tau, th.infinity_log_norm(J))), norm(np.eye(n) + tau * J, np.inf)

    J = rng.standard_normal((n, n)) - np.diag(rng.uniform(1, 5, n))
    limit, mu = th.infinity_max_step(J), th.infinity_log_norm(J)
    law = "‖I+τJ‖_∞ = 1 + τμ_∞(J) up to τ = 1/max|J_ii|"
    rows.append(searched("T3f", law, "random J", exact()))
    rows.append(
        witnessed("T3f", law, "at the limit", (float(th.infinity_law(limit, mu)), norm(np.eye(n) + limit * J, np.inf)))
    )
    D = np.diag(-np.linspace(1.0, 2.0, 3))
    pair = float(th.infinity_law(0.8, th.infinity_log_norm(D))), norm(np.eye(3) + 0.8 * D, np.inf)
    rows.append(passed("T3f", law, "J = diag(−1..−2), τ = 1.6 of it: the norm is larger", pair))

    def leaky(A: Array, c: float, tau: float, slopes: Array) -> float:
        return norm(np.eye(len(A)) + tau * (-c * np.eye(len(A)) + slopes[:, None] * A), np.inf)

    def drawn() -> Iterator[Pair]:
        for _ in range(size.draws):
            A, c = rng.standard_normal((n, n)), rng.uniform(0, 4)
            tau = rng.uniform(0, 1) * th.leaky_infinity_max_step(c, np.diag(A))
            slopes = rng.choice([0.0, 1.0, rng.random()], n)
            yield float(th.leaky_infinity_factor(tau, c, th.infinity_log_norm(A))), leaky(A, c, tau, slopes)

    law = "h + τ(−ch + φ(Ah+u)): 1 − τ(c − max(μ_∞(A), 0))"
    A, c = np.abs(rng.standard_normal((n, n))), 2.0
    tau = th.leaky_infinity_max_step(c, np.diag(A))
    rows.append(searched("T3f", law, "random A and slopes", drawn()))
    rows.append(
        witnessed(
            "T3f",
            law,
            "all slopes 1, at the limit",
            (float(th.leaky_infinity_factor(tau, c, th.infinity_log_norm(A))), leaky(A, c, tau, np.ones(n))),
        )
    )
    law = "(1−a)h + aT(h): 1 − a + a Lip(T)"

    def averaged() -> Iterator[Pair]:
        for _ in range(size.draws):
            T, a = rng.standard_normal((n, n)), rng.random()
            T *= rng.uniform(0, 1.5) / norm(T)
            yield float(th.averaged_factor(a, norm(T))), norm((1 - a) * np.eye(n) + a * T)

    rows.append(searched("T3g", law, "random T", averaged()))
    rows.append(
        witnessed("T3g", law, "T = 0.8 I", (float(th.averaged_factor(0.3, 0.8)), norm((0.7 + 0.3 * 0.8) * np.eye(n))))
    )
    depth, L = 100, 2.0
    step = th.budget_max_step(3.0, [L] * depth)
    f = affine(L * np.eye(1), np.zeros(1), lambda y: y)

    def stack(h: Tensor) -> Tensor:
        for _ in range(depth):
            h = h + step * f(h)
        return h

    rows.append(
        witnessed(
            "T3i",
            "∏(1+τL) ≤ exp Σ τL ≤ G at the step of the budget",
            "G = 3, 100 blocks f = Lh",
            (3.0, derivative_norm(stack, np.ones(1))),
        )
    )
    return rows


def stage_step(t: th.ButcherTableau) -> Callable[[Array, float], float]:
    """Return the norm of a step whose stage i sees the derivative of a convex 1-smooth function, along an angle."""
    A, b = np.array(t.A, dtype=float), np.array(t.b, dtype=float)

    def step(angles: Array, tau: float) -> float:
        v = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        k = np.zeros((t.stages, 2, 2))
        for i in range(t.stages):
            k[i] = -np.outer(v[i], v[i]) @ (np.eye(2) + tau * np.tensordot(A[i], k, 1))
        return norm(np.eye(2) + tau * np.tensordot(b, k, 1))

    return step


def never(size: Size, rng: np.random.Generator) -> list[Row]:
    """T3 h: methods without a radius expand some gradient field at every step."""
    rows = []
    for t in (th.MIDPOINT, th.DOPRI5):
        for tau in (0.1, 0.5):
            step, starts = stage_step(t), rng.uniform(0, math.pi, (4, t.stages))
            more = max(climb(lambda x, tau=tau, step=step: step(x, tau), x, 200, rng) for x in starts)
            rows.append(passed("T3h", "no radius: expands at every step", f"{t.name}, τL = {tau}", (1.0, more)))
    return rows


def runge_kutta(size: Size) -> list[Row]:
    """T3 h: no gradient field is expanded up to τL = 2r, and one is just past it."""
    rng, rows = np.random.default_rng(6), []
    methods = [th.EULER, th.HEUN, th.RK4, th.RK4_38, th.SSPRK33, th.ssprk2(3), th.SSPRK43]
    for t in methods:
        s, tau = t.stages, th.runge_kutta_max_step(t, 1.0)

        step = stage_step(t)
        law = "explicit Runge–Kutta: at most 1 up to τL = 2r"
        found = [
            climb(lambda x, tau=tau, step=step: step(x, tau), rng.uniform(0, math.pi, s), size.climb, rng)
            for _ in range(max(size.draws // 50, 1))
        ]
        rows.append(searched("T3h", law, f"{t.name}, r = {tau / 2:.4g}, adversarial stages", [(1.0, f) for f in found]))
        rows.append(
            witnessed(
                "T3h",
                law,
                f"{t.name}: a direction without curvature keeps its length",
                (1.0, step(np.full(s, 0.3), tau)),
            )
        )
        starts, steps = rng.uniform(0, math.pi, (12, s)), max(size.climb, 400)
        more = max(climb(lambda x, tau=tau, step=step: step(x, 1.05 * tau), x, steps, rng) for x in starts)
        rows.append(passed("T3h", law, f"{t.name}, τ = 1.05 of it", (1.0, more)))
    return rows + never(size, rng)


def compositions(size: Size) -> list[Row]:
    """T3: shortcuts that rescale, a nonlinearity after the sum, compensation by a contraction before an expansive block."""
    rng, n = np.random.default_rng(17), size.dimension

    def scaled(
        A: Array, alpha: float, tau: float, post: Callable[[Tensor], Tensor], b: Array
    ) -> Callable[[Tensor], Tensor]:
        T, c = torch.as_tensor(A), torch.as_tensor(b)
        return lambda h: post(alpha * h - tau * T.T @ torch.relu(T @ h + c))

    def drawn() -> Iterator[Pair]:
        for _ in range(size.draws // 20):
            A, b, alpha, tau = rng.standard_normal((n, n)), rng.standard_normal(n), rng.uniform(0.3, 1.5), rng.random()
            L = float(th.gradient_branch_smoothness(norm(A)))
            bound = th.scaled_shortcut_factor(alpha, tau, lambda t, L=L: th.cocoercive_factor(t, L))
            f = scaled(A, alpha, tau, torch.relu, b)
            h = rng.standard_normal(n)
            yield (
                float(th.post_activation_factor(bound, 1.0)),
                climb(lambda h, f=f: derivative_norm(f, h), h, size.climb, rng),
            )

    law = "σ(αh + τf(h)): L_σ α times the factor at τ/α"
    A = np.eye(n)
    bound = th.scaled_shortcut_factor(0.8, 0.3, lambda t: th.cocoercive_factor(t, 1.0))
    silent = derivative_norm(scaled(A, 0.8, 0.3, torch.relu, np.full(n, -9.0)), np.ones(n))
    c, L = 0.5, 2.0
    tau = th.compensated_max_step(c, L)
    pair = norm((1 + tau * L) * c * np.eye(n)), norm((1 + 1.01 * tau * L) * c * np.eye(n))
    name = "a contraction c before 1 + τL: at most 1 up to τ = (1/c − 1)/L"
    return [
        searched("T3", law, "gradient branches, ReLU within and after", drawn()),
        witnessed("T3", law, "no unit of the branch active", (float(th.post_activation_factor(bound, 1.0)), silent)),
        witnessed("T3i", name, "f = Lh, at the limit", (1.0, pair[0])),
        passed("T3i", name, "τ = 1.01 of it", (1.0, pair[1])),
    ]


LAWS = [feedforward, linear_blocks, gradient_blocks, maximum_norm, runge_kutta, compositions]
