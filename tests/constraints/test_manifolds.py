"""Orthogonal matrices: nearest, proved not to expand, and reached by the parametrization."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from stableopt.constraints import Orthogonal
from stableopt.constraints.manifolds import OrthogonalParametrization
from stableopt.linalg import spectral_norm
from tests.constraints.catalogue import DTYPES
from tests.constraints.oracle import exactly_feasible, same_bits, singular_values

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_triv = pytest.mark.parametrize("triv", ["expm", "cayley"])
SHAPES = [(3, 3), (5, 2), (2, 5), (1, 4), (4, 1), (1, 1)]


@each_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (40, 30)])
def test_the_projection_is_the_polar_factor_with_a_proved_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    p = Orthogonal().project(x)
    assert spectral_norm(p).upper <= 1.0
    assert Orthogonal().violation(p) == 0.0
    U, _, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    torch.testing.assert_close(p.double(), U @ Vh, rtol=0, atol=4 * torch.finfo(dtype).eps + 4e-13)
    if max(shape) <= 5:
        assert exactly_feasible(Orthogonal(), p)


def test_no_orthogonal_matrix_is_nearer_than_the_projection() -> None:
    for shape in SHAPES:
        x = 2 * torch.randn(shape)
        p = Orthogonal().project(x)
        for _ in range(20):
            other = torch.linalg.svd(p + 0.3 * torch.randn(shape), full_matrices=False)
            assert float((other.U @ other.Vh - x).norm()) >= float((p - x).norm()) - 1e-10


def test_the_projection_is_not_nonexpansive() -> None:
    """The promise of convex sets fails here, as documented: near zero a small change turns the result around."""
    x = torch.tensor([[0.01]])
    apart = (Orthogonal().project(x) - Orthogonal().project(-x)).norm()
    assert float(apart) > 50 * float((2 * x).norm())


@each_dtype
def test_violation_is_zero_within_the_stated_tolerance_and_the_distance_past_it(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    working = min(eps, torch.finfo(torch.float32).eps)
    tolerance = 4 * eps * math.sqrt(3) + 8 * working * 3 + 4 * (9 + 64) * 2.0**-52
    for factor, inside in ((1.0, True), (0.2, True), (6.0, False)):
        x = math.sqrt(1 - factor * tolerance * 0.9) * torch.eye(3) if factor * tolerance < 1 else torch.zeros(3, 3)
        x = x.to(dtype)
        distance = float(1 - singular_values(x)[-1] ** 2)
        assert (distance <= tolerance) is inside
        assert Orthogonal().violation(x) == (0.0 if inside else pytest.approx(distance, abs=1e-14))
    assert Orthogonal().violation(2 * torch.eye(3, dtype=dtype)) == 3.0
    assert Orthogonal().violation(torch.zeros(3, 3, dtype=dtype)) == 1.0


@each_dtype
def test_zero_has_a_valid_projection(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        assert Orthogonal().violation(Orthogonal().project(torch.zeros(shape, dtype=dtype))) == 0.0


@each_triv
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_the_map_is_orthogonal_and_starts_at_the_identity(
    shape: tuple[int, int], dtype: torch.dtype, triv: str
) -> None:
    c = Orthogonal(triv)
    w = c.map(torch.randn(shape).to(dtype))
    assert c.violation(w) == 0.0
    assert w.is_contiguous()
    assert w.dtype == dtype
    assert torch.equal(c.map(torch.zeros(shape, dtype=dtype)), torch.eye(*shape, dtype=dtype))


def test_the_two_maps_are_the_exponential_and_the_cayley_transform() -> None:
    x = torch.randn(4, 4)
    A = x.tril(-1) - x.tril(-1).mT
    I = torch.eye(4)
    torch.testing.assert_close(Orthogonal("expm").map(x), torch.linalg.matrix_exp(A))
    torch.testing.assert_close(Orthogonal("cayley").map(x), (I + A / 2) @ torch.linalg.inv(I - A / 2))


@each_triv
@pytest.mark.parametrize("shape", SHAPES)
def test_the_map_and_the_projection_have_the_derivative_of_finite_differences(
    shape: tuple[int, int], triv: str
) -> None:
    c = Orthogonal(triv)
    x = torch.randn(shape).requires_grad_()
    assert torch.autograd.gradcheck(c.map, x, atol=1e-6)
    assert torch.autograd.gradcheck(c.project, (x.detach() + 2 * torch.eye(*shape)).requires_grad_(), atol=1e-5)
    centered = c.parametrization(x)
    centered.right_inverse(torch.randn(shape))
    assert torch.autograd.gradcheck(centered, x, atol=1e-6)


@each_triv
@pytest.mark.parametrize("shape", SHAPES)
def test_assigning_centers_the_map_at_the_projection_bit_for_bit(shape: tuple[int, int], triv: str) -> None:
    c = Orthogonal(triv)
    for dtype in DTYPES:
        layer = nn.Linear(shape[1], shape[0], dtype=dtype)
        parametrize.register_parametrization(layer, "weight", c.parametrization(layer.weight))
        for sign in (1.0, -1.0):  # both signs of the determinant
            wanted = (sign * torch.randn(shape)).to(dtype)
            layer.weight = wanted
            assert torch.equal(layer.weight, c.project(wanted))
            base = layer.parametrizations.weight[0].base
            assert c.violation(base) == 0.0
        assert layer.parametrizations.weight.original.is_contiguous()
        assert layer.weight.is_contiguous()


@each_triv
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_training_reaches_a_given_orthogonal_matrix(triv: str, dtype: torch.dtype) -> None:
    for shape in ((3, 3), (4, 2), (2, 4)):
        goal = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        goal = (goal.U @ goal.Vh).to(dtype)
        layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
        parametrize.register_parametrization(layer, "weight", Orthogonal(triv).parametrization(layer.weight))
        layer.weight = (goal.double() + 0.4 * torch.randn(shape)).to(dtype)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
        for _ in range(60):
            optimizer.zero_grad()
            (layer.weight - goal).double().square().sum().backward()
            optimizer.step()
            assert Orthogonal().violation(layer.weight) == 0.0
        assert float((layer.weight.detach() - goal).double().norm()) < 0.02 + 8 * torch.finfo(dtype).eps


def test_registering_draws_no_random_numbers() -> None:
    x = torch.randn(5, 3)
    state = torch.get_rng_state()
    Orthogonal().parametrization(x).right_inverse(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_whole_base_is_orthogonal_for_a_tall_and_a_wide_matrix() -> None:
    for shape in ((6, 2), (2, 6)):
        module = OrthogonalParametrization(Orthogonal(), torch.empty(shape))
        module.right_inverse(torch.randn(shape))
        torch.testing.assert_close(module.base.mT @ module.base, torch.eye(6), rtol=0, atol=1e-11)


def test_nan_is_not_swallowed_by_entries_that_the_map_ignores() -> None:
    x = torch.zeros(3, 3)
    x[0, 2] = math.nan
    module = Orthogonal().parametrization(x)
    assert Orthogonal().map(x).isnan().any()
    assert module(x).isnan().any()


def test_an_orthogonal_matrix_with_a_proved_norm_is_returned_itself() -> None:
    p = Orthogonal().project(torch.randn(4, 3))
    assert Orthogonal().project(p) is p
    assert same_bits(Orthogonal("cayley").project(p), p)
    empty = torch.zeros(0, 3)
    assert Orthogonal().project(empty) is empty
    assert Orthogonal().map(empty).shape == (0, 3)


@each_dtype
def test_a_matrix_within_the_tolerance_that_expands_is_moved_until_it_does_not(dtype: torch.dtype) -> None:
    x = torch.eye(3, dtype=dtype) * (1 + torch.finfo(dtype).eps)
    assert Orthogonal().violation(x) == 0.0
    assert spectral_norm(x).upper > 1.0
    assert spectral_norm(Orthogonal().project(x)).upper <= 1.0
