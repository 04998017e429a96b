"""What does not suffice for a recurrent network to be stable, each with its counterexample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import minimize_scalar

from stableopt.nn import AntisymmetricCell, DiagonalMetricCell, Recurrence, cell_bound, lipschitz
from stableopt.theory import absolute_spectral_radius, diagonal_norm, spectral_radius

W = torch.tensor([[1.5, -2.0], [1.5, -1.5]], dtype=torch.float64)


def test_a_spectral_radius_below_one_does_not_make_a_cell_contract() -> None:
    """ReLU, the constant input (-0.5, -10): the fixed point (1, 0) repels by 1.5 per step."""
    u = torch.tensor([-0.5, -10.0])
    assert spectral_radius(W.numpy()) == pytest.approx(math.sqrt(0.75))
    h, k = torch.tensor([1.0, 0.0]), torch.tensor([1.0 + 1e-9, 0.0])
    torch.testing.assert_close(torch.relu(W @ h + u), h)
    for _ in range(40):
        h, k = torch.relu(W @ h + u), torch.relu(W @ k + u)
    assert float((h - k).norm()) == pytest.approx(1e-9 * 1.5**40, rel=1e-3)  # 1.1e7 times


def test_no_diagonal_metric_covers_that_cell_and_the_full_one_that_does_proves_nothing() -> None:
    best = minimize_scalar(lambda t: diagonal_norm(W.numpy(), [1.0, math.exp(t)]), bounds=(-5, 5), method="bounded")
    assert best.fun > 1.4
    assert absolute_spectral_radius(W.numpy()) > 1.4
    P = solve_discrete_lyapunov(W.numpy().T, np.eye(2))  # W' P W < P: the linear map contracts in this norm
    R = np.linalg.cholesky(P).T
    assert np.linalg.norm(R @ W.numpy() @ np.linalg.inv(R), 2) < 1.0
    pattern = np.diag([1.0, 0.0])  # a unit that is off does not commute with P
    assert np.linalg.norm(R @ pattern @ W.numpy() @ np.linalg.inv(R), 2) > 1.5


def test_the_diagonal_metric_cell_pulls_that_matrix_below_its_cap() -> None:
    cell = DiagonalMetricCell(2, 2, rate=0.9, memory=4, activation="relu")
    with torch.no_grad():
        cell.weight.copy_(W)
        cell.weight_input.copy_(torch.eye(2))
    x = torch.tensor([-0.5, -10.0]).expand(1, 40, 2)
    states = [Recurrence(cell)(x, torch.tensor(start))[0, -1] for start in ([1.0, 0.0], [1.1, 0.0])]
    assert float((states[0] - states[1]).detach().norm()) <= 0.1 * cell_bound(cell).state.upper ** 40


K = torch.tensor([[0.0, 0.5], [-0.5, 0.0]], dtype=torch.float64)


def published(h: torch.Tensor, u: torch.Tensor, eps: float = 0.1, gamma: float = 0.1) -> torch.Tensor:
    """The antisymmetric network as published: a step along tanh((K - gamma I) h + u)."""
    return h + eps * torch.tanh(h @ (K - gamma * torch.eye(2)).mT + u)


def saturated(unit: int) -> torch.Tensor:
    """A preactivation that leaves one unit linear and all but switches the other off."""
    return torch.tensor([0.0, 3.0]) if unit == 0 else torch.tensor([3.0, 0.0])


def test_frozen_eigenvalues_in_the_left_half_plane_do_not_make_a_network_stable() -> None:
    """Two saturation patterns, each with eigenvalues of negative real part, alternate: a difference grows without limit."""
    M = K - 0.1 * torch.eye(2)
    for unit in (0, 1):
        slopes = 1 - saturated(unit).tanh() ** 2
        assert float(torch.linalg.eigvals(torch.diag(slopes) @ M).real.max()) < 0.0
    h, growth, product = torch.zeros(2), [], torch.eye(2)
    for period in range(3):
        for unit in (0, 1):
            for _ in range(80):
                u = saturated(unit) - h @ M.mT  # the input that puts the units there
                product = torch.autograd.functional.jacobian(lambda h, u=u: published(h, u), h) @ product
                h = published(h, u)
        growth.append(float(torch.linalg.matrix_norm(product, 2)))
        assert period == 0 or growth[-1] > 3.0 * growth[-2]
    assert growth[-1] > 100.0


def test_the_cell_with_its_isometry_outside_of_the_nonlinearity_contracts_on_the_same_patterns() -> None:
    cell = AntisymmetricCell(2, 2, rate=0.999, memory=100, step=0.5)
    with torch.no_grad():
        cell.weight.copy_(torch.eye(2))
        cell.skew.copy_(0.05 * K)  # a turn by about 0.05 per step
        cell.weight_input.copy_(torch.eye(2))
    _, A, Q, tau, damping = (t.detach() for t in cell.prepared())
    h, product = torch.zeros(2), torch.eye(2)
    for step in range(480):
        target = saturated(step // 80 % 2)
        J = damping * Q @ (torch.eye(2) - tau * A.mT @ torch.diag(1 - target.tanh() ** 2) @ A)
        if step % 160 == 0:
            exact = torch.autograd.functional.jacobian(lambda h, x=target - h: cell(x, h), h)
            torch.testing.assert_close(torch.as_tensor(exact), J)
        product = J @ product
        h = damping * Q @ (h - tau * A.mT @ target.tanh())
    assert float(torch.linalg.matrix_norm(product, 2)) <= cell_bound(cell).state.upper ** 480
    assert lipschitz(Recurrence(cell)).upper < math.inf


def test_one_leak_per_unit_is_not_a_contraction_in_the_euclidean_norm() -> None:
    rho, T = 0.9, torch.diag(torch.tensor([0.5, 0.01]))
    J = (torch.eye(2) - T) + T @ (rho * torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert float(torch.linalg.matrix_norm(J, 2)) > 1.05
    assert float(J.abs().sum(1).max()) == pytest.approx(1 - 0.01 * (1 - rho))  # in the maximum norm it is
