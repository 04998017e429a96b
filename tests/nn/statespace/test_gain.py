"""The bounds of the gain of a diagonal state space, against the exact norm of the map from sequence to sequence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stableopt.errors import UncertifiableError
from stableopt.linalg import upper
from stableopt.nn.statespace.gain import LinearSystem, system_gain
from stableopt.nn.statespace.scan import diagonal_scan
from stableopt.theory import lru_gain, lru_input_scale, state_space_gain
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import operator_norm

NORMS = ("l2", "linf", "l1")


def matrix_of(system: LinearSystem, time: int) -> Tensor:
    """The block Toeplitz matrix from ``time`` steps of input to as many of output, from the impulse response."""
    n = len(system.real)
    C = torch.complex(system.output[:, :n], -system.output[:, n:])
    B = torch.complex(system.input[:n], system.input[n:])
    eigenvalues = torch.complex(system.real, system.imag)
    d_out, d_in = len(C), B.shape[1]
    J = torch.zeros(time, d_out, time, d_in)
    for k in range(time):
        response = (C * eigenvalues**k @ B).real
        if k == 0 and system.skip is not None:
            response = response + system.skip
        for t in range(k, time):
            J[t, :, t - k] = response
    return J.reshape(time * d_out, time * d_in)


def drawn(n: int, d_in: int, d_out: int, seed: int, *, skip: bool = True, largest: float = 0.95) -> LinearSystem:
    torch.manual_seed(seed)
    radius, angle = largest * torch.rand(n), 6.3 * torch.rand(n)
    return LinearSystem(
        radius * angle.cos(), radius * angle.sin(), torch.randn(2 * n, d_in), torch.randn(d_out, 2 * n),
        torch.randn(d_out, d_in) if skip else None, float(torch.rand(())) + 0.1,
    )  # fmt: skip


def one_state(modulus: float, scale: float, *, angle: float = 0.0) -> LinearSystem:
    """A single state with scalar input and output."""
    return LinearSystem(
        torch.tensor([modulus * math.cos(angle)]), torch.tensor([modulus * math.sin(angle)]),
        torch.tensor([[scale], [0.0]]), torch.tensor([[1.0, 0.0]]), None,
    )  # fmt: skip


def run(system: LinearSystem, x: Tensor) -> Tensor:
    """The output sequence for one input of shape ``(batch, time, features)``."""
    u = torch.einsum("nd,btd->nbt", system.input, x)
    y = torch.einsum("on,nbt->bto", system.output, diagonal_scan(system.real, system.imag, u))
    return y if system.skip is None else y + x @ system.skip.mT


@settings(max_examples=30)
@given(
    n=st.integers(1, 4), d_in=st.integers(1, 3), d_out=st.integers(1, 3), time=st.integers(1, 12),
    skip=st.booleans(), seed=st.integers(0, 300),
)  # fmt: skip
def test_no_length_has_a_larger_norm(n: int, d_in: int, d_out: int, time: int, skip: bool, seed: int) -> None:
    system = drawn(n, d_in, d_out, seed, skip=skip)
    J = matrix_of(system, time)
    for norm in NORMS:
        bound = system_gain(system, norm)
        assert bound.proved
        assert bound.lower == 0.0
        assert operator_norm(J, norm) <= bound.upper * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_no_pair_of_sequences_is_spread_more_in_the_largest_norm_of_a_step(seed: int) -> None:
    system = drawn(3, 2, 2, seed)
    found = worst_ratio(lambda x: run(system, x), (12, 2), "token_max", starts=8, steps=40)
    assert 0.2 < found / system_gain(system, "token_max").upper <= 1.0


def test_the_largest_step_may_grow_where_the_energy_does_not() -> None:
    """One state repeats its input and one averages: the old average of the second and the new first input add up to sqrt(2)."""
    system = LinearSystem(
        torch.tensor([0.0, 0.99]), torch.zeros(2), torch.cat([torch.diag(torch.tensor([1.0, 0.01])), torch.zeros(2, 2)]),
        torch.eye(2, 4), None,
    )  # fmt: skip
    x = torch.zeros(1, 1000, 2)
    x[:, :-1, 1] = 1.0
    x[:, -1, 0] = 1.0
    assert system_gain(system, "l2").upper == pytest.approx(1.0)
    assert 1.4 < float(run(system, x)[0, -1].norm()) <= system_gain(system, "token_max").upper <= math.sqrt(2) + 1e-12


def test_states_count_one_by_one_where_that_is_less() -> None:
    """y = -x_1 - x_2 from imaginary weights of very different sizes; the product of the norms would be 1e4."""
    system = LinearSystem(
        torch.zeros(2), torch.zeros(2), torch.cat([torch.zeros(2, 2), torch.diag(torch.tensor([1e-2, 1e2]))]),
        torch.tensor([[0.0, 0.0, -1e2, -1e-2]]), None,
    )  # fmt: skip
    torch.testing.assert_close(run(system, torch.tensor([[[1.0, 2.0]]])), torch.tensor([[[-3.0]]]))
    assert math.sqrt(2) <= system_gain(system, "token_max").upper <= 2.0 + 1e-12


@pytest.mark.parametrize("norm", [*NORMS, "token_max"])
def test_a_constant_input_attains_the_gain_of_a_real_positive_eigenvalue(norm: str) -> None:
    system = one_state(0.75, 0.5)
    law = state_space_gain(0.75, 0.5)
    assert law == 2.0
    assert system_gain(system, norm).upper == pytest.approx(2.0, rel=1e-13)
    assert system_gain(system, norm).upper >= 2.0
    x = torch.ones(1, 4000, 1)
    y = run(system, x)
    order = {"l2": 2, "l1": 1}.get(norm, math.inf)
    assert float(torch.linalg.vector_norm(y, order) / torch.linalg.vector_norm(x, order)) == pytest.approx(
        2.0, rel=1e-3
    )


def test_a_turning_input_attains_the_gain_of_a_complex_eigenvalue() -> None:
    """Its real part alone has half of the response at each of two frequencies, so a second output is needed for all of it."""
    system = one_state(0.9, 0.1, angle=1.0)._replace(
        input=torch.tensor([[0.1, 0.0], [0.0, 0.1]]), output=torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    )
    assert system_gain(system, "l2").upper == pytest.approx(1.0, rel=1e-13)
    t = torch.arange(2000.0)
    x = torch.stack([t.cos(), t.sin()], -1)[None]
    assert float(run(system, x).norm() / x.norm()) == pytest.approx(1.0, rel=1e-2)


def test_the_skip_is_counted_with_the_weight_that_fits_and_every_weight_is_valid() -> None:
    """[C, D/q] = [I, I] for orthogonal ranges: sqrt(1 + 1) for q = 1, where a sum of norms gives 2."""
    system = LinearSystem(
        torch.zeros(1), torch.zeros(1), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [1.0, 0.0]]), 1.0,
    )  # fmt: skip
    exact = operator_norm(matrix_of(system, 5), "l2")
    assert exact == pytest.approx(math.sqrt(2.0))
    assert system_gain(system, "l2").upper == pytest.approx(exact, rel=1e-12)
    for weight in (1e-300, 1e-3, 0.3, 50.0, 1e300, 0.0):
        bound = system_gain(system._replace(weight=weight), "l2").upper
        assert exact <= bound <= 2.0 + 1e-12


def test_an_eigenvalue_inside_the_circle_bounds_no_gain() -> None:
    """The usual input scale has the gain 14 at 0.99, and six such layers 7.9e6; the scale 1 - |lambda| has 1."""
    usual, ours = one_state(0.99, upper(lru_input_scale(0.99))), one_state(0.99, 1.0 - 0.99)
    assert system_gain(usual, "l2").upper == pytest.approx(upper(lru_gain(0.99)))
    x = torch.ones(1, 20_000, 1)
    y, z = x, x
    for _ in range(6):
        y, z = run(usual, y), run(ours, z)
    assert float(run(usual, x).norm() / x.norm()) > 14.0
    assert float(y.norm() / x.norm()) > 7.5e6
    assert system_gain(usual, "l2").upper ** 6 == pytest.approx(7.9e6, rel=0.02)
    assert 0.9 < float(z.norm() / x.norm()) <= system_gain(ours, "l2").upper ** 6 <= 1.0 + 1e-12


@pytest.mark.parametrize("modulus", [1.0, 1.0 - 2.0**-53, 1.5])
def test_an_eigenvalue_that_is_not_inside_the_circle_is_refused(modulus: float) -> None:
    with pytest.raises(UncertifiableError, match="not proved to be below 1"):
        system_gain(one_state(modulus, 0.1), "l2")


def test_huge_and_tiny_numbers_are_bounded() -> None:
    for scale in (1e-200, 1e-30, 1e30, 1e150):
        system = drawn(2, 2, 2, 0)
        system = system._replace(input=scale * system.input, output=system.output / scale)
        exact = operator_norm(matrix_of(system, 6), "l2")
        for norm in (*NORMS, "token_max"):
            assert 0.5 * exact < system_gain(system, norm).upper < 100 * exact


def test_nan_is_refused() -> None:
    for name in ("real", "imag", "input", "output", "skip"):
        system = drawn(2, 2, 2, 0)
        getattr(system, name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            system_gain(system, "l2")
