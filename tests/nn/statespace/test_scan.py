"""The parallel recurrence is the loop over time, to rounding, in values and derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stableopt.nn.statespace.scan import diagonal_scan, diagonal_step


def loop(real: Tensor, imag: Tensor, inputs: Tensor, state: Tensor | None) -> Tensor:
    """The literal recurrence, in complex numbers."""
    n = len(real)
    u, eigenvalues = torch.complex(inputs[:n], inputs[n:]), torch.complex(real, imag)[:, None]
    h = torch.zeros_like(u[..., 0]) if state is None else torch.complex(state[:n], state[n:])
    states = []
    for t in range(u.shape[-1]):
        h = eigenvalues * h + u[..., t]
        states.append(h)
    all_states = torch.stack(states, -1)
    return torch.cat([all_states.real, all_states.imag])


def drawn(n: int, batch: int, time: int, seed: int, *, largest: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    radius, angle = largest * torch.rand(n), 6.3 * torch.rand(n)
    return radius * angle.cos(), radius * angle.sin(), torch.randn(2 * n, batch, time), torch.randn(2 * n, batch)


@settings(max_examples=25)
@given(
    n=st.integers(1, 4), batch=st.integers(1, 3), time=st.sampled_from([1, 2, 15, 16, 17, 31, 256, 257, 273]),
    started=st.booleans(), seed=st.integers(0, 50),
)  # fmt: skip
def test_it_is_the_loop(n: int, batch: int, time: int, started: bool, seed: int) -> None:
    real, imag, u, state = drawn(n, batch, time, seed)
    start = state if started else None
    torch.testing.assert_close(
        diagonal_scan(real, imag, u, start), loop(real, imag, u, start), rtol=1e-12, atol=1e-12 * time
    )


@pytest.mark.parametrize("time", [5, 37, 300])
def test_its_derivatives_are_those_of_the_loop(time: int) -> None:
    parts = [p.requires_grad_() for p in drawn(3, 2, time, 1)]
    weight = torch.randn(6, 2, time)
    ours = torch.autograd.grad((diagonal_scan(*parts) * weight).sum(), parts)
    theirs = torch.autograd.grad((loop(*parts) * weight).sum(), parts)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_second_derivatives_exist() -> None:
    parts = tuple(p.requires_grad_() for p in drawn(1, 1, 17, 2))
    assert torch.autograd.gradgradcheck(diagonal_scan, parts, fast_mode=True)


def test_an_eigenvalue_outside_the_circle_grows_as_the_loop_does() -> None:
    real, imag, u, state = drawn(2, 1, 40, 3, largest=1.5)
    torch.testing.assert_close(diagonal_scan(real, imag, u, state), loop(real, imag, u, state), rtol=1e-10, atol=1e-10)


def test_one_step_is_a_complex_product() -> None:
    real, imag, _, state = drawn(3, 1, 1, 4)
    product = torch.complex(real, imag) * torch.complex(*state[:, 0].chunk(2))
    torch.testing.assert_close(
        diagonal_step(real, imag, state[:, 0]), torch.cat([product.real, product.imag]), rtol=1e-14, atol=0
    )


def test_it_is_vectorized() -> None:
    real, imag, u, _ = drawn(3, 4, 33, 5)
    whole = diagonal_scan(real, imag, u)
    mapped = torch.func.vmap(lambda v: diagonal_scan(real, imag, v[:, None])[:, 0], in_dims=1, out_dims=1)(u)
    torch.testing.assert_close(mapped, whole)
