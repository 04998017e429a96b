r"""Upper bounds of the operator norm of a convolution, valid for every image size.

A convolution with kernel :math:`W_\tau` (a :math:`c_{out} \times c_{in}` matrix per tap :math:`\tau`) acts on images over the
whole grid :math:`\mathbb Z^d` as the multiplication by its symbol :math:`\hat W(\omega) = \sum_\tau W_\tau e^{i\omega\cdot\tau}`,
so its norm is :math:`\sup_\omega \|\hat W(\omega)\|_2`. What layers do besides never increases that:

* zero padding by any amount embeds the image in the grid (an isometry) and cropping restricts the result; a stride keeps
  some of the output pixels; a dilation splits the grid into interleaved copies of the undilated operator;
* circular padding of total width at most :math:`d(k-1)` reads the symbol on a finite grid of frequencies only;
* groups are independent: the norm is the largest over the groups.

The supremum is bounded from its values on a finite grid (the *Riesz grid bound*). For unit vectors :math:`a, b` and a
phase :math:`\varphi`, :math:`p(\omega) = \mathrm{Re}(e^{i\varphi} a^* \hat W(\omega) b)` is, up to a shift of the taps, a real
trigonometric polynomial of degree :math:`m_d = (k_d-1)/2` in :math:`\omega_d`. If :math:`|p|` has its maximum at :math:`x`, then
:math:`|p(x+t)| \ge \|p\|_\infty \cos(m_d t)` for :math:`|t| \le \pi/(2m_d)` (M. Riesz), and a grid of :math:`N_d` points has
one within :math:`\pi/N_d` of :math:`x`. Axis by axis,

.. math::
    \sup_\omega \|\hat W(\omega)\|_2
    \le \prod_d \sec\frac{\pi m_d}{N_d} \; \max_{\omega \in \text{grid}} \|\hat W(\omega)\|_2 .
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from stableopt.linalg.bound import Bound
from stableopt.linalg.estimate import gram_norm
from stableopt.linalg.proved import Array, Matrix, as_matrix, gamma, gram_upper, scale_back, scale_to_unit

__all__ = ["conv_norm", "gram_conv_norm"]

_TWIDDLE_ERROR = 2.0**-46
"""How far a computed cosine or sine may be off, with u = 2**-53 and up to three axes: the turns, below 3, are off by at most
6 u, so the angle by 2 pi (6 u) + 2 u (6 pi) < 76 u; the library adds a few units in the last place. 128 u covers all."""


def conv_norm(weight: Matrix, *, groups: int = 1, oversampling: int = 8) -> Bound:
    r"""Bound the operator norm of a convolution from above, for every image size, stride and dilation.

    Args:
        weight: kernel of shape ``(out_channels, in_channels / groups, *kernel)`` with one to three kernel axes.
        groups: number of groups; must divide the output channels.
        oversampling: grid points per tap, at least 2; the bound exceeds the supremum of the symbol by at most the factor
            :math:`\sec(\pi/2\,\cdot\,1/\text{oversampling})` per axis (1.0195 for 8).

    Returns:
        ``Bound(0, upper)``, proved, all rounding counted. It holds for zero padding of any width, and for circular padding of
        total width at most ``dilation * (kernel - 1)`` per axis. The lower end is 0 because the norm itself depends on the image
        size, which is not given.

    Raises:
        TypeError: if ``weight`` is not a real floating tensor or array.
        ValueError: if the shape, the groups or the oversampling do not fit, or an entry is not finite.

    References:
        Zygmund, *Trigonometric Series*, 2002, chapter X (the inequality of M. Riesz); Sedghi, Gupta and Long, *The Singular
        Values of Convolutional Layers*, 2019 (the symbol).

    Examples:
        >>> kernel = torch.tensor([[[0.5, 0.5]]])  # a moving average: its symbol is largest at frequency 0
        >>> 1.0 <= conv_norm(kernel).upper < 1.02
        True
    """
    ndim = weight.ndim
    if not 3 <= ndim <= 5:
        raise ValueError(f"a convolution kernel has 3 to 5 dimensions (out, in, *kernel), got {ndim}.")
    w = as_matrix(weight, ndim=ndim)
    _check_groups(w.shape[0], groups)
    if not isinstance(oversampling, int) or oversampling < 2:
        raise ValueError(f"oversampling must be an integer >= 2, got {oversampling!r}.")
    if w.size == 0 or not w.any():
        return Bound.point(0.0)
    w, exponent = scale_to_unit(w)
    kernel = w.shape[2:]
    grid = tuple(1 if k == 1 else oversampling * k for k in kernel)
    taps = math.prod(kernel)
    parts = w.reshape(groups, w.shape[0] // groups, w.shape[1], taps)
    largest = max(gram_upper(symbols) for part in parts for symbols in _symbols(part, kernel, grid))
    # entrywise, the symbol is off by (gamma_taps + twiddle error) times the sum of |taps|, in both real and imaginary part
    sums = np.sqrt((np.abs(parts).sum(axis=-1) ** 2).sum(axis=(1, 2)).max())
    rounding = 2.0 * (gamma(taps) + _TWIDDLE_ERROR) * float(sums) * (1 + gamma(w.size + 8))
    bound = (Bound.point(largest) + rounding) * _riesz_factor(kernel, grid)
    return Bound(0.0, scale_back(bound, exponent).upper)


def gram_conv_norm(weight: Tensor, *, groups: int = 1, steps: int = 6, oversampling: int = 4) -> Tensor:
    r"""Bound the operator norm of a convolution from above, differentiably and cheaply, for training.

    The grid bound of :func:`conv_norm` with Gram iteration at each frequency, in exact arithmetic an upper bound.

    Args:
        weight: kernel of shape ``(out_channels, in_channels / groups, *kernel)``.
        groups: number of groups.
        steps: Gram steps, see :func:`stableopt.linalg.gram_norm`.
        oversampling: grid points per tap; 4 costs at most 8 % per axis.

    Returns:
        A 0-d tensor in the dtype of ``weight`` (half precision is computed in float32).

    Raises:
        ValueError: if the shape or the groups do not fit.

    Note:
        Not proved: rounding is not counted. A certificate uses :func:`conv_norm`.

    Examples:
        >>> kernel = torch.tensor([[[0.5, 0.5]]], requires_grad=True)
        >>> norm = gram_conv_norm(kernel)
        >>> norm.backward()
        >>> bool(1.0 <= norm < 1.1), kernel.grad.shape
        (True, torch.Size([1, 1, 2]))
    """
    if not 3 <= weight.ndim <= 5:
        raise ValueError(f"a convolution kernel has 3 to 5 dimensions (out, in, *kernel), got {weight.ndim}.")
    _check_groups(weight.shape[0], groups)
    w = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    kernel = tuple(w.shape[2:])
    grid = tuple(1 if k == 1 else oversampling * k for k in kernel)
    symbol = torch.fft.rfftn(w, s=grid, dim=tuple(range(2, w.ndim)))  # (out, in/g, N_1, …, N_d/2+1)
    symbol = symbol.flatten(2).permute(2, 0, 1)  # (frequencies, out, in/g)
    symbol = symbol.unflatten(1, (groups, -1))  # (frequencies, groups, out/g, in/g)
    return (gram_norm(symbol, steps=steps).amax() * _riesz_factor(kernel, grid).upper).to(weight.dtype)


def _symbols(part: Array, kernel: tuple[int, ...], grid: tuple[int, ...]) -> Iterator[Array]:
    r"""Yield the symbol of one group on the grid, each complex matrix as the real one :math:`[[Re, -Im], [Im, Re]]`.

    The kernel is real, so the symbol at :math:`-\omega` is the conjugate and has the same norm: half the first axis suffices.
    The frequencies come in batches of at most 128 MiB.
    """
    axes = [np.arange(grid[0] // 2 + 1), *(np.arange(n) for n in grid[1:])]
    frequencies = np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")])  # (d, F)
    taps = np.stack([a.ravel() for a in np.meshgrid(*(np.arange(k) for k in kernel), indexing="ij")])  # (d, taps)
    turns = sum((np.outer(f, t) % n) / n for f, t, n in zip(frequencies, taps, grid, strict=True))
    angle = 2.0 * math.pi * np.asarray(turns)  # (F, taps)
    for batch in np.array_split(angle, math.ceil(len(angle) * 4 * part[..., 0].size / 2**24)):
        real = np.einsum("oit,ft->foi", part, np.cos(batch))
        imag = np.einsum("oit,ft->foi", part, np.sin(batch))
        yield np.concatenate([np.concatenate([real, -imag], axis=2), np.concatenate([imag, real], axis=2)], axis=1)


def _riesz_factor(kernel: tuple[int, ...], grid: tuple[int, ...]) -> Bound:
    r"""Enclose :math:`\prod_d \sec(\pi (k_d - 1) / (2 N_d))` (the cosine lies in [0.7, 1], its value is off by a few units)."""
    factor = Bound.point(1.0)
    for k, n in zip(kernel, grid, strict=True):
        if k > 1:
            cosine = math.cos(math.pi * (k - 1) / (2 * n))
            factor = factor / Bound(cosine - 2.0**-50, cosine + 2.0**-50)
    return factor


def _check_groups(out_channels: int, groups: int) -> None:
    if not isinstance(groups, int) or groups < 1 or out_channels % groups:
        raise ValueError(f"groups must be a positive divisor of the {out_channels} output channels, got {groups!r}.")
