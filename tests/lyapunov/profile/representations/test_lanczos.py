"""Estimates lie below the norm, and a singular value within their residual; lanes are as few as can be."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.lyapunov.profile.representations.forward import forward_profile
from stableopt.lyapunov.profile.representations.lanczos import lanes, largest_singular_values
from stableopt.lyapunov.profile.representations.survey import chain_of
from tests.lyapunov.profile.representations.opaque import OnceOnly, ReverseOnly


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7, 12])
def test_lanes_hold_every_pair_once_without_overlap_and_are_as_few_as_can_be(depth):
    found = lanes(depth)
    assert sorted(pair for lane in found for pair in lane) == [
        (k, l) for k in range(depth) for l in range(k + 1, depth + 1)
    ]
    for lane in found:
        assert all(a[1] <= b[0] for a, b in pairwise(lane))
    # over the layer in the middle pass this many pairs, and no two of them fit into one lane
    assert len(found) == max((j + 1) * (depth - j) for j in range(depth))


def test_the_residual_holds_for_a_known_spectrum():
    """J = U diag(s) V': the estimate is at most s_1, and some s_i lies within the residual of it."""
    U, V = (torch.linalg.qr(torch.randn(12, 12))[0] for _ in range(2))
    s = torch.linspace(1.0, 3.0, 12)
    layer = nn.Linear(12, 12, bias=False)
    layer.weight = nn.Parameter(U @ torch.diag(s) @ V.T)
    chain = chain_of(layer, torch.randn(3, 12))
    before = np.zeros(3)
    for iterations in (1, 2, 4, 8, 12):
        logs, residuals, _ = largest_singular_values(chain, iterations=iterations)
        estimates = np.exp(logs[:, 1, 0])
        assert (estimates <= 3.0 * (1.0 + 1e-14)).all()
        assert (estimates >= before * (1.0 - 1e-14)).all()  # each step adds a direction
        for estimate in estimates:
            assert np.abs(s.numpy() - estimate).min() <= residuals[1, 0] * estimate * (1.0 + 1e-12) + 1e-14
        before = estimates
    assert before == pytest.approx(np.full(3, 3.0), rel=1e-13)
    assert residuals[1, 0] < 1e-6


def test_a_residual_is_small_as_soon_as_the_estimate_is_good():
    s = torch.cat([torch.tensor([10.0]), torch.linspace(0.0, 2.0, 39)])
    layer = nn.Linear(40, 40, bias=False)
    layer.weight = nn.Parameter(torch.diag(s))
    logs, residuals, _ = largest_singular_values(chain_of(layer, torch.randn(1, 40)), iterations=6)
    assert logs[0, 1, 0] == pytest.approx(math.log(10.0), rel=1e-6)
    assert 1e-12 < residuals[1, 0] < 1e-3


def test_samples_have_estimates_of_their_own():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 4), nn.Tanh()), 3.0 * torch.randn(4, 3)
    exact = forward_profile(model, x).log_samples
    found, _, memory = largest_singular_values(chain_of(model, x), iterations=6)
    assert found == pytest.approx(exact, nan_ok=True, abs=1e-10)
    assert len(np.unique(exact[:, 2, 0].round(6))) == 4
    assert memory == 8 * 4 * ((3 + 5) + (5 + 4) + (3 + 4))


def test_without_forward_mode_cotangents_give_the_same():
    plain = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    model = nn.Sequential(plain[0], ReverseOnly(), plain[2], ReverseOnly(), plain[4])
    x = torch.randn(4, 3)
    expected = forward_profile(plain, x)
    for exact in (True, False):
        profile = forward_profile(model, x, exact=exact, iterations=6)
        assert (profile.mode, expected.mode) == ("reverse", "forward")
        assert profile.log_samples == pytest.approx(expected.log_samples, nan_ok=True, abs=1e-10)
    once = nn.Sequential(plain[0], OnceOnly(), plain[2], OnceOnly(), plain[4])
    assert forward_profile(once, x).log_norms == pytest.approx(expected.log_norms, nan_ok=True, abs=1e-10)
    with pytest.raises(NotImplementedError, match="second derivative"):
        forward_profile(once, x, exact=False)


def test_nothing_comes_of_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    profile = forward_profile(model, torch.randn(2, 3), exact=False)
    assert profile.norm(1, 0) == profile.norm(2, 0) == 0.0
    assert profile.norm(2, 1) > 0.0
    assert not np.isnan(profile.residuals[np.tril_indices(3)]).any()
