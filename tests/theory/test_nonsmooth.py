"""T5: Clarke slopes, prox, subgradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stableopt.theory as th
from stableopt.linalg import Bound

F = torch.nn.functional
FUNCTIONS = {
    "abs": torch.abs,
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "identity": lambda x: 1.0 * x,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}


def slopes_of(name: str) -> torch.Tensor:
    x = torch.cat([torch.linspace(-30, 30, 600001), torch.linspace(-3.5, 3.5, 70001) + 1e-7]).requires_grad_()
    (slope,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x)
    return slope


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_slopes_of_torch_fill_their_interval_and_stay_inside(name: str) -> None:
    slopes, interval = slopes_of(name), th.clarke_slopes(name)
    single = 1e-7  # torch keeps some constants, such as the sixth of hardsigmoid, in single precision
    assert slopes.min() >= interval.lower - single
    assert slopes.max() <= interval.upper + single
    assert slopes.min() == pytest.approx(interval.lower, abs=2e-3)
    assert slopes.max() == pytest.approx(interval.upper, abs=2e-3)
    if interval.lower < -0.05 and name not in {"abs", "hardswish"}:  # rounded outwards in the fifth digit, not more
        assert slopes.min() == pytest.approx(interval.lower, abs=1.2e-5)
        assert slopes.max() == pytest.approx(interval.upper, abs=1.2e-5)


def test_every_named_activation_is_checked() -> None:
    assert set(FUNCTIONS) | {"groupsort"} == set(th.CLARKE_SLOPES)
    with pytest.raises(ValueError, match="known are"):
        th.clarke_slopes("swish-9")


def test_groupsort_permutes() -> None:
    x = torch.randn(4, requires_grad=True)
    J = torch.func.jacrev(lambda v: v.reshape(2, 2).sort(dim=1).values.reshape(4))(x)
    assert set(J.flatten().tolist()) <= {0.0, 1.0}
    assert float(torch.linalg.matrix_norm(J, 2)) == pytest.approx(1.0)


def test_gradient_blocks_need_slopes_that_are_not_negative() -> None:
    good = {n for n in th.CLARKE_SLOPES if th.slopes_allow_gradient_block(th.clarke_slopes(n))}
    assert set(th.CLARKE_SLOPES) - good == {"abs", "gelu", "silu", "mish", "hardswish"}
    assert th.slope_lipschitz(th.clarke_slopes("hardswish")) == 1.5
    assert th.slope_lipschitz(Bound(-2.0, 1.0)) == 2.0
    with pytest.raises(ValueError, match="finite"):
        th.slope_lipschitz(Bound(0.0, math.inf))


@pytest.mark.parametrize("leak", [0.01, -0.5, 2.0])
def test_the_slopes_of_a_leaky_relu(leak: float) -> None:
    interval = th.leaky_relu_slopes(leak)
    assert {interval.lower, interval.upper} == {leak, 1.0}
    with pytest.raises(ValueError, match="finite"):
        th.leaky_relu_slopes(math.nan)


@given(st.floats(1e-3, 1e3), st.floats(0, 10), st.floats(-5, 5), st.floats(-5, 5))
def test_a_prox_contracts_by_its_factor_and_is_firmly_nonexpansive(
    step: float, strong: float, x: float, y: float
) -> None:
    """prox of |u| + (m/2) u^2 is a soft threshold divided by 1 + step m."""
    prox = lambda z: math.copysign(max(abs(z) - step, 0), z) / (1 + step * strong)  # noqa: E731
    d = prox(x) - prox(y)
    assert abs(d) <= th.prox_factor(step, strong) * abs(x - y) + 1e-12
    assert d * d <= d * (x - y) + 1e-12
    far = 1e4 * (1 + step)
    assert (prox(far + 1) - prox(far)) == pytest.approx(th.prox_factor(step, strong), abs=1e-6)  # attained


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(0, 2.5), st.floats(0, 3))
def test_prox_gradient_inherits_the_law_of_the_gradient_step(seed: int, n: int, at: float, strong: float) -> None:
    g = np.random.default_rng(seed)
    G = g.standard_normal((n, n))
    H = G @ G.T + 0.1 * np.eye(n)
    values = np.linalg.eigvalsh(H)
    lr = at / values[-1]
    step = lambda z: np.clip(z - lr * H @ z, -1, 1) / (1 + lr * strong)  # noqa: E731
    x, y = g.standard_normal(n), g.standard_normal(n)
    factor = th.prox_gradient_factor(lr, values[0] * (1 - 1e-9), values[-1] * (1 + 1e-9), strong)
    assert np.linalg.norm(step(x) - step(y)) <= factor * np.linalg.norm(x - y) * (1 + 1e-9)
    small = 1e-3 * np.linalg.eigh(H)[1][:, [0, -1]]  # inside the box the law is attained by an extreme eigenvector
    assert max(np.linalg.norm(step(v)) / 1e-3 for v in small.T) == pytest.approx(factor, abs=1e-6)


def test_a_projection_on_a_nonconvex_set_is_not_nonexpansive() -> None:
    one_nonzero = lambda z: np.where(np.abs(z) == np.abs(z).max(), z, 0.0)  # noqa: E731
    x, y = np.array([1.0, 0.99]), np.array([0.99, 1.0])
    assert np.linalg.norm(one_nonzero(x) - one_nonzero(y)) > 50 * th.prox_factor() * np.linalg.norm(x - y)


@given(st.floats(0, 10), st.floats(0, 3), st.floats(0, 3), st.floats(-5, 5))
def test_subgradient_runs_separate_no_further_than_said(distance: float, lr: float, G: float, x: float) -> None:
    sub = lambda z: G * (1.0 if z >= 0 else -1.0)  # noqa: E731
    y = x + distance
    after = abs((x - lr * sub(x)) - (y - lr * sub(y)))
    assert after <= th.subgradient_separation(distance, lr, G) + 1e-12


def test_the_subgradient_law_is_attained_at_a_kink_and_never_contracts() -> None:
    x, lr, G = -1e-12, 0.5, 2.0
    assert abs((x + lr * G) - (0.0 - lr * G)) == pytest.approx(th.subgradient_separation(1e-12, lr, G))
    assert th.subgradient_separation(1.0, lr, G) == pytest.approx(math.sqrt(1 + 4))
