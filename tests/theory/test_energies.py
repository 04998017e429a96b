"""T4: energies that fall, on losses that are not convex, at the limit and just past it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import stableopt.theory as th

seeds = st.integers(0, 2**32 - 1)
betas = st.sampled_from([0.0, 0.5, 0.9, 0.99])


class Loss:
    """x'Hx/2 + a sum cos x: smooth with the constant ||H|| + a, not convex."""

    def __init__(self, seed: int, n: int, scale: float = 1.0) -> None:
        g = np.random.default_rng(seed)
        G = g.standard_normal((n, n))
        self.H, self.a = scale * (G @ G.T / n - 0.3 * np.eye(n)), scale * g.random()
        self.smoothness = float(np.linalg.norm(self.H, 2)) + self.a
        self.start = 3 * g.standard_normal(n)

    def __call__(self, x: np.ndarray) -> float:
        return float(x @ self.H @ x / 2 + self.a * np.cos(x).sum())

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self.H @ x - self.a * np.sin(x)


def soft(x: np.ndarray, t: float) -> np.ndarray:
    return np.sign(x) * np.maximum(np.abs(x) - t, 0)


PENALTIES = {
    "none": (lambda x: 0.0, lambda x, t: x),
    "l1": (lambda x: 0.7 * np.abs(x).sum(), lambda x, t: soft(x, 0.7 * t)),
    "box": (lambda x: 0.0, lambda x, t: np.clip(x, -1.0, 1.0)),
}


def run(
    loss: Loss, penalty: str, lr: float, beta: float, steps: int, *, realized: bool = True
) -> list[tuple[float, float, float]]:
    """Return (energy before, energy after, |d|^2) of every step of heavy ball with a prox."""
    g, prox = PENALTIES[penalty]
    x, b, records = prox(loss.start, lr), np.zeros_like(loss.start), []
    for _ in range(steps):
        before = th.heavy_ball_energy(loss(x) + g(x), lr, beta, float(np.linalg.norm(b)))
        b = beta * b + loss.gradient(x)
        y = prox(x - lr * b, lr)
        if realized:
            b = th.realized_buffer(x, y, lr)
        d, x = y - x, y
        after = th.heavy_ball_energy(loss(x) + g(x), lr, beta, float(np.linalg.norm(b)))
        records.append((float(before), float(after), float(d @ d)))
        if not abs(after) < 1e12:
            break
    return records


@settings(max_examples=60)
@given(
    seeds,
    st.integers(1, 5),
    st.sampled_from(list(PENALTIES)),
    betas,
    st.floats(0.05, 2.5),
    st.sampled_from([1e-8, 1.0, 1e8]),
)
@example(0, 2, "l1", 0.9, 1.0, 1.0)
def test_the_energy_of_heavy_ball_with_a_prox_obeys_its_law_at_every_lr(
    seed: int, n: int, penalty: str, beta: float, part: float, scale: float
) -> None:
    loss = Loss(seed, n, scale)
    lr = part * th.heavy_ball_energy_limit(loss.smoothness, beta)
    kappa = th.heavy_ball_dissipation(lr, loss.smoothness, beta)
    for before, after, moved in run(loss, penalty, lr, beta, 40):
        size = abs(before) + abs(after) + moved / lr + scale + 1
        assert after <= before - kappa * moved + 1e-11 * size
        if part <= 1:
            assert after <= before + 1e-11 * size


@given(betas, st.floats(1e-8, 1e8), st.floats(0.3, 3.0))
def test_the_dissipation_of_heavy_ball_is_attained_so_its_limit_is_sharp(beta: float, L: float, part: float) -> None:
    """On L x^2/2 with L x = (1 - beta) b the step repeats the one before: every inequality of the proof is an equality."""
    lr, b = part * th.heavy_ball_energy_limit(L, beta), 1.0
    x = (1 - beta) * b / L
    b_next = beta * b + L * x
    x_next = x - lr * b_next
    before = th.heavy_ball_energy(L * x * x / 2, lr, beta, abs(b))
    after = th.heavy_ball_energy(L * x_next * x_next / 2, lr, beta, abs(b_next))
    kappa = th.heavy_ball_dissipation(lr, L, beta)
    assert after - before == pytest.approx(-kappa * (x_next - x) ** 2, abs=1e-9 * (before + after))
    if part > 1.01:
        assert after > before


def test_the_loss_of_heavy_ball_rises_while_its_energy_falls() -> None:
    loss, beta = Loss(3, 4), 0.9
    loss.H = loss.H + 0.3 * np.eye(4)
    lr = th.heavy_ball_energy_limit(loss.smoothness, beta)
    x, b, rises = loss.start, np.zeros(4), 0
    for _ in range(400):
        value = loss(x)
        energy = th.heavy_ball_energy(value, lr, beta, float(np.linalg.norm(b)))
        b = beta * b + loss.gradient(x)
        x = x - lr * b
        rises += loss(x) > value + 1e-9
        assert th.heavy_ball_energy(loss(x), lr, beta, float(np.linalg.norm(b))) <= energy + 1e-10
    assert rises > 5


