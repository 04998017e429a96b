"""The compiled passes of the total variation prox are those in Python, bit for bit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from stableopt.constraints.native import compiled
from stableopt.constraints.tv import TV1D, _looped
from stableopt.constraints.tv_loop import compiled_passes

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@needs_compiler
def test_compiled_and_interpreted_passes_agree_in_every_bit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1500):
        batch, n = rng.integers(1, 4), rng.integers(1, 40)
        values = [
            rng.normal(size=(batch, n)) * 10.0 ** rng.integers(-8, 4),
            rng.integers(-2, 3, size=(batch, n)).astype(float),
            rng.normal(size=(batch, n)).cumsum(axis=1),
        ][rng.integers(0, 3)]
        metric = np.exp(rng.normal(size=(batch, n)) * rng.choice([0.0, 0.1, 3.0]))
        tube = 10.0 ** rng.uniform(-6, 3, size=(batch, 1))
        found, wanted = compiled_passes(values, metric, tube), _looped(values, metric, tube)
        assert found is not None
        assert found[0].tolist() == wanted[0].tolist()
        assert found[1].tolist() == wanted[1].tolist()


@needs_compiler
def test_nothing_in_a_result_tells_which_loop_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 500).cumsum(1)
    fast = TV1D(2.0).prox(x)
    monkeypatch.setenv("STABLEOPT_NATIVE", "0")
    compiled.cache_clear()
    assert compiled_passes(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 1))) is None
    assert torch.equal(TV1D(2.0).prox(x), fast)
    compiled.cache_clear()
