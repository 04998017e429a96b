"""The spectral ball: proved in the storage dtype, near the exact projection, differentiable at every matrix."""

from __future__ import annotations

import math
from pathlib import Path

import mpmath
import pytest
import torch

from stableopt.constraints import SpectralBall
from stableopt.constraints import spectral as module
from stableopt.constraints.spectral import apply_to_singular_values, proved_norm, shrink_until_proved
from stableopt.linalg import spectral_norm
from stableopt.linalg.below import norm_is_below, relative_slack
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import exactly_feasible, same_bits, singular_values

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(3, 3), (5, 2), (2, 5), (1, 6), (6, 1), (1, 1)]


def clip(x: torch.Tensor, radius: float) -> torch.Tensor:
    """The projection as the textbook writes it, in float64."""
    U, S, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    return U @ torch.diag(S.clamp_max(radius)) @ Vh


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_the_projection_is_near_the_exact_one_and_inside(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for radius in (0.3, 1.0, 7.7):
        x = (5 * torch.randn(shape)).to(dtype)
        p = SpectralBall(radius).project(x)
        close = radius * (4 * torch.finfo(dtype).eps + 1e-13)
        torch.testing.assert_close(p.double(), clip(x, radius), rtol=0, atol=close)
        assert singular_values(p)[0] <= mpmath.mpf(radius)
        top = float(singular_values(x)[0])
        assert float(singular_values(p)[0]) >= min(top, radius) * (1 - 4 * torch.finfo(dtype).eps - 1e-13)


@each_dtype
def test_the_ball_at_inside_and_past_its_radius(dtype: torch.dtype) -> None:
    ball = SpectralBall(2.0)
    eps = torch.finfo(dtype).eps
    inside = torch.diag(torch.tensor([2.0 - 4 * eps if dtype != torch.float64 else 2.0 - 1e-12, 1.0])).to(dtype)
    past = torch.diag(torch.tensor([2.0, 1.0])).to(dtype)
    past[0, 0] = (
        torch.nextafter(past[0, 0].float(), torch.tensor(9.0, dtype=torch.float32))
        if dtype == torch.float32
        else 2 + 2 * eps
    )
    assert ball.violation(inside) == 0.0
    assert same_bits(ball.project(inside), inside)
    assert float(past[0, 0]) > 2.0
    assert ball.violation(past) > 0.0
    assert not same_bits(ball.project(past), past)
    assert ball.violation(torch.diag(torch.tensor([5.0, 1.0])).to(dtype)) == pytest.approx(3.0, abs=1e-12)


@each_dtype
def test_matrices_made_to_round_outwards_are_shrunk_until_proved(dtype: torch.dtype) -> None:
    for n in (3, 7, 16):
        target = torch.full((n, n), 1.0 / n, dtype=torch.float64)  # norm 1, every entry rounds the same way
        value = shrink_until_proved(target, 1.0, dtype)
        assert spectral_norm(value).upper <= 1.0
        assert singular_values(value)[0] <= 1 - mpmath.mpf(max(2.0**-48, relative_slack(n, n)))
        lost = 2 * torch.finfo(dtype).eps + 4 * relative_slack(n, n)
        assert float(torch.linalg.matrix_norm(value.double(), 2)) >= 1.0 - lost
        assert value.dtype == dtype


@pytest.mark.parametrize("radius", [5e-324, 1e-310, 1e-30, 1e-9, 1e5, 1e30, 1e300])
@each_dtype
def test_shrinking_ends_at_every_scale(radius: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "norm_is_below", lambda x, r: calls.append(x) or norm_is_below(x, r))
    info = torch.finfo(dtype)
    for size in (info.max, 1.0, info.smallest_normal * info.eps):
        x = torch.tensor([[size, -size], [size, size / 2], [0.0, size]], dtype=dtype)
        p = SpectralBall(radius).project(x)
        assert p.isfinite().all()
        assert exactly_feasible(SpectralBall(radius), p)
        assert len(calls) <= 57
        calls.clear()


def test_a_typical_projection_needs_two_decisions_and_no_enclosure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "norm_is_below", lambda x, r: calls.append(x) or norm_is_below(x, r))
    monkeypatch.setattr(module, "spectral_norm", lambda _: pytest.fail("an expensive enclosure"))
    for dtype in DTYPES:
        for shape in ((32, 48), (200, 210)):
            SpectralBall(1.0).project(torch.randn(shape).to(dtype))
            assert len(calls) == 2
            calls.clear()
    SpectralBall(1e3).project(torch.randn(32, 48))
    assert len(calls) == 1


