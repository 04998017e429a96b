"""The nuclear norm, its ball, and the spectral norm as a penalty: against optimality conditions, bisection and 60 digits."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from stableopt.constraints import Constraint, SpectralBall
from stableopt.constraints import spectra as module
from stableopt.constraints.lowrank import AlmostOrthogonal, Rank
from stableopt.constraints.spectra import NuclearBall, NuclearNorm, SpectralNorm, nuclear_norm_upper
from stableopt.linalg import Bound
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import DIGITS, same_bits, singular_values

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(3, 3), (5, 2), (2, 5), (1, 4), (4, 1), (1, 1)]
AWKWARD = {
    "identity": torch.eye(3, dtype=torch.float64),
    "tall repeated": 3 * torch.eye(4, 2, dtype=torch.float64),
    "wide repeated": 2 * torch.eye(2, 4, dtype=torch.float64),
    "rank one": torch.ones(3, 3, dtype=torch.float64),
    "two equal": torch.diag(torch.tensor([2.0, 2.0, 0.5], dtype=torch.float64)),
    "nearly equal": torch.diag(torch.tensor([2.0, 2.0 + 1e-9, 0.5], dtype=torch.float64)),
    "nearly singular": torch.diag(torch.tensor([2.0, 1.0, 1e-11], dtype=torch.float64)),
}
each_awkward = pytest.mark.parametrize("x", AWKWARD.values(), ids=AWKWARD.keys())


def exact_nuclear_norm(x: Tensor) -> mpmath.mpf:
    with mpmath.workdps(DIGITS):
        return mpmath.fsum(singular_values(x))


def nuclear(x: Tensor) -> float:
    return float(np.linalg.norm(x.numpy(), "nuc"))


def onto_l1_ball(values: list[float], radius: float) -> list[float]:
    """Bisection, with other code than the package."""
    if sum(values) <= radius:
        return values
    low, high = 0.0, max(values)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(v - middle, 0.0) for v in values) > radius else (low, middle)
    return [max(v - low, 0.0) for v in values]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prox_of_the_nuclear_norm_meets_its_optimality_condition(shape: tuple[int, int]) -> None:
    """(x - p)/s is a subgradient: |Z|_2 <= w and <Z, p> = w |p|_*; strictly fewer singular values survive a larger step."""
    for scale in (0.3, 1.0, 30.0):
        for weight, step in ((0.4, 1.0), (2.0, 0.7), (1e3, 1.0)):
            x = scale * torch.randn(shape)
            p = NuclearNorm(weight).prox(x, step)
            Z = (x - p) / step
            assert float(torch.linalg.matrix_norm(Z, 2)) <= weight * (1 + 1e-12) + 1e-12
            assert float((Z * p).sum()) == pytest.approx(weight * nuclear(p), rel=1e-11, abs=1e-11)
            assert float(NuclearNorm(weight).value(p)) == pytest.approx(weight * nuclear(p), rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prox_of_the_spectral_norm_meets_its_optimality_condition(shape: tuple[int, int]) -> None:
    """(x - p)/s is a subgradient: |Z|_* <= w and <Z, p> = w |p|_2."""
    for scale in (0.3, 1.0, 30.0):
        for weight, step in ((0.4, 1.0), (2.0, 0.7), (1e3, 1.0)):
            x = scale * torch.randn(shape)
            p = SpectralNorm(weight).prox(x, step)
            Z, top = (x - p) / step, float(torch.linalg.matrix_norm(p, 2))
            assert nuclear(Z) <= weight * (1 + 1e-12) + 1e-12
            assert float((Z * p).sum()) == pytest.approx(weight * top, rel=1e-11, abs=1e-11)
            assert float(SpectralNorm(weight).value(p)) == pytest.approx(weight * top, rel=1e-13, abs=1e-13)
            if nuclear(x) <= weight * step:
                assert torch.equal(p, torch.zeros(shape))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_the_projection_shortens_the_singular_values_like_the_l1_ball(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for radius in (0.3, 1.0, 7.7):
        x = (3 * torch.randn(shape)).to(dtype)
        p = NuclearBall(radius).project(x)
        U, S, Vh = torch.linalg.svd(x.double(), full_matrices=False)
        wanted = U @ torch.diag(torch.tensor(onto_l1_ball(S.tolist(), radius))) @ Vh
        torch.testing.assert_close(p.double(), wanted, rtol=0, atol=radius * (4 * torch.finfo(dtype).eps + 1e-12))
        assert exact_nuclear_norm(p) <= mpmath.mpf(radius)


def test_the_projection_lies_in_the_normal_cone() -> None:
    """<x - p, q - p> <= 0 for every q in the ball, that is <x - p, p> = r |x - p|_2."""
    for shape in SHAPES:
        x = 4 * torch.randn(shape)
        p = NuclearBall(1.5).map(x)
        if nuclear(x) > 1.5:
            top = 1.5 * float(torch.linalg.matrix_norm(x - p, 2))
            assert float(((x - p) * p).sum()) == pytest.approx(top, rel=1e-11)
            assert nuclear(p) == pytest.approx(1.5, rel=1e-12)


def test_the_bound_of_the_nuclear_norm_is_valid_and_tight() -> None:
    for shape in [*SHAPES, (7, 9)]:
        for dtype in DTYPES:
            x = torch.randn(shape).to(dtype)
            low_rank = (torch.randn(shape[0], 1) @ torch.randn(1, shape[1])).to(dtype)
            for a in (x, low_rank, torch.ones(shape).to(dtype), torch.eye(*shape, dtype=dtype)):
                with mpmath.workdps(DIGITS):
                    exact, bound = exact_nuclear_norm(a), mpmath.mpf(nuclear_norm_upper(a))
                    assert exact <= bound <= exact * (1 + mpmath.mpf(5e-14))
                assert nuclear_norm_upper(a) == nuclear_norm_upper(a.mT.contiguous().mT)
    assert nuclear_norm_upper(torch.zeros(3, 2)) == nuclear_norm_upper(torch.zeros(0, 2)) == 0.0


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-200, 1e200, 1e307])
def test_the_bound_holds_at_every_scale(size: float) -> None:
    x = size * torch.tensor([[1.0, -1.0, 3.0], [1.0, 2.0, 0.0]])
    exact, bound = exact_nuclear_norm(x), mpmath.mpf(nuclear_norm_upper(x))
    assert exact <= bound <= exact * (1 + mpmath.mpf(1e-13)) + 2 * mpmath.mpf(5e-324)
    assert nuclear_norm_upper(torch.full((2, 2), 1.7e308)) == math.inf


def test_the_bound_does_not_trust_the_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3)
    exact = exact_nuclear_norm(x)
    true_svd = np.linalg.svd
    factors = [0.5, 0.0, np.array([1, 1, 0]), np.array([3, 0, 0]), np.array([0.2, 1, 5])]

    def wrong(a: np.ndarray, full_matrices: bool) -> tuple[np.ndarray, ...]:
        U, S, Vh = true_svd(a, full_matrices=full_matrices)
        return U, factors[0] * S, Vh

    while factors:
        monkeypatch.setattr(np.linalg, "svd", wrong)
        bound = nuclear_norm_upper(x)
        monkeypatch.undo()
        assert exact <= bound
        del factors[0]


def test_the_bound_counts_the_rounding_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if all norms were known exactly, and the computed residual were zero."""
    k, u = 20, 2.0**-53
    monkeypatch.setattr(module, "frobenius_norm", lambda a: Bound.point(float(np.sqrt((a * a).sum()))))
    assert nuclear_norm_upper(4 * torch.eye(k)) >= 4 * k * (1 + 0.9 * math.sqrt(k) * k * u)


