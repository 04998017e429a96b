"""Tangents of one update map: the same numbers as the optimizer's step, and the derivative of just that step."""

from __future__ import annotations

import torch

from stableopt.lyapunov.profile.push import push
from stableopt.optim.rules import Adaptive


def test_a_zero_gradient_gives_the_derivative_of_the_limit() -> None:
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    w, g, one = torch.ones(1), torch.zeros(1), torch.ones(1, 1)
    pushed = push(Adaptive(), group, w, g, {}, 0 * one, one, {})
    torch.testing.assert_close(pushed.d_parameter, torch.full((1, 1), -0.1 / 1e-8), rtol=1e-14, atol=0)
    assert torch.equal(pushed.d_state["exp_avg_sq"], torch.zeros(1, 1))
