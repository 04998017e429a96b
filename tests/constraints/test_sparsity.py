"""Sparsity against brute force over all supports."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from stableopt.constraints.sparsity import Sparsity
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import same_bits


@pytest.mark.parametrize("metric", [None, torch.tensor([1.0, 9.0, 0.2, 4.0, 0.01], dtype=torch.float64)])
def test_no_other_support_is_nearer(metric: Any) -> None:
    weights = torch.ones(5) if metric is None else metric
    for k in range(6):
        x = torch.randn(5)
        p = Sparsity(k).project(x, metric=metric)
        cost = min(
            sum(float(weights[i] * x[i] ** 2) for i in range(5) if i not in kept)
            for kept in itertools.combinations(range(5), k)
        )
        assert float((weights * (x - p).square()).sum()) == pytest.approx(cost, rel=1e-13, abs=1e-15)
        assert int((p != 0).sum()) == min(k, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_keep_the_lowest_index_and_bits_are_kept(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -2.0, 2.0, -2.0, 2.0, -0.0], dtype=dtype)
    assert Sparsity(2).project(x).tolist() == [0.0, -2.0, 2.0, 0.0, 0.0, 0.0]
    assert Sparsity(4).project(x).tolist() == [0.0, -2.0, 2.0, -2.0, 2.0, 0.0]
    assert same_bits(Sparsity(5).project(x), x)
    assert same_bits(Sparsity(99).project(x), x)
    many = torch.ones(4000, dtype=dtype)
    assert Sparsity(3).project(many).nonzero().flatten().tolist() == [0, 1, 2]
    assert Sparsity(0).project(x).tolist() == [0.0] * 6


def test_complex_numbers_are_compared_by_modulus() -> None:
    z = torch.tensor([1 + 1j, 0.5j, -3.0, 1 - 1.5j])
    assert Sparsity(2).project(z).tolist() == [0j, 0j, -3 + 0j, 1 - 1.5j]
    assert Sparsity(2).violation(z) == 2.0


def test_the_metric_neither_overflows_nor_ties_at_tiny_sizes() -> None:
    x = torch.tensor([1e-300, 3e-300, 2e-300])
    assert Sparsity(1).project(x, metric=torch.tensor([1e-30, 1e-31, 1e-30])).tolist() == [0.0, 0.0, 2e-300]
    assert Sparsity(1).project(1e300 * x * 1e300, metric=torch.tensor([1e300, 1e290, 1e299])).nonzero().item() == 0


def test_the_derivative_selects() -> None:
    x = torch.tensor([3.0, 1.0, -2.0], requires_grad=True)
    J = torch.autograd.functional.jacobian(Sparsity(2).project, x)
    assert J.diagonal().tolist() == [1.0, 0.0, 1.0]


def test_bad_arguments_are_refused_in_a_sentence() -> None:
    for k, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError), (math.inf, ValueError), ("2", TypeError)):
        with pytest.raises(error, match="Sparsity needs"):
            Sparsity(k)  # type: ignore[arg-type]