def violations(*, realized: bool) -> int:
    count = 0
    for seed in range(6):
        loss = Loss(seed, 5)
        loss.H = loss.H + 0.3 * np.eye(5)
        lr = th.heavy_ball_energy_limit(loss.smoothness, 0.9)
        for penalty in ("l1", "box"):
            records = run(loss, penalty, lr, 0.9, 400, realized=realized)
            count += sum(after > before + 1e-9 * (1 + abs(before)) for before, after, _ in records)
    return count


def test_without_the_realized_buffer_a_prox_breaks_the_energy_and_with_it_never() -> None:
    assert violations(realized=False) > 10
    assert violations(realized=True) == 0


def test_the_realized_buffer_is_torchs_buffer_without_a_prox() -> None:
    x, b, lr = np.array([1.0, -2.0]), np.array([0.3, 0.4]), 0.1
    np.testing.assert_allclose(th.realized_buffer(x, x - lr * b, lr), b)
    with pytest.raises(ValueError, match="one shape"):
        th.realized_buffer([1.0], [1.0, 2.0], 0.1)
    with pytest.raises(ValueError, match="lr"):
        th.realized_buffer([1.0], [1.0], 0.0)


@given(seeds, st.integers(1, 5), st.floats(0.05, 2.5))
def test_a_gradient_step_takes_what_it_promises(seed: int, n: int, part: float) -> None:
    loss = Loss(seed, n)
    lr, g = part / loss.smoothness, loss.gradient(loss.start)
    promised = th.gradient_descent_decrease(lr, loss.smoothness, float(np.linalg.norm(g)))
    assert loss(loss.start - lr * g) <= loss(loss.start) - promised + 1e-9 * (1 + abs(promised))
    L = loss.smoothness  # attained on L x^2 / 2 from x = 1
    attained = L / 2 - L / 2 * (1 - lr * L) ** 2
    assert th.gradient_descent_decrease(lr, L, L) == pytest.approx(attained, abs=1e-9 * L)


def test_the_limits_are_where_the_dissipation_vanishes() -> None:
    for beta in (0.0, 0.5, 0.9):
        assert th.heavy_ball_dissipation(th.heavy_ball_energy_limit(3.0, beta), 3.0, beta) == pytest.approx(
            0.0, abs=1e-12
        )
    assert th.prox_gradient_dissipation(th.prox_gradient_energy_limit(3.0), 3.0) == pytest.approx(0.0, abs=1e-12)
    assert th.gradient_descent_decrease(th.gradient_descent_energy_limit(3.0), 3.0, 1.0) == pytest.approx(
        0.0, abs=1e-12
    )
    assert th.prox_gradient_dissipation(0.1, 3.0) == th.heavy_ball_dissipation(0.1, 3.0, 0.0)
    assert th.sgd_energy_limit(3.0) == th.sgd_energy_limit(3.0, dampening=0.5)  # torch: no dampening without momentum
    assert th.heavy_ball_energy_limit(0.0, 0.9) == math.inf


@settings(max_examples=30)
@given(seeds, betas, st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.5]))
def test_the_limit_of_damped_decayed_sgd_is_that_of_heavy_ball_in_disguise(
    seed: int, beta: float, d: float, wd: float
) -> None:
    loss = Loss(seed, 3)
    lr = th.sgd_energy_limit(loss.smoothness, momentum=beta, dampening=d, weight_decay=wd)
    rate = lr * (1 - d) if beta else lr
    value = lambda x: loss(x) + wd / 2 * float(x @ x)  # noqa: E731
    x, moved = loss.start, np.zeros(3)
    b = np.zeros(3)
    for _ in range(60):
        before = th.heavy_ball_energy(value(x), rate, beta, float(np.linalg.norm(moved)) / rate)
        b = beta * b + (1 - d if beta else 1) * (loss.gradient(x) + wd * x)
        x, moved = x - lr * b, -lr * b
        after = th.heavy_ball_energy(value(x), rate, beta, float(np.linalg.norm(moved)) / rate)
        assert after <= before + 1e-10 * (1 + abs(before))


@given(st.floats(0.01, 1), st.floats(0.01, 1), betas, st.floats(0, 10))
def test_a_change_of_lr_adds_its_drift(lr: float, new: float, beta: float, buffer: float) -> None:
    drift = th.heavy_ball_lr_drift(lr, new, beta, buffer)
    difference = th.heavy_ball_energy(1.0, new, beta, buffer) - th.heavy_ball_energy(1.0, lr, beta, buffer)
    assert drift == pytest.approx(difference, abs=1e-12)
    assert drift <= 0 or new > lr
