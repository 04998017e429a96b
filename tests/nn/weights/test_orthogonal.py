"""Laws of the maps to matrices with orthonormal rows or columns: Cholesky, Cayley, exponential, Björck."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.utils.parametrize as P
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.linalg import spectral_norm
from stableopt.nn.weights import METHODS, Geometry, isometry, orthogonal
from stableopt.nn.weights.isometry import inward, newton_schulz, normal_factor, polar, stored, unit_size
from stableopt.nn.weights.orthogonal import Bjorck, Cayley, Cholesky, Exponential, Isometry
from tests.nn.weights.isometries import DTYPES, FAMILIES

LINEAR = Geometry("linear")
MAPS = (Cholesky, Cayley, Exponential, Bjorck)
SCALE_FREE = (Cholesky, Bjorck)
every_map = pytest.mark.parametrize("kind", MAPS, ids=lambda kind: kind.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def original(m: int, n: int, scale: float = 1.0) -> Tensor:
    """An original of condition number 3."""
    Q, _ = torch.linalg.qr(torch.randn(max(m, n), max(m, n)))
    return scale * (Q[:m, :n] if m != n else Q * torch.linspace(1.0, 3.0, n))


# The limit.


@given(
    kind=st.sampled_from(MAPS),
    family=st.sampled_from(sorted(FAMILIES)),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    exponent=st.integers(-40, 40),
    radius=st.sampled_from([1e-3, 0.7, 1.0, 5.0]),
)
def test_the_stored_weight_is_proved_within_the_radius(
    kind: type[Isometry], family: str, dtype: torch.dtype, shape: tuple[int, int], exponent: int, radius: float
) -> None:
    V = (FAMILIES[family](*shape) * 2.0**exponent).to(dtype)
    if not bool(V.isfinite().all()):
        return
    W = kind(LINEAR, radius)(V)
    assert W.dtype == dtype
    assert W.shape == V.shape
    assert W.is_contiguous()
    assert spectral_norm(W).upper <= radius


@every_map
@every_dtype
def test_a_large_weight_is_proved_within_the_radius_and_close_to_it(kind: type[Isometry], dtype: torch.dtype) -> None:
    W = kind(LINEAR, 2.0)(original(160, 96).to(dtype))
    gap = 1.0 - spectral_norm(W).upper / 2.0
    assert 0.0 <= gap <= max(2.0 * torch.finfo(dtype).eps, 1e-5 if dtype == torch.float32 else 1e-10)


@every_map
@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (3, 5), (12, 12)])
def test_all_singular_values_are_the_radius(kind: type[Isometry], shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(kind(LINEAR, 3.0)(original(*shape)))
    torch.testing.assert_close(values, torch.full_like(values, 3.0), rtol=1e-3 if kind is Bjorck else 1e-10, atol=0.0)


def test_a_newton_schulz_step_ends_within_1_exactly_up_to_norm_2() -> None:
    s = torch.linspace(0.0, 2.0, 201)
    assert float(newton_schulz(torch.diag(s), 1).abs().max()) == 1.0
    assert float(newton_schulz(torch.tensor([[2.0]]), 1)) == -1.0
    assert float(newton_schulz(torch.tensor([[2.0 + 1e-9]]), 1).abs()) > 1.0
    torch.testing.assert_close(newton_schulz(torch.diag(s), 1).diagonal(), 1.5 * s - 0.5 * s**3)


def test_singular_values_grow_towards_one_and_never_pass_it() -> None:
    s = torch.linspace(0.01, 1.0, 50)
    after = [newton_schulz(torch.diag(s), k).diagonal() for k in range(12)]
    assert all(bool((b >= a).all() and (b <= 1.0 + 1e-15).all()) for a, b in itertools.pairwise(after))
    assert float(after[-1][s > 0.1].min()) > 0.999


@every_map
def test_an_error_as_large_as_the_result_does_not_break_the_limit(
    kind: type[Isometry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes before the last Newton-Schulz step may be off by a factor of 2."""
    step = orthogonal.newton_schulz
    monkeypatch.setattr(orthogonal, "newton_schulz", lambda Q, steps: step(1.9 * Q, steps))
    assert spectral_norm(kind(LINEAR)(original(9, 6))).upper <= 1.0


