"""Laws of the two norms for training: the differentiable bound without state, and the warm estimate from below."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from stableopt.linalg import conv_norm, conv_power_start, conv_power_step, gram_conv_norm
from stableopt.linalg.conv_geometry import conv_axes, reductions
from stableopt.linalg.conv_grid import layer_grids
from tests.linalg.conv_oracle import KINDS, Case, cases, kernel_of_kind

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (3, 1), "dilation": (2, 1)},
    {"groups": 2, "stride": (1, 2)},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": (2, 1), "padding_mode": "reflect", "image_size": (7, 6)},
    {"padding": [1, 1], "padding_mode": "replicate", "stride": [2, 2]},
    {"padding": "same", "padding_mode": "circular", "image_size": [6, 5]},
    {"transposed": True, "stride": 2, "output_padding": 1},
    {"transposed": True, "groups": 2, "dilation": 2, "image_size": 4},
]


def kernel(seed: int = 0, shape: tuple[int, ...] = (4, 3, 3, 2)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symbol(w: torch.Tensor, geometry: dict[str, Any], points: int = 96) -> torch.Tensor:
    """The literal symbol of the strided kernel, by embedding each polyphase component in a transform."""
    stride, dilation, groups = (geometry.get(name, 1) for name in ("stride", "dilation", "groups"))
    parts = w.reshape(groups, -1, *w.shape[1:])
    for axis in range(parts.ndim - 3):
        s, d = (value if isinstance(value, int) else value[axis] for value in (stride, dilation))
        s //= math.gcd(s, d)
        phases = [parts[(slice(None),) * (3 + axis) + (slice(b, None, s),)] for b in range(s)]
        longest = phases[0].shape[3 + axis]
        last = parts.ndim - 1 - 3 - axis
        phases = [F.pad(p, (0, 0) * last + (0, longest - p.shape[3 + axis])) for p in phases]
        parts = torch.cat(phases, dim=2)
    dims = tuple(range(3, parts.ndim))
    return torch.fft.fftn(parts, s=(points,) * len(dims), dim=dims).movedim((1, 2), (-2, -1)).flatten(0, -3)


def supremum(w: torch.Tensor, geometry: dict[str, Any], points: int = 96) -> float:
    return float(torch.linalg.matrix_norm(symbol(w, geometry, points), 2).max())


# --- the differentiable bound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_gradient_of_the_bound_is_its_derivative(geometry: dict[str, Any]) -> None:
    weight = kernel().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: gram_conv_norm(w, **geometry), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"stride": 2, "dilation": 2}, {"stride": (3, 1), "groups": 2}])
def test_the_bound_lies_between_the_supremum_of_the_symbol_and_the_stated_factor(
    kind: str, geometry: dict[str, Any]
) -> None:
    w = kernel_of_kind(kind, (4, 3, 3, 4), 1)
    least = supremum(w, geometry)
    rank = 2 if "groups" in geometry else 4
    assert least * (1 - 1e-12) <= float(gram_conv_norm(w, **geometry)) <= 1.0005 * least * 1.04 * rank ** (1 / 2**9)


def test_the_bound_of_sixty_four_channels_is_within_five_percent() -> None:
    """The worst case of a Gram bound is a matrix with equal singular values."""
    w = torch.zeros(64, 64, 3, 3)
    w[:, :, 1, 1] = torch.linalg.qr(torch.randn(64, 64))[0]
    assert 1.04 < float(gram_conv_norm(w)) <= 1.049


@settings(max_examples=60)
@given(cases(largest=100))
def test_both_norms_for_training_agree_with_the_proved_one(case: Case) -> None:
    """With the same grid the Gram bound is the proved one but for the Gram factor, and the estimate is below the symbol."""
    w, geometry = case.weight.double(), case.geometry
    proved = conv_norm(w, **geometry).upper
    loss = 3 ** (1 / 2**9) * (1 / math.cos(math.pi / 16)) ** len(
        case.kernel
    )  # of a Gram bound of rank 3, and of the grid
    assert float(gram_conv_norm(w, oversampling=8, **geometry)) <= proved * loss * (1 + 1e-9)
    vectors = conv_power_start(w, steps=4, **geometry)
    estimate, _ = conv_power_step(w, vectors, **geometry)
    assert float(estimate) <= conv_norm(w, groups=case.groups).upper * (1 + 1e-12)


@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_the_bound_scales_with_the_kernel(exponent: int) -> None:
    w = kernel().float()
    scaled = float(gram_conv_norm(w * 2.0**exponent, stride=2)) * 2.0**-exponent
    assert scaled == pytest.approx(float(gram_conv_norm(w, stride=2)), rel=1e-5)


def test_the_bound_has_no_state_and_leaves_the_kernel_as_it_is() -> None:
    w, other = kernel(0), kernel(1)
    before = w.clone()
    first = gram_conv_norm(w)
    gram_conv_norm(other * 1e6)
    torch.testing.assert_close(gram_conv_norm(w), first, rtol=0, atol=0)
    torch.testing.assert_close(w, before, rtol=0, atol=0)


def test_the_index_of_the_largest_matrix_is_found_among_many() -> None:
    """The largest symbol is hidden from a few power steps: its right singular vector is orthogonal to their start."""
    start = torch.arange(1, 7).cos()
    v = torch.linalg.qr(torch.stack([start, torch.ones(6)], 1))[0][:, 1]
    w = torch.zeros(6, 6, 3)
    w[:, :, 1] = 0.9 * torch.outer(start, start) / start.norm() ** 2
    w += 0.4 * torch.outer(v, v)[..., None]
    w += 1e-9 * torch.randn(6, 6, 3)
    assert supremum(w, {}) * (1 - 1e-12) <= float(gram_conv_norm(w)) <= 1.05 * supremum(w, {})


# --- what both must survive -------------------------------------------------------------------------------------------


def both(w: torch.Tensor, **geometry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return gram_conv_norm(w, **geometry), conv_power_step(w, conv_power_start(w, **geometry), **geometry)[0]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_zero_kernel_has_norm_zero_and_finite_gradients(geometry: dict[str, Any]) -> None:
    w = torch.zeros(4, 3, 3, 2, requires_grad=True)
    for norm in both(w, **geometry):
        assert float(norm.detach()) == 0.0
        (gradient,) = torch.autograd.grad(norm, w)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    w = kernel().to(dtype).requires_grad_()
    eps = torch.finfo(dtype).eps
    for norm, wide in zip(both(w, stride=2), both(w.detach().double(), stride=2), strict=True):
        assert norm.dtype == dtype
        assert float(norm.detach()) == pytest.approx(float(wide), rel=max(eps, 1e-6))
        (gradient,) = torch.autograd.grad(norm, w)
        assert gradient.dtype == dtype
        assert gradient.abs().sum() > 0
    assert conv_power_start(w).dtype == torch.float32


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_both_run_on_meta_tensors(geometry: dict[str, Any]) -> None:
    w = torch.empty(4, 3, 3, 2, device="meta")
    vectors = conv_power_start(w, **geometry)
    estimate, updated = conv_power_step(w, vectors, **geometry)
    assert estimate.device.type == updated.device.type == "meta"
    assert estimate.shape == ()
    assert updated.shape == vectors.shape
    assert updated.shape == conv_power_start(kernel(), **geometry).shape


@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (0, 3, 6, 7, 8)])
def test_both_compile_without_a_break_and_keep_their_numbers(geometry: dict[str, Any]) -> None:
    torch.compiler.reset()
    vectors = conv_power_start(kernel(), **geometry)

    def norms(w: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return gram_conv_norm(w, **geometry), *conv_power_step(w, vectors, **geometry)

    compiled = torch.compile(norms, fullgraph=True, backend="eager")
    for seed in (0, 1):
        plain, traced = kernel(seed).requires_grad_(), kernel(seed).requires_grad_()
        expected, got = norms(plain, vectors), compiled(traced, vectors)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        gradients = [torch.autograd.grad(n[0] + n[1], w)[0] for n, w in ((expected, plain), (got, traced))]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-10)


def test_options_and_shapes_may_change_between_compiled_calls() -> None:
    """The compiler makes symbols of integers that it has seen change; a grid needs their values."""
    torch.compiler.reset()
    options: dict[str, Any] = {}
    compiled = torch.compile(lambda w: gram_conv_norm(w, **options), fullgraph=True, backend="eager")
    for stride, shape in (((1, 2), (3, 3, 3, 3)), ((2, 3), (3, 3, 3, 3)), (3, (4, 2, 4, 5)), (2, (2, 2, 5, 5))):
        options["stride"] = stride
        w = kernel(0, shape)
        torch.testing.assert_close(compiled(w), gram_conv_norm(w, **options), rtol=1e-10, atol=0)


def test_both_work_under_functional_transforms() -> None:
    vectors = conv_power_start(kernel())
    for norm in (gram_conv_norm, lambda w: conv_power_step(w, vectors)[0]):
        w = kernel().requires_grad_()
        torch.testing.assert_close(torch.func.grad(norm)(w.detach()), torch.autograd.grad(norm(w), w)[0])


def test_empty_kernels_have_norm_zero() -> None:
    w = torch.empty(0, 3, 3, 3, requires_grad=True)
    for norm in both(w):
        assert float(norm.detach()) == 0.0


# --- the warm estimate ------------------------------------------------------------------------------------------------


def settled(w: torch.Tensor, steps: int = 400, **geometry: Any) -> torch.Tensor:
    return conv_power_start(w, steps=steps, **geometry)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("free", [False, True])
def test_the_estimate_never_falls_and_never_exceeds_the_supremum(geometry: dict[str, Any], free: bool) -> None:
    w = kernel()
    vectors = conv_power_start(w, steps=0, tracks=5 if free else None, **geometry)
    last, ceiling = 0.0, conv_norm(w, groups=geometry.get("groups", 1)).upper
    for _ in range(30):
        estimate, vectors = conv_power_step(w, vectors, free=free, **geometry)
        assert last * (1 - 1e-13) <= float(estimate) <= ceiling * (1 + 1e-13)
        last = float(estimate)
    grid = layer_grids(w, geometry.get("groups", 1), None, **without_groups(geometry))[0]
    assert last > 0.8 * float(gram_conv_norm(w, **geometry)) / grid.factor


def without_groups(geometry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in geometry.items() if key != "groups"}


@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"stride": (2, 1), "dilation": (2, 3)}, {"groups": 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_settled_vectors_estimate_the_largest_norm_on_the_grid(geometry: dict[str, Any], kind: str) -> None:
    w = kernel_of_kind(kind, (4, 3, 3, 3), 3)
    points = layer_grids(w, geometry.get("groups", 1), 8, **without_groups(geometry))[0].points[0]
    grid = supremum(w, geometry, points)
    estimate, _ = conv_power_step(w, settled(w, oversampling=8, **geometry), oversampling=8, **geometry)
    assert grid * (1 - 2e-3) <= float(estimate) <= grid * (1 + 1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_with_the_factor_the_estimate_is_about_the_bound(geometry: dict[str, Any]) -> None:
    w = kernel()
    axes = conv_axes(w.shape[2:], **without_groups(geometry))
    estimate, _ = conv_power_step(w, settled(w, **geometry), riesz=True, **geometry)
    ratio = float(estimate) / float(gram_conv_norm(w, **geometry))
    assert ratio >= 1 - 2e-3  # the Gram factor of four equal singular values is 1.0027
    if len(reductions(axes)) == 1:
        assert ratio <= 1 + 1e-12


@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"groups": 2}])
def test_at_a_simple_maximum_the_gradient_is_that_of_the_true_norm(geometry: dict[str, Any]) -> None:
    w = kernel(5).requires_grad_()
    points = layer_grids(w, geometry.get("groups", 1), 4, **without_groups(geometry))[0].points[0]
    norms = torch.linalg.matrix_norm(symbol(w, geometry, points), 2)
    largest = norms.max()
    estimate, _ = conv_power_step(w, settled(w.detach(), oversampling=4, **geometry), oversampling=4, **geometry)
    torch.testing.assert_close(estimate, largest, rtol=1e-10, atol=0)
    (expected,) = torch.autograd.grad(norms[norms > largest * (1 - 1e-9)].mean(), w)  # a frequency and its negative
    (got,) = torch.autograd.grad(estimate, w)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_estimate_follows_the_kernel_and_its_derivative_is_the_formula() -> None:
    """Along any direction, at vectors that have not settled: d estimate = Re(u'* dW(w*) v), a linear form of size at most 1."""
    w = kernel(2).requires_grad_()
    vectors = conv_power_start(w, steps=1)
    estimate, _ = conv_power_step(w, vectors)
    (gradient,) = torch.autograd.grad(estimate, w)
    torch.testing.assert_close((gradient * w).sum(), estimate)  # homogeneous of degree one
    direction = kernel(3)
    assert abs(float((gradient * direction).sum())) <= conv_norm(direction).upper


def test_a_jump_of_the_kernel_is_met_within_a_few_steps() -> None:
    """Warm vectors belong to the old kernel; every cell has its own, so the new maximum is in sight at once."""
    w = torch.randn(16, 16, 3, 3)
    vectors = settled(w, steps=30)
    jumped = 0.1 * torch.randn(16, 16, 3, 3)
    jumped[:, :, 1, 1] += 0.4 * torch.outer(torch.ones(16), torch.ones(16))
    ratios = []
    for _ in range(4):
        estimate, vectors = conv_power_step(jumped, vectors, riesz=True)
        ratios.append(float(estimate) / supremum(jumped, {}))
    assert ratios[0] > 0.75
    assert 0.99 < ratios[-1] < 1.05


@pytest.mark.parametrize("exponent", [-140, -80, -40, 40, 80, 120])
def test_the_estimate_scales_with_the_kernel_over_the_whole_range_of_float32(exponent: int) -> None:
    kernel = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    scaled = (kernel.double() * 2.0**exponent).float()
    results = []
    for w in (kernel, scaled):
        norm, _ = conv_power_step(w, conv_power_start(w, stride=2), stride=2)
        results.append(float(norm))
    tolerance = 1e-6 if exponent > -120 else 1e-2  # the numbers themselves have few digits there
    assert results[1] == pytest.approx(results[0] * 2.0**exponent, rel=tolerance)


def test_the_start_is_the_same_every_time_whatever_the_global_generator() -> None:
    w = kernel()
    torch.manual_seed(1)
    first = conv_power_start(w)
    state = torch.get_rng_state()
    torch.testing.assert_close(conv_power_start(w), first, rtol=0, atol=0)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_neither_kernel_nor_vectors_are_changed_and_the_new_ones_have_no_gradient() -> None:
    w = kernel().requires_grad_()
    vectors = conv_power_start(w, steps=2)
    before = vectors.clone(), w.detach().clone()
    _, updated = conv_power_step(w, vectors)
    torch.testing.assert_close(vectors, before[0], rtol=0, atol=0)
    torch.testing.assert_close(w.detach(), before[1], rtol=0, atol=0)
    assert not updated.requires_grad
    assert not vectors.requires_grad


@pytest.mark.parametrize("shape", [(3, 4, 2), (1, 5, 2), (1, 4, 3), (4, 2), (0, 4, 2)])
def test_vectors_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    w = kernel()
    with pytest.raises(ValueError, match="conv_power_start"):
        conv_power_step(w, torch.ones(shape), free=shape == (0, 4, 2))


def test_malformed_options_are_refused_by_all() -> None:
    w = kernel()
    for options in (
        {"stride": 0},
        {"padding_mode": "symmetric"},
        {"output_padding": 1},
        {"oversampling": 1},
        {"groups": 3},
    ):
        with pytest.raises(ValueError, match=r"stride|padding|oversampling|groups"):
            conv_power_start(w, **options)
        with pytest.raises(ValueError, match=r"stride|padding|oversampling|groups"):
            gram_conv_norm(w, **options)
    with pytest.raises(ValueError, match="steps"):
        gram_conv_norm(w, steps=0)
