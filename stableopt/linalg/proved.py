r"""Enclosures of matrix norms and logarithmic norms that count every rounding error.

Everything here is proved for the *stored* numbers: a float32, bfloat16 or float16 matrix is read back exactly as float64.
The proofs need two assumptions about the machine, which the verifier of the certificates repeats and spot-checks:

* float64 is IEEE-754 with round-to-nearest and gradual underflow;
* a matrix product is conventional: each entry is a sum of the products in some order, with or without fused
  multiply-add. (Strassen-like products and split-precision emulations are not: hence numpy on the CPU, never a GPU.)

Then, with :math:`u = 2^{-53}` and :math:`\gamma_k = ku/(1-ku)`, a computed sum of :math:`k` products differs from the exact
one by at most :math:`\gamma_k \sum |a_i b_i|` plus :math:`k \cdot 2^{-1074}` for underflow.

The largest eigenvalue of a symmetric :math:`G` is bounded with a *witness*: any matrix :math:`R` at all. For
:math:`X = tI - G - R^\top R`,

.. math:: tI - G = R^\top R + X \succeq -\|X\|_2 I \quad\Rightarrow\quad \lambda_{\max}(G) \le t + \|X\|_2,

and :math:`\|X\|_2` is bounded by row sums of the computed residual plus its rounding. Taking for :math:`R` the computed Cholesky
factor of :math:`tI - G` makes the residual tiny, but the proof does not trust the factorization.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stableopt.linalg.bound import Bound, round_up

__all__ = [
    "as_matrix",
    "frobenius_norm",
    "gamma",
    "gram_upper",
    "inf_norm",
    "largest_eigenvalues_upper",
    "log_norm",
    "one_norm",
    "scale_back",
    "scale_to_unit",
    "spectral_norm",
]

Array = npt.NDArray[np.float64]
Matrix = Tensor | npt.NDArray[np.floating]

_U = 2.0**-53
_TINY = 2.0**-1074


def spectral_norm(A: Matrix) -> Bound:
    r"""Enclose the operator norm :math:`\|A\|_2 = \sigma_{\max}(A)` of the stored numbers.

    The upper end comes from the Gram matrix and a Cholesky witness (see the module), the lower end from the Rayleigh
    quotient :math:`\|Ax\| / \|x\|` of a computed eigenvector; both count all rounding.

    Args:
        A: matrix of shape ``(m, n)``, any real floating dtype, any device (the proof runs on the CPU).

    Returns:
        A proved enclosure, relative width about 1e-13 for 64 x 64 and 1e-10 for 1024 x 1024. Zero and empty matrices give
        exactly ``[0, 0]``.

    Raises:
        TypeError: if ``A`` is neither a real floating tensor nor such an array.
        ValueError: if ``A`` is not a matrix or holds NaN or infinity.

    References:
        Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, section 3.1 (the error of a product);
        Rump, *Verified bounds for singular values*, BIT 2011.

    Examples:
        >>> norm = spectral_norm(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
        >>> 5.0 in norm and norm.proved and norm.width < 1e-12
        True
    """
    a = as_matrix(A)
    if a.size == 0 or not a.any():
        return Bound.point(0.0)
    if a.shape[0] < a.shape[1]:
        a = a.T
    a, exponent = scale_to_unit(a)
    gram, error = _gram(a[None])
    eigenvalue, vector = _top_eigenpair(gram[0])
    upper = largest_eigenvalues_upper(gram, guess=eigenvalue)
    high = _up(math.sqrt(_up(upper + float(error[0]))))
    low = min(_image_norm_lower(a, vector), high)
    return Bound(_ldexp(low, exponent, up=False), _ldexp(high, exponent, up=True))


def frobenius_norm(A: Matrix) -> Bound:
    r"""Enclose the Frobenius norm :math:`\|A\|_F = (\sum_{ij} a_{ij}^2)^{1/2}`, an upper bound of the spectral norm.

    Args:
        A: matrix of shape ``(m, n)``.

    Raises:
        TypeError: if ``A`` is neither a real floating tensor nor such an array.
        ValueError: if ``A`` is not a matrix or holds NaN or infinity.

    Examples:
        >>> 5.0 in frobenius_norm(torch.tensor([[3.0, 4.0]]))
        True
    """
    a = as_matrix(A)
    if a.size == 0 or not a.any():
        return Bound.point(0.0)
    a, exponent = scale_to_unit(a)
    low, high = _two_norm(a.ravel())
    return Bound(_ldexp(low, exponent, up=False), _ldexp(high, exponent, up=True))


def inf_norm(A: Matrix) -> Bound:
    r"""Enclose the operator norm for the maximum norm, :math:`\|A\|_\infty = \max_i \sum_j |a_{ij}|`.

    Args:
        A: matrix of shape ``(m, n)``.

    Raises:
        TypeError: if ``A`` is neither a real floating tensor nor such an array.
        ValueError: if ``A`` is not a matrix or holds NaN or infinity.

    Examples:
        >>> 7.0 in inf_norm(torch.tensor([[3.0, -4.0], [1.0, 1.0]]))
        True
    """
    a = as_matrix(A)
    if a.size == 0 or not a.any():
        return Bound.point(0.0)
    a, exponent = scale_to_unit(a)
    return scale_back(_enclose_sum(np.abs(a).sum(axis=1).max(), a.shape[1]), exponent)


def one_norm(A: Matrix) -> Bound:
    r"""Enclose the operator norm for the sum norm, :math:`\|A\|_1 = \max_j \sum_i |a_{ij}|`.

    Args:
        A: matrix of shape ``(m, n)``.

    Raises:
        TypeError: if ``A`` is neither a real floating tensor nor such an array.
        ValueError: if ``A`` is not a matrix or holds NaN or infinity.

    Examples:
        >>> 5.0 in one_norm(torch.tensor([[3.0, -4.0], [1.0, 1.0]]))
        True
    """
    return inf_norm(as_matrix(A).T)


def log_norm(A: Matrix, p: float = 2) -> Bound:
    r"""Enclose the logarithmic norm :math:`\mu_p(A) = \lim_{h \downarrow 0} (\|I + hA\|_p - 1)/h`.

    .. math::
        \mu_2(A) = \lambda_{\max}\tfrac{A + A^\top}{2}, \quad
        \mu_\infty(A) = \max_i \Bigl(a_{ii} + \sum_{j \ne i} |a_{ij}|\Bigr), \quad \mu_1(A) = \mu_\infty(A^\top).

    The flow of :math:`\dot x = Ax` contracts in the norm :math:`p` at rate :math:`-\mu_p(A)` when that is positive (T7).

    Args:
        A: square matrix of shape ``(n, n)``.
        p: the norm: 1, 2 or ``math.inf``.

    Returns:
        A proved enclosure; it can be negative, unlike a norm.

    Raises:
        TypeError: if ``A`` is neither a real floating tensor nor such an array.
        ValueError: if ``A`` is not square, holds NaN or infinity, or ``p`` is another number.

    Examples:
        >>> 0.5 in log_norm(torch.tensor([[-1.0, 3.0], [0.0, -1.0]]), 2)
        True
        >>> 2.0 in log_norm(torch.tensor([[-1.0, 3.0], [0.0, -1.0]]), math.inf)
        True
    """
    a = as_matrix(A)
    if a.shape[0] != a.shape[1] or a.size == 0:
        raise ValueError(f"log_norm needs a square matrix with at least one row, got shape {a.shape}.")
    if p not in (1, 2, math.inf):
        raise ValueError(f"log_norm knows the norms p = 1, 2 and inf, got p = {p!r}.")
    if not a.any():
        return Bound.point(0.0)
    a, exponent = scale_to_unit(a)
    return scale_back(_log_norm_two(a) if p == 2 else _log_norm_inf(a.T if p == 1 else a), exponent)


def largest_eigenvalues_upper(G: Array, *, guess: float) -> float:
    r"""Bound from above the largest eigenvalue of every matrix of a batch, with one common bound.

    Args:
        G: batch of exactly symmetric matrices, shape ``(b, n, n)``, float64, entries of size about 1.
        guess: an estimate of the largest eigenvalue of the batch; a bad one costs time or tightness, never truth.

    Returns:
        A float :math:`\ge \max_b \lambda_{\max}(G_b)`, proved.

    Examples:
        >>> largest_eigenvalues_upper(np.eye(2)[None], guess=1.0) >= 1.0
        True
    """
    n = G.shape[-1]
    size = max(abs(guess), float(np.abs(G).max()), _TINY)
    slack = 4 * n * _U
    while True:
        t = guess + slack * size
        shifted = -G
        index = np.arange(n)
        shifted[:, index, index] += t
        try:
            R: Array = np.linalg.cholesky(shifted).astype(np.float64, copy=False).transpose(0, 2, 1)
        except np.linalg.LinAlgError:
            slack *= 4.0
            if slack > 4 * n:  # Gershgorin: t > guess + 4 n max|G| always leaves a positive definite matrix
                return _up(_up(float(np.abs(G).sum(axis=-1).max())) * (1 + gamma(n + 1)))
            continue
        return _up(t + _residual_norm_upper(shifted, R))


def _residual_norm_upper(shifted: Array, R: Array) -> float:
    r"""Bound :math:`\|tI - G - R^\top R\|_2` from above over the batch; ``shifted`` is the computed :math:`tI - G`.

    Only the diagonal of ``shifted`` was rounded, once, by at most u times its own size. The product :math:`R^\top R` is off by
    :math:`\gamma_n |R|^\top|R|`, whose 2-norm is at most :math:`\gamma_n \|R\|_F^2`; the difference is rounded once more.
    """
    n = shifted.shape[-1]
    residual = np.abs(shifted - R.transpose(0, 2, 1) @ R)
    row_sums = max(float(residual.sum(axis=-1).max()), float(residual.sum(axis=-2).max()))
    diagonal = float(np.abs(np.diagonal(shifted, axis1=-2, axis2=-1)).max())
    squares = float((R * R).sum(axis=(-2, -1)).max())
    total = _up(row_sums * (1 + gamma(n + 3)))
    total = _up(total + _up(_U * diagonal) * (1 + 4 * _U))
    total = _up(total + _up(_up(gamma(n) * squares) * (1 + gamma(n * n + 3))))
    return _up(total + 4.0 * n * n * _TINY)


def _gram(A: Array) -> tuple[Array, Array]:
    r"""Return exactly symmetric :math:`G_b \approx A_b^\top A_b` and a bound of each :math:`\|G_b - A_b^\top A_b\|_2`.

    Args:
        A: batch of shape ``(b, m, n)``, entries of size at most 1.
    """
    m, n = A.shape[-2:]
    gram = A.transpose(0, 2, 1) @ A
    upper = np.triu(gram)
    gram = upper + np.triu(gram, 1).transpose(0, 2, 1)
    squares = (A * A).sum(axis=(-2, -1)) * (1 + gamma(m * n + 4))  # an upper bound of the squared Frobenius norm
    return gram, squares * (gamma(m) * (1 + 4 * _U)) + 4.0 * m * n * _TINY


def gram_upper(A: Array, *, guess: float | None = None) -> float:
    r"""Bound :math:`\max_b \|A_b\|_2` of a batch from above, proved.

    Args:
        A: batch of shape ``(b, m, n)``, float64, finite.
        guess: an estimate of the largest norm; computed when absent.

    Examples:
        >>> 1.0 <= gram_upper(np.eye(3)[None]) < 1.0 + 1e-13
        True
    """
    if A.size == 0 or not A.any():
        return 0.0
    if A.shape[-2] < A.shape[-1]:
        A = A.transpose(0, 2, 1)
    A, exponent = scale_to_unit(A)
    gram, error = _gram(A)
    top = float(np.linalg.eigvalsh(gram)[:, -1].max()) if guess is None else math.ldexp(guess, -exponent) ** 2
    high = largest_eigenvalues_upper(gram, guess=top)
    return _ldexp(_up(math.sqrt(_up(high + float(error.max())))), exponent, up=True)


def _log_norm_two(a: Array) -> Bound:
    symmetric = (a + a.T) / 2  # halving is exact unless it underflows; the sum is rounded once
    error = _up(_U * float(np.abs(symmetric).sum(axis=1).max())) * (1 + gamma(len(a) + 3)) + 4.0 * len(a) * _TINY
    eigenvalue, vector = _top_eigenpair(symmetric)
    high = largest_eigenvalues_upper(symmetric[None], guess=eigenvalue)
    low = min(_rayleigh_lower(symmetric, vector), high)
    return Bound(low, high) + Bound(-error, error)


def _log_norm_inf(a: Array) -> Bound:
    diagonal, n = np.diagonal(a), len(a)
    off = np.abs(a - np.diag(diagonal)).sum(axis=1)
    errors = (np.abs(diagonal) + off) * (2 * gamma(n + 1)) * (1 + gamma(n + 4)) + 4.0 * n * _TINY  # of each row its own
    sums = diagonal + off
    return Bound(math.nextafter((sums - errors).max(), -math.inf), _up((sums + errors).max()))


def _rayleigh_lower(S: Array, x: Array) -> float:
    r"""Bound :math:`x^\top S x / \|x\|^2` from below; it is at most :math:`\lambda_{\max}(S)`."""
    n = len(x)
    low, high = _two_norm(x)
    size = _up(_up(float(np.sqrt((S * S).sum()))) * (1 + gamma(n * n + 4)))
    # Sx is off by gamma_n |S||x|, the inner product by gamma_n |x||Sx|: together at most 3 gamma_n |S|_F |x|^2
    error = _up(_up(3 * gamma(n) * size) * _up(high * high)) + 4.0 * n * _TINY
    quotient = Bound.point(float(x @ (S @ x))) - Bound(-error, error)
    return (quotient / (Bound(low, high) ** 2)).lower


def _image_norm_lower(a: Array, x: Array) -> float:
    r"""Bound :math:`\|ax\| / \|x\|` from below; it is at most :math:`\|a\|_2`."""
    image, _ = _two_norm(a @ x)
    low, high = _two_norm(x)
    if low == 0.0:
        return 0.0
    frobenius = _two_norm(a.ravel())[1]
    rounding = Bound.point(gamma(a.shape[1])) * frobenius * high + 4.0 * a.size * _TINY
    return max(0.0, ((image - rounding) / high).lower)


def _top_eigenpair(S: Array) -> tuple[float, Array]:
    values, vectors = np.linalg.eigh(S)
    return float(values[-1]), vectors[:, -1]


def _two_norm(x: Array) -> tuple[float, float]:
    """Enclose the 2-norm of a vector whose entries are of size about 1."""
    return_scale = Bound.point(float((x * x).sum())) * Bound(1 - gamma(x.size + 2), 1 + gamma(x.size + 2))
    underflow = 4.0 * x.size * _TINY
    square = return_scale + Bound(-underflow, underflow)
    root = Bound(max(0.0, square.lower), max(0.0, square.upper)).sqrt()
    return root.lower, root.upper


def _enclose_sum(total: float, terms: int) -> Bound:
    """Enclose the exact sum of non-negative terms from the computed one."""
    return Bound.point(float(total)) * Bound(1 - gamma(terms), 1 + gamma(terms))


def scale_back(bound: Bound, exponent: int) -> Bound:
    """Return the enclosure times ``2**exponent``, rounded outwards where that is subnormal or overflows.

    Examples:
        >>> scale_back(Bound(1.0, 2.0), 3)
        Bound(lower=8.0, upper=16.0, proved=True)
    """
    return Bound(_ldexp(bound.lower, exponent, up=False), _ldexp(bound.upper, exponent, up=True), bound.proved)


def as_matrix(A: Matrix, ndim: int = 2) -> Array:
    """Return the exact float64 copy of a real floating matrix on the CPU, or refuse it.

    Examples:
        >>> as_matrix(torch.ones(1, 2, dtype=torch.bfloat16))
        array([[1., 1.]])
    """
    if isinstance(A, Tensor):
        if not A.dtype.is_floating_point:
            raise TypeError(f"a norm needs a real floating tensor, got dtype {A.dtype}.")
        a = A.detach().to(device="cpu", dtype=torch.float64).numpy()
    elif isinstance(A, np.ndarray) and A.dtype in (np.float16, np.float32, np.float64):
        a = A.astype(np.float64)
    else:
        raise TypeError(f"a norm needs a real floating tensor or array, got {getattr(A, 'dtype', type(A).__name__)}.")
    if a.ndim != ndim:
        raise ValueError(f"expected {ndim} dimensions, got shape {a.shape}.")
    if not np.isfinite(a).all():
        raise ValueError(f"no bound holds for a tensor of shape {a.shape} with NaN or infinite entries.")
    return a


def scale_to_unit(a: Array) -> tuple[Array, int]:
    """Return ``a * 2**-e`` and ``e`` such that the largest entry lies in [1/2, 1).

    The scaling is exact except for entries that become subnormal; those change by less than 2**-1074 each, which every
    underflow term of this module covers.

    Examples:
        >>> scale_to_unit(np.array([[8.0]]))
        (array([[0.5]]), 4)
    """
    exponent = int(np.frexp(np.abs(a).max())[1])
    half = exponent // 2  # in two steps: 2**-1074 itself cannot be scaled by one normal power of two
    return np.ldexp(np.ldexp(a, -half), half - exponent), exponent


def gamma(k: int) -> float:
    r"""Return :math:`\gamma_k = ku/(1-ku)` rounded up, :math:`u = 2^{-53}`.

    Raises:
        ValueError: if ``k`` is so large that the bound is void.

    Examples:
        >>> gamma(1) > 2.0**-53
        True
    """
    if k >= 2**52:
        raise ValueError(f"sums of {k} terms are too long for a proof in float64.")
    return round_up(Fraction(k, 2**53 - k))


def _up(x: float) -> float:
    return math.nextafter(x, math.inf)


def _ldexp(x: float, exponent: int, *, up: bool) -> float:
    """Scale by a power of two, rounded outwards when the result is subnormal or overflows."""
    if x == 0.0:
        return 0.0
    try:
        scaled = math.ldexp(x, exponent)
    except OverflowError:
        largest = math.nextafter(math.inf, 0.0)
        return (math.inf if up else largest) if x > 0 else (-largest if up else -math.inf)
    if Fraction(scaled) == Fraction(x) * Fraction(2) ** exponent:
        return scaled
    return math.nextafter(scaled, math.inf if up else -math.inf)
