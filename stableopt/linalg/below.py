r"""A cheap proof that a spectral norm does not exceed a number.

To *decide* :math:`\|A\|_2 \le r` takes one Gram matrix and one Cholesky factorization, where the enclosure
:func:`stableopt.linalg.spectral_norm` takes an eigenvalue decomposition and a second product. With :math:`u = 2^{-53}`,
:math:`\gamma_k = ku/(1-ku)`, :math:`A` of shape :math:`m \times n`, :math:`n \le m`:

* the computed Gram matrix is :math:`\hat G = A^\top A + E`, :math:`|E| \le \gamma_m |A|^\top |A|`, hence
  :math:`\|E\|_2 \le \gamma_m \min(\|A\|_F^2, \|A\|_1 \|A\|_\infty)`;
* if the Cholesky factorization of the computed :math:`M = tI - \hat G` runs to its end, its factor satisfies
  :math:`\hat R^\top \hat R = M + \Delta`, :math:`|\Delta| \le \gamma_{n+1} |\hat R|^\top |\hat R|`, and the trace of
  :math:`\hat R^\top\hat R` is at most :math:`\operatorname{tr} M / (1 - \gamma_{n+1})`; so
  :math:`M \succeq -\gamma_{n+1} / (1 - \gamma_{n+1}) \operatorname{tr}(M)\, I`;
* the diagonal of :math:`M` is rounded once, and everything may underflow.

Let :math:`c` be the sum of these errors. Then success for :math:`t = r^2 - c` proves :math:`\|A\|_2^2 \le t + c = r^2`. The same
theorem read backwards says when the factorization *must* succeed: for :math:`\|A\|_2^2 < r^2 - 2c`, whatever the order of
summation. That is what :func:`relative_slack` bounds without looking at the numbers.

Assumed of the machine: what :mod:`stableopt.linalg.proved` assumes, and that the factorization is a conventional one too, in which
every entry is an inner product in some order (a few operations per entry are allowed on top, such as a division done as a product
with a reciprocal). The products and the factorization run on the CPU.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stableopt.linalg.proved import Array, Matrix, as_matrix, gamma

__all__ = ["norm_is_below", "relative_slack"]

_U = 2.0**-53
_TINY = 2.0**-1074
_FREE_EXPONENTS = 200  # radii within 2^±200 need no scaling: no square overflows, none that counts underflows
_KRYLOV_STEPS = 12
_BLOCK_COLUMNS = 512
_KRYLOV_FROM = 128  # smaller matrices are factorized sooner than refused


def norm_is_below(A: Matrix, radius: float) -> bool:
    r"""Return True only if :math:`\|A\|_2 \le r` is proved for the stored numbers.

    The tests go from cheap to expensive: an entry above the radius; the Frobenius norm; :math:`\sqrt{\|A\|_1 \|A\|_\infty}`; for
    large matrices a refusal by a Rayleigh quotient :math:`\|Ax\|/\|x\| > r`; the factorization.

    Args:
        A: matrix of shape ``(m, n)``, any real floating dtype, any device (the proof runs on the CPU).
        radius: :math:`r \ge 0`, may be infinite.

    Returns:
        True if the norm is proved to be at most the radius. False means *not proved*: the norm is larger, or smaller by less than
        the relative distance :func:`relative_slack` (at most 1.1e-12 for 64 x 64, 2.4e-10 for 1024 x 1024).

    Raises:
        TypeError: if ``A`` is neither a real floating tensor nor such an array.
        ValueError: if ``A`` is not a matrix or holds NaN or infinity, or the radius is negative or NaN.

    References:
        Rump, *Verification of positive definiteness*, BIT 2006; Higham, *Accuracy and Stability of Numerical Algorithms*, 2002,
        theorems 10.3 and 10.7.

    Examples:
        >>> A = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
        >>> norm_is_below(A, 5.0 + 1e-12), norm_is_below(A, 5.0 - 1e-12)
        (True, False)
    """
    a = np.ascontiguousarray(as_matrix(A))
    if not radius >= 0:
        raise ValueError(f"norm_is_below needs a radius >= 0, got {radius!r}.")
    top = float(max(a.max(), -a.min())) if a.size else 0.0
    if top == 0.0 or radius == math.inf:
        return True
    if top > radius:  # |a_ij| <= |A|_2, and both are exact
        return False
    a, r = _scaled(a, radius)
    square = math.nextafter(r * r, 0.0)
    size = _absolute_square_upper(a, square)
    if size <= square:
        return True
    if min(a.shape) >= _KRYLOV_FROM and _rayleigh_quotient(a, r) > 1.0 + 2.0**-30:
        return False
    return _factorizes(a, square, size)


def relative_slack(m: int, n: int) -> float:
    r"""Return :math:`\varepsilon` such that :math:`\|A\|_2 \le r(1 - \varepsilon)` makes :func:`norm_is_below` say True.

    It holds for every matrix of that shape, every memory layout, every order of summation; :math:`2^{-53}(k(m + n + 24) + 16)`
    with :math:`k = \min(m, n)`. The norm must not be so near the underflow that squares lose digits.

    Examples:
        >>> relative_slack(3, 3) < 1.2e-14, relative_slack(64, 64) < 1.1e-12
        (True, True)
    """
    # |A|_F^2 and tr M are at most k r^2, so c <= (k (gamma_max(m,n) + gamma_{k+9}) + 4u) r^2 (1 + ...); 2c on squares is c on norms
    return (min(m, n) * (m + n + 24) + 16) * 2.0**-53


def _scaled(a: Array, radius: float) -> tuple[Array, float]:
    """Return matrix and radius times a power of two, exactly but for entries that become subnormal, which underflow terms cover."""
    mantissa, exponent = math.frexp(radius)
    if abs(exponent) <= _FREE_EXPONENTS:
        return a, radius
    half = exponent // 2  # in two steps, because 2^-exponent itself may overflow
    return np.ldexp(np.ldexp(a, -half), half - exponent), mantissa


def _absolute_square_upper(a: Array, square: float) -> float:
    r"""Bound :math:`\||A|\|_2^2` from above by the Frobenius norm, and where that is not enough by row and column sums."""
    m, n = a.shape
    flat = a.ravel()
    frobenius = float(flat @ flat) * (1.0 + gamma(m * n + 8)) + 8.0 * m * n * _TINY
    if frobenius <= square:
        return frobenius
    entries = np.abs(a)
    sums = float(entries.sum(axis=1).max()) * float(entries.sum(axis=0).max())
    return min(frobenius, sums * (1.0 + gamma(m + n + 8)))


@torch.no_grad()
def _rayleigh_quotient(a: Array, r: float) -> float:
    """Return ``|Ax| / (r |x|)`` for a vector from a few Lanczos steps in float32; the quotient itself is taken in float64."""
    exact = torch.from_numpy(a)
    W = (exact / r).float()
    if W.shape[0] < W.shape[1]:
        W, exact = W.mT, exact.mT
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(W.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    basis, images = torch.zeros(2, _KRYLOV_STEPS, W.shape[1], dtype=torch.float32, device="cpu").unbind()
    for k in range(_KRYLOV_STEPS):
        for _ in range(2):
            v = v - basis[:k].mT @ (basis[:k] @ v)
        length = float(torch.linalg.vector_norm(v))
        if length == 0.0:
            break
        basis[k] = v / length
        images[k] = v = W.mT @ (W @ basis[k])
    small = basis @ images.mT
    x = (basis.mT @ torch.linalg.eigh((small + small.mT) / 2)[1][:, -1]).double()
    length = float(torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(exact @ x)) / r / length if length > 0 else 0.0


def _gram(A: Tensor) -> Tensor:
    r"""Return the computed :math:`A^\top A`: block columns of the lower triangle, mirrored; that saves up to half of the work."""
    n = A.shape[1]
    M = A.new_empty(n, n)
    for start in range(0, n, _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, n)
        M[start:, start:stop] = A[:, start:].mT @ A[:, start:stop]
        M[start:stop, stop:] = M[stop:, start:stop].mT
    return M


def _allowance(m: int, n: int, trace: float, size: float, square: float) -> float:
    """Bound the sum of all errors of the proof from above: factorization, Gram matrix, diagonal, underflow."""
    growth = gamma(n + 9)
    c = growth / (1.0 - growth) * trace + gamma(m) * size + 4.0 * _U * square
    return c * (1.0 + 16.0 * _U) + 4.0 * (n * (2.0 * (n + 2) + square) + m * n) * _TINY


@torch.no_grad()
def _factorizes(a: Array, square: float, size: float) -> bool:
    r"""Prove :math:`A^\top A \preceq` ``square`` by a Cholesky factorization; ``size`` bounds :math:`\||A|\|_2^2`."""
    A = torch.from_numpy(a)
    if A.shape[0] < A.shape[1]:
        A = A.mT
    m, n = A.shape
    M = _gram(A)
    diagonal = M.diagonal()
    trace = float((square - diagonal).clamp_min(0.0).sum()) * (1.0 + gamma(n + 8))
    c = _allowance(m, n, trace, size, square)
    t = math.nextafter(square - c, -math.inf)
    if t <= 0.0:
        return False
    M.neg_()
    diagonal.add_(t)
    return int(torch.linalg.cholesky_ex(M)[1]) == 0