@every_map
def test_a_jump_of_the_original_is_followed_at_once(kind: type[Isometry]) -> None:
    method, V = kind(LINEAR), original(8, 8)
    method(V)
    u, v = torch.randn(8, 1), torch.randn(1, 8)
    assert spectral_norm(method(0.1 * torch.randn(8, 8) + 1e4 * u @ v)).upper <= 1.0
    assert method(V).equal(kind(LINEAR)(V))


@pytest.mark.parametrize("kind", SCALE_FREE, ids=lambda kind: kind.name)
@every_dtype
@pytest.mark.parametrize("scale", [2.0**-26, 2.0**-13, 2.0**9])
def test_the_scale_of_the_original_does_not_matter(kind: type[Isometry], dtype: torch.dtype, scale: float) -> None:
    V = original(20, 12).to(dtype)
    if (
        dtype == torch.float16
    ):  # below 1 it keeps the derivative finite instead, and the result depends on the scale a little
        torch.testing.assert_close(kind(LINEAR)(max(scale, 0.1) * V), kind(LINEAR)(V), rtol=0.0, atol=4e-3)
    else:
        torch.testing.assert_close(kind(LINEAR)(scale * V), kind(LINEAR)(V), rtol=0.0, atol=0.0)


# Independent oracles.


@pytest.mark.parametrize("shape", [(6, 6), (7, 3)])
def test_cholesky_is_the_q_of_a_qr_decomposition(shape: tuple[int, int]) -> None:
    V = original(*shape)
    Q, R = torch.linalg.qr(V)
    torch.testing.assert_close(Cholesky(LINEAR)(V), Q * R.diagonal().sign(), rtol=0.0, atol=1e-11)
    if shape[0] > shape[1]:
        torch.testing.assert_close(Cholesky(LINEAR)(V.mT), (Q * R.diagonal().sign()).mT, rtol=0.0, atol=1e-11)


def test_cayley_is_the_transform_of_the_skew_part() -> None:
    V = torch.randn(5, 5)
    A = V - V.mT
    expected = torch.linalg.inv(torch.eye(5) + A) @ (torch.eye(5) - A)
    torch.testing.assert_close(Cayley(LINEAR)(V), expected, rtol=0.0, atol=1e-11)


def test_cayley_of_a_tall_matrix_is_its_rectangular_transform() -> None:
    V = torch.randn(7, 3)
    U, Y = V[:3], V[3:]
    inverse = torch.linalg.inv(torch.eye(3) + U - U.mT + Y.mT @ Y)
    expected = torch.cat([inverse @ (torch.eye(3) - U + U.mT - Y.mT @ Y), -2.0 * Y @ inverse])
    torch.testing.assert_close(Cayley(LINEAR)(V), expected, rtol=0.0, atol=1e-11)
    torch.testing.assert_close(Cayley(LINEAR)(V.mT), expected.mT, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("shape", [(5, 5), (6, 2), (1, 1)])
def test_expm_is_the_exponential_of_the_skew_matrix(shape: tuple[int, int]) -> None:
    m, n = shape
    V = torch.randn(shape)
    A = np.zeros((m, m))
    A[:n, :n] = (V[:n] - V[:n].mT).numpy()
    A[n:, :n], A[:n, n:] = V[n:].numpy(), -V[n:].mT.numpy()
    expected = torch.from_numpy(scipy.linalg.expm(A)[:, :n])
    torch.testing.assert_close(Exponential(LINEAR)(V), expected, rtol=0.0, atol=1e-11)
    torch.testing.assert_close(Exponential(LINEAR)(V.mT), expected.mT, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("shape", [(6, 6), (7, 3), (3, 7)])
def test_bjorck_tends_to_the_polar_factor(shape: tuple[int, int]) -> None:
    V = original(*shape)
    U, _, Vh = np.linalg.svd(V.numpy(), full_matrices=False)
    few, many = (Bjorck(LINEAR, steps=k)(V).numpy() for k in (2, 12))
    assert np.abs(many - U @ Vh).max() < 1e-10 < np.abs(few - U @ Vh).max()


# Derivatives.


@every_map
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)])
def test_the_derivative_is_right(kind: type[Isometry], shape: tuple[int, int]) -> None:
    V = (0.5 * original(*shape)).requires_grad_()
    assert torch.autograd.gradcheck(kind(LINEAR, 2.0), (V,), atol=1e-6)


