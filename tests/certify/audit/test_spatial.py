"""Layers without weights: pools, padding, upsampling, activations and dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stableopt.certify.audit import audit
from tests.certify.audit.foreign import holds, norm_of, only


@pytest.mark.parametrize(
    ("pool", "factor"),
    [
        (nn.MaxPool2d(3, 1), 3.0), (nn.MaxPool2d(3, 2), 2.0), (nn.MaxPool1d(3, 1), math.sqrt(3)),
        (nn.MaxPool2d(3, 1, padding=1), 3.0),
        (nn.MaxPool1d(3, 2), math.sqrt(2)), (nn.MaxPool3d(2, 1), math.sqrt(8)), (nn.MaxPool1d(2, 1, dilation=3), math.sqrt(2)),
    ],
)  # fmt: skip
def test_windows_that_overlap_cost_the_root_of_their_number(pool: nn.Module, factor: float) -> None:
    found = only(nn.Sequential(pool), "overlapping-pool")
    assert found.attained == pytest.approx(factor, rel=1e-12)
    assert found.bound == pytest.approx(factor, rel=1e-12)
    holds(found, pool)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(2, 3), nn.AvgPool2d(2), nn.AvgPool2d(3, 1)], ids=str)
def test_windows_side_by_side_cost_nothing(pool: nn.Module) -> None:
    assert len(audit(pool)) == 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ReflectionPad2d(2), (1, 6, 6)), (nn.ReflectionPad1d(1), (2, 6)), (nn.ReplicationPad2d(1), (1, 5, 5)),
        (nn.CircularPad2d(1), (1, 5, 5)), (nn.Upsample(scale_factor=2), (1, 4, 4)), (nn.Upsample(scale_factor=3), (1, 4)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 4, 4)), (nn.Upsample(scale_factor=2, mode="bicubic"), (1, 4, 4)),
        (nn.Unfold(3), (1, 5, 5)),
    ],
)  # fmt: skip
def test_copied_pixels_are_measured_on_the_image(layer: nn.Module, shape: tuple[int, ...]) -> None:
    found = only(nn.Sequential(nn.Identity(), layer), "copied-pixels", shape)
    assert found.attained == pytest.approx(norm_of(layer, shape), rel=1e-9)
    assert found.attained > 1
    holds(found, layer)


def test_zeros_around_an_image_cost_nothing() -> None:
    assert len(audit(nn.Sequential(nn.ZeroPad2d(2), nn.ReflectionPad2d(0)), (1, 6, 6))) == 0


@pytest.mark.parametrize(
    ("layer", "slope"),
    [
        (nn.GELU(), (1 + math.erf(1)) / 2 + math.exp(-1) / math.sqrt(math.pi)), (nn.SiLU(), 1.09983932), (nn.Mish(), 1.08849816),
        (nn.Hardswish(), 1.5), (nn.SELU(), 1.7580993), (nn.ELU(2.0), 2.0), (nn.LeakyReLU(-3.0), 3.0), (nn.PReLU(3, 1.25), 1.25),
    ],
)  # fmt: skip
def test_slopes_above_one_are_a_note_with_the_slope(layer: nn.Module, slope: float) -> None:
    found = only(layer, "steep-activation")
    assert found.severity == "note"
    assert found.attained == pytest.approx(slope, rel=1e-4)
    holds(found, layer)


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.Tanh(), nn.Softplus(), nn.LeakyReLU(0.2), nn.ELU(), nn.Softmax(-1)], ids=str
)
def test_slopes_within_one_are_none(layer: nn.Module) -> None:
    assert len(audit(layer)) == 0


@pytest.mark.parametrize("layer", [nn.Hardshrink(1.0), nn.Threshold(1.0, 5.0), nn.GLU()], ids=str)
def test_activations_without_a_constant_are_serious(layer: nn.Module) -> None:
    found = only(layer, "no-constant")
    assert found.severity == "serious"
    assert found.attained > 20
    holds(found, layer, rel=1e-3)


def test_dropout_counts_in_training_mode_only() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2))
    found = only(layer, "active-dropout")
    assert found.attained == pytest.approx(1.25)
    mask = torch.nn.functional.dropout(torch.ones(1000), 0.2)
    assert float(mask.max()) == pytest.approx(found.attained)
    assert len(audit(layer.eval())) == 0
    assert len(audit(nn.Dropout(0.0))) == 0
