r"""T4, sensitivity to the data: growth of one stochastic step, and uniform stability of SGD when one of n samples is replaced.

G is the Lipschitz constant of the loss of a sample in the parameters, L its smoothness, m its strong convexity.
"""

from __future__ import annotations

from collections.abc import Iterable

from stableopt.linalg.bound import Real, upper
from stableopt.theory._arguments import exact_upper, joined, limit, listed, nonnegative, positive, real_sqrt

__all__ = [
    "accumulated_convex_stability",
    "accumulated_nonsmooth_displacement",
    "accumulated_stability",
    "convex_growth",
    "convex_stability",
    "nonconvex_growth",
    "nonconvex_stability",
    "nonsmooth_displacement",
    "nonsmooth_stability",
    "strongly_convex_growth",
    "strongly_convex_stability",
]


def convex_growth(lr: Real, smoothness: Real) -> Real:
    r"""Bound how one gradient step on a convex loss separates two runs: 1 up to :math:`\eta = 2/L`, then :math:`\eta L-1`.

    Args:
        lr: :math:`\eta \ge 0`.
        smoothness: L >= 0.

    Returns:
        The growth; a prox or projection after the step never adds to it. A Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Examples:
        >>> convex_growth(0.5, smoothness=4.0), convex_growth(1.0, smoothness=4.0)
        (1.0, 3.0)
    """
    return joined(1.0, nonnegative("lr", lr) * nonnegative("smoothness", smoothness) - 1.0)


def strongly_convex_growth(lr: Real, strong: Real, smoothness: Real) -> Real:
    r"""Bound one gradient step on a strongly convex loss: :math:`1-\eta\frac{Lm}{L+m}` for :math:`\eta \le \frac{2}{L+m}`.

    Args:
        lr: :math:`\eta`, at most :math:`2/(L+m)`.
        strong: m >= 0, at most L.
        smoothness: L > 0.

    Returns:
        The growth; a Bound if an operand is one. :func:`stableopt.theory.gradient_descent_factor` is sharper, and twice
        differentiability is not needed for either.

    Raises:
        ValueError: if an argument is out of range.

    References:
        Hardt, Recht and Singer, Train faster, generalize better, Lemma 3.7, 2016.

    Examples:
        >>> strongly_convex_growth(0.25, strong=1.0, smoothness=1.0)
        0.875
    """
    eta, m, L = nonnegative("lr", lr), nonnegative("strong", strong), positive("smoothness", smoothness)
    if upper(m) > upper(L):
        raise ValueError(f"strong cannot exceed smoothness, got {strong!r} > {smoothness!r}.")
    largest = limit(2, exact_upper(m) + exact_upper(L))
    if upper(eta) > largest * (1 + 1e-15):
        raise ValueError(f"lr must be at most 2 / (smoothness + strong) = {largest:.6g}, got {lr!r}.")
    return 1.0 - eta * m / (1.0 + m / L)


def nonconvex_growth(lr: Real, smoothness: Real) -> Real:
    r"""Bound one gradient step on any L-smooth loss: :math:`1+\eta L`.

    Args:
        lr: :math:`\eta \ge 0`.
        smoothness: L >= 0.

    Returns:
        The growth; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Examples:
        >>> nonconvex_growth(0.5, smoothness=4.0)
        3.0
    """
    return 1.0 + nonnegative("lr", lr) * nonnegative("smoothness", smoothness)


def convex_stability(lipschitz: Real, samples: int, lrs: Iterable[Real], smoothness: Real) -> Real:
    r"""Bound the uniform stability of SGD on convex losses: :math:`\varepsilon \le \frac{2G^2}{n}\sum_t\eta_t`.

    Args:
        lipschitz: G >= 0.
        samples: n >= 1.
        lrs: :math:`\eta_t`, one per step, each at most :math:`2/L`.
        smoothness: L >= 0.

    Returns:
        :math:`\varepsilon`, in units of the loss; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range or a learning rate exceeds 2/L.

    References:
        Hardt, Recht and Singer, Theorem 3.8, 2016.

    Examples:
        >>> convex_stability(1.0, samples=4, lrs=[0.5, 0.5], smoothness=4.0)
        0.5
    """
    largest = limit(2, exact_upper(nonnegative("smoothness", smoothness)))
    total: Real = 0.0
    for t, eta in enumerate(listed("lrs", lrs)):
        if upper(eta) > largest:
            raise ValueError(f"lrs[{t}] must be at most 2 / smoothness = {largest:.6g}, got {eta!r}.")
        total = total + eta
    return accumulated_stability(lipschitz, samples, total)


