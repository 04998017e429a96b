"""Laws of the self-correlation bound: above the dense operator for every geometry, and tight for orthogonal kernels."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from stableopt.linalg import conv_correlation
from stableopt.linalg.conv_correlation import conv_gram_bound, polyphase_axis

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def dense_norm(
    weight: torch.Tensor,
    size: tuple[int, ...],
    *,
    groups: int = 1,
    transposed: bool = False,
    circular: tuple[int, ...] | None = None,
    **options: object,
) -> float:
    """The oracle: the operator built column by column in float64, and its largest singular value."""
    weight, dims = weight.double(), weight.ndim - 2
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    basis = torch.eye(channels * math.prod(size)).reshape(-1, channels, *size)
    if circular is not None:
        basis = F.pad(basis, [n for p in reversed(circular) for n in (p, p)], mode="circular")
    columns = (TRANSPOSED if transposed else CONV)[dims](basis, weight, groups=groups, **options).flatten(1)
    return float(torch.linalg.matrix_norm(columns, 2)) if columns.numel() else 0.0


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0]


def paraunitary(n: int, taps: int, seed: int = 0) -> torch.Tensor:
    """An orthogonal one-dimensional kernel, multiplied out tap by tap (no code of the package)."""
    kernel = orthogonal(n, seed)[:, :, None]
    for j in range(1, taps):
        q = orthogonal(n, seed + j)[:, : n // 2]
        moved = torch.einsum("oct,ci->oit", kernel, q @ q.T)
        kernel = F.pad(kernel - moved, (0, 1)) + F.pad(moved, (1, 0))
    return kernel


@settings(max_examples=150)
@given(st.data())
def test_the_bound_is_above_the_dense_operator_for_every_geometry(data: st.DataObject) -> None:
    dims = data.draw(st.sampled_from([1, 1, 2, 2, 3]))
    groups = data.draw(st.sampled_from([1, 2, 3]))
    kernel = [data.draw(st.integers(1, {1: 6, 2: 3, 3: 2}[dims])) for _ in range(dims)]
    stride, dilation = ([data.draw(st.integers(1, 4 if dims == 1 else 3)) for _ in range(dims)] for _ in range(2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    first, second = groups * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    weight = torch.randn(first, second, *kernel, generator=generator)
    transposed = data.draw(st.booleans())
    options = {"stride": tuple(stride), "dilation": tuple(dilation), "groups": groups}
    room = {1: 9, 2: 4, 3: 2}[dims]
    spread = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = tuple(data.draw(st.integers(1, room)) if transposed else data.draw(st.integers(s, s + room)) for s in spread)
    padding = tuple(0 if transposed else data.draw(st.integers(0, 3 if dims == 1 else 1)) for _ in kernel)
    true = dense_norm(weight, size, padding=padding, transposed=transposed, **options)
    assert conv_gram_bound(weight, **options).upper >= true * (1 - 1e-13)


@settings(max_examples=60)
@given(st.data())
def test_circular_padding_is_covered_where_the_stride_divides_the_image(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 2))
    kernel = [data.draw(st.sampled_from([1, 3, 5] if dims == 1 else [1, 3])) for _ in range(dims)]
    stride, dilation = ([data.draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(2))
    circular = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    size = tuple(
        s * data.draw(st.integers(-(-max(p, 1) // s), -(-p // s) + 3)) for s, p in zip(stride, circular, strict=True)
    )
    weight = torch.randn(2, 2, *kernel, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**16))))
    options = {"stride": tuple(stride), "dilation": tuple(dilation)}
    true = dense_norm(weight, size, circular=circular, **options)
    assert conv_gram_bound(weight, **options).upper >= true * (1 - 1e-13)


def test_circular_padding_is_not_covered_where_it_reads_a_pixel_once_more() -> None:
    """Three pixels, stride 2, two taps: the first pixel is the second tap of the second output as well."""
    weight = torch.eye(2)[:, None]
    columns = F.conv1d(F.pad(torch.eye(3)[:, None], (0, 1), mode="circular"), weight, stride=2).flatten(1)
    assert float(torch.linalg.matrix_norm(columns, 2)) == pytest.approx(math.sqrt(2))
    assert conv_gram_bound(weight, stride=2).upper < 1.0 + 1e-13


@pytest.mark.parametrize(
    ("dtype", "excess"),
    [(torch.float64, 1e-10), (torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)],
)
def test_an_orthogonal_kernel_has_norm_one_up_to_the_rounding_of_its_numbers(dtype: torch.dtype, excess: float) -> None:
    weight = torch.einsum("oct,cis->oits", paraunitary(16, 3), paraunitary(16, 3, seed=9)).to(dtype)
    true = dense_norm(weight, (6, 6), padding=2)
    assert true * (1 - 1e-13) <= conv_gram_bound(weight).upper < 1.0 + excess


@pytest.mark.parametrize("shape", [(7, 16), (16, 7), (16, 16)])
def test_rows_or_columns_of_an_orthogonal_kernel_have_norm_one(shape: tuple[int, int]) -> None:
    weight = paraunitary(16, 4)[: shape[0], : shape[1]]
    assert 1.0 <= conv_gram_bound(weight).upper < 1.0 + 1e-10
    assert conv_gram_bound(weight.transpose(0, 1).flip(-1)).upper < 1.0 + 1e-10


def test_the_bound_of_half_precision_comes_from_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the triangle inequality alone the rounding of all lags would add up in the worst direction."""
    weight = torch.einsum("oct,cis->oits", paraunitary(16, 3), paraunitary(16, 3, seed=9)).bfloat16()
    tight = conv_gram_bound(weight).upper
    monkeypatch.setattr(conv_correlation, "_EXACT_ENOUGH", math.inf)
    assert tight - 1.0 < 0.6 * (conv_gram_bound(weight).upper - 1.0)


