"""A look at a model leaves no trace, whatever happens inside."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.lyapunov.undisturbed import Snapshot, undisturbed
from tests.lyapunov.training import equal, make_model, seed_everything


def state(model):
    return {
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "objects": [id(buffer) for buffer in model.buffers()],
        "modes": [module.training for module in model.modules()],
        "random": [torch.get_rng_state(), np.random.get_state(), random.getstate()],  # noqa: NPY002
    }


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_as_before(error):
    seed_everything()
    model = make_model()
    model[2].eval()
    before = state(model)
    with contextlib.suppress(ValueError, KeyboardInterrupt), undisturbed(model):
        model.train()
        for _ in range(3):
            model(torch.randn(4, 6))
        assert not equal(before, state(model))
        if error is not None:
            raise error
    assert equal(before, state(model))


def test_batch_statistics_are_put_back_although_torch_counts_no_version():
    norm = nn.BatchNorm1d(3)
    before = state(norm)
    with undisturbed(norm):
        norm(torch.randn(5, 3))
    assert equal(before, state(norm))


def test_a_second_look_from_the_same_start_sees_the_same():
    seed_everything()
    model, x = make_model(), torch.randn(4, 6)
    start = Snapshot(model)
    with torch.no_grad():
        first = model(x)
        after = state(model)
        for _ in range(2):
            with undisturbed(model, start):
                assert torch.equal(model(x), first)
            assert equal(after, state(model))
        with undisturbed(model):
            assert not torch.equal(model(x), first)


def test_an_untouched_buffer_is_not_written():
    norm = nn.BatchNorm1d(3).eval()
    versions = [buffer._version for buffer in norm.buffers()]
    with undisturbed(norm):
        norm(torch.randn(5, 3))
    assert [buffer._version for buffer in norm.buffers()] == versions