@every_map
@every_dtype
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_value_and_derivative_are_finite_everywhere(kind: type[Isometry], dtype: torch.dtype, family: str) -> None:
    V = FAMILIES[family](6, 4).to(dtype).requires_grad_()
    W = kind(LINEAR)(V)
    (W * torch.linspace(-1.0, 1.0, 24).reshape(6, 4).to(dtype)).sum().backward()
    assert V.grad is not None
    assert bool(W.isfinite().all())
    assert bool(V.grad.isfinite().all())


@every_map
@every_dtype
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_the_original_of_a_drawn_weight_gets_a_gradient(
    kind: type[Isometry], dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    method = kind(LINEAR)
    V = method.right_inverse(torch.randn(shape).to(dtype)).requires_grad_()
    (method(V) * torch.randn(shape).to(dtype)).sum().backward()
    assert V.grad is not None
    assert float(V.grad.abs().max()) > 1e-3


# Coming back.


def rotation(n: int) -> Tensor:
    """A matrix of determinant 1 whose angles are below 3."""
    A = torch.randn(n, n)
    A = A - A.mT
    return torch.linalg.matrix_exp(A * (3.0 / float(torch.linalg.matrix_norm(A, 2))))


@every_map
def test_members_come_back(kind: type[Isometry]) -> None:
    method = kind(LINEAR, 2.0)
    member = 2.0 * rotation(9)
    torch.testing.assert_close(method(method.right_inverse(member)), member, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("kind", [Cholesky, Cayley, Bjorck], ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (1, 6)])
def test_rectangular_weights_come_back_as_their_polar_factor(kind: type[Isometry], shape: tuple[int, int]) -> None:
    W = torch.randn(shape)
    method = kind(LINEAR, 0.5)
    torch.testing.assert_close(method(method.right_inverse(W)), 0.5 * polar(W), rtol=0.0, atol=1e-6)


def test_rectangular_weights_come_back_near_by_the_exponential() -> None:
    method = Exponential(LINEAR)
    for _ in range(5):
        Q = polar(torch.randn(12, 4))
        far = torch.linalg.matrix_norm(torch.eye(12, 4) - Q)
        assert float(torch.linalg.matrix_norm(method(method.right_inverse(Q)) - Q)) < 0.6 * float(far)


@pytest.mark.parametrize("kind", [Cayley, Exponential], ids=lambda kind: kind.name)
def test_reflections_are_out_of_reach_and_come_back_as_a_rotation(kind: type[Isometry]) -> None:
    method = kind(LINEAR)
    Q = rotation(6) @ torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    W = method(method.right_inverse(Q))
    assert float(torch.linalg.det(Q)) < 0.0 < float(torch.linalg.det(W))
    values = torch.linalg.svdvals(W - Q)  # one direction is turned around, the others stay
    assert float(values[0]) == pytest.approx(2.0, abs=1e-3)
    assert float(values[1]) < 1e-2


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.02, 1.0])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)])
def test_the_polar_factor_is_the_nearest_isometry(noise: float, shape: tuple[int, int]) -> None:
    W = 7.0 * torch.linalg.qr(torch.randn(max(shape), min(shape))).Q.reshape(max(shape), -1)
    W = (W if shape[0] >= shape[1] else W.mT) + noise * torch.randn(shape)
    U, _, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    np.testing.assert_allclose(polar(W).numpy(), U @ Vh, rtol=0.0, atol=1e-13)


# Half precision.


def test_rounding_to_half_precision_costs_about_one_unit() -> None:
    Q = torch.linalg.qr(torch.randn(300, 200)).Q.float()
    for dtype in (torch.bfloat16, torch.float16):
        norm = spectral_norm(inward(Q, dtype, 1.0)).upper
        assert 1.0 - 1.2 * torch.finfo(dtype).eps <= norm <= 1.0
        assert spectral_norm(Q.to(dtype)).upper > 1.0  # rounding alone is not enough


def one_sided(margin: float) -> Tensor:
    """A multiple of an orthogonal matrix whose entries, after the shrinking, are all rounded upwards in bfloat16."""
    R = 1.0 - 2.0 * torch.eye(4)
    R = torch.kron(
        torch.kron(R, R), R
    ).float()  # a Hadamard matrix with equal row sums, so it maps (1, ..., 1) to a multiple
    middle = 0.125 * (1.0 + 2.0**-8)  # half way between two numbers
    return (R * middle + 2.0**-20) / (1.0 - margin * 2.0**-7)


