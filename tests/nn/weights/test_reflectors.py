"""Laws of the block reflector."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.utils.parametrize as P
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stableopt.nn.weights.reflectors as reflectors
from stableopt.linalg import spectral_norm
from stableopt.nn.weights import METHODS, BlockReflector, Geometry
from tests.nn.weights.isometries import DTYPES, FAMILIES, dense_reflector

LINEAR = Geometry("linear")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(8, 8), (9, 4), (4, 9), (1, 6), (6, 1)]


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    part=st.floats(0.0, 1.0),
    exponent=st.integers(-40, 40),
    radius=st.sampled_from([1e-3, 0.7, 1.0, 5.0]),
)
def test_the_stored_weight_is_proved_within_the_radius(
    family: str, dtype: torch.dtype, shape: tuple[int, int], part: float, exponent: int, radius: float
) -> None:
    N = max(shape)
    V = (FAMILIES[family](N, max(1, round(part * N))) * 2.0**exponent).to(dtype)
    if not bool(V.isfinite().all()):
        return
    W = BlockReflector(LINEAR, radius, shape=shape)(V)
    assert W.dtype == dtype
    assert W.shape == shape
    assert W.is_contiguous()
    assert spectral_norm(W).upper <= radius


@every_dtype
@pytest.mark.parametrize("shape", [(256, 256), (300, 100), (100, 300)])
def test_a_large_weight_is_proved_within_the_radius_and_close_to_it(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    method = BlockReflector(LINEAR, 2.0)
    V = torch.randn_like(method.right_inverse(torch.zeros(shape, dtype=dtype)))
    gap = 1.0 - spectral_norm(method(V)).upper / 2.0
    assert 0.0 <= gap <= max(2.0 * torch.finfo(dtype).eps, 1e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_reflection_at_the_columns(shape: tuple[int, int], rank: int) -> None:
    V = torch.randn(max(shape), rank) * 7.0
    W = BlockReflector(LINEAR, 3.0, shape=shape)(V)
    torch.testing.assert_close(W, 3.0 * dense_reflector(V, *shape), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_singular_values_are_the_radius(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(BlockReflector(LINEAR, 3.0, shape=shape)(torch.randn(max(shape), 2)))
    torch.testing.assert_close(values, torch.full_like(values, 3.0), rtol=1e-10, atol=0.0)


def test_columns_change_sign_and_what_is_orthogonal_to_them_stays() -> None:
    V = torch.randn(10, 3)
    W = BlockReflector(LINEAR, shape=(10, 10))(V)
    orthogonal = torch.linalg.qr(torch.cat([V, torch.randn(10, 7)], dim=1)).Q[:, 3:]
    torch.testing.assert_close(W @ V, -V, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(W @ orthogonal, orthogonal, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(W, W.mT, rtol=0.0, atol=1e-14)


def test_an_error_as_large_as_the_result_does_not_break_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    step = reflectors.newton_schulz
    V = torch.randn(9, 4)
    for factor in (0.5, 1.9):
        monkeypatch.setattr(reflectors, "newton_schulz", lambda Z, steps, f=factor: step(f * Z, steps))
        assert spectral_norm(BlockReflector(LINEAR, shape=(9, 9))(V)).upper <= 1.0
    monkeypatch.setattr(reflectors, "newton_schulz", lambda Z, steps: step(2.1 * Z, steps))
    assert spectral_norm(BlockReflector(LINEAR, shape=(9, 9))(V)).upper > 1.0


def test_a_jump_of_the_original_is_followed_at_once() -> None:
    method, V = BlockReflector(LINEAR, shape=(8, 8)), torch.randn(8, 2)
    before = method(V)
    assert spectral_norm(method(torch.full((8, 2), 1e12) + torch.randn(8, 2))).upper <= 1.0
    assert method(V).equal(before)


@every_dtype
@pytest.mark.parametrize("scale", [2.0**-26, 2.0**-13, 2.0**9])
def test_the_scale_of_the_original_does_not_matter(dtype: torch.dtype, scale: float) -> None:
    V = torch.randn(20, 3).to(dtype)
    method = BlockReflector(LINEAR, shape=(20, 20))
    exact = dtype != torch.float16
    torch.testing.assert_close(
        method((scale if exact else max(scale, 0.25)) * V), method(V), rtol=0.0, atol=0.0 if exact else 4e-3
    )


# Derivatives.


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (2, 4)])
def test_the_derivative_is_right(shape: tuple[int, int]) -> None:
    V = torch.randn(max(shape), 2).requires_grad_()
    assert torch.autograd.gradcheck(BlockReflector(LINEAR, 2.0, shape=shape), (V,), atol=1e-6)


@every_dtype
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_value_and_derivative_are_finite_everywhere(dtype: torch.dtype, family: str) -> None:
    V = FAMILIES[family](6, 2).to(dtype).requires_grad_()
    W = BlockReflector(LINEAR, shape=(6, 4))(V)
    (W * torch.linspace(-1.0, 1.0, 24).reshape(6, 4).to(dtype)).sum().backward()
    assert V.grad is not None
    assert bool(W.isfinite().all())
    assert bool(V.grad.isfinite().all())


def test_zero_gives_the_identity() -> None:
    torch.testing.assert_close(BlockReflector(LINEAR, shape=(3, 4))(torch.zeros(4, 2)), torch.eye(3, 4))


@every_dtype
@pytest.mark.parametrize("shape", [(8, 8), (9, 4), (4, 9), (32, 4), (4, 32)])
@pytest.mark.parametrize("start", ["drawn", "identity", "zero"])
def test_every_column_of_the_original_gets_a_gradient(dtype: torch.dtype, shape: tuple[int, int], start: str) -> None:
    method = BlockReflector(LINEAR)
    W = {"drawn": torch.randn(shape), "identity": torch.eye(*shape), "zero": torch.zeros(shape)}[start]
    V = method.right_inverse(W.to(dtype)).requires_grad_()
    (method(V) * torch.randn(shape).to(dtype)).sum().backward()
    assert V.grad is not None
    assert float(V.grad.abs().amax(0).min()) > 1e-4


# Coming back.


@pytest.mark.parametrize("shape", [*SHAPES, (40, 10), (10, 40)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_members_come_back(shape: tuple[int, int], rank: int) -> None:
    method = BlockReflector(LINEAR, 0.5, rank=rank)
    rank = min(rank, max(shape))
    member = 0.5 * dense_reflector(torch.randn(max(shape), rank), *shape)
    torch.testing.assert_close(method(method.right_inverse(member)), member, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(method(method.right_inverse(8.0 * member)), member, rtol=0.0, atol=1e-9)  # any multiple


def test_no_reflection_of_that_rank_is_nearer_to_a_square_weight() -> None:
    for _ in range(5):
        W = torch.linalg.qr(torch.randn(7, 7)).Q
        method = BlockReflector(LINEAR, rank=2)
        nearest = torch.linalg.matrix_norm(method(method.right_inverse(W)) - W)
        others = [torch.linalg.matrix_norm(method(torch.randn(7, 2)) - W) for _ in range(200)]
        assert float(nearest) <= float(min(others)) + 1e-9


@pytest.mark.parametrize(
    ("shape", "rank", "columns"),
    [((1024, 1024), None, 64), ((4096, 1024), None, 128), ((64, 64), None, 16), ((10, 10), None, 5), ((1, 1), None, 1),
     ((10, 784), None, 16), ((10, 784), 20, 20), ((3, 4), 20, 4), ((10, 100), 0.25, 25), ((2, 2), 0.01, 1)],
)  # fmt: skip
def test_the_rank_is_what_was_asked_for(shape: tuple[int, int], rank: float | None, columns: int) -> None:
    with torch.device("meta"):
        assert BlockReflector(LINEAR, rank=rank).right_inverse(torch.empty(shape)).shape == (max(shape), columns)


# The ecosystem.


def limited(n: int = 6, m: int = 4) -> nn.Linear:
    """A layer with the map."""
    layer = nn.Linear(n, m)
    P.register_parametrization(layer, "weight", BlockReflector(LINEAR))
    return layer


def test_training_evaluation_and_copies_agree_to_the_bit() -> None:
    layer, other = limited(), limited()
    x = torch.randn(3, 6)
    other.load_state_dict(layer.state_dict())
    for twin in (layer.train(), copy.deepcopy(layer).eval(), other):
        assert twin(x).equal(layer(x))
    assert list(layer.state_dict()) == ["bias", "parametrizations.weight.original"]
    state = {k: v + 0.5 for k, v in layer.state_dict().items()}
    other.load_state_dict(state)
    assert torch.func.functional_call(layer, state, (x,)).equal(other(x))


def test_the_map_compiles_as_one_graph() -> None:
    layer, x = limited(), torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_shapes_and_dtypes_are_known_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = limited()
        assert layer(torch.empty(3, 6)).shape == (3, 4)


def test_any_numbers_after_the_meta_device_are_within_the_radius() -> None:
    with torch.device("meta"):
        layer = limited()
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    assert spectral_norm(layer.weight).upper <= 1.0


def test_a_cast_after_registration_keeps_the_limit() -> None:
    layer = limited(40, 30)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert spectral_norm(layer.to(dtype).weight).upper <= 1.0


def test_autocast_does_not_lower_the_precision() -> None:
    V, method = torch.randn(8, 2).float(), BlockReflector(LINEAR, shape=(8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        W = method(V)
    assert W.equal(method(V))


def test_empty_weights_stay_empty() -> None:
    method = BlockReflector(LINEAR)
    assert method(method.right_inverse(torch.zeros(0, 3))).shape == (0, 3)


# Bad input.


def test_bad_arguments_are_refused() -> None:
    for rank in (0, -1, 1.5, 0.0, True, "2"):
        with pytest.raises(ValueError, match="rank must be"):
            BlockReflector(LINEAR, rank=rank)  # pyright: ignore[reportArgumentType]
    for shape in ((2,), (2, 2, 2), (2, -1), (2, 2.0)):
        with pytest.raises(ValueError, match="shape must be"):
            BlockReflector(LINEAR, shape=shape)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="kind 'conv'"):
        BlockReflector(Geometry("conv"))
    with pytest.raises(ValueError, match="limits l2"):
        BlockReflector(LINEAR, 1.0, "linf")


def test_bad_tensors_are_refused() -> None:
    method = BlockReflector(LINEAR)
    with pytest.raises(RuntimeError, match="does not know the shape"):
        method(torch.zeros(2, 1))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            method.right_inverse(torch.tensor([[1.0, bad]]))
    assert method.shape is None  # a refused weight leaves no trace
    method.right_inverse(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="has shape \\(3, 5\\)"):
        method.right_inverse(torch.zeros(5, 3))
    for V in (torch.zeros(3, 1), torch.zeros(5, 6), torch.zeros(5, 0)):
        with pytest.raises(ValueError, match="has 5 rows"):
            method(V)
    with pytest.raises(ValueError, match="needs a matrix"):
        method(torch.zeros(5))
    with pytest.raises(TypeError, match="real floating"):
        method(torch.zeros(5, 1, dtype=torch.int64))


def test_the_method_is_registered() -> None:
    assert METHODS["bro"] is BlockReflector
    assert BlockReflector.by_construction
    assert BlockReflector.norms == {"l2"}


def test_the_rank_bounds_the_distance_to_the_identity() -> None:
    W = BlockReflector(LINEAR, shape=(12, 12))(torch.randn(12, 3))
    assert int(torch.linalg.matrix_rank(W - torch.eye(12), tol=1e-9)) == 3
