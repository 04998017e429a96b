"""Laws of convolution norms: above the norm of the dense operator for every option that is claimed."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from stableopt.linalg import conv_norm, gram_conv_norm, padding_multiplicity
from stableopt.linalg.conv import conv_symbol_norm
from stableopt.linalg.conv_symbol import symbol_exceeds, symbol_peak, symbol_slack

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def operator_norm(
    weight: torch.Tensor, size: tuple[int, ...], *, groups: int = 1, circular: int | None = None, **options: object
) -> float:
    """Build the dense operator column by column and take its largest singular value."""
    dims = weight.ndim - 2
    channels = weight.shape[1] * groups
    basis = torch.eye(channels * math.prod(size)).reshape(-1, channels, *size)
    if circular is not None:
        basis = F.pad(basis, (circular,) * (2 * dims), mode="circular")
    columns = CONV[dims](basis, weight, groups=groups, **options).flatten(1)
    return float(torch.linalg.matrix_norm(columns, 2)) if columns.numel() else 0.0


@settings(max_examples=60)
@given(st.data())
def test_the_bound_holds_for_every_stride_dilation_padding_and_group(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 2))
    groups = data.draw(st.sampled_from([1, 2]))
    kernel = [data.draw(st.integers(1, 4)) for _ in range(dims)]
    seed = data.draw(st.integers(0, 2**16))
    weight = torch.randn(
        2 * groups, data.draw(st.integers(1, 3)), *kernel, generator=torch.Generator().manual_seed(seed)
    )
    options = {name: data.draw(st.integers(low, 3)) for name, low in [("stride", 1), ("dilation", 1), ("padding", 0)]}
    size = tuple(
        data.draw(st.integers(1 + options["dilation"] * (k - 1), 9 + options["dilation"] * (k - 1))) for k in kernel
    )
    true = operator_norm(weight, size, groups=groups, **options)
    assert conv_norm(weight, groups=groups).upper >= true * (1 - 1e-13)
    assert float(gram_conv_norm(weight, groups=groups)) >= true * (1 - 1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_circular_padding_within_the_kernel_is_covered(k: int) -> None:
    weight = torch.randn(3, 2, k, k)
    for padding in range((k - 1) // 2 + 1):
        true = operator_norm(weight, (6, 6), circular=padding)
        assert conv_norm(weight).upper >= true * (1 - 1e-13)


def test_circular_padding_beyond_the_kernel_is_not_covered() -> None:
    """The refusal of the layers rests on this: repeated pixels raise the norm above the symbol."""
    weight = torch.ones(1, 1, 1, 1)
    assert operator_norm(weight, (2, 2), circular=1) > 1.5 > conv_norm(weight).upper


@pytest.mark.parametrize("kernel", [(3, 3), (2, 2), (5, 3), (1, 4)])
@pytest.mark.parametrize("oversampling", [2, 4, 8])
def test_the_gap_to_the_supremum_of_the_symbol_is_at_most_the_stated_factor(
    kernel: tuple[int, int], oversampling: int
) -> None:
    weight = torch.randn(4, 4, *kernel)
    symbol = torch.fft.fft2(weight, s=(256, 256)).permute(2, 3, 0, 1)
    supremum = float(torch.linalg.matrix_norm(symbol, 2).max())
    factor = (1 / math.cos(math.pi / 2 / oversampling)) ** sum(k > 1 for k in kernel)
    assert supremum <= conv_norm(weight, oversampling=oversampling).upper <= supremum * 1.001 * factor


def test_the_riesz_factor_is_attained_by_a_rotation() -> None:
    """The symbol I + e^{iω} R(φ) has norm |1 + e^{i(ω ± φ)}|, largest (2) at ∓φ: put φ half way between two grid points."""
    n = 8  # the grid of two taps with oversampling 4
    phi = math.pi / n
    rotation = torch.tensor([[math.cos(phi), -math.sin(phi)], [math.sin(phi), math.cos(phi)]])
    weight = torch.stack([torch.eye(2), rotation], dim=-1)
    symbols = [torch.eye(2) + rotation * complex(math.cos(w), math.sin(w)) for w in 2 * math.pi * np.arange(n) / n]
    grid_only = max(float(torch.linalg.matrix_norm(s, 2)) for s in symbols)
    true = operator_norm(weight, (200,), padding=1)
    assert grid_only < 1.97 < true < 2.0
    assert conv_norm(weight, oversampling=4).upper == pytest.approx(2.0, rel=1e-12)
    assert conv_norm(weight, oversampling=4).upper >= 2.0


def test_a_one_by_one_convolution_has_the_norm_of_its_matrix() -> None:
    weight = torch.randn(5, 3, 1, 1)
    true = float(torch.linalg.matrix_norm(weight[..., 0, 0], 2))
    assert true * (1 - 1e-14) <= conv_norm(weight).upper <= true * (1 + 1e-11)


def test_three_dimensional_kernels() -> None:
    weight = torch.randn(2, 2, 2, 2, 2)
    true = operator_norm(weight, (4, 4, 4), padding=1)
    assert true <= conv_norm(weight, oversampling=4).upper <= 1.5 * true


def test_scales_zero_and_empty_kernels() -> None:
    weight = torch.randn(2, 2, 3)
    unit = conv_norm(weight).upper
    for exponent in (-900, -40, 40, 900):
        scaled = conv_norm(weight.numpy() * 2.0**exponent).upper
        assert scaled == pytest.approx(unit * 2.0**exponent, rel=1e-13)
    assert conv_norm(torch.full((1, 1, 3), 1e308)).upper == math.inf
    assert 0.0 < conv_norm(torch.full((1, 1, 3), 5e-324)).upper < 1e-322
    assert conv_norm(torch.zeros(2, 2, 3)).upper == 0.0
    assert conv_norm(torch.empty(0, 2, 3)).upper == 0.0


def test_the_training_bound_is_differentiable_and_close_to_the_proved_one() -> None:
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: gram_conv_norm(w, steps=3), weight, fast_mode=True)
    ratio = (
        float(gram_conv_norm(weight.detach(), steps=8, oversampling=4)) / conv_symbol_norm(weight, oversampling=4).upper
    )
    assert 1 - 1e-9 <= ratio <= 1.02
    assert gram_conv_norm(weight.detach().to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", [conv_norm, gram_conv_norm])
def test_kernels_that_are_none_are_refused(norm: object) -> None:
    with pytest.raises(ValueError, match="3 to 5 dimensions"):
        norm(torch.ones(2, 2))
    with pytest.raises(ValueError, match="divisor"):
        norm(torch.ones(3, 1, 3), groups=2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        conv_norm(torch.full((1, 1, 3), math.nan))
    with pytest.raises(ValueError, match="oversampling"):
        conv_norm(torch.ones(1, 1, 3), oversampling=1)
    with pytest.raises(ValueError, match="groups must be a positive divisor"):
        norm(torch.ones(1, 1, 3), groups=True)
    for none in ([[[1.0]]], None, torch.ones(1, 1, 3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="real floating"):
            norm(none)
    for kernel in ((0,), (-1,), (1.5,), (True,)):
        with pytest.raises(ValueError, match="kernel must be"):
            padding_multiplicity(kernel)


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (3, 2, 4), (4, 4, 2, 3)])
def test_a_kernel_of_one_sign_has_its_value_at_the_frequency_zero(shape: tuple[int, ...]) -> None:
    weight = torch.rand(shape)
    true = float(torch.linalg.matrix_norm(weight.flatten(2).sum(-1), 2))
    assert true * (1 - 1e-14) <= conv_norm(weight).upper <= true * (1 + 1e-11)
    flipped = weight * (-1.0) ** torch.arange(shape[-1])  # the same at the highest frequency
    assert true * (1 - 1e-14) <= conv_norm(flipped).upper <= true * (1 + 1e-11)


def test_the_memory_does_not_grow_with_the_square_of_the_taps() -> None:
    weight = torch.randn(1, 1, 21, 21)
    tracemalloc.start()
    bound = conv_norm(weight).upper
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    assert bound >= float(torch.fft.fft2(weight[0, 0], s=(64, 64)).abs().max())


@settings(max_examples=30)
@given(
    m=st.integers(1, 24), n=st.integers(1, 24), k=st.integers(1, 5), seed=st.integers(0, 99), points=st.integers(10, 40)
)
def test_the_slack_of_the_grid_is_what_it_says(m: int, n: int, k: int, seed: int, points: int) -> None:
    kernel = torch.randn(1, m, n, k, generator=torch.Generator().manual_seed(seed))
    kernel = kernel / kernel.abs().amax()
    true = float(torch.linalg.svdvals(torch.fft.fft(kernel[0], n=points).permute(2, 0, 1)).max())
    bound, peak = symbol_peak(kernel.numpy(), (points,))
    assert true * (1 - 1e-13) <= bound <= true * (1 + symbol_slack(m, n, k) + 1e-13)
    angle = 2 * math.pi * peak[0] * torch.arange(k)
    there = torch.linalg.matrix_norm((kernel[0] * torch.polar(torch.ones(k), angle)).sum(-1), 2)
    assert float(there) == pytest.approx(true, rel=1e-9)
    assert symbol_exceeds(kernel.numpy(), (points,), 0.999 * true, peak)
    assert not symbol_exceeds(kernel.numpy(), (points,), 1.001 * true, peak)
