"""Bounds of convolutions against the matrices of the operators, and against the proof of the verifier."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.certify.conv_bounds import AxisGrid, conv_inf_upper, conv_sides, conv_upper, grids
from stableopt.certify.publish import published, weight_bound
from stableopt.certify.verifier.numbers import RejectedError
from stableopt.certify.verifier.operations import RULES, Graph
from stableopt.errors import UncertifiableError
from tests.certify.oracle import operator_matrix

LAYERS = {(1, False): nn.Conv1d, (1, True): nn.ConvTranspose1d, (2, False): nn.Conv2d, (2, True): nn.ConvTranspose2d}


def node_of(layer: Any) -> dict[str, Any]:
    dims, turned = len(layer.kernel_size), layer.transposed
    return {
        "op": "conv", "in": [0], "dims": dims, "weight": "w", "bias": None, "stride": list(layer.stride),
        "padding": list(layer.padding), "dilation": list(layer.dilation), "groups": layer.groups,
        "padding_mode": layer.padding_mode, "transposed": turned, "output_padding": list(layer.output_padding),
    }  # fmt: skip


def verified(
    node: dict[str, Any], weight: torch.Tensor, shape: tuple[int, ...], bound: float, norm: str = "l2"
) -> bool:
    graph = Graph({"w": weight.detach().double().numpy()}, norm, exact=False)
    try:
        RULES["conv"].check(graph, node, shape, Fraction(bound))
    except RejectedError as error:
        if "not proved" not in str(error):
            raise
        return False
    return True


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    dims, turned, groups = draw(st.sampled_from([1, 1, 2])), draw(st.booleans()), draw(st.integers(1, 2))
    small = st.lists(st.integers(1, 4), min_size=dims, max_size=dims)
    kernel, stride, dilation, image = draw(small), draw(small), draw(small), draw(small)
    image = [i * draw(st.integers(1, 4 if dims == 1 else 2)) for i in image]
    circular = not turned and draw(st.booleans())
    padding = [draw(st.integers(0, d * (k - 1) // 2 if circular else 4)) for k, d in zip(kernel, dilation, strict=True)]
    options: dict[str, Any] = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    options["padding_mode"] = "circular" if circular else "zeros"
    if turned:
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    elif any(i + 2 * p <= d * (k - 1) for i, p, d, k in zip(image, padding, dilation, kernel, strict=True)):
        assume(False)
    torch.manual_seed(draw(st.integers(0, 10**6)))
    layer = LAYERS[dims, turned](2 * groups, draw(st.integers(1, 3)) * groups, tuple(kernel), bias=False, **options)
    return layer, (2 * groups, *image)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_the_bound_is_above_the_operator_and_the_verifier_proves_it(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    try:
        matrix = operator_matrix(layer, shape)
    except (RuntimeError, ValueError):
        assume(False)
    node, weight = node_of(layer), layer.weight
    assume(matrix.size)
    norm, largest = np.linalg.norm(matrix, 2), np.abs(matrix).sum(axis=1).max()
    bound = conv_upper(node, weight, shape[1:])
    assert norm <= bound * (1 + 1e-12)
    assert norm <= conv_upper(node, weight, None) * (1 + 1e-12)
    assert largest <= float(conv_inf_upper(node, weight)) * (1 + 1e-12)
    for kind, truth in (("l2", norm), ("linf", largest)):
        public = published(node, {"w": weight}, [shape], kind)["bound"]
        assert verified(node, weight, shape, public, kind)
        assert not verified(node, weight, shape, truth * (1 - 1e-9), kind)


@pytest.mark.parametrize(
    ("stride", "dilation", "size"), [(1, 1, 7), (2, 1, 8), (1, 2, 9), (1, 3, 9), (2, 2, 8), (3, 1, 9)]
)
def test_on_its_own_circle_the_bound_is_the_norm(stride: int, dilation: int, size: int) -> None:
    torch.manual_seed(stride)
    padding = dilation if stride == 1 else 1 if dilation == 1 else 2
    layer = nn.Conv1d(2, 3, 3, stride, padding, dilation, padding_mode="circular", bias=False)
    norm = np.linalg.norm(operator_matrix(layer, (2, size)), 2)
    assert norm <= conv_upper(node_of(layer), layer.weight, (size,)) <= norm * (1 + 1e-11)


def test_windows_that_do_not_overlap_are_bounded_exactly() -> None:
    layer = nn.Conv2d(2, 3, 4, stride=4, bias=False)
    norm = float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))
    assert norm * (1 - 1e-14) <= conv_upper(node_of(layer), layer.weight, (8, 8)) <= norm * (1 + 1e-12)


def test_a_circle_of_sixteen_points_per_tap_is_the_last_that_is_looked_at_whole() -> None:
    node = {"stride": [1], "padding": [1], "dilation": [1], "padding_mode": "zeros"}
    assert grids(node, (3,), (46,)) == [AxisGrid(1, 3, 48, False)]
    assert grids(node, (3,), (47,)) == [AxisGrid(1, 3, 24, True)]
    assert grids(node, (1,), (500,)) == [AxisGrid(1, 1, 1, False)]


def test_dilation_and_stride_shorten_the_circle() -> None:
    node = {"stride": [1], "padding": [0], "dilation": [4], "padding_mode": "zeros"}
    assert grids(node, (3,), (40,)) == [AxisGrid(1, 3, 10, False)]  # 32 outputs, 8 of each class
    strided = {"stride": [4], "padding": [0], "dilation": [2], "padding_mode": "zeros"}
    assert grids(strided, (3,), (41,)) == [AxisGrid(2, 2, 11, False)]  # 10 outputs


def test_circular_padding_beyond_the_kernel_is_refused() -> None:
    node = {"stride": [1], "padding": [1], "dilation": [1], "padding_mode": "circular"}
    assert grids(node, (3,), (9,)) == [AxisGrid(1, 3, 9, False)]
    with pytest.raises(UncertifiableError, match="repeats outputs"):
        grids(node | {"padding": [2]}, (3,), (9,))
    with pytest.raises(UncertifiableError, match="transposed"):
        grids(node | {"transposed": True}, (3,), (9,))


def test_the_riesz_factor_is_needed_and_enough() -> None:
    """A kernel whose symbol peaks between the 24 frequencies of the grid: without the factor the bound would be too small."""
    taps = torch.cos(torch.arange(3) * 2 * math.pi * (3.5 / 24)).reshape(1, 1, 3)
    node = {"stride": [1], "padding": [1], "dilation": [1], "padding_mode": "zeros", "groups": 1}
    frequencies = np.exp(2j * np.pi * np.outer(np.arange(10**4) / 10**4, np.arange(3)))
    supremum = np.abs(frequencies @ taps.numpy().ravel()).max()
    on_the_grid = np.abs(frequencies[:: 10**4 // 25] @ taps.numpy().ravel()).max()
    bound = conv_upper(node, taps, None)
    assert on_the_grid < supremum <= bound <= supremum / math.cos(math.pi / 24) * (1 + 1e-9)


def test_groups_and_phases_make_the_sides_of_the_symbol() -> None:
    assert conv_sides({"groups": 2, "stride": [4], "dilation": [2]}, (8, 4, 3)) == (4, 8)
    assert conv_sides({"groups": 1, "stride": [9], "dilation": [1]}, (8, 4, 3)) == (8, 12)


def test_zero_and_huge_weights() -> None:
    node = {"op": "conv", "stride": [1], "padding": [0], "dilation": [1], "padding_mode": "zeros", "groups": 1}
    assert conv_upper(node, torch.zeros(1, 1, 3), (5,)) == 0.0
    assert conv_inf_upper(node, torch.zeros(1, 1, 3)) == 0
    tiny = conv_upper(node, torch.full((1, 1, 2), 5e-324, dtype=torch.float64), (5,))
    assert 5e-324 <= tiny <= 5e-323
    with pytest.raises(UncertifiableError, match="too large"):
        weight_bound(node, torch.full((1, 1, 2), 1.7e308, dtype=torch.float64), (1, 5))


def test_three_axes() -> None:
    layer = nn.Conv3d(1, 2, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), bias=False)
    shape = (1, 2, 5, 2)
    norm, bound = np.linalg.norm(operator_matrix(layer, shape), 2), conv_upper(node_of(layer), layer.weight, shape[1:])
    assert norm <= bound <= 1.5 * norm
    assert verified(node_of(layer), layer.weight, shape, weight_bound(node_of(layer), layer.weight, shape))


def test_each_class_of_a_transposed_stride_is_summed_apart() -> None:
    for stride, dilation in itertools.product((1, 2, 3), (1, 2)):
        layer = nn.ConvTranspose1d(2, 3, 4, stride, dilation=dilation, bias=False)
        largest = np.abs(operator_matrix(layer, (2, 12))).sum(axis=1).max()
        bound = float(conv_inf_upper(node_of(layer), layer.weight))
        assert largest <= bound * (1 + 1e-12) <= largest * (1 + 1e-11)
