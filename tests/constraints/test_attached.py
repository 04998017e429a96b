"""The registry of projected parameters: by identity, weak, one set per tensor."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from stableopt.constraints import L1, Box, L2Ball, NonNegative, attach, attached
from stableopt.constraints.attached import _ATTACHED


def test_a_constraint_belongs_to_one_tensor_by_identity(device: torch.device) -> None:
    a, b = nn.Parameter(torch.ones(2, device=device)), nn.Parameter(torch.ones(2, device=device))
    attach(a, L2Ball(1.0))
    assert attached(a) == L2Ball(1.0)
    assert attached(b) is None
    assert attached(copy.deepcopy(a)) is None
    assert attached(a.detach()) is None


def test_attaching_changes_nothing_in_the_tensor() -> None:
    a = nn.Parameter(torch.tensor([-5.0]))
    attach(a, NonNegative())
    assert a.item() == -5.0
    assert a._version == 0


def test_a_change_in_place_keeps_the_attachment() -> None:
    layer = nn.Linear(2, 2)
    attach(layer.weight, NonNegative())
    with torch.no_grad():
        layer.weight.add_(1.0)
    layer.load_state_dict(nn.Linear(2, 2).state_dict())
    layer.half().double()
    assert attached(layer.weight) == NonNegative()


def test_another_set_is_refused_until_the_first_is_forgotten() -> None:
    a = nn.Parameter(torch.ones(2))
    attach(a, Box(0.0, 1.0))
    attach(a, Box(0.0, 1.0))
    with pytest.raises(ValueError, match="already constrained to Box"):
        attach(a, NonNegative())
    assert attached(a) == Box(0.0, 1.0)
    attach(a, None)
    attach(a, None)
    assert attached(a) is None
    attach(a, NonNegative())
    assert attached(a) == NonNegative()


def test_a_tensor_is_not_kept_alive() -> None:
    a = nn.Parameter(torch.ones(2))
    gone, before = weakref.ref(a), len(_ATTACHED)
    attach(a, NonNegative())
    assert len(_ATTACHED) == before + 1
    del a
    gc.collect()
    assert gone() is None
    assert len(_ATTACHED) == before


@pytest.mark.parametrize(
    ("tensor", "constraint"), [([1.0], NonNegative()), (torch.ones(1), L1(0.1)), (torch.ones(1), "box")]
)
def test_wrong_arguments_are_refused(tensor: object, constraint: object) -> None:
    with pytest.raises(TypeError, match="attach needs"):
        attach(tensor, constraint)  # type: ignore[arg-type]
