"""The small gain of a reading: what is known only from below excludes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.growth.gains import CoupledGains
from stableopt.lyapunov.profile.reading import ProfileReading
from stableopt.lyapunov.profile.representations.depth import ForwardProfile
from stableopt.lyapunov.profile.representations.forward import forward_profile
from stableopt.lyapunov.profile.representations.looks import Look


def forward(size: float = 0.5, *, exact: bool = True) -> ForwardProfile:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(size)
    return forward_profile(model, torch.ones(1, 1), exact=exact)


def reading(
    sizes, steps=None, *, dimension=1, look=(True, "forward"), looks=(0, -1), backend="graph"
) -> ProfileReading:
    R = np.asarray(sizes, dtype=np.float64)[:, None, None]
    factors = Factors(R, np.arange(len(R) + 1) if steps is None else np.asarray(steps), dimension=dimension)
    made = [
        Look(int(factors.steps[j]), 0, forward(exact=look[0]), {"0": np.eye(1)}, np.eye(1), how=look[1]) for j in looks
    ]
    return ProfileReading((factors,), (np.ones((len(R) + 1, 1, 1)),), looks=tuple(made), backend=backend)


def gains(*args, **options) -> CoupledGains:
    found = reading(*args, **options).gains
    assert found is not None
    return found


def test_steps_seen_one_by_one_in_all_directions_decide() -> None:
    assert gains([0.4, 0.6]).verdict == "triangular"
    assert gains([4.0, 0.1]).verdict == "fails"


def test_factors_of_several_steps_hide_their_largest_step() -> None:
    # true steps alternate 4 and 0.1: over two of them the geometric mean is 0.63
    found = gains([0.4, 0.4], [0, 2, 4])
    assert found.matrix[1, 1] == pytest.approx(0.4**0.5)
    assert found.verdict == "not excluded"
    assert not found.contracts
    assert gains([16.0, 16.0], [0, 2, 4]).verdict == "fails"  # the mean expands, so some step does


@pytest.mark.parametrize(
    "options",
    [{"dimension": 2}, {"backend": "difference"}, {"look": (False, "forward")}, {"look": (True, "difference")}],
)
def test_what_is_estimated_from_below_excludes_nothing(options) -> None:
    assert gains([0.4, 0.6]).verdict == "triangular"
    assert gains([0.4, 0.6], **options).verdict == "not excluded"
    assert gains([0.4, 1.0], **options).verdict == "fails"


def test_two_looks_at_one_step_are_one() -> None:
    assert gains([0.4, 0.6], looks=(0, 1, 2, 2)).d.tolist() == [0.4, 0.6]
    assert reading([0.4, 0.6], looks=(2, 2)).gains is None


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_sizes_at_the_ends_of_the_floats_are_no_traceback(size: float) -> None:
    assert gains([size, size]).verdict == ("fails" if size > 1 else "triangular")
