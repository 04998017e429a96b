r"""Upper bounds of the operator norm of a convolution: proved, for every option that the layers of torch have.

:mod:`stableopt.linalg.conv_geometry` reduces a layer to a kernel with stride 1 on the whole grid or on a torus, where the norm is
the largest norm of its symbol :math:`\hat W(\omega) = \sum_j W_j e^{i\omega\cdot j}`. On a torus that is a maximum over finitely
many frequencies. Over all frequencies the supremum is bounded from its values on a finite grid (the *Riesz grid bound*): for unit
vectors :math:`a, b` and a phase :math:`\varphi`, :math:`p(\omega) = \mathrm{Re}(e^{i\varphi} a^* \hat W(\omega) b)` is, up to a
shift of the taps, a real trigonometric polynomial of degree :math:`m_d = (K_d-1)/2` in :math:`\omega_d`. If :math:`|p|` has its
maximum at :math:`x`, then :math:`|p(x+t)| \ge \|p\|_\infty \cos(m_d t)` for :math:`|t| \le \pi/(2m_d)` (M. Riesz), and a grid of
:math:`N_d` points has one within :math:`\pi/N_d` of :math:`x`. Axis by axis,

.. math::
    \sup_\omega \|\hat W(\omega)\|_2
    \le \prod_d \sec\frac{\pi m_d}{N_d} \; \max_{\omega \in \text{grid}} \|\hat W(\omega)\|_2 .

For kernels that are nearly orthogonal the factor is most of the loss; there :mod:`stableopt.linalg.conv_correlation` is better.
For kernels of one sign it is as well, and there :math:`\|\hat W(\omega)\|_2 \le \bigl\|\sum_j |W_j|\bigr\|_2`, the *modulus bound*,
is the value at the frequency 0. It is never above the bounds that make use of absolute values alone,

.. math::
    \Bigl\|\sum_j |W_j|\Bigr\|_2 \le \sqrt{\|T\|_1 \|T\|_\infty}, \qquad
    \Bigl\|\sum_j |W_j|\Bigr\|_2 \le \sum_j \|W_j\|_F ,

the first of which is Schur's test of the operator :math:`T` of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stableopt.linalg.bound import Bound, upper
from stableopt.linalg.conv_correlation import correlation_upper
from stableopt.linalg.conv_geometry import Axis, Reduced, conv_axes, reductions
from stableopt.linalg.conv_symbol import (
    as_kernel,
    coarse_points,
    fold,
    riesz_factor,
    symbol_exceeds,
    symbol_peak,
    symbol_reach,
    symbol_upper,
)
from stableopt.linalg.proved import Array, Matrix, gamma, gram_upper, scale_back, scale_to_unit

__all__ = ["conv_norm", "conv_symbol_norm"]

_NO_LOSS = 2.0**-16
"""Relative loss of the self-correlation bound, in the square, below which no grid is looked at."""
_WORTHWHILE = 0.25
"""The same, above which the grid of the symbol is as good: its factor is 1.0173 for 3 x 3 taps."""
_UNREDUCED = (Reduced(1, None, 1),) * 3


def conv_norm(
    weight: Matrix,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding: int | str | Sequence[int] = 0,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    image_size: int | Sequence[int] | None = None,
    oversampling: int = 8,
) -> Bound:
    r"""Bound the operator norm of a convolution from above, proved for the stored numbers.

    .. math:: \sup_{x \ne 0} \frac{\|\text{layer}(x) - \text{layer}(0)\|_2}{\|x\|_2} \le \text{upper}

    Args:
        weight: kernel as the layer stores it, with one to three kernel axes: ``(out, in / groups, *kernel)``, or
            ``(in, out / groups, *kernel)`` for a transposed convolution.
        stride: as in the layer, one number or one per axis. Left at 1, the bound holds for every stride, but a strided layer
            has fewer outputs and a smaller norm.
        dilation: as in the layer. It changes the norm only together with a stride or a padding that repeats pixels.
        groups: number of groups; must divide the first axis of the kernel.
        padding: as in the layer, numbers or ``"same"`` or ``"valid"``. Zero padding of any width is covered by any value.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``. The last three repeat pixels, which costs
            the root of their number where the padding is not the continuation of a period.
        transposed: True for a transposed convolution. Its bound is that of the convolution whose adjoint it is.
        output_padding: as in the layer; it shows more outputs of the adjoint and never exceeds the bound.
        image_size: pixels of the input per axis, if they are fixed; the bound is then that of a torus where this is
            tighter and costs at most twice as many frequencies per axis. None for a bound that holds for every size.
        oversampling: grid points per tap of the reduced kernel, at least 2; the bound exceeds the supremum of the symbol by at
            most the factor :math:`\sec(\pi/2\,\cdot\,1/\text{oversampling})` per axis (1.0196 for 8, and 1.0087 for 3 taps).
            A kernel that is nearly orthogonal, or of one sign, needs no grid: its bound exceeds the norm by little more than its
            rounding.

    Returns:
        ``Bound(0, upper)``, proved, all rounding counted. Called without any option, it holds for zero padding, any stride
        and dilation, and for circular padding of total width at most ``dilation * (kernel - 1)`` per axis. The lower end is 0
        because the norm itself depends on the image. For stride 1, zero or circular padding within the reach of the kernel, and
        large images the norm comes as near to the supremum of the symbol as one likes.

    Raises:
        TypeError: if ``weight`` is not a real floating tensor or array.
        ValueError: if the shape, an option or the oversampling does not fit, or an entry is not finite; the message says which
            options have no bound.

    Note:
        An ``image_size`` speaks of the input of the layer that is described, including its ``padding``.

    References:
        Zygmund, *Trigonometric Series*, 2002, chapter X (the inequality of M. Riesz); Sedghi, Gupta and Long, *The Singular
        Values of Convolutional Layers*, 2019 (the symbol).

    Examples:
        >>> import torch
        >>> kernel = torch.tensor([[[0.5, 0.5]]])  # a moving average: its symbol is largest at frequency 0
        >>> 1.0 <= conv_norm(kernel).upper < 1.02
        True
        >>> 0.7 < conv_norm(kernel, stride=2).upper < 0.71  # the windows do not overlap: 1 / sqrt(2)
        True
        >>> 1.0 <= conv_norm(kernel, padding="same", padding_mode="circular", image_size=8).upper < 1.0 + 1e-12
        True
    """
    w = as_kernel(weight, groups)
    if not isinstance(oversampling, int) or oversampling < 2:
        raise ValueError(f"oversampling must be an integer >= 2, got {oversampling!r}.")
    axes = conv_axes(
        w.shape[2:],
        stride=stride,
        dilation=dilation,
        padding=padding,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
        image_size=image_size,
    )
    if w.size == 0 or not w.any():
        return Bound.point(0.0)
    w, exponent = scale_to_unit(w)
    best = _least_bound(w, groups, axes, oversampling)
    if any(axis.stride > 1 for axis in axes) and best.upper > symbol_reach(fold(w, groups, _UNREDUCED[: len(axes)])):
        # the grids differ, so that for a kernel which its stride does not make smaller, either one may meet the maximum better
        dense = [replace(axis, stride=1, size=None if axis.transposed else axis.size) for axis in axes]
        best = min(best, _least_bound(w, groups, dense, oversampling), key=upper)
    return Bound(0.0, scale_back(best, exponent).upper)


def conv_symbol_norm(weight: Matrix, *, groups: int = 1, oversampling: int = 8) -> Bound:
    r"""Bound the norm of a convolution, whatever its stride, dilation and zero padding, by the Riesz grid bound alone.

    .. math:: \sup_\omega \|\hat W(\omega)\|_2

    It uses nothing but the numbers of the kernel and one grid, so that a certificate can be checked by a short program;
    :func:`conv_norm` is tighter where the stride or the padding is known, and for kernels that are nearly orthogonal.

    Args:
        weight: kernel of shape ``(out, in / groups, *kernel)``.
        groups: number of groups; must divide the first axis of the kernel.
        oversampling: grid points per tap, at least 2.

    Returns:
        ``Bound(0, upper)``, proved, all rounding counted. It holds for circular padding of total width at most
        ``dilation * (kernel - 1)`` per axis as well.

    Raises:
        TypeError: as :func:`conv_norm`.
        ValueError: as :func:`conv_norm`.

    References:
        Zygmund, *Trigonometric Series*, 2002, chapter X.

    Examples:
        >>> import torch
        >>> bool(2.0 <= conv_symbol_norm(torch.tensor([[[1.0, -1.0]]])).upper < 2.04)
        True
    """
    w = as_kernel(weight, groups)
    if not isinstance(oversampling, int) or oversampling < 2:
        raise ValueError(f"oversampling must be an integer >= 2, got {oversampling!r}.")
    if w.size == 0 or not w.any():
        return Bound.point(0.0)
    w, exponent = scale_to_unit(w)
    grid = [1 if k == 1 else oversampling * k for k in w.shape[2:]]
    kernel = fold(w, groups, _UNREDUCED[: w.ndim - 2])
    best = Bound.point(symbol_upper(kernel, grid)) * riesz_factor(w.shape[2:], grid)
    return Bound(0.0, scale_back(best, exponent).upper)


def _least_bound(w: Array, groups: int, axes: Sequence[Axis], oversampling: int) -> Bound:
    return min((_bound(w, groups, option, oversampling) for option in reductions(axes)), key=upper)


def _bound(w: Array, groups: int, axes: Sequence[Reduced], oversampling: int) -> Bound:
    """Bound the layer by one reduction of its axes."""
    taps = [axis.taps(k) for axis, k in zip(axes, w.shape[2:], strict=True)]
    grid = [1 if k == 1 else oversampling * k for k in taps]
    exact = [axis.torus is not None and axis.torus <= 2 * n for axis, n in zip(axes, grid, strict=True)]
    points = [axis.torus if e and n > 1 and axis.torus else n for axis, e, n in zip(axes, exact, grid, strict=True)]
    kernel, copies = fold(w, groups, axes), Bound.point(math.prod(axis.copies for axis in axes)).sqrt()
    best, loss = correlation_upper(kernel, worthwhile=_WORTHWHILE)
    if loss >= _NO_LOSS:
        factor = riesz_factor(taps, [None if e else n for e, n in zip(exact, grid, strict=True)])
        high, peak = symbol_peak(kernel, points)
        best = min(best, (Bound.point(high) * factor).upper)
        if not any(exact):
            best = min(best, _coarse_upper(kernel, taps, best, peak))
    return Bound.point(min(best, _modulus_upper(kernel, best))) * copies


def _coarse_upper(kernel: Array, taps: Sequence[int], best: float, peak: Sequence[float]) -> float:
    """Bound the symbol on the grid of :func:`stableopt.linalg.gram_conv_norm` if that is better, so that it is never below."""
    points = coarse_points(taps)
    factor = riesz_factor(taps, points)
    if symbol_exceeds(kernel, points, best / factor.lower, peak):
        return math.inf
    return (Bound.point(symbol_upper(kernel, points)) * factor).upper


def _modulus_upper(kernel: Array, best: float) -> float:
    r"""Bound :math:`\bigl\|\sum_j |W_j|\bigr\|_2`, the largest over the groups, from above; infinity if that is not better."""
    moduli = np.abs(kernel).reshape(*kernel.shape[:3], -1)
    matrices = moduli.sum(axis=-1)
    reach = np.sqrt((matrices.sum(axis=-1) ** 2).sum(axis=-1).max() / matrices.shape[-1])  # at a vector of ones
    if reach > best:
        return math.inf
    return (Bound.point(gram_upper(matrices)) * (1.0 + gamma(moduli.shape[-1]))).upper
