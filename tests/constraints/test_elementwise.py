"""Convex penalties of entries: optimality in many digits, limits, and half precision."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from stableopt.constraints import L1, L2Squared
from stableopt.constraints.elementwise import ElasticNet, Entropy, Hinge, Huber, LogBarrier
from tests.constraints.catalogue import DTYPES


@pytest.mark.parametrize(("x", "wanted"), [(1.2, 12 / 17), (1.69, 1.69 / 1.7), (1.7, 1.0), (2.0, 1.3), (-5.0, -4.3)])
def test_huber_is_continuous_at_delta_plus_step(x: float, wanted: float) -> None:
    """Two published implementations jump at |x| = delta and return 0.5 for 1.2."""
    assert float(Huber(1.0, 1.0).prox(torch.tensor(x), 0.7)) == pytest.approx(wanted, rel=1e-15)


def test_the_elastic_net_has_the_two_norms_as_its_ends() -> None:
    x = torch.randn(50)
    torch.testing.assert_close(ElasticNet(0.3, 0.0).prox(x, 0.7), L1(0.3).prox(x, 0.7))
    torch.testing.assert_close(ElasticNet(0.0, 0.4).prox(x, 0.7), L2Squared(0.4).prox(x, 0.7))


def test_the_hinge_pushes_to_one_and_no_further() -> None:
    p = Hinge(2.0).prox(torch.tensor([-3.0, 0.0, 0.5, 1.0, 1.5]), 0.25)
    assert p.tolist() == [-2.5, 0.5, 1.0, 1.0, 1.5]


@pytest.mark.parametrize("t", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("x", [-1e12, -1e4, -1.0, 0.0, 1e-9, 1.0, 1e12])
def test_the_barrier_loses_no_digit_to_cancellation(x: float, t: float) -> None:
    with mpmath.workdps(60):
        wanted = float((mpmath.mpf(x) + mpmath.sqrt(mpmath.mpf(x) ** 2 + 4 * mpmath.mpf(t))) / 2)
    assert float(LogBarrier(1.0).prox(torch.tensor(x), t)) == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_barrier_stays_positive_as_stored(dtype: torch.dtype) -> None:
    x = torch.tensor([-torch.finfo(dtype).max, -1.0, -0.0, 1.0]).to(dtype)
    for step in (0.0, 1e-30, 1.0):
        p = LogBarrier(1.0).prox(x, step)
        assert (p.double() > 0).all()
        assert LogBarrier(1.0).value(p).isfinite()


@pytest.mark.parametrize("t", [1e-6, 0.1, 1.0, 1e6])
@pytest.mark.parametrize("ratio", [-690.0, -30.0, -1.0, 0.0, 1.0, 2.0, 10.0, 1e3, 1e9])
def test_the_entropy_has_the_digits_of_lambert_w(ratio: float, t: float) -> None:
    x = ratio * t
    with mpmath.workdps(60):
        z = mpmath.mpf(x) / t - 1 - mpmath.log(t)
        y = mpmath.findroot(lambda y: y + mpmath.exp(y) - z, z if z < 1 else mpmath.log(z))
        wanted = float(t * mpmath.exp(y))
    found = float(Entropy(1.0).prox(torch.tensor(x), t))
    assert found == pytest.approx(wanted, rel=4e-16 * (4 + abs(ratio if ratio < 2 else 1) + abs(math.log(t))))


@pytest.mark.parametrize("g", [Entropy(0.7), LogBarrier(0.7)], ids=repr)
def test_the_derivative_is_the_inverse_of_one_plus_the_curvature(g: Entropy | LogBarrier) -> None:
    x = torch.linspace(-4.0, 6.0, 41).requires_grad_()
    p = g.prox(x, 0.6)
    (found,) = torch.autograd.grad(p.sum(), x)
    bend = 0.7 / p.detach() if isinstance(g, Entropy) else 0.7 / p.detach().square()
    torch.testing.assert_close(found, 1 / (1 + 0.6 * bend), rtol=1e-12, atol=0)


def test_numbers_beyond_the_dtype_give_the_limits_and_no_nan() -> None:
    x = torch.tensor([3.0, -2.0, 0.0], dtype=torch.float32)
    wide = Huber(1e200, 1e200)  # prox x / (1 + 1) on the parabola
    torch.testing.assert_close(wide.prox(x), x / 2)
    torch.testing.assert_close(wide.prox(x, torch.ones(3)), x / 2)
    assert wide.value(x).item() == pytest.approx(float(x.square().sum()) / 2)
    huge = LogBarrier(1e200).prox(torch.tensor([1.0, -1.0]), 1e200)  # (x + sqrt(x^2 + 4 t)) / 2
    torch.testing.assert_close(huge, torch.full((2,), 1e200))
    tiny = Entropy(1e300).prox(torch.tensor([-1e302, -1e303]))  # u = exp(x / t - 1) up to a relative u / t
    torch.testing.assert_close(tiny, torch.tensor([-101.0, -1001.0]).exp(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("x", [-30.0, -36.5, -50.0, -500.0])
def test_far_below_zero_the_entropy_prox_solves_its_equation(x: float) -> None:
    for t in (1e-3, 1.0, 30.0):
        u = Entropy(t).prox(torch.tensor(x)).item()
        if u > 0.0:
            assert u + t * math.log(u) == pytest.approx(x - t, rel=1e-13)
        else:
            assert x / t - 1 < math.log(5e-324)


def test_the_derivative_of_the_entropy_prox_far_below_zero_is_that_of_its_equation() -> None:
    x = torch.tensor([-40.0, -35.0, -20.0, 1.0], requires_grad=True)
    u = Entropy(0.9).prox(x)
    (slope,) = torch.autograd.grad(u.sum(), x)
    torch.testing.assert_close(slope, (u / (u + 0.9)).detach(), rtol=1e-12, atol=0.0)