@settings(max_examples=40)
@given(st.integers(0, 2**16), st.sampled_from([(2, 2, 2), (3, 2, 3, 2), (1, 3, 4)]))
def test_the_grid_alone_is_a_bound(seed: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    symbol = torch.fft.fftn(weight, s=(60,) * (len(shape) - 2), dim=tuple(range(2, len(shape))))
    supremum = float(torch.linalg.matrix_norm(symbol.flatten(2).permute(2, 0, 1), 2).max())
    parts = weight.numpy()[None]
    parts = parts if shape[0] <= shape[1] else np.ascontiguousarray(parts.swapaxes(1, 2))
    lags = conv_correlation._half_of_the_lags(parts.shape[3:])
    others = np.stack([conv_correlation._correlation(parts, lag) for lag in lags])
    center = conv_correlation._correlation(parts, (0,) * len(lags[0]))
    square = conv_correlation._grid_upper(center, others, lags, parts.shape[3:]).upper
    assert math.sqrt(square) >= supremum * (1 - 1e-12)


def test_the_factor_of_the_grid_is_attained() -> None:
    """The Gram symbol 2 + 2 cos(ω + φ) of (1, R(φ)) is largest between the points of the grid."""
    phi = math.pi / 8
    rotation = torch.tensor([[math.cos(phi), -math.sin(phi)], [math.sin(phi), math.cos(phi)]])
    weight = torch.stack([torch.eye(2), rotation], dim=-1)
    assert dense_norm(weight, (200,), padding=1) > 1.9999
    assert conv_gram_bound(weight).upper >= 2.0
    assert conv_gram_bound(weight).upper < 2.01


@pytest.mark.parametrize("kernel", range(1, 8))
@pytest.mark.parametrize("stride", range(1, 6))
@pytest.mark.parametrize("dilation", range(1, 5))
def test_the_phases_of_an_axis_are_the_classes_of_its_taps(kernel: int, stride: int, dilation: int) -> None:
    """Literal twin: taps that may read the same pixel have the same ``d t`` modulo the stride."""
    classes: dict[int, list[int]] = {}
    for tap in range(kernel):
        classes.setdefault(dilation * tap % stride, []).append(tap)
    phases, taps, full = polyphase_axis(kernel, stride, dilation)
    lengths = [len(c) for c in classes.values()]
    assert (phases, taps, full) == (len(classes), max(lengths), lengths.count(max(lengths)))
    assert [c[0] for c in classes.values()] == list(range(phases))


@settings(max_examples=60)
@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3))
def test_norms_of_a_batch_are_above_the_true_ones_and_within_the_stated_gap(
    seed: int, m: int, n: int, squarings: int
) -> None:
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((4, m, n)) * 10.0 ** rng.uniform(-200, 200, (4, 1, 1))
    A[3] = 0.0
    got = conv_correlation._norms_upper(A, squarings)
    true = np.array([np.linalg.norm(a, 2) for a in A])
    assert (got >= true).all()
    assert (got <= true * min(m, n) ** (0.5 ** (squarings + 1)) * (1 + 1e-12) + 1e-150).all()


def test_the_self_correlation_is_exact_on_integers() -> None:
    """An oracle in exact arithmetic: the norm of the self-correlation of integers, as a rational number."""
    weight = torch.tensor([[[3.0, -1.0, 2.0]]])
    triangle = sum(abs(Fraction(c)) for c in (14, -5, -5, 6, 6))  # the correlation of 3, -1, 2
    bound = conv_gram_bound(weight).upper
    assert Fraction(bound) ** 2 <= triangle * (1 + Fraction(1, 10**9))
    assert bound >= 6.0 - 1e-12  # the symbol at frequency pi


def test_scales_zero_and_empty_kernels() -> None:
    weight = torch.randn(2, 3, 3)
    unit = conv_gram_bound(weight, stride=2).upper
    for exponent in (-900, -40, 40, 900):
        scaled = conv_gram_bound(weight.numpy() * 2.0**exponent, stride=2).upper
        assert scaled == pytest.approx(unit * 2.0**exponent, rel=1e-12)
    assert conv_gram_bound(torch.full((1, 1, 3), 1e308)).upper == math.inf
    assert 0.0 < conv_gram_bound(torch.full((1, 1, 3), 5e-324)).upper < 1e-322
    assert conv_gram_bound(torch.zeros(2, 2, 3)).upper == 0.0
    assert conv_gram_bound(torch.empty(0, 2, 3)).upper == 0.0
    assert conv_gram_bound(weight).proved


def test_what_is_no_convolution_is_refused() -> None:
    weight = torch.ones(4, 1, 3)
    for bad, options, message in [
        (torch.ones(2, 2), {}, "3 to 5 dimensions"),
        (weight, {"groups": 3}, "divisor"),
        (weight, {"stride": 0}, "stride"),
        (weight, {"dilation": (1, 1)}, "dilation"),
        (weight * math.nan, {}, "NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            conv_gram_bound(bad, **options)
    with pytest.raises(TypeError, match="floating"):
        conv_gram_bound(torch.ones(1, 1, 3, dtype=torch.int64))
