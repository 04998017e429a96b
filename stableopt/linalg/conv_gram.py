r"""The differentiable upper bound of the norm of a convolution, for training: no state, no history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stableopt.linalg.conv_grid import Grid, angles, binary_size, fold_tensor, layer_grids, wide
from stableopt.linalg.estimate import gram_norm

__all__ = ["gram_conv_norm"]

_CANDIDATES = 8
_POWER_STEPS = 6


def gram_conv_norm(
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
    steps: int = 8,
    oversampling: int | None = None,
) -> Tensor:
    r"""Bound the operator norm of a convolution from above, differentiably and without state, for training.

    The grid bound of :func:`stableopt.linalg.conv_norm` with the Gram bound of the largest matrix on the grid, in exact arithmetic
    an upper bound. The gradient is that of the Gram bound at this one frequency.

    Args:
        weight: kernel as the layer stores it, see :func:`stableopt.linalg.conv_norm`.
        stride: as in the layer.
        dilation: as in the layer.
        groups: number of groups.
        padding: as in the layer.
        padding_mode: as in the layer.
        transposed: True for a transposed convolution.
        output_padding: as in the layer.
        image_size: pixels of the input per axis, if they are fixed.
        steps: Gram steps, see :func:`stableopt.linalg.gram_norm`; 8 overestimate a 64 x 64 matrix by at most 0.9 %.
        oversampling: grid points per tap, at least 2. By default the grid is the coarsest one with a Riesz factor of at most
            1.04 in total: 16 x 16 for a 3 x 3 kernel.

    Returns:
        A 0-d tensor in the dtype of ``weight`` (half precision is computed in float32). With the defaults it exceeds the supremum
        of the symbol of 64 channels by at most 4.9 %. NaN if an entry is NaN or infinite.

    Raises:
        ValueError: if the shape or an option does not fit.

    Note:
        Not proved: rounding is not counted. A certificate uses :func:`stableopt.linalg.conv_norm`.

    References:
        Delattre, Barthélemy, Araujo and Allauzen, *Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram
        Iteration*, 2023.

    Examples:
        >>> kernel = torch.tensor([[[0.5, 0.5]]], requires_grad=True)
        >>> norm = gram_conv_norm(kernel)
        >>> norm.backward()
        >>> bool(1.0 <= norm < 1.05), kernel.grad.shape
        (True, torch.Size([1, 1, 2]))
    """
    grids = layer_grids(
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
    )
    w = wide(weight)
    if w.numel() == 0:
        return w.sum().to(weight.dtype)
    size = binary_size(w)
    norms = [_grid_norm(fold_tensor(w / size, groups, grid.axes), grid, steps) for grid in grids]
    # NaN if an entry is NaN or infinite, in whichever group and at whichever frequency, and else 0
    return (torch.stack(norms).amin() * size + (w.detach() * 0.0).sum()).to(weight.dtype)


def _grid_norm(parts: Tensor, grid: Grid, steps: int) -> Tensor:
    """Bound the norm over the grid: find the frequency and group of the largest matrix, and differentiate there."""
    groups = len(parts)
    angle = angles(grid, parts, (grid.points[0] // 2 + 1, *grid.points[1:]))
    with torch.no_grad():
        rows = parts.detach().flatten(0, 2).mT
        rows = torch.nan_to_num(rows, 0.0, 0.0, 0.0)  # the decompositions below raise where an entry is not finite
        rows = rows / rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)  # only the index of the largest matters
        symbols = torch.complex(angle.cos() @ rows, angle.sin() @ rows).view(-1, *parts.shape[1:3])
        best = _largest_symbol(symbols)
    phase = angle.index_select(0, (best // groups).reshape(1))[0]
    part = parts.index_select(0, (best % groups).reshape(1))[0]
    symbol = torch.complex(part @ phase.cos(), part @ phase.sin())
    return gram_norm(symbol, steps=steps) * grid.factor


def _largest_symbol(symbols: Tensor) -> Tensor:
    r"""Return the index of the matrix with the largest norm.

    A few power steps find candidates, whose largest eigenvalue every Gram matrix is compared with by a Cholesky factorization;
    those that exceed it get their eigenvalues too. (While compiling and under transforms of :mod:`torch.func`, all get them: what
    is left depends on the data.)
    """
    G = symbols.mH @ symbols if symbols.shape[-2] >= symbols.shape[-1] else symbols @ symbols.mH
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # noqa: SLF001 no public question
    if traced or G.is_meta or len(G) <= _CANDIDATES:
        return torch.linalg.eigvalsh(G)[:, -1].argmax()
    x = torch.arange(1, G.shape[-1] + 1, dtype=symbols.real.dtype, device=G.device).cos().to(G.dtype).expand(len(G), -1)
    for _ in range(_POWER_STEPS):
        x = F.normalize((G @ x.unsqueeze(-1)).squeeze(-1), dim=-1)
    reach = torch.linalg.vector_norm((G @ x.unsqueeze(-1)).squeeze(-1), dim=-1)
    candidates = reach.topk(_CANDIDATES).indices
    top = torch.linalg.eigvalsh(G[candidates])[:, -1]
    shifted = -G
    shifted.diagonal(dim1=-2, dim2=-1).add_(top.amax() * (1.0 - 1e-4))
    above = torch.linalg.cholesky_ex(shifted).info > 0
    above[candidates] = False
    rest = above.nonzero().squeeze(-1)
    every, values = torch.cat([candidates, rest]), torch.cat([top, torch.linalg.eigvalsh(G[rest])[:, -1]])
    return every[values.argmax()]