def test_a_feasible_matrix_is_returned_itself_and_zero_too() -> None:
    for x in (0.1 * torch.randn(3, 4), torch.zeros(2, 2), torch.zeros(0, 4)):
        assert SpectralBall(5.0).project(x) is x


def test_the_norm_does_not_depend_on_the_layout() -> None:
    x = torch.randn(7, 5)
    assert proved_norm(x) == proved_norm(x.mT.contiguous().mT) == proved_norm(x.requires_grad_())


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_the_map_is_inside_up_to_one_rounding_and_a_little_short_at_most(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    ball = SpectralBall(0.7)
    for scale in (1e-2, 1.0, 100.0):
        x = (scale * torch.randn(shape)).to(dtype)
        w = ball.map(x)
        norm = float(torch.linalg.matrix_norm(w.double(), 2))
        eps = max(torch.finfo(dtype).eps, 2.0**-46)
        assert norm <= 0.7 * (1 + 4 * eps)
        raw = float(torch.linalg.matrix_norm(x.double(), 2))
        gap = min(shape) ** (1 / 2**7)  # of gram_norm with six steps
        assert norm >= min(raw, 0.7 / gap) * (1 - 8 * eps)
        if raw * gap * (1 + 1e-6) <= 0.7:
            assert torch.equal(w, x)


@pytest.mark.parametrize("radius", [1e-300, 1e-60, 1.0, 1e60])
def test_the_map_is_finite_at_zero_for_every_radius(radius: float) -> None:
    for dtype in DTYPES:
        x = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
        w = SpectralBall(radius).map(x)
        (grad,) = torch.autograd.grad(w.sum(), x)
        assert torch.equal(w, torch.zeros_like(w))
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    "x",
    [
        torch.eye(3),
        3 * torch.eye(3)[:, :2],
        torch.ones(3, 3),
        torch.diag(torch.tensor([2.0, 2.0, 0.5])),
        2 * torch.eye(2, 4),
    ],
    ids=["identity", "tall repeated", "rank one", "two equal", "wide repeated"],
)
def test_derivatives_are_right_at_repeated_and_zero_singular_values(x: torch.Tensor) -> None:
    """The derivative through the factors of the SVD is infinite at each of these."""
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(SpectralBall(1.3).project, x, atol=1e-6)
    assert torch.autograd.gradcheck(SpectralBall(0.61).map, x, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_derivative_of_a_singular_value_function_is_that_of_finite_differences(shape: tuple[int, int]) -> None:
    x = torch.randn(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: apply_to_singular_values(t, lambda s: (s**3, 3 * s**2)), x, atol=1e-5)
    assert torch.autograd.gradcheck(lambda t: apply_to_singular_values(t, lambda s: (s.tanh(), 1 - s.tanh() ** 2)), x)


def test_an_odd_function_of_singular_values_is_the_same_function_of_the_matrix() -> None:
    x = torch.randn(4, 3)
    cube = apply_to_singular_values(x, lambda s: (s**3, 3 * s**2))
    torch.testing.assert_close(cube, x @ x.mT @ x)
    torch.testing.assert_close(apply_to_singular_values(x.mT, lambda s: (s**3, 3 * s**2)), cube.mT)


def test_what_is_not_finite_becomes_nan() -> None:
    for bad in (math.nan, math.inf):
        x = torch.tensor([[1.0, bad], [0.0, 1.0]])
        assert SpectralBall(1.0).project(x).isnan().any()
        assert SpectralBall(1.0).violation(x) == math.inf


def test_a_kernel_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"stableopt\.nn\.stabilize"):
        SpectralBall(1.0).project(torch.ones(2, 2, 3, 3))


