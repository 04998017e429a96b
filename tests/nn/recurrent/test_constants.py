"""Laws of the norms between different norms: never too small, and exact where they are said to be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stableopt.nn.recurrent.constants import from_state, into_state
from tests.nn.recurrent.cells import between


@settings(max_examples=30)
@given(n=st.integers(1, 5), m=st.integers(1, 5), seed=st.integers(0, 99), signs=st.booleans())
@example(n=3, m=4, seed=0, signs=True)
def test_norms_into_the_state_are_never_too_small(n: int, m: int, seed: int, signs: bool) -> None:
    torch.manual_seed(seed)
    U, d = torch.randn(n, m), torch.rand(n) + 0.1
    U = U.abs() if signs else U
    for source in ("l2", "linf", "l1"):
        for state in ("l2", "linf"):
            exact, bound = between(d[:, None] * U, source, state), into_state(U, source, state, d)
            assert exact <= bound.upper * (1 + 1e-14)
            if (source, state) != ("linf", "l2") or signs:  # with one sign the vector of ones attains that one, too
                assert exact == pytest.approx(bound.upper, rel=1e-12)


@pytest.mark.parametrize("state", ["l2", "linf"])
@pytest.mark.parametrize("target", ["l2", "linf", "l1"])
def test_norms_out_of_the_state_are_exact(state: str, target: str) -> None:
    inverse = [0.5, 3.0, 1.0, 2.0]
    exact = between(torch.diag(torch.tensor(inverse)), state, target)
    assert from_state(state, target, inverse).upper == pytest.approx(exact, rel=1e-14)
