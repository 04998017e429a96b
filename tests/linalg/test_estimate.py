"""Laws of the quantities used while training."""

from __future__ import annotations

import pytest
import torch

from stableopt.linalg import gram_norm, power_step, spectral_norm


@pytest.mark.parametrize("shape", [(8, 8), (20, 3), (3, 20), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_gram_norm_is_an_upper_bound_with_the_stated_gap(
    shape: tuple[int, int], steps: int, device: torch.device
) -> None:
    for scale in (1.0, 1e-100, 1e100):
        W = torch.randn(shape, device=device) * scale
        true, value = spectral_norm(W), float(gram_norm(W, steps))
        assert value >= true.lower * (1 - 1e-12)
        assert value <= true.upper * min(shape) ** (0.5 ** (steps + 1)) * (1 + 1e-12)


def test_the_gap_is_attained_by_an_orthogonal_matrix() -> None:
    Q = torch.linalg.qr(torch.randn(16, 16))[0]
    for steps in (1, 3, 6):
        assert float(gram_norm(Q, steps)) == pytest.approx(16 ** (0.5 ** (steps + 1)), rel=1e-12)


def test_gram_norm_is_differentiable_and_finite_everywhere() -> None:
    W = torch.randn(4, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: gram_norm(w, 4), W)
    for special in (torch.zeros(3, 3), torch.eye(3), torch.ones(3, 2)):
        w = special.clone().requires_grad_()
        gram_norm(w).backward()
        assert torch.isfinite(w.grad).all()
    assert float(gram_norm(torch.zeros(3, 3))) == 0.0
    assert float(gram_norm(torch.empty(0, 3))) == 0.0


def test_gram_norm_of_batches_and_complex_matrices() -> None:
    W = torch.randn(5, 4, 3, dtype=torch.complex128)
    true = torch.linalg.matrix_norm(W, 2)
    value = gram_norm(W, 8)
    assert value.shape == (5,)
    assert not value.is_complex()
    assert ((value >= true * (1 - 1e-12)) & (value <= true * 3 ** (0.5**9) * (1 + 1e-12))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_norm_keeps_the_dtype(dtype: torch.dtype) -> None:
    W = torch.randn(8, 8).to(dtype)
    value = gram_norm(W, 6)
    assert value.dtype == dtype
    assert float(value) == pytest.approx(float(torch.linalg.matrix_norm(W.double(), 2)), rel=0.05)


def test_gram_norm_refuses_what_it_cannot_bound() -> None:
    with pytest.raises(ValueError, match="steps >= 1"):
        gram_norm(torch.eye(2), 0)
    with pytest.raises(ValueError, match="two dimensions"):
        gram_norm(torch.ones(3))


def test_power_steps_approach_the_norm_from_below(device: torch.device) -> None:
    W = torch.randn(12, 9, device=device)
    true, u = spectral_norm(W), torch.randn(12, device=device)
    estimates = []
    for _ in range(200):
        estimate, u = power_step(W, u)
        estimates.append(float(estimate))
    assert max(estimates) <= true.upper * (1 + 1e-14)
    assert estimates[-1] >= true.lower * (1 - 1e-6)
    assert estimates[0] < true.lower


def test_a_power_step_on_zero_keeps_its_vector() -> None:
    u = torch.ones(3)
    estimate, after = power_step(torch.zeros(3, 2), u)
    assert float(estimate) == 0.0
    torch.testing.assert_close(after, u)
