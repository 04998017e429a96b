"""T4: edges, against spectral radii and against torch's optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import stableopt.theory as th

betas = st.floats(0.0, 0.99)
curvatures = st.floats(1e-8, 1e8)

METHODS = [
    (lambda lam, b: th.gradient_descent_edge(lam), lambda lr, lam, b: th.sgd_matrix(lr, lam)),
    (th.heavy_ball_edge, th.heavy_ball_matrix),
    (lambda lam, b: th.nesterov_edge(lam, max(b, 0.01)), lambda lr, lam, b: th.nesterov_matrix(lr, lam, max(b, 0.01))),
    (
        lambda lam, b: th.sgd_edge(lam, momentum=b, dampening=0.4, weight_decay=0.2 * lam),
        lambda lr, lam, b: th.sgd_matrix(lr, lam, momentum=b, dampening=0.4, weight_decay=0.2 * lam),
    ),
    (
        lambda lam, b: th.sgd_edge(lam, momentum=max(b, 0.01), weight_decay=0.2 * lam, nesterov=True),
        lambda lr, lam, b: th.sgd_matrix(lr, lam, momentum=max(b, 0.01), weight_decay=0.2 * lam, nesterov=True),
    ),
    (th.adam_edge, th.adam_matrix),
    (lambda lam, b: th.adamw_edge(lam, b, 0.3 * lam), lambda lr, lam, b: th.adamw_matrix(lr, lam, b, 0.3 * lam)),
    (th.nadam_edge, th.nadam_matrix),
    (th.rmsprop_edge, th.rmsprop_matrix),
]


@pytest.mark.parametrize(("edge", "matrix"), METHODS)
@given(lam=curvatures, beta=betas)
@example(lam=1.0, beta=0.0)
@example(lam=1.0, beta=0.9)
def test_the_spectral_radius_is_one_at_the_edge_and_beyond_one_past_it(
    edge: Callable[..., float], matrix: Callable[..., np.ndarray], lam: float, beta: float
) -> None:
    lr = edge(lam, beta)
    M = matrix(lr, lam, beta)
    assert abs(np.linalg.det(M * [[1, lam], [1 / lam, 1]] + np.eye(2))) <= 1e-9 * (
        1 + np.abs(M * [[1, lam], [1 / lam, 1]]).max() ** 2
    )
    for part in (0.05, 0.5, 0.9, 0.99):
        assert th.spectral_radius(matrix(part * lr, lam, beta)) < 1
    assert th.spectral_radius(matrix(1.01 * lr, lam, beta)) > 1
    assert th.spectral_radius(matrix(-0.01 * lr, lam, beta)) > 1


@given(lam=curvatures, beta=betas, c=st.floats(0.001, 1.0))
@example(lam=1.0, beta=0.9, c=0.05)
@example(lam=1.0, beta=0.0, c=1.0)
def test_schedule_free_is_stable_up_to_its_edge_for_every_averaging_weight(lam: float, beta: float, c: float) -> None:
    lr = th.schedule_free_edge(lam, beta, c)
    assert abs(np.linalg.det(th.schedule_free_matrix(lr, lam, beta, c) + np.eye(2))) <= 1e-12
    for part in (0.05, 0.5, 0.9, 0.99):
        assert th.spectral_radius(th.schedule_free_matrix(part * lr, lam, beta, c)) < 1
    assert th.spectral_radius(th.schedule_free_matrix(1.01 * lr, lam, beta, c)) > 1
    assert th.spectral_radius(th.schedule_free_matrix(-0.01 * lr, lam, beta, c)) > 1
    assert lr <= th.schedule_free_edge(lam, beta, c / 2) <= th.schedule_free_edge(lam, beta)
    assert th.schedule_free_edge(lam, beta) == pytest.approx(2 / ((1 - beta) * lam))
    assert th.schedule_free_edge(lam, beta, 1.0) == pytest.approx(2 / lam)


def test_the_schedule_free_matrix_is_its_recursion() -> None:
    eta, lam, beta, c, x, z = 0.7, 1.3, 0.6, 0.2, 0.4, -1.1
    y = (1 - beta) * z + beta * x
    z_next = z - eta * lam * y
    expected = [(1 - c) * x + c * z_next, z_next]
    np.testing.assert_allclose(th.schedule_free_matrix(eta, lam, beta, c) @ [x, z], expected, rtol=1e-14)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.0, 10))
def test_one_step_of_sam_shrinks_a_component_up_to_its_edge_and_not_beyond(lam: float, norm: float, rho: float) -> None:
    """In two dimensions, the other eigenvalue 0.3 lam: the gradient is not the eigenvector."""
    H = np.diag([lam, 0.3 * lam])
    gradient = norm * np.array([0.6, 0.8])
    theta = np.linalg.solve(H, gradient)

    def ratio(lr: float) -> float:
        return abs((theta - lr * H @ (theta + rho * gradient / np.linalg.norm(gradient)))[0] / theta[0])

    edge = th.sam_edge(lam, norm, rho)
    assert ratio(edge) == pytest.approx(1.0, rel=1e-9)
    assert ratio(0.99 * edge) < 1 < ratio(1.01 * edge)
    assert edge <= th.gradient_descent_edge(lam)
    # solved for the curvature it is the formula of Long and Bartlett
    root = norm / (2 * rho) * (math.sqrt(1 + 8 * rho / (edge * norm)) - 1) if rho > 1e-3 else lam
    assert root == pytest.approx(lam, rel=1e-6)


def growth(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], lam: float) -> float:
    """Run a real torch optimizer on lam/2 theta^2; return the growth, the bias correction having faded before."""
    theta, at = torch.nn.Parameter(torch.tensor([0.0])), []
    optimizer = make([theta])
    for _ in range(250):
        theta.grad = torch.zeros(1)
        optimizer.step()
    theta.data.fill_(1e-6)
    for _ in range(200):
        theta.grad = lam * theta.detach()
        optimizer.step()
        at.append(abs(theta.item()))
        if at[-1] > 1e4:
            return math.inf
    return max(at[-5:]) / max(at[:5])


FROZEN = 1e12  # an eps so large that the preconditioner is eps: it is frozen at FROZEN


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("lam", [0.3, 20.0])
def test_torch_optimizers_converge_below_the_edge_and_diverge_above_it(lam: float, beta: float) -> None:
    wd = 0.3
    sgd, optim = torch.optim.SGD, torch.optim
    cases = {
        "gd": (th.sgd_edge(lam, weight_decay=wd), lambda p, lr: sgd(p, lr, weight_decay=wd)),
        "damped": (
            th.sgd_edge(lam, momentum=beta, dampening=0.4, weight_decay=wd),
            lambda p, lr: sgd(p, lr, momentum=beta, dampening=0.4, weight_decay=wd),
        ),
        "undamped": (th.sgd_edge(lam, dampening=0.4), lambda p, lr: sgd(p, lr, dampening=0.4)),
        "heavy ball": (th.heavy_ball_edge(lam, beta), lambda p, lr: sgd(p, lr, momentum=beta)),
        "nesterov": (
            th.sgd_edge(lam, momentum=beta, weight_decay=wd, nesterov=True),
            lambda p, lr: sgd(p, lr, momentum=beta, weight_decay=wd, nesterov=True),
        ),
        "adam": (th.adam_edge(lam, beta), lambda p, lr: optim.Adam(p, lr * FROZEN, (beta, 0.99), eps=FROZEN)),
        "adamw": (
            th.adamw_edge(lam, beta, wd),
            lambda p, lr: optim.AdamW(p, lr * FROZEN, (beta, 0.99), eps=FROZEN, weight_decay=wd / FROZEN),
        ),
        "nadam": (
            th.nadam_edge(lam, beta),
            lambda p, lr: optim.NAdam(p, lr * FROZEN, (beta, 0.99), eps=FROZEN, momentum_decay=50.0),
        ),
        "rmsprop": (
            th.rmsprop_edge(lam, beta),
            lambda p, lr: optim.RMSprop(p, lr * FROZEN, eps=FROZEN, momentum=beta),
        ),
    }
    for name, (edge, make) in cases.items():
        assert growth(lambda p, make=make, lr=0.98 * edge: make(p, lr), lam) < 0.05, name
        assert growth(lambda p, make=make, lr=1.02 * edge: make(p, lr), lam) > 20, name


def test_the_matrices_are_the_steps_of_torch() -> None:
    lam, lr, wd = 2.0, 0.3, 0.2
    for options in (
        {"momentum": 0.6, "dampening": 0.3},
        {"momentum": 0.6, "nesterov": True},
        {"dampening": 0.3},
    ):
        theta = torch.nn.Parameter(torch.tensor([1.0]))
        optimizer = torch.optim.SGD([theta], lr, weight_decay=wd, **options)
        state = None
        for _ in range(6):
            optimizer.zero_grad()
            (lam / 2 * theta.square().sum()).backward()
            optimizer.step()
            buffer = optimizer.state[theta].get("momentum_buffer")
            now = np.array([theta.item(), (buffer if buffer is not None else theta.grad).item()])
            if state is not None:
                predicted = th.sgd_matrix(lr, lam, weight_decay=wd, **options) @ state
                np.testing.assert_allclose(
                    predicted[: 2 if buffer is not None else 1], now[: 2 if buffer is not None else 1]
                )
            state = now


def test_two_forms_of_one_method_have_one_spectrum() -> None:
    for beta in (0.3, 0.9):
        for lr in (0.1, 0.7, 2.0):
            for pair in (
                (th.heavy_ball_matrix(lr, 1.5, beta), th.sgd_matrix(lr, 1.5, momentum=beta)),
                (th.nesterov_matrix(lr, 1.5, beta), th.sgd_matrix(lr, 1.5, momentum=beta, nesterov=True)),
                (th.adam_matrix(lr, 1.5, beta), th.heavy_ball_matrix(lr * (1 - beta), 1.5, beta)),
                (th.nadam_matrix(lr, 1.5, beta), th.nesterov_matrix(lr * (1 - beta), 1.5, beta)),
            ):
                spectra = [np.sort_complex(np.linalg.eigvals(M)) for M in pair]
                np.testing.assert_allclose(spectra[0], spectra[1], atol=1e-7)


def test_a_companion_matrix_is_not_normal() -> None:
    """Spectral radius below 1, norm above 1; the synthesized metric shows the contraction."""
    M = th.heavy_ball_matrix(1.0, 1.0, 0.9)
    assert th.spectral_radius(M) < 1 < np.linalg.norm(M, 2)
    rate = (1 + th.spectral_radius(M)) / 2
    assert th.metric_norm(M, th.synthesize_metric(M, rate)) < rate


def test_the_edge_of_adam_is_38_and_the_sound_limit_of_heavy_ball_is_19_times_below_its_edge() -> None:
    assert th.adam_edge(1.0, 0.9) == pytest.approx(38.0)
    assert th.heavy_ball_edge(7.0, 0.9) / th.heavy_ball_energy_limit(7.0, 0.9) == pytest.approx(19.0)


@given(st.floats(1e-8, 1e8), st.floats(-1, 1), st.floats(0, 3))
def test_the_gradient_step_factor_is_the_norm_of_its_derivative(L: float, part: float, at: float) -> None:
    lr = at / L
    H = np.diag([part * L, L])
    assert th.gradient_descent_factor(lr, part * L, L) == pytest.approx(np.linalg.norm(np.eye(2) - lr * H, 2))
    if part < 0 < at:
        assert th.gradient_descent_factor(lr, part * L, L) >= 1 + lr * abs(part) * L * (1 - 1e-12)
    with pytest.raises(ValueError, match="cannot exceed"):
        th.gradient_descent_factor(lr, 2 * L, L)


def test_decay_bears_negative_curvature_down_to_its_own_size() -> None:
    lr, beta, wd = 0.1, 0.9, 0.5
    assert (
        th.spectral_radius(th.adamw_matrix(lr, -0.49, beta, wd))
        < 1
        < th.spectral_radius(th.adamw_matrix(lr, -0.51, beta, wd))
    )
    assert th.adamw_edge(-0.4, beta, wd) > th.adamw_edge(0.0, beta, wd)
    with pytest.raises(ValueError, match="every lr"):
        th.adamw_edge(-0.51, beta, wd)


def test_flat_losses_have_no_edge_and_contradictory_settings_are_refused() -> None:
    assert th.gradient_descent_edge(0.0) == math.inf
    for call in (th.sgd_edge, lambda lam, **k: th.sgd_matrix(0.1, lam, **k)):
        for wrong in ({"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}):
            with pytest.raises(ValueError, match="nesterov needs"):
                call(1.0, **wrong)
    from stableopt.linalg import Bound

    with pytest.raises(TypeError, match="float"):
        th.heavy_ball_matrix(Bound(0.0, 1.0), 1.0, 0.9)


@given(st.floats(0, 10), st.floats(0.1, 3), st.floats(0.01, 1), st.floats(0.01, 1.0), st.floats(0.1, 3))
def test_normalized_methods_with_decay_stay_within_their_bound(
    start: float, c: float, wd: float, part: float, adj: float
) -> None:
    lr, bound, w = part / wd, th.decayed_norm_bound(start, c, wd, adj), start
    for _ in range(50):
        w = (1 - lr * wd) * w + lr * adj * c  # the worst direction
        assert w <= bound * (1 + 1e-12)
    if part > 0.5:
        assert w == pytest.approx(c * adj / wd, rel=1e-6)  # attained in the limit


def test_the_newton_schulz_direction_has_norm_1_2024() -> None:
    from torch.optim import _muon

    assert (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C) == th.gradient.NEWTON_SCHULZ
    for steps in range(7):
        s = np.linspace(0, 1, 400001)
        for _ in range(steps):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        assert th.newton_schulz_norm(steps=steps) == pytest.approx(np.abs(s).max(), abs=1e-6)
        assert th.newton_schulz_norm(steps=steps) >= np.abs(s).max() * (1 - 1e-12)
    assert th.newton_schulz_norm() == pytest.approx(1.2024, abs=5e-5)
    assert th.newton_schulz_norm((1.5, -0.5, 0.0)) == pytest.approx(1.0)  # the classical cubic stays below 1
    assert th.newton_schulz_norm((2.0, 0.0, 0.0), steps=3) == 8.0
    with pytest.raises(ValueError, match="steps"):
        th.newton_schulz_norm(steps=-1)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-30, 30), st.floats(-20, 20)), min_size=1, max_size=4),
    st.floats(0, 0.2),
)
def test_the_norm_of_a_composite_is_an_upper_bound_and_tight(
    triples: list[tuple[float, float, float]], slack: float
) -> None:
    """With any polynomials and any growth of each step below the slack; attained when every step grows by all of it."""
    bound, reach = th.newton_schulz_norm(triples, slack=slack), 1.0
    for a, b, c in triples:
        s = np.linspace(0, reach * (1 + slack), 20001)
        p = np.abs(s * (a + s * s * (b + c * s * s)))
        reach = p.max()
    assert bound >= reach * (1 - 1e-12)
    if reach > 1e-3:
        assert bound == pytest.approx(reach, rel=1e-3)


def test_the_norm_of_a_composite_is_exact_where_numbers_are() -> None:
    assert th.newton_schulz_norm((1.5, -0.5, 0.0), steps=9) == 1.0
    assert th.newton_schulz_norm([(2.0, 0.0, 0.0), (0.0, 0.0, 1.0)]) == 32.0
    assert th.newton_schulz_norm([(2.0, 0.0, 0.0), (0.0, 0.0, 1.0)], steps=1) == 2.0
    assert th.newton_schulz_norm([]) == 1.0
    assert th.newton_schulz_norm([(2.0, 0.0, 0.0)], slack=0.25) == 2.5
    third = th.newton_schulz_norm((1 / 3, 0.0, 0.0), steps=1)
    assert third >= 1 / 3
    for wrong in ({"steps": 3}, {"slack": -0.1}, {"steps": -1}):
        with pytest.raises(ValueError, match=r"steps|slack"):
            th.newton_schulz_norm([(1.0, 0.0, 0.0)], **wrong)
    assert th.newton_schulz_norm((1e300, 1.0, 1.0), steps=2) == math.inf
    with pytest.raises(ValueError, match="triples"):
        th.newton_schulz_norm([(1.0, 0.0)])
