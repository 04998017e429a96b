"""The edge of NAdam is attained in its metric at every time, for which its momentum matters."""

from __future__ import annotations

import pytest
import torch

from stableopt.optim.rules import AdaptiveNesterov
from stableopt.theory import nadam_edge
from tests.optim.rules.laws import group_of, growth_at


@pytest.mark.parametrize(("omega", "decoupled"), [(0.0, False), (0.5, False), (0.5, True)])
@pytest.mark.parametrize("decay", [0.0, pytest.param(4e-3, marks=pytest.mark.slow), 0.5])
@pytest.mark.parametrize(("t", "product"), [(1.0, 0.4), pytest.param(20.0, 1e-3, marks=pytest.mark.slow), (1e9, 0.0)])
def test_the_edge_of_the_real_optimizer_is_the_limit_in_the_metric_of_each_step(
    t: float, product: float, decay: float, omega: float, decoupled: bool
) -> None:
    options = {
        "lr": 0.1, "betas": (0.8, 1 - 1e-12), "eps": 1e-3, "weight_decay": omega, "decoupled_weight_decay": decoupled,
        "momentum_decay": decay,
    }  # fmt: skip
    frozen = {"step": torch.tensor(t), "exp_avg_sq": torch.full((1,), 1.0), "mu_product": torch.tensor(product)}
    for factor, grows in ((0.995, False), (1.005, True)):
        assert (growth_at(torch.optim.NAdam, options, AdaptiveNesterov(), frozen, factor) > 0) == grows


def test_the_limit_is_that_of_the_theory_and_the_metric_adams_in_the_end() -> None:
    v = torch.tensor([1.0, 4.0])
    state = {"step": torch.tensor(1e9), "exp_avg_sq": v, "mu_product": torch.tensor(0.0)}
    for decay in (0.0, 4e-3):
        group = group_of(torch.optim.NAdam, lr=0.3, betas=(0.9, 0.99), eps=0.5, momentum_decay=decay)
        torch.testing.assert_close(AdaptiveNesterov().metric(state, group), v.sqrt() + 0.5, rtol=1e-9, atol=0.0)
    assert AdaptiveNesterov().limit(group) * 0.3 == pytest.approx(nadam_edge(1.0, 0.9), rel=1e-12)


def test_young_momentum_makes_the_limit_four_times_smaller() -> None:
    """On the scale of sqrt(v) + eps the first thousand steps bear a quarter of what the limit of the theory says."""
    group = group_of(torch.optim.NAdam, betas=(0.9, 0.999), eps=0.0)
    state = {
        "step": torch.tensor(10.0),
        "exp_avg_sq": torch.ones(1) * (1 - 0.999**10),
        "mu_product": torch.tensor(1e-4),
    }
    assert 0.24 < float(AdaptiveNesterov().metric(state, group)) < 0.28
