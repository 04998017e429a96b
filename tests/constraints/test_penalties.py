"""Values and proximal points of the penalties, against rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from stableopt.constraints import L1, ElasticNet, L2Squared, LinfBall, WeightedL1
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import entries

numbers = st.floats(min_value=-1e6, max_value=1e6)
amounts = st.floats(min_value=0.0, max_value=1e3)


def soft(x: Fraction, threshold: Fraction) -> Fraction:
    return x - threshold if x > threshold else x + threshold if x < -threshold else Fraction(0)


@given(x=numbers, weight=amounts, step=amounts)
@example(x=1.0, weight=0.5, step=2.0)
@example(x=-3.0, weight=0.5, step=2.0)
def test_l1_moves_by_the_product_of_step_and_weight(x: float, weight: float, step: float) -> None:
    exact = soft(Fraction(x), Fraction(weight) * Fraction(step))
    found = float(L1(weight).prox(torch.tensor(x), step))
    assert abs(Fraction(found) - exact) <= Fraction(4e-16) * (abs(Fraction(x)) + Fraction(weight) * Fraction(step))


@given(x=numbers, weight=amounts, step=amounts)
def test_l2_squared_divides_by_one_plus_the_product(x: float, weight: float, step: float) -> None:
    exact = Fraction(x) / (1 + Fraction(weight) * Fraction(step))
    found = float(L2Squared(weight).prox(torch.tensor(x), step))
    assert abs(Fraction(found) - exact) <= Fraction(6e-16) * abs(exact) + Fraction(2) ** -1070


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_the_sums_of_the_stored_numbers(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype)
    one = sum((abs(v) for v in entries(x)), Fraction(0))
    two = sum((v * v for v in entries(x)), Fraction(0))
    assert float(L1(0.3).value(x)) == pytest.approx(float(Fraction(0.3) * one), rel=1e-14)
    assert float(L2Squared(0.3).value(x)) == pytest.approx(float(Fraction(0.15) * two), rel=1e-14)


def test_a_long_half_precision_sum_neither_overflows_nor_stalls() -> None:
    x = torch.full((100_000,), 100.0, dtype=torch.float16)
    assert L1(1.0).value(x).item() == 1e7
    assert L2Squared(2.0).value(x).item() == 1e9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(200).to(dtype)
    assert torch.equal(L1(0.1).prox(x, 0.7), L1(0.1).prox(x.float(), 0.7).to(dtype))
    assert torch.equal(L2Squared(0.1).prox(x, 0.7), L2Squared(0.1).prox(x.float(), 0.7).to(dtype))


def test_l1_is_exactly_zero_up_to_its_threshold_and_not_past_it() -> None:
    t = 0.3 * 0.7
    x = torch.tensor([t, -t, math.nextafter(t, 1.0), -math.nextafter(t, 1.0), 0.0])
    p = L1(0.3).prox(x, 0.7)
    assert (p[[0, 1, 4]] == 0).all()
    assert p[2] > 0 > p[3]


def test_the_derivative_of_l1_at_its_kink_is_zero() -> None:
    x = torch.tensor([0.5, -0.5, 0.0, 1.0], requires_grad=True)
    (grad,) = torch.autograd.grad(L1(0.5).prox(x).sum(), x)
    assert grad.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_penalties_can_be_differentiated_as_a_loss_and_with_respect_to_the_step() -> None:
    x = torch.tensor([3.0, -4.0], requires_grad=True)
    assert torch.autograd.grad(L1(0.5).value(x), x)[0].tolist() == [0.5, -0.5]
    assert torch.autograd.grad(L2Squared(0.5).value(x), x)[0].tolist() == [1.5, -2.0]
    step = torch.tensor([0.5, 2.0], requires_grad=True)
    assert torch.autograd.grad(L1(0.5).prox(x, step).sum(), step)[0].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_beyond_the_range_of_the_dtype_gives_the_minimizer(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -2.0], dtype=dtype)
    assert (L1(1e200).prox(x, 1e200) == 0).all()
    assert (L2Squared(1e200).prox(x, 1e200) == 0).all()


def test_implicit_decay_contracts_where_explicit_decay_diverges() -> None:
    x = torch.ones(1)
    for product in (0.1, 2.0, 50.0):
        factor = float(L2Squared(product).prox(x))
        assert factor == pytest.approx(1 / (1 + product), rel=1e-15)
        assert factor < 1
    assert abs(1 - 50.0) > 1


def test_a_threshold_beyond_the_dtype_sends_everything_to_zero() -> None:
    x = torch.tensor([3.0, -1e30], dtype=torch.float32)
    assert L1(1e200).prox(x).tolist() == [0.0, 0.0]
    assert L1(1e200).prox(x, torch.full((2,), 1e30, dtype=torch.float32)).tolist() == [0.0, 0.0]


def test_conjugates_at_the_ends_of_the_weights() -> None:
    assert L2Squared(0.0).conjugate() == LinfBall(0.0)
    assert L2Squared(4.0).conjugate() == L2Squared(0.25)
    assert ElasticNet(0.5, 0.0).conjugate() == LinfBall(0.5)
    assert ElasticNet(0.0, 2.0).conjugate() == L2Squared(0.5)
    for g in (ElasticNet(0.5, 2.0), L2Squared(1e-320)):
        with pytest.raises(ValueError, match="no conjugate"):
            g.conjugate()


def test_weights_of_single_entries_are_thresholds_of_their_own() -> None:
    x = torch.randn(3, 4, dtype=torch.complex128)
    weights = (0.0, 0.3, 1.0, 5.0)
    p = WeightedL1(weights, dims=1).prox(x, 0.5)
    for column, weight in enumerate(weights):
        torch.testing.assert_close(p[:, column], L1(weight).prox(x[:, column], 0.5))
    with pytest.raises(ValueError, match="as many weights"):
        WeightedL1(weights).prox(x)


def test_the_conjugate_of_weighted_l1_is_a_box() -> None:
    box = WeightedL1((0.5, 0.0, 2.0), dims=1).conjugate()
    assert box == LinfBall(1.0, weights=(0.5, 0.0, 2.0), dims=1)
    assert box.project(torch.full((1, 3), -9.0)).tolist() == [[-0.5, 0.0, -2.0]]
