r"""A proved norm of a convolution from its self-correlation, tight where the kernel is nearly orthogonal.

A kernel that :mod:`stableopt.linalg.conv_geometry` has reduced to stride 1, with taps :math:`W_j`, is an operator :math:`T` on
images over the whole grid. Two steps bound :math:`\|T\|`.

**Gram.** :math:`TT^*` is the convolution with the self-correlation :math:`S_\ell = \sum_j W_{j+\ell} W_j^\top`, and
:math:`\|T\|^2 = \|TT^*\| = \|T^*T\|`; the smaller of the two matrices is taken.

**Norm of the self-correlation.** The better of

.. math::
    \|T\|^2 \le \lambda_{\max}(S_0) + \sum_{\ell \ne 0} \|S_\ell\|_2, \qquad
    \|T\|^2 \le t + \prod_i \sec\frac{\pi m_i}{N_i} \max_{\omega \in \text{grid}} \|\hat S(\omega) - tI\|_2 ,

the triangle inequality, and the grid bound of M. Riesz for the *deviation* from a multiple of the identity: for every unit vector
:math:`u` the function :math:`u^*(\hat S(\omega) - tI)u` is a trigonometric polynomial of degree :math:`m_i = K_i - 1` in
:math:`\omega_i`. For an orthogonal kernel :math:`\hat S = I`, so what either bound loses is only a fraction of the rounding of the
stored numbers.

Since :math:`S_0` is the mean of :math:`\hat S` over all frequencies, :math:`\lambda_{\max}(S_0) \le \|T\|^2`: what the triangle
inequality adds to it is all that it can lose, and that tells before any grid is looked at whether this view is worth its time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from stableopt.linalg.bound import Bound
from stableopt.linalg.conv_geometry import Reduced, conv_axes, reductions
from stableopt.linalg.conv_symbol import as_kernel, fold
from stableopt.linalg.proved import (
    Array,
    Matrix,
    gamma,
    largest_eigenvalues_upper,
    scale_back,
    scale_to_unit,
)

__all__ = ["conv_gram_bound", "correlation_upper", "polyphase_axis"]

_TINY = 2.0**-1074
_U = 2.0**-53
_TWIDDLE_ERROR = 2.0**-46
"""How far a computed cosine or sine may be off: the turns, below 3, are off by at most 6 u, so the angle by 2 pi (6 u) + 2 u (6 pi)
< 76 u with u = 2**-53; the library adds a few units in the last place. 128 u covers all."""
_EXACT_ENOUGH = 2.0**-30
"""Relative loss of the triangle inequality below which the grid is not worth its time."""
_MULTIPLICATIONS = 2.0**33
"""Multiplications that Gram squarings on the grid may take; where that is too few for one, the Frobenius norm serves."""
_BATCH = 2**22
"""Numbers per batch of frequencies."""


def conv_gram_bound(
    weight: Matrix, *, stride: int | Sequence[int] = 1, dilation: int | Sequence[int] = 1, groups: int = 1
) -> Bound:
    r"""Bound the operator norm of a convolution from above by its self-correlation alone, for every image size.

    :func:`stableopt.linalg.conv_norm` uses this bound where it is the better one.

    Args:
        weight: kernel of shape ``(out_channels, in_channels / groups, *kernel)``, or for a transposed convolution, the adjoint with
            the same norm, ``(in_channels, out_channels / groups, *kernel)``; one to three kernel axes.
        stride: stride, one number or one per axis.
        dilation: dilation, one number or one per axis.
        groups: number of groups; must divide the first dimension.

    Returns:
        ``Bound(0, upper)``, proved, all rounding counted. It holds for zero padding of any width; for circular padding of total
        width at most ``dilation * (kernel - 1)`` it holds if the stride divides the size of the image, per axis. For an
        orthogonal kernel of 64 channels, 3 x 3, it exceeds 1 by about 5e-11 in float64, 6e-8 in float32, 4e-3 in bfloat16.

    Raises:
        TypeError: if ``weight`` is not a real floating tensor or array.
        ValueError: if the shape, the groups, the stride or the dilation do not fit, or an entry is not finite.

    References:
        Vaidyanathan, *Multirate Systems and Filter Banks*, 1993, chapters 4 and 6 (polyphase matrices, paraunitary filters);
        Zygmund, *Trigonometric Series*, 2002, chapter X (the inequality of M. Riesz).

    Examples:
        >>> import torch
        >>> shift = torch.tensor([[[0.0, 0.0, 1.0]]])
        >>> conv_gram_bound(shift).upper - 1.0 < 1e-14
        True
        >>> pair = torch.tensor([[[0.6, 0.8]]])  # its taps never read the same pixel when the stride is 2
        >>> conv_gram_bound(pair, stride=2).upper < 1.0001, conv_gram_bound(pair).upper > 1.39
        (True, True)
    """
    w = as_kernel(weight, groups)
    axes = reductions(conv_axes(w.shape[2:], stride=stride, dilation=dilation))[0]
    if w.size == 0 or not w.any():
        return Bound.point(0.0)
    w, exponent = scale_to_unit(w)
    return Bound(0.0, scale_back(Bound.point(correlation_upper(fold(w, groups, axes))[0]), exponent).upper)


def correlation_upper(kernel: Array, worthwhile: float = math.inf) -> tuple[float, float]:
    r"""Bound the norm of a convolution with stride 1 over all frequencies and groups from above, proved.

    Args:
        kernel: shape ``(groups, out, channels, *taps)``, entries of size at most 1 and one of them about 1.
        worthwhile: the largest loss of the triangle inequality, relative to the square, with which the bound is of use.

    Returns:
        The bound and what the triangle inequality loses in the square at most, both infinite as soon as the loss is known to exceed
        what is worthwhile.

    Examples:
        >>> correlation_upper(np.eye(2)[None, :, :, None])[0] < 1.0 + 1e-14
        True
        >>> correlation_upper(np.ones((1, 1, 1, 3)), worthwhile=0.1)
        (inf, inf)
    """
    parts = kernel.swapaxes(1, 2) if kernel.shape[1] > kernel.shape[2] else kernel
    parts = np.ascontiguousarray(parts)
    center = _correlation(parts, (0,) * (parts.ndim - 3))
    upper = np.triu(center)
    center = upper + np.triu(center, 1).swapaxes(-1, -2)
    guess = float(np.linalg.eigvalsh(center)[:, -1].max())
    lags = _half_of_the_lags(parts.shape[3:])
    others, least = [], 0.0
    for lag in lags:
        others.append(_correlation(parts, lag))
        least += 2.0 * float(np.sqrt((others[-1] ** 2).sum(axis=(-2, -1)) / center.shape[-1]).min())
        if least > 1.01 * worthwhile * guess:  # of every group, a Frobenius norm is at most sqrt(n) times the norm
            return math.inf, math.inf
    square, loss = _square_upper(parts, center, guess, others, lags, worthwhile)
    return Bound(0.0, square).sqrt().upper, loss


def polyphase_axis(kernel: int, stride: int, dilation: int) -> tuple[int, int, int]:
    r"""Return how one axis of a strided, dilated kernel becomes an axis without stride.

    Args:
        kernel: taps :math:`k`.
        stride: :math:`s`.
        dilation: :math:`d`.

    Returns:
        The number of phases :math:`\min(k, \sigma)` with :math:`\sigma = s/\gcd(d, s)`, the number of taps
        :math:`\lceil k/\sigma\rceil`, and how many of the phases use the last tap.

    Examples:
        >>> polyphase_axis(3, 2, 1), polyphase_axis(3, 2, 2), polyphase_axis(4, 4, 2)
        ((2, 2, 1), (1, 3, 1), (2, 2, 2))
    """
    phases = min(kernel, stride // math.gcd(stride, dilation))
    taps = Reduced(phases, None, 1).taps(kernel)
    return phases, taps, kernel - phases * (taps - 1)


def _square_upper(
    parts: Array, center: Array, guess: float, others: list[Array], lags: list[tuple[int, ...]], worthwhile: float
) -> tuple[float, float]:
    """Bound the squared norm of the convolutions without stride from above, the largest over the groups, and the loss."""
    kernel, terms = parts.shape[3:], parts[0, 0].size
    square = float((parts * parts).sum(axis=tuple(range(1, parts.ndim))).max()) * (1.0 + gamma(parts[0].size + 4))
    # what rounding does to one lag, in the Frobenius norm, times the number of lags
    rounding = Bound.point(gamma(terms)) * square + 4.0 * parts.shape[1] * terms * _TINY
    rounding = rounding * (1 + 2 * len(lags))
    triangle = Bound.point(largest_eigenvalues_upper(center, guess=guess))
    if not others:
        return (triangle + rounding).upper, 0.0
    norms = np.stack([_norms_upper(other, squarings=2) for other in others])  # (lags, groups)
    triangle = triangle + float(norms.sum(axis=0).max()) * (1.0 + gamma(len(lags) + 2)) * 2.0
    loss = triangle.upper / guess - 1.0
    if loss > worthwhile:
        return math.inf, math.inf
    bound = (triangle + rounding).upper
    if loss > _EXACT_ENOUGH:
        bound = min(bound, (_grid_upper(center, np.stack(others), lags, kernel) + rounding).upper)
    return bound, loss


def _half_of_the_lags(kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the lags that are lexicographically positive; the others are their negatives."""
    every = itertools.product(*(range(1 - k, k) for k in kernel))
    return [lag for lag in every if lag > (0,) * len(kernel)]


