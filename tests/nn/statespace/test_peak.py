"""The tight bound of the gain: between the peak of the frequency response and a thousandth above it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopt.nn import DiagonalStateSpace, lipschitz, peak_gain
from stableopt.nn.statespace import peak
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.statespace.test_diagonal import attaining, scrambled


def response(layer: DiagonalStateSpace, frequency: float) -> float:
    """The norm of the frequency response, from its series: the sum of the impulse response times e^(-i w k)."""
    with torch.no_grad():
        system = layer.system()
        n = len(system.real)
        B = torch.complex(system.input[:n], system.input[n:])
        C = torch.complex(system.output[:, :n], -system.output[:, n:])
        eigenvalues = torch.complex(system.real, system.imag)
        total = torch.zeros(layer.d_out, layer.d_in, dtype=torch.complex128)
        for k in range(300):
            total = total + (C * eigenvalues**k @ B).real * np.exp(-1j * frequency * k)
        if system.skip is not None:
            total = total + system.skip
    return float(torch.linalg.matrix_norm(total, 2))


@settings(max_examples=8)
@given(
    n=st.integers(1, 5), d_in=st.integers(1, 3), d_out=st.integers(1, 3), skip=st.booleans(), seed=st.integers(0, 200)
)
def test_it_is_above_every_finite_length_and_below_the_simple_bound(
    n: int, d_in: int, d_out: int, skip: bool, seed: int
) -> None:
    layer = scrambled(DiagonalStateSpace(d_in, n, d_out, skip=skip), seed, 1.0)
    bound = peak_gain(layer)
    assert bound.proved
    J = jacobian(layer, torch.zeros(1, 12, d_in))
    assert operator_norm(J, "l2") <= bound.upper <= lipschitz(layer).upper


def test_it_is_the_peak_to_a_thousandth() -> None:
    layer = DiagonalStateSpace(3, 4, 2, radius=(0.6, 0.9))
    peaks = max(response(layer, w) for w in np.linspace(0, math.pi, 40))
    assert peaks < peak_gain(layer).upper < 1.01 * peaks
    assert peak_gain(layer, 1e-5).upper < peak_gain(layer, 1e-2).upper
    assert peak_gain(layer).upper < 0.9 * lipschitz(layer).upper


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slow_states_are_proved_too(dtype: torch.dtype) -> None:
    layer = DiagonalStateSpace(4, 16, radius=(0.99, 0.9999)).to(dtype)
    assert peak_gain(layer).upper < 0.95 * lipschitz(layer).upper


def test_a_slow_state_is_found_at_its_own_frequency() -> None:
    """The response of one complex state to real numbers is half of its gain there, and next to nothing on a coarse grid."""
    layer = DiagonalStateSpace(1, 1, radius=(0.9999, 0.9999), skip=False)
    with torch.no_grad():
        layer.phase.fill_(1.0)
    assert 0.4 * lipschitz(layer).upper < peak_gain(layer).upper < 0.52 * lipschitz(layer).upper


def test_where_the_simple_bound_is_attained_it_stays() -> None:
    layer = attaining()
    assert peak_gain(layer).upper == pytest.approx(1.0, abs=1e-6)


def test_a_number_below_the_peak_is_never_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof does not trust the guess: a peak that is too low is refused at every excess below the truth."""
    layer = DiagonalStateSpace(3, 4, 2, radius=(0.6, 0.9))
    tight, guess = peak_gain(layer, 1e-4).upper, peak._peak
    monkeypatch.setattr(peak, "_peak", lambda *arguments: 0.97 * guess(*arguments))
    assert peak_gain(layer, 1e-4).upper >= tight / (1.0 + 1e-4)
    system = layer.system()
    A, B, C, D = peak._real_form(system)
    P = peak._storage(A, B, C @ A, C @ B + D, 1.1 * tight, 1e-3)
    assert P is not None
    assert peak._holds(A, B, C, D, P, 1.2 * tight)
    for wrong in (P, -P, 0.0 * P, 3.0 * P):
        for below in (0.99, 0.9, 0.5):
            assert not peak._holds(A, B, C, D, wrong, below * tight)

    I, nothing = np.eye(8), np.zeros_like(B)
    assert peak._holds(A, nothing, 0.0 * C, D, I, 1.01 * float(np.linalg.norm(D, 2)))
    assert not peak._holds(A, nothing, 0.0 * C, D, I, 0.99 * float(np.linalg.norm(D, 2)))
    assert not peak._holds(A, nothing, 9.0 * C, D, I, 1e3)  # the states alone have more output than they lose


def test_nothing_in_nothing_out() -> None:
    layer = DiagonalStateSpace(2, 3)
    with torch.no_grad():
        layer.output_weight.zero_()
        assert layer.skip_weight is not None
        layer.skip_weight.zero_()
    assert peak_gain(layer).upper == 0.0


def test_it_is_refused_where_it_does_not_hold() -> None:
    with pytest.raises(ValueError, match="needs a causal system"):
        peak_gain(DiagonalStateSpace(2, 3, bidirectional=True))
    with pytest.raises(ValueError, match="excess must be finite and > 0"):
        peak_gain(DiagonalStateSpace(2, 3), 0.0)
