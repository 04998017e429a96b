r"""A warm estimate of the norm of a convolution, at almost no cost in a training step.

The frequencies of the grid lie in cells of at most two per axis, with one vector each. All vectors together are multiplied by the
kernel once and by its transpose once; the symbol itself, a matrix per frequency, is never formed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt.linalg.conv_grid import Grid, angles, binary_size, fold_tensor, layer_grids, wide

__all__ = ["conv_power_start", "conv_power_step"]


def conv_power_start(
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding: int | str | Sequence[int] = 0,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    image_size: int | Sequence[int] | None = None,
    oversampling: int | None = None,
    tracks: int | None = None,
    steps: int = 20,
) -> Tensor:
    r"""Return start vectors for :func:`conv_power_step`, the same ones for the same kernel.

    Args:
        weight: the kernel.
        stride: as in the layer, and so the options that follow; give :func:`conv_power_step` the same.
        dilation: as in the layer.
        groups: number of groups.
        padding: as in the layer.
        padding_mode: as in the layer.
        transposed: True for a transposed convolution.
        output_padding: as in the layer.
        image_size: pixels of the input per axis, if they are fixed.
        oversampling: grid points per tap.
        tracks: number of free vectors; by default one per cell of the grid.
        steps: power steps to begin with.

    Returns:
        Real and imaginary parts, shape ``(tracks, weight.shape[0], 2)``, on the device of the kernel, float32 or wider.

    Raises:
        ValueError: if the shape or an option does not fit.

    Examples:
        >>> conv_power_start(torch.ones(4, 2, 3, 3), tracks=2).shape
        torch.Size([2, 4, 2])
    """
    grid = layer_grids(
        weight,
        groups,
        oversampling,
        stride=stride,
        dilation=dilation,
        padding=padding,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
        image_size=image_size,
    )[0]
    w = wide(weight.detach())
    generator = torch.Generator().manual_seed(0)
    shape = (grid.tracks if tracks is None else tracks, weight.shape[0], 2)
    vectors = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(w)
    if w.numel() == 0:
        return vectors
    kernel = fold_tensor(w / binary_size(w), groups, grid.axes)
    for _ in range(steps):
        vectors = _ascend(kernel, vectors, grid, free=tracks is not None)[2]
    return vectors


def conv_power_step(
    weight: Tensor,
    vectors: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding: int | str | Sequence[int] = 0,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    image_size: int | Sequence[int] | None = None,
    oversampling: int | None = None,
    free: bool = False,
    riesz: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Estimate the norm of a convolution by one power step of warm vectors, differentiably, for training.

    The frequencies of the grid lie in cells, of two per axis or of one where the grid has few. The vector :math:`u` of a cell looks
    for the frequency in it where it reaches most, and makes a power step there:

    .. math::
        \omega^* = \arg\max_\omega \|\hat W(\omega)^* u\|, \quad
        v = \frac{\hat W(\omega^*)^* u}{\|\hat W(\omega^*)^* u\|}, \quad
        u' = \frac{\hat W(\omega^*) v}{\|\hat W(\omega^*) v\|} .

    The estimate is the largest :math:`\|\hat W(\omega^*) v\| = \mathrm{Re}(u'^* \hat W(\omega^*) v)`, and its derivative along
    :math:`dW` is :math:`\mathrm{Re}(u'^* d\hat W(\omega^*) v)`. For a kernel that stays as it is, it never falls from step to step.
    The symbol is never formed: a step is two products with the kernel.

    Args:
        weight: kernel as the layer stores it, see :func:`stableopt.linalg.conv_norm`.
        vectors: shape ``(cells, weight.shape[0], 2)``, from :func:`conv_power_start` or from the step before.
        stride: as in the layer.
        dilation: as in the layer.
        groups: number of groups.
        padding: as in the layer.
        padding_mode: as in the layer.
        transposed: True for a transposed convolution.
        output_padding: as in the layer.
        image_size: pixels of the input per axis, if they are fixed.
        oversampling: grid points per tap, at least 2; the default is that of :func:`gram_conv_norm`.
        free: let every vector go to the frequency of the whole grid where it reaches most. A few vectors are enough then and the
            step is the cheapest there is, but they may all stay at frequencies that are not the largest.
        riesz: multiply by the Riesz factor of the grid and by the root of the number of copies. Once the vectors have settled
            the result is about that of :func:`gram_conv_norm`.

    Returns:
        The estimate, 0-d, in the dtype of ``weight``; and the new vectors, without gradient. Without ``riesz`` the estimate is, up
        to rounding, never above the supremum of the symbol: an *estimate* from below, which proves nothing.

    Raises:
        ValueError: if the shapes or an option do not fit.

    References:
        Miyato et al., *Spectral Normalization for Generative Adversarial Networks*, 2018 (warm vectors).

    Examples:
        >>> kernel = torch.tensor([[[0.5, 0.5]]])
        >>> vectors = conv_power_start(kernel, steps=0)
        >>> estimate, vectors = conv_power_step(kernel, vectors)
        >>> round(float(estimate), 4)
        1.0
    """
    grid = layer_grids(
        weight,
        groups,
        oversampling,
        stride=stride,
        dilation=dilation,
        padding=padding,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
        image_size=image_size,
    )[0]
    if (
        vectors.ndim != 3
        or vectors.shape[1:] != (weight.shape[0], 2)
        or not (len(vectors) == grid.tracks or (free and len(vectors)))
    ):
        raise ValueError(
            f"the vectors of this kernel have shape ({'tracks' if free else grid.tracks}, {weight.shape[0]}, 2), "
            f"got {tuple(vectors.shape)}; conv_power_start makes them."
        )
    w = wide(weight)
    if w.numel() == 0:
        return w.sum().to(weight.dtype), vectors
    size = binary_size(w)
    kernel = fold_tensor(w / size, groups, grid.axes)  # (groups, out, channels, taps)
    with torch.no_grad():
        left, right, updated = _ascend(kernel.detach(), vectors.to(w.dtype), grid, free=free)
    largest = (left * (kernel.flatten(2) @ right)).sum((1, 2)).amax()
    if riesz:
        largest = largest * grid.factor
    return (largest * size).to(weight.dtype), updated.to(vectors.dtype)