def _correlation(parts: Array, lag: tuple[int, ...]) -> Array:
    r"""Return the computed :math:`S_\ell = \sum_\tau W_{\tau+\ell}W_\tau^\top` of every group."""
    later = tuple(slice(max(n, 0), k + min(n, 0)) for n, k in zip(lag, parts.shape[3:], strict=True))
    earlier = tuple(slice(max(-n, 0), k + min(-n, 0)) for n, k in zip(lag, parts.shape[3:], strict=True))
    a, b = (parts[(slice(None),) * 3 + cut].reshape(*parts.shape[:2], -1) for cut in (later, earlier))
    return a @ b.swapaxes(-1, -2)


def _norms_upper(A: Array, squarings: int) -> Array:
    r"""Bound the spectral norm of each matrix of a batch from above by Gram squarings, all rounding counted.

    :math:`\|A\|_2^2 = \|A^\top A\|_2 \le \|\mathrm{fl}(A^\top A)\|_2 + \gamma_n \|A\|_F^2 +` underflow, again and again, and the
    Frobenius norm at the end, which exceeds the norm by the factor :math:`n^{2^{-t-1}}` at most after :math:`t` squarings.
    """
    m, n = A.shape[-2:]
    size = np.abs(A).max(axis=(-2, -1), keepdims=True)
    exponent = np.frexp(np.where(size > 0.0, size, 1.0))[1]
    scaled = np.ldexp(A, -exponent)  # entries below 1; what becomes subnormal is covered by the underflow terms
    frobenius = np.sqrt((scaled * scaled).sum(axis=(-2, -1))) * (1.0 + gamma(m * n + 8)) + 4.0 * m * n * _TINY
    if squarings == 0:
        bound = frobenius
    else:
        gram = scaled.swapaxes(-1, -2) @ scaled
        error = gamma(m) * frobenius * frobenius * (1.0 + 8.0 * _U) + 4.0 * m * n * _TINY
        bound = np.sqrt(_norms_upper(gram, squarings - 1) + error) * (1.0 + 8.0 * _U)
    bound = np.ldexp(bound * (1.0 + 4.0 * _U), exponent[..., 0, 0]) + _TINY
    return np.where(size[..., 0, 0] > 0.0, bound, 0.0)


