"""Bounds from the weights hold at every batch, are attained by their witness, and are not claimed where none is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from stableopt.lyapunov.profile.representations.forward import forward_profile
from stableopt.lyapunov.profile.representations.law import log_law
from stableopt.lyapunov.profile.representations.survey import chain_of
from stableopt.nn import stabilize


def test_no_norm_exceeds_the_products_and_the_witness_attains_them():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    profile = forward_profile(model, 3.0 * torch.randn(20, 4))
    below = np.tril_indices(4, -1)
    assert (profile.log_norms[below] <= profile.log_law[below]).all()
    assert (profile.log_products[below] <= profile.log_law[below]).all()
    assert (profile.log_law[1, 0] - profile.log_norms[1, 0]) > 1e-3  # some unit is at rest, at this batch
    u, v = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    aligned = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    aligned[0].weight, aligned[2].weight = nn.Parameter(2.0 * torch.outer(v, u)), nn.Parameter(5.0 * torch.outer(u, v))
    profile = forward_profile(aligned, torch.ones(1, 3))  # the unit v is on
    assert profile.norm(2, 0) == pytest.approx(10.0)
    assert profile.log_law[2, 0] == pytest.approx(math.log(10.0))
    assert profile.log_law[2, 0] >= profile.log_norms[2, 0] - 1e-15


def laws(*layers, training=True):
    model = nn.Sequential(nn.Linear(3, 3), *layers, nn.Linear(3, 3)).train(training)
    return log_law(chain_of(model, torch.randn(4, 3))), [
        math.log(float(torch.linalg.matrix_norm(m.weight.detach(), 2))) for m in (model[0], model[-1])
    ]


def test_dropout_in_training_multiplies():
    found, norms = laws(nn.Dropout(0.75))
    assert found == pytest.approx([norms[0] + math.log(4.0), norms[1]], abs=1e-9)
    found, norms = laws(nn.Dropout(0.75), training=False)
    assert found == pytest.approx(norms, abs=1e-9)
    assert laws(nn.Dropout(1.0))[0][0] == -math.inf


def test_batch_statistics_have_a_bound_in_evaluation_only():
    assert math.isnan(laws(nn.BatchNorm1d(3))[0][0])
    assert np.isfinite(laws(nn.BatchNorm1d(3), training=False)[0]).all()


def test_weights_that_training_changes_have_no_bound_and_those_by_construction_have():
    spectral = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)))
    assert np.isnan(log_law(chain_of(spectral, torch.randn(2, 3)))).all()
    limited = nn.Sequential(stabilize(nn.Linear(3, 3), 0.5, method="schur"))
    found = log_law(chain_of(limited, torch.randn(2, 3)))
    assert found[0] <= math.log(0.5) + 1e-9
    assert forward_profile(limited, torch.randn(2, 3)).gains[0] <= found[0]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(10.0 * self.a(x))


def test_a_function_between_the_modules_leaves_no_bound():
    assert np.isnan(log_law(chain_of(Scaled(), torch.randn(2, 3)))).all()


def test_chosen_layers_have_the_product_of_what_lies_between():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
    x = torch.randn(2, 3)
    whole, some = log_law(chain_of(model, x)), log_law(chain_of(model, x, ["0", "2"]))
    assert some == pytest.approx([whole[:2].sum(), whole[2:].sum()])
