r"""The symbol of a convolution on a grid of frequencies, and the proof that its norm stays below a number.

A kernel that :mod:`stableopt.linalg.conv_geometry` has reduced to stride 1 acts on images over the whole grid :math:`\mathbb Z^d`
as the multiplication by its symbol :math:`\hat W(\omega) = \sum_j W_j e^{i\omega\cdot j}`, and on a torus by the values at the
frequencies of the torus. The kernel is real, so the symbol at :math:`-\omega` is the conjugate and has the same norm.

The proof for one frequency is that of :mod:`stableopt.linalg.below` for complex matrices. With :math:`A` of shape
:math:`m \times n`, :math:`n \le m`, :math:`u = 2^{-53}`:

* real and imaginary part of the Gram matrix :math:`G = A^* A` are computed by real products of :math:`2m` terms, so each entry is
  off by at most :math:`\sqrt2 \gamma_{2m} (|A|^\top |A|)_{ij}` and :math:`\|E\|_2 \le \sqrt2 \gamma_{2m} \|A\|_F^2`;
* the Cholesky factorization of :math:`M = tI - \hat G` uses, per real and imaginary part of an entry, a sum of at most :math:`2n`
  products and a few operations more: if it runs to its end, :math:`\hat R^* \hat R = M + \Delta`,
  :math:`|\Delta| \le \sqrt2 \gamma_{2n+32} |\hat R|^\top |\hat R|`. Then with :math:`c = \sqrt2 \gamma_{2n+32}`,
  :math:`\|\hat R\|_F^2 \le \operatorname{tr} M / (1 - c)` and :math:`M \succeq -c/(1-c) \operatorname{tr}(M) I`;
* the diagonal of :math:`M` is rounded once.

The factorization reads one triangle, so the matrix of the proof is the Hermitian one with that triangle; the bounds are entrywise
and hold for it too. The number :math:`t` is the largest eigenvalue met so far: most frequencies are proved by factorizations
alone, and eigenvalues are computed only where one fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from stableopt.linalg.bound import Bound
from stableopt.linalg.conv_geometry import Reduced, check_kernel
from stableopt.linalg.proved import Array, Matrix, as_matrix, gamma

__all__ = [
    "as_kernel",
    "coarse_points",
    "fold",
    "half_grid",
    "riesz_factor",
    "symbol_exceeds",
    "symbol_peak",
    "symbol_reach",
    "symbol_slack",
    "symbol_upper",
]

_U = 2.0**-53
_TINY = 2.0**-1074
_TWIDDLE_ERROR = 2.0**-46
"""How far a computed cosine or sine may be off, with u = 2**-53 and up to three axes: the turns, below 3, are off by at most
6 u, so the angle by 2 pi (6 u) + 2 u (6 pi) < 76 u; the library adds a few units in the last place. 128 u covers all."""
_BATCH_ENTRIES = 2**17
"""Complex entries of the symbol that are treated together: a few MB, so that a batch stays in the cache."""
_FLOOR = 2.0**-300
"""A Gram matrix of a kernel of size 1 that is smaller counts as that large: its factorization must not underflow."""
_COARSE_FACTOR = 1.04
"""The Riesz factor that :func:`coarse_points` looks for."""
_POWER_STEPS = 3


def as_kernel(weight: Matrix, groups: int) -> Array:
    """Return the exact float64 copy of a convolution kernel on the CPU, or refuse it.

    Args:
        weight: a real floating tensor or array.
        groups: number of groups.

    Raises:
        TypeError: if it is not real and floating.
        ValueError: if it is no kernel with these groups, or an entry is not finite.

    Examples:
        >>> as_kernel(torch.ones(1, 1, 2), 1)
        array([[[1., 1.]]])
    """
    if not isinstance(weight, torch.Tensor | np.ndarray):
        raise TypeError(f"a norm needs a real floating tensor or array, got {type(weight).__name__}.")
    check_kernel(weight.shape, groups)
    return as_matrix(weight, ndim=weight.ndim)


def fold(kernel: Array, groups: int, axes: Sequence[Reduced]) -> Array:
    r"""Rearrange a kernel for stride 1: tap :math:`t = s'j + b` becomes tap :math:`j` of the input channel :math:`(i, b)`.

    Args:
        kernel: shape ``(out, in / groups, *kernel)``.
        groups: number of groups.
        axes: the reduction of each axis.

    Returns:
        Shape ``(groups, out / groups, channels, *taps)``; phases that no tap has are left out.

    Examples:
        >>> fold(np.arange(3.0).reshape(1, 1, 3), 1, [Reduced(2, None, 1)])[0, 0]
        array([[0., 2.],
               [1., 0.]])
    """
    sizes = kernel.shape[2:]
    taps = [axis.taps(k) for axis, k in zip(axes, sizes, strict=True)]
    phases = [min(axis.stride, k) for axis, k in zip(axes, sizes, strict=True)]
    padded = np.zeros((*kernel.shape[:2], *(t * p for t, p in zip(taps, phases, strict=True))))
    padded[(slice(None), slice(None), *(slice(k) for k in sizes))] = kernel
    split = padded.reshape(*kernel.shape[:2], *(n for pair in zip(taps, phases, strict=True) for n in pair))
    dims = len(taps)
    order = (0, 1, *(3 + 2 * a for a in range(dims)), *(2 + 2 * a for a in range(dims)))
    return split.transpose(order).reshape(groups, kernel.shape[0] // groups, -1, *taps)


def half_grid(points: Sequence[int]) -> npt.NDArray[np.int64]:
    r"""Return one of each pair :math:`\pm\omega` of the grid of frequencies :math:`2\pi q/N`, as integers :math:`q`.

    Args:
        points: number :math:`N` of points per axis.

    Returns:
        Shape ``(frequencies, axes)``.

    Examples:
        >>> half_grid((4,)).tolist()
        [[0], [1], [2]]
    """
    q = np.stack([a.ravel() for a in np.meshgrid(*(np.arange(n) for n in points), indexing="ij")], axis=1)
    mirrored = np.ravel_multi_index(tuple(((-q) % np.array(points)).T), tuple(points))
    return q[np.arange(len(q)) <= mirrored]


def riesz_factor(taps: Sequence[int], points: Sequence[int | None]) -> Bound:
    r"""Enclose :math:`\prod_d \sec(\pi (K_d - 1) / (2 N_d))` over the axes with a grid; None marks an exact torus.

    Args:
        taps: taps :math:`K_d` of the reduced kernel per axis.
        points: number :math:`N_d \ge 2 K_d` of points per axis, or None. Then the cosine lies in [0.7, 1], its value is off by a
            few units in the last place.

    Examples:
        >>> riesz_factor((3,), (None,))
        Bound(lower=1.0, upper=1.0, proved=True)
    """
    factor = Bound.point(1.0)
    for k, n in zip(taps, points, strict=True):
        if k > 1 and n is not None:
            cosine = math.cos(math.pi * (k - 1) / (2 * n))
            factor = factor / Bound(cosine - 2.0**-50, min(1.0, cosine + 2.0**-50))
    return factor


def coarse_points(taps: Sequence[int]) -> tuple[int, ...]:
    r"""Return the points per axis of the coarsest grid with a Riesz factor of at most 1.04 in total: what training looks at.

    Args:
        taps: taps of the reduced kernel per axis.

    Examples:
        >>> coarse_points((3, 3)), coarse_points((3, 1))
        ((16, 16), (12, 1))
    """
    angle = 2 * math.acos(_COARSE_FACTOR ** (-1 / max(sum(k > 1 for k in taps), 1)))
    return tuple(1 if k == 1 else math.ceil(math.pi * (k - 1) / angle) for k in taps)


def symbol_upper(kernel: Array, points: Sequence[int]) -> float:
    r"""Bound :math:`\max_\omega \|\hat W(\omega)\|_2` over a grid and over the groups from above, proved.

    Args:
        kernel: shape ``(groups, out, channels, *taps)``, entries of size at most 1 and one of them about 1.
        points: points per axis.

    Examples:
        >>> 1.0 <= symbol_upper(np.full((1, 1, 1, 2), 0.5), (4,)) < 1.0 + 1e-12
        True
    """
    return symbol_peak(kernel, points)[0]


def symbol_peak(kernel: Array, points: Sequence[int]) -> tuple[float, tuple[float, ...]]:
    r"""Return the bound of :func:`symbol_upper`, and the frequency where about that is met, in turns.

    Examples:
        >>> symbol_peak(np.array([[[[0.5, -0.5]]]]), (4,))[1]
        (0.5,)
    """
    weights = _tall(kernel)
    long, short, count = weights.shape[1:]
    # entrywise, the symbol is off by (gamma_taps + twiddle error) times the sum of |taps|, in both real and imaginary part
    sums = np.sqrt((np.abs(weights).sum(axis=-1) ** 2).sum(axis=(1, 2)).max())
    rounding = 2.0 * (gamma(count) + _TWIDDLE_ERROR) * float(sums) * (1 + gamma(weights.size + 8))
    square, size, peak = 0.0, 0.0, np.zeros(len(points), dtype=np.int64)
    rows = np.ascontiguousarray(weights.reshape(-1, count).T)  # (taps, groups * long * short)
    for q in _batches(half_grid(points), rows.shape[1], count):
        symbols = _symbols(q, kernel.shape[3:], points, rows, (long, short))
        high, fresh, best = _prove(symbols, square)
        if high > square:
            square, peak = high, q[best // len(weights)]
        size = max(size, fresh)
    high = square + _allowance(long, short, square, size)
    largest = math.nextafter(math.sqrt(math.nextafter(high, math.inf)), math.inf)
    return (Bound.point(largest) + rounding).upper, tuple(int(n) / m for n, m in zip(peak, points, strict=True))


def symbol_exceeds(kernel: Array, points: Sequence[int], level: float, near: Sequence[float]) -> bool:
    r"""Return whether :math:`\|\hat W(\omega)\|_2` exceeds a level somewhere on a grid, up to rounding. Nothing is proved.

    Args:
        kernel: as for :func:`symbol_upper`.
        points: points per axis.
        level: the level.
        near: the frequency around which to look first, in turns.

    Examples:
        >>> symbol_exceeds(np.full((1, 1, 1, 2), 0.5), (4,), 0.9, (0.4,))
        True
    """
    weights = _tall(kernel)
    rows = np.ascontiguousarray(weights.reshape(-1, weights.shape[-1]).T)
    corners = [{math.floor(x * n) % n, math.ceil(x * n) % n} for x, n in zip(near, points, strict=True)]
    first = np.stack([a.ravel() for a in np.meshgrid(*map(sorted, corners), indexing="ij")], axis=1)
    for q in (first, *_batches(half_grid(points), rows.shape[1], rows.shape[0])):
        gram, diagonal, _ = _gram(_symbols(q, kernel.shape[3:], points, rows, weights.shape[1:3]))
        if _failures(gram, diagonal, level**2).any():
            return True
    return False


def symbol_slack(m: int, n: int, taps: int) -> float:
    r"""Return by how much :func:`symbol_upper` exceeds the largest norm of the symbol at most, relatively: rounding alone.

    Args:
        m: rows of the matrices of the symbol.
        n: columns.
        taps: taps in all.

    Note:
        With :math:`n \le m` it is half of :math:`8n(2n + 2m + 48)u` and of what :func:`_allowance` adds, and the rounding of the
        symbols, where the sums of the moduli are at most :math:`\sqrt{n\,\text{taps}}` times the norm.

    Examples:
        >>> 1e-11 < symbol_slack(128, 128, 2) < 1e-10
        True
    """
    short = min(m, n)
    proof = short * (10.0 * (m + n) + 256.0) * _U
    return proof + (2.0 * _TWIDDLE_ERROR + 2.0**-51 * taps) * math.sqrt(short * taps)


def symbol_reach(kernel: Array) -> float:
    r"""Estimate :math:`\sup_\omega \|\hat W(\omega)\|_2` from below by its values at eight frequencies. Nothing is proved.

    Args:
        kernel: as for :func:`symbol_upper`.

    Examples:
        >>> 0.0 < symbol_reach(np.full((1, 1, 1, 2), 0.5)) <= 1.0
        True
    """
    taps = kernel.shape[3:]
    weights = kernel.reshape(*kernel.shape[:3], -1)
    points = [2 * k for k in taps]
    cosine, sine = _twiddles(_shuffled(half_grid(points))[:8], taps, points)
    symbols = np.tensordot(cosine + 1j * sine, weights, axes=(1, 3))
    short = symbols if symbols.shape[-2] >= symbols.shape[-1] else symbols.swapaxes(-1, -2)
    top = float(np.linalg.eigvalsh(short.conj().swapaxes(-1, -2) @ short)[..., -1].max())
    return math.sqrt(max(top, 0.0)) * (1.0 - 2.0**-30)


def _tall(kernel: Array) -> Array:
    """Return the kernel as ``(groups, long, short, taps)``: a matrix has the norm of its transpose."""
    weights = kernel.reshape(*kernel.shape[:3], -1)
    return weights.transpose(0, 2, 1, 3) if weights.shape[1] < weights.shape[2] else weights


def _shuffled(q: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return frequencies in a fixed random order: along a smooth symbol one record would follow the other."""
    return q[np.random.default_rng(0).permutation(len(q))]