def accumulated_convex_stability(lipschitz: Real, samples: int, total: Real, largest: Real, smoothness: Real) -> Real:
    r"""Return :func:`convex_stability` from what a run needs to remember: the sum and the largest of its learning rates.

    Args:
        lipschitz: G >= 0.
        samples: n >= 1.
        total: :math:`\sum_t\eta_t \ge 0`.
        largest: :math:`\max_t\eta_t`, at most :math:`2/L`.
        smoothness: L >= 0.

    Returns:
        :math:`\varepsilon`, in units of the loss; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range or the largest learning rate exceeds 2/L.

    Examples:
        >>> accumulated_convex_stability(1.0, samples=4, total=1.0, largest=0.5, smoothness=4.0)
        0.5
    """
    allowed = limit(2, exact_upper(nonnegative("smoothness", smoothness)))
    if upper(nonnegative("largest", largest)) > allowed:
        raise ValueError(f"the largest lr must be at most 2 / smoothness = {allowed:.6g}, got {largest!r}.")
    return accumulated_stability(lipschitz, samples, total)


def accumulated_stability(lipschitz: Real, samples: int, drift: Real) -> Real:
    r"""Bound the uniform stability of SGD from its propagated learning rates: :math:`\varepsilon \le \frac{2G^2}{n}S_T`.

    :math:`S_{t+1} = \gamma_tS_t+\eta_t` from :math:`S_0 = 0`, with :math:`\gamma_t` a bound of the growth of step t
    (:func:`convex_growth`, :func:`strongly_convex_growth`, :func:`nonconvex_growth`). No learning rate is too large for it.

    Args:
        lipschitz: G >= 0.
        samples: n >= 1.
        drift: :math:`S_T \ge 0`; the sum of the learning rates if all growths are 1.

    Returns:
        :math:`\varepsilon`, in units of the loss; a Bound if an operand is one. Batches of any size, drawn uniformly.

    Raises:
        ValueError: if an argument is out of range.

    References:
        Hardt, Recht and Singer, Lemma 2.5, 2016. *Proof:* write
        :math:`\theta^+-\theta'^+ = [\theta-\eta\nabla f(\theta)-\theta'+\eta\nabla f(\theta')]-\eta[\nabla f(\theta')-\nabla
        f'(\theta')]`, f and f' the losses of the two batches. The first bracket is at most :math:`\gamma\|\theta-\theta'\|`, the
        second vanishes unless the replaced sample is drawn: with probability B/n, and then at most 2G/B. Take the mean.

    Examples:
        >>> accumulated_stability(2.0, samples=4, drift=0.5)
        1.0
    """
    return 2.0 * nonnegative("lipschitz", lipschitz) ** 2 * nonnegative("drift", drift) / _samples(samples)


def strongly_convex_stability(lipschitz: Real, samples: int, strong: Real) -> Real:
    r"""Bound the uniform stability of projected SGD on m-strongly convex losses: :math:`\varepsilon \le \frac{2G^2}{mn}`.

    Args:
        lipschitz: G >= 0 on the set projected on.
        samples: n >= 1.
        strong: m > 0.

    Returns:
        :math:`\varepsilon`, for any number of steps with a constant :math:`\eta \le 1/L`; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range.

    References:
        Hardt, Recht and Singer, Theorem 3.9, 2016.

    Examples:
        >>> strongly_convex_stability(1.0, samples=4, strong=0.5)
        1.0
    """
    return 2.0 * nonnegative("lipschitz", lipschitz) ** 2 / (positive("strong", strong) * _samples(samples))


