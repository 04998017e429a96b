"""What an evaluation shows of kinks and autocast, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stableopt.lyapunov.profile.finite.ground import look
from stableopt.nn.activations import GroupSort


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.LeakyReLU(inplace=True), "leaky_relu"),
        (nn.MaxPool1d(2), "max_pool1d"),
        (nn.Hardtanh(), "hardtanh"),
        (GroupSort(2), "GroupSort"),
        (nn.Tanh(), ""),
        (nn.GELU(), ""),
        (nn.Softplus(), ""),
        (nn.ELU(), ""),
        (nn.ELU(0.5), "elu"),
    ],
    ids=str,
)
def test_kinks_are_seen(layer: nn.Module, name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    ground = look(model, lambda: model(torch.ones(1, 4)).sum().backward())
    assert name in ground.kinks if name else not ground.kinks
    assert not ground.autocast


def test_kinks_of_functions_are_seen_and_in_what_order() -> None:
    model = nn.Linear(2, 2)
    assert look(model, lambda: F.l1_loss(F.relu(model(torch.ones(1, 2))), torch.zeros(1, 2))).kinks == (
        "relu",
        "l1_loss",
    )


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    look(model, lambda: model(torch.randn(4, 2)).sum().backward())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
