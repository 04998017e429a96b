r"""Bounds of convolutions for a declared image, in exactly the form that the verifier proves.

Along each axis a convolution is reduced to stride 1 and no dilation, :math:`y_b = \sum_j W_j X_{b+j}` with :math:`K` taps between
blocks of pixels (step S6 of docs/soundness.md). With :math:`P` positions on its strided side (its outputs, or the inputs of a
transposed one) an image with zero padding never meets itself on a circle of :math:`N` blocks,

.. math::
    g = \gcd(s, d), \quad s' = s/g, \quad d' = d/g, \quad K = \lceil k/s' \rceil, \quad N = \lceil P/d' \rceil + K - 1 ,

and circular padding has its own circle. The norm is then at most the largest norm of the symbol at the :math:`N` frequencies of the
circle. If :math:`N > 16K`, all frequencies are bounded instead from :math:`8K` of them, with the factor
:math:`\sec(\pi(K-1)/(16K))` of M. Riesz.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

from stableopt.errors import UncertifiableError
from stableopt.linalg.bound import Bound
from stableopt.linalg.conv_geometry import Reduced
from stableopt.linalg.conv_symbol import as_kernel, fold, riesz_factor, symbol_upper
from stableopt.linalg.proved import gamma, scale_back, scale_to_unit

__all__ = ["AxisGrid", "conv_inf_upper", "conv_sides", "conv_upper", "grids"]

_FINEST = 16
"""Frequencies per tap up to which all frequencies of a circle are looked at."""
_COARSE = 8
"""Frequencies per tap of the Riesz grid."""


@dataclass(frozen=True, slots=True)
class AxisGrid:
    """One axis of a convolution with stride 1, and the frequencies at which its symbol is looked at.

    Args:
        stride: :math:`s'`: tap :math:`t = s'j + b` of the kernel is tap :math:`j` of the channels of phase :math:`b`.
        taps: :math:`K`.
        points: the number of frequencies.
        riesz: whether the largest value on them needs the factor of M. Riesz.

    Examples:
        >>> AxisGrid(1, 3, 34, False).points
        34
    """

    stride: int
    taps: int
    points: int
    riesz: bool


def grids(node: dict[str, Any], kernel: Sequence[int], image: Sequence[int] | None) -> list[AxisGrid]:
    """Reduce each axis of a convolution and choose its frequencies.

    Args:
        node: the operation ``conv``: its stride, padding, dilation, padding mode, and whether it is transposed.
        kernel: taps per axis.
        image: pixels of the input per axis; None for a bound that holds for every size.

    Raises:
        UncertifiableError: for circular padding of more than the kernel reaches.

    Examples:
        >>> node = {"stride": [2], "padding": [1], "dilation": [1], "padding_mode": "zeros"}
        >>> grids(node, (3,), (32,))  # 16 outputs, two taps between blocks of two pixels
        [AxisGrid(stride=2, taps=2, points=17, riesz=False)]
    """
    sizes = itertools.repeat(None) if image is None else image
    circular = node.get("padding_mode", "zeros") == "circular"
    rows = zip(kernel, node["stride"], node["dilation"], node["padding"], sizes, strict=False)
    if circular and any(2 * p > d * (k - 1) for k, _, d, p, _ in rows):
        raise UncertifiableError(
            "circular padding of more pixels than the kernel reaches repeats outputs: it has no rule."
        )
    rows = zip(kernel, node["stride"], node["dilation"], node["padding"], sizes, strict=False)
    axis = _circular if circular else _zeros
    return [axis(k, s, d, p, n, transposed=node.get("transposed", False)) for k, s, d, p, n in rows]


def _zeros(k: int, s: int, d: int, p: int, image: int | None, *, transposed: bool) -> AxisGrid:
    common = math.gcd(s, d)
    stride, classes = s // common, d // common
    taps = -(-k // stride)
    if image is None:
        return _choose(stride, taps, None)
    positions = image if transposed else (image + 2 * p - d * (k - 1) - 1) // s + 1
    return _choose(stride, taps, -(-positions // classes) + taps - 1)


def _circular(k: int, s: int, d: int, _p: int, image: int | None, *, transposed: bool) -> AxisGrid:
    if transposed:
        raise UncertifiableError("a transposed convolution with circular padding has no rule.")
    if image is None:
        return _choose(1, k, None)
    step = math.gcd(s, image)
    stride = step // math.gcd(step, d)
    return _choose(stride, -(-k // stride), image // math.gcd(d, image) // stride)


def _choose(stride: int, taps: int, torus: int | None) -> AxisGrid:
    if taps == 1:
        return AxisGrid(stride, 1, 1, False)
    if torus is not None and torus <= _FINEST * taps:
        return AxisGrid(stride, taps, torus, False)
    return AxisGrid(stride, taps, _COARSE * taps, True)


def conv_upper(node: dict[str, Any], weight: Tensor, image: Sequence[int] | None) -> float:
    r"""Bound the operator norm of a convolution from above, proved: the largest norm of its symbol times the Riesz factors.

    Args:
        node: the operation ``conv``.
        weight: its weight, ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` if it is transposed.
        image: pixels of the input per axis; None for any.

    Raises:
        UncertifiableError: as :func:`grids`.

    Examples:
        >>> import torch
        >>> node = {"stride": [1], "padding": [0], "dilation": [1], "padding_mode": "zeros", "groups": 1}
        >>> 1.9 < conv_upper(node, torch.tensor([[[1.0, -1.0]]]), (6,)) <= 2.0 + 1e-12
        True
    """
    w = as_kernel(weight, node["groups"])
    axes = grids(node, w.shape[2:], image)
    if not w.any():
        return 0.0
    w, exponent = scale_to_unit(w)
    kernel = fold(w, node["groups"], [Reduced(axis.stride, None, 1) for axis in axes])
    high = Bound.point(symbol_upper(kernel, [axis.points for axis in axes]))
    factor = riesz_factor([axis.taps for axis in axes], [axis.points if axis.riesz else None for axis in axes])
    return scale_back(high * factor, exponent).upper


def conv_sides(node: dict[str, Any], shape: Sequence[int]) -> tuple[int, int]:
    """Return the sides of the matrices of the symbol: outputs of a group, and inputs of a group times the phases of the stride.

    Args:
        node: the operation.
        shape: of its weight.

    Examples:
        >>> conv_sides({"groups": 2, "stride": [2], "dilation": [1]}, (8, 4, 3))
        (4, 8)
    """
    phases = (min(s // math.gcd(s, d), k) for s, d, k in zip(node["stride"], node["dilation"], shape[2:], strict=True))
    return shape[0] // node["groups"], shape[1] * math.prod(phases)


def conv_inf_upper(node: dict[str, Any], weight: Tensor) -> Fraction:
    r"""Bound the norm of a convolution for the maximum norm: the largest sum of the moduli of the taps that meet in one output.

    .. math:: \max_o \sum_{i, t} |W_{oit}|

    In a transposed convolution the taps that meet in one output are those of one class modulo :math:`s'`.

    Args:
        node: the operation.
        weight: its weight.

    Examples:
        >>> import torch
        >>> node = {"stride": [2], "dilation": [1], "groups": 1, "transposed": True}
        >>> round(float(conv_inf_upper(node, torch.tensor([[[1.0, 2.0, 4.0]]]))), 12)  # taps 0 and 2, or tap 1
        5.0
    """
    w, exponent = scale_to_unit(np.abs(as_kernel(weight, node["groups"])))
    if node.get("transposed", False):
        steps = [s // math.gcd(s, d) for s, d in zip(node["stride"], node["dilation"], strict=True)]
        grouped = w.reshape(node["groups"], -1, *w.shape[1:])
        classes = itertools.product(*(range(min(s, k)) for s, k in zip(steps, w.shape[2:], strict=True)))
        parts = (
            grouped[(..., *(slice(c, None, s) for c, s in zip(start, steps, strict=True)))].sum(
                axis=(1, *range(3, w.ndim + 1))
            )
            for start in classes
        )
        top = max(float(part.max()) for part in parts)
    else:
        top = float(w.sum(axis=tuple(range(1, w.ndim))).max())
    return Fraction(top) * (1 + Fraction(gamma(2 * w.size))) * Fraction(2) ** exponent
