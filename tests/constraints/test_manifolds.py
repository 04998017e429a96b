"""Orthogonal matrices: nearest, proved not to expand, and reached by the parametrization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import geotorch
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stableopt.constraints import Constraint, Orthogonal, from_spec
from stableopt.constraints.lowrank import AlmostOrthogonal, Rank
from stableopt.constraints.manifolds import OrthogonalParametrization, Stiefel
from stableopt.constraints.symmetric import PSD
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
    tolerance = min(4 * eps * math.sqrt(3), 0.25) + 8 * working * 3 + 8 * (3 * 30 + 16) * 2.0**-53
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


def householder(n: int) -> Tensor:
    """All entries but the diagonal are equal, so that their rounding errors are, too."""
    return torch.eye(n) - 2.0 / n * torch.ones(n, n)


@each_dtype
def test_rounding_stays_well_within_the_tolerance_also_where_it_conspires(dtype: torch.dtype) -> None:
    """Products of Householder matrices have few different entries: their rounding errors add up to a pattern."""
    eps = torch.finfo(dtype).eps
    targets = [torch.kron(householder(n), householder(n)) for n in (3, 7, 9)]
    targets.append(torch.kron(householder(5), torch.kron(householder(5), householder(3))))
    targets += [householder(n) for n in (5, 70)] + [torch.randn(n, n) for n in (20, 90)]
    for target in targets:
        p = Orthogonal().project(target.to(dtype))
        assert Orthogonal().violation(p) == 0.0
        assert float((torch.linalg.svdvals(p.double()).square() - 1).abs().max()) <= 8 * eps + 1e-10


@each_dtype
def test_what_has_lost_a_direction_is_never_called_orthogonal(dtype: torch.dtype) -> None:
    for shape in ((90, 90), (300, 4), (4, 5000)):
        assert Orthogonal().violation(torch.zeros(shape, dtype=dtype)) == 1.0
        x = torch.eye(*shape, dtype=dtype)
        x[0, 0] = 0.8
        assert Orthogonal().violation(x) == pytest.approx(0.36, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 8)])
def test_large_matrices_in_bfloat16_are_judged_rightly(shape: tuple[int, int]) -> None:
    p = Orthogonal().project(torch.randn(shape).bfloat16())
    assert Orthogonal().violation(p) == 0.0
    assert spectral_norm(p).upper <= 1.0
    distance = float((torch.linalg.svdvals(p.double()).square() - 1).abs().max())
    assert distance <= 1.6 * torch.finfo(torch.bfloat16).eps
    assert Orthogonal().violation(torch.zeros(shape).bfloat16()) == 1.0
    assert Orthogonal().violation((0.8 * p.double()).bfloat16()) == pytest.approx(0.37, abs=0.02)


@each_triv
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch's forward mode
def test_derivatives_go_forward_too(shape: tuple[int, int], triv: str) -> None:
    c = Orthogonal(triv)
    x = torch.randn(shape)
    for function, point in ((c.map, x), (c.project, x + 2 * torch.eye(*shape))):
        reverse = torch.autograd.functional.jacobian(function, point)
        for i, direction in enumerate(torch.eye(point.numel()).reshape(-1, *shape)):
            with torch.autograd.forward_ad.dual_level():
                dual = function(torch.autograd.forward_ad.make_dual(point, direction))
                tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
            wanted = reverse.reshape(*shape, -1)[..., i]
            torch.testing.assert_close(torch.zeros(shape) if tangent is None else tangent, wanted, atol=1e-9, rtol=0)


def test_stiefel_is_the_same_set_under_its_own_name() -> None:
    x = torch.randn(5, 2)
    assert same_bits(Stiefel().project(x), Orthogonal().project(x))
    assert same_bits(Stiefel("cayley").map(x), Orthogonal("cayley").map(x))
    assert from_spec(Stiefel("cayley").spec()) == Stiefel("cayley")
    assert Stiefel() != Orthogonal()
    assert isinstance(Stiefel().parametrization(x), OrthogonalParametrization)
    assert repr(Stiefel().parametrization(x)).startswith("OrthogonalParametrization(Stiefel")
    with pytest.raises(ValueError, match="Stiefel knows the maps expm, cayley"):
        Stiefel("exp")
    with pytest.raises(ValueError, match="Stiefel needs a matrix"):
        Stiefel().project(torch.ones(3))


Registers = Callable[[nn.Module, str], Any]
THEIRS: dict[str, tuple[Registers, Constraint]] = {
    "orthogonal": (geotorch.orthogonal, Orthogonal()),
    "low rank": (lambda m, n: geotorch.low_rank(m, n, 2), Rank(2)),
    "almost orthogonal": (lambda m, n: geotorch.almost_orthogonal(m, n, 0.3), AlmostOrthogonal(0.3)),
    "definite": (geotorch.positive_definite, PSD(0.01)),
    "semidefinite": (geotorch.positive_semidefinite, PSD()),
}
each_of_theirs = pytest.mark.parametrize(("theirs", "ours"), THEIRS.values(), ids=THEIRS.keys())


def register(c: Constraint, layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(layer, "weight", c.parametrization(layer.weight))
    return layer


@each_of_theirs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works_here_and_not_in_geotorch(theirs: Registers, ours: Constraint, dtype: torch.dtype) -> None:
    with pytest.raises(NotImplementedError, match="not implemented for"):
        theirs(nn.Linear(4, 4, dtype=dtype), "weight")
    layer = register(ours, nn.Linear(4, 4, dtype=dtype))
    layer.weight.double().square().sum().backward()
    assert layer.weight.dtype == dtype


@each_of_theirs
def test_the_meta_device_works_here_and_not_in_geotorch(theirs: Registers, ours: Constraint) -> None:
    with pytest.raises(RuntimeError, match=r"Tensor\.item\(\) cannot be called on meta tensors"):
        theirs(nn.Linear(4, 4, device="meta"), "weight")
    assert register(ours, nn.Linear(4, 4, device="meta")).weight.device.type == "meta"


@each_of_theirs
def test_any_matrix_can_be_assigned_here_and_not_in_geotorch(theirs: Registers, ours: Constraint) -> None:
    layer = nn.Linear(4, 4)
    theirs(layer, "weight")
    with pytest.raises(ValueError, match="not contained in"):
        layer.weight = torch.randn(4, 4)
    layer = register(ours, nn.Linear(4, 4))
    for wanted in (torch.randn(4, 4), torch.zeros(4, 4), torch.ones(4, 4)):
        layer.weight = wanted
        torch.testing.assert_close(layer.weight, ours.project(wanted), rtol=1e-12, atol=1e-12)
        layer.weight.sum().backward()


def test_zero_can_be_assigned_to_two_of_theirs() -> None:
    for name, (theirs, _) in THEIRS.items():
        layer = nn.Linear(4, 4)
        theirs(layer, "weight")
        if name in {"low rank", "semidefinite"}:
            layer.weight = torch.zeros(4, 4)
            assert torch.equal(layer.weight, torch.zeros(4, 4))
            continue
        with pytest.raises(ValueError, match="not contained in"):
            layer.weight = torch.zeros(4, 4)


@each_of_theirs
def test_registering_starts_at_the_nearest_point_here_and_at_random_in_geotorch(
    theirs: Registers, ours: Constraint
) -> None:
    layer, before = nn.Linear(4, 4), torch.get_rng_state()
    state = layer.weight.detach().clone(), torch.get_rng_state()
    register(ours, layer)
    torch.testing.assert_close(layer.weight, ours.project(state[0]), rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state[1])
    other = nn.Linear(4, 4)
    before = torch.get_rng_state()
    theirs(other, "weight")
    assert not torch.equal(torch.get_rng_state(), before)


def test_wide_and_tall_matrices_are_contiguous_here_and_not_in_geotorch() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        geotorch.almost_orthogonal(nn.Linear(6, 4), "weight", 0.3)
    for name in ("orthogonal", "low rank"):
        layer = nn.Linear(6, 4)
        THEIRS[name][0](layer, "weight")
        assert not layer.weight.is_contiguous()
    for shape in ((6, 4), (4, 6)):
        layer = nn.Linear(*shape)
        geotorch.orthogonal(layer, "weight")
        assert not layer.parametrizations.weight.original.is_contiguous()
    for c in (Orthogonal(), Rank(2), AlmostOrthogonal(0.3)):
        for shape in ((6, 4), (4, 6), (4, 4)):
            layer = nn.Linear(*shape)
            layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous().mT)
            register(c, layer)
            layer.weight = layer.weight.detach().clone()
            layer.weight = torch.randn(shape).mT
            assert layer.weight.is_contiguous()
            assert layer.parametrizations.weight.original.is_contiguous()
