"""Levels of soft thresholds: both algorithms, a Fraction oracle, hard data, derivatives."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stableopt.constraints.layout import Vectors
from stableopt.constraints.threshold import at_hand, capped_level, level_by_newton, level_by_sorting, soft_level


def oracle(t: list[float], q: list[float], target: float) -> list[Fraction]:
    """Return what is above the level in exact arithmetic: try the k largest entries, for every k."""
    numbers, weights, goal = [Fraction(a) for a in t], [Fraction(a) for a in q], Fraction(target)
    best = max(
        (sum((w * a for a, w in top), Fraction(0)) - goal) / sum((w for _, w in top), Fraction(0))
        for k in range(1, len(t) + 1)
        for top in [sorted(zip(numbers, weights, strict=True), reverse=True)[:k]]
    )
    return [max(a - best, Fraction(0)) for a in numbers]


def check(t: Tensor, q: Tensor | None, target: float, slack: float = 1e-13) -> None:
    v = Vectors("", t, 1)
    ones = [1.0] * t.shape[1]
    level = soft_level(v, t, q, target)
    for row, above in zip(t.tolist(), level.above.tolist(), strict=True):
        weights = ones if q is None else q.flatten().tolist()
        wanted = oracle(row, weights, target)
        scale = max(wanted)
        assert all(abs(Fraction(a) - b) <= slack * scale for a, b in zip(above, wanted, strict=True))


sizes = st.integers(1, 12)


@given(
    n=sizes,
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    target=st.sampled_from([1e-6, 0.3, 7.0]),
)
def test_the_level_agrees_with_exact_arithmetic(n: int, seed: int, scale: float, target: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = scale * torch.randn(2, n, generator=generator)
    check(t, None, target)
    check(t, 0.1 + 3 * torch.rand(1, n, generator=generator), target)


def hard_rows() -> list[Tensor]:
    steps, noise = torch.arange(60, dtype=torch.float64), torch.linspace(-25, 25, 60, dtype=torch.float64)
    one = torch.ones(60, dtype=torch.float64)
    return [
        2.0**-steps, -(2.0**steps), 1.7**-steps, 0 * one, one, torch.cat((one[:30], steps[:30])),
        1.0 / (1.0 + steps), -(steps**5), noise.exp(), -noise.exp(), steps.sqrt(),
    ]  # fmt: skip


@pytest.mark.parametrize("row", hard_rows())
@pytest.mark.parametrize("target", [1e-12, 1e-3, 1.0, 1e3])
def test_newton_and_sorting_find_the_same_level_on_hard_data(row: Tensor, target: float) -> None:
    b = ((row - row.max()) / target).clamp_min(-1.0)[None]
    v = Vectors("", b, 1)
    assert float(level_by_newton(v, b, None)) == pytest.approx(float(level_by_sorting(b, None)), rel=0, abs=4e-15)
    q = torch.linspace(0.5, 2.0, 60)[None] / float(torch.linspace(0.5, 2.0, 60)[row == row.max()].max())
    assert float(level_by_newton(v, b, q)) == pytest.approx(float(level_by_sorting(b, q)), rel=0, abs=4e-15)
    check(row[None], None, target)


@pytest.mark.parametrize("n", [4096, 4097, 20_000])
@pytest.mark.parametrize("target", [1e-3, 1.0, 1e2, 1e6])
def test_newton_and_sorting_agree_on_long_vectors_that_are_sampled(n: int, target: float) -> None:
    for t in (torch.randn(1, n), torch.linspace(0, 1, n)[None] ** 8, torch.randn(3, n)):
        for q in (None, 0.5 + torch.rand(1, n)):
            v = Vectors("", t, 1)
            top, heavy = t.max(1, keepdim=True).values, 1.0 if q is None else q[0, t.argmax(1)][:, None]
            b = ((t - top) * heavy / target).clamp_min(-1.0)
            weights = None if q is None else (q / heavy).expand(t.shape)
            torch.testing.assert_close(level_by_newton(v, b, weights), level_by_sorting(b, weights), rtol=0, atol=1e-14)


def test_newton_stops_within_its_passes_on_a_sample_that_misses_every_large_entry() -> None:
    t = torch.zeros(1, 10_000)
    t[0, 1], t[0, 3] = 5.0, 4.5
    level = soft_level(Vectors("", t, 1), t, None, 1.0)
    assert float(level.theta) == pytest.approx(4.25, abs=1e-14)
    assert int((level.above > 0).sum()) == 2


def test_a_large_common_part_costs_no_accuracy() -> None:
    t = 2.0**40 + torch.tensor([[0.5, 0.25, 0.0, -1.0]])
    above = soft_level(Vectors("", t, 1), t, None, 0.5).above
    torch.testing.assert_close(above, torch.tensor([[0.375, 0.125, 0.0, 0.0]]), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-300, 1e300, 1.7e308])
def test_huge_and_tiny_numbers_do_not_overflow(size: float) -> None:
    t = size * torch.tensor([[1.0, -1.0, 0.99]])
    for target in (1e-290, 1.0, 1e290):
        above = soft_level(Vectors("", t, 1), t, None, target).above
        assert above.isfinite().all()
        assert float(above.sum()) == pytest.approx(target, rel=1e-12)


def test_a_target_of_zero_leaves_nothing_and_has_no_derivative() -> None:
    t = torch.randn(1, 5, requires_grad=True)
    level = soft_level(Vectors("", t, 1), t, None, 0.0)
    assert not level.above.any()
    assert float(level.theta.detach()) == float(t.detach().max())
    assert not torch.autograd.grad(level.above.sum(), t)[0].any()


def test_rows_have_their_own_targets_and_empty_rows_pass() -> None:
    t = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    level = soft_level(Vectors("", t, 1), t, None, torch.tensor([[1.0], [4.0]]))
    torch.testing.assert_close(level.theta, torch.tensor([[2.0], [0.0]]))
    nothing = torch.zeros(2, 0)
    assert soft_level(Vectors("", nothing, 1), nothing, None, 1.0).above.shape == (2, 0)
    assert level_by_sorting(nothing, None).shape == (2, 1)


def test_the_derivative_is_that_of_finite_differences() -> None:
    t, q = torch.randn(2, 7), 0.5 + torch.rand(1, 7)
    v = Vectors("", t, 1)
    for weights in (None, q):
        assert torch.autograd.gradcheck(lambda a: soft_level(v, a, weights, 1.3).above, t.clone().requires_grad_())  # noqa: B023
        assert torch.autograd.gradcheck(lambda a: soft_level(v, a, weights, 1.3).theta, t.clone().requires_grad_())  # noqa: B023
    assert torch.autograd.gradcheck(lambda a: capped_level(v, a, 0.5, 1.3, 3).values, t.clone().requires_grad_())


def test_mapping_over_a_batch_takes_the_sorted_way_and_gives_the_same() -> None:
    t = torch.randn(5, 9)
    seen = []

    def one(row: Tensor) -> Tensor:
        seen.append(at_hand(row))
        return soft_level(Vectors("", row, None), row[None], None, 1.0).above[0]

    mapped = torch.func.vmap(one)(t)
    assert seen == [False]
    torch.testing.assert_close(mapped, soft_level(Vectors("", t, 1), t, None, 1.0).above, rtol=1e-13, atol=1e-14)


def capped_oracle(t: list[float], cap: float, total: float) -> list[Fraction]:
    """Return the clipped entries in exact arithmetic: the sum is linear between the breakpoints, so try every piece."""
    numbers, c, goal = [Fraction(a) for a in t], Fraction(cap), Fraction(total)

    def clipped(theta: Fraction) -> list[Fraction]:
        return [min(max(a - theta, Fraction(0)), c) for a in numbers]

    breaks = sorted({a - s for a in numbers for s in (Fraction(0), c)})
    for low, high in itertools.pairwise(breaks):
        at_low, at_high = sum(clipped(low), Fraction(0)), sum(clipped(high), Fraction(0))
        if at_high <= goal <= at_low:
            part = Fraction(0) if at_low == at_high else (at_low - goal) / (at_low - at_high)
            return clipped(low + part * (high - low))
    raise AssertionError("no piece reaches the total")


@given(n=sizes, seed=st.integers(0, 10**6), cap=st.sampled_from([0.01, 0.5, 3.0, 100.0]), part=st.floats(0.01, 1.0))
def test_the_capped_level_agrees_with_exact_arithmetic(n: int, seed: int, cap: float, part: float) -> None:
    t = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    total = part * n * cap
    count = min(math.ceil(Fraction(total) / Fraction(cap)), n)
    result = capped_level(Vectors("", t, 1), t, cap, total, count)
    for row, values in zip(t.tolist(), result.values.tolist(), strict=True):
        wanted = capped_oracle(row, cap, min(total, n * cap))
        assert all(abs(Fraction(a) - b) <= 1e-13 * max(1.0, cap) for a, b in zip(values, wanted, strict=True))


@pytest.mark.parametrize("weight", [1e-6, 1e-12, 1e-30])
def test_a_largest_entry_of_little_weight_does_not_blur_the_level(weight: float) -> None:
    t = torch.tensor([[1e6, 1.0, 1.0 - 1e-7, 0.5, 0.5 - 1e-7, -3.0]])
    q = torch.tensor([[weight, 1.0, 0.7, 1.0, 1.0, 1.0]])
    for target in (0.2, 0.75, 5.0):
        above = soft_level(Vectors("", t, 1), t, q, target).above[0].tolist()
        wanted = oracle(t[0].tolist(), q[0].tolist(), target)
        assert all(abs(Fraction(a) - b) <= 1e-12 * max(1, b) for a, b in zip(above, wanted, strict=True))
