"""The proved norm of a convolution is never below the largest singular value of the layer as torch runs it, for every option."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from stableopt.linalg import conv_norm, gram_conv_norm, padding_multiplicity
from stableopt.linalg.conv import _coarse_upper, _modulus_upper
from stableopt.linalg.conv_geometry import conv_axes, reductions
from stableopt.linalg.conv_symbol import fold
from stableopt.linalg.proved import scale_to_unit
from stableopt.nn.weights import METHODS, Geometry
from tests.linalg.conv_oracle import Case, cases, operator_norm

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

ROUNDING = 1e-13
"""Of the oracle: singular values of matrices of a few hundred numbers per side in float64."""


def check_bounds(case: Case, oversampling: int) -> None:
    """Every bound of the layer, whether it knows the image or not, is above the norm of the operator."""
    true, weight = operator_norm(case), case.weight
    for known in ({}, {"image_size": case.size}):
        bound = conv_norm(weight, oversampling=oversampling, **case.geometry, **known)
        assert bound.proved
        assert bound.lower == 0.0
        assert bound.upper >= true * (1 - ROUNDING), (case, known, bound.upper / true)


@settings(max_examples=300)
@given(cases(), st.sampled_from((2, 3, 8)))
def test_the_proved_norm_is_never_below_that_of_the_dense_operator(case: Case, oversampling: int) -> None:
    check_bounds(case, oversampling)


@pytest.mark.slow
@settings(max_examples=1500)
@given(cases(), st.sampled_from((2, 3, 4, 5, 8)))
def test_the_proved_norm_is_never_below_that_of_the_dense_operator_over_many_more(
    case: Case, oversampling: int
) -> None:
    check_bounds(case, oversampling)


@settings(max_examples=100)
@given(cases(largest=150))
def test_the_differentiable_bound_is_never_below_that_of_the_dense_operator(case: Case) -> None:
    true, weight = operator_norm(case), case.weight.double()
    for known in ({}, {"image_size": case.size}):
        assert float(gram_conv_norm(weight, **case.geometry, **known)) >= true * (1 - 1e-11), (case, known)


@settings(max_examples=200)
@given(cases(largest=150))
def test_every_single_way_to_bound_a_layer_is_above_the_dense_operator(case: Case) -> None:
    """The modulus bound and the coarse grid on their own, which the minimum would hide where they are not the least."""
    true, weight = operator_norm(case), case.weight.double().numpy()
    if not weight.any():
        return
    weight, exponent = scale_to_unit(weight)
    options = {key: value for key, value in case.geometry.items() if key != "groups"}
    for axes in reductions(conv_axes(case.kernel, **options)):
        kernel, copies = fold(weight, case.groups, axes), math.sqrt(math.prod(axis.copies for axis in axes))
        taps = kernel.shape[3:]
        for bound in (_modulus_upper(kernel, math.inf), _coarse_upper(kernel, taps, math.inf, (0.3,) * len(taps))):
            assert math.ldexp(bound * copies, exponent) >= true * (1 - ROUNDING), case


@settings(max_examples=200)
@given(cases())
def test_the_proved_norm_is_never_above_the_bounds_that_training_divides_by(case: Case) -> None:
    """So that what is divided by one of them is proved to be within the radius."""
    geometry, weight = Geometry.of(case.layer()), case.weight.double()
    proved = conv_norm(weight, **case.geometry).upper
    for method in ("schur", "frobenius", "gram"):
        assert proved <= float(METHODS[method](geometry).bound(weight)) * (1 + 1e-12), method


@settings(max_examples=80)
@given(cases(largest=150))
def test_knowing_the_image_or_a_finer_grid_never_costs_more_than_the_grid(case: Case) -> None:
    """Both are supremum times at most the factor: the coarse one may only lose what its docstring says."""
    curved = sum(k > 1 for k in case.kernel)
    fine = conv_norm(case.weight, oversampling=8, **case.geometry).upper
    for other, points in (({"image_size": case.size}, 8), ({"oversampling": 2}, 2)):
        loss = (1 / math.cos(math.pi / 2 / points)) ** curved
        assert conv_norm(case.weight, **case.geometry, **other).upper <= fine * loss * (1 + 1e-9)


@settings(max_examples=80)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_size_free_bound_is_met_by_large_images(
    kernel: int, stride: int, dilation: int, inside: int, outside: int, transposed: bool, seed: int
) -> None:
    """The tightness law: bound / norm is at most the Riesz factor of 8 points per tap, 1.0196, in the limit of large images."""
    case = Case(
        kernel=(kernel,),
        stride=(stride,),
        dilation=(dilation,),
        padding=(0,),
        size=(40 * dilation if transposed else 40 * stride * dilation // math.gcd(stride, dilation),),
        inside=inside,
        outside=outside,
        transposed=transposed,
        seed=seed,
    )
    bound = conv_norm(case.weight, **case.geometry).upper
    # a window sin(pi n / 41) of 40 blocks of at most 5 taps costs a relative (pi * 4 / 41)^2 / 2 at most
    assert bound * (1 - 0.05) / 1.0196 <= operator_norm(case) <= bound * (1 + ROUNDING)


@settings(max_examples=60)
@given(st.data())
def test_on_a_torus_the_bound_is_the_norm(data: st.DataObject) -> None:
    """Equality: circular padding of the reach of the kernel, and a stride that divides the image."""
    dims = data.draw(st.integers(1, 2))
    axes = [[data.draw(st.sampled_from(values)) for _ in range(dims)] for values in ((1, 3, 5), (1, 2, 3), (1, 2, 3))]
    kernel, stride, dilation = axes
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    least = [max(p, 1) for p in padding]
    size = tuple(-(-n // s) * s + s * data.draw(st.integers(0, 2)) for n, s in zip(least, stride, strict=True))
    case = Case(
        tuple(kernel),
        tuple(stride),
        tuple(dilation),
        padding,
        size,
        1,
        2,
        2,
        "circular",
        seed=data.draw(st.integers(0, 99)),
    )
    assert conv_norm(case.weight, image_size=size, **case.geometry).upper == pytest.approx(
        operator_norm(case), rel=1e-11
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(1, 1, 1), (2, 2, 1), (3, 3, 2), (2, 4, 1), (1, 2, 3)])
def test_windows_that_do_not_overlap_have_the_norm_of_the_matrix(
    dims: int, transposed: bool, kernel: int, stride: int, dilation: int
) -> None:
    case = Case(
        (kernel,) * dims, (stride,) * dims, (dilation,) * dims, (0,) * dims, (7 if dims < 3 else 5,) * dims, 1, 1, 2
    )
    case = replace(case, transposed=transposed)
    weight = case.weight
    matrix = torch.linalg.matrix_norm(weight.flatten(1), 2)
    true = operator_norm(case)
    assert true == pytest.approx(float(matrix), rel=1e-12)
    assert true * (1 - ROUNDING) <= conv_norm(weight, **case.geometry).upper <= true * (1 + 1e-11)


def constant_image_case(mode: str, padding: int, size: int) -> Case:
    return Case((1,), (1,), (1,), (padding,), (size,), padding_mode=mode, kind="ones")


@pytest.mark.parametrize(
    ("mode", "padding", "size", "copies"),
    [
        ("replicate", 1, 6, 2),
        ("replicate", 3, 6, 4),
        ("replicate", 2, 1, 5),
        ("reflect", 1, 6, 2),
        ("reflect", 1, 3, 3),
        ("reflect", 4, 5, 3),
        ("circular", 2, 6, 2),
        ("circular", 3, 3, 3),
    ],
)
def test_the_copies_of_the_padding_are_met_by_a_kernel_of_one_tap(
    mode: str, padding: int, size: int, copies: int
) -> None:
    case = constant_image_case(mode, padding, size)
    assert operator_norm(case) == pytest.approx(math.sqrt(copies), rel=1e-14)
    bound = conv_norm(case.weight, image_size=size, **case.geometry).upper
    assert math.sqrt(copies) <= bound <= math.sqrt(copies) * (1 + 1e-12)


def test_two_axes_multiply_their_copies() -> None:
    case = Case((1, 1), (1, 1), (1, 1), (1, 2), (4, 4), padding_mode="replicate", kind="ones")
    assert operator_norm(case) == pytest.approx(math.sqrt(6))
    assert conv_norm(case.weight, image_size=(4, 4), **case.geometry).upper == pytest.approx(math.sqrt(6), rel=1e-12)


def test_the_bound_of_a_larger_reflected_image_fails_for_the_smallest() -> None:
    """Three pixels reflect the middle one twice: without a declared size the bound counts that image."""
    small = constant_image_case("reflect", 1, 3)
    large = conv_norm(small.weight, image_size=8, **small.geometry).upper
    assert large < 1.42 < operator_norm(small) <= conv_norm(small.weight, **small.geometry).upper


def full_norm(w: torch.Tensor, size: int) -> float:
    columns = F.conv1d(torch.eye(size)[:, None], w, padding=w.shape[-1] - 1).flatten(1)
    return float(torch.linalg.matrix_norm(columns, 2))


def torus_norm(w: torch.Tensor, points: int) -> float:
    return float(torch.fft.fft(w.ravel(), n=points).abs().max())


def test_the_bound_of_a_declared_image_fails_for_a_larger_one() -> None:
    """|1 + z - z^2|^2 = 1 + 4 sin^2 is largest at a quarter turn, which a torus of 3 pixels does not have."""
    w = torch.tensor([[[1.0, 1.0, -1.0]]])
    declared = conv_norm(w, padding=2, image_size=1).upper
    assert full_norm(w, 1) <= declared == pytest.approx(2.0, rel=1e-12)
    assert declared < 2.2 < full_norm(w, 20) <= conv_norm(w, padding=2).upper


def test_the_bound_of_a_declared_image_is_that_of_the_smallest_torus_that_holds_it() -> None:
    """Two pixels and three taps 1, -1, 1 need a torus of 4: one of 3 has a smaller norm than the operator."""
    w = torch.tensor([[[1.0, -1.0, 1.0]]])
    bound = conv_norm(w, padding=2, image_size=2).upper
    assert torus_norm(w, 3) < 2.2 < full_norm(w, 2) <= bound == pytest.approx(torus_norm(w, 4), rel=1e-12)


def test_the_bound_of_a_stride_fails_without_it_and_for_a_dilation_that_undoes_it() -> None:
    case = Case((2,), (2,), (1,), (0,), (40,), kind="ones")
    strided = conv_norm(case.weight, **case.geometry).upper
    assert strided < 1.4143
    for other in (replace(case, stride=(1,)), replace(case, dilation=(2,))):
        assert strided < 1.9 < operator_norm(other) <= conv_norm(other.weight, **other.geometry).upper


def test_a_bound_lowered_by_little_is_below_the_operator() -> None:
    """Two taps of a rotation by half a grid step need the whole factor: 1 % less would be wrong."""
    phi = math.pi / 4
    weight = torch.stack(
        [torch.eye(2), torch.tensor([[math.cos(phi), -math.sin(phi)], [math.sin(phi), math.cos(phi)]])], -1
    )
    columns = F.conv1d(torch.eye(600).reshape(-1, 2, 300), weight, padding=1).flatten(1)
    true = float(torch.linalg.matrix_norm(columns, 2))
    assert 1.9999 < true <= conv_norm(weight, oversampling=2).upper
    assert conv_norm(weight, oversampling=2).upper * 0.9999 < true


def read_pixels(case: Case) -> np.ndarray:
    """Literal twin of the counts: pad an image of its own indices with torch, and collect what any window reads."""
    size, (p,) = case.size[0], case.padding
    image = torch.arange(size, dtype=torch.float64)[None, None]
    names = {"zeros": "constant", "circular": "circular", "reflect": "reflect", "replicate": "replicate"}
    padded = F.pad(image, (p, p), mode=names[case.padding_mode]).ravel().long().numpy()
    if case.padding_mode == "zeros":
        padded = np.arange(size)
        return np.bincount(padded)
    (k,), (s,), (d,) = case.kernel, case.stride, case.dilation
    places = {start + d * t for start in range(0, len(padded) - d * (k - 1), s) for t in range(k)}
    return np.bincount(padded[sorted(places)])


@settings(max_examples=200)
@given(
    st.sampled_from(("zeros", "circular", "reflect", "replicate")),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(0, 12),
)
def test_the_copies_are_those_that_torch_makes_and_a_window_reads(
    mode: str, kernel: int, stride: int, dilation: int, padding: int, extra: int
) -> None:
    least = {"zeros": 1, "circular": padding, "reflect": padding + 1, "replicate": 1}[mode]
    least = max(least, dilation * (kernel - 1) + 1 - 2 * padding, 1)
    case = Case((kernel,), (stride,), (dilation,), (padding,), (least + extra,), padding_mode=mode)
    options = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode}
    assert padding_multiplicity((kernel,), image_size=least + extra, **options) == read_pixels(case).max()
    every = max(read_pixels(replace(case, size=(n,))).max() for n in range(least, least + 50))
    assert padding_multiplicity((kernel,), **options) == every


@settings(max_examples=60)
@given(st.integers(0, 2**16), st.integers(1, 6))
def test_the_bound_is_above_the_exact_norm_in_rational_arithmetic(seed: int, n: int) -> None:
    """No tolerance at all: positive taps reach their sum at frequency 0, one column has the norm of a vector."""
    generator = torch.Generator().manual_seed(seed)
    taps = torch.rand(1, 1, n, generator=generator)
    total = sum(Fraction(x) for x in taps.ravel().tolist())
    bound = conv_norm(taps, padding="same", padding_mode="circular", image_size=2 * n).upper
    assert total <= Fraction(bound) <= total * (1 + Fraction(1, 10**11))
    column = torch.randn(n, 1, 1, generator=generator)
    square = sum(Fraction(x) ** 2 for x in column.ravel().tolist())
    assert square <= Fraction(conv_norm(column).upper) ** 2 <= square * (1 + Fraction(1, 10**11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_read_back_exactly(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 2, 3, 3).to(dtype)
    assert conv_norm(weight, stride=2).upper == conv_norm(weight.double(), stride=2).upper


def test_a_nearly_orthogonal_kernel_needs_no_factor() -> None:
    q = torch.linalg.qr(torch.randn(8, 8))[0]
    weight = torch.zeros(8, 8, 3, 3)
    weight[:, :, 1, 1] = q
    for geometry in ({}, {"stride": 2}, {"stride": 2, "dilation": 3}, {"transposed": True, "stride": 2}):
        assert 1.0 - 1e-13 <= conv_norm(weight, **geometry).upper < 1.0 + 1e-11
    noisy = weight + 1e-3 * torch.randn(8, 8, 3, 3)
    symbol = torch.fft.fft2(noisy, s=(96, 96)).permute(2, 3, 0, 1)
    supremum = float(torch.linalg.matrix_norm(symbol, 2).max())
    assert supremum <= conv_norm(noisy).upper < supremum * 1.003


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_mode": "symmetric", "padding": 1}, "no bound is known"),
        ({"padding_mode": "circular", "padding": 1, "transposed": True}, "transposed"),
        ({"padding": "same", "transposed": True}, "transposed"),
        ({"padding": "same", "stride": 2}, "stride 1"),
        ({"padding": "full"}, "'same' or 'valid'"),
        ({"padding": -1}, "padding must be"),
        ({"padding": (1, 1)}, "padding must be"),
        ({"output_padding": 1}, "belongs to transposed"),
        ({"output_padding": 2, "stride": 2, "transposed": True}, "smaller than the stride"),
        ({"stride": 0}, "stride must be"),
        ({"stride": 1.5}, "stride must be"),
        ({"dilation": (1, 2, 3)}, "dilation must be"),
        ({"dilation": True}, "dilation must be"),
        ({"image_size": 0}, "image_size must be"),
        ({"image_size": 2, "padding": 2, "padding_mode": "reflect"}, "too small"),
        ({"image_size": 1, "padding": 2, "padding_mode": "circular"}, "too small"),
        ({"groups": 0}, "groups must be"),
        ({"groups": 3}, "divisor"),
        ({"oversampling": 1}, "oversampling"),
    ],
)
@pytest.mark.parametrize("norm", [conv_norm, gram_conv_norm])
def test_what_has_no_bound_is_refused(norm: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm(torch.ones(2, 1, 3), **options)


def test_numbers_that_are_no_real_floats_are_refused() -> None:
    for dtype in (torch.int64, torch.bool, torch.complex128):
        with pytest.raises(TypeError):
            conv_norm(torch.ones(1, 1, 3).to(dtype))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            conv_norm(torch.full((1, 1, 3), bad), stride=2)