def nonconvex_stability(lipschitz: Real, samples: int, smoothness: Real, decay: Real, steps: int) -> float:
    r"""Bound the uniform stability of SGD on losses in [0, 1] with :math:`\eta_t \le c/t`.

    :math:`\varepsilon \le \frac{1+1/(Lc)}{n-1}\,(2cG^2)^{\frac1{Lc+1}}\,T^{\frac{Lc}{Lc+1}}`.

    Args:
        lipschitz: G >= 0.
        samples: n >= 2.
        smoothness: L > 0.
        decay: c > 0.
        steps: T >= 1.

    Returns:
        :math:`\varepsilon` in floating point, at the upper ends of enclosures of G; other arguments enter at their
        upper ends too.

    Raises:
        ValueError: if an argument is out of range.

    References:
        Hardt, Recht and Singer, Theorem 3.12, 2016.

    Examples:
        >>> round(nonconvex_stability(1.0, samples=5, smoothness=1.0, decay=1.0, steps=2), 12)
        1.0
    """
    if samples < 2 or steps < 1:
        raise ValueError(f"nonconvex stability needs samples >= 2 and steps >= 1, got {samples} and {steps}.")
    G, L = upper(nonnegative("lipschitz", lipschitz)), upper(positive("smoothness", smoothness))
    c = upper(positive("decay", decay))
    power = 1.0 / (L * c + 1.0)
    return (1.0 + 1.0 / (L * c)) / (samples - 1) * (2 * c * G * G) ** power * steps ** (1.0 - power)


def nonsmooth_displacement(lipschitz: Real, samples: int, lrs: Iterable[Real]) -> Real:
    r"""Bound how far two runs of the subgradient method drift apart.

    :math:`\mathbb E\|\theta_T-\theta'_T\| \le 2G\sqrt{\textstyle\sum\eta_t^2}+\frac{4G}{n}\sum\eta_t`.

    Convex losses without smoothness, samples drawn with replacement, with or without projection.

    Args:
        lipschitz: G >= 0.
        samples: n >= 1.
        lrs: :math:`\eta_t \ge 0`, one per step.

    Returns:
        The bound, in units of the parameters; a Bound if an operand is one. The first term does not vanish with n.

    Raises:
        ValueError: if an argument is out of range.

    References:
        Bassily, Feldman, Guzman and Talwar, Stability of SGD on nonsmooth convex losses, 2020. *Proof:* monotone
        subgradients give |d+|^2 <= |d|^2 + 4 eta^2 G^2 + 4 eta G |d| [the replaced sample is drawn]; take the largest |d|.

    Examples:
        >>> nonsmooth_displacement(1.0, samples=4, lrs=[0.5, 0.5, 0.5, 0.5])
        4.0
    """
    total: Real = 0.0
    squares: Real = 0.0
    for eta in listed("lrs", lrs):
        total, squares = total + eta, squares + eta**2
    return accumulated_nonsmooth_displacement(lipschitz, samples, total, squares)


def accumulated_nonsmooth_displacement(lipschitz: Real, samples: int, total: Real, squares: Real) -> Real:
    r"""Return :func:`nonsmooth_displacement` from the sum and the sum of squares of the learning rates.

    Args:
        lipschitz: G >= 0.
        samples: n >= 1.
        total: :math:`\sum_t\eta_t \ge 0`.
        squares: :math:`\sum_t\eta_t^2 \ge 0`.

    Returns:
        The bound, in units of the parameters; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> accumulated_nonsmooth_displacement(1.0, samples=4, total=2.0, squares=1.0)
        4.0
    """
    total, squares = nonnegative("total", total), nonnegative("squares", squares)
    return nonnegative("lipschitz", lipschitz) * (2.0 * real_sqrt(squares) + 4.0 * total / _samples(samples))


def nonsmooth_stability(lipschitz: Real, samples: int, lrs: Iterable[Real]) -> Real:
    r"""Bound the uniform stability of the subgradient method: G times :func:`nonsmooth_displacement`.

    Args:
        lipschitz: G >= 0.
        samples: n >= 1.
        lrs: :math:`\eta_t \ge 0`, one per step.

    Returns:
        :math:`\varepsilon`, in units of the loss; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> nonsmooth_stability(2.0, samples=4, lrs=[0.5, 0.5, 0.5, 0.5])
        16.0
    """
    return nonnegative("lipschitz", lipschitz) * nonsmooth_displacement(lipschitz, samples, lrs)


def _samples(samples: int) -> float:
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    return float(samples)