def _grid_upper(center: Array, others: Array, lags: list[tuple[int, ...]], kernel: tuple[int, ...]) -> Bound:
    r"""Bound :math:`t + \sec(\dots)\max_\omega \|\hat S(\omega) - tI\|_2` for the computed self-correlation."""
    rows = center.shape[-1]
    t = float(np.diagonal(center, axis1=-2, axis2=-1).mean())
    deviation = center.copy()
    index = np.arange(rows)
    deviation[:, index, index] -= t
    grid = tuple(1 if k == 1 else 8 * (k - 1) for k in kernel)
    frequencies = (grid[0] // 2 + 1) * math.prod(grid[1:])
    squarings = min(6, int(_MULTIPLICATIONS / (float(frequencies) * len(center) * (2 * rows) ** 3)))
    largest = max(float(_symbol_norms(*s, squarings).max()) for s in _symbols(deviation, others, lags, grid))
    # per entry the symbol is off by at most (gamma + twiddle error) * sum of the moduli of what was added, in both of its parts
    frobenius = [np.sqrt((part * part).sum(axis=(-2, -1))) for part in (deviation, *others)]
    sums = float((frobenius[0] + 2.0 * sum(frobenius[1:])).max()) * (1.0 + gamma(rows * rows + len(lags) + 16))
    slip = Bound.point(2.0 * (gamma(len(lags) + 6) + _TWIDDLE_ERROR)) * sums + 16.0 * rows * rows * len(lags) * _TINY
    diagonal = Bound.point(_U) * float(np.abs(np.diagonal(deviation, axis1=-2, axis2=-1)).max())
    return (Bound.point(largest) + slip) * _riesz_factor(kernel, grid) + diagonal * 2.0 + t


def _symbols(
    center: Array, others: Array, lags: list[tuple[int, ...]], grid: tuple[int, ...]
) -> Iterator[tuple[Array, Array]]:
    r"""Yield real and imaginary part of the Hermitian symbol on half of the grid, in batches of frequencies.

    :math:`\hat S(\omega) = S_0 + \sum_{\ell > 0} (S_\ell + S_\ell^\top)\cos(\omega\cdot\ell)
    + i \sum_{\ell > 0} (S_\ell - S_\ell^\top)\sin(\omega\cdot\ell)`; the symbol at :math:`-\omega` is its conjugate.
    """
    axes = [np.arange(grid[0] // 2 + 1), *(np.arange(n) for n in grid[1:])]
    frequencies = np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")])  # (D, F)
    even = (others + others.swapaxes(-1, -2)).reshape(len(lags), -1)
    odd = (others - others.swapaxes(-1, -2)).reshape(len(lags), -1)
    count, entries = frequencies.shape[1], max(center.size, len(lags))
    for batch in np.array_split(frequencies, min(count, math.ceil(count * entries / _BATCH)), axis=1):
        turns = sum((np.outer(f, lag) % n) / n for f, lag, n in zip(batch, np.array(lags).T, grid, strict=True))
        angle = 2.0 * math.pi * np.asarray(turns)  # (frequencies of the batch, lags)
        shape = (batch.shape[1], *center.shape)
        yield center + (np.cos(angle) @ even).reshape(shape), (np.sin(angle) @ odd).reshape(shape)


def _symbol_norms(real: Array, imag: Array, squarings: int) -> Array:
    if squarings == 0:
        # the Frobenius norm of the complex matrix, not of its embedding, which is larger by the root of 2
        return _norms_upper(np.concatenate([real, imag], axis=-1), 0)
    top, bottom = np.concatenate([real, -imag], axis=-1), np.concatenate([imag, real], axis=-1)
    return _norms_upper(np.concatenate([top, bottom], axis=-2), squarings)


def _riesz_factor(kernel: tuple[int, ...], grid: tuple[int, ...]) -> Bound:
    r"""Enclose :math:`\prod_i \sec(\pi (k_i - 1) / N_i)` (the cosines lie in [0.9, 1], their values are off by a few units)."""
    factor = Bound.point(1.0)
    for k, n in zip(kernel, grid, strict=True):
        if k > 1:
            cosine = math.cos(math.pi * (k - 1) / n)
            factor = factor / Bound(cosine - 2.0**-50, cosine + 2.0**-50)
    return factor
