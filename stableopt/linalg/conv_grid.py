r"""The frequencies that training looks at: grids of a reduced kernel, in torch.

Both norms for training work on the kernel that :mod:`stableopt.linalg.conv_geometry` reduces to stride 1, and on a grid of
frequencies that is just fine enough for a Riesz factor of 1.04, see :mod:`stableopt.linalg.conv`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stableopt.linalg.conv_geometry import Reduced, check_kernel, conv_axes, reductions
from stableopt.linalg.conv_symbol import coarse_points, riesz_factor

__all__ = ["Grid", "angles", "binary_size", "block_matrices", "fold_tensor", "layer_grids", "specialized", "wide"]

_FEW = 160
"""So many frequencies have a vector each. A vector that chooses among several may stay at one that is not the largest."""


@dataclass(frozen=True)
class Grid:
    """A reduction of all axes with the frequencies to look at.

    Args:
        axes: the reduction of each axis.
        taps: taps of the reduced kernel per axis.
        points: frequencies per axis.
        width: frequencies of a cell per axis, 1 where there are few frequencies and else 2.
        cells: cells per axis; along the first axis half of the circle is enough, for conjugate symbols.
        tracks: number of cells.
        factor: from the largest norm on the grid to the bound of the layer.

    Examples:
        >>> grids = layer_grids(torch.zeros(1, 1, 3), 1, None, padding=1, padding_mode="zeros")
        >>> grids[0].points, grids[0].width, grids[0].cells
        ((12,), 1, (7,))
    """

    axes: tuple[Reduced, ...]
    taps: tuple[int, ...]
    points: tuple[int, ...]
    width: int
    cells: tuple[int, ...]
    tracks: int
    factor: float


def wide(weight: Tensor) -> Tensor:
    """Return a half precision tensor in float32 and any other as it is.

    Examples:
        >>> wide(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return weight.float() if weight.dtype in {torch.float16, torch.bfloat16} else weight


def binary_size(V: Tensor) -> Tensor:
    """Return a constant power of two near the largest absolute entry, by which dividing is exact: squares then fit their dtype.

    Args:
        V: a tensor; 1 if it is zero, NaN if an entry is infinite.

    Examples:
        >>> binary_size(torch.tensor([3.0, -5.0])), binary_size(torch.tensor([1e-40])) < 1e-40
        (tensor(4.), tensor(True))
    """
    top = V.detach().abs().amax()
    return torch.where(top > 0.0, top / (2.0 * torch.frexp(top).mantissa), 1.0)


def layer_grids(
    weight: Tensor,
    groups: int,
    oversampling: int | None,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    image_size: int | Sequence[int] | None = None,
) -> tuple[Grid, ...]:
    """Return the grid of every way to bound a layer.

    Args:
        weight: kernel as the layer stores it.
        groups: number of groups.
        oversampling: grid points per tap, at least 2; None for the coarsest grid with a Riesz factor of at most 1.04 in total.
        stride: as in the layer, and so the options that follow.
        dilation: as in the layer.
        padding: as in the layer.
        padding_mode: as in the layer.
        transposed: True for a transposed convolution.
        output_padding: as in the layer.
        image_size: pixels of the input per axis, if they are fixed.

    Raises:
        TypeError: if the weight is no real floating tensor.
        ValueError: if the shape or an option does not fit.

    Examples:
        >>> layer_grids(torch.zeros(1, 1, 3, 3), 1, None)[0].points
        (16, 16)
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = f"dtype {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"a convolution kernel is a real floating tensor, got {kind}.")
    check_kernel(weight.shape, groups)
    options = (stride, dilation, padding, output_padding, image_size)
    if torch.compiler.is_compiling():
        options = tuple(specialized(option) for option in options)
    options = tuple(tuple(option) if isinstance(option, list) else option for option in options)
    return _constant_grids(specialized(tuple(weight.shape[2:])), oversampling, padding_mode, transposed, *options)


def specialized(option: Any) -> Any:
    """Return an option with plain integers. While compiling they may be symbols; a range must have a length, so it asks them.

    Examples:
        >>> specialized((2, [3], "same"))
        (2, (3,), 'same')
    """
    if isinstance(option, tuple | list):
        return tuple(specialized(n) for n in option)
    return len(range(option)) if isinstance(option, int) and not isinstance(option, bool) and option > 0 else option


@torch.compiler.assume_constant_result
def _constant_grids(*options: Any) -> tuple[Grid, ...]:
    return _cached_grids(*options)


@functools.lru_cache(maxsize=1024, typed=True)
def _cached_grids(
    kernel: tuple[int, ...],
    oversampling: int | None,
    padding_mode: str,
    transposed: bool,
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    padding: int | str | Sequence[int],
    output_padding: int | Sequence[int],
    image_size: int | Sequence[int] | None,
) -> tuple[Grid, ...]:
    axes = conv_axes(
        kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
        image_size=image_size,
    )
    return tuple(_grid(kernel, reduced, oversampling) for reduced in reductions(axes))


def _grid(kernel: Sequence[int], axes: tuple[Reduced, ...], oversampling: int | None) -> Grid:
    if oversampling is not None and (not isinstance(oversampling, int) or oversampling < 2):
        raise ValueError(f"oversampling must be an integer >= 2, got {oversampling!r}.")
    taps = tuple(axis.taps(k) for axis, k in zip(axes, kernel, strict=True))
    plain = coarse_points(taps) if oversampling is None else [1 if k == 1 else oversampling * k for k in taps]
    exact = [axis.torus is not None and axis.torus <= n for axis, n in zip(axes, plain, strict=True)]
    points = tuple(axis.torus if e and axis.torus else n for axis, e, n in zip(axes, exact, plain, strict=True))
    factor = riesz_factor(taps, [None if e else n for e, n in zip(exact, plain, strict=True)]).upper
    half = (points[0] // 2 + 1, *points[1:])
    width = 1 if math.prod(half) <= _FEW else 2
    cells = tuple(-(-n // width) for n in half)
    copies = math.prod(axis.copies for axis in axes)
    return Grid(axes, taps, points, width, cells, math.prod(cells), factor * math.sqrt(copies))


def fold_tensor(w: Tensor, groups: int, axes: Sequence[Reduced]) -> Tensor:
    """Rearrange a kernel for stride 1, as :func:`stableopt.linalg.conv_symbol.fold` does for arrays.

    Args:
        w: shape ``(out, in / groups, *kernel)``.
        groups: number of groups.
        axes: the reduction of each axis.

    Returns:
        Shape ``(groups, out / groups, channels, taps)``.

    Examples:
        >>> fold_tensor(torch.zeros(4, 2, 3, 3), 2, [Reduced(2, None, 1)] * 2).shape
        torch.Size([2, 2, 8, 4])
    """
    sizes = tuple(w.shape[2:])
    taps = [axis.taps(k) for axis, k in zip(axes, sizes, strict=True)]
    phases = [min(axis.stride, k) for axis, k in zip(axes, sizes, strict=True)]
    if any(p > 1 for p in phases):
        dims = len(taps)
        missing = [t * p - k for t, p, k in zip(taps, phases, sizes, strict=True)]
        w = F.pad(w, [end for m in reversed(missing) for end in (0, m)])
        w = w.reshape(*w.shape[:2], *(n for pair in zip(taps, phases, strict=True) for n in pair))
        w = w.permute(0, 1, *(3 + 2 * a for a in range(dims)), *(2 + 2 * a for a in range(dims)))
    return w.reshape(groups, w.shape[0] // groups, -1, math.prod(taps))


def block_matrices(parts: Tensor, taps: Sequence[int]) -> tuple[Tensor, float]:
    r"""Return matrices the largest norm of which, times a number, is an upper bound of the norm of a kernel of stride 1.

    With the taps of some axes along the rows, :math:`W_{jk}`, and those of the others along the columns,

    .. math:: \Bigl\|\sum_{j,k} W_{jk} e^{i(\omega\cdot j + \omega'\cdot k)}\Bigr\|_2 \le
        \sqrt{\text{number of taps}} \; \bigl\|[W_{jk}]_{j,k}\bigr\|_2 .

    Args:
        parts: shape ``(groups, out, channels, taps)``.
        taps: taps per axis.

    Returns:
        Shape ``(groups, rows, columns)``, as near to square as may be, and the number.

    Examples:
        >>> block_matrices(torch.ones(1, 1, 1, 4), (2, 2))
        (tensor([[[1., 1.],
                 [1., 1.]]]), 2.0)
    """
    groups, out, channels, count = parts.shape
    dims = len(taps)
    sides = [out * math.prod(taps[:p]) + channels * math.prod(taps[p:]) for p in range(dims + 1)]
    split = sides.index(min(sides))
    order = (0, 1, *range(3, 3 + split), 2, *range(3 + split, 3 + dims))
    blocks = parts.unflatten(-1, tuple(taps)).permute(order)
    return blocks.reshape(groups, out * math.prod(taps[:split]), -1), math.sqrt(count)


def angles(grid: Grid, like: Tensor, ends: Sequence[int]) -> Tensor:
    r"""Return the angles :math:`\omega\cdot j` of the first ``ends`` frequencies per axis.

    Args:
        grid: the grid.
        like: a tensor of the dtype and on the device of the result.
        ends: number of frequencies per axis.

    Returns:
        Shape ``(frequencies, taps)``.

    Examples:
        >>> angles(layer_grids(torch.zeros(1, 1, 2), 1, 2)[0], torch.zeros(1), (3,))[:, 1].div(math.pi)
        tensor([0.0000, 0.5000, 1.0000])
    """
    angle = torch.zeros(1, 1, dtype=like.dtype, device=like.device)
    for k, n, end in zip(grid.taps, grid.points, ends, strict=True):
        q = torch.arange(end, device=like.device)
        turns = torch.remainder(q[:, None] * torch.arange(k, device=like.device), n).to(like.dtype) * (2 * math.pi / n)
        angle = (angle[:, None, :, None] + turns[None, :, None, :]).flatten(2).flatten(0, 1)
    return angle
