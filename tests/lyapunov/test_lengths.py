"""Norms of tensors of every kind, in order, and as numbers."""

from __future__ import annotations

import math

import pytest
import torch

from stableopt.lyapunov.lengths import has_norm, norms, read


def test_the_order_is_kept_over_dtypes_and_half_precision_does_not_overflow(device):
    tensors = [
        torch.full((4,), 300.0, dtype=torch.float16, device=device),
        torch.tensor([3.0, 4.0], dtype=torch.float64, device=device),
        torch.full((4096,), 1.0, dtype=torch.bfloat16, device=device),
        torch.tensor([3 + 4j], device=device),
        torch.tensor([1.0, 0.0], dtype=torch.float32, device=device),
    ]
    assert read(norms(tensors)) == [600.0, 5.0, 64.0, 5.0, 1.0]
    assert read(norms(tensors[:1])) == [600.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(bad):
    assert not math.isfinite(read(norms([torch.tensor([1.0, bad])]))[0])


def test_nothing_is_nothing():
    assert norms([]) == []
    assert read([]) == []


@pytest.mark.parametrize(
    ("x", "has"),
    [
        (torch.ones(1), True),
        (torch.ones(1, dtype=torch.complex64), True),
        (torch.ones(1, dtype=torch.bfloat16), True),
        (torch.ones(1).to(torch.float8_e4m3fn), False),
        (torch.ones(1, dtype=torch.int8), False),
        (torch.ones(0), False),
        (torch.ones(1, device="meta"), False),
        (torch.eye(2).to_sparse(), False),
    ],
)
def test_what_has_a_norm(x, has):
    assert has_norm(x) is has
    assert not has or math.isfinite(read(norms([x]))[0])
