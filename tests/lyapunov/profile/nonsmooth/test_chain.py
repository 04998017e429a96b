"""Layers as matrices, and which models are chains of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stableopt.lyapunov.profile.nonsmooth.chain import NotAChain, affine, calls_of, matrix_of
from stableopt.lyapunov.profile.nonsmooth.clarke import clarke_bounds
from stableopt.nn.activations import Scale

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 4, 2, groups=2, dilation=2), (4, 4, 4)),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 2)),
    "reflect": (lambda: nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 1, 3, stride=2, output_padding=1), (2, 3, 3)),
    "mean": (lambda: nn.AvgPool2d(3, stride=1, padding=1), (1, 4, 4)),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d(2), (2, 3, 3)),
    "sequence": (lambda: nn.Linear(3, 2), (4, 3)),
    "scale": (lambda: Scale(-0.3), (3,)),
    "pad": (lambda: nn.ReplicationPad2d(1), (1, 2, 3)),
    "dropout": (lambda: nn.Dropout(0.5).eval(), (3,)),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (3,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_matrices_that_automatic_differentiation_sees(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model = nn.Sequential(make(), nn.LeakyReLU(0.3), nn.Flatten()).double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    reading = clarke_bounds(model, x)
    assert reading.proved
    for i in range(2):
        J = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x[i]).reshape(-1, x[i].numel())
        norm = float(torch.linalg.matrix_norm(J, 2))
        assert reading.chosen[i].lower <= norm * (1 + 1e-12)
        assert reading.chosen[i].upper >= norm * (1 - 1e-12)
        assert reading.chosen[i].width < 1e-11


def test_batch_normalization_is_affine_in_evaluation_mode_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten()).double()
    x = torch.randn(4, 1, 5, dtype=torch.float64)
    for _ in range(5):
        model(x)
    model[1].weight.data.uniform_(-1, 1)
    with pytest.raises(ValueError, match=r"BatchNorm1d '1' is in training mode"):
        clarke_bounds(model, x)
    reading = clarke_bounds(model.eval(), x)
    J = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x[0]).reshape(-1, 5)
    assert reading.proved
    assert float(torch.linalg.matrix_norm(J, 2)) == pytest.approx(reading.chosen[0].upper, rel=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_the_magnitude_bounds_every_entry(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    part = affine(make().double())
    assert part is not None
    matrix, magnitude = matrix_of(part.apply, shape), matrix_of(part.magnitude, shape)
    assert (abs(matrix) <= magnitude * (1 + 1e-15)).all()


class Twice(nn.Module):
    """One activation called twice is a chain; a layer that gets another input than the last output is none."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip, self.act = skip, nn.ReLU()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.a(x))
        return self.act(self.b(x if self.skip else z))


def test_a_chain_is_what_gives_each_layer_the_output_of_the_last() -> None:
    x = torch.ones(2, 3)
    assert [call.name for call in calls_of(Twice(False), x)] == ["a", "act", "b", "act"]
    with pytest.raises(NotAChain, match="layer 'b' gets something else"):
        calls_of(Twice(True), x)
    with pytest.raises(NotAChain, match="Tanh '1' is neither affine nor piecewise linear"):
        calls_of(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), x)
    with pytest.raises(NotAChain, match=r"Dropout '0' is neither affine .* in training mode"):
        calls_of(nn.Sequential(nn.Dropout(0.5)), x)


def test_matrices_that_are_too_large_are_left_to_automatic_differentiation(monkeypatch: pytest.MonkeyPatch) -> None:
    from stableopt.lyapunov.profile.nonsmooth import chain

    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    small = clarke_bounds(model, x, reach=0.2)
    monkeypatch.setattr(chain, "LARGEST_MATRIX", 11)
    large = clarke_bounds(model, x, reach=0.2)
    assert small.proved
    assert "4 x 3 entries" in large.reason
    assert [b.upper for b in large.largest] == pytest.approx([b.upper for b in small.largest], rel=1e-11)
