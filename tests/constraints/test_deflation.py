"""Clipping without a decomposition: near the exact projection, a function of the matrix alone, and honest when it gives up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stableopt.constraints import deflation as module
from stableopt.constraints import spectral
from stableopt.constraints.deflation import (
    apply_to_singular_values,
    leading_subspace,
    project_by_deflation,
    project_by_sign,
)
from stableopt.constraints.spectral import SpectralBall
from tests.constraints.oracle import same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rotated(sigma: Tensor, m: int, seed: int = 0) -> Tensor:
    """A float64 matrix of m rows with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = sigma.numel()
    U = torch.linalg.qr(torch.randn(m, n, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    return (U * sigma) @ V.mT


def clip(W: Tensor, radius: float) -> Tensor:
    """The projection as the textbook writes it, in float64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U * S.clamp_max(radius)) @ Vh


def spectrum(above: int, n: int = 200, bulk: float = 0.85) -> Tensor:
    sigma = torch.linspace(bulk, 0.0, n)
    sigma[:above] = torch.linspace(2.0, 1.2, above)
    return sigma


@each_dtype
@pytest.mark.parametrize("above", [1, 3, 20])
def test_deflation_is_as_near_to_the_projection_as_it_promises(above: int, dtype: torch.dtype) -> None:
    W = 7.0 * rotated(spectrum(above), 220)
    for X in (W, W.mT):
        P = project_by_deflation(X, 7.0, dtype)
        if P is None:
            assert dtype == torch.float64  # 1e-14 is not always reached: the decomposition does it then
            continue
        promised = 7.0 * (2.0**-44 if dtype == torch.float64 else torch.finfo(dtype).eps / 2)
        assert float(torch.linalg.matrix_norm(P - clip(X, 7.0))) <= promised
    assert dtype != torch.float64 or above != 1 or project_by_deflation(W, 7.0, dtype) is not None


def test_a_bulk_without_a_gap_and_a_cluster_at_the_radius_are_clipped_too() -> None:
    bulk = torch.randn(210, 200) / 14
    radius = float(torch.linalg.svdvals(bulk)[7]) * 1.0003
    cluster = clip(bulk, radius) + 1e-6 * torch.randn(210, 200)
    for X in (bulk, cluster):
        P = project_by_deflation(X, radius, torch.float32)
        assert P is not None
        assert float(torch.linalg.matrix_norm(P - clip(X, radius))) <= 1e-7 * radius


def test_it_is_a_function_of_the_matrix_alone() -> None:
    W = rotated(spectrum(3), 200)
    first = project_by_deflation(W, 1.0, torch.float32)
    state = torch.get_rng_state()
    torch.randn(7)
    second = project_by_deflation(W.clone(), 1.0, torch.float32)
    assert first is not None
    assert second is not None
    assert same_bits(first, second)
    torch.set_rng_state(state)
    project_by_deflation(W, 1.0, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_declines_what_it_is_not_good_at() -> None:
    few = rotated(spectrum(2), 200)
    assert project_by_deflation(few[:, :100], 0.5, torch.float32) is None  # small
    assert project_by_deflation(few, 1e-5, torch.float32) is None  # far too large
    assert project_by_deflation(few, 0.2, torch.float32) is None  # nearly all exceed the radius
    assert project_by_deflation(few, 3.0, torch.float32) is None  # none does


@each_dtype
def test_the_ball_gives_the_same_whichever_way_it_goes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ball = SpectralBall(1.0)
    for W in (rotated(spectrum(2), 200), torch.randn(200, 210) / 25):
        X = W.to(dtype)
        quick = ball.project(X)
        with monkeypatch.context() as m:
            m.setattr(spectral, "project_by_deflation", lambda *_: None)
            thorough = ball.project(X)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(quick.double(), thorough.double(), rtol=0, atol=eps + 1e-10)
        assert float(torch.linalg.matrix_norm((quick.double() - clip(X, 1.0)), 2)) <= 16 * eps + 1e-10
        for p in (quick, thorough):
            assert ball.violation(p) == 0.0
            assert same_bits(ball.project(p), p)
            assert same_bits(ball.project(p.mT.contiguous().mT), p)


def test_a_wrong_deflation_is_found_out_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    W = rotated(spectrum(2), 200).float()
    right = SpectralBall(1.0).project(W)
    for wrong in (lambda X, *_: 1.001 * clip(X, 1.0), lambda X, *_: X * torch.nan):
        monkeypatch.setattr(spectral, "project_by_deflation", wrong)
        p = SpectralBall(1.0).project(W)
        assert SpectralBall(1.0).violation(p) == 0.0
        torch.testing.assert_close(p, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(12, 12), (20, 7), (7, 20), (1, 1), (1, 5)])
def test_the_sign_clips_all_singular_values(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    for scale in (0.3, 1.0, 50.0, 1e4):
        W = scale * torch.randn(shape)
        radius = 0.6 * float(torch.linalg.matrix_norm(W, 2)) / min(scale, 50.0)
        P = project_by_sign(W.to(device), radius, dtype).cpu()
        error = torch.finfo(dtype).eps / 4 * radius + 1e-14 * float(torch.linalg.matrix_norm(W))
        assert float(torch.linalg.matrix_norm(P - clip(W, radius))) <= error
        again = clip(W, radius) + 1e-9 * radius * torch.randn(shape)  # many values next to the radius
        P = project_by_sign(again.to(device), radius, dtype).cpu()
        assert float(torch.linalg.matrix_norm(P - clip(again, radius))) <= error


def test_the_sign_serves_a_projection_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "project_by_deflation", project_by_sign)
    for dtype in DTYPES:
        W = torch.randn(30, 20).to(dtype)
        p = SpectralBall(3.0).project(W)
        assert SpectralBall(3.0).violation(p) == 0.0
        torch.testing.assert_close(p.double(), clip(W, 3.0), rtol=0, atol=3 * 4 * torch.finfo(dtype).eps + 1e-11)


def test_a_matrix_inside_is_left_alone_by_the_sign() -> None:
    W = torch.eye(3)
    assert project_by_sign(W, 2.0, torch.float64) is W


@pytest.mark.parametrize("shape", [(80, 70), (70, 80), (30, 5), (3, 3)])
def test_the_leading_subspace_holds_the_leading_vectors(shape: tuple[int, int]) -> None:
    sigma = torch.linspace(1.0, 0.01, min(shape))
    sigma[:3] = torch.tensor([1.9, 1.7, 1.5])[: len(sigma)]
    W = rotated(sigma, max(shape)) if shape[0] >= shape[1] else rotated(sigma, max(shape)).mT
    V, values = leading_subspace(W, 4)
    k = min(4, *shape)
    assert V.shape == (shape[1], V.shape[1])
    torch.testing.assert_close(V.mT @ V, torch.eye(V.shape[1]), rtol=0, atol=1e-13)
    top = torch.linalg.svdvals(W @ V)
    torch.testing.assert_close(top[: min(3, k)], sigma[: min(3, k)], rtol=1e-3, atol=0)
    assert len(values) == V.shape[1] + 1
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(float(sigma[0]), rel=1e-4)
    if min(shape) > 4:
        assert values[-1] == pytest.approx(float(sigma[4]), rel=0.1)


def square(s: Tensor) -> tuple[Tensor, Tensor]:
    return s**2, 2 * s


jit_warning = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # inside torch.func


@jit_warning
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize("kind", [torch.float64, torch.complex128], ids=str)
def test_functions_of_singular_values_have_both_derivatives(shape: tuple[int, int], kind: torch.dtype) -> None:
    x = torch.randn(shape, dtype=kind, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: apply_to_singular_values(t, square), x, check_forward_ad=True, atol=1e-5)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    (g,) = torch.autograd.grad(apply_to_singular_values(x, square).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|does not require grad"):
        torch.autograd.grad(g.sum(), x)


@jit_warning
def test_forward_and_reverse_transforms_agree() -> None:
    x = torch.randn(3, 2)
    for f in (lambda t: apply_to_singular_values(t, square), SpectralBall(0.8).project):
        forward, reverse = torch.func.jacfwd(f)(x), torch.func.jacrev(f)(x)
        torch.testing.assert_close(forward, reverse)
        torch.testing.assert_close(forward, torch.autograd.functional.jacobian(f, x))
        tangent = torch.randn(3, 2)
        _, moved = torch.func.jvp(f, (x,), (tangent,))
        torch.testing.assert_close(moved, torch.einsum("abij,ij->ab", forward, tangent))


def test_newton_schulz_steps_reach_one() -> None:
    for ratio in (1.0, 10.0, 1e8):
        s = 1.0 / ratio
        for _ in range(module._newton_schulz_steps(ratio)):
            s = 1.5 * s - 0.5 * s**3
        assert s == pytest.approx(1.0, abs=1e-15)


def test_a_multiple_of_an_orthogonal_matrix_has_no_further_directions() -> None:
    """Every image lies in the span of the first block."""
    Q = torch.linalg.qr(torch.randn(200, 200))[0]
    V, values = leading_subspace(0.9 * Q, 16)
    torch.testing.assert_close(V.mT @ V, torch.eye(16), rtol=0, atol=1e-12)
    assert values == pytest.approx([0.9] * 17, rel=1e-5)
    P = SpectralBall(0.7).project(0.9 * Q)
    torch.testing.assert_close(P, 0.7 * Q, rtol=0, atol=1e-9)
    W = 0.5 * Q + 0.5 * torch.outer(Q[:, 0], Q.mT @ Q[:, 0])
    P = SpectralBall(0.7).project(W.float())
    torch.testing.assert_close(P.double(), clip(W, 0.7), rtol=0, atol=1e-6)
