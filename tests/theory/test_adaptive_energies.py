"""T4: the energies of Adam and AdamW in a metric, checked along runs and at equality."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stableopt.theory as th
from tests.theory.test_energies import Loss, soft

seeds = st.integers(0, 2**32 - 1)
betas = st.sampled_from([0.0, 0.5, 0.9, 0.99])


def smoothness_in(loss: Loss, P: np.ndarray) -> float:
    return float(np.linalg.norm(loss.H / np.sqrt(np.outer(P, P)), 2) + loss.a / P.min())


@settings(max_examples=40)
@given(seeds, st.integers(1, 4), betas, st.floats(0.1, 2.0))
def test_the_energy_of_adam_obeys_its_law_while_the_metric_grows(seed: int, n: int, beta: float, part: float) -> None:
    g, loss = np.random.default_rng(seed), Loss(seed, n)
    P = 0.5 + g.random(n)
    lr = part * th.adam_energy_limit(smoothness_in(loss, P))
    x, m = loss.start, np.zeros(n)
    for _ in range(40):
        before = th.adam_energy(loss(x), lr, beta, float(m @ (m / P)))
        P_next = P * (1 + 0.1 * g.random(n))
        drift = th.adam_metric_drift(lr, beta, float(m @ (m / P)), float(m @ (m / P_next)))
        assert drift <= 0
        P, m = P_next, beta * m + (1 - beta) * loss.gradient(x)
        d = -lr * m / P
        x = x + d
        after = th.adam_energy(loss(x), lr, beta, float(m @ (m / P)))
        kappa, moved = th.adam_dissipation(lr, smoothness_in(loss, P)), float(d @ (P * d))
        assert after <= before + drift - kappa * moved + 1e-10 * (1 + abs(before) + abs(after) + moved / lr)
        if abs(after) > 1e12:
            break


def test_when_the_metric_shrinks_the_energy_can_rise_by_its_drift() -> None:
    drift = th.adam_metric_drift(0.1, 0.9, 1.0, 2.0)
    assert drift > 0
    assert th.adam_energy(1.0, 0.1, 0.9, 2.0) - th.adam_energy(1.0, 0.1, 0.9, 1.0) == pytest.approx(drift)


@given(betas, st.floats(0.3, 3.0))
def test_the_dissipation_of_adam_is_attained(beta: float, part: float) -> None:
    """On L x^2/2 with m = L x the momentum repeats itself."""
    L = 2.0
    lr, x = part * th.adam_energy_limit(L), 1.0
    m = L * x
    y = x - lr * (beta * m + (1 - beta) * L * x)
    change = th.adam_energy(L * y * y / 2, lr, beta, m * m) - th.adam_energy(L * x * x / 2, lr, beta, m * m)
    assert change == pytest.approx(-th.adam_dissipation(lr, L) * (y - x) ** 2, abs=1e-9)
    assert change <= 1e-9 or part > 1
    assert change > 0 or part <= 1.001


PENALTIES = {
    "none": (lambda x: 0.0, lambda x, t, P: x),
    "l1": (lambda x: 0.7 * np.abs(x).sum(), lambda x, t, P: soft(x, 0.7 * t / P)),
    "box": (lambda x: 0.0, lambda x, t, P: np.clip(x, -1.0, 1.0)),
}


def adamw_run(
    seed: int, n: int, beta: float, wd: float, part: float, penalty: str, *, realized: bool = True
) -> list[tuple[float, ...]]:
    g, loss = np.random.default_rng(seed), Loss(seed, n)
    P, (h, prox) = 0.2 + g.random(n), PENALTIES[penalty]
    L = smoothness_in(loss, P)
    lr = min(part * th.adamw_energy_limit(L, beta, wd), 0.99 / wd if wd else np.inf)
    settings_ = {"lr": lr, "beta1": beta, "weight_decay": wd}

    def energy(x: np.ndarray, m: np.ndarray) -> float:
        d = th.adamw_displacement(x, m, P, lr, wd)
        return float(th.adamw_energy(loss(x), float(x @ (P * x)), float(d @ (P * d)), penalty=float(h(x)), **settings_))

    x = prox(loss.start, 1.0, P)
    m = th.adamw_realized_momentum(x, x, P, lr, wd)  # at rest: no displacement
    np.testing.assert_allclose(th.adamw_displacement(x, m, P, lr, wd), 0.0, atol=1e-12)
    kappa, records = th.adamw_dissipation(lr, L, beta, wd), []
    for _ in range(60):
        before = energy(x, m)
        m = beta * m + (1 - beta) * loss.gradient(x)
        y = prox((1 - lr * wd) * x - lr * m / P, th.adamw_prox_step(lr, beta), P)
        if realized:
            m = th.adamw_realized_momentum(x, y, P, lr, wd)
            np.testing.assert_allclose(
                th.adamw_displacement(y, m, P, lr, wd), y - x, rtol=1e-6, atol=1e-8 * (1 + np.abs(x).max())
            )
        d, x = y - x, y
        moved = float(d @ (P * d))
        records.append((before, energy(x, m), float(kappa) * moved, moved / lr))
        if abs(records[-1][1]) > 1e10:
            break
    return records


@settings(max_examples=60)
@given(
    seeds,
    st.integers(1, 4),
    betas,
    st.sampled_from([0.0, 0.01, 0.3]),
    st.floats(0.1, 2.0),
    st.sampled_from(list(PENALTIES)),
)
def test_the_energy_of_adamw_with_decay_and_prox_obeys_its_law(
    seed: int, n: int, beta: float, wd: float, part: float, penalty: str
) -> None:
    for before, after, dissipated, size in adamw_run(seed, n, beta, wd, part, penalty):
        slack = 1e-9 * (1 + abs(before) + abs(after) + size / (1 - beta))
        assert after <= before - dissipated + slack
        if part <= 1:
            assert after <= before + slack


def test_without_the_realized_momentum_the_energy_of_adamw_rises() -> None:
    def count(*, realized: bool) -> int:
        runs = [adamw_run(s, 4, 0.9, 0.01, 1.0, p, realized=realized) for s in range(8) for p in ("l1", "box")]
        return sum(after > before + 1e-8 * (1 + abs(before)) for r in runs for before, after, *_ in r)

    assert count(realized=False) > 10
    assert count(realized=True) == 0


@given(betas, st.sampled_from([0.0, 0.05, 0.3]), st.floats(0.3, 1.5), st.floats(0.5, 3.0))
def test_the_dissipation_of_adamw_is_attained_so_its_limit_is_sharp(
    beta1: float, wd: float, part: float, P: float
) -> None:
    """On P L x^2/2 choose the displacement so that the step repeats it."""
    L = 6.0
    lr = part * th.adamw_energy_limit(L, beta1, wd)
    if lr * wd >= 0.99:
        return
    step, beta = th.adamw_prox_step(lr, beta1), beta1 * (1 - lr * wd)
    d = -1.0
    x = -(1 - beta) * d / (step * (L + wd))
    m = th.adamw_realized_momentum([x - d], [x], [P], lr, wd)[0]
    settings_ = {"lr": lr, "beta1": beta1, "weight_decay": wd}
    m_next = beta1 * m + (1 - beta1) * P * L * x
    y = (1 - lr * wd) * x - lr * m_next / P
    assert y - x == pytest.approx(d, rel=1e-6)
    d_next = th.adamw_displacement([y], [m_next], [P], lr, wd)[0]
    assert d_next == pytest.approx(d, rel=1e-6)
    energy = lambda z, q: th.adamw_energy(P * L * z * z / 2, P * z * z, P * q * q, **settings_)  # noqa: E731
    kappa = th.adamw_dissipation(lr, L, beta1, wd)
    assert energy(y, d_next) - energy(x, d) == pytest.approx(-kappa * P * d * d, abs=1e-7 * (1 + P * L * x * x))
    if lr < 0.999 / wd if wd else True:
        assert (kappa >= -1e-9) == (part <= 1) or abs(part - 1) < 1e-6


def test_the_limit_of_adamw() -> None:
    for beta1 in (0.0, 0.5, 0.9):
        assert th.adamw_energy_limit(4.0, beta1, 0.0) == 0.5 == th.adam_energy_limit(4.0)
        limit = th.adamw_energy_limit(100.0, beta1, 0.1)
        assert th.adamw_dissipation(limit, 100.0, beta1, 0.1) == pytest.approx(0.0, abs=1e-9)
        assert (
            th.adamw_dissipation(1.01 * limit, 100.0, beta1, 0.1)
            < 0
            < th.adamw_dissipation(0.99 * limit, 100.0, beta1, 0.1)
        )
    assert th.adamw_energy_limit(0.01, 0.9, 0.5) == 2.0  # the decay alone: 1 / weight_decay
    assert th.adamw_dissipation(0.1, 3.0, 0.9, 0.0) == pytest.approx(th.adam_dissipation(0.1, 3.0))
    with pytest.raises(ValueError, match="below 1"):
        th.adamw_dissipation(2.0, 1.0, 0.9, 0.5)
    with pytest.raises(ValueError, match="positive diagonal"):
        th.adamw_displacement([1.0], [1.0], [0.0], 0.1, 0.1)


def test_the_displacement_is_what_torch_adamw_did() -> None:
    """A huge eps freezes torch's metric at eps; the state after each step tells the displacement."""
    eps, lr, wd, beta1 = 1e12, 0.3, 0.2, 0.9
    theta = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.AdamW([theta], lr * eps, (beta1, 0.99), eps=eps, weight_decay=wd / eps)
    for _ in range(400):
        before = theta.detach().clone()
        theta.grad = torch.tensor([3.0, 0.5]) * theta.detach() + 1.0
        optimizer.step()
    m = optimizer.state[theta]["exp_avg"].numpy()
    theta_now = theta.detach().numpy()
    d = th.adamw_displacement(theta_now, m, [1.0, 1.0], lr, wd)
    np.testing.assert_allclose(d, theta_now - before.numpy(), atol=1e-9)
