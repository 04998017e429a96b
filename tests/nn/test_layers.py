"""Laws of the iteration over layers, and of the check that a rule applies."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from stableopt.errors import UncertifiableError
from stableopt.nn import GradientBlock, layers
from stableopt.nn.dispatch import check_forward, registered_class


def test_the_layers_run_one_by_one_are_the_model() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(
        shared, nn.Sequential(nn.Tanh(), nn.Sequential(shared), nn.Sequential()), shared, GradientBlock(3)
    )
    x = torch.randn(2, 3)
    y = x
    for _, layer in layers(model):
        y = layer(y)
    torch.testing.assert_close(y, model(x), rtol=0, atol=0)


def test_the_names_are_those_of_torch() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), nn.Flatten())
    assert [name for name, _ in layers(model)] == ["0.0", "0.1", "1"]
    assert all(model.get_submodule(name) is layer for name, layer in layers(model))


def test_a_single_layer_is_its_own_sequence() -> None:
    layer = parametrizations.orthogonal(nn.Linear(2, 2))
    assert list(layers(layer)) == [("", layer)]


def test_a_leaf_without_a_rule_is_still_a_layer() -> None:
    assert [name for name, _ in layers(nn.Sequential(nn.LayerNorm(2)))] == ["0"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ModuleList([nn.ReLU()]),
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, batch_first=True)),
        lambda: nn.parallel.DataParallel(nn.Sequential(nn.ReLU())),
    ],
)
def test_an_unknown_order_is_refused(make: object) -> None:
    with pytest.raises(UncertifiableError, match=r"nested nn\.Sequential"):
        list(layers(make()))  # type: ignore[operator]


def test_a_hook_on_a_container_is_refused() -> None:
    inner = nn.Sequential(nn.ReLU())
    inner.register_forward_hook(lambda *_: None)
    with pytest.raises(UncertifiableError, match=r"'1' \(Sequential\) has a forward hook"):
        list(layers(nn.Sequential(nn.ReLU(), inner)))


def test_the_class_of_a_rule_is_the_nearest_registered_one() -> None:
    assert registered_class(nn.ReLU6()) is nn.Hardtanh
    assert registered_class(parametrizations.orthogonal(nn.Linear(2, 2))) is nn.Linear
    assert registered_class(nn.LocalResponseNorm(1)) is None


def test_a_backward_hook_does_not_change_the_map() -> None:
    layer = nn.Linear(1, 1)
    layer.register_full_backward_hook(lambda *_: None)
    assert check_forward(layer, nn.Linear) is None