def _batches(q: npt.NDArray[np.int64], entries: int, taps: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield frequencies in batches for which neither the symbols nor the cosines need much memory."""
    yield from np.array_split(_shuffled(q), math.ceil(len(q) / max(1, _BATCH_ENTRIES // max(entries, taps))))


def _twiddles(q: npt.NDArray[np.int64], taps: Sequence[int], points: Sequence[int]) -> tuple[Array, Array]:
    r"""Return :math:`\cos(\omega\cdot j)` and :math:`\sin(\omega\cdot j)`, shape ``(frequencies, taps)``."""
    j = np.stack([a.ravel() for a in np.meshgrid(*(np.arange(k) for k in taps), indexing="ij")], axis=1)
    turns = sum((np.outer(q[:, a], j[:, a]) % n) / n for a, n in enumerate(points))
    angle = 2.0 * math.pi * np.asarray(turns)
    return np.cos(angle), np.sin(angle)


def _symbols(
    q: npt.NDArray[np.int64], taps: Sequence[int], points: Sequence[int], rows: Array, sides: Sequence[int]
) -> Array:
    """Return real and imaginary parts of the symbols, shape ``(frequencies * groups, 2, *sides)``."""
    return np.stack([(part @ rows).reshape(-1, *sides) for part in _twiddles(q, taps, points)], axis=1)


def _gram(symbols: Array) -> tuple[npt.NDArray[np.complex128], Array, float]:
    r"""Return the Gram matrices, their diagonals, and the largest :math:`\|A\|_F^2`, rounded up."""
    batch, _, m, n = symbols.shape
    stacked = symbols.reshape(batch, 2 * m, n)
    turned = np.concatenate([symbols[:, 1], -symbols[:, 0]], axis=1)
    gram = np.empty((batch, n, n), dtype=np.complex128)
    gram.real = stacked.transpose(0, 2, 1) @ stacked
    gram.imag = stacked.transpose(0, 2, 1) @ turned  # Re^T Im - Im^T Re
    index = np.arange(n)
    diagonal = gram.real[:, index, index].copy()
    return gram, diagonal, float(diagonal.sum(axis=1).max()) * (1 + gamma(2 * m + n + 4))


def _prove(symbols: Array, square: float) -> tuple[float, float, int]:
    r"""Return a number :math:`\ge` ``square`` for which every :math:`tI - \hat G` factorizes.

    Args:
        symbols: real and imaginary parts, shape ``(batch, 2, m, n)``.
        square: the number that was enough so far.

    Returns:
        The number, the largest :math:`\|A\|_F^2`, and the place of the matrix that the number is for if it is a new one.
    """
    _, _, m, n = symbols.shape
    gram, diagonal, size = _gram(symbols)
    slack, best = 8 * n * (2 * n + 2 * m + 48) * _U, 0
    failed = _failures(gram, diagonal, square).nonzero()[0]
    while len(failed):  # it ends: a matrix with a dominant diagonal factorizes
        # one of the largest first, so that eigenvalues of few are needed
        tried = failed if square > 0.0 else failed[_reach(gram[failed]).argmax()][None]
        tops = np.linalg.eigvalsh(gram[tried])[:, -1]
        high = float(tops.max()) + slack * max(float(tops.max()), _FLOOR)
        if high > square:
            square, best = high, int(tried[tops.argmax()])
        else:
            slack *= 8.0
        failed = failed[_failures(gram[failed], diagonal[failed], square)]
    return square, size, best


def _reach(gram: npt.NDArray[np.complex128]) -> Array:
    """Estimate the largest eigenvalues by a few power steps from a fixed vector."""
    x = np.cos(np.arange(1.0, gram.shape[-1] + 1))[None, :, None] + np.zeros((len(gram), 1, 1))
    for _ in range(_POWER_STEPS):
        x = gram @ x
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), _FLOOR)
    return np.linalg.norm(gram @ x, axis=(1, 2))


def _failures(gram: npt.NDArray[np.complex128], diagonal: Array, square: float) -> npt.NDArray[np.bool_]:
    """Return for which of the batch ``square * I - gram`` has no Cholesky factorization; the Gram matrices are left as they are."""
    if square <= 0.0:
        return np.ones(len(gram), dtype=np.bool_)
    index = np.arange(gram.shape[-1])
    shifted = -gram
    shifted[:, index, index] = square - diagonal
    return torch.linalg.cholesky_ex(torch.from_numpy(shifted)).info.numpy() != 0


def _allowance(m: int, n: int, square: float, size: float) -> float:
    """Bound the errors of the proof from above: factorization, Gram matrix, diagonal, underflow."""
    c = math.sqrt(2.0) * gamma(2 * n + 32) * (1 + 4 * _U)
    trace = n * square  # the diagonal of a Gram matrix is not negative
    total = c / (1 - c) * trace + math.sqrt(2.0) * gamma(2 * m) * size + 4 * _U * square
    return total * (1 + 64 * _U) + 8.0 * n * (n + 2 * m) * _TINY
