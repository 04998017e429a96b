"""The largest learning rate is the inverse of the limit, to the last bit; norms and views are what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableopt.optim.lion_step import PlainLion
from stableopt.optim.rules import (
    Adaptive,
    AdaptiveNesterov,
    HeavyBall,
    Rectified,
    RootMeanSquare,
    SignDescent,
    UpdateRule,
    weighted_square,
)
from stableopt.optim.rules.base import real_view, unviewed
from tests.optim.rules.laws import group_of

CASES: list[tuple[UpdateRule, dict[str, Any]]] = [
    (HeavyBall(), group_of(torch.optim.SGD, momentum=0.9)),
    (HeavyBall(), group_of(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.3)),
    (HeavyBall(), group_of(torch.optim.SGD, momentum=0.5, dampening=0.25, weight_decay=2.0)),
    (Adaptive(), group_of(torch.optim.AdamW, weight_decay=0.2)),
    (Adaptive(), group_of(torch.optim.Adam, weight_decay=0.2)),
    (Rectified(), group_of(torch.optim.RAdam)),
    (AdaptiveNesterov(), group_of(torch.optim.NAdam, weight_decay=0.1, decoupled_weight_decay=True)),
    (RootMeanSquare(), group_of(torch.optim.RMSprop, momentum=0.7)),
]


@pytest.mark.parametrize(("rule", "group"), CASES)
@given(sharpness=st.floats(1e-6, 1e6), fraction=st.floats(0.01, 1.0))
def test_the_largest_learning_rate_is_the_last_one_that_bears_the_sharpness(
    rule: UpdateRule, group: dict[str, Any], sharpness: float, fraction: float
) -> None:
    lr = rule.max_lr(sharpness, group, fraction)
    assert sharpness <= fraction * rule.limit(group | {"lr": lr})
    assert sharpness > fraction * rule.limit(group | {"lr": math.nextafter(lr, math.inf)})
    assert rule.max_lr(sharpness, group | {"lr": 77.0}, fraction) == lr


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_largest_learning_rate_has_its_closed_form(fraction: float) -> None:
    """SGD: A f/(λ + fω); AdamW: 2Bf/(λ + fBω), B = (1+β)/(1−β)."""
    sgd = group_of(torch.optim.SGD, momentum=0.5, weight_decay=2.0)
    assert HeavyBall().max_lr(3.0, sgd, fraction) == pytest.approx(3 * fraction / (3 + 2 * fraction), rel=1e-14)
    adamw = group_of(torch.optim.AdamW, betas=(0.5, 0.9), weight_decay=2.0)
    assert Adaptive().max_lr(3.0, adamw, fraction) == pytest.approx(6 * fraction / (3 + 6 * fraction), rel=1e-14)


def test_without_curvature_every_learning_rate_is_borne_unless_decay_has_a_limit_of_its_own() -> None:
    plain, decayed = (group_of(torch.optim.SGD, weight_decay=w) for w in (0.0, 0.5))
    assert HeavyBall().max_lr(0.0, plain) == HeavyBall().max_lr(-1.0, plain) == math.inf
    assert HeavyBall().max_lr(0.0, decayed) == pytest.approx(4.0)
    assert HeavyBall().max_lr(-0.25, decayed) == pytest.approx(8.0)
    assert HeavyBall().max_lr(-0.5, decayed) == math.inf
    assert HeavyBall().max_lr(1.0, group_of(torch.optim.SGD, momentum=1.5)) == 0.0


def test_a_sharpness_is_a_number_and_a_normalized_step_has_no_limit() -> None:
    group = group_of(torch.optim.SGD)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="sharpness"):
            HeavyBall().max_lr(bad, group)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            HeavyBall().max_lr(1.0, group, bad)
    with pytest.raises(ValueError, match="normalized"):
        SignDescent().max_lr(1.0, group_of(PlainLion))


def test_a_weighted_square_weighs_each_part() -> None:
    x = torch.tensor([1 + 2j, 3 - 1j])
    assert weighted_square(x, 2.0).item() == pytest.approx(30.0)
    assert weighted_square(x, torch.tensor([1.0, 0.5])).item() == pytest.approx(10.0)
    assert weighted_square(x, torch.tensor([[1.0, 2.0], [3.0, 4.0]])).item() == 1 + 8 + 27 + 4
    assert torch.equal(unviewed(real_view(x), x), x)
    assert real_view(x).data_ptr() == x.data_ptr()


def test_a_rule_takes_everything_and_knows_no_invariant_unless_it_says_so() -> None:
    assert HeavyBall().norm_limit(group_of(torch.optim.SGD, weight_decay=0.1), (2, 2)) is None
