r"""T4, stochastic gradient descent near a minimum: what happens to the mean square, and what happens almost surely.

Both are right and they differ: the almost-sure exponent can be negative while the mean square grows. Say which one is meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from stableopt.linalg.bound import Real, lower, upper
from stableopt.theory._arguments import (
    Array,
    exact_lower,
    exact_upper,
    limit,
    matrices,
    nonnegative,
    positive,
    vector,
)

__all__ = [
    "almost_sure_exponent",
    "mean_square_edge",
    "mean_square_exponent",
    "mean_square_factor",
    "mean_square_max_lr",
    "second_moment_operator",
]


def mean_square_factor(lr: Real, smallest_curvature: Real, second_moment: Real) -> Real:
    r"""Bound the mean square of one stochastic step.

    :math:`\mathbb E\|(I-\eta H_\xi)\delta\|^2 \le (1-2\eta\mu+\eta^2 s)\|\delta\|^2`.

    Args:
        lr: :math:`\eta \ge 0`.
        smallest_curvature: :math:`\mu \ge 0` with :math:`\mathbb E H_\xi \succeq \mu I`.
        second_moment: :math:`s = \|\mathbb E H_\xi^2\|_2`, at least :math:`\mu^2`.

    Returns:
        The factor of the *square*; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite, or :math:`s < \mu^2` (impossible by Jensen).

    Examples:
        >>> mean_square_factor(0.5, smallest_curvature=1.0, second_moment=2.0)
        0.5
    """
    eta, (mu, s) = nonnegative("lr", lr), _moments(smallest_curvature, second_moment)
    return 1.0 - 2.0 * eta * mu + eta**2 * s


def mean_square_max_lr(smallest_curvature: Real, second_moment: Real) -> float:
    r"""Return the sufficient limit of the mean square: :math:`2\mu/\|\mathbb E H_\xi^2\|`.

    Args:
        smallest_curvature: :math:`\mu \ge 0` (the lower end is used).
        second_moment: :math:`\|\mathbb E H_\xi^2\|_2 > 0` (the upper end is used).

    Returns:
        The learning rate, rounded down; 0 if :math:`\mu = 0`. Sufficient, not necessary: see :func:`mean_square_edge`.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> mean_square_max_lr(1.0, second_moment=4.0)
        0.5
    """
    mu, s = _moments(smallest_curvature, positive("second_moment", second_moment))
    return limit(2 * exact_lower(mu), exact_upper(s))


def second_moment_operator(hessians: Sequence[ArrayLike], batch: int, lr: float) -> Array:
    r"""Return the map of second moments under one step.

    :math:`I-2\eta C+\eta^2D` on :math:`\mathrm{vec}(\mathbb E\delta\delta^\top)`.

    It equals :math:`\mathbb E[(I-\eta H_B)\otimes(I-\eta H_B)]` over batches B drawn without replacement, with
    :math:`C = \tfrac12(H\oplus H)`, :math:`D = (1-p)\,H\otimes H+p\,\mathrm{mean}_i(H_i\otimes H_i)`,
    :math:`p = \frac{n-B}{B(n-1)}`.

    Args:
        hessians: the symmetric Hessians of the n samples, each ``(d, d)``; small d, since the result is ``(d*d, d*d)``.
        batch: B, from 1 to n.
        lr: :math:`\eta \ge 0`.

    Returns:
        The operator, ``(d*d, d*d)``.

    Raises:
        ValueError: if the Hessians are malformed or the batch is out of range.

    Examples:
        >>> second_moment_operator([[[1.0]], [[3.0]]], batch=1, lr=0.5)
        array([[0.25]])
    """
    eta = float(upper(nonnegative("lr", lr)))
    C, D = _kronecker_moments(hessians, batch)
    return np.eye(len(C)) - 2 * eta * C + eta**2 * D


def mean_square_edge(hessians: Sequence[ArrayLike], batch: int) -> float:
    r"""Return the exact mean-square limit of SGD near an interpolating minimum: :math:`2/\lambda_{\max}(C^+D)`.

    Args:
        hessians: the Hessians of the n samples at the minimum, symmetric positive semidefinite, each ``(d, d)``; small d.
        batch: B, from 1 to n, drawn without replacement.

    Returns:
        The learning rate up to which :math:`\mathbb E\|\delta_t\|^2` stays bounded, computed in floating point (an estimate);
        infinity if all Hessians vanish.

    Raises:
        ValueError: if a Hessian is not positive semidefinite or the batch is out of range.

    References:
        Mulayoff and Michaeli, Exact mean square linear stability analysis for SGD, 2024.

    Examples:
        >>> round(mean_square_edge([[[1.0]], [[3.0]]], batch=2), 12)  # the full batch: 2 / mean
        1.0
        >>> round(mean_square_edge([[[1.0]], [[3.0]]], batch=1), 12)  # 2 * 2 / (1 + 9) * 2
        0.8
    """
    for i, H in enumerate(matrices("hessians", hessians)):
        values = np.linalg.eigvalsh(H)
        if values[0] < -1e-9 * max(abs(values).max(), 1e-300):
            raise ValueError(
                f"hessians[{i}] must be positive semidefinite at a minimum, got the eigenvalue {values[0]:.6g}."
            )
    C, D = _kronecker_moments(hessians, batch)
    values, vectors = np.linalg.eigh((C + C.T) / 2)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    if not kept.any():
        return math.inf
    half = vectors[:, kept] / np.sqrt(values[kept])  # half half^T is the pseudo-inverse of C
    return 2.0 / float(np.linalg.eigvalsh(half.T @ D @ half)[-1])


def almost_sure_exponent(factors: ArrayLike, probabilities: ArrayLike | None = None) -> float:
    r"""Return the almost-sure exponent of :math:`\delta_{t+1} = a_\xi\delta_t`: :math:`\mathbb E\log|a_\xi|`.

    Args:
        factors: the values of a, ``(k,)``.
        probabilities: their probabilities, ``(k,)``, summing to 1; None for equal ones.

    Returns:
        The exponent per step in nats; ``-inf`` if a vanishes with positive probability.

    Raises:
        ValueError: if an argument is malformed.

    Examples:
        >>> almost_sure_exponent([0.5, 2.0])
        0.0
    """
    a, p = _distribution(factors, probabilities)
    if np.any((a == 0) & (p > 0)):
        return -math.inf
    return math.fsum(weight * math.log(abs(value)) for value, weight in zip(a, p, strict=True) if weight > 0)


def mean_square_exponent(factors: ArrayLike, probabilities: ArrayLike | None = None) -> float:
    r"""Return the exponent of the root mean square of :math:`\delta_{t+1} = a_\xi\delta_t`: :math:`\tfrac12\log\mathbb E a_\xi^2`.

    Args:
        factors: the values of a, ``(k,)``.
        probabilities: their probabilities, ``(k,)``, summing to 1; None for equal ones.

    Returns:
        The exponent per step in nats, never below :func:`almost_sure_exponent` (Jensen).

    Raises:
        ValueError: if an argument is malformed.

    Examples:
        >>> round(mean_square_exponent([0.5, 2.0]), 4)
        0.3769
    """
    a, p = _distribution(factors, probabilities)
    largest = float(np.abs(a[p > 0]).max())
    if largest == 0:
        return -math.inf
    return math.log(largest) + 0.5 * math.log(math.fsum(p * (a / largest) ** 2))  # scaled: squares may underflow


def _moments(smallest_curvature: Real, second_moment: Real) -> tuple[Real, Real]:
    mu, s = nonnegative("smallest_curvature", smallest_curvature), nonnegative("second_moment", second_moment)
    if lower(mu) ** 2 > upper(s) * (1 + 1e-12):
        raise ValueError(
            f"second_moment is at least the square of the mean curvature, got {second_moment!r} < {mu!r}^2."
        )
    return mu, s


def _kronecker_moments(hessians: Sequence[ArrayLike], batch: int) -> tuple[Array, Array]:
    Hs = matrices("hessians", hessians)
    n = len(Hs)
    if not 1 <= batch <= n:
        raise ValueError(f"batch must lie in 1..{n}, got {batch}.")
    if any(not np.allclose(H, H.T, rtol=1e-9, atol=1e-300) for H in Hs):
        raise ValueError("hessians must be symmetric.")
    mean = sum(Hs, np.zeros_like(Hs[0])) / n
    identity = np.eye(len(mean))
    p = (n - batch) / (batch * (n - 1)) if n > 1 else 0.0
    squares = sum((np.kron(H, H) for H in Hs), np.zeros_like(np.kron(mean, mean))) / n
    C = (np.kron(mean, identity) + np.kron(identity, mean)) / 2
    return C, (1 - p) * np.kron(mean, mean) + p * squares


def _distribution(factors: ArrayLike, probabilities: ArrayLike | None) -> tuple[Array, Array]:
    a = vector("factors", factors)
    p = np.full(len(a), 1 / len(a)) if probabilities is None else vector("probabilities", probabilities)
    if len(p) != len(a) or p.min() < 0 or abs(math.fsum(p) - 1) > 1e-9:
        raise ValueError(f"probabilities must be {len(a)} numbers >= 0 with the sum 1, got {p.tolist()}.")
    return a, p