def _choices(grid: Grid, like: Tensor, *, free: bool) -> Tensor:
    r"""Return :math:`e^{i\omega\cdot j}`, shape ``(cells or 1, choices, taps)``, for the frequencies that each vector can choose.

    It depends on no data, so it is kept; not for tensors that only trace.
    """
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return _make_choices(grid, like.dtype, like.device, free)
    return _kept_choices(grid, like.dtype, like.device, free)


def _make_choices(grid: Grid, dtype: torch.dtype, device: torch.device, free: bool) -> Tensor:
    like = torch.empty(0, dtype=dtype, device=device)
    if free:
        angle = angles(grid, like, grid.points).unsqueeze(0)
    else:
        dims, width = len(grid.cells), grid.width
        angle = angles(grid, like, [width * c for c in grid.cells])
        angle = angle.view(*(n for c in grid.cells for n in (c, width)), -1)
        angle = angle.permute(*range(0, 2 * dims, 2), *range(1, 2 * dims, 2), 2 * dims)
        angle = angle.reshape(grid.tracks, width**dims, -1)
    return torch.polar(torch.ones_like(angle), angle)


_kept_choices = functools.lru_cache(maxsize=256)(_make_choices)


def _ascend(kernel: Tensor, vectors: Tensor, grid: Grid, *, free: bool) -> tuple[Tensor, Tensor, Tensor]:
    r"""Make one power step of every vector at the best of its frequencies.

    Args:
        kernel: shape ``(groups, out, channels, taps)``, real.
        vectors: shape ``(tracks, groups * out, 2)``.
        grid: the frequencies.
        free: whether each vector may choose among all.

    Returns:
        The best :math:`u'` and :math:`e^{i\omega\cdot j} v` of each group as real and imaginary parts, shapes
        ``(groups, out, 2)`` and ``(groups, channels * taps, 2)``, and the new vectors.
    """
    groups, out, channels, taps = kernel.shape
    tracks = len(vectors)
    tiny = torch.finfo(kernel.dtype).tiny
    matrix = kernel.flatten(2)  # (groups, out, channels * taps)
    u = vectors.view(tracks, groups, out, 2).transpose(0, 1)  # (groups, tracks, out, 2)
    pulled = torch.bmm(u.transpose(2, 3).reshape(groups, 2 * tracks, out), matrix)
    pulled = pulled.view(groups, tracks, 2, channels, taps)
    X = torch.complex(pulled[:, :, 0], pulled[:, :, 1])  # W_j^T u
    Q = X.mH @ X  # |sum_j conj(z_j) X_j|^2 is a form in z
    z = _choices(grid, kernel, free=free)
    reach = ((z @ Q) * z.conj()).real.sum(-1)  # (groups, tracks, choices)
    choice = reach.argmax(-1)[..., None, None].expand(-1, -1, 1, taps)
    best = z.expand(groups, tracks, -1, -1).gather(2, choice)
    v = (X * best.conj()).sum(-1, keepdim=True)
    v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(tiny)
    right = torch.view_as_real((v * best).flatten(2))  # (groups, tracks, channels * taps, 2)
    image = torch.bmm(matrix, right.permute(0, 2, 1, 3).reshape(groups, channels * taps, 2 * tracks))
    image = image.view(groups, out, tracks, 2).transpose(1, 2)  # (groups, tracks, out, 2)
    norm = torch.linalg.vector_norm(image, dim=(-2, -1), keepdim=True)
    u = torch.where(norm > tiny, image / norm.clamp_min(tiny), u)
    winner = norm.view(groups, tracks).argmax(-1)
    rows = torch.arange(groups, device=kernel.device)
    return u[rows, winner], right[rows, winner], u.transpose(0, 1).reshape(tracks, groups * out, 2)
