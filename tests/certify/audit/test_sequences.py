"""Sequences: eigenvalues below one limit neither a ReLU recurrence nor the gain of a state space."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.certify.audit import audit
from stableopt.certify.audit.sequences import counterexample
from stableopt.nn import ContractingCell, Recurrence, StateSpaceStack, contracting
from tests.certify.audit.foreign import COUNTEREXAMPLE, Loop, Mode, holds, of_kind, only


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_spectral_radius_below_one_does_not_make_a_recurrence_stable(activation: str) -> None:
    layer = nn.RNN(2, 2, nonlinearity=activation)
    layer.weight_hh_l0.data = COUNTEREXAMPLE.clone()
    found = only(nn.Sequential(layer), "spectral-radius")
    W = COUNTEREXAMPLE.numpy()
    assert found.numbers["spectral radius"] == pytest.approx(np.abs(np.linalg.eigvals(W)).max())
    assert found.numbers["norm"] == pytest.approx(np.linalg.norm(W, 2))
    assert found.attained == pytest.approx(1.5)  # W[0, 0], the first unit alone
    assert found.numbers["growth over 20 steps"] == pytest.approx(1.5**20, rel=1e-3)
    assert found.severity == "serious"


@pytest.mark.parametrize(("activation", "n"), [("relu", 2), ("tanh", 2), ("relu", 8), ("tanh", 16), ("relu", 16)])
def test_the_counterexample_is_a_fixed_point_from_which_states_move_apart(activation: str, n: int) -> None:
    W = COUNTEREXAMPLE if n == 2 else torch.randn(n, n) * 2 / math.sqrt(n)
    found = counterexample(W, activation)
    assert found is not None
    sigma = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh}[activation]
    h, u = found.state.numpy(), found.drive.numpy()
    assert np.abs(sigma(W.numpy() @ h + u) - h).max() < 1e-12
    on = found.active.numpy()
    assert np.abs(np.linalg.eigvals(W.numpy()[np.ix_(on, on)])).max() == pytest.approx(found.rate)
    assert found.grown(W, activation, 20).gain > 0.05 * found.rate**20


def test_a_norm_below_one_has_no_counterexample_and_no_finding() -> None:
    W = torch.randn(6, 6)
    W = 0.99 * W / torch.linalg.matrix_norm(W, 2)
    assert counterexample(W, "relu") is None
    layer = nn.RNN(2, 6)
    layer.weight_hh_l0.data = W
    assert not of_kind(audit(layer), "spectral-radius")


def test_a_recurrence_written_by_hand_is_found_in_the_run() -> None:
    found = only(Loop(COUNTEREXAMPLE), "spectral-radius", (6, 3))
    assert (found.path, found.attained) == ("W", pytest.approx(1.5))
    assert not of_kind(audit(Loop(0.5 * torch.eye(3)), (6, 3)), "spectral-radius")


@pytest.mark.parametrize(("r", "angle"), [(0.5, 0.0), (0.9, 1.0), (0.97, 2.0)])
def test_eigenvalues_below_one_do_not_limit_the_gain(r: float, angle: float) -> None:
    layer = Mode(r, angle, math.sqrt(1 - r * r))
    found = only(layer, "eigenvalue-only", (16, 1))
    w = np.linspace(-math.pi, math.pi, 20001)
    z = np.exp(1j * w)
    lam = r * np.exp(1j * angle)
    # the two real outputs carry the complex state; a real input excites both frequencies
    states = [layer.scale / (1 - mode / z) for mode in (lam, lam.conjugate())]
    exact = math.sqrt(float(((np.abs(states[0]) ** 2 + np.abs(states[1]) ** 2) / 2).max()))
    assert exact * 0.98 < found.attained < exact * (1 + 1e-9)
    assert found.numbers["peak of the frequency response"] == pytest.approx(exact, rel=1e-3)
    assert found.numbers["eigenvalue"] == pytest.approx(r, rel=2e-2)
    if angle == 0.0:
        assert exact == pytest.approx(math.sqrt((1 + r) / (1 - r)), rel=1e-6)
    holds(found, layer)


def test_the_scale_one_minus_r_keeps_the_gain_at_one() -> None:
    assert not of_kind(audit(Mode(0.9, 0.0, 0.1), (16, 1)), "eigenvalue-only")
    found = only(Mode(1.01, 0.0, 1.0), "unstable", (16, 1))
    assert found.numbers["eigenvalue"] == pytest.approx(1.01, rel=1e-6)


def test_ours_have_no_finding() -> None:
    for model, shape in (
        (StateSpaceStack(2, 4, 4, 1, 2, gain=10.0), (8, 2)),
        (Recurrence(ContractingCell(3, 4)), (8, 3)),
        (contracting(nn.GRU(3, 4), input_bound=3.0), (8, 3)),
    ):
        assert len(audit(model, shape)) == 0


@pytest.mark.parametrize(
    "layer", [nn.GRU(2, 4, batch_first=True), nn.LSTM(2, 4), nn.GRUCell(2, 4), nn.RNNCell(2, 4)], ids=str
)
def test_recurrent_layers_that_do_not_contract_are_measured_at_two_lengths(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data.double() * 3
    found = only(nn.ModuleList([layer]), "unbounded-recurrence")
    assert found.numbers["gain at length 32"] == found.attained > 0
    assert found.severity == "weak"
