r"""T1, the Lyapunov criterion: transition operators, what an energy proves about them, and how to build an energy from them.

Along a trajectory with one-step derivatives :math:`A_t` the transition operators are
:math:`\Phi(t,s) = A_{t-1}\cdots A_s`. An energy :math:`V_t(\delta) = \delta^\top P_t \delta` that decays bounds every one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from stableopt.linalg.bound import Real, lower, upper
from stableopt.theory._arguments import Array, listed, matrices, matrix, nonnegative, positive, real_sqrt

__all__ = [
    "energy_rate",
    "energy_transition_bound",
    "metric_log_norm",
    "metric_norm",
    "spectral_radius",
    "synthesize_energy",
    "synthesize_metric",
    "synthesized_energy_bound",
    "synthesized_energy_rate",
    "terminal_exponent",
    "transition",
    "transition_norms",
]


def energy_transition_bound(rates: Iterable[Real], smallest: Real, largest: Real) -> Real:
    r"""Bound a transition operator by the decay of an energy: :math:`\sqrt{M/m}\,\prod_r \sqrt{\rho_r}`.

    If :math:`mI \preceq P_t \preceq MI` and :math:`V_{t+1}(A_t\delta) \le \rho_t V_t(\delta)` for all :math:`\delta`, then
    :math:`\|\Phi(t,s)\|_2` is at most this.

    Args:
        rates: the rates :math:`\rho_s, \dots, \rho_{t-1} \ge 0` of the energy (not of its root).
        smallest: m > 0, below every eigenvalue of every :math:`P_t`.
        largest: M >= m, above every eigenvalue of every :math:`P_t`.

    Returns:
        The bound; a Bound if an operand is one.

    Raises:
        ValueError: if a rate is negative, m is not positive, or M < m.

    Note:
        Sufficient only: rates above 1 do not prove instability.

    References:
        T1; chain the inequality, then use m|x|^2 <= V <= M|x|^2.

    Examples:
        >>> energy_transition_bound([0.25, 0.25], smallest=1.0, largest=4.0)
        0.5
    """
    m, M = positive("smallest", smallest), positive("largest", largest)
    if upper(M) < lower(m):
        raise ValueError(f"largest must be at least smallest, got {largest!r} < {smallest!r}.")
    bound = real_sqrt(M / m)
    for rho in listed("rates", rates):
        bound = bound * real_sqrt(rho)
    return bound


def transition(A: Sequence[ArrayLike], s: int, t: int) -> Array:
    r"""Return :math:`\Phi(t,s) = A_{t-1}\cdots A_s`, the identity for ``t == s``.

    Args:
        A: the one-step matrices :math:`A_0, \dots, A_{T-1}`, each ``(n, n)``.
        s: start, ``0 <= s <= t``.
        t: end, ``t <= T``.

    Returns:
        The product, ``(n, n)``.

    Raises:
        ValueError: if the matrices are malformed or the times out of order.

    Examples:
        >>> transition([[[2.0]], [[3.0]]], 0, 2)
        array([[6.]])
    """
    steps = matrices("A", A)
    if not 0 <= s <= t <= len(steps):
        raise ValueError(f"transition needs 0 <= s <= t <= {len(steps)}, got s={s} and t={t}.")
    Phi = np.eye(steps[0].shape[0])
    for step in steps[s:t]:
        Phi = step @ Phi
    return Phi


def transition_norms(A: Sequence[ArrayLike]) -> Array:
    r"""Return the table ``K[t, s]`` :math:`= \|\Phi(t,s)\|_2` for all ``s <= t``, zero elsewhere.

    Profile-boundedness is a bound on the *largest* entry; the column ``s = 0`` alone misses what starts late.

    Args:
        A: the one-step matrices :math:`A_0, \dots, A_{T-1}`, each ``(n, n)``.

    Returns:
        ``(T + 1, T + 1)``, computed in floating point (an estimate, not an enclosure).

    Raises:
        ValueError: if the matrices are malformed.

    Examples:
        >>> transition_norms([[[0.5]], [[4.0]]])
        array([[1. , 0. , 0. ],
               [0.5, 1. , 0. ],
               [2. , 4. , 1. ]])
    """
    steps = matrices("A", A)
    T = len(steps)
    K = np.eye(T + 1)
    for s in range(T):
        Phi = np.eye(steps[0].shape[0])
        for t in range(s, T):
            Phi = steps[t] @ Phi
            K[t + 1, s] = np.linalg.norm(Phi, 2)
    return K


def terminal_exponent(A: Sequence[ArrayLike]) -> float:
    r"""Return the finite-time exponent :math:`\lambda = \frac1T \log \|\Phi(T,0)\|_2`.

    Args:
        A: the one-step matrices, each ``(n, n)``.

    Returns:
        The exponent per step; ``-inf`` if the product is zero.

    Raises:
        ValueError: if the matrices are malformed.

    Note:
        :math:`\lambda \le 0` proves neither boundedness (the norms can grow like t) nor anything about a later start.

    Examples:
        >>> terminal_exponent([[[1.0]], [[1.0]]])
        0.0
    """
    norm = float(np.linalg.norm(transition(A, 0, len(A)), 2))
    return math.log(norm) / len(A) if norm > 0 else -math.inf


def synthesize_energy(A: Sequence[ArrayLike], w: float) -> list[Array]:
    r"""Build a Lyapunov energy from measured one-step matrices.

    :math:`P_T = I`, :math:`P_t = I + w A_t^\top P_{t+1} A_t`, which is
    :math:`P_t = \sum_{r \ge t} w^{r-t} \Phi(r,t)^\top\Phi(r,t)`; hence :math:`A_t^\top P_{t+1} A_t = (P_t - I)/w`.

    Args:
        A: the one-step matrices :math:`A_0, \dots, A_{T-1}`, each ``(n, n)``.
        w: weight > 0; the decay approaches :math:`1/w`.

    Returns:
        :math:`P_0, \dots, P_T`, each symmetric and at least the identity.

    Raises:
        ValueError: if the matrices are malformed or w is not positive.

    Note:
        A construction for a finite horizon. A profile that is only bounded by a constant does not give, on an infinite
        horizon, an energy that strictly dissipates.

    Examples:
        >>> [float(P[0, 0]) for P in synthesize_energy([[[0.5]], [[0.5]]], w=2.0)]
        [1.75, 1.5, 1.0]
    """
    weight = float(upper(positive("w", w)))
    steps = matrices("A", A)
    energies = [np.eye(steps[0].shape[0])]
    for step in reversed(steps):
        P = energies[-1]
        energies.append(np.eye(len(P)) + weight * step.T @ P @ step)
    return [(P + P.T) / 2 for P in reversed(energies)]


def synthesized_energy_bound(constant: Real, rate: Real, w: Real) -> Real:
    r"""Return M with :math:`I \preceq P_t \preceq MI` for the synthesized energy: :math:`M = C^2/(1 - w\rho^2)`.

    Args:
        constant: C >= 1 with :math:`\|\Phi(r,t)\| \le C\rho^{r-t}` for all t <= r.
        rate: :math:`\rho \ge 0`.
        w: weight > 0 of :func:`synthesize_energy`, with :math:`w\rho^2 < 1`.

    Returns:
        M; a Bound if an operand is one.

    Raises:
        ValueError: if C < 1 or :math:`w\rho^2 \ge 1`.

    Examples:
        >>> synthesized_energy_bound(constant=2.0, rate=0.5, w=2.0)
        8.0
    """
    C, rho, weight = positive("constant", constant), nonnegative("rate", rate), positive("w", w)
    if lower(C) < 1:
        raise ValueError(
            f"constant must be at least 1, since the transition from t to t is the identity, got {constant!r}."
        )
    remaining = 1.0 - weight * rho**2
    if lower(remaining) <= 0:
        raise ValueError(f"w * rate^2 must be below 1, got w={w!r} and rate={rate!r}; lower w.")
    return C**2 / remaining


def synthesized_energy_rate(w: Real, bound: Real) -> Real:
    r"""Return the decay rate of the synthesized energy: :math:`\frac1w\,(1 - 1/M)`.

    Args:
        w: weight > 0 of :func:`synthesize_energy`.
        bound: M >= 1 with :math:`P_t \preceq MI`.

    Returns:
        :math:`\rho` with :math:`V_{t+1}(A_t\delta) \le \rho V_t(\delta)`; a Bound if an operand is one.

    Raises:
        ValueError: if w is not positive or M < 1.

    Examples:
        >>> synthesized_energy_rate(w=2.0, bound=8.0)
        0.4375
    """
    weight, M = positive("w", w), positive("bound", bound)
    if lower(M) < 1:
        raise ValueError(f"bound must be at least 1, since P_t is at least the identity, got {bound!r}.")
    return (1.0 - 1.0 / M) / weight


def energy_rate(A: ArrayLike, P: ArrayLike, P_next: ArrayLike) -> float:
    r"""Return the smallest :math:`\rho` with :math:`A^\top P_{t+1} A \preceq \rho P_t`.

    Args:
        A: one step, ``(n, n)``.
        P: the energy before, symmetric positive definite.
        P_next: the energy after, symmetric positive semidefinite.

    Returns:
        The rate, computed in floating point.

    Raises:
        ValueError: if a matrix is malformed or P is not positive definite.

    Examples:
        >>> energy_rate([[0.5]], [[1.0]], [[2.0]])
        0.5
    """
    step, after = matrices("(A, P_next)", [A, P_next])
    half = _root(P) if np.shape(P) == step.shape else _refuse_shape(P, step)
    X = np.linalg.solve(half.T, (step.T @ after @ step)) @ np.linalg.inv(half)
    return float(np.linalg.eigvalsh((X + X.T) / 2)[-1])


def metric_norm(A: ArrayLike, P: ArrayLike) -> float:
    r"""Return the norm of A in the metric P: :math:`\|P^{1/2} A P^{-1/2}\|_2`.

    Args:
        A: ``(n, n)``.
        P: symmetric positive definite, ``(n, n)``.

    Returns:
        The norm, computed in floating point.

    Raises:
        ValueError: if a matrix is malformed or P is not positive definite.

    Examples:
        >>> metric_norm([[0.0, 1.0], [0.0, 0.0]], [[4.0, 0.0], [0.0, 1.0]])
        2.0
    """
    return math.sqrt(max(energy_rate(A, P, P), 0.0))


def metric_log_norm(J: ArrayLike, P: ArrayLike) -> float:
    r"""Return the logarithmic norm in the metric P: the largest eigenvalue of the symmetric part of :math:`P^{1/2}JP^{-1/2}`.

    The flow :math:`\dot h = f(h)` contracts at rate m in this metric iff it is at most -m for every derivative J of f.

    Args:
        J: ``(n, n)``.
        P: symmetric positive definite, ``(n, n)``.

    Returns:
        The logarithmic norm, computed in floating point.

    Raises:
        ValueError: if a matrix is malformed or P is not positive definite.

    Examples:
        >>> metric_log_norm([[-1.0, 10.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]])
        4.0
    """
    M = matrix("J", J)
    half = _root(P) if np.shape(P) == M.shape else _refuse_shape(P, M)
    X = half @ M @ np.linalg.inv(half)
    return float(np.linalg.eigvalsh((X + X.T) / 2)[-1])


def synthesize_metric(A: ArrayLike, rate: float) -> Array:
    r"""Return P with :math:`\|P^{1/2}AP^{-1/2}\|_2 < \text{rate}` for a fixed matrix whose spectral radius is below ``rate``.

    The solution of :math:`P = I + A^\top P A/\text{rate}^2`: the limit of :func:`synthesize_energy` with
    :math:`w = \text{rate}^{-2}`. This is the norm to use for companion matrices, which are not normal.

    Args:
        A: ``(n, n)``; the cost is that of a linear system with n^2 unknowns.
        rate: a number above the spectral radius of A.

    Returns:
        P, symmetric, at least the identity.

    Raises:
        ValueError: if rate does not exceed the spectral radius.

    Examples:
        >>> A = [[0.0, 4.0], [0.0, 0.0]]
        >>> metric_norm(A, synthesize_metric(A, rate=0.5)) < 0.5
        True
    """
    M, r = matrix("A", A), float(upper(positive("rate", rate)))
    if spectral_radius(M) >= r:
        raise ValueError(f"rate must exceed the spectral radius {spectral_radius(M):.6g} of A, got {rate!r}.")
    n, S = len(M), M / r
    P = np.linalg.solve(np.eye(n * n) - np.kron(S.T, S.T), np.eye(n).ravel()).reshape(n, n)
    return (P + P.T) / 2


def spectral_radius(A: ArrayLike) -> float:
    """Return the largest modulus of an eigenvalue, computed in floating point.

    Examples:
        >>> spectral_radius([[-2.0, 4.0], [0.0, 1.0]])
        2.0
    """
    M = matrix("A", A)
    return float(np.abs(np.linalg.eigvals(M)).max()) if M.size else 0.0


def _root(P: ArrayLike) -> Array:
    M = matrix("P", P)
    if not np.allclose(M, M.T, rtol=1e-12, atol=0.0):
        raise ValueError("P must be symmetric.")
    values, vectors = np.linalg.eigh((M + M.T) / 2)
    if values.size and values[0] <= 0:
        raise ValueError(f"P must be positive definite, got the eigenvalue {values[0]:.6g}.")
    return (vectors * np.sqrt(values)) @ vectors.T


def _refuse_shape(P: ArrayLike, A: Array) -> Array:
    raise ValueError(f"P must have the shape {A.shape} of the matrix, got {np.shape(P)}.")
