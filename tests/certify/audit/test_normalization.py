"""Normalizations: the measured constant is that of the dense Jacobian, and a large eps makes it harmless."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.certify.audit import audit
from tests.certify.audit.foreign import holds, of_kind, only


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-2])
def test_layer_norm_attains_the_norm_of_its_jacobian_at_a_constant_input(eps: float) -> None:
    layer = nn.LayerNorm(7, eps=eps)
    layer.weight.data = torch.tensor([0.5, -2.0, 1.0, 3.0, 0.1, 1.5, -1.0])
    found = only(nn.Sequential(layer), "sample-normalization")
    exact = np.linalg.norm(np.diag(layer.weight.detach().numpy()) @ (np.eye(7) - 1 / 7), 2) / math.sqrt(eps)
    assert found.attained == pytest.approx(exact, rel=1e-6)
    assert found.severity == "serious"
    assert found.claimed == 1.0
    assert found.bound >= exact
    holds(found, layer)


@pytest.mark.parametrize("eps", [1e-6, None])
def test_rms_norm_attains_its_largest_weight_over_the_root_of_eps(eps: float | None) -> None:
    layer = nn.RMSNorm(5, eps=eps, dtype=torch.float32)
    layer.weight.data[2] = -2.5
    found = only(layer, "sample-normalization")
    assert found.attained == pytest.approx(2.5 / math.sqrt(eps or 2.0**-23), rel=1e-6)
    assert found.bound == pytest.approx(found.attained, rel=1e-6)


@pytest.mark.parametrize(
    "layer", [nn.GroupNorm(2, 6), nn.InstanceNorm1d(3), nn.InstanceNorm2d(3), nn.LayerNorm((2, 3))], ids=str
)
def test_other_normalizations_attain_the_root_of_eps(layer: nn.Module) -> None:
    found = only(nn.Sequential(layer), "sample-normalization")
    assert found.attained == pytest.approx(1 / math.sqrt(1e-5), rel=1e-5)


def test_the_limit_is_a_constant_of_one() -> None:
    assert len(audit(nn.LayerNorm(4, eps=1.0))) == 0
    found = only(nn.LayerNorm(4, eps=0.9), "sample-normalization")
    assert found.attained == pytest.approx(1 / math.sqrt(0.9), rel=1e-6)


def test_batch_norm_couples_the_samples_in_training_and_without_statistics_only() -> None:
    layer = nn.BatchNorm1d(3)
    found = only(layer, "batch-statistics")
    assert found.severity == "weak"
    assert found.attained > 0.5
    assert found.witness is not None
    x, y = found.witness.x, found.witness.y
    assert torch.equal(x[0], y[0])
    copy = nn.BatchNorm1d(3).requires_grad_(False)
    assert float((copy(x)[0] - copy(y)[0]).norm()) == pytest.approx(found.attained)
    assert len(audit(layer.eval())) == 0
    assert only(nn.BatchNorm2d(3, track_running_stats=False).eval(), "batch-statistics").severity == "serious"


def test_a_normalization_with_stored_statistics_is_left_alone() -> None:
    assert not of_kind(audit(nn.InstanceNorm1d(3, track_running_stats=True).eval()), "sample-normalization")
