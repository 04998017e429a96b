"""Looks at a probe: one chain for all of them, and what goes wrong is a reason, no error of the training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.lyapunov.profile.representations import looks as module
from stableopt.lyapunov.profile.representations.looks import Look, Looks
from stableopt.lyapunov.profile.tangents.system import System
from stableopt.lyapunov.profile.training import Profile


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def profiled(probe: Any, steps: int = 12, **options: Any):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    profile = Profile(model, optimizer, directions=2, probe=probe, look_every=3, **options)
    with profile:
        for _ in range(steps):
            optimizer.zero_grad()
            profile.backward(model(x).square().mean())
            optimizer.step()
    return profile.result()


def test_a_chain_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = module.chain_of
    monkeypatch.setattr(module, "chain_of", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = net()
    system = System(torch.optim.SGD(model.parameters(), lr=0.1))
    system.begin(2, seed=0)
    looks = Looks(model, torch.ones(5, 3), system)
    for step in range(4):
        looks.take(step, 0, 2)
        with torch.no_grad():
            next(model.parameters()).mul_(0.5)
    assert len(calls) == 1
    fresh = Looks(model, torch.ones(5, 3), system)
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    fresh.take(3, 0, 2)
    for name, gram in fresh.made()[0].grams.items():
        assert np.allclose(gram, looks.made()[-1].grams[name], rtol=1e-13)


def test_another_model_behind_the_probe_gets_another_chain() -> None:
    model = net()
    system = System(torch.optim.SGD(model.parameters(), lr=0.1))
    system.begin(2, seed=0)
    looks = Looks(model, torch.ones(5, 3), system)
    looks.take(0, 0, 2)
    model[1] = nn.Sequential(nn.Tanh(), nn.Identity(), nn.Tanh())
    looks.take(1, 0, 2)
    assert [look.reason for look in looks.made()] == ["", ""]
    assert len(looks.made()[1].grams) > 0


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, ZeroDivisionError])
@pytest.mark.parametrize("failing", [{0}, {2}, {0, 1, 2, 3, 4}])
def test_a_probe_that_fails_now_and_then_is_a_reason(error: type[Exception], failing: set[int], tmp_path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    now = [0]

    def probe() -> None:
        if now[0] in failing:
            raise error("not today")
        model(x)

    with Profile(model, optimizer, tmp_path, directions=2, probe=probe, look_every=3) as profile:
        for step in range(12):
            now[0] = (step + 1) // 3
            optimizer.zero_grad()
            profile.backward(model(x).square().mean())
            optimizer.step()
    reading = profile.result()
    good = 5 - len(failing)
    assert [bool(look.grams) for look in reading.looks] == [i not in failing for i in range(5)]
    assert ["not today" in look.reason for look in reading.looks] == [i in failing for i in range(5)]
    steps, layers = reading.mixed
    assert len(steps) == good
    assert list(layers) == (["0", "2"] if good else [])
    assert all(np.isfinite(norms).all() and len(norms) == good for norms in layers.values())
    assert (reading.gains is None) == (good < 2)


@pytest.mark.parametrize("row", [math.nan, math.inf])
def test_a_probe_that_is_not_finite_is_no_traceback(row: float, tmp_path) -> None:
    probe = torch.ones(4, 3)
    probe[1] = row
    reading = profiled(probe, run_dir=tmp_path)
    _, layers = reading.mixed
    assert all(np.isnan(norms).all() for norms in layers.values())
    assert reading.gains is None
    assert (tmp_path / "profile.json").is_file()


@pytest.mark.parametrize(
    ("grams", "theta", "gain"),
    [
        ({}, np.eye(2), math.nan),
        ({"0": np.full((2, 2), np.nan)}, np.eye(2), math.nan),
        ({"0": np.eye(2)}, np.full((2, 2), np.inf), math.nan),
        ({"0": np.eye(2)}, np.zeros((2, 2)), math.nan),
        ({"0": np.eye(2), "1": 4 * np.eye(2)}, np.eye(2), 2.0),
        ({"0": np.diag([1.0, 0.0])}, np.diag([4.0, 0.0]), 0.5),
    ],
)
def test_a_gain_is_that_of_the_last_layer_or_unknown(grams, theta, gain: float) -> None:
    assert Look(0, 0, None, grams, theta).gain == pytest.approx(gain, nan_ok=True)