def test_a_projection_beyond_the_range_of_the_dtype_is_stored_inside_it() -> None:
    """Clipping one singular value can enlarge an entry: here from -65200, which float16 has, to -65800, which it has not."""
    s, c = 0.03**0.5, 0.97**0.5
    u = torch.cat([torch.tensor([s]), torch.full((7,), c / 7**0.5)])
    v = torch.cat([torch.tensor([c]), torch.full((7,), -s / 7**0.5)])
    x = (9e4 * torch.outer(u, u) - 7e4 * torch.outer(v, v)).half()
    assert x.isfinite().all()
    assert float(clip(x, 7e4).abs().max()) > 65520
    p = SpectralBall(7e4).project(x)
    assert p.isfinite().all()
    assert singular_values(p)[0] <= 7e4


@each_dtype
@pytest.mark.parametrize("shape", [(3, 4), (14, 11)])
def test_a_projection_keeps_its_distance_so_that_every_proof_agrees(shape: tuple[int, int], dtype: torch.dtype) -> None:
    p = SpectralBall(0.8).project(torch.randn(shape).to(dtype))
    hair = max(2.0**-48, relative_slack(*shape))
    assert singular_values(p)[0] <= mpmath.mpf(0.8) * (1 - mpmath.mpf(hair))
    assert spectral_norm(p).upper <= 0.8  # the wider proof of a certificate, too
    for other in (p, p.mT.contiguous().mT, p.flip(0), p.flip(1), p.flip(0, 1)):
        assert SpectralBall(0.8).violation(other) == 0.0
        assert same_bits(SpectralBall(0.8).project(other), other)


def test_the_value_is_the_same_with_and_without_gradients() -> None:
    for x in (torch.randn(5, 4), 3 * torch.randn(4, 6), 0.01 * torch.randn(3, 3)):
        ball = SpectralBall(1.0)
        plain, tracked = ball.project(x), ball.project(x.clone().requires_grad_())
        assert same_bits(plain, tracked)
        with torch.no_grad():
            assert not ball.project(x.clone().requires_grad_()).requires_grad or same_bits(plain, x)


def test_a_batch_is_projected_matrix_by_matrix() -> None:
    x = torch.randn(2, 4, 3, 5)
    ball = SpectralBall(1.0)
    for dims, order in (((-2, -1), (0, 1, 2, 3)), ((3, 0), (1, 2, 3, 0)), ((1, 2), (0, 3, 1, 2))):
        batch = x.permute(order)
        expected = torch.stack([ball.project(W) for W in batch.reshape(-1, *batch.shape[-2:])]).reshape(batch.shape)
        back = [order.index(d) for d in range(4)]
        same = SpectralBall(1.0, dims=dims)
        assert same_bits(same.project(x).contiguous(), expected.permute(back).contiguous())
        assert same_bits(same.project(same.project(x)), same.project(x))
        torch.testing.assert_close(
            same.map(x).permute(order)[0, 0], ball.map(batch[0, 0].contiguous()), rtol=1e-13, atol=0
        )
    worst = max(SpectralBall(1.0).violation(W) for W in x.reshape(-1, 3, 5))
    assert SpectralBall(1.0, dims=(-2, -1)).violation(x) == worst
    mixed = torch.stack([5 * torch.eye(2), 0.3 * torch.eye(2), torch.full((2, 2), math.nan)])
    p = SpectralBall(1.0, dims=(1, 2)).project(mixed)
    assert same_bits(p[1], mixed[1])
    assert p[2].isnan().all()
    assert p[:2].isfinite().all()
    inside = 0.1 * mixed[:2]
    assert SpectralBall(1.0, dims=(1, 2)).project(inside) is inside


@pytest.mark.parametrize("dims", [3, (1,), (0, 1, 2), (0, 0), "ab", (0, 1.0)])
def test_dims_are_two(dims: object) -> None:
    with pytest.raises((TypeError, ValueError), match="dims"):
        SpectralBall(1.0, dims=dims)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (5, 2), (2, 5), (1, 4)])