@each_dtype
def test_the_ball_at_inside_and_past_its_radius(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=dtype)
    norm = float(exact_nuclear_norm(x))
    assert NuclearBall(norm * (1 + 1e-13)).violation(x) == 0.0
    assert NuclearBall(norm * (1 + 1e-13)).project(x) is x
    for radius in (norm * (1 - 1e-14), norm / 2):
        assert NuclearBall(radius).violation(x) == pytest.approx(norm - radius, abs=1e-13)
        assert exact_nuclear_norm(NuclearBall(radius).project(x)) <= mpmath.mpf(radius)


def test_the_map_keeps_what_is_inside_bit_for_bit() -> None:
    for shape in SHAPES:
        x = torch.randn(shape)
        assert torch.equal(NuclearBall(50.0).map(x), x)
        assert not torch.equal(NuclearBall(0.1).map(x), x)


def test_the_ball_of_radius_zero_is_the_zero_matrix() -> None:
    assert torch.equal(NuclearBall(0.0).project(torch.randn(3, 2)), torch.zeros(3, 2))
    assert NuclearBall(0.0).violation(torch.zeros(3, 2)) == 0.0
    assert NuclearBall(0.0).violation(torch.full((3, 2), 5e-324)) > 0.0


@pytest.mark.parametrize("radius", [5e-324, 1e-310, 1e-30, 1e30, 1e300])
@each_dtype
def test_projecting_ends_at_every_scale(radius: float, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for size in (info.max, 1.0, info.smallest_normal * info.eps):
        x = torch.tensor([[size, -size], [size, size / 2], [0.0, size]], dtype=dtype)
        p = NuclearBall(radius).project(x)
        assert p.isfinite().all()
        assert exact_nuclear_norm(p) <= mpmath.mpf(radius)
        assert same_bits(NuclearBall(radius).project(p), p)


def test_a_projection_stays_near_the_sphere() -> None:
    for dtype, short in ((torch.float64, 1e-12), (torch.float32, 1e-7), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
        for n in (4, 24):
            x = torch.randn(n, n).to(dtype)
            p = NuclearBall(2.0).project(x)
            assert 2.0 * (1 - short) <= nuclear(p.double()) <= 2.0


@each_awkward
def test_derivatives_are_right_at_repeated_and_vanishing_singular_values(x: Tensor) -> None:
    """The derivative through the factors of the decomposition is infinite at these."""
    x = x.clone().requires_grad_()
    for function in (
        lambda t: NuclearNorm(0.7).prox(t, 1.1),
        lambda t: NuclearNorm(0.0).prox(t, 1.1),
        lambda t: SpectralNorm(0.7).prox(t, 0.9),
        lambda t: SpectralNorm(0.0).prox(t, 0.9),
        lambda t: SpectralNorm(50.0).prox(t),
        NuclearBall(0.77).map,
        NuclearBall(0.77).project,
        NuclearBall(50.0).map,
    ):
        assert torch.autograd.gradcheck(function, x, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch.func
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (4, 2), (3, 3)])
def test_the_largest_value_is_at_the_level_where_the_radius_is_zero(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The level is the largest value; of another decomposition that can be in the last bit above it, with another slope."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        x, v = torch.randn(2, *shape, dtype=dtype, generator=draw).unbind(0)
        x.requires_grad_()
        assert not torch.autograd.grad(NuclearBall(0.0).map(x), x, v)[0].any()
        assert torch.autograd.grad(SpectralNorm(0.0).prox(x), x, v)[0].allclose(v, atol=1e-12)
        assert not torch.func.jvp(NuclearBall(0.0).map, (x.detach(),), (v,))[1].any()


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (1, 1)])
def test_derivatives_of_complex_matrices_are_those_of_finite_differences(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: NuclearNorm(0.7).prox(t, 1.1), x)
    assert torch.autograd.gradcheck(lambda t: SpectralNorm(0.3).prox(t), x)
    for c in (NuclearBall(0.77), AlmostOrthogonal(0.3), Rank(1)):
        assert torch.autograd.gradcheck(c.map, x)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_complex_matrices_have_the_same_formulas(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.complex128).to(dtype)
        U, S, Vh = torch.linalg.svd(x.to(torch.complex128), full_matrices=False)
        nearest = {
            NuclearNorm(0.5): (S - 0.5).clamp_min(0),
            NuclearBall(1.2): torch.tensor(onto_l1_ball(S.tolist(), 1.2)),
            SpectralNorm(1.2): S - torch.tensor(onto_l1_ball(S.tolist(), 1.2)),
            AlmostOrthogonal(0.3): S.clamp(0.7, 1.3),
            Rank(2): S * (torch.arange(len(S)) < 2),
        }
        for g, sigma in nearest.items():
            p = g.prox(x)
            assert p.dtype == dtype
            torch.testing.assert_close(
                p.to(torch.complex128), (U * sigma) @ Vh, rtol=0, atol=4 * eps * float(S[0]) + 1e-12
            )
            if isinstance(g, Constraint):
                assert g.violation(p) == 0.0
        assert nuclear_norm_upper(x) == pytest.approx(float(S.sum()), rel=1e-13)
        assert float(NuclearNorm(2.0).value(x)) == pytest.approx(2 * float(S.sum()), rel=1e-13)
        assert nuclear_norm_upper(x) >= float(S.sum()) * (1 - 1e-15)


def test_the_conjugates_know_each_other() -> None:
    assert NuclearNorm(0.4).conjugate() == SpectralBall(0.4)
    assert NuclearNorm(0.4, (-2, -1)).conjugate() == SpectralBall(0.4, (-2, -1))
    assert SpectralNorm(0.4, (0, 2)).conjugate() == NuclearBall(0.4, (0, 2))
    assert NuclearBall(0.4, (0, 2)).conjugate() == SpectralNorm(0.4, (0, 2))
    with pytest.raises(ValueError, match="conjugate"):
        NuclearNorm(0.0).conjugate()
