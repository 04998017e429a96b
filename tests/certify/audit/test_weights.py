"""Claimed norms: what is attained lies between the dense operator's norm by numpy and the proved bound, for every kind of claim."""

from __future__ import annotations

import warnings

import geotorch
import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize as P
from torch import nn
from torch.nn.utils import parametrizations as Q

from stableopt import stabilize
from stableopt.certify.audit import audit
from stableopt.certify.audit.weights import grade
from tests.certify.audit.foreign import holds, norm_of, of_kind, only

MULTIPLE = 1 + 1e-12


def test_a_power_iteration_is_below_the_true_norm_by_the_measured_amount() -> None:
    layer = Q.spectral_norm(nn.Linear(64, 48)).eval()
    W = layer.weight.detach().numpy()
    found = only(nn.Sequential(layer), "spectral-norm")
    true = np.linalg.norm(W, 2)
    assert found.attained <= true * MULTIPLE
    assert found.attained == pytest.approx(true, rel=1e-10)
    assert true <= found.bound
    assert found.numbers["excess"] == pytest.approx(true - 1, rel=1e-6)
    assert found.severity == grade(true - 1)
    assert found.path == "0.weight"
    holds(found, lambda x: x @ layer.weight.detach().T)


def test_a_jump_of_the_weight_is_serious_and_many_iterations_leave_a_note_at_most() -> None:
    layer = Q.spectral_norm(nn.Linear(32, 32))
    original = layer.parametrizations.weight.original
    for _ in range(3):
        layer(torch.zeros(1, 32))
    original.data = 0.1 * torch.randn(32, 32) + 0.5 * torch.outer(torch.randn(32), torch.randn(32))
    layer.eval()
    found = only(layer, "spectral-norm")
    assert found.severity == "serious"
    assert found.attained == pytest.approx(np.linalg.norm(layer.weight.detach().numpy(), 2))
    layer.train()
    for _ in range(2000):
        layer(torch.zeros(1, 32))
    assert all(f.severity == "note" for f in audit(layer.eval()))


def test_the_old_hook_is_read_as_well_although_its_weight_is_made_where_it_runs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.utils.spectral_norm(nn.Linear(32, 32))
        rows = torch.nn.utils.weight_norm(nn.Linear(32, 32))
    found = only(nn.Sequential(layer), "spectral-norm")
    layer.eval()
    layer(torch.zeros(1, 32))
    assert found.attained == pytest.approx(np.linalg.norm(layer.weight.detach().numpy(), 2), rel=1e-10)
    found = only(rows, "weight-norm")
    rows(torch.zeros(1, 32))
    W = rows.weight.detach().numpy()
    assert found.attained == pytest.approx(np.linalg.norm(W, 2), rel=1e-10)
    assert found.claimed == pytest.approx(np.linalg.norm(W, axis=1).max(), rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 4, 3, padding=1),
        lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1),
        lambda: nn.Conv1d(3, 3, 5, padding=2),
        lambda: nn.ConvTranspose2d(3, 2, 2, stride=2),
    ],
)
@pytest.mark.parametrize("claim", [Q.spectral_norm, Q.orthogonal])
def test_a_claim_about_the_kernel_as_a_matrix_is_compared_with_the_operator(make, claim) -> None:
    layer = claim(make()).eval()
    shape = (layer.in_channels, *[6] * len(layer.kernel_size))
    true = norm_of(layer, shape)
    found = of_kind(audit(nn.Sequential(layer), shape), "kernel-norm")
    if true > MULTIPLE:
        assert found[0].attained == pytest.approx(true, rel=1e-9)
        assert found[0].bound >= true
        holds(found[0], layer)
    else:
        assert not found


def test_the_image_is_that_of_the_run_or_one_of_sixteen_pixels() -> None:
    layer = Q.spectral_norm(nn.Conv2d(2, 2, 3, padding=1)).eval()
    small, large = only(layer, "kernel-norm", (2, 5, 7)), only(layer, "kernel-norm")
    assert small.attained == pytest.approx(norm_of(layer, (2, 5, 7)))
    assert small.attained < large.attained < large.bound
    assert large.witness is not None
    assert large.witness.x.shape == (1, 2, 16, 16)


@pytest.mark.parametrize("make", [Q.orthogonal, lambda layer: geotorch.orthogonal(layer, "weight")])
def test_an_orthogonal_weight_is_off_by_rounding_and_more_in_bfloat16(make) -> None:
    layer = nn.Linear(32, 32, dtype=torch.float32)
    make(layer)
    layer.eval()
    found = only(layer, "orthogonal")
    W = layer.weight.detach()
    assert found.attained - 1 == pytest.approx(np.linalg.norm(W.double().numpy(), 2) - 1, rel=1e-3)
    assert 1 < found.attained < 1 + 1e-5
    assert found.severity == "note"
    cast = np.linalg.norm(W.bfloat16().double().numpy(), 2)
    assert found.numbers["norm in bfloat16"] == pytest.approx(cast, rel=1e-10)
    assert cast > 1 + 1e-4


class Doubled(nn.Module):
    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return 2 * W


def test_a_parametrization_that_states_nothing_is_a_note_and_ours_are_none() -> None:
    layer = nn.Linear(4, 3)
    P.register_parametrization(layer, "weight", Doubled())
    found = only(layer, "unknown-parametrization")
    assert found.severity == "note"
    assert found.attained == pytest.approx(np.linalg.norm(layer.weight.detach().numpy(), 2))
    assert len(audit(stabilize(nn.Linear(4, 3)))) == 0
    assert len(audit(nn.Linear(4, 3))) == 0


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
def test_padding_by_copies_makes_the_operator_larger(mode: str) -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    found = of_kind(audit(layer, (1, 8, 8)), "copying-padding")
    assert bool(found) == (mode in {"reflect", "replicate"})
    if found:
        assert found[0].attained == pytest.approx(norm_of(layer, (1, 8, 8)), rel=1e-9)
        zeros = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        zeros.weight.data = layer.weight.data
        assert found[0].claimed == pytest.approx(norm_of(zeros, (1, 8, 8)), rel=1e-9)
        assert found[0].claimed < found[0].attained <= found[0].bound
        holds(found[0], layer)
