"""The climb to the largest eigenvalue, against all eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stableopt.optim.ascent import Direction, ascend
from stableopt.optim.curvature import dot


def symmetric(seed: int, n: int) -> Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (A + A.T) / 2


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 12), st.sampled_from([0.0, 0.05, 0.3]))
def test_a_climb_ends_below_the_top_with_the_residual_that_it_says(
    seed: int, n: int, count: int, tolerance: float
) -> None:
    B, calls = symmetric(seed, n), []

    def product(u: list[Tensor]) -> list[Tensor]:
        calls.append(1)
        return [B @ u[0]]

    start = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    found = ascend(product, [start], count, 0.0, tolerance)
    assert found is not None
    eigenvalues = torch.linalg.eigvalsh(B)
    scale = float(eigenvalues.abs().max())
    assert len(calls) <= count
    assert found.value <= float(eigenvalues[-1]) + 1e-12 * scale
    assert found.value >= float(start @ B @ start / (start @ start)) - 1e-9 * scale  # it climbs
    assert found.lowest >= min(0.0, float(eigenvalues[0])) - 1e-12 * scale
    u = found.vector[0]
    assert float(u.norm()) == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(found.image[0], B @ u, rtol=1e-8, atol=1e-8 * scale)
    r = found.residual()
    assert float((eigenvalues - found.value).abs().min()) <= math.sqrt(dot(r, r)) + 1e-9 * scale
    if len(calls) < count and tolerance and n > 1:
        assert math.sqrt(dot(r, r)) <= max(tolerance, 1e-5) * abs(found.value) * (1 + 1e-9) + 1e-9 * scale


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_enough_products_reach_the_top(seed: int, n: int) -> None:
    B = symmetric(seed, n)
    found = ascend(lambda u: [B @ u[0]], [torch.ones(n, dtype=torch.float64)], 200, 0.0, 0.0)
    assert found is not None
    top = torch.linalg.eigvalsh(B)[-1]
    assert found.value == pytest.approx(float(top), abs=1e-6 * float(B.norm()))


def test_a_move_is_a_power_step_whose_largest_modulus_is_the_largest_eigenvalue() -> None:
    scale = torch.tensor([-4.0, 3.0])
    u = torch.tensor([0.6, 0.8])
    here = Direction([u], [scale * u], float(u @ (scale * u)), -4.0)
    for _ in range(40):
        here = here.moved(2)
        u = here.vector[0]
        here = Direction([u], [scale * u], float(u @ (scale * u)), -4.0)
    assert here.value == pytest.approx(3.0)
    still = Direction([torch.tensor([1.0, 0.0])], [torch.zeros(2)], 0.0, 0.0)
    assert still.moved(3).vector[0].tolist() == [1.0, 0.0]  # nowhere to go


def test_the_runner_up_of_a_climb_is_kept_and_looked_at_when_the_first_is_sure() -> None:
    B = torch.diag(torch.tensor([-1.0, 0.5, 3.0, 4.0]))
    found = ascend(lambda u: [B @ u[0]], [torch.ones(4)], 4, 0.0, 1e-9)
    assert found is not None
    assert found.second is not None
    second = found.second[0]
    assert float(second @ B @ second) == pytest.approx(3.0, rel=1e-3)
    first, other = [torch.eye(4)[2]], [torch.eye(4)[3]]  # the former first has been overtaken
    for count, value in ((1, 3.0), (2, 4.0)):
        again = ascend(lambda u: [B @ u[0]], first, count, 0.0, 0.05, other)
        assert again is not None
        assert again.value == pytest.approx(value)


def test_what_is_not_finite_or_zero_is_no_direction() -> None:
    assert ascend(lambda u: u, [torch.zeros(2)], 5, 0.0, 0.0) is None
    assert ascend(lambda u: [u[0] * math.nan], [torch.ones(2)], 5, 0.0, 0.0) is None
    assert ascend(lambda u: [u[0] * math.inf], [torch.ones(2)], 5, 0.0, 0.0) is None