def test_complex_matrices(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for radius in (0.3, 1.0):
        ball, x = SpectralBall(radius), (3 * torch.randn(shape, dtype=torch.complex128)).to(dtype)
        U, S, Vh = torch.linalg.svd(x.to(torch.complex128), full_matrices=False)
        p = ball.project(x)
        torch.testing.assert_close(
            p.to(torch.complex128),
            (U * S.clamp_max(radius)) @ Vh,
            rtol=0,
            atol=radius * (4 * torch.finfo(dtype).eps + 1e-13),
        )
        embedded = torch.cat([torch.cat([p.real, -p.imag], 1), torch.cat([p.imag, p.real], 1)])
        assert singular_values(embedded)[0] <= mpmath.mpf(radius)
        assert ball.violation(p) == 0.0
        assert ball.violation(x) == pytest.approx(float(S[0]) - radius, rel=1e-5)
        for other in (p, p.mT.contiguous().mT, p.conj().resolve_conj(), p.conj()):
            assert torch.equal(ball.project(other), other)
        assert torch.linalg.matrix_norm(ball.map(x), 2) <= radius * (1 + 4 * torch.finfo(dtype).eps)
        assert ball.prox(x, 0.5).equal(p)
    real = torch.randn(4, 3)
    torch.testing.assert_close(ball.project(real.to(torch.complex128)).real, ball.project(real), rtol=0, atol=1e-12)


def test_a_large_complex_matrix_is_deflated_through_its_real_embedding() -> None:
    x = torch.randn(120, 100, dtype=torch.complex128) / 12
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    radius = float(S[3] + S[4]) / 2
    p = SpectralBall(radius).project(x.to(torch.complex64))
    assert float((p - (U * S.clamp_max(radius)) @ Vh).abs().max()) <= 1e-6 * radius
    assert SpectralBall(radius).violation(p) == 0.0


def test_complex_derivatives_are_those_of_finite_differences() -> None:
    for shape in ((3, 2), (2, 3)):
        x = torch.randn(shape, dtype=torch.complex128, requires_grad=True)
        assert torch.autograd.gradcheck(SpectralBall(0.9).project, x, atol=1e-6)


def test_autocast_does_not_reach_the_norm() -> None:
    x = 3 * torch.randn(8, 6, dtype=torch.float32)
    plain = SpectralBall(1.0).map(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(SpectralBall(1.0).map(x), plain)
        p = SpectralBall(1.0).project(x)
    assert same_bits(p, SpectralBall(1.0).project(x))


def test_the_conjugate_is_the_nuclear_norm_by_moreau() -> None:
    ball, x = SpectralBall(0.8), torch.randn(4, 3)
    for step in (0.3, 2.0):
        back = step * ball.conjugate().prox(x / step, 1.0 / step)
        torch.testing.assert_close(ball.project(x) + back, x, rtol=0, atol=1e-11)
    assert SpectralBall(0.8, dims=(1, 2)).conjugate().dims == (1, 2)  # type: ignore[attr-defined]


def test_a_batch_of_points_under_vmap() -> None:
    x = torch.randn(5, 4, 3)
    torch.testing.assert_close(
        torch.func.vmap(SpectralBall(1.0).project)(x), torch.stack([SpectralBall(1.0).project(W) for W in x])
    )


def test_gradients_of_what_is_not_finite_or_empty() -> None:
    x = torch.tensor([[1.0, math.nan], [0.0, 1.0]], requires_grad=True)
    (g,) = torch.autograd.grad(SpectralBall(1.0).project(x).sum(), x)
    assert g.isnan().any()
    empty = torch.zeros(0, 3, requires_grad=True)
    assert SpectralBall(1.0).project(empty) is empty


def test_a_sharded_matrix_is_gathered(tmp_path: Path) -> None:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = 3 * torch.randn(4, 3)
        sharded = distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)])
        p = SpectralBall(1.0).project(sharded)
        assert p.placements == sharded.placements  # type: ignore[attr-defined]
        assert same_bits(p.full_tensor(), SpectralBall(1.0).project(x))  # type: ignore[attr-defined]
        assert SpectralBall(1.0).violation(p) == 0.0
        assert SpectralBall(1.0).violation(sharded) == SpectralBall(1.0).violation(x)
    finally:
        dist.destroy_process_group()
