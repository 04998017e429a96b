"""Normalized steps have an invariant, attained in the limit, and leave no energy of the momentum to judge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from stableopt.optim.lion_step import PlainLion
from stableopt.optim.orthogonalize import muon_step
from stableopt.optim.rules import SignDescent, SpectralDescent, step_sums
from tests.optim.rules.laws import group_of


@pytest.mark.parametrize("part", [0.01, 0.5, 1.0])
def test_lion_stays_within_its_norm_limit_and_reaches_it(part: float) -> None:
    omega = 0.5
    w = nn.Parameter(torch.zeros(3))
    optimizer = PlainLion([w], lr=part / omega, weight_decay=omega)
    limit = SignDescent().norm_limit(optimizer.param_groups[0], (3,))
    assert limit == pytest.approx(2.0, rel=1e-14)
    for step in range(1000):
        w.grad = -torch.ones(3) if step > 300 else torch.randn(3)
        optimizer.step()
        assert float(w.detach().abs().max()) <= limit * (1 + 1e-14)
    assert float(w.detach().max()) == pytest.approx(limit, rel=1e-2)


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_muon_stays_within_its_norm_limit_and_comes_near_it(adjust: str | None, shape: tuple[int, int]) -> None:
    rule, omega = SpectralDescent(), 0.5
    group = {"lr": 0.1, "weight_decay": omega, "momentum": 0.9, "nesterov": True, "adjust_lr_fn": adjust, "ns_steps": 5}
    limit = rule.norm_limit(group, shape)
    a = math.sqrt(8 / 3) if adjust is None and shape == (8, 3) else 1.0 if adjust is None else 0.2 * math.sqrt(8)
    assert limit == pytest.approx(2 * a, rel=1e-14)
    w, buffer, target = torch.zeros(shape), torch.zeros(shape), torch.randn(shape)
    for step in range(400):
        gradient = torch.randn(shape) if step < 100 else target
        muon_step(
            [w], [gradient], [buffer], lr=0.1, weight_decay=omega, momentum=0.9, nesterov=True, adjust_lr_fn=adjust
        )
        assert float(torch.linalg.matrix_norm(w, 2)) <= limit * (1 + 1e-13)
    assert float(torch.linalg.matrix_norm(w, 2)) > 0.8 * limit


def test_our_muon_step_is_the_update_of_its_rule() -> None:
    rule = SpectralDescent()
    group: dict[str, Any] = {
        "lr": 0.1,
        "weight_decay": 0.2,
        "momentum": 0.8,
        "nesterov": True,
        "ns_steps": 6,
        "adjust_lr_fn": None,
    }
    value, state = torch.randn(6, 4), {}
    w, buffer = value.clone(), torch.zeros(6, 4)
    for _ in range(5):
        gradient = torch.randn(6, 4)
        value, state = rule.update(value, gradient, state, group)
        muon_step([w], [gradient], [buffer], lr=0.1, weight_decay=0.2, momentum=0.8, nesterov=True, ns_steps=6)
    torch.testing.assert_close(value, w, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("cls", "rule"), [(PlainLion, SignDescent()), (torch.optim.Muon, SpectralDescent())])
def test_there_is_no_invariant_without_decay_or_beyond_a_step_that_turns_round(cls: type, rule: SignDescent) -> None:
    assert rule.norm_limit(group_of(cls, weight_decay=0.0), (1, 1)) is None
    assert rule.norm_limit(group_of(cls, lr=2.0, weight_decay=0.51), (1, 1)) is None
    assert rule.norm_limit(group_of(cls, lr=2.0, weight_decay=0.5), (1, 1)) >= 2.0
    with pytest.raises(ValueError, match="normalized"):
        rule.limit(group_of(cls))


def test_torchs_muon_has_no_proved_invariant() -> None:
    assert SpectralDescent(polar=False).norm_limit(group_of(torch.optim.Muon), (1, 1)) is None


def test_only_loss_and_regularizer_are_judged() -> None:
    group = group_of(PlainLion, weight_decay=0.5)
    value, state = SignDescent().update(torch.ones(3), torch.ones(3), {}, group)
    sums = [float(x) for x in step_sums(SignDescent(), group, torch.ones(3), None, value, state)]
    assert sums[:4] == [0.0] * 4
    assert sums[4] > 0
    before = state["exp_avg"].clone()
    SignDescent().realign(torch.ones(3), state, 0.0, group)
    assert torch.equal(state["exp_avg"], before)
