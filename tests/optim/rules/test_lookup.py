"""A rule is found by class, and never for a stranger."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.optim import SGD, AdamW
from stableopt.optim.lion_step import PlainLion
from stableopt.optim.rules import (
    Adaptive,
    AdaptiveNesterov,
    HeavyBall,
    Rectified,
    RootMeanSquare,
    SignDescent,
    SpectralDescent,
    rule_for,
)

RULES = {
    torch.optim.SGD: HeavyBall(), torch.optim.Adam: Adaptive(), torch.optim.AdamW: Adaptive(), SGD: HeavyBall(), AdamW: Adaptive(),
    torch.optim.NAdam: AdaptiveNesterov(), torch.optim.RAdam: Rectified(), torch.optim.RMSprop: RootMeanSquare(),
    torch.optim.Muon: SpectralDescent(polar=False), PlainLion: SignDescent(),
}  # fmt: skip


@pytest.mark.parametrize("cls", RULES)
def test_a_class_and_its_subclasses_with_its_step_have_its_rule(cls: type[torch.optim.Optimizer]) -> None:
    class Renamed(cls):
        pass

    for c in (cls, Renamed):
        assert rule_for(c([nn.Parameter(torch.ones(1, 1))])) == RULES[cls]


@pytest.mark.parametrize("cls", [c for c in RULES if c not in {SGD, AdamW}])
def test_a_subclass_with_a_step_of_its_own_is_a_stranger(cls: type[torch.optim.Optimizer]) -> None:
    class Other(cls):
        def step(self, closure=None):
            return None

    assert rule_for(Other([nn.Parameter(torch.ones(1, 1))])) is None


def test_nothing_is_known_about_the_rest() -> None:
    assert rule_for(torch.optim.Rprop([nn.Parameter(torch.ones(1))])) is None
    assert rule_for(torch.optim.Adamax([nn.Parameter(torch.ones(1))])) is None
