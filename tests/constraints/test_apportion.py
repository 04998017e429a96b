"""Rounding with an exact sum: every promise of the module, in Fractions, on rows of every kind."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import stableopt.constraints.apportion as module
from stableopt.constraints.apportion import apportion, exactly_sums_to, grid_of
from stableopt.constraints.rounding import round_down_to
from tests.constraints.oracle import same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rows(kind: int, n: int, seed: int = 0) -> Tensor:
    """Return four rows of nonnegative numbers of one kind, not normalized."""
    generator = torch.Generator().manual_seed(seed)
    noise, steps = torch.rand(4, n, generator=generator), torch.arange(n, dtype=torch.float64)
    lone = torch.full((4, n), 1e-4)
    lone[:, n // 2] = n
    made = [
        noise, (60 * noise - 30).exp(), (300 * noise).exp2(), torch.ones(4, n), (noise - 0.7).clamp_min(0) + (steps == 0),
        lone, (-steps).exp2().expand(4, n), (0.5 + noise).flip(1).cumsum(1) ** 3, (40 * noise).round().exp2(),
    ]  # fmt: skip
    return made[kind]


def exact(row: Tensor) -> list[Fraction]:
    return [Fraction(a) for a in row.double().tolist()]


def normalized(t: Tensor, total: float) -> Tensor:
    return t / t.sum(1, keepdim=True) * total


@each_dtype
@pytest.mark.parametrize("kind", range(9))
def test_the_sum_is_exact_and_nothing_is_negative(dtype: torch.dtype, kind: int) -> None:
    for n in (1, 2, 3, 7, 40, 500):
        for wanted in (1.0, 0.7, 3e-5, 1e4):
            total = round_down_to(wanted, dtype)
            t = normalized(rows(kind, n), total)
            p = apportion(t, total, dtype)
            assert p.dtype == dtype
            for row in p:
                assert sum(exact(row), Fraction(0)) == Fraction(total), (n, total)
                assert min(exact(row)) >= 0
            assert not p[t == 0].any()
            assert exactly_sums_to(p, total).all()
            assert same_bits(apportion(p.double(), total, dtype), p)


@each_dtype
@pytest.mark.parametrize("kind", range(9))
def test_entries_move_by_little(dtype: torch.dtype, kind: int) -> None:
    """By two units of their own class, a share of one unit of the largest entry, and the grid."""
    eps = torch.finfo(dtype).eps
    for n in (2, 7, 40, 500):
        t = normalized(rows(kind, n), 1.0)
        moved = (apportion(t, 1.0, dtype).double() - t).abs()
        top, grid = t.amax(1, keepdim=True), 2.0 ** grid_of(1.0, dtype)[0]
        assert (moved <= 2 * eps * t + eps * top + 4 * grid).all()


def test_small_entries_beside_one_large_entry_share_what_is_taken_from_them() -> None:
    t = torch.full((1, 1001), 5e-4)
    t[0, 500] = 0.5
    p = apportion(normalized(t, 1.0), 1.0, torch.bfloat16).double()
    others = torch.cat((p[0, :500], p[0, 501:]))
    assert float(others.min()) > 4.9e-4
    assert float(others.max()) < 5.1e-4


@each_dtype
def test_what_is_exact_already_keeps_its_bits(dtype: torch.dtype) -> None:
    for row in ([0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.75, 0.125, 0.125], [0.5 + 2.0**-6, 0.5 - 2.0**-6, 0.0]):
        t = torch.tensor([row])
        assert torch.equal(apportion(t, 1.0, dtype).double(), t)


@given(
    n=st.integers(2, 60),
    seed=st.integers(0, 10**6),
    cap=st.sampled_from([0.5, 0.3, 0.05, 1.0 / 60]),
    dtype=st.sampled_from(DTYPES),
    part=st.floats(0.1, 1.0),
)
def test_a_cap_is_respected_and_the_sum_stays_exact(
    n: int, seed: int, cap: float, dtype: torch.dtype, part: float
) -> None:
    high = round_down_to(cap, dtype)
    total = round_down_to(part * n * high, dtype)
    t = torch.rand(1, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    for _ in range(200):  # water filling: raise and clip until the sum fits
        t = (t * (total / t.sum())).clamp_max(high)
    t = t + (high - t) * ((total - t.sum()) / (high * n - t.sum()).clamp_min(1e-300)).clamp(0.0, 1.0)
    p = apportion(t, total, dtype, high)[0]
    assert sum(exact(p), Fraction(0)) == Fraction(total)
    assert min(exact(p)) >= 0
    assert max(exact(p)) <= Fraction(high)
    grid = 2.0**-24 if dtype == torch.float16 else 0.0
    assert float((p.double() - t[0]).abs().max()) <= 3 * torch.finfo(dtype).eps * high + 1e-15 * total + grid


def test_every_entry_at_the_cap_is_found_exactly() -> None:
    for dtype in DTYPES:
        p = apportion(torch.full((1, 8), 0.125 * (1 - 1e-12)), 1.0, dtype, 0.125)
        assert torch.equal(p, torch.full((1, 8), 0.125, dtype=dtype))


@each_dtype
def test_extreme_totals_are_exact(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    for total in (least, 3 * least, 64 * least, info.smallest_normal, info.max, info.max / 4):
        for kind in (0, 1, 3):
            p = apportion(normalized(rows(kind, 5), 1.0) * total, total, dtype)
            assert all(sum(exact(row), Fraction(0)) == Fraction(total) for row in p)


@each_dtype
def test_a_sum_that_is_off_by_one_bit_is_not_accepted(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    good = torch.tensor([[0.5, 0.25, 0.25]], dtype=dtype)
    assert exactly_sums_to(good, 1.0).item()
    for wrong in (0.25 * (1 + info.eps), 0.25 * (1 - info.eps / 2), -0.25, math.nan, math.inf, 0.0, 1.25):
        bad = good.clone()
        bad[0, 2] = wrong
        assert not exactly_sums_to(bad, 1.0).item()
    balanced = torch.tensor([[1.25, -0.25]], dtype=dtype)
    assert not exactly_sums_to(balanced, 1.0).item()


def test_integers_that_wrap_around_are_not_accepted() -> None:
    exponent, R = grid_of(1.0, torch.float64)
    assert (exponent, R) == (-60, 2**60)
    turn = 2**64 // R
    assert not exactly_sums_to(torch.ones(1, turn + 1), 1.0).item()  # 17 R = R modulo 2^64


def test_bits_below_the_grid_are_not_proved() -> None:
    tiny = 2.0**-62
    row = torch.tensor([[1.0 - 2.0**-53, 2.0**-53 - tiny, tiny]])
    assert sum(exact(row[0]), Fraction(0)) == 1
    assert not exactly_sums_to(row, 1.0).item()


def test_the_way_through_torch_alone_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in DTYPES:
        sparse = normalized((torch.rand(1, 300) - 0.7).clamp_min(0), 1.0)
        here = apportion(sparse, 1.0, dtype)
        with monkeypatch.context() as patch:
            patch.setattr("stableopt.constraints.apportion.at_hand", lambda t: False)
            assert same_bits(apportion(sparse, 1.0, dtype), here)


def test_rows_that_are_not_numbers_do_no_harm() -> None:
    t = torch.tensor([[math.nan, 0.5], [math.inf, math.inf], [0.5, 0.5], [0.0, 0.0]])
    for dtype in DTYPES:
        assert torch.equal(apportion(t, 1.0, dtype)[2], torch.tensor([0.5, 0.5], dtype=dtype))


@pytest.mark.slow
def test_a_million_entries_are_exact() -> None:
    t = normalized(torch.randn(1, 1_000_000).exp(), 1.0)
    for dtype in DTYPES:
        p = apportion(t, 1.0, dtype)
        assert sum(exact(p[0]), Fraction(0)) == 1


def test_where_units_run_out_the_general_steps_take_over() -> None:
    """One large entry of bfloat16 cannot make up for what small ones miss."""
    t = torch.tensor([[0.9, 0.1 - 2.0**-12, 2.0**-12], [1 / 3, 1 / 3, 1 / 3]])
    _, exact = module._corrected(t, *grid_of(1.0, torch.bfloat16), 8, torch.bfloat16)
    assert not exact.all()
    p = apportion(t, 1.0, torch.bfloat16)
    assert exactly_sums_to(p, 1.0).all()
    assert (p.double() - t).abs().max() < 2.0**-7


def test_the_simple_correction_moves_an_entry_by_one_unit_at_most() -> None:
    t = torch.rand(5, 4000)
    t = t / t.sum(dim=1, keepdim=True)
    for dtype, digits in ((torch.float32, 24), (torch.float16, 11), (torch.float64, 53)):
        _, exact = module._corrected(t, *grid_of(1.0, dtype), digits, dtype)
        assert exact.all()
        p = apportion(t, 1.0, dtype).double()
        unit = 2.0 ** (t.log2().floor() + 1 - digits).clamp_min(grid_of(1.0, dtype)[0])
        off = (p - t).abs() > 2.0 * unit
        assert off.sum() <= 10  # the few below an empty class
        assert ((p - t).abs() <= torch.maximum(2.0 * unit, unit.median())).all()
