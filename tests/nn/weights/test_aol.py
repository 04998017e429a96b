"""Laws of almost orthogonal layers, against dense matrices and the dense operator that torch's own layers make of unit images."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.utils.parametrize as P
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.nn import GroupSort, export, lipschitz, stabilize
from stableopt.nn.weights import METHODS, Geometry
from stableopt.nn.weights.aol import AlmostOrthogonal, _balance, _gram_power
from tests.linalg.conv_oracle import Case, cases, operator_norm
from tests.nn.weights.isometries import DTYPES, FAMILIES

LINEAR = Geometry("linear")


def norm(W: Tensor) -> float:
    return float(torch.linalg.matrix_norm(W.detach().double(), 2))


def scales(W: Tensor, steps: int) -> Tensor:
    """The formula as it is written down, for the columns of a matrix, in float64."""
    p = 2 ** (steps - 1)
    power = torch.linalg.matrix_power(W.double().mT @ W.double(), p)
    return power.abs().sum(dim=1) ** (1.0 / (2 * p))


def scaled_by(case: Case, factor: float, steps: int) -> float:
    """The exact norm of the layer of a case with its kernel mapped and multiplied by a factor."""
    layer = case.layer()
    W = AlmostOrthogonal(Geometry.of(layer), steps=steps)(layer.weight) * factor
    layer.weight.copy_(W)
    channels = case.groups * case.inside
    basis = torch.eye(channels * math.prod(case.size)).reshape(-1, channels, *case.size)
    columns = layer(basis).flatten(1)
    return float(torch.linalg.svdvals(columns)[0]) if columns.numel() else 0.0


# Matrices.


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    steps=st.integers(1, 5),
    family=st.sampled_from(sorted(FAMILIES)),
    dtype=st.sampled_from(DTYPES),
    radius=st.sampled_from((0.1, 1.0, 3.0)),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=300)
def test_matrices_stay_within_the_radius_as_stored(
    m: int, n: int, steps: int, family: str, dtype: torch.dtype, radius: float, seed: int
) -> None:
    torch.manual_seed(seed)
    V = FAMILIES[family](m, n).to(dtype).requires_grad_()
    limit = AlmostOrthogonal(LINEAR, radius, steps=steps)
    W = limit(V)
    assert LINEAR.proved(W.detach()).upper <= radius
    assert W.dtype == dtype
    assert W.is_contiguous()
    (W * torch.randn(m, n).to(dtype)).sum().backward()
    assert bool(V.grad.isfinite().all())


@given(m=st.integers(1, 9), n=st.integers(1, 9), steps=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_the_result_is_the_formula(m: int, n: int, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    V = torch.randn(m, n)
    W = AlmostOrthogonal(LINEAR, 2.0, steps=steps)(V)
    expected = V / scales(V, steps) if n < m else (V.mT / scales(V.mT, steps)).mT
    torch.testing.assert_close(W, 2.0 * expected, rtol=1e-12, atol=1e-13)


@given(n=st.integers(1, 8), steps=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_the_diagonal_dominates_the_gram_matrix(n: int, steps: int, seed: int) -> None:
    """What the proof says, before any norm: diag(t)^2 - G is positive semidefinite. At the witness less is not enough."""
    torch.manual_seed(seed)
    W = torch.randn(n + 2, n)
    t = AlmostOrthogonal(LINEAR, steps=steps).bounds(W).flatten()
    G = W.mT @ W
    size = norm(G)
    assert float(torch.linalg.eigvalsh(torch.diag(t**2) - G)[0]) >= -1e-13 * size
    positive = W.abs()  # then the Perron vector is a witness of equality for one step
    t = AlmostOrthogonal(LINEAR).bounds(positive).flatten()
    G = positive.mT @ positive
    low = float(torch.linalg.eigvalsh(torch.diag(t**2) - G)[0])
    assert abs(low) <= 1e-12 * norm(G)
    assert float(torch.linalg.eigvalsh(torch.diag(t**2 * (1 - 1e-6)) - G)[0]) < 0.0


def test_orthogonal_channels_and_weights_of_one_sign_reach_the_radius() -> None:
    Q = torch.linalg.qr(torch.randn(9, 6))[0]
    for steps in (1, 2, 4):
        for W in (Q, 5.0 * Q.mT):
            torch.testing.assert_close(AlmostOrthogonal(LINEAR, steps=steps)(W), W / norm(W), rtol=0, atol=1e-12)
    assert 1.0 - 1e-12 < norm(AlmostOrthogonal(LINEAR)(torch.rand(6, 8))) <= 1.0


def test_more_steps_come_closer_to_the_radius() -> None:
    torch.manual_seed(0)
    V = torch.randn(48, 48)
    reached = [norm(AlmostOrthogonal(LINEAR, steps=steps)(V)) for steps in range(1, 7)]
    assert reached == sorted(reached)
    assert reached[0] < 0.8
    assert reached[3] > 0.9
    assert reached[5] > 0.98
    # in the limit every channel is divided by the norm
    W = AlmostOrthogonal(LINEAR, steps=6)(V)
    assert float((W - V / norm(V)).abs().max()) < 0.03 * float(W.abs().max())


def test_the_smaller_side_is_scaled() -> None:
    wide = torch.linalg.qr(torch.randn(40, 5))[0].mT * torch.rand(5, 1)
    assert float(torch.linalg.svdvals(AlmostOrthogonal(LINEAR)(wide))[-1]) > 1.0 - 1e-12
    assert float(torch.linalg.svdvals(AlmostOrthogonal(LINEAR)(wide.mT))[-1]) > 1.0 - 1e-12


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1e8, 1e150])
def test_the_size_of_the_original_does_not_matter(scale: float) -> None:
    V = torch.randn(5, 7)
    for steps in (1, 3, 6):
        limit = AlmostOrthogonal(LINEAR, steps=steps)
        if scale > 1e-12:
            torch.testing.assert_close(limit(scale * V), limit(V), rtol=1e-12, atol=0)
        else:  # below what a gradient can hold the weight fades out
            assert bool((limit(scale * V).abs() <= limit(V).abs() * (1 + 1e-12)).all())


def test_channels_of_zeros_stay_zero_and_can_leave() -> None:
    for dtype in DTYPES:
        for steps in (1, 2, 5):
            V = torch.randn(6, 4).to(dtype)
            V[:, 1] = 0.0
            V.requires_grad_()
            W = AlmostOrthogonal(LINEAR, steps=steps)(V)
            assert not W[:, 1].any()
            W.sum().backward()
            assert bool(V.grad.isfinite().all())
            assert float(V.grad[:, 1].abs().max()) > 0.0


def test_the_derivative_is_exact() -> None:
    for steps in (1, 2, 3):
        assert torch.autograd.gradcheck(
            AlmostOrthogonal(LINEAR, steps=steps), torch.randn(4, 3, requires_grad=True), eps=1e-6, atol=1e-6
        )
        kernel = torch.randn(2, 3, 3, requires_grad=True)
        strided = AlmostOrthogonal(Geometry("conv", (2,)), steps=steps)
        assert torch.autograd.gradcheck(strided, kernel, eps=1e-6, atol=1e-6)


# Convolutions.


@given(case=cases(160), steps=st.integers(1, 3), dtype=st.sampled_from(DTYPES))
@settings(max_examples=150)
def test_convolutions_of_every_geometry_stay_within_the_radius(case: Case, steps: int, dtype: torch.dtype) -> None:
    geometry = Geometry.of(case.layer())
    V = case.weight.to(dtype)
    W = AlmostOrthogonal(geometry, 1.0, steps=steps)(V)
    assert geometry.proved(W).upper <= 1.0
    assert W.shape == V.shape
    if dtype == torch.float64 and case.dtype == torch.float64:
        assert scaled_by(case, 1.0, steps) <= 1.0 + 1e-13


@pytest.mark.parametrize(
    "case",
    [
        Case((3,), (2,), (1,), (0,), (12,), inside=2, outside=2, kind="positive"),
        Case((4,), (2,), (1,), (2,), (12,), inside=2, outside=3, kind="ones"),
        Case((3, 3), (1, 1), (1, 1), (0, 0), (7, 7), inside=1, outside=2, kind="positive"),
        Case((3,), (1,), (1,), (2,), (40,), inside=1, outside=1, kind="gauss"),
        Case((3,), (2,), (1,), (0,), (20,), inside=2, outside=1, transposed=True, kind="positive"),
    ],
    ids=str,
)
def test_the_bound_is_met_and_a_slightly_larger_kernel_breaks_it(case: Case) -> None:
    """At a witness of one sign the row sums are the norm: of large images, up to the grid factor of the proof that is held back."""
    reached = scaled_by(case, 1.0, 1)
    assert 0.8 < reached <= 1.0 + 1e-13
    assert scaled_by(case, 1.001 / reached, 1) > 1.0


def test_one_sign_on_a_torus_is_exactly_the_radius_but_for_the_grid() -> None:
    """On a torus the constant image is the witness; what the proof may lose on its grid is the only loss."""
    layer = nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular", bias=False)
    W = AlmostOrthogonal(Geometry.of(layer))(torch.rand(3, 3, 3))
    sup = norm(W.sum(dim=-1))
    assert abs(sup * 1.0 / math.cos(math.pi * 2 / 48) - 1.0) < 1e-11


def test_a_stride_loses_nothing() -> None:
    """Kernels that never meet, for kernel = stride, are scaled as matrices: the radius is reached where they are orthogonal."""
    Q = torch.linalg.qr(torch.randn(12, 12))[0].reshape(12, 3, 2, 2)
    W = AlmostOrthogonal(Geometry("conv", (2, 2)))(7.0 * Q)
    torch.testing.assert_close(W, Q, rtol=0, atol=1e-11)
    unit = AlmostOrthogonal(Geometry("conv"))(Q)
    assert norm(unit.flatten(1)) < 0.9


def test_phases_of_a_tall_kernel_are_scaled_on_their_own() -> None:
    """With more outputs than inputs times phases the columns are scaled, one number per channel and phase of a tap."""
    V = torch.randn(20, 2, 5)
    limit = AlmostOrthogonal(Geometry("conv", (2,)))
    ratio = (limit(V) / V).detach()
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio))
    assert torch.allclose(ratio[..., 0], ratio[..., 2])
    assert torch.allclose(ratio[..., 1], ratio[..., 3])
    assert not torch.allclose(ratio[..., 0], ratio[..., 1])


def test_groups_are_scaled_on_their_own() -> None:
    V = torch.randn(6, 2, 3)
    grouped = AlmostOrthogonal(Geometry("conv", groups=3))
    single = AlmostOrthogonal(Geometry("conv"))
    for g in range(3):
        torch.testing.assert_close(grouped(V)[2 * g : 2 * g + 2], single(V[2 * g : 2 * g + 2]), rtol=1e-12, atol=1e-14)
    tall, one = AlmostOrthogonal(Geometry("conv", groups=2)), torch.randn(10, 2, 3)
    for g in range(2):
        torch.testing.assert_close(tall(one)[5 * g : 5 * g + 5], single(one[5 * g : 5 * g + 5]), rtol=1e-12, atol=1e-14)


@given(
    k=st.integers(1, 4), m=st.integers(1, 3), n=st.integers(1, 3), steps=st.integers(1, 3), seed=st.integers(0, 10**6)
)
@settings(max_examples=50)
def test_the_lags_of_the_power_are_those_of_a_large_torus(k: int, m: int, n: int, steps: int, seed: int) -> None:
    """Against the dense operator on a torus so large that nothing wraps around: row sums of the p-th power of its Gram matrix."""
    torch.manual_seed(seed)
    W = torch.randn(m, n, k)
    p = 2 ** (steps - 1)
    size = 2 * p * (k - 1) + 3
    dense = torch.zeros(m, size, n, size)
    for x in range(size):
        for t in range(k):
            dense[:, x, :, (x + t) % size] += W[..., t]
    T = dense.reshape(m * size, n * size)
    power = torch.linalg.matrix_power(T @ T.mT, p).abs().reshape(m, size, m, size)
    matrix, scale = _gram_power(W[None], steps)
    torch.testing.assert_close(matrix[0] * scale[0] ** p, power[:, 0].sum(dim=-1), rtol=1e-10, atol=1e-12)


# The inverse.


@given(m=st.integers(2, 9), n=st.integers(2, 9), seed=st.integers(0, 10**6))
@settings(max_examples=50)
def test_what_the_map_reaches_comes_back(m: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    limit = AlmostOrthogonal(LINEAR, 0.6)
    W = limit(torch.randn(m, n))
    torch.testing.assert_close(limit(limit.right_inverse(W)), W, rtol=1e-5, atol=1e-7)


def test_kernels_that_the_map_reaches_come_back() -> None:
    for geometry, shape in (
        (Geometry("conv"), (5, 4, 3, 3)),
        (Geometry("conv", (2, 1)), (9, 2, 3, 2)),
        (Geometry("conv_transpose", (2,), groups=2), (6, 3, 4)),
    ):
        for steps, tolerance in ((1, 1e-8), (2, 0.02), (3, 0.02)):
            limit = AlmostOrthogonal(geometry, 1.5, steps=steps)
            W = limit(torch.randn(shape))
            again = limit(limit.right_inverse(W))
            assert float((again - W).norm() / W.norm()) < tolerance


def test_the_direction_of_another_weight_is_kept() -> None:
    """Channels keep their ratios, so the result is a multiple of the weight where all channels are connected."""
    W = torch.randn(6, 5)
    limit = AlmostOrthogonal(LINEAR)
    for factor in (1e-6, 1.0, 1e6):
        again = limit(limit.right_inverse(factor * W))
        ratio = again / W
        assert float(ratio.max() - ratio.min()) < 1e-8 * float(ratio.max())
        assert 0.5 < norm(again) <= 1.0


def test_unconnected_channels_each_get_the_radius_and_none_is_lost() -> None:
    limit = AlmostOrthogonal(LINEAR)
    for dtype, least in ((torch.float64, 1e-5), (torch.float32, 1e-2)):  # float32 fades out squares of its precision
        W = torch.diag(torch.tensor([1.0, 1e-2, least, 0.0], dtype=dtype))
        expected = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        again = limit(limit.right_inverse(W)).double()
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-3)
        assert float(_balance(W.double()[None], 1).min()) > 0.0


# In a model, and refusals.


def test_the_method_limits_a_model_through_training_and_export() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), GroupSort(), nn.Flatten(), nn.Linear(72, 5))
    stabilize(model, method="aol")
    x, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % 5
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(10.0 * model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert lipschitz(model).upper <= 1.0
    assert losses[-1] < 0.8 * losses[0]
    plain = export(model)
    assert type(plain[0]) is nn.Conv2d
    assert type(plain[3]) is nn.Linear
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=0, atol=0)


def test_the_image_of_a_layer_is_smaller_than_before() -> None:
    case = Case((3, 3), (1, 1), (1, 1), (1, 1), (6, 6), inside=2, outside=3)
    assert operator_norm(case) > 1.5
    assert scaled_by(case, 1.0, 1) < 1.0


def test_wrong_steps_and_norms_are_refused() -> None:
    assert METHODS["aol"] is AlmostOrthogonal
    for steps in (0, 7, 1.0, True, "2"):
        with pytest.raises(ValueError, match="steps"):
            AlmostOrthogonal(LINEAR, steps=steps)
    with pytest.raises(ValueError, match="l2"):
        AlmostOrthogonal(LINEAR, 1.0, "l1")
    assert "steps=2" in repr(AlmostOrthogonal(LINEAR, steps=2))


def test_a_bound_that_is_met_on_the_grid_of_the_proof_leaves_room_for_its_rounding() -> None:
    """Two equal taps that are a Hadamard matrix: the row sums and the symbol at the frequency 0 are the norm."""
    H = torch.ones(1, 1)
    while len(H) < 128:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    conv = Geometry("conv")
    proved = conv.proved(AlmostOrthogonal(conv)(torch.stack([H, H], dim=-1))).upper
    assert 1.0 - 1e-9 < proved <= 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_none(bad: float) -> None:
    for geometry, shape in ((LINEAR, (3, 4)), (LINEAR, (4, 3)), (Geometry("conv", groups=2), (4, 2, 3))):
        V = torch.randn(shape)
        V.view(-1)[5] = bad
        for steps in (1, 3):
            assert not bool(AlmostOrthogonal(geometry, steps=steps)(V).isfinite().all())


def test_compiled_in_one_piece_and_registered() -> None:
    torch._dynamo.reset()
    layer = nn.Conv2d(3, 20, 3, stride=2)
    P.register_parametrization(layer, "weight", AlmostOrthogonal(Geometry.of(layer), steps=2))
    x = torch.randn(1, 3, 7, 7)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