def test_where_the_rounding_errors_conspire_the_worst_case_is_kept_away_from() -> None:
    for margin in (0.8, 1.6):
        W = one_sided(margin)
        size = spectral_norm(W).upper
        naive = spectral_norm(((1.0 - margin * 2.0**-7) * W).bfloat16()).upper
        assert naive > size  # shrunk by more than a unit, and yet larger than before
        assert spectral_norm(stored(W, torch.bfloat16, size)).upper <= size


def test_subnormal_weights_in_half_precision_are_within_the_radius() -> None:
    for radius in (1e-7, 1e-6, 1e-4):
        W = inward(polar(torch.randn(40, 30)).float(), torch.float16, radius)
        assert spectral_norm(W).upper <= radius


# Cholesky cannot fail.


def test_an_indefinite_gram_matrix_is_shifted_by_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isometry, "_SHIFT", -1e9)  # a shift that leaves the matrix indefinite
    V = torch.ones(6, 3).requires_grad_()
    Z = normal_factor(V)
    Z.square().sum().backward()
    assert V.grad is not None
    assert bool(Z.isfinite().all() and V.grad.isfinite().all())
    assert 0.1 < spectral_norm(Z).upper <= 1.0 + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_normal_factor_of_any_family_is_a_contraction(dtype: torch.dtype) -> None:
    for family in FAMILIES.values():
        Z = normal_factor(unit_size(family(200, 60).to(dtype), dtype))
        assert spectral_norm(Z).upper <= 1.01  # before the Newton-Schulz step


# The ecosystem.


def limited(kind: type[Isometry], n: int = 6, m: int = 4) -> nn.Linear:
    """A layer with the map."""
    layer = nn.Linear(n, m)
    P.register_parametrization(layer, "weight", kind(LINEAR))
    return layer


@every_map
def test_training_evaluation_and_copies_agree_to_the_bit(kind: type[Isometry]) -> None:
    layer = limited(kind)
    x = torch.randn(3, 6)
    other = limited(kind)
    other.load_state_dict(layer.state_dict())
    for twin in (layer.train(), copy.deepcopy(layer).eval(), other):
        assert twin(x).equal(layer(x))
    assert list(layer.state_dict()) == ["bias", "parametrizations.weight.original"]
    state = {k: 2.0 * v for k, v in layer.state_dict().items()}
    other.load_state_dict(state)
    assert torch.func.functional_call(layer, state, (x,)).equal(other(x))


@every_map
def test_the_map_compiles_as_one_graph(kind: type[Isometry]) -> None:
    layer = limited(kind)
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@every_map
def test_shapes_and_dtypes_are_known_on_the_meta_device(kind: type[Isometry]) -> None:
    with torch.device("meta"):
        layer = limited(kind)
        assert layer(torch.empty(3, 6)).shape == (3, 4)
    assert layer.weight.is_meta


@every_map
def test_autocast_does_not_lower_the_precision(kind: type[Isometry]) -> None:
    V = original(8, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        W = kind(LINEAR)(V)
    assert W.equal(kind(LINEAR)(V))


@every_map
def test_empty_weights_stay_empty(kind: type[Isometry]) -> None:
    assert kind(LINEAR)(torch.zeros(0, 3)).shape == (0, 3)
    assert kind(LINEAR).right_inverse(torch.zeros(3, 0)).shape == (3, 0)


# Bad input.


@every_map
def test_what_is_no_matrix_is_refused(kind: type[Isometry]) -> None:
    with pytest.raises(ValueError, match="kind 'conv'"):
        kind(Geometry("conv"))
    with pytest.raises(ValueError, match="limits l2"):
        kind(LINEAR, 1.0, "linf")
    for shape in ((3,), (2, 2, 2)):
        with pytest.raises(ValueError, match="needs a matrix"):
            kind(LINEAR)(torch.zeros(shape))
    with pytest.raises(TypeError, match="real floating"):
        kind(LINEAR)(torch.zeros(2, 2, dtype=torch.int64))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            kind(LINEAR).right_inverse(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_bjorck_needs_a_step(steps: float) -> None:
    with pytest.raises(ValueError, match="steps must be"):
        Bjorck(LINEAR, steps=steps)


def test_the_methods_are_registered() -> None:
    for kind in MAPS:
        assert METHODS[kind.name] is kind
        assert kind.by_construction
        assert kind.norms == {"l2"}
